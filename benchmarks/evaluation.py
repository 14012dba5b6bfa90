"""The metrics of an evaluation at the size of a published data set: `python -m benchmarks.evaluation`.

Embeddings are drawn from a seed: identities in a space whose directions matter unevenly, as those of recognisers do,
some of them near one another or near a training identity, images around them, some of them copies; rows in no order.
Every measurement runs in a process of its own, so that peak memory is its own: all that is resident, the interpreter
and the set (whose size the first line of the output gives) included.

Baseline (benchmarks.plain_evaluation): whole matrices, and a mask over all images for every identity. It runs at the
full size where that is affordable; where it holds all pairs of images, at that of --small identities, and ours beside
it at the same size. Seconds of CPU are less than those on the clock where other programs run beside it; the ratio is
theirs. `all` is what an evaluation does of these, one after the other in one process.

    python -m benchmarks.evaluation                                       # 200,000 x 512, 4,000 identities
    python -m benchmarks.evaluation --identities 400 --metrics genuine c_intra  # sooner

Legend: N images, K identities, M training identities, D width, F width of features.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plain_evaluation as plain
from evaluation.metrics.duplicates import find_duplicates
from evaluation.metrics.frechet import frechet_distance, statistics_of
from evaluation.metrics.identities import (
    RADIUS,
    centre_cosines,
    identity_centres,
    intra_consistency,
    unique_identities,
)
from evaluation.metrics.leakage import leakage
from evaluation.metrics.neighbours import precision_recall
from evaluation.metrics.scores import genuine_scores, impostor_scores, score_summary

Data = dict[str, np.ndarray]
Figures = dict[str, float]
DECAY = 0.35  # the i-th direction is i^-DECAY long: impostor cosines deviate by 0.09
SPREAD = (0.4, 1.2)  # length of what tells an image from its identity, lowest and highest identity
NEAR = 0.02  # share of identities near another one, of training identities near a generated one
COPIES = 0.005  # share of images that are a copy of another
COPY_COSINE, K = 0.98, 10


def make_set(identities: int, images: int, width: int, training: int, seed: int) -> Data:
    """Unit embeddings (N, D) in no order, labels (N,), and training centres (M, D)."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, width + 1, dtype=np.float32) ** -DECAY

    def draw(count: int) -> np.ndarray:
        return _unit(rng.standard_normal((count, width), np.float32) * scale)

    centres, known = draw(identities), draw(training)
    near = max(1, int(NEAR * identities))
    centres[-near:] = _unit(centres[:near] + 0.3 * draw(near))
    shared = min(near, training)
    known[:shared] = _unit(centres[:shared] + 0.3 * draw(shared))
    labels = rng.permutation(np.repeat(np.arange(identities), images))
    lengths = rng.uniform(*SPREAD, identities).astype(np.float32)
    embeddings = np.empty((len(labels), width), np.float32)
    for start in range(0, len(labels), 16_384):
        part = labels[start : start + 16_384]
        embeddings[start : start + len(part)] = _unit(centres[part] + lengths[part, None] * draw(len(part)))
    copies = rng.choice(len(labels), (2, int(COPIES * len(labels))), replace=False)
    embeddings[copies[0]] = _unit(embeddings[copies[1]] + 0.1 * draw(copies.shape[1]))
    return {"embeddings": embeddings, "labels": labels, "training": known}


