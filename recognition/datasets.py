"""Identity folders `<root>/<identity>/<image>` as labelled images, and the order in which a run sees them.

What a run sees at step s depends on (seed, s) alone: not on the number of processes, of workers, nor on interruptions.
Legend: n images, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from recognition.augment import Augmentation
from utils.config import UserError, existing_folder
from utils.data.face_dataset import read_identity_list
from utils.distributed import seed_for
from utils.images import centre_square, list_images, load_images, read_image, resize


@dataclass(frozen=True)
class IdentityFolders:
    """The images of a training set, sorted by identity and name."""

    root: Path
    identities: list[str]  # label -> folder name
    paths: list[str]  # (n,) relative to root
    labels: np.ndarray  # (n,) int64, 0 .. len(identities) - 1


def read_identity_folders(
    root: str | Path | None, *, exclude_identities_file: str | Path | None = None, min_images_per_identity: int = 1
) -> IdentityFolders:
    """List `<root>/<identity>/...`; every folder directly below `root` that holds images is an identity.

    Args:
        exclude_identities_file: text file with a folder name a line; these people are left out.
        min_images_per_identity: identities with fewer images are left out.

    Raises:
        UserError: no such folder or file, a folder that cannot be read, fewer than two identities left.
    """
    root = existing_folder(root, "dataset.root", "it holds one folder of images per identity")
    if min_images_per_identity < 1:
        raise UserError(f"dataset.min_images_per_identity: {min_images_per_identity}; it must be at least 1")
    excluded = read_identity_list(exclude_identities_file, "dataset.exclude_identities_file")

    by_identity: dict[str, list[str]] = {}
    try:
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        for name in folders:
            next((root / name).iterdir(), None)  # list_images would pass over a folder that it may not enter
    except OSError as error:
        raise UserError(f"dataset.root: {error.filename} cannot be read ({error.strerror})") from error
    for path in list_images(root):
        if "/" in path:
            by_identity.setdefault(path.split("/", 1)[0], []).append(path)
    if not by_identity:
        blocks = any(root.glob("*.png"))
        hint = "; identity blocks are split by split_identity_blocks.py first" if blocks else ""
        raise UserError(f"dataset.root: {root} holds no identities; folders of images are wanted, one a person{hint}")
    kept = {
        name: files
        for name, files in sorted(by_identity.items())
        if name not in excluded and len(files) >= min_images_per_identity
    }
    if len(kept) < 2:
        raise UserError(
            f"dataset.root: {root} holds {len(kept)} of {len(by_identity)} identities after leaving out those in "
            f"exclude_identities_file and those with fewer than {min_images_per_identity} images; two are needed"
        )
    labels = np.repeat(np.arange(len(kept)), [len(files) for files in kept.values()])
    return IdentityFolders(root, list(kept), [path for files in kept.values() for path in files], labels)


class IdentityDataset(Dataset):
    """Augmented training images. Items are asked for as (pass over the images, index): both seed the augmentation."""

    def __init__(
        self, folders: IdentityFolders, *, size: int, augment: Augmentation, seed: int, cache_in_memory: bool = False
    ) -> None:
        self.folders, self.size, self.augment, self.seed = folders, size, augment, seed
        self.cache: np.ndarray | None = None  # (n, S, S, 3) uint8
        if cache_in_memory:
            self.cache = load_images(folders.paths, size, root=folders.root, progress="reading images")

    def __len__(self) -> int:
        return len(self.folders.paths)

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, int]:
        """uint8 (S, S, 3) RGB and its label."""
        number, index = item
        if self.cache is not None:
            pixels = self.cache[index]
        else:
            pixels = resize(centre_square(read_image(self.folders.root / self.folders.paths[index])), self.size)
        generator = np.random.Generator(np.random.PCG64(seed_for(self.seed, "augment", number, index)))
        return self.augment(pixels, generator), int(self.folders.labels[index])


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
