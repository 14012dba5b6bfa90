"""Samplers: functions over one signature, (unet, x_T, context, schedule, *, settings).

What predicts the noise (guidance, the two stages of UIFace) is separate from what steps to the next timestep (DDIM,
ancestral DDPM): a *predictor* is called as predict(x_t, t) -> eps, and knows nothing of the solver that calls it.

| paper | here |
| --- | --- |
| alpha_bar_t, alpha_bar_{t-1} (DDPM; DDIM writes alpha_t) | alpha_bar, alpha_bar_previous |
| eps_theta(x_t, t, c), eps_theta(x_t, t, empty) | eps_id, eps_empty |
| sigma_t, eta (DDIM equation 16) | sigma, eta |
| h_t, d_t (UIFace) | h, d |

Legend: B batch, C channels, H W height and width, D context width. Every sample's trajectory depends on its own x_T,
context, noise and the settings alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.attention_maps import aggregate_cross_maps, map_change
from diffusion.schedule import NoiseSchedule
from models.diffusion.attention import AttentionControl
from models.diffusion.context import PreparedContext
from models.diffusion.unet import ConditionalUNet
from utils.config import UserError

INDEXINGS = ("exact", "published")

Predictor = Callable[[Tensor, int], Tensor]  # (x_t (B, C, H, W), t) -> eps (B, C, H, W)
Callback = Callable[[int, int, Tensor, Tensor], None]  # (step number, t, x_t, x_0 as predicted at t), before the update
Generators = torch.Generator | Sequence[torch.Generator] | None  # a sequence holds one for each sample


@dataclass
class TwoStageResult:
    """x_0 (B, C, H, W); d (stage-1 steps - 1, B), the change of the attention map from the second step on; switch_t
    (B,) long, the timestep whose d fell under the threshold, -1 where none did; timesteps, all of them, descending."""

    x_0: Tensor
    d: Tensor
    switch_t: Tensor
    timesteps: list[int]


# --------------------------------------------------------------------------------------------------------- samplers


@torch.no_grad()
def sample_ddim(
    unet: ConditionalUNet,
    x_T: Tensor,
    context: Tensor | None,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 50,
    indexing: str = "exact",
    eta: float = 0.0,
    guidance_scale: float = 0.0,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """One-stage sampling with DDIM (Song et al., ICLR 2021), as ADMIS (FRCSyn, CVPR 2024) does with a guidance of 0.

    x_T (B, C, H, W) noise; context (B, D) or None for the empty one. Settings as in `solve_ddim` and `GuidedPredictor`.
    Returns x_0 (B, C, H, W).
    """
    with evaluating(unet):
        predict = GuidedPredictor(unet, context, len(x_T), guidance_scale)
        return solve_ddim(predict, x_T, schedule, num_steps, indexing, eta, generator, callback)


@torch.no_grad()
def sample_ddpm(
    unet: ConditionalUNet,
    x_T: Tensor,
    context: Tensor | None,
    schedule: NoiseSchedule,
    *,
    guidance_scale: float = 0.0,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling over all T steps (DDPM, algorithm 2), as IDiff-Face (ICCV 2023) samples.

    x_T (B, C, H, W) noise; context (B, D) or None for the empty one. Returns x_0 (B, C, H, W).
    """
    with evaluating(unet):
        predict = GuidedPredictor(unet, context, len(x_T), guidance_scale)
        return solve_ddpm(predict, x_T, schedule, generator, callback)


@torch.no_grad()
def sample_two_stage(
    unet: ConditionalUNet,
    x_T: Tensor,
    context: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 50,
    threshold: float = 0.006,
    min_t: int = 500,
    guidance_scale: float = 1.0,
    indexing: str = "exact",
    eta: float = 0.0,
    generator: Generators = None,
    callback: Callback | None = None,
) -> TwoStageResult:
    """The two-stage sampler of UIFace (ICLR 2025): content without identity first, then the identity, with DDIM steps.

    x_T (B, C, H, W) noise; context (B, D). threshold: of d_t, under which a sample takes its context from the next
    step on; it belongs to a checkpoint and a number of steps (see `calibrate_threshold`). 0 never switches before
    min_t, which makes min_t the fixed partition of the paper's appendix. min_t: the adaptive stage runs at t >= min_t.
    """
    with evaluating(unet):
        predict = TwoStagePredictor(unet, context, threshold=threshold, min_t=min_t, guidance_scale=guidance_scale)
        x_0 = solve_ddim(predict, x_T, schedule, num_steps, indexing, eta, generator, callback)
    return TwoStageResult(x_0, predict.d, predict.switch_t, ddim_timesteps(schedule.num_timesteps, num_steps))


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


# ------------------------------------------------------------------------------------------------------- predictors


