"""fp32 by products of bf16: against float64, exact where the numbers allow it, no row touched by another; what is told
where they cannot run."""

import copy
import ctypes
import subprocess
import tempfile

import pytest
import torch
from torch import nn

from diffusion.drawing_settings import DrawingSettings
from models.cpu import split_products
from models.cpu.products import use_products
from models.cpu.split_products import SplitConv2d, SplitConvTranspose2d, SplitLinear, split_layer
from models.diffusion.attention import Projection
from models.diffusion.unet import ConditionalUNet
from tests.compat import fill_deterministic, relative_error
from utils.errors import UserError


def reason_against() -> str:
    try:
        split_products.library()
    except UserError as error:
        return str(error)
    return ""


needs_amx = pytest.mark.skipif(bool(reason_against()), reason=reason_against() or "runs here")

CONVOLUTIONS = [
    nn.Conv2d(32, 64, 3, padding=1),
    nn.Conv2d(64, 32, 3, padding=1, bias=False),
    nn.Conv2d(96, 32, 1),
    nn.Conv2d(64, 64, 3, padding=1, stride=2),
    nn.Conv2d(32, 544, 1),  # more outputs than are taken at a time
    nn.Conv2d(160, 32, 3, padding=1),  # taps that begin in the middle of a block of K
    nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
    nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1, bias=False),
]


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(layer: nn.Module) -> nn.Module:
    for i, parameter in enumerate(layer.parameters()):
        parameter.requires_grad_(False).copy_(drawn(*parameter.shape, seed=i))
    return layer


@needs_amx
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 3), (4, 33)])  # 33: images whose pixels share blocks of 32
def test_convolutions(conv, size):
    layer = split_layer(filled(copy.deepcopy(conv)))
    x = drawn(3, conv.in_channels, *size)
    wanted = filled(copy.deepcopy(conv)).double()(x.double())
    found = layer(x)
    assert found.shape == wanted.shape and found.is_contiguous(memory_format=torch.channels_last)
    assert 0 < relative_error(found.double(), wanted) < 8e-6
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), found)
    for image, alone in zip(found, x, strict=True):
        assert torch.equal(layer(alone[None])[0], image), "an image does not depend on its neighbours"


@needs_amx
@pytest.mark.parametrize("shape", [(1, 32), (31, 64), (2, 33, 96), (2, 3, 1024)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(shape, bias):
    linear = filled(nn.Linear(shape[-1], 96, bias=bias))
    x = drawn(*shape)
    wanted = linear.double()(x.double())
    found = SplitLinear(linear.float())(x)
    assert found.shape == wanted.shape
    assert 0 < relative_error(found.double(), wanted) < 8e-6


@needs_amx
def test_projections_of_tokens():
    projection, x = filled(Projection(64, 32)), drawn(2, 5, 64)
    assert relative_error(split_layer(projection)(x), projection(x)) < 8e-6


@needs_amx
def test_sixteen_bits_are_multiplied_exactly():
    """Numbers of two bf16 times numbers of one: no product is left out, and whole sums below 2^24 are not rounded."""
    linear = nn.Linear(1024, 64, bias=False)
    generator = torch.Generator().manual_seed(0)
    linear.weight.data = torch.randint(-2, 3, linear.weight.shape, generator=generator).float()
    x = torch.randint(-(2**12), 2**12, (40, 1024), generator=generator).float()
    assert (x != x.bfloat16().float()).any()
    assert torch.equal(SplitLinear(linear)(x).double(), x.double() @ linear.weight.double().T)


TILES = """
#include <immintrin.h>
extern "C" void set_up(const void* config) { _tile_loadconfig(config); }
extern "C" void look(void* config) { _tile_storeconfig(config); }
extern "C" void release() { _tile_release(); }
"""


@needs_amx
def test_other_users_of_the_tiles_are_left_alone(tmp_path):
    """The shapes of AMX's registers that another library has set up in this thread are those it finds afterwards."""
    (tmp_path / "tiles.cpp").write_text(TILES)
    subprocess.run(
        ["g++", *split_products.FLAGS, str(tmp_path / "tiles.cpp"), "-o", str(tmp_path / "tiles.so")], check=True
    )
    tiles = ctypes.CDLL(str(tmp_path / "tiles.so"))
    theirs = bytearray(64)
    theirs[0], theirs[16], theirs[48] = 1, 32, 7  # palette, bytes of a row, rows of register 0
    layer, found = split_layer(filled(nn.Linear(64, 64))), ctypes.create_string_buffer(64)
    tiles.set_up(bytes(theirs))
    layer(drawn(33, 64))
    tiles.look(found)
    tiles.release()
    assert found.raw == bytes(theirs)
    layer(drawn(33, 64))
    tiles.look(found)
    assert found.raw == bytes(64), "what was not set up is released"


@needs_amx
def test_values_that_are_not_finite_stay_so():
    x = drawn(4, 64)
    x[1, 3], x[2, 5] = float("inf"), float("nan")
    finite = torch.isfinite(split_layer(filled(nn.Linear(64, 32)))(x)).all(dim=1)
    assert finite.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 3, 3, padding=1),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, 3, padding=1, dilation=2),
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(32, 32, 2, stride=2),
        nn.Conv1d(32, 32, 1),  # of channels, not of tokens
        nn.Linear(32, 33),
        nn.GroupNorm(32, 32),
    ],
    ids=str,
)
def test_other_layers_stay_as_they_are(other):
    assert split_layer(other) is None


