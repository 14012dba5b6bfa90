"""Samplers: settings that say what predicts the noise and what steps to the next timestep, and functions over one
signature, (unet, x_T, context, schedule, *, settings).

The parts are separate: rules (diffusion.rules: guidance, the two stages of UIFace) know nothing of solvers
(diffusion.solvers: DDIM, ancestral DDPM, DPM-Solver++), and the engine that joins them (diffusion.engine) draws data
sets with the same code as the functions here, which send all samples through the network together.

Legend: B batch, C channels, H W height and width, D context width. Every sample's trajectory depends on its own x_T,
context, noise and the settings alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion import rules, solvers
from diffusion.engine import Callback, Engine, Start, Trajectory, evaluating
from diffusion.rules import Interval, Rule
from diffusion.schedule import NoiseSchedule
from diffusion.solvers import DDIM, Generators, Solver, ddim_timesteps
from models.diffusion.unet import ConditionalUNet
from utils.config import UserError

# ----------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True, kw_only=True)
class Ddpm:
    """One stage, ancestral sampling over all T steps (DDPM, algorithm 2), as IDiff-Face (ICCV 2023) samples."""

    guidance_scale: float = 0.0  # s in (1 + s) eps_id - s eps_empty
    guidance_interval: Interval = None  # [lowest, highest] timestep at which guidance acts; None: all

    def parts(self, schedule: NoiseSchedule) -> tuple[Rule, Solver]:
        """What predicts the noise and what steps. Raises UserError for settings that are none."""
        return rules.OneStage(self.guidance_scale, self.guidance_interval), solvers.ddpm(schedule)


@dataclass(frozen=True, kw_only=True)
class OneStage:
    """One stage, the identity from the first step on, as ADMIS (FRCSyn, CVPR 2024) draws with a guidance of 0."""

    solver: str = DDIM  # ddim (Song et al., ICLR 2021), dpm_solver_2m (Lu et al., 2022)
    num_steps: int = 50
    indexing: str = "exact"  # of alpha_bar in ddim: exact, or published with UIFace
    eta: float = 0.0  # of ddim: 0 deterministic .. 1 as noisy as DDPM
    guidance_scale: float = 0.0  # s in (1 + s) eps_id - s eps_empty
    guidance_interval: Interval = None  # [lowest, highest] timestep at which guidance acts; None: all

    def parts(self, schedule: NoiseSchedule) -> tuple[Rule, Solver]:
        """What predicts the noise and what steps. Raises UserError for settings that are none."""
        rule = rules.OneStage(self.guidance_scale, self.guidance_interval)
        return rule, solvers.make_solver(schedule, self.solver, self.num_steps, self.indexing, self.eta)


@dataclass(frozen=True, kw_only=True)
class TwoStage:
    """The two-stage sampler of UIFace (ICLR 2025): content without identity first, then the identity.

    threshold: of d_t, under which a sample takes its context from the next step on; it belongs to a checkpoint (see
    `calibrate_threshold`) and to `threshold_num_steps` steps, and is rescaled where `num_steps` differ
    (`rules.rescaled_threshold`). 0 never switches before min_t, which makes min_t the fixed partition of the paper's
    appendix.
    """

    solver: str = DDIM  # ddim (Song et al., ICLR 2021), dpm_solver_2m (Lu et al., 2022)
    num_steps: int = 50
    indexing: str = "exact"  # of alpha_bar in ddim: exact, or published with UIFace
    eta: float = 0.0  # of ddim: 0 deterministic .. 1 as noisy as DDPM
    threshold: float = 0.006
    threshold_num_steps: int | None = None  # None: num_steps
    min_t: int = 500  # the adaptive stage runs at t >= min_t
    guidance_scale: float = 1.0  # s in (1 + s) eps_id - s eps_empty, in stage 2
    guidance_interval: Interval = None  # [lowest, highest] timestep of stage 2 at which guidance acts; None: all

    def parts(self, schedule: NoiseSchedule) -> tuple[Rule, Solver]:
        """What predicts the noise and what steps. Raises UserError for settings that are none."""
        solver = solvers.make_solver(schedule, self.solver, self.num_steps, self.indexing, self.eta)
        threshold = self.threshold
        if self.threshold_num_steps is not None:
            strides = [solvers.stride(schedule.num_timesteps, n) for n in (self.num_steps, self.threshold_num_steps)]
            threshold = rules.rescaled_threshold(threshold, *strides)
        return rules.TwoStage(threshold, self.min_t, self.guidance_scale, self.guidance_interval), solver


Sampler = Ddpm | OneStage | TwoStage


@dataclass
class TwoStageResult:
    """x_0 (B, C, H, W); d (stage-1 steps - 1, B), the change of the attention map from the second step on; switch_t
    (B,) long, the timestep whose d fell under the threshold, -1 where none did; timesteps, all of them, descending."""

    x_0: Tensor
    d: Tensor
    switch_t: Tensor
    timesteps: list[int]


# ---------------------------------------------------------------------------------------------------------- functions


def sample_ddim(
    unet: ConditionalUNet,
    x_T: Tensor,
    context: Tensor | None,
    schedule: NoiseSchedule,
    *,
    negative: Tensor | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
    **settings: Any,
) -> Tensor:
    """One-stage sampling with DDIM, or the solver in `settings`, the fields of `OneStage`.

    x_T (B, C, H, W) noise; context (B, D) or None for the empty one; negative (B, D): contexts that guidance leads away
    from, None for the empty one. Returns x_0 (B, C, H, W).
    """
    sampler = OneStage(**settings)
    return _stacked(_draw(sampler, unet, x_T, context, schedule, negative, generator, callback))


def sample_ddpm(
    unet: ConditionalUNet,
    x_T: Tensor,
    context: Tensor | None,
    schedule: NoiseSchedule,
    *,
    negative: Tensor | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
    **settings: Any,
) -> Tensor:
    """Ancestral sampling over all T steps; `settings` are the fields of `Ddpm`, the rest is as in `sample_ddim`."""
    sampler = Ddpm(**settings)
    return _stacked(_draw(sampler, unet, x_T, context, schedule, negative, generator, callback))


def sample_two_stage(
    unet: ConditionalUNet,
    x_T: Tensor,
    context: Tensor,
    schedule: NoiseSchedule,
    *,
    threshold: float | Tensor = 0.006,
    negative: Tensor | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
    **settings: Any,
) -> TwoStageResult:
    """The two-stage sampler of UIFace; `settings` are the other fields of `TwoStage`, the rest as in `sample_ddim`.

    threshold: of all samples, or (B,), each sample's own, as it is.
    """
    own = threshold.tolist() if isinstance(threshold, Tensor) else None
    sampler = TwoStage(**settings) if own is not None else TwoStage(threshold=threshold, **settings)
    drawn = _draw(sampler, unet, x_T, context, schedule, negative, generator, callback, own)
    d = torch.tensor([sample.progress.d for sample in drawn], device=x_T.device).T  # (S - 1, B)
    switch_t = torch.tensor([sample.progress.switch_t for sample in drawn], device=x_T.device)
    return TwoStageResult(_stacked(drawn), d, switch_t, ddim_timesteps(schedule.num_timesteps, sampler.num_steps))


def check_network(sampler: Sampler, unet: ConditionalUNet, has_contexts: bool) -> None:
    """Raise UserError for a network, or contexts, that the sampler cannot work with."""
    if not isinstance(sampler, TwoStage):
        return
    if not unet.has_cross_attention:
        raise UserError(
            "sampler: the two-stage sampler needs identity cross-attention (condition_type CA, conditional); take "
            "sampler=ddim or ddpm"
        )
    if not has_contexts:
        raise UserError("contexts: the two-stage sampler needs identity contexts; use sample_ddim without them")


def calibrate_threshold(d: Tensor, timesteps: Sequence[int], target_t: int) -> float:
    """The lowest threshold under which the median sample has switched at `target_t`.

    d (stage-1 steps - 1, B) and timesteps as a two-stage run with threshold 0 recorded them: up to its own switch a
    sample runs the same at every threshold, so its d is what another threshold would have met. Raises UserError for a
    target outside the recorded steps.
    """
    recorded = list(timesteps[1 : len(d) + 1])
    if not recorded or not recorded[-1] <= target_t <= recorded[0]:
        span = f"{recorded[0]} to {recorded[-1]}" if recorded else "none"
        raise UserError(f"target_t: {target_t} is outside the recorded timesteps of stage 1 ({span})")
    up_to_target = d[: sum(t >= target_t for t in recorded)].float()
    lowest = up_to_target.amin(dim=0)  # (B,): a sample switches once the threshold is above this
    return float(np.nextafter(np.float32(lowest.median().item()), np.float32(np.inf)))


def _draw(
    sampler: Sampler,
    unet: ConditionalUNet,
    x_T: Tensor,
    context: Tensor | None,
    schedule: NoiseSchedule,
    negative: Tensor | None,
    generator: Generators,
    callback: Callback | None,
    thresholds: Sequence[float] | None = None,
) -> list[Trajectory]:
    """All samples together, in the order of x_T."""
    size = len(x_T)
    check_network(sampler, unet, context is not None)
    rule, solver = sampler.parts(schedule)
    for name, rows in (("context", context), ("negative", negative)):
        if rows is not None and len(rows) != size:
            raise ValueError(f"{name}: {len(rows)} contexts for a batch of {size}")
    if isinstance(generator, Sequence) and len(generator) != size:
        raise ValueError(f"generator: {len(generator)} generators for a batch of {size}; give one or one a sample")
    generators = generator if isinstance(generator, Sequence) else [generator] * size
    starts = [
        Start(
            key=row,
            x_T=x_T[row],
            context=None if context is None else context[row],
            negative=None if negative is None else negative[row],
            generator=generators[row],
            threshold=None if thresholds is None else thresholds[row],
        )
        for row in range(size)
    ]
    with evaluating(unet):
        drawn = list(Engine(unet, rule, solver, callback=callback).run(starts))
    return sorted(drawn, key=lambda sample: sample.start.key)


def _stacked(drawn: Sequence[Trajectory]) -> Tensor:
    return torch.stack([sample.x_t for sample in drawn])
