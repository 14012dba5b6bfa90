"""Training that meets NaNs, a full disk or a SIGTERM."""

import json
import os
import resource
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch

from tests.test_training import overrides, run, weights  # noqa: F401 (a fixture)
from utils import curves, guards
from utils.checkpoint import CheckpointFolder, save_torch
from utils.config import UserError
from utils.curves import plot_metrics
from utils.data.prefetch import prefetch
from utils.interruption import STATUS, StopRequest

NAN, ONE = torch.tensor(float("nan")), torch.tensor(1.0)


def test_bad_steps_are_skipped_counted_and_in_the_end_fatal():
    steps = guards.FiniteSteps(limit=2, skipped=3)
    assert steps.take(ONE, 1, list) and not steps.take(NAN, 2, list)
    assert steps.take(ONE, 3, list) and not steps.take(NAN, 4, list)
    assert steps.skipped == 5
    with pytest.raises(UserError, match=r"2 steps in a row up to step 5 .* the last batch is a/1\.png, b/2\.png;"):
        steps.take(NAN, 5, lambda: ["a/1.png", "b/2.png"])


def test_a_loss_that_stands_still_is_told_once(caplog):
    loss = guards.MovingLoss(patience=10)
    for step, value in ((1, 1.0), (5, 1.0), (11, 0.99), (21, 0.99)):
        loss.look(value, step)
    assert [record.getMessage()[:22] for record in caplog.records] == ["the loss has not moved"]
    caplog.clear()
    loss = guards.MovingLoss(patience=10)
    for step, value in ((1, 1.0), (11, 0.5), (21, 1.0)):
        loss.look(value, step)
    assert not caplog.records


def nan_images(monkeypatch, dataset_names):
    """Images of these names become NaN."""
    from utils.data.face_dataset import FaceDataset

    get = FaceDataset.__getitem__

    def spoilt(self, item):
        image, index = get(self, item)
        return (image * float("nan") if dataset_names(self.names[index]) else image), index

    monkeypatch.setattr(FaceDataset, "__getitem__", spoilt)


def test_a_nan_image_costs_its_steps_only(compose, overrides, tmp_path, monkeypatch):  # noqa: F811
    nan_images(monkeypatch, lambda name: name == "id3/1.png")
    metrics = run(compose("train_config", *overrides, f"output_dir={tmp_path}"))
    assert 1 <= metrics["skipped_steps"] <= 2 and np.isfinite(metrics["loss"])
    _, ema, model = weights(tmp_path)
    assert all(value.isfinite().all() for state in (ema, model) for value in state.values())


def test_nothing_but_nan_names_the_files(compose, overrides, tmp_path, monkeypatch):  # noqa: F811
    nan_images(monkeypatch, lambda name: True)
    with pytest.raises(UserError, match=r"training\.max_bad_steps: 3 steps in a row .* the last batch is id\d/\d"):
        run(compose("train_config", *overrides, f"output_dir={tmp_path}", "training.max_bad_steps=3"))


def test_a_full_disk_costs_a_checkpoint_not_the_run(compose, overrides, tmp_path, monkeypatch, caplog):  # noqa: F811
    save = CheckpointFolder.save

    def full(self, step, state):
        if step == 2:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
            try:
                return save(self, step, state)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        return save(self, step, state)

    monkeypatch.setattr(CheckpointFolder, "save", full)
    cfg = compose("train_config", *overrides, f"output_dir={tmp_path}", "training.checkpoint.steps_between=1",
                  "training.steps=3")  # fmt: skip
    run(cfg)
    assert [path.name for path in CheckpointFolder(tmp_path / "checkpoints").paths()] == [
        "step_00000001.ckpt",
        "step_00000003.ckpt",
    ]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.suffix != ".ckpt"] == []
    assert "this checkpoint (those before it stay) cannot be written" in caplog.text


def test_a_run_goes_on_in_another_precision(compose, overrides, tmp_path):  # noqa: F811
    cfg = ("train_config", *overrides, f"output_dir={tmp_path}")
    for steps, precision in ((2, "fp32"), (4, "fp16"), (6, "bf16")):
        metrics = run(compose(*cfg, f"training.steps={steps}", f"training.precision={precision}"))
    assert weights(tmp_path)[0] == 6 and np.isfinite(metrics["loss"])


def test_the_last_checkpoint_must_be_written(tmp_path):
    def broken():
        raise OSError(28, "No space left on device", str(tmp_path))

    assert guards.save_or_warn(broken, last=False) is False
    with pytest.raises(UserError, match="the last checkpoint cannot be written: No space left on device"):
        guards.save_or_warn(broken, last=True)