class GuidedPredictor:
    """eps of the contexts, with classifier-free guidance (Ho & Salimans, 2022) away from the empty context."""

    def __init__(
        self, unet: ConditionalUNet, context: Tensor | None, batch_size: int, guidance_scale: float = 0.0
    ) -> None:
        """context (B, D) or None for the empty one, which guidance leaves as it is. guidance_scale s: see `guide`."""
        _check_context(context, batch_size)
        self.unet = unet
        self.guidance_scale = guidance_scale
        self.is_guided = context is not None and guidance_scale != 0
        if self.is_guided:
            contexts = prepare_with_empty(unet, context)
            rows = torch.arange(batch_size, device=context.device)
            self.contexts = contexts.select(torch.cat([torch.zeros_like(rows), rows + 1]))
        else:
            self.contexts = unet.prepare_context(context, batch_size)

    def __call__(self, x_t: Tensor, t: int) -> Tensor:
        if not self.is_guided:
            return _predict(self.unet, x_t, t, self.contexts)
        eps_empty, eps_id = _predict(self.unet, torch.cat([x_t, x_t]), t, self.contexts).chunk(2)
        return guide(eps_id, eps_empty, self.guidance_scale)


class TwoStagePredictor:
    """eps of UIFace's two stages. Keeps the state of one trajectory: which samples have switched, and d so far.

    Both branches run in one network pass: B samples with the empty context, and behind them those that need their
    identity, as followers, which take over the attention maps of the former. Before its switch a sample costs one
    evaluation a step.
    """

    def __init__(
        self, unet: ConditionalUNet, context: Tensor, *, threshold: float, min_t: int, guidance_scale: float
    ) -> None:
        if not unet.has_cross_attention:
            raise UserError(
                "sampler: the two-stage sampler needs identity cross-attention (condition_type CA, conditional)"
            )
        if context is None:
            raise UserError("contexts: the two-stage sampler needs identity contexts; use sample_ddim without them")
        if not threshold >= 0:
            raise UserError(f"threshold: {threshold}; give 0 (no adaptive switch) or more")
        self.unet = unet
        self.threshold = threshold
        self.min_t = min_t
        self.guidance_scale = guidance_scale
        self.batch_size = len(context)
        self.device = context.device
        self.switch_t = torch.full((self.batch_size,), -1, device=self.device)
        self.switched = torch.zeros(self.batch_size, dtype=torch.bool, device=self.device)
        self._changes: list[Tensor] = []
        self._h: Tensor | None = None
        self._contexts = prepare_with_empty(unet, context)  # row 0 empty, row 1 + i identity i
        self._set_followers(self.switched.nonzero().flatten())

    @property
    def d(self) -> Tensor:
        """(stage-1 steps - 1, B)."""
        return torch.stack(self._changes) if self._changes else torch.zeros(0, self.batch_size, device=self.device)

    def __call__(self, x_t: Tensor, t: int) -> Tensor:
        _check_context(self.switched, len(x_t))
        return self.stage_1(x_t, t) if t >= self.min_t else self.stage_2(x_t, t)

    def stage_1(self, x_t: Tensor, t: int) -> Tensor:
        """Adaptive stage: the empty context until the cross-attention map settles, then the identity."""
        # 1. eps_empty for all; eps_id, with the self-attention maps of the empty pass, for samples that have switched
        control = AttentionControl(source=self._followers, record_cross=True)
        eps, eps_id = self._predict(x_t, t, control)
        eps[self._followers] = eps_id
        # 2. h_t of the pass that made eps
        maps = aggregate_cross_maps(control.cross_maps, x_t.shape[-2:])
        h, h_id = maps.tensor_split([self.batch_size])
        h[self._followers] = h_id
        # 3. d_t, and the switch from the next step on where it fell under the threshold
        if self._h is not None:
            d_t = map_change(h, self._h)
            self._changes.append(d_t)
            newly = (d_t < self.threshold) & ~self.switched
            if newly.any():
                self.switch_t[newly] = t
                self.switched = self.switched | newly
                self._set_followers(self.switched.nonzero().flatten())
        self._h = h
        return eps

    def stage_2(self, x_t: Tensor, t: int) -> Tensor:
        """Guided stage: all samples with their identity, self- and cross-attention maps of the empty pass injected."""
        if len(self._followers) < self.batch_size:
            self._set_followers(torch.arange(self.batch_size, device=self.device))
        eps_empty, eps_id = self._predict(x_t, t, AttentionControl(source=self._followers, blend_cross=True))
        return guide(eps_id, eps_empty, self.guidance_scale)

    def _predict(self, x_t: Tensor, t: int, control: AttentionControl) -> tuple[Tensor, Tensor]:
        x_t = torch.cat([x_t, x_t[self._followers]])  # (B + F, C, H, W)
        return _predict(self.unet, x_t, t, self._pass_contexts, control).tensor_split([self.batch_size])

    def _set_followers(self, followers: Tensor) -> None:
        """Name the samples that run with their identity too, (F,) long, and gather the contexts of B + F rows."""
        self._followers = followers
        empty = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        self._pass_contexts = self._contexts.select(torch.cat([empty, followers + 1]))


def guide(eps_id: Tensor, eps_empty: Tensor, guidance_scale: float) -> Tensor:
    """(1 + s) eps_id - s eps_empty: s = 0 is no guidance. IDiff-Face and others write w = 1 + s."""
    return (1 + guidance_scale) * eps_id - guidance_scale * eps_empty


