"""An evaluation from settings to files: open the sets, embed their images, measure, curate, write.

    <output_dir>/<set>/result.json, tables.npz     everything of a set (evaluation.results)
    <output_dir>/<set>/curated.txt, dropped.tsv    what curation leaves, and why the rest goes; curated/: the images
    <output_dir>/metrics.json, report.html         the figures of all sets; the same to look at
    <output_dir>/cache/                            embeddings and features

All processes embed; the first one measures and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.curated_set import choose, write_images, write_lists
from evaluation.feature_networks import FeatureNetwork
from evaluation.features import Extraction, content_digests
from evaluation.generated_set import GeneratedSet, open_set
from evaluation.material import Material, RealMaterial, rows_for_features
from evaluation.measure import Bench, curated_name, measure
from evaluation.real_set import RealSet, match_identities, open_real
from evaluation.report import read_figures, write_report
from evaluation.results import SetResult
from evaluation.settings import AUTO, EvaluationSettings, check_output
from models.autoencoder.lpips import load_lpips
from utils import distributed
from utils.checkpoint import write_json
from utils.config import UserError
from utils.data.formats.selected import SelectedImages
from utils.distributed import seed_for
from utils.embedders import Embedder
from utils.logging import get_logger
from utils.precision import warn_of_emulation
from utils.similarity import cosine_at_fmr
from utils.version import code_version

log = get_logger(__name__)

METRICS, REPORT_FILE = "metrics.json", "report.html"
OWN_FOLDERS = ("cache",)  # of output_dir, which no set may be called
MATCH_FMR = 1e-3  # r = 1 - the cosine at this false match rate, where radius=auto


def open_sets(options: EvaluationSettings) -> list[GeneratedSet]:
    """The generated sets. UserError as `open_set`, for two of one name, and where files would be written into a set."""
    listed = options.listed()
    sets = [open_set(entry, key) for entry, key in listed]
    taken: dict[str, str] = dict.fromkeys(OWN_FOLDERS, "a folder of the evaluation")
    for found, (_, key) in zip(sets, listed, strict=True):
        for name in (found.name, *([curated_name(found.name)] if options.curate.enabled else [])):
            if name in taken:
                raise UserError(f"{key}.name: {name} is {taken[name]}; give another")
            taken[name] = f"the name of {key}"
    real = [] if options.real.root is None else [options.real.root]
    check_output(Path(options.output_dir), taken, [*(found.root for found in sets), *real])
    return sets


def evaluate(
    options: EvaluationSettings,
    sets: Sequence[GeneratedSet],
    embedder: Embedder,
    features: FeatureNetwork,
    facts: Mapping[str, Any],
) -> None:
    """Evaluate `sets` and write everything. Every process calls this.

    facts: what is said of the embedder: name, sha256, is_published. Raises UserError for a real set that does not fit,
    images that cannot be read, and a curation that leaves nothing.
    """
    device = distributed.device(options.device)
    warn_of_emulation(options.precision, device)
    real = open_real(options.real, embedder, flip=options.flip)
    _check_radius(options, real)
    matches = [_matches(found, real, options) for found in sets]
    lpips = None if options.lpips_vgg is None else load_lpips(options.lpips_vgg, options.lpips_linear).to(device)
    compares = real is not None and (features.network is None or real.has_images)
    _warn(options, features, real)
    extraction = Extraction(
        Path(options.output_dir), embedder, features, options.flip, options.batch_size, options.precision, device
    )
    load_real = None if real is None else _embed_real(real, matches, extraction, options, compares)
    load = [_embed(found, matched, extraction, options, compares) for found, matched in zip(sets, matches, strict=True)]

    def finish() -> None:
        loaded = None if load_real is None else load_real()
        bench = Bench(options, _radius(options, loaded), facts, features, loaded, lpips)
        _finish([function() for function in load], bench)

    distributed.on_main(finish)


def _matches(found: GeneratedSet, real: RealSet | None, options: EvaluationSettings) -> dict[int, int]:
    """Of the identities drawn from a real one's context, at most diversity_identities, drawn by the seed."""
    if real is None:
        return {}
    matched = match_identities(options.real.match, found.images.identities, real.images.identities)
    identities = np.array(sorted(matched), np.int64)
    if len(identities) > options.diversity_identities:
        generator = np.random.default_rng(seed_for(options.seed, "matched"))
        identities = np.sort(generator.choice(identities, options.diversity_identities, replace=False))
    return {identity: matched[identity] for identity in identities.tolist()}


def _warn(options: EvaluationSettings, features: FeatureNetwork, real: RealSet | None) -> None:
    """Say once what will be missing or not comparable."""
    if not distributed.is_main():
        return  # every process would say it: other ranks report warnings
    if real is None:
        log.warning("no real set: leakage, FID, precision, recall, D_intra and reproduction are left out (real.root)")
    elif features.network is not None and not real.has_images:
        log.warning("no real images: FID, precision, recall and D_intra are left out (real.root)")
    elif not features.is_comparable:
        log.warning(
            "FID, precision, recall and D_intra are computed in %s: their values are not comparable with published "
            "ones, only with those of other sets here (features=inception features.weights=FILE)",
            features.name,
        )
    if options.lpips_vgg is None:
        log.warning("no weights of VGG: LPIPS is left out (lpips_vgg, lpips_linear)")


