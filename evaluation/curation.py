"""Which images and identities of a generated set are worth training on: a pure choice, with reasons.

In this order: images too far from their identity's centre go; identities left with too few images go; of the rest, with
centres of what is left, identities too near to a training identity or to one kept before them go. Nothing is random.

Legend: N images, K identities, M training identities, D width.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from evaluation.metrics.identities import centre_cosines, identity_centres
from evaluation.metrics.labelled import check_unit_rows, group_rows
from utils import context_selection
from utils.context_selection import ContextSelector

KEPT = ""
FAR, FEW = "far from the identity's centre", "too few images left"
NEAR_ANOTHER, NEAR_TRAINING = "near another identity", "near a training identity"
_REASONS = {context_selection.NEAR_ANOTHER: NEAR_ANOTHER, context_selection.NEAR_KNOWN: NEAR_TRAINING, KEPT: KEPT}


@dataclass(frozen=True)
class Curation:
    """What is kept, and why the rest is not: FAR, FEW, NEAR_ANOTHER, NEAR_TRAINING, or KEPT (empty)."""

    image_reasons: np.ndarray  # (N,) str; FAR, or the reason of the identity
    identity_reasons: np.ndarray  # (K,) str

    @property
    def images(self) -> np.ndarray:
        """(N,) bool, True where an image is kept."""
        return self.image_reasons == KEPT

    @property
    def identities(self) -> np.ndarray:
        """(K,) bool, True where an identity is kept."""
        return self.identity_reasons == KEPT

    def counts(self) -> dict[str, dict[str, int]]:
        """How many `images` and `identities` there were, were kept, and were dropped for each reason."""
        found = {"images": self.image_reasons, "identities": self.identity_reasons}
        return {name: {"all": len(reasons), "kept": 0} | _count(reasons) for name, reasons in found.items()}


def _count(reasons: np.ndarray) -> dict[str, int]:
    return {reason or "kept": number for reason, number in sorted(Counter(reasons.tolist()).items())}


def curate(
    embeddings: np.ndarray,
    labels: np.ndarray,
    *,
    min_centre_cosine: float | None = None,
    min_images: int = 1,
    max_among: float | None = None,
    max_training: float | None = None,
    training_centres: np.ndarray | None = None,
) -> Curation:
    """Choose among unit embeddings (N, D) of identities 0..K - 1, labels (N,), every one of which has an image.

    Args:
        min_centre_cosine: lowest cosine of an image to the centre of all images of its identity; None: no limit.
        min_images: an identity with fewer images left is dropped.
        max_among: highest cosine of the centres of two identities kept, in their order; None: no limit.
        max_training: highest cosine of a centre to any of training_centres (M, D); None: no limit.

    Raises:
        ValueError: cosines outside -1..1, min_images below 1, max_training without training_centres or the other way
            round, rows that are not unit vectors, an identity without images.
    """
    limits = {"min_centre_cosine": min_centre_cosine, "max_among": max_among, "max_training": max_training}
    for name, cosine in limits.items():
        if cosine is not None and not -1 <= cosine <= 1:
            raise ValueError(f"{name}: {cosine}; a cosine lies in -1..1")
    if min_images < 1:
        raise ValueError(f"min_images: {min_images}; an identity keeps at least 1")
    if training_centres is not None:
        check_unit_rows(training_centres, "training_centres")
    num_identities = len(group_rows(labels))
    image_reasons = np.full(len(labels), KEPT, object)
    if min_centre_cosine is not None:
        cosines = centre_cosines(embeddings, labels, identity_centres(embeddings, labels))
        image_reasons[cosines < min_centre_cosine] = FAR
    left = image_reasons == KEPT
    sizes = np.bincount(labels[left], minlength=num_identities)
    identity_reasons = np.where(sizes < min_images, FEW, KEPT).astype(object)

    candidates = np.flatnonzero(sizes >= min_images)
    position = np.full(num_identities, -1)
    position[candidates] = np.arange(len(candidates))
    left &= position[labels] >= 0
    if len(candidates):
        centres = identity_centres(embeddings[left], position[labels[left]], len(candidates))
        selector = ContextSelector(len(candidates), max_among=max_among, max_known=max_training, known=training_centres)
        identity_reasons[candidates] = [_REASONS[reason] for reason in selector.offer(centres)]
    is_kept = image_reasons == KEPT
    image_reasons[is_kept] = identity_reasons[labels[is_kept]]
    return Curation(image_reasons.astype(str), identity_reasons.astype(str))
