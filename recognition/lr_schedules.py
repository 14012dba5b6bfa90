"""Learning rates over the epochs of a recogniser's training: factors of the optimiser's rate, each with a warm-up.

A factor is a function of the step alone, but for `Plateau`, which goes by validation and keeps a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from utils.config import UserError
from utils.logging import get_logger

log = get_logger(__name__)


@dataclass
class LRSchedule:
    """The rate itself, after a linear rise from 0 over `warmup_epochs`."""

    warmup_epochs: float = 0.0
    needs_validation: ClassVar[bool] = False  # whether `observe` must be told how good the network is

    def __post_init__(self) -> None:
        check(self, "warmup_epochs", lambda warmup_epochs: warmup_epochs >= 0, "it is at least 0")

    @property
    def stops(self) -> bool:
        """Whether the run should end before its last epoch."""
        return False

    def at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """What the optimiser's rate is multiplied by in 0-based `step` of `epochs * steps_per_epoch`."""
        warmup = self.warmup_epochs * steps_per_epoch
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        rest = max(epochs * steps_per_epoch - warmup, 1.0)
        return rise * self.after_warmup(step // steps_per_epoch, min(1.0, max(0.0, step - warmup) / rest))

    def check_epochs(self, epochs: int) -> None:
        """UserError for a warm-up that a run of `epochs` epochs does not end; a warning for what it does not reach."""
        if self.warmup_epochs > epochs:
            raise UserError(
                f"training.lr_schedule.warmup_epochs: {self.warmup_epochs:g}, but training.epochs is {epochs}: "
                "the rate would never be reached"
            )

    def after_warmup(self, epoch: int, share: float) -> float:
        """The factor in 0-based `epoch`, of which `share` in [0, 1] of the steps after the warm-up are done."""
        return 1.0

    def observe(self, epoch: int, score: float) -> None:
        """The network's `score` (more is better) after `epoch` epochs."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""


@dataclass
class Step(LRSchedule):
    """Times `factor` from each of `milestones`, 0-based epochs, on."""

    milestones: list[int] = field(default_factory=lambda: [22, 28, 32])
    factor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            "milestones",
            lambda epochs: list(epochs) == sorted(set(epochs)) and all(epoch >= 0 for epoch in epochs),
            "rising epochs from 0 on are wanted",
        )
        check(self, "factor", lambda factor: factor > 0, "it is above 0")

    def check_epochs(self, epochs: int) -> None:
        super().check_epochs(epochs)
        late = [str(milestone) for milestone in self.milestones if milestone >= epochs]
        if late:
            log.warning(
                "training.lr_schedule.milestones: %s not reached, training.epochs is %d (the first epoch is 0)",
                *(", ".join(late), epochs),
            )

    def after_warmup(self, epoch: int, share: float) -> float:
        return self.factor ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass
class Cosine(LRSchedule):
    """A half cosine from 1 down to `final_share` at the last step (SGDR without restarts, arXiv 1608.03983)."""

    final_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "final_share", lambda final_share: 0 <= final_share <= 1, "it is a share from 0 to 1")

    def after_warmup(self, epoch: int, share: float) -> float:
        return self.final_share + (1.0 - self.final_share) * 0.5 * (1.0 + math.cos(math.pi * share))


@dataclass
class Polynomial(LRSchedule):
    """(1 - share done) to the power `power`: with 2 the schedule of insightface's recipes."""

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "power", lambda power: power > 0, "it is above 0")

    def after_warmup(self, epoch: int, share: float) -> float:
        return (1.0 - share) ** self.power


@dataclass
class Plateau(LRSchedule):
    """Times `factor` when validation has not risen for `patience` epochs, and the end after `stop_patience`.

    IDiff-Face's recipe (ICCV 2023): 4 and 6 epochs, by the mean accuracy on the benchmarks it is then tested on.
    """

    factor: float = 0.1
    patience: int = 4
    stop_patience: int | None = 6  # None: the run goes on to its last epoch
    needs_validation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "factor", lambda factor: 0 < factor < 1, "it is between 0 and 1")
        check(self, "patience", lambda patience: patience >= 1, "it is at least 1")
        check(
            self,
            "stop_patience",
            lambda stop_patience: stop_patience is None or stop_patience >= 1,
            "it is at least 1, or null",
        )
        self._state = PlateauState()

    @property
    def stops(self) -> bool:
        state = self._state
        return self.stop_patience is not None and state.epoch - state.best_epoch >= self.stop_patience

    def after_warmup(self, epoch: int, share: float) -> float:
        return self.factor**self._state.drops

    def observe(self, epoch: int, score: float) -> None:
        state = self._state
        state.epoch = epoch
        if state.best is None or score > state.best:
            state.best, state.best_epoch, state.since = score, epoch, epoch
        elif epoch - state.since >= self.patience:
            state.drops, state.since = state.drops + 1, epoch

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = PlateauState(**state)


@dataclass
class PlateauState:
    """Where a `Plateau` stands; epochs count from 1 on."""

    best: float | None = None
    best_epoch: int = 0
    since: int = 0  # the epoch of the last rise or drop
    epoch: int = 0  # the last one that was observed
    drops: int = 0


def check(schedule: LRSchedule, name: str, valid: Callable[[Any], bool], wanted: str) -> None:
    """UserError naming `training.lr_schedule.<name>` unless `valid` is true of its value, whatever its type."""
    value = getattr(schedule, name)
    try:
        good = valid(value)
    except TypeError:  # a comparison with what is no number
        good = False
    if not good:
        raise UserError(f"training.lr_schedule.{name}: {value!r}; {wanted}")


def check_validated(lr_schedule: LRSchedule, is_validated: bool) -> None:
    """UserError where `lr_schedule` goes by a validation that the run does not have."""
    if lr_schedule.needs_validation and not is_validated:
        raise UserError(
            "training.lr_schedule: plateau goes by validation, and no pairs are named; give "
            "validation.benchmarks_dir=FOLDER, or validation.pairs_file=LIST with validation.root=FOLDER"
        )
