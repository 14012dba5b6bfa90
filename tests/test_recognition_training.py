"""The recogniser's loop: its files, resume at any number of processes, accumulation, guards, validation."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recognition import heads
from recognition.augment import Augmentation
from recognition.backbones import build_backbone
from recognition.datasets import IdentityDataset, read_training_set
from recognition.lr_schedules import LRSchedule, Plateau, Step
from recognition.train import check_optimizer
from recognition.training_loop import train
from recognition.training_settings import TrainingSettings
from recognition.training_state import parameter_groups
from tests.processes import together
from tests.test_recognition import people  # noqa: F401 (a fixture)
from utils import distributed
from utils.checkpoint import CheckpointFolder, load_safetensors, load_torch
from utils.config import UserError
from utils.interruption import STATUS

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)


class NormFree(nn.Module):
    """A backbone in which one image never sees another: no batch norm, no dropout."""

    config = {"name": "norm_free"}  # what its file says of it

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.PReLU(8), nn.Flatten(), nn.Linear(128, 16))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Small(NormFree):
    """A backbone with all that makes a resume hard, and little else."""

    def __init__(self) -> None:
        super().__init__()
        convolution, activation, *last = self.layers
        self.layers = nn.Sequential(
            convolution, nn.BatchNorm2d(8), activation, *last, nn.Dropout(0.2), nn.BatchNorm1d(16)
        )


def run(
    people: Path,  # noqa: F811
    output_dir: Path,
    *,
    build: Callable[[], nn.Module] = Small,
    head: type = heads.ArcFace,
    optimizer: Any = SGD,
    lr_schedule: LRSchedule | None = None,
    cached: bool = True,
    hooks: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Train a tiny network; `kwargs` go to the settings."""
    values = {"epochs": 3, "batch_size": 12, "num_workers": 0, "device": "cpu", "steps_between_logging": 2, **kwargs}
    torch.manual_seed(0)
    backbone, head = build(), head(16, 8, scale=16.0)
    augment = Augmentation(flip=0.5, crop=0.2, low_resolution=0.2, photometric=0.2)
    dataset = IdentityDataset(read_training_set(people), size=16, augment=augment, seed=0, cache_in_memory=cached)
    schedule = lr_schedule or Step(milestones=[2])
    settings = TrainingSettings(**values)
    return train(
        backbone, head, dataset, optimizer, schedule, settings, output_dir, {"training": values}, **(hooks or {})
    )


def last_state(output_dir: Path) -> dict[str, Any]:
    return load_torch(sorted((output_dir / "checkpoints").iterdir())[-1])


def flat(state: dict[str, Any]) -> dict[str, Tensor]:
    """Weights and optimiser state of a checkpoint under one name each."""
    return {
        **{f"backbone.{name}": tensor for name, tensor in state["backbone"].items()},
        **{f"head.{name}": tensor for name, tensor in state["head"].items()},
        **{f"{slot}/{name}": t for name, slots in state["optimizer"].items() for slot, t in slots.items()},
    }


