"""A generated data set on the disk: images, their manifest, and what is needed to go on after a kill.

    <save_dir>/<identity>/<k>.png      or <save_dir>/<identity>.png, an identity block
    <save_dir>/sampling.json           the settings; the same folder never mixes two of them
    <save_dir>/manifest.jsonl          file, identity, index, seed, switch_t, sha256 of every image, angle (radians) of
                                       perturbed ones; written at the end
    <save_dir>/attention_change.npz    d of every image (two-stage sampler)
    <save_dir>/.parts/*.jsonl          while drawing: the lines of each process, appended after their images

An image counts as drawn when its line and its file exist. Images are written to a temporary name and renamed, lines
come after them, so a process may be killed at any moment.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.calibration import CALIBRATION_FILE
from diffusion.sampling_preview import PREVIEW_FILE
from utils.checkpoint import write_atomically, write_json, write_text
from utils.config import UserError
from utils.images import SAMPLED_BLOCK, encode_image, read_block, read_image, write_block

SAVE_MODES = ("folders", "blocks")
MANIFEST_COLUMNS = ("file", "identity", "index", "seed", "switch_t", "sha256")
OPTIONAL_COLUMNS = ("angle",)  # of identity perturbation, radians
BLOCK_COLUMNS = SAMPLED_BLOCK[1]
_OWN_FILES = ("log.txt", PREVIEW_FILE, CALIBRATION_FILE)
_WAITING_BATCHES = 2  # how far drawing may run ahead of the disk

Record = dict[str, Any]  # a line of the manifest; in .parts also `d`, the image's series
Sample = tuple[str, int]  # identity and index


class SampleStore:
    """The folder of one data set. Everything but `writer` belongs to the main process."""

    def __init__(self, save_dir: str | Path, save_mode: str) -> None:
        if save_mode not in SAVE_MODES:
            raise UserError(f"sampling.save_mode: {save_mode!r} is not one of {', '.join(SAVE_MODES)}")
        self.folder, self.save_mode = Path(save_dir), save_mode
        self.manifest = self.folder / "manifest.jsonl"
        self.series = self.folder / "attention_change.npz"
        self.settings = self.folder / "sampling.json"
        self.parts = self.folder / ".parts"

    def file_of(self, identity: str, index: int) -> str:
        """Path of an image relative to the folder."""
        return f"{identity}/{index}.png" if self.save_mode == "folders" else f"{identity}.png"

    def claim(self, fixed: Mapping[str, Any], sizes: Mapping[str, int], source: Mapping[str, Any]) -> None:
        """Keep the settings in the folder, or check that they are those of an earlier run.

        `fixed`: what decides how an image looks; none of it may change. `sizes`: may grow, not shrink (in blocks only
        the number of identities: a block is one file). `source`: where the files lay, for the record. UserError
        otherwise, once there are images; settings that drew none are replaced.
        """
        value = {"fixed": dict(fixed), "sizes": dict(sizes), "source": dict(source)}
        value = json.loads(json.dumps(value))  # what a file keeps: lists for tuples
        if self.settings.is_file():
            change = self._first_change(json.loads(self.settings.read_text()), value)
            if change and self.records():
                raise UserError(
                    f"{change}; {self.folder} holds images drawn with other settings: give another sampling.save_dir, "
                    "or delete it"
                )
            if change:
                (self.folder / CALIBRATION_FILE).unlink(missing_ok=True)
        elif self.folder.is_dir():
            foreign = [p.name for p in self.folder.iterdir() if p.name not in _OWN_FILES and not p.name.startswith(".")]
            if foreign:
                raise UserError(
                    f"sampling.save_dir: {self.folder} holds other files ({foreign[0]}) and no sampling.json; "
                    "give a new folder"
                )
        write_json(self.settings, value)

    def _first_change(self, known: Mapping[str, Any], value: Mapping[str, Any]) -> str:
        """What of `value` does not go with the settings in the folder; empty where all does."""
        for key in sorted({*known["fixed"], *value["fixed"]}):
            was, now = known["fixed"].get(key), value["fixed"].get(key)
            if was != now:
                told = [settings["source"].get("step") for settings in (value, known)] if key == "checkpoint" else []
                if None not in told and len(set(told)) == 2:
                    return f"checkpoint: step {told[0]}, before step {told[1]} (checkpoint.global_step chooses)"
                return f"{key}: {_short(now)}, before {_short(was)}"
        for key, now in value["sizes"].items():
            was = known["sizes"][key]
            grown_block = now > was and self.save_mode == "blocks" and key == "sampling.n_samples_per_context"
            if now < was or grown_block:
                return f"{key}: {now}, before {was}"
        return ""

    def records(self) -> dict[Sample, Record]:
        """All images drawn so far: whole lines of the manifest and its parts whose file exists."""
        series = self._read_series()
        found: dict[Sample, Record] = {}
        for path in (self.manifest, *sorted(self.parts.glob("*.jsonl"))):
            for record in _read_lines(path):
                key = (record["identity"], record["index"])
                if "d" not in record and key in series:
                    record["d"] = series[key]
                found[key] = record
        present: dict[str, bool] = {}
        for record in found.values():
            if record["file"] not in present:
                present[record["file"]] = (self.folder / record["file"]).is_file()
        return {key: record for key, record in found.items() if present[record["file"]]}

    def missing(self, identities: Sequence[str], n_samples: int, *, with_series: bool) -> list[list[Sample]]:
        """What is still to be drawn, in units that one process draws: images, or whole blocks.

        Lines of what is there are gathered in one part, so that a line cut short by a kill is never appended to.
        """
        records = self.records()
        if with_series:
            records = {key: record for key, record in records.items() if "d" in record}
        if records:
            write_text(self.parts / "drawn.jsonl", "".join(_line(record) for record in records.values()))
        for path in self.parts.glob("process_*.jsonl"):
            path.unlink()
        units = []
        for name in identities:
            unit = [(name, index) for index in range(n_samples)]
            lacking = [sample for sample in unit if sample not in records]
            if self.save_mode == "folders":
                units += [[sample] for sample in lacking]
            elif lacking:
                units.append(unit)
        return units

    def writer(self, process: int, n_samples: int) -> "SampleWriter":
        """Where process number `process` puts its images."""
        return SampleWriter(self, self.parts / f"process_{process:05d}.jsonl", n_samples)

    def merge(self, identities: Sequence[str], n_samples: int, timesteps: Sequence[int] | None) -> int:
        """Write manifest.jsonl in the order of identities, and attention_change.npz; drop the parts. Returns the count.

        `timesteps` (S - 1,): those that the rows of d belong to; None: the sampler has no d. RuntimeError when an image
        is missing.
        """
        records = self.records()
        wanted = [(name, index) for name in identities for index in range(n_samples)]
        lost = [sample for sample in wanted if sample not in records]
        if lost:
            raise RuntimeError(
                f"{len(lost)} of {len(wanted)} images are not in {self.folder} (the first: {lost[0]}); "
                "do all processes see this folder?"
            )
        if timesteps is not None:
            arrays = {
                "identity": np.array([name for name, _ in wanted]),
                "index": np.array([index for _, index in wanted]),
                "d": np.array([records[sample]["d"] for sample in wanted], dtype=np.float32).T,  # (S - 1, n)
                "timesteps": np.array(timesteps),
            }
            write_atomically(self.series, lambda path: _save_arrays(path, arrays))
        columns = (*MANIFEST_COLUMNS, *(column for column in OPTIONAL_COLUMNS if column in records[wanted[0]]))
        kept = ({column: records[sample][column] for column in columns} for sample in wanted)
        write_text(self.manifest, "".join(_line(record) for record in kept))
        if self.parts.is_dir():
            for path in self.parts.iterdir():
                path.unlink()
            self.parts.rmdir()
        return len(wanted)

    def read(self, identity: str, n_samples: int, most: int) -> np.ndarray:
        """The first images of a person, `most` at most, uint8 (k, H, W, 3)."""
        count = min(most, n_samples)
        if self.save_mode == "folders":
            return np.stack([read_image(self.folder / self.file_of(identity, index)) for index in range(count)])
        block = read_image(self.folder / self.file_of(identity, 0))
        return read_block(block, block.shape[1] // BLOCK_COLUMNS)[:count]

    def _read_series(self) -> dict[Sample, list[float]]:
        if not self.series.is_file():
            return {}
        with np.load(self.series, allow_pickle=False) as arrays:
            keys = zip(arrays["identity"].tolist(), arrays["index"].tolist(), strict=True)
            return dict(zip(keys, arrays["d"].T.tolist(), strict=True))


class SampleWriter:
    """Encodes and writes in a thread while the next batch is drawn. Leaving the `with` block waits for it."""

    def __init__(self, store: SampleStore, part: Path, n_samples: int) -> None:
        self.store, self.part, self.n_samples = store, part, n_samples
        self._pool = ThreadPoolExecutor(1)
        self._waiting: list[Future[None]] = []
        self._blocks: dict[str, dict[int, tuple[np.ndarray, Record]]] = {}

    def __enter__(self) -> "SampleWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=exception[0] is not None)
        if exception[0] is None:
            self._wait(0)

    def add(self, images: np.ndarray, records: list[Record]) -> None:
        """Take images uint8 (B, H, W, 3) and their lines (without file and sha256)."""
        self._wait(_WAITING_BATCHES - 1)
        self._waiting.append(self._pool.submit(self._write, images, records))

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.pop(0).result()  # an error of the thread is raised here

    def _write(self, images: np.ndarray, records: list[Record]) -> None:
        if self.store.save_mode == "folders":
            for image, record in zip(images, records, strict=True):
                self._put(image, [record])
            return
        for image, record in zip(images, records, strict=True):
            block = self._blocks.setdefault(record["identity"], {})
            block[record["index"]] = (image, record)
            if len(block) == self.n_samples:
                tiles, lines = zip(*(block[index] for index in range(self.n_samples)), strict=True)
                self._put(write_block(np.stack(tiles), BLOCK_COLUMNS), list(lines))
                del self._blocks[record["identity"]]

    def _put(self, image: np.ndarray, records: list[Record]) -> None:
        """One file, then its lines."""
        data = encode_image(image)
        file = self.store.file_of(records[0]["identity"], records[0]["index"])
        path = self.store.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)
        digest = hashlib.sha256(data).hexdigest()
        self.part.parent.mkdir(parents=True, exist_ok=True)
        with self.part.open("a", encoding="utf-8") as lines:
            lines.write("".join(_line({"file": file, **record, "sha256": digest}) for record in records))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _read_lines(path: Path) -> Iterator[Record]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut short by a kill: the image is drawn again
        if isinstance(record, dict) and all(column in record for column in MANIFEST_COLUMNS):
            yield record


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # numpy appends .npz to a bare name
        np.savez_compressed(file, **arrays)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:20] + "..."
