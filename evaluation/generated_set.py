"""A generated data set as an evaluation sees it: its images in any format, and what was recorded of each.

sample.py records every image's seed and switch step (manifest.jsonl), its d (attention_change.npz) and its own settings
(dataset.json); align.py what became of it (alignment_report.jsonl). They are found beside the images or elsewhere, and
joined by identity and index.

Legend: N images, K identities, S steps of stage 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from utils.alignment_job import REPORT
from utils.checkpoint import read_json
from utils.config import UserError, existing_file, existing_folder
from utils.data.formats.recognise import open_labelled
from utils.data.formats.selected import SelectedImages
from utils.logging import get_logger

log = get_logger(__name__)

MANIFEST, SERIES, DATASET = "manifest.jsonl", "attention_change.npz", "dataset.json"
SERIES_SHOWN = 200  # images whose d is kept for the report
WRITTEN = ("aligned", "resized")  # statuses of images that alignment wrote
MADE_OF_NAME = re.compile(r"[^\w.-]+")


@dataclass
class DataSettings:
    """The `data` section of evaluate_config.yaml, and an entry of `sets`."""

    root: str | None = None
    name: str | None = None  # None: the last part of `root`
    samples_dir: str | None = None  # None: `root`
    alignment_report: str | None = None  # None: in `root` or `samples_dir`, where it is there


@dataclass
class GeneratedSet:
    """Images identity by identity, and what is known of each; an absent column is None."""

    name: str
    root: str
    images: SelectedImages
    index: np.ndarray | None = None  # (N,) int, number within the identity, as in the manifest; -1 unknown
    seed: np.ndarray | None = None  # (N,) int64, -1 unknown
    switch_t: np.ndarray | None = None  # (N,) int, -1 where the image did not switch
    attention_change: tuple[np.ndarray, np.ndarray, float] | None = None  # timesteps (S,), d (n, S), threshold
    alignment: list[dict[str, Any]] | None = None  # lines of the report
    provenance: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def open_set(settings: DataSettings, key: str) -> GeneratedSet:
    """Open what `settings`, the section named `key`, describes; images are listed, not read.

    Raises UserError for folders that are not there, sets that cannot be read, records that are damaged or tell of other
    images, and fewer than two identities.
    """
    if settings.root is None or not Path(settings.root).expanduser().is_file():
        existing_folder(settings.root, f"{key}.root", "the images of a generated data set")
    root = Path(settings.root).expanduser()
    places = [root if root.is_dir() else root.parent]
    if settings.samples_dir is not None:
        samples = existing_folder(settings.samples_dir, f"{key}.samples_dir", f"the folder with {MANIFEST}")
        if not (samples / MANIFEST).is_file() and not (samples / DATASET).is_file():
            raise UserError(
                f"{key}.samples_dir: {samples} holds neither {MANIFEST} nor {DATASET}; sample.py writes both"
            )
        places.insert(0, samples)
    report = settings.alignment_report and existing_file(
        settings.alignment_report, f"{key}.alignment_report", f"the {REPORT} that align.py wrote"
    )
    try:
        everything = open_labelled(root)
    except UserError as error:
        raise UserError(f"{key}.root: {error}") from error
    images = SelectedImages(everything, np.argsort(everything.labels, kind="stable"))
    if len(images.identities) < 2:
        raise UserError(f"{key}.root: {root} holds {len(images.identities)} identities with images; two are needed")
    name = MADE_OF_NAME.sub("_", settings.name or root.resolve().name).strip("._") or "set"
    found = GeneratedSet(name, str(root), images)
    report = report or _first(places, REPORT)
    if report is not None:
        found.alignment = list(_json_lines(report, ("file", "status")))
    if (path := _first(places, DATASET)) is not None:
        found.provenance = read_json(path, "put back a copy, or take it away")
    if (path := _first(places, MANIFEST)) is not None:
        _join_manifest(found, path, key)
    if (path := _first(places, SERIES)) is not None:
        found.attention_change = _read_series(path, found.provenance.get("threshold"))
    return found


def _first(places: list[Path], name: str) -> Path | None:
    return next((place / name for place in places if (place / name).is_file()), None)


def _join_manifest(found: GeneratedSet, path: Path, key: str) -> None:
    """Fill in index, seed and switch_t by (identity, index)."""
    records = {
        (str(r["identity"]), r["index"]): r for r in _json_lines(path, ("identity", "index", "seed", "switch_t"))
    }
    indices = indices_of(found.images, found.alignment)
    identities = [found.images.identities[label] for label in found.images.labels]
    lines = [records.get((name, index)) for name, index in zip(identities, indices, strict=True)]
    known = sum(line is not None for line in lines)
    if not known:
        raise UserError(
            f"{key}.samples_dir: {path} tells of {len(records)} images, none of them in {found.root} (there is "
            f"{found.images.names[0]}); give the folder that these images were drawn into"
        )
    if known < len(lines):
        found.warnings.append(f"{len(lines) - known} of {len(lines)} images do not stand in {path.name}")
    found.index = np.array(indices, np.int64)
    found.seed = np.array([-1 if line is None else line["seed"] for line in lines], np.int64)
    switched = [None if line is None else line["switch_t"] for line in lines]
    if any(t is not None for t in switched):
        found.switch_t = np.array([-1 if t is None else t for t in switched], np.int64)


def indices_of(images: SelectedImages, alignment: list[dict[str, Any]] | None) -> list[int]:
    """The index of every image within its identity as it was drawn, from its name; -1 where that is no number.

    Aligned identity blocks are closed up where no face was found: there the report, whose lines then have an index,
    tells which image each tile is.
    """
    kept: dict[str, list[int]] = {}
    for line in sorted((line for line in alignment or () if "index" in line), key=lambda line: line["index"]):
        tiles = kept.setdefault(PurePosixPath(line["file"]).with_suffix("").as_posix(), [])
        if line["status"] in WRITTEN:
            tiles.append(line["index"])
    indices = []
    for name, label in zip(images.names, images.labels, strict=True):
        stem = PurePosixPath(name).stem
        number = int(stem) if stem.isascii() and stem.isdecimal() else -1
        tiles = kept.get(images.identities[label])
        if tiles is not None:
            number = tiles[number] if 0 <= number < len(tiles) else -1
        indices.append(number)
    return indices


def _read_series(path: Path, threshold: float | None) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Timesteps (S,), d (n, S) of images spread over the set, and the threshold; None where that is not known."""
    if threshold is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            d, timesteps = arrays["d"].T, arrays["timesteps"]  # (N, S), (S,)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not the series of d that sample.py writes ({error})") from error
    rows = np.unique(np.linspace(0, len(d) - 1, min(len(d), SERIES_SHOWN)).astype(int))
    return timesteps, d[rows], float(threshold)


def _json_lines(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl file; UserError for a line that is none or lacks one of `columns`."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number}: not JSON; damaged, or still being written") from error
            missing = [c for c in columns if not isinstance(record, Mapping) or c not in record]
            if missing:
                raise UserError(f"{path} line {number}: has no {missing[0]}; {', '.join(columns)} are wanted")
            yield record