def same_bits(one: Path, other: Path) -> None:
    first, second = flat(last_state(one)), flat(last_state(other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert last_state(one)["progress"]["history"] == last_state(other)["progress"]["history"]


def close(one: Path, other: Path) -> None:
    first, second = flat(last_state(one)), flat(last_state(other))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5, msg=name)
    histories = [last_state(path)["progress"]["history"] for path in (one, other)]
    assert len(histories[0]) == len(histories[1]) > 0
    for a, b in zip(*histories, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


# Files


@pytest.fixture(scope="module")
def finished(people: Path, tmp_path_factory) -> Path:  # noqa: F811
    output_dir = tmp_path_factory.mktemp("run")
    run(people, output_dir, steps_between_checkpoints=5, keep_checkpoints=10)
    return output_dir


def test_a_run_leaves_its_files(finished: Path) -> None:
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == [
        "step_00000005.ckpt",
        "step_00000010.ckpt",
        "step_00000012.ckpt",
    ]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert (metrics["identities"], metrics["images"], metrics["steps"]) == (8, 48, 12)
    assert [entry["lr"] for entry in metrics["history"]] == pytest.approx([0.05, 0.05, 0.005])
    assert metrics["history"][-1]["loss"] < metrics["history"][0]["loss"]
    assert metrics["images_per_second"] > 0 and metrics["skipped_steps"] == 0
    assert list((finished / "tensorboard").iterdir())
    assert (finished / "training.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    # The epoch's means are those of its steps
    assert metrics["history"][0]["loss"] == pytest.approx((lines[0]["loss"] + lines[1]["loss"]) / 2)
    network, metadata = load_safetensors(finished / "backbone.safetensors")
    assert metadata["config"] == Small.config and network.keys() == Small().state_dict().keys()
    assert metadata["channel_order"] == "RGB" and metadata["provenance"]["head"]["name"] == "ArcFace"
    found = [metadata["provenance"][key] for key in ("identities", "images", "steps", "images_per_step")]
    assert found == [8, 48, 12, 12]


def test_a_finished_run_is_left_alone(people: Path, finished: Path, caplog) -> None:  # noqa: F811
    files = {path: path.stat().st_mtime_ns for path in sorted(finished.rglob("*"))}
    with caplog.at_level("INFO"):
        metrics = run(people, finished, steps_between_checkpoints=5, keep_checkpoints=10)
    assert metrics == json.loads((finished / "metrics.json").read_text())
    assert "this run is finished (12 steps)" in caplog.text
    assert files == {path: path.stat().st_mtime_ns for path in sorted(finished.rglob("*"))}


def test_a_finished_run_goes_on_for_more_epochs_and_writes_what_a_kill_cost(people, finished, tmp_path) -> None:  # noqa: F811
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "backbone.safetensors").unlink()
    assert run(people, tmp_path / "run")["steps"] == 12
    again = load_safetensors(tmp_path / "run" / "backbone.safetensors")[0]
    assert all(torch.equal(again[n], t) for n, t in load_safetensors(finished / "backbone.safetensors")[0].items())
    assert run(people, tmp_path / "run", epochs=4)["steps"] == 16
    later = load_safetensors(tmp_path / "run" / "backbone.safetensors")[0]
    assert not all(torch.equal(again[name], later[name]) for name in again)


# Resume


@pytest.mark.parametrize("step", [5, 10])
def test_resume_is_the_uninterrupted_run_bit_for_bit(people, finished, tmp_path, step: int) -> None:  # noqa: F811
    # As a run killed after this checkpoint leaves its folder; read from files this time, not from the cache
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(finished / "checkpoints" / f"step_{step:08d}.ckpt", tmp_path / "checkpoints")
    run(people, tmp_path, cached=False, steps_between_checkpoints=5)
    same_bits(tmp_path, finished)
    expected, actual = (load_safetensors(folder / "backbone.safetensors")[0] for folder in (finished, tmp_path))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sample_rate": 0.5, "head": heads.AdaFace},
        {"optimizer": partial(torch.optim.AdamW, lr=1e-3), "head": heads.CurricularFace, "micro_batch_size": 4},
        {"precision": "bf16", "head": heads.ElasticFaceArc, "gradient_clip": 1.0},
    ],
)
def test_resume_with_everything_that_has_a_state(people: Path, tmp_path: Path, kwargs: dict) -> None:  # noqa: F811
    run(people, tmp_path / "whole", **kwargs, steps_between_checkpoints=5, keep_checkpoints=9)
    (tmp_path / "part" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "whole/checkpoints/step_00000005.ckpt", tmp_path / "part" / "checkpoints")
    run(people, tmp_path / "part", **kwargs)
    same_bits(tmp_path / "part", tmp_path / "whole")


