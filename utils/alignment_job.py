"""Aligning a folder of faces: what there is to do, the worker that does it, the report, and resuming.

A unit is what one worker does at once: some images of identity folders, or one identity block. Every finished unit adds
its lines to a report of its rank, so that a killed run resumes where it stopped; at the end the parts become
`alignment_report.jsonl`, sorted by file, whatever the number of ranks and workers.
"""

import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from utils import distributed
from utils.alignment import CROP_SIZE, Detection, FaceAligner
from utils.checkpoint import read_json, write_json, write_text
from utils.config import UserError, existing_folder
from utils.data.face_files import FaceFiles
from utils.images import (
    ALIGNED_BLOCK,
    block_tile_size,
    default_threads,
    image_size,
    read_block,
    read_image,
    recorded_tile_size,
    resize,
    tile_of_block,
    write_block,
    write_image,
)
from utils.logging import get_logger

REPORT, SUMMARY, SETTINGS = "alignment_report.jsonl", "alignment_summary.json", "alignment_settings.json"
PART_PATTERN = ".alignment_report.*.part"
IMAGES_PER_UNIT = 64
NO_FACE = "no face found"
STATUSES = ("aligned", "resized", "failed", "discarded")

logger = get_logger(__name__)
Record = dict[str, Any]


@dataclass
class AlignSettings:
    """The keys of configs/align_config.yaml."""

    input_dir: str
    output_dir: str
    layout: str = "auto"
    tile_size: int | None = None
    min_face_size: float = 20
    detection_size: int = 112
    detection_padding: float = 0.1
    just_resize_if_fail: bool = False
    discard_identity_if_fail: bool = False
    processes: int | None = None
    device: str = "auto"

    def check(self) -> None:
        """Raise UserError for values that make no sense, before work starts."""
        self.input_dir = str(existing_folder(self.input_dir, "input_dir", "the folder of faces to align").resolve())
        self.output_dir = str(Path(self.output_dir).resolve())
        if self.input_dir == self.output_dir:
            raise UserError("output_dir: is input_dir; aligned faces need a folder of their own")
        if self.layout not in ("auto", "folders", "blocks"):
            raise UserError(f"layout: {self.layout}; it can be auto, folders or blocks")
        if self.just_resize_if_fail and self.discard_identity_if_fail:
            raise UserError("just_resize_if_fail, discard_identity_if_fail: both are true; a failure can do only one")
        if self.tile_size is not None and self.tile_size < 1:
            raise UserError(f"tile_size: {self.tile_size}; it is a number of pixels or null")
        if self.min_face_size < 1:
            raise UserError(f"min_face_size: {self.min_face_size}; it is at least 1 pixel, 20 suits photographs")
        if self.detection_padding < 0 or self.detection_size < 1:
            raise UserError("detection_size, detection_padding: at least 1 pixel and a share of at least 0")
        if self.tile_size is None:
            self.tile_size = recorded_tile_size(self.input_dir)
        if self.processes is not None and self.processes < 1:
            raise UserError(f"processes: {self.processes}; it is at least 1, or null")
        if self.device.partition(":")[0] not in ("auto", "cpu", "cuda"):
            raise UserError(f"device: {self.device}; it can be auto, cpu or cuda")

    def results(self) -> Record:
        """The settings on which the aligned images depend; a resumed run must have the same."""
        return {key: value for key, value in asdict(self).items() if key not in ("output_dir", "processes", "device")}


@dataclass
class Unit:
    """Input files that a worker handles together: images (whole identities where these may be discarded) or a block."""

    files: list[str]
    block: bool


def _is_block(settings: AlignSettings, file: str) -> bool:
    """Whether an image's size is that of an identity block: several whole tiles."""
    return tile_of_block(Path(settings.input_dir) / file, settings.tile_size) is not None


def find_layout(settings: AlignSettings, files: Sequence[str], *, in_shards: bool = False) -> str:
    """`folders` or `blocks`: images in subfolders are faces; those side by side are blocks where their size says so;
    `shards`: WebDataset's, whose images become folders."""
    if settings.layout != "auto":
        return settings.layout
    if in_shards:
        return "shards"
    if any("/" in file for file in files):
        return "folders"
    if _is_block(settings, files[0]):
        return "blocks"
    return "folders"


