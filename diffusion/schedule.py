"""Noise schedules: betas and what follows from them.

Notation of DDPM (Ho et al., NeurIPS 2020): beta_t, alpha_t = 1 - beta_t, alpha_bar_t = prod_{s <= t} alpha_s
(`alphas_cumprod`), for the T timesteps 0 .. T - 1.
"""

import math

import numpy as np
import torch
from torch import Tensor

from utils.config import UserError

KINDS = ("linear", "cosine", "cosine_warped")
COSINE_OFFSET = 0.008  # s in the cosine schedule


class NoiseSchedule:
    """The betas of a diffusion process. Computed in float64; the tensors are float32 of shape (T,) on one device.

    betas, alphas, alphas_cumprod, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod.
    """

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(
        self,
        num_timesteps: int = 1000,
        kind: str = "linear",
        *,
        k: float = 1.0,
        beta_min: float = 0.0,
        beta_max: float = 0.999,
    ) -> None:
        """Build one of the named schedules.

        linear: from 1e-4 to 0.02, times 1000 / T (DDPM). cosine: Nichol & Dhariwal (ICML 2021), betas at most
        `beta_max`.
        cosine_warped: the same with the exponent `k` and the lower bound `beta_min`.

        Raises UserError for an unknown kind, for settings the kind does not read, and for betas outside [0, 1).
        """
        if kind not in KINDS:
            raise UserError(f"kind: {kind!r}; give one of {', '.join(KINDS)}")
        if num_timesteps < 1:
            raise UserError(f"num_timesteps: {num_timesteps}; give at least 1")
        unread = {"k": k != 1.0, "beta_min": beta_min != 0.0, "beta_max": beta_max != 0.999}
        if kind == "cosine":
            unread.pop("beta_max")
        if kind != "cosine_warped" and any(unread.values()):
            name = next(name for name, changed in unread.items() if changed)
            raise UserError(f"{name}: the {kind} schedule does not read it; leave it out, or take another kind")
        if kind == "linear":
            scale = 1000 / num_timesteps
            betas = np.linspace(1e-4 * scale, 0.02 * scale, num_timesteps)
        else:
            if not 0 <= beta_min <= beta_max < 1:
                raise UserError(f"beta_min, beta_max: {beta_min}, {beta_max}; give 0 <= beta_min <= beta_max < 1")
            betas = _cosine_betas(num_timesteps, k, beta_min, beta_max)
        self._set(betas)

    @classmethod
    def from_betas(cls, betas: Tensor | np.ndarray) -> "NoiseSchedule":
        """The schedule of given betas (T,), such as those of a published checkpoint."""
        schedule = cls.__new__(cls)
        schedule._set(torch.as_tensor(betas).detach().cpu().double().numpy())
        return schedule

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @property
    def device(self) -> torch.device:
        return self.betas.device

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Move the tensors to `device`; returns the schedule itself."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def alpha_bar(self, t: int) -> float:
        """alpha_bar_t in float64; 1, the clean sample, for t < 0."""
        return float(self._alphas_cumprod[t]) if t >= 0 else 1.0

    def beta(self, t: int) -> float:
        """beta_t in float64."""
        return float(self._betas[t])

    def _set(self, betas: np.ndarray) -> None:
        if betas.ndim != 1 or len(betas) == 0:
            raise UserError(f"betas: shape {betas.shape}; give a list of one beta per timestep")
        if not np.all((betas >= 0) & (betas < 1)):  # also catches nan
            raise UserError(
                f"betas: from {betas.min():.4g} to {betas.max():.4g} in {len(betas)} timesteps; "
                "every beta must be in [0, 1)"
            )
        self._betas, self._alphas_cumprod = betas, np.cumprod(1 - betas)
        for name, values in {
            "betas": betas,
            "alphas": 1 - betas,
            "alphas_cumprod": self._alphas_cumprod,
            "sqrt_alphas_cumprod": np.sqrt(self._alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - self._alphas_cumprod),
        }.items():
            setattr(self, name, torch.from_numpy(values).float())


def _cosine_betas(num_timesteps: int, k: float, beta_min: float, beta_max: float) -> np.ndarray:
    """beta_t = clip(1 - f((t + 1) / T) / f(t / T), beta_min, beta_max) with f(u) = cos^2(pi / 2 * (u + s) / (1 +
    s)^k)."""
    u = np.arange(num_timesteps + 1) / num_timesteps
    f = np.cos(math.pi / 2 * (u + COSINE_OFFSET) / (1 + COSINE_OFFSET) ** k) ** 2
    return np.clip(1 - f[1:] / f[:-1], beta_min, beta_max)
