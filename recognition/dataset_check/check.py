"""All checks of a training set in a row, in seconds for any size: counts of everything, pixels of a sample."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from recognition.dataset_check.counts import check_counts
from recognition.dataset_check.findings import ERROR, Outcome
from recognition.dataset_check.labels import check_embeddings, check_pixel_labels
from recognition.dataset_check.mean_face import check_mean_face
from recognition.dataset_check.pixels import GREY_SPREAD, FaceStatistics, check_channels, check_files
from recognition.dataset_check.sample import ChosenImages, choose, single_sets
from recognition.datasets import TrainingSet
from utils import distributed
from utils.checkpoint import write_json
from utils.config import UserError, instantiate
from utils.data.formats.check import scan_images
from utils.embedders import Embedder
from utils.images import write_image
from utils.logging import get_logger

log = get_logger(__name__)

REPORT, MEAN_FACE = "dataset_check.json", "mean_face.png"
LABEL_IMAGES = 2048  # of which all pairs are compared by their pixels


@dataclass
class CheckSettings:
    """The `check` section of recognition_check_config.yaml."""

    images: int | str = 2048  # looked at, spread over the identities; "all"
    embedded_images: int = 512  # of these, where there is an embedder
    max_unreadable: float = 0.0  # share of unreadable images above which a run stops
    errors: str = "stop"  # what an error does: stop, or warn

    def __post_init__(self) -> None:
        if self.images != "all" and not (isinstance(self.images, int) and self.images > 0):
            raise UserError(f"check.images: {self.images!r}; a number above 0, or all")
        if self.embedded_images < 1:
            raise UserError(f"check.embedded_images: {self.embedded_images}; it must be at least 1")
        if not 0 <= self.max_unreadable <= 1:
            raise UserError(f"check.max_unreadable: {self.max_unreadable}; a share from 0 to 1 is wanted")
        if self.errors not in ("stop", "warn"):
            raise UserError(f"check.errors: {self.errors!r}; stop or warn")


@dataclass
class TrainingCheckSettings(CheckSettings):
    """The `check` section of recognition_train_config.yaml."""

    enabled: bool = True


def check_before_training(
    cfg: DictConfig, settings: TrainingCheckSettings, source: TrainingSet, input_size: int, device: str
) -> None:
    """`check_training_set` at the start of a run of recognition.train with the configuration `cfg`.

    The embedder, where `cfg` has one, is gone from memory afterwards. Raises UserError as `check_training_set`, and for
    an embedder that nothing would use.
    """
    if not settings.enabled:
        if "embedder" in cfg:
            raise UserError("embedder: only the check of the images uses it, and check.enabled is false; leave one out")
        return
    embedder = instantiate(cfg.embedder, "embedder") if "embedder" in cfg else None
    check_training_set(
        source,
        settings,
        input_size=input_size,
        output_dir=cfg.output_dir,
        embedder=embedder,
        device=distributed.device(device),
    )


def check_training_set(
    source: TrainingSet,
    settings: CheckSettings,
    *,
    input_size: int,
    output_dir: str | Path,
    embedder: Embedder | None = None,
    device: torch.device | str | None = None,
) -> list[Outcome]:
    """Look at a training set on rank 0, log a line for every finding, write REPORT and MEAN_FACE to `output_dir`.

    The sets that it was joined from are looked at one by one, and have numbered reports and mean faces.

    Args:
        input_size: side of the network's input, in pixels.
        embedder: compares people, where there is one; on `device`.

    Returns:
        One outcome for each set.

    Raises:
        UserError: on all ranks, where an error was found and `settings.errors` is "stop".
    """

    def look() -> list[Outcome]:
        sets = single_sets(source)
        folder = Path(output_dir)
        outcomes = []
        for number, part in enumerate(sets):
            files = [folder / (name if len(sets) == 1 else f"{number}_{name}") for name in (REPORT, MEAN_FACE)]
            outcomes.append(_check(part, settings, input_size, *files, embedder, device))
        _stop_at_errors(sets, outcomes, settings)
        return outcomes

    return distributed.on_main(look)


def _stop_at_errors(sets: list[TrainingSet], outcomes: list[Outcome], settings: CheckSettings) -> None:
    errors = [
        f"{part.images.path}: {finding.line()}"
        for part, outcome in zip(sets, outcomes, strict=True)
        for finding in outcome.findings
        if finding.severity == ERROR
    ]
    if errors and settings.errors == "stop":
        more = f" (and {len(errors) - 1} more errors above)" if len(errors) > 1 else ""
        raise UserError(f"dataset: {errors[0]}{more}; check.errors=warn goes on")


def _check(
    source: TrainingSet,
    settings: CheckSettings,
    input_size: int,
    report_file: Path,
    mean_face_file: Path,
    embedder: Embedder | None,
    device: torch.device | str | None,
) -> Outcome:
    count = len(source) if settings.images == "all" else int(settings.images)
    images = ChosenImages(source, choose(source.labels, count))
    statistics = FaceStatistics(len(images), choose(images.labels, LABEL_IMAGES))
    scan = scan_images(images, on_face=statistics)

    outcome = check_counts(source)
    outcome.facts["images_looked_at"] = len(images)
    outcome.take(check_files(images, scan, settings.max_unreadable, input_size))
    mean_face, aligned = check_mean_face(scan.mean_face, len(images) - len(scan.unreadable))
    outcome.take(mean_face)
    faces, numbers = statistics.readable_faces()
    labels = images.labels[numbers]
    if aligned:
        outcome.take(check_channels(statistics))
    else:  # what is not a face in its place has no skin in the middle, and pixels that say nothing of labels
        outcome.facts["channels"] = outcome.facts["pixel_labels"] = "none made: no aligned faces"
    if embedder is not None:
        some_faces = choose(labels, settings.embedded_images)
        coloured = bool((statistics.spread[numbers[some_faces]] > GREY_SPREAD).mean() > 0.5)
        outcome.take(_embed_and_check(embedder, faces[some_faces], labels[some_faces], source, coloured, device))
    elif aligned:
        outcome.take(check_pixel_labels(faces, labels))

    _report(outcome, source, scan.mean_face, report_file, mean_face_file)
    return outcome


def _embed_and_check(
    embedder: Embedder,
    faces: np.ndarray,
    labels: np.ndarray,
    source: TrainingSet,
    coloured: bool,
    device: torch.device | str | None,
) -> Outcome:
    if not len(faces):
        return Outcome({"embeddings": "none made: no readable images"})
    embeddings = embedder.embed(faces, device=device, progress="embedding")
    swapped = embedder.embed(faces[..., ::-1], device=device, progress="channels exchanged") if coloured else None
    return check_embeddings(embeddings, labels, source.identities, swapped)


def _report(
    outcome: Outcome, source: TrainingSet, mean_face: np.ndarray | None, report_file: Path, mean_face_file: Path
) -> None:
    facts = outcome.facts
    log.info(
        "%s: %d images of %d identities (%s format), %d looked at, %d findings",
        *(source.images.path, facts["images"], facts["identities"], source.images.format, facts["images_looked_at"]),
        len(outcome.findings),
    )
    for finding in outcome.findings:
        (log.error if finding.severity == ERROR else log.warning)("%s", finding.line())
    report = {
        "root": str(source.images.path),
        "format": source.images.format,
        "facts": facts,
        "findings": [asdict(finding) for finding in outcome.findings],
    }
    write_json(report_file, report)
    if mean_face is not None:
        write_image(mean_face_file, mean_face)
