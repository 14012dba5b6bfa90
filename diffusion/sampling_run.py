"""Drawing a data set: every person, every image, by any number of processes, in as many goes as it takes.

An image is fixed by (seed, identity, index): its noise comes from a generator of its own, so that batch size, number of
processes and order leave it alone. (The composition of a batch changes rounding, nothing else.)
Legend: B images, C channels, h w height and width of what is diffused, H W of the image, D context width.
"""

import functools
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.calibration import Calibration, CalibrationSettings, calibrate, read_calibration
from diffusion.generator import FaceGenerator
from diffusion.identities import Identities
from diffusion.perturbation import (
    Perturbation,
    PerturbationSettings,
    check_perturbation,
    measure_perturbation,
)
from diffusion.sample_store import Record, Sample, SampleStore
from diffusion.samplers import INDEXINGS, ddim_timesteps
from diffusion.sampling_preview import COLUMNS, ROWS, write_preview
from utils import distributed
from utils.config import UserError
from utils.images import resize, to_uint8
from utils.logging import get_logger
from utils.precision import autocast, check_precision, warn_of_emulation

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
    batch_size: int = 64  # images a process draws at a time
    seed: int = 0
    save_mode: str = "folders"  # folders: <identity>/<k>.png; blocks: <identity>.png
    image_size: int | None = None  # side of the images in pixels; null: as decoded
    precision: str = "fp32"  # fp32, bf16, fp16
    device: str = "auto"
    sample_config: dict[str, Any] = field(default_factory=dict)  # what the chosen sampler reads, see configs/sampler
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    perturbation: PerturbationSettings = field(default_factory=PerturbationSettings)


@dataclass
class Drawn:
    """What one batch gives."""

    images: np.ndarray  # uint8 (B, H, W, 3)
    switch_t: list[int | None]  # None: the sampler has no stages
    d: np.ndarray | None  # (S - 1, B) change of the attention map, two-stage sampler of S steps in stage 1


def draw_data_set(
    generator: FaceGenerator,
    sampler: functools.partial,
    identities: Identities,
    cfg: SamplingSettings,
    source: dict[str, Any],
) -> dict[str, Any]:
    """Draw what is missing in `cfg.save_dir`, then write its manifest. Returns counts and times.

    `sampler`: a function of diffusion.samplers with its settings; `source`: paths, kept in sampling.json for the
    record. Run by every process of a torchrun; they must see the same folder. Raises UserError before work where the
    folder holds images of other settings.
    """
    device = distributed.device(cfg.device)
    warn_of_emulation(cfg.precision, device)
    generator.to(device)
    store = SampleStore(cfg.save_dir, cfg.save_mode)
    has_stages = "threshold" in sampler.keywords

    # Settings, threshold, perturbation, work: decided by one process for all
    def prepare() -> tuple[Calibration | None, Perturbation | None, list[list[Sample]]]:
        store.claim(fixed_settings(generator, sampler, identities, cfg), _sizes(identities, cfg), source)
        calibration = None
        if sampler.keywords.get("threshold") == AUTO:
            calibration = read_calibration(store.folder) or measure(generator, sampler, identities, cfg, device)
        perturbation = None
        if cfg.perturbation.lower_bound is not None:
            perturbation = measure_perturbation(cfg.perturbation, identities, cfg.seed)
        units = store.missing(identities.names, cfg.n_samples_per_context, with_series=has_stages)
        return calibration, perturbation, units

    calibration, perturbation, units = distributed.on_main(prepare)
    if calibration is not None:
        log.info(
            "threshold %.4g: the median of %d images switches at t = %d",
            calibration.threshold,
            len(calibration.d[0]),
            calibration.target_t,
        )
        sampler = functools.partial(sampler, threshold=calibration.threshold)
    if perturbation is not None:
        raised = sum(bound > cfg.perturbation.lower_bound for bound in perturbation.lower_bounds.values())
        log.info(
            "perturbation: cos(a) from %g on; from more for %d of %d identities, whose nearest neighbour is nearer",
            *(cfg.perturbation.lower_bound, raised, len(identities)),
        )
    mine = [sample for unit in distributed.share(units) for sample in unit]
    total = len(identities) * cfg.n_samples_per_context
    todo = sum(len(unit) for unit in units)
    log.info("%d images of %d identities, %d to draw, in %s", total, len(identities), todo, store.folder)

    # Draw
    start = time.perf_counter()
    world = distributed.world_size()
    progress = tqdm(
        total=len(mine),
        unit="image",
        desc="drawing" if world == 1 else f"drawing (1 of {world} processes)",
        disable=not distributed.is_main() or not mine,
    )
    with store.writer(distributed.rank(), cfg.n_samples_per_context) as writer, progress:
        for first in range(0, len(mine), cfg.batch_size):
            batch = mine[first : first + cfg.batch_size]
            seeds = [image_seed(cfg.seed, name, index) for name, index in batch]
            contexts, angles = identities.contexts_of([name for name, _ in batch]), None
            if perturbation is not None:
                contexts, angles = perturbation.apply(contexts, batch)
            drawn = draw_batch(
                generator,
                sampler,
                contexts,
                seeds,
                device=device,
                precision=cfg.precision,
                image_size=cfg.image_size,
            )
            writer.add(drawn.images, _records(batch, seeds, drawn, angles))
            progress.update(len(batch))
    seconds = time.perf_counter() - start

    # Merge
    rates = distributed.all_gather_objects((len(mine), seconds))  # all have drawn
    if distributed.is_main():
        timesteps = series_timesteps(generator, sampler) if has_stages else None
        store.merge(identities.names, cfg.n_samples_per_context, timesteps)
        names = identities.names[:ROWS]
        rows = [store.read(name, cfg.n_samples_per_context, COLUMNS) for name in names]
        write_preview(store.folder, rows, names, calibration)
    distributed.barrier()
    slowest = max(seconds for _, seconds in rates)
    summary = {
        "images": total,
        "identities": len(identities),
        "drawn": todo,
        "seconds": slowest,
        "images_per_second": todo / slowest if todo else 0.0,
    }
    log.info("done: %d images drawn in %.1f s (%.2f a second)", todo, slowest, summary["images_per_second"])
    return summary


