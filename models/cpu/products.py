"""Which products take the place of a network's layers.

- "unfolded": convolutions as products where images are small, as they were stored.
- "winograd": and 3x3 ones by tiles where that pays; its sums need float32.
- "split": convolutions and linear layers in fp32 by products of bf16, on a CPU with AMX.
"""

from collections.abc import Collection
from typing import Literal

import torch
from torch import nn

from models.cpu.convolutions import UnfoldedConv2d, WinogradConv2d, is_plain, tile_of
from models.cpu.split_products import split_layer

Products = Literal["unfolded", "winograd", "split"]


def use_products(network: nn.Module, products: Products, keep: Collection[nn.Module] = ()) -> None:
    """Put them in place of a network's own layers, for good. Only with "unfolded" it can be trained and saved after
    that, and its parameters are the same.

    The layers in `keep`, and what they are made of, stay as they are, and so does a network that is changed already.
    Each layer is freed before the next is changed. Raises UserError where this CPU has no split products.
    """
    _replace(network, products, keep)
    network.to(memory_format=torch.channels_last)


def _replace(parent: nn.Module, products: Products, keep: Collection[nn.Module]) -> None:
    for name in [name for name, _ in parent.named_children()]:  # the names alone: a list of layers would keep them
        child = getattr(parent, name)
        if child in keep:
            continue
        new = split_layer(child) if products == "split" else _convolution(child, products == "winograd")
        if new is None:
            _replace(child, products, keep)
        else:
            setattr(parent, name, new)


def _convolution(layer: nn.Module, winograd: bool) -> nn.Module | None:
    if isinstance(layer, UnfoldedConv2d) or not (is_plain(layer, 1) or is_plain(layer, 3)):
        return None
    tile = tile_of(layer) if winograd else None
    return UnfoldedConv2d(layer) if tile is None else WinogradConv2d(layer, tile)
