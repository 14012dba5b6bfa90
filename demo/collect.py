"""Fills the report and metrics.json from the files that the stages wrote."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.pipeline import ALIGNMENT, GENERATED, SET_NAMES, Pipeline, count_text, read_lines
from demo.report import Curves, Figure, Panel, Report, StageRun, render
from models.autoencoder.vqgan import load_decoder, load_encoder
from utils.checkpoint import read_json, write_json, write_text
from utils.images import default_threads, grid, list_images, load_images, to_float, to_uint8, write_image

ROWS, COLUMNS, STATIONS = 8, 6, 10  # of the face panels; images of each station of the pipeline
INSTALL_SECONDS = Path(__file__).resolve().parent.parent / ".venv" / "install_seconds"
PACKAGES = ("torch", "numpy", "facenet-pytorch", "hydra-core", "pillow")


def write_report(pipeline: Pipeline) -> str:
    """Write metrics.json and report.html; returns the table of accuracies as text."""
    out = pipeline.output_dir
    accuracy = {name: read_accuracy(out / "tests" / name / "results.json") for name in (*pipeline.sets, "untrained")}
    for row in accuracy.values():
        row["people"] = len(list((out / "verification/faces").iterdir()))
    detection = read_detection(pipeline)
    seconds = {record.name: record.seconds for record in pipeline.stages.records}
    if INSTALL_SECONDS.is_file():
        seconds = {"install": float(INSTALL_SECONDS.read_text())} | seconds
    total = sum(seconds.values())
    metrics = {
        "accuracy": accuracy,
        "seconds": {name: round(value, 1) for name, value in seconds.items()} | {"total": round(total, 1)},
        "counts": {
            name: dict(zip(("identities", "images"), count(folder), strict=True)) for name, folder in folders(pipeline)
        },
        "mtcnn": {
            name: {"tried": tried, "found": found, "rate": found / max(1, tried)} for name, tried, found in detection
        },
        "switch": switch_summary(out),
        "hardware": {"processor": processor(), "threads": default_threads(), "cuda": torch.cuda.is_available()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "seed": pipeline.seed,
    }
    write_json(out / "metrics.json", metrics)
    report = build(pipeline, accuracy, detection, seconds, metrics)
    write_text(out / "report.html", render(report))
    drawn = next(panel for panel in report.panels if panel.key == "two_stage")
    write_image(out / "faces.png", grid(np.concatenate([row[:COLUMNS] for row in drawn.rows]), COLUMNS))
    width = max(len(name) for name in accuracy)
    return "".join(
        f"{name:{width}}  {100 * row['accuracy']:6.2f} % ± {100 * row['std']:.2f}   "
        f"({row['genuine']} genuine, {row['impostor']} impostor pairs of {row['people']} people)\n"
        for name, row in accuracy.items()
    )


def build(
    pipeline: Pipeline,
    accuracy: dict[str, dict[str, Any]],
    detection: list[tuple[str, int, int]],
    seconds: dict[str, float],
    metrics: dict[str, Any],
) -> Report:
    """The report's content."""
    out = pipeline.output_dir
    series = np.load(out / "samples/two_stage/attention_change.npz", allow_pickle=False)
    manifest = read_lines(out / "samples/two_stage/manifest.jsonl")
    reference = accuracy[pipeline.reference]
    two_stage = accuracy["two_stage"]
    source = "rendered faces" if pipeline.data is None else "your faces"
    lead = (
        "A recogniser that has seen nothing but faces drawn by a generator tells people apart whom it has never seen: "
        f"it is right on {100 * two_stage['accuracy']:.1f} % of pairs. Trained on the {source} from which the "
        f"generator learnt, the same network reaches {100 * reference['accuracy']:.1f} %; without training, "
        f"{100 * accuracy['untrained']['accuracy']:.1f} %."
    )
    stages = [
        StageRun(r.title, r.seconds, r.commands, r.outcome, resumed=r.attempts > 1) for r in pipeline.stages.records
    ]
    if "install" in seconds:
        stages.insert(0, StageRun("Install", seconds["install"], ["make venv"], "the packages of requirements.txt"))
    return Report(
        title="From rendered faces to a recogniser" if pipeline.data is None else "From your faces to a recogniser",
        lead=lead,
        created=time.strftime("%-d %B %Y, %H:%M"),
        seconds=sum(seconds.values()),
        accuracy=accuracy,
        data={name: count_text(folder) for name, folder in folders(pipeline)} | {"untrained": "none: random weights"},
        panels=panels(pipeline),
        pipeline=stations(pipeline),
        timesteps=[int(t) for t in series["timesteps"]],
        d=series["d"],
        switch_t=[-1 if line["switch_t"] is None else int(line["switch_t"]) for line in manifest],
        threshold=threshold(out),
        curves=curves(pipeline),
        detection=detection,
        stages=stages,
        environment={
            "processor": f"{metrics['hardware']['processor']}, {metrics['hardware']['threads']} threads",
            "system": platform.platform(terse=True),
            **metrics["versions"],
        },
        settings={name: ", ".join(flat(given)) for name, given in pipeline.scripts.items() if given},
    )