def prepare_with_empty(unet: ConditionalUNet, context: Tensor) -> PreparedContext:
    """Prepared contexts of B + 1 rows: the empty context, then the B given ones."""
    is_empty = torch.arange(len(context) + 1, device=context.device) == 0
    return unet.prepare_context(torch.cat([context[:1], context]), empty_mask=is_empty)


# ---------------------------------------------------------------------------------------------------------- solvers


def solve_ddim(
    predict: Predictor,
    x_T: Tensor,
    schedule: NoiseSchedule,
    num_steps: int,
    indexing: str = "exact",
    eta: float = 0.0,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM from x_T (B, C, H, W) to x_0 with the noise that `predict` sees.

    indexing: "exact" reads alpha_bar at the previous timestep, as DDIM does; "published" one index lower, as the code
    published with UIFace does. eta: 0 deterministic .. 1 as noisy as DDPM.
    """
    if indexing not in INDEXINGS:
        raise UserError(f"indexing: {indexing!r}; give one of {', '.join(INDEXINGS)}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta: {eta}; give a number from 0 (DDIM) to 1 (DDPM)")
    timesteps = ddim_timesteps(schedule.num_timesteps, num_steps)
    _check_generators(generator, len(x_T))
    x_t = x_T
    for i, t in enumerate(timesteps):
        t_previous = timesteps[i + 1] if i + 1 < len(timesteps) else -1
        alpha_bar = schedule.alpha_bar(t)
        alpha_bar_previous = schedule.alpha_bar(t_previous - 1 if indexing == "published" else t_previous)

        # 1. the noise in x_t
        eps = predict(x_t, t)
        # 2. "predicted x_0", DDIM equation 12
        x_0 = (x_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        # 3. sigma_t, DDIM equation 16
        sigma = eta * ((1 - alpha_bar_previous) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_previous)) ** 0.5
        # 4. "direction pointing to x_t", DDIM equation 12
        direction = max(1 - alpha_bar_previous - sigma**2, 0.0) ** 0.5 * eps
        if callback is not None:
            callback(i, t, x_t, x_0)
        # 5. x_{t-1}, DDIM equation 12
        x_t = alpha_bar_previous**0.5 * x_0 + direction
        if sigma > 0:
            x_t = x_t + sigma * draw_noise(x_t, generator)
    return x_t


def solve_ddpm(
    predict: Predictor,
    x_T: Tensor,
    schedule: NoiseSchedule,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling from x_T (B, C, H, W) to x_0 with the noise that `predict` sees, variance beta_t."""
    _check_generators(generator, len(x_T))
    x_t = x_T
    for i, t in enumerate(reversed(range(schedule.num_timesteps))):
        beta, alpha_bar = schedule.beta(t), schedule.alpha_bar(t)
        # 1. the noise in x_t
        eps = predict(x_t, t)
        if callback is not None:
            callback(i, t, x_t, (x_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5)
        # 2. the mean of x_{t-1}, DDPM equation 11
        x_t = (x_t - beta / (1 - alpha_bar) ** 0.5 * eps) / (1 - beta) ** 0.5
        # 3. its noise; none in the last two steps, as in the code published with IDiff-Face (DDPM: the last one)
        if t > 1:
            x_t = x_t + beta**0.5 * draw_noise(x_t, generator)
    return x_t


def ddim_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """The timesteps of `num_steps` steps, descending to 0: every (T // num_steps)-th, so 31 of them for 30 of 1000."""
    if not 1 <= num_steps <= num_timesteps:
        raise UserError(
            f"num_steps: {num_steps}; give a number from 1 to {num_timesteps}, the timesteps of the schedule"
        )
    return list(reversed(range(0, num_timesteps, num_timesteps // num_steps)))


def draw_noise(like: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise of the shape, type and device of `like` (B, C, H, W).

    With one generator for each sample, a sample's noise does not depend on the batch it is in. A generator on the CPU
    gives the same noise for every device.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return _randn(like.shape, like, generator)
    return torch.stack([_randn(like.shape[1:], like, one) for one in generator])


def _randn(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


@contextmanager
def evaluating(unet: ConditionalUNet) -> Iterator[None]:
    """Put every submodule into evaluation mode, and back into the mode it was in."""
    training = [module for module in unet.modules() if module.training]
    unet.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _predict(
    unet: ConditionalUNet, x_t: Tensor, t: int, contexts: PreparedContext, control: AttentionControl | None = None
) -> Tensor:
    timesteps = torch.full((len(x_t),), t, device=x_t.device)
    # under autocast the network returns half precision; the trajectory stays in the precision of x_T
    return unet(x_t, timesteps, contexts, control=control).to(x_t.dtype)


def _check_context(context: Tensor | None, batch_size: int) -> None:
    if context is not None and len(context) != batch_size:
        raise ValueError(f"context: {len(context)} contexts for a batch of {batch_size}")


def _check_generators(generator: Generators, batch_size: int) -> None:
    if isinstance(generator, Sequence) and len(generator) != batch_size:
        raise ValueError(
            f"generator: {len(generator)} generators for a batch of {batch_size}; give one or one a sample"
        )
