"""Train a face recogniser on labelled images: class folders, or a set in any format of utils/data/formats.

    python -m recognition.train dataset.root=faces output_dir=outputs/recogniser
    torchrun --nproc_per_node 8 -m recognition.train dataset.root=faces output_dir=outputs/recogniser

The same command goes on where a killed run stopped. Settings: configs/recognition_train_config.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from recognition.augment import Augmentation
from recognition.dataset_check import CheckSettings, check_training_set
from recognition.datasets import DatasetSettings, IdentityDataset, TrainingSet, open_training_set
from recognition.heads import CosineHead
from recognition.training_loop import train
from recognition.training_settings import TrainingSettings
from recognition.validation import ValidationSettings, benchmark_validation
from recognition.watch import Watch, chance_loss
from utils import distributed
from utils.config import UserError, check_keys, entry_point, instantiate, plain, settings
from utils.distributed import seed_for

KEYS = ("output_dir", "dataset", "augment", "backbone", "head", "training", "check", "embedder", "validation")
# Parts of the section `training` that are config groups, built by their `_target_`.
GROUPS = ("optimizer", "lr_schedule")


@dataclass
class TrainingCheckSettings(CheckSettings):
    """The `check` section of recognition_train_config.yaml."""

    enabled: bool = True


@entry_point("recognition_train_config")
def main(cfg: DictConfig) -> dict[str, Any]:
    check_keys(cfg, KEYS, "")
    loop = settings(
        OmegaConf.masked_copy(cfg.training, [k for k in cfg.training if k not in GROUPS]), TrainingSettings, "training"
    )
    make_optimizer, lr_schedule = (instantiate(cfg.training[name], f"training.{name}") for name in GROUPS)
    data = settings(cfg.dataset, DatasetSettings, "dataset")
    augment = settings(cfg.augment, Augmentation, "augment")
    check = settings(cfg.check, TrainingCheckSettings, "check")
    validation = settings(cfg.validation, ValidationSettings, "validation")
    validate = benchmark_validation(validation) if validation.is_set else None
    source = open_training_set(data)

    torch.manual_seed(seed_for(loop.seed, "weights"))
    backbone = instantiate(cfg.backbone, "backbone")
    head = instantiate(cfg.head, "head", in_features=backbone.num_features, num_classes=len(source.identities))
    look_at_images(cfg, check, source, backbone.input_size, loop.device)
    dataset = IdentityDataset(
        source,
        size=backbone.input_size,
        augment=augment,
        seed=loop.seed,
        cache_in_memory=data.cache_in_memory,
    )
    watch = Watch(
        max(2, round(loop.sample_rate * len(source.identities))),
        steps_per_epoch=loop.steps_of_epoch(len(dataset)),
        loss_at_chance=loss_at_chance(head, len(source.identities)),
    )
    return train(
        backbone, head, dataset, make_optimizer, lr_schedule, loop, cfg.output_dir, plain(cfg), validate, watch
    )


def loss_at_chance(head: CosineHead, num_identities: int) -> float:
    """The loss (nats) of embeddings at right angles to every class centre."""
    target = head.target_logit(torch.zeros(1), torch.ones(1), torch.Generator())
    return chance_loss(num_identities, head.scale, target.item())


def look_at_images(
    cfg: DictConfig, check: TrainingCheckSettings, source: TrainingSet, input_size: int, device: str
) -> None:
    """The check before training; its embedder is gone from memory afterwards."""
    if not check.enabled:
        if "embedder" in cfg:
            raise UserError("embedder: only the check of the images uses it, and check.enabled is false; leave one out")
        return
    embedder = instantiate(cfg.embedder, "embedder") if "embedder" in cfg else None
    check_training_set(
        source,
        check,
        input_size=input_size,
        output_dir=cfg.output_dir,
        embedder=embedder,
        device=distributed.device(device),
    )


if __name__ == "__main__":
    main()
