"""ElasticFace: margins drawn anew for every sample (Boutros et al., CVPR workshops 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from recognition.heads.base import CosineHead, check_margin, check_number
from recognition.heads.fixed import add_angle
from utils.config import UserError


class ElasticFace(CosineHead):
    """The draw that both forms share: E(m, sigma), a normal distribution of the margin of each sample in a batch.

    With `plus` (the paper's ElasticFace+) the batch's margins are handed out by difficulty: the sample with the lowest
    cosine to its class gets the largest. Outside of training the margin is m.
    """

    def __init__(
        self, in_features: int, num_classes: int, scale: float, margin: float, sigma: float, plus: bool
    ) -> None:
        super().__init__(in_features, num_classes, scale)
        check_margin(margin)
        check_number("sigma", sigma, lambda value: value > 0, "a number above 0")
        if not isinstance(plus, bool):
            raise UserError(f"head.plus: {plus!r}; true or false is wanted")
        self.margin = margin
        self.sigma = sigma
        self.plus = plus

    def draw(self, cosine: Tensor, generator: torch.Generator | None) -> Tensor:
        """Margins (B,) for samples with `cosine` (B,) to their own class; `generator` as in `target_logit`."""
        if not self.training:
            return torch.full_like(cosine, self.margin)
        # Drawn on the CPU: one seed gives the same margins on any device
        normal = torch.randn(len(cosine), generator=generator).to(cosine)
        margins = self.margin + self.sigma * normal
        if self.plus:
            hardest_first = cosine.detach().argsort(stable=True)
            margins = torch.empty_like(margins).scatter(0, hardest_first, margins.sort(descending=True).values)
        return margins


class ElasticFaceArc(ElasticFace):
    """s cos(theta_y + E(m, sigma)), L_EArc of the paper; `plus`: sigma 0.0175. Beyond pi it goes on as ArcFace."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        scale: float = 64.0,
        margin: float = 0.5,
        sigma: float = 0.05,
        plus: bool = False,
    ) -> None:
        super().__init__(in_features, num_classes, scale, margin, sigma, plus)

    def target_logit(self, cosine: Tensor, norms: Tensor, generator: torch.Generator | None) -> Tensor:
        return add_angle(cosine, self.draw(cosine, generator))


class ElasticFaceCos(ElasticFace):
    """s (cos(theta_y) - E(m, sigma)), L_ECos of the paper; `plus`: sigma 0.02."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        scale: float = 64.0,
        margin: float = 0.35,
        sigma: float = 0.05,
        plus: bool = False,
    ) -> None:
        super().__init__(in_features, num_classes, scale, margin, sigma, plus)

    def target_logit(self, cosine: Tensor, norms: Tensor, generator: torch.Generator | None) -> Tensor:
        return cosine - self.draw(cosine, generator)
