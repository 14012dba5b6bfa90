"""TFace's training sets: TFRecord shards of `tf.train.Example`, and a text file that says where each image is.

    <root>/<name>/<name>-00000.tfrecord     records: length (8 bytes), its CRC, an Example, its CRC (little-endian)
    <index root>/<name>.txt                 name <tab> shard <tab> byte offset <tab> label        TFace
    <anywhere>/<name>.index                 path <tab> shard <tab> byte offset                    img2tfrecord, ADMIS

The Example holds the encoded image as the bytes feature `image`. Of the second form the label is the number of the
parent folder. Files written here come with both, so labels, names and identities survive; further features are ignored.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.config import UserError
from utils.data.formats.crc32c import masked_crc32c
from utils.data.formats.labelled import (
    FileParts,
    LabelledImages,
    labels_by,
    name_identities,
    parent_of,
    read_lines,
    whole_numbers,
)

SHARD = "{}-{:05d}.tfrecord"
FRAME = 16  # bytes of a record besides its data
MAX_SHARDS = 100_000


class TFRecordImages(LabelledImages):
    """Images at known offsets of TFRecord shards."""

    format = "TFRecord"

    def __init__(
        self,
        path: str | Path,
        shards: Sequence[Path],
        shard_of: np.ndarray,
        offsets: np.ndarray,
        names: Sequence[str],
        identities: Sequence[str],
        labels: np.ndarray,
    ) -> None:
        """Image i is the record at byte `offsets[i]` of `shards[shard_of[i]]`; UserError for an offset outside it."""
        super().__init__(path, names, identities, labels)
        self.parts = FileParts(shards)
        self.shard_of, self.offsets = shard_of, offsets
        ends = np.array(self.parts.sizes, np.int64)[shard_of]
        outside = np.flatnonzero((offsets < 0) | (offsets + FRAME > ends))
        if len(outside):
            row = int(outside[0])
            raise UserError(
                f"{path}: image {row} begins at byte {offsets[row]}, outside {shards[shard_of[row]].name}, which has "
                f"{ends[row]} bytes; the index belongs to other files, or they are cut short"
            )

    def encoded(self, index: int) -> bytes:
        shard, offset = int(self.shard_of[index]), int(self.offsets[index])
        data = read_record(self.parts, shard, offset)
        return feature(data, b"image", f"{self.parts.paths[shard]}: the record at byte {offset}")


def read_tfrecord(index: str | Path, root: str | Path | None = None) -> TFRecordImages:
    """The images of an index file of either form (see above).

    `root`: the folder with the shards or with the folder `<name>` of them; None: beside the index, or one level up.
    Raises UserError for lines of another form, shards that are not there, offsets outside them.
    """
    index = Path(index)
    lines = read_lines(index)
    columns = lines[0].count("\t") + 1 if lines else 0
    if columns not in (3, 4):
        raise UserError(f"{index}: not an index of TFRecord files; 3 or 4 columns separated by tabs are wanted")
    firsts: list[str] = []  # the first column
    table = np.empty((len(lines), columns - 1), np.int64)  # shard, offset and perhaps label
    for row, line in enumerate(lines):
        first, *rest = line.split("\t")
        if len(rest) != columns - 1:
            raise UserError(f"{index} line {row + 1}: {len(rest) + 1} columns; the first line has {columns}")
        firsts.append(sys.intern(first) if columns == 4 else first)  # names of sets repeat, by the million
        table[row] = whole_numbers(rest, index, row + 1)
    sets = firsts if columns == 4 else [index.stem] * len(lines)
    shards, shard_of = _find_shards(index, sets, table[:, 0], root)

    if columns == 3:
        names = [_relative(first) for first in firsts]
        loose = next((name for name in names if not parent_of(name)), None)
        if loose is not None:
            raise UserError(f"{index}: {loose} has no folder, whose number would be the label")
        identities, labels = labels_by([parent_of(name).rpartition("/")[2] for name in names])
    else:
        labels = table[:, 2]
        known = _names_beside(index, table)
        identities = name_identities(labels, known or [""] * len(labels), index)
        names = known or [f"{identities[label]}/{i:07d}" for i, label in enumerate(labels)]
    return TFRecordImages(index, shards, shard_of, table[:, 1], names, identities, labels)


def _find_shards(
    index: Path, sets: Sequence[str], numbers: np.ndarray, root: str | Path | None
) -> tuple[list[Path], np.ndarray]:
    """The files of an index, and for each of its lines (n,) which of them."""
    if numbers.min() < 0 or numbers.max() >= MAX_SHARDS:
        raise UserError(f"{index}: shards {numbers.min()}..{numbers.max()}; they are numbered from 0")
    places = [Path(root)] if root is not None else [index.parent, index.parent.parent]
    number_of: dict[tuple[str, int], int] = {}
    shards: list[Path] = []
    shard_of = np.empty(len(sets), np.int64)
    for row, key in enumerate(zip(sets, numbers.tolist(), strict=True)):
        if key not in number_of:
            number_of[key] = len(shards)
            shards.append(_shard_path(index, places, *key))
        shard_of[row] = number_of[key]
    return shards, shard_of


def _shard_path(index: Path, places: Sequence[Path], name: str, number: int) -> Path:
    if not name or "/" in name or "\\" in name or name == "..":
        raise UserError(f"{index}: refused: {name!r} is not the name of a set of shards below the root")
    file = SHARD.format(name, number)
    candidates = [folder / file for place in places for folder in (place / name, place)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError(f"{index}: no {file} in {' or '.join(str(p.parent) for p in candidates)}; give the right root")
    return found


def _relative(path: str) -> str:
    """The path in an index as a name; of an absolute one, which is another machine's, the last folder and file."""
    path = path.replace("\\", "/").removeprefix("./")
    return "/".join(path.split("/")[-2:]) if path.startswith("/") or path[1:2] == ":" else path


