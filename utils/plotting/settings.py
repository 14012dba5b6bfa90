"""What the figures show, and the method that they show: a generator, its people, its sampler.

Legend: n images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from diffusion.drawing import Drawn, FaceDrawer, Job
from diffusion.engine import Observer
from diffusion.generator import FaceGenerator
from diffusion.identities import Identities
from diffusion.layouts import Sample
from diffusion.samplers import Sampler, TwoStage
from diffusion.sampling_run import jobs_of, measure
from diffusion.sampling_settings import AUTO, SamplingSettings, drawing_settings
from diffusion.sampling_setup import set_up
from utils import distributed
from utils.config import UserError, check_keys, settings
from utils.precision import warn_of_emulation

# Keys of sample.py's section `sampling` that a figure depends on
SAMPLING_KEYS = (
    "contexts_file",
    "n_contexts",
    "batch_size",
    "compute_batch",
    "seed",
    "image_size",
    "precision",
    "winograd",
    "float32_matmul_precision",
    "device",
    "sample_config",
    "calibration",
)


@dataclass
class FigureSettings:
    """The section `figures` of plotting_config.yaml."""

    identity: str | None = None  # of figures that show one; null: the first of the contexts
    index: int = 0  # number of the image in figures that show one, as in manifest.jsonl
    n_timesteps: int = 8  # columns of the figures over t, spread evenly over the steps
    n_curves: int = 32  # images of attention_change
    n_rows: int = 4  # images, or identities, of the grids
    fixed_t0: list[int] = field(default_factory=lambda: [400, 500, 600, 700])  # of comparison
    guidance_scales: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0, 2.0, 4.0])
    perturbation_cosines: list[float] = field(default_factory=lambda: [1.0, 0.95, 0.9, 0.8, 0.7, 0.6])


@dataclass
class EvaluationSettings:
    """The section `evaluation` of plotting_config.yaml."""

    dir: str | None = None  # of evaluate.py, or of one set in it
    n_pairs: int = 8  # of nearest_training
    n_identities: int = 4  # best, and worst, of strips
    n_images: int = 8  # an identity of strips


@dataclass
class Method:
    """What draws, and what of it is shown. An image (identity, index) is the one that sample.py draws with these
    settings (without perturbation)."""

    generator: FaceGenerator
    sampler: Sampler
    identities: Identities
    sampling: SamplingSettings
    figures: FigureSettings

    @property
    def identity(self) -> str:
        """The one of figures that show one."""
        return self.figures.identity or self.identities.names[0]

    def calibrated(self) -> Method:
        """With a threshold for `auto`, measured as sample.py does; calibration.json goes to `sampling.save_dir`."""
        if not isinstance(self.sampler, TwoStage) or self.sampler.threshold != AUTO:
            return self
        found = measure(self.generator, self.sampler, self.identities, self.sampling)
        return dataclasses.replace(self, sampler=dataclasses.replace(self.sampler, threshold=found.threshold))

    def drawer(self, sampler: Sampler | None = None, observer: Observer | None = None) -> FaceDrawer:
        """What draws with `sampler`, None: the method's own."""
        sampler = self.sampler if sampler is None else sampler
        drawing = drawing_settings(self.sampling)
        return FaceDrawer(self.generator, sampler, drawing, image_size=self.sampling.image_size, observer=observer)

    def jobs(self, samples: Sequence[Sample]) -> list[Job]:
        """The jobs of images (identity, index)."""
        return list(jobs_of(samples, self.identities, None, None, self.sampling.seed, {}))

    def draw(self, sampler: Sampler, jobs: Sequence[Job]) -> list[Drawn]:
        """The images of these jobs, in their order."""
        drawn = {image.key: image for image in self.drawer(sampler).draw(jobs)}
        return [drawn[job.key] for job in jobs]


def load_method(cfg: DictConfig) -> Method:
    """Rebuild what the configuration names. Raises UserError for settings that are none or do not fit the model."""
    check_keys(cfg.sampling, SAMPLING_KEYS, "sampling")
    figures = settings(cfg.figures, FigureSettings, "figures")
    sampling = settings(
        {**OmegaConf.to_container(cfg.sampling), "save_dir": cfg.output_dir}, SamplingSettings, "sampling"
    )
    for name in ("n_timesteps", "n_curves", "n_rows"):
        _at_least(f"figures.{name}", getattr(figures, name), 1)
    _at_least("figures.index", figures.index, 0)
    _within("figures.perturbation_cosines", figures.perturbation_cosines, 0, 1)
    _within("figures.guidance_scales", figures.guidance_scales, 0, float("inf"))
    generator, identities, sampler = set_up(cfg, sampling)
    _within("figures.fixed_t0", figures.fixed_t0, 1, generator.schedule.num_timesteps)
    if figures.identity is not None and figures.identity not in identities.names:
        raise UserError(
            f"figures.identity: {figures.identity!r} is none of the {len(identities)} identities "
            f"({identities.names[0]} .. {identities.names[-1]})"
        )
    device = distributed.device(sampling.device)
    warn_of_emulation(sampling.precision, device)
    return Method(generator.to(device), sampler, identities, sampling, figures)


def read_evaluation_settings(cfg: DictConfig) -> EvaluationSettings:
    """The section `evaluation`, checked."""
    found = settings(cfg.evaluation, EvaluationSettings, "evaluation")
    for name in ("n_pairs", "n_identities", "n_images"):
        _at_least(f"evaluation.{name}", getattr(found, name), 1)
    return found


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{key}: {value}; give at least {least}")


def _within(key: str, values: Sequence[float], low: float, high: float) -> None:
    if not values or not all(low <= value <= high for value in values):
        span = f"numbers from {low} on" if high == float("inf") else f"numbers from {low} to {high}"
        raise UserError(f"{key}: {list(values)}; give a list of {span}")