def _embed_real(
    real: RealSet,
    matches: Sequence[dict[int, int]],
    extraction: Extraction,
    options: EvaluationSettings,
    compares: bool,
) -> Callable[[], RealMaterial]:
    """Embed what there is to embed of the real set; the function that loads it, for the first process.

    matches: those of all generated sets; compares: whether features are compared.
    """
    wanted = np.array(sorted({other for matched in matches for other in matched.values()}), np.int64)
    rows = is_drawn = None
    if compares:
        rows, is_drawn = rows_for_features(real.images.labels, wanted, options.feature_images, options.seed)
    apart = compares and extraction.features.network is not None
    digests = content_digests(real.images, "real") if real.embeddings is None or apart else None
    embedded = extraction.embed(real.images, digests, "real") if real.embeddings is None else None
    featured = extraction.features_of(SelectedImages(real.images, rows), digests[rows], "real") if apart else None

    def load() -> RealMaterial:
        embeddings = real.embeddings if embedded is None else embedded.load()
        features = None if rows is None else embeddings[rows] if featured is None else featured.load()
        return RealMaterial.of(real, embeddings, rows, features, is_drawn)

    return load


def _embed(
    found: GeneratedSet, matched: dict[int, int], extraction: Extraction, options: EvaluationSettings, compares: bool
) -> Callable[[], Material]:
    """Embed a generated set; the function that loads it, for the first process."""
    labels, identities = found.images.labels, np.array(sorted(matched), np.int64)
    rows = is_drawn = None
    if compares:
        rows, is_drawn = rows_for_features(labels, identities, options.feature_images, options.seed)
    digests = content_digests(found.images, found.name)
    embedded = extraction.embed(found.images, digests, found.name)
    apart = compares and extraction.features.network is not None
    featured = extraction.features_of(SelectedImages(found.images, rows), digests[rows], found.name) if apart else None

    def load() -> Material:
        embeddings = embedded.load()
        features = None if rows is None else embeddings[rows] if featured is None else featured.load()
        everything = np.arange(len(labels))
        names = found.images.identities
        return Material(found, everything, labels, names, embeddings, rows, features, matched, is_drawn)

    return load


def _check_radius(options: EvaluationSettings, real: RealSet | None) -> None:
    """UserError where radius=auto and the real set has too few impostor pairs for it."""
    if options.radius == AUTO:
        sizes = np.bincount(real.images.labels)
        pairs = (int(sizes.sum()) ** 2 - int(np.square(sizes).sum())) // 2
        if pairs * MATCH_FMR < 1:
            raise UserError(f"radius: auto needs 1000 impostor pairs; the real set has {pairs}, give a number")


def _radius(options: EvaluationSettings, real: RealMaterial | None) -> float:
    """r, where radius=auto by the impostor scores of the real set."""
    if options.radius != AUTO:
        return float(options.radius)
    identities = [real.names[label] for label in real.labels]
    found = cosine_at_fmr(identities, real.embeddings, MATCH_FMR, seed=options.seed)
    log.info("radius=%.4f: FMR 0.1 %% of %d impostor pairs of the real set", 1 - found.cosine, found.impostor_pairs)
    return 1 - found.cosine


def _finish(materials: Sequence[Material], bench: Bench) -> None:
    """Measure all sets, curate, and write. First process."""
    output_dir = Path(bench.options.output_dir)
    about = {"version": code_version(), "settings": asdict(bench.options)}
    results: list[SetResult] = []
    curation: dict[str, Any] = {}
    left: list[tuple[Material, Path]] = []

    def keep(material: Material, name: str) -> SetResult:
        result = measure(material, bench, name)
        result.provenance = {**result.provenance, "evaluation": about}
        result.save(output_dir / name)
        results.append(result)
        log.info("%s: %s", name, _line(result))
        return result

    for material in materials:
        name = material.source.name
        before = keep(material, name)
        if bench.options.curate.enabled:
            chosen = choose(material, bench.real, bench.options.curate, name)
            write_lists(material, chosen, output_dir / name)
            kept = material.select(chosen.images)
            after = keep(kept, curated_name(name))
            curation[name] = {**chosen.counts(), "before": before.metrics, "after": after.metrics}
            left.append((kept, output_dir / name))
    write_json(output_dir / METRICS, _figures(results, bench, about) | ({"curation": curation} if curation else {}))
    figures = [] if bench.options.figures_dir is None else read_figures(bench.options.figures_dir)
    write_report(results, output_dir / REPORT_FILE, figures=figures)
    if bench.options.curate.write:
        for kept, folder in left:
            log.info("%d images in %s", len(kept.rows), write_images(kept, bench.options.curate.format, folder))


def _figures(results: Sequence[SetResult], bench: Bench, about: Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json"""
    sets = {
        result.name: {
            "root": result.root,
            "metrics": result.metrics,
            "verdict": result.verdict,
            "warnings": result.warnings,
        }
        for result in results
    }
    features = {"name": bench.features.name, "is_comparable": bench.features.is_comparable}
    return {"sets": sets, "embedder": dict(bench.embedder), "features": features, **about}


def _line(result: SetResult) -> str:
    """The verdict, or the figures that are looked at first."""
    shown = {
        key: result.metrics[key] for key in ("c_intra", "u_class", "eer", "d_intra", "recall", "fid", "leakage_max")
    }
    figures = ", ".join(f"{key} {value:.4g}" for key, value in shown.items() if value is not None)
    return f"{figures}{'; ' + result.verdict if result.verdict else ''}"
