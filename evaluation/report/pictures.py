"""Thumbnails of a data set's images, and where its image files are.

Legend: H W height and width of an image.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from utils.config import UserError
from utils.data.formats.folders import ImageFiles
from utils.data.formats.recognise import open_labelled
from utils.images import centre_square, default_threads, encode_image, resize

SIZES = (112, 80, 64)  # pixels a side, the best first
QUALITY = 65  # of WebP
SAMPLE = 48  # images by which the size of all is estimated


def thumbnail(image: np.ndarray, size: int) -> bytes:
    """uint8 (H, W, 3) RGB => the centred square as WebP, `size` pixels a side."""
    return encode_image(resize(centre_square(image), size), ".webp", QUALITY)


class Pictures:
    """The images below `root`, by the names that the readers of `utils.data.formats` give them."""

    def __init__(self, root: str | Path) -> None:
        """Raises UserError where there is no data set."""
        self._images = open_labelled(root)
        self._number = {name: number for number, name in enumerate(self._images.names)}
        self._of_identity: dict[str, list[str]] | None = None
        self._threads = ThreadPoolExecutor(default_threads())

    def pixels(self, name: str) -> np.ndarray:
        """uint8 (H, W, 3) RGB; UserError where the set has no such image or it cannot be read."""
        if name not in self._number:
            raise UserError(f"{self._images.path}: no image {name!r}; the data set has changed since it was evaluated")
        return self._images.pixels(self._number[name])

    def thumbnails(self, names: Sequence[str], size: int) -> Iterator[bytes]:
        """The thumbnail of each, in order; `size` pixels a side."""
        return self._threads.map(lambda name: thumbnail(self.pixels(name), size), names)

    def best_size(self, names: Sequence[str], max_bytes: float) -> int:
        """The largest of SIZES at which thumbnails of all of `names` take at most `max_bytes`, by a sample of them.

        The smallest one where none does.
        """
        if not names:
            return SIZES[0]
        sample = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, SAMPLE).astype(int))]
        for size in SIZES:
            found = [len(data) for data in self.thumbnails(sample, size)]
            if np.mean(found) * len(names) <= max_bytes:
                return size
        return SIZES[-1]

    def of_identity(self, identity: str) -> list[str]:
        """The names of an identity's images; none for an identity that the set does not have."""
        if self._of_identity is None:
            self._of_identity = {}
            for name, label in zip(self._images.names, self._images.labels, strict=True):
                self._of_identity.setdefault(self._images.identities[label], []).append(name)
        return self._of_identity.get(identity, [])

    def address(self, page: str | Path) -> str | None:
        """What stands before an image's name in a link from the file `page`; None where images are no files."""
        if not isinstance(self._images, ImageFiles):
            return None
        way = os.path.relpath(Path(self._images.root).resolve(), Path(page).resolve().parent)
        return quote(way.replace(os.sep, "/")) + "/"


def shrink_figure(data: bytes, max_bytes: int) -> tuple[bytes, str]:
    """A PNG as it is where it fits, else as WebP, halved until it does. Returns it and its media type."""
    if len(data) <= max_bytes:
        return data, "image/png"
    with Image.open(io.BytesIO(data)) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    while True:
        smaller = encode_image(pixels, ".webp", 85)
        if len(smaller) <= max_bytes or min(pixels.shape[:2]) < 2:
            return smaller, "image/webp"
        pixels = resize(pixels, (pixels.shape[0] // 2, pixels.shape[1] // 2))
