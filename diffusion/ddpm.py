"""The forward process and the training loss of DDPM (Ho et al., NeurIPS 2020).

Legend: B batch, C channels, H W height and width, D context width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.schedule import NoiseSchedule


def q_sample(x_0: Tensor, t: Tensor, noise: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Draw x_t from q(x_t | x_0), DDPM equation 4: sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.

    x_0, noise (B, C, H, W); t (B,) long in 0 .. T - 1. Returns (B, C, H, W).
    """
    signal = schedule.sqrt_alphas_cumprod.to(t.device)[t][:, None, None, None]
    sigma = schedule.sqrt_one_minus_alphas_cumprod.to(t.device)[t][:, None, None, None]
    return signal * x_0 + sigma * noise


def training_loss(
    unet: nn.Module,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    context: Tensor | None,
    schedule: NoiseSchedule,
    *,
    empty_mask: Tensor | None = None,
    element_mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared error of the predicted noise, DDPM equation 14.

    x_0, noise (B, C, H, W); t (B,) long; context (B, context_input_channels) or None. The masks go to the network:
    they say which contexts are emptied, (B,) bool, and which components of an embedding survive, (B, D) bool.
    reduction: "mean" gives a scalar, "none" the error of each sample, (B,).
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: {reduction!r}; give 'mean' or 'none'")
    x_t = q_sample(x_0, t, noise, schedule)
    eps = unet(x_t, t, context, empty_mask=empty_mask, element_mask=element_mask)
    losses = F.mse_loss(eps.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
    return losses.mean() if reduction == "mean" else losses
