"""Solvers: from x_t and the predicted noise to the next timestep, for samples that stand at steps of their own.

Every solver here is linear in x_t, in the image predicted now and in the one predicted a step before, so that one class
with four coefficients a step holds them all; what differs is how the coefficients come about.

| paper | here |
| --- | --- |
| alpha_bar_t, alpha_bar_{t-1} (DDPM; DDIM writes alpha_t) | alpha_bar, alpha_bar_next |
| eps_theta(x_t, t) | eps |
| sigma_t, eta (DDIM equation 16) | sigma, eta |
| lambda_t = log(alpha_t / sigma_t), h (DPM-Solver: alpha_t^2 = alpha_bar_t, sigma_t^2 = 1 - alpha_bar_t) | lambdas, h |

Legend: n samples, S steps, C channels, H W height and width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from utils.config import UserError

INDEXINGS = ("exact", "published")
DDIM, DPM_SOLVER = "ddim", "dpm_solver_2m"
SOLVERS = (DDIM, DPM_SOLVER)

Generators = torch.Generator | Sequence[torch.Generator | None] | None  # a sequence holds one for each sample


class Solver:
    """x_next = keep x_t + new x_0 + old x_0_before + sigma z, with coefficients of every step.

    `first_order` are (keep, new) of a step without a past. Coefficients are float64 and are cast to the type of x_t.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        timesteps: Sequence[int],
        *,
        keep: Sequence[float],
        new: Sequence[float],
        old: Sequence[float] | None = None,
        sigma: Sequence[float] | None = None,
        first_order: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        """timesteps (S,) descending, and S values of each coefficient; `old` and `sigma` None: 0."""
        zeros = [0.0] * len(timesteps)
        alpha_bar = [schedule.alpha_bar(t) for t in timesteps]
        self.timesteps = list(timesteps)
        self.sigma = list(sigma or zeros)
        self.is_multistep = old is not None
        first_keep, first_new = first_order or (keep, new)
        columns = [
            [a**-0.5 for a in alpha_bar],
            [((1 - a) / a) ** 0.5 for a in alpha_bar],
            keep,
            new,
            old or zeros,
            first_keep,
            first_new,
            self.sigma,
        ]
        self._table = torch.tensor(columns, dtype=torch.float64).T  # (S, 8)

    def __len__(self) -> int:
        return len(self.timesteps)

    def predict_x_0(self, steps: Sequence[int], x_t: Tensor, eps: Tensor) -> Tensor:
        """The image that the noise `eps` in x_t leaves (DDIM equation 12, "predicted x_0"): (n, C, H, W) each."""
        scale, noise = self._coefficients(steps, x_t)[:2]
        return scale * x_t - noise * eps

    def step(
        self,
        steps: Sequence[int],
        x_t: Tensor,
        x_0: Tensor,
        x_0_before: Tensor,
        has_past: Tensor,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x_t of every sample's next timestep.

        steps: numbers 0 .. S - 1, one a sample; x_t, x_0, x_0_before (n, C, H, W), the last as predicted a step before,
        read where `has_past` (n,) bool; noise z, None where no sample's sigma is above 0.
        """
        _, _, keep, new, old, first_keep, first_new, sigma = self._coefficients(steps, x_t)
        if self.is_multistep:
            past = has_past[:, None, None, None]
            second = keep * x_t + new * x_0 + old * x_0_before
            x_next = torch.where(past, second, first_keep * x_t + first_new * x_0)
        else:
            x_next = keep * x_t + new * x_0
        return x_next if noise is None else x_next + sigma * noise

    def _coefficients(self, steps: Sequence[int], like: Tensor) -> tuple[Tensor, ...]:
        rows = self._table[list(steps)].to(like.device, like.dtype)  # (n, 8)
        return rows[..., None, None, None].unbind(1)  # (n, 1, 1, 1) each


def ddim(schedule: NoiseSchedule, num_steps: int, indexing: str = "exact", eta: float = 0.0) -> Solver:
    """DDIM (Song et al., ICLR 2021), equation 12: sqrt(alpha_bar_next) x_0 + sqrt(1 - alpha_bar_next - sigma^2) eps.

    indexing: "exact" reads alpha_bar at the next timestep, as DDIM does; "published" one index lower, as the code
    published with UIFace does. eta: 0 deterministic .. 1 as noisy as DDPM. Raises UserError for settings that are none.
    """
    check_ddim(indexing, eta)
    timesteps = ddim_timesteps(schedule.num_timesteps, num_steps)
    keep, new, sigmas = [], [], []
    for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
        alpha_bar = schedule.alpha_bar(t)
        alpha_bar_next = schedule.alpha_bar(t_next - 1 if indexing == "published" else t_next)
        # sigma_t, equation 16
        sigma = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)) ** 0.5
        # the "direction pointing to x_t" is along eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar)
        direction = max(1 - alpha_bar_next - sigma**2, 0.0) ** 0.5 / (1 - alpha_bar) ** 0.5
        keep.append(direction)
        new.append(alpha_bar_next**0.5 - direction * alpha_bar**0.5)
        sigmas.append(sigma)
    return Solver(schedule, timesteps, keep=keep, new=new, sigma=sigmas)


def ddpm(schedule: NoiseSchedule) -> Solver:
    """Ancestral sampling over all T steps (DDPM, algorithm 2) with variance beta_t.

    None of it in the last two steps, as in the code published with IDiff-Face (DDPM: in the last one).
    """
    timesteps = list(reversed(range(schedule.num_timesteps)))
    keep, new = [], []
    for t in timesteps:
        beta, alpha_bar, alpha_bar_next = schedule.beta(t), schedule.alpha_bar(t), schedule.alpha_bar(t - 1)
        # the mean of x_{t-1}, equation 11, in terms of x_0: equation 7
        keep.append((1 - beta) ** 0.5 * (1 - alpha_bar_next) / (1 - alpha_bar))
        new.append(alpha_bar_next**0.5 * beta / (1 - alpha_bar))
    sigmas = [schedule.beta(t) ** 0.5 if t > 1 else 0.0 for t in timesteps]
    return Solver(schedule, timesteps, keep=keep, new=new, sigma=sigmas)


def dpm_solver_2m(schedule: NoiseSchedule, num_steps: int) -> Solver:
    """DPM-Solver++(2M) (Lu et al., 2022, arXiv 2211.01095), algorithm 2, on the timesteps of DDIM.

    x_next = sigma_next / sigma_t x_t - alpha_next (exp(-h) - 1) D with h = lambda_next - lambda_t and
    D = (1 + 1 / (2 r)) x_0 - 1 / (2 r) x_0_before, r = h_before / h. First order, D = x_0, in a step without a past and
    in the last one, which goes to alpha_bar 1, where h is infinite and x_next = x_0.
    """
    timesteps = ddim_timesteps(schedule.num_timesteps, num_steps)
    alpha_bars = [schedule.alpha_bar(t) for t in timesteps]
    lambdas = [0.5 * math.log(a / (1 - a)) for a in alpha_bars]
    keep, first_new, new, old = [], [], [], []
    for i in range(len(timesteps) - 1):
        h = lambdas[i + 1] - lambdas[i]
        weight = -(alpha_bars[i + 1] ** 0.5) * math.expm1(-h)
        extrapolation = h / (2 * (lambdas[i] - lambdas[i - 1])) if i > 0 else 0.0  # 1 / (2 r)
        keep.append(((1 - alpha_bars[i + 1]) / (1 - alpha_bars[i])) ** 0.5)
        first_new.append(weight)
        new.append(weight * (1 + extrapolation))
        old.append(-weight * extrapolation)
    keep, first_new, new, old = [*keep, 0.0], [*first_new, 1.0], [*new, 1.0], [*old, 0.0]
    return Solver(schedule, timesteps, keep=keep, new=new, old=old, first_order=(keep, first_new))


def make_solver(schedule: NoiseSchedule, name: str, num_steps: int, indexing: str, eta: float) -> Solver:
    """The solver of this name. Raises UserError for one that is none, and for settings that it does not read."""
    if name not in SOLVERS:
        raise UserError(f"solver: {name!r}; give one of {', '.join(SOLVERS)}")
    if name == DDIM:
        return ddim(schedule, num_steps, indexing, eta)
    check_ddim(indexing, eta)
    if indexing != "exact" or eta != 0:
        key, value, right = ("indexing", indexing, "exact") if indexing != "exact" else ("eta", eta, "0")
        raise UserError(f"{key}: {value}; {name} does not read it, give {right} (or take solver {DDIM})")
    return dpm_solver_2m(schedule, num_steps)


def check_ddim(indexing: str, eta: float) -> None:
    """Raise UserError for settings that DDIM does not know."""
    if indexing not in INDEXINGS:
        raise UserError(f"indexing: {indexing!r}; give one of {', '.join(INDEXINGS)}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta: {eta}; give a number from 0 (DDIM) to 1 (DDPM)")


def ddim_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """The timesteps of `num_steps` steps, descending to 0: every (T // num_steps)-th, so 31 of them for 30 of 1000."""
    return list(reversed(range(0, num_timesteps, stride(num_timesteps, num_steps))))


def stride(num_timesteps: int, num_steps: int) -> int:
    """Distance between the timesteps of `num_steps` steps; UserError where there are not so many."""
    if not 1 <= num_steps <= num_timesteps:
        raise UserError(
            f"num_steps: {num_steps}; give a number from 1 to {num_timesteps}, the timesteps of the schedule"
        )
    return num_timesteps // num_steps


def draw_noise(like: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise of the shape, type and device of `like` (n, C, H, W).

    With one generator for each sample, a sample's noise does not depend on the batch it is in; a generator that all
    share draws for the whole batch. A generator on the CPU gives the same noise for every device.
    """
    if isinstance(generator, Sequence):
        if any(one is not generator[0] for one in generator):
            return torch.stack([_randn(like.shape[1:], like, one) for one in generator])
        generator = generator[0]
    return _randn(like.shape, like, generator)


def _randn(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
