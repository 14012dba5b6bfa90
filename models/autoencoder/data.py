"""Images for the autoencoder: any folder tree, without named identities, split into training and validation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils import distributed
from utils.config import UserError, existing_folder
from utils.data.face_dataset import read_identity_list
from utils.data.step_sampler import StepSampler
from utils.images import list_images, load_images
from utils.interruption import leave_stopping_to_the_parent
from utils.logging import get_logger

log = get_logger(__name__)


@dataclass
class DatasetSettings:
    """The section `dataset` of train_autoencoder_config.yaml."""

    samples_root: str
    image_size: int  # side in pixels; images are cut to their centred square and resized
    exclude_identities_file: str | None  # identities (folder names), one a line, that neither train nor validate
    validation_share: float  # of the images, held out to measure reconstruction
    horizontal_flip: bool
    cache_in_memory: bool


def split_images(dataset: DatasetSettings, seed: int) -> tuple[list[str], list[str]]:
    """Relative paths of the training and of the validation images below `dataset.samples_root`.

    Raises UserError when a path is missing or nothing is left to train on.
    """
    root = existing_folder(dataset.samples_root, "dataset.samples_root", "a folder tree of images")
    if not 0.0 <= dataset.validation_share < 1.0:
        raise UserError(f"dataset.validation_share: {dataset.validation_share}; it must be at least 0 and below 1")
    found = list_images(root)
    people = (PurePosixPath(name).parent.name for name in found)
    excluded = read_identity_list(dataset.exclude_identities_file, "dataset.exclude_identities_file", people)
    names = [name for name in found if PurePosixPath(name).parent.name not in excluded]
    order = np.random.default_rng(distributed.seed_for(seed, "validation")).permutation(len(names))
    held_out = round(dataset.validation_share * len(names))
    if dataset.validation_share > 0:
        held_out = max(1, held_out)
    if held_out >= len(names):
        raise UserError(
            f"dataset.samples_root: no image of {root} is left to train on ({len(found)} found, "
            f"{len(found) - len(names)} of excluded identities, {held_out} held out)"
        )
    validation = set(order[:held_out].tolist())
    training = [name for i, name in enumerate(names) if i not in validation]
    log.info(
        "%d images to train on and %d to validate in %s (%d images of excluded identities left out)",
        len(training),
        held_out,
        root,
        len(found) - len(names),
    )
    return training, [names[i] for i in sorted(validation)]


class Images(Dataset):
    """Square images as uint8 (H, W, 3), held in memory when they fit in half of it, else decoded when asked for."""

    def __init__(self, root: str | Path, names: list[str], size: int, cache: bool) -> None:
        self.root, self.names, self.size = Path(root), names, size
        self.pixels: np.ndarray | None = None  # (n, H, W, 3)
        if cache and len(names) * size * size * 3 <= _memory_share():
            self.pixels = load_images(
                names, size, root=root, progress="reading images" if distributed.is_main() else None
            )
        elif cache:
            log.info("%d images of %d pixels fill more than half of the memory: decoded as needed", len(names), size)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: list[int]) -> Tensor:
        """uint8 (len(indices), H, W, 3)."""
        if self.pixels is not None:
            return torch.from_numpy(self.pixels[indices])
        return torch.from_numpy(load_images([self.names[i] for i in indices], self.size, root=self.root, threads=1))

    def __getitems__(self, items: list[tuple[int, bool]]) -> Tensor:
        """A batch of (index, whether to flip left to right): uint8 (B, H, W, 3)."""
        images = self.read([index for index, _ in items])
        flips = torch.tensor([flip for _, flip in items])
        return torch.where(flips[:, None, None, None], images.flip(2), images)


def _memory_share() -> float:
    """Bytes that one process may fill with images: half of the machine's memory over its processes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _as_it_is(batch: Tensor) -> Tensor:
    return batch


def training_batches(images: Images, sampler: StepSampler, num_workers: int, device: torch.device) -> DataLoader:
    """Batches uint8 (B, H, W, 3), one a step of `sampler`; workers are for images that are not in memory."""
    return DataLoader(
        images,
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=0 if images.pixels is not None else num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_stopping_to_the_parent,
    )
