"""The settings of the two halves of a VQ autoencoder (latent diffusion's first stage) from their shapes."""

from math import gcd
from typing import Any

from utils.networks.shapes import Shapes, agreed, has, indices

ROOTS = r"encoder|quant_conv|decoder|quantize|post_quant_conv"
ENCODER_PARTS = ("encoder.", "quant_conv.")
DECODER_PARTS = ("decoder.", "quantize.", "post_quant_conv.")
# Only the places of attention depend on it, as fractions of it; latent diffusion's own value.
RESOLUTION = 256


def halves(shapes: Shapes) -> tuple[bool, bool]:
    """Whether the encoder and the decoder are there."""
    return has(shapes, r"encoder\..*"), has(shapes, r"decoder\..*")


def describe_encoder(shapes: Shapes) -> tuple[dict[str, Any], str]:
    """`ddconfig` and `embed_dim` of VQEncoder, and a line for the reader."""
    ch = agreed(shapes, (r"encoder\.conv_in\..*", 0), (r"encoder\.down\.0\.block\.0\.norm1\..*", 0), default=128)
    levels = indices(shapes, r"encoder\.down\.(\d+)\.")
    widths = [
        agreed(shapes, (rf"encoder\.down\.{i}\.block\.\d+\.(conv[12]\.(weight|bias)|norm2\..*)", 0), default=ch)
        for i in levels
    ]
    ddconfig = {
        "double_z": False,
        "z_channels": agreed(shapes, (r"encoder\.conv_out\..*", 0), (r"quant_conv\.weight", 1), default=3),
        "resolution": RESOLUTION,
        "in_channels": agreed(shapes, (r"encoder\.conv_in\.weight", 1), default=3),
        "out_ch": 3,
        "ch": ch,
        "ch_mult": [max(1, width // ch) for width in widths] or [1],
        "num_res_blocks": max(
            (len(indices(shapes, rf"encoder\.down\.{i}\.block\.(\d+)\.")) for i in levels), default=1
        ),
        "attn_resolutions": [RESOLUTION >> i for i in levels if has(shapes, rf"encoder\.down\.{i}\.attn\..*")],
        "dropout": 0.0,
    }
    embed_dim = agreed(shapes, (r"quant_conv\..*", 0), default=3)
    return {"ddconfig": ddconfig, "embed_dim": embed_dim}, f"a VQ encoder (f = {_factor(levels)}, {_list(widths)})"


def describe_decoder(shapes: Shapes) -> tuple[dict[str, Any], str]:
    """`ddconfig`, `n_embed` and `embed_dim` of VQDecoder, and a line for the reader."""
    levels = indices(shapes, r"decoder\.up\.(\d+)\.")
    widths = [
        agreed(shapes, (rf"decoder\.up\.{i}\.block\.\d+\.(conv[12]\.(weight|bias)|norm2\..*)", 0), default=128)
        for i in levels
    ]
    ch = gcd(*widths) if widths else 128
    ddconfig = {
        "double_z": False,
        "z_channels": agreed(shapes, (r"decoder\.conv_in\.weight", 1), (r"post_quant_conv\..*", 0), default=3),
        "resolution": RESOLUTION,
        "in_channels": 3,
        "out_ch": agreed(shapes, (r"decoder\.conv_out\..*", 0), default=3),
        "ch": ch,
        "ch_mult": [width // ch for width in widths] or [1],
        "num_res_blocks": max(
            (len(indices(shapes, rf"decoder\.up\.{i}\.block\.(\d+)\.")) - 1 for i in levels), default=1
        ),
        "attn_resolutions": [RESOLUTION >> i for i in levels if has(shapes, rf"decoder\.up\.{i}\.attn\..*")],
        "dropout": 0.0,
    }
    n_embed = agreed(shapes, (r"quantize\.embedding\.weight", 0), default=8192)
    embed_dim = agreed(shapes, (r"post_quant_conv\.weight", 1), (r"quantize\.embedding\.weight", 1), default=3)
    config = {"ddconfig": ddconfig, "n_embed": n_embed, "embed_dim": embed_dim}
    return config, f"a VQ decoder (f = {_factor(levels)}, {n_embed} codes, {_list(widths)})"


def _factor(levels: list[int]) -> int:
    return 2 ** max(0, len(levels) - 1)


def _list(widths: list[int]) -> str:
    return "-".join(str(width) for width in widths) + " channels"