class StopAfter:
    """A watch that sends this process a SIGTERM at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def look(self, step: int, **values: Tensor) -> dict[str, float]:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}


def test_sigterm_saves_and_leaves(people: Path, finished: Path, tmp_path: Path, caplog) -> None:  # noqa: F811
    with pytest.raises(SystemExit) as left:
        run(people, tmp_path, steps_between_checkpoints=5, hooks={"watch": StopAfter(6)})
    assert left.value.code == STATUS and "SIGTERM: saved step 6" in caplog.text
    assert last_state(tmp_path)["step"] == 6
    run(people, tmp_path, steps_between_checkpoints=5)
    same_bits(tmp_path, finished)


def test_workers_change_nothing(people: Path, finished: Path, tmp_path: Path) -> None:  # noqa: F811
    run(people, tmp_path, cached=False, num_workers=2)
    same_bits(tmp_path, finished)


def run_norm_free(people: Path, output_dir: Path, **kwargs: Any) -> None:  # noqa: F811
    run(people, output_dir, build=NormFree, **kwargs)


def stop_norm_free(people: Path, output_dir: Path, step: int, **kwargs: Any) -> bool:  # noqa: F811
    """A run that a SIGTERM ends after `step`, on all processes; whether it left as it should."""
    try:
        run(people, output_dir, build=NormFree, hooks={"watch": StopAfter(step)}, **kwargs)
    except SystemExit as left:
        return left.code == STATUS
    return False


def test_two_processes_then_one_then_three(people: Path, tmp_path: Path) -> None:  # noqa: F811
    kwargs = {"head": heads.AdaFace, "steps_between_logging": 1}
    run_norm_free(people, tmp_path / "one", batch_size=12, **kwargs)
    many = tmp_path / "many"
    assert together(2, tmp_path / "a", partial(stop_norm_free, **kwargs, batch_size=6), people, many, 3) == [True, True]
    assert last_state(many)["step"] == 3
    assert stop_norm_free(people, many, 7, batch_size=12, **kwargs)
    together(3, tmp_path / "b", partial(run_norm_free, **kwargs, batch_size=4), people, many)
    assert last_state(many)["step"] == 12
    close(many, tmp_path / "one")
    losses = [
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (many, tmp_path / "one")
    ]
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def run_sampled(people: Path, output_dir: Path, **kwargs: Any) -> None:  # noqa: F811
    run(people, output_dir, sample_rate=0.5, batch_size=6, **kwargs)


def test_sampled_shards_resume_bit_for_bit(people: Path, tmp_path: Path) -> None:  # noqa: F811
    whole, part = tmp_path / "whole", tmp_path / "part"
    together(2, tmp_path / "a", partial(run_sampled, steps_between_checkpoints=5, keep_checkpoints=9), people, whole)
    (part / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints/step_00000005.ckpt", part / "checkpoints")
    together(2, tmp_path / "b", run_sampled, people, part)
    same_bits(part, whole)


@pytest.mark.parametrize("head", [heads.CosFace, heads.NormFace])
def test_parts_of_a_batch_add_up_to_it(people: Path, tmp_path: Path, head: type) -> None:  # noqa: F811
    run_norm_free(people, tmp_path / "whole", head=head)
    run_norm_free(people, tmp_path / "parts", head=head, micro_batch_size=5)
    close(tmp_path / "parts", tmp_path / "whole")


# Guards and settings


@pytest.mark.parametrize("kwargs", [{"precision": "bf16"}, {"precision": "fp16"}, {"channels_last": True}])
def test_other_precision_and_layout_learn_too(people: Path, tmp_path: Path, kwargs: dict) -> None:  # noqa: F811
    history = run(people, tmp_path, build=NormFree, head=heads.NormFace, epochs=6, **kwargs)["history"]
    # fp16's loss scale begins too high: the steps of a whole epoch may be skipped
    losses = [entry["loss"] for entry in history if entry["loss"] is not None]
    assert losses[-1] < 0.9 * losses[0]


def test_a_run_does_not_go_on_as_another(people: Path, finished: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(UserError, match=r"training\.batch_size: .* 12 images a step .*not 6.*batch_size=12"):
        run(people, tmp_path / "run", batch_size=6)
    with pytest.raises(UserError, match=r"training\.optimizer: AdamW, but .* holds a run with SGD"):
        run(people, tmp_path / "run", optimizer=torch.optim.AdamW)
    with pytest.raises(UserError, match=r"output_dir: the checkpoint in .*: does not fit NormFree"):
        run(people, tmp_path / "run", build=NormFree)
    with pytest.raises(UserError, match=r"output_dir: the checkpoint in .*: does not fit AdaFace: 2 missing"):
        run(people, tmp_path / "run", head=heads.AdaFace)
    shutil.copytree(people, tmp_path / "people")
    (tmp_path / "people" / "p7").rename(tmp_path / "people" / "p8")
    with pytest.raises(UserError, match=r"output_dir: .* not on these 8"):
        run(tmp_path / "people", tmp_path / "run")


class Poisoned(NormFree):
    """Its output is no number in some training steps, counted from 0; a batch norm remembers what it sees."""

    steps: range = range(0)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.step = 0

    def forward(self, images: Tensor) -> Tensor:
        images = images * float("nan") if self.training and self.step in self.steps else images
        self.step += self.training
        return self.norm(self.layers(images))


def test_steps_without_a_finite_gradient_are_skipped(monkeypatch, people, tmp_path: Path, caplog) -> None:  # noqa: F811
    monkeypatch.setattr(Poisoned, "steps", range(4, 6))
    metrics = run(people, tmp_path, build=Poisoned, sample_rate=0.5, head=heads.AdaFace)
    assert metrics["skipped_steps"] == 2 and "step 5: the gradient is not finite" in caplog.text
    assert all(torch.isfinite(tensor).all() for tensor in flat(last_state(tmp_path)).values())


def test_an_epoch_without_a_step_has_no_loss(monkeypatch, people, tmp_path: Path, caplog) -> None:  # noqa: F811
    whole = run(people, tmp_path / "whole", build=Poisoned, epochs=2)
    monkeypatch.setattr(Poisoned, "steps", range(whole["steps"] // 2))
    metrics = run(people, tmp_path / "run", build=Poisoned, epochs=2)
    assert [entry["loss"] is None for entry in metrics["history"]] == [True, False]
    assert "epoch 1: every step was skipped" in caplog.text


class PoisonedShard(heads.CosFace):
    """In the tenth step the gradient of the second process's class centres overflows, and nothing else does."""

    step = 0

    def cosine(self, embeddings: Tensor, centres: Tensor | None = None) -> Tensor:
        centres = self.weight * 1
        if self.step == 9 and distributed.rank() == 1:
            centres.register_hook(lambda gradient: gradient * float("inf"))
        self.step += 1
        return super().cosine(embeddings, centres)


