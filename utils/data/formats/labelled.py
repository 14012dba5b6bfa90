"""What every reader of a data set gives: encoded images by number, with names, and labels where the set has them.

Legend: n images, K identities, P pairs.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from utils.config import UserError
from utils.images import decode_image, read_bytes

# How identities are called that have a number only; the width makes the order of names that of numbers.
NUMBERED = "{:07d}"
MAX_IDENTITIES = 10_000_000
MAX_OPEN_FILES = 256
WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")  # fits 64 bits
# An empty name, an absolute one, a drive, a step upwards, control characters.
OUTSIDE = re.compile(r"^$|^[/\\]|^[a-zA-Z]:|(^|[/\\])\.\.([/\\]|$)|[\x00-\x1f]")


class EncodedImages(ABC):
    """n images as the files hold them (JPEG, PNG, ...), read one at a time by number, in any order.

    Safe in threads and in the workers of a DataLoader, forked or spawned.
    """

    format = "images"  # in the words of `python -m utils.data`

    def __init__(self, path: str | Path, names: Sequence[str]) -> None:
        """`names` are relative paths with forward slashes; UserError where one would lead outside its root."""
        self.path = Path(path)
        self.names = list(names)
        for name in self.names:
            check_inside(name, self.path)

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of image `index` as they were written; UserError where the file does not hold them."""

    def describe(self, index: int) -> str:
        """What messages call image `index`: the file and the name in it."""
        return f"{self.path}: {self.names[index]}"

    def pixels(self, index: int) -> np.ndarray:
        """Image `index` decoded: uint8 (H, W, 3) RGB; UserError where it cannot be."""
        return decode_image(self.encoded(index), self.describe(index))

    def digest(self, index: int) -> bytes:
        """16 bytes that tell the content of image `index` from any other's; UserError as `encoded`."""
        return hashlib.blake2b(self.encoded(index), digest_size=16).digest()


class LabelledImages(EncodedImages):
    """Images of K identities: `identities` (K names), `labels` (n,) int64 in 0 .. K - 1. An identity may be empty."""

    def __init__(self, path: str | Path, names: Sequence[str], identities: Sequence[str], labels: np.ndarray) -> None:
        super().__init__(path, names)
        self.identities = list(identities)
        self.labels = np.asarray(labels, np.int64)
        for identity in self.identities:
            check_inside(identity, self.path)
        if len(self.labels) != len(self.names):
            raise ValueError(f"{self.path}: {len(self.names)} names, {len(self.labels)} labels")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.identities):
            raise ValueError(f"{self.path}: labels outside 0..{len(self.identities) - 1}")

    def portable_name(self, index: int) -> str:
        """The name under which writers keep image `index`: always below the name of its identity."""
        identity, name = self.identities[self.labels[index]], self.names[index]
        return name if name.startswith(identity + "/") else f"{identity}/{name.replace('/', '_')}"


def check_inside(name: str, path: str | Path) -> None:
    """UserError when `name`, which stands in the file `path`, is not a relative path that stays below its root."""
    if OUTSIDE.search(name):
        raise UserError(f"{path}: refused: the name {name!r} in it is not a path below the data set's own folder")


def labels_by(folders: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Identities, labels (n,) from the folder of each image; sorted by number where all are numbers, else by name."""
    unique = sorted(set(folders))
    if all(name.isascii() and name.isdecimal() for name in unique):
        unique.sort(key=lambda name: (len(name.lstrip("0")), name.lstrip("0")))  # 2 before 10
    number = {name: label for label, name in enumerate(unique)}
    return unique, np.array([number[folder] for folder in folders], np.int64)


def parent_of(name: str) -> str:
    """The folder of an image's path, "" where there is none."""
    parent = PurePosixPath(name).parent.as_posix()
    return "" if parent == "." else parent


def name_identities(labels: np.ndarray, names: Sequence[str], path: str | Path) -> list[str]:
    """What the identities 0 .. largest label are called, for formats that keep a number for each.

    The folder of their images (the last one, else the first one) where every identity has one of its own, else, and for
    numbers that no image has, the number. UserError for numbers that cannot be labels.
    """
    if len(labels) == 0:
        raise UserError(f"{path}: holds no images")
    if labels.min() < 0 or labels.max() >= MAX_IDENTITIES:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise UserError(f"{path}: the label {wrong}; labels are whole numbers in 0..{MAX_IDENTITIES - 1}")
    numbers = [NUMBERED.format(label) for label in range(int(labels.max()) + 1)]
    for folder_of in (parent_of, lambda name: name.split("/", 1)[0] if "/" in name else ""):
        found = _one_folder_each(labels.tolist(), names, folder_of)
        if found is not None:
            identities = [found.get(label, number) for label, number in enumerate(numbers)]
            if len(set(identities)) == len(identities):
                return identities
    return numbers


def _one_folder_each(labels: list[int], names: Sequence[str], folder_of: Callable[[str], str]) -> dict[int, str] | None:
    found: dict[int, str] = {}
    for label, name in zip(labels, names, strict=True):
        folder = folder_of(name)
        if not folder or found.setdefault(label, folder) != folder:
            return None
    return found if len(set(found.values())) == len(found) else None


class FileParts:
    """Parts of files by offset and length. Files are opened when they are first read, in each process anew."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """UserError for a file that is not there."""
        self.paths = list(paths)
        self.sizes = [_size(path) for path in self.paths]
        self._open: dict[int, int] = {}

    def read(self, file: int, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` of file number `file`; UserError where they reach past its end."""
        if offset < 0 or length < 0 or offset + length > self.sizes[file]:
            raise UserError(
                f"{self.paths[file]}: {length} bytes at {offset} are outside the file of {self.sizes[file]} bytes; "
                "it is cut short, or its index belongs to another file"
            )
        try:
            data = self._pread(file, offset, length)
        except OSError as error:
            raise UserError(f"{self.paths[file]}: cannot be read ({error.strerror})") from error
        if len(data) != length:
            raise UserError(f"{self.paths[file]}: has become shorter since it was opened")
        return data

    def _pread(self, file: int, offset: int, length: int) -> bytes:
        # pread has no position that threads or forked workers could share
        descriptor = self._open.get(file)
        if descriptor is not None:
            return os.pread(descriptor, length, offset)
        descriptor = os.open(self.paths[file], os.O_RDONLY)
        if len(self._open) < MAX_OPEN_FILES and self._open.setdefault(file, descriptor) == descriptor:
            return os.pread(descriptor, length, offset)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file in UTF-8, without blank ones at its end; UserError for anything else."""
    try:
        return read_bytes(path).decode("utf-8").rstrip("\r\n ").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error


def whole_numbers(fields: Sequence[str], path: str | Path, line: int) -> list[int]:
    """Fields of line `line` of an index as integers; UserError naming what is none."""
    for field in fields:
        if not WHOLE_NUMBER.fullmatch(field.strip()):
            raise UserError(f"{path} line {line}: {field[:40]!r}; a whole number is wanted")
    return [int(field) for field in fields]
