"""Functions and scripts in several gloo processes, forked from one server that has imported what they need."""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.conftest import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
SCRIPTS = ["main", "train_autoencoder", "sample", "encode", "recognition.train", "recognition.test"]
LATE = ["torch._dynamo", "torch.utils.tensorboard", "matplotlib.backends.backend_agg"]  # what they import as they run
CONTEXT.set_forkserver_preload(["tests.processes", *SCRIPTS, *LATE])


def together(processes: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)`, of a module, returns on each of so many ranks; `folder` is theirs to exchange it."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = _start(_work, [(rank, processes, folder, function, args) for rank in range(processes)])
    for process in ranks:
        process.join(timeout=300)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * processes, f"{function.__name__} ended with {codes}"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _start(target: Callable[..., None], arguments: list[tuple]) -> list[BaseProcess]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # for the server, which the first call starts
    processes = [CONTEXT.Process(target=target, args=some) for some in arguments]
    try:
        for process in processes:
            process.start()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return processes


def _work(rank: int, processes: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    result = function(*args)
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


def start_script(
    script: str, arguments: Sequence[str], world: int, output: Path, errors: Path | None = None
) -> list[BaseProcess]:
    """A script (sample.py, recognition.train) in `world` processes, with the variables that a launcher sets.

    What they say goes to the file `output`; standard error to `errors`, where one is given.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    files = (output, errors or output)
    return _start(_run_script, [(script, arguments, rank, world, port, files) for rank in range(world)])


def _run_script(
    script: str, arguments: Sequence[str], rank: int, world: int, port: int, files: tuple[Path, Path]
) -> None:
    torch.set_num_threads(1)
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY), descriptor)
    if world > 1:
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        sys.modules.pop(script, None)  # the server has it: runpy would warn
        runpy.run_module(script, run_name="__main__", alter_sys=True)
