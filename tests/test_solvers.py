"""Solvers on predictors whose trajectory is known: by hand, exactly, and by their order of convergence."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from diffusion.solvers import Solver, ddim, ddim_timesteps, ddpm, dpm_solver_2m, draw_noise, make_solver
from tests.compat import relative_error
from utils.config import UserError


def solve(
    solver: Solver,
    predict: Callable[[Tensor, int], Tensor],
    x_T: Tensor,
    generator: torch.Generator | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """All samples from x_T (B, C, H, W) to x_0 with the noise that `predict` sees in x_t at t."""
    x_t, x_0_before = x_T, x_T
    for i, t in enumerate(solver.timesteps):
        steps = [i] * len(x_T)
        x_0 = solver.predict_x_0(steps, x_t, predict(x_t, t))
        if callback is not None:
            callback(i, t, x_t, x_0)
        noise = draw_noise(x_t, generator) if solver.sigma[i] > 0 else None
        x_t = solver.step(steps, x_t, x_0, x_0_before, torch.full((len(x_T),), i > 0), noise)
        x_0_before = x_0
    return x_t


def knows(x_0: Tensor, schedule: NoiseSchedule) -> Callable[[Tensor, int], Tensor]:
    """The predictor of a network that knows x_0: the noise that makes x_t of it."""

    def predict(x_t: Tensor, t: int) -> Tensor:
        alpha_bar = schedule.alpha_bar(t)
        return (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5

    return predict


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
        found = solve(ddim(schedule, num_steps, indexing, eta), knows(x_0, schedule), x_T)
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
        solve(
            ddim(schedule, 50, indexing),
            knows(x_0, schedule),
            x_T,
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
    solve(
        ddim(schedule, 4, indexing),
        lambda x_t, t: torch.full_like(x_t, 0.5),
        torch.full((1, 1, 1, 1), 2.0),
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
    solve(
        ddim(schedule, 2, eta=1.0),
        lambda x_t, t: torch.zeros_like(x_t),
        torch.ones(1, 1, 1, 1),
        generator=torch.Generator().manual_seed(3),
        callback=lambda i, t, x_t, x_0: states.append(x_t.item()),
    )
    z = torch.randn(1, 1, 1, 1, generator=torch.Generator().manual_seed(3)).item()
    assert states[1] == pytest.approx(0.9**0.5 / 0.72**0.5 + z / 14**0.5)


def test_ddpm_by_hand():
    """betas 0.1, 0.2, 0.5, eps 0.5 everywhere: noise at t = 2 only."""
    schedule = NoiseSchedule.from_betas(torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64))
    x_T = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    x_0 = solve(ddpm(schedule), lambda x_t, t: torch.full_like(x_t, 0.5), x_T, torch.Generator().manual_seed(3))
    z = torch.randn(1, 1, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64).item()
    x = (2.0 - 0.5 / 0.64**0.5 * 0.5) / 0.5**0.5 + 0.5**0.5 * z
    x = (x - 0.2 / 0.28**0.5 * 0.5) / 0.8**0.5
    x = (x - 0.1 / 0.1**0.5 * 0.5) / 0.9**0.5
    assert x_0.item() == pytest.approx(x)


def test_ddpm_finds_an_image_that_the_network_knows():
    schedule = NoiseSchedule(100)
    x_0, x_T = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(solve(ddpm(schedule), knows(x_0, schedule), x_T), x_0)


def test_noise_of_one_generator_a_sample_ignores_the_batch():
    like = torch.zeros(3, 3, 4, 4)
    together = draw_noise(like, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    alone = draw_noise(like[:1], [torch.Generator().manual_seed(6)])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])
    assert torch.equal(
        draw_noise(like, torch.Generator().manual_seed(1)), draw_noise(like, torch.Generator().manual_seed(1))
    )


# ------------------------------------------------------------------------------------------------- DPM-Solver++(2M)


def gaussian(schedule: NoiseSchedule, mean: float = 0.5, deviation: float = 0.3):
    """Data from N(mean, deviation^2): the noise that a perfect network predicts, and the exact solution of the
    probability flow, x_t = sqrt(alpha_bar) mean + c (alpha_bar deviation^2 + 1 - alpha_bar)^(1/2) for a constant c."""

    def spread(t: int) -> float:
        return (schedule.alpha_bar(t) * deviation**2 + 1 - schedule.alpha_bar(t)) ** 0.5

    def predict(x_t: Tensor, t: int) -> Tensor:
        alpha_bar = schedule.alpha_bar(t)
        return (1 - alpha_bar) ** 0.5 * (x_t - alpha_bar**0.5 * mean) / spread(t) ** 2

    def exact(c: Tensor, t: int) -> Tensor:
        return schedule.alpha_bar(t) ** 0.5 * mean + c * spread(t)

    return predict, exact


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm_solver_2m", 2)])
def test_order_of_convergence(name, order):
    """Half the stride, half the error to the power of the order; measured at t = 200, in the middle of the way."""
    schedule = NoiseSchedule()
    predict, exact = gaussian(schedule)
    c = torch.tensor([-1.5, -0.3, 0.8, 2.0], dtype=torch.float64).view(4, 1, 1, 1)
    errors = []
    for num_steps in (50, 100, 200):
        solver = make_solver(schedule, name, num_steps, "exact", 0.0)
        seen = {}
        solve(
            solver,
            predict,
            exact(c, solver.timesteps[0]),
            callback=lambda i, t, x_t, x_0, seen=seen: seen.update({t: x_t}),
        )
        errors.append((seen[200] - exact(c, 200)).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)
    assert errors[0] < {1: 0.05, 2: 2e-3}[order]


def test_dpm_solver_against_a_plain_implementation():
    """Algorithm 2 of the paper, in scalars and with the names that stand there."""
    schedule = NoiseSchedule()
    solver = dpm_solver_2m(schedule, 20)
    x_T = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def predict(x: Tensor, t: int) -> Tensor:
        return torch.sin(3 * x + t / 100)

    def data(x: Tensor, t: int) -> Tensor:
        alpha = schedule.alpha_bar(t) ** 0.5
        return (x - (1 - alpha**2) ** 0.5 * predict(x, t)) / alpha

    x, outputs, half_log_snr = x_T, [], []
    grid = [*range(950, -1, -50), -1]
    for i, (s, t) in enumerate(itertools.pairwise(grid)):
        outputs.append(data(x, s))
        if t < 0:
            x = outputs[-1]
            continue
        a_s, a_t = torch.tensor([schedule.alpha_bar(s), schedule.alpha_bar(t)], dtype=torch.float64).sqrt()
        sigma_s, sigma_t = (1 - a_s**2).sqrt(), (1 - a_t**2).sqrt()
        half_log_snr.append((a_s / sigma_s).log())
        h = (a_t / sigma_t).log() - half_log_snr[-1]
        d = outputs[-1]
        if i > 0:
            r = (half_log_snr[-1] - half_log_snr[-2]) / h
            d = (1 + 1 / (2 * r)) * outputs[-1] - 1 / (2 * r) * outputs[-2]
        x = sigma_t / sigma_s * x - a_t * ((-h).exp() - 1) * d
    assert relative_error(solve(solver, predict, x_T), x) < 1e-12


def test_dpm_solver_without_a_past_is_ddim():
    """Lu et al., section 4: the first order is DDIM; a sample without a past gets it, beside one that has one."""
    schedule = NoiseSchedule()
    x_t, x_0, before = torch.randn(3, 2, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = [7, 12]
    first = dpm_solver_2m(schedule, 20).step(steps, x_t, x_0, before, torch.tensor([False, True]))
    plain = ddim(schedule, 20).step(steps, x_t, x_0, before, torch.tensor([False, True]))
    torch.testing.assert_close(first[0], plain[0])
    assert relative_error(first[1], plain[1]) > 1e-3


def test_settings_that_a_solver_does_not_read():
    schedule = NoiseSchedule(100)
    assert len(make_solver(schedule, "dpm_solver_2m", 20, "exact", 0.0)) == 20
    for settings, message in (
        (("euler", 20, "exact", 0.0), "solver: 'euler'; give one of ddim, dpm_solver_2m"),
        (("dpm_solver_2m", 20, "published", 0.0), "indexing: published; dpm_solver_2m does not read it, give exact"),
        (("dpm_solver_2m", 20, "exact", 0.5), "eta: 0.5; dpm_solver_2m does not read it, give 0"),
        (("ddim", 20, "other", 0.0), "indexing: 'other'"),
    ):
        with pytest.raises(UserError, match=message):
            make_solver(schedule, *settings)
