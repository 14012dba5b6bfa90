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


class AggregatedMap:
    """h_t of one network pass, summed layer by layer as the maps are made, so that none of them is kept.

    Layers of one resolution are summed before they are brought to S x S: bilinear interpolation is linear, and it
    leaves maps in [0, 1] there.
    """

    def __init__(self, image_size: Sequence[int]) -> None:
        """image_size: (H, W) of the network's input, which gives h and w of every layer."""
        self.height, self.width = image_size
        self.num_layers = 0
        self._sums: dict[int, Tensor] = {}  # N -> (B, N)

    def add(self, logits: Tensor) -> None:
        """The map of one more cross-attention layer, logits (B, heads, N, T)."""
        attended = logits.float().softmax(dim=-2).mean(dim=(1, 3))  # (B, N): over queries, mean of heads and tokens
        attended = attended / attended.amax(dim=1, keepdim=True).clamp_min(EPSILON)
        num_queries = attended.shape[1]
        earlier = self._sums.get(num_queries)
        self._sums[num_queries] = attended if earlier is None else earlier + attended
        self.num_layers += 1

    def h(self) -> Tensor:
        """(B, S, S) in [0, 1], the mean over the layers, min-max normalised per sample; no sample depends on
        another."""
        total = torch.stack([self._resized(attended) for attended in self._sums.values()]).sum(dim=0)
        mean = total / self.num_layers  # (B, S, S)
        low, high = mean.amin(dim=(1, 2), keepdim=True), mean.amax(dim=(1, 2), keepdim=True)
        return (mean - low) / (high - low).clamp_min(EPSILON)

    def _resized(self, attended: Tensor) -> Tensor:
        downscaling = round((self.height * self.width / attended.shape[1]) ** 0.5)
        image = attended.unflatten(1, (1, self.height // downscaling, self.width // downscaling))  # (B, 1, h, w)
        return F.interpolate(image, size=(MAP_SIZE, MAP_SIZE), mode="bilinear", align_corners=False).squeeze(1)


def map_change(h: Tensor, h_previous: Tensor) -> Tensor:
    """d_t = mean |h_t - h_{t+1}| per sample: (B, S, S) twice -> (B,)."""
    return (h - h_previous).abs().mean(dim=(1, 2))