def flat(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """`key value` of every leaf."""
    found = []
    for name, value in tree.items():
        found += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name} {value}"]
    return found


def read_accuracy(path: Path) -> dict[str, Any]:
    """One row of the table from the results of recognition.test."""
    results = read_json(path)
    return {
        "accuracy": results["accuracy"],
        "std": results["accuracy_std"],
        "genuine": results["num_genuine"],
        "impostor": results["num_impostor"],
        "eer": results["eer"],
        "tar_at_far_1e-2": results["tar_at_far"]["0.01"],
    }


def folders(pipeline: Pipeline) -> list[tuple[str, Path]]:
    """Each training set's aligned faces."""
    out = pipeline.output_dir
    return [(pipeline.reference, out / "aligned/train"), *((name, out / "generated" / name) for name in GENERATED)]


def count(folder: Path) -> tuple[int, int]:
    """Identities and images of a folder of identity folders."""
    names = list_images(folder)
    return len({name.rpartition("/")[0] for name in names}), len(names)


def read_detection(pipeline: Pipeline) -> list[tuple[str, int, int]]:
    """Name, images tried and faces found of every alignment."""
    out = pipeline.output_dir
    places = {
        f"{pipeline.reference}, training": out / "aligned/train",
        f"{pipeline.reference}, test": out / "aligned/test",
    }
    for name in GENERATED:
        blocks = out / f"samples/{name}_aligned"
        places[name] = blocks if blocks.is_dir() else out / "generated" / name
    summaries = {name: read_json(folder / ALIGNMENT) for name, folder in places.items()}
    return [(name, summary["images"], summary["aligned"]) for name, summary in summaries.items()]


def threshold(out: Path) -> float:
    """The switching threshold that the two-stage samples were drawn with."""
    calibration = out / "samples/two_stage/calibration.json"
    return float(read_json(calibration)["threshold"]) if calibration.is_file() else 0.0


def switch_summary(out: Path) -> dict[str, Any]:
    """Where the two-stage samples took their identity."""
    switches = [line["switch_t"] for line in read_lines(out / "samples/two_stage/manifest.jsonl")]
    switched = [t for t in switches if t is not None and t >= 0]
    return {
        "threshold": threshold(out),
        "samples": len(switches),
        "switched": len(switched),
        "median_t": float(np.median(switched)) if switched else None,
    }


def panels(pipeline: Pipeline) -> list[Panel]:
    """The first identities of each training set; a row of both generated ones is the same new identity."""
    everything = {name: rows(folder) for name, folder in folders(pipeline)}
    shared = [i for i in everything["two_stage"] if i in everything["one_stage"]][:ROWS]
    chosen = {pipeline.reference: list(everything[pipeline.reference])[:ROWS], "two_stage": shared, "one_stage": shared}
    captions = {
        pipeline.reference: "From these people the generator learnt.",
        "two_stage": "New identities: no one that it has seen.",
        "one_stage": "The same new identities, for comparison.",
    }
    paths = dict(folders(pipeline))
    return [
        Panel(
            name,
            SET_NAMES[name][0].upper() + SET_NAMES[name][1:],
            captions[name],
            [load_images(everything[name][i], 112, root=paths[name]) for i in identities],
        )
        for name, identities in chosen.items()
    ]


