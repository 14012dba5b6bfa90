"""The figures of an evaluation: what is shown, read off its result, and the drawing of it.

Legend: K identities, p pairs, H W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evaluation.results import Histogram, SetResult
from utils.config import UserError
from utils.data.formats.recognise import open_labelled
from utils.plotting.canvas import BLUE, FONT, GREEN, GREY, VERMILION, image_grid, new_figure
from utils.plotting.roc import Curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Panels of `scores_figure`: title, axis, and the histograms of a SetResult with their names and colours
PANELS = (
    ("pairs of images", "cosine", {"impostor": ("impostor", VERMILION), "genuine": ("genuine", BLUE)}),
    ("images and the centre of their identity", "cosine", {"centre_cosine": ("images", GREEN)}),
    (
        "nearest training identity",
        "cosine of centres",
        {"leakage_real": ("between training identities", GREY), "leakage": ("of generated identities", VERMILION)},
    ),
)


@dataclass(frozen=True)
class Pairs:
    """Generated images, each with the training image most like it."""

    generated: list[np.ndarray]  # (p,) of uint8 (H, W, 3)
    training: list[np.ndarray]
    cosines: list[float]


@dataclass(frozen=True)
class Strips:
    """Identities with some of their images, the most consistent first, then the least consistent."""

    names: list[str]
    consistency: list[float]  # mean cosine of all the identity's images to their centre
    images: list[list[np.ndarray]]  # of uint8 (H, W, 3)
    cosines: list[list[float]]  # of each image to the centre
    num_best: int


def scores_figure(histograms: Mapping[str, Histogram], metrics: Mapping[str, float | int | None]) -> Figure:
    """Distributions of cosines, a panel for each kind that the evaluation measured, as densities."""
    panels = [panel for panel in PANELS if any(name in histograms for name in panel[2])]
    figure = new_figure(3.4 * len(panels), 2.7)
    for axes, (title, label, named) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, (legend, colour) in named.items():
            if name not in histograms:
                continue
            edges, counts = histograms[name].edges, histograms[name].counts
            density = counts / max(counts.sum(), 1) / np.diff(edges)
            axes.stairs(density, edges, fill=True, color=colour, alpha=0.35)
            axes.stairs(density, edges, color=colour, linewidth=1.2, label=f"{legend} ({counts.sum():,})")
        if "genuine" in named and metrics.get("eer") is not None:
            axes.plot([], [], " ", label=f"EER {100 * metrics['eer']:.2f} %")
        axes.set_title(title, fontsize=FONT + 1)
        axes.set_xlabel(label, fontsize=FONT + 1)
        axes.set(yticks=[], xlim=_span([histograms[name] for name in named if name in histograms]))
        axes.set_ylim(0, 1.45 * axes.get_ylim()[1])  # the legend stands above the curves
        axes.tick_params(labelsize=FONT)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.legend(fontsize=FONT - 1, frameon=False, loc="upper left")
    return figure


def roc_curves(results: Sequence[SetResult]) -> Curves:
    """The ROC of every set that has one, as `roc_figure` takes them."""
    curves = {}
    for result in results:
        if result.roc is not None:
            eer = result.metrics.get("eer")
            label = "" if eer is None else f"EER {100 * eer:.2f} %"
            curves[result.name] = {"far": result.roc[0], "tar": result.roc[1], "label": label}
    return {"pairs of images": curves}


def nearest_pairs(result: SetResult, count: int) -> Pairs:
    """The `count` generated images that are most like a training image. Raises UserError where an image is gone."""
    found = result.nearest_training_images[:count]
    return Pairs(
        _read(result.root, [generated for generated, _, _ in found]),
        _read(result.training_root, [training for _, training, _ in found]),
        [cosine for _, _, cosine in found],
    )


def nearest_figure(pairs: Pairs) -> Figure:
    """Generated faces above the training faces most like them, with the cosine."""
    return image_grid(
        [pairs.generated, pairs.training],
        rows=["generated", "nearest in\ntraining"],
        notes=[[], [f"cos {cosine:.2f}" for cosine in pairs.cosines]],
    )[0]


def identity_strips(result: SetResult, num_identities: int, num_images: int) -> Strips:
    """The identities of the highest and of the lowest consistency, with their first images. Raises UserError where an
    image is gone."""
    order = np.argsort(-result.identities.consistency, kind="stable")  # (K,)
    num_best = min(num_identities, -(-len(order) // 2))
    num_worst = min(num_identities, len(order) - num_best)
    chosen = [*order[:num_best], *order[len(order) - num_worst :]]
    rows = [np.flatnonzero(result.images.identity == identity)[:num_images] for identity in chosen]
    images = iter(_read(result.root, result.images.files[np.concatenate(rows)].tolist()))
    return Strips(
        names=[str(result.identities.names[identity]) for identity in chosen],
        consistency=[float(result.identities.consistency[identity]) for identity in chosen],
        images=[[next(images) for _ in row] for row in rows],
        cosines=[result.images.centre_cosine[row].tolist() for row in rows],
        num_best=num_best,
    )


def strips_figure(strips: Strips) -> Figure:
    """A row an identity, the best above a gap, the worst below; each image with its cosine to the centre."""
    rows = [f"{name}\nmean {mean:.2f}" for name, mean in zip(strips.names, strips.consistency, strict=True)]
    return image_grid(
        strips.images,
        rows=rows,
        notes=[[f"{cosine:.2f}" for cosine in row] for row in strips.cosines],
        breaks={strips.num_best},
    )[0]


def _read(root: str, files: Sequence[str]) -> list[np.ndarray]:
    """Images by their names in the set at `root`."""
    images = open_labelled(root)
    numbers = {name: number for number, name in enumerate(images.names)}
    gone = next((name for name in files if name not in numbers), None)
    if gone is not None:
        raise UserError(f"evaluation.dir: {root} holds no {gone} any more; evaluate the set again")
    return [images.pixels(numbers[name]) for name in files]


def _span(histograms: Sequence[Histogram]) -> tuple[float, float]:
    """From the lower edge of the first filled bin to the upper edge of the last; (-1, 1) where none is."""
    filled = [(histogram.edges, np.flatnonzero(histogram.counts)) for histogram in histograms]
    ends = [(edges[bins[0]], edges[bins[-1] + 1]) for edges, bins in filled if len(bins)]
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (-1.0, 1.0)
