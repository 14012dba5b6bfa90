"""The adversarial part of the VQGAN objective (Esser et al., CVPR 2021, section 3.1).

Legend: B batch, H W height and width. Images are RGB in [-1, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import distributed


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., CVPR 2017): one logit, real or reconstructed, for every overlapping patch of an image.

    `layers` strided 4x4 convolutions from `channels` upwards (doubling, at most 8 times as wide), then two more of
    stride 1. The original normalises by batch; here it is GroupNorm, so that the result does not depend on how a batch
    is spread over processes.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            wider = channels * min(2**i, 8)
            stride = 2 if i < layers else 1
            modules += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(16, wider // 4), wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        modules.append(nn.Conv2d(width, 1, 4, padding=1))
        self.main = nn.Sequential(*modules)
        # He's initialisation: from the published N(0, 0.02) a small one took hundreds of steps to tell anything.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, 0.2)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> logits (B, 1, h, w), positive for real."""
        return self.main(images)


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """(E max(0, 1 - D(x)) + E max(0, 1 + D(x_hat))) / 2."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor, scale: float = 1.0
) -> Tensor:
    """lambda = |grad L_rec| / (|grad L_gan| + 1e-4) at the decoder's last layer, at most 1e4 (VQGAN, equation 7).

    `scale` multiplies both losses first, against underflow in float16. The gradients are averaged over processes, so
    the weight is that of the whole batch.
    """
    norms = []
    for loss in (reconstruction_loss, generator_loss):
        (gradient,) = torch.autograd.grad(loss * scale, last_layer, retain_graph=True)
        norms.append(distributed.all_reduce_mean(gradient.float()).norm() / scale)
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)
