"""Identities and how many images each has: what tells a finished data set from half of one.

Legend: K identities with images.
"""

from __future__ import annotations

import numpy as np

from recognition.dataset_check.findings import Outcome
from recognition.datasets import TrainingSet
from utils.data.formats.check import some
from utils.data.formats.labelled import LabelledImages

EMPTY_ERROR = 0.1  # share of identity folders without an image that stops a run; fewer are a warning
MANY_SINGLE = 0.5  # share of identities with one image that is told
# Two groups of identities: the share of the variance of log counts that lies between the groups (Otsu 1979). A long
# tail stays below it (0.64 for a normal, 0.75 for a uniform distribution), two heaps come near 1.
TWO_GROUPS = 0.9
GROUP_RATIO, GROUP_SHARE = 3.0, 0.1  # of the groups' typical counts; of all identities, in the smaller group


def check_counts(source: TrainingSet) -> Outcome:
    """Identities, images of each, identities without any or with one image, and sets in two groups.

    Two groups are many identities with a full and many with a small count: the face of a generation, copy or
    alignment that stopped.
    """
    outcome = Outcome()
    counts = np.bincount(source.labels, minlength=len(source.identities))  # (K,)
    empty, listed = empty_identities(source.images)
    single = [source.identities[label] for label in np.flatnonzero(counts == 1)]
    low, middle, high = int(counts.min()), float(np.median(counts)), int(counts.max())
    outcome.facts["identities"] = len(counts)
    outcome.facts["images"] = len(source)
    outcome.facts["images_per_identity"] = {"minimum": low, "median": middle, "maximum": high}
    outcome.facts["identities_with_one_image"] = len(single)
    outcome.facts["identities_without_images"] = len(empty)

    if empty:
        share = len(empty) / listed
        (outcome.error if share >= EMPTY_ERROR else outcome.warning)(
            "empty identities",
            f"{len(empty)} of {listed} identities have no image ({some(empty)})",
            "a half-empty folder tree: a copy, a generation or an alignment that stopped or failed there",
            "finish it, or remove the empty folders",
        )
    if len(single) >= MANY_SINGLE * len(counts):
        outcome.warning(
            "single images",
            f"{len(single)} of {len(counts)} identities have one image ({some(single)})",
            "a list of photographs rather than a set to train on: one image shows nothing of how a face varies",
            "dataset.min_images_per_identity=2 leaves them out",
        )
    groups = two_groups(counts)
    if groups is not None:
        few, typical_few, typical_many = groups
        outcome.warning(
            "images per identity",
            f"{few} of {len(counts)} identities have about {typical_few:g} images, the others about {typical_many:g}",
            "a half-empty folder tree (a copy or a generation that stopped), or two data sets in one",
            f"finish it, or dataset.min_images_per_identity={round((typical_few * typical_many) ** 0.5)}",
        )
    return outcome


def empty_identities(images: LabelledImages) -> tuple[list[str], int]:
    """Names of the identities that a set lists without an image of theirs, and how many it lists."""
    counts = np.bincount(images.labels, minlength=len(images.identities))
    return [images.identities[label] for label in np.flatnonzero(counts == 0)], len(counts)


def two_groups(counts: np.ndarray) -> tuple[int, float, float] | None:
    """Whether counts (K,) > 0 fall into two groups: size of the small-count group and both medians; None where not.

    The cut is the one with the largest variance between the groups of log counts (Otsu, IEEE SMC 1979).
    """
    logs = np.sort(np.log(counts))
    total = logs.var()
    if len(logs) < 1 / GROUP_SHARE or total == 0:
        return None
    below = np.arange(1, len(logs))  # size of the lower group at every cut
    sums = np.cumsum(logs)[:-1]
    gap = (logs.sum() - sums) / (len(logs) - below) - sums / below  # between the groups' means
    between = below * (len(logs) - below) / len(logs) ** 2 * gap**2
    cut = int(between.argmax()) + 1
    few, many = float(np.exp(np.median(logs[:cut]))), float(np.exp(np.median(logs[cut:])))
    smaller = min(cut, len(logs) - cut) / len(logs)
    if between.max() / total < TWO_GROUPS or smaller < GROUP_SHARE or many < GROUP_RATIO * few:
        return None
    return cut, round(few, 6), round(many, 6)
