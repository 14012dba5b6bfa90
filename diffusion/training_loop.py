"""The diffusion training loop.

A step is a pure function of (seed, step): data order, mirroring, timesteps, noise and context dropout are drawn for the
whole global batch from a generator seeded with both, and every rank takes its slice. So a run that was killed and
resumed ends with the same weights as one that was not, and two processes compute what one does with twice the batch.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from diffusion.ddpm import training_loss
from diffusion.first_stage import FirstStage
from diffusion.previews import draw_preview
from diffusion.schedule import NoiseSchedule
from diffusion.training_batches import Batch, training_batches
from diffusion.training_settings import TrainingSettings
from models.cpu.products import use_products
from utils import distributed
from utils.checkpoint import CheckpointFolder, read_content, strict_load
from utils.config import UserError, differences
from utils.curves import CURVES, Curves
from utils.data.face_dataset import FaceDataset
from utils.data.latents import cached_latents
from utils.data.prefetch import prefetch
from utils.ema import EMA
from utils.guards import FiniteSteps, MovingLoss, save_or_warn, write_or_warn
from utils.images import write_image
from utils.interruption import StopRequest
from utils.logging import ScalarLogger, get_logger
from utils.metrics_file import MetricsFile, report
from utils.networks import recognise
from utils.precision import autocast, check_precision, warn_of_emulation

log = get_logger(__name__)

# What training may change in a network on its way: no weight depends on it.
FREE_MODEL_KEYS = ("context_dropout_probability", "unconditioned_probability")
PATIENCE = 2000  # steps after which a loss should have moved


def train(
    unet: nn.Module,
    schedule: NoiseSchedule,
    dataset: FaceDataset,
    first_stage: FirstStage,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    make_lr_scheduler: Callable[..., Any],
    make_ema: Callable[..., EMA],
    cfg: TrainingSettings,
    output_dir: Path,
    config: dict[str, Any],
) -> dict[str, float]:
    """Train `unet` to `cfg.steps`, from the newest checkpoint in `output_dir` where there is one.

    `first_stage` turns images into what is diffused; the three factories are partial (config groups); `config` is kept
    in every checkpoint, which is enough to sample from it. Returns the last logged numbers. Raises UserError for
    settings that do not fit together, and when the loss stops being a number.
    """
    # Network, optimiser, average
    device = distributed.device(cfg.device)
    warn_of_emulation(cfg.precision, device)
    scale = _context_scale(cfg.context_scale, dataset)
    unet = unet.to(device, memory_format=torch.channels_last if cfg.channels_last else torch.contiguous_format)
    if device.type == "cpu" and cfg.channels_last and check_precision(cfg.precision) != "fp32":
        use_products(unet, "unfolded")  # convolutions of small images in bf16 take up to ten times as long
    optimizer = make_optimizer(unet.parameters())
    lr_scheduler = make_lr_scheduler(optimizer)
    ema = make_ema(unet)
    scaler = torch.amp.GradScaler(device.type, enabled=check_precision(cfg.precision) == "fp16")
    schedule = schedule.to(device)

    # Resume
    folder = CheckpointFolder(output_dir / "checkpoints", cfg.checkpoint.keep, tuple(cfg.steps_of_checkpoints))
    first_step, losses, skipped = 0, [], 0  # losses since the last logged step, a scalar each
    state = folder.load_latest() if cfg.checkpoint.restore else None
    if state is not None:
        _check_same_run(state, first_stage, config, output_dir)
    if state is None and cfg.checkpoint.path is not None:
        content, metadata = read_content(cfg.checkpoint.path)
        if isinstance(content, dict) and content.get("kind") == "diffusion":
            state = content
        else:  # weights alone, of a published or converted file
            file = recognise(Path(cfg.checkpoint.path), content, metadata)
            for network in (unet, ema.model):
                strict_load(network, file.state, f"training.checkpoint.path: {file.path}", file.looks_like)
            log.info("starting from the weights in %s (%s)", file.path, file.looks_like)
    if state is not None:
        first_step = _restore(state, unet, ema, optimizer, lr_scheduler, scaler)
        losses = [torch.tensor(loss, device=device) for loss in state.get("losses", [])]
        skipped = state.get("skipped_steps", 0)
        log.info("going on from step %d", first_step)
        changed = sorted(differences(state["config"], config))
        if changed:
            log.warning("going on with other settings than the checkpoint's: %s", ", ".join(changed))
    if first_step >= cfg.steps:
        log.info("the run is complete (%d steps); give another output_dir or more training.steps", first_step)
        return {}

    # Latents, once, unless the caller has them
    if first_stage.encoder is not None and cfg.cache_latents and first_stage.latents is None:
        first_stage.latents = cached_latents(
            dataset, first_stage.encoder, output_dir, batch_size=64, num_workers=cfg.num_workers, device=device
        )

    # From here on `net` computes the loss: compiled and wrapped, same weights
    unet.activation_checkpointing = cfg.activation_checkpointing
    net = torch.compile(unet) if cfg.compile else unet
    if distributed.world_size() > 1:
        net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    batches = training_batches(unet, schedule, dataset, first_stage, scale, cfg, first_step, device)
    if device.type == "cuda":  # on the CPU a second thread would take cores from the step
        batches = prefetch(batches)
    scalars = ScalarLogger(output_dir, cfg.wandb_project, config)
    metrics_file = MetricsFile(output_dir / "metrics.jsonl", first_step)
    curves = Curves(metrics_file.path, output_dir)
    log.info(
        "%.1f M parameters, %d images, %d steps of %d x %d, %s on %s",
        sum(p.numel() for p in unet.parameters()) / 1e6,
        len(dataset),
        cfg.steps,
        distributed.world_size(),
        cfg.batch_size,
        cfg.precision,
        device,
    )

    # Train
    net.train()
    finite_steps, moving_loss = FiniteSteps(cfg.max_bad_steps, skipped), MovingLoss(PATIENCE)
    metrics: dict[str, float] = {}
    waited, images, tick = 0.0, 0, time.perf_counter()
    progress = tqdm(
        range(first_step, cfg.steps), initial=first_step, total=cfg.steps, disable=not distributed.is_main()
    )
    with StopRequest() as stop:
        for step in progress:
            done = step + 1
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            images += len(batch.x_0) * distributed.world_size()

            optimizer.zero_grad(set_to_none=True)
            loss = _backward(net, batch, schedule, scaler, cfg)
            scaler.unscale_(optimizer)
            # The same on every rank: DDP has averaged the gradients. The one point where the host waits for the device.
            norm = nn.utils.get_total_norm([p.grad for p in unet.parameters() if p.grad is not None])
            taken = finite_steps.take(norm, done, lambda batch=batch: [dataset.names[i] for i in batch.indices])
            if taken and cfg.gradient_clip is not None:
                nn.utils.clip_grads_with_norm_(unet.parameters(), cfg.gradient_clip, norm)
            if taken or scaler.is_enabled():  # the scaler skips the step itself, and needs to know
                scaler.step(optimizer)
                scaler.update()
            lr_scheduler.step()
            if taken:
                ema.update(unet)
                losses.append(loss)

            # Log
            if done % cfg.steps_between_logging == 0 or done == cfg.steps:
                seconds = time.perf_counter() - tick
                metrics = {
                    "lr": lr_scheduler.get_last_lr()[0],
                    "images_per_second": images / seconds,
                    "waiting_share": waited / seconds,  # of the time, for data
                    "ema_decay": ema.decay_at(ema.num_updates),
                    "skipped_steps": float(finite_steps.skipped),
                }
                if losses:
                    metrics["loss"] = distributed.all_reduce_mean(torch.stack(losses).mean()).item()
                    moving_loss.look(metrics["loss"], done)
                    progress.set_postfix(loss=f"{metrics['loss']:.4f}", img_s=f"{images / seconds:.0f}", refresh=False)
                write_or_warn("the log", partial(report, scalars, metrics_file, done, metrics))
                losses, waited, images, tick = [], 0.0, 0, time.perf_counter()

            # Look
            if cfg.steps_between_sampling and (done % cfg.steps_between_sampling == 0 or done == cfg.steps):
                if distributed.is_main():
                    progress.set_description("drawing the preview")
                    preview = draw_preview(
                        ema.model, schedule, dataset, first_stage, batch.x_0.shape[1:], scale, cfg.seed
                    )
                    path = output_dir / "previews" / f"step_{done:08d}.png"
                    write_or_warn("the preview", partial(write_image, path, preview))
                    write_or_warn("the preview", partial(scalars.image, "preview", preview, done))
                    progress.set_description(None)
                distributed.barrier()

            # Save; a SIGTERM to any rank ends the run after a checkpoint
            last, stops = done == cfg.steps, stop.agreed()
            if done % cfg.checkpoint.steps_between == 0 or done in cfg.steps_of_checkpoints or last or stops:
                window = distributed.all_reduce_mean(torch.stack(losses)).tolist() if losses else []
                if distributed.is_main():
                    state = {
                        "kind": "diffusion",
                        "model": unet.state_dict(),
                        "ema": ema.model.state_dict(),
                        "ema_updates": ema.num_updates,
                        "optimizer": optimizer.state_dict(),
                        "lr_scheduler": lr_scheduler.state_dict(),
                        "scaler": scaler.state_dict(),
                        "losses": window,
                        "skipped_steps": finite_steps.skipped,
                        "config": config,
                        "latent_scale": first_stage.latent_scale,
                        "latent_shape": list(batch.x_0.shape[1:]),
                        "context_scale": scale,
                    }
                    save_or_warn(partial(folder.save, done, state), last=last or stops)
                    curves.update(last=last)
                distributed.barrier()
            if stops and not last:
                progress.close()
                scalars.close()
                stop.leave(done)
    if metrics:
        log.info("step %d: %s", cfg.steps, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        log.info(
            "checkpoints, %s and previews are in %s; sample.py checkpoint.path=%s draws", CURVES, *[output_dir] * 2
        )
    scalars.close()
    return metrics


def _backward(
    net: nn.Module, batch: Batch, schedule: NoiseSchedule, scaler: torch.amp.GradScaler, cfg: TrainingSettings
) -> Tensor:
    """Add the gradient of this rank's mean loss, in parts of `cfg.micro_batch_size`; returns that loss, detached."""
    parts = list(batch.split(cfg.micro_batch_size))
    total = torch.zeros((), device=batch.x_0.device)
    for number, part in enumerate(parts):
        share = len(part.x_0) / len(batch.x_0)
        with distributed.no_sync(net, number < len(parts) - 1), autocast(batch.x_0.device, cfg.precision):
            loss = share * training_loss(
                net,
                part.x_0,
                part.t,
                part.noise,
                part.context,
                schedule,
                empty_mask=part.empty_mask,
                element_mask=part.element_mask,
            )
        with distributed.no_sync(net, number < len(parts) - 1):
            scaler.scale(loss).backward()
        total += loss.detach()
    return total


