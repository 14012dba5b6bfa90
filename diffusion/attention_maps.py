"""The aggregated cross-attention map h_t and its change d_t, by which UIFace (ICLR 2025) tells when a layout has
settled.

Legend: B batch, N = h * w queries, T context tokens, S = 32 side of the aggregated map.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAP_SIZE = 32  # S
EPSILON = 1e-12  # keeps a constant map, which has no layout, at zero instead of nan


def aggregate_cross_maps(cross_maps: Sequence[Tensor], image_size: Sequence[int]) -> Tensor:
    """h_t of one network pass.

    cross_maps: the logits of every cross-attention layer, (B, heads, N, T) each. image_size: (H, W) of the network's
    input, which gives h and w of every layer. Returns (B, S, S) in [0, 1]; no sample depends on another.
    """
    height, width = image_size
    layers = []
    for logits in cross_maps:
        attended = logits.float().softmax(dim=-2).mean(dim=(1, 3))  # (B, N): over queries, mean of heads and tokens
        attended = attended / attended.amax(dim=1, keepdim=True).clamp_min(EPSILON)
        downscaling = round((height * width / attended.shape[1]) ** 0.5)
        layer = attended.unflatten(1, (1, height // downscaling, width // downscaling))  # (B, 1, h, w)
        layer = F.interpolate(layer, size=(MAP_SIZE, MAP_SIZE), mode="bilinear", align_corners=False)
        layers.append(layer.squeeze(1).clamp(0, 1))
    h = torch.stack(layers).mean(dim=0)  # (B, S, S)
    low, high = h.amin(dim=(1, 2), keepdim=True), h.amax(dim=(1, 2), keepdim=True)
    return (h - low) / (high - low).clamp_min(EPSILON)


def map_change(h: Tensor, h_previous: Tensor) -> Tensor:
    """d_t = mean |h_t - h_{t+1}| per sample: (B, S, S) twice -> (B,)."""
    return (h - h_previous).abs().mean(dim=(1, 2))
