"""Figures as objects, grids of images, PNG bytes.

matplotlib is imported where a figure is made: it takes long to load, and training processes import `utils`. There is no
pyplot, so that nothing is global and any thread may draw.
Legend: R rows, C columns, H W height and width, S side of a map. Lengths are in inches.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
FONT = 8  # points
CELL, GAP, BREAK, MARGIN = 0.95, 0.03, 0.22, 0.06  # an image, between images, between groups of rows, around all
LINE = 0.15  # height of a line of FONT
BARS = 1.9 * LINE  # height of `bars_over` and its legend
# Colours that people of any colour vision tell apart (Okabe and Ito, 2008)
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8c8c8c"
HEAT = "magma"  # colours of a map


def new_figure(width: float, height: float, *, is_grid: bool = False) -> Figure:
    """An empty figure; matplotlib arranges its axes, or not where it `is_grid`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="none" if is_grid else "constrained")


def png(figure: Figure, title: str = "", caption: str = "") -> bytes:
    """The figure as PNG; title and caption go into the file, where image viewers show them."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Title": title, "Description": caption})
    return buffer.getvalue()


def image_grid(
    images: Sequence[Sequence[np.ndarray | None]],
    *,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    notes: Sequence[Sequence[str]] = (),
    breaks: Collection[int] = (),
    head: float = 0.0,
) -> tuple[Figure, np.ndarray]:
    """Lay images out in R rows and C columns; returns the figure and its axes (R, C).

    images: uint8 (H, W, 3), or float (S, S) in [0, 1], shown as a heat map; None leaves a place empty. columns, rows,
    notes: texts above each column, left of each row, below each image. breaks: numbers of rows before which a gap
    parts groups. head: room above all, for the caller.
    """
    count = (len(images), max(len(row) for row in images))
    left = MARGIN + max((text_width(line) for text in rows for line in text.split("\n")), default=0.0)
    top = MARGIN + head + LINE * max((text.count("\n") + 1 for text in columns), default=0)
    below = GAP + LINE * max((text.count("\n") + 1 for line in notes for text in line if text), default=0)
    tops = [top + row * (CELL + below) + BREAK * sum(b <= row for b in breaks) for row in range(count[0])]
    width = left + count[1] * (CELL + GAP) - GAP + MARGIN
    height = tops[-1] + CELL + below - GAP + MARGIN
    figure = new_figure(width, height, is_grid=True)
    axes = np.empty(count, dtype=object)
    for r in range(count[0]):
        for c in range(count[1]):
            place = (left + c * (CELL + GAP)) / width, 1 - (tops[r] + CELL) / height, CELL / width, CELL / height
            axes[r, c] = cell = figure.add_axes(place)
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
            image = images[r][c] if c < len(images[r]) else None
            if image is None:
                cell.patch.set_visible(False)
            elif image.ndim == 2:
                cell.imshow(image, cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
            else:
                cell.imshow(image)
            if notes and c < len(notes[r]) and notes[r][c]:
                cell.set_xlabel(notes[r][c], fontsize=FONT - 1, labelpad=1.5)
    for cell, text in zip(axes[0], columns, strict=False):
        cell.set_title(text, fontsize=FONT, pad=3)
    for cell, text in zip(axes[:, 0], rows, strict=False):
        cell.set_ylabel(text, fontsize=FONT, rotation=0, ha="right", va="center", labelpad=4)
    return figure, axes


def heat_over(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A map float (S, S) in [0, 1] as colour over the brightness of an image uint8 (H, W, 3): uint8 (H, W, 3)."""
    import matplotlib

    from utils.images import resize

    colours = (matplotlib.colormaps[HEAT](heat)[..., :3] * 255).round().astype(np.uint8)  # (S, S, 3)
    colours = resize(colours, image.shape[:2])
    grey = image.mean(axis=2, keepdims=True)  # (H, W, 1)
    return (0.45 * grey + 0.55 * colours).round().astype(np.uint8)


def bars_over(axes: np.ndarray, colours: Sequence[str | None], legend: Mapping[str, str]) -> None:
    """A coloured bar over each column of an `image_grid` (None: none), and above them what the colours mean, by text.
    The grid's `head` is BARS."""
    from matplotlib.patches import Patch, Rectangle

    figure = axes[0, 0].figure
    height = figure.get_figheight()
    for cell, colour in zip(axes[0], colours, strict=False):
        if colour is not None:
            box = cell.get_position()
            place = box.x0, 1 - (MARGIN + 1.5 * LINE) / height
            figure.add_artist(Rectangle(place, box.width, 0.05 / height, facecolor=colour, edgecolor="none"))
    figure.legend(
        handles=[Patch(color=colour, label=text) for text, colour in legend.items()],
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - MARGIN / height),
        ncols=len(legend),
        fontsize=FONT - 1,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
    )


def text_width(text: str) -> float:
    """How wide a line of text (mathtext, too) is in the size FONT, with the gap to what it stands beside."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=FONT).get_extents().width / 72 + 0.08 if text else 0.0
