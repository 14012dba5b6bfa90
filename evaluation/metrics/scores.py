"""Genuine and impostor scores of a data set, and what they say: EER, FMR100, FMR1000, FDR, ROC.

A score is the cosine of two embeddings; a pair is taken for one person where it lies at or above a threshold. FMR is
the share of impostor pairs (two identities) so taken, FNMR that of genuine pairs (one identity) that are not.

Legend: N images, D width.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from evaluation.metrics.labelled import check_labelled, group_rows
from recognition.verification import ROC_POINTS, equal_error_rate
from utils.similarity import ROWS_AT_ONCE

PAIRS_AT_ONCE = 512  # at D = 512 two blocks of 1 MiB, which stay in the cache
RESOLUTION = 1e-9  # a rate times a count may miss a whole number by rounding


@dataclass(frozen=True)
class ScoreSummary:
    """What the scores say; None where there are too few pairs to say it."""

    num_genuine: int
    num_impostor: int
    genuine_mean: float | None
    impostor_mean: float | None
    eer: float | None  # where FMR = FNMR
    fmr100: float | None  # lowest FNMR at FMR <= 1 %
    fmr1000: float | None  # lowest FNMR at FMR <= 0.1 %
    fdr: float | None  # Fisher discriminant ratio
    fmr1000_cosine: float | None  # pairs above it are one person at FMR <= 0.1 %: 1 - it is the embedder's own r
    roc: tuple[np.ndarray, np.ndarray] | None  # false and true match rates (points,), ascending, thinned

    def metrics(self) -> dict[str, float | int | None]:
        """By the keys of evaluation.definitions."""
        return {name: value for name, value in vars(self).items() if name != "roc"}


def genuine_scores(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of images of one identity, float32 (pairs,), identity by identity.

    embeddings: (N, D) unit rows in any order; labels: (N,) whole numbers from 0. Raises ValueError for other input.
    """
    check_labelled(embeddings, labels)
    groups = group_rows(labels)
    sizes = groups.sizes
    scores = np.empty(int((sizes * (sizes - 1) // 2).sum()), np.float32)
    filled = 0
    for identity in np.flatnonzero(sizes > 1):
        rows = embeddings[groups[identity]]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            cosines = rows[start : start + ROWS_AT_ONCE] @ rows[start:].T
            found = cosines[~np.tri(*cosines.shape, dtype=bool)]  # above the diagonal: each pair once
            scores[filled : filled + len(found)] = found
            filled += len(found)
    return scores


def impostor_pairs(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (count,), twice, of `count` different pairs of images of two identities, any set of so many as likely.

    All of the pairs where there are no more than `count`. The draw depends on (labels, count, seed) alone.
    """
    groups = group_rows(labels)
    ends = np.repeat(groups.bounds[1:], groups.sizes)  # (N,) where the identity of a row ends, in sorted order
    behind = np.cumsum(len(ends) - ends)  # a row is paired with all behind its identity: every pair once, and numbered
    total = int(behind[-1]) if len(behind) else 0
    generator = np.random.default_rng(seed)
    if total <= count:
        chosen = np.arange(total)
    elif total <= 2 * count:
        chosen = np.sort(generator.permutation(total)[:count])
    else:
        chosen = np.empty(0, np.int64)
        while len(chosen) < count:  # what was drawn twice is drawn anew
            more = generator.integers(total, size=count - len(chosen))
            chosen = np.sort(np.concatenate([chosen, more]))  # np.unique hashes first, which takes 100 times as long
            chosen = chosen[np.append(True, chosen[1:] != chosen[:-1])]
    first = np.searchsorted(behind, chosen, side="right")
    second = len(ends) - (behind[first] - chosen)
    return groups.order[first], groups.order[second]


def impostor_scores(embeddings: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Cosines of `count` pairs of images of two identities, drawn by `seed` (see impostor_pairs): float32 (count,).

    embeddings: (N, D) unit rows in any order; labels: (N,) whole numbers from 0. Raises ValueError for other input.
    """
    check_labelled(embeddings, labels)
    first, second = impostor_pairs(labels, count, seed)
    scores = np.empty(len(first), np.float32)
    for start in range(0, len(scores), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        scores[part] = np.einsum("nd,nd->n", embeddings[first[part]], embeddings[second[part]])
    return scores


def score_summary(genuine: np.ndarray, impostor: np.ndarray) -> ScoreSummary:
    """EER, FMR100, FMR1000 (ISO/IEC 19795-1) and FDR (mu_g - mu_i)^2 / (sigma_g^2 + sigma_i^2) of cosines.

    genuine, impostor: (pairs,) each. The rates are exact: every distinct score is a threshold. A rate that the impostor
    pairs do not resolve (FMR100 of fewer than 100) is None, and so is all that needs a kind of pair that is missing.
    """
    if not (len(genuine) and len(impostor)):
        means = [float(scores.mean(dtype=np.float64)) if len(scores) else None for scores in (genuine, impostor)]
        return ScoreSummary(len(genuine), len(impostor), *means, *[None] * 6)
    genuine, impostor = np.sort(genuine), np.sort(impostor)
    (mean_g, variance_g), (mean_i, variance_i) = _moments(genuine), _moments(impostor)
    spread = variance_g + variance_i
    allowed = {level: int(level * len(impostor) + RESOLUTION) for level in (1e-2, 1e-3)}  # false matches
    fnmr = {
        level: float(1 - match_rates(genuine, impostor, np.array([count]))[1][0]) if count else None
        for level, count in allowed.items()
    }
    return ScoreSummary(
        num_genuine=len(genuine),
        num_impostor=len(impostor),
        genuine_mean=mean_g,
        impostor_mean=mean_i,
        eer=_equal_error_rate(genuine, impostor),
        fmr100=fnmr[1e-2],
        fmr1000=fnmr[1e-3],
        fdr=(mean_g - mean_i) ** 2 / spread if spread else None,
        fmr1000_cosine=float(impostor[-1 - allowed[1e-3]]) if allowed[1e-3] else None,
        roc=_thin_roc(genuine, impostor),
    )


def match_rates(genuine: np.ndarray, impostor: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true match rates (points,) where at most `allowed` (points,) impostor pairs are false matches.

    genuine, impostor: scores, ascending. The true match rate is the highest there is under that limit.
    """
    last = len(impostor) - 1 - np.asarray(allowed)  # the best of the scores that have to be refused
    limits = np.where(last >= 0, impostor[np.maximum(last, 0)], -np.inf)
    false, true = (
        (len(scores) - np.searchsorted(scores, limits, side="right")) / len(scores) for scores in (impostor, genuine)
    )
    return false, true


def _moments(scores: np.ndarray) -> tuple[float, float]:
    """Mean and variance (ddof 0), computed in float64."""
    return float(scores.mean(dtype=np.float64)), float(scores.var(dtype=np.float64))


def _equal_error_rate(genuine: np.ndarray, impostor: np.ndarray) -> float:
    """The rate between the two points of the ROC around FMR = FNMR; scores ascending.

    As the threshold falls, FMR - FNMR rises: the crossing is found by bisection, without the ROC's other points.
    """

    def rates(threshold: float) -> tuple[float, float]:
        false, true = ((len(s) - np.searchsorted(s, threshold, side="left")) / len(s) for s in (impostor, genuine))
        return false, true

    def crossed(threshold: float) -> bool:
        false, true = rates(threshold)
        return false >= 1 - true

    # The first score of each kind at which the rates have crossed; at the lowest of a kind they always have.
    found = [
        scores[-1 - bisect_left(range(len(scores)), True, key=lambda i, s=scores: crossed(s[-1 - i]))]
        for scores in (genuine, impostor)
    ]
    at = max(found)
    above = [
        scores[position]
        for scores in (genuine, impostor)
        if (position := np.searchsorted(scores, at, "right")) < len(scores)
    ]
    before = rates(min(above)) if above else (0.0, 0.0)
    return equal_error_rate(*np.array([before, rates(at)]).T)


def _thin_roc(genuine: np.ndarray, impostor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of the ROC evenly spread over the logarithm of the false match rate; scores ascending."""
    counts = np.geomspace(1, len(impostor), ROC_POINTS).round().astype(np.int64)
    false, true = match_rates(genuine, impostor, np.unique(np.append(0, counts)))
    kept = np.append(True, false[1:] > false[:-1])  # ties of impostor scores: one point
    return false[kept], true[kept]
