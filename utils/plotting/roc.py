"""The ROC of every network, or every data set, in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from utils.plotting.canvas import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# network => set => {"far": [...], "tar": [...], "label": what the legend adds}
Curves = Mapping[str, Mapping[str, Mapping[str, Any]]]
COLUMNS = 3  # of panels


def roc_figure(curves: Curves) -> Figure:
    """True against false accept rate (ascending both), the latter on a logarithmic axis down to one impostor pair.

    One network: all sets in one panel. Several: a panel a set.
    """
    names = list(dict.fromkeys(name for sets in curves.values() for name in sets))
    panels = [[name] for name in names] if len(curves) > 1 else [names]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(6 * columns, 4.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        lowest = 1.0
        for model, sets in curves.items():
            for name in (name for name in panel if name in sets):
                curve = sets[name]
                label = model if len(panel) == 1 else name
                label += f" ({curve['label']})" if curve["label"] else ""
                axes.step(curve["far"], curve["tar"], where="post", label=label)
                lowest = min([lowest, *(far for far in curve["far"] if far > 0)])
        title = panel[0] if len(panel) == 1 else next(iter(curves))
        axes.set(xscale="log", xlim=(min(lowest, 0.5), 1), ylim=(0, 1), title=title)
        axes.set(xlabel="false accept rate", ylabel="true accept rate")
        axes.grid(alpha=0.3, which="both")
        axes.legend(loc="lower right", fontsize="small")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure
