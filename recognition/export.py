"""Write a recogniser as ONNX, its numbers checked under onnxruntime.

    python -m recognition.export checkpoint=backbone.safetensors output=backbone.onnx

encode.py, recognition.embed and others read it back with embedder=insightface_onnx checkpoint=backbone.onnx.
Settings: configs/recognition_export_config.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from recognition.backbones import InputAdapter, backbone_of
from recognition.onnx_export import TOLERANCE, export_onnx
from utils import distributed
from utils.config import UserError, check_writable, entry_point, existing_file, settings
from utils.logging import get_logger
from utils.networks import BACKBONE, open_network_file

log = get_logger("export")


@dataclass
class ExportSettings:
    """The keys of configs/recognition_export_config.yaml."""

    checkpoint: str
    output: str
    opset: int = 17


@entry_point("recognition_export_config")
def main(cfg: DictConfig) -> None:
    options = settings(cfg, ExportSettings, "")
    output = Path(options.output).expanduser()
    if output.suffix != ".onnx":
        raise UserError(f"output: {output}; name the file .onnx")
    if output.exists():
        raise UserError(f"output: {output} exists; give another name")
    check_writable(output, "output")
    if distributed.world_size() > 1:
        raise UserError("recognition.export: one process is enough; start it without torchrun")
    checkpoint = existing_file(options.checkpoint, "checkpoint", "recognition.train writes one")
    if checkpoint.suffix == ".onnx":
        raise UserError(f"checkpoint: {checkpoint} is ONNX already; give the file that recognition.train wrote")
    file = open_network_file(checkpoint)
    backbone = InputAdapter(backbone_of(file), file.channel_order or "RGB").eval()
    metadata = {"kind": BACKBONE, "config": file.config}
    if "provenance" in file.metadata:
        metadata["provenance"] = file.metadata["provenance"]
    deviation = export_onnx(backbone, output, opset=options.opset, metadata=metadata)
    log.info(
        "wrote %s (opset %d, %d x %d pixels => %d numbers): under onnxruntime it differs from the backbone by at most "
        "%.1e in a number of the unit embeddings and %.1e of the output's length (allowed: %.0e)",
        *(output, options.opset, backbone.input_size, backbone.input_size, backbone.num_features),
        *(deviation.absolute, deviation.relative, TOLERANCE),
    )


if __name__ == "__main__":
    main()
