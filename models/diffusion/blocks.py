"""Building blocks of the UNet: time embedding, residual blocks, changes of resolution.

Legend: B batch, C channels, H W height and width, E width of the time embedding, D context width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.attention import AttentionControl, CrossAttentionBlock, SelfAttentionBlock
from models.diffusion.context import PreparedContext
from models.diffusion.group_norm import GroupNorm

CONDITION_TYPES = ("CA", "AdaGN", "AddPlusGN", "DiffAE")


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep through a two-layer perceptron (DDPM, appendix B)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.lin1 = nn.Linear(channels, 4 * channels)
        self.lin2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps (B,) -> (B, E = 4 * channels)."""
        half = self.channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)  # (B, channels / 2)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.lin1.weight.dtype)  # (B, channels)
        return self.lin2(F.silu(self.lin1(sinusoids)))


@dataclass
class PreparedTime:
    """Everything about B timesteps that does not depend on x_t, so that a run computes it once.

    terms: for every residual block, in order of execution, the tensors (B, out_channels) of its `time_terms`.
    """

    terms: list[tuple[Tensor, ...]]

    def select(self, rows: Tensor) -> "PreparedTime":
        """The timesteps of these rows, (n,) long; a row may come up more than once."""
        return PreparedTime([tuple(term[rows] for term in terms) for terms in self.terms])

    def to(self, dtype: torch.dtype) -> "PreparedTime":
        return PreparedTime([tuple(term.to(dtype) for term in terms) for terms in self.terms])


class AdaptiveGroupNorm(nn.Module):
    """(1 + scale) * GroupNorm(h) + shift (Dhariwal & Nichol, 2021, section 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """h (B, C, H, W), scale and shift (B, C) -> (B, C, H, W)."""
        return torch.addcmul(shift[..., None, None], self.norm(h), 1 + scale[..., None, None])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions under the time embedding and, in all types but CA, the context embedding.

    - CA: the context comes in through cross-attention only; the time embedding scales and shifts.
    - AdaGN: the sum of both embeddings scales and shifts.
    - DiffAE: the time embedding scales and shifts, then the context embedding multiplies.
    - AddPlusGN: both embeddings are added before a plain GroupNorm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int,
        condition_type: str,
        context_channels: int | None,
        layer: int = 0,
    ) -> None:
        """`context_channels` None: unconditional. `layer`: the number of this block, under which prepared timesteps
        keep its terms."""
        super().__init__()
        self.layer = layer
        self.condition_type = condition_type
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, out_channels))
        self.takes_context = context_channels is not None and condition_type != "CA"
        if self.takes_context:
            self.context_emb = nn.Sequential(nn.SiLU(), nn.Linear(context_channels, out_channels))
        adds_context = self.takes_context and condition_type == "AdaGN"
        self.time_alone_scales = condition_type != "AddPlusGN" and not adds_context
        if condition_type == "AddPlusGN":
            self.norm2 = GroupNorm(out_channels)
        else:
            self.scale_emb = nn.Linear(out_channels, out_channels)
            self.shift_emb = nn.Linear(out_channels, out_channels)
            self.norm2 = AdaptiveGroupNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # a block begins as the identity (Goyal et al., 2017, for residual networks; ADM for this one)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def time_terms(self, time_embedding: Tensor) -> tuple[Tensor, ...]:
        """What the block needs of the time embedding (B, E) alone: the terms (B, out_channels) of `forward`.

        Scale and shift; where the context is added to the time embedding first, that sum's part.
        """
        time = self.time_emb(time_embedding)
        return (self.scale_emb(time), self.shift_emb(time)) if self.time_alone_scales else (time,)

    def time_layers(self) -> list[nn.Module]:
        """What `time_terms` computes with, and `forward` does not."""
        return [self.time_emb, *([self.scale_emb, self.shift_emb] if self.time_alone_scales else [])]

    def forward(self, x: Tensor, time_terms: tuple[Tensor, ...], context: Tensor | None) -> Tensor:
        """x (B, C, H, W), time_terms of `time_terms`, context (B, D) or None -> (B, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        identity = self.context_emb(context) if self.takes_context else None  # (B, out_channels)
        if self.condition_type == "AddPlusGN":
            (time,) = time_terms
            embedding = time if identity is None else time + identity
            h = self.norm2(h + embedding[..., None, None])
        elif self.takes_context and self.condition_type == "AdaGN":
            embedding = time_terms[0] + identity
            h = self.norm2(h, self.scale_emb(embedding), self.shift_emb(embedding))
        else:
            h = self.norm2(h, *time_terms)
            if identity is not None:  # DiffAE
                h = h * identity[..., None, None]
        return self.conv2(F.silu(h)) + self.shortcut(x)


class Stage(nn.Module):
    """A residual block, then an attention block where there is one."""

    def __init__(self, res: ResidualBlock, attn: SelfAttentionBlock | CrossAttentionBlock | None) -> None:
        super().__init__()
        self.res = res
        self.attn = attn

    def forward(
        self, x: Tensor, time: PreparedTime, context: PreparedContext, control: AttentionControl | None
    ) -> Tensor:
        """x (B, C, H, W) -> (B, out_channels, H, W)."""
        x = self.res(x, time.terms[self.res.layer], context.embedding)
        return x if self.attn is None else self.attn(x, context, control)


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(
        self, res1: ResidualBlock, attn: SelfAttentionBlock | CrossAttentionBlock, res2: ResidualBlock
    ) -> None:
        super().__init__()
        self.res1 = res1
        self.attn = attn
        self.res2 = res2

    def forward(
        self, x: Tensor, time: PreparedTime, context: PreparedContext, control: AttentionControl | None
    ) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        x = self.res1(x, time.terms[self.res1.layer], context.embedding)
        return self.res2(self.attn(x, context, control), time.terms[self.res2.layer], context.embedding)


class Downsample(nn.Module):
    """Halves height and width with a strided 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # (B, C, H, W) -> (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Doubles height and width with a transposed 4x4 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # (B, C, H, W) -> (B, C, 2H, 2W)
