"""Negative identity guidance (NegFaceDiff, 2025): each image is led away from the context of somebody else.

Guidance is eps = (1 + s) eps_id - s eps_negative instead of away from the empty context. Who the other is comes from
(seed, identity, index) and the contexts' source alone; contexts of others are taken as they are, without perturbation.

Legend: n identities, N contexts of their source, D width.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from diffusion.identities import Identities
from diffusion.samplers import Sampler
from models.diffusion.unet import ConditionalUNet
from utils.config import UserError
from utils.distributed import seed_for

RANDOM, MOST_SIMILAR, LEAST_SIMILAR = "random", "most_similar", "least_similar"
CHOICES = (RANDOM, MOST_SIMILAR, LEAST_SIMILAR)


@dataclass
class NegativeSettings:
    """The section `sampling.negative` of sample_ddim_config.yaml."""

    choice: str | None = None  # random: another one for each image; most_similar, least_similar: by cosine; null: off


def check_negative(settings: NegativeSettings, unet: ConditionalUNet, sampler: Sampler, identities: Identities) -> None:
    """Raise UserError for a choice that is none, or where there is nobody to be led away from."""
    key, choice = "sampling.negative.choice", settings.choice
    if choice is None:
        return
    if choice not in CHOICES:
        raise UserError(f"{key}: {choice!r}; give one of {', '.join(CHOICES)}, or null")
    if not unet.is_context_conditional or unet.n_context_classes > 0:
        kind = "classes" if unet.is_context_conditional else "no context"
        raise UserError(f"{key}: {choice}, but the model takes {kind}; leave it null")
    if sampler.guidance_scale == 0:
        raise UserError(f"{key}: {choice}, but sampling.sample_config.cfg_scale is 0: nothing guides; raise it")
    if len(identities.neighbours) < 2:
        raise UserError(f"{key}: {choice}, but there is one context only; give more, or leave it null")


class Negatives:
    """Whom each image of a data set is led away from."""

    def __init__(self, settings: NegativeSettings, identities: Identities, seed: int) -> None:
        self.choice, self.seed = settings.choice, seed
        self._rows = {name: row for row, name in enumerate(identities.names)}
        self._contexts = identities.neighbours  # (N, D) unit rows, the n drawn ones first
        self._nearest: tuple[int, int] | None = None  # the last identity's row, and its negative's

    def context(self, identity: str, index: int) -> Tensor:
        """The negative context (D,) of an image."""
        row = self._rows[identity]
        if self.choice == RANDOM:
            generator = np.random.default_rng(seed_for(self.seed, "negative", identity, index))
            other = int(generator.integers(len(self._contexts) - 1))
            return self._contexts[other + (other >= row)]
        if self._nearest is None or self._nearest[0] != row:
            cosines = (self._contexts.double() @ self._contexts[row].double()).numpy()  # (N,)
            farthest = self.choice == LEAST_SIMILAR
            cosines[row] = np.inf if farthest else -np.inf
            self._nearest = (row, int(cosines.argmin() if farthest else cosines.argmax()))
        return self._contexts[self._nearest[1]]
