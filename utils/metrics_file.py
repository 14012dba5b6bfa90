"""What a run measured, a line a step, for plots and reports."""

import json
from pathlib import Path

from utils import distributed
from utils.checkpoint import write_text
from utils.logging import ScalarLogger


class MetricsFile:
    """`metrics.jsonl`: one line a logged step; on resuming, lines past the checkpoint are dropped."""

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        if distributed.is_main() and path.is_file():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= first_step]
            write_text(path, "".join(line + "\n" for line in lines))

    def append(self, values: dict[str, float]) -> None:
        """Add one line, on rank 0."""
        if distributed.is_main():
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def report(scalars: ScalarLogger, file: MetricsFile, step: int, values: dict[str, float]) -> None:
    """One logged step of a training run, to all who keep it."""
    scalars.scalars({f"train/{name}": value for name, value in values.items()}, step)
    file.append({"step": step, **values})


def _step(line: str) -> float:
    """The step that a line is about; infinite for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")
