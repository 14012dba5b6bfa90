"""The autoencoder's training loop: L1 + quantiser + adversarial loss of a patch discriminator (VQGAN, CVPR 2021).

Everything random is drawn from (seed, step), and gradients are averaged over processes before they are used. So a run
that was stopped and resumed ends with the same weights as one that was not, and two processes compute what one does
with twice the batch. A limit in minutes gives that up for an end that can be foretold.

Legend: B batch, C channels, H W height and width, K codes, n rows of latents.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.autoencoder.codebook import place_codes, revive_codes
from models.autoencoder.data import DatasetSettings, Images, split_images, training_batches
from models.autoencoder.evaluation import draw_preview, evaluate, measure_latents
from models.autoencoder.losses import PatchDiscriminator, adaptive_weight, hinge_discriminator_loss
from models.autoencoder.lpips import LPIPS, load_lpips
from models.autoencoder.quantization import perplexity
from models.autoencoder.training_settings import (
    TrainingSettings,
    adversarial_factor,
    check_settings,
    lr_factor,
    share_done,
)
from models.autoencoder.vqgan import DECODER_FILE, ENCODER_FILE, VQModel, save_autoencoder
from utils import distributed
from utils.checkpoint import CheckpointFolder, read_json, strict_load, write_json
from utils.config import UserError, differences, existing_file
from utils.curves import Curves
from utils.data.step_sampler import StepSampler
from utils.ema import EMA
from utils.guards import FiniteSteps, save_or_warn, write_or_warn
from utils.images import to_float, write_image
from utils.interruption import StopRequest
from utils.logging import ScalarLogger, check_wandb, get_logger
from utils.metrics_file import MetricsFile, report
from utils.precision import autocast, warn_of_emulation

log = get_logger(__name__)

METRICS_FILE = "metrics.json"
POSTFIX = (("l1", "l1"), ("codes", "perplexity"))  # of the progress bar
PREVIEW_IMAGES = 16
VALIDATION_IMAGES = 1024  # at most, in each report


def train(
    autoencoder: dict[str, Any],
    dataset: DatasetSettings,
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    make_discriminator_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    make_ema: Callable[[nn.Module], EMA],
    cfg: TrainingSettings,
    output_dir: Path,
    config: dict[str, Any],
) -> dict[str, float]:
    """Train the VQ autoencoder that `autoencoder` describes (the arguments of VQModel) and write its two halves.

    `config` is the whole configuration, kept in every checkpoint. Goes on from the newest checkpoint in `output_dir`;
    a finished run is left as it is. Returns the reconstruction error on the held-out images. Raises UserError for
    settings that do not fit together, before any image is read.
    """
    check_settings(cfg, dataset, autoencoder)
    check_wandb(cfg.wandb_project)
    device = distributed.device(cfg.device)
    warn_of_emulation(cfg.precision, device)

    # Networks, optimisers, average
    torch.manual_seed(distributed.seed_for(cfg.seed, "weights"))
    try:
        model = VQModel(**autoencoder)
    except ValueError as error:
        raise UserError(f"autoencoder.{error}") from error
    discriminator = PatchDiscriminator(cfg.discriminator_channels, cfg.discriminator_layers)
    memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model, discriminator = (net.to(device, memory_format=memory_format) for net in (model, discriminator))
    optimizer = make_optimizer(model.parameters())
    optimizer_d = make_discriminator_optimizer(discriminator.parameters())
    learning_rates = [group["lr"] for group in [*optimizer.param_groups, *optimizer_d.param_groups]]
    ema = make_ema(model)
    lpips = _perceptual(cfg, device)
    scaler, scaler_d = (torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16") for _ in range(2))
    counts = torch.zeros(model.n_embed, device=device)  # use of each code since the last revival

    # Resume
    folder = CheckpointFolder(output_dir / "checkpoints")
    state = folder.load_latest()
    first_step, minutes_before, skipped = 0, 0.0, 0
    if state is not None:
        _check_same_run(state, config, output_dir)
        first_step, minutes_before = state["step"], state["minutes"]
        skipped = state.get("skipped_steps", 0)
        strict_load(model, state["model"], "checkpoint")
        strict_load(discriminator, state["discriminator"], "checkpoint")
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer_d.load_state_dict(state["optimizer_discriminator"])
        if state["scaler"]:  # empty in a checkpoint of a run without fp16
            scaler.load_state_dict(state["scaler"])
        if state["scaler_discriminator"]:  # empty in a checkpoint of a run without fp16
            scaler_d.load_state_dict(state["scaler_discriminator"])
        counts = state["codebook_counts"].to(device)
    done = share_done(cfg, first_step, minutes_before)
    if done >= 1.0 and all((output_dir / name).is_file() for name in (ENCODER_FILE, DECODER_FILE, METRICS_FILE)):
        changed = sorted(differences(state["config"], config))
        if changed:
            log.warning("finished before, with other settings, and left as it is: %s", ", ".join(changed))
        log.info("this run is finished (%d steps): %s and %s in %s", first_step, ENCODER_FILE, DECODER_FILE, output_dir)
        return read_json(output_dir / METRICS_FILE)
    if state is not None:
        log.info("going on from step %d", first_step)

    # Data
    training_names, validation_names = split_images(dataset, cfg.seed)
    images = Images(dataset.samples_root, training_names, dataset.image_size, dataset.cache_in_memory)
    held_out = Images(dataset.samples_root, validation_names[:VALIDATION_IMAGES], dataset.image_size, cache=True)
    sampler = StepSampler(len(images), cfg.batch_size, cfg.seed, cfg.steps, first_step, dataset.horizontal_flip)
    preview_pixels = (held_out if len(held_out) else images).read(list(range(PREVIEW_IMAGES))[: len(held_out) or 1])

    # Train
    scalars = ScalarLogger(output_dir, cfg.wandb_project, config)
    metrics_file = MetricsFile(output_dir / "metrics.jsonl", first_step)
    curves = Curves(metrics_file.path, output_dir)
    log.info("%.2f M parameters, %s on %s", sum(p.numel() for p in model.parameters()) / 1e6, cfg.precision, device)
    window = _Window(model.n_embed, device)
    finite_steps = FiniteSteps(cfg.max_bad_steps, skipped)
    began = time.perf_counter()
    progress = tqdm(total=cfg.steps, initial=first_step, unit="step", disable=not distributed.is_main())
    step = first_step
    batches = iter(training_batches(images, sampler, cfg.num_workers, device))
    with StopRequest() as stop:
        while done < 1.0:
            torch.manual_seed(distributed.seed_for(cfg.seed, "step", step, distributed.rank()))  # for dropout
            factor = lr_factor(cfg, step, done)
            groups = [*optimizer.param_groups, *optimizer_d.param_groups]
            for group, lr in zip(groups, learning_rates, strict=True):
                group["lr"] = lr * factor
            pixels = next(batches).to(device, non_blocking=True)  # uint8 (B, H, W, 3)
            files = partial(_batch_names, images, sampler, step)
            take = partial(finite_steps.take, step=step + 1, files=files)  # of a gradient's norm
            real = to_float(pixels).to(memory_format=memory_format)  # pixels => float32 in [-1, 1], (B, 3, H, W)
            if step == cfg.quantization_start:
                place_codes(model, [model, ema.model], images, cfg.batch_size, cfg.seed, device)

            # Autoencoder: L1 + quantiser + adversarial loss
            with autocast(device, cfg.precision):
                output = model(real, quantize=step >= cfg.quantization_start)
            reconstruction_loss = (output.images.float() - real).abs().mean()
            similarity_loss = reconstruction_loss  # with the perceptual part, where there is one
            if lpips is not None:
                with autocast(device, cfg.precision):
                    perceptual_loss = lpips(output.images, real).mean()
                similarity_loss = reconstruction_loss + cfg.lpips_weight * perceptual_loss
                window.add(lpips=perceptual_loss)
            loss = similarity_loss + cfg.codebook_weight * output.quantizer_loss
            adversarial = adversarial_factor(cfg, step)
            if adversarial > 0:
                discriminator.requires_grad_(False)
                with autocast(device, cfg.precision):
                    generator_loss = -discriminator(output.images).float().mean()
                last_layer = model.decoder.conv_out.weight
                weight = adaptive_weight(similarity_loss, generator_loss, last_layer, scaler.get_scale())
                loss = loss + adversarial * cfg.discriminator_weight * weight * generator_loss
            taken = _update(model, loss, optimizer, scaler, cfg.gradient_clip, take)
            if taken:
                ema.update(model)
                window.add(l1=reconstruction_loss, quantizer=output.quantizer_loss)

            # Discriminator: hinge loss on the same images
            if adversarial > 0:
                discriminator.requires_grad_(True)
                with autocast(device, cfg.precision):
                    logits_real, logits_fake = discriminator(torch.cat([real, output.images.detach()])).float().chunk(2)
                discriminator_loss = hinge_discriminator_loss(logits_real, logits_fake)
                _update(discriminator, discriminator_loss, optimizer_d, scaler_d, None, take)
                window.add(discriminator=discriminator_loss, generator=generator_loss, adversarial_weight=weight)

            # Codebook
            if taken and step >= cfg.quantization_start:
                used = torch.bincount(output.indices, minlength=model.n_embed).float()
                used = distributed.all_reduce_mean(used) * distributed.world_size()
                counts += used
                window.counts += used
                if cfg.revive_codes_every is not None and (step + 1) % cfg.revive_codes_every == 0:
                    window.revived += revive_codes([model, ema.model], counts, output.latents, cfg.seed, step)
                    counts.zero_()
            step += 1
            progress.update()
            minutes = minutes_before + _agreed((time.perf_counter() - began) / 60, device)
            done = share_done(cfg, step, minutes)
            finished = done >= 1.0

            # Log
            if step % cfg.steps_between_logging == 0 or finished:
                values = {
                    **window.means(),
                    "lr": optimizer.param_groups[0]["lr"],
                    "minutes": minutes,
                    "skipped_steps": float(finite_steps.skipped),
                }
                write_or_warn("the log", partial(report, scalars, metrics_file, step, values))
                shown = {name: f"{values[key]:.4g}" for name, key in POSTFIX if key in values}
                progress.set_postfix(shown, refresh=False)
                window = _Window(model.n_embed, device)

            # Look
            if step % cfg.steps_between_previews == 0 or finished:
                placed = step > cfg.quantization_start
                measured = evaluate(ema.model, held_out, cfg.batch_size, device, placed, lpips)
                scalars.scalars({f"validation/{name}": value for name, value in measured.items()}, step)
                log.info("step %d, %.1f minutes: %s", step, minutes, _in_words(measured))
                if distributed.is_main():
                    preview = draw_preview(ema.model, preview_pixels, device, quantize=placed)
                    path = output_dir / "previews" / f"step_{step:08d}.png"
                    write_or_warn("the preview", partial(write_image, path, preview))
                    write_or_warn("the preview", partial(scalars.image, "preview", preview, step))

            # Save; a SIGTERM to any rank ends the run after a checkpoint
            stops = stop.agreed()
            if step % cfg.steps_between_checkpoints == 0 or finished or stops:
                if distributed.is_main():
                    state = {
                        "kind": "autoencoder",
                        "minutes": minutes,
                        "model": model.state_dict(),
                        "discriminator": discriminator.state_dict(),
                        "ema": ema.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "optimizer_discriminator": optimizer_d.state_dict(),
                        "scaler": scaler.state_dict(),
                        "scaler_discriminator": scaler_d.state_dict(),
                        "codebook_counts": counts,
                        "skipped_steps": finite_steps.skipped,
                        "config": config,
                    }
                    save_or_warn(partial(folder.save, step, state), last=finished or stops)
                    curves.update(last=finished)
                distributed.barrier()
            if stops and not finished:
                progress.close()
                scalars.close()
                stop.leave(step)
    progress.close()

    # Result: the averaged weights, with latents centred and their deviation measured
    result = ema.model
    if step <= cfg.quantization_start:
        log.warning(
            "the run ended at step %d, before training.quantization_start=%d: the codebook is placed now, but the "
            "decoder was not trained with it",
            step,
            cfg.quantization_start,
        )
        place_codes(result, [result], images, cfg.batch_size, cfg.seed, device)
    mean, std = measure_latents(result, images, cfg.batch_size, device)
    result.shift_latents(-mean)
    measured = evaluate(result, held_out, cfg.batch_size, device, lpips=lpips)
    metrics = {"steps": step, "images": len(images), "latent_std": std, "latent_scale": 1.0 / std, **measured}
    if distributed.is_main():
        save_autoencoder(result, output_dir, latent_scale=1.0 / std)
        write_json(output_dir / METRICS_FILE, metrics)
    distributed.barrier()
    log.info("wrote %s and %s to %s; %s", ENCODER_FILE, DECODER_FILE, output_dir, _in_words(metrics))
    scalars.close()
    return metrics


def _check_same_run(state: dict[str, Any], config: dict[str, Any], output_dir: Path) -> None:
    """UserError when the checkpoint in `output_dir` belongs to another autoencoder or image size."""
    if state.get("kind") != "autoencoder":
        raise UserError(
            f"output_dir: {output_dir} holds a run of another kind ({state.get('kind')}); give another folder"
        )
    there = {**state["config"]["autoencoder"], "image_size": state["config"]["dataset"]["image_size"]}
    here = {**config["autoencoder"], "image_size": config["dataset"]["image_size"]}
    for name in here:
        if there.get(name) != here[name]:
            raise UserError(
                f"output_dir: {output_dir} holds a run with another {name} ({there.get(name)}, now {here[name]}); "
                "give another folder or the same setting"
            )


def _perceptual(cfg: TrainingSettings, device: torch.device) -> LPIPS | None:
    """The perceptual distance, where its weight is above 0 and both files are given."""
    if cfg.lpips_weight == 0:
        if cfg.lpips_vgg is not None or cfg.lpips_linear is not None:
            raise UserError(
                "training.lpips_weight: 0, but the files of the perceptual loss are given; give 1, as VQGAN"
            )
        return None
    if cfg.lpips_vgg is None or cfg.lpips_linear is None:
        log.warning(
            "training.lpips_vgg and lpips_linear are not both given: no perceptual loss; VQGAN's sharpness comes from "
            "it and from the discriminator (training.lpips_weight=0 says that this is meant)"
        )
        return None
    vgg = existing_file(cfg.lpips_vgg, "training.lpips_vgg", "torchvision's vgg16-397923af.pth")
    linear = existing_file(cfg.lpips_linear, "training.lpips_linear", "vgg.pth of the lpips package")
    return load_lpips(vgg, linear).to(device)


def _agreed(value: float, device: torch.device) -> float:
    """The mean of `value` over processes, so that all of them stop at the same step."""
    return distributed.all_reduce_mean(torch.tensor(value, dtype=torch.float64, device=device)).item()


def _update(
    network: nn.Module,
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip: float | None,
    take: Callable[[Tensor], bool],
) -> bool:
    """One optimiser step on the mean over processes of the gradient of `loss`, if `take` takes the gradient's norm."""
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    # Averaged here and not by DistributedDataParallel: two networks take turns in one step, and parts of them rest
    # (the codebook before quantisation starts, the discriminator in the autoencoder's turn).
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if distributed.world_size() > 1:
        mean = distributed.all_reduce_mean(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))
    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm(gradients)
    taken = take(norm)
    if taken and clip is not None:
        nn.utils.clip_grads_with_norm_(network.parameters(), clip, norm)
    if taken or scaler.is_enabled():  # the scaler skips the step itself, and needs to know
        scaler.step(optimizer)
        scaler.update()
    return taken


def _batch_names(images: Images, sampler: StepSampler, step: int) -> list[str]:
    """The files of this rank's images in step `step`."""
    return [images.names[index] for index, _ in sampler.local_batch(step)]


class _Window:
    """What is averaged from one logged step to the next."""

    def __init__(self, n_embed: int, device: torch.device) -> None:
        self.values: dict[str, list[Tensor]] = {}
        self.counts = torch.zeros(n_embed, device=device)
        self.revived = 0

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def means(self) -> dict[str, float]:
        """Means over steps and processes; of the codebook: the share of codes in use, perplexity, codes revived."""
        means = {name: distributed.all_reduce_mean(torch.stack(v).mean()).item() for name, v in self.values.items()}
        if self.counts.sum() > 0:
            means["codes_used"] = (self.counts > 0).float().mean().item()
            means["perplexity"] = perplexity(self.counts)
            means["codes_revived"] = float(self.revived)
        return means


def _in_words(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items()) or "no images are held out"
