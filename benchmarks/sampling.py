"""The two-stage sampler against the published procedure on the same weights: `python -m benchmarks.sampling`.

Baseline, written out below: one batch through all steps, both branches for every sample at every step, each in a pass
of its own; attention logits computed once for the layer's output and once more to be kept; the maps of all layers of
both passes kept until the step ends; contexts embedded at every step; fp32, NCHW. Against it diffusion.engine, in fp32
(high: by three products of bf16 for one), compiled, in bf16, and with 20 steps of DPM-Solver++(2M); it goes on with the
next image where one ends.

Weights are random, so that no layout ever settles by itself; each sample gets a threshold of its own, chosen from a
pass without switches, with which the switches are spread evenly over stage 1. Each variant runs in a process of its
own, so that peak memory is its own: above the weights as they are loaded. What a compiled network packs a second time,
or what Winograd's transformed filters take more, is counted.

    python -m benchmarks.sampling                             # the published network, 216 M weights, batch 8
    python -m benchmarks.sampling --size demo                 # make demo's network
    python -m benchmarks.sampling --variants fp32 --images 8  # sooner

Legend: B batch, R rows of a pass, N = h * w queries, T context tokens, C D their widths, S side of h.
"""

import argparse
import gc
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.engine import Engine, Start
from diffusion.rules import rescaled_threshold
from diffusion.samplers import TwoStage
from diffusion.schedule import NoiseSchedule
from models.cpu import split_products
from models.cpu.products import use_products
from models.diffusion.attention import Attention, CrossAttentionBlock, Projection
from models.diffusion.blocks import Downsample, Upsample
from models.diffusion.unet import ConditionalUNet
from utils.errors import UserError

NUM_STEPS, MIN_T, SCALE = 50, 500, 1.0
SIZES: dict[str, dict[str, Any]] = {
    "published": {"latent": (3, 32, 32), "batch": 8, "model": {}},
    "demo": {
        "latent": (3, 8, 8),
        "batch": 8,
        "model": {
            "initial_channels": 64,
            "channel_multipliers": [1, 1],
            "is_attention": [False, True],
            "n_blocks_per_resolution": 1,
            "context_channels": 32,
        },
    },
}
FAST = {"solver": "dpm_solver_2m", "num_steps": 20}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "fp32": {"precision": "fp32", "products": "winograd"},
    "fp32-16-rows": {"precision": "fp32", "products": "winograd", "compute_batch": 16},
    "fp32-20-steps": {"precision": "fp32", "products": "winograd", **FAST},
    "fp32-high": {"precision": "fp32", "products": "split"},
    "fp32-high-16-rows": {"precision": "fp32", "products": "split", "compute_batch": 16},
    "fp32-high-20-steps": {"precision": "fp32", "products": "split", **FAST},
    "fp32-direct": {"precision": "fp32"},
    "fp32-direct-compiled": {"precision": "fp32", "compile": True},
    "bf16": {"precision": "bf16"},
    "bf16-20-steps": {"precision": "bf16", **FAST},
    "bf16-16-rows": {"precision": "bf16", "compute_batch": 16},
    "bf16-16-rows-20-steps": {"precision": "bf16", "compute_batch": 16, **FAST},
    "bf16-compiled": {"precision": "bf16", "compile": True},
    "bf16-20-steps-compiled": {"precision": "bf16", "compile": True, **FAST},
}


def build(size: dict[str, Any]) -> ConditionalUNet:
    """The same random network for every variant; the layers that begin at zero are drawn, too."""
    torch.manual_seed(0)
    unet = ConditionalUNet(learn_empty_context=True, **size["model"]).eval().requires_grad_(False)
    for parameter in unet.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return unet


def inputs(size: dict[str, Any], images: int) -> tuple[Tensor, Tensor]:
    """Noise (images, C, h, w) and contexts (images, D) as sample.py feeds them: unit vectors times sqrt(D)."""
    generator = torch.Generator().manual_seed(1)
    x_T = torch.randn(images, *size["latent"], generator=generator)
    context = torch.randn(images, 512, generator=generator)
    return x_T, F.normalize(context) * 512**0.5


# ---------------------------------------------------------------------------------------------- published procedure


Maps = list[Tensor | None]  # of all attention layers in order of execution, (B, heads, queries, keys); None: no map


