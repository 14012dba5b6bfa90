"""Files: written whole or not at all, read without executing anything in them."""

import errno
import hashlib
import json
import os
import pickle
import uuid
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils import safe_pickle
from utils.config import UserError


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


def sync_folder(folder: str | Path) -> None:
    """Wait until the names of files renamed into `folder` are on the disk (each file's content already is)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8, whole or not at all."""
    return write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON, whole or not at all."""
    return write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path, advice: str = "delete the file") -> dict[str, Any]:
    """The object in a JSON file of the project's own. UserError, with `advice`, where the file holds none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} in place of an object; {advice}")
    return value


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; read a piece at a time. Raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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
    """torch.load that executes nothing, for files of `save_torch`.

    Raises UserError when the file is missing, cut short or holds more than tensors, containers and numbers.
    """
    try:
        return _load_weights_only(path, map_location)
    except pickle.UnpicklingError as error:  # torch's own words are a page of advice on executing the file
        raise UserError(
            f"{path}: not a readable checkpoint; damaged, or it holds more than tensors and numbers"
        ) from error


def read_content(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """What a downloaded file of weights holds, and its metadata ({} but for safetensors); nothing in it is executed.

    Told by content, not by name: safetensors, files of torch.save, and those that hold objects beside their tensors
    (Lightning's), which the restricted unpickler reads. Raises UserError for a missing or damaged file, and for one
    that wants to call anything.
    """
    if is_safetensors(path):
        return load_safetensors(path)
    try:
        return _load_weights_only(path, "cpu"), {}
    except pickle.UnpicklingError:
        return safe_pickle.load(path), {}


def _load_weights_only(path: str | Path, map_location: str | torch.device) -> Any:
    if not Path(path).is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        safe_pickle.check_archive(path)
        return torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        if "TorchScript" in str(error):
            raise UserError(f"{path}: a TorchScript archive, which holds code; give its state dict") from error
        raise UserError(f"{path}: not a readable checkpoint; damaged or cut short") from error


def save_safetensors(tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: Mapping[str, Any]) -> Path:
    """Write named tensors with `metadata` (JSON values) in the header, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {key: json.dumps(value) for key, value in metadata.items()}
    return write_atomically(path, lambda p: save_file(tensors, p, metadata=header))


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is named so or begins as one: the length of a header in JSON, eight bytes, then the header."""
    if Path(path).suffix == ".safetensors":
        return True
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


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
    if not is_safetensors(path):
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
