"""The recogniser's training loop: margin-softmax classification of identities.

Legend: B batch of one process, S side in pixels, K identities.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from recognition.backbones import num_parameters, save_backbone
from recognition.datasets import IdentityDataset, StepBatches, collate
from recognition.heads import CosineHead, embedding_norms
from utils import distributed
from utils.checkpoint import CheckpointFolder, strict_load, write_json
from utils.config import UserError
from utils.distributed import seed_for
from utils.images import default_threads, to_float
from utils.logging import ScalarLogger, get_logger
from utils.precision import DTYPES, autocast, warn_of_emulation

log = get_logger(__name__)

KIND = "recognition_training"
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass
class TrainingSettings:
    """The `training` section of recognition_train_config.yaml."""

    epochs: int = 40
    batch_size: int = 64  # images a step of one process
    steps_per_epoch: int | None = None  # None: one pass over the images
    lr: float = 0.1
    milestones: list[int] = field(default_factory=lambda: [22, 28, 32])  # 0-based epochs that begin with a lower rate
    lr_factor: float = 0.1  # of the rate at every milestone
    warmup_epochs: float = 0.0  # the rate rises linearly from 0 over these
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_batch_norm: bool = False  # True: batch norms are decayed as well, which the published code does
    gradient_clip: float | None = None  # largest norm of the gradient
    precision: str = "fp32"
    channels_last: bool = False
    num_workers: int = 4
    seed: int = 0
    device: str = "auto"
    steps_between_logging: int = 50
    steps_between_checkpoints: int | None = None  # None: at the end of every epoch
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "steps_per_epoch",
            "steps_between_logging",
            "steps_between_checkpoints",
            "gradient_clip",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"training.{name}: {value}; it must be above 0")
        for name in ("warmup_epochs", "weight_decay", "momentum", "num_workers", "lr_factor"):
            if getattr(self, name) < 0:
                raise UserError(f"training.{name}: {getattr(self, name)}; it must be at least 0")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UserError(f"training.lr: {self.lr}; it must be above 0")
        if self.precision not in DTYPES:
            raise UserError(f"training.precision: {self.precision!r}; there are {', '.join(DTYPES)}")
        if any(epoch < 0 for epoch in self.milestones) or sorted(self.milestones) != list(self.milestones):
            raise UserError(f"training.milestones: {self.milestones}; rising epochs from 0 on are wanted")

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of 0-based `step`."""
        epoch = step // steps_per_epoch
        rate = self.lr * self.lr_factor ** sum(epoch >= milestone for milestone in self.milestones)
        warmup_steps = self.warmup_epochs * steps_per_epoch
        return rate * min(1.0, (step + 1) / warmup_steps) if warmup_steps else rate


