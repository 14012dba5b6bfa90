"""Margin heads: classification layers whose logits ask for more than a correct class.

Legend: B batch, D width of the embedding, K identities. Angles in radians.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.config import UserError


class CosineHead(nn.Module):
    """Class centres on the unit sphere; subclasses turn the cosine of the own class into a harder target.

    `forward(embeddings (B, D), labels (B,) long)` returns float32 logits (B, K), multiplied by `scale`, for the
    cross-entropy.
    """

    def __init__(self, in_features: int, num_classes: int, scale: float, margin: float) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: {num_classes}; a margin head needs at least 2 identities")
        if not isinstance(scale, (int, float)) or scale <= 0:
            raise UserError(f"head.scale: {scale!r}; a number above 0 is wanted")
        if not isinstance(margin, (int, float)) or not 0 <= margin < math.pi:
            raise UserError(f"head.margin: {margin!r}; a number from 0 to pi is wanted")
        self.scale = scale
        self.margin = margin
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.normal_(self.weight, std=0.01)

    def target(self, cosine: Tensor) -> Tensor:
        """The target logit, before scaling, for the cosine to the own class centre; both (B, 1) float32."""
        raise NotImplementedError

    def cosine(self, embeddings: Tensor) -> Tensor:
        """Cosines (B, K) float32 between embeddings (B, D) and class centres."""
        # bf16 has steps of 0.004 near cosine 1, coarser than what tells two faces apart: always float32 here
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(F.normalize(embeddings.float()), F.normalize(self.weight.float())).clamp(-1, 1)

    def logits(self, cosine: Tensor, labels: Tensor) -> Tensor:
        """Cosines (B, K) => scaled logits (B, K) with the margin at the own class."""
        rows = labels[:, None]  # (B, 1)
        target = self.target(cosine.gather(1, rows))  # (B, 1)
        return self.scale * cosine.scatter(1, rows, target)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.logits(self.cosine(embeddings), labels)


class ArcFace(CosineHead):
    """Additive angular margin: s cos(theta_y + m) (Deng et al., CVPR 2019, equation 3).

    Where theta_y + m would pass pi, that is cos(theta_y) <= cos(pi - m), the cosine would rise again; the target
    goes on as cos(theta_y) - m sin(pi - m), which keeps it falling in theta_y.
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 64.0, margin: float = 0.5) -> None:
        super().__init__(in_features, num_classes, scale, margin)

    def target(self, cosine: Tensor) -> Tensor:
        # The floor keeps the gradient of the square root finite at theta = 0
        sine = (1.0 - cosine.square()).clamp_min(1e-12).sqrt()
        shifted = cosine * math.cos(self.margin) - sine * math.sin(self.margin)  # cos(theta + m)
        beyond = cosine - self.margin * math.sin(math.pi - self.margin)
        return torch.where(cosine > math.cos(math.pi - self.margin), shifted, beyond)


class CosFace(CosineHead):
    """Additive cosine margin: s (cos(theta_y) - m) (Wang et al., CVPR 2018, equation 4)."""

    def __init__(self, in_features: int, num_classes: int, scale: float = 64.0, margin: float = 0.4) -> None:
        super().__init__(in_features, num_classes, scale, margin)

    def target(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin
