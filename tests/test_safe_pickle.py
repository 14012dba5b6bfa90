import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from tests.malicious import Call
from utils import safe_pickle
from utils.config import UserError

VECTOR = np.arange(4, dtype=np.float32)
PLAIN = {
    "names": ["a/1.png", "ü"],
    "numbers": (1, 2.5, True, None, 2**80),
    "bytes": b"\x00\xff",
    "array": VECTOR,
    "big-endian": VECTOR.astype(">f4"),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "strings": np.array(["x", "yz"]),
    "objects": np.array([{"k": VECTOR}, None], dtype=object),
    "scalar": np.float64(0.5),
    "ordered": OrderedDict(a=1),
    "flags": np.array([True, False]),
}


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, np.ndarray):
        assert found.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=") and found.shape == expected.shape
        if expected.dtype == object:
            for a, b in zip(found.flat, expected.flat, strict=True):
                assert_same(a, b)
        else:
            assert np.array_equal(found, expected)
    else:
        assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_of_every_protocol(protocol):
    assert_same(safe_pickle.loads(pickle.dumps(PLAIN, protocol)), PLAIN)


def test_arrays_pickled_by_old_numpy():
    data = pickle.dumps(VECTOR, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert_same(np.asarray(safe_pickle.loads(data)), VECTOR)


def test_python_2_strings_stay_bytes():
    # pickle.dumps(({"name": "\xff\xd8"}, [True]), 2) of Python 2
    data = b"\x80\x02}q\x00U\x04nameq\x01U\x02\xff\xd8q\x02s]q\x03\x88a\x86q\x04."
    assert safe_pickle.loads(data) == ({b"name": b"\xff\xd8"}, [True])


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch pwned",), r"(posix|nt)\.system"),
        (eval, ("1",), r"(builtins|__builtin__)\.eval"),
        (getattr, (VECTOR, "dumps"), r"(builtins|__builtin__)\.getattr"),
        (np.load, ("x.npy",), r"numpy.*load"),
        (torch.load, ("x.pt",), r"torch.*load"),
        (bytearray, (b"x",), r"(builtins|__builtin__)\.bytearray"),
    ],
)
def test_calls_are_refused_by_name(function, arguments, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hidden = {"harmless": [VECTOR, Call(function, *arguments)]}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(hidden))
    np.save(tmp_path / "b.npy", np.array(hidden, dtype=object), allow_pickle=True)
    torch.save(hidden, tmp_path / "c.npy")
    for file in ("a.pkl", "b.npy", "c.npy"):
        with pytest.raises(UserError, match=rf"{file}: refused: the pickle wants to call {name}"):
            safe_pickle.load(tmp_path / file)
    assert not (tmp_path / "pwned").exists()


def test_other_codecs_and_odd_arrays_are_refused():
    class Encoded:
        def __reduce__(self):
            import _codecs

            return _codecs.encode, ("nevat", "rot13")

    with pytest.raises(UserError, match="rot13"):
        safe_pickle.loads(pickle.dumps(Encoded()))
    with pytest.raises(UserError, match=r"fields|plain numbers"):
        safe_pickle.loads(pickle.dumps(np.zeros(2, dtype=[("a", "f4"), ("b", "O")])))
    with pytest.raises(UserError, match="plain numbers"):
        safe_pickle.loads(pickle.dumps(np.zeros(2, dtype="M8[s]")))


def test_a_pickle_cannot_change_the_reader():
    # GLOBAL torch._utils _rebuild_parameter; BUILD {"__name__": "changed"} on the function itself
    data = b"ctorch._utils\n_rebuild_parameter\n(dS'__name__'\nS'changed'\nsb."
    safe_pickle.loads(data)
    assert safe_pickle._parameter.__name__ == "_parameter"


def test_torch_archives(tmp_path):
    base = torch.arange(12.0)
    value = {
        "tensor": base.view(3, 4)[:, 1:3],
        "shares": base[2:5],
        "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "vector": VECTOR,
    }
    torch.save(value, tmp_path / "a.npy")  # IDiff-Face's .npy files are such archives
    found = safe_pickle.load(tmp_path / "a.npy")
    for key in value:
        if key == "vector":
            assert_same(found[key], VECTOR)
        else:
            assert torch.equal(found[key], value[key].data) and found[key].dtype == value[key].dtype
    assert found["tensor"].stride() == (4, 1)
    torch.save(VECTOR, tmp_path / "b.npy")
    assert_same(safe_pickle.load(tmp_path / "b.npy"), VECTOR)


def test_torch_views_stay_inside_their_storage(tmp_path):
    torch.save(torch.arange(4.0), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:8] if name.endswith("data/0") else data)
    with pytest.raises(UserError, match=r"b\.pt: cannot be read"):
        safe_pickle.load(tmp_path / "b.pt")


def test_lightning_classes_are_placeholders(monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks")

    class ModelCheckpoint:
        def __init__(self):
            self.path = "x"

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    data = pickle.dumps({"callbacks": {ModelCheckpoint: 1}, "object": ModelCheckpoint(), "epoch": 3})
    found = safe_pickle.loads(data)
    assert found["epoch"] == 3 and found["object"] == {}
    assert [key.__name__ for key in found["callbacks"]] == ["ModelCheckpoint"]


def test_numpy_files(tmp_path):
    np.save(tmp_path / "numbers.npy", VECTOR)
    assert_same(safe_pickle.load(tmp_path / "numbers.npy"), VECTOR)
    np.save(tmp_path / "dictionary.npy", np.array({"a": VECTOR}, dtype=object), allow_pickle=True)
    assert_same(safe_pickle.load(tmp_path / "dictionary.npy"), {"a": VECTOR})
    np.savez(tmp_path / "arrays.npz", names=np.array(["a", "b"]), embeddings=VECTOR)
    assert_same(safe_pickle.load(tmp_path / "arrays.npz"), {"names": np.array(["a", "b"]), "embeddings": VECTOR})


@pytest.mark.parametrize(
    "data",
    [b"", b"no pickle", pickle.dumps(PLAIN)[:-20], b"PK\x03\x04 cut", b"\x93NUMPY\x01\x00", b"\x80\x04."],
)
def test_damaged_files_are_named(tmp_path, data):
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"x\.bin: cannot be read"):
        safe_pickle.load(tmp_path / "x.bin")


def test_old_torch_files_are_explained(tmp_path):
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before 1\.6"):
        safe_pickle.load(tmp_path / "old.pt")
