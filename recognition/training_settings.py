"""What a run of the recogniser's loop is told, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from utils import distributed
from utils.config import UserError
from utils.precision import check_precision

POSITIVE = (
    "epochs",
    "steps_per_epoch",
    "micro_batch_size",
    "gradient_clip",
    "max_bad_steps",
    "epochs_between_validation",
    "steps_between_logging",
    "steps_between_checkpoints",
    "keep_checkpoints",
)


@dataclass
class TrainingSettings:
    """The section `training` of recognition_train_config.yaml, but for its config groups optimizer and lr_schedule."""

    epochs: int = 40
    batch_size: int = 64  # images a step of one process
    micro_batch_size: int | None = None  # images computed at once, gradients added up; None: the whole batch
    steps_per_epoch: int | None = None  # None: one pass over the images
    sample_rate: float = 1.0  # Partial FC: share of the class centres that a step computes with
    decay_batch_norm: bool = False  # True: batch norms are decayed as well, which the published code does
    sync_batch_norm: bool = False  # batch statistics over all processes (GPUs only)
    gradient_clip: float | None = None  # largest norm of the backbone's gradient
    max_bad_steps: int = 25  # so many steps in a row without a finite gradient end the run
    precision: str = "fp32"  # fp32, bf16 or fp16 (autocast; weights, and the classifier, stay fp32)
    channels_last: bool = False
    compile: bool = False
    num_workers: int = 4
    seed: int = 0
    device: str = "auto"
    epochs_between_validation: int = 1  # and after the last one
    wandb_project: str | None = None  # also log to this project of Weights & Biases
    steps_between_logging: int = 50
    steps_between_checkpoints: int | None = None  # None: at the end of every epoch
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:  # NaN neither
                raise UserError(f"training.{name}: {value}; it must be above 0")
        if self.num_workers < 0:
            raise UserError(f"training.num_workers: {self.num_workers}; it must be at least 0")
        if not 0 < self.sample_rate <= 1:
            raise UserError(f"training.sample_rate: {self.sample_rate}; it must be above 0 and at most 1")
        if self.micro_batch_size is not None and 1 in (self.micro_batch_size, self.batch_size % self.micro_batch_size):
            raise UserError(
                f"training.micro_batch_size: {self.micro_batch_size} cuts a batch of {self.batch_size} into parts of "
                "one image, and batch norm needs two or more"
            )
        if self.sync_batch_norm and distributed.device(self.device).type != "cuda":
            raise UserError("training.sync_batch_norm: true, but torch synchronises batch norms on GPUs only")
        check_precision(self.precision, "training.precision")

    @property
    def images_per_step(self) -> int:
        """Images a step of all processes together."""
        return self.batch_size * distributed.world_size()

    def steps_of_epoch(self, images: int) -> int:
        """Steps of an epoch over a set of so many images."""
        return self.steps_per_epoch or max(1, images // self.images_per_step)
