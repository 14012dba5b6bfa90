"""Convolutions and linear layers in fp32 by products of bf16, three for one, on a CPU with AMX.

"float32 matmul precision: high", as torch calls it (`torch.set_float32_matmul_precision`), for CPUs: every number is
the sum of two bf16 (split_products.cpp). AMX multiplies bf16 up to sixteen times as fast as AVX-512 multiplies fp32.
Results differ from those of fp32 products by 5e-6 of their norm, and like theirs they do not depend on other rows. The
kernel runs on the calling thread.

Legend: B batch, C K channels before and after, H W height and width, N tokens.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.diffusion.attention import Projection
from utils.errors import UserError

SOURCE = Path(__file__).with_suffix(".cpp")
INSTRUCTIONS = {  # as /proc/cpuinfo calls them: as compilers do
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512_bf16": "avx512bf16",
    "amx_tile": "amx-tile",
    "amx_bf16": "amx-bf16",
}
FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", *(f"-m{name}" for name in INSTRUCTIONS.values())]
WIDTH = 32  # numbers of channels that it takes are multiples of it


class Geometry(ctypes.Structure):
    """What split_products.cpp calls so."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("images", "height", "width", "channels", "out_height", "out_width")),
        *((name, ctypes.c_long) for name in ("outputs", "stride", "taps")),
        *((name, ctypes.POINTER(ctypes.c_long)) for name in ("dy", "dx")),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, compiled with $CXX (g++) once a process. Raises UserError, which says what is missing, where it
    cannot run."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().partition("flags")[2].partition("\n")[0].split() if info.is_file() else []
    if not set(flags) >= set(INSTRUCTIONS):
        raise UserError("this CPU has no AMX instructions for bf16")
    try:
        # less than a second; a file that stays could be damaged, or another's
        with tempfile.TemporaryDirectory(prefix="uiface_") as folder:
            loaded = ctypes.CDLL(str(_compile(Path(folder))))
    except OSError as error:
        raise UserError(f"its kernel cannot be compiled and loaded: {error} (TMPDIR sets another place)") from error
    if loaded.request_tiles():
        raise UserError("this system does not let processes use the CPU's AMX instructions")
    return loaded


def _compile(folder: Path) -> Path:
    path = folder / f"{SOURCE.stem}.so"
    try:
        command = shlex.split(os.environ.get("CXX") or "g++")
        command += [*FLAGS, str(SOURCE), "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[0]
        raise UserError(f"the C++ compiler {command[0]} (set by CXX) failed: {said}") from error
    except (OSError, ValueError) as error:
        found = os.environ.get("CXX") or "g++"
        said = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"no C++ compiler: {found} (set by CXX; GCC 11 or newer would do): {said}") from error
    return path


