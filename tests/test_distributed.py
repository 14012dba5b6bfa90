"""Processes that Slurm starts find one another without torchrun; devices by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils import distributed
from utils.config import UserError

ROOT = Path(__file__).parent.parent
STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_LOCALID": "0",
}


def scontrol(folder: Path, answer: str) -> str:
    """A PATH on which `scontrol` gives `answer`."""
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_tasks_of_a_step_join(tmp_path):
    code = "from utils import distributed as d; d.init(); print(d.all_gather_objects((d.rank(), d.local_rank())))"
    path = scontrol(tmp_path, 'test "$3" = "node[1-2]" && echo localhost && echo node2')
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **STEP, "SLURM_PROCID": str(number), "PATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    assert [task.communicate(timeout=120)[0].strip() for task in tasks] == ["[(0, 0), (1, 0)]"] * 2


@pytest.mark.parametrize("more", [{"SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0"}])
def test_one_task_or_torchrun_is_left_alone(monkeypatch, more):
    for name, value in {**STEP, "SLURM_PROCID": "0", **more}.items():
        monkeypatch.setenv(name, value)
    distributed.init()
    assert distributed.world_size() == 1 and "MASTER_PORT" not in os.environ


def test_a_step_without_scontrol_says_so(monkeypatch, tmp_path):
    for name, value in {**STEP, "SLURM_PROCID": "0", "PATH": scontrol(tmp_path, "exit 1")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"SLURM_STEP_NODELIST: scontrol show hostnames .* failed"):
        distributed.init()


def test_devices_that_torch_does_not_know():
    assert distributed.device("cpu").type == "cpu"
    with pytest.raises(UserError, match=r"^device: 'gpu'; auto, cpu or cuda is wanted$"):
        distributed.device("gpu")
