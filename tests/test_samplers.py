"""The samplers against published trajectories, hand-computed steps and the cost they promise."""

import pytest
import torch

from diffusion.samplers import (
    calibrate_threshold,
    ddim_timesteps,
    draw_noise,
    guide,
    sample_ddim,
    sample_ddpm,
    sample_two_stage,
    solve_ddim,
    solve_ddpm,
)
from diffusion.schedule import NoiseSchedule
from models.diffusion.unet import ConditionalUNet
from tests.compat import fill_deterministic, load_arrays, load_json, relative_error
from utils.config import UserError


@pytest.fixture(scope="module")
def published():
    unet = fill_deterministic(ConditionalUNet(**load_json("tiny_config")["unet_tiny"]))
    return unet, {name: torch.from_numpy(array) for name, array in load_arrays("unet_tiny").items() if array.ndim}


@pytest.fixture(scope="module")
def small():
    """A network of a few thousand operations, noise and contexts for four samples, and a schedule of 100 timesteps."""
    unet = fill_deterministic(
        ConditionalUNet(
            initial_channels=32,
            channel_multipliers=[1, 1],
            is_attention=[False, True],
            n_blocks_per_resolution=1,
            context_input_channels=8,
            context_channels=32,
            learn_empty_context=True,
        )
    )
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(4, 3, 8, 8, generator=generator)
    return unet, x_T, torch.randn(4, 8, generator=generator), NoiseSchedule(100)


