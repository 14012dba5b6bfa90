"""Several sets of images read as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.data.formats.labelled import EncodedImages


class JoinedImages(EncodedImages):
    """The images of several sets, one set after the other; names begin with that of their set."""

    format = "several sets"

    def __init__(self, sets: Sequence[EncodedImages], names: Sequence[str]) -> None:
        """`names`: what the sets are called, one each. UserError where a name would lead out of its set."""
        self.sets = list(sets)
        self.starts = np.cumsum([0, *(len(part) for part in self.sets)])
        inside = [f"{name}/{image}" for name, part in zip(names, self.sets, strict=True) for image in part.names]
        super().__init__(" + ".join(str(part.path) for part in self.sets), inside)

    def encoded(self, index: int) -> bytes:
        part, row = self._find(index)
        return part.encoded(row)

    def describe(self, index: int) -> str:
        part, row = self._find(index)
        return part.describe(row)

    def _find(self, index: int) -> tuple[EncodedImages, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sets[number], int(index - self.starts[number])
