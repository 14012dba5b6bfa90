"""The normalisation of every layer of the UNet.

Legend: B batch, C channels.
"""

from torch import Tensor, nn

GROUPS = 32  # of every GroupNorm in the network
LARGE_MAP = 1024  # pixels, from which torch's GroupNorm takes another kernel for channels-last maps on the CPU


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu & He, ECCV 2018) with GROUPS groups."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) -> the same shape and type."""
        is_slow = x.requires_grad or x[0, 0].numel() < LARGE_MAP
        if x.device.type == "cpu" and x.dtype != self.weight.dtype and is_slow:
            # its kernels for smaller ones, and those of the backward pass, take three times as long in half precision
            # as with both conversions
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)
        return super().forward(x)
