"""What a run of the recogniser's loop tells and leaves: validation, reports of epochs, the backbone, the metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from recognition.backbones import num_parameters, save_backbone
from recognition.datasets import IdentityDataset
from recognition.lr_schedules import LRSchedule
from recognition.training_state import Progress
from utils import distributed
from utils.checkpoint import read_json, write_json
from utils.guards import write_or_warn
from utils.logging import ScalarLogger, get_logger

log = get_logger(__name__)

BACKBONE_FILE, BEST_FILE, METRICS_FILE = "backbone.safetensors", "backbone_best.safetensors", "metrics.json"

# From the backbone, in eval mode, to accuracies in [0, 1] by name; called by all processes together, which may share
# the work. Their plain mean is what the best epoch, and a plateau of the rate, go by.
Validate = Callable[[nn.Module], dict[str, float]]


def validate_epoch(
    validate: Validate,
    backbone: nn.Module,
    epoch: int,
    progress: Progress,
    lr_schedule: LRSchedule,
    output_dir: Path,
    provenance: dict[str, Any],
) -> dict[str, float]:
    """The accuracies that `validate` finds after `epoch` epochs, those of rank 0 on every process.

    Tells the schedule of their mean, and keeps the backbone as `backbone_best.safetensors` where it is the best so far.
    """
    backbone.eval()
    results = distributed.broadcast_object(validate(backbone))
    backbone.train()
    mean = sum(results.values()) / len(results)
    lr_schedule.observe(epoch, mean)
    if progress.best is None or mean > progress.best["mean"]:
        progress.best = {"epoch": epoch, "mean": mean}
        if distributed.is_main():
            best = partial(save_backbone, backbone, output_dir / BEST_FILE, "RGB", provenance=provenance)
            write_or_warn("the best backbone", best)
    return results


def report_epoch(entry: dict[str, Any], scalars: ScalarLogger, step: int) -> None:
    """An epoch's numbers, an entry of the history, to the log and to TensorBoard."""
    validation = entry.get("validation", {})
    values = {f"epoch/{name}": entry[name] for name in ("loss", "accuracy") if entry[name] is not None}
    values |= {f"validation/{name}": value for name, value in validation.items()}
    write_or_warn("the log", partial(scalars.scalars, values, step))
    found = "".join(f", {name} {100 * value:.2f} %" for name, value in validation.items())
    if entry["loss"] is None:
        log.warning("epoch %d: every step was skipped, lr %g%s", entry["epoch"], entry["lr"], found)
        return
    log.info(
        "epoch %d: loss %.4f, training accuracy %.4f, lr %g%s",
        *(entry["epoch"], entry["loss"], entry["accuracy"], entry["lr"], found),
    )


def finished_metrics(progress: Progress, output_dir: Path) -> dict[str, Any] | None:
    """The metrics of a run that has left all its files; None where a kill came between the last checkpoint and them."""

    def read() -> dict[str, Any] | None:
        if not all((output_dir / name).is_file() for name in (BACKBONE_FILE, METRICS_FILE)):
            return None
        metrics = read_json(output_dir / METRICS_FILE)
        return metrics if metrics["steps"] == progress.step else None

    return distributed.on_main(read)


def leave_files(
    progress: Progress,
    backbone: nn.Module,
    dataset: IdentityDataset,
    images_per_step: int,
    output_dir: Path,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Write `backbone.safetensors` and `metrics.json` at the end of a run; the metrics."""
    metrics = {
        "identities": len(dataset.source.identities),
        "images": len(dataset),
        "parameters": num_parameters(backbone),
        "steps": progress.step,
        "loss": progress.history[-1]["loss"],
        "training_accuracy": progress.history[-1]["accuracy"],
        "skipped_steps": progress.skipped_steps,
        "seconds": progress.seconds,
        "images_per_second": progress.step * images_per_step / progress.seconds,
        "best": progress.best,
        "history": progress.history,
    }
    if distributed.is_main():
        save_backbone(backbone, output_dir / BACKBONE_FILE, "RGB", provenance=provenance)
        write_json(output_dir / METRICS_FILE, metrics)
        log.info("wrote %s", output_dir / BACKBONE_FILE)
    distributed.barrier()
    return metrics
