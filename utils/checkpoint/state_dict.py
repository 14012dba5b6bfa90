"""State dicts: out of any file, without the prefixes of wrappers, and strictly into a module."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from utils.checkpoint.files import read_content
from utils.config import UserError

# Wrappers whose names stand before a network's keys, in any order and number: DistributedDataParallel, torch.compile,
# the averages and the diffusion module of the published code.
PREFIXES = ("module.", "_module.", "_orig_mod.", "eps_model.")
COUNTER = "num_batches_tracked"
# Under what name a file of more than weights keeps its state dict: Lightning, and the trainers of insightface.
CONTAINERS = ("state_dict", "state_dict_backbone", "model_state_dict")
# The diffusion module of the published code keeps its schedule beside the network, eight vectors of length T.
SCHEDULE_BUFFERS = (
    "betas",
    "alphas",
    "sigmas",
    "sqrt_alphas_inv",
    "alpha_bars",
    "sqrt_alpha_bars",
    "sqrt_one_minus_alpha_bars",
    "one_minus_alphas_over_sqrt_one_minus_alpha_bars",
)


def find_state_dict(content: object, path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in what a file holds: itself, or under one of `CONTAINERS`, its names as they are.

    Raises UserError, naming `path`, where there is none.
    """
    if isinstance(content, dict):
        content = next((content[name] for name in CONTAINERS if isinstance(content.get(name), dict)), content)
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())
    ):
        raise UserError(f"{path}: holds no state dict (names and tensors)")
    return dict(content)


def load_network_file(path: str | Path) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The state dict in `path` with all wrapping prefixes stripped, and the `betas` (T,) of a published diffusion file.

    Reads .safetensors, a bare state dict, or one inside a checkpoint of Lightning; nothing in the file is executed.
    Raises UserError for anything else, and for weights that are not finite.
    """
    state = find_state_dict(read_content(path)[0], path)
    stripped = {strip_prefixes(name): tensor for name, tensor in state.items()}
    if len(stripped) != len(state):
        raise UserError(f"{path}: holds more than one network under different prefixes")
    check_finite(stripped, path)
    return split_schedule(stripped)


def load_state_dict_file(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in `path`, prefixes and schedule buffers taken off; see `load_network_file`."""
    return load_network_file(path)[0]


def strip_prefixes(name: str) -> str:
    """`name` without any chain of `PREFIXES` before it."""
    while True:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None:
            return name
        name = name[len(prefix) :]


def split_schedule(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The network's own tensors, and the `betas` (T,) if the eight schedule buffers (or some) stand beside them."""
    betas = state.get("betas")
    if betas is None or betas.ndim != 1:
        return dict(state), None
    own = {name: t for name, t in state.items() if not (name in SCHEDULE_BUFFERS and t.shape == betas.shape)}
    return own, betas


def weights_sha256(*states: Mapping[str, torch.Tensor]) -> str:
    """A digest of names and values, that does not depend on the file they came from."""
    digest = hashlib.sha256()
    for state in states:
        for name, tensor in sorted(state.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_finite(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Raise UserError, naming the first, where tensors hold NaN or infinity."""
    floats = {name: t for name, t in state.items() if t.is_floating_point()}
    # A sum is not finite where a number is not (or where it overflows), and much cheaper than a mask
    suspects = {name: t for name, t in floats.items() if not torch.isfinite(t.sum(dtype=torch.float32))}
    bad = [name for name, t in suspects.items() if not torch.isfinite(t).all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"{path}: its weights are not finite ({bad[0]}{more}); the training that wrote it has diverged")


def with_counters(module: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with zero for every batch norm's counter that it lacks: old files have none, and only a cumulative batch
    norm would read it."""
    counters = {name: torch.zeros_like(t) for name, t in module.state_dict().items() if name.endswith(COUNTER)}
    return {**counters, **state}


def strict_load(module: nn.Module, state: Mapping[str, torch.Tensor], what: str, looks_like: str | None = None) -> None:
    """Load `state` or raise one UserError line: which keys are missing, unexpected, of another shape or type.

    `what` begins the line, `looks_like` says at its end which network the keys belong to.
    """
    own = module.state_dict()
    shared = [name for name in own if name in state]
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in shared
            if state[name].shape != own[name].shape
        ],
        "of another type": [
            f"{name} {state[name].dtype} instead of {own[name].dtype}"
            for name in shared
            if own[name].is_floating_point() and not state[name].is_floating_point()
        ],
    }
    found = [
        f"{len(names)} {label} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for label, names in problems.items()
        if names
    ]
    if found:
        tail = f"; the file looks like {looks_like}" if looks_like else ""
        raise UserError(f"{what}: does not fit {type(module).__name__}: {'; '.join(found)}{tail}")
    module.load_state_dict(state)
