"""The network that predicts the noise, and its schedule, out of any file that holds one.

A checkpoint of main.py carries its configuration, and so does a file that `python -m utils.checkpoint convert` wrote.
Of a published file the network's settings are read off its shapes, and its schedule stands beside the weights.
Legend: C channels, h w height and width of what is diffused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from models.diffusion.unet import ConditionalUNet
from utils.checkpoint import check_finite, save_safetensors, strict_load
from utils.config import UserError, existing_file, instantiate, plain
from utils.logging import get_logger
from utils.networks import UNET, NetworkFile

log = get_logger(__name__)

# Fields of ModelFile that a converted file carries in its metadata
SAID = ("latent_diffusion", "latent_shape", "latent_scale", "context_scale", "step", "is_published")
PUBLISHED_LATENT_SHAPE = (3, 32, 32)  # 128 x 128 images through the VQ-f4 autoencoder


@dataclass
class ModelFile:
    """A UNet with its weights, and what must be known to draw with it."""

    unet: ConditionalUNet
    schedule: NoiseSchedule
    model_config: dict[str, Any]  # arguments of ConditionalUNet
    latent_diffusion: bool | None = None  # whether it was trained on latents; None: the file does not say
    latent_shape: tuple[int, ...] = PUBLISHED_LATENT_SHAPE  # (C, h, w)
    latent_scale: float | None = None  # of the autoencoder it was trained with; None: the file does not say
    context_scale: float = 1.0  # the network takes unit contexts times this
    step: int | None = None  # of training; None: the file does not say
    is_published: bool = True  # a bare state dict, without configuration


def model_of_record(path: Path, record: Mapping[str, Any], use_non_ema: bool = False) -> ModelFile:
    """The model in a checkpoint of main.py: its average, or its live weights. UserError where it does not fit."""
    config = record["config"]
    unet = instantiate(config["model"], "model")
    weights = record["model" if use_non_ema else "ema"]
    check_finite(weights, path)
    strict_load(unet, weights, str(path))
    return ModelFile(
        unet,
        instantiate(config["diffusion"], "diffusion"),
        {name: value for name, value in config["model"].items() if name != "_target_"},
        latent_diffusion=bool(config.get("latent_diffusion", True)),
        latent_shape=tuple(record["latent_shape"]),
        latent_scale=float(record["latent_scale"]),
        context_scale=float(record["context_scale"]),
        step=int(record["step"]),
        is_published=False,
    )


def model_of_network_file(
    file: NetworkFile, *, model_cfg_path: str | None = None, diffusion_cfg_path: str | None = None
) -> ModelFile:
    """The model in a published file (opened), or in one that `save_model_file` wrote, strictly.

    The two YAML files say what the file does not show: a network without cross-attention whose widths are not the
    published ones, a schedule where no betas are in the file. Raises UserError where something is missing or does not
    fit, and for a configuration that the file itself carries.
    """
    path = file.path
    if file.kind != UNET:
        raise file.mismatch(UNET)
    if "config" in file.metadata and model_cfg_path is not None:
        raise UserError(f"model_cfg_path: {path} carries its own configuration; leave model_cfg_path out")
    if model_cfg_path is not None:
        node = OmegaConf.load(existing_file(model_cfg_path, "model_cfg_path", "a file of configs/model"))
        unet = instantiate(node, "model_cfg_path")
        config = {name: value for name, value in plain(node).items() if name != "_target_"}
    else:
        if file.assumed:
            unseen = ", ".join(file.assumed)
            raise UserError(
                f"model_cfg_path: not set; {path} looks like {file.looks_like}, whose {unseen} cannot be seen in its "
                "weights; name its file in configs/model"
            )
        config, unet = file.config, ConditionalUNet(**file.config)
        log.info("%s: %s", path, file.looks_like)
    strict_load(unet, file.state, str(path), file.looks_like)
    said = {name: file.metadata[name] for name in SAID if name in file.metadata}
    return ModelFile(unet, _schedule_of(file, diffusion_cfg_path), config, **said)


def _schedule_of(file: NetworkFile, diffusion_cfg_path: str | None) -> NoiseSchedule:
    """The schedule in a file, or the one of a YAML file; where both are given they must agree."""
    if file.betas is not None and diffusion_cfg_path is None:
        return NoiseSchedule.from_betas(file.betas)
    hint = f"{file.path} holds no betas; name a file in configs/diffusion"
    node = OmegaConf.load(existing_file(diffusion_cfg_path, "diffusion_cfg_path", hint))
    schedule = instantiate(node, "diffusion_cfg_path")
    if file.betas is None:
        return schedule
    own = NoiseSchedule.from_betas(file.betas)
    if own.betas.shape != schedule.betas.shape or not torch.allclose(own.betas, schedule.betas, atol=1e-6):
        raise UserError(f"diffusion_cfg_path: {diffusion_cfg_path} is not the schedule in {file.path}; leave it out")
    return own


def save_model_file(model: ModelFile, path: str | Path) -> None:
    """Write weights, betas and configuration as safetensors; `model_of_network_file` needs nothing else."""
    schedule = model.schedule
    betas = torch.tensor([schedule.beta(t) for t in range(schedule.num_timesteps)], dtype=torch.float64)  # (T,)
    weights: dict[str, Tensor] = {**model.unet.state_dict(), "betas": betas}
    said = {name: getattr(model, name) for name in SAID}
    save_safetensors(weights, path, {"kind": UNET, "config": model.model_config, **said})
