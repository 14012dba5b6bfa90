"""The engine: the same samples as all together, to the last bit whatever runs beside them, at the cost it promises."""

import copy
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from diffusion.drawing import FaceDrawer, Job
from diffusion.drawing_settings import DrawingSettings
from diffusion.engine import Engine, Start, Trajectory
from diffusion.generator import FaceGenerator, FirstStage
from diffusion.rules import Branch, OneStage, Progress, TwoStage, guide, rescaled_threshold
from diffusion.samplers import TwoStage as TwoStageSampler
from diffusion.samplers import sample_ddim, sample_two_stage
from diffusion.schedule import NoiseSchedule
from diffusion.solvers import ddim, dpm_solver_2m
from models.autoencoder.vqgan import VQDecoder
from models.cpu import convolutions
from models.cpu.convolutions import WinogradConv2d
from models.cpu.products import use_products
from models.cpu.split_products import SplitFilters
from models.diffusion.attention import AttentionControl
from tests import test_samplers
from tests.compat import fill_deterministic, relative_error
from tests.test_sample import DDCONFIG
from tests.test_split_products import needs_amx
from utils.config import UserError

small = test_samplers.small  # the fixture: a network, noise, contexts, a schedule
N, NUM_STEPS, MIN_T = 7, 10, 40  # samples; 6 of 10 steps are in stage 1


@pytest.fixture(scope="module")
def starts(small) -> list[Start]:
    """Seven samples that switch at steps of their own (and one that does not), with noise of their own."""
    generator = torch.Generator().manual_seed(1)
    x_T, context = torch.randn(N, 3, 8, 8, generator=generator), torch.randn(N, 8, generator=generator)
    recorded = sample_two_stage(
        small[0], x_T, context, small[3], threshold=0.0, num_steps=NUM_STEPS, min_t=MIN_T, eta=0.0
    )
    ranks = [0, 1, 2, 3, 4, 2, 1]
    thresholds = [recorded.d[: rank + 1, i].min().item() * 1.001 for i, rank in enumerate(ranks)]
    thresholds[3] = 0.0
    return [Start(i, x_T[i], context[i], threshold=thresholds[i]) for i in range(N)]


def seeded(starts: list[Start]) -> list[Start]:
    """The same with fresh generators, seeded by their keys."""
    return [
        Start(s.key, s.x_T, s.context, s.negative, torch.Generator().manual_seed(100 + s.key), s.threshold)
        for s in starts
    ]


def make(small, *, eta: float = 0.0, **settings) -> Engine:
    """One lane, unless `settings` say otherwise."""
    if "compute_batch" in settings:
        settings = {"lanes": 1, **settings}
    return Engine(small[0], TwoStage(min_t=MIN_T), ddim(small[3], NUM_STEPS, eta=eta), **settings)


def draw(engine: Engine, starts: list[Start]) -> list[Trajectory]:
    """In the order of their keys."""
    return sorted(engine.run(starts), key=lambda sample: sample.start.key)


def same(a: list[Trajectory], b: list[Trajectory]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(one.x_t, other.x_t)
        and (one.progress.switch_t, one.progress.d) == (other.progress.switch_t, other.progress.d)
        for one, other in zip(a, b, strict=True)
    )


# ------------------------------------------------------------------------------------------------------- same samples


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_equals_all_samples_together(small, starts, eta):
    unet, _, _, schedule = small
    together = sample_two_stage(
        unet,
        torch.stack([s.x_T for s in starts]),
        torch.stack([s.context for s in starts]),
        schedule,
        threshold=torch.tensor([s.threshold for s in starts]),
        num_steps=NUM_STEPS,
        min_t=MIN_T,
        eta=eta,
        generator=[s.generator for s in seeded(starts)],
    )
    drawn = draw(make(small, eta=eta, compute_batch=5), seeded(starts))
    assert relative_error(torch.stack([s.x_t for s in drawn]), together.x_0) < 1e-5
    assert [s.progress.switch_t for s in drawn] == together.switch_t.tolist()
    assert relative_error(torch.tensor([s.progress.d for s in drawn]).T, together.d) < 1e-4
    if eta == 0:
        assert sorted(set(together.switch_t.tolist())) == [-1, 40, 50, 60, 70, 80] or len(set(together.switch_t)) >= 4


