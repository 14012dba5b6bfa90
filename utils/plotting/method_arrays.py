"""The numbers and images behind the figures of the method.

Legend: n images, k shown timesteps, S steps, R rows, C columns (of latents: channels), h w and H W height and width of
latents and of images, M side of the aggregated map, D context width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffusion.drawing import Drawn, FaceDrawer
from diffusion.engine import Observation
from diffusion.layouts import Sample
from diffusion.perturbation import lower_bounds, turn
from diffusion.samplers import OneStage, Sampler, TwoStage
from diffusion.sampling_settings import series_timesteps
from utils.distributed import seed_for
from utils.plotting.settings import Method
from utils.precision import autocast


@dataclass(frozen=True)
class AttentionChange:
    """d_t of n images over the S steps of stage 1."""

    timesteps: list[int]  # (S - 1,) descending, from the second step on
    d: np.ndarray  # (S - 1, n)
    switch_t: np.ndarray  # (n,), -1 where an image does not switch
    threshold: float
    min_t: int  # of stage 1


@dataclass(frozen=True)
class Path:
    """One image on its way, at k timesteps."""

    timesteps: list[int]  # (k,) descending
    predicted: np.ndarray  # uint8 (k, H, W, 3), x_0 as predicted there, with all that the sampler does
    h: np.ndarray  # (k, M, M) in [0, 1], the aggregated cross-attention map
    d: np.ndarray  # (k,) its change since the step before; nan in the first step and in stage 2
    switch_t: int  # -1 where it did not switch
    min_t: int
    sample: np.ndarray  # uint8 (H, W, 3), what comes out
    empty: np.ndarray  # uint8 (k, H, W, 3), x_0 as the network predicts it from the same x_t without a context
    identity: np.ndarray  # the same, with the identity's context


@dataclass(frozen=True)
class Grid:
    """Images in rows and columns."""

    images: np.ndarray  # uint8 (R, C, H, W, 3)
    rows: list[str]
    columns: list[str]
    marked: np.ndarray | None = None  # (C,) bool; None: no column


class Recorder:
    """An engine's observer that keeps what it sees."""

    def __init__(self) -> None:
        self.steps: list[Observation] = []  # of one sample, in order

    def __call__(self, seen: Observation) -> None:
        h = None if seen.h is None else seen.h.clone()
        self.steps.append(replace(seen, x_t=seen.x_t.clone(), x_0=seen.x_0.clone(), h=h))


