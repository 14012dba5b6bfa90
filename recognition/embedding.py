"""From faces to identity embeddings: unit vectors of a recognition backbone.

Legend: n images, H W height and width, D width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.config import UserError
from utils.images import load_images, resize, to_float
from utils.precision import autocast


def embed_images(
    backbone: nn.Module,
    images: np.ndarray | Sequence[str | Path | Callable[[], np.ndarray]],
    *,
    root: str | Path = ".",
    batch_size: int = 64,
    flip: bool = True,
    normalise: bool = True,
    precision: str = "fp32",
    device: torch.device | str | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """Embed faces; they are resized to the backbone's `input_size` where they have another size.

    Args:
        backbone: as made by `recognition.backbones`; it runs in eval mode and gets its own mode back.
        images: uint8 (n, H, W, 3) RGB; or n paths of image files (relative ones below `root`), or functions that give
            one image uint8 (H, W, 3) each, read a batch at a time.
        flip: embed the mirror image too and add both outputs before normalising (the flip test of the benchmarks).
        normalise: off: the sum keeps the length that the network gives it, which some protocols use.
        precision: fp32, bf16 or fp16 of the network's arithmetic.
        device: where to compute; None: where the backbone is. The backbone is moved there.
        progress: label of a progress bar; None shows none.

    Returns:
        float32 (n, D), rows of length 1 (but for `normalise` off).

    Raises:
        UserError: an image that cannot be read, a backbone whose embeddings are not finite.
        ValueError: an array of another type or shape.
    """
    is_array = isinstance(images, np.ndarray)
    if is_array and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3):
        raise ValueError(f"images: {images.dtype} {images.shape}; uint8 (n, H, W, 3) is wanted")
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}; it must be at least 1")
    if device is not None:
        backbone.to(device)
    device = next(backbone.parameters(), torch.empty(0)).device  # an ONNX graph has no parameters and takes the CPU's
    size = backbone.input_size
    embeddings = np.empty((len(images), backbone.num_features), np.float32)

    was_training = backbone.training
    backbone.eval()
    try:
        starts = range(0, len(images), batch_size)
        for start in tqdm(starts, desc=progress, unit="batch", disable=progress is None):
            batch = images[start : start + batch_size]
            pixels = resize(batch, size) if is_array else load_images(batch, size, root=root)  # (b, S, S, 3) uint8
            with autocast(device, precision):
                rows = embed_batch(backbone, to_float(pixels).to(device), flip=flip, normalise=normalise)
            embeddings[start : start + batch_size] = rows.cpu()
    finally:
        backbone.train(was_training)
    if not np.isfinite(embeddings).all():
        raise UserError("the backbone gives embeddings that are not finite: its training has diverged")
    return embeddings


@torch.inference_mode()
def embed_batch(backbone: nn.Module, images: Tensor, *, flip: bool, normalise: bool = True) -> Tensor:
    """float32 (b, 3, S, S) in [-1, 1] => float32 (b, D) unit vectors, normalise(f(x) + f(flip x)) where `flip`."""
    features = backbone(images).float()  # (b, D)
    if flip:
        features = features + backbone(images.flip(-1)).float()
    return F.normalize(features) if normalise else features
