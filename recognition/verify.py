"""Whether two images show one person: similarity, threshold and verdict, for a quick look.

    python -m recognition.verify A.jpg B.jpg [--checkpoint FILE] [--results results.json | --threshold COSINE]

The similarity is the cosine of the two embeddings, from -1 to 1. A threshold belongs to one network: it is the one that
the 10-fold protocol of recognition.test found for this file, out of results.json beside the checkpoint or --results.
Without one there is no verdict. Images that have not the size of an aligned crop are aligned first.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recognition.face_input import face_crop, is_crop
from utils import distributed
from utils.alignment import FaceAligner
from utils.config import CommandLineParser, UserError, command_line, existing_file
from utils.embedders import Embedder, backbone_embedder, onnx_embedder
from utils.logging import setup_logging

CHECKPOINT = Path("outputs/recogniser/backbone.safetensors")  # where the README's recogniser is
RESULTS = "results.json"  # of recognition.test
FIRST_CHOICE = "lfw"  # of several sets that a network was tested on


@dataclass(frozen=True)
class Threshold:
    """The least cosine of two images of one person, and how it came about."""

    cosine: float
    source: str
    flip: bool = True  # whether mirror images were added where it was measured
    channel_order: str | None = None  # that the network was given there; None: as its file says


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = CommandLineParser(prog="python -m recognition.verify", description=__doc__)
    command.add_argument("a", type=Path, metavar="A", help="an image of one face")
    command.add_argument("b", type=Path, metavar="B", help="another one")
    command.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, help="the recogniser's file, also .onnx; else %(default)s"
    )
    given = command.add_mutually_exclusive_group()
    given.add_argument("--results", type=Path, help=f"of recognition.test; else {RESULTS} beside the checkpoint")
    given.add_argument("--threshold", type=float, help="the least cosine of one person, where you know it")
    command.add_argument("--set", help="whose threshold of several in the results; else lfw, or the first")
    command.add_argument(
        "--align",
        choices=("auto", "always", "never"),
        default="auto",
        help="find and align the face first; auto: unless the image has the size of an aligned crop",
    )
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return command


def main() -> int:
    """Run the command that sys.argv names."""
    setup_logging()
    options = parser().parse_args()
    hint = "give the recogniser's file with --checkpoint"
    checkpoint = existing_file(options.checkpoint, "--checkpoint", hint)
    for key in ("a", "b"):
        existing_file(getattr(options, key), key.upper(), "an image is wanted")
    threshold = find_threshold(checkpoint, options.results, options.threshold, options.set)
    embedder = open_embedder(checkpoint, threshold)
    similarity, notes = compare_faces((options.a, options.b), embedder, threshold, options.align, options.device)
    lines = [*notes, f"network: {checkpoint}", *verdict(similarity, threshold, checkpoint)]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def open_embedder(checkpoint: Path, threshold: Threshold | None) -> Embedder:
    """The recogniser in a file, given its images as where `threshold` was measured. UserError where it holds none."""
    order = None if threshold is None else threshold.channel_order
    if checkpoint.suffix == ".onnx":
        return onnx_embedder(str(checkpoint), channel_order=order or "RGB")
    return backbone_embedder(str(checkpoint), channel_order=order)


def compare_faces(
    images: tuple[Path, Path], embedder: Embedder, threshold: Threshold | None, align: str, device: str
) -> tuple[float, list[str]]:
    """The cosine of the faces in two image files, and a line on how each was taken.

    align: auto, always or never. Raises UserError where a file cannot be read or shows no face.
    """
    place = distributed.device(device)
    flip = threshold is None or threshold.flip
    rows, notes = [], []
    for image in images:
        as_it_is = align == "never" or (align == "auto" and is_crop(image, embedder.input_size))
        crop, how = face_crop(image, None if as_it_is else FaceAligner(device=place))
        rows.append(embedder.embed(crop[None], flip=flip, device=place)[0])  # (D,)
        notes.append(how)
    return float(rows[0] @ rows[1]), notes


def verdict(similarity: float, threshold: Threshold | None, checkpoint: Path) -> list[str]:
    """Similarity, threshold with its source, and what they say together, a line each: nothing without a threshold."""
    lines = [f"similarity: {similarity:.4f} (cosine)"]
    if threshold is None:
        return [
            *lines,
            f"threshold: none, {checkpoint} is not calibrated: test it with python -m recognition.test and give its "
            f"{RESULTS} with --results, or a cosine with --threshold",
            "verdict: none",
        ]
    lines.append(f"threshold: {threshold.cosine:.4f}, {threshold.source}")
    return [*lines, f"verdict: {'the same person' if similarity > threshold.cosine else 'different people'}"]


def find_threshold(
    checkpoint: Path, results: Path | None, cosine: float | None, set_name: str | None
) -> Threshold | None:
    """The threshold that was given, or out of results of recognition.test; None where there are none of this network.

    Raises UserError for a cosine outside -1..1, a file of results that cannot be read, a given one of other networks,
    and a set that is not in it.
    """
    if cosine is not None:
        if not -1 <= cosine <= 1 or set_name is not None:
            shown = "--set chooses among results" if set_name is not None else "a cosine is between -1 and 1"
            raise UserError(f"--threshold: {cosine:g}; {shown}")
        return Threshold(cosine, "as given on the command line")
    beside = checkpoint.parent / RESULTS
    path = beside if results is None else existing_file(results, "--results", f"recognition.test writes {RESULTS}")
    report = _report_of(path, checkpoint) if path.is_file() else None
    if report is not None:
        return threshold_of(report, path, set_name)
    if results is not None:
        raise UserError(f"--results: {path} is of other networks than {checkpoint}; a threshold belongs to one network")
    if set_name is not None:
        raise UserError(f"--set: {set_name}, but no {RESULTS} beside {checkpoint} is of it; give it with --results")
    return None


def threshold_of(report: dict[str, Any], path: Path, set_name: str | None = None) -> Threshold:
    """The threshold in the report of one network: squared distance d of unit vectors => cosine 1 - d / 2.

    Raises UserError where the report has no such set, or `path` does not read as results do.
    """
    sets = report["sets"]
    name = set_name or (FIRST_CHOICE if FIRST_CHOICE in sets else next(iter(sets), None))
    if name not in sets:
        there = ", ".join(sets) or "none"
        raise UserError(f"--set: {name}; the sets of pairs in {path} are: {there}")
    found = sets[name]
    try:
        squared, accuracy = float(found["threshold"]), float(found["accuracy"])
        count, folds = int(found["num_genuine"]) + int(found["num_impostor"]), int(found["num_folds"])
        flip, order = bool(report["flip"]), report.get("channel_order")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--results: {path} lacks a number for {name} ({error}); test the network again") from error
    if not (math.isfinite(squared) and 0 <= squared <= 4):
        raise UserError(f"--results: {path} has threshold {squared} for {name}; a squared distance is between 0 and 4")
    source = f"from {path}, set {name}: {100 * accuracy:.2f} % of {count} pairs right, {folds} folds"
    return Threshold(1 - squared / 2, source, flip, order)


def _report_of(path: Path, checkpoint: Path) -> dict[str, Any] | None:
    """The report of this network in a file of recognition.test; None where it is of others."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        reports = content.get("models", [content])
        tested = [(report, report["checkpoint"]) for report in reports if isinstance(report["sets"], dict)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--results: {path} is no {RESULTS} of recognition.test") from error
    own = (report for report, file in tested if file is not None and _same_file(Path(file), checkpoint, path))
    return next(own, None)


def _same_file(tested: Path, checkpoint: Path, results: Path) -> bool:
    """Whether results are of this checkpoint; of a folder that was moved, they lie beside a file of the same name."""
    if tested.is_file():
        return tested.samefile(checkpoint) or filecmp.cmp(tested, checkpoint, shallow=False)
    return tested.name == checkpoint.name and results.resolve().parent == checkpoint.resolve().parent


if __name__ == "__main__":
    command_line(main)
