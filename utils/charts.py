"""Small charts as inline SVG for HTML reports. Colours are CSS variables of `utils/page.css`, so that they follow its
light and dark theme.

Every chart is a function from numbers to a string; x and y are in the units of the data, everything else in pixels of
the drawing (which scales with the page).
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT = 480, 280  # small, so that the text stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 46
MAX_POINTS = 240


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) within low .. high."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick label: up to four significant digits, thousands shortened to k."""
    if abs(value) >= 10_000 and value % 1000 == 0:
        return f"{value / 1000:g}k"
    return f"{value:.4g}".replace("e-0", "e-")


class Axes:
    """Maps data to pixels and draws the frame; x may run backwards (diffusion time falls during sampling).

    On a logarithmic axis the range is positive, and values below it stand at its lower end.
    """

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        x_label: str,
        y_label: str,
        *,
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        self.x_range, self.y_range = x_range, y_range
        self.log_x, self.log_y = log_x, log_y
        self.labels = (x_label, y_label)

    def x(self, value: float) -> float:
        return LEFT + _share(value, self.x_range, self.log_x) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - _share(value, self.y_range, self.log_y) * (HEIGHT - BOTTOM - TOP)

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return "M" + "L".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in zip(xs, ys, strict=True))

    def frame(self, x_ticks: Sequence[float] | None = None, y_ticks: Sequence[float] | None = None) -> str:
        """Grid, tick labels and axis names; the ticks are round numbers where none are given."""
        parts = []
        for value in _ticks(self.y_range, self.log_y) if y_ticks is None else y_ticks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
        for value in _ticks(self.x_range, self.log_x) if x_ticks is None else x_ticks:
            label = f'<text class="tick" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            parts.append(f"{label}{number(value)}</text>")
        base = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(self.labels[0])}</text>'
        )
        turn = f"translate(13,{(TOP + base) / 2}) rotate(-90)"
        parts.append(f'<text class="label" transform="{turn}" text-anchor="middle">{escape(self.labels[1])}</text>')
        return "".join(parts)


def _share(value: float, span: tuple[float, float], log: bool) -> float:
    """How far along its axis a value stands: 0 at the first end, 1 at the second."""
    low, high = span
    if log:
        low, high, value = math.log10(low), math.log10(high), math.log10(max(value, min(span)))
    return (value - low) / ((high - low) or 1)


def _ticks(span: tuple[float, float], log: bool) -> list[float]:
    low, high = sorted(span)
    if not log:
        return ticks(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1,) if math.log10(high / low) > 2.5 else (1, 2, 5)
    return [m * 10.0**d for d in decades for m in multiples if low * 0.999 <= m * 10.0**d <= high * 1.001]


