"""The charts of the report: score distributions, ROC, leakage, the switch. All are inline SVG.

A data set keeps its colour in every chart; what it is compared with (impostor pairs, real identities) is grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from evaluation.results import Histogram, SetResult
from utils import charts
from utils.page import series_colour

LOWEST_FMR = 1e-6
MARKED_FMR = (1e-2, 1e-3)  # of FMR100 and FMR1000


@dataclass(frozen=True)
class Chart:
    """One drawing of the page; `body` is HTML, `set` the number of the data set that it is of, None for all."""

    title: str
    caption: str
    body: str
    set: int | None = None


@dataclass(frozen=True)
class Density:
    """A histogram to draw; a filled one is what the others are compared with."""

    name: str
    histogram: Histogram
    colour: str
    is_filled: bool = False

    def heights(self) -> np.ndarray:
        """Probability density of every bin (bins,): its area is 1."""
        counts = np.asarray(self.histogram.counts, float)
        return counts / (max(1.0, counts.sum()) * np.diff(self.histogram.edges))


def score_charts(results: Sequence[SetResult]) -> list[Chart]:
    """Genuine and impostor cosines, a chart a data set, on the same axes."""
    shown = [(number, r) for number, r in enumerate(results) if {"genuine", "impostor"} <= r.histograms.keys()]
    groups = [
        [
            Density("impostor pairs", r.histograms["impostor"], "--muted", is_filled=True),
            Density("genuine pairs", r.histograms["genuine"], series_colour(number)),
        ]
        for number, r in shown
    ]
    span, top = _common_axes([density for group in groups for density in group])
    return [
        Chart(
            r.name if len(results) > 1 else "Genuine and impostor pairs",
            "Two images of one identity, two images of different ones: the less they overlap, the better.",
            densities(group, "cosine of two images", span, top),
            number,
        )
        for (number, r), group in zip(shown, groups, strict=True)
    ]


def consistency_chart(results: Sequence[SetResult]) -> Chart | None:
    """How near images are to their identity's centre, all data sets in one chart."""
    return _overlay(
        results,
        "centre_cosine",
        None,
        "Images and their identity's centre",
        "The further right, the more alike the images of an identity.",
        "cosine to the centre",
    )


def leakage_chart(results: Sequence[SetResult]) -> Chart | None:
    """Each generated identity's nearest training identity, beside the same between training identities."""
    return _overlay(
        results,
        "leakage",
        "leakage_real",
        "Nearest training identity",
        "Generated identities should be no nearer to people trained on than these are to one another (grey).",
        "cosine of the nearest training centre",
    )


def roc_chart(results: Sequence[SetResult]) -> Chart | None:
    """True over false match rate, all data sets in one chart; false matches on a logarithmic axis."""
    curves = [(n, r.name, *map(np.asarray, r.roc)) for n, r in enumerate(results) if r.roc is not None]
    positive = [float(fmr[fmr > 0].min()) for _, _, fmr, _ in curves if (fmr > 0).any()]
    if not positive:
        return None
    low = max(LOWEST_FMR, min(positive))
    axes = charts.Axes((min(low, 0.1), 1.0), (0.0, 1.0), "false match rate", "true match rate", log_x=True)
    body = axes.frame()
    for rate in MARKED_FMR:
        if rate >= low:
            x, top, base = axes.x(rate), axes.y(1.0), axes.y(0.0)
            body += f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{base:.1f}"/>'
    for number, name, fmr, tmr in curves:
        seen = fmr >= low
        body += _line(axes, fmr[seen], tmr[seen], series_colour(number), name)
    body = charts.svg(body, "receiver operating characteristic")
    names = {name: series_colour(number) for number, name, _, _ in curves}
    return Chart(
        "ROC",
        "How many genuine pairs are accepted when so many impostor pairs are. Dashed: FMR 1 % and 0.1 %.",
        body + (charts.legend(names) if len(names) > 1 else ""),
    )


