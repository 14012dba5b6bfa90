"""From drawn images to files and lines, in threads beside the drawing; diffusion.sample_store says what stands where.

Encoding and the disk's syncs take their time; the threads share them out, and drawing waits only when it is far ahead.
"""

import hashlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from diffusion.layouts import Sample
from diffusion.sample_lines import Record, line_of
from diffusion.sample_store import Piece, SampleStore, waiting_file
from utils.checkpoint import sync_folder
from utils.distributed import SharedCounter
from utils.guards import needs_disk
from utils.interruption import Stopped

THREADS = 4
MOST_WAITING = 64  # images that drawing may be ahead of the disk


class SampleWriter:
    """Where one process puts its images. Leaving the `with` block waits for what is under way."""

    def __init__(self, store: SampleStore, run: str, rank: int, pieces: Sequence[Piece]) -> None:
        """run: its name, of SampleStore.claim; pieces: of all processes, which tell when a group is whole."""
        self.store, self.layout = store, store.layout
        self.temporary = store.run_folder(run)
        self.part = store.parts / f"{run}-{rank:05d}.jsonl"
        self._run = run
        self._left: Counter[int] = Counter()  # images to draw of each group
        for piece in pieces:
            self._left[piece.group] += len(piece.samples)
        self._pool = ThreadPoolExecutor(THREADS)
        self._futures: list[Future[None]] = []
        self._lines = Lock()

    def __enter__(self) -> "SampleWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown()
        if kind is None or issubclass(kind, (Stopped, KeyboardInterrupt)):  # any other error is told already
            self._wait(0)

    def add(self, image: np.ndarray, group: int, record: Record) -> None:
        """Take an image uint8 (H, W, 3) and its line (without file and sha256).

        Raises UserError where the disk does not take this one or one before it.
        """
        self._submit(self._write, image, group, record)

    def pack(self, group: int) -> None:
        """Make the file of a group whose images all wait already."""
        self._submit(self._pack, group)

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        self._wait(MOST_WAITING - 1)
        self._futures.append(self._pool.submit(work, *arguments))

    def _wait(self, most: int) -> None:
        """Until so many are left; errors of the threads are raised here."""
        with needs_disk("sampling.save_dir"):
            while len(self._futures) > most or (self._futures and self._futures[0].done()):
                self._futures.pop(0).result()

    def _write(self, image: np.ndarray, group: int, record: Record) -> None:
        layout, sample = self.layout, (record["identity"], record["index"])
        data = layout.encode(image)
        file = layout.file_of(sample)
        path = self.store.waiting / waiting_file(layout, sample) if layout.is_packed else self.store.folder / file
        self._publish(path, lambda temporary: temporary.write_bytes(data))
        self._append({"file": file, **record, "sha256": hashlib.sha256(data).hexdigest()})
        if layout.is_packed and SharedCounter(f"{self._run}/group_{group}").add(1) == self._left[group]:
            self._pack(group)

    def _pack(self, group: int) -> None:
        samples, path = self.layout.group(group), self.store.folder / self.layout.packed_file(group)
        waiting: dict[Sample, Path] = {s: self.store.waiting / waiting_file(self.layout, s) for s in samples}

        def write(temporary: Path) -> None:
            self.layout.pack(group, lambda sample: waiting[sample].read_bytes(), temporary)

        self._publish(path, write)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        line = {"packed": self.layout.packed_file(group), "images": len(samples), "sha256": digest}
        self._append(line, sync=True)
        sync_folder(path.parent)  # the waiting images go only when their file is sure to stay
        for file in waiting.values():
            file.unlink()

    def _publish(self, path: Path, write: Callable[[Path], object]) -> None:
        """Let a file appear whole, whatever happens.

        It is written in the folder of this run: when another run has begun, that is gone, and so can nothing appear.
        """
        temporary = self.temporary / uuid.uuid4().hex
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _append(self, line: Record, *, sync: bool = False) -> None:
        with self._lines, self.part.open("a", encoding="utf-8") as file:
            file.write(line_of(line))
            if sync:
                file.flush()
                os.fsync(file.fileno())