@pytest.fixture
def evaluations(published, small):
    """Samples that went through the networks, one number for each pass."""
    counts = []
    hooks = [
        unet.image_proj.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
        for unet in (published[0], small[0])
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def knows(x_0: torch.Tensor, schedule: NoiseSchedule):
    """The predictor of a network that knows x_0: the noise that makes x_t of it."""

    def predict(x_t: torch.Tensor, t: int) -> torch.Tensor:
        alpha_bar = schedule.alpha_bar(t)
        return (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5

    return predict


# --------------------------------------------------------------------------------------------- published trajectories


def test_published_one_stage(published):
    unet, arrays = published
    x_0 = sample_ddim(unet, arrays["x"], arrays["context"], NoiseSchedule(), num_steps=20, indexing="published")
    assert relative_error(x_0, arrays["one_stage_x0"]) < 5e-3


def test_published_two_stage_and_its_cost(published, evaluations):
    unet, arrays = published
    trajectory = []
    result = sample_two_stage(
        unet,
        arrays["x"],
        arrays["context"],
        NoiseSchedule(),
        num_steps=20,
        threshold=0.034644488245248795,
        min_t=500,
        guidance_scale=1.0,
        indexing="published",
        callback=lambda i, t, x_t, x_0: trajectory.append(x_t),
    )
    assert result.timesteps == arrays["two_stage_timesteps"].tolist()
    assert result.switch_t.tolist() == arrays["two_stage_switch_t"].tolist() == [600, 850, 700]
    assert relative_error(result.d, arrays["two_stage_d"]) < 1e-3
    assert torch.equal(trajectory[0], arrays["x"])
    trajectory = torch.stack([*trajectory[1:], result.x_0])
    assert relative_error(trajectory, arrays["two_stage_trajectory"]) < 1e-4
    assert relative_error(result.x_0, arrays["two_stage_x0"]) < 1e-4
    # one evaluation a step before the switch (850, 700, 600: one more from the next step on), two after it
    assert evaluations == [3, 3, 3, 4, 4, 4, 5, 5, 6, 6] + 10 * [6]


# ------------------------------------------------------------------------------------------------------------ solvers


def test_timesteps():
    assert ddim_timesteps(1000, 50) == list(range(980, -1, -20))
    assert len(ddim_timesteps(1000, 30)) == 31
    assert ddim_timesteps(1000, 30)[:2] == [990, 957]
    assert ddim_timesteps(4, 4) == [3, 2, 1, 0]
    for num_steps in (0, 5):
        with pytest.raises(UserError, match=f"num_steps: {num_steps}; give a number from 1 to 4"):
            ddim_timesteps(4, num_steps)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [3, 50])
def test_ddim_finds_an_image_that_the_network_knows(num_steps, eta):
    schedule = NoiseSchedule()
    x_0, x_T = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for indexing in ("exact", "published"):
        found = solve_ddim(knows(x_0, schedule), x_T, schedule, num_steps, indexing, eta)
        torch.testing.assert_close(found, x_0)


def test_ddim_stays_on_the_trajectory_of_a_known_noise():
    """With x_0 known and eta 0, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps for one eps: exact indexing
    only."""
    schedule = NoiseSchedule()
    x_0, eps = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha_bar = schedule.alpha_bar(980)
    x_T = alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * eps
    errors = {}
    for indexing in ("exact", "published"):
        seen = {}
        solve_ddim(
            knows(x_0, schedule),
            x_T,
            schedule,
            50,
            indexing,
            callback=lambda i, t, x_t, x_0, seen=seen: seen.update({(i, t): (x_t, x_0)}),
        )
        x_t, predicted = seen[24, 500]
        alpha_bar = schedule.alpha_bar(500)
        errors[indexing] = relative_error(x_t, alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * eps)
        torch.testing.assert_close(predicted, x_0)
    assert errors["exact"] < 1e-12
    assert errors["published"] > 1e-4


@pytest.mark.parametrize(("indexing", "alpha_bar_previous"), [("exact", 0.72), ("published", 0.9)])
def test_a_ddim_step_by_hand(indexing, alpha_bar_previous):
    """betas 0.1, 0.2, 0.5, 0.5: alpha_bar 0.9, 0.72, 0.36, 0.18. Two steps: t = 2, then 0, then the image."""
    schedule = NoiseSchedule.from_betas(torch.tensor([0.1, 0.2, 0.5, 0.5], dtype=torch.float64))
    states = []
    solve_ddim(
        lambda x_t, t: torch.full_like(x_t, 0.5),
        torch.full((1, 1, 1, 1), 2.0),
        schedule,
        4,
        indexing,
        callback=lambda i, t, x_t, x_0: states.append((t, x_t.item(), x_0.item())),
    )
    assert [t for t, *_ in states] == [3, 2, 1, 0]
    _, x_t, x_0 = states[1]
    assert x_0 == pytest.approx((x_t - 0.64**0.5 * 0.5) / 0.36**0.5)
    assert states[2][1] == pytest.approx(alpha_bar_previous**0.5 * x_0 + (1 - alpha_bar_previous) ** 0.5 * 0.5)


def test_ddim_noise_by_hand():
    """betas 0.1, 0.2 and eta 1: sigma^2 = (1 - 0.9) / (1 - 0.72) * (1 - 0.72 / 0.9) = 1/14 at t = 1."""
    schedule = NoiseSchedule.from_betas(torch.tensor([0.1, 0.2], dtype=torch.float64))
    states = []
    solve_ddim(
        lambda x_t, t: torch.zeros_like(x_t),
        torch.ones(1, 1, 1, 1),
        schedule,
        2,
        eta=1.0,
        generator=torch.Generator().manual_seed(3),
        callback=lambda i, t, x_t, x_0: states.append(x_t.item()),
    )
    z = torch.randn(1, 1, 1, 1, generator=torch.Generator().manual_seed(3)).item()
    assert states[1] == pytest.approx(0.9**0.5 / 0.72**0.5 + z / 14**0.5)


def test_ddpm_by_hand():
    """betas 0.1, 0.2, 0.5, eps 0.5 everywhere: noise at t = 2 only."""
    schedule = NoiseSchedule.from_betas(torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64))
    x_T = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    x_0 = solve_ddpm(lambda x_t, t: torch.full_like(x_t, 0.5), x_T, schedule, torch.Generator().manual_seed(3))
    z = torch.randn(1, 1, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64).item()
    x = (2.0 - 0.5 / 0.64**0.5 * 0.5) / 0.5**0.5 + 0.5**0.5 * z
    x = (x - 0.2 / 0.28**0.5 * 0.5) / 0.8**0.5
    x = (x - 0.1 / 0.1**0.5 * 0.5) / 0.9**0.5
    assert x_0.item() == pytest.approx(x)