def _check_same_run(state: dict[str, Any], first_stage: FirstStage, config: dict[str, Any], output_dir: Path) -> None:
    """A run goes on with the network, the autoencoder and images of the size that it was begun with."""
    if state.get("kind") != "diffusion":
        raise UserError(
            f"output_dir: {output_dir} holds checkpoints of kind {state.get('kind')!r}; give another folder"
        )
    for key in sorted(differences(state["config"].get("model", {}), config.get("model", {}))):
        if key not in FREE_MODEL_KEYS:
            was, now = state["config"]["model"].get(key), config["model"].get(key)
            raise UserError(f"model.{key}: {now}, but {output_dir} holds a run with {was}; give another output_dir")
    was, now = (c.get("constants", {}).get("image_size") for c in (state["config"], config))
    if was != now:
        raise UserError(f"constants.image_size: {now}, but {output_dir} holds a run on {was}; give another output_dir")
    if abs(first_stage.latent_scale - state["latent_scale"]) > 1e-4 * state["latent_scale"]:
        raise UserError(
            f"training.checkpoint.VQEncoder: latent_scale {first_stage.latent_scale:.6g}, but {output_dir} holds a run "
            f"with {state['latent_scale']:.6g}; give the autoencoder that it was begun with, or another output_dir"
        )


def _restore(state: dict[str, Any], unet: nn.Module, ema: EMA, optimizer: Any, lr_scheduler: Any, scaler: Any) -> int:
    """Put a checkpoint's state into the objects; the number of steps done."""
    strict_load(unet, state["model"], "the checkpoint in output_dir (or training.checkpoint.path)")
    ema.load_state_dict({"num_updates": state["ema_updates"], "model": state["ema"]})
    optimizer.load_state_dict(state["optimizer"])
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    if state["scaler"]:  # empty in a checkpoint of a run without fp16
        scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def _context_scale(name: str, dataset: FaceDataset) -> float:
    """The factor on unit contexts that `training.context_scale` names."""
    width = 1 if dataset.embeddings is None else dataset.embeddings.shape[1]
    scales = {"unit": 1.0, "sqrt_dim": math.sqrt(width)}
    if name not in scales:
        raise UserError(f"training.context_scale: {name!r} is not one of {', '.join(scales)}")
    return scales[name]
