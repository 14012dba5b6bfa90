"""What all heads share: class centres, cosines, and the steps from cosines to logits.

Legend: B batch, D width of the embedding, K identities, theta_j angle between an embedding and class centre j, y the
own class. Angles in radians.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.config import UserError


class CosineHead(nn.Module):
    """Class centres on the unit sphere; subclasses turn the cosine of the own class into a harder target.

    `forward(embeddings (B, D), labels (B,) long)` returns float32 logits (B, K), multiplied by `scale`, for the
    cross-entropy. Its steps can be called one by one, so that a classifier that is sharded over processes, or sampled,
    can share the work. On every process, with the embeddings of the global batch gathered in one order:

        cosines = head.cosine(embeddings, centres)           # (B, K'): the classes of this process
        own = ...                                            # (B,): of the own class, from the process that has it
        head.observe(own, norms)                             # running statistics, from the global batch
        target = head.target_logit(own, norms, generator)    # (B,)
        others = head.other_logits(cosines, target)          # (B, K')
        head.scale * others, with head.scale * target at the own class

    A head has no state but `weight` and buffers, which hold no axis of classes: with the global batch in `observe`
    they are the same on all processes.
    """

    def __init__(self, in_features: int, num_classes: int, scale: float) -> None:
        """`weight` (num_classes, in_features) gets fresh values.

        Raises:
            ValueError: fewer than 2 classes. UserError: a scale that is no number above 0.
        """
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: {num_classes}; a margin head needs at least 2 identities")
        check_number("scale", scale, lambda value: value > 0, "a number above 0")
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.normal_(self.weight, std=0.01)

    def cosine(self, embeddings: Tensor, centres: Tensor | None = None) -> Tensor:
        """Cosines (B, K') float32 in [-1, 1] between embeddings (B, D) and class centres (K', D); None: `weight`."""
        centres = self.weight if centres is None else centres
        # bf16 has steps of 0.004 near cosine 1, coarser than what tells two faces apart: always float32 here
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(F.normalize(embeddings.float()), F.normalize(centres.float())).clamp(-1, 1)

    def observe(self, cosine: Tensor, norms: Tensor) -> None:
        """Update the running statistics from the global batch, in training only; once a step, before `target_logit`.

        cosine (B,) to the own class. norms (B,) of the embeddings before normalisation. Most heads have none.
        """

    def target_logit(self, cosine: Tensor, norms: Tensor, generator: torch.Generator | None) -> Tensor:
        """The logit (B,) of the own class before scaling.

        Args:
            cosine: (B,) to the own class.
            norms: (B,) of the embeddings before normalisation; no gradient flows into them.
            generator: on the CPU, for random margins, of which the whole batch's are drawn here and nowhere else, and
                in training only. Processes that hold the same global batch give generators of the same seed, made from
                (seed, step): torch's default generator, which None stands for, may differ from process to process.
        """
        raise NotImplementedError

    def other_logits(self, cosines: Tensor, target: Tensor) -> Tensor:
        """The logits (B, K') of other classes before scaling, from their cosines (B, K') and `target_logit` (B,)."""
        return cosines

    def logits(self, cosine: Tensor, labels: Tensor, norms: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Cosines (B, K), labels (B,) and norms (B,) => scaled logits (B, K); in training it observes the batch.

        `generator`: see `target_logit`.
        """
        rows = labels[:, None]  # (B, 1)
        own = cosine.gather(1, rows).squeeze(1)  # (B,)
        self.observe(own, norms)
        target = self.target_logit(own, norms, generator)  # (B,)
        return self.scale * self.other_logits(cosine, target).scatter(1, rows, target[:, None])

    def forward(self, embeddings: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.logits(self.cosine(embeddings), labels, embedding_norms(embeddings), generator)


def embedding_norms(embeddings: Tensor) -> Tensor:
    """Euclidean norms (B,) float32 of embeddings (B, D), without gradient."""
    return torch.linalg.vector_norm(embeddings.detach().float(), dim=1)


def cosine_of_sum(cosine: Tensor, angle: Tensor) -> Tensor:
    """cos(theta + angle) from cos(theta) (B,), theta in [0, pi], and angle (B,) or ()."""
    # The floor keeps the gradient of the square root finite at theta = 0
    sine = (1.0 - cosine.square()).clamp_min(1e-12).sqrt()
    return cosine * angle.cos() - sine * angle.sin()


def check_number(name: str, value: Any, valid: Callable[[float], bool], wanted: str) -> None:
    """UserError naming `head.<name>` unless `value` is a finite number that is `valid`; `wanted` says it in words."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and valid(value)):
        raise UserError(f"head.{name}: {value!r}; {wanted} is wanted")


def check_margin(margin: Any) -> None:
    """UserError unless `margin` is a number from 0 to below pi."""
    check_number("margin", margin, lambda value: 0 <= value < math.pi, "a number from 0 to pi")
