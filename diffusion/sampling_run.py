"""Drawing a data set: every person, every image, by any number of processes, in as many goes as it takes.

An image is fixed by (seed, identity, index): its noise comes from a generator of its own, and it is computed in batches
of a fixed number of rows, so that batch size, number of processes and order leave it alone.
Legend: S steps of stage 1, n images.
"""

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from diffusion.calibration import Calibration, CalibrationSettings, calibrate, read_calibration
from diffusion.data_card import describe, write_card
from diffusion.drawing import COMPUTE_BATCH, DrawingSettings, Drawn, FaceDrawer, Job, check_compute_batch
from diffusion.generator import FaceGenerator
from diffusion.identities import Identities
from diffusion.layouts import Sample, Shards, check_layout, make_layout
from diffusion.negatives import Negatives, NegativeSettings, check_negative
from diffusion.perturbation import (
    Perturbation,
    PerturbationSettings,
    check_perturbation,
    measure_perturbation,
)
from diffusion.sample_store import Piece, Record, SampleStore
from diffusion.sample_writer import SampleWriter
from diffusion.samplers import Sampler, TwoStage, check_network
from diffusion.sampling_preview import COLUMNS, ROWS, write_preview
from diffusion.sampling_progress import SamplingProgress
from diffusion.solvers import ddim_timesteps
from utils import distributed
from utils.config import UserError
from utils.guards import needs_disk
from utils.interruption import STATUS, Stopped, stoppable
from utils.logging import get_logger
from utils.precision import check_precision, warn_of_emulation
from utils.version import code_version

log = get_logger(__name__)

AUTO = "auto"
# UIFace (ICLR 2025); it belongs to the published model at the published number of steps
PUBLISHED_THRESHOLD, PUBLISHED_NUM_STEPS = 0.006, 50
_SEED_BITS = 53  # seeds stand in the manifest, and JSON readers keep integers exactly up to here


@dataclass
class SamplingSettings:
    """The section `sampling` of sample_ddim_config.yaml."""

    save_dir: str
    contexts_file: str | None = None  # null: uniform contexts
    n_contexts: int | None = None  # identities to draw; null: all of the contexts file
    n_samples_per_context: int = 50  # images an identity
    batch_size: int = 64  # images that a process has under way, at most
    compute_batch: int = COMPUTE_BATCH  # rows of every network pass
    compile: bool = False  # the network, with torch.compile
    seed: int = 0
    save_mode: str = "folders"  # folders: <identity>/<k>.png; blocks: <identity>.png; shards: WebDataset
    image_format: str = "png"  # png, jpg, webp
    image_quality: int | None = None  # 1 .. 100 of jpg (null: 95) and webp (null: without loss)
    images_per_shard: int = 1000  # at most, in whole identities
    licence: str | None = None  # of the data set, for its data card
    verify: bool = False  # hash every image that is there before going on
    image_size: int | None = None  # side of the images in pixels; null: as decoded
    precision: str = "fp32"  # fp32, bf16, fp16
    device: str = "auto"
    sample_config: dict[str, Any] = field(default_factory=dict)  # what the chosen sampler reads, see configs/sampler
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    perturbation: PerturbationSettings = field(default_factory=PerturbationSettings)
    negative: NegativeSettings = field(default_factory=NegativeSettings)


def draw_data_set(
    generator: FaceGenerator,
    sampler: Sampler,
    identities: Identities,
    cfg: SamplingSettings,
    source: dict[str, Any],
) -> dict[str, Any]:
    """Draw what is missing in `cfg.save_dir`, then write its manifest and data card. Returns counts and times.

    `source`: paths, kept in dataset.json for the record. Run by every process of a torchrun; they must see the same
    folder. Raises UserError before work where the folder holds images of other settings or another run works in it,
    and where the disk takes no more. SIGTERM ends the process with status 143 as soon as it comes; what is drawn is
    kept.
    """
    check_negative(cfg.negative, generator.unet, sampler, identities)
    device = distributed.device(cfg.device)
    warn_of_emulation(cfg.precision, device)
    generator.to(device)
    layout = make_layout(
        cfg.save_mode,
        identities.names,
        cfg.n_samples_per_context,
        image_format=cfg.image_format,
        quality=cfg.image_quality,
        images_per_shard=cfg.images_per_shard,
    )
    store = SampleStore(cfg.save_dir, layout)
    try:
        return _draw_data_set(generator, sampler, identities, cfg, source, store)
    except Stopped:
        log.warning("SIGTERM: what is drawn is kept, leaving; the same command goes on from there")
        sys.exit(STATUS)
    finally:
        store.lock.release()


