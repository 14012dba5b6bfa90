"""Train the VQ autoencoder: `python train_autoencoder.py dataset.samples_root=FOLDER`, or the same under torchrun.

Settings: configs/train_autoencoder_config.yaml. Writes vq_encoder.safetensors and vq_decoder.safetensors, which main.py
and sample.py read. The same command goes on where a stopped run ended.
"""

import inspect
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from models.autoencoder.data import DatasetSettings
from models.autoencoder.modules import Encoder
from models.autoencoder.training_loop import train
from models.autoencoder.training_settings import TrainingSettings
from utils.config import check_keys, entry_point, instantiate, plain, settings

# Parts of the section `training` that are config groups, built by their `_target_`.
GROUPS = ("optimizer", "discriminator_optimizer", "ema")


@entry_point("train_autoencoder_config")
def main(cfg: DictConfig) -> dict[str, float]:
    """Check the settings, train, return the reconstruction error on held-out images."""
    loop = settings(
        OmegaConf.masked_copy(cfg.training, [k for k in cfg.training if k not in GROUPS]), TrainingSettings, "training"
    )
    dataset = settings(cfg.dataset, DatasetSettings, "dataset")
    check_keys(cfg.autoencoder, ("ddconfig", "n_embed", "embed_dim"), "autoencoder")
    check_keys(cfg.autoencoder.ddconfig, inspect.signature(Encoder).parameters, "autoencoder.ddconfig")
    factories = [instantiate(cfg.training[name], f"training.{name}") for name in GROUPS]
    return train(plain(cfg.autoencoder), dataset, *factories, loop, Path(cfg.output_dir), plain(cfg))


if __name__ == "__main__":
    main()
