"""Cosines between sets of unit vectors, a chunk at a time: nearest neighbours, and the cosine of a false match rate.

Legend: n rows, m references, D width. Rows have length 1, so that a cosine is a dot product.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.config import UserError

ROWS_AT_ONCE = 1024
REFERENCES_AT_ONCE = 8192  # with ROWS_AT_ONCE 32 MiB of float32 cosines
# Impostor pairs of so many images, 200 million, are all looked at; of a larger set a seeded draw of so many images.
CALIBRATION_IMAGES = 20_000


def nearest_cosines(rows: np.ndarray, references: np.ndarray, *, skip_own: bool = False) -> np.ndarray:
    """The highest cosine of each row (n, D) with any reference (m, D): (n,), -1 where there is none.

    As nearest_neighbours, which also tells which it was.
    """
    return nearest_neighbours(rows, references, skip_own=skip_own)[0]


def nearest_neighbours(
    rows: np.ndarray, references: np.ndarray, *, skip_own: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The highest cosine of each row (n, D) with any reference (m, D), and that reference (the first of equals).

    (n,) each; -1 and -1 where there is none. Computed in the type of the rows; float32 is off by 1e-6 at most, and
    twice as fast as float64.

    skip_own: the rows are the first n references, and row i is not compared with reference i.
    """
    nearest, which = np.full(len(rows), -np.inf, rows.dtype), np.full(len(rows), -1, np.int64)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        chunk = rows[start : start + ROWS_AT_ONCE]
        at = np.arange(len(chunk))
        for first in range(0, len(references), REFERENCES_AT_ONCE):
            cosines = chunk @ references[first : first + REFERENCES_AT_ONCE].astype(rows.dtype, copy=False).T
            if skip_own:
                own = start + at - first
                inside = (own >= 0) & (own < cosines.shape[1])
                cosines[np.flatnonzero(inside), own[inside]] = -np.inf
            best = cosines.argmax(axis=1)
            is_nearer = cosines[at, best] > nearest[start : start + len(chunk)]
            nearest[start : start + len(chunk)][is_nearer] = cosines[at, best][is_nearer]
            which[start : start + len(chunk)][is_nearer] = first + best[is_nearer]
    nearest[which < 0] = -1.0
    return nearest, which


def sum_by_label(rows: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The sum of the rows (n, D) of every label, float64 (count, D); labels: (n,) in 0..count - 1, in any order."""
    order = np.argsort(labels, kind="stable")
    sums = np.zeros((count, rows.shape[1]))
    for start in range(0, len(order), REFERENCES_AT_ONCE):
        part = order[start : start + REFERENCES_AT_ONCE]
        found = labels[part]
        firsts = np.flatnonzero(np.append(True, found[1:] != found[:-1]))
        sums[found[firsts]] += np.add.reduceat(rows[part], firsts, axis=0, dtype=np.float64)
    return sums


@dataclass(frozen=True)
class MatchThreshold:
    """The cosine that impostor pairs exceed at a stated rate, and what it was measured on."""

    cosine: float
    fmr: float  # false match rate
    images: int
    impostor_pairs: int
    is_sample: bool  # of a larger set


def cosine_at_fmr(
    identities: Sequence[str],
    embeddings: np.ndarray,
    fmr: float,
    *,
    seed: int = 0,
    max_images: int = CALIBRATION_IMAGES,
) -> MatchThreshold:
    """The lowest cosine that at most the share `fmr` of impostor pairs exceeds: where FMR100 and FMR1000 are read off.

    Impostor pairs are all pairs of images (rows of embeddings (n, D), unit) of different identities. Exact up to
    `max_images` images; of more, so many are drawn with `seed`. Raises UserError where there are too few impostor pairs
    for the rate to mean anything: fewer than 1 / fmr.
    """
    if not 0 < fmr < 1:
        raise UserError(f"fmr: {fmr}; a false match rate lies between 0 and 1, such as 0.001")
    is_sample = len(embeddings) > max_images
    labels = np.unique(np.asarray(identities), return_inverse=True)[1]
    if is_sample:
        chosen = np.sort(np.random.default_rng(seed).choice(len(embeddings), max_images, replace=False))
        labels, embeddings = labels[chosen], embeddings[chosen]
    sizes = np.bincount(labels)
    pairs = (len(labels) ** 2 - int(np.square(sizes).sum())) // 2
    if pairs * fmr < 1:
        raise UserError(
            f"fmr: {fmr:g} is less than one of the {pairs} impostor pairs of {len(labels)} images of "
            f"{np.count_nonzero(sizes)} identities; give a larger set, labelled by folder (<identity>/<image>)"
        )
    kept = int(fmr * pairs) + 1  # the last of the kept cosines is the threshold
    highest = np.empty(0, embeddings.dtype)
    for start in range(0, len(labels), ROWS_AT_ONCE):
        chunk, others = embeddings[start : start + ROWS_AT_ONCE], embeddings[start:]
        is_impostor = labels[start : start + len(chunk), None] != labels[None, start:]
        is_impostor &= np.arange(len(chunk))[:, None] < np.arange(len(others))  # each pair once
        cosines = (chunk @ others.T)[is_impostor]
        if len(highest) == kept:
            cosines = cosines[cosines > highest.min()]
        highest = np.concatenate([highest, cosines])
        if len(highest) > kept:
            highest = np.partition(highest, len(highest) - kept)[-kept:]
    return MatchThreshold(float(highest.min()), fmr, len(labels), pairs, is_sample)