def _draw_data_set(
    generator: FaceGenerator,
    sampler: Sampler,
    identities: Identities,
    cfg: SamplingSettings,
    source: dict[str, Any],
    store: SampleStore,
) -> dict[str, Any]:
    """`draw_data_set` but for what comes at its end, however that comes."""
    has_stages = isinstance(sampler, TwoStage)
    about = {"licence": cfg.licence, "code_versions": [code_version()], "source": source}

    # Settings, threshold, perturbation, work: decided by one process for all
    @needs_disk("sampling.save_dir")
    def prepare() -> tuple[str, Calibration | None, Perturbation | None, list[Piece]]:
        run = store.claim(fixed_settings(generator, sampler, identities, cfg), _sizes(identities, cfg), about)
        calibration = None
        if has_stages and sampler.threshold == AUTO:
            calibration = read_calibration(store.folder) or measure(generator, sampler, identities, cfg)
        perturbation = None
        if cfg.perturbation.lower_bound is not None:
            perturbation = measure_perturbation(cfg.perturbation, identities, cfg.seed)
        return run, calibration, perturbation, store.plan(with_series=has_stages, verify=cfg.verify)

    run, calibration, perturbation, pieces = distributed.on_main(prepare)
    if calibration is not None:
        log.info(
            "threshold %.4g: the median of %d images switches at t = %d",
            calibration.threshold,
            len(calibration.d[0]),
            calibration.target_t,
        )
        sampler = dataclasses.replace(sampler, threshold=calibration.threshold)
    if perturbation is not None:
        raised = sum(bound > cfg.perturbation.lower_bound for bound in perturbation.lower_bounds.values())
        log.info(
            "perturbation: cos(a) from %g on; from more for %d of %d identities, whose nearest neighbour is nearer",
            *(cfg.perturbation.lower_bound, raised, len(identities)),
        )
    total = len(identities) * cfg.n_samples_per_context
    todo = sum(len(piece.samples) for piece in pieces)
    log.info("%d images of %d identities, %d to draw, in %s", total, len(identities), todo, store.folder)

    # Draw: pieces of work go to whichever process has room for them
    start = time.perf_counter()
    rule, solver = sampler.parts(generator.schedule)
    progress = SamplingProgress(run, todo, solver.timesteps)
    with stoppable(), progress:
        with SampleWriter(store, run, distributed.rank(), pieces) as writer:
            groups: dict[Sample, int] = {}
            angles: dict[Sample, float] = {}
            samples = _take(pieces, distributed.SharedCounter(f"{run}/pieces"), writer, groups)
            if pieces:
                negatives = None if cfg.negative.choice is None else Negatives(cfg.negative, identities, cfg.seed)
                drawer = FaceDrawer(generator, sampler, drawing_settings(cfg), image_size=cfg.image_size)
                for drawn in drawer.draw(jobs_of(samples, identities, perturbation, negatives, cfg.seed, angles)):
                    record = _record(drawn, cfg.seed, angles.pop(drawn.key, None))
                    writer.add(drawn.image, groups.pop(drawn.key), record)
                    progress.add(drawn)
        distributed.wait_for_all(progress.refresh)
    seconds = time.perf_counter() - start

    # Merge
    @needs_disk("sampling.save_dir")
    def merge() -> None:
        lines = store.merge(series_timesteps(generator, sampler) if has_stages else None)
        names = identities.names[:ROWS]
        columns = min(COLUMNS, cfg.n_samples_per_context)
        rows = [np.stack(store.layout.read(store.folder, [(name, k) for k in range(columns)])) for name in names]
        write_preview(store.folder, rows, names, calibration)
        counts = describe(lines, rows[0].shape[1:], rule.threshold if has_stages else None)
        write_card(store.folder, {**store.described(), **counts})
        store.finish(counts)

    distributed.on_main(merge)
    slowest = max(distributed.all_gather_objects(seconds))
    summary = {
        "images": total,
        "identities": len(identities),
        "drawn": todo,
        "seconds": slowest,
        "images_per_second": todo / slowest if todo else 0.0,
        "mean_switch_step": progress.mean_switch_step(),
    }
    log.info("done: %d images drawn in %.1f s (%.2f a second)", todo, slowest, summary["images_per_second"])
    return summary


