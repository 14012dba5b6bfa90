"""The lines that tell of drawn images: of the manifest, and those that each process appends while it draws.

A line of an image is a line of the manifest; in .parts it has `d`, too. Where images are packed, another kind of line
tells of their file: `packed` (its path), `images` (their number), `sha256` (of the file).

Legend: S steps of stage 1, n images.
"""

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.layouts import Layout, Sample
from utils.checkpoint import write_atomically
from utils.config import UserError

MANIFEST_COLUMNS = ("file", "identity", "index", "seed", "switch_t", "sha256")
OPTIONAL_COLUMNS = ("angle",)  # of identity perturbation, radians
NEWEST = 64  # last lines of each process of the last run, whose files a restart verifies

Record = dict[str, Any]


@dataclass
class Found:
    """What the lines in a folder tell."""

    records: dict[Sample, Record]
    packed: dict[str, tuple[int, str]]  # by file: number of images, sha256 (of a block)
    newest: list[Sample]  # whose lines came last


def line_of(record: Mapping[str, Any]) -> str:
    """A record as a line of text."""
    return json.dumps(record) + "\n"


def read_lines(manifest: Path, series: Path, parts: Path, layout: Layout) -> Found:
    """All whole lines: of the manifest with its d from `series`, then of the parts, in the order of their runs."""
    series_of = _read_series(series)
    found = Found({}, {}, [])
    files = sorted(parts.glob("*.jsonl"))
    last = files[-1].name.partition("-")[0] if files else ""
    for path in (manifest, *files):
        keys: list[Sample] = []
        for record in _lines_of(path):
            if "packed" in record:
                found.packed[record["packed"]] = (record["images"], record["sha256"])
                continue
            key = (record["identity"], record["index"])
            if path == manifest:
                file = layout.disk_file(record["file"])
                found.packed[file] = (found.packed.get(file, (0, ""))[0] + 1, record["sha256"])
                record["d"] = series_of.get(key)
            elif "d" in record:
                record["d"] = np.array(record["d"], np.float32)
            found.records[key] = record
            keys.append(key)
        if path.name.partition("-")[0] == last:
            found.newest += keys[-NEWEST:]
    return found


def _lines_of(path: Path) -> Iterator[Record]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut short by a kill: the image is drawn again
            if isinstance(record, dict) and ("packed" in record or _is_of_image(record)):
                yield record


def _is_of_image(record: Record) -> bool:
    """Whether all columns are there, and those by which an image is found are what they should be."""
    kinds = {"file": str, "identity": str, "index": int}
    return all(c in record for c in MANIFEST_COLUMNS) and all(isinstance(record[c], k) for c, k in kinds.items())


def write_series(path: Path, samples: Sequence[Sample], d: np.ndarray, timesteps: Sequence[int]) -> None:
    """Keep d (S - 1, n) of all images; `timesteps` (S - 1,): those that its rows belong to."""
    arrays = {
        "identity": np.array([name for name, _ in samples]),
        "index": np.array([index for _, index in samples]),
        "d": d,
        "timesteps": np.array(timesteps),
    }

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:  # numpy appends .npz to a bare name
            np.savez_compressed(file, **arrays)

    write_atomically(path, save)


def _read_series(path: Path) -> dict[Sample, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys = zip(arrays["identity"].tolist(), arrays["index"].tolist(), strict=True)
            return dict(zip(keys, arrays["d"].T, strict=True))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({error}); put back a copy, or delete it: the images are then drawn again"
        ) from error
