"""Measure recognisers on verification sets: the 10-fold protocol, rates at fixed false accepts, RFW, IJB, the ROC.

    python -m recognition.test checkpoint=backbone.safetensors benchmarks_dir=benchmarks output_dir=results
    python -m recognition.test checkpoint=backbone.safetensors dataset.root=lfw pairs_file=pairs.txt output_dir=results
    python -m recognition.test checkpoint=[a.safetensors,null] backbone=ir_50 bin_file=lfw.bin output_dir=results

Writes results.json, results.md, results.tex, roc.png and roc.json to output_dir and prints the tables. A test that was
killed goes on with the same command. Settings: configs/recognition_test_config.yaml.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from recognition.backbones import InputAdapter, backbone_of
from recognition.benchmark_sets import open_sets
from recognition.eigenfaces import EigenfaceSettings, fit_rows, read_faces
from recognition.ijb import TemplateSettings
from recognition.measurement import Computing, Model, Sets, measure
from recognition.published import ROWS
from recognition.tables import RFW_SET, all_tables, latex, markdown, shows_published
from utils import distributed
from utils.checkpoint import read_json, write_json, write_text
from utils.config import UserError, entry_point, existing_file, existing_folder, instantiate, settings
from utils.data.formats.benchmarks import open_rfw
from utils.data.formats.ijb import read_ijb
from utils.distributed import seed_for
from utils.embedders import onnx_embedder
from utils.images import write_encoded
from utils.logging import get_logger
from utils.networks import open_network_file
from utils.plotting.canvas import png
from utils.plotting.roc import roc_figure
from utils.precision import check_precision

log = get_logger(__name__)

RESULTS, CURVES = "results.json", "roc.json"
BASELINES = ("eigenfaces",)
SETS = ("benchmarks_dir", "bin_file", "bin_files", "pairs_file", "rfw_dir", "ijb_dir")  # keys that name sets


@dataclass
class DatasetSettings:
    """The `dataset` section of recognition_test_config.yaml."""

    root: str | None = None
    layout: str = "lfw"
    skip_missing: bool = False


@dataclass
class TestSettings:
    """The top level of recognition_test_config.yaml."""

    output_dir: str
    checkpoint: Any  # a path, null, or a list of these
    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    channel_order: str | None = None
    benchmarks_dir: str | None = None
    bin_file: str | None = None
    bin_files: list[str] = field(default_factory=list)
    pairs_file: str | None = None
    rfw_dir: str | None = None
    ijb_dir: str | None = None
    ijb: TemplateSettings = field(default_factory=TemplateSettings)
    baseline: str | None = None
    baseline_root: str | None = None
    eigenfaces: EigenfaceSettings = field(default_factory=EigenfaceSettings)
    name: Any = None  # a text, null, or a list of these
    compare: list[str] = field(default_factory=list)
    flip: bool = True
    batch_size: int = 64
    precision: str = "fp32"
    keep_embeddings: bool = True
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size: {self.batch_size}; it must be at least 1")
        check_precision(self.precision)
        if self.channel_order not in (None, "RGB", "BGR"):
            raise UserError(f"channel_order: {self.channel_order!r}; it is RGB or BGR, or null: as the file says")
        if self.baseline is not None and self.baseline not in BASELINES:
            raise UserError(f"baseline: {self.baseline!r}; there is {', '.join(BASELINES)}")
        if (self.baseline is None) != (self.baseline_root is None):
            raise UserError("baseline, baseline_root: baseline=eigenfaces and baseline_root=FOLDER go together")


@entry_point("recognition_test_config")
def main(cfg: DictConfig) -> dict[str, Any]:
    options = settings(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "backbone"]), TestSettings, "")
    inputs = inputs_of(options)
    check_output(options.output_dir, inputs)
    earlier = [read_results(folder) for folder in options.compare]
    models = list_models(options, cfg.get("backbone"), [report["name"] for reports, _ in earlier for report in reports])
    sets = open_all(options)

    output_dir = Path(options.output_dir)
    computing = Computing(
        output_dir / "embeddings",
        options.batch_size,
        options.precision,
        distributed.device(options.device),
        options.keep_embeddings,
    )
    measured = [measure(model, sets, computing) for model in models]

    reports = [report for report, _ in measured]
    rows = reports + [report for others, _ in earlier for report in others]
    results = joined(reports, inputs)
    if shows_published(rows):
        results["published"] = [asdict(row) for row in ROWS]
    if distributed.is_main():
        tables = all_tables(rows)
        own = {report["name"]: curves for report, curves in measured}
        write_text(output_dir / CURVES, json.dumps(own) + "\n")  # a later test draws them beside its own
        roc = roc_figure({**own, **{name: c for _, curves in earlier for name, c in curves.items()}})
        write_encoded(output_dir / "roc.png", png(roc))
        write_text(output_dir / "results.tex", latex(tables))
        write_text(output_dir / "results.md", markdown(tables))
        write_json(output_dir / RESULTS, results)
        sys.stdout.write(markdown(tables))
    distributed.barrier()
    return results


def inputs_of(options: TestSettings) -> dict[str, Any]:
    """What results.json holds the results of."""
    own = {key: getattr(options, key) for key in (*SETS, "checkpoint", "channel_order", "flip", "precision")}
    return own | {f"dataset.{key}": getattr(options.dataset, key) for key in ("root", "layout", "skip_missing")}


def check_output(output_dir: str, inputs: dict[str, Any]) -> None:
    """The results of another model or other pairs are not overwritten; more sets may be added."""
    file = Path(output_dir) / RESULTS
    if not file.is_file():
        return
    known = read_json(file, "remove it, or give another output_dir").get("inputs")
    if known is None:
        raise UserError(f"output_dir: {file} was written by an older version; give another output_dir")
    for key, now in inputs.items():
        newly_named = key in (*SETS, "dataset.root") and known.get(key) in (None, [])
        if known.get(key) != now and not newly_named:
            raise UserError(f"{key}: {now}, but {file} holds the results of {known.get(key)}; give another output_dir")


def joined(reports: list[dict[str, Any]], inputs: dict[str, Any]) -> dict[str, Any]:
    """What results.json holds: the report of the one model, with the numbers of the one set beside it where there is
    but one; else a list."""
    if len(reports) > 1:
        return {"inputs": inputs, "models": reports}
    (report,) = reports
    alone = next(iter(report["sets"].values())) if len(report["sets"]) == 1 and "ijb" not in report else {}
    return {**report, **alone, "inputs": inputs}


def read_results(folder: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Reports and curves of an earlier test, from its output folder. UserError where it holds none."""
    path = existing_folder(folder, "compare", "the output_dir of an earlier test")
    results, curves = (read_json(existing_file(path / name, "compare")) for name in (RESULTS, CURVES))
    reports = results.get("models", [results])
    if not all(isinstance(report, dict) and {"name", "sets"} <= report.keys() for report in reports):
        raise UserError(f"compare: {path / RESULTS} was not written by this version of recognition.test; test it again")
    return reports, curves