def plan(settings: AlignSettings) -> tuple[str, list[Unit]]:
    """Look through input_dir: its layout and all units, in an order that does not depend on ranks or workers."""
    faces = FaceFiles(settings.input_dir)
    files = faces.names()
    if not files:
        raise UserError(f"input_dir: no images in {settings.input_dir}; it holds folders of images or identity blocks")
    layout = find_layout(settings, files, in_shards=faces.shards is not None)
    if (layout == "shards") != (faces.shards is not None):
        raise UserError(f"layout: {layout}, but {settings.input_dir} holds WebDataset shards; leave it at auto")
    if layout == "blocks":
        for file in files:
            if not _is_block(settings, file):
                height, width = image_size(Path(settings.input_dir) / file)
                tiles = settings.tile_size or "128 (4 columns) or 112 (5 columns)"
                raise UserError(f"tile_size: {file}, {width} x {height} pixels, is no block of tiles of {tiles}")
        return layout, [Unit([file], block=True) for file in files]
    if any("/" in file for file in files) and (loose := [file for file in files if "/" not in file]):
        logger.warning("input_dir: %d images stand outside the identity folders and are left out", len(loose))
        files = [file for file in files if "/" in file]
    elif settings.discard_identity_if_fail and not any("/" in file for file in files):
        raise UserError(f"discard_identity_if_fail: {settings.input_dir} has no identity folders, only images")
    _check_names(files)
    identities: dict[str, list[str]] = {}
    for file in files:
        identities.setdefault(str(PurePosixPath(file).parent), []).append(file)
    groups = identities.values() if settings.discard_identity_if_fail else [[file] for file in files]
    units: list[Unit] = []
    for group in groups:
        if not units or len(units[-1].files) + len(group) > IMAGES_PER_UNIT:
            units.append(Unit([], block=False))
        units[-1].files += group
    return layout, units


def _check_names(files: Sequence[str]) -> None:
    """Aligned faces are PNG files: two inputs that differ only in their ending would overwrite each other."""
    seen: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(output_name(file), file)
        if other != file:
            raise UserError(f"input_dir: {other} and {file} would both become {output_name(file)}; rename one")


def output_name(file: str) -> str:
    """The aligned file of an input file: the same path, as PNG."""
    return str(PurePosixPath(file).with_suffix(".png"))


class Worker:
    """Aligns units; one in every process."""

    def __init__(self, settings: AlignSettings, device: str) -> None:
        self.settings = settings
        self.faces = FaceFiles(settings.input_dir)
        self.aligner = FaceAligner(
            min_face_size=settings.min_face_size,
            detection_size=settings.detection_size,
            detection_padding=settings.detection_padding,
            device=device,
        )

    def run(self, unit: Unit) -> list[Record]:
        """Align a unit, write its images and return its report lines."""
        return self._run_block(unit.files[0]) if unit.block else self._run_images(unit.files)

    def _run_images(self, files: Sequence[str]) -> list[Record]:
        records: list[Record] = []
        crops: list[np.ndarray | None] = []
        for start in range(0, len(files), IMAGES_PER_UNIT):  # an identity may be larger than a unit usually is
            part = files[start : start + IMAGES_PER_UNIT]
            images, reasons = [], {}
            for file in part:
                try:
                    images.append((file, self.faces.read(file)))
                except UserError as error:
                    reasons[file] = str(error)
            aligned = dict(zip((file for file, _ in images), self._align([image for _, image in images]), strict=True))
            for file in part:
                crop, record = aligned.get(file, (None, {"status": "failed", "reason": reasons.get(file)}))
                crops.append(crop)
                records.append({"file": file, **record})
        if self.settings.discard_identity_if_fail:
            spoilt = {str(PurePosixPath(r["file"]).parent) for r in records if r["status"] == "failed"}
            for record in records:
                if str(PurePosixPath(record["file"]).parent) in spoilt:
                    record["status"] = "discarded"
        for crop, record in zip(crops, records, strict=True):
            if crop is not None and record["status"] != "discarded":
                write_image(Path(self.settings.output_dir) / output_name(record["file"]), crop)
        return records

    def _run_block(self, file: str) -> list[Record]:
        try:
            block = read_image(Path(self.settings.input_dir) / file)
        except UserError as error:
            return [{"file": file, "index": 0, "status": "failed", "reason": str(error)}]
        tile_size = self.settings.tile_size or block_tile_size(block.shape[1])
        aligned = self._align(list(read_block(block, tile_size)))
        records = [{"file": file, "index": index, **record} for index, (_, record) in enumerate(aligned)]
        if self.settings.discard_identity_if_fail and any(record["status"] == "failed" for record in records):
            return [{**record, "status": "discarded"} for record in records]
        tiles = [crop for crop, _ in aligned if crop is not None]
        if tiles:
            columns = ALIGNED_BLOCK[1]
            write_image(Path(self.settings.output_dir) / output_name(file), write_block(np.stack(tiles), columns))
        return records

    def _align(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray | None, Record]]:
        """Aligned crops, None where there is nothing to write, with their report entries."""
        results: list[tuple[np.ndarray | None, Record]] = []
        for image, (crop, detection) in zip(images, self.aligner.align(images), strict=True):
            status = "aligned"
            if crop is None and self.settings.just_resize_if_fail:
                crop, status = resize(image, CROP_SIZE), "resized"
            elif crop is None:
                status = "failed"
            results.append((crop, _entry(status, detection)))
        return results


def _entry(status: str, detection: Detection) -> Record:
    found = detection.landmarks is not None
    return {
        "status": status,
        "probability": round(detection.probability, 4) if found else None,
        "faces": detection.faces,
        "landmarks": np.round(detection.landmarks.astype(float), 2).tolist() if found else None,
        **({} if found else {"reason": NO_FACE}),
    }


_worker: Worker | None = None


def _start_worker(settings: AlignSettings, device: str) -> None:
    """Prepare a worker process: one thread each, and no life after the process that started it."""
    global _worker
    torch.set_num_threads(1)

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    _worker = Worker(settings, device)


