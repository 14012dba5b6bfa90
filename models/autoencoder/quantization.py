"""Vector quantisation with a learnt codebook (VQ-VAE, NeurIPS 2017; VQGAN, CVPR 2021).

Legend: B batch, D width of a code, H W latent height and width, n rows, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.autoencoder.modules import features_to_rows, rows_to_features

# Distances held at a time by the nearest-code search: 16 MB in float32, so that a chunk stays in the cache of a CPU
_CHUNK_ELEMENTS = 2**22


def nearest_codes(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index (n,) of the Euclidean nearest code of `codebook` (K, D) for each row of `rows` (n, D); the lowest on a tie.

    |z - e|^2 = |z|^2 - 2 z.e + |e|^2; the first term is the same for all codes, so the search is one matrix product
    a chunk of rows.
    """
    squared_norms = codebook.square().sum(dim=1)  # (K,)
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // codebook.shape[0])
    return torch.cat(
        [torch.addmm(squared_norms, chunk, codebook.T, alpha=-2).argmin(dim=1) for chunk in rows.split(rows_per_chunk)]
    )


class Quantized(NamedTuple):
    """What `VectorQuantizer` returns."""

    latents: Tensor  # (B, D, H, W) float32, the codes nearest to the input, with the straight-through gradient
    indices: Tensor  # (B * H * W,) long, images, then lines, then columns
    loss: Tensor  # (), quantiser loss


class VectorQuantizer(nn.Module):
    """Codebook of `n_embed` vectors of width `embed_dim`.

    Loss: |sg(z_q) - z|^2 + beta |z_q - sg(z)|^2, means over elements; the published code puts beta at the codebook's
    term, where VQ-VAE (equation 3) has it at the commitment's.
    """

    def __init__(self, n_embed: int, embed_dim: int, beta: float = 0.25) -> None:
        super().__init__()
        self.n_embed = n_embed
        self.beta = beta
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_embed, 1.0 / n_embed)

    def forward(self, z: Tensor) -> Quantized:
        """Quantise `z` (B, D, H, W), in float32 under any autocast: distances between near codes are small."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            rows = features_to_rows(z)  # (n, D)
            indices = nearest_codes(rows.detach(), self.embedding.weight.detach())
            z_q = rows_to_features(self.embedding(indices), like=z)  # (B, D, H, W)
            loss = (z_q.detach() - z).square().mean() + self.beta * (z_q - z.detach()).square().mean()
            return Quantized(z + (z_q - z).detach(), indices, loss)


def kmeans_codebook(rows: Tensor, n_embed: int, *, generator: torch.Generator, iterations: int = 5) -> Tensor:
    """Codebook (n_embed, D) fitted to latents `rows` (n, D): distinct random rows, then Lloyd's iterations.

    Where there are fewer rows than codes, rows are drawn again and set apart by a thousandth of their deviation.
    Codes that lose all their rows keep their place.
    """
    n = rows.shape[0]
    picks = torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-n_embed // n))])[:n_embed]
    jitter = torch.randn(n_embed, rows.shape[1], generator=generator) * rows.std(dim=0).cpu() * 1e-3
    codes = rows[picks.to(rows.device)]
    codes[n:] += jitter.to(rows)[n:]
    for _ in range(iterations):
        nearest = nearest_codes(rows, codes)
        counts = torch.zeros(n_embed, device=rows.device).index_add_(0, nearest, torch.ones(n, device=rows.device))
        sums = torch.zeros_like(codes).index_add_(0, nearest, rows)
        codes = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes)
    return codes


@torch.no_grad()
def revive_dead_codes(counts: Tensor, rows: Tensor, codebooks: Sequence[Tensor], generator: torch.Generator) -> int:
    """Overwrite codes that `counts` (K,) says nobody used with random latents of `rows` (n, D); how many they were.

    Codes are lost early, while the encoder still moves, and gradient descent never reaches them again. (Random restarts
    as in Jukebox, Dhariwal et al., 2020.) All `codebooks` (K, D) get the same rows, in place: the one in training and
    its average.
    """
    dead = torch.nonzero(counts == 0).flatten()
    picks = torch.randint(len(rows), (len(dead),), generator=generator).to(rows.device)
    for codebook in codebooks:
        codebook[dead] = rows[picks].to(codebook)
    return len(dead)


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' use: the number of codes that would carry as much, if all were used alike."""
    p = counts.double() / counts.sum().clamp(min=1)
    return float(torch.exp(-(p * torch.log(p.clamp(min=1e-12))).sum()))
