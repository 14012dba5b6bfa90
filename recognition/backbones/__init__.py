"""Recognition backbones: the networks that turn an aligned face into an identity embedding.

`build_backbone("ir_50")` makes one by name, `load_backbone(path)` rebuilds one from a file, this project's or a
published one.
Input: float32 (B, 3, S, S) RGB in [-1, 1], S = `backbone.input_size`; output: (B, `backbone.num_features`), any length.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from recognition.backbones.adapter import InputAdapter
from recognition.backbones.ir import BOTTLENECK_FROM, IR_DEPTHS, IRBackbone
from recognition.backbones.iresnet import IRESNET_DEPTHS, IResNet
from recognition.backbones.mobilefacenet import MobileFaceNet
from utils.checkpoint import save_safetensors, strict_load, with_counters
from utils.config import UserError
from utils.networks import BACKBONE, NetworkFile, open_network_file

BACKBONES = (
    *(f"ir_{depth}" for depth in IR_DEPTHS),
    *(f"ir_se_{depth}" for depth in IR_DEPTHS),
    *(f"iresnet{depth}" for depth in IRESNET_DEPTHS),
    "mobilefacenet",
)
STRIDE = 16  # four stages that halve the side


def build_backbone(
    name: str,
    *,
    input_size: int = 112,
    num_features: int = 512,
    width: float = 1.0,
    dropout: float | None = None,
    stem_stride: int = 1,
    affine_output: bool | None = None,
    inner_norm: bool = True,
    bottleneck: bool | None = None,
) -> nn.Module:
    """Build a backbone by name, with fresh weights.

    Args:
        name: one of `BACKBONES`.
        input_size: side of the input in pixels, a multiple of 16 (of 32 when `stem_stride` is 2).
        num_features: width of the embedding.
        width: multiplier of every channel count (1: as published; less: small models for the CPU).
        dropout: probability before the last linear layer; None: 0.4 for IR, else 0, as published.
        stem_stride: stride of the first convolution of IR and iresnet; 1 as published, 2 quarters the cost.
        affine_output: whether the last batch norm is affine; None: as its family. face.evoLVe's IR files want True.
        inner_norm: whether an IR unit has a batch norm between its first convolution and PReLU; face.evoLVe's and
            CurricularFace's have none.
        bottleneck: whether the IR units are bottlenecks; None: from 152 layers on, as TFace's and not face.evoLVe's.

    Raises:
        UserError: unknown name, or a size the network cannot take. The keys are those of the `backbone` config group.
    """
    if name not in BACKBONES:
        raise UserError(f"backbone.name: unknown backbone {name!r}; there are {', '.join(BACKBONES)}")
    for key, value, kind in (
        ("input_size", input_size, int),
        ("num_features", num_features, int),
        ("width", width, (int, float)),
        ("dropout", dropout, (int, float, type(None))),
    ):
        if not isinstance(value, kind):
            raise UserError(f"backbone.{key}: {value!r}; a number is wanted")
    if stem_stride not in (1, 2):
        raise UserError(f"backbone.stem_stride: {stem_stride}; it may be 1 or 2")
    if input_size < STRIDE * stem_stride or input_size % (STRIDE * stem_stride):
        raise UserError(f"backbone.input_size: {input_size}; it must be a positive multiple of {STRIDE * stem_stride}")
    if num_features < 1:
        raise UserError(f"backbone.num_features: {num_features}; it must be at least 1")
    if not 0 < width <= 4:
        raise UserError(f"backbone.width: {width}; it must be above 0 and at most 4")
    if dropout is not None and not 0 <= dropout < 1:
        raise UserError(f"backbone.dropout: {dropout}; it must be in [0, 1)")

    shape = {"input_size": input_size, "num_features": num_features, "width": width, "stem_stride": stem_stride}
    if not name.startswith("ir_"):
        if bottleneck is not None or not inner_norm:
            raise UserError(f"backbone.inner_norm, backbone.bottleneck: they belong to the IR networks, not to {name}")
        dropout = 0.0 if dropout is None else dropout
    if name == "mobilefacenet":
        if stem_stride != 1:
            raise UserError(f"backbone.stem_stride: {stem_stride}; {name} has a stem of its own and wants 1")
        backbone: nn.Module = MobileFaceNet(
            input_size=input_size,
            num_features=num_features,
            width=width,
            dropout=dropout,
            affine_output=bool(affine_output),
        )
    elif name.startswith("iresnet"):
        if affine_output is not None:
            raise UserError(
                f"backbone.affine_output: {affine_output}; it belongs to the other networks, {name} wants null"
            )
        backbone = IResNet(int(name.removeprefix("iresnet")), dropout=dropout, **shape)
    else:
        dropout = 0.4 if dropout is None else dropout
        depth = int(name.rsplit("_", 1)[1])
        backbone = IRBackbone(
            depth,
            squeeze_excite=name.startswith("ir_se_"),
            dropout=dropout,
            affine_output=bool(affine_output),
            inner_norm=inner_norm,
            bottleneck=depth >= BOTTLENECK_FROM if bottleneck is None else bottleneck,
            **shape,
        )
    backbone.input_size = input_size
    backbone.num_features = num_features
    backbone.config = {
        "name": name,
        **shape,
        "dropout": dropout,
        "affine_output": affine_output,
        "inner_norm": inner_norm,
        "bottleneck": bottleneck,
    }
    return backbone


def save_backbone(
    backbone: nn.Module,
    path: str | Path,
    channel_order: str | None = None,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write weights and configuration as safetensors; `load_backbone` needs nothing else.

    `channel_order`: of the images that the network was trained on, RGB or BGR; None: nobody knows. `provenance`: what
    it was trained on and with, JSON values (see `recognition.provenance`); None: nobody knows either.
    """
    metadata: dict[str, Any] = {"kind": BACKBONE, "config": backbone.config}
    if channel_order is not None:
        metadata["channel_order"] = channel_order
    if provenance is not None:
        metadata["provenance"] = dict(provenance)
    save_safetensors(backbone.state_dict(), path, metadata)


def load_backbone(path: str | Path) -> nn.Module:
    """The backbone in a file, in eval mode; it takes RGB, whatever it was trained on.

    Reads what `save_backbone` wrote, and the published files of TFace, face.evoLVe, CurricularFace, AdaFace,
    insightface and ElasticFace, whose network is recognised from keys and shapes (see `utils.networks`).

    Raises:
        UserError: no such file, a file of another kind, or weights that do not fit.
    """
    file = open_network_file(path)
    backbone = backbone_of(file)
    return InputAdapter(backbone, "BGR") if file.channel_order == "BGR" else backbone


def backbone_of(file: NetworkFile) -> nn.Module:
    """The network in a recognised file as it was trained, in eval mode. Raises UserError as `load_backbone`."""
    if file.kind != BACKBONE:
        raise file.mismatch(BACKBONE)
    if file.config["name"] not in BACKBONES:
        raise UserError(f"{file.path}: looks like {file.looks_like}; there are {', '.join(BACKBONES)}")
    backbone = build_backbone(**file.config)
    strict_load(backbone, with_counters(backbone, file.state), str(file.path), file.looks_like)
    return backbone.eval()


def num_parameters(backbone: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in backbone.parameters() if p.requires_grad)


__all__ = [
    "BACKBONES",
    "InputAdapter",
    "backbone_of",
    "build_backbone",
    "load_backbone",
    "num_parameters",
    "save_backbone",
]