class SplitFilters(nn.Module):
    """Filters in two parts, as the kernel reads them: as many bytes as in fp32."""

    def __init__(self, filters: Tensor, bias: Tensor | None) -> None:
        """filters: (K, taps * C), tap by tap; bias (K,). Raises ValueError for others than float32 on a CPU, and for
        numbers of channels that are no multiples of WIDTH."""
        super().__init__()
        self.outputs, depth = filters.shape
        if filters.dtype != torch.float32 or filters.device.type != "cpu" or not _fits(depth, self.outputs):
            found = f"{filters.dtype} {tuple(filters.shape)} on {filters.device}"
            raise ValueError(f"filters: {found}; float32 on a CPU, of multiples of {WIDTH} wanted")
        filters = filters.detach().contiguous()
        self.packed = nn.Parameter(torch.empty(2 * filters.numel(), dtype=torch.bfloat16), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().contiguous(), requires_grad=False)
        library().pack_filters(
            ctypes.c_void_p(filters.data_ptr()),
            ctypes.c_void_p(self.packed.data_ptr()),
            ctypes.c_long(self.outputs),
            ctypes.c_long(depth),
        )

    def forward(self, x: Tensor, taps: Sequence[tuple[int, int]] = ((0, 0),), stride: int = 1) -> Tensor:
        """x (B, H, W, C) -> (B, H', W', K), H' = ceil(H / stride): output (i, j) is the sum over the taps (dy, dx) of
        their filter times input (stride i + dy, stride j + dx), zero outside."""
        x = x.contiguous()
        images, height, width, channels = x.shape
        depth = self.packed.numel() // (2 * self.outputs)
        if (
            channels % WIDTH
            or len(taps) * channels != depth
            or (x.dtype, self.packed.dtype) != (torch.float32, torch.bfloat16)
        ):
            raise ValueError(f"x: {x.dtype} {tuple(x.shape)}; float32 with {depth // len(taps)} channels wanted")
        if x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
            raise ValueError(f"x: on {x.device}, requires_grad {x.requires_grad}; on a CPU without gradients wanted")
        y = x.new_empty(images, -(-height // stride), -(-width // stride), self.outputs)
        offsets = [(ctypes.c_long * len(taps))(*axis) for axis in zip(*taps, strict=True)]
        geometry = Geometry(images, height, width, channels, *y.shape[1:], stride, len(taps), *offsets)
        library().multiply_filters(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(self.packed.data_ptr()),
            None if self.bias is None else ctypes.c_void_p(self.bias.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.byref(geometry),
        )
        return y


class SplitLinear(nn.Module):
    """What a linear layer computes."""

    def __init__(self, layer: nn.Linear | Projection) -> None:
        """With the filters of `layer`."""
        super().__init__()
        self.filters = SplitFilters(layer.weight.flatten(1), layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., K)."""
        rows = x.numel() // x.shape[-1]
        return self.filters(x.reshape(1, 1, rows, x.shape[-1])).view(*x.shape[:-1], self.filters.outputs)


class SplitConv2d(nn.Module):
    """What a 1x1 or 3x3 convolution with stride 1 or 2 computes. Inputs and outputs are channels-last in memory."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """With the filters of `conv`, one that `split_layer` takes."""
        super().__init__()
        (self.stride, _), (side, _) = conv.stride, conv.kernel_size
        self.taps = [(y - side // 2, x - side // 2) for y in range(side) for x in range(side)]
        self.filters = SplitFilters(conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, K, ceil(H / stride), ceil(W / stride))."""
        return self.filters(x.permute(0, 2, 3, 1), self.taps, self.stride).permute(0, 3, 1, 2)


class SplitConvTranspose2d(nn.Module):
    """What a transposed 4x4 convolution with stride 2 and padding 1 computes: outputs of even and odd rows and columns
    each have filters of 2x2 taps. Inputs and outputs are channels-last in memory."""

    ROWS = ([(3, -1), (1, 0)], [(2, 0), (0, 1)])  # of even and odd outputs: (row of the filter, dy)

    def __init__(self, conv: nn.ConvTranspose2d) -> None:
        """With the filters of `conv`, one that `split_layer` takes."""
        super().__init__()
        weight = conv.weight.permute(1, 2, 3, 0)  # (K, 4, 4, C)
        self.phases, self.taps = nn.ModuleList(), []
        for rows in self.ROWS:
            for columns in self.ROWS:
                both = [(row, column) for row in rows for column in columns]
                filters = torch.stack([weight[:, i, j] for (i, _), (j, _) in both], dim=1)  # (K, 4, C)
                self.phases.append(SplitFilters(filters.flatten(1), conv.bias))
                self.taps.append([(dy, dx) for (_, dy), (_, dx) in both])

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, K, 2 H, 2 W)."""
        x = x.permute(0, 2, 3, 1).contiguous()
        batch, height, width, _ = x.shape
        parts = [filters(x, taps) for filters, taps in zip(self.phases, self.taps, strict=True)]
        y = torch.stack(parts).unflatten(0, (2, 2)).permute(2, 3, 0, 4, 1, 5)  # (B, H, 2, W, 2, K)
        return y.reshape(batch, 2 * height, 2 * width, parts[0].shape[-1]).permute(0, 3, 1, 2)


def split_layer(layer: nn.Module) -> nn.Module | None:
    """What computes the same by split products; None where this is no layer for them."""
    if isinstance(layer, nn.Linear):
        return SplitLinear(layer) if _fits(layer.in_features, layer.out_features) else None
    if not isinstance(layer, (Projection, nn.Conv2d, nn.ConvTranspose2d)):
        return None
    if not _fits(layer.in_channels, layer.out_channels) or layer.groups > 1 or layer.padding_mode != "zeros":
        return None
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    if isinstance(layer, Projection):
        return SplitLinear(layer)
    if isinstance(layer, nn.ConvTranspose2d):
        fits = shape == ((4, 4), (2, 2), (1, 1), (1, 1)) and layer.output_padding == (0, 0)
        return SplitConvTranspose2d(layer) if fits else None
    plain = [((side, side), (stride, stride), (side // 2, side // 2), (1, 1)) for side in (1, 3) for stride in (1, 2)]
    return SplitConv2d(layer) if shape in plain else None


def _fits(channels: int, outputs: int) -> bool:
    return channels % WIDTH == 0 and outputs % WIDTH == 0
