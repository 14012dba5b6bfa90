"""The settings of a ConditionalUNet from its shapes. Legend: C channels, D context width."""

from typing import Any

from utils.networks.shapes import Shapes, agreed, has, indices

ROOTS = r"image_proj|time_emb|context_emb|empty_context_embedding|down|middle|up|norm|final"
# What no parameter shows: AdaGN and DiffAE have the same ones, and without cross-attention nothing says how wide a head
# is. Of the published files (96 channels, IDiff-Face's) it is known.
PUBLISHED_HEAD_CHANNELS = 32
PUBLISHED_WIDTHS = (96, 192, 384, 768)


def describe(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Arguments of ConditionalUNet, those among them that the shapes do not show, and a line for the reader.

    Dropout probabilities are not among them: they change nothing outside training.
    """
    initial = agreed(
        shapes,
        (r"image_proj\..*", 0),
        (r"norm\..*", 0),
        (r"final\.weight", 1),
        (r"time_emb\.lin1\.weight", 1),
        default=96,
    )
    # Down: n blocks a level and a strided convolution between levels
    blocks = indices(shapes, r"down\.(\d+)\.res\.")
    strided = [i for i in indices(shapes, r"down\.(\d+)\.conv\.(?:weight|bias)$", at_least=1) if i not in blocks]
    levels = [
        [b for b in blocks if low < b < high] for low, high in zip([-1, *strided], [*strided, 10**9], strict=True)
    ]
    levels = [level for level in levels if level]
    widths = [agreed(shapes, *((rf"down\.{b}\.res\.conv2\..*", 0) for b in level), default=32) for level in levels]
    is_attention = [has(shapes, "|".join(rf"down\.{b}\.attn\..*" for b in level)) for level in levels]
    multipliers = [max(1, width // before) for before, width in zip([initial, *widths], widths, strict=False)]

    crosses = has(shapes, r".*\.attn\.cross_attention\..*")
    modulates = has(shapes, r".*\.res\.context_emb\.1\..*")
    conditional = crosses or modulates
    if crosses:
        condition_type = "CA"
    else:
        condition_type = "AdaGN" if has(shapes, r".*\.res\.scale_emb\..*") else "AddPlusGN"
    assumed: dict[str, Any] = {"condition_type": "AdaGN"} if conditional and condition_type == "AdaGN" else {}

    context_channels = agreed(
        shapes,
        (r".*\.c_proj_in\.weight", 1),
        (r".*\.c_norm\..*", 0),
        (r".*\.res\.context_emb\.1\.weight", 1),
        (r"context_emb\.bias", 0),
        (r"empty_context_embedding", 0),
        default=256,
    )
    projection = shapes.get("context_emb.weight", (context_channels, 512))
    is_embedding = (
        conditional and "context_emb.bias" not in shapes and len(projection) == 2 and projection[1] == context_channels
    )
    if crosses:
        tokens = agreed(shapes, (r".*\.c_proj_in\.weight", 0), default=0)
        head_channels = max(1, tokens // context_channels)
    else:
        head_channels = assumed["attention_head_channels"] = PUBLISHED_HEAD_CHANNELS
    heads = -1
    last = widths[-1] if widths else initial
    inner = agreed(shapes, (r"middle\.attn\.(self_)?attention\.to_[qkv]\.(weight|bias)", 0), default=last)
    if inner != last:
        heads = max(1, inner // head_channels)

    config = {
        "input_channels": agreed(shapes, (r"image_proj\.weight", 1), (r"final\..*", 0), default=3),
        "initial_channels": initial,
        "channel_multipliers": multipliers,
        "is_attention": is_attention,
        "attention_heads": heads,
        "attention_head_channels": head_channels,
        "n_blocks_per_resolution": max((len(level) for level in levels), default=1),
        "condition_type": condition_type,
        "is_context_conditional": conditional,
        "n_context_classes": projection[0] if is_embedding else 0,
        "context_input_channels": projection[1] if len(projection) == 2 and not is_embedding else 512,
        "context_channels": context_channels,
        "learn_empty_context": "empty_context_embedding" in shapes,
    }
    if tuple(widths) == PUBLISHED_WIDTHS and heads == -1:
        assumed = {}  # one of IDiff-Face's
    return config, assumed, _title(config, widths)


def _title(config: dict[str, Any], widths: list[int]) -> str:
    channels = "-".join(str(width) for width in widths)
    if not config["is_context_conditional"]:
        return f"an unconditional UNet of {channels} channels"
    classes = config["n_context_classes"]
    contexts = f"{classes} classes" if classes else f"contexts {config['context_input_channels']} wide"
    empty = ", a learnt empty context" if config["learn_empty_context"] else ""
    return f"a UNet of {channels} channels conditioned by {config['condition_type']}, {contexts}{empty}"
