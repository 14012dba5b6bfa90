"""What predicts the noise in a step of one sample: which contexts the network sees, and how their outputs combine.

A rule knows nothing of solvers, batches and the network; it says for one sample at one timestep which rows it asks of
the network (an `Evaluation`), and it is told what the cross-attention maps looked like. Guidance everywhere is
eps = (1 + s) eps_id - s eps_away (Ho & Salimans, 2022), away from the empty context or, in negative identity guidance
(NegFaceDiff), from the context of somebody else.

Legend: n samples, S side of the aggregated map.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from diffusion.attention_maps import map_change
from utils.config import UserError

Interval = Sequence[float] | None  # (lowest, highest) timestep at which guidance acts; None: all


class Branch(Enum):
    """The context of one row of a network pass."""

    EMPTY = "empty"
    IDENTITY = "identity"
    NEGATIVE = "negative"


@dataclass(frozen=True)
class Evaluation:
    """What one step of one sample asks of the network: eps = (1 + scale) eps[main] - scale eps[away]."""

    branches: tuple[Branch, ...]  # a row each
    main: int = 0  # of branches; its cross-attention maps make h_t, too
    away: int = 0
    scale: float = 0.0
    injects_self: bool = False  # all rows take their self-attention weights from the first, the empty one
    blends_cross: bool = False  # rows behind the first blend its cross-attention maps into theirs


@dataclass
class Progress:
    """What a rule knows of one sample under way."""

    has_context: bool = True
    has_negative: bool = False
    threshold: float | None = None  # this sample's own; None: the rule's
    switch_t: int = -1  # timestep whose d fell under the threshold; -1: none yet
    h: Tensor | None = None  # (S, S) of the step before
    d: list[float] = field(default_factory=list)  # from the second step of stage 1 on


class Rule(Protocol):
    """What the engine asks of a rule."""

    injects: bool  # whether rows inject attention maps into each other, and maps are aggregated into h_t

    def evaluation(self, t: int, progress: Progress) -> Evaluation:
        """What a sample needs at timestep t."""

    def observe(self, timesteps: Sequence[int], samples: Sequence[Progress], h: Tensor) -> None:
        """Learn h_t (n, S, S) of the rows that made eps. Called where `injects`, after each pass."""


@dataclass(frozen=True)
class OneStage:
    """eps of the context, guided away from the empty or the negative one where `guidance_scale` says so."""

    guidance_scale: float = 0.0
    guidance_interval: Interval = None

    injects = False

    def __post_init__(self) -> None:
        check_interval(self.guidance_interval)

    def evaluation(self, t: int, progress: Progress) -> Evaluation:
        if not progress.has_context:
            return Evaluation((Branch.EMPTY,))
        if self.guidance_scale == 0 or not acts_at(self.guidance_interval, t):
            return Evaluation((Branch.IDENTITY,))
        away = Branch.NEGATIVE if progress.has_negative else Branch.EMPTY
        return Evaluation((away, Branch.IDENTITY), main=1, scale=self.guidance_scale)

    def observe(self, timesteps: Sequence[int], samples: Sequence[Progress], h: Tensor) -> None:
        raise NotImplementedError("a rule of one stage looks at no attention map")


@dataclass(frozen=True)
class TwoStage:
    """The adaptive two-stage rule of UIFace (ICLR 2025).

    Stage 1, t >= min_t: the empty context, until the cross-attention map changes by less than the threshold between
    two steps; from the next step on the identity, with the self-attention maps of the empty pass. Stage 2: the
    identity, with self- and cross-attention maps of the empty pass, guided. Before its switch a sample costs one row a
    step, after it two, three with a negative context (whose row injects the same maps).
    """

    threshold: float = 0.006
    min_t: int = 500
    guidance_scale: float = 1.0
    guidance_interval: Interval = None

    injects = True

    def __post_init__(self) -> None:
        check_interval(self.guidance_interval)
        if not self.threshold >= 0:
            raise UserError(f"threshold: {self.threshold}; give 0 (no adaptive switch) or more")

    def evaluation(self, t: int, progress: Progress) -> Evaluation:
        if t >= self.min_t:
            if progress.switch_t < 0:
                return Evaluation((Branch.EMPTY,), injects_self=True)
            return Evaluation((Branch.EMPTY, Branch.IDENTITY), main=1, injects_self=True)
        scale = self.guidance_scale if acts_at(self.guidance_interval, t) else 0.0
        injected = {"main": 1, "scale": scale, "injects_self": True, "blends_cross": True}
        if scale != 0 and progress.has_negative:
            return Evaluation((Branch.EMPTY, Branch.IDENTITY, Branch.NEGATIVE), away=2, **injected)
        return Evaluation((Branch.EMPTY, Branch.IDENTITY), **injected)

    def observe(self, timesteps: Sequence[int], samples: Sequence[Progress], h: Tensor) -> None:
        """d_t of the samples in stage 1, and their switch from the next step on where it fell under the threshold."""
        rows = [row for row, t in enumerate(timesteps) if t >= self.min_t]
        later = [row for row in rows if samples[row].h is not None]
        if later:
            d_t = map_change(h[later], torch.stack([samples[row].h for row in later])).tolist()
            for row, d in zip(later, d_t, strict=True):
                sample = samples[row]
                threshold = self.threshold if sample.threshold is None else sample.threshold
                sample.d.append(d)
                if d < threshold and sample.switch_t < 0:
                    sample.switch_t = timesteps[row]
        for row in rows:
            samples[row].h = h[row]


def guide(eps_id: Tensor, eps_away: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """(1 + s) eps_id - s eps_away: s = 0 is no guidance. IDiff-Face and others write w = 1 + s."""
    return (1 + guidance_scale) * eps_id - guidance_scale * eps_away


def acts_at(interval: Interval, t: int) -> bool:
    """Whether guidance acts at timestep t (Kynkaanniemi et al., NeurIPS 2024): it helps in the middle of the noise
    levels, and harms diversity above and does nothing below."""
    return interval is None or interval[0] <= t <= interval[1]


def check_interval(interval: Interval) -> None:
    """Raise UserError for an interval of timesteps that is none."""
    if interval is None:
        return
    is_pair = isinstance(interval, Sequence) and not isinstance(interval, str) and len(interval) == 2
    if not is_pair or any(isinstance(t, bool) or not isinstance(t, (int, float)) for t in interval):
        raise UserError(f"guidance_interval: {interval}; give [lowest, highest] timestep, or null for all")
    if not 0 <= interval[0] <= interval[1]:
        raise UserError(f"guidance_interval: {list(interval)}; give 0 <= lowest <= highest timestep")


def rescaled_threshold(threshold: float, stride: int, reference_stride: int) -> float:
    """The threshold at `stride` timesteps between steps that means what `threshold` does at `reference_stride`.

    Along a trajectory h is a smooth function of t, so h_t - h_{t + stride} = -stride dh/dt + O(stride^2) and
    d_t = mean |h_t - h_{t + stride}| is proportional to the stride to first order. The rule "the layout moves by less
    than threshold / stride a timestep" is therefore the same rule at every stride.
    """
    return threshold * stride / reference_stride