def _names_beside(index: Path, table: np.ndarray) -> list[str] | None:
    """The paths in `<name>.index`, where it stands beside `<name>.txt` and tells of the same records."""
    beside = index.with_suffix(".index")
    if beside == index or not beside.is_file():
        return None
    lines = [line.split("\t") for line in read_lines(beside)]
    if any(len(fields) != 3 for fields in lines):
        return None
    places = [whole_numbers(fields[1:], beside, number) for number, fields in enumerate(lines, start=1)]
    return [_relative(fields[0]) for fields in lines] if np.array_equal(np.array(places), table[:, :2]) else None


# Records


def write_record(file: BinaryIO, data: bytes) -> None:
    """Append one record to a binary file."""
    length = struct.pack("<Q", len(data))
    file.write(length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data)))


def read_record(parts: FileParts, file: int, offset: int) -> bytes:
    """The data of the record at `offset`; UserError where none begins there or a checksum is wrong."""
    length = _length(parts, file, offset)
    data = parts.read(file, offset + 12, length)
    (crc,) = struct.unpack("<I", parts.read(file, offset + 12 + length, 4))
    if masked_crc32c(data) != crc:
        raise UserError(f"{parts.paths[file]}: the record at byte {offset} is damaged: its checksum is another")
    return data


def _length(parts: FileParts, file: int, offset: int) -> int:
    head = parts.read(file, offset, 12)
    if not begins_record(head):
        raise UserError(f"{parts.paths[file]}: no TFRecord begins at byte {offset}; damaged, or another file's index")
    return struct.unpack_from("<Q", head)[0]


def begins_record(head: bytes) -> bool:
    """Whether the first 12 bytes are a length and its checksum."""
    return len(head) >= 12 and struct.pack("<I", masked_crc32c(head[:8])) == head[8:12]


def record_offsets(path: Path) -> list[int]:
    """Where the records of a file begin, by their lengths; UserError where they do not fill the file."""
    parts = FileParts([path])
    offsets, offset = [], 0
    while offset < parts.sizes[0]:
        offsets.append(offset)
        offset += FRAME + _length(parts, 0, offset)
    return offsets


# tf.train.Example, in the wire format of protocol buffers:
# Example {features = 1}, Features {map feature = 1: {key = 1, value = 2}}, Feature {bytes_list = 1, int64_list = 3},
# each list {value = 1}


def example(image: bytes, label: int) -> bytes:
    """An Example with the bytes feature `image` and the integer feature `label`."""
    features = (("image", _message(1, _message(1, image))), ("label", _message(3, _message(1, _varint(label)))))
    entries = b"".join(_message(1, _message(1, key.encode()) + _message(2, value)) for key, value in features)
    return _message(1, entries)


def feature(data: bytes, name: bytes, where: str) -> bytes:
    """The bytes feature `name` of an Example; UserError naming `where` when there is none."""
    try:
        for _, features in _messages(memoryview(data), 1):
            for _, entry in _messages(features, 1):
                parts = dict(_messages(entry, 1, 2))
                if bytes(parts.get(1, b"")) == name:
                    values = [value for _, list_ in _messages(parts[2], 1) for _, value in _messages(list_, 1)]
                    if len(values) == 1:
                        return bytes(values[0])
    except (IndexError, KeyError, ValueError) as error:
        raise UserError(f"{where} is not a tf.train.Example") from error
    raise UserError(f"{where} has no bytes feature {name.decode()!r}; it is not a data set of images")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _message(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _messages(data: memoryview, *wanted: int) -> Iterator[tuple[int, memoryview]]:
    """Fields of wire type 2 (length and bytes) among `wanted` numbers; others are passed over."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while position < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            varint()
            continue
        if wire_type not in (1, 2, 5):
            raise ValueError(f"wire type {wire_type}")
        length = varint() if wire_type == 2 else 8 if wire_type == 1 else 4
        if length > len(data) - position:
            raise ValueError("a field that reaches past the end")
        if wire_type == 2 and number in wanted:
            yield number, data[position : position + length]
        position += length