def open_all(options: TestSettings) -> Sets:
    """Every set that the settings name. UserError where they name none, or one that cannot be read."""
    data = options.dataset
    if options.bin_file is not None and (options.pairs_file is not None or data.root is not None):
        raise UserError("bin_file: holds pairs and images; leave pairs_file and dataset.root out")
    bins = [*([options.bin_file] if options.bin_file is not None else []), *options.bin_files]
    named = (options.benchmarks_dir, options.rfw_dir, options.ijb_dir, options.pairs_file, data.root)
    if not bins and all(value is None for value in named):
        raise UserError(
            "pairs_file: not set; give pairs_file=LIST with dataset.root=FOLDER, or bin_file=FILE of an insightface "
            ".bin, benchmarks_dir=FOLDER, rfw_dir=FOLDER or ijb_dir=FOLDER instead"
        )
    pairs = open_sets(
        benchmarks_dir=options.benchmarks_dir,
        bin_files=bins,
        pairs_file=options.pairs_file,
        root=data.root,
        layout=data.layout,
        skip_missing=data.skip_missing,
    )
    sets = Sets(pairs, ijb=options.ijb)
    if options.rfw_dir is not None:
        groups = open_rfw(existing_folder(options.rfw_dir, "rfw_dir"), skip_missing=data.skip_missing)
        sets.pairs |= {RFW_SET.format(group): found for group, found in groups.items()}
    if options.ijb_dir is not None:
        sets.templates.append(read_ijb(existing_folder(options.ijb_dir, "ijb_dir")))
    return sets