def test_ddpm_finds_an_image_that_the_network_knows():
    schedule = NoiseSchedule(100)
    x_0, x_T = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(solve_ddpm(knows(x_0, schedule), x_T, schedule), x_0)


def test_noise_of_one_generator_a_sample_ignores_the_batch():
    like = torch.zeros(3, 3, 4, 4)
    together = draw_noise(like, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    alone = draw_noise(like[:1], [torch.Generator().manual_seed(6)])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])
    assert torch.equal(
        draw_noise(like, torch.Generator().manual_seed(1)), draw_noise(like, torch.Generator().manual_seed(1))
    )


# ----------------------------------------------------------------------------------------------------------- guidance


def test_guidance_by_hand():
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 1.0) == 5.0
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 0.0) == 3.0


def test_guided_sampling(small, evaluations):
    unet, x_T, context, _ = small
    schedule = NoiseSchedule(25)
    with torch.no_grad():
        t = torch.full((4,), 24)
        eps = 1.5 * unet(x_T, t, context) - 0.5 * unet(x_T, t)
    evaluations.clear()
    seen = []
    sample_ddpm(unet, x_T, context, schedule, guidance_scale=0.5, callback=lambda *args: seen.append(args))
    assert evaluations == 25 * [8]
    alpha_bar = schedule.alpha_bar(24)
    torch.testing.assert_close(seen[0][3], (x_T - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5, rtol=1e-4, atol=1e-3)

    evaluations.clear()
    unguided = sample_ddim(unet, x_T, None, schedule, num_steps=5)
    assert evaluations == 5 * [4]
    torch.testing.assert_close(sample_ddim(unet, x_T, None, schedule, num_steps=5, guidance_scale=2.0), unguided)
    assert relative_error(sample_ddim(unet, x_T, context, schedule, num_steps=5), unguided) > 1e-4


# ---------------------------------------------------------------------------------------------------------- two stages


def test_fixed_partition(small, evaluations):
    unet, x_T, context, schedule = small
    result = sample_two_stage(unet, x_T, context, schedule, num_steps=10, threshold=0, min_t=60)
    assert result.timesteps == list(range(90, -1, -10))
    assert result.switch_t.tolist() == [-1, -1, -1, -1]
    assert result.d.shape == (3, 4)
    assert evaluations == 4 * [4] + 6 * [8]


def test_no_first_stage(small, evaluations):
    unet, x_T, context, schedule = small
    result = sample_two_stage(unet, x_T, context, schedule, num_steps=5, min_t=100)
    assert result.d.shape == (0, 4)
    assert evaluations == 5 * [8]


def test_first_step_never_switches(small, evaluations):
    unet, x_T, context, schedule = small
    result = sample_two_stage(unet, x_T, context, schedule, num_steps=5, threshold=2.0, min_t=40)
    assert result.switch_t.tolist() == [60] * 4  # d exists from the second step on; all of it is under 2
    assert evaluations == [4, 4, 8, 8, 8]


def test_calibrated_threshold_switches_the_median_sample(small):
    unet, x_T, context, schedule = small
    settings = dict(num_steps=20, min_t=30)
    recorded = sample_two_stage(unet, x_T, context, schedule, threshold=0, **settings)
    threshold = calibrate_threshold(recorded.d, recorded.timesteps, target_t=60)
    result = sample_two_stage(unet, x_T, context, schedule, threshold=threshold, **settings)
    assert (result.switch_t >= 60).sum() == 2
    lower = sample_two_stage(unet, x_T, context, schedule, threshold=threshold * (1 - 1e-6), **settings)
    assert (lower.switch_t >= 60).sum() == 1


def test_calibration_by_hand():
    d = torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.4, 0.6], [0.1, 0.5, 0.3]])
    timesteps = [950, 900, 850, 800, 750]
    assert calibrate_threshold(d, timesteps, 850) == pytest.approx(0.5)  # lowest so far: 0.5, 0.4, 0.6
    assert calibrate_threshold(d, timesteps, 800) == pytest.approx(0.3)  # 0.1, 0.4, 0.3
    assert (torch.tensor(0.5) < calibrate_threshold(d, timesteps, 850)).item()
    for target_t in (950, 750):
        with pytest.raises(UserError, match=rf"target_t: {target_t} is outside .* \(900 to 800\)"):
            calibrate_threshold(d, timesteps, target_t)
    with pytest.raises(UserError, match=r"target_t: 800 is outside .* \(none\)"):
        calibrate_threshold(torch.zeros(0, 3), timesteps, 800)


