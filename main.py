"""Train the identity-conditioned diffusion model: `python main.py ...` or `torchrun --nproc_per_node 8 main.py ...`.

Settings: configs/train_config.yaml. The same command goes on where a stopped run ended.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from diffusion.first_stage import FirstStage, load_first_stage
from diffusion.training_loop import train
from diffusion.training_settings import TrainingSettings
from utils import distributed
from utils.config import UserError, entry_point, instantiate, plain, settings
from utils.logging import check_wandb

# Parts of the section `training` that are config groups, built by their `_target_`.
GROUPS = ("optimizer", "lr_scheduler", "ema")


@entry_point("train_config")
def main(cfg: DictConfig) -> dict[str, float]:
    """Compose dataset, first stage, network and schedule; train; return the last logged numbers."""
    loop = settings(
        OmegaConf.masked_copy(cfg.training, [k for k in cfg.training if k not in GROUPS]), TrainingSettings, "training"
    )
    factories = {name: instantiate(cfg.training[name], f"training.{name}") for name in GROUPS}
    factories["lr_scheduler"](
        torch.optim.SGD([torch.zeros(1)], lr=1.0)
    )  # one that cannot be is told before data are read
    check_wandb(loop.wandb_project)
    device = distributed.device(loop.device)

    if loop.context_dropout is not None:
        cfg.model.context_dropout_probability = loop.context_dropout
    torch.manual_seed(loop.seed)  # the first weights
    unet = instantiate(cfg.model, "model")
    schedule = instantiate(cfg.diffusion, "diffusion")
    first_stage = FirstStage()
    if cfg.latent_diffusion:
        first_stage = load_first_stage(loop.checkpoint.VQEncoder, loop.checkpoint.VQDecoder, device)
    dataset = instantiate(cfg.dataset, "dataset")
    _check_contexts(cfg, dataset)
    _check_size(cfg, unet, first_stage, device)
    return train(unet, schedule, dataset, first_stage, *factories.values(), loop, Path(cfg.output_dir), plain(cfg))


def _check_contexts(cfg: DictConfig, dataset: object) -> None:
    """The network's context width must be the embeddings' own."""
    if not cfg.model.is_context_conditional:
        return
    if dataset.embeddings is None:
        raise UserError(
            "dataset.embeddings_file_path: not set, and the model is conditional; encode.py makes such a file, "
            "model=unet_uncond_adagn needs none"
        )
    width = dataset.embeddings.shape[1]
    if width != cfg.model.context_input_channels:
        raise UserError(
            f"model.context_input_channels: {cfg.model.context_input_channels}, but the embeddings are {width} wide; "
            f"give model.context_input_channels={width}"
        )


@torch.no_grad()
def _check_size(cfg: DictConfig, unet: torch.nn.Module, first_stage: FirstStage, device: torch.device) -> None:
    """The latents' height and width must suit the network, which is known before any image is encoded."""
    size = int(cfg.constants.image_size)
    height = first_stage.encode(torch.zeros(1, 3, size, size, device=device)).shape[-1]
    factor = size // height * unet.downscaling
    if size % factor:
        raise UserError(f"constants.image_size: {size}; autoencoder and network need a multiple of {factor}")


if __name__ == "__main__":
    main()
