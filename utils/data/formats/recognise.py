"""Which format a path holds, by its content."""

from __future__ import annotations

import tarfile
from pathlib import Path

from utils import safe_pickle
from utils.config import UserError
from utils.data.formats import recordio, tfrecord
from utils.data.formats.blocks import open_blocks
from utils.data.formats.folders import read_class_folders, read_name_list
from utils.data.formats.labelled import EncodedImages, LabelledImages
from utils.data.formats.pairs import holds_pairs, pairs_of_pickle, read_pairs
from utils.data.formats.recordio import RecordImages
from utils.data.formats.tfrecord import read_tfrecord
from utils.data.formats.webdataset import ShardImages
from utils.data.formats.writers import is_unfinished
from utils.images import read_bytes

NAME_LISTS = ("image_names.pkl", "image_names.txt")
PICKLES = (".pkl", ".pickle", ".bin")


def open_labelled(path: str | Path, root: str | Path | None = None) -> LabelledImages:
    """The labelled images at `path`, in whichever format they are.

    A folder: class folders, identity blocks, one with a .rec file, with .tar shards, with TFRecord shards and their
    index, or with a name list (`image_names.pkl` or `.txt`) beside the images. A file: .rec, .idx, .tar, an index of
    TFRecord shards, a name list.

    `root`: where the images of a name list or the shards of an index are, if not beside it.
    Raises UserError for anything else, and for files that are damaged or would lead outside their folder.
    """
    images = open_images(path, root)
    if not isinstance(images, LabelledImages):
        raise UserError(f"{path}: verification pairs; a set of labelled images is wanted")
    return images


def open_images(path: str | Path, root: str | Path | None = None) -> EncodedImages:
    """As `open_labelled`; verification sets too: insightface's `.bin`, and a `pairs.txt` that begins with its counts,
    whose persons' folders are in `root` or beside it."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path, root)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    head = _head(path, 12)
    if head.startswith(recordio.MAGIC_BYTES):
        return RecordImages(path)
    if tfrecord.begins_record(head):
        raise UserError(f"{path}: one shard of a TFRecord set; give its index, or the folder with both")
    if head.startswith(b"\x80") or path.suffix in PICKLES:
        value = safe_pickle.loads(read_bytes(path), str(path))
        return (
            pairs_of_pickle(path, value) if holds_pairs(value) or path.suffix == ".bin" else read_name_list(path, root)
        )
    if tarfile.is_tarfile(path):
        return ShardImages(path, [path])
    return _open_text(path, root)


def _head(path: Path, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _open_text(path: Path, root: str | Path | None) -> EncodedImages:
    first = _head(path, 4096).decode("utf-8", "replace").partition("\n")[0].rstrip()
    fields = first.split()
    if 1 <= len(fields) <= 2 and all(field.isdecimal() for field in fields):
        record = path.with_suffix(".rec")
        return RecordImages(record) if record.is_file() else read_pairs(path, path.parent if root is None else root)
    columns = first.split("\t")
    if len(columns) in (3, 4) and all(field.strip().isdecimal() for field in columns[1:]):
        return read_tfrecord(path, root)
    return read_name_list(path, root)


def _open_folder(folder: Path, root: str | Path | None) -> EncodedImages:
    if is_unfinished(folder):
        raise UserError(f"{folder}: a conversion that was interrupted; give the same command again, and it goes on")
    records = sorted(folder.glob("*.rec"))
    if len(records) > 1:
        raise UserError(f"{folder}: {', '.join(path.name for path in records)}; give one of these files")
    if records:
        return RecordImages(records[0])
    shards = sorted(folder.glob("*.tar"))
    if shards:
        return ShardImages(folder, shards)
    indices = _indices(folder)
    if len(indices) > 1:
        raise UserError(f"{folder}: {', '.join(str(path) for path in indices)}; give one of these indices")
    if indices:
        return read_tfrecord(indices[0], root)
    if any(folder.glob("*.tfrecord")):
        raise UserError(f"{folder}: TFRecord shards without <name>.txt or <name>.index, which tells what is where")
    names = next((folder / name for name in NAME_LISTS if (folder / name).is_file()), None)
    if names is not None:
        return open_images(names, root)
    return open_blocks(folder) or read_class_folders(folder)


def _indices(folder: Path) -> list[Path]:
    """The indices of TFRecord sets in `folder`, or one level up when the shards are in it; those with labels first."""
    found: dict[str, Path] = {}
    for place in (folder, folder.parent):
        for suffix in (".txt", ".index"):
            for index in sorted(place.glob(f"*{suffix}")):
                homes = (folder, folder / index.stem) if place == folder else (folder,)
                if any((home / tfrecord.SHARD.format(index.stem, 0)).is_file() for home in homes):
                    found.setdefault(index.stem, index)
    return list(found.values())
