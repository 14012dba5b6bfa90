"""Runs that are killed, stopped, restarted and moved to other numbers of processes, as real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.processes import start_script
from tests.test_training import overrides, run, weights  # noqa: F401 (a fixture)
from utils.interruption import STATUS

pytestmark = pytest.mark.slow


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start(folder: Path, arguments: list[str]) -> subprocess.Popen:
    """main.py under a torchrun that restarts it once, in a session of its own, its output in <folder>.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command += ["main.py", *arguments, f"output_dir={folder}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with folder.with_suffix(".txt").open("w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for(condition: Callable[[], bool], is_running: Callable[[], bool], output: Path) -> None:
    """Until `condition` holds; fails, with the end of the output, where the run ends before or nothing happens."""
    for _ in range(6000):
        if condition():
            return
        if not is_running():
            break
        time.sleep(0.02)
    raise AssertionError(output.read_text()[-3000:])


def steps(folder: Path) -> int:
    """The last step that the run has logged."""
    file = folder / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines() if line.endswith("}")] if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def workers(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "main.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def same_run(folder: Path, other: Path) -> None:
    """Both runs logged the same losses and ended with the same bits."""
    assert losses(folder) == losses(other)
    for one, two in zip(weights(folder), weights(other), strict=True):
        assert one == two if isinstance(one, int) else all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_is_stopped_and_killed_equals_one_that_is_not(overrides, run_script, tmp_path):  # noqa: F811
    arguments = [*overrides, "training.steps=48", "training.steps_between_logging=1",
                 "training.checkpoint.steps_between=6", "training.steps_between_sampling=null"]  # fmt: skip
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    run_script("main.py", *arguments, f"output_dir={whole}", processes=2)

    # SIGKILL to a worker, which torchrun answers with new ones; then SIGTERM to torchrun, as Slurm sends it
    agent, rng = start(folder, arguments), np.random.default_rng(0)
    output = folder.with_suffix(".txt")

    def wait(condition: Callable[[], bool]) -> None:
        wait_for(condition, lambda: agent.poll() is None, output)

    wait(lambda: steps(folder) > 6)
    os.kill(int(rng.choice(workers(agent))), signal.SIGKILL)
    wait(lambda: "going on from step" in output.read_text())
    begun = weights(folder)[0]
    assert begun >= 6
    wait(lambda: steps(folder) >= begun + 2)
    os.kill(agent.pid, signal.SIGTERM)
    assert agent.wait(timeout=60) != 0
    assert "SIGTERM: saved step" in output.read_text()
    saved = weights(folder)[0]
    assert begun + 2 <= saved < 48, "what was computed before the signal is saved"

    # The same command goes on; then SIGTERM to one of the workers, and once more
    output = tmp_path / "again.txt"
    ranks = start_script("main.py", [*arguments, f"output_dir={folder}"], 2, output)
    wait_for(lambda: steps(folder) >= saved + 2, lambda: all(rank.is_alive() for rank in ranks), output)
    os.kill(ranks[int(rng.integers(2))].pid, signal.SIGTERM)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [STATUS, STATUS]
    run_script("main.py", *arguments, f"output_dir={folder}", processes=2)
    same_run(folder, whole)


def test_two_processes_then_one_then_three(compose, run_script, overrides, tmp_path):  # noqa: F811
    common = [*overrides, "training.optimizer.lr=1e-3", "training.steps_between_logging=1"]
    run(compose("train_config", *common, "training.batch_size=12", f"output_dir={tmp_path / 'one'}"))
    many = [*common, f"output_dir={tmp_path / 'many'}"]
    run_script("main.py", *many, "training.steps=2", "training.batch_size=6", processes=2)
    run(compose("train_config", *many, "training.steps=4", "training.batch_size=12"))
    run_script("main.py", *many, "training.steps=6", "training.batch_size=4", processes=3)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
