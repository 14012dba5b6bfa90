"""Batches of pixels on their way from worker processes to the process that trains.

Legend: S side in pixels, B batch.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils.interruption import leave_stopping_to_the_parent

Request = TypeVar("Request")
AHEAD = 4  # batches of a worker that are asked for and not yet taken
SLOTS = AHEAD + 1  # the next one is asked for before the one that is taken has been copied


class _Ring(Dataset):
    """The workers' side: every batch goes into the next slot of the worker's own, of which only the number is sent."""

    def __init__(self, make: Callable[[Any, np.ndarray], np.ndarray], shape: tuple[int, ...], workers: int) -> None:
        # Shared by fork, without a name: /dev/shm, which is small in a container, has no part in it
        memory = mmap.mmap(-1, max(1, workers * SLOTS * int(np.prod(shape))))
        self.pixels = np.frombuffer(memory, np.uint8).reshape(workers, SLOTS, *shape)
        self.make, self.made = make, 0

    def __getitem__(self, request: Any) -> tuple[int, int, Any]:
        info = get_worker_info()
        slot = self.made % SLOTS
        self.made += 1
        return info.id, slot, self.make(request, self.pixels[info.id, slot])


def batches_from_workers(
    make: Callable[[Request, np.ndarray], np.ndarray],
    requests: Iterable[Request],
    shape: tuple[int, int, int, int],
    *,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(pixels, labels) of every request in order, made by `workers` forked processes of one thread each.

    A DataLoader sends every batch through a file of shared memory of its own; here the memory is mapped once, which on
    small images saves as much time as augmenting them takes.

    Args:
        make: writes the pixels that a request asks for into a uint8 array of `shape` and returns their labels (B,).
        shape: (B, S, S, 3) of every batch.
        pin_memory: give page-locked memory, from which a GPU copies without waiting.

    Raises:
        UserError: as `make` does, from `next`, with torch's account of the worker around its text; RuntimeError, in
            the midst of anything, where a worker dies: torch watches over them.
    """
    ring = _Ring(make, shape, workers)
    loader = DataLoader(
        ring,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        prefetch_factor=AHEAD,
        collate_fn=_as_it_is,
        multiprocessing_context="fork",
        worker_init_fn=leave_stopping_to_the_parent,
    )
    return _taken(iter(loader), ring, pin_memory)  # the workers begin here, not when the first batch is asked for


def _taken(made: Iterator[tuple[int, int, np.ndarray]], ring: _Ring, pin: bool) -> Iterator[tuple[Tensor, Tensor]]:
    for worker, slot, labels in made:
        pixels = torch.empty(ring.pixels.shape[2:], dtype=torch.uint8, pin_memory=pin)
        pixels.copy_(torch.from_numpy(ring.pixels[worker, slot]))
        targets = torch.from_numpy(labels)
        yield pixels, targets.pin_memory() if pin else targets


def _as_it_is(sample: Any) -> Any:
    return sample