def make_features(count: int, width: int, seed: int) -> Data:
    """Features (count, F) of real images and of generated ones, which vary less."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, width + 1, dtype=np.float32) ** -0.5
    real, generated = (rng.standard_normal((count, width), np.float32) * scale for _ in range(2))
    return {"real": real, "generated": 0.9 * generated + 0.05 * scale}


def make_scores(num_genuine: int, num_impostor: int, seed: int) -> Data:
    """Cosines as those of a recogniser are spread."""
    rng = np.random.default_rng(seed)
    return {
        "genuine": 0.6 + 0.12 * rng.standard_normal(num_genuine, np.float32),
        "impostor": 0.09 * rng.standard_normal(num_impostor, np.float32),
    }


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# ---------------------------------------------------------------------------------------------------- what is measured


def ours_genuine(data: Data, args: argparse.Namespace) -> Figures:
    found = genuine_scores(data["embeddings"], data["labels"])
    return {"pairs": len(found), "mean": found.mean(dtype=np.float64)}


def ours_impostor(data: Data, args: argparse.Namespace) -> Figures:
    found = impostor_scores(data["embeddings"], data["labels"], args.impostors, args.seed)
    return {"pairs": len(found), "std": found.std(dtype=np.float64)}


def ours_rates(data: Data, args: argparse.Namespace) -> Figures:
    found = score_summary(data["genuine"], data["impostor"]).metrics()
    return {key: found[key] for key in ("eer", "fmr100", "fmr1000", "fdr")}


def ours_c_intra(data: Data, args: argparse.Namespace) -> Figures:
    centres = identity_centres(data["embeddings"], data["labels"])
    cosines = centre_cosines(data["embeddings"], data["labels"], centres)
    return {"c_intra": intra_consistency(cosines, data["labels"], RADIUS).c_intra}


def ours_u_class(data: Data, args: argparse.Namespace) -> Figures:
    return {"u_class": unique_identities(data["centres"], RADIUS)[0]}


def ours_leakage(data: Data, args: argparse.Namespace) -> Figures:
    found = leakage(data["centres"], data["training"]).metrics()
    return {"mean": found["leakage_mean"], "highest": found["leakage_max"], "real": found["leakage_real_mean"]}


def ours_duplicates(data: Data, args: argparse.Namespace) -> Figures:
    found = find_duplicates(data["embeddings"], data["labels"], COPY_COSINE).metrics()
    return {"within": found["duplicates_within"], "across": found["duplicates_across"]}


def ours_precision_recall(data: Data, args: argparse.Namespace) -> Figures:
    return precision_recall(data["real"], data["generated"], K).metrics()


def ours_fid(data: Data, args: argparse.Namespace) -> Figures:
    return {"fid": frechet_distance(statistics_of(data["real"]), statistics_of(data["generated"]))}


def ours_all(data: Data, args: argparse.Namespace) -> Figures:
    genuine = genuine_scores(data["embeddings"], data["labels"])
    impostor = impostor_scores(data["embeddings"], data["labels"], args.impostors, args.seed)
    found = score_summary(genuine, impostor).metrics()
    figures = {key: found[key] for key in ("num_genuine", "num_impostor", "eer", "fmr100", "fmr1000", "fdr")}
    centres = identity_centres(data["embeddings"], data["labels"])
    cosines = centre_cosines(data["embeddings"], data["labels"], centres)
    figures["c_intra"] = intra_consistency(cosines, data["labels"], RADIUS).c_intra
    figures["u_class"] = unique_identities(centres, RADIUS)[0]
    leaks = leakage(centres, data["training"]).metrics()
    return figures | {key: leaks[key] for key in ("leakage_mean", "leakage_max", "leakage_share")}


Measured = Callable[[Data, argparse.Namespace], Figures]
OURS: dict[str, Measured] = {
    "genuine": ours_genuine,
    "impostor": ours_impostor,
    "rates": ours_rates,
    "c_intra": ours_c_intra,
    "u_class": ours_u_class,
    "leakage": ours_leakage,
    "duplicates": ours_duplicates,
    "precision_recall": ours_precision_recall,
    "fid": ours_fid,
    "all": ours_all,
}
PLAIN: dict[str, Measured] = {
    "genuine": lambda data, args: plain.genuine(data["embeddings"], data["labels"]),
    "impostor": lambda data, args: plain.impostor(data["embeddings"], data["labels"], args.impostors, args.seed),
    "rates": lambda data, args: plain.rates(data["genuine"], data["impostor"]),
    "c_intra": lambda data, args: plain.c_intra(data["embeddings"], data["labels"], RADIUS),
    "u_class": lambda data, args: plain.u_class(data["centres"], RADIUS),
    "leakage": lambda data, args: plain.leakage(data["centres"], data["training"]),
    "duplicates": lambda data, args: plain.duplicates(data["embeddings"], data["labels"], COPY_COSINE),
    "precision_recall": lambda data, args: plain.precision_recall(data["real"], data["generated"], K),
    "fid": lambda data, args: plain.fid(data["real"], data["generated"]),
}
QUADRATIC = ("impostor", "duplicates")  # the baseline holds all pairs of images
ON_FEATURES = ("precision_recall", "fid")


def load(metric: str, size: str, folder: Path, args: argparse.Namespace) -> Data:
    """What a metric works on, before the clock starts."""
    if metric in ON_FEATURES:
        return make_features(args.features, args.feature_width, args.seed)
    if metric == "rates":
        return make_scores(args.identities * args.images * (args.images - 1) // 2, args.impostors, args.seed)
    data = {path.stem: np.load(path) for path in (folder / size).glob("*.npy")}
    if metric in ("u_class", "leakage"):
        data["centres"] = identity_centres(data.pop("embeddings"), data.pop("labels"))
    return data


def measure(job: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Of a job `implementation/size/metric`: seconds, those on a CPU (of all threads), peak MiB, the figures found."""
    implementation, size, metric = job.split("/")
    data = load(metric, size, folder, args)
    start, start_cpu = time.perf_counter(), time.process_time()
    figures = {"ours": OURS, "plain": PLAIN}[implementation][metric](data, args)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    figures = {key: float(value) for key, value in figures.items()}
    return {"seconds": seconds, "cpu": cpu, "mib": int(peak.split()[1]) / 1024, "figures": figures}