def attend(
    attention: Attention, x: Tensor, tokens: Tensor, injected: Tensor | None, blends: bool
) -> tuple[Tensor, Tensor]:
    """x (B, C, N) to tokens (B, D, keys): what comes out, and the map, for which the logits are computed again."""

    def conv(layer: Projection, x: Tensor) -> Tensor:
        return F.conv1d(x, layer.weight, layer.bias)

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(1, (attention.heads, -1)).transpose(2, 3)  # (B, heads, N or keys, d)

    q, k, v = heads(conv(attention.to_q, x)), heads(conv(attention.to_k, tokens)), heads(conv(attention.to_v, tokens))
    scale = q.shape[-1] ** -0.25

    def logits() -> Tensor:
        return (q * scale) @ (k * scale).transpose(-1, -2)

    attention_map = logits()
    if injected is not None and not blends:
        attention_map = injected
    elif injected is not None:
        mean, std = attention_map.mean(-1, keepdim=True), attention_map.std(-1, keepdim=True)
        other_mean, other_std = injected.mean(-1, keepdim=True), injected.std(-1, keepdim=True)
        attention_map = (attention_map - mean) / std * (other_std + std) / 2 + (other_mean + mean) / 2
    out = conv(attention.proj_out, (attention_map.softmax(-1) @ v).transpose(2, 3).flatten(1, 2))  # (B, C, N)
    return out, attention_map if injected is not None else logits()


def attention_block(block: CrossAttentionBlock, x: Tensor, embedding: Tensor, injected: Maps, kept: Maps) -> Tensor:
    tokens = block.c_proj_in(embedding).unflatten(-1, (block.context_channels, block.num_tokens))
    tokens = block.c_norm(tokens)  # (B, D, T)
    side = x.shape[-2:]

    def normed(h: Tensor) -> Tensor:
        return block.x_norm(h).flatten(2)  # (B, C, N)

    h = block.x_proj_in(x)
    self_map, cross_map = (injected[len(kept)], injected[len(kept) + 1]) if injected else (None, None)
    out, used = attend(block.self_attention, normed(h), normed(h), self_map, blends=False)
    kept.append(used)
    h = h + out.unflatten(-1, side)
    out, used = attend(block.cross_attention, normed(h), tokens, cross_map, blends=True)
    kept.append(used)
    h = h + out.unflatten(-1, side)
    out = block.ff(normed(h).transpose(1, 2)).transpose(1, 2)
    return x + block.x_proj_out(h + out.unflatten(-1, side))


def published_pass(
    unet: ConditionalUNet, x: Tensor, t: int, context: Tensor | None, injected: Maps
) -> tuple[Tensor, Maps]:
    """eps and all maps of one pass; `injected`: maps that take the place of the pass's own, none where empty."""
    time_embedding = unet.time_emb(torch.full((len(x),), t))
    embedding = unet.embed_context(context, len(x))
    kept: Maps = []

    def residual(block: Any, h: Tensor) -> Tensor:
        return block(h, block.time_terms(time_embedding), None)

    def stage(module: Any, h: Tensor) -> Tensor:
        h = residual(module.res, h)
        return h if module.attn is None else attention_block(module.attn, h, embedding, injected, kept)

    h = unet.image_proj(x)
    skips = [h]
    for module in unet.down:
        h = module(h) if isinstance(module, Downsample) else stage(module, h)
        skips.append(h)
    h = residual(unet.middle.res1, h)
    h = attention_block(unet.middle.attn, h, embedding, injected, kept)
    h = residual(unet.middle.res2, h)
    for module in unet.up:
        h = module(h) if isinstance(module, Upsample) else stage(module, torch.cat([h, skips.pop()], dim=1))
    return unet.final(F.silu(unet.norm(h))), kept


def aggregated(cross_maps: Maps, side: int) -> Tensor:
    """h (B, S, S) of the cross-attention maps of all layers."""
    layers = []
    for logits in cross_maps:
        attended = logits.softmax(dim=-2).mean(dim=(1, 3))
        attended = attended / attended.amax(dim=1, keepdim=True)
        resolution = round(attended.shape[1] ** 0.5)
        image = attended.view(-1, 1, resolution, resolution)
        layers.append(F.interpolate(image, size=(32, 32), mode="bilinear", align_corners=False).clamp(0, 1)[:, 0])
    h = torch.stack(layers).mean(dim=0)
    low, high = h.amin(dim=(1, 2), keepdim=True), h.amax(dim=(1, 2), keepdim=True)
    return (h - low) / (high - low)


