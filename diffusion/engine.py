"""The sampling engine: many samples under way, each with its own step, stage and identity, in one network batch.

Every sample is a small state machine. A pass takes the samples that fit its rows, oldest first; a sample that has not
switched takes one row, one with guidance or injection two or three, in the same pass. Where a sample ends, the next job
takes its place, so that hardly a row idles until the work runs out. With a fixed number of rows a pass always has
the same shape, short ones are filled up, and on a CPU each runs on one thread, as many passes side by side as there are
threads: then what a row gives does not depend on its neighbours, its place or the machine's cores, and a sample's x_0
is a function of its job alone. (Kernels round differently at other batch sizes: another number of rows agrees to 1e-5.)

Legend: n samples of a pass, R its rows, C channels, H W height and width, D context width, S side of h.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.attention_maps import AggregatedMap
from diffusion.lanes import Lanes
from diffusion.rules import Branch, Evaluation, Progress, Rule, guide
from diffusion.solvers import Solver, draw_noise
from models.diffusion.attention import AttentionControl
from models.diffusion.blocks import PreparedTime
from models.diffusion.context import PreparedContext
from models.diffusion.unet import ConditionalUNet
from utils.precision import DTYPES, autocast, cast_products

Callback = Callable[[int, int, Tensor, Tensor], None]  # (step number, t, x_t, x_0 as predicted at t), before the update
MAX_ROWS_OF_A_SAMPLE = 3


@dataclass(frozen=True)
class Observation:
    """One step of one sample before its update. Its tensors are views of those of the pass: clone what is kept."""

    key: Any  # of the sample's Start
    step: int
    t: int
    x_t: Tensor  # (C, H, W)
    x_0: Tensor  # (C, H, W), as predicted at t, guided
    h: Tensor | None  # (S, S) of the row that made it; None: the rule looks at no map


Observer = Callable[[Observation], None]


@dataclass
class Start:
    """One sample to draw."""

    key: Any  # whatever the caller knows it by
    x_T: Tensor  # (C, H, W) noise
    context: Tensor | None  # (D,), () class number, or None for the empty context
    negative: Tensor | None = None  # (D,), the context that guidance leads away from; None: the empty one
    generator: torch.Generator | None = None  # of the noise that the solver adds; None: the global one
    threshold: float | None = None  # of the switch, this sample's own; None: the rule's


@dataclass
class Trajectory:
    """One sample under way; when the engine hands it out, x_t is its x_0."""

    start: Start
    x_t: Tensor  # (C, H, W)
    progress: Progress
    contexts: dict[Branch, PreparedContext] | None = None  # of one row each; None: not yet prepared
    step: int = 0  # the next one to take
    x_0: Tensor | None = None  # as predicted in the step before, where the solver looks back
    evaluation: Evaluation | None = None  # of the step before


@dataclass
class Counts:
    """What an engine has done so far."""

    passes: int = 0  # of the network
    rows: int = 0  # that samples asked for
    padding: int = 0  # rows that filled up short passes
    compile_seconds: float = 0.0  # of the first pass, where it is compiled


@dataclass
class _Pass:
    """The samples of one pass, what each needs, and their rows."""

    samples: list[Trajectory] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    rows: int = 0

    def add(self, sample: Trajectory, evaluation: Evaluation) -> None:
        self.samples.append(sample)
        self.evaluations.append(evaluation)
        self.rows += len(evaluation.branches)


class _Feed:
    """What is still to draw; `is_empty` once it has been seen to end."""

    def __init__(self, starts: Iterable[Start]) -> None:
        self._waiting, self.is_empty = iter(starts), False

    def take(self) -> Start | None:
        start = None if self.is_empty else next(self._waiting, None)
        self.is_empty = start is None
        return start


class Engine:
    """Draws samples with one network, rule and solver."""

    def __init__(
        self,
        unet: ConditionalUNet,
        rule: Rule,
        solver: Solver,
        *,
        compute_batch: int | None = None,
        lanes: int | None = None,
        max_samples: int | None = None,
        precision: str | None = None,
        compile: bool = False,
        callback: Callback | None = None,
        observer: Observer | None = None,
    ) -> None:
        """The network must be in evaluation mode.

        compute_batch: rows R of every pass; None: as many as the samples under way ask for, all in one pass, on the
        calling thread. lanes: passes side by side; None: one for each CPU thread, one on a GPU.
        max_samples: under way at a time, besides what has ended and is not handed out yet; None: all (with a
        compute_batch: all that find room in its rows).
        precision: None leaves autocast to the caller; bf16 and fp16 cast the weights of `unet` for good, once.
        compile: with torch.compile, for long runs; needs a compute_batch. callback: sees every pass; for samples that
        all stand at the same step, so without a compute_batch only. observer: sees every step of every sample, in the
        thread that computes it; of one sample in order.
        """
        if compile and compute_batch is None:
            raise ValueError("compile: needs a fixed compute_batch")
        if callback is not None and compute_batch is not None:
            raise ValueError("callback: sees whole steps, which a fixed compute_batch splits up")
        if compute_batch is not None and compute_batch < MAX_ROWS_OF_A_SAMPLE:
            raise ValueError(f"compute_batch: {compute_batch}; give at least {MAX_ROWS_OF_A_SAMPLE}")
        if lanes is not None and lanes < 1:
            raise ValueError(f"lanes: {lanes}; give at least 1")
        self.unet, self.rule, self.solver = unet, rule, solver
        self.compute_batch, self.max_samples, self.precision = compute_batch, max_samples, precision
        self.callback, self.observer = callback, observer
        self.counts = Counts()
        self.device = next(unet.parameters()).device
        self.lanes = Lanes(self.device, lanes) if compute_batch is not None else Lanes(None)
        self._time = self._compute(self._prepare_time)  # a row for each step
        dtype = None if precision is None else DTYPES[precision]
        if dtype is not None:
            cast_products(unet, dtype, keep=unet.time_layers())  # of which another engine makes the same, in float32
            self._time = self._time.to(dtype)
        self._empty = self._compute(self._prepare, None)
        self._network = self._forward
        self.compiled = compile
        self._is_cold = compile  # its first pass compiles
        if compile:
            # freezing packs the weights for the CPU's kernels once instead of at every call
            options = {"freezing": True} if self.device.type == "cpu" else None
            self._network = torch.compile(self._forward, dynamic=False, fullgraph=True, options=options)

    def run(self, starts: Iterable[Start]) -> Iterator[Trajectory]:
        """Draw all of `starts`, which are pulled when there is room for one; yields them as they end.

        No lane waits for another: each takes its next pass from the samples that are in none. What `starts` raises is
        raised here, after the samples that have ended.
        """
        feed, under_way, ended = _Feed(starts), [], []
        computing: dict[Future[None], _Pass] = {}
        try:
            while True:
                try:
                    self._occupy_lanes(computing, under_way, feed)
                except Exception:
                    yield from ended
                    raise
                yield from ended  # while lanes of their own compute
                if not computing:
                    return
                done = wait(computing, return_when=FIRST_COMPLETED).done
                ended = []
                for future in [future for future in computing if future in done]:  # in the order of their beginning
                    future.result()
                    ended += [sample for sample in computing.pop(future).samples if sample.step == len(self.solver)]
                under_way = [sample for sample in under_way if sample.step < len(self.solver)]
        finally:
            wait(computing)  # of a run that is given up

    def _occupy_lanes(self, computing: dict[Future[None], _Pass], under_way: list[Trajectory], feed: _Feed) -> None:
        """Begin a pass in every lane that has none, as far as there are samples."""
        while len(computing) < self.lanes.count:
            busy = {id(sample) for work in computing.values() for sample in work.samples}
            work = self._choose(under_way, busy, feed)
            if not work.samples:
                return
            self.counts.passes += 1
            self.counts.rows += work.rows
            if self.compute_batch is not None:
                self.counts.padding += self.compute_batch - work.rows
            began = time.perf_counter()
            future = self.lanes.submit(self._advance, work)
            computing[future] = work
            if self._is_cold:
                wait([future])
                self.counts.compile_seconds, self._is_cold = time.perf_counter() - began, False

    def _choose(self, under_way: list[Trajectory], busy: set[int], feed: _Feed) -> _Pass:
        """Fill a pass: samples under way that are in no other, then new ones, which join `under_way`.

        The oldest come first, so that images come steadily, and stages mix; once no new ones can come, the least
        advanced, so that all end together and the last passes are full, too.
        """
        work, room = _Pass(), math.inf if self.compute_batch is None else self.compute_batch

        def place(sample: Trajectory) -> bool:
            evaluation = self.rule.evaluation(self.solver.timesteps[sample.step], sample.progress)
            fits = work.rows + len(evaluation.branches) <= room
            if fits:
                work.add(sample, evaluation)
            return fits

        # A new sample that needs more rows than were left has not begun; one of them is enough
        is_full = False
        idle = [sample for sample in under_way if id(sample) not in busy]
        for sample in sorted(idle, key=lambda sample: sample.step) if feed.is_empty else idle:
            is_full |= not place(sample) and sample.step == 0
        while not is_full and work.rows < room and (self.max_samples is None or len(under_way) < self.max_samples):
            start = feed.take()
            if start is None:
                break
            progress = Progress(start.context is not None, start.negative is not None, start.threshold)
            under_way.append(Trajectory(start, start.x_T, progress))
            is_full = not place(under_way[-1])
        return work

    def _compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """As a pass is computed: small products, too, round differently on several threads."""
        return self.lanes.submit(function, *arguments).result()

    @torch.no_grad()
    def _prepare_time(self) -> PreparedTime:
        return self.unet.prepare_time(torch.tensor(self.solver.timesteps, device=self.device))

    @torch.no_grad()
    def _prepare(self, context: Tensor | None) -> PreparedContext:
        """Of one row, so that it does not depend on who else comes."""
        with self._autocast():
            return self.unet.prepare_context(None if context is None else context[None])

    def _contexts_of(self, sample: Trajectory) -> dict[Branch, PreparedContext]:
        if sample.contexts is None:
            given = {Branch.IDENTITY: sample.start.context, Branch.NEGATIVE: sample.start.negative}
            prepared = {branch: self._prepare(context) for branch, context in given.items() if context is not None}
            sample.contexts = {Branch.EMPTY: self._empty, **prepared}
        return sample.contexts

    @torch.no_grad()
    def _advance(self, work: _Pass) -> None:
        """One pass of the network, and a step of the solver for each of its samples."""
        samples, solver = work.samples, self.solver
        steps = [sample.step for sample in samples]
        timesteps = [solver.timesteps[step] for step in steps]
        x_t = torch.stack([sample.x_t for sample in samples])  # (n, C, H, W)

        # 1. the network, all rows at once
        first_rows, eps_rows, h_rows = self._evaluate(work, x_t)
        # 2. the noise in x_t, guided
        main = [first + e.main for first, e in zip(first_rows, work.evaluations, strict=True)]
        away = [first + e.away for first, e in zip(first_rows, work.evaluations, strict=True)]
        scale = torch.tensor([e.scale for e in work.evaluations], device=x_t.device, dtype=x_t.dtype)
        eps = guide(eps_rows[main], eps_rows[away], scale[:, None, None, None])
        # 3. h_t of the pass that made eps, and the switch from the next step on
        if h_rows is not None:
            self.rule.observe(timesteps, [sample.progress for sample in samples], h_rows[main])
        # 4. the step. A prediction of another kind than the one before (another stage, guidance that begins) is no past
        #    to extrapolate from: a multistep solver starts again there
        x_0 = solver.predict_x_0(steps, x_t, eps)
        has_past = [s.x_0 is not None and s.evaluation == e for s, e in zip(samples, work.evaluations, strict=True)]
        before = x_0
        if solver.is_multistep:
            before = torch.stack([x_0[row] if s.x_0 is None else s.x_0 for row, s in enumerate(samples)])
        if self.callback is not None:
            self.callback(steps[0], timesteps[0], x_t, x_0)
        if self.observer is not None:
            for row, (sample, step, t) in enumerate(zip(samples, steps, timesteps, strict=True)):
                h = None if h_rows is None else h_rows[main[row]]
                self.observer(Observation(sample.start.key, step, t, x_t[row], x_0[row], h))
        noise = self._noise(samples, steps, x_t)
        x_next = solver.step(steps, x_t, x_0, before, torch.tensor(has_past, device=x_t.device), noise)
        for row, (sample, evaluation) in enumerate(zip(samples, work.evaluations, strict=True)):
            sample.x_t = x_next[row]
            sample.x_0 = x_0[row] if solver.is_multistep else None
            sample.evaluation = evaluation
            sample.step += 1
            if sample.step == len(solver):
                sample.contexts = sample.x_0 = None  # megabytes, of no use to whoever keeps the sample

    def _evaluate(self, work: _Pass, x_t: Tensor) -> tuple[list[int], Tensor, Tensor | None]:
        """The rows of the samples through the network: each sample's first row, eps and h of all rows."""
        of_sample, contexts, source, blend, first_rows = [], [], [], [], []
        for number, (sample, evaluation) in enumerate(zip(work.samples, work.evaluations, strict=True)):
            first = len(of_sample)
            first_rows.append(first)
            for offset, branch in enumerate(evaluation.branches):
                of_sample.append(number)
                contexts.append(self._contexts_of(sample)[branch])
                source.append(first if evaluation.injects_self else first + offset)
                blend.append(evaluation.blends_cross and offset > 0)
        padding = 0 if self.compute_batch is None else self.compute_batch - work.rows
        of_sample += [0] * padding
        contexts += contexts[:1] * padding
        source += range(work.rows, work.rows + padding)
        blend += [False] * padding

        device = x_t.device
        rows = torch.tensor(of_sample, device=device)
        steps = torch.tensor([sample.step for sample in work.samples], device=device)[rows]
        # Where no row blends, none of its cost; a compiled network keeps to one form
        blends = torch.tensor(blend, device=device) if any(blend) or self.compiled else None
        injection = (torch.tensor(source, device=device), blends)
        with self._autocast():
            eps, h = self._network(
                x_t[rows], steps, PreparedContext.stack(contexts), *(injection if self.rule.injects else (None, None))
            )
        # under autocast the network returns half precision; the trajectory stays in the precision of x_T
        return first_rows, eps.to(x_t.dtype), h

    def _forward(
        self, x_t: Tensor, steps: Tensor, contexts: PreparedContext, source: Tensor | None, blend: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What is compiled: (R, C, H, W), (R,) step numbers, R contexts -> eps (R, C, H, W), h (R, S, S)."""
        timesteps = self._time.select(steps)
        if source is None:
            return self.unet(x_t, timesteps, contexts), None
        maps = AggregatedMap(x_t.shape[-2:])
        control = AttentionControl(source, blend, maps.add)
        eps = self.unet(x_t, timesteps, contexts, control=control)
        return eps, maps.h()

    def _noise(self, samples: list[Trajectory], steps: list[int], x_t: Tensor) -> Tensor | None:
        """z (n, C, H, W) of the samples whose solver adds noise in this step; None where there is none."""
        noisy = [row for row, step in enumerate(steps) if self.solver.sigma[step] > 0]
        if not noisy:
            return None
        drawn = draw_noise(x_t[noisy], [samples[row].start.generator for row in noisy])
        return torch.zeros_like(x_t).index_copy_(0, torch.tensor(noisy, device=x_t.device), drawn)

    def _autocast(self) -> Any:
        return nullcontext() if self.precision is None else autocast(self.device, self.precision)


@contextmanager
def evaluating(unet: nn.Module) -> Iterator[None]:
    """Put every submodule into evaluation mode, and back into the mode it was in."""
    training = [module for module in unet.modules() if module.training]
    unet.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
