"""The study as a picture: accuracy with its spread, and accuracy against consistency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.results import VariantResult
from evaluation.definitions import DEFINITIONS
from utils.checkpoint import write_atomically

AGAINST = "c_intra"


def plot_study(variants: Sequence[VariantResult], path: str | Path) -> None:
    """Write a PNG; nothing where no variant is complete.

    Left: a column a sampler, every seed a dot, the mean a bar with the standard deviation over seeds. Right: the same
    means over C_intra. Colours are the same in both, and so is the axis of accuracy.
    """
    if variants:
        figure = draw(variants)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw(variants: Sequence[VariantResult]) -> Figure:
    """The figure; its axes hold per cent."""
    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_seeds(left, variants)
    _draw_consistency(right, variants)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_seeds(axes: Axes, variants: Sequence[VariantResult]) -> None:
    for at, row in enumerate(variants):
        seeds = [100 * value for value in row.accuracy.values()]
        axes.errorbar(at, 100 * row.mean, yerr=_spread(row.std), fmt="_", markersize=22, capsize=5, color=_colour(at))
        axes.plot([at] * len(seeds), seeds, "o", color=_colour(at), alpha=0.6, markeredgewidth=0, markersize=6)
    axes.set_xticks(range(len(variants)), [row.title for row in variants], rotation=25, ha="right")
    for at, label in enumerate(axes.get_xticklabels()):
        label.set_color(_colour(at))  # the legend of both panels
    axes.set_xlim(-0.6, len(variants) - 0.4)
    seeds = ", ".join(variants[0].accuracy)
    axes.set(ylabel="verification accuracy, %", title=f"mean ± standard deviation; dots: seeds {seeds}")


def _draw_consistency(axes: Axes, variants: Sequence[VariantResult]) -> None:
    for at, row in enumerate(variants):
        x, y = 100 * row.metrics[AGAINST], 100 * row.mean
        axes.errorbar(x, y, yerr=_spread(row.std), fmt="o", capsize=4, color=_colour(at))
    axes.margins(x=0.1)
    axes.set(
        xlabel=f"{DEFINITIONS[AGAINST].title}, % (r = {variants[0].metrics['radius']:.2f})", title="against consistency"
    )


def _colour(number: int) -> tuple[float, ...]:
    return colormaps["tab10"](number % 10)


def _spread(std: float | None) -> float | None:
    return None if std is None else 100 * std
