"""Labelled images into any of the formats. Encoded bytes pass through unchanged: nothing is decoded or compressed anew.

Each file appears whole or not at all. A folder that is being filled carries a record of what goes into it: the same
conversion goes on with the files that are missing, another one is refused, and so is reading before the end.

What survives: labels in every format but class folders, which number identities anew in the order of their names;
names and identities in every format. `train.rec` keeps images sorted by label.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import read_json, write_atomically, write_json, write_text
from utils.config import UserError
from utils.data.formats import recordio, tfrecord
from utils.data.formats.labelled import LabelledImages
from utils.data.formats.webdataset import write_sample
from utils.images import IMAGE_SUFFIXES, suffix_of, write_encoded

RECORD = ".conversion.json"
TAR_SHARD = "{}-{:06d}.tar"


def write_labelled(data: LabelledImages, out: str | Path, to: str, *, images_per_shard: int = 10_000) -> None:
    """Write `data` into the folder `out` as `to`, one of WRITERS.

    Args:
        images_per_shard: of TFRecord and WebDataset; the other formats have no shards.

    Raises:
        UserError: an unknown format; a folder that holds something else or lies in the source; names that the format
            cannot keep apart; an image that cannot be read.
    """
    out = Path(out)
    if to not in WRITERS:
        raise UserError(f"to: {to}; there are {', '.join(WRITERS)}")
    if images_per_shard < 1:
        raise UserError(f"images_per_shard: {images_per_shard}; it must be at least 1")
    names = _names(data, flat=to == "folders")
    record = _claim(data, out, {"format": to, "images": len(data), "images_per_shard": images_per_shard}, names)
    with tqdm(total=len(data), desc=to, unit="image", disable=not distributed.is_main()) as bar:
        WRITERS[to](data, out, names, images_per_shard, bar)
    write_json(out / RECORD, {**record, "complete": True})


def _names(data: LabelledImages, flat: bool) -> list[str]:
    """What the images are called in the new set: below the folder of their identity, one level deep where `flat`."""
    names = [data.portable_name(index) for index in range(len(data))]
    if flat:
        folder_of = [folder_name(identity) for identity in data.identities]
        if len(set(folder_of)) < len(folder_of):
            raise UserError(f"{data.path}: two identities would get one folder; their names differ in / and _ only")
        lengths = [len(identity) for identity in data.identities]
        names = [
            f"{folder_of[label]}{_visible(name[lengths[label] :])}"
            for label, name in zip(data.labels.tolist(), names, strict=True)
        ]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{data.path}: two images would get the name {name}")
        if not name.isascii() and name.encode("utf-8", "replace").decode("utf-8") != name:
            raise UserError(f"{data.path}: the name {name!r} is not UTF-8")
        seen.add(name)
    return names


def folder_name(identity: str) -> str:
    """The class folder of an identity: one level, not hidden."""
    return _visible(identity.replace("/", "_"))


def _visible(name: str) -> str:
    return re.sub(r"(^|/)\.", r"\1_", name)


def _claim(data: LabelledImages, out: Path, record: dict, names: list[str]) -> dict:
    """Make `out`, or see that it is a part of the same conversion; clear what a killed one left half written. Its
    record, not yet complete."""
    source = data.path.resolve()
    if source.is_dir() and (out.resolve() == source or source in out.resolve().parents):
        raise UserError(f"OUT: {out} is inside {data.path}, which is read; name a folder elsewhere")
    digest = hashlib.sha256(data.labels.tobytes())
    digest.update("\n".join([*data.identities, *names]).encode("utf-8", "surrogateescape"))
    record = {**record, "names_and_labels": digest.hexdigest(), "complete": False}
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT: {out} is a file; name a new folder")
    if (out / RECORD).is_file():
        if {**read_json(out / RECORD, "name another folder"), "complete": False} != record:
            raise UserError(
                f"OUT: {out} holds a conversion of other images or with other settings; name another folder"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"OUT: {out} is not empty; name a new folder")
    write_json(out / RECORD, record)
    for leftover in [*out.glob(".*.tmp"), *out.glob("*/.*.tmp")]:
        leftover.unlink()
    return record


def is_unfinished(folder: Path) -> bool:
    """Whether a conversion into `folder` was begun and has not come to its end."""
    record = folder / RECORD
    return record.is_file() and not read_json(record, "name another folder")["complete"]


def _write_folders(data: LabelledImages, out: Path, names: list[str], _: int, bar: tqdm) -> None:
    for identity in data.identities:
        (out / folder_name(identity)).mkdir(exist_ok=True)  # the empty ones too: they have a label
    taken = set(names)
    for index, name in enumerate(names):
        image = data.encoded(index)
        if not name.lower().endswith(IMAGE_SUFFIXES):
            name += suffix_of(image, data.describe(index))
            if name in taken:
                raise UserError(f"{data.path}: two images would get the name {name}")
        path = out / name
        if not (path.is_file() and path.stat().st_size == len(image)):
            write_encoded(path, image)
        bar.update()


def _write_tfrecord(data: LabelledImages, out: Path, names: list[str], images_per_shard: int, bar: tqdm) -> None:
    name = out.resolve().name
    shards = _write_shards(
        len(data),
        images_per_shard,
        lambda number: out / name / tfrecord.SHARD.format(name, number),
        lambda path, rows: _fill_tfrecord(data, path, rows, bar),
        bar,
    )
    places = [(number, offset) for number, path in enumerate(shards) for offset in tfrecord.record_offsets(path)]
    if len(places) != len(data):
        raise UserError(f"OUT: the shards in {out / name} hold {len(places)} images, not {len(data)}; remove {out}")
    lines = [f"{image}\t{number}\t{offset}\n" for image, (number, offset) in zip(names, places, strict=True)]
    write_text(out / f"{name}.index", "".join(lines))
    labels = data.labels.tolist()
    lines = [f"{name}\t{number}\t{offset}\t{label}\n" for label, (number, offset) in zip(labels, places, strict=True)]
    write_text(out / f"{name}.txt", "".join(lines))


def _fill_tfrecord(data: LabelledImages, path: Path, rows: range, bar: tqdm) -> None:
    with path.open("wb") as file:
        for index in rows:
            tfrecord.write_record(file, tfrecord.example(data.encoded(index), int(data.labels[index])))
            bar.update()


def _write_webdataset(data: LabelledImages, out: Path, names: list[str], images_per_shard: int, bar: tqdm) -> None:
    name = out.resolve().name
    _write_shards(
        len(data),
        images_per_shard,
        lambda number: out / TAR_SHARD.format(name, number),
        lambda path, rows: _fill_tar(data, path, names, rows, bar),
        bar,
    )


def _fill_tar(data: LabelledImages, path: Path, names: list[str], rows: range, bar: tqdm) -> None:
    with tarfile.open(path, "w") as archive:
        for index in rows:
            image = data.encoded(index)
            suffix = Path(names[index]).suffix.lower()
            if suffix not in IMAGE_SUFFIXES:
                suffix = suffix_of(image, data.describe(index))
            write_sample(archive, f"{index:09d}", suffix, image, int(data.labels[index]), names[index])
            bar.update()


def _write_shards(
    count: int,
    images_per_shard: int,
    path_of: Callable[[int], Path],
    fill: Callable[[Path, range], None],
    bar: tqdm,
) -> list[Path]:
    """Write the shards that are not there yet; all their paths."""
    paths = []
    for number, start in enumerate(range(0, count, images_per_shard)):
        rows = range(start, min(count, start + images_per_shard))
        paths.append(path_of(number))
        if paths[-1].is_file():
            bar.update(len(rows))
        else:
            write_atomically(paths[-1], lambda temporary, rows=rows: fill(temporary, rows))
    return paths


def _write_records(data: LabelledImages, out: Path, names: list[str], _: int, bar: tqdm) -> None:
    """`train.rec` appears last: where it is, all is."""
    path = out / "train.rec"
    order = np.argsort(data.labels, kind="stable")
    present, counts = np.unique(data.labels, return_counts=True)
    end = len(data) + 1  # the key past the last image
    if end + len(present) > recordio.LARGEST_EXACT:
        raise UserError(f"to: rec; its numbers are float32 and count to {recordio.LARGEST_EXACT} only; take tfrecord")
    if path.is_file():
        bar.update(len(data))
        return

    def fill(temporary: Path) -> None:
        index: list[str] = []
        with temporary.open("wb") as file:

            def append(key: int, content: bytes) -> None:
                index.append(f"{key}\t{file.tell()}\n")
                recordio.write_record(file, content)

            append(0, recordio.pack((end, end + len(present)), 0))
            for key, row in enumerate(order.tolist(), start=1):
                append(key, recordio.pack(float(data.labels[row]), key, data.encoded(row)))
                bar.update()
            stops = 1 + np.cumsum(counts)
            for number, (stop, count) in enumerate(zip(stops.tolist(), counts.tolist(), strict=True)):
                append(end + number, recordio.pack((stop - count, stop), end + number))
        lines = [f"{key}\t{data.labels[row]}\t{names[row]}\n" for key, row in enumerate(order.tolist(), start=1)]
        write_text(path.with_suffix(".lst"), "".join(lines))
        write_text(path.with_suffix(".idx"), "".join(index))

    write_atomically(path, fill)


WRITERS = {
    "folders": _write_folders,
    "tfrecord": _write_tfrecord,
    "rec": _write_records,
    "webdataset": _write_webdataset,
}
