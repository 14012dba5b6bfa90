"""A generated data set on the disk: images, their manifest, and what is needed to go on after a kill.

    <save_dir>/<identity>/<k>.png      or identity blocks, or shards: see diffusion.layouts
    <save_dir>/dataset.json            what it is: settings (the same folder never mixes two), counts, code, licence
    <save_dir>/manifest.jsonl          file, identity, index, seed, switch_t, sha256 of every image, angle (radians) of
                                       perturbed ones; written at the end
    <save_dir>/attention_change.npz    d of every image (two-stage sampler)
    <save_dir>/README.md               the data card; preview.html: a look
    <save_dir>/.lock                   while drawing: who does
    <save_dir>/.parts/                 while drawing:
        <run>-<rank>.jsonl             lines of one process, appended after their images; and of packed files
        run_<run>/                     files being written
        images/<identity>/<k>.png      images that wait to be packed

An image counts as drawn when its line and its file are there. Files are written into run_<run>, synced and renamed;
lines come after them, so that a process may be killed at any moment. A run begins by deleting the run_ folders of
those before: a process that outlived its run can rename nothing any more.
"""

import json
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diffusion.calibration import CALIBRATION_FILE
from diffusion.layouts import Layout, Sample, digests
from diffusion.sample_lines import MANIFEST_COLUMNS, OPTIONAL_COLUMNS, Found, Record, line_of, read_lines, write_series
from diffusion.sampling_preview import PREVIEW_FILE
from utils.checkpoint import sync_folder, write_json, write_text
from utils.config import UserError
from utils.folder_lock import FolderLock
from utils.images import default_threads, list_images
from utils.logging import get_logger

log = get_logger(__name__)

DATASET_FILE = "dataset.json"
PIECE = 4  # images that a process takes at a time
SETTLING = 60.0  # seconds in which a file that another machine wrote shows up here
# Of data sets that were begun before there were these settings
BEFORE_THEY_WERE_SETTINGS = {"sampling.float32_matmul_precision": "highest"}
_OWN_FILES = ("log.txt", PREVIEW_FILE, CALIBRATION_FILE)


@dataclass
class Piece:
    """Work that one process takes at a time: images of one group; none where the group is only to be packed."""

    group: int
    samples: list[Sample]