def rows(folder: Path) -> dict[str, list[str]]:
    """The first images of every identity that has COLUMNS of them."""
    found: dict[str, list[str]] = {}
    for name in list_images(folder):
        found.setdefault(name.rpartition("/")[0], []).append(name)
    full = {identity: names[:COLUMNS] for identity, names in found.items() if len(names) >= COLUMNS}
    return full or {identity: names[:COLUMNS] for identity, names in found.items()}


def stations(pipeline: Pipeline) -> list[Figure]:
    """A few faces along the way: rendered, aligned, through the autoencoder; drawn, aligned."""
    out = pipeline.output_dir
    firsts = [names[0] for names in rows(out / "aligned/train").values()][:STATIONS]
    originals = {name.rpartition(".")[0]: name for name in list_images(out / "faces/train")}
    faces = load_images([originals[name.rpartition(".")[0]] for name in firsts], 112, root=out / "faces/train")
    aligned = load_images(firsts, 112, root=out / "aligned/train")
    image_size = load_encoder_size(pipeline)
    small = load_images(firsts, image_size, root=out / "aligned/train")
    generated = {name: [r[0] for r in rows(out / "generated" / name).values()][:STATIONS] for name in GENERATED}
    first = "Rendered" if pipeline.data is None else "Given"
    figures = [
        Figure(first, "one image of each of ten people", faces),
        Figure("Aligned", "five landmarks, 112 x 112 pixels", aligned),
        Figure("Through the autoencoder", f"{image_size} pixels, encoded and decoded", reconstruct(out, small)),
    ]
    for name, paths in generated.items():
        figures.append(
            Figure(
                SET_NAMES[name][0].upper() + SET_NAMES[name][1:],
                "new identities, aligned again",
                load_images(paths, 112, root=out / "generated" / name),
            )
        )
    return figures


def load_encoder_size(pipeline: Pipeline) -> int:
    """Side in pixels of the images that the diffusion model learnt from."""
    return int(pipeline.scripts["diffusion"]["constants"]["image_size"])


@torch.inference_mode()
def reconstruct(out: Path, images: np.ndarray) -> np.ndarray:
    """Images uint8 (n, H, W, 3) through encoder and decoder."""
    encoder = load_encoder(out / "autoencoder/vq_encoder.safetensors")
    decoder = load_decoder(out / "autoencoder/vq_decoder.safetensors")
    return to_uint8(decoder(encoder(to_float(images))))


def curves(pipeline: Pipeline) -> list[Curves]:
    """Losses of everything that was trained."""
    out = pipeline.output_dir
    histories = {name: read_json(out / "recognisers" / name / "metrics.json")["history"] for name in pipeline.sets}

    def logged(folder: str, value: str) -> tuple[list[int], list[float]]:
        lines = read_lines(out / folder / "metrics.jsonl")
        return [line["step"] for line in lines], [line[value] for line in lines]

    def epochs(value: str, factor: float) -> dict[str, tuple[list[int], list[float]]]:
        return {
            name: ([h["epoch"] for h in lines], [factor * h[value] for h in lines]) for name, lines in histories.items()
        }

    return [
        Curves(
            "Autoencoder", "How far pixels in -1 to 1 are from the original.", "L1", {"L1": logged("autoencoder", "l1")}
        ),
        Curves("Diffusion model", "Mean squared error of the noise.", "loss", {"loss": logged("diffusion", "loss")}),
        Curves(
            "Recognisers, loss", "The same recipe on each set.", "cross-entropy", epochs("loss", 1), x_label="epoch"
        ),
        Curves(
            "Recognisers, training accuracy",
            "Share of training images put right, in spite of the margin.",
            "per cent",
            epochs("accuracy", 100),
            x_label="epoch",
        ),
    ]


def processor() -> str:
    """The processor's name and the number of cores, as far as the system tells."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"