@torch.no_grad()
def published_procedure(
    unet: ConditionalUNet, x_t: Tensor, context: Tensor, schedule: NoiseSchedule, num_steps: int, thresholds: Tensor
) -> tuple[Tensor, int]:
    """x_0 and the number of evaluated rows: both branches for every sample at every step."""
    timesteps = list(range(0, schedule.num_timesteps, schedule.num_timesteps // num_steps))[::-1]
    switched, h, rows = torch.zeros(len(x_t), dtype=torch.bool), None, 0
    for i, t in enumerate(timesteps):
        eps_empty, maps_empty = published_pass(unet, x_t, t, None, [])
        rows += 2 * len(x_t)
        if t >= MIN_T:
            injected = [one if k % 2 == 0 else None for k, one in enumerate(maps_empty)]
            eps_id, maps_id = published_pass(unet, x_t, t, context, injected)
            eps = torch.where(switched[:, None, None, None], eps_id, eps_empty)
            chosen = [
                torch.where(switched[:, None, None, None], a, b)
                for a, b in zip(maps_id[1::2], maps_empty[1::2], strict=True)
            ]
            h_before, h = h, aggregated(chosen, x_t.shape[-1])
            if h_before is not None:
                switched = switched | ((h - h_before).abs().mean(dim=(1, 2)) < thresholds)
        else:
            eps_id, maps_id = published_pass(unet, x_t, t, context, maps_empty)
            eps = (1 + SCALE) * eps_id - SCALE * eps_empty
        alpha_bar = schedule.alpha_bar(t)
        alpha_bar_next = schedule.alpha_bar(timesteps[i + 1] if i + 1 < len(timesteps) else -1)
        x_0 = (x_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        x_t = alpha_bar_next**0.5 * x_0 + (1 - alpha_bar_next) ** 0.5 * eps
    return x_t, rows


# ------------------------------------------------------------------------------------------------------- measurement


@torch.no_grad()
def spread_thresholds(unet: ConditionalUNet, x_T: Tensor, context: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Thresholds (B,) at NUM_STEPS with which the switches are spread evenly over stage 1, in groups of eight samples.

    From d of a run without switches, up to the end of stage 1: until its switch a sample runs the same at every
    threshold. A sample switches at the step nearest to the wanted one whose d is lower than all before.
    """
    rule, solver = TwoStage(num_steps=NUM_STEPS, threshold=0.0, min_t=MIN_T).parts(schedule)
    solver.timesteps = [t for t in solver.timesteps if t >= MIN_T]
    starts = [Start(i, x_T[i], context[i]) for i in range(len(x_T))]
    recorded = {
        s.start.key: torch.tensor(s.progress.d) for s in Engine(unet, rule, solver, compute_batch=8).run(starts)
    }
    thresholds = []
    for i in range(len(x_T)):
        series = recorded[i]
        lowest = [k for k in range(len(series)) if k == 0 or series[k] < series[:k].min()]
        wanted = (i % 8 + 0.5) / 8 * len(series)
        step = min(lowest, key=lambda k: abs(k - wanted))
        before = series[:step].min() if step else 2 * series[0]
        thresholds.append((series[step] + before) / 2)
    return torch.stack(thresholds)


class PeakMemory:
    """Highest resident memory in MiB since `reset`, looked at every 20 ms."""

    def __init__(self) -> None:
        self.peak = self.now()
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def now() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    def reset(self) -> None:
        self.peak = self.now()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.02)


def run_published(unet: ConditionalUNet, size: dict[str, Any], thresholds: Tensor) -> dict[str, Any]:
    """One batch."""
    x_T, context = inputs(size, len(thresholds))
    batch = size["batch"]
    memory = PeakMemory()
    weights = memory.now()
    began = time.perf_counter()
    x_0, rows = published_procedure(unet, x_T[:batch], context[:batch], NoiseSchedule(), NUM_STEPS, thresholds[:batch])
    seconds = time.perf_counter() - began
    return {
        "x_0": x_0,
        "images": batch,
        "seconds": seconds,
        "rows": rows,
        "memory": memory.peak - weights,
        "compile": 0.0,
    }


def run_ours(
    unet: ConditionalUNet, size: dict[str, Any], thresholds: Tensor, variant: dict[str, Any]
) -> dict[str, Any]:
    """All images, one after the other through the engine."""
    variant = dict(variant)
    precision, compiled = variant.pop("precision"), variant.pop("compile", False)
    products, compute_batch = variant.pop("products", "unfolded"), variant.pop("compute_batch", size["batch"])
    num_steps = variant.get("num_steps", NUM_STEPS)
    rule, solver = TwoStage(**{"num_steps": NUM_STEPS, "min_t": MIN_T, "guidance_scale": SCALE, **variant}).parts(
        NoiseSchedule()
    )
    x_T, context = inputs(size, len(thresholds))
    own = [rescaled_threshold(threshold, NUM_STEPS, num_steps) for threshold in thresholds.tolist()]  # 1 / stride
    starts = [Start(i, x_T[i], context[i], threshold=own[i]) for i in range(len(x_T))]
    gc.collect()
    memory = PeakMemory()
    weights = memory.now()
    use_products(unet, products, keep=unet.time_layers())
    engine = Engine(unet, rule, solver, compute_batch=compute_batch, precision=precision, compile=compiled)
    gc.collect()
    memory.reset()  # what making them took is over

    def feed() -> Iterator[Start]:
        for start in starts:
            if engine.counts.compile_seconds and not watched:
                watched.append(True)
                memory.reset()  # what compiling itself takes is over
            yield start

    watched: list[bool] = []
    began = time.perf_counter()
    drawn = sorted(engine.run(feed()), key=lambda sample: sample.start.key)
    seconds = time.perf_counter() - began - engine.counts.compile_seconds
    if compiled:  # the pass that compiled is not counted, nor is its time
        seconds *= engine.counts.passes / (engine.counts.passes - 1)
    return {
        "x_0": torch.stack([sample.x_t for sample in drawn]),
        "images": len(drawn),
        "seconds": seconds,
        "rows": engine.counts.rows,
        "padding": engine.counts.padding,
        "memory": memory.peak - weights,
        "compile": engine.counts.compile_seconds,
    }


def measure(variant: str, folder: Path, size_name: str, images: int, threads: int) -> None:
    """One variant, or the thresholds of all, in this process."""
    torch.set_num_threads(threads)
    size = SIZES[size_name]
    unet = build(size)
    if variant == "thresholds":
        torch.save(spread_thresholds(unet, *inputs(size, images), NoiseSchedule()), folder / "thresholds.pt")
        return
    thresholds = torch.load(folder / "thresholds.pt", weights_only=True)
    if variant == "published":
        result = run_published(unet, size, thresholds)
    else:
        result = run_ours(unet, size, thresholds, VARIANTS[variant])
    torch.save(result, folder / f"{variant}.pt")


def processor() -> str:
    """The machine's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: the variants with their ratios to the baseline."""
    base = results["published"]
    base_rate = base["images"] / base["seconds"]
    lines = [
        "| variant | images/s | ratio | rows an image | padding | peak MiB above weights | ratio | error of x_0, "
        "median | worst | compiling, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        rate = r["images"] / r["seconds"]
        told = ["", ""]
        if "20-steps" not in name and name != "published":
            wanted = base["x_0"].flatten(1)
            errors = (r["x_0"][: len(wanted)].flatten(1) - wanted).norm(dim=1) / wanted.norm(dim=1)
            told = [f"{errors.median():.1e}", f"{errors.max():.1e}"]
        padding = r.get("padding", 0) / (r["rows"] + r.get("padding", 0))
        lines.append(
            f"| {name} | {rate:.4g} | {rate / base_rate:.2f} | {r['rows'] / r['images']:.1f} | {100 * padding:.0f} % | "
            f"{r['memory']:.0f} | {r['memory'] / base['memory']:.2f} | {told[0]} | {told[1]} | {r['compile']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="published")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--images", type=int, default=24, help="that the engine draws; the baseline draws one batch of 8"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the measuring processes
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.images < SIZES[args.size]["batch"]:
        parser.error(f"--images: at least {SIZES[args.size]['batch']}, the baseline's batch")
    if args.folder is not None:
        measure(args.measure, args.folder, args.size, args.images, args.threads)
        return
    variants = ["published", *(name for name in args.variants if name != "published")]
    if any(VARIANTS[name].get("products") == "split" for name in variants):
        try:
            split_products.library()
        except UserError as error:
            skipped = [name for name in variants if VARIANTS[name].get("products") == "split"]
            print(f"{', '.join(skipped)}: left out, {error}")
            variants = [name for name in variants if name not in skipped]
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("DEFAULT", "AVX2") and (skipped := [name for name in variants if "bf16" in name]):
        print(f"{', '.join(skipped)}: left out, this CPU ({capability}) only emulates bf16")
        variants = [name for name in variants if name not in skipped]
    print(
        f"{args.size}: batch {SIZES[args.size]['batch']}, {NUM_STEPS} steps, {args.threads} threads of {processor()} "
        f"({capability}), torch {torch.__version__}"
    )
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for variant in ["thresholds", *variants]:
            command = [sys.executable, "-m", "benchmarks.sampling", "--folder", str(folder), "--measure", variant]
            command += ["--size", args.size, "--images", str(args.images), "--threads", str(args.threads)]
            subprocess.run(command, check=True)
            if variant != "thresholds":
                results[variant] = torch.load(folder / f"{variant}.pt", weights_only=True)
    print(table(results))


if __name__ == "__main__":
    main()