class SampleStore:
    """The folder of one data set; for the main process alone."""

    def __init__(self, save_dir: str | Path, layout: Layout) -> None:
        self.folder, self.layout = Path(save_dir), layout
        self.manifest = self.folder / "manifest.jsonl"
        self.series = self.folder / "attention_change.npz"
        self.dataset = self.folder / DATASET_FILE
        self.parts = self.folder / ".parts"
        self.waiting = self.parts / "images"
        self.lock = FolderLock(self.folder, "sampling.save_dir")

    def claim(self, settings: Mapping[str, Any], sizes: Mapping[str, int], about: Mapping[str, Any]) -> str:
        """Take the folder for this run, whose name is returned; keep the settings, or check that they are the same.

        `settings`: what decides how an image looks; none of it may change. `sizes`: may grow, not shrink (packed: only
        the number of identities). `about`: what else dataset.json tells. Raises UserError otherwise, once there are
        images (settings that drew none are replaced), and where another run holds the folder.
        """
        self.lock.acquire()
        value = {"complete": False, **about, "settings": dict(settings), "sizes": dict(sizes)}
        value = json.loads(json.dumps(value))  # what a file keeps: lists for tuples
        if self.dataset.is_file():
            known = self.described()
            change = self._first_change(known, value)
            if change and self._has_images():
                raise UserError(
                    f"{change}; {self.folder} holds images drawn with other settings: give another sampling.save_dir, "
                    "or delete it"
                )
            if change:
                (self.folder / CALIBRATION_FILE).unlink(missing_ok=True)
                for path in self.parts.glob("*.jsonl"):
                    path.unlink()
            else:
                versions = [*known["code_versions"], *value["code_versions"]]
                value["code_versions"] = sorted({*versions}, key=versions.index)
        else:
            foreign = [p.name for p in self.folder.iterdir() if p.name not in _OWN_FILES and not p.name.startswith(".")]
            if foreign:
                raise UserError(
                    f"sampling.save_dir: {self.folder} holds other files ({foreign[0]}) and no {DATASET_FILE}; "
                    "give a new folder"
                )
        write_json(self.dataset, value)
        return self._begin()

    def _begin(self) -> str:
        """Clear what earlier runs were writing when they ended; the name of this one, which sorts after theirs."""
        names = [path.name.removeprefix("run_").partition("_")[0] for path in self.parts.glob("*")]
        number = 1 + max((int(name) for name in names if name.isdecimal()), default=0)
        for path in [*self.parts.glob("run_*"), *self.parts.glob("ended_*")]:
            ended = path.rename(path.with_name(f"ended_{uuid.uuid4().hex}"))  # out of reach of who still writes there
            shutil.rmtree(ended)
        self._clear_temporary()
        run = f"{number:06d}_{uuid.uuid4().hex[:8]}"
        self.run_folder(run).mkdir(parents=True)
        return run

    def _clear_temporary(self) -> None:
        for path in self.folder.glob(".*.tmp"):  # of utils.checkpoint.write_atomically
            path.unlink(missing_ok=True)

    def run_folder(self, run: str) -> Path:
        """Where the files of a run are written before they are renamed."""
        return self.parts / f"run_{run}"

    def described(self) -> dict[str, Any]:
        """dataset.json as it is. UserError for a damaged one: nothing else tells what the images were drawn with."""
        try:
            told = json.loads(self.dataset.read_text(encoding="utf-8"))
            return {**told, "settings": dict(told["settings"]), "sizes": dict(told["sizes"])}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"sampling.save_dir: {self.dataset} is damaged ({error}); put back a copy, or give another folder"
            ) from error

    def _first_change(self, known: Mapping[str, Any], value: Mapping[str, Any]) -> str:
        """What of `value` does not go with the settings in the folder; empty where all does."""
        known_settings = {**BEFORE_THEY_WERE_SETTINGS, **known["settings"]}
        for key in sorted({*known_settings, *value["settings"]}):
            was, now = known_settings.get(key), value["settings"].get(key)
            if was != now:
                told = [told["source"].get("step") for told in (value, known)] if key == "checkpoint" else []
                if None not in told and len(set(told)) == 2:
                    return f"checkpoint: step {told[0]}, before step {told[1]} (checkpoint.global_step chooses)"
                return f"{key}: {_short(now)}, before {_short(was)}"
        for key, now in value["sizes"].items():
            was = known["sizes"][key]
            grown_file = now > was and self.layout.is_packed and key == "sampling.n_samples_per_context"
            if now < was or grown_file:
                return f"{key}: {now}, before {was}"
        return ""

    def _has_images(self) -> bool:
        found, present = self._lines(), self._present()
        return any(self.layout.disk_file(record["file"]) in present for record in found.records.values()) or any(
            list_images(self.waiting)
        )

    def plan(self, *, with_series: bool, verify: bool) -> list[Piece]:
        """What is still to be done, in pieces.

        Of what the last run left, the newest files are read and hashed, with `verify` all; damaged ones are deleted and
        drawn again. `with_series`: an image whose d is lost counts as not drawn.
        """
        found = self._lines()
        self._delete_damaged(found, list(found.records) if verify else found.newest, show=verify)
        finished, waiting = self._state(found, with_series)
        pieces, lost = [], 0
        for number in range(len(self.layout)):
            group = self.layout.group(number)
            if all(sample in finished for sample in group):
                continue
            lacking = [sample for sample in group if sample not in (waiting if self.layout.is_packed else finished)]
            lost += sum(sample in found.records for sample in lacking)
            starts = range(0, max(1, len(lacking)), PIECE)
            pieces += [Piece(number, lacking[start : start + PIECE]) for start in starts]
        if lost:
            log.info("%d images have a line, but no sound file that holds them: they are drawn again", lost)
        return pieces

    def _lines(self) -> Found:
        return read_lines(self.manifest, self.series, self.parts, self.layout)

    def _present(self) -> set[str]:
        """The files of images and shards in the folder."""
        return {*list_images(self.folder), *(path.name for path in self.folder.glob("*.tar"))}

    def _state(self, found: Found, with_series: bool) -> tuple[dict[Sample, Record], dict[Sample, Record]]:
        """Of the images with a line: those that are finished, and those that wait to be packed."""
        records = found.records
        if with_series:
            records = {key: record for key, record in records.items() if record.get("d") is not None}
        present, layout = self._present(), self.layout
        if not layout.is_packed:
            return {s: record for s, record in records.items() if record["file"] in present}, {}
        finished: dict[Sample, Record] = {}
        for number in range(len(layout)):
            group, file = layout.group(number), layout.packed_file(number)
            count, digest = found.packed.get(file, (0, ""))
            if file in present and count == len(group) and all(sample in records for sample in group):
                whole = {} if file != records[group[0]]["file"] else {"sha256": digest}  # a block has one for all
                finished.update({sample: {**records[sample], **whole} for sample in group})
        names = set(list_images(self.waiting))
        waiting = {s: r for s, r in records.items() if s not in finished and waiting_file(layout, s) in names}
        return finished, waiting

    def _delete_damaged(self, found: Found, samples: Sequence[Sample], *, show: bool) -> None:
        """Hash the files of these images and delete those that are not as their lines say."""
        layout, wanted = self.layout, {}  # by path relative to the folder: the sha256 of what it holds, by name
        present, names = self._present(), set(list_images(self.waiting))
        for sample in samples:
            record, waiting = found.records[sample], waiting_file(layout, sample)
            file = layout.disk_file(record["file"])
            if waiting in names:
                path = (self.waiting / waiting).relative_to(self.folder).as_posix()
                wanted[path] = {path: record["sha256"]}
            elif file in present and (not layout.is_packed or file in found.packed):
                digest = found.packed[file][1] if layout.is_packed and file == record["file"] else record["sha256"]
                wanted.setdefault(file, {})[record["file"]] = digest
        with ThreadPoolExecutor(default_threads()) as pool:
            hashed = pool.map(lambda path: digests(self.folder, path), wanted)
            bar = tqdm(hashed, total=len(wanted), desc="verifying", unit="file", disable=not show or not wanted)
            damaged = [
                path
                for (path, digest), is_now in zip(wanted.items(), bar, strict=True)
                if any(is_now.get(name) != value for name, value in digest.items())
            ]
        for path in damaged:
            log.warning("%s: not as its line says; it is drawn again", self.folder / path)
            (self.folder / path).unlink()

    def merge(self, timesteps: Sequence[int] | None) -> list[Record]:
        """Write attention_change.npz and manifest.jsonl; the lines of the latter, in the order of identities.

        `timesteps` (S - 1,): those that the rows of d belong to; None: the sampler has no d. UserError when an image is
        missing.
        """
        wanted = list(self.layout.samples())
        deadline = time.monotonic() + SETTLING
        while True:
            records, _ = self._state(self._lines(), with_series=timesteps is not None)
            lost = [sample for sample in wanted if sample not in records]
            if not lost:
                break
            if time.monotonic() > deadline:
                raise UserError(
                    f"sampling.save_dir: {len(lost)} of {len(wanted)} images are not in {self.folder} (the first: "
                    f"{lost[0]}); all processes must see this folder; the same command draws what is missing"
                )
            time.sleep(1)  # a network file system shows the files of other machines late
        columns = (*MANIFEST_COLUMNS, *(column for column in OPTIONAL_COLUMNS if column in records[wanted[0]]))
        lines = [{column: records[sample][column] for column in columns} for sample in wanted]
        if timesteps is not None:
            d = np.array([records[sample]["d"] for sample in wanted], dtype=np.float32).T  # (S - 1, n)
            write_series(self.series, wanted, d, timesteps)
        write_text(self.manifest, "".join(line_of(line) for line in lines))
        strange = self._present() - {self.layout.disk_file(line["file"]) for line in lines}
        if strange:
            log.warning("%s: %d files are no images of this data set: %s", self.folder, len(strange), min(strange))
        return lines

    def read(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Finished images, uint8 (H, W, 3) each; UserError for one that has been damaged since."""
        try:
            return self.layout.read(self.folder, samples)
        except UserError as error:
            raise UserError(f"{error}; sampling.verify=true finds what is damaged and draws it again") from error

    def finish(self, description: Mapping[str, Any]) -> None:
        """Keep the finished data set's description; drop what only drawing needs."""
        write_json(self.dataset, {**self.described(), **description, "complete": True})
        sync_folder(self.folder)  # the manifest's name is on the disk before the parts are gone
        shutil.rmtree(self.parts)
        self._clear_temporary()


def waiting_file(layout: Layout, sample: Sample) -> str:
    """Where an image waits to be packed, below .parts/images."""
    return f"{sample[0]}/{sample[1]}{layout.waiting_suffix}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:20] + "..."
