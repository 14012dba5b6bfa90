"""Learned perceptual distance (Zhang et al., CVPR 2018), the perceptual part of VQGAN's reconstruction loss.

The weights are those that users have: torchvision's VGG-16 (a state dict, classifier or not) and the linear layers that
the authors publish (`vgg.pth` of the lpips package, `lin0.model.1.weight` ...). Nothing is downloaded.

Legend: B batch, C channels of a layer, H W height and width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.checkpoint import load_state_dict_file, strict_load
from utils.config import UserError

# VGG-16 up to conv5_3: the widths of its convolutions; each block but the first begins with max pooling.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# ImageNet's mean and deviation for images in [-1, 1]
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Distance of images (B, 3, H, W) in [-1, 1], H and W at least 16: (B,), 0 for equal ones. Frozen."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []  # after which layer a block's features are taken
        width = 3
        for number, widths in enumerate(BLOCKS):
            layers += [nn.MaxPool2d(2)] if number else []
            for out in widths:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
                width = out
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)  # named and numbered as in torchvision
        self.lins = nn.ParameterList([nn.Parameter(torch.ones(widths[-1]) / widths[-1]) for widths in BLOCKS])
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.requires_grad_(False)

    def unit_features(self, images: Tensor) -> list[Tensor]:
        """The features of each block, (B, C, H, W) float32, of length 1 at every pixel."""
        h = (images - self.mean) / self.std
        taken = []
        for number, layer in enumerate(self.features):
            h = layer(h)
            if number in self.taps:
                taken.append(F.normalize(h.float(), dim=1, eps=1e-10))
        return taken

    def weigh(self, squares: list[Tensor]) -> Tensor:
        """The mean over pixels of squared differences (B, C, H, W), weighted and summed over blocks: (B,)."""
        parts = [
            (square * w[:, None, None]).sum(dim=1).mean(dim=(1, 2))
            for square, w in zip(squares, self.lins, strict=True)
        ]
        return torch.stack(parts).sum(dim=0)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """The mean over pixels, summed over layers, of the weighted squared differences of unit features."""
        both = [features.chunk(2) for features in self.unit_features(torch.cat([images, others]))]
        return self.weigh([(a - b).square() for a, b in both])


def load_lpips(vgg_path: str | Path, linear_path: str | Path) -> LPIPS:
    """LPIPS from the two files. Raises UserError for files that are not these."""
    network = LPIPS()
    vgg = {k.removeprefix("features."): v for k, v in load_state_dict_file(vgg_path).items() if "classifier" not in k}
    own = set(network.features.state_dict())
    strict_load(network.features, {k: v for k, v in vgg.items() if k in own}, f"{vgg_path} (VGG-16 of torchvision)")
    linear = load_state_dict_file(linear_path)
    for number, parameter in enumerate(network.lins):
        found = linear.get(f"lin{number}.model.1.weight", torch.empty(0))
        if found.numel() != parameter.numel():
            raise UserError(
                f"{linear_path}: no lin{number}.model.1.weight of {parameter.numel()} values; LPIPS's vgg.pth is wanted"
            )
        parameter.data.copy_(found.flatten())
    return network
