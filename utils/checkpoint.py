"""Files of weights: written whole or not at all, read without executing anything in them, checked key by key."""

import errno
import json
import os
import pickle
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from utils.config import UserError
from utils.logging import get_logger

log = get_logger(__name__)

# Wrappers whose names stand before the UNet's keys in published files, in any order and number.
PREFIXES = ("module.", "_module.", "eps_model.")
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


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it; on any error nothing is left behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8, whole or not at all."""
    return write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON, whole or not at all."""
    return write_text(path, json.dumps(value, indent=2) + "\n")


def save_torch(obj: Any, path: str | Path) -> Path:
    """torch.save, whole or not at all, of what `load_torch` reads: tensors, containers, numbers, strings.

    Raises OSError where the disk does not take it.
    """

    def write(temporary: Path) -> None:
        try:
            torch.save(obj, temporary)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("inline_container", "iostream", "PytorchStreamWriter")):
                raise
            raise OSError(errno.EIO, "the disk is full or broken", str(path)) from error  # torch keeps no errno

    return write_atomically(path, write)


def load_torch(path: str | Path, map_location: str | torch.device = "cpu") -> Any:
    """torch.load that executes nothing. Raises UserError when the file is missing, cut short or holds other objects."""
    if not Path(path).is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words are a page of advice on executing the file
        raise UserError(
            f"{path}: not a readable checkpoint; damaged, or it holds more than tensors and numbers"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable checkpoint; damaged or cut short") from error


def save_safetensors(tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: Mapping[str, Any]) -> Path:
    """Write named tensors with `metadata` (JSON values) in the header, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {key: json.dumps(value) for key, value in metadata.items()}
    return write_atomically(path, lambda p: save_file(tensors, p, metadata=header))


def load_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file. Raises UserError when it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
            return tensors, _decode_metadata(file.metadata())
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a safetensors file without its tensors; {} for any other file."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(str(path), framework="pt") as file:
            return _decode_metadata(file.metadata())
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _decode_metadata(header: Mapping[str, str] | None) -> dict[str, Any]:
    values = {}
    for key, text in (header or {}).items():
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text  # written by somebody else, as a plain string
    return values


def load_network_file(path: str | Path) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The state dict in `path` with all wrapping prefixes stripped, and the `betas` (T,) of a published diffusion file.

    Reads .safetensors, a bare state dict, or one under `state_dict`. Raises UserError for anything else.
    """
    state = load_safetensors(path)[0] if Path(path).suffix == ".safetensors" else load_torch(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: holds no state dict (names and tensors)")
    stripped = {_strip_prefixes(name): tensor for name, tensor in state.items()}
    if len(stripped) != len(state):
        raise UserError(f"{path}: holds more than one network under different prefixes")
    betas = stripped.get("betas")
    if betas is not None and betas.ndim == 1:
        stripped = {
            name: t for name, t in stripped.items() if not (name in SCHEDULE_BUFFERS and t.shape == betas.shape)
        }
    return stripped, betas


def load_state_dict_file(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in `path`, prefixes and schedule buffers taken off; see `load_network_file`."""
    return load_network_file(path)[0]


def _strip_prefixes(name: str) -> str:
    while True:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None:
            return name
        name = name[len(prefix) :]


def strict_load(module: nn.Module, state: Mapping[str, torch.Tensor], what: str) -> None:
    """Load `state` or raise one UserError line: which keys are missing, unexpected, of another shape."""
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {label} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise UserError(f"{what}: does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(state)


class CheckpointFolder:
    """The checkpoints of one run: `step_<number>.ckpt`, the last `keep` of them and those named as milestones."""

    PATTERN = re.compile(r"^step_(\d+)\.ckpt$")

    def __init__(self, folder: str | Path, keep: int = 2, milestones: tuple[int, ...] = ()) -> None:
        if keep < 1:
            raise UserError(f"keep_checkpoints: {keep}; at least one checkpoint must be kept")
        self.folder, self.keep, self.milestones = Path(folder), keep, set(milestones)
        self._damaged: set[Path] = set()  # found by load_latest; none of them counts as kept

    def paths(self) -> list[Path]:
        """All complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), p) for p in self.folder.iterdir() if (match := self.PATTERN.match(p.name))]
        return [path for _, path in sorted(found)]

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state of `step` (whole or not at all), then delete what is older than the last `keep`."""
        path = save_torch({**state, "step": step}, self.folder / f"step_{step:08d}.ckpt")
        good = [p for p in self.paths() if p not in self._damaged or p == path]
        for old in good[: -self.keep]:
            if int(self.PATTERN.match(old.name)[1]) not in self.milestones:
                old.unlink()
        return path

    def load_latest(self) -> dict[str, Any] | None:
        """The newest readable state, or None in a new folder; see `load_newest`."""
        newest = self.load_newest()
        return None if newest is None else newest[1]

    def load_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """File and state of the newest readable checkpoint, or None in a new folder. A damaged file is named in a
        warning and passed over; UserError when there are checkpoints and none can be read."""
        paths = self.paths()
        for path in reversed(paths):
            try:
                return path, load_torch(path)
            except UserError as error:
                self._damaged.add(path)
                log.warning("%s; going back to the checkpoint before it", error)
        if paths:
            raise UserError(f"{self.folder}: none of its {len(paths)} checkpoints can be read")
        return None