def svg(body: str, title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'


def thin(xs: np.ndarray, ys: np.ndarray, points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of a long curve, each the mean over its neighbourhood, so that no spike is picked by chance."""
    if len(xs) <= points:
        return xs, ys
    edges = np.linspace(0, len(xs), points + 1).astype(int)
    spans = [slice(a, b) for a, b in pairwise(edges)]
    return np.array([xs[s].mean() for s in spans]), np.array([ys[s].mean() for s in spans])


def smooth(values: np.ndarray, weight: float = 0.9) -> np.ndarray:
    """Exponential moving average, started without bias towards zero."""
    out, total, norm = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out[i] = total / norm
    return out


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    colours: Mapping[str, str],
    log_y: bool = False,
) -> str:
    """Named curves, each (x values, y values): faint as measured, strong after smoothing, with a legend for several."""
    curves = {}
    for name, (xs, ys) in series.items():
        xs, ys = np.asarray(xs, float), np.asarray(ys, float)
        good = np.isfinite(ys) & ((ys > 0) | (not log_y))
        if good.sum() > 1:
            curves[name] = thin(xs[good], ys[good])
    if not curves:
        return '<p class="note">No values were recorded.</p>'
    everything = np.concatenate([ys for _, ys in curves.values()])
    low, high = float(everything.min()), float(everything.max())
    margin = 0.0 if log_y else 0.05 * (high - low or abs(high) or 1.0)
    if log_y:
        low, high = low * 0.9, high * 1.1
    x_range = (min(xs[0] for xs, _ in curves.values()), max(xs[-1] for xs, _ in curves.values()))
    axes = Axes(x_range, (low - margin, high + margin), x_label, y_label, log_y=log_y)
    body = axes.frame()
    for name, (xs, ys) in curves.items():
        style = f'style="stroke:var({colours[name]})"'
        body += f'<path class="raw" {style} d="{axes.path(xs, ys)}"/>'
        body += f'<path class="curve" {style} d="{axes.path(xs, smooth(ys))}"><title>{escape(name)}</title></path>'
    return svg(body, title) + (legend({name: colours[name] for name in curves}) if len(curves) > 1 else "")


def legend(names: Mapping[str, str]) -> str:
    """Names beside a dash of their colour."""
    items = "".join(
        f'<span><i style="background:var({colour})"></i>{escape(name)}</span>' for name, colour in names.items()
    )
    return f'<div class="legend">{items}</div>'


def map_changes(timesteps: Sequence[int], d: np.ndarray, threshold: float, colour: str = "--c1") -> str:
    """The series d_t of UIFace's first stage: d (steps, samples) over diffusion time, which falls from left to right.

    Faint: single samples. Strong: their median. Dashed: the threshold under which a sample switches.
    """
    d = np.asarray(d, float)
    positive = d[d > 0]
    if positive.size == 0 or len(timesteps) < 2:
        return '<p class="note">No values were recorded.</p>'
    low, high = min(float(positive.min()), threshold or np.inf) * 0.85, max(float(positive.max()), threshold) * 1.15
    axes = Axes(
        (max(timesteps), min(timesteps)), (low, high), "diffusion timestep t", "change of the map, d_t", log_y=True
    )
    shown = d[:, np.linspace(0, d.shape[1] - 1, min(60, d.shape[1])).astype(int)]
    body = axes.frame()
    for column in shown.T:
        good = column > 0
        strand = axes.path(np.asarray(timesteps)[good], column[good])
        body += f'<path class="strand" style="stroke:var({colour})" d="{strand}"/>'
    middle = np.median(d, axis=1)
    body += f'<path class="curve" style="stroke:var({colour})" d="{axes.path(timesteps, middle)}">'
    body += "<title>median</title></path>"
    if threshold > 0:
        y = axes.y(threshold)
        body += f'<line class="threshold" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        body += f'<text class="tick" x="{WIDTH - RIGHT - 4}" y="{y - 6:.1f}" text-anchor="end">'
        body += f"threshold {threshold:.3g}</text>"
    return svg(body, "d_t of every sample over diffusion time")


def switch_histogram(timesteps: Sequence[int], switch_t: Sequence[int], colour: str = "--c1") -> str:
    """How many samples switched at each stage-1 timestep; those that never did (-1) stand at the right, in grey."""
    switch_t = np.asarray(switch_t, int)
    slots = [*sorted(set(timesteps), reverse=True), -1]
    counts = [int((switch_t == slot).sum()) for slot in slots]
    axes = Axes((0, len(slots)), (0, max(1, *counts) * 1.06), "timestep of the switch", "samples")
    stride = max(1, len(slots) // 6)
    body = axes.frame(x_ticks=[])
    for i, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        x, width = axes.x(i + 0.12), axes.x(0.76) - axes.x(0)
        name = "never" if slot < 0 else str(slot)
        if count:
            body += f'<rect x="{x:.1f}" y="{axes.y(count):.1f}" width="{width:.1f}" rx="1.5" '
            body += f'height="{HEIGHT - BOTTOM - axes.y(count):.1f}" '
            body += f'style="fill:var({"--muted" if slot < 0 else colour})">'
            body += f"<title>{name}: {count} samples</title></rect>"
        if slot < 0 or (i % stride == 0 and (stride == 1 or i < len(slots) - 2)):
            body += f'<text class="tick" x="{x + width / 2:.1f}" y="{HEIGHT - BOTTOM + 18}" '
            body += f'text-anchor="middle">{name}</text>'
    return svg(body, "histogram of the timesteps at which samples switched")


def accuracy_bars(rows: Sequence[tuple[str, str, float, float]], *, low: float = 0.5, high: float = 1.0) -> str:
    """Horizontal bars from chance (`low`) to 1 of (name, colour variable, accuracy, standard deviation over folds)."""
    width, left, right, step = 760, 180, 150, 38
    height = step * len(rows) + 30

    def x(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (width - left - right)

    body = ""
    for value in ticks(low, high, 5):
        body += f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="6" y2="{height - 24}"/>'
        body += (
            f'<text class="tick" x="{x(value):.1f}" y="{height - 7}" text-anchor="middle">{100 * value:.0f} %</text>'
        )
    for i, (name, colour, mean, std) in enumerate(rows):
        top = 8 + i * step
        body += f'<text class="name" x="{left - 14}" y="{top + 19}" text-anchor="end">{escape(name)}</text>'
        body += f'<rect x="{left}" y="{top + 3}" width="{max(1.5, x(mean) - left):.1f}" height="{step - 16}" rx="2" '
        body += f'style="fill:var({colour})"><title>{escape(name)}: {100 * mean:.2f} %</title></rect>'
        y = top + 3 + (step - 16) / 2
        body += f'<line class="whisker" x1="{x(mean - std):.1f}" x2="{x(mean + std):.1f}" y1="{y}" y2="{y}"/>'
        body += f'<text class="value" x="{width - right + 16}" y="{top + 20}">{100 * mean:.1f} '
        body += f'<tspan class="tick">± {100 * std:.1f} %</tspan></text>'
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="verification accuracy">{body}</svg>'
