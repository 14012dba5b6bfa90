"""SIGTERM as a wish that long work can meet: finish the step, save, leave with a status that is not 0.

Slurm, spot machines and torchrun (to its workers) announce the end of a run by SIGTERM, with seconds to spare.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from utils import distributed
from utils.logging import get_logger

log = get_logger(__name__)

STATUS = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended; torchrun restarts on it


class StopRequest:
    """While entered, SIGTERM is noted instead of obeyed; `agreed` tells whether any process has received it.

    with StopRequest() as stop:
        for step in ...:
            ...
            if stop.agreed():
                save()
                stop.leave(step)
    """

    def __init__(self) -> None:
        self._received = False
        self._previous = None
        self._group = None

    def __enter__(self) -> "StopRequest":
        self._previous = signal.signal(signal.SIGTERM, self._note)
        if distributed.world_size() > 1:
            # over gloo even where gradients go over nccl: the answer must not wait for the GPU's queue
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def agreed(self) -> bool:
        """Whether a SIGTERM has come to any process; the same answer on all of them, which call it together."""
        if self._group is None:
            return self._received
        flag = torch.tensor(int(self._received), dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def leave(self, step: int) -> None:
        """End the process; the same command goes on from `step`."""
        log.warning("SIGTERM: saved step %d, leaving; the same command goes on from there", step)
        sys.exit(STATUS)


def leave_stopping_to_the_parent(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: SIGTERM to a whole process group (`timeout`, Slurm) is the parent's to answer.

    A worker that died of it would end the parent before it has saved. Workers end with their parent, however it ends.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Stopped(BaseException):
    """SIGTERM has come; see `stoppable`."""


@contextmanager
def stoppable() -> Iterator[None]:
    """While entered, the first SIGTERM raises Stopped in the main thread, as Ctrl-C raises KeyboardInterrupt.

    For work that may end anywhere because what is done is on the disk, and whose processes need not end together.
    Further signals are passed over, so that what comes next can leave in peace.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopped

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, previous)
