"""What watches over a training run: steps that are no numbers, a loss that does not move, a disk that is full."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from utils import distributed
from utils.config import UserError
from utils.logging import get_logger

log = get_logger(__name__)

SHOWN_FILES = 8
STANDSTILL = 0.98  # a loss above this share of its first value has not moved


class FiniteSteps:
    """Counts the steps whose gradient is not finite; they are skipped, and after `limit` in a row the run stops.

    `skipped` is the number of all skipped steps, for the log and for checkpoints.
    """

    def __init__(self, limit: int, skipped: int = 0) -> None:
        self.limit, self.skipped = limit, skipped
        self._in_a_row = 0

    def take(self, norm: Tensor, step: int, files: Callable[[], Sequence[str]]) -> bool:
        """Whether step `step` (from 1 on) is to be taken, given the norm of its gradient, the same on all ranks.

        `files`: names of this rank's images in the batch, asked for when the run stops. Raises UserError then.
        """
        if bool(torch.isfinite(norm)):
            self._in_a_row = 0
            return True
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row == 1:
            log.warning("step %d: the gradient is not finite; the step is skipped (%d so far)", step, self.skipped)
        if self._in_a_row >= self.limit:
            names = [name for part in distributed.all_gather_objects(list(files())) for name in part]
            shown = ", ".join(names[:SHOWN_FILES]) + (
                f" and {len(names) - SHOWN_FILES} more" * (len(names) > SHOWN_FILES)
            )
            raise UserError(
                f"training.max_bad_steps: {self._in_a_row} steps in a row up to step {step} had a gradient that is not "
                f"finite; the last batch is {shown}; look at these files, try a smaller learning rate, "
                "training.gradient_clip=1 or training.precision=bf16; the last checkpoint is kept"
            )
        return False


class MovingLoss:
    """Says once when the loss of a run stands where it began."""

    def __init__(self, patience: int) -> None:
        """`patience`: steps from the first report on after which the loss should have moved."""
        self.patience = patience
        self._first: tuple[int, float] | None = None
        self._silent = False

    def look(self, loss: float, step: int) -> None:
        """Compare a mean `loss` over the last steps with the first one reported."""
        if self._first is None:
            self._first = (step, loss)
        elif not self._silent and step - self._first[0] >= self.patience:
            self._silent = True
            if loss > STANDSTILL * self._first[1]:
                log.warning(
                    "the loss has not moved: %.4g at step %d, %.4g at step %d; look at the learning rate, at the "
                    "images and at training.gradient_clip",
                    *(self._first[1], self._first[0], loss, step),
                )


def write_or_warn(what: str, write: Callable[[], object]) -> bool:
    """Run `write`; a full or broken disk costs `what`, not the run. Returns whether it was written."""
    try:
        write()
    except OSError as error:
        log.warning("%s cannot be written: %s; the run goes on", what, _reason(error))
        return False
    return True


def save_or_warn(save: Callable[[], object], *, last: bool) -> bool:
    """Write a checkpoint by `save`, which leaves the older ones alone when it fails; the next interval tries again.

    Returns whether it was written. Raises UserError where it is the `last` one and cannot be.
    """
    if not last:
        return write_or_warn("this checkpoint (those before it stay)", save)
    try:
        save()
    except OSError as error:
        raise UserError(
            f"output_dir: the last checkpoint cannot be written: {_reason(error)}; make room and give the same command "
            "again, which goes on from the checkpoint before"
        ) from error
    return True


@contextmanager
def needs_disk(key: str) -> Iterator[None]:
    """A file that cannot be read or written inside the block is a UserError that names `key` and the file.

    For work that goes on where it was: a full or read-only disk loses nothing of it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{key}: {_reason(error)}; what is there is kept, and the same command goes on from it when this is mended"
        ) from error


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return f"{text} ({error.filename})" if error.filename else text
