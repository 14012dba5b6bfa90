"""The recogniser's training loop: margin-softmax classification of identities.

A step depends on (seed, step) alone: data order, augmentation, random margins and the classes that Partial FC samples
are drawn from both. So a run that was killed and resumed ends with the same weights as one that was not, and without
batch norm, dropout and sampling two processes compute what one does with twice the batch.

Legend: B images of one process, S side in pixels, D width of the embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from recognition.datasets import IdentityDataset, StepBatches, load_batches
from recognition.heads import CosineHead
from recognition.lr_schedules import LRSchedule, check_validated
from recognition.partial_fc import Classified, PartialFC
from recognition.provenance import training_provenance
from recognition.training_outputs import Validate, finished_metrics, leave_files, report_epoch, validate_epoch
from recognition.training_settings import TrainingSettings
from recognition.training_state import (
    Progress,
    RunningStatistics,
    Tally,
    Trainee,
    checkpoint_state,
    parameter_groups,
    restore,
)
from utils import distributed
from utils.checkpoint import CheckpointFolder
from utils.config import UserError
from utils.curves import Curves
from utils.distributed import seed_for
from utils.guards import FiniteSteps, save_or_warn, write_or_warn
from utils.images import to_float
from utils.interruption import StopRequest
from utils.logging import ScalarLogger, get_logger
from utils.metrics_file import MetricsFile, report
from utils.precision import autocast, warn_of_emulation

log = get_logger(__name__)


class Watch(Protocol):
    """What looks after a run: recognition.watch.Watch."""

    def look(
        self, step: int, *, loss: Tensor, hits: Tensor, norms: Tensor, cosines: Tensor, embeddings: Tensor
    ) -> dict[str, float]:
        """Called on every process with each reported step (from 1 on), of which all see the global batch: see
        `Classified`. Returns numbers for the log."""


def train(
    backbone: nn.Module,
    head: CosineHead,
    dataset: IdentityDataset,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    lr_schedule: LRSchedule,
    cfg: TrainingSettings,
    output_dir: str | Path,
    config: dict[str, Any],
    validate: Validate | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in `output_dir` where there is one; a finished run is left alone.

    Writes `<output_dir>/checkpoints/step_*.ckpt`, `backbone.safetensors`, `backbone_best.safetensors` (of the best
    validation), `metrics.json`, `metrics.jsonl`, `training.png`, TensorBoard scalars.

    Args:
        head: the whole classifier (K, D), with the same weights on every process; each keeps its share of it.
        make_optimizer: from parameter groups to the optimiser (config group optimizer).
        config: plain dictionary of the run's settings, kept in every checkpoint.

    Returns:
        What `metrics.json` holds.

    Raises:
        UserError: settings that do not fit together, a checkpoint of another run in `output_dir`, a loss or gradients
            that are not finite.
    """
    output_dir = Path(output_dir)
    device = distributed.device(cfg.device)
    warn_of_emulation(cfg.precision, device)
    check_validated(lr_schedule, validate is not None)
    identities = dataset.source.identities
    global_batch = cfg.images_per_step
    steps_per_epoch = cfg.steps_of_epoch(len(dataset))
    last_step = cfg.epochs * steps_per_epoch
    batches = partial(_batches, dataset, cfg)
    counts = {"identities": len(identities), "images": len(dataset), "images_per_step": global_batch}
    provenance = partial(training_provenance, head, **counts)
    batches(0, last_step)  # a batch that cannot be is told before work

    # Backbone, classifier, optimiser, loss scaling
    memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
    if cfg.sync_batch_norm:
        backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    backbone = backbone.to(device, memory_format=memory_format)
    classifier = PartialFC(head, cfg.sample_rate, cfg.seed).to(device)
    optimizer = make_optimizer(parameter_groups([backbone, classifier], cfg.decay_batch_norm))
    rates = [group["lr"] for group in optimizer.param_groups]
    scaler = _loss_scaler(device, cfg.precision)
    trainee = Trainee(backbone, classifier, optimizer, scaler, lr_schedule)

    # The newest checkpoint of this folder
    folder = CheckpointFolder(output_dir / "checkpoints", keep=cfg.keep_checkpoints)
    run = {"identities": identities, "images_per_step": global_batch, "config": config}
    progress = Progress()
    state = folder.load_latest()
    if state is not None:
        progress = restore(state, trainee, **run, output_dir=output_dir)
        del state  # it holds the whole classifier
        if progress.step >= last_step or lr_schedule.stops:
            metrics = finished_metrics(progress, output_dir)
            if metrics is None:
                return leave_files(
                    progress, backbone, dataset, global_batch, output_dir, provenance(steps=progress.step)
                )
            log.info("this run is finished (%d steps); its files are in %s", progress.step, output_dir)
            return metrics
        log.info("going on from step %d", progress.step)
    first_step, seconds_before, start = progress.step, progress.seconds, time.perf_counter()

    # From here on `net` computes the embeddings: compiled and wrapped, same weights
    net: nn.Module = torch.compile(backbone) if cfg.compile else backbone
    if distributed.world_size() > 1:
        net = DistributedDataParallel(net, [device.index] if device.type == "cuda" else None)
    net.train()
    classifier.train()
    loader = load_batches(
        dataset, batches(first_step, last_step), num_workers=cfg.num_workers, pin_memory=device.type == "cuda"
    )
    epoch_tally, logging_tally = (Tally(sums, device) for sums in (progress.epoch_sums, progress.logging_sums))
    finite_steps = FiniteSteps(cfg.max_bad_steps, progress.skipped_steps)
    statistics = RunningStatistics([backbone, head])
    scalars = ScalarLogger(output_dir, cfg.wandb_project, config)
    metrics_file = MetricsFile(output_dir / "metrics.jsonl", first_step)
    curves = Curves(metrics_file.path, output_dir)
    log.info(
        "%d images of %d identities, steps %d..%d of %d images, %d steps an epoch, %s on %s",
        *(len(dataset), len(identities), first_step, last_step, global_batch, steps_per_epoch, cfg.precision, device),
    )
    bar = tqdm(total=last_step, initial=first_step, desc="recogniser", unit="step", disable=not distributed.is_main())
    images_seen, tick = 0, time.perf_counter()
    with StopRequest() as stop:
        for step, (pixels, labels) in enumerate(loader, start=first_step):
            done = step + 1
            factor = lr_schedule.at(step, steps_per_epoch, cfg.epochs)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            lr = rates[0] * factor
            torch.manual_seed(seed_for(cfg.seed, "dropout", step, distributed.rank()))
            statistics.remember()

            # One step of the optimiser, unless the gradient is not finite
            labels = labels.to(device, non_blocking=True)
            classifier.begin_step(labels, step, optimizer)
            optimizer.zero_grad(set_to_none=True)
            result = _backward(net, classifier, pixels, labels, step, scaler, cfg, memory_format)
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in backbone.parameters() if p.grad is not None])
            files = partial(_names, dataset, batches(step, done))
            taken = finite_steps.take(torch.hypot(norm, classifier.gradient_norm()), done, files)
            if taken:
                if cfg.gradient_clip is not None:
                    nn.utils.clip_grads_with_norm_(backbone.parameters(), cfg.gradient_clip, norm)
                scaler.step(optimizer)
                classifier.end_step(optimizer)
                epoch_tally.add(result)
                logging_tally.add(result)
            else:
                statistics.put_back()
            scaler.update()
            images_seen += global_batch
            bar.update()

            # Log
            last, epoch_ends = done == last_step, done % steps_per_epoch == 0
            if done % cfg.steps_between_logging == 0 or last:
                loss, accuracy = logging_tally.means()
                speed = images_seen / (time.perf_counter() - tick)
                values = {"lr": lr, "images_per_second": speed, "skipped_steps": float(finite_steps.skipped)}
                if loss is not None:
                    values |= {"loss": loss, "accuracy": accuracy}
                    bar.set_postfix(loss=f"{loss:.3f}", img_s=f"{speed:.0f}", refresh=False)
                if watch is not None:
                    values |= watch.look(done, **vars(result))
                write_or_warn("the log", partial(report, scalars, metrics_file, done, values))
                logging_tally.clear()
                images_seen, tick = 0, time.perf_counter()

            # Validate, where an epoch ends
            if epoch_ends:
                epoch = done // steps_per_epoch
                mean_loss, accuracy = epoch_tally.means()
                epoch_tally.clear()
                entry = {"epoch": epoch, "loss": mean_loss, "accuracy": accuracy, "lr": lr}
                if validate is not None and (epoch % cfg.epochs_between_validation == 0 or last):
                    entry["validation"] = validate_epoch(
                        *(validate, backbone, epoch, progress, lr_schedule, output_dir, provenance(steps=done))
                    )
                    tick, images_seen = time.perf_counter(), 0
                progress.history.append(entry)
                report_epoch(entry, scalars, done)
            ends = last or (epoch_ends and lr_schedule.stops)

            # Save; a SIGTERM to any process ends the run after a checkpoint
            sound = taken or bool(torch.isfinite(result.loss))
            if ends and not sound:
                raise UserError(
                    f"training.optimizer.lr: the loss is {result.loss.item()} at the last step, {done}, with lr "
                    f"{lr:g}; lower the rate, add training.lr_schedule.warmup_epochs or a training.gradient_clip"
                )
            stops = stop.agreed() and sound
            interval = cfg.steps_between_checkpoints
            due = ends or stops or (epoch_ends if interval is None else done % interval == 0)
            if due and sound:  # weights that give no finite loss are no place to go on from
                progress.step, progress.skipped_steps = done, finite_steps.skipped
                progress.epoch_sums, progress.logging_sums = epoch_tally.tolist(), logging_tally.tolist()
                progress.seconds = seconds_before + time.perf_counter() - start
                _save(folder, checkpoint_state(trainee, progress, **run), last=ends or stops)
                if distributed.is_main():
                    curves.update(last=ends)
                distributed.barrier()
            if stops and not ends:
                bar.close()
                scalars.close()
                stop.leave(done)
            if ends:
                break
    bar.close()
    scalars.close()
    return leave_files(progress, backbone, dataset, global_batch, output_dir, provenance(steps=progress.step))


