"""The two-stage sampler's threshold for one checkpoint, measured on a few images.

d_t scales with the model, the contexts and the stride between timesteps, so a threshold belongs to a checkpoint and a
number of steps (UIFace's 0.006 to the published model at 50). What means the same everywhere is the timestep at which
the median image takes its identity.
Legend: S steps of stage 1, n images.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from diffusion.samplers import calibrate_threshold
from utils.checkpoint import write_json
from utils.config import UserError

CALIBRATION_FILE = "calibration.json"


@dataclass
class CalibrationSettings:
    """The section `sampling.calibration` of sample_ddim_config.yaml."""

    target_t: int = 700  # timestep at which the median image shall switch
    n_contexts: int = 16  # images to measure on


@dataclass
class Calibration:
    """What was measured, as calibration.json keeps it."""

    threshold: float
    target_t: int
    timesteps: list[int]  # (S - 1,) those of the rows of d, descending
    d: list[list[float]]  # (S - 1, n), drawn with threshold 0


def calibrate(d: Tensor, timesteps: Sequence[int], target_t: int, save_dir: str | Path) -> Calibration:
    """Find the threshold with which the median image of d (S - 1, n) switches at `target_t`; keep calibration.json.

    `timesteps` are all of the sampler's, descending.
    """
    threshold = calibrate_threshold(d, timesteps, target_t)
    calibration = Calibration(threshold, target_t, list(timesteps[1 : len(d) + 1]), d.tolist())
    write_json(Path(save_dir) / CALIBRATION_FILE, asdict(calibration))
    return calibration


def read_calibration(save_dir: str | Path) -> Calibration | None:
    """The calibration that an earlier run of the same settings kept in the folder; UserError for a damaged file."""
    path = Path(save_dir) / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        return Calibration(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and the threshold is measured again") from error
