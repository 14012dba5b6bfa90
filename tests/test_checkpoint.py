"""Files of weights: whole or not at all, strict, and nothing in them executed."""

import os
import pickle

import pytest
import torch
from torch import nn

from utils.checkpoint import (
    SCHEDULE_BUFFERS,
    CheckpointFolder,
    load_network_file,
    load_safetensors,
    load_state_dict_file,
    load_torch,
    read_json,
    read_metadata,
    save_safetensors,
    save_torch,
    strict_load,
    write_atomically,
    write_json,
)
from utils.config import UserError


@pytest.mark.parametrize("prefix", ["", "eps_model.", "module.eps_model.", "_module.module.eps_model."])
def test_prefixes_and_schedule_buffers_are_taken_off(tmp_path, prefix):
    weights = {f"{prefix}down.0.weight": torch.ones(2, 3), f"{prefix}final.bias": torch.zeros(3)}
    outer = prefix.removesuffix("eps_model.")
    buffers = {outer + name: torch.linspace(0, 1, 10) for name in SCHEDULE_BUFFERS}
    torch.save({**weights, **buffers}, tmp_path / "unet.pt")
    state, betas = load_network_file(tmp_path / "unet.pt")
    assert set(state) == {"down.0.weight", "final.bias"}
    assert torch.equal(betas, torch.linspace(0, 1, 10))
    assert set(load_state_dict_file(tmp_path / "unet.pt")) == set(state)


def test_lightning_nesting_and_safetensors(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "x.ckpt")
    assert list(load_state_dict_file(tmp_path / "x.ckpt")) == ["a"]
    save_safetensors({"module.a": torch.ones(2)}, tmp_path / "x.safetensors", {"kind": "k", "n": 3})
    assert list(load_state_dict_file(tmp_path / "x.safetensors")) == ["a"]
    assert read_metadata(tmp_path / "x.safetensors") == {"kind": "k", "n": 3}
    tensors, metadata = load_safetensors(tmp_path / "x.safetensors")
    assert metadata["n"] == 3 and tensors["module.a"].tolist() == [1.0, 1.0]


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("evil.pt", "wb") as file:
        pickle.dump({"state_dict": Evil()}, file)
    torch.save({"a": Evil()}, "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(UserError, match=r"refused: the pickle wants to call (posix|nt)\.mkdir"):
            load_state_dict_file(name)
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_torch(name)
    assert not os.path.exists("pwned")


def test_bad_files_give_one_line(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        load_torch(tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_torch(tmp_path / "cut.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_safetensors(tmp_path / "cut.safetensors")
    save_torch({"a": 3}, tmp_path / "no_tensors.pt")
    with pytest.raises(UserError, match="no state dict"):
        load_state_dict_file(tmp_path / "no_tensors.pt")


def test_a_damaged_json_file_is_one_line(tmp_path):
    path = write_json(tmp_path / "record.json", {"a": [1]})
    assert read_json(path) == {"a": [1]}
    for content, message in (
        (b'{"a": [1', "damaged, not JSON"),
        (b"\xff{}", "damaged, not JSON"),
        (b"[1]", "holds a list"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"record\.json: {message}.*; make it anew$"):
            read_json(path, "make it anew")


def test_strict_load_names_the_keys():
    with pytest.raises(UserError) as info:
        strict_load(nn.Linear(2, 3), {"weight": torch.zeros(3, 4), "scale": torch.zeros(1)}, "file.pt")
    text = str(info.value)
    assert "1 missing (bias)" in text and "1 unexpected (scale)" in text and "(3, 4) instead of (3, 2)" in text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = save_torch({"step": 1}, tmp_path / "a.ckpt")

    def fail(target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fail)
    assert load_torch(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_folder_keeps_the_newest_and_the_milestones(tmp_path, caplog):
    folder = CheckpointFolder(tmp_path, keep=2, milestones=(2,))
    for step in (1, 2, 3, 4):
        folder.save(step, {"value": step})
    assert [p.name for p in folder.paths()] == ["step_00000002.ckpt", "step_00000003.ckpt", "step_00000004.ckpt"]
    assert folder.load_latest() == {"value": 4, "step": 4}
    folder.paths()[-1].write_bytes(b"damaged")
    assert folder.load_latest()["step"] == 3
    assert "going back" in caplog.text
    for path in folder.paths():
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="none of its 3 checkpoints"):
        folder.load_latest()
    assert CheckpointFolder(tmp_path / "new").load_latest() is None


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    for step in (10, 12):
        CheckpointFolder(tmp_path).save(step, {"w": torch.zeros(3)})
    cut = tmp_path / "step_00000012.ckpt"
    cut.write_bytes(cut.read_bytes()[:100])
    folder = CheckpointFolder(tmp_path, keep=2)
    assert folder.load_latest()["step"] == 10
    folder.save(13, {"w": torch.ones(3)})
    (tmp_path / "step_00000013.ckpt").write_bytes(b"cut too")
    assert CheckpointFolder(tmp_path).load_latest()["step"] == 10
