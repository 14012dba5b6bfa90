"""Some of the images of a labelled set, as a set of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.data.formats.labelled import LabelledImages


class SelectedImages(LabelledImages):
    """The images `rows` (n,) of another set, in that order, under their names there; identities without any are left
    out and the others keep their order."""

    def __init__(self, images: LabelledImages, rows: np.ndarray | Sequence[int]) -> None:
        self.images, self.rows = images, np.asarray(rows, np.int64)
        self.format = images.format
        present, labels = np.unique(images.labels[self.rows], return_inverse=True)
        names = [images.names[row] for row in self.rows.tolist()]
        super().__init__(images.path, names, [images.identities[label] for label in present], labels)

    def encoded(self, index: int) -> bytes:
        return self.images.encoded(int(self.rows[index]))

    def pixels(self, index: int) -> np.ndarray:
        return self.images.pixels(int(self.rows[index]))

    def digest(self, index: int) -> bytes:
        return self.images.digest(int(self.rows[index]))

    def describe(self, index: int) -> str:
        return self.images.describe(int(self.rows[index]))
