"""Measure a recogniser on verification pairs: the 10-fold protocol, rates at fixed false accepts, the ROC.

    python -m recognition.test checkpoint=backbone.safetensors dataset.root=lfw pairs_file=pairs.txt output_dir=results
    python -m recognition.test checkpoint=backbone.safetensors bin_file=lfw.bin output_dir=results

Writes results.json, results.md and roc.png to output_dir and prints the table.
Settings: configs/recognition_test_config.yaml.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from recognition.backbones import load_backbone
from recognition.embedding import embed_images
from recognition.verification import FAR_LEVELS, evaluate_pairs, plot_roc
from utils import distributed
from utils.checkpoint import write_json, write_text
from utils.config import UserError, entry_point, existing_file, existing_folder, instantiate, settings
from utils.data.formats.pairs import VerificationPairs, read_bin, read_pairs
from utils.distributed import seed_for
from utils.logging import get_logger

log = get_logger(__name__)


@dataclass
class DatasetSettings:
    """The `dataset` section of recognition_test_config.yaml."""

    root: str | None = None
    skip_missing: bool = False


@dataclass
class TestSettings:
    """The top level of recognition_test_config.yaml."""

    output_dir: str
    checkpoint: str | None
    dataset: DatasetSettings
    pairs_file: str | None = None
    bin_file: str | None = None
    name: str | None = None
    flip: bool = True
    batch_size: int = 64
    seed: int = 0
    device: str = "auto"


@entry_point("recognition_test_config")
def main(cfg: DictConfig) -> dict[str, Any]:
    options = settings(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "backbone"]), TestSettings, "")
    if options.batch_size < 1:
        raise UserError(f"batch_size: {options.batch_size}; it must be at least 1")
    _check_output(options)
    backbone = load_model(options.checkpoint, cfg.get("backbone"), options.seed)
    pairs = open_pairs(options)

    embeddings = embed_pairs(backbone, pairs, options)
    result = evaluate_pairs(embeddings, pairs.issame, pairs.num_folds)

    name = options.name or default_name(options.checkpoint)
    report = {
        "name": name,
        "checkpoint": options.checkpoint,
        "pairs_file": options.pairs_file,
        "bin_file": options.bin_file,
        "dataset_root": options.dataset.root,
        "flip": options.flip,
        "num_images": len(pairs),
        "num_skipped_pairs": pairs.num_skipped,
        **result.summary(),
    }
    if distributed.is_main():
        output_dir = Path(options.output_dir)
        table = markdown_table([report])
        write_json(output_dir / "results.json", report)
        write_text(output_dir / "results.md", table)
        plot_roc({name: result}, output_dir / "roc.png")
        sys.stdout.write(table)
        if pairs.num_skipped:
            log.warning("%d pairs were left out, their images are missing", pairs.num_skipped)
    return report


def _check_output(options: TestSettings) -> None:
    """The results of another model or other pairs are not overwritten."""
    file = Path(options.output_dir) / "results.json"
    if not file.is_file():
        return
    known = json.loads(file.read_text(encoding="utf-8"))
    for key, now in (
        ("checkpoint", options.checkpoint),
        ("pairs_file", options.pairs_file),
        ("bin_file", options.bin_file),
    ):
        if known.get(key) != now:
            raise UserError(f"{key}: {now}, but {file} holds the results of {known.get(key)}; give another output_dir")


def load_model(checkpoint: str | None, backbone_cfg: DictConfig | None, seed: int) -> nn.Module:
    """The backbone to measure: from a file, whose network is recognised, or `backbone_cfg` with random weights."""
    if checkpoint is not None:
        path = existing_file(checkpoint, "checkpoint", "null measures random weights")
        if backbone_cfg is not None:
            raise UserError(f"backbone: {path} shows which network it is; leave backbone= out")
        return load_backbone(path)
    if backbone_cfg is None:
        raise UserError("backbone: not set; say which network gets random weights, as in backbone=ir_50")
    torch.manual_seed(seed_for(seed, "weights"))
    return instantiate(backbone_cfg, "backbone").eval()


def open_pairs(options: TestSettings) -> VerificationPairs:
    """The pairs of `bin_file`, or `pairs_file` with its images below `dataset.root`; UserError unless one is set."""
    if options.bin_file is not None:
        if options.pairs_file is not None or options.dataset.root is not None:
            raise UserError("bin_file: holds pairs and images; leave pairs_file and dataset.root out")
        return read_bin(existing_file(options.bin_file, "bin_file"))
    hint = "or bin_file=FILE of an insightface .bin instead"
    pairs_file = existing_file(options.pairs_file, "pairs_file", hint)
    root = existing_folder(options.dataset.root, "dataset.root", "the images of pairs_file")
    return read_pairs(pairs_file, root, skip_missing=options.dataset.skip_missing)


def embed_pairs(backbone: nn.Module, pairs: VerificationPairs, options: TestSettings) -> np.ndarray:
    """Embeddings (2 P, D), rows 2i and 2i+1 those of pair i. Each image is embedded once, by one of the processes."""
    mine = distributed.share(range(len(pairs)))
    part = embed_images(
        backbone,
        [partial(pairs.pixels, index) for index in mine],
        batch_size=options.batch_size,
        flip=options.flip,
        device=distributed.device(options.device),
        progress="embedding" if distributed.is_main() else None,
    )
    embeddings = np.empty((len(pairs), part.shape[1]), np.float32)
    for some, rows in distributed.all_gather_objects((mine, part)):
        embeddings[some] = rows
    return embeddings[pairs.pairs.reshape(-1)]


def default_name(checkpoint: str | None) -> str:
    """`untrained`, or the run folder of the checkpoint (its file name, where it has a telling one)."""
    if checkpoint is None:
        return "untrained"
    path = Path(checkpoint)
    return path.resolve().parent.name if path.name == "backbone.safetensors" else path.stem


def markdown_table(reports: list[dict[str, Any]]) -> str:
    """Reports of `main` as a Markdown table, a row each; accuracies and rates in per cent."""
    levels = [f"{far:g}" for far in FAR_LEVELS]
    head = ["model", "accuracy", "EER", *(f"TAR@FAR {level}" for level in levels), "threshold", "genuine", "impostor"]
    rows = [
        [
            report["name"],
            f"{100 * report['accuracy']:.2f} ± {100 * report['accuracy_std']:.2f}",
            f"{100 * report['eer']:.2f}",
            *(f"{100 * report['tar_at_far'][level]:.2f}" for level in levels),
            f"{report['threshold']:.3f}",
            str(report["num_genuine"]),
            str(report["num_impostor"]),
        ]
        for report in reports
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
