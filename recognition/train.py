"""Train a face recogniser on labelled images: class folders, or a set in any format of utils/data/formats.

    python -m recognition.train dataset.root=faces output_dir=outputs/recogniser
    torchrun --nproc_per_node 8 -m recognition.train dataset.root=faces output_dir=outputs/recogniser

The same command goes on where a killed run stopped. Settings: configs/recognition_train_config.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from recognition.augment import Augmentation
from recognition.dataset_check import TrainingCheckSettings, check_before_training
from recognition.datasets import DatasetSettings, IdentityDataset, open_training_set
from recognition.lr_schedules import check_validated
from recognition.training_loop import train
from recognition.training_settings import TrainingSettings
from recognition.validation import ValidationSettings, benchmark_validation
from recognition.watch import watch_over
from utils.config import UserError, entry_point, instantiate, plain, settings
from utils.distributed import seed_for
from utils.logging import check_wandb

# Parts of the section `training` that are config groups, built by their `_target_`.
GROUPS = ("optimizer", "lr_schedule")


@entry_point("recognition_train_config")
def main(cfg: DictConfig) -> dict[str, Any]:
    loop = settings(
        OmegaConf.masked_copy(cfg.training, [k for k in cfg.training if k not in GROUPS]), TrainingSettings, "training"
    )
    check_wandb(loop.wandb_project)
    make_optimizer, lr_schedule = (instantiate(cfg.training[name], f"training.{name}") for name in GROUPS)
    check_optimizer(make_optimizer)
    lr_schedule.check_epochs(loop.epochs)
    data = settings(cfg.dataset, DatasetSettings, "dataset")
    augment = settings(cfg.augment, Augmentation, "augment")
    check = settings(cfg.check, TrainingCheckSettings, "check")
    validation = settings(cfg.validation, ValidationSettings, "validation")
    validate = benchmark_validation(validation) if validation.is_set else None
    check_validated(lr_schedule, validate is not None)
    source = open_training_set(data)

    torch.manual_seed(seed_for(loop.seed, "weights"))
    backbone = instantiate(cfg.backbone, "backbone")
    head = instantiate(cfg.head, "head", in_features=backbone.num_features, num_classes=len(source.identities))
    check_before_training(cfg, check, source, backbone.input_size, loop.device)
    dataset = IdentityDataset(
        source,
        size=backbone.input_size,
        augment=augment,
        seed=loop.seed,
        cache_in_memory=data.cache_in_memory,
    )
    watch = watch_over(head, len(dataset), loop)
    return train(
        backbone, head, dataset, make_optimizer, lr_schedule, loop, cfg.output_dir, plain(cfg), validate, watch
    )


def check_optimizer(make_optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    """UserError for values that the optimiser does not take, before data are read."""
    for name, value in getattr(make_optimizer, "keywords", {}).items():
        if isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"training.optimizer.{name}: {value!r}; a finite number is wanted")
    try:
        make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise UserError(f"training.optimizer: {error}") from error


if __name__ == "__main__":
    main()
