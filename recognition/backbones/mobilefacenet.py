"""MobileFaceNet (Chen et al., CCBR 2018): a million parameters, for telephones and for a CPU.

Layers and widths of the paper's table 1; the embedding has `num_features` numbers, 512 as in TFace and insightface
where the paper has 128. insightface's own "mbf" is twice as wide in its bottlenecks. Legend: B batch, C channels, H W
height and width.
"""

from __future__ import annotations

from torch import Tensor, nn

from recognition.backbones.layers import init_weights, scaled

STEM_CHANNELS, LAST_CHANNELS = 64, 512
# Rows of table 1: expansion t, output channels c, repeats n, stride s of the first repeat
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
STEM_STRIDE = 2


class Bottleneck(nn.Module):
    """Inverted residual of MobileNetV2 with PReLU: x (B, C_in, H, W) -> (B, C_out, H/stride, W/stride).

    The shortcut is there where input and output have the same shape.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.expand = convolution(in_channels, hidden, 1)
        self.depthwise = convolution(hidden, hidden, 3, stride, padding=1, groups=hidden)
        self.project = convolution(hidden, out_channels, 1, activation=False)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.has_shortcut else out


class MobileFaceNet(nn.Module):
    """MobileFaceNet: images (B, 3, S, S) in [-1, 1] -> features (B, num_features). S is a multiple of 16."""

    def __init__(
        self, *, input_size: int, num_features: int, width: float, dropout: float, affine_output: bool
    ) -> None:
        super().__init__()
        channels = scaled(STEM_CHANNELS, width)
        self.stem = nn.Sequential(
            convolution(3, channels, 3, STEM_STRIDE, padding=1),
            convolution(channels, channels, 3, padding=1, groups=channels),
        )
        units: list[nn.Module] = []
        for expansion, row_channels, repeats, stride in BOTTLENECKS:
            for repeat in range(repeats):
                out_channels = scaled(row_channels, width)
                units.append(Bottleneck(channels, out_channels, expansion, stride if repeat == 0 else 1))
                channels = out_channels
        self.body = nn.Sequential(*units)
        last = scaled(LAST_CHANNELS, width)
        self.output_layer = nn.Sequential(
            convolution(channels, last, 1),
            # One weight a place and channel, in place of an average: the corners of a face's field of view tell less
            convolution(last, last, input_size // 16, groups=last, activation=False),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(last, num_features, bias=False),
            nn.BatchNorm1d(num_features, affine=affine_output),
        )
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)  # (B, C, S/2, S/2)
        x = self.body(x)  # (B, 2 C, S/16, S/16)
        return self.output_layer(x)  # (B, num_features)


def convolution(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    *,
    padding: int = 0,
    groups: int = 1,
    activation: bool = True,
) -> nn.Sequential:
    """Convolution without bias, batch norm and, unless it is linear, PReLU with a slope for each channel."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, nn.PReLU(out_channels)) if activation else nn.Sequential(*layers)
