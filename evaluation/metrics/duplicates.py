"""Near copies: images of a set whose embeddings nearly coincide, within an identity and across identities.

Legend: N images, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.metrics.labelled import check_labelled

BLOCK = 4096  # rows and columns at once: 64 MiB of float32 cosines


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
    for first in range(0, len(labels), BLOCK):
        earlier = embeddings[first : first + BLOCK]
        for start in range(first, len(labels), BLOCK):
            cosines = embeddings[start : start + BLOCK] @ earlier.T
            _note(within, across, labels, np.argwhere(cosines > cosine) + np.array([start, first]))
    return Duplicates(within, across, cosine)


def _note(within: np.ndarray, across: np.ndarray, labels: np.ndarray, pairs: np.ndarray) -> None:
    """Enter the pairs (n, 2) of an image and an earlier one, sorted by both, where an image has no original yet."""
    images, originals = pairs[pairs[:, 1] < pairs[:, 0]].T
    is_own = labels[images] == labels[originals]
    for found, chosen in ((within, is_own), (across, ~is_own)):
        copies, firsts = np.unique(images[chosen], return_index=True)
        is_new = found[copies] < 0  # earlier columns came first
        found[copies[is_new]] = originals[chosen][firsts][is_new]
