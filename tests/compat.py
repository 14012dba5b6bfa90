"""Deterministic weights and published numbers that the compatibility tests share.

Each tensor of a state dict is filled from its own name, so two implementations with the same parameter names hold the
same weights without a weight file.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


def fill_deterministic(module: nn.Module) -> nn.Module:
    """Overwrite every parameter and buffer of `module` from the CRC of its name; returns the module in eval mode."""
    state = module.state_dict()
    module.load_state_dict(
        {name: deterministic_tensor(name, tuple(value.shape)).to(value.dtype) for name, value in state.items()}
    )
    return module.eval()


def deterministic_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that stands under `name` in a deterministic state dict, float32."""
    n = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    if name.endswith("num_batches_tracked"):
        n = np.zeros(shape)
    elif name.endswith("running_var"):
        n = 1 + 0.1 * np.abs(n)
    elif name.endswith(("running_mean", "bias")):
        n = 0.1 * n
    elif len(shape) <= 1:
        n = 1 + 0.1 * n
    else:
        n = 0.5 * n / np.sqrt(np.prod(shape[1:]))
    return torch.as_tensor(np.asarray(n), dtype=torch.float32)


def load_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/data/<name>.npz."""
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def load_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, from tests/data/state_dicts/<name>.json."""
    return {key: tuple(shape) for key, shape in load_json(f"state_dicts/{name}").items()}


def load_json(name: str) -> dict:
    """tests/data/<name>.json."""
    return json.loads((DATA / f"{name}.json").read_text())


def relative_error(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """||actual - expected|| / ||expected||, L2, in float64."""
    actual, expected = (torch.as_tensor(value).double() for value in (actual, expected))
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    return ((actual - expected).norm() / expected.norm()).item()