def test_a_write_that_fails_is_an_oserror_and_leaves_nothing(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError):
            save_torch({"w": torch.zeros(100_000)}, tmp_path / "x.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.curves
def test_sigterm_saves_and_the_run_goes_on(compose, overrides, tmp_path, monkeypatch):  # noqa: F811
    run(compose("train_config", *overrides, f"output_dir={tmp_path / 'whole'}"))
    agreed = StopRequest.agreed
    asked = []

    def kill_once(self):
        asked.append(None)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed(self)

    monkeypatch.setattr(StopRequest, "agreed", kill_once)
    handler = signal.getsignal(signal.SIGTERM)
    cfg = ("train_config", *overrides, f"output_dir={tmp_path / 'ended'}")
    with pytest.raises(SystemExit) as ended:
        run(compose(*cfg))
    assert ended.value.code == STATUS == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert weights(tmp_path / "ended")[0] == 2
    run(compose(*cfg))
    for one, other in zip(weights(tmp_path / "whole")[1:], weights(tmp_path / "ended")[1:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    curves = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "ended")]
    losses = [[json.loads(line)["loss"] for line in text.splitlines()] for text in curves]
    assert losses[0] == losses[1]
    assert (tmp_path / "ended" / "training.png").stat().st_size > 1000


@pytest.mark.parametrize("setting", ["micro_batch_size=3", "activation_checkpointing=true"])
def test_memory_settings_change_no_number(compose, overrides, tmp_path, setting):  # noqa: F811
    losses = []
    for name, extra in (("plain", []), ("lean", [f"training.{setting}"])):
        run(compose("train_config", *overrides, *extra, f"output_dir={tmp_path / name}", "training.optimizer.lr=1e-3"))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3


def test_a_damaged_or_missing_shard_of_latents_is_made_anew(face_folder, tmp_path, monkeypatch, caplog):
    from utils.data import latents
    from utils.data.face_dataset import FaceDataset

    monkeypatch.setattr(latents, "IMAGES_PER_SHARD", 5)
    dataset = FaceDataset(str(face_folder / "faces"), 16)
    torch.manual_seed(0)
    encoder = torch.nn.Conv2d(3, 2, 4, stride=4)
    calls = []
    encode = latents._encode
    monkeypatch.setattr(latents, "_encode", lambda *a: calls.append(a[2].start) or encode(*a))

    def cache(network=encoder):
        calls.clear()
        return latents.cached_latents(
            dataset, network, tmp_path, batch_size=3, num_workers=0, device=torch.device("cpu")
        )

    first = cache()
    assert calls == [0, 5, 10, 15] and len(first) == 18
    rows, mirrored = [7, 17, 0], [True, False, True]
    with torch.no_grad():
        images = torch.stack([dataset[(row, flip)][0] for row, flip in zip(rows, mirrored, strict=True)])
        np.testing.assert_allclose(first.take(rows, mirrored), encoder(images).half().float(), atol=1e-3)
    before = first.take(range(18), [False] * 18)
    cache()
    assert calls == []
    (tmp_path / "latents" / "00001.npy").write_bytes(b"cut")
    (tmp_path / "latents" / "00003.json").unlink()
    again = cache()
    assert calls == [5, 15] and "not the bytes that were written" in caplog.text
    assert np.array_equal(again.take(range(18), [False] * 18), before)
    cache(torch.nn.Conv2d(3, 2, 4, stride=4))
    assert calls == [0, 5, 10, 15] and "made from other images or with another autoencoder" in caplog.text


def test_prefetch_keeps_order_and_errors():
    def items():
        yield from range(5)
        raise UserError("the sixth")

    got = []
    with pytest.raises(UserError, match="the sixth"):
        for item in prefetch(items()):
            got.append(item)
    assert got == [0, 1, 2, 3, 4]
    assert list(prefetch(iter(range(100)), depth=3)) == list(range(100))
    endless = prefetch(iter(int, 1))
    assert next(endless) == 0
    endless.close()
    deadline = time.monotonic() + 5
    while any(thread.name == "prefetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread ends with the iterator"
        time.sleep(0.05)


def test_weights_and_biases_get_what_tensorboard_gets(compose, overrides, tmp_path, monkeypatch):  # noqa: F811
    class Wandb(types.ModuleType):
        logged, started, finished = [], {}, 0

        class Image:
            def __init__(self, image):
                self.image = image

        def init(self, **settings):
            self.started = settings
            return self

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.finished += 1

    fake = Wandb("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(compose("train_config", *overrides, f"output_dir={tmp_path / 'run'}", "training.wandb_project=faces"))
    assert fake.started["project"] == "faces" and fake.started["config"]["training"]["steps"] == 6
    assert [step for step, values in fake.logged if "train/loss" in values] == [2, 4, 6] and fake.finished == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb_project: faces, but the package wandb is not installed"):
        run(compose("train_config", *overrides, f"output_dir={tmp_path / 'new'}", "training.wandb_project=faces"))


def test_curves_survive_gaps(tmp_path):
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "lr": 0.1}, {"step": 3, "loss": float("nan"), "lr": 0.1}]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    plot_metrics(tmp_path / "m.jsonl", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_curves_are_drawn_once_a_minute_and_at_the_end(tmp_path, monkeypatch):
    seconds = [0.0]
    drawn = []
    monkeypatch.setattr(curves.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(curves, "plot_metrics", lambda *args: drawn.append(seconds[0]))
    picture = curves.Curves(tmp_path / "m.jsonl", tmp_path)
    for now in (1, 59, 60, 61, 119, 121, 122):
        seconds[0] = now
        picture.update(last=now == 122)
    assert drawn == [60, 121, 122]
