"""Identity perturbation (IDperturb, CVPR 2026): each image of an identity is drawn with a context of its own near it.

Image of identity v: cos(a) v + sin(a) u, with u a random unit vector orthogonal to v and cos(a) uniform in [lb, 1]. The
lower bound lb is raised for each identity to max over the others j of cos(angle(v, v_j) / 2), half way to the nearest,
so that no image comes nearer to another identity. What is random comes from (seed, identity, index) alone, by a
generator of its own: the noise that an image starts from is the same with and without perturbation.

Legend: n identities, N contexts of their source, D width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.identities import Identities
from models.diffusion.unet import ConditionalUNet
from utils.config import UserError
from utils.distributed import seed_for
from utils.similarity import nearest_neighbours


@dataclass
class PerturbationSettings:
    """The section `sampling.perturbation` of sample_ddim_config.yaml."""

    lower_bound: float | None = None  # of cos(a), 0 .. 1; null: off; the paper has 0.6


def check_perturbation(settings: PerturbationSettings, unet: ConditionalUNet) -> None:
    """Raise UserError for a bound that is none, or a model whose contexts are no vectors."""
    bound = settings.lower_bound
    if bound is None:
        return
    if not 0 <= bound <= 1:
        raise UserError(f"sampling.perturbation.lower_bound: {bound}; a cosine from 0 to 1 is wanted (0.6), or null")
    if not unet.is_context_conditional or unet.n_context_classes > 0:
        kind = "classes" if unet.is_context_conditional else "no context"
        raise UserError(
            f"sampling.perturbation.lower_bound: {bound}, but the model takes {kind}; only vectors can be "
            "perturbed; leave it null"
        )


@dataclass
class Perturbation:
    """How the contexts of one data set are perturbed."""

    seed: int
    lower_bounds: dict[str, float]  # of cos(a), by identity

    def apply(self, contexts: Tensor, samples: list[tuple[str, int]]) -> tuple[Tensor, list[float]]:
        """Perturb unit contexts (B, D) of the images (identity, index): unit (B, D), and the angles a in radians."""
        perturbed, angles = [], []
        for context, (name, index) in zip(contexts.double().numpy(), samples, strict=True):
            generator = np.random.default_rng(seed_for(self.seed, "perturbation", name, index))
            row, angle = perturb(context, self.lower_bounds[name], generator)
            perturbed.append(row)
            angles.append(angle)
        return torch.from_numpy(np.stack(perturbed)).to(contexts.dtype), angles


def measure_perturbation(settings: PerturbationSettings, identities: Identities, seed: int) -> Perturbation:
    """The lower bound of every identity, from all contexts of their source (drawing more of it changes none)."""
    contexts, neighbours = identities.contexts.numpy(), identities.neighbours.numpy()
    bounds = lower_bounds(contexts, neighbours, settings.lower_bound)
    return Perturbation(seed, dict(zip(identities.names, bounds.tolist(), strict=True)))


def lower_bounds(contexts: np.ndarray, neighbours: np.ndarray, lower_bound: float) -> np.ndarray:
    """Of cos(a), (n,): `lower_bound`, or half the angle to the nearest neighbour where that is less.

    contexts (n, D) unit rows; neighbours (N, D): the contexts, then the others of their source.
    """
    contexts = contexts.astype(np.float64)
    nearest, which = nearest_neighbours(contexts, neighbours, skip_own=True)
    # again, one by one: a product of matrices rounds differently for another number of rows
    cosines = (contexts * neighbours[which]).sum(axis=1)
    nearest = np.minimum(np.where(which < 0, nearest, cosines), 1)
    return np.maximum(lower_bound, np.sqrt((1 + nearest) / 2))  # cos(x / 2) from cos(x)


def perturb(context: np.ndarray, lower_bound: float, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """Turn a unit vector (D,) by a random angle a, in a random direction: the unit vector (D,) and a in radians."""
    cosine = generator.uniform(lower_bound, 1)
    return turn(context, cosine, generator), float(np.arccos(cosine))


def turn(context: np.ndarray, cosine: float, generator: np.random.Generator) -> np.ndarray:
    """Turn a unit vector (D,) in a random direction until its cosine with itself is `cosine`: unit (D,)."""
    direction = generator.standard_normal(len(context))
    direction -= (direction @ context) * context
    direction /= np.linalg.norm(direction)
    return cosine * context + np.sqrt(1 - cosine**2) * direction