@pytest.mark.parametrize("max_samples", [1, 3, None])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [6, 2, 4, 0, 1, 5, 3], [3, 5]])
def test_byte_identical_in_any_order_and_company(small, starts, order, max_samples):
    reference = draw(make(small, eta=0.5, compute_batch=6), seeded(starts))
    mine = seeded([starts[i] for i in order])
    drawn = draw(make(small, eta=0.5, compute_batch=6, max_samples=max_samples), mine)
    assert same(drawn, [reference[i] for i in sorted(order)])


@pytest.mark.parametrize(("lanes", "threads"), [(1, 2), (2, 1), (3, 3), (None, 2)])
def test_byte_identical_on_any_number_of_threads(small, starts, lanes, threads):
    """With and without lanes of its own, whatever number of threads the caller has; which stays as it was."""
    reference = draw(make(small, compute_batch=6), starts)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same(draw(make(small, compute_batch=6, lanes=lanes), starts), reference)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("compute_batch", [3, 4, 16])
def test_another_compute_batch_differs_by_rounding(small, starts, compute_batch):
    reference = draw(make(small, compute_batch=6), starts)
    other = draw(make(small, compute_batch=compute_batch), starts)
    for a, b in zip(reference, other, strict=True):
        assert relative_error(a.x_t, b.x_t) < 1e-5


