"""What an embedder says of the faces of a variant, before any recogniser is trained on them.

Legend: n images, K identities, M training identities, D width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.metrics.identities import centre_cosines, identity_centres, intra_consistency, unique_identities
from evaluation.metrics.leakage import leakage
from evaluation.metrics.sampling import switch_statistics
from evaluation.metrics.scores import genuine_scores, impostor_scores, score_summary
from utils.config import UserError
from utils.contexts import identity_of, mean_contexts, read_embeddings
from utils.similarity import cosine_at_fmr


@dataclass
class MetricSettings:
    """The section `metrics` of study_config.yaml."""

    r: float | None = None  # cosine distance; None: calibrated on the training embeddings
    fmr: float = 0.001
    impostor_pairs: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.r is not None and not 0 < self.r < 2:
            raise UserError(f"metrics.r: {self.r}; a cosine distance between 0 and 2, such as 0.3")
        if not 0 < self.fmr < 1:
            raise UserError(f"metrics.fmr: {self.fmr}; a false match rate between 0 and 1, such as 0.001")
        if self.impostor_pairs < 1:
            raise UserError(f"metrics.impostor_pairs: {self.impostor_pairs}; give at least 1")


@dataclass(frozen=True)
class Reference:
    """What generated identities are measured by."""

    r: float  # cosine distance within which two faces are one person to this embedder
    centres: np.ndarray | None  # (M, D) unit, of the training identities; None: leakage is not measured


def read_reference(settings: MetricSettings, training_embeddings: Path | None) -> Reference:
    """The training identities, and r: as given, or 1 - the cosine that the share fmr of their impostor pairs exceeds.

    One of the two must be given. Raises UserError for embeddings that cannot be read, or are too few for the rate.
    """
    if training_embeddings is None:
        return Reference(settings.r, None)
    names, rows = read_embeddings(training_embeddings)
    _, centres = mean_contexts(names, rows)
    if settings.r is not None:
        return Reference(settings.r, centres)
    found = cosine_at_fmr([identity_of(name) for name in names], rows, settings.fmr, seed=settings.seed)
    return Reference(1 - found.cosine, centres)


def measure_faces(
    embeddings: Path, manifest: Path, reference: Reference, settings: MetricSettings
) -> dict[str, float | int | None]:
    """Figures of one generated set, by the keys of evaluation.definitions.

    embeddings: the embeddings.npy (n, D) that encode.py wrote of it; manifest: the manifest.jsonl of its drawing.
    Raises UserError where the embedder is another than that of the reference.
    """
    names, rows = read_embeddings(embeddings)
    if reference.centres is not None and reference.centres.shape[1] != rows.shape[1]:
        raise UserError(
            f"training_embeddings: {reference.centres.shape[1]} wide, but those by embed.checkpoint are "
            f"{rows.shape[1]} wide; both must come from one network"
        )
    identities, labels = np.unique([identity_of(name) for name in names], return_inverse=True)
    centres = identity_centres(rows, labels)
    scores = score_summary(
        genuine_scores(rows, labels), impostor_scores(rows, labels, settings.impostor_pairs, settings.seed)
    )
    consistency = intra_consistency(centre_cosines(rows, labels, centres), labels, reference.r)
    unique, _ = unique_identities(centres, reference.r)
    found = {
        "num_images": len(names),
        "num_identities": len(identities),
        **scores.metrics(),
        **consistency.metrics(),
        "u_class": unique,
    }
    if (switches := read_switches(manifest)) is not None:
        found |= switch_statistics(switches).metrics()
    return found if reference.centres is None else found | leakage(centres, reference.centres, reference.r).metrics()


def read_switches(manifest: Path) -> np.ndarray | None:
    """(n,) the timestep at which each image of a manifest.jsonl took its identity, -1 where it did not switch; None for
    samplers that know no switch."""
    lines = manifest.read_text(encoding="utf-8").splitlines()
    switches = [json.loads(line)["switch_t"] for line in lines]
    return None if None in switches else np.array(switches, np.int64)
