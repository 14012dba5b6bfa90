"""What a run of the diffusion loop is told, checked before anything is read."""

from dataclasses import dataclass, field

from utils.config import UserError
from utils.precision import check_precision


@dataclass
class CheckpointSettings:
    """Where weights come from and go to."""

    restore: bool = True  # go on from the newest checkpoint of the run folder
    path: str | None = None  # a checkpoint of another run to start from (weights, optimiser, step)
    VQEncoder: str | None = None
    VQDecoder: str | None = None
    steps_between: int = 5000
    keep: int = 2  # newest ones; the milestones in steps_of_checkpoints stay as well


@dataclass
class TrainingSettings:
    """The section `training` of train_config.yaml, but for its config groups optimizer, lr_scheduler and ema."""

    steps: int = 900_000
    batch_size: int = 64  # images a process
    num_workers: int = 4  # processes that decode images, a process
    seed: int = 0
    precision: str = "fp16"  # fp32, bf16 or fp16 (autocast; weights stay fp32)
    device: str = "auto"
    context_dropout: float | None = None  # overrides model.context_dropout_probability
    context_permutation: float = 0.0  # share of samples that get the embedding of another image of their identity
    context_scale: str = "unit"  # unit: unit vectors; sqrt_dim: times the square root of their width
    horizontal_flip: bool = True
    cache_latents: bool = True  # encode every image once; false runs the encoder in every step
    gradient_clip: float | None = None  # largest norm of the gradient
    micro_batch_size: int | None = None  # images computed at once, gradients added up; None: the whole batch
    activation_checkpointing: bool = False  # compute activations twice instead of keeping them
    max_bad_steps: int = 25  # so many steps in a row without a finite gradient end the run
    channels_last: bool = True
    compile: bool = False
    steps_between_logging: int = 100
    steps_between_sampling: int | None = 5000  # steps between previews, and at the end; None: none
    wandb_project: str | None = None  # also log to this project of Weights & Biases
    steps_of_checkpoints: list[int] = field(default_factory=list)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    def __post_init__(self) -> None:
        for key in (
            "steps",
            "batch_size",
            "micro_batch_size",
            "max_bad_steps",
            "steps_between_logging",
            "steps_between_sampling",
        ):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"training.{key}: {getattr(self, key)}; it is at least 1")
        for key in ("steps_between", "keep"):
            if getattr(self.checkpoint, key) < 1:
                raise UserError(f"training.checkpoint.{key}: {getattr(self.checkpoint, key)}; it is at least 1")
        if self.num_workers < 0:
            raise UserError(f"training.num_workers: {self.num_workers}; it is 0 or more")
        if self.gradient_clip is not None and self.gradient_clip <= 0:
            raise UserError(f"training.gradient_clip: {self.gradient_clip}; it is above 0, or null")
        if not 0 <= self.context_permutation <= 1:
            raise UserError(f"training.context_permutation: {self.context_permutation}; it is a share from 0 to 1")
        check_precision(self.precision, "training.precision")
