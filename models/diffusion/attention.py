"""Self-attention and identity cross-attention, with injection and observation of attention maps.

Legend: B batch, C channels, H W height and width, N = H * W queries, D context width, T context tokens, d width of a
head. An attention map is the scaled logits before the softmax, (B, heads, queries, keys).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.context import PreparedContext
from models.diffusion.group_norm import GroupNorm


@dataclass
class AttentionControl:
    """What one forward pass does with its attention maps: injection within the batch, and observation.

    Attention injection (UIFace, ICLR 2025) needs the maps of a pass with the empty context at the same x_t and t. All
    branches run in one batch, and its shape is that of the batch alone, whichever rows inject: row i takes the
    self-attention weights of row `source[i]`, itself where nothing is injected. No row's numbers depend on a row that
    is not its source, and nothing is kept between layers.

    source: (B,) long. blend: (B,) bool, rows that blend the cross-attention map of their source into their own; None:
    none does.
    observe_cross: called with every layer's cross-attention map (B, heads, N, T) as used, in order of execution.
    """

    source: Tensor
    blend: Tensor | None = None
    observe_cross: Callable[[Tensor], None] | None = None


def blend_maps(maps: Tensor, source: Tensor) -> Tensor:
    """Give each row's map the mean of its own and its source's means and standard deviations over the keys, per query.

    maps (B, heads, queries, keys), source (B,) rows. UIFace's cross-attention injection, an adaptive instance
    normalisation whose target lies half way; the standard deviations are unbiased.
    """
    mean = maps.mean(dim=-1, keepdim=True)
    centred = maps - mean
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (maps.shape[-1] - 1) ** 0.5
    return torch.addcmul((mean[source] + mean) / 2, centred, (std[source] + std) / (2 * std))


class Projection(nn.Conv1d):
    """A linear layer of tokens, stored as a 1x1 convolution, as published."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, outputs)."""
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class Attention(nn.Module):
    """Multi-head attention over tokens (B, N, C)."""

    def __init__(self, channels: int, context_channels: int, heads: int, head_channels: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_channels
        self.to_q = Projection(channels, inner)
        self.to_k = Projection(context_channels, inner)
        self.to_v = Projection(context_channels, inner)
        self.proj_out = Projection(inner, channels)

    def queries(self, x: Tensor) -> Tensor:
        return self._split_heads(self.to_q(x))  # (B, heads, N, d)

    def keys(self, x: Tensor) -> Tensor:
        return self._split_heads(self.to_k(x))  # (B, heads, keys, d)

    def values(self, x: Tensor) -> Tensor:
        return self._split_heads(self.to_v(x))  # (B, heads, keys, d)

    def merge(self, attended: Tensor) -> Tensor:
        """(B, heads, N, d) -> (B, N, C)."""
        return self.proj_out(attended.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def self_attention(attention: Attention, x: Tensor, control: AttentionControl | None) -> Tensor:
    """Attention of the tokens x (B, N, C) to themselves; a row with a source takes its weights, and has its own
    values."""
    queries, keys = attention.queries(x), attention.keys(x)  # (B, heads, N, d)
    if control is not None:  # same queries and keys, same weights: their logits never exist as a whole
        queries, keys = queries[control.source], keys[control.source]
    return attention.merge(_attend(queries, keys, attention.values(x)))


def cross_attention(
    attention: Attention, x: Tensor, keys_values: tuple[Tensor, Tensor], control: AttentionControl | None
) -> Tensor:
    """Attention of the tokens x (B, N, C) to the context's keys and values (B, heads, T, d)."""
    keys, values = keys_values
    if control is None:
        return attention.merge(_attend(attention.queries(x), keys, values))
    logits = attention_map(attention.queries(x), keys)  # (B, heads, N, T)
    if control.blend is not None:
        blended = blend_maps(logits, control.source)
        logits = torch.where(control.blend[:, None, None, None], blended, logits)
    if control.observe_cross is not None:
        control.observe_cross(logits)
    return attention.merge(logits.softmax(dim=-1).to(values.dtype) @ values)


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Each (B, heads, tokens, d) -> (B, heads, N, d)."""
    if queries.device.type == "cpu" and queries.requires_grad and queries.dtype in (torch.bfloat16, torch.float16):
        # its backward pass in half precision takes up to ten times as long as in float32
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(queries.float(), keys.float(), values.float()).to(values.dtype)
    return F.scaled_dot_product_attention(queries, keys, values)


def attention_map(queries: Tensor, keys: Tensor) -> Tensor:
    """Scaled logits in float32, (B, heads, queries, keys); both sides are scaled, which keeps half precision in
    range."""
    scale = queries.shape[-1] ** -0.25
    return ((queries * scale) @ (keys * scale).transpose(-1, -2)).float()


class SelfAttentionBlock(nn.Module):
    """x + attention(norm(x)): the attention of every network but the one with identity cross-attention."""

    def __init__(self, channels: int, heads: int, head_channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.attention = Attention(channels, channels, heads, head_channels)
        # a block begins as the identity, like the residual blocks
        nn.init.zeros_(self.attention.proj_out.weight)
        nn.init.zeros_(self.attention.proj_out.bias)

    def forward(self, x: Tensor, context: PreparedContext, control: AttentionControl | None = None) -> Tensor:
        """x (B, C, H, W) -> the same shape; the context is not used."""
        return x + _to_image(self_attention(self.attention, _to_tokens(self.norm(x)), control), x)


class CrossAttentionBlock(nn.Module):
    """Self-attention, attention to the identity context's tokens, and a feed-forward net (IDiff-Face, ICCV 2023)."""

    def __init__(self, channels: int, context_channels: int, heads: int, head_channels: int, layer: int) -> None:
        """`layer`: the number of this block in order of execution, under which the prepared context keeps its keys."""
        super().__init__()
        inner = heads * head_channels
        self.layer = layer
        self.context_channels, self.num_tokens = context_channels, head_channels
        self.x_proj_in = nn.Conv2d(channels, inner, 1)
        self.x_proj_out = nn.Conv2d(inner, channels, 1)
        self.self_attention = Attention(inner, inner, heads, head_channels)
        self.c_proj_in = nn.Linear(context_channels, context_channels * self.num_tokens)
        self.cross_attention = Attention(inner, context_channels, heads, head_channels)
        self.x_norm = GroupNorm(inner)  # shared by the three branches
        self.c_norm = GroupNorm(context_channels)
        self.ff = nn.Sequential(nn.Linear(inner, 4 * inner), nn.GELU(), nn.Linear(4 * inner, inner))
        nn.init.zeros_(self.x_proj_out.weight)
        nn.init.zeros_(self.x_proj_out.bias)

    def context_keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded contexts (B, D) -> keys and values of their tokens, (B, heads, T, d) each. They do not depend on
        t."""
        tokens = self.c_proj_in(context).unflatten(-1, (self.context_channels, self.num_tokens))  # (B, D, T)
        tokens = self.c_norm(tokens).transpose(1, 2)  # (B, T, D)
        return self.cross_attention.keys(tokens), self.cross_attention.values(tokens)

    def forward(self, x: Tensor, context: PreparedContext, control: AttentionControl | None = None) -> Tensor:
        """x (B, C, H, W) and B contexts -> (B, C, H, W)."""
        keys_values = context.keys_values[self.layer]
        h = self.x_proj_in(x)  # (B, heads * d, H, W)
        h = h + _to_image(self_attention(self.self_attention, _to_tokens(self.x_norm(h)), control), h)
        h = h + _to_image(cross_attention(self.cross_attention, _to_tokens(self.x_norm(h)), keys_values, control), h)
        h = h + _to_image(self.ff(_to_tokens(self.x_norm(h))), h)
        return x + self.x_proj_out(h)


def _to_tokens(x: Tensor) -> Tensor:
    # (B, C, H, W) -> (B, N, C), contiguous: a linear layer of it is one product, not one for each image
    return x.flatten(2).transpose(1, 2).contiguous()


def _to_image(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(-1, like.shape[-2:])  # (B, N, C) -> (B, C, H, W)
