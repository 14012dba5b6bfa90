"""Convolutions as products of matrices: exact in float64, close in float32, of any size, and where they belong."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.cpu import convolutions, products
from models.cpu.convolutions import MAX_BYTES, UnfoldedConv2d, WinogradConv2d
from models.cpu.products import use_products
from tests.compat import relative_error
from tests.test_unet import small_inputs, small_unet


def conv(channels: int, outputs: int, side: int = 3, **settings) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, outputs, side, padding=side // 2, **settings).requires_grad_(False)


def image(channels: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (5, 7), (1, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_tiles_give_the_convolution(tile, size, bias):
    direct = conv(3, 5, bias=bias).double()
    x = image(3, *size).double()
    torch.testing.assert_close(WinogradConv2d(direct, tile)(x), direct(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("tile, limit", [(2, 1e-6), (4, 5e-6)])
def test_rounding_in_float32(tile, limit):
    direct, x = conv(192, 96), image(192, 16, 16)
    wanted = F.conv2d(x.double(), direct.weight.double(), direct.bias.double(), padding=1)
    assert relative_error(WinogradConv2d(direct, tile)(x).double(), wanted) < limit


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [5, 64])  # images of many pixels for so few filters are not unfolded
def test_unfolding_gives_the_convolution(side, bias, outputs):
    direct = conv(3, outputs, side, bias=bias).double()
    x = image(3, 5, 7).double()
    torch.testing.assert_close(UnfoldedConv2d(direct)(x), direct(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("side", [1, 3])
def test_unfolding_can_be_trained(side):
    """The same parameters, under the same names, with the gradients of the convolution."""
    direct, x = conv(3, 64, side).double().requires_grad_(), image(3, 5, 7).double().requires_grad_()
    wanted = torch.autograd.grad(direct(x).square().sum(), [x, *direct.parameters()])
    network = nn.Sequential(direct)
    parameters = list(network.parameters())
    use_products(network, "unfolded")
    assert isinstance(network[0], UnfoldedConv2d) and list(network.state_dict()) == ["0.weight", "0.bias"]
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    found = torch.autograd.grad(network(x).square().sum(), [x, *parameters])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "other",
    [
        conv(4, 4, stride=2),
        conv(4, 4, groups=2),
        conv(4, 4, dilation=2),
        conv(4, 4, 5),
        conv(4, 4, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 4, 3, padding=1),
    ],
)
def test_other_convolutions_stay_as_they_are(other):
    network = nn.Sequential(other)
    use_products(network, "winograd")
    assert network[0] is other
    for build in (lambda: WinogradConv2d(other, 2), lambda: UnfoldedConv2d(other)):
        with pytest.raises(ValueError, match="wanted"):
            build()


def test_tiles_are_as_large_as_memory_allows():
    widths = {4: 96, 2: 512, None: 1024}  # 1, 16 and 64 MiB of transformed filters
    assert 36 * 512**2 * 4 > MAX_BYTES >= 16 * 512**2 * 4 and MAX_BYTES < 16 * 1024**2 * 4
    network = nn.Sequential(*[conv(width, width) for width in widths.values()], conv(3, 64), conv(1024, 32, 1))
    use_products(network, "winograd")
    tiles = [layer.tile if isinstance(layer, WinogradConv2d) else None for layer in network]
    assert tiles == [*widths, None, None]
    assert [type(layer) for layer in network[2:]] == [UnfoldedConv2d] * 3


def test_layers_are_freed_one_by_one(monkeypatch):
    network = nn.Sequential(conv(4, 4), nn.Sequential(conv(4, 4), conv(4, 4)), conv(4, 4))
    layers = [weakref.ref(layer) for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    left = []
    monkeypatch.setattr(products, "tile_of", lambda _: left.append(sum(layer() is not None for layer in layers)))
    use_products(network, "winograd")
    assert left == [4, 3, 2, 1]


def test_few_images_are_taken_at_a_time(monkeypatch):
    direct, taken = conv(3, 5).double(), []
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    monkeypatch.setattr(
        convolutions, "TILES_BYTES", 2 * 4 * 3 * 36 * 8 + 1
    )  # two images of 4 tiles, 3 channels, float64
    layer = WinogradConv2d(direct, 4)
    convolve = layer._convolve
    monkeypatch.setattr(layer, "_convolve", lambda part: taken.append(len(part)) or convolve(part))
    torch.testing.assert_close(layer(x), direct(x), rtol=0, atol=1e-13)
    assert taken == [2, 2, 1]


def test_a_network_computes_what_it_did(monkeypatch):
    monkeypatch.setattr(convolutions, "MIN_CHANNELS", 32)
    unet = small_unet().eval()
    x, t, context = small_inputs()
    with torch.no_grad():
        wanted = unet(x, t, context)
        use_products(unet, "winograd")
        found = unet(x, t, context)
        layers = list(unet.modules())
        use_products(unet, "winograd")
    assert sum(isinstance(layer, WinogradConv2d) for layer in layers) > 10
    assert layers == list(unet.modules()), "once is enough"
    assert 0 < relative_error(found, wanted) < 1e-5
    assert not any(layer.weight.requires_grad for layer in layers if isinstance(layer, WinogradConv2d))
