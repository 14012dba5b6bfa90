"""All metrics of one data set, out of its arrays: a SetResult.

Legend: N images, K identities, M real identities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from evaluation.definitions import DEFINITIONS
from evaluation.feature_networks import FeatureNetwork
from evaluation.material import Material, RealMaterial
from evaluation.metrics.duplicates import find_duplicates
from evaluation.metrics.frechet import FeatureStatistics, frechet_distance, statistics_of
from evaluation.metrics.identities import (
    centre_cosines,
    diversity,
    identity_centres,
    intra_consistency,
    unique_identities,
)
from evaluation.metrics.leakage import Leakage, leakage, nearest_images
from evaluation.metrics.neighbours import precision_recall
from evaluation.metrics.perceptual import drawn_identities, intra_class_lpips
from evaluation.metrics.reproduction import identity_reproduction, reproduction_metrics
from evaluation.metrics.sampling import alignment_failures, switch_statistics
from evaluation.metrics.scores import genuine_scores, impostor_scores, score_summary
from evaluation.results import Histogram, Identities, Images, SetResult
from evaluation.settings import EvaluationSettings
from evaluation.verdict import verdict
from models.autoencoder.lpips import LPIPS
from utils.config import UserError
from utils.data.formats.pairs import draw_pairs
from utils.data.formats.selected import SelectedImages
from utils.distributed import seed_for
from utils.images import load_images
from utils.logging import get_logger
from utils.similarity import nearest_neighbours

log = get_logger(__name__)

COSINE_EDGES = np.linspace(-1, 1, 201)
TIMESTEP_EDGES = np.linspace(0, 1000, 51)
NEAREST_SHOWN = 24  # generated images beside a training image
NEAREST_IDENTITIES = 200  # those nearest to the training set, whose images are compared with all training images


@dataclass
class Bench:
    """What all sets are measured with."""

    options: EvaluationSettings
    radius: float
    embedder: Mapping[str, Any]  # name, sha256, is_published
    features: FeatureNetwork
    real: RealMaterial | None
    lpips: LPIPS | None  # on the device that computes

    @cached_property
    def real_statistics(self) -> FeatureStatistics:
        """Of the real features."""
        return statistics_of(self.real.drawn_features)


def measure(material: Material, bench: Bench, name: str) -> SetResult:
    """The result of a set, or of the part of one that curation left; `name` is what the report calls it."""
    options, source, labels = bench.options, material.source, material.labels
    warnings = [*source.warnings, *([] if bench.real is None else bench.real.source.warnings)]
    metrics: dict[str, Any] = dict.fromkeys(DEFINITIONS)
    metrics |= {"num_images": len(labels), "num_identities": len(material.names)}

    genuine = genuine_scores(material.embeddings, labels)
    impostor = impostor_scores(material.embeddings, labels, options.impostor_pairs, seed_for(options.seed, "impostors"))
    scores = score_summary(genuine, impostor)
    centres = identity_centres(material.embeddings, labels, len(material.names))
    cosines = centre_cosines(material.embeddings, labels, centres)
    consistency = intra_consistency(cosines, labels, bench.radius)
    u_class, _ = unique_identities(centres, bench.radius)
    neighbour_cosine, neighbour = nearest_neighbours(centres, centres, skip_own=True)
    metrics |= scores.metrics() | consistency.metrics() | {"u_class": u_class, "radius": bench.radius}

    if alone := int(np.count_nonzero(np.bincount(labels) == 1)):
        warnings.append(
            f"{alone} of {len(material.names)} identities have one image, which is its own centre: they count as "
            "consistent whatever it shows"
        )

    copies = np.full(len(labels), -1)
    if options.duplicate_cosine is not None:
        duplicates = find_duplicates(material.embeddings, labels, options.duplicate_cosine)
        copies = duplicates.duplicate_of
        metrics |= duplicates.metrics()
    histograms = {"genuine": genuine, "impostor": impostor, "centre_cosine": cosines}
    leaked, nearest = None, []
    if bench.real is not None:
        leaked = leakage(centres, bench.real.centres, bench.radius)
        metrics |= leaked.metrics()
        histograms |= {"leakage": leaked.cosines, "leakage_real": leaked.real_cosines}
        nearest = _nearest_training_images(material, bench.real, leaked)
        metrics |= _feature_metrics(material, bench, warnings) | _reproduction(material, bench, warnings)
    if bench.lpips is not None:
        metrics |= _lpips(material, bench, warnings)
    if source.alignment is not None and len(material.rows) == len(source.images):
        metrics |= alignment_failures(source.alignment).metrics()

    switch_t = None if source.switch_t is None else source.switch_t[material.rows]
    counted = {key: _histogram(values, COSINE_EDGES) for key, values in histograms.items()}
    if switch_t is not None:
        metrics |= switch_statistics(switch_t).metrics()
        counted["switch_t"] = _histogram(switch_t[switch_t >= 0], TIMESTEP_EDGES)
    return SetResult(
        name=name,
        root=source.root,
        metrics=metrics,
        identities=Identities(
            names=np.array(material.names),
            num_images=np.bincount(labels),
            consistency=consistency.mean_cosine,
            near_share=consistency.near_share,
            neighbour=neighbour,
            neighbour_cosine=neighbour_cosine,
            training_name=None if leaked is None else np.array(bench.real.names)[leaked.nearest],
            training_cosine=None if leaked is None else leaked.cosines,
            switch_t=None if switch_t is None else _mean_switch(switch_t, labels, len(material.names)),
        ),
        images=Images(
            files=np.array(material.files),
            identity=labels,
            centre_cosine=cosines,
            duplicate_of=copies,
            index=_column(source.index, material),
            seed=_column(source.seed, material),
            switch_t=switch_t,
        ),
        embedder=dict(bench.embedder),
        features={key: getattr(bench.features, key) for key in ("name", "sha256", "is_comparable")},
        verdict=verdict(consistency.c_intra, bench.radius, published=bench.embedder["is_published"]),
        warnings=warnings,
        provenance=source.provenance,
        training_root=None if bench.real is None else bench.real.source.root,
        nearest_training_images=nearest,
        histograms=counted,
        roc=scores.roc,
        attention_change=source.attention_change,
    )


def _histogram(values: np.ndarray, edges: np.ndarray) -> Histogram:
    """float32 cosines may lie a rounding error outside of -1 .. 1."""
    return Histogram(edges, np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0])


def _column(values: np.ndarray | None, material: Material) -> np.ndarray | None:
    return None if values is None else values[material.rows]


def _mean_switch(switch_t: np.ndarray, labels: np.ndarray, num_identities: int) -> np.ndarray:
    """(K,) mean timestep of the images that switched, nan where none did."""
    switched = switch_t >= 0
    sums = np.bincount(labels[switched], switch_t[switched], num_identities)
    counts = np.bincount(labels[switched], minlength=num_identities)
    return np.divide(sums, counts, out=np.full(num_identities, np.nan), where=counts > 0)


def _nearest_training_images(material: Material, real: RealMaterial, leaked: Leakage) -> list[tuple[str, str, float]]:
    """The images most like a training image, of the identities nearest to the training set."""
    suspects = np.argsort(-leaked.cosines, kind="stable")[:NEAREST_IDENTITIES]
    rows = np.flatnonzero(np.isin(material.labels, suspects))
    chosen, training, cosines = nearest_images(
        material.embeddings[rows], material.labels[rows], real.embeddings, NEAREST_SHOWN
    )
    files, names = material.files, real.source.images.names
    return [
        (files[rows[own]], names[other], float(cosine))
        for own, other, cosine in zip(chosen.tolist(), training.tolist(), cosines.tolist(), strict=True)
    ]


def _feature_metrics(material: Material, bench: Bench, warnings: list[str]) -> dict[str, float | int | None]:
    """FID, precision, recall and D_intra, where there are images enough."""
    if material.features is None or bench.real.features is None:
        warnings.append("FID, precision and recall need the real images; give real.root")
        return {}
    found: dict[str, float | int | None] = {}
    own, real = material.drawn_features, bench.real.drawn_features
    fewest = min(len(own), len(real))
    if fewest > 1:
        found["fid"] = frechet_distance(statistics_of(own), bench.real_statistics)
        if fewest <= own.shape[1]:
            warnings.append(
                f"FID is of {fewest} images in features {own.shape[1]} wide, too few for a covariance: "
                "it is high whatever they show, and compares with sets of this size alone"
            )
    k = bench.options.neighbours
    if fewest > k:
        found |= precision_recall(real, own, k).metrics()
    else:
        warnings.append(f"precision and recall need more than neighbours={k} images of each set, there are {fewest}")
    return found | _diversity(material, bench, warnings)


def _diversity(material: Material, bench: Bench, warnings: list[str]) -> dict[str, float | int | None]:
    if not material.matches:
        return {}
    k, real = bench.options.diversity_neighbours, bench.real
    own = material.labels[material.feature_rows]
    enough = np.bincount(own, minlength=len(material.names)) > k
    matched = {identity: other for identity, other in material.matches.items() if enough[identity]}
    if len(matched) < len(material.matches):
        warnings.append(
            f"D_intra leaves out {len(material.matches) - len(matched)} of {len(material.matches)} identities, which "
            f"have no more than diversity_neighbours={k} images"
        )
    if not matched:
        return {}
    number = {other: k for k, other in enumerate(matched.values())}  # the same numbers for the same identity
    theirs = np.array([number.get(label, -1) for label in real.labels[real.feature_rows].tolist()])
    ours = np.array([number[matched[label]] if label in matched else -1 for label in own.tolist()])
    return diversity(
        real.features[theirs >= 0], theirs[theirs >= 0], material.features[ours >= 0], ours[ours >= 0], k
    ).metrics()


def _reproduction(material: Material, bench: Bench, warnings: list[str]) -> dict[str, float | int | None]:
    """Pairs of real images of matched identities; a variation is an image generated from its identity's context."""
    if not material.matches:
        return {}
    real, options = bench.real, bench.options
    label_of = {other: own for own, other in material.matches.items()}
    candidates = np.flatnonzero(np.isin(real.labels, list(label_of)))
    try:
        pairs = draw_pairs(
            SelectedImages(real.source.images, candidates),
            options.reproduction_pairs,
            seed_for(options.seed, "reproduction"),
        )
    except UserError as error:
        warnings.append(f"identity reproduction is left out: reproduction_pairs: {error}")
        return {}
    chosen = candidates[pairs.pairs]  # (P, 2) rows of real images
    generator = np.random.default_rng(seed_for(options.seed, "variations"))
    variations = np.empty_like(chosen)
    for number, (pair, same) in enumerate(zip(real.labels[chosen], pairs.issame, strict=True)):
        members = [np.flatnonzero(material.labels == label_of[label]) for label in pair.tolist()]
        if same and len(members[0]) < 2:
            warnings.append("identity reproduction is left out: a matched identity has one generated image")
            return {}
        variations[number] = (
            generator.choice(members[0], 2, replace=False) if same else [generator.choice(rows) for rows in members]
        )
    results = identity_reproduction(
        real.embeddings[chosen.reshape(-1)], material.embeddings[variations.reshape(-1)], pairs.issame
    )
    return reproduction_metrics(results)


def _lpips(material: Material, bench: Bench, warnings: list[str]) -> dict[str, float | int | None]:
    sizes = np.bincount(material.labels)
    drawn = drawn_identities(sizes, seed_for(bench.options.seed, "lpips"), bench.options.lpips_identities)
    if not len(drawn):
        warnings.append("LPIPS needs an identity with two images")
        return {}
    images = material.source.images
    side = images.pixels(int(material.rows[0])).shape[0]

    def read(identity: int) -> np.ndarray:
        rows = material.rows[material.labels == identity].tolist()
        return load_images([lambda row=row: images.pixels(row) for row in rows], side)

    result = intra_class_lpips(bench.lpips, (read(k) for k in drawn.tolist()), bench.options.batch_size)
    return result.metrics()


def curated_name(name: str) -> str:
    """What the report calls the part of a set that curation left."""
    return f"{name}_curated"
