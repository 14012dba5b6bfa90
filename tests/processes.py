"""A function in several gloo processes at once, forked from one server that has imported what they need."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.conftest import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.processes", "recognition.training_loop"])


def together(processes: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)`, of a module, returns on each of so many ranks; `folder` is theirs to exchange it."""
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # for the server, which the first call starts
    ranks = [CONTEXT.Process(target=_work, args=(rank, processes, folder, function, args)) for rank in range(processes)]
    try:
        for process in ranks:
            process.start()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    for process in ranks:
        process.join(timeout=300)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * processes, f"{function.__name__} ended with {codes}"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _work(rank: int, processes: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    result = function(*args)
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()
