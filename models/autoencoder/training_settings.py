"""What a run of the autoencoder's loop is told, checked before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from models.autoencoder.data import DatasetSettings
from utils.config import UserError
from utils.precision import check_precision


@dataclass
class TrainingSettings:
    """The section `training` of train_autoencoder_config.yaml, but for its config groups."""

    steps: int
    max_minutes: float | None  # stop after so many minutes of training, all runs on this folder together
    batch_size: int  # images a process
    num_workers: int  # processes that decode images which are not in memory, a process
    seed: int
    precision: str  # fp32, bf16 or fp16 (autocast; weights stay fp32)
    device: str
    channels_last: bool
    lr_schedule: str  # cosine (to 0) or constant, in the share of steps or minutes that is done
    warmup_steps: int
    gradient_clip: float | None  # largest norm of the autoencoder's gradient
    max_bad_steps: int  # so many steps in a row without a finite gradient end the run
    lpips_weight: float  # of the perceptual loss; needs the two files below
    lpips_vgg: str | None  # torchvision's VGG-16 state dict
    lpips_linear: str | None  # vgg.pth of the lpips package
    codebook_weight: float
    quantization_start: int  # until this step the latents pass unquantised; then k-means places the codes
    revive_codes_every: int | None  # after so many steps, codes unused since the last time are drawn anew
    discriminator_start: int | None  # step; null: no discriminator
    discriminator_weight: float
    discriminator_warmup: int  # steps over which the weight rises to that from 0
    discriminator_channels: int
    discriminator_layers: int
    steps_between_logging: int
    steps_between_previews: int
    wandb_project: str | None  # also log to this project of Weights & Biases
    steps_between_checkpoints: int


def check_settings(cfg: TrainingSettings, dataset: DatasetSettings, autoencoder: dict[str, Any]) -> None:
    """Settings that cannot work, before anything is built."""
    check_precision(cfg.precision, "training.precision")
    if cfg.lr_schedule not in ("cosine", "constant"):
        raise UserError(f"training.lr_schedule: {cfg.lr_schedule!r} is not one of cosine, constant")
    intervals = ("steps_between_logging", "steps_between_previews", "steps_between_checkpoints")
    for name in ("steps", "batch_size", "max_bad_steps", *intervals):
        if getattr(cfg, name) < 1:
            raise UserError(f"training.{name}: {getattr(cfg, name)}; it must be at least 1")
    if cfg.quantization_start >= cfg.steps:
        raise UserError(f"training.quantization_start: {cfg.quantization_start} is not below training.steps")
    factor = 2 ** (len(autoencoder["ddconfig"]["ch_mult"]) - 1)
    if dataset.image_size % factor or dataset.image_size < factor:
        raise UserError(
            f"dataset.image_size: {dataset.image_size} is not a multiple of {factor}, as the autoencoder needs"
        )


def share_done(cfg: TrainingSettings, step: int, minutes: float) -> float:
    """How much of the run is over, 1 at its end: by steps, or by minutes where these run out first."""
    by_time = 0.0 if cfg.max_minutes is None else minutes / cfg.max_minutes
    return max(step / cfg.steps, by_time)


def adversarial_factor(cfg: TrainingSettings, step: int) -> float:
    """What discriminator_weight is multiplied by in `step`: 0 before discriminator_start, then a linear rise to 1."""
    if cfg.discriminator_start is None or step < cfg.discriminator_start:
        return 0.0
    return min(1.0, (step - cfg.discriminator_start + 1) / (cfg.discriminator_warmup + 1))


def lr_factor(cfg: TrainingSettings, step: int, done: float) -> float:
    """What the learning rate is multiplied by: a linear rise, then constant or a half cosine to 0."""
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    return warmup * (0.5 * (1.0 + math.cos(math.pi * done)) if cfg.lr_schedule == "cosine" else 1.0)