def switch_charts(results: Sequence[SetResult]) -> list[Chart]:
    """Of each two-stage data set: d_t with the threshold, and how many images switched at which timestep."""
    found = []
    for number, r in enumerate(results):
        colour, of = series_colour(number), f" · {r.name}" if len(results) > 1 else ""
        if r.attention_change is not None:
            timesteps, d, threshold = r.attention_change
            found.append(
                Chart(
                    f"Change of the attention map{of}",
                    f"d over diffusion time of {len(d):,} images, and their median; under the threshold an image "
                    "takes its identity (UIFace, section 3.3).",
                    charts.map_changes([int(t) for t in timesteps], np.asarray(d).T, threshold, colour),
                    number,
                )
            )
        switch_t = r.images.switch_t
        if switch_t is not None:
            times = sorted({int(t) for t in switch_t} - {-1})
            found.append(
                Chart(
                    f"Where images switched{of}",
                    f"{np.count_nonzero(switch_t >= 0):,} of {len(switch_t):,} images took their identity during "
                    "stage 1; the others at its end.",
                    charts.switch_histogram(times, switch_t, colour),
                    number,
                )
            )
    return found


def densities(series: Sequence[Density], x_label: str, span: tuple[float, float], top: float) -> str:
    """Histograms as step lines, filled ones as areas beneath, over `span`, up to the density `top`."""
    axes = charts.Axes(span, (0.0, top), x_label, "density")
    body = axes.frame(y_ticks=[])  # areas are 1: the numbers of a density say nothing to a reader
    for density in sorted(series, key=lambda d: not d.is_filled):
        edges, heights = np.asarray(density.histogram.edges), density.heights()
        xs, ys = np.repeat(edges, 2), np.concatenate([[0.0], np.repeat(heights, 2), [0.0]])
        seen = (xs >= span[0]) & (xs <= span[1])
        fill = f'style="fill:var({density.colour})"'
        kind = "area strong" if density.is_filled else "area"
        body += f'<path class="{kind}" {fill} d="{axes.path(xs[seen], ys[seen])}"/>'
        if not density.is_filled:
            body += _line(axes, xs[seen], ys[seen], density.colour, density.name)
    return charts.svg(body, f"distribution of the {x_label}") + charts.legend({d.name: d.colour for d in series})


def _overlay(
    results: Sequence[SetResult], key: str, reference: str | None, title: str, caption: str, x_label: str
) -> Chart | None:
    """The histogram `key` of every data set, and of every real set the one called `reference`."""
    series = [
        Density(r.name, r.histograms[key], series_colour(number))
        for number, r in enumerate(results)
        if key in r.histograms
    ]
    if not series:
        return None
    real = {r.training_root: r.histograms[reference] for r in results if reference in r.histograms}
    for root, histogram in real.items():
        name = "between training identities" + (f" of {root}" if len(real) > 1 else "")
        series.append(Density(name, histogram, "--muted", is_filled=True))
    span, top = _common_axes(series)
    return Chart(title, caption, densities(series, x_label, span, top))


def _common_axes(series: Sequence[Density]) -> tuple[tuple[float, float], float]:
    """The span of x that holds every count, and the height of the highest bin with a little room."""
    lows, highs, top = [], [], 1e-9
    for density in series:
        filled = np.flatnonzero(density.histogram.counts)
        if filled.size:
            lows.append(float(density.histogram.edges[filled[0]]))
            highs.append(float(density.histogram.edges[filled[-1] + 1]))
            top = max(top, float(density.heights().max()))
    return (min(lows, default=0.0), max(highs, default=1.0)), 1.05 * top


def _line(axes: charts.Axes, xs: Sequence[float], ys: Sequence[float], colour: str, name: str) -> str:
    path = f'<path class="curve" style="stroke:var({colour})" d="{axes.path(xs, ys)}">'
    return f"{path}<title>{escape(name)}</title></path>"
