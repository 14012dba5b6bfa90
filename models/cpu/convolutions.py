"""Convolutions as products of matrices, for drawing on the CPU.

In fp32, 3x3 ones by Winograd's minimal filtering (Lavin & Gray, Fast Algorithms for Convolutional Neural Networks,
CVPR 2016): m x m outputs take (m + 2)^2 multiplications in place of 9 m^2, 2.25 times fewer with m = 2 and 4 times with
m = 4. Transformed filters take more memory than filters, 1.8 times with m = 2 and 4 times with m = 4; wide layers,
which stand where images are small and filters most of the traffic, are unfolded instead (im2col), which costs none.
All of it is channels-last in memory, so that attention's tokens are rows as they lie there.
Results differ from those of a direct convolution by rounding alone: 3e-7 (m = 2) and 2e-6 (m = 4) of their norm.

Legend: B batch, C K channels before and after, H W; m side of a tile of the output, n = m + 2 of the input it comes
from, P tiles of the whole batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# One-dimensional transforms A^T (m, n), G (n, 3), B^T (n, n) of Lavin & Gray, section 4, y = A^T [(G g) * (B^T d)],
# from the points 0, 1, -1 (with m = 4: and 2, -2) and infinity
TRANSFORMS = {
    2: (
        [[1, 1, 1, 0], [0, 1, -1, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    ),
    4: (
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
    ),
}
MAX_BYTES = 24 * 2**20  # of the transformed filters of a layer
TILES_BYTES = 8 * 2**20  # of the images taken at a time: what is made of their tiles stays in the cache, too
MIN_CHANNELS = 96  # of a layer with tiles: below, transforming costs more than multiplying
PIXELS_PER_FILTER = 2  # at most, of the whole batch: above, unfolding costs more than a product of matrices saves


class WinogradConv2d(nn.Module):
    """What a 3x3 convolution with stride 1 and padding 1 computes. Inputs and outputs are channels-last in memory."""

    def __init__(self, conv: nn.Conv2d, tile: int) -> None:
        """With the filters of `conv`; tile: m, 2 or 4. Raises ValueError for a convolution of another kind."""
        super().__init__()
        if not is_plain(conv, 3) or tile not in TRANSFORMS:
            raise ValueError(
                f"{conv}, tile {tile}: a plain 3x3 convolution with padding 1, and a tile of 2 or 4 wanted"
            )
        self.tile = tile
        outputs, filters, inputs = (
            torch.kron(one, one) for one in (torch.tensor(rows, dtype=torch.float64) for rows in TRANSFORMS[tile])
        )
        weight = conv.weight.detach()
        self.register_buffer("of_inputs", inputs.to(weight))  # (n * n, n * n)
        self.register_buffer("of_outputs", outputs.to(weight))  # (m * m, n * n)
        transformed = torch.einsum("ns,kcs->nck", filters.to(weight.device), weight.double().flatten(2))
        self.weight = _frozen(transformed.to(weight).contiguous())  # (n * n, C, K)
        self.bias = None if conv.bias is None else _frozen(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, K, H, W)."""
        tiles = -(-x.shape[2] // self.tile) * -(-x.shape[3] // self.tile)  # of an image
        images = max(1, TILES_BYTES // (tiles * x.shape[1] * (self.tile + 2) ** 2 * x.element_size()))
        parts = [self._convolve(part) for part in x.split(images)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _convolve(self, x: Tensor) -> Tensor:
        m, n, (batch, channels, height, width) = self.tile, self.tile + 2, x.shape
        rows, columns = -(-height // m), -(-width // m)
        margins = (0, 0, 1, columns * m - width + 1, 1, rows * m - height + 1)
        padded = F.pad(x.permute(0, 2, 3, 1), margins)
        tiles = padded.unfold(1, n, m).unfold(2, n, m).permute(4, 5, 0, 1, 2, 3)  # (n, n, B, rows, columns, C)
        transformed = self.of_inputs @ tiles.reshape(n * n, -1)
        products = torch.bmm(transformed.view(n * n, -1, channels), self.weight)  # (n * n, P, K)
        if self.bias is not None:
            products[n + 1] += self.bias  # the point (1, 1), which goes with a factor of one into every output
        y = (self.of_outputs @ products.flatten(1)).view(m, m, batch, rows, columns, -1)
        y = y.permute(2, 3, 0, 4, 1, 5).reshape(batch, rows * m, columns * m, -1)
        return y[:, :height, :width].permute(0, 3, 1, 2)


class UnfoldedConv2d(nn.Conv2d):
    """A 1x1 or 3x3 convolution that keeps height and width, computed as one product over the whole batch where images
    are small beside the filters. Inputs and outputs are channels-last in memory."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """With the parameters of `conv`, which should be channels-last. Raises ValueError for another kind."""
        if not is_plain(conv, 1) and not is_plain(conv, 3):
            raise ValueError(f"{conv}: a plain 1x1 or 3x3 convolution that keeps height and width wanted")
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size)
        super().__init__(*shape, padding=conv.padding, bias=conv.bias is not None, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, K, H, W)."""
        side, pixels = self.kernel_size[0], x.shape[0] * x.shape[2] * x.shape[3]
        if side == 3 and pixels > PIXELS_PER_FILTER * self.out_channels:
            return super().forward(x)
        rows = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        if side == 3:
            padded, (_, height, width, _) = F.pad(rows, (0, 0, 1, 1, 1, 1)), rows.shape
            taps = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
            rows = torch.cat(taps, dim=-1)  # (B, H, W, 9 * C)
        filters = self.weight.permute(0, 2, 3, 1).flatten(1)  # (K, side * side * C), a view of channels-last filters
        return F.linear(rows.contiguous(), filters, self.bias).permute(0, 3, 1, 2)


def _frozen(weights: Tensor) -> nn.Parameter:
    return nn.Parameter(weights.detach(), requires_grad=False)


def is_plain(conv: nn.Module, side: int) -> bool:
    """Whether a module is a convolution with filters of this side that keeps height and width, and nothing besides."""
    return (
        isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.dilation) == ((side, side), (1, 1), (1, 1))
        and (conv.padding, conv.groups, conv.padding_mode) == ((side // 2, side // 2), 1, "zeros")
    )


def tile_of(conv: nn.Conv2d) -> int | None:
    """The largest tile whose transformed filters do not take too much memory; None where tiles do not pay."""
    if not is_plain(conv, 3) or min(conv.in_channels, conv.out_channels) < MIN_CHANNELS:
        return None
    filter_bytes = conv.in_channels * conv.out_channels * conv.weight.element_size()
    return next((m for m in (4, 2) if (m + 2) ** 2 * filter_bytes <= MAX_BYTES), None)
