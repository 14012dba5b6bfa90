"""Identity blocks `<root>/<identity>.png` as labelled images: every tile is one, called `<identity>/<k>`.

Legend: n images, S side of a tile.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import distributed
from utils.config import UserError
from utils.data.formats.labelled import LabelledImages
from utils.images import (
    IMAGE_SUFFIXES,
    default_threads,
    encode_image,
    read_block,
    read_image,
    recorded_tile_size,
    tile_of_block,
)

# Decoded blocks that are kept, one a slot: tiles are read in order, by several threads
SLOTS = 16


class BlockImages(LabelledImages):
    """The tiles of blocks. A tile has no bytes of its own: `encoded` is a PNG of its pixels."""

    format = "identity blocks"

    def __init__(self, root: str | Path, files: Sequence[str], tile_size: int | None = None) -> None:
        """`files` below `root`, each a block of tiles of `tile_size` pixels (None: the sizes in use).

        Every block is decoded once, to see how many of its tiles are filler. UserError where one is no block.
        """
        root = Path(root)
        self.files = [root / file for file in files]
        self.sizes = [_tile_size(file, tile_size) for file in self.files]
        self._start()
        counting = tqdm(
            total=len(self.files), desc="reading blocks", unit="file", disable=not distributed.is_main(), delay=2
        )
        counts = []
        with counting, ThreadPoolExecutor(default_threads()) as pool:
            for count in pool.map(lambda number: len(self._block(number)), range(len(self.files))):
                counts.append(count)
                counting.update()
        identities = [file.stem for file in self.files]
        labels = np.repeat(np.arange(len(counts)), counts)
        names = [f"{identity}/{k}" for identity, count in zip(identities, counts, strict=True) for k in range(count)]
        super().__init__(root, names, identities, labels)
        self._first = np.cumsum([0, *counts])  # number of each block's first tile

    def _start(self) -> None:
        self._locks = [threading.Lock() for _ in range(SLOTS)]
        self._kept: list[tuple[int, np.ndarray] | None] = [None] * SLOTS

    def pixels(self, index: int) -> np.ndarray:
        number = int(self.labels[index])
        return self._block(number)[index - self._first[number]]

    def encoded(self, index: int) -> bytes:
        return encode_image(self.pixels(index))

    def digest(self, index: int) -> bytes:
        return hashlib.blake2b(self.pixels(index).tobytes(), digest_size=16).digest()

    def describe(self, index: int) -> str:
        number = int(self.labels[index])
        return f"{self.files[number]}, tile {index - self._first[number]}"

    def _block(self, number: int) -> np.ndarray:
        """The tiles of a block, uint8 (tiles, S, S, 3)."""
        slot = number % SLOTS
        with self._locks[slot]:
            kept = self._kept[slot]
            if kept is None or kept[0] != number:
                kept = number, read_block(read_image(self.files[number]), self.sizes[number])
                self._kept[slot] = kept
            return kept[1]

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key not in ("_locks", "_kept")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._start()


def _tile_size(file: Path, tile_size: int | None) -> int:
    found = tile_of_block(file, tile_size)
    if found is None:
        wanted = f"several tiles of {tile_size} pixels" if tile_size else "4 tiles of 128 or 5 of 112 pixels a row"
        raise UserError(f"{file}: not an identity block of {wanted}, as the others in its folder are")
    return found


def open_blocks(folder: str | Path) -> BlockImages | None:
    """The blocks in a folder without subfolders, whose first image has the size of a block; None for any other.

    Raises UserError where another of its images has not, and where the folder cannot be read.
    """
    folder = Path(folder)
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error
    files = [entry.name for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES)]
    if not files or any(entry.is_dir() for entry in entries):
        return None
    tile_size = recorded_tile_size(folder)
    return BlockImages(folder, files, tile_size) if tile_of_block(folder / files[0], tile_size) else None