def build(folder: Path, args: argparse.Namespace) -> None:
    """Write the two sets, `full` and `small`."""
    for size, identities in (("full", args.identities), ("small", args.small)):
        (folder / size).mkdir()
        for name, array in make_set(identities, args.images, args.width, args.training, args.seed).items():
            np.save(folder / size / f"{name}.npy", array)


# ------------------------------------------------------------------------------------------------------------ the table


def difference(ours: Figures, others: Figures) -> float:
    """The largest relative difference of two results' figures."""
    return max(abs(ours[key] - others[key]) / max(abs(others[key]), 1e-12) for key in others)


def table(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """Markdown: every metric at full size, and beside the baseline at the size of that."""
    lines = [
        "| metric | seconds | CPU s | peak MiB | compared at | CPU s, ours : plain | ratio | peak MiB, ours : plain | "
        "figures differ by |",
        "| --- " * 9 + "|",
    ]
    for metric in args.metrics:
        full = results[f"ours/full/{metric}"]
        line = f"| {metric} | {full['seconds']:.2f} | {full['cpu']:.2f} | {full['mib']:.0f} | "
        if metric not in PLAIN:
            lines.append(line + "| | | | |")
            continue
        size = "small" if metric in QUADRATIC else "full"
        ours, base = results[f"ours/{size}/{metric}"], results[f"plain/{size}/{metric}"]
        compared = f"{args.small * args.images:,} images" if size == "small" else "full size"
        if metric in ON_FEATURES:
            compared = f"{args.features:,} x {args.feature_width:,}, twice"
        lines.append(
            f"{line}{compared} | {ours['cpu']:.2f} : {base['cpu']:.2f} | {base['cpu'] / ours['cpu']:.1f} | "
            f"{ours['mib']:.0f} : {base['mib']:.0f} | {100 * difference(ours['figures'], base['figures']):.2g} % |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--identities", type=int, default=4000)
    parser.add_argument("--images", type=int, default=50, help="of an identity")
    parser.add_argument("--width", type=int, default=512, help="of an embedding")
    parser.add_argument("--training", type=int, default=10_000, help="training identities that leakage looks at")
    parser.add_argument("--impostors", type=int, default=10_000_000, help="impostor pairs that are drawn")
    parser.add_argument(
        "--small", type=int, default=200, help="identities where the baseline holds all pairs of images"
    )
    parser.add_argument(
        "--features", type=int, default=4000, help="real and generated images of precision, recall, FID"
    )
    parser.add_argument(
        "--feature-width", type=int, default=1024, help="2048 is Inception's; scipy's root takes minutes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--metrics", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the measuring processes
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if min(args.identities, args.images, args.training, args.small) < 2 or args.features <= K:
        parser.error(f"--identities, --images, --training, --small: at least 2; --features: more than {K}")
    return args


def main() -> None:
    args = parse()
    if args.job == "build":
        build(args.folder, args)
        return
    if args.job is not None:
        (args.folder / "result.json").write_text(json.dumps(measure(args.job, args.folder, args)))
        return
    jobs = []
    for metric in args.metrics:
        jobs.append(f"ours/full/{metric}")
        if metric in QUADRATIC:
            jobs += [f"ours/small/{metric}", f"plain/small/{metric}"]
        elif metric in PLAIN:
            jobs.append(f"plain/full/{metric}")
    results = {}
    with tempfile.TemporaryDirectory() as name:
        for job in ["build", *jobs]:
            command = [sys.executable, "-m", "benchmarks.evaluation", *sys.argv[1:], "--folder", name, "--job", job]
            subprocess.run(command, check=True)
            if job != "build":
                found = results[job] = json.loads((Path(name) / "result.json").read_text())
                line = f"{job}: {found['seconds']:.2f} s, {found['cpu']:.2f} s of CPU, {found['figures']}"
                print(line, file=sys.stderr, flush=True)
    images = args.identities * args.images
    print(
        f"{images:,} x {args.width} embeddings ({images * args.width / 2**18:.0f} MiB) of {args.identities:,} "
        f"identities, {args.training:,} training identities, {args.impostors:,} impostor pairs, seed {args.seed}; "
        f"{len(os.sched_getaffinity(0))} cores, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'unset')}"
    )
    print(table(results, args))


if __name__ == "__main__":
    main()
