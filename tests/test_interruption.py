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
from tests.test_training import overrides, run, weights  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start(folder: Path, arguments: list[str], processes: int = 2, restarts: int = 0) -> subprocess.Popen:
    """main.py under torchrun, in a session of its own, its output in <folder>.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [f"--max-restarts={restarts}", "main.py", *arguments, f"output_dir={folder}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with folder.with_suffix(".txt").open("w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for(condition: Callable[[], bool], folder: Path, process: subprocess.Popen) -> None:
    """Until `condition` holds; fails, with the end of the output, where the run ends before or nothing happens."""
    for _ in range(6000):
        if condition():
            return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise AssertionError(folder.with_suffix(".txt").read_text()[-3000:])


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


def test_a_run_that_is_stopped_and_killed_equals_one_that_is_not(overrides, tmp_path):  # noqa: F811
    arguments = [*overrides, "training.steps=40", "training.steps_between_logging=1",
                 "training.checkpoint.steps_between=8", "training.steps_between_sampling=null"]  # fmt: skip
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    assert start(whole, arguments).wait(timeout=600) == 0

    # SIGTERM to torchrun, as Slurm sends it
    process = start(folder, arguments)
    wait_for(lambda: steps(folder) >= 3, folder, process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    saved = weights(folder)[0]
    assert 3 <= saved < 40, "what was computed before the signal is saved"
    assert "SIGTERM: saved step" in folder.with_suffix(".txt").read_text()

    # The same command goes on; then SIGTERM to a worker, and SIGKILL
    process, rng = start(folder, arguments, restarts=2), np.random.default_rng(0)
    output = folder.with_suffix(".txt")
    for number, sent in enumerate((signal.SIGTERM, signal.SIGKILL), start=1):
        wait_for(lambda number=number: output.read_text().count("going on from step") == number, folder, process)
        goal = weights(folder)[0] + int(rng.integers(2, 7))
        wait_for(lambda goal=goal: steps(folder) >= goal, folder, process)
        os.kill(int(rng.choice(workers(process))), sent)
    assert process.wait(timeout=600) == 0, output.read_text()[-3000:]
    assert output.read_text().count("going on from step") == 3
    same_run(folder, whole)


def test_two_processes_then_one_then_three(compose, run_script, overrides, tmp_path):  # noqa: F811
    common = [*overrides, "training.optimizer.lr=1e-3", "training.steps_between_logging=1"]
    run(compose("train_config", *common, "training.batch_size=12", f"output_dir={tmp_path / 'one'}"))
    many = [*common, f"output_dir={tmp_path / 'many'}"]
    run_script("main.py", *many, "training.steps=2", "training.batch_size=6", processes=2)
    run(compose("train_config", *many, "training.steps=4", "training.batch_size=12"))
    run_script("main.py", *many, "training.steps=6", "training.batch_size=4", processes=3)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
