"""Runs that are killed, stopped, restarted and moved to other numbers of processes, as real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.test_training import overrides, weights  # noqa: F401 (a fixture)

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


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen) -> None:
    """Until the run has logged `steps` steps."""
    for _ in range(1200):
        file = folder / "metrics.jsonl"
        if file.is_file() and len(file.read_text().splitlines()) >= steps:
            return
        assert process.poll() is None, folder.with_suffix(".txt").read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(folder.with_suffix(".txt").read_text()[-3000:])


def workers(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "main.py" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.fixture
def arguments(overrides):  # noqa: F811
    """Enough short steps to be interrupted, a line of metrics each."""
    return [*overrides, "training.steps=60", "training.steps_between_logging=1", "training.checkpoint.steps_between=10",
            "training.steps_between_sampling=null"]  # fmt: skip


@pytest.fixture
def undisturbed(arguments, tmp_path):
    process = start(tmp_path / "whole", arguments)
    assert process.wait(timeout=240) == 0
    return tmp_path / "whole"


def test_sigterm_to_torchrun_and_to_a_worker(arguments, undisturbed, tmp_path):
    folder = tmp_path / "stopped"
    process = start(folder, arguments, restarts=1)
    wait_for_steps(folder, 3, process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    saved = weights(folder)[0]
    assert saved >= 3, "what was computed before the signal is saved"
    assert "SIGTERM: saved step" in folder.with_suffix(".txt").read_text()

    # the same command goes on; a worker that is told to stop costs nothing either
    process = start(folder, arguments, restarts=1)
    wait_for_steps(folder, saved + 3, process)
    os.kill(workers(process)[-1], signal.SIGTERM)
    assert process.wait(timeout=240) == 0, folder.with_suffix(".txt").read_text()[-3000:]
    text = folder.with_suffix(".txt").read_text()
    assert re.search(r"SIGTERM: saved step (\d+)", text) and text.count("going on from step") == 2
    assert losses(folder) == losses(undisturbed)
    for one, other in zip(weights(undisturbed)[1:], weights(folder)[1:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_random_kills_change_nothing(arguments, undisturbed, tmp_path):
    folder, rng = tmp_path / "killed", np.random.default_rng(0)
    process = start(folder, arguments, restarts=3)
    for _ in range(3):
        done = len((folder / "metrics.jsonl").read_text().splitlines()) if (folder / "metrics.jsonl").exists() else 0
        wait_for_steps(folder, done // 10 * 10 + int(rng.integers(3, 14)), process)
        os.kill(int(rng.choice(workers(process))), signal.SIGKILL)
        time.sleep(1)
    assert process.wait(timeout=240) == 0, folder.with_suffix(".txt").read_text()[-3000:]
    assert losses(folder) == losses(undisturbed)
    assert weights(folder)[0] == 60
    for one, other in zip(weights(undisturbed)[1:], weights(folder)[1:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_then_one_then_three(run_script, overrides, tmp_path):  # noqa: F811
    common = [*overrides, "training.optimizer.lr=1e-3", "training.steps_between_logging=1"]
    run_script("main.py", *common, "training.steps=6", "training.batch_size=12", f"output_dir={tmp_path / 'one'}")
    for steps, processes in ((2, 2), (4, 1), (6, 3)):
        batch = f"training.batch_size={12 // processes}"
        where = f"output_dir={tmp_path / 'many'}"
        run_script("main.py", *common, f"training.steps={steps}", batch, where, processes=processes)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
