"""Labelled images to learn from: one set, or several joined.

Legend: n images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.config import UserError, existing_folder, settings
from utils.data.face_dataset import read_identity_list
from utils.data.formats.blocks import BlockImages
from utils.data.formats.joined import JoinedImages
from utils.data.formats.labelled import EncodedImages
from utils.data.formats.recognise import open_labelled
from utils.logging import get_logger

log = get_logger(__name__)


@dataclass
class SetSettings:
    """One entry of `dataset.sets`."""

    root: str
    name: str | None = None  # None: the last part of `root`
    weight: float | None = None  # share of every batch, relative to those of the other sets
    exclude_identities_file: str | None = None
    min_images_per_identity: int = 1


@dataclass
class DatasetSettings:
    """The `dataset` section of recognition_train_config.yaml."""

    root: str | None = None
    exclude_identities_file: str | None = None
    min_images_per_identity: int = 1
    sets: list[Any] | None = None  # of SetSettings
    merge_identities: bool = False
    cache_in_memory: bool = False


@dataclass(frozen=True)
class SetPart:
    """The images start .. stop - 1 of a training set, which came from one set; its share of every batch, if any."""

    name: str
    start: int
    stop: int
    weight: float | None = None


@dataclass(frozen=True)
class TrainingSet:
    """Labelled images to learn from: those of `images` in `rows`, their labels without gaps."""

    images: EncodedImages
    rows: np.ndarray  # (n,) int64, numbers in `images`, in its order
    labels: np.ndarray  # (n,) int64, 0 .. len(identities) - 1
    identities: list[str]  # label -> name
    parts: list[SetPart] = field(default_factory=list)  # of a set made of several

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, index: int) -> np.ndarray:
        """Image `index`: uint8 (H, W, 3) RGB; UserError where it cannot be read."""
        return self.images.pixels(int(self.rows[index]))


def open_training_set(cfg: DatasetSettings) -> TrainingSet:
    """The set at `dataset.root`, or those of `dataset.sets` joined; says how many images and identities each gives.

    Raises:
        UserError: as `read_training_set` and `join_training_sets`; both or neither of root and sets.
    """
    if cfg.sets is None:
        return read_training_set(
            cfg.root,
            exclude_identities_file=cfg.exclude_identities_file,
            min_images_per_identity=cfg.min_images_per_identity,
        )
    for name, default in (("root", None), ("exclude_identities_file", None), ("min_images_per_identity", 1)):
        if getattr(cfg, name) != default:
            raise UserError(f"dataset.{name}: {getattr(cfg, name)}; with dataset.sets it is given in each set")
    if not cfg.sets:
        raise UserError("dataset.sets: holds no set; entries such as {root: FOLDER, weight: 0.5} are wanted")
    entries = [settings(entry, SetSettings, f"dataset.sets[{k}]") for k, entry in enumerate(cfg.sets)]
    sets = [
        read_training_set(
            entry.root,
            exclude_identities_file=entry.exclude_identities_file,
            min_images_per_identity=entry.min_images_per_identity,
            key=f"dataset.sets[{k}]",
        )
        for k, entry in enumerate(entries)
    ]
    return join_training_sets(sets, entries, merge_identities=cfg.merge_identities)


def read_training_set(
    root: str | Path | None,
    *,
    exclude_identities_file: str | Path | None = None,
    min_images_per_identity: int = 1,
    key: str = "dataset",
) -> TrainingSet:
    """The labelled images at `root`: class folders `<root>/<identity>/<image>`, or any format that
    utils.data.formats.recognise opens.

    Args:
        exclude_identities_file: text file with the name of an identity a line; these people are left out.
        min_images_per_identity: identities with fewer images are left out.
        key: the section that messages name.

    Raises:
        UserError: no such folder or file, one that cannot be read, fewer than two identities left.
    """
    if root is None or not Path(root).expanduser().is_file():
        root = existing_folder(root, f"{key}.root", "one folder of images per identity, or another labelled set")
    if min_images_per_identity < 1:
        raise UserError(f"{key}.min_images_per_identity: {min_images_per_identity}; it must be at least 1")
    try:
        images = open_labelled(root)
    except UserError as error:
        raise UserError(f"{key}.root: {error}") from error
    if isinstance(images, BlockImages):  # read in random order, each image would cost a whole block
        raise UserError(f"{key}.root: {root} holds identity blocks; split_identity_blocks.py makes folders of them")

    excluded = read_identity_list(exclude_identities_file, f"{key}.exclude_identities_file", images.identities)
    counts = np.bincount(images.labels, minlength=len(images.identities)).tolist()
    kept = [
        label
        for label, (name, count) in enumerate(zip(images.identities, counts, strict=True))
        if name not in excluded and count >= min_images_per_identity
    ]
    if len(kept) < 2:
        raise UserError(
            f"{key}.root: {root} holds {len(kept)} of {np.count_nonzero(counts)} identities after leaving out those "
            f"in exclude_identities_file and those with fewer than {min_images_per_identity} images; two are needed"
        )
    new_label = np.full(len(images.identities), -1)
    new_label[kept] = np.arange(len(kept))
    labels = new_label[images.labels]
    rows = np.flatnonzero(labels >= 0)
    return TrainingSet(images, rows, labels[rows], [images.identities[label] for label in kept])


def join_training_sets(
    sets: Sequence[TrainingSet], entries: Sequence[SetSettings], *, merge_identities: bool = False
) -> TrainingSet:
    """One training set out of several, in their order, with labels of its own; a single one stays as it is.

    Identities of different sets are different people, called `<set>/<identity>`; with `merge_identities` those of the
    same name are one. With weights every batch holds a set's share of images (the branches of TFace).

    Raises:
        UserError: two sets of one given name, a weight that is not above 0, weights for some sets only.
    """
    if len(sets) == 1:
        return sets[0]
    weights = [entry.weight for entry in entries]
    for k, weight in enumerate(weights):
        if (weight is None) != (weights[0] is None):
            raise UserError(f"dataset.sets[{k}].weight: {weight}; give every set a weight, or none")
        if weight is not None and not 0 < weight < float("inf"):
            raise UserError(f"dataset.sets[{k}].weight: {weight}; a number above 0 is wanted")
    names = set_names(entries)

    number: dict[str, int] = {}  # identity -> label
    labels, parts, seen = [], [], Counter()
    for part, name, weight in zip(sets, names, weights, strict=True):
        seen.update(part.identities)
        known = [identity if merge_identities else f"{name}/{identity}" for identity in part.identities]
        new = np.array([number.setdefault(identity, len(number)) for identity in known])
        start = sum(map(len, labels))
        labels.append(new[part.labels])
        parts.append(SetPart(name, start, start + len(part), weight))
        log.info("%s: %d images of %d identities", name, len(part), len(part.identities))
    images = JoinedImages([part.images for part in sets], names)
    rows = [part.rows + start for part, start in zip(sets, images.starts, strict=False)]
    shared = sum(count > 1 for count in seen.values())
    log.info(
        "%d sets together: %d images of %d identities; %d names stand in more than one set and are %s",
        *(len(sets), sum(map(len, rows)), len(number), shared),
        "the same people" if merge_identities else "different people (dataset.merge_identities=true: the same)",
    )
    return TrainingSet(images, np.concatenate(rows), np.concatenate(labels), list(number), parts)


def set_names(entries: Sequence[SetSettings]) -> list[str]:
    """What the sets are called: as given, or after their root with a number where that is taken already."""
    given = [entry.name for entry in entries if entry.name is not None]
    for name in given:
        if given.count(name) > 1 or not name or "/" in name:
            raise UserError(f"dataset.sets: the name {name!r}; a name of its own for each set is wanted, without '/'")
    names: list[str] = []
    for entry in entries:
        stem = entry.name or Path(entry.root).expanduser().resolve().name
        name, copies = stem, 1
        while entry.name is None and name in (*given, *names):
            copies += 1
            name = f"{stem}-{copies}"
        names.append(name)
    return names
