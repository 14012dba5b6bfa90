"""main.py's training step against the published procedure: `python -m benchmarks.training`.

Baseline, written out below: every step sends its images through the frozen encoder, in fp32 and NCHW, then Adam as it
is by default, and an EMA that goes over the state dict entry by entry. Against it the real loop of this project
(diffusion.training_loop.train) with its cache of latents, fused Adam and foreach EMA; in fp32, in bf16 with
channels-last, and compiled. All see the same images, timesteps and noise; each runs in a process of its own, so that
peak memory is its own.

    python -m benchmarks.training                          # the published network at 128 pixels, batch 8
    python -m benchmarks.training --size demo              # make demo's network at 32 pixels, batch 32
    python -m benchmarks.training --variants published fp32 --steps 5

Legend: one step is one optimiser step of `batch` images.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from diffusion.ddpm import training_loss
from diffusion.first_stage import FirstStage, load_first_stage
from diffusion.schedule import NoiseSchedule
from diffusion.training_batches import training_batches
from diffusion.training_loop import train
from diffusion.training_settings import CheckpointSettings, TrainingSettings
from models.autoencoder.vqgan import VQModel, save_autoencoder
from models.diffusion.unet import ConditionalUNet
from utils.config import CONFIG_DIR
from utils.data.face_dataset import FaceDataset
from utils.data.latents import cached_latents
from utils.data.rendered.dataset import render_dataset
from utils.ema import EMA

WARM_UP = 2  # steps that are not counted (5 of the compiled one, whose compilation they hold)
WIDTH = 512  # of the contexts

SIZES = {
    "published": {
        "image_size": 128,
        "batch": 8,
        "autoencoder": "vq_f4",
        "model": {},
    },
    "demo": {
        "image_size": 32,
        "batch": 32,
        "autoencoder": "vq_f4_small",
        "model": {
            "initial_channels": 64,
            "channel_multipliers": [1, 1],
            "is_attention": [False, True],
            "n_blocks_per_resolution": 1,
            "context_channels": 32,
        },
    },
}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "published": None,  # the baseline
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16", "channels_last": True},
    "bf16-compiled": {"precision": "bf16", "channels_last": True, "compile": True},
}


def prepare(folder: Path, size: dict[str, Any], steps: int) -> None:
    """Render the images and write an untrained autoencoder; what they show does not matter to the time."""
    images = size["batch"] * steps
    render_dataset(folder / "faces", -(-images // 8), 8, size=size["image_size"], seed=0)
    names = sorted(path.relative_to(folder / "faces").as_posix() for path in (folder / "faces").rglob("*.png"))
    rows = np.random.default_rng(0).standard_normal((len(names), WIDTH)).astype(np.float32)
    np.savez(folder / "embeddings.npz", names=np.asarray(names), embeddings=rows)
    torch.manual_seed(0)
    described = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "autoencoder" / f"{size['autoencoder']}.yaml"))
    save_autoencoder(VQModel(**described), folder, latent_scale=1.0)


def build(folder: Path, size: dict[str, Any]) -> tuple[ConditionalUNet, FaceDataset, FirstStage]:
    """The same network, images and autoencoder for every variant."""
    torch.manual_seed(0)
    unet = ConditionalUNet(
        learn_empty_context=True,
        context_dropout_probability=0.25,
        unconditioned_probability=0.2,
        context_input_channels=WIDTH,
        **size["model"],
    )
    dataset = FaceDataset(str(folder / "faces"), size["image_size"], str(folder / "embeddings.npz"))
    encoder, decoder = folder / "vq_encoder.safetensors", folder / "vq_decoder.safetensors"
    return unet, dataset, load_first_stage(str(encoder), str(decoder), torch.device("cpu"))


def settings(size: dict[str, Any], steps: int, **changes: Any) -> TrainingSettings:
    """Of every variant: as main.py has them, with nothing but steps inside the measured time."""
    common = {"precision": "fp32", "num_workers": 2, "channels_last": False, "device": "cpu"}
    intervals = {"steps_between_logging": 1, "steps_between_sampling": None}
    return TrainingSettings(
        steps=steps,
        batch_size=size["batch"],
        checkpoint=CheckpointSettings(steps_between=10**9),
        **{**common, **intervals, **changes},
    )


def run_published(folder: Path, size: dict[str, Any], steps: int) -> dict[str, Any]:
    """The published procedure: seconds and loss of each step."""
    unet, dataset, first_stage = build(folder, size)
    schedule, cfg = NoiseSchedule(), settings(size, steps)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-4)
    averaged = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    unet.train()
    seconds, losses, waited = [], [], 0.0
    tick = asked = time.perf_counter()
    for batch in training_batches(unet, schedule, dataset, first_stage, 1.0, cfg, 0, torch.device("cpu")):
        waited += time.perf_counter() - asked  # reading and encoding
        loss = training_loss(
            unet,
            batch.x_0,
            batch.t,
            batch.noise,
            batch.context,
            schedule,
            empty_mask=batch.empty_mask,
            element_mask=batch.element_mask,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, tensor in unet.state_dict().items():
            averaged[name] = 0.9999 * averaged[name] + (1 - 0.9999) * tensor
        losses.append(loss.item())
        seconds.append(time.perf_counter() - tick)
        tick = asked = time.perf_counter()
    return {"seconds": seconds, "losses": losses, "waiting": waited / sum(seconds), "preparation": 0.0}


def run_ours(folder: Path, size: dict[str, Any], steps: int, variant: str) -> dict[str, Any]:
    """The loop of this project: seconds and loss of each step, out of its own metrics."""
    unet, dataset, first_stage = build(folder, size)
    cfg = settings(size, steps, **VARIANTS[variant])
    began = time.perf_counter()
    first_stage.latents = cached_latents(
        dataset, first_stage.encoder, folder, batch_size=16, num_workers=0, device=torch.device("cpu")
    )
    preparation = time.perf_counter() - began
    output_dir = folder / f"run_{variant}"
    output_dir.mkdir()
    train(
        unet,
        NoiseSchedule(),
        dataset,
        first_stage,
        lambda parameters: torch.optim.Adam(parameters, lr=1e-4, fused=True),
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        EMA,
        cfg,
        output_dir,
        {},
    )
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": [size["batch"] / line["images_per_second"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "waiting": float(np.mean([line["waiting_share"] for line in lines[WARM_UP:]])),
        "preparation": preparation,
    }


def measure(variant: str, folder: Path, size_name: str, steps: int, threads: int) -> dict[str, Any]:
    """One variant in this process."""
    torch.set_num_threads(threads)
    size = SIZES[size_name]
    result = run_published(folder, size, steps) if variant == "published" else run_ours(folder, size, steps, variant)
    counted = result["seconds"][5 if "compiled" in variant else WARM_UP :]
    return {
        **result,
        "images_per_second": size["batch"] / float(np.median(counted)),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: the variants with their ratios to the baseline."""
    base = results["published"]
    lines = [
        "| variant | images/s | ratio | peak GiB | waiting for data | mean loss | off the baseline by | once, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        loss, reference = np.mean(r["losses"]), np.mean(base["losses"])
        compiling = sum(r["seconds"][:5]) - 5 * np.median(r["seconds"][5:]) if "compiled" in name else 0.0
        lines.append(
            f"| {name} | {r['images_per_second']:.2f} | {r['images_per_second'] / base['images_per_second']:.2f} | "
            f"{r['peak_gib']:.2f} | {100 * r['waiting']:.1f} % | {loss:.5f} | "
            f"{100 * abs(loss / reference - 1):.3f} % | {r['preparation'] + compiling:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="published")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the measuring processes
    args = parser.parse_args()
    if args.steps <= 5:
        parser.error("--steps: at least 6; the first five warm up")
    if args.folder is not None:
        result = measure(args.variants[0], args.folder, args.size, args.steps, args.threads)
        (args.folder / "result.json").write_text(json.dumps(result))
        return
    variants = ["published", *(name for name in args.variants if name != "published")]
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("DEFAULT", "AVX2") and (skipped := [name for name in variants if "bf16" in name]):
        print(f"{', '.join(skipped)}: left out, this CPU ({capability}) only emulates bf16")
        variants = [name for name in variants if name not in skipped]
    print(f"{args.size}: batch {SIZES[args.size]['batch']}, {args.steps} steps, {args.threads} threads, {capability}")
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, SIZES[args.size], args.steps)
        for variant in variants:
            command = [sys.executable, "-m", "benchmarks.training", "--folder", str(folder), "--variants", variant]
            command += ["--size", args.size, "--steps", str(args.steps), "--threads", str(args.threads)]
            subprocess.run(command, check=True)
            results[variant] = json.loads((folder / "result.json").read_text())
    print(table(results))


if __name__ == "__main__":
    main()
