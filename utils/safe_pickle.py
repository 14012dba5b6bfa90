"""Reading pickles from the web without executing them.

A pickle is a program: it may call anything that it can import. The unpickler here lets it import a fixed list of names,
each standing for a function of this module that builds plain data and checks what it is given; any other is refused. It
reads lists, tuples, dictionaries, None, booleans, numbers, bytes, strings, numpy arrays and scalars, and tensors, from
plain pickles (Python 2's too), `.npy` files that hold objects, and the zip archives of `torch.save`. Classes of
Lightning, which stand in its checkpoints, become inert placeholders.
"""

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.config import UserError

LIGHTNING = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_lite")
# torch.save before version 1.6 began its files with this number.
OLD_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
# Booleans, integers, floats, complex numbers, bytes, strings and objects, of any byte order and width.
DTYPE = re.compile(r"[<>=|]?(\?|[bhilqBHILQefdgFDG]|[biufc](1|2|4|8|16|32)|O8?|[SUa]\d+)")
TORCH_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    OverflowError,
    MemoryError,
    UnicodeDecodeError,
    zipfile.BadZipFile,
)


def _text(value: str | bytes) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else value


class _Dtype:
    """Stands for a numpy.dtype while a pickle is read: only plain scalar types, no fields."""

    def __init__(self, spec: str | bytes, *_: Any) -> None:
        self.spec = _text(spec)
        self.order = "="
        if not DTYPE.fullmatch(self.spec):
            raise pickle.UnpicklingError(f"a numpy array of type {self.spec!r}, which is not plain numbers or strings")

    def __setstate__(self, state: tuple) -> None:
        order, nested = _text(state[1]), state[2:5]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in nested):
            raise pickle.UnpicklingError("a numpy array with fields")
        self.order = order

    def build(self) -> np.dtype:
        return np.dtype("O") if self.spec.lstrip("<>=|")[0] == "O" else np.dtype(self.spec).newbyteorder(self.order)


class _Array(np.ndarray):
    """An array that only takes the state which numpy itself writes."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, data = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("a numpy array without a type")
        super().__setstate__((1, shape, dtype.build(), fortran_order, data))


def _new_array(*_: Any) -> np.ndarray:
    """numpy's `_reconstruct`: an empty array, whose state comes next."""
    return np.empty(0, np.uint8).view(_Array)


def _array_of_buffer(buffer: Any, dtype: _Dtype, shape: tuple, order: str, *_: Any) -> np.ndarray:
    """numpy's `_frombuffer` (pickle protocol 5)."""
    return np.frombuffer(buffer, _no_objects(dtype)).reshape(shape, order=order).copy(order="K")


def _scalar(dtype: _Dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, _no_objects(dtype))[0]


