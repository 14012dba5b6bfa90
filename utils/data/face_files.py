"""The images in a folder by name, whether they are files or stand in WebDataset shards."""

from pathlib import Path

import numpy as np

from utils.data.formats.webdataset import ShardImages
from utils.images import list_images, read_image


class FaceFiles:
    """Images below `root`; where it holds .tar files, those in them. Can be sent to other processes."""

    def __init__(self, root: str | Path) -> None:
        """Lists the shards, if there are any; UserError as ShardImages raises it."""
        self.root = Path(root)
        shards = sorted(self.root.glob("*.tar"))
        self.shards = ShardImages(self.root, shards) if shards else None
        names = [] if self.shards is None else map(self.shards.portable_name, range(len(self.shards)))
        self._rows = {name: row for row, name in enumerate(names)}

    def names(self) -> list[str]:
        """Relative paths with forward slashes, sorted; in shards below the name of their identity."""
        return list_images(self.root) if self.shards is None else sorted(self._rows)

    def read(self, name: str) -> np.ndarray:
        """One of them: uint8 (H, W, 3) RGB; UserError where it cannot be read."""
        return read_image(self.root / name) if self.shards is None else self.shards.pixels(self._rows[name])
