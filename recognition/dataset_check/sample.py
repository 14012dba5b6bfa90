"""Which images of a training set are looked at, read as `utils.data.formats.check` reads a set.

Legend: n images of the set, K identities, m images that are looked at.
"""

from __future__ import annotations

import numpy as np

from recognition.datasets import TrainingSet
from utils.data.formats.joined import JoinedImages
from utils.data.formats.labelled import LabelledImages

TOGETHER = 8  # images of one identity that are taken before the next one's: labels show in images of one person


class ChosenImages(LabelledImages):
    """Some images of a training set, in any format, by their numbers (m,) in it."""

    def __init__(self, source: TrainingSet, chosen: np.ndarray) -> None:
        self.source, self.rows = source.images, source.rows[chosen]
        names = [source.images.names[row] for row in self.rows.tolist()]
        super().__init__(source.images.path, names, source.identities, source.labels[chosen])
        self.format = source.images.format

    def encoded(self, index: int) -> bytes:
        return self.source.encoded(int(self.rows[index]))

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.rows[index]))


def single_sets(source: TrainingSet) -> list[TrainingSet]:
    """The sets that a training set was joined from, or itself: faults of one would drown in the others."""
    if not isinstance(source.images, JoinedImages):
        return [source]
    sets = []
    for images, start, part in zip(source.images.sets, source.images.starts, source.parts, strict=False):
        present, labels = np.unique(source.labels[part.start : part.stop], return_inverse=True)
        identities = [source.identities[label] for label in present.tolist()]
        sets.append(TrainingSet(images, source.rows[part.start : part.stop] - start, labels, identities))
    return sets


def choose(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """`count` numbers of images, ascending: up to TOGETHER of each identity, identities at random; more of each where
    the identities run out. `labels` (n,) int; all n where there are no more.
    """
    if count >= len(labels):
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]  # by identity, at random within
    grouped = labels[order]
    within = np.arange(len(order)) - np.searchsorted(grouped, grouped)  # 0, 1, ... among those of the identity
    turn = rng.permutation(int(labels.max()) + 1)[grouped]  # of the identity
    taken = np.lexsort((within, turn, within // TOGETHER))[:count]
    return np.sort(order[taken])
