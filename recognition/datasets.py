"""Labelled images to learn from, and the order in which a run sees them.

What a run sees at step s depends on (seed, s) alone: not on the number of processes, of workers, nor on interruptions.
Legend: n images, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from recognition.augment import Augmentation
from utils.config import UserError, existing_folder
from utils.data.face_dataset import read_identity_list
from utils.data.formats.labelled import LabelledImages
from utils.data.formats.recognise import open_labelled
from utils.distributed import seed_for
from utils.images import centre_square, load_images, resize


@dataclass(frozen=True)
class TrainingSet:
    """Labelled images to learn from: those of `images` in `rows`, their labels without gaps."""

    images: LabelledImages
    rows: np.ndarray  # (n,) int64, numbers in `images`, in its order
    labels: np.ndarray  # (n,) int64, 0 .. len(identities) - 1
    identities: list[str]  # label -> name

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, index: int) -> np.ndarray:
        """Image `index`: uint8 (H, W, 3) RGB; UserError where it cannot be read."""
        return self.images.pixels(int(self.rows[index]))


def read_training_set(
    root: str | Path | None, *, exclude_identities_file: str | Path | None = None, min_images_per_identity: int = 1
) -> TrainingSet:
    """The labelled images at `root`: class folders `<root>/<identity>/<image>`, or any format that
    utils.data.formats.recognise opens.

    Args:
        exclude_identities_file: text file with the name of an identity a line; these people are left out.
        min_images_per_identity: identities with fewer images are left out.

    Raises:
        UserError: no such folder or file, one that cannot be read, fewer than two identities left.
    """
    if root is None or not Path(root).expanduser().is_file():
        root = existing_folder(root, "dataset.root", "one folder of images per identity, or another labelled set")
    if min_images_per_identity < 1:
        raise UserError(f"dataset.min_images_per_identity: {min_images_per_identity}; it must be at least 1")
    try:
        images = open_labelled(root)
    except UserError as error:
        raise UserError(f"dataset.root: {error}") from error

    excluded = read_identity_list(exclude_identities_file, "dataset.exclude_identities_file", images.identities)
    counts = np.bincount(images.labels, minlength=len(images.identities)).tolist()
    kept = [
        label
        for label, (name, count) in enumerate(zip(images.identities, counts, strict=True))
        if name not in excluded and count >= min_images_per_identity
    ]
    if len(kept) < 2:
        raise UserError(
            f"dataset.root: {root} holds {len(kept)} of {np.count_nonzero(counts)} identities after leaving out those "
            f"in exclude_identities_file and those with fewer than {min_images_per_identity} images; two are needed"
        )
    new_label = np.full(len(images.identities), -1)
    new_label[kept] = np.arange(len(kept))
    labels = new_label[images.labels]
    rows = np.flatnonzero(labels >= 0)
    return TrainingSet(images, rows, labels[rows], [images.identities[label] for label in kept])


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


def collate(samples: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples => uint8 (B, S, S, 3) pixels, (B,) long labels."""
    pixels, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


class StepBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (pass, index) for the steps first_step .. last_step - 1 of one process.

    Every pass over the images is a permutation drawn from (seed, pass), cut into global batches; a process takes its
    consecutive part of each. The images past the last whole batch wait for another pass.
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int,
        first_step: int,
        last_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`batch_size` images a process; UserError where all processes together want more images than there are."""
        if batch_size < 2:
            raise UserError(f"training.batch_size: {batch_size}; batch norm needs two images or more")
        self.global_batch = batch_size * world_size
        if self.global_batch > num_images:
            raise UserError(
                f"training.batch_size: {batch_size} on each of {world_size} processes; the training set holds only "
                f"{num_images} images"
            )
        self.num_images, self.seed = num_images, seed
        self.first_step, self.last_step = first_step, last_step
        self.part = slice(rank * batch_size, (rank + 1) * batch_size)

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        drawn, order = -1, np.empty(0, np.int64)
        for step in range(self.first_step, self.last_step):
            number, position = divmod(step, self.num_images // self.global_batch)
            if number != drawn:
                generator = np.random.Generator(np.random.PCG64(seed_for(self.seed, "order", number)))
                drawn, order = number, generator.permutation(self.num_images)
            batch = order[position * self.global_batch : (position + 1) * self.global_batch]
            yield [(number, int(index)) for index in batch[self.part]]