class Recogniser(nn.Module):
    """Backbone and head in one module, so that data parallelism sees every parameter in one backward pass."""

    def __init__(self, backbone: nn.Module, head: CosineHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, S, S) in [-1, 1], labels (B,) => float32 logits (B, K) with margin, hits (B,) bool without."""
        embeddings = self.backbone(images)  # (B, D)
        cosine = self.head.cosine(embeddings)  # (B, K)
        return self.head.logits(cosine, labels, embedding_norms(embeddings)), cosine.detach().argmax(dim=1) == labels


def parameter_groups(model: nn.Module, weight_decay: float, decay_batch_norm: bool) -> list[dict[str, Any]]:
    """Trainable parameters in two groups for the optimiser: decayed, and (batch norms) not decayed."""
    norms = {
        id(p) for m in model.modules() if isinstance(m, BATCH_NORMS) and not decay_batch_norm for p in m.parameters()
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) not in norms], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in norms], "weight_decay": 0.0},
    ]


def train(
    backbone: nn.Module,
    head: CosineHead,
    dataset: IdentityDataset,
    settings: TrainingSettings,
    output_dir: str | Path,
    config: dict[str, Any],
) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in `output_dir` where there is one.

    Writes `<output_dir>/checkpoints/step_*.ckpt`, `backbone.safetensors`, `metrics.json`, TensorBoard scalars.

    Args:
        config: plain dictionary of the run's settings, kept in every checkpoint.

    Returns:
        What `metrics.json` holds.

    Raises:
        UserError: a checkpoint of another run in `output_dir`, a loss that is not finite.
    """
    output_dir = Path(output_dir)
    rank, world_size = distributed.rank(), distributed.world_size()
    device = distributed.device(settings.device)
    warn_of_emulation(settings.precision, device)
    global_batch = settings.batch_size * world_size
    identities = dataset.source.identities

    # Network, optimiser, loss scaling
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    model = Recogniser(backbone, head).to(device, memory_format=memory_format)
    optimizer = torch.optim.SGD(
        parameter_groups(model, settings.weight_decay, settings.decay_batch_norm),
        lr=settings.lr,
        momentum=settings.momentum,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")

    # The newest checkpoint of this folder
    checkpoints = CheckpointFolder(output_dir / "checkpoints", keep=settings.keep_checkpoints)
    first_step, history, seconds_before = 0, [], 0.0
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, hits, images of this process in this epoch
    state = checkpoints.load_latest()
    if state is not None:
        check_same_run(state, identities, global_batch, config, output_dir)
        strict_load(model, state["model"], f"output_dir: the checkpoint in {output_dir}")
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty in a checkpoint of a run without fp16
            scaler.load_state_dict(state["scaler"])
        first_step, history, seconds_before = state["step"], state["history"], state["seconds"]
        sums += torch.tensor(state["sums"], dtype=torch.float64) / world_size
        log.info("resuming after step %d", first_step)

    # Data: what a step sees depends on the seed and the step alone
    steps_per_epoch = settings.steps_per_epoch or max(1, len(dataset) // global_batch)
    last_step = settings.epochs * steps_per_epoch
    batches = StepBatches(
        len(dataset),
        batch_size=settings.batch_size,
        first_step=first_step,
        last_step=last_step,
        seed=settings.seed,
        rank=rank,
        world_size=world_size,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=min(settings.num_workers, default_threads()),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )

    parallel: nn.Module = model
    if world_size > 1:
        parallel = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
    parallel.train()
    scalars = ScalarLogger(output_dir)
    start = time.perf_counter()
    log.info(
        "%d images of %d identities, steps %d..%d of %d images, %d steps an epoch",
        *(len(dataset), len(identities), first_step, last_step, global_batch, steps_per_epoch),
    )
    bar = tqdm(total=last_step, initial=first_step, desc="recogniser", unit="step", disable=not distributed.is_main())
    for step, (pixels, labels) in enumerate(loader, start=first_step):
        lr = settings.lr_at(step, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed_for(settings.seed, "dropout", step, rank))

        # uint8 (B, S, S, 3) pixels => float32 (B, 3, S, S) in [-1, 1] => logits (B, K)
        images = to_float(pixels.to(device, non_blocking=True)).contiguous(memory_format=memory_format)
        labels = labels.to(device, non_blocking=True)
        with autocast(device, settings.precision):
            logits, hits = parallel(images, labels)
        loss = F.cross_entropy(logits, labels)

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if settings.gradient_clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        sums[0] += loss.detach() * len(labels)
        sums[1] += hits.sum()
        sums[2] += len(labels)

        # Reports and checkpoints; every process takes part in the means
        done = step + 1
        epoch_ends = done % steps_per_epoch == 0
        interval = settings.steps_between_checkpoints
        saves = done == last_step or (epoch_ends if interval is None else done % interval == 0)
        if done % settings.steps_between_logging == 0 or saves or epoch_ends:
            loss_now = distributed.all_reduce_mean(loss).item()
            if not math.isfinite(loss_now):
                raise UserError(
                    f"training.lr: the loss is {loss_now} at step {done} with lr {lr:g}; lower the rate, add "
                    "warmup_epochs or a gradient_clip"
                )
            scalars.scalars({"train/loss": loss_now, "train/lr": lr}, done)
            bar.set_postfix(loss=f"{loss_now:.3f}", refresh=False)
        bar.update()
        if epoch_ends:
            means = distributed.all_reduce_mean(sums)
            mean_loss, accuracy = (means[:2] / means[2]).tolist()
            sums.zero_()
            epoch = done // steps_per_epoch
            history.append({"epoch": epoch, "loss": mean_loss, "accuracy": accuracy, "lr": lr})
            scalars.scalars({"epoch/loss": mean_loss, "epoch/accuracy": accuracy}, done)
            log.info("epoch %d: loss %.4f, training accuracy %.4f, lr %g", epoch, mean_loss, accuracy, lr)
        if saves:
            totals = (distributed.all_reduce_mean(sums) * world_size).tolist()
            if distributed.is_main():
                state = {
                    "kind": KIND,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "identities": identities,
                    "images_per_step": global_batch,
                    "history": history,
                    "sums": totals,
                    "seconds": seconds_before + time.perf_counter() - start,
                    "config": config,
                }
                checkpoints.save(done, state)
    bar.close()
    scalars.close()

    seconds = seconds_before + time.perf_counter() - start
    metrics = {
        "identities": len(identities),
        "images": len(dataset),
        "parameters": num_parameters(backbone),
        "steps": last_step,
        "loss": history[-1]["loss"],
        "training_accuracy": history[-1]["accuracy"],
        "seconds": seconds,
        "images_per_second": last_step * global_batch / seconds,
        "history": history,
    }
    if distributed.is_main():
        save_backbone(backbone, output_dir / "backbone.safetensors")
        write_json(output_dir / "metrics.json", metrics)
        log.info("wrote %s", output_dir / "backbone.safetensors")
    distributed.barrier()
    return metrics


def check_same_run(
    state: dict[str, Any], identities: list[str], global_batch: int, config: dict[str, Any], output_dir: Path
) -> None:
    """Refuse a checkpoint of other identities; warn of settings that changed since it was written."""
    if state.get("kind") != KIND:
        raise UserError(f"output_dir: {output_dir} holds checkpoints of another kind of training; give another folder")
    if state["identities"] != identities:
        raise UserError(
            f"output_dir: {output_dir} holds a run on {len(state['identities'])} identities, not on these "
            f"{len(identities)}; give another folder, or the same dataset"
        )
    held, processes = state["images_per_step"], distributed.world_size()
    if held != global_batch:
        raise UserError(
            f"training.batch_size: {output_dir} holds a run of {held} images a step over all processes, not "
            f"{global_batch}; with {processes} processes take training.batch_size={held / processes:g}"
        )
    changed = [
        f"{section}.{name}"
        for section, values in config.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if value != state["config"].get(section, {}).get(name, value)
    ]
    if changed:
        log.warning("going on with other settings than the checkpoint's: %s", ", ".join(changed))
