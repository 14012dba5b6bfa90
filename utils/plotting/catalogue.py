"""All figures by name: title, caption, what each needs, how it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusion.samplers import TwoStage
from evaluation.results import SetResult
from utils.config import UserError
from utils.logging import get_logger
from utils.plotting import method_arrays, result_plots
from utils.plotting.canvas import png
from utils.plotting.method_plots import (
    BEYOND,
    attention_change_figure,
    attention_maps_figure,
    grid_figure,
    stages_figure,
)
from utils.plotting.roc import roc_figure
from utils.plotting.settings import EvaluationSettings, Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = get_logger(__name__)

Made = tuple[str, str, bytes]  # title, caption, PNG


@dataclass(frozen=True)
class MethodFigure:
    """A figure of a generator and its sampler."""

    title: str
    caption: str
    make: Callable[[Method], Figure]
    has_stages: bool = True  # whether only the two-stage sampler has it
    turns_contexts: bool = False


@dataclass(frozen=True)
class SetFigure:
    """A figure of evaluated sets: of each of them, or one of all."""

    title: str
    caption: str
    make: Callable[[Sequence[SetResult], EvaluationSettings], Figure]
    lacks: Callable[[SetResult], str | None]  # what the set has not that the figure shows
    is_joint: bool = False


Work = tuple[str, SetFigure, list[SetResult]]  # name of the file, figure, sets in it


METHOD_FIGURES = {
    "attention_change": MethodFigure(
        "Change of the attention map",
        "Change d_t of the aggregated cross-attention map in stage 1; sampling goes from left to right. Grey: with the "
        "empty context; orange: with the identity, from the step after the switch on; black: the median of the images. "
        "An image takes its identity when d_t falls under the threshold (dots), at the latest in stage 2. Below: how "
        "many take it when.",
        lambda method: attention_change_figure(method_arrays.attention_change(method)),
    ),
    "attention_maps": MethodFigure(
        "Attention map and predicted image",
        "One image on its way. Above: x_0 as predicted at t; middle: the aggregated cross-attention map h_t, 0 black "
        "to 1 yellow; below: the map over the image. The bar shows what the sampler does at t.",
        lambda method: attention_maps_figure(method_arrays.path(method)),
    ),
    "stages": MethodFigure(
        "The two stages",
        "x_0 as the network predicts it from the same x_t with the empty context and with the identity's, and as the "
        "two-stage sampler goes on from it. The bar shows what the sampler does at t.",
        lambda method: stages_figure(method_arrays.path(method)),
    ),
    "comparison": MethodFigure(
        "One stage, fixed and adaptive partition",
        "One identity from the same noise in each row: sampling in one stage (s: guidance scale), in two stages parted "
        "at a fixed t_0, and in two stages parted where the image's own attention map has settled: at the timestep "
        "beside the row.",
        lambda method: grid_figure(method_arrays.comparison(method)),
    ),
    "guidance": MethodFigure(
        "Guidance",
        "The guidance scale s in (1 + s) eps_id - s eps_empty. A row is one identity from one noise.",
        lambda method: grid_figure(method_arrays.guidance(method)),
        has_stages=False,
    ),
    "perturbation": MethodFigure(
        "Identity perturbation",
        "The context turned away from its identity's, to the cosine above the column. A row has the same noise and the "
        "same direction. Perturbation does not go further than half way to the nearest other identity.",
        lambda method: grid_figure(method_arrays.perturbation(method), BEYOND),
        has_stages=False,
        turns_contexts=True,
    ),
}

SET_FIGURES = {
    "scores": SetFigure(
        "Distributions of scores",
        "Cosines of the embeddings, as densities; in brackets how many.",
        lambda results, _: result_plots.scores_figure(results[0].histograms, results[0].metrics),
        lambda result: None if result.histograms else "histograms of scores",
    ),
    "roc": SetFigure(
        "ROC",
        "Genuine pairs accepted over impostor pairs accepted, among the images of each set.",
        lambda results, _: roc_figure(result_plots.roc_curves(results)),
        lambda result: "ROC" if result.roc is None else None,
        is_joint=True,
    ),
    "nearest_training": SetFigure(
        "Nearest training faces",
        "The generated faces most like a training face, and that face, with the cosine of their embeddings.",
        lambda results, shown: result_plots.nearest_figure(result_plots.nearest_pairs(results[0], shown.n_pairs)),
        lambda result: None if result.nearest_training_images else "nearest training images; give it a real set",
    ),
    "strips": SetFigure(
        "Best and worst identities",
        "The identities whose images lie nearest to their centre, and those whose images lie furthest from it; below "
        "each image its cosine to the centre.",
        lambda results, shown: result_plots.strips_figure(
            result_plots.identity_strips(results[0], shown.n_identities, shown.n_images)
        ),
        lambda result: None if len(result.identities.names) else "identities",
    ),
}
NAMES = (*METHOD_FIGURES, *SET_FIGURES)


def method_figures(method: Method, names: Sequence[str] | None = None) -> list[Made]:
    """(title, caption, PNG) of the method's figures, as a report embeds them; names None: all that this sampler and
    model have. Raises UserError, before any is drawn, for a name that they have not."""
    return [made for _, made in draw_method(method, method_names(method, names))]


def method_names(method: Method, names: Sequence[str] | None = None) -> list[str]:
    """These names, checked; None: those of all figures that the sampler and the model have. Raises UserError for one
    that they have not."""
    lacking = {name: reason for name in METHOD_FIGURES if (reason := _lacks(method, METHOD_FIGURES[name])) is not None}
    if names is None:
        for name, reason in lacking.items():
            log.info("figure %s left out: %s", name, reason)
        return [name for name in METHOD_FIGURES if name not in lacking]
    for name in names:
        if name in lacking:
            raise UserError(f"figure: {name}: {lacking[name]}")
    return list(names)


def draw_method(method: Method, names: Sequence[str]) -> Iterator[tuple[str, Made]]:
    """Make the figures of these names, from `method_names`, each when it is asked for. A threshold `auto` is measured
    first."""
    if not names:
        return
    method = method.calibrated()
    for name in names:
        figure = METHOD_FIGURES[name]
        yield name, _made(figure.make(method), figure.title, figure.caption)


def set_work(results: Sequence[SetResult], names: Sequence[str] | None = None) -> list[Work]:
    """The figures of these names of each set, or one of all; names None: all that the results hold. Raises UserError
    for a figure that a result does not hold."""
    work = []
    for name in SET_FIGURES if names is None else names:
        figure = SET_FIGURES[name]
        having = []
        for result in results:
            lacking = figure.lacks(result)
            if lacking is None:
                having.append(result)
            elif names is not None:
                raise UserError(f"figure: {name}: the evaluation of {result.name} holds no {lacking}")
            else:
                log.info("figure %s of %s left out: no %s", name, result.name, lacking)
        for group in [having] if figure.is_joint else [[result] for result in having]:
            suffix = f"_{group[0].name}" if group and len(results) > 1 and not figure.is_joint else ""
            work += [(name + suffix, figure, group)] if group else []
    return work


def draw_sets(work: Sequence[Work], settings: EvaluationSettings) -> Iterator[tuple[str, Made]]:
    """Make the figures of `set_work`, each when it is asked for."""
    for name, figure, group in work:
        title = figure.title if figure.is_joint else f"{figure.title}: {group[0].name}"
        yield name, _made(figure.make(group, settings), title, figure.caption)


def _made(figure: Figure, title: str, caption: str) -> Made:
    return title, caption, png(figure, title, caption)


def _lacks(method: Method, figure: MethodFigure) -> str | None:
    """Why the sampler or the model has not this figure; None: it has."""
    if figure.has_stages and not isinstance(method.sampler, TwoStage):
        return f"only the two-stage sampler has it (sampler=two_stage), not {type(method.sampler).__name__}"
    if method.identities.contexts is None:
        return "the model is unconditional"
    if figure.turns_contexts and method.identities.neighbours is None:
        return "the model takes classes, and only vectors can be turned"
    return None
