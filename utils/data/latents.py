"""Latents of a whole data set, computed once: the frozen encoder need not run in every training step."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import write_json
from utils.data.face_dataset import FaceDataset
from utils.logging import get_logger

log = get_logger(__name__)


def cached_latents(
    dataset: FaceDataset,
    encoder: nn.Module,
    folder: str | Path,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> np.ndarray:
    """Encoder outputs of every image and of its mirror image: a memory map (n, 2, C, h, w) float16, [:, 1] mirrored.

    Written to `<folder>/latents.npy` by all ranks together, with a key beside it that depends on the images' names and
    sizes in bytes, on the image size and on the encoder's weights; a cache with another key is computed anew.
    """
    folder = Path(folder)
    path, key_path = folder / "latents.npy", folder / "latents.json"
    key = {"sha256": _cache_key(dataset, encoder), "images": len(dataset)}
    if not (path.is_file() and key_path.is_file() and json.loads(key_path.read_text()) == key):
        _encode_all(dataset, encoder, path, batch_size, num_workers, device)
        distributed.barrier()
        if distributed.is_main():
            write_json(key_path, key)  # last: without it the array counts as unfinished
    distributed.barrier()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _cache_key(dataset: FaceDataset, encoder: nn.Module) -> str:
    digest = hashlib.sha256(str(dataset.image_size).encode())
    for name in dataset.names:
        digest.update(f"{name}:{(dataset.root / name).stat().st_size}\n".encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _encode_all(
    dataset: FaceDataset, encoder: nn.Module, path: Path, batch_size: int, num_workers: int, device: torch.device
) -> None:
    shape = tuple(encoder(dataset[(0, False)][0][None].to(device)).shape[1:])  # (C, h, w)
    if distributed.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "latents.json").unlink(missing_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(len(dataset), 2, *shape)).flush()
    distributed.barrier()
    latents = np.lib.format.open_memmap(path, mode="r+")
    items = [(index, False) for index in distributed.share(range(len(dataset)))]
    loader = DataLoader(dataset, batch_size=batch_size, sampler=items, num_workers=num_workers)
    for images, indices in tqdm(loader, desc="latents", unit="batch", disable=not distributed.is_main()):
        for mirrored, batch in enumerate((images, images.flip(-1))):
            latents[indices.numpy(), mirrored] = encoder(batch.to(device)).float().cpu().numpy()  # images => latents
    latents.flush()
