"""Drawing a data set: every person, every image, by any number of processes, in as many goes as it takes.

An image is fixed by (seed, identity, index): its noise comes from a generator of its own, and it is computed in batches
of a fixed number of rows, so that batch size, number of processes and order leave it alone.
Legend: S steps of stage 1, n images.
"""

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from diffusion.calibration import Calibration, calibrate, read_calibration
from diffusion.data_card import describe, write_card
from diffusion.drawing import Drawn, FaceDrawer, Job
from diffusion.generator import FaceGenerator
from diffusion.identities import Identities
from diffusion.layouts import Sample, make_layout
from diffusion.negatives import Negatives, check_negative
from diffusion.perturbation import (
    Perturbation,
    measure_perturbation,
)
from diffusion.sample_lines import Record
from diffusion.sample_store import Piece, SampleStore
from diffusion.sample_writer import SampleWriter
from diffusion.samplers import Sampler, TwoStage
from diffusion.sampling_preview import COLUMNS, ROWS, write_preview
from diffusion.sampling_progress import SamplingProgress
from diffusion.sampling_settings import (
    AUTO,
    SamplingSettings,
    drawing_settings,
    fixed_settings,
    series_timesteps,
    sizes,
)
from utils import distributed
from utils.guards import needs_disk
from utils.interruption import STATUS, Stopped, stoppable
from utils.logging import get_logger
from utils.precision import warn_of_emulation
from utils.version import code_version

log = get_logger(__name__)

_SEED_BITS = 53  # seeds stand in the manifest, and JSON readers keep integers exactly up to here


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
    and where the disk takes no more. SIGTERM ends the process with status 143 after the passes under way; what is
    drawn is kept.
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
        run = store.claim(fixed_settings(generator, sampler, identities, cfg), sizes(identities, cfg), about)
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
        rows = [np.stack(store.read([(name, k) for k in range(columns)])) for name in names]
        write_preview(store.folder, rows, names, calibration)
        counts = describe(lines, rows[0].shape[1:], rule.threshold if has_stages else None)
        write_card(store.folder, {**store.described(), **counts})
        store.finish(counts)

    distributed.on_main(merge)
    mean_switch_step = progress.mean_switch_step()  # before anybody can leave, and the counters with the main process
    slowest = max(distributed.all_gather_objects(seconds))
    summary = {
        "images": total,
        "identities": len(identities),
        "drawn": todo,
        "seconds": slowest,
        "images_per_second": todo / slowest if todo else 0.0,
        "mean_switch_step": mean_switch_step,
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
