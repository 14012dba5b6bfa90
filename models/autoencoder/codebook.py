"""The codebook while it is trained: where the codes first lie, and what becomes of those that nothing uses.

Legend: B batch, D width of a code, h w height and width of a latent.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.autoencoder.data import Images
from models.autoencoder.modules import features_to_rows
from models.autoencoder.quantization import kmeans_codebook, revive_dead_codes
from models.autoencoder.vqgan import VQModel
from utils import distributed
from utils.images import to_float

ROWS_PER_CODE = 16  # latents that the first codebook is fitted to, for each code


@torch.no_grad()
def place_codes(
    model: VQModel, owners: list[VQModel], images: Images, batch_size: int, seed: int, device: torch.device
) -> None:
    """Fit the codebook of `owners` by k-means to `model`'s latents of some training images; the same on every rank."""
    rng = np.random.default_rng(distributed.seed_for(seed, "codebook"))
    order = rng.permutation(len(images))
    rows: list[Tensor] = []
    for start in range(0, len(order), batch_size):
        pixels = images.read(order[start : start + batch_size].tolist()).to(device)
        rows.append(features_to_rows(model.encode(to_float(pixels))))  # (B * h * w, D)
        if sum(map(len, rows)) >= ROWS_PER_CODE * model.n_embed:
            break
    generator = torch.Generator().manual_seed(distributed.seed_for(seed, "codebook"))
    codes = kmeans_codebook(torch.cat(rows), model.n_embed, generator=generator)
    codes = distributed.broadcast_object(codes.cpu()).to(device)
    for owner in owners:
        owner.quantize.embedding.weight.copy_(codes)


def revive_codes(owners: list[VQModel], counts: Tensor, latents: Tensor, seed: int, step: int) -> int:
    """Draw the codes without `counts` anew from this step's latents (B, D, h, w) of all ranks; how many they were."""
    rows = torch.cat(distributed.all_gather_objects(features_to_rows(latents.detach().float()).cpu()))
    generator = torch.Generator().manual_seed(distributed.seed_for(seed, "revive", step))
    codebooks = [net.quantize.embedding.weight for net in owners]
    return revive_dead_codes(counts, rows.to(counts.device), codebooks, generator)