def _take(
    pieces: Sequence[Piece], counter: distributed.SharedCounter, writer: SampleWriter, groups: dict[Sample, int]
) -> Iterator[Sample]:
    """The images that fall to this process, as it has room for them; the group of each goes into `groups`."""
    for piece in distributed.deal(pieces, counter):
        if not piece.samples:
            writer.pack(piece.group)
        for sample in piece.samples:
            groups[sample] = piece.group
            yield sample


def drawing_settings(cfg: SamplingSettings) -> DrawingSettings:
    """How the images of a data set are computed."""
    return DrawingSettings(cfg.compute_batch, None, cfg.batch_size, cfg.precision, cfg.compile)


def jobs_of(
    samples: Iterable[Sample],
    identities: Identities,
    perturbation: Perturbation | None,
    negatives: Negatives | None,
    seed: int,
    angles: dict[Sample, float],
) -> Iterator[Job]:
    """The job of each (identity, index). Angles of perturbed contexts go into `angles`."""
    for sample in samples:
        name, index = sample
        contexts = identities.contexts_of([name])
        if perturbation is not None:
            contexts, (angles[sample],) = perturbation.apply(contexts, [sample])
        context = None if contexts is None else contexts[0]
        negative = None if negatives is None else negatives.context(name, index)
        yield Job(sample, image_seed(seed, name, index), context, negative)


def image_seed(seed: int, identity: str, index: int) -> int:
    """The seed of one image."""
    return distributed.seed_for(seed, identity, index) % 2**_SEED_BITS


def series_timesteps(generator: FaceGenerator, sampler: TwoStage) -> list[int]:
    """(S - 1,) the timesteps of the rows of d: those of stage 1, from its second step on."""
    timesteps = ddim_timesteps(generator.schedule.num_timesteps, sampler.num_steps)
    return [t for t in timesteps if t >= sampler.min_t][1:]


def measure(generator: FaceGenerator, sampler: TwoStage, identities: Identities, cfg: SamplingSettings) -> Calibration:
    """Draw a few images without any switch and propose the threshold from their d; kept in the folder."""
    n = cfg.calibration.n_contexts
    log.info("measuring the threshold on %d images", n)
    names = [identities.names[number % len(identities)] for number in range(n)]
    contexts = identities.contexts_of(names)
    seeds = [distributed.seed_for(cfg.seed, "calibration", number) % 2**_SEED_BITS for number in range(n)]
    jobs = [Job(number, seeds[number], contexts[number]) for number in range(n)]
    never = dataclasses.replace(sampler, threshold=0.0)
    drawer = FaceDrawer(generator, never, dataclasses.replace(drawing_settings(cfg), compile=False))
    d = {trajectory.start.key: trajectory.progress.d for trajectory in drawer.trajectories(jobs)}
    return calibrate(
        torch.tensor([d[number] for number in range(n)]).T,  # (S - 1, n)
        drawer.engine.solver.timesteps,
        cfg.calibration.target_t,
        cfg.save_dir,
    )


def check_settings(generator: FaceGenerator, sampler: Sampler, cfg: SamplingSettings) -> Sampler:
    """Raise UserError for settings that cannot work; `auto` becomes the published threshold where it belongs."""
    for key, value in (
        ("n_samples_per_context", cfg.n_samples_per_context),
        ("batch_size", cfg.batch_size),
        ("image_size", cfg.image_size),
        ("calibration.n_contexts", cfg.calibration.n_contexts),
    ):
        if value is not None and value < 1:
            raise UserError(f"sampling.{key}: {value}; give at least 1")
    check_precision(cfg.precision)
    check_perturbation(cfg.perturbation, generator.unet)
    check_compute_batch(cfg.compute_batch)
    check_layout(cfg.save_mode, cfg.image_format, cfg.image_quality, cfg.images_per_shard)
    check_sampler(generator, sampler)
    if not isinstance(sampler, TwoStage) or sampler.threshold != AUTO:
        return sampler
    if generator.is_published:
        sampler = dataclasses.replace(sampler, threshold=PUBLISHED_THRESHOLD, threshold_num_steps=PUBLISHED_NUM_STEPS)
        rule, solver = sampler.parts(generator.schedule)
        log.info("threshold %.4g: as published, 0.006 at 50 steps, for %d steps", rule.threshold, len(solver))
        return sampler
    target, recorded = cfg.calibration.target_t, series_timesteps(generator, sampler)
    if not recorded or not recorded[-1] <= target <= recorded[0]:
        span = f"t = {recorded[0]} .. {recorded[-1]}" if recorded else "no timestep"
        raise UserError(
            f"sampling.calibration.target_t: {target}, but with these settings images can switch at {span} "
            "(step_th is the lower end)"
        )
    return sampler