def test_a_sample_does_not_depend_on_its_batch(small):
    unet, x_T, context, schedule = small
    seeds = [11, 12, 13, 14]

    def run(rows: list[int]):
        generators = [torch.Generator().manual_seed(seeds[row]) for row in rows]
        return sample_two_stage(
            unet,
            x_T[rows],
            context[rows],
            schedule,
            num_steps=10,
            threshold=0.05,
            min_t=40,
            eta=0.5,
            generator=generators,
        )

    together = run([0, 1, 2, 3])
    for row in range(4):
        alone = run([row])
        assert alone.switch_t[0] == together.switch_t[row]
        assert relative_error(alone.x_0[0], together.x_0[row]) < 1e-4


def test_modes_come_back(small):
    unet, x_T, context, schedule = small
    modes = []

    def stop(*_):
        raise RuntimeError("stop")

    unet.train()
    unet.middle.eval()
    sample_ddim(unet, x_T, context, schedule, num_steps=1, callback=lambda *_: modes.append(unet.training))
    assert unet.training and unet.down.training and not unet.middle.training
    with pytest.raises(RuntimeError, match="stop"):
        sample_ddim(unet, x_T, context, schedule, num_steps=1, callback=stop)
    assert unet.training and not unet.middle.training
    unet.eval()
    assert modes == [False]


def test_samples_take_part_in_later_gradients(small):
    unet, x_T, context, schedule = small
    x_0 = sample_ddim(unet, x_T, context, schedule, num_steps=1)
    weight = torch.ones(1, requires_grad=True)
    (weight * x_0).sum().backward()
    assert weight.grad is not None and all(parameter.grad is None for parameter in unet.parameters())


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"indexing": "seed"}, "indexing: 'seed'; give one of exact, published"),
        ({"eta": 2}, "eta: 2"),
        ({"num_steps": 101}, "num_steps: 101; give a number from 1 to 100"),
        ({"threshold": -1}, "threshold: -1"),
    ],
)
def test_wrong_settings(small, evaluations, settings, message):
    with pytest.raises(UserError, match=message):
        sample_two_stage(*small, **settings)
    assert not evaluations


def test_wrong_inputs(small, evaluations):
    unet, x_T, context, schedule = small
    with pytest.raises(ValueError, match="context: 3 contexts for a batch of 4"):
        sample_ddim(unet, x_T, context[:3], schedule)
    with pytest.raises(ValueError, match="context: 3 contexts for a batch of 4"):
        sample_two_stage(unet, x_T, context[:3], schedule)
    with pytest.raises(ValueError, match="generator: 1 generators for a batch of 4"):
        sample_ddpm(unet, x_T, context, schedule, generator=[torch.Generator()])
    with pytest.raises(UserError, match="contexts: the two-stage sampler needs identity contexts"):
        sample_two_stage(unet, x_T, None, schedule)
    plain = ConditionalUNet(
        initial_channels=32,
        channel_multipliers=[1],
        is_attention=[False],
        condition_type="AdaGN",
        context_input_channels=8,
    )
    with pytest.raises(UserError, match="condition_type CA"):
        sample_two_stage(plain, x_T, context, schedule)
    assert not evaluations
