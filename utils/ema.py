"""Exponential moving average of a network's weights."""

import copy
from typing import Any

import torch
from torch import nn


class EMA:
    """An average of the weights that follows them with a decay that rises to `decay`.

    At update n = 1, 2, ... the decay is min(decay, 1 - (1 + max(0, n - 2) / inv_gamma)^-power), so 0 for the first two
    updates: the average starts from weights that have been trained, not from the initial ones. With the defaults it is
    the warm-up of the IDiff-Face and UIFace training configurations; `decay=0.999` with `power=None` is the plain
    average of the UIFace paper (appendix). Buffers are copied, not averaged.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, inv_gamma: float = 1.0, power: float | None = 0.75
    ) -> None:
        """`model` gives the first values; `power=None` switches the warm-up off. ValueError: decay outside [0, 1]."""
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ema.decay: {decay} is not in [0, 1]")
        self.decay, self.inv_gamma, self.power = decay, inv_gamma, power
        self.num_updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, n: int) -> float:
        """The decay of update number `n`, counted from 1."""
        if self.power is None:
            return self.decay
        return min(self.decay, 1.0 - (1.0 + max(0, n - 2) / self.inv_gamma) ** -self.power)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average <- decay * average + (1 - decay) * weights, in one fused pass over all parameters."""
        self.num_updates += 1
        decay = self.decay_at(self.num_updates)
        averaged, current = dict(self.model.named_parameters()), dict(model.named_parameters())
        if averaged.keys() != current.keys():
            raise ValueError(
                f"the averaged network has other parameters: {sorted(averaged.keys() ^ current.keys())[:4]}"
            )
        targets = [p.data for p in averaged.values()]
        sources = [current[name].data for name in averaged]
        torch._foreach_lerp_(targets, sources, 1.0 - decay)
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of updates."""
        return {"num_updates": self.num_updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; strict."""
        self.num_updates = int(state["num_updates"])
        self.model.load_state_dict(state["model"])
