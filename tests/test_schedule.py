"""Noise schedules and the forward process against published arrays and hand-computed numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from diffusion.ddpm import q_sample, training_loss
from diffusion.schedule import NoiseSchedule
from tests.compat import load_arrays, relative_error
from utils.config import UserError

CONFIGS = Path(__file__).parents[1] / "configs" / "diffusion"


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_published_arrays(kind):
    published = load_arrays("schedules")
    schedule = NoiseSchedule(1000, kind)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float32
    assert relative_error(schedule.betas, published[f"{kind}_betas"]) < 1e-6
    assert relative_error(schedule.alphas_cumprod, published[f"{kind}_alpha_bars"]) < 1e-6


def test_linear_literals():
    schedule = NoiseSchedule()
    assert schedule.num_timesteps == 1000
    assert schedule.betas[0].item() == pytest.approx(1e-4)
    assert schedule.betas[-1].item() == pytest.approx(0.02)
    assert schedule.alpha_bar(999) == pytest.approx(4.0358e-05, rel=1e-4)
    assert schedule.alpha_bar(-1) == 1.0
    assert NoiseSchedule(2000).betas[[0, -1]].tolist() == pytest.approx([5e-5, 0.01])


def test_derived_values_by_hand():
    schedule = NoiseSchedule.from_betas(torch.tensor([0.1, 0.2, 0.5]))
    assert schedule.alphas.tolist() == pytest.approx([0.9, 0.8, 0.5])
    assert schedule.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.36])
    assert schedule.sqrt_alphas_cumprod.tolist() == pytest.approx([0.9486833, 0.8485281, 0.6])
    assert schedule.sqrt_one_minus_alphas_cumprod.tolist() == pytest.approx([0.3162278, 0.5291503, 0.8])
    assert [schedule.beta(2), schedule.alpha_bar(2)] == pytest.approx([0.5, 0.36])


def test_cosine_warped():
    same = NoiseSchedule(100, "cosine_warped")
    assert torch.equal(same.betas, NoiseSchedule(100, "cosine").betas)
    warped = NoiseSchedule(100, "cosine_warped", k=1.5, beta_min=1e-3, beta_max=0.5)
    assert warped.betas.min() == pytest.approx(1e-3)
    u = 0.5, 0.51
    f = [np.cos(np.pi / 2 * (x + 0.008) / 1.008**1.5) ** 2 for x in u]
    assert warped.betas[50].item() == pytest.approx(1 - f[1] / f[0], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "quadratic"}, "kind: 'quadratic'"),
        ({"num_timesteps": 0}, "num_timesteps: 0"),
        ({"num_timesteps": 10}, r"betas: from 0.01 to 2 in 10 timesteps"),
        ({"kind": "linear", "beta_max": 0.1}, "beta_max: the linear schedule does not read it"),
        ({"kind": "cosine", "k": 2.0}, "k: the cosine schedule does not read it"),
        ({"kind": "cosine", "beta_max": 1.0}, "beta_min, beta_max: 0.0, 1.0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        NoiseSchedule(**settings)


@pytest.mark.parametrize("betas", [[0.1, float("nan")], [-0.1], [[0.1, 0.2]], []])
def test_wrong_betas(betas):
    with pytest.raises(UserError, match="betas"):
        NoiseSchedule.from_betas(torch.tensor(betas))


def test_moves_to_a_device():
    schedule = NoiseSchedule(25)
    assert schedule.to("meta") is schedule
    assert schedule.device.type == schedule.sqrt_alphas_cumprod.device.type == "meta"


@pytest.mark.parametrize(
    ("name", "num_timesteps", "last_beta"),
    [("ddpm", 1000, 0.02), ("ddpm_2000", 2000, 0.01), ("ddpm_cosine", 1000, 0.1)],
)
def test_configs(name, num_timesteps, last_beta):
    schedule = instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    assert schedule.num_timesteps == num_timesteps
    assert schedule.betas[-1].item() == pytest.approx(last_beta)


def test_q_sample_and_loss_by_hand():
    schedule = NoiseSchedule.from_betas(torch.tensor([0.1, 0.2, 0.5]))
    x_0, noise = torch.full((2, 1, 2, 2), 2.0), torch.full((2, 1, 2, 2), -1.0)
    t = torch.tensor([0, 2])
    x_t = q_sample(x_0, t, noise, schedule)
    assert x_t[:, 0, 0, 0].tolist() == pytest.approx([2 * 0.9486833 - 0.3162278, 2 * 0.6 - 0.8])

    seen = {}

    def network(x, t, context, **masks):
        seen.update(masks, x=x, t=t, context=context)
        return torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])

    context, empty = torch.zeros(2, 4), torch.tensor([True, False])
    losses = training_loss(network, x_0, t, noise, context, schedule, empty_mask=empty, reduction="none")
    assert losses.tolist() == [1.0, 4.0]  # noise is -1 everywhere
    assert torch.equal(seen["x"], x_t) and seen["t"] is t and seen["context"] is context
    assert seen["empty_mask"] is empty and seen["element_mask"] is None
    assert training_loss(network, x_0, t, noise, context, schedule).item() == 2.5
    with pytest.raises(ValueError, match="reduction: 'sum'"):
        training_loss(network, x_0, t, noise, context, schedule, reduction="sum")
