"""The ROC of every network on every set, in one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from utils.checkpoint import write_atomically, write_text

# network => set => {"far": [...], "tar": [...], "label": what the legend adds}
Curves = Mapping[str, Mapping[str, Mapping[str, Any]]]
COLUMNS = 3  # of panels


def write_curves(curves: Curves, path: Path) -> None:
    """Keep the points, so that a later test can draw them beside its own."""
    write_text(path, json.dumps(curves) + "\n")


def plot_roc(curves: Curves, path: str | Path) -> None:
    """Write a PNG, false accepts on a logarithmic axis down to one impostor pair.

    One network: all sets in one panel. Several: a panel a set.
    """
    names = list(dict.fromkeys(name for sets in curves.values() for name in sets))
    panels = [[name] for name in names] if len(curves) > 1 else [names]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 4.5 * rows), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        lowest = 1.0
        for model, sets in curves.items():
            for name in (name for name in panel if name in sets):
                curve = sets[name]
                label = model if len(panel) == 1 else name
                axes.step(curve["far"], curve["tar"], where="post", label=f"{label} ({curve['label']})")
                lowest = min([lowest, *(far for far in curve["far"] if far > 0)])
        title = panel[0] if len(panel) == 1 else next(iter(curves))
        axes.set(xscale="log", xlim=(min(lowest, 0.5), 1), ylim=(0, 1), title=title)
        axes.set(xlabel="false accept rate", ylabel="true accept rate")
        axes.grid(alpha=0.3, which="both")
        axes.legend(loc="lower right", fontsize="small")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
