"""Learning-rate schedules that torch does not have: functions from an optimiser to a scheduler stepped every step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from utils.config import UserError


def warmup_cosine(optimizer: Optimizer, steps: int, warmup_steps: int = 0, final_share: float = 0.0) -> LambdaLR:
    """Linear from 0 over `warmup_steps`, then a half cosine down to `final_share` of the learning rate at `steps`.

    Raises UserError unless 0 <= warmup_steps < steps.
    """
    if not 0 <= warmup_steps < steps:
        raise UserError(
            f"training.lr_scheduler.warmup_steps: {warmup_steps}, of a run of {steps} steps; give 0 to {steps - 1}"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / (steps - warmup_steps))
        return final_share + (1.0 - final_share) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, warmup_steps: int = 0) -> LambdaLR:
    """The learning rate itself, after a linear rise over `warmup_steps`."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0)
