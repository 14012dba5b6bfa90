"""How alike new contexts may be: what a user gives, as cosines.

A limit is a cosine, or a false match rate (`fmr:0.001`) whose cosine is measured on embeddings of known people: the
right cosine belongs to one embedder.

Legend: m identities, D width.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from utils.checkpoint import read_json
from utils.config import UserError
from utils.context_selection import NEAR_ANOTHER, NEAR_KNOWN
from utils.context_sources import ContextSource
from utils.contexts import identity_of, mean_contexts, read_contexts, read_embeddings, rows_digest
from utils.images import IMAGE_SUFFIXES
from utils.logging import get_logger
from utils.similarity import MatchThreshold, cosine_at_fmr

log = get_logger(__name__)

FMR = "fmr:"  # before a false match rate that stands for its cosine
LIMITS = {NEAR_ANOTHER: "max_similarity_among", NEAR_KNOWN: "max_similarity_to"}  # which key rejects for which reason


@dataclass
class ContextSettings:
    """The keys of configs/create_contexts_config.yaml that all sources share."""

    output_dir: str
    n_contexts: int | None = None  # null: as many as the source has (authentic)
    seed: int = 0
    max_similarity_among: Any = None  # highest cosine between two contexts: a number, fmr:RATE, or null
    max_similarity_to: Any = None  # highest cosine with a training identity, likewise
    training_identities: str | None = None  # embeddings or contexts of the training identities
    calibration_embeddings: str | None = None  # embeddings that fmr:RATE is measured on
    tries_per_context: int = 20  # candidates looked at, at most, for each context wanted


def check_limits(settings: ContextSettings) -> None:
    """UserError for limits that are no numbers, or that come without what they hold against."""
    for key in LIMITS.values():
        _parse(getattr(settings, key), key)
    if (settings.max_similarity_to is None) != (settings.training_identities is None):
        raise UserError(
            "max_similarity_to, training_identities: one is set without the other; give the limit and the file of "
            "embeddings or contexts that it holds against"
        )
    rates = [key for key in LIMITS.values() if str(getattr(settings, key)).startswith(FMR)]
    if bool(rates) != (settings.calibration_embeddings is not None):
        raise UserError(
            f"calibration_embeddings: {settings.calibration_embeddings}; it goes with a limit of the form "
            f"{FMR}0.001: the false match rate whose cosine is measured on these embeddings"
        )


def _parse(value: Any, key: str) -> float | None:
    """A limit as the user wrote it: a cosine, or the rate behind `fmr:`. UserError for anything else."""
    if value is None:
        return None
    text = str(value)
    is_rate = text.startswith(FMR)
    try:
        number = float(text.removeprefix(FMR))
    except ValueError:
        number = math.nan
    if not (0 < number < 1 if is_rate else -1 < number <= 1):
        raise UserError(f"{key}: {value!r}; give a cosine from -1 to 1, {FMR}0.001 (a false match rate) or null")
    return number


@dataclass
class Limits:
    """The limits as cosines, and what they were taken from."""

    inputs: dict[str, str]  # SHA-256 of every file read, by key
    known_rows: np.ndarray | None  # (m, D) contexts of the training identities
    calibration: tuple[list[str], np.ndarray] | None  # image names and embeddings
    cosines: dict[str, float | None] = field(default_factory=dict)  # by key
    measured: dict[str, MatchThreshold] = field(default_factory=dict)  # of the keys given as fmr:RATE

    def measure(self, settings: ContextSettings) -> None:
        """Fill in the cosines."""
        for key in LIMITS.values():
            value = getattr(settings, key)
            self.cosines[key] = _parse(value, key)
            if str(value).startswith(FMR):
                names, rows = self.calibration
                try:
                    found = cosine_at_fmr([identity_of(n) for n in names], rows, self.cosines[key], seed=settings.seed)
                except UserError as error:
                    raise UserError(f"calibration_embeddings: {settings.calibration_embeddings}: {error}") from error
                self.cosines[key], self.measured[key] = found.cosine, found
                log.info(
                    "%s: cosine %.4f at a false match rate of %g, of %d impostor pairs of %d images%s",
                    *(key, found.cosine, found.fmr, found.impostor_pairs, found.images),
                    " (drawn of more)" if found.is_sample else "",
                )


def read_limits(settings: ContextSettings, source: ContextSource) -> Limits:
    """Read what the limits hold against; UserError where it does not go with the source's contexts."""
    inputs, found = dict(source.inputs), {}
    for key, read in (("training_identities", _read_training_identities), ("calibration_embeddings", read_embeddings)):
        path = getattr(settings, key)
        if path is None:
            continue
        names, rows = read(Path(path).expanduser())
        if rows.shape[1] != source.width:
            raise UserError(f"{key}: {path} is {rows.shape[1]} wide, the source's contexts {source.width}")
        record = Path(path).expanduser().with_name("encoder.json")  # of encode.py
        made_by = read_json(record).get("embedder_sha256") if record.is_file() else None
        if made_by is not None and source.inputs.get("source.recogniser", made_by) != made_by:
            raise UserError(
                f"{key}: {path} was embedded by another recogniser than source.recogniser ({record} says which); "
                "cosines of two embedders do not compare"
            )
        inputs[key], found[key] = rows_digest(names, rows), (names, rows)
    known = found.get("training_identities")
    return Limits(inputs, None if known is None else known[1], found.get("calibration_embeddings"))


def _read_training_identities(path: Path) -> tuple[list[str], np.ndarray]:
    """Names and contexts (m, D): embeddings of images are averaged by folder, contexts are taken as they are."""
    try_contexts = path.name == "contexts.npy"
    names, rows = read_contexts(path) if try_contexts else read_embeddings(path)
    if any(PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES for name in names):
        identities, contexts = mean_contexts(names, rows)
        log.info("training_identities: %d, the means of %d embeddings in %s", len(identities), len(rows), path)
        return identities, contexts
    log.info("training_identities: %d contexts in %s", len(names), path)
    return names, rows