def attention_change(method: Method) -> AttentionChange:
    """d_t (UIFace, ICLR 2025) of `n_curves` images, dealt out among the first identities."""
    sampler, names = method.sampler, method.identities.names
    count = method.figures.n_curves
    drawer = method.drawer()
    jobs = method.jobs([(names[number % len(names)], number // len(names)) for number in range(count)])
    drawn = {sample.start.key: sample.progress for sample in drawer.trajectories(jobs)}
    return AttentionChange(
        series_timesteps(method.generator, sampler),
        np.array([drawn[job.key].d for job in jobs]).T,
        np.array([drawn[job.key].switch_t for job in jobs]),
        drawer.engine.rule.threshold,
        sampler.min_t,
    )


def path(method: Method) -> Path:
    """The image (`identity`, `index`) at `n_timesteps` of its steps."""
    recorder = Recorder()
    drawer = method.drawer(observer=recorder)
    (sample,) = drawer.trajectories(method.jobs([(method.identity, method.figures.index)]))
    timesteps = drawer.engine.solver.timesteps
    steps = spread(len(timesteps), method.figures.n_timesteps)
    shown = [recorder.steps[step] for step in steps]
    d = dict(zip(series_timesteps(method.generator, method.sampler), sample.progress.d, strict=True))
    x_t = torch.stack([seen.x_t for seen in shown])  # (k, C, h, w)
    return Path(
        timesteps=[seen.t for seen in shown],
        predicted=drawer.decode(torch.stack([seen.x_0 for seen in shown])),
        h=torch.stack([seen.h for seen in shown]).cpu().numpy(),
        d=np.array([d.get(seen.t, np.nan) for seen in shown]),
        switch_t=sample.progress.switch_t,
        min_t=method.sampler.min_t,
        sample=drawer.decode(sample.x_t[None])[0],
        empty=drawer.decode(predict(drawer, x_t, steps, None)),
        identity=drawer.decode(predict(drawer, x_t, steps, sample.start.context)),
    )


@torch.no_grad()
def predict(drawer: FaceDrawer, x_t: Tensor, steps: list[int], context: Tensor | None) -> Tensor:
    """x_0 (k, C, h, w) as the network alone, without injection and guidance, predicts it from x_t (k, C, h, w) at the
    steps of these numbers. context: as the network takes it, (D,) or a class number; None: the empty one."""
    solver = drawer.engine.solver
    t = torch.tensor([solver.timesteps[step] for step in steps], device=x_t.device)
    given = None if context is None else context.expand(len(x_t), *context.shape)
    with autocast(x_t.device, drawer.settings.precision):
        eps = drawer.generator.unet(x_t, t, given)
    return solver.predict_x_0(steps, x_t, eps.to(x_t.dtype))


def comparison(method: Method) -> Grid:
    """`n_rows` images of one identity, a row each, and a sampler a column: each row starts from the same noise, and is
    given the same on its way."""
    jobs = method.jobs([(method.identity, row) for row in range(method.figures.n_rows)])
    columns = compared_samplers(method.sampler, method.figures.fixed_t0)
    drawn = [method.draw(sampler, jobs) for sampler in columns.values()]
    rows = [f"noise {row + 1}\n{_switch(image.switch_t)}" for row, image in enumerate(drawn[-1])]
    return _grid(drawn, rows, list(columns))


def compared_samplers(sampler: TwoStage, fixed_t0: list[int]) -> dict[str, Sampler]:
    """One stage without guidance (ADMIS) and with that of `sampler`; two stages parted at each t0 (UIFace's appendix);
    `sampler` itself. All with its solver and steps."""
    shared = {setting.name: getattr(sampler, setting.name) for setting in dataclasses.fields(OneStage)}
    one_stage = OneStage(**shared)
    found: dict[str, Sampler] = {"one stage": replace(one_stage, guidance_scale=0.0)}
    if sampler.guidance_scale != 0:
        found[f"one stage,\n$s$ = {sampler.guidance_scale:g}"] = one_stage
    for t0 in fixed_t0:
        found[f"$t_0$ = {t0}"] = replace(sampler, threshold=0.0, threshold_num_steps=None, min_t=t0)
    return {**found, "adaptive": sampler}


def guidance(method: Method) -> Grid:
    """The image `index` of `n_rows` identities, a row each, and a guidance scale a column; the same noise in a row."""
    names = method.identities.names
    first = names.index(method.identity)
    names = (names[first:] + names[:first])[: method.figures.n_rows]
    jobs = method.jobs([(name, method.figures.index) for name in names])
    scales = method.figures.guidance_scales
    drawn = [method.draw(replace(method.sampler, guidance_scale=scale), jobs) for scale in scales]
    return _grid(drawn, names, [f"$s$ = {scale:g}" for scale in scales])


def perturbation(method: Method) -> Grid:
    """`n_rows` images of one identity, a row each, and a cosine of the context with the identity's own a column.

    A row has the same noise and the same direction of perturbation throughout (IDperturb, CVPR 2026). Marked: those
    further off than half way to the nearest other identity, which perturbation does not take.
    """
    identities = method.identities
    bounds = lower_bounds(identities.contexts.numpy(), identities.neighbours.numpy(), 0.0)
    bound = bounds[identities.names.index(method.identity)]
    cosines, rows = method.figures.perturbation_cosines, range(method.figures.n_rows)
    drawn: list[list[Drawn]] = []
    for cosine in cosines:
        samples: list[Sample] = [(method.identity, row) for row in rows]
        jobs = method.jobs(samples)
        for job, (name, index) in zip(jobs, samples, strict=True):
            generator = np.random.default_rng(seed_for(method.sampling.seed, "perturbation figure", name, index))
            turned = turn(job.context.double().numpy(), cosine, generator)
            job.context = torch.from_numpy(turned).to(job.context.dtype)
        drawn.append(method.draw(method.sampler, jobs))
    grid = _grid(drawn, [f"noise {row + 1}" for row in rows], [f"cos = {cosine:g}" for cosine in cosines])
    return replace(grid, marked=np.array(cosines) < bound)


def spread(size: int, count: int) -> list[int]:
    """`count` numbers out of 0 .. size - 1, the first and the last among them, evenly apart; all where there are
    fewer."""
    return sorted({round(x) for x in np.linspace(0, size - 1, min(count, size)).tolist()})


def _switch(switch_t: int) -> str:
    return "no switch" if switch_t < 0 else f"switch at {switch_t}"


def _grid(drawn: list[list[Drawn]], rows: list[str], columns: list[str]) -> Grid:
    """drawn: by column, then row."""
    images = np.stack([np.stack([image.image for image in column]) for column in drawn], axis=1)
    return Grid(images, rows, columns)