def _run_in_worker(unit: Unit) -> list[Record]:
    return _worker.run(unit)


def _results(settings: AlignSettings, units: Sequence[Unit]) -> Iterator[list[Record]]:
    """Report lines of every unit, in the order in which they are done."""
    device = str(distributed.device(settings.device))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = 1 if device.startswith("cuda") else max(1, default_threads() // ranks_here)
    processes = min(settings.processes or free, len(units))
    if processes <= 1:
        worker = Worker(settings, device)
        yield from map(worker.run, units)
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA, nor torch's threads safely
    pool = ProcessPoolExecutor(processes, context, _start_worker, (settings, device))
    try:
        futures: list[Future] = [pool.submit(_run_in_worker, unit) for unit in units]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_lines(path: Path) -> list[Record]:
    """Complete report lines of a file; the last may have been cut short by a kill."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def merge_reports(output_dir: Path) -> list[Record]:
    """Join the report and the ranks' parts into one report sorted by file, each image once; returns its lines."""
    parts = sorted(output_dir.glob(PART_PATTERN))
    records = [record for path in (output_dir / REPORT, *parts) for record in _read_lines(path)]
    unique = {(record["file"], record.get("index", 0)): record for record in records}
    records = [unique[key] for key in sorted(unique)]
    if parts:
        write_text(output_dir / REPORT, "".join(json.dumps(record) + "\n" for record in records))
        for part in parts:
            part.unlink()
    return records


def _prepare(settings: AlignSettings) -> set[str]:
    """Rank 0, before the work: check that the run goes on with the same settings; the input files already done."""
    output_dir = Path(settings.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    settings_file, wanted = output_dir / SETTINGS, settings.results()
    if settings_file.exists():
        found = read_json(settings_file)
        for key, value in wanted.items():
            if found.get(key) != value:
                raise UserError(
                    f"{key}: {value}, but {output_dir} was begun with {found.get(key)}; "
                    "go on with that, or give another output_dir"
                )
    write_json(settings_file, wanted)
    statuses: dict[str, list[str]] = {}
    for record in merge_reports(output_dir):
        statuses.setdefault(record["file"], []).append(record["status"])
    return {
        file
        for file, found in statuses.items()
        if not {"aligned", "resized"} & set(found) or (output_dir / output_name(file)).exists()
    }


def run_alignment(settings: AlignSettings) -> Record:
    """Align everything in settings.input_dir that is not done yet; returns the summary (on every rank).

    Writes the aligned images, `alignment_report.jsonl`, `alignment_summary.json` and `alignment_settings.json` to
    settings.output_dir. Units are split over ranks, and within a rank over worker processes.
    """
    settings.check()
    layout, units, done = distributed.on_main(lambda: (*plan(settings), _prepare(settings)))
    todo = [unit for unit in units if not done.issuperset(unit.files)]
    total = sum(len(unit.files) for unit in units)
    logger.info("%s: %s, %d files, %d done before", settings.input_dir, layout, total, len(done))
    started = time.monotonic()
    mine = distributed.share(todo)
    counts: Counter[str] = Counter()
    output_dir = Path(settings.output_dir)
    bar = tqdm(
        total=sum(len(unit.files) for unit in mine), desc="align", unit="file", disable=not distributed.is_main()
    )
    with bar, (output_dir / PART_PATTERN.replace("*", str(distributed.rank()))).open("a", encoding="utf-8") as part:
        for records in _results(settings, mine):
            part.write("".join(json.dumps(record) + "\n" for record in records))
            part.flush()
            counts.update(record["status"] for record in records)
            bar.update(len({record["file"] for record in records}))
            bar.set_postfix(counts, refresh=False)
    distributed.barrier()
    summary = distributed.on_main(lambda: _summarise(settings, layout, time.monotonic() - started, done))
    if not summary["aligned"] + summary["resized"]:
        raise UserError(
            f"input_dir: no image was aligned of {summary['images']} in {settings.input_dir}; "
            f"{output_dir / REPORT} says why (min_face_size and detection_size decide how small a face may be)"
        )
    return summary


def _summarise(settings: AlignSettings, layout: str, seconds: float, done: set[str]) -> Record:
    output_dir = Path(settings.output_dir)
    records = merge_reports(output_dir)
    counts = Counter(record["status"] for record in records)
    new = sum(record["file"] not in done for record in records)
    identities = {
        record["file"] if layout == "blocks" else str(PurePosixPath(record["file"]).parent) for record in records
    }
    summary = {
        "images": len(records),
        "identities": len(identities),
        **{status: counts[status] for status in STATUSES},
        "unreadable": sum(
            record.get("reason", NO_FACE) != NO_FACE for record in records if record["status"] == "failed"
        ),
        "rate": counts["aligned"] / max(1, len(records)),
        "layout": layout,
        "seconds": round(seconds, 1),
        "images_per_second": round(new / max(seconds, 1e-9), 2),
        "settings": settings.results(),
    }
    write_json(output_dir / SUMMARY, summary)
    return summary
