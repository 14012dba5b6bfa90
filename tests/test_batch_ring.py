"""Batches that workers write into memory shared with the process that trains."""

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from utils.config import UserError
from utils.data.batch_ring import AHEAD, SLOTS, batches_from_workers

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
