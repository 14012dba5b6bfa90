"""Look at a training set before hours of training: what is in it, and what would spoil the run.

    python -m recognition.check dataset.root=faces
    python -m recognition.check dataset.root=faces check.images=all embedder=own embedder.checkpoint=b.safetensors

Prints a line for every finding, writes dataset_check.json and mean_face.png to output_dir; exit status 2 on an error.
`python -m recognition.train` does the same before its first step. Settings: configs/recognition_check_config.yaml.
"""

from __future__ import annotations

from omegaconf import DictConfig

from recognition.dataset_check import CheckSettings, Outcome, check_training_set
from recognition.datasets import DatasetSettings, open_training_set
from utils import distributed
from utils.config import UserError, entry_point, instantiate, settings


@entry_point("recognition_check_config")
def main(cfg: DictConfig) -> list[Outcome]:
    data = settings(cfg.dataset, DatasetSettings, "dataset")
    options = settings(cfg.check, CheckSettings, "check")
    if not isinstance(cfg.input_size, int) or cfg.input_size < 1:
        raise UserError(f"input_size: {cfg.input_size!r}; a number of pixels above 0 is wanted")
    device = distributed.device(cfg.device)
    embedder = instantiate(cfg.embedder, "embedder") if "embedder" in cfg else None
    source = open_training_set(data)
    return check_training_set(
        source, options, input_size=cfg.input_size, output_dir=cfg.output_dir, embedder=embedder, device=device
    )


if __name__ == "__main__":
    main()
