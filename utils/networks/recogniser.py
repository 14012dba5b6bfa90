"""The settings of recognition backbones from their shapes: IR and IR-SE (TFace's names), iresnet (insightface's).

face.evoLVe, CurricularFace and AdaFace use TFace's names too; what differs shows in the shapes: an affine last norm, a
unit without its inner batch norm, a gate that is the sixth entry of its unit, no bottlenecks from 152 layers on.
"""

import math
import re
from typing import Any

from utils.networks.shapes import Shapes, agreed, has, indices, matching

IR_ROOTS = r"input_layer|body|output_layer"
IRESNET_ROOTS = r"conv1|bn1|prelu|layer[1-4]|bn2|fc|features"
INCEPTION_ROOTS = r"conv2d_\d[ab]|mixed_[67]a|repeat_[123]|block8|last_linear|last_bn|logits"
# Units in all, by the depth in the name
IR_UNITS = {8: 18, 16: 34, 24: 50, 49: 101, 50: 152, 66: 200}
IRESNET_UNITS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34, (3, 4, 14, 3): 50, (3, 13, 30, 3): 100, (6, 26, 60, 6): 200}
STEM_CHANNELS, STRIDE = 64, 16  # of the published networks; four stages halve the side
NUMBERED_GATE = re.compile(r"(body\.\d+\.res_layer\.)\d+\.(fc[12]\.)")  # a squeeze-and-excitation gate without a name


def rename(name: str) -> str:
    """A parameter's name as this project's networks have it."""
    return NUMBERED_GATE.sub(r"\1se_block.\2", name)


def describe_ir(shapes: Shapes) -> tuple[dict[str, Any], str]:
    """Arguments of build_backbone (but `dropout`, which is for training), and a line for the reader."""
    units = len(indices(shapes, r"body\.(\d+)\."))
    depth = IR_UNITS.get(units)
    kind = "ir_se" if has(shapes, r"body\..*\.se_block\..*") else "ir"
    bottleneck = _most(shapes, units, r"body\.\d+\.res_layer\.7\.weight")
    channels = agreed(shapes, (r"output_layer\.0\.(weight|bias|running_.*)", 0), default=512)
    config = {
        "name": f"{kind}_{depth}",
        **_common(shapes, r"output_layer\.3", r"output_layer\.4\..*", r"input_layer\.[012]\..*", channels),
        "affine_output": True if has(shapes, r"output_layer\.4\.(weight|bias)", at_least=1) else None,
        "inner_norm": bottleneck or _most(shapes, units, r"body\.\d+\.res_layer\.2\.running_mean"),
        "bottleneck": bottleneck,
    }
    if depth is None:
        return config, f"an {kind.upper().replace('_', '-')} recogniser of {units} units, a depth that is not known"
    details = [] if config["inner_norm"] else ["units without inner norm"]
    details += ["affine last norm"] if config["affine_output"] else []
    return config, _title(config, f"an {kind.upper().replace('_', '-')}-{depth} recogniser", details)


def describe_iresnet(shapes: Shapes) -> tuple[dict[str, Any], str]:
    """Arguments of build_backbone, and a line for the reader."""
    units = tuple(len(indices(shapes, rf"layer{stage}\.(\d+)\.")) for stage in (1, 2, 3, 4))
    depth = IRESNET_UNITS.get(units)
    channels = agreed(shapes, (r"bn2\.(weight|bias|running_.*)", 0), default=512)
    stem = r"(conv1|bn1|prelu)\..*"
    config = {"name": f"iresnet{depth}", **_common(shapes, "fc", r"features\..*", stem, channels)}
    if depth is None:
        return config, f"an iresnet of {units} units, a depth that is not known"
    return config, _title(config, f"an iresnet{depth} recogniser", [])


def _common(shapes: Shapes, linear: str, last_norm: str, stem: str, channels: int) -> dict[str, Any]:
    """Settings that both families have, from the layers around the units."""
    features = agreed(shapes, (rf"{linear}\.(weight|bias)", 0), (last_norm, 0), default=512)
    inputs = agreed(shapes, (rf"{linear}\.weight", 1), default=channels * 49)
    first = agreed(shapes, (stem, 0), default=STEM_CHANNELS)
    return {
        "input_size": STRIDE * max(1, math.isqrt(inputs // channels)),
        "num_features": features,
        "width": first / STEM_CHANNELS,
    }


def _most(shapes: Shapes, units: int, pattern: str) -> bool:
    return 2 * len(list(matching(shapes, pattern))) > units


def _title(config: dict[str, Any], name: str, details: list[str]) -> str:
    size = config["input_size"]
    return ", ".join([f"{name} ({size} x {size} pixels => {config['num_features']} numbers)", *details])