def _loss_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Of the loss; it does nothing but in fp16."""
    if precision != "fp16" or distributed.world_size() == 1:
        return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    # Shards of the classifier differ: all processes must find a gradient too large where one does
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler  # here: all of FSDP comes with it

    return ShardedGradScaler(device.type)


def _batches(dataset: IdentityDataset, cfg: TrainingSettings, first_step: int, last_step: int) -> StepBatches:
    """What this process sees in the steps first_step .. last_step - 1."""
    return StepBatches(
        len(dataset),
        batch_size=cfg.batch_size,
        first_step=first_step,
        last_step=last_step,
        seed=cfg.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        parts=dataset.source.parts,
    )


def _save(folder: CheckpointFolder, state: dict[str, Any], last: bool) -> None:
    """Write a checkpoint on rank 0; `state`, with the whole classifier, lives no longer than that."""
    if distributed.is_main():
        save_or_warn(partial(folder.save, state["progress"]["step"], state), last=last)


def _names(dataset: IdentityDataset, batches: StepBatches) -> list[str]:
    """The images in `batches`, for a message."""
    rows = dataset.source.rows
    return [dataset.source.images.names[rows[index]] for batch in batches for _, index in batch]


def _backward(
    net: nn.Module,
    classifier: PartialFC,
    pixels: Tensor,
    labels: Tensor,
    step: int,
    scaler: torch.amp.GradScaler,
    cfg: TrainingSettings,
    memory_format: torch.memory_format,
) -> Classified:
    """Add the gradient of the global batch's mean loss, in parts of `cfg.micro_batch_size` images of this process.

    pixels (B, S, S, 3) uint8, labels (B,). Returns what the classifier says of the whole batch, without gradient.
    """
    generator = torch.Generator().manual_seed(seed_for(cfg.seed, "margin", step))  # the same on every process
    size = cfg.micro_batch_size or len(labels)
    parts: list[Classified] = []
    for first in range(0, len(labels), size):
        part = slice(first, first + size)
        share = len(labels[part]) / len(labels)
        with distributed.no_sync(net, waits=first + size < len(labels)):
            # uint8 (b, S, S, 3) pixels => float32 (b, 3, S, S) in [-1, 1] => embeddings (b, D)
            images = to_float(pixels[part].to(labels.device, non_blocking=True), memory_format)
            with autocast(labels.device, cfg.precision):
                embeddings = net(images)
            embeddings = embeddings.float()
            if isinstance(net, DistributedDataParallel):
                # It averages over processes, whose gradients are parts of one mean already
                embeddings.register_hook(lambda gradient: gradient * distributed.world_size())
            result = classifier(embeddings, labels[part], generator, observe=size >= len(labels))
            scaler.scale(share * result.loss).backward()
        parts.append(replace(result, loss=share * result.loss.detach()))
    if len(parts) == 1:
        return parts[0]
    whole = Classified(
        torch.stack([part.loss for part in parts]).sum(),
        *(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Classified) if f.name != "loss"),
    )
    # Once a step, as without parts; margins go by the statistics of the step before
    classifier.head.observe(whole.cosines, whole.norms)
    return whole
