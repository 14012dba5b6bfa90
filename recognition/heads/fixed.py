"""Heads whose margin is a constant, or that have none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recognition.heads.base import CosineHead, check_margin, cosine_of_sum
from utils.config import UserError


class ArcFace(CosineHead):
    """Additive angular margin: s cos(theta_y + m) (Deng et al., CVPR 2019, equation 3).

    Where theta_y + m would pass pi, the target goes on as `add_angle` says. With `easy_margin` the margin holds only
    for theta_y < pi / 2; further classes keep cos(theta_y), which eases the beginning of the training.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        scale: float = 64.0,
        margin: float = 0.5,
        easy_margin: bool = False,
    ) -> None:
        super().__init__(in_features, num_classes, scale)
        check_margin(margin)
        if not isinstance(easy_margin, bool):
            raise UserError(f"head.easy_margin: {easy_margin!r}; true or false is wanted")
        self.margin = margin
        self.easy_margin = easy_margin

    def target_logit(self, cosine: Tensor, norms: Tensor, generator: torch.Generator | None) -> Tensor:
        angle = torch.full_like(cosine, self.margin)
        if self.easy_margin:
            return torch.where(cosine > 0, cosine_of_sum(cosine, angle), cosine)
        return add_angle(cosine, angle)


class CosFace(CosineHead):
    """Additive cosine margin: s (cos(theta_y) - m) (Wang et al., CVPR 2018, equation 4)."""

    def __init__(self, in_features: int, num_classes: int, scale: float = 64.0, margin: float = 0.4) -> None:
        super().__init__(in_features, num_classes, scale)
        check_margin(margin)
        self.margin = margin

    def target_logit(self, cosine: Tensor, norms: Tensor, generator: torch.Generator | None) -> Tensor:
        return cosine - self.margin


class NormFace(CosineHead):
    """Normalised softmax without margin: s cos(theta_j) (Wang et al., ACM MM 2017; CosFace's equation 3)."""

    def __init__(self, in_features: int, num_classes: int, scale: float = 64.0) -> None:
        super().__init__(in_features, num_classes, scale)

    def target_logit(self, cosine: Tensor, norms: Tensor, generator: torch.Generator | None) -> Tensor:
        return cosine


class Softmax(NormFace):
    """Plain softmax: W_j . x, nothing normalised, no scale (ArcFace's equation 1, without its biases).

    What the interface calls cosines are inner products here, of any size.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes, scale=1.0)

    def cosine(self, embeddings: Tensor, centres: Tensor | None = None) -> Tensor:
        """Inner products (B, K') float32 of embeddings (B, D) and rows of weights (K', D); None: `weight`."""
        centres = self.weight if centres is None else centres
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(embeddings.float(), centres.float())


def add_angle(cosine: Tensor, angle: Tensor) -> Tensor:
    """cos(theta + angle) from cos(theta) (B,) and angle (B,), going on where theta + angle passes pi.

    There, that is where cos(theta) <= cos(pi - angle), the cosine would rise again; cos(theta) - angle sin(angle) in
    its place keeps falling in theta.
    """
    beyond = cosine - angle * angle.sin()
    return torch.where(cosine > -angle.cos(), cosine_of_sum(cosine, angle), beyond)
