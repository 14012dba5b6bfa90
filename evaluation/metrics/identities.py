"""Consistency, uniqueness and diversity of identities (DCFace, Kim et al., CVPR 2023): C_intra, U_class, D_intra.

Legend: N images, K identities, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.metrics.labelled import check_labelled, check_unit_rows, group_rows
from evaluation.metrics.neighbours import ball_radii, within_balls
from utils.context_selection import ContextSelector
from utils.similarity import sum_by_label

ROWS_AT_ONCE = 1024  # rows of D = 512 gathered at once: 2 MiB
RADIUS = 0.3  # cosine distance, DCFace's; it belongs to DCFace's embedder


@dataclass(frozen=True)
class Consistency:
    """How near images are to their identity's centre."""

    c_intra: float  # mean of near_share over identities
    near_share: np.ndarray  # (K,) share of the images nearer than r to the centre
    mean_cosine: np.ndarray  # (K,) mean cosine of the images to the centre

    def metrics(self) -> dict[str, float | int | None]:
        """By the keys of evaluation.definitions."""
        return {"c_intra": self.c_intra, "centre_cosine_mean": float(self.mean_cosine.mean())}


@dataclass(frozen=True)
class Diversity:
    """How much of real variation generated images cover."""

    d_intra: float  # mean of the shares
    identities: np.ndarray  # (m,) those with real images
    shares: np.ndarray  # (m,) share of the real images inside the balls of that identity's generated images

    def metrics(self) -> dict[str, float | int | None]:
        """By the keys of evaluation.definitions."""
        return {"d_intra": self.d_intra}


def identity_centres(embeddings: np.ndarray, labels: np.ndarray, num_identities: int | None = None) -> np.ndarray:
    """The normalised mean of every identity's unit embeddings: float32 (K, D), summed in float64.

    embeddings: (N, D) in any order; labels: (N,) whole numbers from 0; num_identities: K, else the highest label + 1.
    Raises ValueError for other input, an identity without images, and one whose embeddings cancel out.
    """
    check_labelled(embeddings, labels)
    groups = group_rows(labels, num_identities)
    if not groups.sizes.all():
        raise ValueError(f"labels: identity {groups.sizes.argmin()} of {len(groups)} has no images, and so no centre")
    sums = sum_by_label(embeddings, labels, len(groups))
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    if (lengths < 1e-12).any():
        raise ValueError(f"embeddings: those of identity {lengths[:, 0].argmin()} cancel out; it has no centre")
    return (sums / lengths).astype(np.float32)


def centre_cosines(embeddings: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The cosine of each unit embedding (N, D) to the centre of its identity, float32 (N,); centres: (K, D) unit."""
    check_labelled(embeddings, labels)
    cosines = np.empty(len(labels), np.float32)
    for start in range(0, len(labels), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        cosines[part] = np.einsum("nd,nd->n", embeddings[part], centres[labels[part]])
    return cosines


def intra_consistency(cosines: np.ndarray, labels: np.ndarray, r: float = RADIUS) -> Consistency:
    """C_intra (DCFace): the share of images nearer than r to their centre, averaged over identities.

    cosines: (N,) to the own identity's centre; labels: (N,); r: cosine distance, in (0, 2). Raises ValueError for
    another r and for an identity without images.
    """
    _check_radius(r)
    sizes = group_rows(labels).sizes
    if not len(sizes) or not sizes.all():
        raise ValueError("labels: an identity without images has no consistency")
    precise = cosines.astype(np.float64)
    near = np.bincount(labels, 1 - precise < r, len(sizes)) / sizes
    mean = np.bincount(labels, precise, len(sizes)) / sizes
    return Consistency(float(near.mean()), near, mean)


def unique_identities(centres: np.ndarray, r: float = RADIUS) -> tuple[float, np.ndarray]:
    """U_class (DCFace): the share of identities that a greedy pass keeps, and which, bool (K,).

    In their order, a centre (K, D) is dropped where one that was kept is nearer than r, a cosine distance in (0, 2).
    """
    _check_radius(r)
    check_unit_rows(centres, "centres")
    if not len(centres):
        raise ValueError("centres: there are none")
    selector = ContextSelector(len(centres), max_among=1 - r, rounding=0.0)
    kept = np.array([not reason for reason in selector.offer(centres)])
    return float(kept.mean()), kept


def diversity(
    real_features: np.ndarray,
    real_labels: np.ndarray,
    generated_features: np.ndarray,
    generated_labels: np.ndarray,
    k: int,
) -> Diversity:
    """D_intra (DCFace): how many of an identity's real images its generated ones surround.

    Per identity with real images, the share of them inside a ball around one of the images generated from that
    identity's context, reaching to its k-th nearest other one (Euclidean); the mean over those identities.

    real_features, generated_features: (n, F), (m, F), Inception's by the definition; labels: (n,), (m,), the same
    numbers for the same identity. Raises ValueError where an identity with real images has fewer than k + 1 generated.
    """
    real, generated = group_rows(real_labels), group_rows(generated_labels)
    identities = np.flatnonzero(real.sizes)
    if not len(identities):
        raise ValueError("real_labels: there are no real images")
    shares = np.empty(len(identities))
    for at, identity in enumerate(identities):
        count = generated.sizes[identity] if identity < len(generated) else 0
        if count <= k:
            raise ValueError(f"generated_labels: identity {identity} has {count} images; k = {k} needs {k + 1} or more")
        balls = generated_features[generated[identity]]
        shares[at] = within_balls(real_features[real[identity]], balls, ball_radii(balls, k)).mean()
    return Diversity(float(shares.mean()), identities, shares)


def _check_radius(r: float) -> None:
    if not 0 < r < 2:
        raise ValueError(f"r: {r}; a cosine distance between 0 and 2, such as 0.3")
