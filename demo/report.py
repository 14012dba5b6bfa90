"""The report of a demo run: one HTML file that needs no other file, no script and no network.

`render` is a pure function of a `Report`; `demo.collect` fills one from the files that the stages wrote.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np

from utils import charts, page
from utils.images import encode_image, resize

# Each training set keeps its colour through the whole report (variables of utils/page.css).
COLOURS = {"rendered": "--c3", "real": "--c3", "two_stage": "--c1", "one_stage": "--c2", "untrained": "--muted"}
NAMES = {
    "rendered": "rendered faces",
    "real": "your faces",
    "two_stage": "generated, two-stage",
    "one_stage": "generated, one-stage",
    "untrained": "untrained",
}


@dataclass
class Panel:
    """Faces of one data set: one row an identity, each uint8 (n, H, W, 3)."""

    key: str
    title: str
    caption: str
    rows: list[np.ndarray]


@dataclass
class Figure:
    """One station of the pipeline with the same few samples, uint8 (n, H, W, 3)."""

    title: str
    caption: str
    images: np.ndarray


@dataclass
class Curves:
    """One training-curve chart: name -> (steps, values)."""

    title: str
    caption: str
    y_label: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log_y: bool = False
    x_label: str = "step"


@dataclass
class StageRun:
    """What ran: the exact commands, how long they took, and what came out."""

    title: str
    seconds: float
    commands: list[str]
    outcome: str
    resumed: bool = False


@dataclass
class Report:
    """Everything that the page shows. Rates and accuracies are in 0..1, times in seconds."""

    title: str
    lead: str
    created: str
    seconds: float
    accuracy: dict[str, dict]
    data: dict[str, str]
    panels: list[Panel]
    pipeline: list[Figure]
    timesteps: list[int]
    d: np.ndarray
    switch_t: list[int]
    threshold: float
    curves: list[Curves]
    detection: list[tuple[str, int, int]]
    stages: list[StageRun]
    environment: dict[str, str]
    settings: dict[str, object] = field(default_factory=dict)


STYLE = page.STYLE + Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def render(report: Report) -> str:
    """The page as one string of HTML."""
    sections = [
        _head(report),
        _accuracy(report),
        _faces(report),
        _pipeline(report),
        _two_stage(report),
        _training(report),
        _detection(report),
        _what_ran(report),
        _environment(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def strip(images: np.ndarray, alt: str, size: int = 112) -> str:
    """uint8 (n, H, W, 3) side by side, each embedded as a JPEG of `size` pixels."""
    tags = ""
    for i, image in enumerate(resize(images, size), 1):
        source = page.data_uri(encode_image(image, ".jpg"), "image/jpeg")
        tags += f"<img alt='{escape(alt)}, image {i}' width='{size}' height='{size}' src='{source}'>"
    return f"<div class='strip' style='--n:{len(images)}'>{tags}</div>"


def _card(title: str, caption: str, body: str) -> str:
    """A box; all three are HTML already."""
    return f"<div class='card'><h3>{title}</h3><p class='note'>{caption}</p>{body}</div>"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8.3 s, 2 min 05 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _head(report: Report) -> str:
    return (
        f"<header><h1>{escape(report.title)}</h1><p class='lead'>{escape(report.lead)}</p>"
        f"<p class='meta'>{escape(report.created)} · {duration(report.seconds)} in all"
        f" · {escape(report.environment.get('processor', ''))}</p></header>"
    )


def _accuracy(report: Report) -> str:
    rows = [(k, report.accuracy[k]) for k in COLOURS if k in report.accuracy]
    if not rows:
        return ""
    bars = charts.accuracy_bars([(NAMES[k], COLOURS[k], row["accuracy"], row["std"]) for k, row in rows])
    first = rows[0][1]
    body = ""
    for key, row in rows:
        body += (
            f"<tr><td><span class='dot' style='background:var({COLOURS[key]})'></span>{escape(NAMES[key])}</td>"
            f"<td>{escape(report.data.get(key, ''))}</td>"
            f"<td class='n'><b>{100 * row['accuracy']:.2f}</b> ± {100 * row['std']:.2f}</td>"
            f"<td class='n'>{100 * row['eer']:.2f}</td><td class='n'>{_rate(row['tar_at_far_1e-2'])}</td>"
            f"<td class='n'>{row['genuine']:,} + {row['impostor']:,}</td></tr>"
        )
    return (
        "<h2>Verification accuracy on people never seen</h2>"
        f"<p>Same person or not: {first['genuine']:,} genuine and {first['impostor']:,} impostor pairs of "
        f"{first['people']:,} people who appear in no training set. Ten folds, the threshold chosen on nine and "
        "applied to the tenth, flip test; ± is the standard deviation over folds. Chance is 50 %.</p>"
        f"<div class='card wide'>{bars}</div>"
        "<div class='card wide scroll'><table><thead><tr><th>Recogniser trained on</th><th>Training set</th>"
        "<th class='n'>Accuracy, %</th><th class='n'>EER, %</th><th class='n'>TAR at FAR 1 %, %</th>"
        f"<th class='n'>Pairs</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def _rate(value: float | None) -> str:
    """Per cent; a dash where there are too few impostor pairs for the rate."""
    return "–" if value is None else f"{100 * value:.2f}"


def _faces(report: Report) -> str:
    cards = ""
    for panel in report.panels:
        strips = "".join(strip(row, f"{panel.title}, identity {i + 1}") for i, row in enumerate(panel.rows))
        dot = f"<span class='dot' style='background:var({COLOURS[panel.key]})'></span>"
        cards += _card(dot + escape(panel.title), escape(panel.caption), strips)
    return (
        "<h2>Faces</h2><p>One row an identity, as the recognisers see them: aligned to 112 x 112 pixels. The images "
        f"are the first of each identity, not a selection.</p><div class='columns'>{cards}</div>"
    )


def _pipeline(report: Report) -> str:
    stations = "".join(
        f"<div><h3>{escape(f.title)}</h3><p class='note'>{escape(f.caption)}</p></div>{strip(f.images, f.title)}"
        for f in report.pipeline
    )
    return f"<h2>Along the pipeline</h2><div class='card wide stations'>{stations}</div>"


def _two_stage(report: Report) -> str:
    change = charts.map_changes(report.timesteps, report.d, report.threshold)
    switches = charts.switch_histogram(report.timesteps, report.switch_t)
    switched = [t for t in report.switch_t if t >= 0]
    text = (
        f"{len(switched):,} of {len(report.switch_t):,} samples switched to their identity before stage 2"
        + (f", the median one at t = {int(np.median(switched))}" if switched else "")
        + f". The threshold {report.threshold:.3g} was calibrated for this very model."
    )
    return (
        "<h2>Two-stage sampling</h2><p>Stage 1 draws content that belongs to no identity. Once the cross-attention map "
        "settles, that is once its change d<sub>t</sub> falls below a threshold, the identity comes in. "
        f"{escape(text)}</p><div class='columns charts'>"
        + _card("Change of the attention map", "Every sample, and their median.", change)
        + _card("Where the samples switched", "After this step an image is drawn with its identity.", switches)
        + "</div>"
    )


def _training(report: Report) -> str:
    cards = ""
    for curves in report.curves:
        names = {name: COLOURS.get(name, "--c4" if i else "--c1") for i, name in enumerate(curves.series)}
        labels = {NAMES.get(name, name): name for name in curves.series}
        chart = charts.lines(
            {label: curves.series[name] for label, name in labels.items()},
            title=curves.title,
            x_label=curves.x_label,
            y_label=curves.y_label,
            colours={label: names[name] for label, name in labels.items()},
            log_y=curves.log_y,
        )
        cards += _card(escape(curves.title), escape(curves.caption), chart)
    return f"<h2>Training</h2><p>Faint: as logged; strong: smoothed.</p><div class='columns charts'>{cards}</div>"


def _detection(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{escape(NAMES.get(name, name))}</td><td class='n'>{total:,}</td><td class='n'>{found:,}</td>"
        f"<td class='n'>{100 * found / max(1, total):.1f} %</td></tr>"
        for name, total, found in report.detection
    )
    return (
        "<h2>Faces found by the detector</h2><p>Share of images in which MTCNN finds a face, during alignment.</p>"
        "<div class='card wide scroll'><table><thead><tr><th>Images</th><th class='n'>Tried</th>"
        f"<th class='n'>Found</th><th class='n'>Share</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _what_ran(report: Report) -> str:
    rows = ""
    for number, stage in enumerate(report.stages, 1):
        commands = "".join(f"<code>{escape(command)}</code>" for command in stage.commands)
        count = f"{len(stage.commands)} command{'s' * (len(stage.commands) > 1)}"
        how = f"<details><summary>{count}</summary>{commands}</details>"
        note = " (resumed; the last attempt)" if stage.resumed else ""
        rows += (
            f"<tr><td class='n'>{number}</td><td>{escape(stage.title)}{how if stage.commands else ''}</td>"
            f"<td>{escape(stage.outcome)}</td><td class='n'>{duration(stage.seconds)}{note}</td></tr>"
        )
    return (
        "<h2>What ran</h2><p>Every stage is a script of the project, started as anyone would start it, from the "
        "project's folder.</p><div class='card wide scroll'><table><thead><tr><th class='n'></th>"
        f"<th>Stage</th><th>Outcome</th><th class='n'>Time</th></tr></thead><tbody>{rows}</tbody>"
        f"<tfoot><tr><td></td><td>In all</td><td></td><td class='n'>{duration(report.seconds)}</td></tr>"
        "</tfoot></table></div>"
    )


def _environment(report: Report) -> str:
    entries = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in report.environment.items())
    settings = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in report.settings.items())
    return (
        f"<h2>Machine and settings</h2><div class='columns'><div class='card'><dl>{entries}</dl></div>"
        f"<div class='card'><dl>{settings}</dl></div></div>"
    )
