"""One convention for the input of every recogniser, whatever it was trained on."""

from __future__ import annotations

from torch import Tensor, nn

from utils.config import UserError

MEAN, STD = 127.5, 127.5  # of this project's networks: pixels 0..255 => [-1, 1]


class InputAdapter(nn.Module):
    """A recogniser behind the input of this project's networks: (B, 3, S, S) RGB in [-1, 1].

    channel_order: RGB or BGR, as the network was trained. mean, std: it takes (pixel - mean) / std of pixels 0..255.
    """

    def __init__(
        self,
        network: nn.Module,
        channel_order: str = "RGB",
        mean: float = MEAN,
        std: float = STD,
        *,
        input_size: int | None = None,
        num_features: int | None = None,
    ) -> None:
        """`input_size` (pixels) and `num_features` of networks that do not say; UserError for another order."""
        super().__init__()
        if channel_order not in ("RGB", "BGR"):
            raise UserError(f"embedder.channel_order: {channel_order!r}; it is RGB or BGR")
        if not std > 0:
            raise UserError(f"embedder.std: {std}; it must be above 0")
        self.network = network
        self.channel_order, self.mean, self.std = channel_order, mean, std
        self.input_size: int = network.input_size if input_size is None else input_size
        self.num_features: int = network.num_features if num_features is None else num_features

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) RGB in [-1, 1] => (B, num_features), any length."""
        if self.channel_order == "BGR":
            images = images.flip(1)
        if (self.mean, self.std) != (MEAN, STD):
            images = (images * STD + (MEAN - self.mean)) / self.std  # [-1, 1] => pixels 0..255 => its own scale
        return self.network(images)
