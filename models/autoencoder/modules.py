"""Convolutional encoder and decoder of the VQ autoencoder (VQGAN, CVPR 2021; latent diffusion, CVPR 2022, appendix E).

Legend: B batch, C channels, H W height and width. Parameter names follow the published `ffhq256` first stage, so
that its weights load strictly.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with eps 1e-6, as in the published first stage; at most one group a channel."""
    groups = min(groups, channels)
    if channels % groups:
        raise ValueError(
            f"ddconfig.norm_groups: {channels} channels, a width of ch * ch_mult, are not a multiple of {groups}"
        )
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions around a shortcut; no time embedding."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, C_out, H, W)
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2) for project in (self.q, self.k, self.v))  # (B, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, H*W, C)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Strided 3x3 convolution padded by one on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class Level(nn.Module):
    """Residual blocks of one resolution, with attention after each where asked for; the owner adds the resampling."""

    def __init__(self, widths: Sequence[int], attention: bool, dropout: float, groups: int) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.block = nn.ModuleList(ResnetBlock(c_in, c_out, dropout, groups) for c_in, c_out in pairs)
        self.attn = nn.ModuleList(AttnBlock(c_out, groups) for _, c_out in pairs if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, dropout, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def _check_ddconfig(resolution: int, ch_mult: Sequence[int], double_z: bool) -> None:
    if double_z:
        raise ValueError("ddconfig.double_z: true; a VQ autoencoder has no variance channels, so it must be false")
    halvings = len(ch_mult) - 1
    if resolution % 2**halvings:
        raise ValueError(
            f"ddconfig.resolution: {resolution} cannot be halved {halvings} times, between levels of ch_mult"
        )


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) in [-1, 1] to features (B, z_channels, H/f, W/f), f = 2 ** (levels - 1).

    The arguments are the keys of latent diffusion's `ddconfig`; `attn_resolutions` are the sides, counted from
    `resolution`, at which every residual block is followed by attention. `norm_groups` is ours: with as many groups as
    channels, as a narrow network would have with the published 32, each norm takes away the mean of every channel, and
    brightness hardly gets through.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        resolution: int,
        in_channels: int = 3,
        out_ch: int = 3,
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        double_z: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        del out_ch  # one ddconfig describes both halves; this width is the decoder's
        _check_ddconfig(resolution, ch_mult, double_z)
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([ch, *widths[:-1]], widths, strict=True)):
            level = Level(
                [c_in] + [c_out] * num_res_blocks, resolution // 2**i in attn_resolutions, dropout, norm_groups
            )
            if i < len(widths) - 1:
                level.downsample = Downsample(c_out)
            self.down.append(level)
        self.mid = Middle(widths[-1], dropout, norm_groups)
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid(h)  # (B, C, H/f, W/f)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, z_channels, H/f, W/f)


class Decoder(nn.Module):
    """Features (B, z_channels, H/f, W/f) to images (B, out_ch, H, W), about [-1, 1] and not clamped.

    The mirror of `Encoder`, with one more residual block a level.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        resolution: int,
        in_channels: int = 3,
        out_ch: int = 3,
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        double_z: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        del in_channels  # one ddconfig describes both halves; this width is the encoder's
        _check_ddconfig(resolution, ch_mult, double_z)
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], dropout, norm_groups)
        self.up = nn.ModuleList()  # up.0 is the finest level, so they run last to first
        for i, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            level = Level(
                [c_in] + [c_out] * (num_res_blocks + 1), resolution // 2**i in attn_resolutions, dropout, norm_groups
            )
            if i > 0:
                level.upsample = Upsample(c_out)
            self.up.append(level)
        self.norm_out = group_norm(widths[0], norm_groups)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))  # (B, C, H/f, W/f)
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, out_ch, H, W)


def features_to_rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B * H * W, C), rows in the order of images, then lines, then columns."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def rows_to_features(rows: Tensor, like: Tensor) -> Tensor:
    """Inverse of `features_to_rows` for the shape of `like` (B, C, H, W)."""
    b, _, h, w = like.shape
    return rows.view(b, h, w, -1).permute(0, 3, 1, 2).contiguous(memory_format=torch.contiguous_format)