@needs_amx
def test_wrong_inputs_are_told():
    layer = SplitConv2d(nn.Conv2d(32, 64, 3, padding=1))
    for x in (drawn(1, 64, 4, 4), drawn(1, 32, 4, 4).double()):
        with pytest.raises(ValueError, match="float32 with 32 channels wanted"):
            layer(x)
    for x in (drawn(1, 32, 4, 4).requires_grad_(), drawn(1, 32, 4, 4).to("meta")):
        with pytest.raises(ValueError, match="on a CPU without gradients wanted"):
            layer(x)
    with pytest.raises(ValueError, match="float32 with 8 channels wanted"):  # which no layer has that split_layer makes
        SplitConvTranspose2d(nn.ConvTranspose2d(8, 32, 4, 2, 1))(drawn(1, 8, 4, 4))
    with pytest.raises(ValueError, match="float32 with 32 channels wanted"):
        layer.double()(drawn(1, 32, 4, 4))
    for wrong in (nn.Linear(32, 33), nn.Linear(33, 32), nn.Linear(32, 32).double(), nn.Linear(32, 32, device="meta")):
        with pytest.raises(ValueError, match="float32 on a CPU, of multiples of 32 wanted"):
            SplitLinear(wrong)


@needs_amx
def test_empty_batches():
    assert SplitLinear(nn.Linear(32, 64))(torch.zeros(0, 32)).shape == (0, 64)
    assert split_layer(nn.Conv2d(32, 64, 1))(torch.zeros(0, 32, 3, 3)).shape == (0, 64, 3, 3)
    assert split_layer(nn.ConvTranspose2d(32, 64, 4, 2, 1))(torch.zeros(0, 32, 3, 3)).shape == (0, 64, 6, 6)


@needs_amx
def test_whole_networks():
    unet = ConditionalUNet(
        initial_channels=32,
        channel_multipliers=[1, 2],
        is_attention=[False, True],
        n_blocks_per_resolution=1,
        context_channels=32,
    ).eval()
    fill_deterministic(unet)
    x, t, context = drawn(3, 3, 8, 8), torch.tensor([3, 500, 999]), drawn(3, 512)
    with torch.no_grad():
        wanted = unet(x, t, context)
        kept = unet.time_layers()
        use_products(unet, "split", keep=kept)
        layers = list(unet.modules())
        use_products(unet, "split", keep=kept)
        found = unet(x, t, context)
    assert layers == list(unet.modules()), "once is enough"
    assert kept <= set(layers)
    left = [layer for layer in layers if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)) and layer not in kept]
    assert left == [unet.image_proj, unet.final]
    assert 0 < relative_error(found, wanted) < 5e-5


# ------------------------------------------------------------------------------------------------ where it cannot run


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process; its temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    split_products.library.cache_clear()
    yield tmp_path
    split_products.library.cache_clear()


@needs_amx
def test_it_is_compiled_once_and_leaves_nothing(fresh):
    library = split_products.library()
    assert split_products.library() is library and not list(fresh.iterdir())


@needs_amx
@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", r"no C\+\+ compiler: no-such-compiler \(set by CXX.*\): No such file or directory"),
        ("/tmp", r"no C\+\+ compiler: /tmp \(set by CXX.*\): Permission denied"),
        ("g++ '", r"no C\+\+ compiler: g\+\+ ' \(set by CXX.*\): No closing quotation"),
        ("false", r"the C\+\+ compiler false \(set by CXX\) failed: exit code 1"),
        ("g++ -mno-such-flag", r"failed: g\+\+: error: .*no-such-flag"),
    ],
)
def test_no_compiler(fresh, monkeypatch, compiler, message):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(UserError, match=message):
        split_products.library()
    assert not list(fresh.iterdir())


@needs_amx
def test_no_place_for_what_is_compiled(fresh, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(fresh / "none"))
    with pytest.raises(UserError, match=r"cannot be compiled and loaded: .*No such file.* \(TMPDIR"):
        split_products.library()


@needs_amx
def test_what_is_compiled_cannot_be_loaded(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "sh -c 'echo damaged > $(echo $* | grep -o [^[:space:]]*.so$)' --")
    with pytest.raises(UserError, match=r"cannot be compiled and loaded: .*split_products\.so"):
        split_products.library()


@needs_amx
def test_a_system_without_amx(fresh, monkeypatch):
    class Denied:
        def __init__(self, path: str) -> None:
            self.request_tiles = lambda: -1

    monkeypatch.setattr(ctypes, "CDLL", Denied)
    with pytest.raises(UserError, match="does not let processes use the CPU's AMX instructions"):
        split_products.library()


def test_another_cpu(fresh, monkeypatch):
    monkeypatch.setitem(split_products.INSTRUCTIONS, "of_another_cpu", "")
    with pytest.raises(UserError, match="this CPU has no AMX instructions for bf16"):
        split_products.library()
    with pytest.raises(
        UserError, match=r"^sampling\.float32_matmul_precision: high, but this CPU has no AMX.*highest$"
    ):
        DrawingSettings(float32_matmul_precision="high").check(torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"float32_matmul_precision": "medium"}, "'medium' is not one of highest, high"),
        ({"float32_matmul_precision": "high", "precision": "bf16"}, "high is for fp32, but sampling.precision is bf16"),
        ({"float32_matmul_precision": "high", "winograd": True}, "high, but sampling.winograd is true"),
        ({"float32_matmul_precision": "high", "compile": True}, "high cannot be compiled on a CPU"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(UserError, match=f"^sampling.float32_matmul_precision: {message}"):
        DrawingSettings(**settings).check(torch.device("cpu"))