def run_fp16(people: Path, output_dir: Path, head: type) -> dict[str, Any]:  # noqa: F811
    return run(people, output_dir, build=NormFree, head=head, precision="fp16", batch_size=6)


def test_processes_agree_on_a_gradient_that_one_of_them_cannot_take(people: Path, tmp_path: Path) -> None:  # noqa: F811
    # The loss scale begins too high: some steps are skipped in any case
    usual = together(2, tmp_path / "a", run_fp16, people, tmp_path / "usual", heads.CosFace)[0]["skipped_steps"]
    expected = usual + 1
    both = together(2, tmp_path / "b", run_fp16, people, tmp_path / "poisoned", PoisonedShard)
    assert [metrics["skipped_steps"] for metrics in both] == [expected, expected]
    state = last_state(tmp_path / "poisoned")
    assert state["scaler"]["scale"] == 2.0 ** (16 - expected)  # rank 0's, which saw no overflow of its own
    assert all(torch.isfinite(tensor).all() for tensor in flat(state).values())


def test_many_such_steps_end_the_run_and_no_checkpoint_holds_them(monkeypatch, people, tmp_path: Path) -> None:  # noqa: F811
    monkeypatch.setattr(Poisoned, "steps", range(5, 100))
    with pytest.raises(
        UserError, match=r"training\.max_bad_steps: 5 steps in a row up to step 10 .*p\d/p\d_000\d\.png"
    ):
        run(people, tmp_path, build=Poisoned, max_bad_steps=5, steps_between_checkpoints=2, keep_checkpoints=9)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step_00000002.ckpt",
        "step_00000004.ckpt",
    ]


def test_divergence_stops_the_run_before_a_checkpoint(people: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match=r"training\.optimizer\.lr: the loss is (nan|inf) at the last step, 12"):
        run(people, tmp_path, optimizer=partial(SGD, lr=1e30), steps_between_checkpoints=None)
    assert not (tmp_path / "checkpoints").exists()


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(monkeypatch, people, finished, tmp_path, caplog) -> None:  # noqa: F811
    save = CheckpointFolder.save

    def full(self: CheckpointFolder, step: int, state: dict) -> Path:
        if step == 5:
            raise OSError(28, "No space left on device")
        return save(self, step, state)

    monkeypatch.setattr(CheckpointFolder, "save", full)
    run(people, tmp_path, steps_between_checkpoints=5)
    assert "No space left on device" in caplog.text
    same_bits(tmp_path, finished)


