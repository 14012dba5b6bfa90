"""The page: what is computed of the results, the template filled, the file written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from evaluation.report import figures as charts
from evaluation.report import tables
from evaluation.report.pictures import Pictures, shrink_figure
from evaluation.report.sheet import SetSheet, sheet_json
from evaluation.results import SetResult
from utils import page
from utils.checkpoint import write_text
from utils.config import UserError
from utils.version import code_version

HERE = Path(__file__).parent
SCRIPTS = ("data.js", "sheet.js", "identity.js", "terms.js")
FIGURES_SHARE = 0.4  # of max_bytes, for the extra figures
LEAST = 10_000  # bytes for the identities of a data set; with fewer hardly any would be seen
PAIRS, PAIR_SIZE = 24, 112  # of generated and nearest training images; pixels a side
Figure = tuple[str, str, bytes]  # title, caption, PNG


def read_figures(folder: str | Path) -> list[Figure]:
    """The pictures `*.png` of a folder, in the order of their names, with the title and caption that `utils.plotting`
    writes into them; of any other picture the title is its name."""
    figures = []
    for path in sorted(Path(folder).glob("*.png")):
        with Image.open(path) as image:
            words = image.info
        figures.append((str(words.get("Title", path.stem)), str(words.get("Description", "")), path.read_bytes()))
    return figures


def write_report(
    results: Sequence[SetResult], path: str | Path, *, max_bytes: int = 25_000_000, figures: Sequence[Figure] = ()
) -> Path:
    """Write one HTML file that shows `results` side by side; it appears whole or not at all.

    The page holds its style, scripts, charts and pictures, makes no request, and takes at most `max_bytes` bytes:
    thumbnails, and then the tables of images, of a stratified sample of the identities where not all fit. What is left
    out is linked to where it is a file.

    Args:
        results: one a data set, each with a name of its own; the first one's colour is the first.
        figures: extra ones, each (title, caption, PNG), shown in this order; large ones are scaled down to fit.

    Raises:
        UserError: no result, two of one name, images that are not where they were, `max_bytes` too small for the page.
        ValueError: a metric that evaluation.definitions does not define.
    """
    path = Path(path)
    names = [result.name for result in results]
    if not names or len(set(names)) != len(names):
        raise UserError(f"data sets: {', '.join(names) or 'none'}; each needs a name of its own")
    pictures = [Pictures(result.root) for result in results]
    real = {root: Pictures(root) for root in {result.training_root for result in results} if root is not None}
    content = _content(results, pictures, real, [_fitted(f, max_bytes, len(figures)) for f in figures])
    template = _environment().get_template("template.html")
    left = max_bytes - len(template.render(content, data="").encode())
    if left < LEAST * len(results):
        raise UserError(f"max_bytes: {max_bytes}; the page without its identities takes {max_bytes - left} already")
    sheets = [
        SetSheet(result, images, real.get(result.training_root), images.address(path))
        for result, images in zip(results, pictures, strict=True)
    ]
    return write_text(path, template.render(content, data=Markup(sheet_json(sheets, left))))


def _content(
    results: Sequence[SetResult],
    pictures: Sequence[Pictures],
    real: dict[str, Pictures],
    figures: list[dict[str, str]],
) -> dict[str, Any]:
    """Everything of the template but the identities."""
    overview = [charts.consistency_chart(results), charts.roc_chart(results)]
    return {
        "title": _listed([result.name for result in results]),
        "created": time.strftime("%-d %B %Y, %H:%M"),
        "version": code_version(),
        "results": results,
        "colours": [page.series_colour(number) for number in range(len(results))],
        "style": Markup(page.STYLE + (HERE / "report.css").read_text(encoding="utf-8")),
        "scripts": Markup("\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)),
        "warnings": {w: [r.name for r in results if w in r.warnings] for result in results for w in result.warnings},
        "headlines": tables.headlines(results),
        "caveats": tables.caveats(results),
        "metrics": tables.all_rows(results),
        "gates": tables.CONSISTENCY_GATES,
        "published": tables.published_rows(),
        "scores": [*charts.score_charts(results), *(chart for chart in overview if chart is not None)],
        "leakage": charts.leakage_chart(results),
        "switches": charts.switch_charts(results),
        "pairs": [_pairs(result, images, real) for result, images in zip(results, pictures, strict=True)],
        "figures": figures,
        "leakage_rows": [row for row in tables.all_rows(results) if row.key.startswith("leakage")],
        "settings": tables.settings(results),
    }


def _pairs(result: SetResult, pictures: Pictures, real: dict[str, Pictures]) -> list[dict[str, Any]]:
    """The generated images that are nearest to a training image, beside it: names, data URIs, cosine."""
    if result.training_root is None:
        return []
    shown = result.nearest_training_images[:PAIRS]
    generated = pictures.thumbnails([name for name, _, _ in shown], PAIR_SIZE)
    training = real[result.training_root].thumbnails([name for _, name, _ in shown], PAIR_SIZE)
    return [
        {
            "generated": name,
            "training": nearest,
            "cosine": cosine,
            "pictures": [page.data_uri(data, "image/webp") for data in both],
        }
        for (name, nearest, cosine), *both in zip(shown, generated, training, strict=True)
    ]


def _fitted(figure: Figure, max_bytes: int, count: int) -> dict[str, str]:
    """A figure for the page, in its share of the bytes; base64 takes 4 for 3."""
    title, caption, data = figure
    data, media_type = shrink_figure(data, int(FIGURES_SHARE * max_bytes / count * 3 / 4))
    return {"title": title, "caption": caption, "source": page.data_uri(data, media_type)}


def _listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _title(text: str) -> Markup:
    """C_intra => C with the subscript intra."""
    head, underscore, tail = text.partition("_")
    return Markup("{}<sub>{}</sub>").format(head, tail) if underscore else escape(text)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"value": tables.format_value, "metric": _title}
    return environment
