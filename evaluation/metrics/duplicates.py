"""Near copies: images of a set whose embeddings nearly coincide, within an identity and across identities.

All pairs are compared, most of them by a bound: with a row x cut into its coordinates x1 along a few principal
directions and the rest x2, x y <= x1 y1 + |x2| |y2| (Cauchy and Schwarz). Where the bound lies under the limit the
cosine does, too; only rows in which it does not are multiplied out.

Legend: N images, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.metrics.labelled import check_labelled

BLOCK = 1024  # rows and columns at once: 4 MiB of float32 cosines, which stay in the cache
DIRECTIONS = 63  # with the length of the rest 64 columns instead of D
SAMPLE = 16_384  # rows that the directions are found from; any directions are right, these are quick
ROUNDING = 1e-5  # of a bound in float32; a tenth of it at most in a squared length


@dataclass(frozen=True)
class Duplicates:
    """Which images are copies of an earlier one; -1 where an image is none."""

    within: np.ndarray  # (N,) int, the first earlier image of the same identity
    across: np.ndarray  # (N,) int, the first earlier image of another identity
    cosine: float  # above which two images are copies

    @property
    def duplicate_of(self) -> np.ndarray:
        """(N,) int, the first image, of whatever identity, that each is a copy of, -1 where it is none."""
        first = np.minimum(self.within, self.across)
        return np.where(first < 0, np.maximum(self.within, self.across), first)

    def metrics(self) -> dict[str, float | int | None]:
        """By the keys of evaluation.definitions: shares of the images."""
        count = max(1, len(self.within))
        return {
            "duplicates_within": float(np.count_nonzero(self.within >= 0) / count),
            "duplicates_across": float(np.count_nonzero(self.across >= 0) / count),
        }


def find_duplicates(embeddings: np.ndarray, labels: np.ndarray, cosine: float) -> Duplicates:
    """Compare all pairs of unit embeddings (N, D), labels (N,): copies have a cosine above `cosine`.

    Which of two is the copy goes by the order of the rows. Raises ValueError for other input, and for a cosine outside
    (0, 1).
    """
    check_labelled(embeddings, labels)
    if not 0 < cosine < 1:
        raise ValueError(f"cosine: {cosine}; it lies between 0 and 1, such as 0.98")
    within, across = np.full(len(labels), -1), np.full(len(labels), -1)
    bounding = _bounding(embeddings)
    for first in range(0, len(labels), BLOCK):
        earlier = slice(first, first + BLOCK)
        for start in range(first, len(labels), BLOCK):
            bound = bounding[start : start + BLOCK] @ bounding[earlier].T
            rows = start + np.flatnonzero(bound.max(axis=1) > cosine - ROUNDING)
            if len(rows):
                found = np.argwhere(embeddings[rows] @ embeddings[earlier].T > cosine)
                _note(within, across, labels, rows[found[:, 0]], first + found[:, 1])
    return Duplicates(within, across, cosine)


def _bounding(embeddings: np.ndarray) -> np.ndarray:
    """(N, DIRECTIONS + 1) rows, whose products are no less than the cosines of the unit embeddings (N, D)."""
    sample = embeddings[:: len(embeddings) // SAMPLE + 1]
    directions = np.linalg.eigh(sample.T @ sample)[1][:, -DIRECTIONS:]  # (D, m), those of the largest values
    along = embeddings @ directions
    rest = np.einsum("nd,nd->n", embeddings, embeddings) - np.einsum("nm,nm->n", along, along)
    rest = np.sqrt(np.maximum(rest, 0) + ROUNDING / 10)  # rounded up, where little is left too
    return np.column_stack([along, rest])


def _note(
    within: np.ndarray, across: np.ndarray, labels: np.ndarray, images: np.ndarray, originals: np.ndarray
) -> None:
    """Enter pairs (n,) of an image and one to compare, sorted by both, where an image has no original yet."""
    is_earlier = originals < images
    images, originals = images[is_earlier], originals[is_earlier]
    is_own = labels[images] == labels[originals]
    for found, chosen in ((within, is_own), (across, ~is_own)):
        copies, firsts = np.unique(images[chosen], return_index=True)
        is_new = found[copies] < 0  # earlier originals came first
        found[copies[is_new]] = originals[chosen][firsts][is_new]
