"""insightface's training sets: MXNet RecordIO, `train.rec` with `train.idx`, and `train.lst` where there is one.

    .rec   records: magic, part and length (4 bytes each, little-endian), data, zeros up to a multiple of 4 bytes
           data: flag (uint32), label (float32), id, id2 (uint64); flag floats, which replace the label when flag > 0;
           the encoded image
    .idx   key <tab> byte offset
    .lst   key <tab> label <tab> path

Record 0 has no image: its first number is the key past the last image, its second the one past the last identity. The
records between them, one an identity, hold the first key of the identity's images and the key past them.
A record whose data hold the magic at a multiple of 4 bytes is cut there in parts, and the magic left out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.config import UserError
from utils.data.formats.labelled import (
    NUMBERED,
    FileParts,
    LabelledImages,
    name_identities,
    read_lines,
    whole_numbers,
)

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
HEADER = struct.Struct("<IfQQ")
LENGTH_BITS = 29
WHOLE, FIRST, MIDDLE, LAST = range(4)
LARGEST_EXACT = 1 << 24  # float32 counts no further, and the format keeps keys and labels in it


class RecordImages(LabelledImages):
    """Images of a .rec file. Names and identities are those of the .lst file, else numbers."""

    format = "RecordIO"

    def __init__(self, path: str | Path) -> None:
        """`path`: the .rec file; its .idx stands beside it. UserError where the two do not fit together."""
        path = Path(path)
        self.parts = FileParts([path])
        self.offset_of = _read_index(path.with_suffix(".idx"), self.parts.sizes[0])
        self.keys, labels = self._images(path)
        known = self._names(path.with_suffix(".lst"))
        identities = name_identities(labels, known or [""] * len(labels), path)
        names = known or [
            f"{identities[label]}/{NUMBERED.format(k)}" for label, k in zip(labels, self.keys, strict=True)
        ]
        super().__init__(path, names, identities, labels)

    def encoded(self, index: int) -> bytes:
        key = int(self.keys[index])
        _, numbers, image = self._record(key)
        if numbers[0] != self.labels[index]:
            raise UserError(
                f"{self.parts.paths[0]}: record {key} has the label {numbers[0]:g}, its identity {self.labels[index]}"
            )
        return image

    def _record(self, key: int) -> tuple[int, tuple[float, ...], bytes]:
        """Of the record `key`: the flag, the label (one number, or `flag` of them) and what follows the header."""
        path = self.parts.paths[0]
        offset = self.offset_of.get(key)
        if offset is None:
            raise UserError(f"{path.with_suffix('.idx')}: has no record {key}")
        data = read_record(self.parts, offset)
        if len(data) < HEADER.size:
            raise UserError(f"{path}: record {key} has no header; not a data set of images")
        flag, label, _, _ = HEADER.unpack_from(data)
        end = HEADER.size + 4 * flag
        if end > len(data):
            raise UserError(f"{path}: record {key} announces {flag} numbers, more than it holds")
        return flag, struct.unpack_from(f"<{flag}f", data, HEADER.size) if flag else (label,), data[end:]

    def _images(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Keys and labels of the images, (n,) each."""
        flag, first, _ = self._record(0) if 0 in self.offset_of else (0, (), b"")
        if flag == 0:  # a plain list of images
            keys = np.array(sorted(self.offset_of), np.int64)
            return keys, np.array([self._label(key) for key in keys.tolist()], np.int64)
        end = self._whole(first[0], 0)
        if not 1 < end <= len(self.offset_of):
            raise UserError(f"{path}: record 0 announces {end - 1} images; the index has {len(self.offset_of)} records")
        ranges: list[list[int]] = []
        for key in range(end, self._whole(first[1], 0) if flag > 1 else end):
            _, bounds, _ = self._record(key)
            ranges.append([self._whole(bound, key) for bound in bounds[:2]])
        ranges.sort()
        keys = np.arange(1, end)
        # Where the identities' records cover all images without a gap, one image tells the label of its identity
        if all(len(r) == 2 and r[0] < r[1] for r in ranges) and (
            [1, *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), end]
        ):
            counts = [stop - start for start, stop in ranges]
            return keys, np.repeat(np.array([self._label(start) for start, _ in ranges], np.int64), counts)
        return keys, np.array([self._label(key) for key in keys.tolist()], np.int64)

    def _label(self, key: int) -> int:
        return self._whole(self._record(key)[1][0], key)

    def _whole(self, number: float, key: int) -> int:
        if number != number or number != int(min(max(number, -1), LARGEST_EXACT)):
            raise UserError(f"{self.parts.paths[0]}: record {key} holds the number {number:g}; a whole one is wanted")
        return int(number)

    def _names(self, lst: Path) -> list[str] | None:
        """The paths of the .lst file, where it has one for every image."""
        if not lst.is_file():
            return None
        path_of = {}
        for number, line in enumerate(read_lines(lst), start=1):
            fields = line.split("\t")
            if len(fields) < 3 or not fields[0].isdecimal():
                return None  # insightface's own lists have other columns
            path_of[whole_numbers(fields[:1], lst, number)[0]] = fields[-1]
        return [path_of[key] for key in self.keys.tolist()] if set(self.keys.tolist()) <= set(path_of) else None


