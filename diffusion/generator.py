"""What draws faces, rebuilt from files: network, noise schedule and decoder.

What files hold a network is said in `diffusion.model_file`; here one is chosen and joined with its decoder.
Legend: C channels, h w height and width of what is diffused.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion.first_stage import FirstStage
from diffusion.model_file import model_of_network_file, model_of_record
from diffusion.schedule import NoiseSchedule
from models.autoencoder.vqgan import load_decoder
from models.diffusion.unet import ConditionalUNet
from utils.checkpoint import CheckpointFolder, read_content, weights_sha256
from utils.config import UserError, existing_file
from utils.networks import recognise

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

    The two configuration files serve published checkpoints that do not show everything. `latent_diffusion` and
    `latent_shape` None: as the checkpoint says; a published one diffuses latents of 3 x 32 x 32. Raises UserError where
    a file is missing, does not fit, or comes from another autoencoder than the decoder.
    """
    path, content, metadata = _read_checkpoint(choice)
    if isinstance(content, dict) and content.get("kind") == "diffusion":
        for key, value in (("model_cfg_path", model_cfg_path), ("diffusion_cfg_path", diffusion_cfg_path)):
            if value is not None:
                raise UserError(f"{key}: {path} carries its own configuration; leave {key} out")
        model = model_of_record(path, content, choice.use_non_ema)
    else:
        if choice.use_non_ema:
            raise UserError(f"checkpoint.use_non_ema: {path} holds one set of weights; leave it out")
        file = recognise(path, content, metadata)
        model = model_of_network_file(file, model_cfg_path=model_cfg_path, diffusion_cfg_path=diffusion_cfg_path)
    unet, schedule = model.unet, model.schedule
    if model.latent_diffusion is not None and latent_diffusion not in (None, model.latent_diffusion):
        raise UserError(f"latent_diffusion: {latent_diffusion}, but {path} was trained with {model.latent_diffusion}")
    in_latents = (latent_diffusion is not False) if model.latent_diffusion is None else model.latent_diffusion

    first_stage = FirstStage()
    if in_latents:
        hint = "the decoder of the autoencoder that the model was trained with (vq_decoder.safetensors)"
        decoder = load_decoder(existing_file(decoder_path, "VQDecoder_path", hint))
        first_stage = FirstStage(decoder=decoder, latent_scale=decoder.latent_scale)
        trained = model.latent_scale
        if trained is not None and abs(decoder.latent_scale - trained) > 1e-4 * trained:
            raise UserError(
                f"VQDecoder_path: {decoder_path} has latent_scale {decoder.latent_scale:.6g}, but {path} was trained "
                f"with {trained:.6g}; give the decoder that belongs to it"
            )
    shape = tuple(int(size) for size in (latent_shape or model.latent_shape))
    divisor = unet.downscaling
    if len(shape) != 3 or shape[0] != unet.input_channels or any(size < 1 or size % divisor for size in shape[1:]):
        raise UserError(
            f"latent_shape: {list(shape)}; this model takes [{unet.input_channels}, h, w], multiples of {divisor}"
        )
    decoder_weights = first_stage.decoder.state_dict() if first_stage.decoder is not None else {}
    return FaceGenerator(
        unet=unet.eval().requires_grad_(False),
        schedule=schedule,
        first_stage=first_stage,
        latent_shape=shape,
        context_scale=model.context_scale,
        step=model.step,
        is_published=model.is_published,
        weights_sha256=weights_sha256(unet.state_dict(), {"betas": schedule.betas}, decoder_weights),
    )


def _read_checkpoint(choice: CheckpointChoice) -> tuple[Path, Any, dict[str, Any]]:
    """The file that `choice` names, what it holds and its metadata; in a folder that of `global_step`, or the newest
    that can be read."""
    path = Path(choice.path)
    if path.is_file():
        if choice.global_step is not None:
            raise UserError(f"checkpoint.global_step: {path} is one file; give a run folder, or leave it out")
        return path, *read_content(path)
    if not path.is_dir():
        raise UserError(
            f"checkpoint.path: no such file or folder: {path}; give a run folder of main.py or a checkpoint"
        )
    folder = CheckpointFolder(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    found = {int(folder.PATTERN.match(file.name)[1]): file for file in folder.paths()}
    if found and choice.global_step is None:
        return *folder.load_newest(), {}
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
    return found[step], *read_content(found[step])
