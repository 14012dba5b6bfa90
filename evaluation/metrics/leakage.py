"""Leakage: how near generated identities and images come to those of the training set.

Legend: K generated, M training identities, N images, D width. Rows are unit vectors, nearness is the cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.metrics.identities import RADIUS
from evaluation.metrics.labelled import check_labelled, check_unit_rows, group_rows
from utils.similarity import nearest_neighbours


@dataclass(frozen=True)
class Leakage:
    """The nearest training identity of every generated one, beside the same figure between real identities."""

    cosines: np.ndarray  # (K,) cosine of the centres
    nearest: np.ndarray  # (K,) int, which training identity
    real_cosines: np.ndarray  # (M,) of every training identity to the nearest other one; -1 where there is only one
    real_nearest: np.ndarray  # (M,) int, which; -1 where there is only one
    r: float  # cosine distance under which two centres are taken for one person

    def metrics(self) -> dict[str, float | int | None]:
        """By the keys of evaluation.definitions."""
        has_others = len(self.real_cosines) > 1
        return {
            "leakage_mean": float(self.cosines.mean()),
            "leakage_max": float(self.cosines.max()),
            "leakage_share": float((1 - self.cosines.astype(np.float64) < self.r).mean()),
            "leakage_real_mean": float(self.real_cosines.mean()) if has_others else None,
            "leakage_real_max": float(self.real_cosines.max()) if has_others else None,
            "leakage_real_share": float((1 - self.real_cosines.astype(np.float64) < self.r).mean())
            if has_others
            else None,
        }


def leakage(centres: np.ndarray, training_centres: np.ndarray, r: float = RADIUS) -> Leakage:
    """For each generated centre (K, D) the nearest of the training centres (M, D), all of them compared.

    r: cosine distance of the embedder within which two are one person. Raises ValueError for rows that are not unit
    vectors and where there are none.
    """
    for name, rows in (("centres", centres), ("training_centres", training_centres)):
        check_unit_rows(rows, name)
        if not len(rows):
            raise ValueError(f"{name}: there are none")
    cosines, nearest = nearest_neighbours(centres, training_centres)
    real_cosines, real_nearest = nearest_neighbours(training_centres, training_centres, skip_own=True)
    return Leakage(cosines, nearest, real_cosines, real_nearest, r)


def nearest_images(
    embeddings: np.ndarray, labels: np.ndarray, training_embeddings: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `count` generated images most like a training image, one an identity, most alike first.

    embeddings: (N, D); labels: (N,); training_embeddings: (m, D). All are compared: N m D multiplications. Returns rows
    of the generated images, rows of the training images, and cosines, at most (count,) each.
    """
    check_labelled(embeddings, labels)
    check_unit_rows(training_embeddings, "training_embeddings")
    cosines, nearest = nearest_neighbours(embeddings, training_embeddings)
    groups = group_rows(labels)
    best = np.array([groups[k][cosines[groups[k]].argmax()] for k in np.flatnonzero(groups.sizes)], np.int64)
    best = best[np.argsort(-cosines[best], kind="stable")[:count]]
    return best, nearest[best], cosines[best]