def _read_index(path: Path, size: int) -> dict[int, int]:
    """Key => byte offset of an .idx file; UserError for other lines and for offsets outside a .rec of `size` bytes."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a .rec file is read with its index beside it")
    offset_of: dict[int, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.split()
        if len(fields) != 2:
            raise UserError(f"{path} line {number}: {line[:40]!r}; a key and a byte offset are wanted")
        key, offset = whole_numbers(fields, path, number)
        if not 0 <= offset <= size - 8:
            raise UserError(
                f"{path} line {number}: record {key} begins at byte {offset}, outside the .rec file of {size} bytes; "
                "it is cut short, or the index belongs to another file"
            )
        offset_of[key] = offset
    if not offset_of:
        raise UserError(f"{path}: is empty")
    return offset_of


# Records


def read_record(parts: FileParts, offset: int) -> bytes:
    """The data of the record at `offset`, its parts joined; UserError where no record begins there."""
    data = b""
    expected = (WHOLE, FIRST)
    while True:
        magic, word = struct.unpack("<II", parts.read(0, offset, 8))
        part, length = word >> LENGTH_BITS, word & (1 << LENGTH_BITS) - 1
        if magic != MAGIC or part not in expected:
            raise UserError(f"{parts.paths[0]}: no record begins at byte {offset}; damaged, or another file's index")
        data += parts.read(0, offset + 8, length)
        if part in (WHOLE, LAST):
            return data
        data += MAGIC_BYTES
        expected = (MIDDLE, LAST)
        offset += 8 + length + -length % 4


def write_record(file: BinaryIO, data: bytes) -> None:
    """Append one record. Raises UserError for data that the format cannot hold."""
    if len(data) >= 1 << LENGTH_BITS:
        raise UserError(f"an image of {len(data)} bytes; a record holds less than {1 << LENGTH_BITS}")
    cuts = list(_aligned_magics(data))
    start = 0
    for number, end in enumerate([*cuts, len(data)]):
        if not cuts:
            part = WHOLE
        else:
            part = FIRST if number == 0 else LAST if end == len(data) and number == len(cuts) else MIDDLE
        length = end - start
        file.write(MAGIC_BYTES + struct.pack("<I", part << LENGTH_BITS | length) + data[start:end] + bytes(-length % 4))
        start = end + 4


def _aligned_magics(data: bytes) -> Iterator[int]:
    position = data.find(MAGIC_BYTES)
    while position >= 0:
        if position % 4 == 0:
            yield position
            position += 3
        position = data.find(MAGIC_BYTES, position + 1)


def pack(label: float | tuple[float, ...], key: int, image: bytes = b"") -> bytes:
    """The data of a record: a header with one label, or with several numbers behind it, and the image."""
    if isinstance(label, tuple):
        return HEADER.pack(len(label), 0.0, key, 0) + struct.pack(f"<{len(label)}f", *label) + image
    return HEADER.pack(0, label, key, 0) + image
