"""Embeddings of a set, written in parts as they are made: a test that was killed goes on with the part it was at.

Parts and their batches do not depend on the number of processes, and so neither do the numbers.
Legend: m images, D width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import read_json, write_atomically, write_json
from utils.data.formats.labelled import EncodedImages

Reader = Callable[[], np.ndarray]

PART_SIZE = 512
DESCRIPTION = "embeddings.json"


class EmbeddingStore:
    """The embeddings of one set by one network, in files of `folder`."""

    def __init__(self, folder: str | Path, images: EncodedImages, description: Mapping[str, Any]) -> None:
        """`description`: JSON values that the embeddings depend on; files of another description are not used.

        Every process makes one and calls `fill`.
        """
        self.folder, self.images = Path(folder), images
        self.description = {**description, "images": len(images), "part_size": PART_SIZE}
        self._files = [self.folder / f"{start:08d}.npy" for start in range(0, len(images), PART_SIZE)]

    def fill(self, embed: Callable[[list[Reader]], np.ndarray], progress: str) -> None:
        """Compute what is not there yet, shared out among the processes.

        embed: functions that give one image uint8 (H, W, 3) each, in order => their rows float32 (count, D).
        """
        claim = self.folder / DESCRIPTION
        if distributed.is_main() and not (claim.is_file() and read_json(claim) == self.description):
            shutil.rmtree(self.folder, ignore_errors=True)
            write_json(claim, self.description)
        distributed.barrier()
        todo = [number for number, file in enumerate(self._files) if not file.exists()]
        distributed.barrier()  # all have looked before one writes: they must share out the same list
        mine = distributed.share(todo)
        parts = {number: range(len(self.images))[number * PART_SIZE :][:PART_SIZE] for number in mine}
        with tqdm(
            total=sum(map(len, parts.values())),
            desc=progress,
            unit="image",
            disable=not (distributed.is_main() and parts),
        ) as bar:
            for number, part in parts.items():
                rows = embed([partial(self.images.pixels, index) for index in part])
                _save(self._files[number], rows)
                bar.update(len(part))
        distributed.barrier()

    def load(self) -> np.ndarray:
        """All embeddings (m, D) float32, once every process has called `fill`."""
        first = np.load(self._files[0], mmap_mode="r")
        embeddings = np.empty((len(self.images), first.shape[1]), np.float32)
        for number, file in enumerate(self._files):
            embeddings[number * PART_SIZE :][:PART_SIZE] = np.load(file)
        return embeddings

    def delete(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder)


def _save(path: Path, rows: np.ndarray) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, np.save would append .npy to it
            np.save(file, rows)

    write_atomically(path, write)
