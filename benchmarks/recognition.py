"""A recogniser's training step and its loader against the plain procedure: `python -m benchmarks.recognition`.

Baseline (benchmarks.plain_recognition): the training of TFace written plainly. Against it the real loop of this project
(recognition.training_loop.train) and its loader (recognition.datasets.load_batches).
Step: both see the same images in memory and must agree in the loss (no dropout, whose mask goes by the memory layout,
and a small rate, so that rounding does not grow); the loop also converts pixels, watches the gradient and logs.
Loader: from files to float32 batches, with UIFace's augmentation. Each variant runs in a process of its own, so that
peak memory is its own.

    python -m benchmarks.recognition                                   # IR-50, batch 16, 10,000 identities
    python -m benchmarks.recognition --size small --parts step         # IR-18 with a quarter of its channels
    python -m benchmarks.recognition --variants bf16 --steps 6         # named, it runs where it is only emulated too
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.plain_recognition import PlainDataset, PlainTrainer
from recognition.augment import Augmentation
from recognition.backbones import build_backbone
from recognition.datasets import IdentityDataset, StepBatches, load_batches, read_training_set
from recognition.heads import ArcFace
from recognition.lr_schedules import LRSchedule
from recognition.training_loop import train
from recognition.training_settings import TrainingSettings
from utils.data.rendered.dataset import render_dataset
from utils.images import default_threads, read_image, to_float, write_image

SIDE = 112
IMAGES_PER_IDENTITY = 8
NOISE = 4.0  # levels, standard deviation: rendered faces are smoother than photographs, and quicker to decode
WARM_UP = 2  # steps that are not counted (4 of the compiled ones, whose compilation they hold)
SGD = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}
SIZES: dict[str, dict[str, Any]] = {
    "published": {"name": "ir_50"},
    "small": {"name": "ir_18", "width": 0.25},
}
STEPS: dict[str, dict[str, Any] | None] = {
    "plain": None,  # the baseline
    "fp32": {},
    "fp32-channels-last": {"channels_last": True},
    "fp32-compiled": {"channels_last": True, "compile": True},
    "bf16": {"precision": "bf16", "channels_last": True},
    "bf16-compiled": {"precision": "bf16", "channels_last": True, "compile": True},
}
LOADERS = {f"{kind} {suffix}": (kind, suffix) for suffix in ("png", "jpg") for kind in ("plain", "files")}
LOADERS["cached"] = ("cached", "png")  # dataset.cache_in_memory


def prepare(folder: Path, images: int) -> None:
    """Rendered faces with noise, as PNG and as JPEG of quality 95, in class folders."""
    render_dataset(folder / "rendered", -(-images // IMAGES_PER_IDENTITY), IMAGES_PER_IDENTITY, size=SIDE, seed=0)
    rng = np.random.default_rng(0)
    for path in sorted((folder / "rendered").rglob("*.png")):
        pixels = read_image(path)
        noisy = np.clip(np.rint(pixels + rng.normal(0, NOISE, pixels.shape)), 0, 255).astype(np.uint8)
        for suffix in ("png", "jpg"):
            write_image(folder / suffix / path.parent.name / f"{path.stem}.{suffix}", noisy)
    shutil.rmtree(folder / "rendered")


def dataset(folder: Path, suffix: str, augment: Augmentation, *, cached: bool) -> IdentityDataset:
    source = read_training_set(folder / suffix)
    return IdentityDataset(source, size=SIDE, augment=augment, seed=0, cache_in_memory=cached)


def run_step(folder: Path, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and loss of each training step."""
    torch.manual_seed(0)
    backbone = build_backbone(**SIZES[args.size], dropout=0.0)
    head = ArcFace(backbone.num_features, args.classes)
    data = dataset(folder, "png", Augmentation(flip=0.0), cached=True)
    if STEPS[variant] is None:
        order = StepBatches(len(data), batch_size=args.batch, first_step=0, last_step=args.steps, seed=0)
        # Ready in memory: the plain step is not charged for its loader
        batches = [(to_float(pixels), labels) for pixels, labels in load_batches(data, order, num_workers=0)]
        trainer = PlainTrainer(backbone, head.weight.detach(), **SGD)
        seconds, losses = [], []
        for images, labels in batches:
            began = time.perf_counter()
            losses.append(trainer.step(images, labels))
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds, "losses": losses}

    output_dir = folder / "run"
    settings = TrainingSettings(
        epochs=1,
        steps_per_epoch=args.steps,
        batch_size=args.batch,
        num_workers=0,
        device="cpu",
        steps_between_logging=1,
        steps_between_checkpoints=10**9,
        **STEPS[variant],
    )
    optimizer = partial(torch.optim.SGD, fused=True, **SGD)
    output_dir.mkdir()
    train(backbone, head, data, optimizer, LRSchedule(), settings, output_dir, {})
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(output_dir)
    return {
        "seconds": [args.batch / line["images_per_second"] for line in lines],
        "losses": [line["loss"] for line in lines],
    }


