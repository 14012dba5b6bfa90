"""Train a face recogniser on labelled images: class folders, or a set in any format of utils/data/formats.

    python -m recognition.train dataset.root=faces output_dir=outputs/recogniser
    torchrun --nproc_per_node 8 -m recognition.train dataset.root=faces output_dir=outputs/recogniser

The same command goes on where a killed run stopped. Settings: configs/recognition_train_config.yaml.
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig

from recognition.augment import Augmentation
from recognition.datasets import DatasetSettings, IdentityDataset, open_training_set
from recognition.training_loop import TrainingSettings, train
from utils.config import check_keys, entry_point, instantiate, plain, settings
from utils.distributed import seed_for


@entry_point("recognition_train_config")
def main(cfg: DictConfig) -> dict[str, Any]:
    check_keys(cfg, ("output_dir", "dataset", "augment", "backbone", "head", "training"), "")
    training = settings(cfg.training, TrainingSettings, "training")
    data = settings(cfg.dataset, DatasetSettings, "dataset")
    augment = settings(cfg.augment, Augmentation, "augment")
    source = open_training_set(data)

    torch.manual_seed(seed_for(training.seed, "weights"))
    backbone = instantiate(cfg.backbone, "backbone")
    head = instantiate(cfg.head, "head", in_features=backbone.num_features, num_classes=len(source.identities))
    dataset = IdentityDataset(
        source,
        size=backbone.input_size,
        augment=augment,
        seed=training.seed,
        cache_in_memory=data.cache_in_memory,
    )
    return train(backbone, head, dataset, training, cfg.output_dir, plain(cfg))


if __name__ == "__main__":
    main()
