"""Inception-v3 (Szegedy et al., CVPR 2016) up to its pool, for FID and what is measured in its features.

Parameters are named as torchvision and torch-fidelity name them. Two sets of weights are in use: torchvision's, and
those that Google published in 2015, with which FID is reported (torch-fidelity's and pytorch-fid's file). The latter's
graph averages without the border's zeros, and takes the maximum in the pool of its last block.

Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 2048  # of the pool
SIDE = 299  # of the input, pixels
CLASSES = {1008: "2015", 1000: "torchvision"}  # outputs of the classifier => whose weights

# A convolution: name, channels, kernel, stride (1 where not said); kernels of stride 1 are padded to keep the size.
# A branch: convolutions one after another, before them perhaps a pool; a list in it: side by side.
Conv = tuple[str, int, int | tuple[int, int]]


def _block_a(pool: int) -> list[list]:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["pool", ("branch_pool", pool, 1)],
    ]


def _block_b() -> list[list]:
    return [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        ["shrink"],
    ]


def _block_c(width: int) -> list[list]:
    double = [("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, (7, 1)), ("branch7x7dbl_3", width, (1, 7))]
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [*double, ("branch7x7dbl_4", width, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
        ["pool", ("branch_pool", 192, 1)],
    ]


def _block_d() -> list[list]:
    seven = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))]
    return [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [*seven, ("branch7x7x3_4", 192, 3, 2)],
        ["shrink"],
    ]


def _block_e() -> list[list]:
    def split(name: str) -> list[Conv]:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    return [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), split("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), split("branch3x3dbl_3")],
        ["pool", ("branch_pool", 192, 1)],
    ]


STEM = (
    ("Conv2d_1a_3x3", 32, 3, 2),
    ("Conv2d_2a_3x3", 32, 3),
    ("Conv2d_2b_3x3", 64, 3),
    "shrink",
    ("Conv2d_3b_1x1", 80, 1),
    ("Conv2d_4a_3x3", 192, 3),
    "shrink",
)
UNPADDED = ("Conv2d_2a_3x3", "Conv2d_4a_3x3")
BLOCKS = {
    **{f"Mixed_5{name}": _block_a(pool) for name, pool in zip("bcd", (32, 64, 64), strict=True)},
    "Mixed_6a": _block_b(),
    **{f"Mixed_6{name}": _block_c(width) for name, width in zip("bcde", (128, 160, 160, 192), strict=True)},
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e(),
    "Mixed_7c": _block_e(),
}


class _Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int | tuple, stride: int = 1, *, same: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if stride == 1 and same else (0, 0)
        self.conv = nn.Conv2d(channels, out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """The branches of a block, concatenated."""

    def __init__(self, channels: int, branches: list[list], pool: str) -> None:
        """`pool`: average (zeros of the border count), inside (they do not) or maximum."""
        super().__init__()
        self.branches, self.pool = branches, pool
        self.width = 0
        for branch in branches:
            width = channels
            for step in branch:
                if not isinstance(step, str):
                    parts = step if isinstance(step, list) else [step]
                    for name, *shape in parts:
                        self.add_module(name, _Convolution(width, *shape))
                    width = sum(part[1] for part in parts)
            self.width += width

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch in self.branches:
            h = x
            for step in branch:
                if step == "shrink":
                    h = F.max_pool2d(h, 3, 2)
                elif step == "pool" and self.pool == "maximum":
                    h = F.max_pool2d(h, 3, 1, 1)
                elif step == "pool":
                    h = F.avg_pool2d(h, 3, 1, 1, count_include_pad=self.pool == "average")
                elif isinstance(step, list):
                    h = torch.cat([getattr(self, name)(h) for name, *_ in step], dim=1)
                else:
                    h = getattr(self, step[0])(h)
            found.append(h)
        return torch.cat(found, dim=1)


class InceptionPool(nn.Module):
    """float32 (B, 3, 299, 299) in about [-1, 1] => the pool (B, 2048)."""

    def __init__(self, weights: str) -> None:
        """`weights`: one of the values of CLASSES, which decides how blocks pool and how images are resized."""
        super().__init__()
        self.weights = weights
        channels = 3
        for step in STEM:
            if step != "shrink":
                same = step[0] not in UNPADDED
                self.add_module(step[0], _Convolution(channels, *step[1:], same=same))
                channels = step[1]
        for name, branches in BLOCKS.items():
            pool = "average" if weights == "torchvision" else "maximum" if name == "Mixed_7c" else "inside"
            block = _Mixed(channels, branches, pool)
            self.add_module(name, block)
            channels = block.width

    def forward(self, x: Tensor) -> Tensor:
        for step in STEM:
            x = F.max_pool2d(x, 3, 2) if step == "shrink" else getattr(self, step[0])(x)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean(dim=(2, 3))

    def prepare(self, image: np.ndarray) -> Tensor:
        """uint8 (H, W, 3) RGB => float32 (3, 299, 299), resized and scaled as the weights expect it."""
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()  # (3, H, W) 0..255
        if self.weights == "torchvision":
            resized = F.interpolate(pixels[None], (SIDE, SIDE), mode="bilinear", antialias=True)[0]
            return resized / 127.5 - 1
        rows, columns = (_corner_weights(size) for size in pixels.shape[1:])
        return (rows @ pixels @ columns.T - 128) / 128


def _corner_weights(size: int) -> Tensor:
    """(299, size): bilinear interpolation as TensorFlow 1 has it, pixel i lying at i * size / 299."""
    at = torch.arange(SIDE, dtype=torch.float64) * size / SIDE
    low = at.floor().long()
    high = (low + 1).clamp(max=size - 1)
    share = at - low
    weights = torch.zeros(SIDE, size, dtype=torch.float64)
    rows = torch.arange(SIDE)
    weights[rows, low] += 1 - share
    weights[rows, high] += share
    return weights.float()


def own_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict without the classifiers, which the pool comes before."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(("fc.", "AuxLogits."))}