def _no_objects(dtype: _Dtype) -> np.dtype:
    built = dtype.build()
    if built.hasobject:
        raise pickle.UnpicklingError("objects in a raw buffer")
    return built


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode`, with which Python 3 writes bytes in old protocols."""
    if _text(encoding).lower().replace("-", "") not in ("latin1", "iso88591", "ascii", "utf8"):
        raise pickle.UnpicklingError(f"_codecs.encode with {encoding!r}")
    return text.encode(_text(encoding))


def _tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    """torch's `_rebuild_tensor(_v2)`: a view of a storage, which is a vector here (torch checks the bounds)."""
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    return data


def _sequence(items: Any = ()) -> tuple:
    return tuple(items)


FUNCTIONS: dict[tuple[str, str], Callable] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _new_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array_of_buffer for core in ("core", "_core")},
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): _sequence,
}


class RestrictedUnpickler(pickle.Unpickler):
    """Builds plain data and refuses everything else with a UserError that names it."""

    def __init__(self, file: Any, name: str, storages: "_TorchArchive | None" = None) -> None:
        super().__init__(file, encoding="bytes")  # Python 2 strings stay bytes: names and image data look alike
        self.name = name
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """What stands for `module.name`. Every result is new or immutable: a pickle may set attributes on it."""
        if (module, name) in FUNCTIONS:
            function = FUNCTIONS[module, name]
            return lambda *arguments: function(*arguments)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("numpy", "ndarray"):
            return None  # an argument of `_reconstruct`, never called
        if module in ("torch", "torch.storage") and name in TORCH_STORAGES:
            return TORCH_STORAGES[name]
        if module.split(".")[0] in LIGHTNING:
            return type(name, (_Placeholder,), {"__module__": module})
        raise UserError(f"{self.name}: refused: the pickle wants to call {module}.{name}; only plain data are read")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """A tensor's storage, from the torch archive around the pickle."""
        if self.storages is None or not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a reference to data outside the pickle")
        return self.storages.storage(pid[1], str(pid[2]))


class _Placeholder(dict):
    """An object of a class that is not loaded: a dictionary without behaviour."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Attributes are dropped."""


def check_archive(path: str | Path) -> None:
    """Raise UserError for a zip archive of torch.save with compressed members: torch writes none, and a small file
    could unfold into more than the memory holds. Any other file passes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _check_stored(archive, str(path))


def _check_stored(archive: zipfile.ZipFile, name: str) -> None:
    if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
        raise UserError(f"{name}: a torch archive with compressed parts, which torch.save never writes; refused")


class _TorchArchive:
    """The zip file of torch.save: one pickle, and one file of raw numbers a storage."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        _check_stored(archive, name)
        self.archive = archive
        self.name = name
        self.folder = next(item for item in archive.namelist() if item.endswith("data.pkl"))[: -len("data.pkl")]
        order = f"{self.folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise UserError(f"{name}: a torch archive of a big-endian machine; save it again on an ordinary one")
        self.read: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def load(self) -> Any:
        return RestrictedUnpickler(io.BytesIO(self.archive.read(f"{self.folder}data.pkl")), self.name, self).load()

    def storage(self, dtype: torch.dtype, key: str) -> torch.Tensor:
        """The vector in one storage; tensors that share it share its memory."""
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a storage without a type")
        if (key, dtype) not in self.read:
            data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            self.read[key, dtype] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.read[key, dtype]


def loads(data: bytes, name: str = "pickle") -> Any:
    """Unpickle bytes. Raises UserError naming `name` for damaged data and for everything that is not plain data."""
    return _guarded(lambda: RestrictedUnpickler(io.BytesIO(data), name).load(), name)


def load(path: str | Path) -> Any:
    """Read the data in a pickle, a torch archive, an `.npy` or an `.npz` file, told apart by content, not by name.

    An `.npz` gives a dictionary of arrays, an `.npy` with a single object that object. Strings that Python 2 wrote come
    as bytes. Raises UserError for damaged files and for everything that is not plain data.
    """
    name = str(path)
    with Path(path).open("rb") as file:
        start = file.read(8)
        file.seek(0)
        if start.startswith(b"PK\x03\x04"):
            return _guarded(lambda: _load_zip(file, name), name)
        if start.startswith(b"\x93NUMPY"):
            return _guarded(lambda: _load_npy(file, name), name)
        value = _guarded(lambda: RestrictedUnpickler(file, name).load(), name)
    if isinstance(value, int) and value == OLD_TORCH_MAGIC:
        raise UserError(f"{name}: written by torch before 1.6; load it there with torch.load and save it again")
    return value


def _guarded(read: Callable[[], Any], name: str) -> Any:
    try:
        return read()
    except UserError:
        raise
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: cannot be read: {reason}") from error


def _load_zip(file: Any, name: str) -> Any:
    with zipfile.ZipFile(file) as archive:
        if any(item.endswith("data.pkl") for item in archive.namelist()):
            return _TorchArchive(archive, name).load()
        arrays = {}
        for item in archive.namelist():
            with archive.open(item) as member:
                arrays[item.removesuffix(".npy")] = _load_npy(io.BytesIO(member.read()), name)
        return arrays


def _load_npy(file: Any, name: str) -> Any:
    """Numbers by numpy itself; objects are a pickle behind the header, read by the restricted unpickler."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if not dtype.hasobject:
        file.seek(0)
        return np.load(file, allow_pickle=False)
    array = np.asarray(RestrictedUnpickler(file, name).load(), dtype=object)
    if array.shape != shape:
        raise UserError(f"{name}: cannot be read: its header says {shape}, its data are {array.shape}")
    return array.item() if shape == () else array
