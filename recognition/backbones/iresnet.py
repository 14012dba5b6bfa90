"""The iresnet networks of insightface and ElasticFace: IR under other names, each stage with a strided shortcut.

Parameter names are those of the published insightface files. Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from torch import Tensor, nn

from recognition.backbones.layers import init_weights, scaled

IRESNET_DEPTHS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    200: (6, 26, 60, 6),
}


class IResUnit(nn.Module):
    """Residual unit: x (B, C_in, H, W) -> (B, C_out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.prelu = nn.PReLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return residual + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """iresnet: images (B, 3, S, S) in [-1, 1] -> features (B, num_features)."""

    def __init__(
        self, depth: int, *, input_size: int, num_features: int, width: float, dropout: float, stem_stride: int
    ) -> None:
        super().__init__()
        channels = scaled(64, width)
        self.conv1 = nn.Conv2d(3, channels, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        for stage, num_units in enumerate(IRESNET_DEPTHS[depth]):
            out_channels = scaled(64 << stage, width)
            units = [IResUnit(channels, out_channels, 2)]
            units += [IResUnit(out_channels, out_channels, 1) for _ in range(num_units - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*units))
            channels = out_channels
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        side = input_size // (16 * stem_stride)
        self.fc = nn.Linear(channels * side * side, num_features)
        self.features = nn.BatchNorm1d(num_features)
        self.features.weight.requires_grad = False  # stays 1: the margin heads normalise the scale away
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))  # (B, C, S, S)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 8 C, S/16, S/16)
        x = self.dropout(self.bn2(x).flatten(1))  # (B, 8 C S/16 S/16)
        return self.features(self.fc(x))  # (B, num_features)
