"""Improved residual networks of ArcFace (Deng et al., CVPR 2019, section 3.2.2), plain or with squeeze-and-excitation.

Parameter names are those of the published TFace files. Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from torch import Tensor, nn

from recognition.backbones.layers import SqueezeExcite, init_weights, scaled

# Units per stage. From 152 on TFace's units are bottlenecks and four times wider.
IR_DEPTHS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    101: (3, 13, 30, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
BOTTLENECK_FROM = 152


class IRUnit(nn.Module):
    """Residual unit: x (B, C_in, H, W) -> (B, C_out, H/stride, W/stride)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        bottleneck: bool,
        squeeze_excite: bool,
        inner_norm: bool = True,
    ) -> None:
        super().__init__()
        if in_channels != out_channels:
            self.shortcut_layer: nn.Module = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        else:
            self.shortcut_layer = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()  # every stride-th pixel
        if bottleneck:
            hidden = out_channels // 4
            self.res_layer = nn.Sequential(
                nn.BatchNorm2d(in_channels),
                nn.Conv2d(in_channels, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                nn.PReLU(hidden),
                nn.Conv2d(hidden, hidden, 3, 1, 1, bias=False),
                nn.BatchNorm2d(hidden),
                nn.PReLU(hidden),
                nn.Conv2d(hidden, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        else:
            inner = [nn.BatchNorm2d(out_channels)] if inner_norm else []
            self.res_layer = nn.Sequential(
                nn.BatchNorm2d(in_channels),
                nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False),
                *inner,
                nn.PReLU(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, stride, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        if squeeze_excite:
            self.res_layer.add_module("se_block", SqueezeExcite(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut_layer(x) + self.res_layer(x)


class IRBackbone(nn.Module):
    """IR or IR-SE network: images (B, 3, S, S) in [-1, 1] -> features (B, num_features)."""

    def __init__(
        self,
        depth: int,
        *,
        squeeze_excite: bool,
        input_size: int,
        num_features: int,
        width: float,
        dropout: float,
        stem_stride: int,
        affine_output: bool,
        inner_norm: bool,
        bottleneck: bool,
    ) -> None:
        super().__init__()
        channels = scaled(64, width)
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, channels, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(channels), nn.PReLU(channels)
        )
        units: list[nn.Module] = []
        for stage, num_units in enumerate(IR_DEPTHS[depth]):
            out_channels = scaled((256 if bottleneck else 64) << stage, width)
            for unit in range(num_units):
                stride = 2 if unit == 0 else 1
                units.append(
                    IRUnit(
                        channels,
                        out_channels,
                        stride,
                        bottleneck=bottleneck,
                        squeeze_excite=squeeze_excite,
                        inner_norm=inner_norm,
                    )
                )
                channels = out_channels
        self.body = nn.Sequential(*units)
        side = input_size // (16 * stem_stride)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(channels * side * side, num_features),
            nn.BatchNorm1d(num_features, affine=affine_output),
        )
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.input_layer(images)  # (B, C, S, S)
        x = self.body(x)  # (B, 8 C, S/16, S/16)
        return self.output_layer(x)  # (B, num_features)
