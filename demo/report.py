"""The report of a demo run: one HTML file that needs no other file, no script and no network.

`render` is a pure function of a `Report`; `demo.collect` fills one from the files that the stages wrote.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from demo import charts
from utils.images import encode_image, resize

# Each training set keeps its colour through the whole report (variables of the style sheet below).
COLOURS = {"rendered": "--ren", "real": "--ren", "two_stage": "--two", "one_stage": "--one", "untrained": "--muted"}
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


STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1f2328; --soft: #5b626b; --rule: #e4e1db; --grid: #ece9e3;
  --ren: #66788a; --two: #0b7a75; --one: #c07a1e; --muted: #a9a59c; --extra: #7c5aa6; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --card: #1b1f23; --ink: #e6e4df; --soft: #9aa1a9; --rule: #2d3238; --grid: #262b30;
  --ren: #8fa3b8; --two: #3fb5a8; --one: #e0a04a; --muted: #6d7278; --extra: #b092d6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 56px 28px 96px; }
h1 { font-size: 34px; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 12px; font-weight: 650; }
h2 { font-size: 21px; letter-spacing: -.01em; margin: 64px 0 6px; font-weight: 620; }
h3 { font-size: 15px; margin: 0 0 2px; font-weight: 600; }
p { margin: 6px 0 0; max-width: 74ch; } .lead { font-size: 18px; } .note, .meta { color: var(--soft); font-size: 14px; }
.meta { margin-top: 14px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 20px; min-width: 0; }
.card .note { margin-top: 0; }
.columns { display: grid; gap: 18px; margin-top: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.wide { margin-top: 18px; } .scroll { overflow-x: auto; }
.strip { display: grid; grid-template-columns: repeat(var(--n), 1fr); gap: 3px; margin-top: 3px; }
.strip img { display: block; width: 100%; height: auto; border-radius: 2px; }
.card h3 + .note { margin-bottom: 12px; }
.stations { display: grid; gap: 16px 22px; grid-template-columns: minmax(170px, 1fr) 4fr; align-items: center; }
.stations .strip { margin: 0; } .stations p { margin: 0; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; border-bottom: 1px solid var(--rule); }
th, td { padding: 8px 18px 8px 0; vertical-align: top; } td { border-bottom: 1px solid var(--grid); }
tr:last-child td { border-bottom: 0; } .n { text-align: right; white-space: nowrap; } tfoot td { font-weight: 600; }
th:last-child, td:last-child { padding-right: 0; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 9px; }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { fill: var(--ink); font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
svg .tick, svg .label { fill: var(--soft); font-size: 12px; } svg .value { font-weight: 600; font-size: 15px; }
svg .value .tick { font-weight: 400; } svg .name { font-size: 14px; }
.grid { stroke: var(--grid); } .axis { stroke: var(--muted); } .whisker { stroke: var(--ink); stroke-width: 1.5; opacity: .75; }
path { fill: none; stroke-linejoin: round; } .raw { stroke-width: 1; opacity: .28; } .curve { stroke-width: 2.2; }
.strand { stroke: var(--two); stroke-width: 1; opacity: .16; }
.threshold { stroke: var(--ink); stroke-dasharray: 5 4; opacity: .7; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--soft); font-size: 13px; margin-top: 8px; }
.legend i { display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 7px; vertical-align: middle; }
code { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
details { margin-top: 3px; } summary { cursor: pointer; color: var(--soft); font-size: 13px; }
details code { display: block; margin-top: 6px; padding: 8px 10px; background: var(--paper); border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) { main { padding: 28px 16px 64px; } .stations { grid-template-columns: 1fr; gap: 6px; }
  .stations .strip { margin-bottom: 14px; } h1 { font-size: 27px; } }
@media print { .card { break-inside: avoid; } }
"""


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
        data = base64.b64encode(encode_image(image, ".jpg")).decode()
        tags += (
            f"<img alt='{escape(alt)}, image {i}' width='{size}' height='{size}' src='data:image/jpeg;base64,{data}'>"
        )
    return f"<div class='strip' style='--n:{len(images)}'>{tags}</div>"


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
            f"<td class='n'>{100 * row['eer']:.2f}</td><td class='n'>{100 * row['tar_at_far_1e-2']:.2f}</td>"
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


