"""Augmented images and labels in batches, made ahead of the training step that takes them.

What a run sees at step s depends on (seed, s) alone: not on the number of processes, of workers, nor on interruptions.
Legend: n images, S side in pixels, B batch of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recognition.augment import Augmentation
from recognition.step_batches import StepBatches
from recognition.training_sets import DatasetSettings, TrainingSet, open_training_set, read_training_set
from utils.data.batch_ring import batches_from_workers
from utils.data.prefetch import prefetch
from utils.distributed import seed_for
from utils.images import centre_square, default_threads, load_images, resize
from utils.logging import get_logger

log = get_logger(__name__)


class IdentityDataset(Dataset):
    """Augmented training images. Items are asked for as (pass over the images, index): both seed the augmentation."""

    def __init__(
        self, source: TrainingSet, *, size: int, augment: Augmentation, seed: int, cache_in_memory: bool = False
    ) -> None:
        self.source, self.size, self.augment, self.seed = source, size, augment, seed
        self.cache: np.ndarray | None = None  # (n, S, S, 3) uint8
        if cache_in_memory:
            readers = [partial(source.pixels, index) for index in range(len(source))]
            self.cache = load_images(readers, size, progress="reading images")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, int]:
        """uint8 (S, S, 3) RGB and its label."""
        number, index = item
        if self.cache is not None:
            pixels = self.cache[index]
        else:
            pixels = resize(centre_square(self.source.pixels(index)), self.size)
        generator = np.random.Generator(np.random.PCG64(seed_for(self.seed, "augment", number, index)))
        return self.augment(pixels, generator), int(self.source.labels[index])

    def fill(self, items: Sequence[tuple[int, int]], pixels: np.ndarray) -> np.ndarray:
        """Write the images of `items` into uint8 (B, S, S, 3) and return their labels (B,) int64."""
        for k, item in enumerate(items):
            pixels[k], _ = self[item]
        return self.source.labels[[index for _, index in items]]

    def batch(self, items: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """uint8 (B, S, S, 3) RGB and labels (B,) long of `items`."""
        pixels = np.empty((len(items), self.size, self.size, 3), np.uint8)
        labels = self.fill(items, pixels)
        return torch.from_numpy(pixels), torch.from_numpy(labels)


def load_batches(
    dataset: IdentityDataset, batches: StepBatches, *, num_workers: int, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels uint8 (B, S, S, 3) and labels (B,) long of every batch, made ahead of the step that takes them.

    `num_workers` processes of one thread each (torch sees to that), at most one a processor; with 0 a thread of this
    process.
    """
    if batches.shares:
        shares = ", ".join(f"{count} of {name}" for name, count in batches.shares.items())
        log.info("every step's %d images: %s", batches.global_batch, shares)
    workers = min(num_workers, default_threads())
    if workers:
        shape = (len(batches.batch(batches.first_step)), dataset.size, dataset.size, 3)
        return batches_from_workers(dataset.fill, batches, shape, workers=workers, pin_memory=pin_memory)
    return prefetch(map(dataset.batch, batches))


__all__ = [
    "DatasetSettings",
    "IdentityDataset",
    "StepBatches",
    "TrainingSet",
    "load_batches",
    "open_training_set",
    "read_training_set",
]
