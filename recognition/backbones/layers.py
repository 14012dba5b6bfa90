"""What the backbone families share: channel widths, the squeeze-and-excitation gate and the initialisation."""

from __future__ import annotations

from torch import Tensor, nn


def scaled(channels: int, width: float) -> int:
    """Channel count times the width multiplier, rounded to a multiple of 8 (at least 8)."""
    return channels if width == 1 else max(8, round(channels * width / 8) * 8)


class SqueezeExcite(nn.Module):
    """Channel gate of squeeze-and-excitation networks (Hu et al., CVPR 2018), without biases."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        gate = self.fc2(self.relu(self.fc1(squeezed))).sigmoid()  # (B, C, 1, 1) in (0, 1)
        return x * gate


def init_weights(module: nn.Module) -> None:
    """He initialisation (fan-out, ReLU gain) of convolutions and linear layers; batch norms keep (1, 0)."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
