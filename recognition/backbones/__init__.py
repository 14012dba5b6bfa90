"""Recognition backbones: the networks that turn an aligned face into an identity embedding.

`build_backbone("ir_50")` makes one by name, `load_backbone(path)` rebuilds one from a file this project wrote and
`load_published_backbone(path, "ir_50")` reads the state dict of a published one.
Input: float32 (B, 3, S, S) RGB in [-1, 1], S = `backbone.input_size`; output: (B, `backbone.num_features`), any length.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from recognition.backbones.ir import IR_DEPTHS, IRBackbone
from recognition.backbones.iresnet import IRESNET_DEPTHS, IResNet
from utils.checkpoint import load_safetensors, load_state_dict_file, save_safetensors, strict_load
from utils.config import UserError

KIND = "recognition_backbone"
BACKBONES = (
    *(f"ir_{depth}" for depth in IR_DEPTHS),
    *(f"ir_se_{depth}" for depth in IR_DEPTHS),
    *(f"iresnet{depth}" for depth in IRESNET_DEPTHS),
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
) -> nn.Module:
    """Build a backbone by name, with fresh weights.

    Args:
        name: one of `BACKBONES`.
        input_size: side of the input in pixels, a multiple of 16 (of 32 when `stem_stride` is 2).
        num_features: width of the embedding.
        width: multiplier of every channel count (1: as published; less: small models for the CPU).
        dropout: probability before the last linear layer; None: 0.4 for IR, 0 for iresnet, as published.
        stem_stride: stride of the first convolution; 1 as published, 2 quarters the cost.
        affine_output: whether the last batch norm is affine; None: as its family. Some published IR files want True.

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
    if name.startswith("iresnet"):
        if affine_output is not None:
            raise UserError(
                f"backbone.affine_output: {affine_output}; it belongs to the IR networks, {name} wants null"
            )
        dropout = 0.0 if dropout is None else dropout
        backbone: nn.Module = IResNet(int(name.removeprefix("iresnet")), dropout=dropout, **shape)
    else:
        dropout = 0.4 if dropout is None else dropout
        backbone = IRBackbone(
            int(name.rsplit("_", 1)[1]),
            squeeze_excite=name.startswith("ir_se_"),
            dropout=dropout,
            affine_output=bool(affine_output),
            **shape,
        )
    backbone.input_size = input_size
    backbone.num_features = num_features
    backbone.config = {"name": name, **shape, "dropout": dropout, "affine_output": affine_output}
    return backbone


def save_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Write weights and configuration as safetensors; `load_backbone` needs nothing else."""
    save_safetensors(backbone.state_dict(), path, {"kind": KIND, "config": backbone.config})


def load_backbone(path: str | Path) -> nn.Module:
    """Rebuild a backbone from a file of `save_backbone`, in eval mode.

    Raises:
        UserError: no such file, a file of another kind, or weights that do not fit.
    """
    tensors, metadata = load_safetensors(path)
    if metadata.get("kind") != KIND:
        raise UserError(f"{path}: holds {metadata.get('kind', 'no description')!r}; a file of kind {KIND!r} is wanted")
    backbone = build_backbone(**metadata["config"])
    strict_load(backbone, tensors, str(path))
    return backbone.eval()


def load_published_backbone(path: str | Path, name: str, *, input_size: int = 112) -> nn.Module:
    """Read a published state dict (TFace, insightface, ElasticFace: `.pth`) into the backbone `name`, in eval mode.

    The width of the embedding and whether the last norm is affine are read off the file.

    Raises:
        UserError: no such file, or keys and shapes that are not those of `name`.
    """
    state = load_state_dict_file(path)
    is_iresnet = name.startswith("iresnet")
    last_linear = state.get("fc.weight" if is_iresnet else "output_layer.3.weight")
    num_features = 512 if last_linear is None else last_linear.shape[0]
    affine_output = True if not is_iresnet and "output_layer.4.weight" in state else None
    backbone = build_backbone(name, input_size=input_size, num_features=num_features, affine_output=affine_output)
    # Old files lack the counter, which only a cumulative batch norm would read
    state = {**{k: v for k, v in backbone.state_dict().items() if k.endswith("num_batches_tracked")}, **state}
    strict_load(backbone, state, str(path))
    return backbone.eval()


def num_parameters(backbone: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in backbone.parameters() if p.requires_grad)


__all__ = [
    "BACKBONES",
    "KIND",
    "build_backbone",
    "load_backbone",
    "load_published_backbone",
    "num_parameters",
    "save_backbone",
]
