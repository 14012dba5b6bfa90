"""What a checkpoint of the recogniser's training holds, and the way back from it.

A checkpoint is that of one process with the whole classifier, whatever the number of processes that wrote it: weights
and the optimiser's state under the parameters' names, sums over the global batch. So any number can go on from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recognition.lr_schedules import LRSchedule
from recognition.partial_fc import Classified, PartialFC
from utils import distributed
from utils.checkpoint import strict_load
from utils.config import UserError, differences
from utils.logging import get_logger

log = get_logger(__name__)

KIND = "recognition_training"
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
CLASSIFIER = "head.weight"  # the name of the classifier's weight in the optimiser's state


def parameter_groups(modules: Iterable[nn.Module], decay_batch_norm: bool) -> list[dict[str, Any]]:
    """Trainable parameters in two groups for the optimiser: with its own weight decay, and (batch norms) without."""
    modules = list(modules)
    norms = {
        id(p)
        for module in modules
        for m in module.modules()
        if isinstance(m, BATCH_NORMS) and not decay_batch_norm
        for p in m.parameters()
    }
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) not in norms]},
        {"params": [p for p in trainable if id(p) in norms], "weight_decay": 0.0},
    ]


class RunningStatistics:
    """The running statistics of batch norms and heads, which a step that is no number would spoil for good."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._buffers = [buffer for module in modules for buffer in module.buffers()]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Take note of them, before a step."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def put_back(self) -> None:
        """Make them what they were when `remember` was called."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)


class Tally:
    """Mean loss and training accuracy over steps, kept on the device until somebody asks."""

    def __init__(self, sums: list[float], device: torch.device) -> None:
        """`sums`: of the loss over images, of hits, of images, as `tolist` gives them."""
        self._sums = torch.tensor(sums, dtype=torch.float64, device=device)

    def add(self, result: Classified) -> None:
        """Count one step, by its global batch."""
        count = float(len(result.hits))
        self._sums += torch.stack([result.loss * count, result.hits.sum(), torch.full_like(result.loss, count)])

    def tolist(self) -> list[float]:
        """The three sums; see `__init__`."""
        return self._sums.tolist()

    def means(self) -> tuple[float, float] | tuple[None, None]:
        """Loss and accuracy; None where no step was counted."""
        loss, hits, images = self.tolist()
        return (loss / images, hits / images) if images else (None, None)

    def clear(self) -> None:
        """Begin anew."""
        self._sums.zero_()


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry an epoch
    best: dict[str, Any] | None = None  # epoch and mean of the best validation
    seconds: float = 0.0
    epoch_sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # of the Tally of this epoch
    logging_sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # of the one since the last report
    skipped_steps: int = 0


@dataclass
class Trainee:
    """The objects that training changes."""

    backbone: nn.Module
    classifier: PartialFC
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    lr_schedule: LRSchedule

    def state(self) -> dict[str, Any]:
        """All of it, on rank 0 with the whole classifier; all processes call it together."""
        names = {parameter: name for name, parameter in self._parameters().items()}
        optimizer_state = {names[p]: dict(state) for p, state in self.optimizer.state.items()}
        if self.classifier.head.weight in self.optimizer.state:
            optimizer_state[CLASSIFIER] = self.classifier.whole_state(self.optimizer)
        return {
            "backbone": self.backbone.state_dict(),
            "head": {**self.classifier.head.state_dict(), "weight": self.classifier.whole_weight()},
            "optimizer": optimizer_state,
            "optimizer_class": type(self.optimizer).__name__,
            "scaler": self.scaler.state_dict(),
            "lr_schedule": self.lr_schedule.state_dict(),
        }

    def load(self, state: dict[str, Any], what: str) -> None:
        """Go on from `state`, of any number of processes; `what` names it. Raises UserError where it does not fit."""
        strict_load(self.backbone, state["backbone"], what)
        part = self.classifier.part
        strict_load(self.classifier.head, {name: part(tensor) for name, tensor in state["head"].items()}, what)
        # States by the numbers that torch gives parameters; rates and decay are those of this run's settings
        fresh = self.optimizer.state_dict()
        names = {parameter: name for name, parameter in self._parameters().items()}
        ordered = [names[p] for group in self.optimizer.param_groups for p in group["params"]]
        states = {number: state["optimizer"].get(name) for number, name in enumerate(ordered)}
        if CLASSIFIER in state["optimizer"]:
            whole = state["optimizer"][CLASSIFIER]
            states[ordered.index(CLASSIFIER)] = {
                name: part(value) if isinstance(value, Tensor) else value for name, value in whole.items()
            }
        fresh["state"] = {number: values for number, values in states.items() if values is not None}
        self.optimizer.load_state_dict(fresh)
        if state["scaler"]:  # empty in a checkpoint of a run without fp16
            self.scaler.load_state_dict(state["scaler"])
        if state["lr_schedule"]:  # empty but for a plateau
            self.lr_schedule.load_state_dict(state["lr_schedule"])

    def _parameters(self) -> dict[str, nn.Parameter]:
        named = {f"backbone.{name}": parameter for name, parameter in self.backbone.named_parameters()}
        return {**named, CLASSIFIER: self.classifier.head.weight}


def checkpoint_state(
    trainee: Trainee, progress: Progress, identities: list[str], images_per_step: int, config: dict[str, Any]
) -> dict[str, Any]:
    """What the checkpoint after `progress.step` holds; all processes call it together, rank 0's is whole."""
    return {
        "kind": KIND,
        **trainee.state(),
        "progress": asdict(progress),
        "identities": identities,
        "images_per_step": images_per_step,
        "config": config,
    }


def restore(
    state: dict[str, Any],
    trainee: Trainee,
    identities: list[str],
    images_per_step: int,
    config: dict[str, Any],
    output_dir: Path,
) -> Progress:
    """Put a checkpoint's state into `trainee`; how far the run was.

    Raises UserError for a checkpoint of another run; warns of settings that have changed since it was written.
    """
    if state.get("kind") != KIND or "progress" not in state:
        raise UserError(f"output_dir: {output_dir} holds checkpoints of another kind of training; give another folder")
    if state["identities"] != identities:
        raise UserError(
            f"output_dir: {output_dir} holds a run on {len(state['identities'])} identities, not on these "
            f"{len(identities)}; give another folder, or the same dataset"
        )
    held, processes = state["images_per_step"], distributed.world_size()
    if held != images_per_step:
        raise UserError(
            f"training.batch_size: {output_dir} holds a run of {held} images a step over all processes, not "
            f"{images_per_step}; with {processes} processes take training.batch_size={held / processes:g}"
        )
    optimizer, optimizer_then = type(trainee.optimizer).__name__, state["optimizer_class"]
    if optimizer != optimizer_then:
        raise UserError(
            f"training.optimizer: {optimizer}, but {output_dir} holds a run with {optimizer_then}; give another folder"
        )
    trainee.load(state, f"output_dir: the checkpoint in {output_dir}")
    changed = sorted(differences(state["config"], config))
    if changed:
        log.warning("going on with other settings than the checkpoint's: %s", ", ".join(changed))
    return Progress(**state["progress"])
