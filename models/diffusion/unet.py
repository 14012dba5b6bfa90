"""The UNet that predicts the noise in a latent (or image), conditioned on an identity context.

Legend: B batch, C channels, H W height and width, D context width, E width of the time embedding.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.diffusion.attention import AttentionControl, CrossAttentionBlock, SelfAttentionBlock
from models.diffusion.blocks import (
    CONDITION_TYPES,
    Downsample,
    Middle,
    PreparedTime,
    ResidualBlock,
    Stage,
    TimeEmbedding,
    Upsample,
)
from models.diffusion.context import ContextEmbedder, PreparedContext
from models.diffusion.group_norm import GROUPS, GroupNorm
from utils.config import UserError


class ConditionalUNet(ContextEmbedder):
    """UNet of IDiff-Face (ICCV 2023) and UIFace (ICLR 2025), with the published files' parameter names and shapes.

    The context enters by one of four ways: "CA" identity cross-attention, "AdaGN", "AddPlusGN" or "DiffAE" in the
    residual blocks (see ResidualBlock). All but the conditional CA network have plain self-attention blocks.
    """

    def __init__(
        self,
        *,
        input_channels: int = 3,
        initial_channels: int = 96,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        is_attention: Sequence[bool] = (False, True, True, True),
        attention_heads: int = -1,
        attention_head_channels: int = 32,
        n_blocks_per_resolution: int = 2,
        condition_type: str = "CA",
        context_input_channels: int = 512,
        context_channels: int = 256,
        is_context_conditional: bool = True,
        n_context_classes: int = 0,
        learn_empty_context: bool = False,
        context_dropout_probability: float = 0.0,
        unconditioned_probability: float = 0.0,
    ) -> None:
        """Build the network; raises UserError, naming the setting, where the settings do not fit together.

        channel_multipliers: cumulative, so (1, 2, 2, 2) on 96 channels gives levels of 96, 192, 384 and 768.
        is_attention: per level. attention_heads: -1 takes as many as fit, C // attention_head_channels.
        context_dropout_probability: of single components (CPD); unconditioned_probability: of whole contexts.
        """
        super().__init__(
            input_channels=context_input_channels,
            channels=context_channels,
            n_classes=n_context_classes,
            is_conditional=is_context_conditional,
            learn_empty=learn_empty_context,
            dropout_probability=context_dropout_probability,
            unconditioned_probability=unconditioned_probability,
        )
        has_cross_attention = condition_type == "CA" and is_context_conditional
        widths = _level_widths(initial_channels, channel_multipliers, is_attention)
        if condition_type not in CONDITION_TYPES:
            raise UserError(f"condition_type: {condition_type!r}; give one of {', '.join(CONDITION_TYPES)}")
        if n_blocks_per_resolution < 1:
            raise UserError(f"n_blocks_per_resolution: {n_blocks_per_resolution}; give at least 1")
        if has_cross_attention and context_channels % GROUPS:
            raise UserError(f"context_channels: {context_channels}; give a multiple of {GROUPS} (GroupNorm)")
        narrower = [initial_channels, *widths]  # the last block on the way up has the width of the level above
        attended = {widths[-1], *(w for i, a in enumerate(is_attention) if a for w in narrower[i : i + 2])}
        _check_heads(attention_heads, attention_head_channels, sorted(attended), has_cross_attention)

        self.input_channels = input_channels
        self.has_cross_attention = has_cross_attention
        self.activation_checkpointing = False  # True: in training, blocks compute their activations twice
        self.downscaling = 2 ** (len(widths) - 1)  # height and width must be multiples of it
        time_channels = 4 * initial_channels
        num_residuals, num_cross_attentions = 0, 0

        def residual(in_channels: int, out_channels: int) -> ResidualBlock:
            nonlocal num_residuals
            num_residuals += 1
            width = context_channels if is_context_conditional else None
            return ResidualBlock(in_channels, out_channels, time_channels, condition_type, width, num_residuals - 1)

        def attention(channels: int) -> SelfAttentionBlock | CrossAttentionBlock:
            nonlocal num_cross_attentions
            heads = channels // attention_head_channels if attention_heads == -1 else attention_heads
            if not has_cross_attention:
                return SelfAttentionBlock(channels, heads, attention_head_channels)
            num_cross_attentions += 1
            return CrossAttentionBlock(
                channels, context_channels, heads, attention_head_channels, layer=num_cross_attentions - 1
            )

        self.image_proj = nn.Conv2d(input_channels, initial_channels, 3, padding=1)
        self.time_emb = TimeEmbedding(initial_channels)

        # Down: n blocks a level, then half the resolution, except on the last level
        down, skip_widths, channels = [], [initial_channels], initial_channels
        for level, width in enumerate(widths):
            for _ in range(n_blocks_per_resolution):
                down.append(Stage(residual(channels, width), attention(width) if is_attention[level] else None))
                channels = width
                skip_widths.append(channels)
            if level < len(widths) - 1:
                down.append(Downsample(channels))
                skip_widths.append(channels)
        self.down = nn.ModuleList(down)

        self.middle = Middle(residual(channels, channels), attention(channels), residual(channels, channels))

        # Up: n + 1 blocks a level, each fed with a skip connection, the last one narrowing to the level above
        up = []
        for level in reversed(range(len(widths))):
            level_above = widths[level - 1] if level > 0 else initial_channels
            for out_channels in (*[widths[level]] * n_blocks_per_resolution, level_above):
                res = residual(channels + skip_widths.pop(), out_channels)
                up.append(Stage(res, attention(out_channels) if is_attention[level] else None))
                channels = out_channels
            if level > 0:
                up.append(Upsample(channels))
        self.up = nn.ModuleList(up)

        self.norm = GroupNorm(initial_channels)
        self.final = nn.Conv2d(initial_channels, input_channels, 3, padding=1)
        # the first prediction is zero noise, whose loss is 1, rather than an arbitrary function
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)

    def prepare_context(
        self,
        context: Tensor | None,
        batch_size: int = 1,
        *,
        empty_mask: Tensor | None = None,
        element_mask: Tensor | None = None,
    ) -> PreparedContext:
        """Embed contexts and compute the keys and values they have in every cross-attention block.

        context: (B, context_input_channels) or (B,) class numbers; None stands for `batch_size` empty contexts.
        Masks as in `forward`. The result takes the place of the context in `forward`, at any x and t.
        """
        if context is not None:
            batch_size = len(context)
        embedding = self.embed_context(context, batch_size, empty_mask=empty_mask, element_mask=element_mask)
        blocks = [module for module in self.modules() if isinstance(module, CrossAttentionBlock)]
        return PreparedContext(embedding, [block.context_keys_values(embedding) for block in blocks])

    def prepare_time(self, t: Tensor) -> PreparedTime:
        """Embed timesteps (B,) and compute what every residual block makes of them.

        The result takes the place of the timesteps in `forward`, at any x and context.
        """
        embedding = self.time_emb(t)  # (B, E)
        blocks = [module for module in self.modules() if isinstance(module, ResidualBlock)]
        return PreparedTime([block.time_terms(embedding) for block in blocks])

    def time_layers(self) -> set[nn.Module]:
        """The modules that only `prepare_time` computes with."""
        blocks = [module for module in self.modules() if isinstance(module, ResidualBlock)]
        parts = [self.time_emb, *(layer for block in blocks for layer in block.time_layers())]
        return {module for part in parts for module in part.modules()}

    def forward(
        self,
        x: Tensor,
        t: Tensor | PreparedTime,
        context: Tensor | PreparedContext | None = None,
        *,
        empty_mask: Tensor | None = None,
        element_mask: Tensor | None = None,
        control: AttentionControl | None = None,
    ) -> Tensor:
        """Predict the noise eps in x_t.

        x: (B, input_channels, H, W). t: (B,) timesteps, or B prepared ones. context: (B, context_input_channels), (B,)
        class numbers, a prepared context of B rows, or None for the empty context in the whole batch.
        empty_mask: (B,) bool, these samples get the empty context; element_mask: (B, D) bool, components of the
        embedding that survive partial dropout. In training, masks that are not given are drawn; in evaluation nothing
        is dropped.
        control: injection and observation of attention maps.

        Returns (B, input_channels, H, W). Raises ValueError for inputs of the wrong shape.
        """
        if (
            x.ndim != 4
            or x.shape[1] != self.input_channels
            or x.shape[2] % self.downscaling
            or x.shape[3] % self.downscaling
        ):
            raise ValueError(
                f"x: {tuple(x.shape)}; this network takes (B, {self.input_channels}, H, W) with H and W multiples of "
                f"{self.downscaling}"
            )
        if not isinstance(context, PreparedContext):
            context = self.prepare_context(context, len(x), empty_mask=empty_mask, element_mask=element_mask)
        elif empty_mask is not None or element_mask is not None:
            raise ValueError("empty_mask, element_mask: they belong to prepare_context when the context is prepared")
        if context.embedding is not None and len(context.embedding) != len(x):
            raise ValueError(f"context: {len(context.embedding)} contexts for a batch of {len(x)}")

        # Chen et al., Training deep nets with sublinear memory cost (2016); nothing random happens inside the blocks
        checkpointed = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if checkpointed else _call

        time = t if isinstance(t, PreparedTime) else self.prepare_time(t)
        h = self.image_proj(x)  # (B, C0, H, W)
        skips = [h]
        for module in self.down:
            h = module(h) if isinstance(module, Downsample) else run(module, h, time, context, control)
            skips.append(h)
        h = run(self.middle, h, time, context, control)
        for module in self.up:
            if isinstance(module, Upsample):
                h = module(h)
            else:
                h = run(module, torch.cat([h, skips.pop()], dim=1), time, context, control)
        return self.final(F.silu(self.norm(h)))  # (B, input_channels, H, W)


def _call(module: nn.Module, *inputs: Any) -> Tensor:
    return module(*inputs)


def _level_widths(initial_channels: int, multipliers: Sequence[int], is_attention: Sequence[bool]) -> list[int]:
    if not multipliers or len(multipliers) != len(is_attention):
        raise UserError(
            f"is_attention: {len(is_attention)} values for {len(multipliers)} channel_multipliers; "
            "give one of each a level"
        )
    widths, width = [], initial_channels
    for multiplier in multipliers:
        width *= multiplier
        widths.append(width)
    bad = [width for width in (initial_channels, *widths) if width < GROUPS or width % GROUPS]
    if bad:
        raise UserError(
            f"initial_channels: {initial_channels} with channel_multipliers {list(multipliers)} gives a width of "
            f"{bad[0]}; every width must be a multiple of {GROUPS} (GroupNorm)"
        )
    return widths


def _check_heads(heads: int, head_channels: int, widths: Sequence[int], has_cross_attention: bool) -> None:
    """`widths`: of the blocks with attention."""
    if head_channels < 1:
        raise UserError(f"attention_head_channels: {head_channels}; give at least 1")
    if heads != -1 and heads < 1:
        raise UserError(f"attention_heads: {heads}; give -1 (as many as fit) or at least 1")
    if heads != -1 and has_cross_attention and heads * head_channels % GROUPS:
        raise UserError(
            f"attention_heads: {heads} of {head_channels} channels have a width of {heads * head_channels}; "
            f"it must be a multiple of {GROUPS} (GroupNorm)"
        )
    uneven = [width for width in widths if heads == -1 and width % head_channels]
    if uneven:
        raise UserError(
            f"attention_head_channels: {head_channels} does not divide {uneven[0]}, the width of an attention block; "
            "give a divisor, or set attention_heads"
        )
