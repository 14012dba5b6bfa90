"""Perceptual diversity within identities: the mean LPIPS distance of an identity's images (UIFace, appendix A.1).

LPIPS is a weighted squared Euclidean distance of features f, so that its mean over all pairs of n images is
2 / (n - 1) sum_i |f_i - mean f|^2: every image passes the network once, not once a pair, and only sums are kept.

Legend: n images of an identity, B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.autoencoder.lpips import LPIPS
from utils.images import to_float

MAX_IDENTITIES = 100  # as UIFace


@dataclass(frozen=True)
class PerceptualDiversity:
    """LPIPS between images of one identity."""

    lpips: float  # mean over identities of the mean over pairs
    per_identity: np.ndarray  # (identities,)

    def metrics(self) -> dict[str, float | int | None]:
        """By the keys of evaluation.definitions."""
        return {"lpips": self.lpips}


def drawn_identities(num_images: np.ndarray, seed: int, count: int = MAX_IDENTITIES) -> np.ndarray:
    """Which identities are looked at: `count` drawn by `seed` of those with two images or more, ascending.

    num_images: (K,) of every identity; all of them where there are no more than `count`.
    """
    eligible = np.flatnonzero(np.asarray(num_images) > 1)
    if len(eligible) <= count:
        return eligible
    return np.sort(np.random.default_rng(seed).choice(eligible, count, replace=False))


def intra_class_lpips(network: LPIPS, identities: Iterable[np.ndarray], batch_size: int = 32) -> PerceptualDiversity:
    """Mean pairwise LPIPS within each identity, and over identities.

    network: on the device that is to compute; identities: of each the images, uint8 (n, H, W, 3) RGB, n at least 2, H
    and W at least 16. Raises ValueError for fewer images and where there are no identities.
    """
    distances = [mean_pairwise_lpips(network, images, batch_size) for images in identities]
    if not distances:
        raise ValueError("identities: there are none with two images or more")
    return PerceptualDiversity(float(np.mean(distances)), np.array(distances))


@torch.no_grad()
def mean_pairwise_lpips(network: LPIPS, images: np.ndarray, batch_size: int = 32) -> float:
    """The mean of network(a, b) over all pairs of images, uint8 (n, H, W, 3) RGB. Raises ValueError for n < 2."""
    if len(images) < 2:
        raise ValueError(f"images: {len(images)} of an identity make no pair")
    device = network.mean.device
    count, spread, means = 0, 0.0, list[Tensor]()
    for start in range(0, len(images), batch_size):
        batch = network.unit_features(to_float(torch.from_numpy(images[start : start + batch_size]).to(device)))
        size = len(batch[0])
        centres = [features.mean(dim=0, keepdim=True) for features in batch]  # (1, C, H, W) of each block
        spread += network.weigh([(f - c).square() for f, c in zip(batch, centres, strict=True)]).double().sum().item()
        if means:  # spreads around two centres join with that between them (Chan, Golub & LeVeque, 1979)
            between = network.weigh([(c - m).square() for c, m in zip(centres, means, strict=True)]).item()
            spread += between * count * size / (count + size)
        else:
            means = [torch.zeros_like(centre) for centre in centres]
        means = [m + (c - m) * (size / (count + size)) for c, m in zip(centres, means, strict=True)]
        count += size
    return 2 * spread / (count - 1)
