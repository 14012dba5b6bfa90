"""What draws faces, rebuilt from files: network, noise schedule and decoder.

A checkpoint of this project carries its configuration: model and schedule come from the file itself. A published file
is a bare state dict, with its schedule buffers beside the network's keys: the model's configuration must be named.
Legend: C channels, h w height and width of what is diffused.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from diffusion.first_stage import FirstStage
from diffusion.schedule import NoiseSchedule
from models.autoencoder.vqgan import load_decoder
from models.diffusion.unet import ConditionalUNet
from utils.checkpoint import CheckpointFolder, load_network_file, load_torch, read_metadata, strict_load
from utils.config import UserError, existing_file, instantiate

PUBLISHED_LATENT_SHAPE = (3, 32, 32)  # 128 x 128 images through the VQ-f4 autoencoder
_PUBLISHED_FILE = re.compile(r"^ema_averaged_model(?:_(\d+))?\.ckpt$")  # as IDiff-Face and ADMIS name theirs


@dataclass
class CheckpointChoice:
    """The section `checkpoint` of sample_ddim_config.yaml."""

    path: str  # a run folder of main.py, one of its .ckpt files, or a published UNet file
    global_step: int | None = None  # of the checkpoint to take from a folder; null: the newest
    use_non_ema: bool = False  # the live weights instead of their moving average


@dataclass
class FaceGenerator:
    """Network, schedule and decoder in evaluation mode, on one device."""

    unet: ConditionalUNet
    schedule: NoiseSchedule
    first_stage: FirstStage  # its decoder turns x_0 into images; without one, diffusion runs in pixels
    latent_shape: tuple[int, ...]  # (C, h, w) of what is diffused
    context_scale: float  # the network takes unit contexts times this
    step: int | None  # of training; None: the file does not say
    is_published: bool  # a bare state dict, without configuration
    weights_sha256: str  # of all weights and betas in use, whatever file they came from

    def to(self, device: torch.device) -> "FaceGenerator":
        """Move everything to `device`; returns the generator itself."""
        self.unet.to(device)
        self.schedule.to(device)
        if self.first_stage.decoder is not None:
            self.first_stage.decoder.to(device)
        return self


def load_generator(
    choice: CheckpointChoice,
    decoder_path: str | None,
    *,
    model_cfg_path: str | None = None,
    diffusion_cfg_path: str | None = None,
    latent_diffusion: bool | None = None,
    latent_shape: tuple[int, ...] | None = None,
) -> FaceGenerator:
    """Rebuild what `choice` names, strictly, on the CPU.

    The two configuration files serve published checkpoints only. `latent_diffusion` and `latent_shape` None: as the
    checkpoint says; a published one diffuses latents of 3 x 32 x 32. Raises UserError where a file is missing, does not
    fit, or comes from another autoencoder than the decoder.
    """
    path, record = _read_checkpoint(choice)
    if record is not None:
        config = record["config"]
        unet = instantiate(config["model"], "model")
        schedule = instantiate(config["diffusion"], "diffusion")
        weights = record["model" if choice.use_non_ema else "ema"]
        saved_shape, saved_scale = record["latent_shape"], float(record["latent_scale"])
        context_scale, step = float(record["context_scale"]), int(record["step"])
        in_latents = bool(config.get("latent_diffusion", True))
        for key, value in (("model_cfg_path", model_cfg_path), ("diffusion_cfg_path", diffusion_cfg_path)):
            if value is not None:
                raise UserError(f"{key}: {path} carries its own configuration; leave {key} out")
        if latent_diffusion not in (None, in_latents):
            raise UserError(f"latent_diffusion: {latent_diffusion}, but {path} was trained with {in_latents}")
    else:
        if choice.use_non_ema:
            raise UserError(f"checkpoint.use_non_ema: {path} holds one set of weights; leave it out")
        weights, betas = load_network_file(path)
        unet = _from_file(
            model_cfg_path, "model_cfg_path", f"{path} carries no configuration; name its file in configs/model"
        )
        if betas is not None:
            schedule = NoiseSchedule.from_betas(betas)
        else:
            schedule = _from_file(
                diffusion_cfg_path, "diffusion_cfg_path", f"{path} holds no betas; name a file in configs/diffusion"
            )
        saved_shape, saved_scale = PUBLISHED_LATENT_SHAPE, None
        context_scale, step = 1.0, None
        in_latents = latent_diffusion is not False
    strict_load(unet, weights, str(path))

    first_stage = FirstStage()
    if in_latents:
        hint = "the decoder of the autoencoder that the model was trained with (vq_decoder.safetensors)"
        decoder = load_decoder(existing_file(decoder_path, "VQDecoder_path", hint))
        first_stage = FirstStage(decoder=decoder, latent_scale=decoder.latent_scale)
        if saved_scale is not None and abs(decoder.latent_scale - saved_scale) > 1e-4 * saved_scale:
            raise UserError(
                f"VQDecoder_path: {decoder_path} has latent_scale {decoder.latent_scale:.6g}, but {path} was trained "
                f"with {saved_scale:.6g}; give the decoder that belongs to it"
            )
    shape = tuple(int(size) for size in (latent_shape or saved_shape))
    divisor = unet.downscaling
    if len(shape) != 3 or shape[0] != unet.input_channels or any(size < 1 or size % divisor for size in shape[1:]):
        raise UserError(
            f"latent_shape: {list(shape)}; this model takes [{unet.input_channels}, h, w], multiples of {divisor}"
        )
    digest = hashlib.sha256()
    decoder_weights = first_stage.decoder.state_dict() if first_stage.decoder is not None else {}
    for tensors in (weights, {"betas": schedule.betas}, decoder_weights):
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return FaceGenerator(
        unet=unet.eval().requires_grad_(False),
        schedule=schedule,
        first_stage=first_stage,
        latent_shape=shape,
        context_scale=context_scale,
        step=step,
        is_published=record is None,
        weights_sha256=digest.hexdigest(),
    )


def _read_checkpoint(choice: CheckpointChoice) -> tuple[Path, Mapping[str, Any] | None]:
    """The file that `choice` names, and what it holds if main.py wrote it; None for a published one.

    In a folder the file of `global_step`, or the newest that can be read.
    """
    path = Path(choice.path)
    if path.is_file():
        if choice.global_step is not None:
            raise UserError(f"checkpoint.global_step: {path} is one file; give a run folder, or leave it out")
        return path, _as_record(path, None if path.suffix == ".safetensors" else load_torch(path))
    if not path.is_dir():
        raise UserError(
            f"checkpoint.path: no such file or folder: {path}; give a run folder of main.py or a checkpoint"
        )
    folder = CheckpointFolder(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    found = {int(folder.PATTERN.match(file.name)[1]): file for file in folder.paths()}
    if found and choice.global_step is None:
        path, state = folder.load_newest()
        return path, _as_record(path, state)
    if not found:
        matches = [(match, file) for file in path.iterdir() if (match := _PUBLISHED_FILE.match(file.name))]
        found = {int(match[1] or -1): file for match, file in matches}  # the one without a number comes first
    if not found:
        raise UserError(
            f"checkpoint.path: no checkpoint in {path}; main.py writes checkpoints/step_<number>.ckpt there"
        )
    step = max(found) if choice.global_step is None else choice.global_step
    if step not in found:
        steps = ", ".join(str(step) for step in sorted(found))
        raise UserError(f"checkpoint.global_step: no checkpoint of step {step} in {path}; there are {steps}")
    return found[step], _as_record(found[step], load_torch(found[step]))


def _as_record(path: Path, content: Any) -> Mapping[str, Any] | None:
    """`content` of a file if it is a checkpoint of main.py, None if it may be a published one; UserError otherwise."""
    described = content if isinstance(content, dict) else read_metadata(path)
    kind = described.get("kind")
    if kind not in (None, "diffusion"):
        raise UserError(f"checkpoint.path: {path} is a file of kind {kind!r}; give a checkpoint of main.py")
    return content if kind is not None else None


def _from_file(path: str | None, key: str, hint: str) -> Any:
    """Build what the YAML file at `path` describes."""
    return instantiate(OmegaConf.load(existing_file(path, key, hint)), key)
