"""Scripts of this project as processes that start fast: a server imports everything once, and forks."""

import multiprocessing
import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["sample", "tests.processes"])


def start_samplers(arguments: list[str], world: int, output: Path) -> list[BaseProcess]:
    """sample.py in `world` processes as a launcher would start them; what they say goes to the file `output`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = [
        _context.Process(target=_run_sampler, args=(arguments, rank, world, port, output)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def _run_sampler(arguments: list[str], rank: int, world: int, port: int, output: Path) -> None:
    import torch

    import sample

    torch.set_num_threads(1)
    said = os.open(output, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if world > 1:
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    sys.argv = ["sample.py", *arguments]
    sample.main()