def list_models(options: TestSettings, backbone_cfg: DictConfig | None, taken: list[str]) -> list[Model]:
    """The rows to measure; networks are loaded when their turn comes. UserError for files that are not there and for
    names that stand twice, `taken` ones among them."""
    alone = options.checkpoint is None and backbone_cfg is None and options.baseline is not None
    checkpoints = options.checkpoint if isinstance(options.checkpoint, list) else [options.checkpoint]
    checkpoints = [] if alone else checkpoints
    names = options.name if isinstance(options.name, list) else [options.name]
    names = [None] * len(checkpoints) if options.name is None else names
    if any(isinstance(name, dict | list) for name in names):
        raise UserError(f"name: {options.name}; a text, or a list of texts, is wanted")
    if len(names) != len(checkpoints):
        raise UserError(f"name: {options.name}; {len(checkpoints)} names are wanted, one a checkpoint")
    if backbone_cfg is not None and None not in checkpoints:
        raise UserError(f"backbone: {checkpoints[0]} shows which network it is; leave backbone= out")
    models = []
    for checkpoint, name in zip(checkpoints, names, strict=True):
        if checkpoint is not None:
            existing_file(checkpoint, "checkpoint", "null measures random weights")
        elif backbone_cfg is None:
            raise UserError("backbone: not set; say which network gets random weights, as in backbone=ir_50")
        load = partial(load_model, checkpoint, backbone_cfg, options.seed, options.channel_order)
        facts = {"checkpoint": checkpoint, "channel_order": options.channel_order, "precision": options.precision}
        models.append(Model(default_name(checkpoint) if name in (None, "") else str(name), load, options.flip, facts))
    if options.baseline is not None:
        models += baseline_models(options)
    seen = list(taken)
    for model in models:
        if model.name in seen:
            raise UserError(f"name: two rows are called {model.name!r}; give name=[...], one a checkpoint")
        seen.append(model.name)
    if not models:
        raise UserError("checkpoint: the list is empty; give a file")
    return models


def baseline_models(options: TestSettings) -> list[Model]:
    """The rows of eigenfaces, computed when the first of them is measured."""
    own = options.eigenfaces
    images, chosen = read_faces(options.baseline_root, own)
    fitted = cache(lambda: fit_rows(images, chosen, own, options.seed))
    described = f"{own.colour}, {own.components} components"

    def row(kind: str) -> Callable[[], nn.Module]:
        return lambda: fitted()[kind]

    facts = {"checkpoint": None, "baseline_root": options.baseline_root, "eigenfaces": asdict(own)}
    return [Model(f"eigenfaces, {kind} ({described})", row(kind), False, facts) for kind in ("plain", "whitened")]


def load_model(
    checkpoint: str | None, backbone_cfg: DictConfig | None, seed: int, channel_order: str | None = None
) -> nn.Module:
    """The network to measure: from a file, whose network is recognised, or `backbone_cfg` with random weights.

    It takes RGB; where it was trained on BGR, by `channel_order` or the file, the channels are turned for it. Raises
    UserError where the file says another order than `channel_order`.
    """
    if checkpoint is None:
        torch.manual_seed(seed_for(seed, "weights"))
        network, order = instantiate(backbone_cfg, "backbone"), channel_order
    elif Path(checkpoint).suffix == ".onnx":
        return onnx_embedder(checkpoint, channel_order=channel_order or "RGB").network
    else:
        file = open_network_file(checkpoint)
        network, order = backbone_of(file), channel_order or file.channel_order
        if file.channel_order is not None and order != file.channel_order:
            raise UserError(f"channel_order: {order}, but {checkpoint} says {file.channel_order}; leave it out")
    return (InputAdapter(network, "BGR") if order == "BGR" else network).eval()


def default_name(checkpoint: str | None) -> str:
    """`untrained`, or the run folder of the checkpoint (its file name, where it has a telling one)."""
    if checkpoint is None:
        return "untrained"
    path = Path(checkpoint)
    return path.resolve().parent.name if path.name == "backbone.safetensors" else path.stem


if __name__ == "__main__":
    main()
