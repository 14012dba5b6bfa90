"""What curation leaves of a data set, on the disk: a list, why the rest is not in it, and the images themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from evaluation.curation import Curation, curate
from evaluation.material import Material, RealMaterial
from evaluation.settings import CurateSettings
from utils.checkpoint import write_text
from utils.config import UserError
from utils.data.formats.selected import SelectedImages
from utils.data.formats.writers import write_labelled

KEPT, DROPPED, FOLDER = "curated.txt", "dropped.tsv", "curated"


def choose(material: Material, real: RealMaterial | None, settings: CurateSettings, key: str) -> Curation:
    """What is kept of a set. UserError, naming the section `key`, where it is nothing."""
    found = curate(
        material.embeddings,
        material.labels,
        min_centre_cosine=settings.min_cosine,
        min_images=settings.min_images,
        max_among=settings.max_identity_cosine,
        max_training=settings.max_training_cosine,
        training_centres=None if settings.max_training_cosine is None else real.centres,
    )
    if not found.images.any():
        reasons, counts = np.unique(found.image_reasons, return_counts=True)
        told = ", ".join(f"{count} {reason}" for reason, count in zip(reasons, counts, strict=True))
        raise UserError(f"curate: nothing is left of {key} ({told}); the limits are too strict for this embedder")
    return found


def write_lists(material: Material, found: Curation, folder: Path) -> None:
    """curated.txt: the names of the images that are kept, one a line; dropped.tsv: the others, each with its reason."""
    named = list(zip(material.files, found.image_reasons.tolist(), strict=True))
    write_text(folder / KEPT, "".join(f"{file}\n" for file, reason in named if not reason))
    write_text(folder / DROPPED, "".join(f"{file}\t{reason}\n" for file, reason in named if reason))


def write_images(kept: Material, format: str, folder: Path) -> Path:
    """The images of a curated set as a data set of their own, in a format of utils.data.formats.writers; its folder.

    Goes on where a killed run ended. Raises UserError where another choice was written there before.
    """
    out = folder / FOLDER
    try:
        write_labelled(SelectedImages(kept.source.images, kept.rows), out, format)
    except UserError as error:
        raise UserError(f"curate.write: {error}") from error
    return out
