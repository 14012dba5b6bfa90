"""Improved precision and recall (Kynkaanniemi et al., NeurIPS 2019), by exact k-nearest-neighbour balls.

Distances are Euclidean, computed in the type of the features a chunk of rows at a time. |a - b|^2 is taken apart into
|a|^2 + |b|^2 - 2 a b, less exact the farther the features lie from the origin: precision_recall centres them first.

Legend: n rows, m balls, F width of the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

DISTANCES_AT_ONCE = 2**24  # 64 MiB of float32


@dataclass(frozen=True)
class PrecisionRecall:
    """How much of the generated set looks real, and how much of the real one is covered."""

    precision: float  # share of generated images inside the balls of real ones
    recall: float  # share of real images inside the balls of generated ones
    k: int
    num_real: int
    num_generated: int

    def metrics(self) -> dict[str, float | int | None]:
        """By the keys of evaluation.definitions."""
        return {"precision": self.precision, "recall": self.recall}


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al., 2019, equations 1 and 2).

    real (n, F), generated (m, F): features of Inception's pool by the definition; k: 10 in UIFace, 3 in the paper.
    Raises ValueError where a set has no more than k images, or widths differ.
    """
    _check_widths(real, generated)
    centre = real.mean(axis=0, dtype=np.float64).astype(real.dtype)
    real, generated = real - centre, generated - centre
    real_radii, generated_radii = ball_radii(real, k), ball_radii(generated, k)
    is_covered = np.zeros(len(real), bool)
    looks_real = 0
    for start, squared in _squared_distances(generated, real):
        looks_real += int((squared <= np.square(real_radii)).any(axis=1).sum())
        own = generated_radii[start : start + len(squared), None]
        is_covered |= (squared <= np.square(own)).any(axis=0)
    return PrecisionRecall(looks_real / len(generated), float(is_covered.mean()), k, len(real), len(generated))


def ball_radii(features: np.ndarray, k: int) -> np.ndarray:
    """The distance of each row (m, F) to its k-th nearest other row, (m,). Raises ValueError for m <= k and k < 1."""
    if not 1 <= k < len(features):
        raise ValueError(f"k: {k}; it lies in 1..{len(features) - 1}, for {len(features)} images")
    radii = np.empty(len(features), features.dtype)
    for start, squared in _squared_distances(features, features):
        at = np.arange(len(squared))
        squared[at, start + at] = np.inf  # not its own neighbour, however many copies it has
        radii[start : start + len(squared)] = np.sqrt(np.partition(squared, k - 1, axis=1)[:, k - 1])
    return radii


def within_balls(rows: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Whether each row (n, F) lies inside any ball, border and all: bool (n,). centres: (m, F); radii: (m,)."""
    inside = np.empty(len(rows), bool)
    for start, squared in _squared_distances(rows, centres):
        inside[start : start + len(squared)] = (squared <= np.square(radii)).any(axis=1)
    return inside


def _check_widths(rows: np.ndarray, others: np.ndarray) -> None:
    if rows.ndim != 2 or others.ndim != 2 or rows.shape[1] != others.shape[1]:
        raise ValueError(f"features {rows.shape} and {others.shape}: two sets of rows of one width are wanted")


def _squared_distances(rows: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of the first row of a chunk, and its squared distances to all others, (rows of it, m)."""
    _check_widths(rows, others)
    lengths = np.einsum("nf,nf->n", others, others)
    step = max(1, DISTANCES_AT_ONCE // max(1, len(others)))
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        squared = chunk @ others.T
        squared *= -2
        squared += np.einsum("nf,nf->n", chunk, chunk)[:, None]
        squared += lengths
        yield start, np.maximum(squared, 0, out=squared)