def test_compiled_in_one_graph(monkeypatch, small, starts):
    """Traced and run without the C++ compiler, which takes minutes; benchmarks.sampling has the real thing."""
    inductor = torch.compile

    def traced(function, *, dynamic: bool, fullgraph: bool, options: dict):
        return inductor(function, dynamic=dynamic, fullgraph=fullgraph, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    plain = draw(make(small, compute_batch=6), starts)
    unet = copy.deepcopy(small[0])
    monkeypatch.setattr(convolutions, "MIN_CHANNELS", 32)
    use_products(unet, "winograd")
    engine = make((unet, *small[1:]), compute_batch=6, compile=True)
    compiled = draw(engine, starts)
    assert engine.counts.compile_seconds > 0
    assert all(relative_error(a.x_t, b.x_t) < 1e-4 for a, b in zip(compiled, plain, strict=True))
    assert same(compiled, draw(engine, starts[::-1]))


def test_bf16_stays_close_and_casts_products_once(small, starts):
    unet = fill_deterministic(type(small[0])(**test_samplers.SMALL))
    engine = Engine(unet, TwoStage(0.0, MIN_T), ddim(small[3], NUM_STEPS), compute_batch=6, precision="bf16")
    assert unet.image_proj.weight.dtype == torch.bfloat16 and unet.norm.weight.dtype == torch.float32
    never = [Start(s.key, s.x_T, s.context) for s in starts]
    plain = Engine(small[0], TwoStage(0.0, MIN_T), ddim(small[3], NUM_STEPS), compute_batch=6)
    for a, b in zip(draw(engine, never), draw(plain, never), strict=True):
        assert a.x_t.dtype == torch.float32
        assert relative_error(a.x_t, b.x_t) < 0.1


@pytest.mark.parametrize("condition_type", ["CA", "AdaGN", "AddPlusGN", "DiffAE"])
def test_bf16_is_the_same_in_a_second_engine(small, starts, condition_type):
    """The process that measured the threshold draws as one does that read it."""
    unet = fill_deterministic(type(small[0])(**{**test_samplers.SMALL, "condition_type": condition_type}))
    rule = TwoStage(0.0, MIN_T) if condition_type == "CA" else OneStage()

    def drawn() -> list[Trajectory]:
        return draw(Engine(unet, rule, ddim(small[3], NUM_STEPS), compute_batch=6, precision="bf16"), starts[:2])

    assert same(drawn(), drawn())


# --------------------------------------------------------------------------------------------------------------- cost


def rows_by_hand(sample: Trajectory) -> int:
    """One row a step up to the switch and its step, two after it; two in every step of stage 2."""
    timesteps = range(90, -1, -10)
    return sum(1 if t >= max(MIN_T, sample.progress.switch_t) else 2 for t in timesteps)


def test_rows_are_those_of_the_switch_steps(small, starts):
    engine = make(small, compute_batch=5)
    drawn = draw(engine, starts)
    assert engine.counts.rows == sum(rows_by_hand(sample) for sample in drawn)
    assert engine.counts.rows + engine.counts.padding == 5 * engine.counts.passes
    assert rows_by_hand(drawn[3]) == 6 + 2 * 4  # never switched
    assert len({rows_by_hand(sample) for sample in drawn}) >= 4


def test_no_row_idles_while_there_is_work(small, starts):
    """Padding comes at the very end only: the last pass that a new sample could have filled is full."""
    engine = make(small, compute_batch=4)
    many = [Start(100 * k + s.key, s.x_T, s.context, threshold=s.threshold) for k in range(3) for s in starts]
    paddings = []

    def feed() -> Iterator[Start]:
        for start in many:
            paddings.append(engine.counts.padding)
            yield start

    assert sum(1 for _ in engine.run(feed())) == 21
    assert max(paddings) == 0
    assert engine.counts.padding < 4 * NUM_STEPS


def test_jobs_are_pulled_when_there_is_room(small, starts):
    pulled, most = [], 0

    def feed() -> Iterator[Start]:
        for start in starts:
            pulled.append(start.key)
            yield start

    ended = 0
    for _ in make(small, compute_batch=4, max_samples=3).run(feed()):
        ended += 1
        most = max(most, len(pulled) - ended)
    assert ended == N and most <= 3 + 1  # the next is pulled before one that ended is handed out


def test_at_most_one_sample_waits_for_room(small, starts):
    """Two rows a sample and five a pass: a third sample fits into none, and no fourth may be pulled for the gap."""
    pulled, most = [], 0

    def feed() -> Iterator[Start]:
        for k in range(6):
            for start in starts:
                pulled.append(start.key)
                yield Start(100 * k + start.key, start.x_T, start.context)

    engine = Engine(small[0], OneStage(guidance_scale=0.5), ddim(small[3], NUM_STEPS), compute_batch=5, lanes=1)
    for ended, _ in enumerate(engine.run(feed())):
        most = max(most, len(pulled) - ended)
    assert len(pulled) == 6 * N and most <= 3 + 2  # two end in a pass, and the next are pulled before they come


def test_samples_of_three_rows_and_of_one_share_passes(small, starts):
    """Where all samples went in step, three rows each, two of eight rows would idle in every pass of stage 2."""
    engine, paddings = make(small, compute_batch=8), []

    def feed() -> Iterator[Start]:
        for k in range(8):
            for start in starts:
                paddings.append(engine.counts.padding)
                yield Start(100 * k + start.key, start.x_T, start.context, start.context.flip(0), None, start.threshold)

    ended = [len(paddings) for _ in engine.run(feed())]
    assert len(ended) == 8 * N and ended[0] < 3 * N  # images come long before all is pulled
    assert max(paddings) < 0.02 * engine.counts.rows


def test_what_the_feed_raises_loses_no_sample_that_ended(small, starts):
    def feed() -> Iterator[Start]:
        yield from starts[:2]
        raise OSError("the store is gone")

    drawn = []
    with pytest.raises(OSError, match="the store is gone"):
        for sample in make(small, compute_batch=3, max_samples=2).run(feed()):
            drawn.append(sample)
    assert len(drawn) >= 1


def test_no_lane_waits_for_another(small, starts):
    """A pass that takes as long as all the others together holds up its own samples alone."""
    engine, reference = make(small, compute_batch=4, lanes=2), draw(make(small, compute_batch=4), starts)
    advance, others, slow = engine._advance, threading.Event(), []

    def one_slow_pass(work) -> None:
        if any(sample.start.key == 0 for sample in work.samples) and not slow:
            slow.extend(sample.start.key for sample in work.samples)
            assert others.wait(60), "the other lane stands still"
        advance(work)

    engine._advance = one_slow_pass
    drawn = []
    for sample in engine.run(starts):
        drawn.append(sample)
        if len(drawn) == N - len(slow):
            others.set()
    assert {sample.start.key for sample in drawn[-len(slow) :]} == set(slow)
    assert same(sorted(drawn, key=lambda sample: sample.start.key), reference)


def test_a_run_that_is_given_up_leaves_nothing_behind(small, starts):
    engine = make(small, compute_batch=4, lanes=2)
    run = engine.run(starts)
    next(run)
    run.close()
    passes = engine.counts.passes
    assert len(draw(engine, starts[:2])) == 2 and engine.counts.passes > passes


def test_a_sample_that_ended_holds_no_contexts(small, starts):
    assert all(sample.contexts is None and sample.x_0 is None for sample in make(small, compute_batch=6).run(starts))


# ---------------------------------------------------------------------------------------------------------- guidance


def test_negative_guidance_by_hand_in_two_stages(small):
    """One step from t = 0 in stage 2: the identity's and the negative's row both take the maps of the empty one."""
    unet, x_T, context, schedule = small
    found = sample_two_stage(
        unet, x_T, context, schedule, num_steps=1, min_t=1, guidance_scale=0.7, negative=context.flip(0)
    ).x_0
    contexts = torch.stack([context, context, context.flip(0)], dim=1).flatten(0, 1)  # three rows a sample
    rows = torch.arange(12)
    control = AttentionControl(rows // 3 * 3, rows % 3 > 0)
    with torch.no_grad():
        x = x_T.repeat_interleave(3, dim=0)
        eps = unet(x, torch.zeros(12, dtype=torch.long), contexts, empty_mask=rows % 3 == 0, control=control)
    eps = 1.7 * eps[1::3] - 0.7 * eps[2::3]
    alpha_bar = schedule.alpha_bar(0)
    assert relative_error(found, (x_T - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5) < 1e-5
    away_from_nobody = sample_two_stage(unet, x_T, context, schedule, num_steps=1, min_t=1, guidance_scale=0.7).x_0
    assert relative_error(found, away_from_nobody) > 1e-4


def test_negative_guidance_by_hand_in_one_stage(small):
    unet, x_T, context, schedule = small
    found = sample_ddim(unet, x_T, context, schedule, num_steps=1, guidance_scale=0.7, negative=context.flip(0))
    with torch.no_grad():
        t = torch.zeros(4, dtype=torch.long)
        eps = 1.7 * unet(x_T, t, context) - 0.7 * unet(x_T, t, context.flip(0))
    alpha_bar = schedule.alpha_bar(0)
    assert relative_error(found, (x_T - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5) < 1e-5


def test_rows_of_negative_guidance(small, starts):
    with_negative = [Start(s.key, s.x_T, s.context, s.context.flip(0), threshold=s.threshold) for s in starts]
    engine, plain = make(small, compute_batch=7), make(small, compute_batch=7)
    drawn, without = draw(engine, with_negative), draw(plain, starts)
    assert engine.counts.rows == plain.counts.rows + 4 * N  # one more in each of the four steps of stage 2
    assert [s.progress.d for s in drawn] == [s.progress.d for s in without]  # stage 1 is not guided


def test_guidance_interval(small):
    unet, x_T, context, schedule = small

    def run(interval, scale=1.0):
        settings = {"num_steps": 5, "guidance_scale": scale, "guidance_interval": interval}
        return sample_ddim(unet, x_T, context, schedule, **settings)

    assert torch.equal(run([0, 100]), run(None))
    assert torch.equal(run([30, 35]), run(None, scale=0.0))  # no step falls into it
    assert relative_error(run([20, 40]), run(None)) > 1e-4
    rule, one, none = OneStage(1.0, (20, 40)), (Branch.EMPTY, Branch.IDENTITY), (Branch.IDENTITY,)
    assert [rule.evaluation(t, Progress()).branches for t in (80, 60, 40, 20, 0)] == [none, none, one, one, none]
    rule = TwoStage(0.0, 40, 1.0, (10, 20))
    assert [rule.evaluation(t, Progress()).scale for t in (60, 40, 30, 20, 10, 0)] == [0, 0, 0, 1, 1, 0]
    for interval in ([1], [5, 2], [-1, 3], ["a", 3], 3):
        with pytest.raises(UserError, match="guidance_interval: "):
            OneStage(1.0, interval)


def test_guidance_of_a_batch():
    eps = torch.tensor([3.0, 3.0]), torch.tensor([1.0, 1.0])
    assert guide(*eps, torch.tensor([1.0, 0.0])).tolist() == [5.0, 3.0]


# ------------------------------------------------------------------------------------------- solvers under two stages


def test_a_multistep_solver_starts_again_where_the_prediction_changes(small, starts):
    solver = dpm_solver_2m(small[3], NUM_STEPS)
    past = []
    step = solver.step
    solver.step = lambda steps, x_t, x_0, before, has_past, noise: (
        past.append((steps[0], has_past.item())) or step(steps, x_t, x_0, before, has_past, noise)
    )
    (sample,) = Engine(small[0], TwoStage(min_t=MIN_T), solver).run(starts[1:2])
    switch = solver.timesteps.index(sample.progress.switch_t)
    begins = {0, switch + 1, 6}  # the first step, the first with the identity, the first of stage 2
    assert past == [(i, i not in begins) for i in range(NUM_STEPS)]


def first_under(result, threshold: float) -> torch.Tensor:
    """Where each sample of a run that never switched would have switched; its last recorded step if nowhere."""
    under = [[t for t, d in zip(result.timesteps[1:], row, strict=False) if d < threshold] for row in result.d.T]
    return torch.tensor([times[0] if times else result.timesteps[len(result.d)] for times in under])


def test_threshold_of_another_number_of_steps(small):
    """d at half the stride is half as large, so the rescaled threshold switches at about the same timestep."""
    unet, x_T, context, _ = small
    schedule = NoiseSchedule()
    fine, coarse = (
        sample_two_stage(unet, x_T, context, schedule, num_steps=num_steps, threshold=0.0) for num_steps in (100, 50)
    )
    at = {t: d for t, d in zip(fine.timesteps[1:], fine.d, strict=False)}
    ratios = torch.stack([d / at[t] for t, d in zip(coarse.timesteps[1:], coarse.d, strict=False)])
    assert ratios.median().item() == pytest.approx(2, abs=0.25)
    assert rescaled_threshold(0.006, 50, 20) == pytest.approx(0.015)
    rule, _ = TwoStageSampler(threshold=0.006, threshold_num_steps=50, num_steps=20).parts(schedule)
    assert rule.threshold == pytest.approx(0.015)

    threshold = coarse.d[:12].amin(dim=0).median().item() * 1.001
    switched = first_under(coarse, threshold)
    rescaled = first_under(fine, rescaled_threshold(threshold, 10, 20))
    unscaled = first_under(fine, threshold)
    assert (switched - rescaled).abs().sum() < (switched - unscaled).abs().sum()


# ------------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def generator(small, monkeypatch) -> FaceGenerator:
    monkeypatch.setattr(convolutions, "MIN_CHANNELS", 32)
    decoder = fill_deterministic(VQDecoder(DDCONFIG, n_embed=32))
    unet = copy.deepcopy(small[0])  # a drawer changes it
    return FaceGenerator(unet, small[3], FirstStage(decoder=decoder), (3, 8, 8), 2.0, 0, False, "")


@pytest.mark.parametrize(
    ("image_size", "threads", "products"),
    [(None, 1, "highest"), (12, 2, "highest"), pytest.param(None, 2, "high", marks=needs_amx)],
)
def test_images_are_byte_identical_in_any_order(generator, image_size, threads, products):
    contexts = torch.nn.functional.normalize(torch.randn(9, 8, generator=torch.Generator().manual_seed(2)))
    jobs = [Job(k, 50 + k, contexts[k], contexts[k - 1]) for k in range(9)]
    sampler = TwoStageSampler(threshold=0.05, num_steps=5, min_t=50, eta=0.3)

    def images(jobs: list[Job], max_samples: int | None) -> dict[int, np.ndarray]:
        settings = DrawingSettings(compute_batch=8, max_samples=max_samples, float32_matmul_precision=products)
        drawer = FaceDrawer(generator, sampler, settings, image_size=image_size)
        kinds = {type(layer) for layer in (*generator.unet.modules(), *generator.first_stage.decoder.modules())}
        assert (SplitFilters in kinds) == (products == "high")
        return {drawn.key: drawn.image for drawn in drawer.draw(iter(jobs))}

    reference = images(jobs, None)
    side = image_size or 16
    assert len(reference) == 9 and all(image.shape == (side, side, 3) for image in reference.values())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for order, max_samples in (([8, 3, 5, 0, 1, 2, 4, 7, 6], 2), ([4], None), ([7, 6, 5], 3)):
            drawn = images([jobs[k] for k in order], max_samples)
            assert drawn.keys() == set(order)
            assert all((image == reference[key]).all() for key, image in drawn.items())
    finally:
        torch.set_num_threads(before)
    assert all((reference[a] != reference[b]).any() for a in range(9) for b in range(a))


def test_lanes_are_those_of_the_settings(generator):
    drawer = FaceDrawer(generator, TwoStageSampler(num_steps=2, min_t=50), DrawingSettings(compute_batch=4, lanes=3))
    assert drawer.engine.lanes.count == 3


@pytest.mark.parametrize(
    ("settings", "used"),
    [({}, True), ({"winograd": True}, True), ({"winograd": False}, False), ({"precision": "bf16"}, False)],
)
def test_winograd_is_for_fp32_on_a_cpu(generator, settings, used):
    drawer = FaceDrawer(generator, TwoStageSampler(num_steps=2, min_t=50), DrawingSettings(compute_batch=4, **settings))
    for network in (generator.unet, generator.first_stage.decoder):
        assert any(isinstance(layer, WinogradConv2d) for layer in network.modules()) == used
    (drawn,) = drawer.draw([Job(0, 0, torch.ones(8))])
    assert drawn.image.shape == (16, 16, 3)


def test_values_that_are_not_finite_are_told(generator):
    drawer = FaceDrawer(generator, TwoStageSampler(num_steps=2, min_t=50), DrawingSettings(compute_batch=4))
    with pytest.raises(UserError, match="not finite in fp32; try another checkpoint"):
        list(drawer.draw([Job(0, 0, torch.full((8,), float("nan")))]))


# ------------------------------------------------------------------------------------------------------------- errors


def test_wrong_settings(small):
    with pytest.raises(ValueError, match="compile: needs a fixed compute_batch"):
        make(small, compile=True)
    with pytest.raises(ValueError, match="callback: sees whole steps"):
        make(small, compute_batch=4, callback=lambda *_: None)
    with pytest.raises(ValueError, match="lanes: 0; give at least 1"):
        make(small, compute_batch=4, lanes=0)
    with pytest.raises(ValueError, match="compute_batch: 2; give at least 3"):
        make(small, compute_batch=2)
