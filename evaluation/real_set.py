"""The real set that generated ones are compared with: images, or the embeddings of encode.py, or both.

Legend: m images, M identities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from recognition.training_sets import read_training_set
from utils.checkpoint import read_json
from utils.config import UserError, existing_file
from utils.contexts import identity_of, read_embeddings, read_names
from utils.data.face_dataset import read_identity_list
from utils.data.formats.labelled import LabelledImages, labels_by
from utils.data.formats.selected import SelectedImages
from utils.embedders import Embedder
from utils.embedding_job import DESCRIPTION
from utils.logging import get_logger

log = get_logger(__name__)

BY_NAME = "names"


@dataclass
class RealSettings:
    """The `real` section of evaluate_config.yaml."""

    root: str | None = None
    embeddings_file: str | None = None
    image_names_file: str | None = None
    exclude_identities_file: str | None = None
    match: str | None = None


class EmbeddedNames(LabelledImages):
    """Images of which the embeddings are at hand and nothing else."""

    format = "embeddings"

    def encoded(self, index: int) -> bytes:
        raise UserError(f"real.root: not set; the image {self.names[index]} is needed, and there is its embedding only")


@dataclass
class RealSet:
    """Labels and names in `images`, whose pixels are there where `has_images`."""

    images: LabelledImages
    has_images: bool
    root: str | None
    embeddings: np.ndarray | None  # (m, D) float32 unit rows, of the file; None: still to be computed
    warnings: list[str]


def open_real(settings: RealSettings, embedder: Embedder, *, flip: bool) -> RealSet | None:
    """Open what the section says; None where it names nothing. Images are listed, not read.

    flip: whether embeddings are to have the mirror image's added. Raises UserError for files that are not there, that
    another network wrote, or that belong to other images, and fewer than two identities.
    """
    if settings.embeddings_file is None and settings.image_names_file is not None:
        raise UserError("real.image_names_file: names the rows of real.embeddings_file, which is not set")
    if settings.root is None and settings.embeddings_file is None:
        named = next((k for k in ("exclude_identities_file", "match") if getattr(settings, k) is not None), None)
        if named is not None:
            raise UserError(f"real.{named}: there is no real set; give real.root or real.embeddings_file")
        return None
    if settings.embeddings_file is None:
        training = read_training_set(
            settings.root, exclude_identities_file=settings.exclude_identities_file, key="real"
        )
        return RealSet(SelectedImages(training.images, training.rows), True, settings.root, None, [])
    path, names, rows = _read_rows(settings)
    warnings = _check_network(path, rows, embedder, flip)
    if settings.root is None:
        images, chosen = _of_names(names, path, settings.exclude_identities_file)
        return RealSet(images, False, None, rows[chosen], warnings)
    training = read_training_set(settings.root, exclude_identities_file=settings.exclude_identities_file, key="real")
    everything = SelectedImages(training.images, training.rows)
    found = _match_rows(everything.names, names)
    kept = np.flatnonzero(found >= 0)
    if not len(kept):
        raise UserError(
            f"real.embeddings_file: {path} has no row for any image of {settings.root} (its first is {names[0]}, there "
            f"is {everything.names[0]}); give the embeddings of these images"
        )
    if len(kept) < len(everything):
        warnings.append(f"{len(everything) - len(kept)} of {len(everything)} real images have no embedding")
    images = SelectedImages(everything, kept)
    _check_identities(images, settings.root)
    return RealSet(images, True, settings.root, rows[found[kept]], warnings)


def _read_rows(settings: RealSettings) -> tuple[Path, list[str], np.ndarray]:
    path = Path(settings.embeddings_file).expanduser()
    if not path.is_dir():
        existing_file(path, "real.embeddings_file", "the embeddings.npy of encode.py")
    names_file = settings.image_names_file
    if names_file is not None:
        names_file = existing_file(names_file, "real.image_names_file", "one name a line")
    try:
        return path, *read_embeddings(path, names_file)
    except UserError as error:
        reason = str(error).replace("dataset.images_name_file_path", "real.image_names_file")
        raise UserError(f"real.embeddings_file: {reason}") from error


def _check_network(path: Path, rows: np.ndarray, embedder: Embedder, flip: bool) -> list[str]:
    """UserError where the rows are known to be of another network; a warning where nobody knows."""
    if rows.shape[1] != embedder.width:
        raise UserError(
            f"real.embeddings_file: {path} holds rows {rows.shape[1]} wide, this embedder's are {embedder.width}; "
            "embed both sets with one network"
        )
    made = (path if path.is_dir() else path.parent) / DESCRIPTION
    if not made.is_file():
        return [f"nothing tells which network made {path.name}; it has to be this evaluation's"]
    found = read_json(made, "embed the set again")
    if found.get("embedder_sha256") != embedder.sha256:
        raise UserError(
            f"real.embeddings_file: {path} was made with {found.get('checkpoint')}, another network than the embedder; "
            "embed both sets with one network"
        )
    if found.get("flip") != flip:
        raise UserError(f"flip: {flip}, but {path} was made with flip={found.get('flip')}; embed both alike")
    return []


def _of_names(names: Sequence[str], path: Path, exclude: str | None) -> tuple[EmbeddedNames, np.ndarray]:
    """The images that the rows belong to, but for people left out, and which rows these are."""
    people = [identity_of(name) for name in names]
    excluded = read_identity_list(exclude, "real.exclude_identities_file", people)
    chosen = np.array([row for row, person in enumerate(people) if person not in excluded], np.int64)
    identities, labels = labels_by([people[row] for row in chosen])
    images = EmbeddedNames(path, [names[row] for row in chosen], identities, labels)
    _check_identities(images, str(path))
    return images, chosen


def _check_identities(images: LabelledImages, where: str) -> None:
    if len(images.identities) < 2:
        raise UserError(f"real: {where} gives {len(images.identities)} identities; two are needed")


def _match_rows(images: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """For each image the row of its name, else of its name but for the ending, else -1."""
    exact = {name: row for row, name in enumerate(names)}
    stems = {_stem(name): row for row, name in enumerate(names)}
    return np.array([exact.get(name, stems.get(_stem(name), -1)) for name in images], np.int64)


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def match_identities(match: str | None, generated: Sequence[str], real: Sequence[str]) -> dict[int, int]:
    """Which generated identity was drawn from the context of which real one, by their numbers in the two lists.

    match: `names`, where they have one name; a file with a name a line (context_names.txt of encode.py), where the
    generated identity number k belongs to its line k, counted from 0; None: none. Raises UserError for a file that is
    not there, and where nobody is matched.
    """
    if match is None:
        return {}
    name_of = {name: name for name in generated}
    if match != BY_NAME:
        lines = read_names(existing_file(match, "real.match", f"`{BY_NAME}`, or a context_names.txt"))
        numbers = {name: int(name) for name in generated if name.isascii() and name.isdecimal()}
        name_of = {name: lines[number] for name, number in numbers.items() if number < len(lines)}
        name_of |= {name: name for name in generated if name in set(lines)}
    label_of = {name: label for label, name in enumerate(real)}
    found = {k: label_of[name_of[name]] for k, name in enumerate(generated) if name_of.get(name) in label_of}
    if not found:
        raise UserError(
            f"real.match: {match}: no generated identity (such as {generated[0]}) has a real one (such as {real[0]}); "
            "leave it out where the contexts are of new people"
        )
    return found
