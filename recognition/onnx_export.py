"""Backbones as ONNX files, written only where the graph gives the backbone's own numbers.

Legend: B batch, S side in pixels, D width of the embedding.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recognition.backbones.adapter import MEAN, STD
from recognition.onnx import OnnxRecogniser
from utils.alignment import norm_crop
from utils.checkpoint import weights_sha256, write_atomically
from utils.config import UserError
from utils.data.rendered import render_with_landmarks, sample_identity, sample_nuisance
from utils.images import resize, to_float

OPSETS = range(13, 21)  # from PRelu and Slice as the graphs use them to the last that torch's exporter writes
TOLERANCE = 1e-4
PROBES = 4  # images of each kind that the numbers are compared on
BATCHES = (1, 3, 2 * PROBES)  # sizes of batches that the graph must take


@dataclass(frozen=True)
class Deviation:
    """How far the graph's embeddings are from the backbone's, at most, over all probes."""

    absolute: float  # of one number of the unit embeddings
    relative: float  # length of the difference of the outputs, as a share of the output's length


def export_onnx(
    backbone: nn.Module, path: str | Path, *, opset: int = 17, metadata: Mapping[str, Any] | None = None
) -> Deviation:
    """Write `backbone` as an ONNX graph `images` (B, 3, S, S) RGB in [-1, 1] => `embeddings` (B, D), not normalised.

    B is open. The graph is run by onnxruntime on noise and on rendered faces, in batches of several sizes, and compared
    with the backbone before the file gets its name; the file's properties say how it wants its input.

    Args:
        backbone: float32, with `input_size` and `num_features`; it gets its own mode back.
        opset: version of ONNX's operators, one of `OPSETS`.
        metadata: JSON values, which become properties of the file too.

    Returns:
        The greatest deviations found.

    Raises:
        UserError: onnx or onnxruntime is not installed, an opset that is not written, embeddings that are not finite or
            that differ by more than `TOLERANCE`. No file is left behind then.
    """
    onnx = _onnx()
    if opset not in OPSETS:
        raise UserError(f"opset: {opset}; it can be {OPSETS[0]} to {OPSETS[-1]}")
    images = probe_images(backbone.input_size)
    properties = {
        "input": f"images (batch, 3, {backbone.input_size}, {backbone.input_size}), (pixel - {MEAN}) / {STD}",
        "output": f"embeddings (batch, {backbone.num_features}), not normalised",
        "input_size": backbone.input_size,
        "channel_order": "RGB",
        "mean": MEAN,
        "std": STD,
        "weights_sha256": weights_sha256(backbone.state_dict()),
        **(metadata or {}),
    }
    was_training = backbone.training
    backbone.eval()
    deviations: list[Deviation] = []

    def write(temporary: Path) -> None:
        with warnings.catch_warnings():  # torch announces another exporter, which needs packages of its own
            warnings.filterwarnings("ignore", message="You are using the legacy", category=DeprecationWarning)
            torch.onnx.export(
                backbone,
                (images[:2],),  # a batch of one could be taken for a fixed size
                str(temporary),
                dynamo=False,
                opset_version=opset,
                input_names=["images"],
                output_names=["embeddings"],
                dynamic_axes={"images": {0: "batch"}, "embeddings": {0: "batch"}},
            )
        model = onnx.load(str(temporary))
        onnx.helper.set_model_props(model, {key: _text(value) for key, value in properties.items()})
        onnx.checker.check_model(model)
        onnx.save(model, str(temporary))
        graph = OnnxRecogniser(temporary, backbone.input_size)
        deviations.append(compare(backbone, graph, images))
        check(deviations[0], path)

    try:
        write_atomically(path, write)
    finally:
        backbone.train(was_training)
    return deviations[0]


def probe_images(size: int) -> Tensor:
    """Noise and aligned rendered faces, float32 (2 PROBES, 3, size, size) in [-1, 1], the same at every call."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (PROBES, size, size, 3), dtype=np.uint8)
    faces = [
        norm_crop(*render_with_landmarks(sample_identity(0, index), sample_nuisance(0, index, 0), 128))
        for index in range(PROBES)
    ]
    return to_float(np.concatenate([noise, resize(np.stack(faces), size)]))


@torch.inference_mode()
def compare(backbone: nn.Module, graph: nn.Module, images: Tensor) -> Deviation:
    """The greatest deviations of `graph` from `backbone` on images (n, 3, S, S), in batches of `BATCHES`.

    Raises UserError where the backbone's output is not finite.
    """
    wanted = backbone(images).double()  # (n, D)
    if not wanted.isfinite().all():
        raise UserError("checkpoint: the backbone gives embeddings that are not finite; its training has diverged")
    lengths = wanted.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    absolute = relative = 0.0
    for size in BATCHES:
        found = torch.cat([graph(part).double() for part in images.split(size)])
        if found.shape != wanted.shape:
            raise UserError(f"the ONNX graph gives {tuple(found.shape)} instead of {tuple(wanted.shape)}")
        difference = nn.functional.normalize(found) - nn.functional.normalize(wanted)
        absolute = max(absolute, float(difference.abs().nan_to_num(nan=torch.inf).max()))
        relative = max(
            relative, float(((found - wanted).norm(dim=1, keepdim=True) / lengths).nan_to_num(torch.inf).max())
        )
    return Deviation(absolute, relative)


def check(deviation: Deviation, path: str | Path) -> None:
    """Raise UserError where a deviation is above `TOLERANCE`."""
    if max(deviation.absolute, deviation.relative) > TOLERANCE:
        raise UserError(
            f"output: {path} is not written: under onnxruntime the embeddings differ from the backbone's by "
            f"{deviation.absolute:.1e} (unit vectors) and {deviation.relative:.1e} (share of the length), more than "
            f"{TOLERANCE:.0e}; try another opset, or another version of onnxruntime"
        )


def _onnx() -> Any:
    """The package onnx, which torch's exporter needs; UserError where it, or onnxruntime, is not installed."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f"export needs {error.name}, which is not installed: pip install onnx onnxruntime") from error
    return onnx


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
