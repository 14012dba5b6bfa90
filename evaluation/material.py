"""What the metrics are computed from: the arrays of one generated set, and of the real one.

Legend: N images, K identities of the generated set; m images, M identities of the real one; D width of embeddings, F of
features; n of the images, those whose features are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.generated_set import GeneratedSet
from evaluation.metrics.identities import identity_centres
from evaluation.real_set import RealSet
from utils.distributed import seed_for


@dataclass
class Material:
    """A generated set, or the part of it that `rows` tells: labels without gaps, rows identity by identity."""

    source: GeneratedSet
    rows: np.ndarray  # (N,) int, in source.images
    labels: np.ndarray  # (N,) int
    names: list[str]  # (K,)
    embeddings: np.ndarray  # (N, D) float32 unit rows
    feature_rows: np.ndarray | None  # (n,) int, in `rows`; None: there are no features
    features: np.ndarray | None  # (n, F) float32
    matches: dict[int, int]  # identity => the real one that it was drawn from
    is_drawn: np.ndarray | None = None  # (n,) bool, of `feature_rows` those that the seed drew; None: all

    def select(self, kept: np.ndarray) -> Material:
        """The part that `kept` (N,) bool tells, which holds at least one image."""
        chosen = np.flatnonzero(kept)
        present, labels = np.unique(self.labels[chosen], return_inverse=True)
        features = feature_rows = is_drawn = None
        if self.feature_rows is not None:
            position = np.full(len(self.rows), -1)
            position[chosen] = np.arange(len(chosen))
            moved = position[self.feature_rows]
            feature_rows, features = moved[moved >= 0], self.features[moved >= 0]
            is_drawn = None if self.is_drawn is None else self.is_drawn[moved >= 0]
        return Material(
            source=self.source,
            rows=self.rows[chosen],
            labels=labels,
            names=[self.names[label] for label in present],
            embeddings=self.embeddings[chosen],
            feature_rows=feature_rows,
            features=features,
            matches={k: self.matches[label] for k, label in enumerate(present.tolist()) if label in self.matches},
            is_drawn=is_drawn,
        )

    @property
    def drawn_features(self) -> np.ndarray:
        """(n', F), a fair sample of the set's: without those of images that are there as matched ones alone."""
        return self.features if self.is_drawn is None else self.features[self.is_drawn]

    @property
    def files(self) -> list[str]:
        """(N,) what the set's reader calls each image."""
        return [self.source.images.names[row] for row in self.rows.tolist()]


@dataclass
class RealMaterial:
    """The real set."""

    source: RealSet
    embeddings: np.ndarray  # (m, D) float32 unit rows
    centres: np.ndarray  # (M, D) float32 unit rows
    feature_rows: np.ndarray | None  # (n,) int, in the real images
    features: np.ndarray | None  # (n, F)
    is_drawn: np.ndarray | None = None  # (n,) bool, as in Material

    @classmethod
    def of(
        cls,
        source: RealSet,
        embeddings: np.ndarray,
        feature_rows: np.ndarray | None,
        features: np.ndarray | None,
        is_drawn: np.ndarray | None = None,
    ) -> RealMaterial:
        """With the centres of the identities."""
        centres = identity_centres(embeddings, source.images.labels, len(source.images.identities))
        return cls(source, embeddings, centres, feature_rows, features, is_drawn)

    @property
    def drawn_features(self) -> np.ndarray:
        """(n', F), as in Material."""
        return self.features if self.is_drawn is None else self.features[self.is_drawn]

    @property
    def labels(self) -> np.ndarray:
        """(m,) int."""
        return self.source.images.labels

    @property
    def names(self) -> list[str]:
        """(M,)"""
        return self.source.images.identities


def rows_for_features(
    labels: np.ndarray, identities: np.ndarray, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Whose features are computed, ascending: `count` images drawn by `seed`, and all of `identities`.

    labels: (N,) int. Returns rows (n,), and which of them were drawn, bool (n,): the others are no fair sample.
    """
    drawn = np.arange(len(labels))
    if len(labels) > count:
        drawn = np.random.default_rng(seed_for(seed, "features")).choice(len(labels), count, replace=False)
    rows = np.union1d(drawn, np.flatnonzero(np.isin(labels, identities)))
    return rows, np.isin(rows, drawn)
