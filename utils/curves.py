"""The curves of a run as one picture in its folder, so that a look is enough."""

import json
import time
from functools import partial
from pathlib import Path

import numpy as np

from utils.checkpoint import write_atomically
from utils.guards import write_or_warn

CURVES = "training.png"  # in the run folder
SECONDS_BETWEEN = 60.0  # a drawing takes two, and the step waits
COLUMNS = 2
SMOOTHING = 0.03  # share of all points that the dark line averages over


class Curves:
    """The picture of a run that goes on: drawn anew at most every SECONDS_BETWEEN, and at the end."""

    def __init__(self, metrics_file: str | Path, output_dir: str | Path):
        self.metrics_file, self.picture = Path(metrics_file), Path(output_dir) / CURVES
        self._drawn = time.monotonic()

    def update(self, *, last: bool) -> None:
        """Draw what `metrics_file` holds now, if it is time or the run ends; a full disk costs only the picture."""
        if last or time.monotonic() - self._drawn >= SECONDS_BETWEEN:
            write_or_warn("the curves", partial(plot_metrics, self.metrics_file, self.picture))
            self._drawn = time.monotonic()


def plot_metrics(metrics_file: str | Path, picture: str | Path) -> None:
    """Write a PNG with one panel for each number in `metrics_file` (lines of JSON, each with its `step`).

    Losses are on a logarithmic axis; behind a moving average stand the points themselves. Nothing is written where
    there are fewer than two lines.
    """
    if not Path(metrics_file).is_file():
        return
    lines = [json.loads(line) for line in Path(metrics_file).read_text(encoding="utf-8").splitlines()]
    names = list(dict.fromkeys(name for line in lines for name in line if name != "step"))
    if len(lines) < 2 or not names:
        return
    from matplotlib.figure import Figure  # here: it takes a tenth of the start of every training process

    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(5.2 * COLUMNS, 2.6 * rows), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(rows, COLUMNS, squeeze=False).flat, names, strict=False):
        points = np.array([(line["step"], line[name]) for line in lines if name in line], dtype=float)  # (n, 2)
        steps, values = points.T
        axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(steps, _moving_average(values), color="tab:blue", linewidth=1.5)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if ("loss" in name or name == "l1") and (values[np.isfinite(values)] > 0).all():
            axes.set_yscale("log")
    for axes in figure.axes[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=9)
    write_atomically(picture, lambda path: figure.savefig(path, format="png"))


def _moving_average(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those before it, over SMOOTHING of them; values that are no numbers do not count."""
    width = max(1, round(SMOOTHING * len(values)))
    finite = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(finite, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    first = np.maximum(np.arange(len(values)) + 1 - width, 0)
    last = np.arange(len(values)) + 1
    return (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)
