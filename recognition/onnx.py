"""Recognisers in ONNX files (insightface's w600k_r50, glintr100 and others), run by onnxruntime.

A graph is data for a fixed set of operators: nothing in the file is executed as code.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils.config import UserError


class OnnxRecogniser(nn.Module):
    """An ONNX graph behind a module's face: (B, 3, S, S) in the graph's own scale => (B, num_features).

    Name, size and layout (channels first or last) of the input, and the width of the output, are the file's own. A
    graph for batches of a fixed size gets its batches filled up with zeros. `properties`: what its maker wrote in it.
    """

    def __init__(self, path: str | Path, input_size: int) -> None:
        """`input_size`: side in pixels where the file leaves it open.

        Raises UserError where onnxruntime is not installed, or the file is no recogniser that it can run.
        """
        super().__init__()
        try:
            import onnxruntime
            from onnxruntime.capi import onnxruntime_pybind11_state as failures
        except ImportError as error:
            raise UserError(f"{path}: needs onnxruntime, which is not installed: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # its errors are raised, its warnings are the exporter's business
        bad_file = (failures.Fail, failures.InvalidArgument, failures.InvalidGraph, failures.InvalidProtobuf)
        bad_file = (*bad_file, failures.NoModel, failures.NotImplemented, failures.RuntimeException)
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, onnxruntime.get_available_providers())
        except bad_file as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: not an ONNX file that onnxruntime can run ({reason})") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape = inputs[0].shape
        channels_first = len(shape) == 4 and shape[1] == 3
        self.channels_last = len(shape) == 4 and not channels_first and shape[3] == 3
        if len(inputs) != 1 or not (channels_first or self.channels_last):
            shown = ", ".join(f"{item.name} {item.shape}" for item in inputs)
            raise UserError(f"{path}: takes {shown}; a recogniser takes one batch of images of 3 channels")
        sides = [side for side in (shape[1:3] if self.channels_last else shape[2:]) if isinstance(side, int)]
        if len(set(sides)) > 1:
            raise UserError(f"{path}: takes images of {sides[0]} x {sides[1]}; square ones are wanted")
        self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.input_name, self.output_name = inputs[0].name, outputs[0].name
        self.dtype = np.float16 if "float16" in inputs[0].type else np.float32
        self.batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
        self.input_size: int = sides[0] if sides else input_size
        try:
            probe = self._run(np.zeros((1, 3, self.input_size, self.input_size), np.float32))
        except bad_file as error:
            raise UserError(f"{path}: cannot take an image ({' '.join(str(error).split())[:200]})") from error
        if probe.ndim != 2 or len(probe) != 1:
            raise UserError(f"{path}: gives {probe.shape} for one image; a recogniser gives one vector")
        self.num_features: int = probe.shape[1]
        self.properties: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._run(images.cpu().numpy())).to(images.device)

    def _run(self, images: np.ndarray) -> np.ndarray:
        """(B, 3, S, S) => (B, D), float32."""
        images = images.astype(self.dtype)
        if self.channels_last:
            images = images.transpose(0, 2, 3, 1)
        step = self.batch or len(images)
        parts = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            filled = np.zeros((step, *part.shape[1:]), part.dtype)
            filled[: len(part)] = part
            (out,) = self.session.run([self.output_name], {self.input_name: filled})
            parts.append(out[: len(part)] if len(out) == step else out)
        return np.concatenate(parts).astype(np.float32)
