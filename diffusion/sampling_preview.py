"""`preview.html`: a look at a generated data set.

One file that holds its pictures, so that the folder of a data set has no images but its own.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from diffusion.calibration import Calibration
from utils import charts, page
from utils.checkpoint import write_text
from utils.images import encode_image, grid

ROWS, COLUMNS = 8, 8  # people and images of each
PREVIEW_FILE = "preview.html"

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style} img {{ max-width: 100%; height: auto; margin-top: 18px }} svg {{ max-width: 720px }}</style>
<main>
<h1>{title}</h1>
<p>{caption}</p>
<img alt="generated faces, one row a person" src="{faces}">
{curves}
</main>
</html>
"""


def write_preview(
    save_dir: str | Path, rows: Sequence[np.ndarray], names: Sequence[str], calibration: Calibration | None
) -> Path:
    """Write the page. rows: uint8 (k, H, W, 3) per person, k the same for all; names: theirs."""
    save_dir = Path(save_dir)
    faces = encode_image(grid(np.concatenate(list(rows)), columns=len(rows[0])))
    curves = ""
    if calibration is not None:
        curves = (
            f"<h2>Threshold</h2><p>{calibration.threshold:.4g}, measured on {len(calibration.d[0])} images: the median "
            f"one takes its identity at t = {calibration.target_t}. Faint: each image's change of the attention map d. "
            f"Strong: their median. Dashed: the threshold.</p>"
            + charts.map_changes(calibration.timesteps, np.asarray(calibration.d), calibration.threshold)
        )
    text = _PAGE.format(
        title=escape(save_dir.resolve().name),
        caption=f"One row a person: {escape(', '.join(names))}.",
        style=page.STYLE,
        faces=page.data_uri(faces, "image/png"),
        curves=curves,
    )
    return write_text(save_dir / PREVIEW_FILE, text)
