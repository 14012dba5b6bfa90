"""Latents of a whole data set, computed once: the frozen encoder need not run in every training step.

    <folder>/latents/latents.json   key (images, transform, encoder), shape, images a shard
    <folder>/latents/00000.npy      float16 (images, 2, C, h, w): the latent of each image and of its mirror image
    <folder>/latents/00000.json     sha256 of the shard; written after it, so a shard without it is not finished

Legend: n images, C channels, h w height and width of a latent.
"""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import file_sha256, read_json, write_atomically, write_json
from utils.data.face_dataset import FaceDataset
from utils.logging import get_logger

log = get_logger(__name__)

IMAGES_PER_SHARD = 1024
KEY_FILE = "latents.json"


class LatentCache:
    """The memory-mapped shards of a finished cache as one array (n, 2, C, h, w)."""

    def __init__(self, shards: Sequence[Path], images_per_shard: int) -> None:
        self.shards = [np.load(path, mmap_mode="r", allow_pickle=False) for path in shards]
        self.images_per_shard = images_per_shard

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def take(self, rows: Sequence[int], mirrored: Sequence[bool]) -> np.ndarray:
        """Latents of images `rows`, each as it is or `mirrored`: float32 (B, C, h, w)."""
        latents = np.empty((len(rows), *self.shards[0].shape[2:]), np.float32)
        for out, row, flip in zip(latents, rows, mirrored, strict=True):
            shard, position = divmod(row, self.images_per_shard)
            out[...] = self.shards[shard][position, int(flip)]
        return latents


def cached_latents(
    dataset: FaceDataset,
    encoder: nn.Module,
    folder: str | Path,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> LatentCache:
    """The latents of every image and of its mirror image, out of `<folder>/latents` as far as they are there.

    The key depends on the images' names and sizes in bytes, on the image size and on the encoder's weights: a cache
    with another key is thrown away with a warning. Ranks share the missing shards, and a killed run goes on with them.
    A shard whose bytes are not those that were written is computed anew.
    """
    folder = Path(folder) / "latents"
    key = {"sha256": _cache_key(dataset, encoder), "images": len(dataset), "images_per_shard": IMAGES_PER_SHARD}
    shards = [folder / f"{number:05d}.npy" for number in range(-(-len(dataset) // IMAGES_PER_SHARD))]
    todo = distributed.on_main(lambda: _claim(folder, key, shards))
    mine = distributed.share(todo)
    total = sum(len(_rows(number, len(dataset))) for number in mine)
    with tqdm(total=total, desc="latents", unit="image", disable=not (mine and distributed.is_main())) as bar:
        for number in mine:
            rows = _rows(number, len(dataset))
            latents = _encode(dataset, encoder, rows, batch_size, num_workers, device, bar)
            write_atomically(shards[number], lambda path, latents=latents: _write(path, latents))
            write_json(shards[number].with_suffix(".json"), {"sha256": file_sha256(shards[number])})
    distributed.barrier()
    return LatentCache(shards, IMAGES_PER_SHARD)


def _claim(folder: Path, key: dict[str, Any], shards: Sequence[Path]) -> list[int]:
    """Numbers of the shards that are missing or damaged, after throwing a cache of another key away."""
    key_file = folder / KEY_FILE
    if not (key_file.is_file() and read_json(key_file) == key):
        if folder.is_dir():
            log.warning("%s: made from other images or with another autoencoder; it is made anew", folder)
            shutil.rmtree(folder)
        write_json(key_file, key)
    todo = []
    for number, path in enumerate(shards):
        record = path.with_suffix(".json")
        if not (path.is_file() and record.is_file()):
            todo.append(number)
        elif read_json(record)["sha256"] != file_sha256(path):
            log.warning("%s: not the bytes that were written; it is made anew", path)
            todo.append(number)
    return todo


def _cache_key(dataset: FaceDataset, encoder: nn.Module) -> str:
    digest = hashlib.sha256(str(dataset.image_size).encode())
    for name in dataset.names:
        digest.update(f"{name}:{(dataset.root / name).stat().st_size}\n".encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _rows(number: int, n: int) -> range:
    """The images of a shard."""
    return range(number * IMAGES_PER_SHARD, min(n, (number + 1) * IMAGES_PER_SHARD))


@torch.inference_mode()
def _encode(
    dataset: FaceDataset,
    encoder: nn.Module,
    rows: range,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    bar: tqdm,
) -> np.ndarray:
    """Images `rows` => float16 (rows, 2, C, h, w)."""
    items = [(row, False) for row in rows]
    parts: list[np.ndarray] = []
    for images, _ in DataLoader(dataset, batch_size=batch_size, sampler=items, num_workers=num_workers):
        images = images.to(device, non_blocking=True)
        both = [encoder(view).half().cpu().numpy() for view in (images, images.flip(-1))]  # (b, C, h, w) each
        parts.append(np.stack(both, axis=1))
        bar.update(len(images))
    return np.concatenate(parts)


def _write(path: Path, latents: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, latents)
