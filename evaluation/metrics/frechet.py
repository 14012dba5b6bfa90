"""The Frechet distance of two sets of features as Gaussians (FID; Heusel et al., NeurIPS 2017).

Legend: n rows, F width of the features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class FeatureStatistics:
    """Mean and covariance of features that come in batches, in float64; parts of several processes are merged."""

    width: int
    count: int = 0
    mean: np.ndarray = field(init=False)  # (F,)
    scatter: np.ndarray = field(init=False)  # (F, F) sum of the outer products of deviations from the mean

    def __post_init__(self) -> None:
        self.mean, self.scatter = np.zeros(self.width), np.zeros((self.width, self.width))

    def update(self, features: np.ndarray) -> None:
        """Take in a batch (n, F). Raises ValueError for another width and values that are not finite."""
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"features {features.shape}: (n, {self.width}) are wanted")
        if not len(features):
            return
        batch = FeatureStatistics(self.width, len(features))
        batch.mean = features.mean(axis=0)
        if not np.isfinite(batch.mean).all():
            raise ValueError(f"features: not all of {len(features)} rows are finite")
        deviations = features - batch.mean
        batch.scatter = deviations.T @ deviations
        self.merge(batch)

    def merge(self, other: FeatureStatistics) -> None:
        """Take in what another has seen (Chan, Golub & LeVeque, 1979)."""
        if other.width != self.width:
            raise ValueError(f"statistics of width {other.width} and {self.width} cannot be merged")
        total = self.count + other.count
        if not total:
            return
        difference = other.mean - self.mean
        self.scatter += other.scatter + np.outer(difference, difference) * (self.count * other.count / total)
        self.mean = self.mean + difference * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """(F, F), ddof 1. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"features: a covariance needs 2 images or more, there are {self.count}")
        return self.scatter / (self.count - 1)


def statistics_of(features: np.ndarray, rows_at_once: int = 8192) -> FeatureStatistics:
    """The statistics of features (n, F) that are at hand, a chunk at a time."""
    statistics = FeatureStatistics(features.shape[1])
    for start in range(0, len(features), rows_at_once):
        statistics.update(features[start : start + rows_at_once])
    return statistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2), at least 0 (Heusel et al., 2017, equation 6).

    The trace of the root is the sum of the roots of the eigenvalues of S_a^1/2 S_b S_a^1/2, which is symmetric: no
    complex numbers arise where a covariance is singular, as it is of fewer images than F + 1.
    """
    covariance_a, covariance_b = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariance_b @ root)
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(np.maximum(product, 0)).sum()
    return max(0.0, float(np.square(a.mean - b.mean).sum() + trace))