def check_sampler(generator: FaceGenerator, sampler: Sampler) -> None:
    """Raise UserError for settings of `sampler` that are of another type or cannot work with this model."""
    for setting in dataclasses.fields(sampler):
        name, value, wanted = setting.name, getattr(sampler, setting.name), setting.type
        if name == "threshold" and value == AUTO:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if wanted == (int | None) and value is None:
            continue
        is_whole = wanted in (int, int | None)
        if (is_whole or wanted is float) and (not is_number or (is_whole and value != int(value))):
            options = f" or {AUTO}" if name == "threshold" else ""
            raise UserError(f"sampler.{name}: {value!r}; give a {'whole ' if is_whole else ''}number{options}")
    check_network(sampler, generator.unet, has_contexts=True)
    if isinstance(sampler, TwoStage) and sampler.threshold == AUTO:
        if sampler.threshold_num_steps is not None:
            raise UserError(
                f"sampler.threshold_num_steps: {sampler.threshold_num_steps}, but the threshold is {AUTO}, which is "
                "found for num_steps; leave it null"
            )
        sampler = dataclasses.replace(sampler, threshold=0.0)
    try:
        sampler.parts(generator.schedule)
    except UserError as error:  # it begins with the setting's name
        raise UserError(f"sampler.{error}") from error


def fixed_settings(
    generator: FaceGenerator, sampler: Sampler, identities: Identities, cfg: SamplingSettings
) -> dict[str, Any]:
    """All that decides how image (identity, index) looks, under the keys that a user knows."""
    fixed = {
        "checkpoint": generator.weights_sha256,
        "latent_shape": list(generator.latent_shape),
        "sampler": type(sampler).__name__,
        **{f"sampler.{name}": value for name, value in dataclasses.asdict(sampler).items()},
        "sampling.contexts_file": identities.sha256,
        "sampling.seed": cfg.seed,
        "sampling.save_mode": cfg.save_mode,
        "sampling.image_format": cfg.image_format,
        "sampling.image_quality": cfg.image_quality,
        "sampling.image_size": cfg.image_size,
        "sampling.precision": cfg.precision,
        "sampling.compute_batch": cfg.compute_batch,
        "sampling.compile": cfg.compile,
        "sampling.perturbation.lower_bound": cfg.perturbation.lower_bound,
        "sampling.negative.choice": cfg.negative.choice,
    }
    if cfg.save_mode == Shards.name:
        fixed["sampling.images_per_shard"] = cfg.images_per_shard
    looks_at_others = cfg.perturbation.lower_bound is not None or cfg.negative.choice is not None
    if looks_at_others and identities.depends_on_number:
        fixed["sampling.n_contexts"] = len(identities)  # more of them are nearer neighbours
    if isinstance(sampler, TwoStage) and sampler.threshold == AUTO:
        fixed["sampling.calibration.target_t"] = cfg.calibration.target_t
        fixed["sampling.calibration.n_contexts"] = cfg.calibration.n_contexts
    return fixed


def _sizes(identities: Identities, cfg: SamplingSettings) -> dict[str, int]:
    return {
        "sampling.n_contexts": len(identities),
        "sampling.n_samples_per_context": cfg.n_samples_per_context,
    }


def _record(drawn: Drawn, seed: int, angle: float | None) -> Record:
    """The manifest's line of an image, as far as drawing knows it."""
    name, index = drawn.key
    record: Record = {
        "identity": name,
        "index": index,
        "seed": image_seed(seed, name, index),
        "switch_t": drawn.switch_t,
    }
    if angle is not None:
        record["angle"] = angle
    if drawn.d is not None:
        record["d"] = [float(f"{value:.6g}") for value in drawn.d]
    return record
