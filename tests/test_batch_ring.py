"""Batches that workers write into memory shared with the process that trains."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from utils.config import UserError
from utils.data.batch_ring import AHEAD, SLOTS, batches_from_workers
from utils.images import write_image
from utils.interruption import STATUS

SHAPE = (3, 4, 4, 3)


def fill(request: int, pixels: np.ndarray) -> np.ndarray:
    if request < 0:
        raise UserError(f"image {request}: not readable")
    time.sleep(0.002 * (request % 3))
    pixels[...] = request
    return np.arange(request, request + 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_come_whole_and_in_order_while_the_workers_run_ahead(workers: int) -> None:
    made = batches_from_workers(fill, range(10 * SLOTS), SHAPE, workers=workers)
    kept = []
    for k, (pixels, labels) in enumerate(made):
        if k % 7 == 0:
            time.sleep(0.03)  # every slot is full by now: none may be written over before it has been taken
        kept.append((pixels, labels))
    assert len(kept) == 10 * SLOTS > AHEAD * workers
    for k, (pixels, labels) in enumerate(kept):
        assert pixels.dtype == torch.uint8 and pixels.shape == SHAPE and bool((pixels == k).all())
        assert labels.dtype == torch.int64 and labels.tolist() == [k, k + 1, k + 2]


def test_what_a_worker_finds_wrong_is_told() -> None:
    with pytest.raises(UserError, match="image -1: not readable"):
        list(batches_from_workers(fill, [0, 1, -1], SHAPE, workers=2))


def test_a_worker_that_dies_ends_the_loader() -> None:
    def die(request: int, pixels: np.ndarray) -> np.ndarray:
        if request == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return fill(request, pixels)

    made: Iterator = batches_from_workers(die, range(9), SHAPE, workers=1)
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        list(made)


@pytest.mark.slow
def test_sigterm_to_the_whole_group_saves_all_the_same(tmp_path: Path) -> None:
    """As `timeout` sends it: the workers get it, too."""
    for k in range(4):
        for n in range(8):
            pixels = np.random.default_rng(8 * k + n).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            write_image(tmp_path / "people" / str(k) / f"{n}.png", pixels)
    arguments = [f"dataset.root={tmp_path / 'people'}", f"output_dir={tmp_path / 'run'}", "check.enabled=false"]
    arguments += ["backbone=ir_18", "backbone.input_size=32", "backbone.width=0.125", "backbone.num_features=16"]
    arguments += ["training.num_workers=2", "training.batch_size=8", "training.epochs=500", "training.device=cpu"]
    arguments += ["training.steps_between_logging=1", "training.steps_between_checkpoints=1000"]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "recognition.train", *arguments],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == STATUS, log.read_text()[-2000:]
    assert "SIGTERM: saved step" in log.read_text()