def run_loader(folder: Path, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each float32 batch, from the third on: by then the workers have started."""
    kind, suffix = LOADERS[variant]
    data = dataset(folder, suffix, Augmentation(0.5, crop=0.2, low_resolution=0.2, photometric=0.2), cached=False)
    steps = args.passes * (len(data) // args.loader_batch)
    if kind == "plain":
        files = [folder / suffix / name for name in data.source.images.names] * args.passes
        labels = data.source.labels.tolist() * args.passes
        loader: Iterator = iter(
            DataLoader(
                PlainDataset(files, labels),
                batch_size=args.loader_batch,
                shuffle=True,
                num_workers=args.workers,
                drop_last=True,
            )
        )
    else:
        if kind == "cached":
            data = dataset(folder, suffix, data.augment, cached=True)
        order = StepBatches(len(data), batch_size=args.loader_batch, first_step=0, last_step=steps, seed=0)
        made = load_batches(data, order, num_workers=args.workers)
        loader = ((to_float(pixels, torch.channels_last), labels) for pixels, labels in made)
    ticks = [time.perf_counter() for _ in loader]
    # The queues of the workers are full when the clock starts, and empty at the end: an honest rate leaves both out
    ahead = 4 * max(args.workers, 1)
    return {"seconds": np.diff(ticks[WARM_UP : -ahead if len(ticks) > 2 * ahead + WARM_UP else None]).tolist()}


def measure(folder: Path, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process."""
    if variant in STEPS:
        torch.set_num_threads(args.threads)
        result = run_step(folder, variant, args)
        seconds = float(np.median(result["seconds"][4 if "compiled" in variant else WARM_UP :]))
        rate = args.batch / seconds
    else:
        torch.set_num_threads(1)  # OpenMP's threads spin between two batches, on the processors of the workers
        result = run_loader(folder, variant, args)
        rate = args.loader_batch / float(np.mean(result["seconds"]))  # batches come in bursts: the mean, no median
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**result, "images_per_second": rate, "peak_gib": peak}


def step_table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: training steps with their ratios to the baseline."""
    base = results["plain"]
    lines = ["| step | images/s | ratio | peak GiB | mean loss | off the baseline by |", "| --- " * 6 + "|"]
    for name, r in results.items():
        loss, reference = np.mean(r["losses"]), np.mean(base["losses"])
        lines.append(
            f"| {name} | {r['images_per_second']:.2f} | {r['images_per_second'] / base['images_per_second']:.2f} | "
            f"{r['peak_gib']:.2f} | {loss:.4f} | {100 * abs(loss / reference - 1):.3f} % |"
        )
    return "\n".join(lines)


def loader_table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: loaders with their ratios to the plain one that reads the same files."""
    lines = ["| loader | images/s | ratio | peak GiB |", "| --- " * 4 + "|"]
    for name, r in results.items():
        base = results[f"plain {LOADERS[name][1]}"]["images_per_second"]
        rate = r["images_per_second"]
        lines.append(f"| {name} | {rate:.0f} | {rate / base:.2f} | {r['peak_gib']:.2f} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("step", "loader"), default=["step", "loader"])
    parser.add_argument("--size", choices=SIZES, default="published")
    parser.add_argument("--variants", nargs="+", choices=STEPS, help="of the step; all that this CPU computes in")
    parser.add_argument("--batch", type=int, default=16, help="images a training step")
    parser.add_argument("--classes", type=int, default=10_000, help="identities that the classifier tells apart")
    parser.add_argument("--steps", type=int, default=12, help="training steps of each variant")
    parser.add_argument("--images", type=int, default=512, help="files of the loader")
    parser.add_argument("--passes", type=int, default=8, help="how often the loader reads them")
    parser.add_argument("--loader-batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=default_threads())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the training step")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the measuring processes
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= 4:
        parser.error("--steps: at least 5; the first four warm up")
    if args.images < max(args.batch, args.loader_batch):
        parser.error("--images: at least one batch")
    if args.images * args.passes < 3 * args.loader_batch + WARM_UP:
        parser.error("--passes: at least three batches of the loader")
    return args


def main() -> None:
    args = parse()
    if args.folder is not None:
        result = measure(args.folder, args.one, args)
        (args.folder / "result.json").write_text(json.dumps(result))
        return
    capability = torch.backends.cpu.get_cpu_capability()
    steps = list(STEPS)
    if args.variants is not None:
        steps = ["plain", *(name for name in args.variants if name != "plain")]
    elif capability in ("DEFAULT", "AVX2"):
        steps = [name for name in steps if "bf16" not in name]
        print(f"bf16: left out, this CPU ({capability}) only emulates it; --variants bf16 measures that")
    tables = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.images)
        for part, variants, table in (("step", steps, step_table), ("loader", list(LOADERS), loader_table)):
            if part not in args.parts:
                continue
            results = {}
            for variant in variants:
                command = [sys.executable, "-m", "benchmarks.recognition", *sys.argv[1:]]
                subprocess.run([*command, "--folder", name, "--one", variant], check=True)
                results[variant] = json.loads((folder / "result.json").read_text())
            tables.append(table(results))
    network = f"{SIZES[args.size]['name']}, width {SIZES[args.size].get('width', 1)}"
    print(f"{network}, batch {args.batch}, {args.classes} identities, {args.threads} threads, {capability}")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
