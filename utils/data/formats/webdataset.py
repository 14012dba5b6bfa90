"""WebDataset shards: tar files in which the members `<key>.<extension>` with one key make a sample.

The image is the member with an image's extension, `<key>.cls` its label in decimal digits; where there is none, the
folder of the key is the identity. Shards written here number the keys and keep an image's name in `<key>.json`.
Nothing is unpacked: the tar files are listed once and then read by offset, in any order.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import distributed
from utils.config import UserError
from utils.data.formats.labelled import (
    FileParts,
    LabelledImages,
    check_inside,
    labels_by,
    name_identities,
    parent_of,
    whole_numbers,
)
from utils.images import IMAGE_SUFFIXES

BLOCK = 512  # of a tar file


@dataclass
class _Sample:
    """One sample as its shard lists it: where its members are, (offset, size) by extension."""

    shard: int
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


class ShardImages(LabelledImages):
    """Images inside tar files."""

    format = "WebDataset"

    def __init__(self, path: str | Path, shards: Sequence[str | Path]) -> None:
        """List `shards`. UserError for a damaged or compressed tar, links, names that lead outside, missing labels."""
        path = Path(path)
        self.parts = FileParts([Path(shard) for shard in shards])
        samples: list[_Sample] = []
        silent = len(shards) < 2 or not distributed.is_main()
        for number in tqdm(range(len(shards)), desc="reading tar files", unit="file", disable=silent, delay=2):
            samples += _list_shard(self.parts, number)
        if not samples:
            raise UserError(f"{path}: its tar files hold no images")
        images = [_image_extension(self.parts.paths[s.shard], s) for s in samples]
        self.places = np.array([(s.shard, *s.members[e]) for s, e in zip(samples, images, strict=True)], np.int64)
        names = [self._name(s, extension) for s, extension in zip(samples, images, strict=True)]
        if "cls" in samples[0].members:
            labels = np.array([self._label(sample) for sample in samples], np.int64)
            identities = name_identities(labels, names, path)
        else:
            loose = next((sample.key for sample in samples if not parent_of(sample.key)), None)
            if loose is not None:
                raise UserError(f"{path}: {loose} has no label: neither {loose}.cls nor a folder, which would tell it")
            identities, labels = labels_by([parent_of(sample.key) for sample in samples])
        super().__init__(path, names, identities, labels)

    def encoded(self, index: int) -> bytes:
        return self.parts.read(*self.places[index].tolist())

    def _name(self, sample: _Sample, extension: str) -> str:
        """What the sample's .json says under `name`, else its key."""
        if "json" in sample.members:
            where = f"{self.parts.paths[sample.shard]}: {sample.key}.json"
            try:
                values = json.loads(self.parts.read(sample.shard, *sample.members["json"]))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON") from error
            if isinstance(values, dict) and isinstance(values.get("name"), str):
                return values["name"]
        return f"{sample.key}.{extension}"

    def _label(self, sample: _Sample) -> int:
        path = self.parts.paths[sample.shard]
        if "cls" not in sample.members:
            raise UserError(f"{path}: {sample.key} has no label; other samples have one in a .cls")
        text = self.parts.read(sample.shard, *sample.members["cls"]).decode("ascii", "replace")
        return whole_numbers([text], f"{path}: {sample.key}.cls", 1)[0]


def _image_extension(shard: Path, sample: _Sample) -> str:
    found = [extension for extension in sample.members if f".{extension.lower()}" in IMAGE_SUFFIXES]
    if len(found) != 1:
        raise UserError(f"{shard}: the sample {sample.key} has {len(found)} images; one is wanted")
    return found[0]


def _list_shard(parts: FileParts, number: int) -> Iterator[_Sample]:
    """The samples of one tar file."""
    path = parts.paths[number]
    sample = None
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep every header
                if member.isdir():
                    continue
                check_inside(member.name, path)
                if not member.isreg() or member.issparse():
                    raise UserError(
                        f"{path}: refused: {member.name} is a link or a device; files are read, nothing else"
                    )
                if not 0 <= member.size <= parts.sizes[number] - member.offset_data:
                    raise UserError(f"{path}: cut short: {member.name} reaches past its end")
                folder, _, file = member.name.removeprefix("./").rpartition("/")
                stem, _, extension = file.partition(".")
                if not stem or not extension:
                    continue  # hidden files, and those of no sample
                key = f"{folder}/{stem}" if folder else stem
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = _Sample(number, key)
                if extension in sample.members:
                    raise UserError(f"{path}: {member.name} stands in it twice")
                sample.members[extension] = (member.offset_data, member.size)
            end = archive.offset
    except (tarfile.TarError, ValueError) as error:  # ValueError: a number of an extended header
        raise UserError(f"{path}: not a readable tar file without compression ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    # tarfile takes a header that it cannot read for the end
    if parts.sizes[number] < end + BLOCK or parts.read(number, end, BLOCK) != bytes(BLOCK):
        raise UserError(f"{path}: damaged or cut short at byte {end}")
    if sample is not None:
        yield sample


def write_sample(archive: tarfile.TarFile, key: str, suffix: str, image: bytes, label: int, name: str) -> None:
    """Append one sample: the image as it is, its label and its name."""
    values = {suffix: image, ".cls": str(label).encode(), ".json": json.dumps({"name": name}).encode()}
    for extension, data in values.items():
        member = tarfile.TarInfo(key + extension)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
