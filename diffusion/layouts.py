"""How the images of a data set stand on the disk: one file each, identity blocks, or WebDataset shards.

A group is what is looked after together: an identity, or the identities of a shard. In a packed layout a group is one
file, made when the last of its images is there; until then they wait as files of their own.
"""

import hashlib
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from utils.config import UserError
from utils.data.formats.webdataset import ShardImages, write_sample
from utils.images import (
    IMAGE_SUFFIXES,
    SAMPLED_BLOCK,
    decode_image,
    encode_image,
    read_bytes,
    read_image,
    write_block,
)

Sample = tuple[str, int]  # identity and index
BLOCK_COLUMNS = SAMPLED_BLOCK[1]
IMAGE_FORMATS = ("png", "jpg", "webp")
SHARD = "faces-{:06d}.tar"


class Layout(ABC):
    """Where image (identity, index) stands. Paths are relative to the data set's folder, with forward slashes."""

    name: str  # of sampling.save_mode
    is_packed = True

    def __init__(self, identities: Sequence[str], n_samples: int, image_format: str, quality: int | None) -> None:
        """identities: in the manifest's order; n_samples: images of each; quality: see encode_image."""
        self.identities, self.n_samples = identities, n_samples
        self.suffix, self.quality = f".{image_format}", quality

    @property
    def waiting_suffix(self) -> str:
        """Of an image that waits to be packed."""
        return self.suffix

    def __len__(self) -> int:
        """The number of groups."""
        return len(self.identities)

    def group(self, number: int) -> list[Sample]:
        """The images of a group, in the order of the manifest."""
        return [(self.identities[number], index) for index in range(self.n_samples)]

    def samples(self) -> Iterator[Sample]:
        """All images, in the order of the manifest."""
        for number in range(len(self)):
            yield from self.group(number)

    @abstractmethod
    def file_of(self, sample: Sample) -> str:
        """What the manifest calls the image's file."""

    def packed_file(self, number: int) -> str:
        """The file that a group becomes."""
        return self.disk_file(self.file_of(self.group(number)[0]))

    def disk_file(self, file: str) -> str:
        """The file on the disk that holds what the manifest calls `file`."""
        return file

    def encode(self, image: np.ndarray) -> bytes:
        """The file of one image uint8 (H, W, 3), as it is written first."""
        return encode_image(image, self.waiting_suffix, self.quality)

    def pack(self, number: int, read: Callable[[Sample], bytes], path: Path) -> None:
        """Write a group's file to `path`; `read` gives the images as `encode` made them."""
        raise NotImplementedError(f"{self.name}: its images are files of their own")

    @abstractmethod
    def read(self, folder: Path, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Finished images, uint8 (H, W, 3) each."""


class Folders(Layout):
    """<identity>/<index>.png"""

    name = "folders"
    is_packed = False

    def file_of(self, sample: Sample) -> str:
        return f"{sample[0]}/{sample[1]}{self.suffix}"

    def read(self, folder: Path, samples: Sequence[Sample]) -> list[np.ndarray]:
        return [read_image(folder / self.file_of(sample)) for sample in samples]


class Blocks(Layout):
    """<identity>.png, tiles in rows of BLOCK_COLUMNS. Tiles wait without loss: a block is compressed once."""

    name = "blocks"
    waiting_suffix = ".png"

    def file_of(self, sample: Sample) -> str:
        return f"{sample[0]}{self.suffix}"

    def encode(self, image: np.ndarray) -> bytes:
        return encode_image(image, self.waiting_suffix)

    def pack(self, number: int, read: Callable[[Sample], bytes], path: Path) -> None:
        tiles = np.stack([decode_image(read(sample)) for sample in self.group(number)])
        path.write_bytes(encode_image(write_block(tiles, BLOCK_COLUMNS), self.suffix, self.quality))

    def read(self, folder: Path, samples: Sequence[Sample]) -> list[np.ndarray]:
        tiles = []
        for name, index in samples:
            block = read_image(folder / self.file_of((name, index)))
            side = block.shape[1] // BLOCK_COLUMNS
            top, left = index // BLOCK_COLUMNS * side, index % BLOCK_COLUMNS * side
            tiles.append(block[top : top + side, left : left + side])
        return tiles


class Shards(Layout):
    """faces-<number>.tar of whole identities; members <number of the image>.png, .cls and .json."""

    name = "shards"

    def __init__(
        self, identities: Sequence[str], n_samples: int, image_format: str, quality: int | None, images_per_shard: int
    ) -> None:
        """images_per_shard: at most, but at least one identity."""
        super().__init__(identities, n_samples, image_format, quality)
        self.people = max(1, images_per_shard // n_samples)  # of a shard
        self.number_of = {name: number for number, name in enumerate(identities)}

    def __len__(self) -> int:
        return -(-len(self.identities) // self.people)

    def group(self, number: int) -> list[Sample]:
        names = self.identities[number * self.people : (number + 1) * self.people]
        return [(name, index) for name in names for index in range(self.n_samples)]

    def file_of(self, sample: Sample) -> str:
        label = self.number_of[sample[0]]
        return f"{SHARD.format(label // self.people)}/{self._key(sample)}{self.suffix}"

    def disk_file(self, file: str) -> str:
        return file.partition("/")[0]

    def _key(self, sample: Sample) -> str:
        return f"{self.number_of[sample[0]] * self.n_samples + sample[1]:09d}"

    def pack(self, number: int, read: Callable[[Sample], bytes], path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            for sample in self.group(number):
                label, name = self.number_of[sample[0]], f"{sample[0]}/{sample[1]}{self.suffix}"
                write_sample(archive, self._key(sample), self.suffix, read(sample), label, name)

    def read(self, folder: Path, samples: Sequence[Sample]) -> list[np.ndarray]:
        shards = sorted({self.disk_file(self.file_of(sample)) for sample in samples})
        images = ShardImages(folder, [folder / shard for shard in shards])
        row = {name: number for number, name in enumerate(images.names)}
        return [images.pixels(row[f"{name}/{index}{self.suffix}"]) for name, index in samples]


def make_layout(
    save_mode: str,
    identities: Sequence[str],
    n_samples: int,
    *,
    image_format: str,
    quality: int | None,
    images_per_shard: int,
) -> Layout:
    """The layout that the settings of `sampling` describe; see `check_layout`."""
    if save_mode == Shards.name:
        return Shards(identities, n_samples, image_format, quality, images_per_shard)
    return {Folders.name: Folders, Blocks.name: Blocks}[save_mode](identities, n_samples, image_format, quality)


def check_layout(save_mode: str, image_format: str, quality: int | None, images_per_shard: int) -> None:
    """Raise UserError for a layout or image format that does not exist, or a quality that the format does not have."""
    modes = (Folders.name, Blocks.name, Shards.name)
    if save_mode not in modes:
        raise UserError(f"sampling.save_mode: {save_mode!r} is not one of {', '.join(modes)}")
    if image_format not in IMAGE_FORMATS:
        raise UserError(f"sampling.image_format: {image_format!r} is not one of {', '.join(IMAGE_FORMATS)}")
    if quality is not None and image_format == "png":
        raise UserError(
            f"sampling.image_quality: {quality}, but png is without loss; give jpg or webp, or leave it out"
        )
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f"sampling.image_quality: {quality}; give 1 to 100")
    if images_per_shard < 1:
        raise UserError(f"sampling.images_per_shard: {images_per_shard}; give at least 1")


def digests(folder: Path, path: str) -> dict[str, str]:
    """The sha256 of a file, or of every image in a shard, by the manifest's names; empty where it cannot be read."""
    try:
        if not path.endswith(".tar"):
            return {path: hashlib.sha256(read_bytes(folder / path)).hexdigest()}
        with tarfile.open(folder / path, "r:") as archive:
            return {
                f"{path}/{member.name}": hashlib.sha256(archive.extractfile(member).read()).hexdigest()
                for member in archive
                if PurePosixPath(member.name).suffix in IMAGE_SUFFIXES
            }
    except (UserError, OSError, tarfile.TarError):
        return {}  # damaged; the caller draws its images again
