"""The samplers against published trajectories, hand-computed steps and the cost they promise."""

import pytest
import torch

from diffusion.rules import guide
from diffusion.samplers import calibrate_threshold, sample_ddim, sample_ddpm, sample_two_stage
from diffusion.schedule import NoiseSchedule
from models.diffusion.unet import ConditionalUNet
from tests.compat import fill_deterministic, load_arrays, load_json, relative_error
from utils.config import UserError

SMALL = dict(
    initial_channels=32,
    channel_multipliers=[1, 1],
    is_attention=[False, True],
    n_blocks_per_resolution=1,
    context_input_channels=8,
    context_channels=32,
    learn_empty_context=True,
)


@pytest.fixture(scope="module")
def published():
    unet = fill_deterministic(ConditionalUNet(**load_json("tiny_config")["unet_tiny"]))
    return unet, {name: torch.from_numpy(array) for name, array in load_arrays("unet_tiny").items() if array.ndim}


@pytest.fixture(scope="module")
def small():
    """A network of a few thousand operations, noise and contexts for four samples, and a schedule of 100 timesteps."""
    unet = fill_deterministic(ConditionalUNet(**SMALL))
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
