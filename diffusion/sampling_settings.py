"""The settings of a data set: what may be set, what cannot work, and what decides how an image looks.

Legend: S steps of stage 1.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from diffusion.calibration import CalibrationSettings
from diffusion.drawing_settings import COMPUTE_BATCH, DrawingSettings
from diffusion.generator import FaceGenerator
from diffusion.identities import Identities
from diffusion.layouts import Shards, check_layout
from diffusion.negatives import NegativeSettings
from diffusion.perturbation import PerturbationSettings, check_perturbation
from diffusion.samplers import Sampler, TwoStage, check_network
from diffusion.solvers import ddim_timesteps
from utils.config import UserError
from utils.logging import get_logger

log = get_logger(__name__)

AUTO = "auto"
# UIFace (ICLR 2025); it belongs to the published model at the published number of steps
PUBLISHED_THRESHOLD, PUBLISHED_NUM_STEPS = 0.006, 50


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
    winograd: bool | None = None  # convolutions with fewer multiplications; null: on a CPU in fp32, highest
    float32_matmul_precision: str = "highest"  # highest, high
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


def drawing_settings(cfg: SamplingSettings) -> DrawingSettings:
    """How the images of a data set are computed."""
    return DrawingSettings(
        compute_batch=cfg.compute_batch,
        max_samples=cfg.batch_size,
        precision=cfg.precision,
        compile=cfg.compile,
        winograd=cfg.winograd,
        float32_matmul_precision=cfg.float32_matmul_precision,
    )


def series_timesteps(generator: FaceGenerator, sampler: TwoStage) -> list[int]:
    """(S - 1,) the timesteps of the rows of d: those of stage 1, from its second step on."""
    timesteps = ddim_timesteps(generator.schedule.num_timesteps, sampler.num_steps)
    return [t for t in timesteps if t >= sampler.min_t][1:]


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
    drawing_settings(cfg).check(next(generator.unet.parameters()).device)
    check_perturbation(cfg.perturbation, generator.unet)
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
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
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
        "sampling.winograd": cfg.winograd,
        "sampling.float32_matmul_precision": cfg.float32_matmul_precision,
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


def sizes(identities: Identities, cfg: SamplingSettings) -> dict[str, int]:
    """How large the data set is: what may grow under the same settings."""
    return {
        "sampling.n_contexts": len(identities),
        "sampling.n_samples_per_context": cfg.n_samples_per_context,
    }
