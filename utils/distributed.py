"""One process or many: the few collective operations that the project needs, all no-ops in a single process."""

import contextlib
import functools
import hashlib
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError

T = TypeVar("T")
SLURM_PORTS = range(20000, 30000)  # below the ports that systems hand out themselves; one a step
LOST = "another process of this run has ended; what is done is kept, and the same command goes on from there"
TIMEOUT = timedelta(minutes=60)  # one rank may encode or save while the others wait


def init() -> None:
    """Join the process group when torchrun or Slurm's srun started this process: nccl with CUDA, else gloo."""
    _take_slurm_environment()
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, **_store_of_this_attempt())


def _take_slurm_environment() -> None:
    """Give a task of `srun` the variables that torchrun would set; one task a GPU, ranks as Slurm numbers its tasks.

    Only inside a step of several tasks: a batch script that starts torchrun itself is left alone. UserError where the
    step's first machine cannot be told.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in os.environ or tasks == "1":
        return
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"SLURM_STEP_NODELIST: {shlex.join(command)} failed ({error}); start with torchrun") from error
    step = int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
    variables = {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": os.environ["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0].partition(",")[0],
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(SLURM_PORTS.start + step % len(SLURM_PORTS)),
    }
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _store_of_this_attempt() -> dict[str, Any]:
    """Arguments of init_process_group that keep a restart by `torchrun --max-restarts` apart from the attempt before.

    torchrun's store outlives its workers, and so do the addresses that they left in it: a restarted worker that reads
    one before its owner has come back waits for a process that is gone. On one machine the number of the attempt is a
    prefix that all ranks know; across machines each agent counts its own restarts, so torch's default stays.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, int(os.environ["WORLD_SIZE"]), is_master=False, timeout=TIMEOUT)
    prefixed = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": prefixed, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 .. world_size - 1."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its own machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes and reports."""
    return rank() == 0


def device(name: str = "auto") -> torch.device:
    """`auto`: this rank's GPU where there is one, else the CPU; any other name is taken as it is."""
    if name != "auto":
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device: {name}, but torch sees no GPU here; give auto or cpu")
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise UserError(f"device: {name!r}; auto, cpu or cuda is wanted") from error
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def no_sync(net: nn.Module, waits: bool) -> contextlib.AbstractContextManager:
    """While `waits`, gradients of `net` add up without being exchanged, as for all parts of a batch but the last."""
    return net.no_sync() if waits and isinstance(net, DistributedDataParallel) else contextlib.nullcontext()


def wait_for_all(idle: Callable[[], object], seconds: float = 0.2) -> None:
    """Wait until every process is here, calling `idle` every so many seconds; signals are seen while it waits.

    Raises UserError where another process has ended.
    """
    if not dist.is_initialized():
        return
    work = dist.barrier(async_op=True)
    while not work.is_completed():
        idle()
        time.sleep(seconds)
    try:
        work.wait()
    except RuntimeError as error:  # gloo: the connection is closed
        raise UserError(LOST) from error


@functools.cache
def _local_store() -> dist.Store:
    return dist.HashStore()


class SharedCounter:
    """A whole number, 0 at first, that every process adds to without waiting for the others.

    It lives in torch.distributed's store, which adds atomically; safe in threads. Counters of one name are one.
    """

    def __init__(self, name: str) -> None:
        # the store that the processes met through; torch has no public name for it
        self._store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else _local_store()
        self._name = name

    def add(self, amount: int = 0) -> int:
        """Add; the number after it. UserError where the process that keeps the store has ended."""
        try:
            return self._store.add(self._name, amount)
        except dist.DistError as error:
            raise UserError(LOST) from error


def deal(items: Sequence[T], counter: SharedCounter) -> Iterator[T]:
    """Hand out `items`, the same list on every process, one at a time and in order to whichever process asks next."""
    while (number := counter.add(1)) <= len(items):
        yield items[number - 1]


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of `tensor` over processes, a new tensor of the same shape."""
    if not dist.is_initialized():
        return tensor.detach().clone()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def all_gather_objects(obj: Any) -> list[Any]:
    """Every process's `obj`, in the order of ranks."""
    if not dist.is_initialized():
        return [obj]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: Any) -> Any:
    """Rank 0's `obj`, on every rank."""
    if not dist.is_initialized():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; a user's mistake that rank 0 finds ends every rank."""
    outcome: T | UserError | None = None
    if is_main():
        try:
            outcome = work()
        except UserError as error:
            outcome = error
    outcome = broadcast_object(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def share(items: Sequence[Any]) -> Sequence[Any]:
    """This rank's part of `items`: every world_size-th one, from the rank's own number on."""
    return items[rank() :: world_size()]


def seed_for(*numbers: int | str) -> int:
    """A 63-bit seed that depends on all of `numbers` and on nothing else (not on the rank, not on Python's hashes)."""
    digest = hashlib.sha256("/".join(str(n) for n in numbers).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
