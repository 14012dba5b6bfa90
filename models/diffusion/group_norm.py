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
        if x.device.type == "cpu" and x.dtype != self.weight.dtype and x[0, 0].numel() < LARGE_MAP:
            # its kernel for smaller ones in half precision takes three times as long as both conversions
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)
        return super().forward(x)