def _faces(report: Report) -> str:
    cards = ""
    for panel in report.panels:
        strips = "".join(strip(row, f"{panel.title}, identity {i + 1}") for i, row in enumerate(panel.rows))
        dot = f"<span class='dot' style='background:var({COLOURS[panel.key]})'></span>"
        cards += f"<div class='card'><h3>{dot}{escape(panel.title)}</h3><p class='note'>{escape(panel.caption)}</p>{strips}</div>"
    return (
        "<h2>Faces</h2><p>One row an identity, as the recognisers see them: aligned to 112 x 112 pixels. The images are "
        f"the first of each identity, not a selection.</p><div class='columns'>{cards}</div>"
    )


def _pipeline(report: Report) -> str:
    stations = "".join(
        f"<div><h3>{escape(f.title)}</h3><p class='note'>{escape(f.caption)}</p></div>{strip(f.images, f.title)}"
        for f in report.pipeline
    )
    return f"<h2>Along the pipeline</h2><div class='card wide stations'>{stations}</div>"


def _two_stage(report: Report) -> str:
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
        f"<div class='card'><h3>Change of the attention map</h3>{charts.map_changes(report.timesteps, report.d, report.threshold)}"
        "</div><div class='card'><h3>Where the samples switched</h3>"
        f"{charts.switch_histogram(report.timesteps, report.switch_t)}</div></div>"
    )


def _training(report: Report) -> str:
    cards = ""
    for curves in report.curves:
        names = {name: COLOURS.get(name, "--extra" if i else "--two") for i, name in enumerate(curves.series)}
        labels = {NAMES.get(name, name): name for name in curves.series}
        chart = charts.lines(
            {label: curves.series[name] for label, name in labels.items()},
            title=curves.title,
            x_label=curves.x_label,
            y_label=curves.y_label,
            colours={label: names[name] for label, name in labels.items()},
            log_y=curves.log_y,
        )
        cards += f"<div class='card'><h3>{escape(curves.title)}</h3><p class='note'>{escape(curves.caption)}</p>{chart}</div>"
    return f"<h2>Training</h2><p>Faint: as logged; strong: smoothed.</p><div class='columns charts'>{cards}</div>"


def _detection(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td class='n'>{total:,}</td><td class='n'>{found:,}</td>"
        f"<td class='n'>{100 * found / max(1, total):.1f} %</td></tr>"
        for name, total, found in report.detection
    )
    return (
        "<h2>Faces found by the detector</h2><p>Share of images in which MTCNN finds a face, during alignment.</p>"
        "<div class='card wide scroll'><table><thead><tr><th>Images</th><th class='n'>Tried</th><th class='n'>Found</th>"
        f"<th class='n'>Share</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _what_ran(report: Report) -> str:
    rows = ""
    for number, stage in enumerate(report.stages, 1):
        commands = "".join(f"<code>{escape(command)}</code>" for command in stage.commands)
        how = f"<details><summary>{len(stage.commands)} command{'s' * (len(stage.commands) > 1)}</summary>{commands}</details>"
        note = " (resumed; the last attempt)" if stage.resumed else ""
        rows += (
            f"<tr><td class='n'>{number}</td><td>{escape(stage.title)}{how if stage.commands else ''}</td>"
            f"<td>{escape(stage.outcome)}</td><td class='n'>{duration(stage.seconds)}{note}</td></tr>"
        )
    return (
        "<h2>What ran</h2><p>Every stage is a script of the project, started as anyone would start it, from the project's "
        "folder.</p><div class='card wide scroll'><table><thead><tr><th class='n'></th><th>Stage</th><th>Outcome</th>"
        f"<th class='n'>Time</th></tr></thead><tbody>{rows}</tbody><tfoot><tr><td></td><td>In all</td><td></td>"
        f"<td class='n'>{duration(report.seconds)}</td></tr></tfoot></table></div>"
    )


def _environment(report: Report) -> str:
    entries = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in report.environment.items())
    settings = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in report.settings.items())
    return (
        f"<h2>Machine and settings</h2><div class='columns'><div class='card'><dl>{entries}</dl></div>"
        f"<div class='card'><dl>{settings}</dl></div></div>"
    )
