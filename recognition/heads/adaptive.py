"""Heads that adapt to the training through running statistics of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from recognition.heads.base import CosineHead, check_margin, check_number, cosine_of_sum
from recognition.heads.fixed import add_angle

NORM_RANGE = (1e-3, 100.0)  # of AdaFace: a norm outside counts as its end, so that one image cannot move the statistics
NORM_EPS = 1e-3  # of AdaFace: added to the deviation


class CurricularFace(CosineHead):
    """ArcFace's target, and harder negatives the further the training is (Huang et al., CVPR 2020, section 3.2).

    T(cos theta_y) = cos(theta_y + m). A negative with cos theta_j > T, a hard one, gets the logit
    N = cos theta_j (t + cos theta_j), the others keep cos theta_j. t, from 0 on, is the running mean of cos theta_y:
    t <- t_alpha mean(cos theta_y) + (1 - t_alpha) t. Beyond pi the target goes on as ArcFace's.
    """

    def __init__(
        self, in_features: int, num_classes: int, scale: float = 64.0, margin: float = 0.5, t_alpha: float = 0.01
    ) -> None:
        super().__init__(in_features, num_classes, scale)
        check_margin(margin)
        check_rate(t_alpha)
        self.margin = margin
        self.t_alpha = t_alpha
        self.register_buffer("t", torch.zeros(()))

    @torch.no_grad()
    def observe(self, cosine: Tensor, norms: Tensor) -> None:
        if self.training:
            self.t.lerp_(cosine.mean().to(self.t), self.t_alpha)

    def target_logit(self, cosine: Tensor, norms: Tensor, generator: torch.Generator | None) -> Tensor:
        return add_angle(cosine, torch.full_like(cosine, self.margin))

    def other_logits(self, cosines: Tensor, target: Tensor) -> Tensor:
        return torch.where(cosines > target[:, None], cosines * (self.t + cosines), cosines)


class AdaFace(CosineHead):
    """A margin by the image's quality, told by the embedding's norm (Kim et al., CVPR 2022, section 3.3).

    z = clip((norm - mean) / (deviation / h), -1, 1), without gradient; mean and deviation are running statistics of
    the batch's norms, moved by t_alpha a step. The target is s (cos(theta_y + g_angle) - g_add) with
    g_angle = -m z and g_add = m z + m; theta_y + g_angle is kept in [0, pi], as the published code does.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        scale: float = 64.0,
        margin: float = 0.4,
        h: float = 0.333,
        t_alpha: float = 0.01,
    ) -> None:
        super().__init__(in_features, num_classes, scale)
        check_margin(margin)
        check_number("h", h, lambda value: value > 0, "a number above 0")
        check_rate(t_alpha)
        self.margin = margin
        self.h = h
        self.t_alpha = t_alpha
        # The published code starts here: near the norms of batch-normalised 512-d embeddings, with small margins first
        self.register_buffer("norm_mean", torch.tensor(20.0))
        self.register_buffer("norm_std", torch.tensor(100.0))

    @torch.no_grad()
    def observe(self, cosine: Tensor, norms: Tensor) -> None:
        if not self.training or len(norms) < 2:  # one norm has no deviation
            return
        std, mean = torch.std_mean(norms.clamp(*NORM_RANGE))
        self.norm_mean.lerp_(mean.to(self.norm_mean), self.t_alpha)
        self.norm_std.lerp_(std.to(self.norm_std), self.t_alpha)

    def target_logit(self, cosine: Tensor, norms: Tensor, generator: torch.Generator | None) -> Tensor:
        deviation = (norms.detach().clamp(*NORM_RANGE) - self.norm_mean) / (self.norm_std + NORM_EPS)  # (B,)
        quality = (self.h * deviation).clamp(-1, 1).to(cosine)  # (B,): z
        angle = -self.margin * quality
        shifted = cosine_of_sum(cosine, angle)
        # theta + angle below 0 or beyond pi
        shifted = torch.where((angle < 0) & (cosine > angle.cos()), 1.0, shifted)
        shifted = torch.where((angle > 0) & (cosine < -angle.cos()), -1.0, shifted)
        return shifted - (self.margin * quality + self.margin)


def check_rate(t_alpha: float) -> None:
    """UserError unless `t_alpha` is a number above 0 and at most 1."""
    check_number("t_alpha", t_alpha, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
