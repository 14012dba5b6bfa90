"""The figures of the method, drawn from the arrays of `method_arrays`.

Legend: k shown timesteps, n images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from utils.plotting.canvas import (
    BARS,
    BLUE,
    FONT,
    GREY,
    ORANGE,
    VERMILION,
    bars_over,
    heat_over,
    image_grid,
    new_figure,
)
from utils.plotting.method_arrays import AttentionChange, Grid, Path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASES = {
    "stage 1, empty context": GREY,
    "stage 1, identity, layout injected": ORANGE,
    "stage 2, identity, injected and guided": BLUE,
}
BEYOND = "further than half way to the nearest other identity"
FINAL = "sample"


def attention_change_figure(arrays: AttentionChange) -> Figure:
    """d_t of every image over t, which falls from left to right as in sampling, each with its switch marked; below, how
    many take their identity when."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    waiting, taken, guided = PHASES.values()
    times, d, switch_t = np.array(arrays.timesteps), np.maximum(arrays.d, 1e-12), arrays.switch_t
    has_switched = switch_t >= 0
    stride = times[0] - times[1] if len(times) > 1 else max(int(times[0]) - arrays.min_t, 1)
    figure = new_figure(5.2, 4.0)
    curves, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for own, switch in zip(d.T, switch_t, strict=True):
        before, after = (times >= switch, times <= switch) if switch >= 0 else (times > 0, times < 0)
        curves.plot(times[before], own[before], color=waiting, linewidth=0.8, alpha=0.7)
        curves.plot(times[after], own[after], color=taken, linewidth=0.8, alpha=0.5)
    at = [own[times == t][0] for own, t in zip(d.T[has_switched], switch_t[has_switched], strict=True)]
    curves.plot(times, np.median(d, axis=1), color="black", linewidth=1.8, label="median")
    curves.plot([], [], color=waiting, label="empty context")
    curves.plot([], [], color=taken, label="identity")
    curves.scatter(switch_t[has_switched], at, s=16, color=VERMILION, zorder=3, label="switch")
    if arrays.threshold > 0:
        label = f"threshold {arrays.threshold:.3g}"
        curves.axhline(arrays.threshold, color="black", linewidth=1, linestyle="--", label=label)
    slots, sizes = np.unique(switch_t[has_switched], return_counts=True)
    counts.bar(slots, sizes, width=0.7 * stride, color=VERMILION)
    first_guided, rest = times[-1] - stride, int((~has_switched).sum())
    counts.bar([first_guided], [rest], width=0.7 * stride, color=guided, label=f"not before stage 2: {rest}")

    curves.set(yscale="log")
    is_narrow = d.max() < 10 * d.min()
    curves.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if is_narrow else (1, 2, 5)))
    curves.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    curves.yaxis.set_minor_formatter(NullFormatter())
    curves.set_ylabel("change of the map $d_t$", fontsize=FONT + 1)
    curves.legend(
        fontsize=FONT - 1, ncols=5, frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1.0), handlelength=1.2
    )
    counts.set_xlim(times[0] + 0.6 * stride, first_guided - 0.6 * stride)
    counts.set_ylabel("images", fontsize=FONT + 1)
    counts.set_xlabel("timestep $t$ of the switch", fontsize=FONT + 1)
    counts.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    counts.legend(fontsize=FONT - 1, framealpha=1, edgecolor="none", loc="upper right")
    for axes in (curves, counts):
        axes.axvline(times[-1] - stride / 2, color=guided, linewidth=1)
        axes.tick_params(labelsize=FONT)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    place = curves.get_xaxis_transform()
    curves.text(times[-1] - 0.6 * stride, 0.97, "stage 2", transform=place, fontsize=FONT, color=guided, va="top")
    return figure


def attention_maps_figure(arrays: Path) -> Figure:
    """The predicted x_0, the aggregated cross-attention map h_t, and one over the other, a column a timestep."""
    over = [heat_over(image, h) for image, h in zip(arrays.predicted, arrays.h, strict=True)]
    columns = [f"$t$ = {t}" + _change(d) for t, d in zip(arrays.timesteps, arrays.d, strict=True)]
    figure, axes = image_grid(
        [[*arrays.predicted, arrays.sample], arrays.h, over],
        columns=[*columns, FINAL + "\n"],
        rows=["predicted\n$x_0$", "map $h_t$", "both"],
        head=BARS,
    )
    _show_phases(axes, arrays)
    return figure


def stages_figure(arrays: Path) -> Figure:
    """The predicted x_0 without and with the identity, from the same x_t, above the one that the sampler goes by."""
    figure, axes = image_grid(
        [arrays.empty, arrays.identity, [*arrays.predicted, arrays.sample]],
        columns=[*(f"$t$ = {t}" for t in arrays.timesteps), FINAL],
        rows=["empty\ncontext", "identity\ncontext", "as\nsampled"],
        head=BARS,
    )
    _show_phases(axes, arrays)
    return figure


def grid_figure(arrays: Grid, mark: str = "") -> Figure:
    """Images in rows and columns; `mark`: what the columns marked have in common."""
    shows_mark = arrays.marked is not None and arrays.marked.any()
    head = BARS if shows_mark else 0.0
    figure, axes = image_grid(arrays.images, columns=arrays.columns, rows=arrays.rows, head=head)
    if shows_mark:
        bars_over(axes, [VERMILION if marked else None for marked in arrays.marked], {mark: VERMILION})
    return figure


def phase(t: int, switch_t: int, min_t: int) -> int:
    """Which of PHASES a step at t is in: the identity is taken from the step after the switch on, or with stage 2."""
    if t < min_t:
        return 2
    return 0 if switch_t < 0 or t >= switch_t else 1


def _change(d: float) -> str:
    return "\n" if np.isnan(d) else f"\n$d_t$ = {d:.2g}"


def _show_phases(axes: np.ndarray, arrays: Path) -> None:
    colours = list(PHASES.values())
    bars_over(axes, [colours[phase(t, arrays.switch_t, arrays.min_t)] for t in arrays.timesteps], PHASES)