def draw_batch(
    generator: FaceGenerator,
    sampler: functools.partial,
    contexts: Tensor | None,
    seeds: Sequence[int],
    *,
    device: torch.device,
    precision: str = "fp32",
    image_size: int | None = None,
) -> Drawn:
    """Draw one image a seed: contexts unit (B, D), (B,) class numbers or None => images and what is known of them.

    Raises FloatingPointError when the model's output is not finite.
    """
    with torch.inference_mode():
        result = run_sampler(generator, sampler, contexts, seeds, device=device, precision=precision)
        x_0 = getattr(result, "x_0", result)  # (B, C, h, w)
        if not torch.isfinite(x_0).all():
            raise FloatingPointError(f"the model draws values that are not finite in {precision}; try bf16 or fp32")
        with autocast(device, precision):
            images = to_uint8(generator.first_stage.decode(x_0))  # x_0 => uint8 (B, H, W, 3)
    if image_size is not None:
        images = resize(images, image_size, antialias=False)  # as the published presets go from 128 to 112
    if result is x_0:
        return Drawn(images, [None] * len(seeds), None)
    return Drawn(images, result.switch_t.tolist(), result.d.float().cpu().numpy())


def run_sampler(
    generator: FaceGenerator,
    sampler: functools.partial,
    contexts: Tensor | None,
    seeds: Sequence[int],
    *,
    device: torch.device,
    precision: str,
) -> Any:
    """Noise from each seed, then the sampler. Noise is drawn on the CPU, so that all devices start from the same."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x_T = torch.stack([torch.randn(generator.latent_shape, generator=g) for g in generators]).to(device)  # (B, C, h, w)
    if contexts is not None:
        contexts = contexts.to(device)
        if contexts.is_floating_point():
            contexts = contexts * generator.context_scale
    takes_generator = "generator" in inspect.signature(sampler.func).parameters
    extra = {"generator": generators} if takes_generator else {}
    with torch.inference_mode(), autocast(device, precision):
        return sampler(generator.unet, x_T, contexts, generator.schedule, **extra)


def image_seed(seed: int, identity: str, index: int) -> int:
    """The seed of one image."""
    return distributed.seed_for(seed, identity, index) % 2**_SEED_BITS


def series_timesteps(generator: FaceGenerator, sampler: functools.partial) -> list[int]:
    """(S - 1,) the timesteps of the rows of d: those of stage 1, from its second step on."""
    timesteps = ddim_timesteps(generator.schedule.num_timesteps, sampler.keywords["num_steps"])
    return [t for t in timesteps if t >= sampler.keywords["min_t"]][1:]


def measure(
    generator: FaceGenerator,
    sampler: functools.partial,
    identities: Identities,
    cfg: SamplingSettings,
    device: torch.device,
) -> Calibration:
    """Draw a few images without any switch and propose the threshold from their d; kept in the folder."""
    n = cfg.calibration.n_contexts
    names = [identities.names[number % len(identities)] for number in range(n)]
    seeds = [distributed.seed_for(cfg.seed, "calibration", number) % 2**_SEED_BITS for number in range(n)]
    never = functools.partial(sampler, threshold=0.0)
    changes = []
    log.info("measuring the threshold on %d images", n)
    for first in range(0, n, cfg.batch_size):
        batch = slice(first, first + cfg.batch_size)
        contexts = identities.contexts_of(names[batch])
        result = run_sampler(generator, never, contexts, seeds[batch], device=device, precision=cfg.precision)
        changes.append(result.d.float().cpu())
    return calibrate(
        torch.cat(changes, dim=1),  # (S - 1, n)
        ddim_timesteps(generator.schedule.num_timesteps, sampler.keywords["num_steps"]),
        cfg.calibration.target_t,
        cfg.save_dir,
    )


def check_settings(generator: FaceGenerator, sampler: functools.partial, cfg: SamplingSettings) -> functools.partial:
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
    check_sampler(generator, sampler)
    if "threshold" not in sampler.keywords:
        return sampler
    if not generator.unet.has_cross_attention:
        raise UserError(
            "sampler: the two-stage sampler needs a model with identity cross-attention; take sampler=ddim or ddpm"
        )
    threshold = sampler.keywords["threshold"]
    if threshold != AUTO:
        if threshold < 0:
            raise UserError(f"sampling.sample_config.MSE_th: {threshold}; give {AUTO} or a number from 0 on")
        return sampler
    if generator.is_published and sampler.keywords["num_steps"] == PUBLISHED_NUM_STEPS:
        log.info("threshold %g, as published", PUBLISHED_THRESHOLD)
        return functools.partial(sampler, threshold=PUBLISHED_THRESHOLD)
    target, recorded = cfg.calibration.target_t, series_timesteps(generator, sampler)
    if not recorded or not recorded[-1] <= target <= recorded[0]:
        span = f"t = {recorded[0]} .. {recorded[-1]}" if recorded else "no timestep"
        raise UserError(
            f"sampling.calibration.target_t: {target}, but with these settings images can switch at {span} "
            "(step_th is the lower end)"
        )
    return sampler


def check_sampler(generator: FaceGenerator, sampler: functools.partial) -> None:
    """Raise UserError for settings of `sampler` that are of another type, unknown or too many steps."""
    for name, value in sampler.keywords.items():
        wanted = inspect.signature(sampler.func).parameters[name].annotation
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value != AUTO and ((wanted in (int, float) and not is_number) or (wanted is int and value != int(value))):
            options = f" or {AUTO}" if name == "threshold" else ""
            raise UserError(f"sampler.{name}: {value!r}; give a {'whole ' if wanted is int else ''}number{options}")
    if sampler.keywords.get("indexing") not in (None, *INDEXINGS):
        raise UserError(f"sampler.indexing: {sampler.keywords['indexing']!r}; give one of {', '.join(INDEXINGS)}")
    if "num_steps" in sampler.keywords:
        ddim_timesteps(generator.schedule.num_timesteps, sampler.keywords["num_steps"])


def fixed_settings(
    generator: FaceGenerator, sampler: functools.partial, identities: Identities, cfg: SamplingSettings
) -> dict[str, Any]:
    """All that decides how image (identity, index) looks, under the keys that a user knows."""
    fixed = {
        "checkpoint": generator.weights_sha256,
        "latent_shape": list(generator.latent_shape),
        "sampler": sampler.func.__name__,
        **{f"sampler.{name}": value for name, value in sampler.keywords.items()},
        "sampling.contexts_file": identities.sha256,
        "sampling.seed": cfg.seed,
        "sampling.save_mode": cfg.save_mode,
        "sampling.image_size": cfg.image_size,
        "sampling.precision": cfg.precision,
        "sampling.perturbation.lower_bound": cfg.perturbation.lower_bound,
    }
    if cfg.perturbation.lower_bound is not None and identities.depends_on_number:
        fixed["sampling.n_contexts"] = len(identities)  # more of them are nearer neighbours
    if sampler.keywords.get("threshold") == AUTO:
        fixed["sampling.calibration.target_t"] = cfg.calibration.target_t
        fixed["sampling.calibration.n_contexts"] = cfg.calibration.n_contexts
    return fixed


def _sizes(identities: Identities, cfg: SamplingSettings) -> dict[str, int]:
    return {
        "sampling.n_contexts": len(identities),
        "sampling.n_samples_per_context": cfg.n_samples_per_context,
    }


def _records(
    batch: Sequence[Sample], seeds: Sequence[int], drawn: Drawn, angles: Sequence[float] | None
) -> list[Record]:
    """The manifest's lines of a batch, as far as drawing knows them."""
    records: list[Record] = []
    for row, ((name, index), seed) in enumerate(zip(batch, seeds, strict=True)):
        record: Record = {"identity": name, "index": index, "seed": seed, "switch_t": drawn.switch_t[row]}
        if angles is not None:
            record["angle"] = angles[row]
        if drawn.d is not None:
            record["d"] = [float(f"{value:.6g}") for value in drawn.d[:, row]]
        records.append(record)
    return records