def test_batch_norms_are_spared_unless_asked() -> None:
    backbone = build_backbone("ir_18", input_size=16, width=0.125)
    norms = {p for m in backbone.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for p in m.parameters()}
    optimizer = torch.optim.SGD(parameter_groups([backbone], decay_batch_norm=False), lr=0.1, weight_decay=5e-4)
    decayed, spared = optimizer.param_groups
    assert set(spared["params"]) == norms and spared["weight_decay"] == 0
    assert set(decayed["params"]) == set(backbone.parameters()) - norms and decayed["weight_decay"] == 5e-4
    decayed, spared = parameter_groups([backbone], decay_batch_norm=True)
    assert set(decayed["params"]) == set(backbone.parameters()) and not spared["params"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"precision": "fp8"}, r"training.precision: 'fp8' is not one of fp32, bf16, fp16"),
        ({"epochs": 0}, r"training\.epochs: 0"),
        ({"sample_rate": 0.0}, r"training\.sample_rate: 0\.0"),
        ({"gradient_clip": -1.0}, r"training\.gradient_clip: -1"),
        ({"gradient_clip": float("nan")}, r"training\.gradient_clip: nan"),
        (
            {"batch_size": 9, "micro_batch_size": 4},
            r"training\.micro_batch_size: 4 cuts a batch of 9 into parts of one",
        ),
        ({"sync_batch_norm": True, "device": "cpu"}, r"training\.sync_batch_norm: true, but .* on GPUs only"),
        ({"num_workers": -1}, r"training\.num_workers: -1"),
    ],
)
def test_settings_that_cannot_work(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainingSettings(**kwargs)


def test_rates_that_no_optimiser_takes() -> None:
    with pytest.raises(UserError, match=r"training\.optimizer: Invalid learning rate: -1"):
        check_optimizer(partial(SGD, lr=-1.0))
    with pytest.raises(UserError, match=r"^training\.optimizer\.lr: 'fast'; a finite number"):
        check_optimizer(partial(SGD, lr="fast"))
    with pytest.raises(UserError, match=r"^training\.optimizer\.lr: nan; a finite number"):
        check_optimizer(partial(SGD, lr=float("nan")))
    check_optimizer(SGD)


# Validation


class Scores:
    """A validation that gives two accuracies whose mean is the next of `means`; the network is in eval mode."""

    def __init__(self, *means: float) -> None:
        self.means = list(means)

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        assert not backbone.training
        mean = self.means.pop(0)
        return {"lfw": mean + 0.1, "agedb_30": mean - 0.1}


def test_validation_is_reported_and_the_best_epoch_kept(people: Path, finished: Path, tmp_path: Path) -> None:  # noqa: F811
    scores = Scores(0.6, 0.8, 0.7)
    metrics = run(people, tmp_path, hooks={"validate": scores})
    assert not scores.means
    assert [entry["validation"]["lfw"] for entry in metrics["history"]] == pytest.approx([0.7, 0.9, 0.8])
    assert metrics["best"] == {"epoch": 2, "mean": pytest.approx(0.8)}
    best, metadata = load_safetensors(tmp_path / "backbone_best.safetensors")
    assert metadata["provenance"]["steps"] == 8  # of 12
    assert not all(torch.equal(best[n], t) for n, t in load_safetensors(tmp_path / "backbone.safetensors")[0].items())
    # Looking changes nothing
    expected = flat(last_state(finished))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in flat(last_state(tmp_path)).items())


def test_validation_every_other_epoch_and_after_the_last(people: Path, tmp_path: Path) -> None:  # noqa: F811
    metrics = run(people, tmp_path, epochs_between_validation=2, hooks={"validate": Scores(0.6, 0.5)})
    assert [entry["epoch"] for entry in metrics["history"] if "validation" in entry] == [2, 3]


def test_a_plateau_lowers_the_rate_ends_the_run_and_survives_a_kill(people: Path, tmp_path: Path) -> None:  # noqa: F811
    def plateau() -> Plateau:
        return Plateau(patience=1, stop_patience=3)

    kwargs = {"epochs": 9, "steps_per_epoch": 1, "build": NormFree}
    scores = (0.5, 0.6, 0.6, 0.6, 0.6, 0.6)
    metrics = run(people, tmp_path / "whole", **kwargs, lr_schedule=plateau(), hooks={"validate": Scores(*scores)})
    assert [entry["lr"] for entry in metrics["history"]] == pytest.approx([0.05, 0.05, 0.05, 0.005, 5e-4])
    assert metrics["steps"] == 5 and metrics["best"]["epoch"] == 2
    hooks = {"validate": Scores(*scores), "watch": StopAfter(3)}
    with pytest.raises(SystemExit):
        run(people, tmp_path / "part", **kwargs, lr_schedule=plateau(), hooks=hooks, steps_between_logging=1)
    run(people, tmp_path / "part", **kwargs, lr_schedule=plateau(), hooks={"validate": Scores(*scores[3:])})
    same_bits(tmp_path / "part", tmp_path / "whole")
    # Started once more, it is finished: nothing is validated
    assert run(people, tmp_path / "whole", **kwargs, lr_schedule=plateau(), hooks={"validate": Scores()}) == metrics
    with pytest.raises(UserError, match=r"training\.lr_schedule: plateau goes by validation"):
        run(people, tmp_path / "none", lr_schedule=plateau())
