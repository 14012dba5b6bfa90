"""`preview.html`: a look at a generated data set.

One file that holds its pictures, so that the folder of a data set has no images but its own.

Legend: S steps of stage 1, n images.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from diffusion.calibration import Calibration
from utils.checkpoint import write_text
from utils.images import encode_image, grid

ROWS, COLUMNS = 8, 8  # people and images of each
PREVIEW_FILE = "preview.html"
_WIDTH, _HEIGHT, _MARGIN = 720, 360, 56  # of the drawing

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem }}
img, svg {{ max-width: 100%; height: auto }}</style>
<h1>{title}</h1>
<p>{caption}</p>
<img alt="generated faces, one row a person" src="data:image/png;base64,{faces}">
{curves}
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
            f"one takes its identity at t = {calibration.target_t}. Grey: each image's change of the attention map d. "
            f"Black: their median. Dashed: the threshold.</p>{_curves(calibration)}"
        )
    page = _PAGE.format(
        title=escape(save_dir.resolve().name),
        caption=f"One row a person: {escape(', '.join(names))}.",
        faces=base64.b64encode(faces).decode(),
        curves=curves,
    )
    return write_text(save_dir / PREVIEW_FILE, page)


def _curves(calibration: Calibration) -> str:
    """d_t over t as SVG, logarithmic; time runs from left to right as sampling does."""
    d = np.log10(np.maximum(np.asarray(calibration.d), 1e-12))  # (S - 1, n)
    limit = np.log10(calibration.threshold)
    low, high = min(d.min(), limit), max(d.max(), limit)
    times = calibration.timesteps
    bottom, right = _HEIGHT - _MARGIN, _WIDTH - 20

    def x(t: float) -> float:
        return _MARGIN + (times[0] - t) / max(times[0] - times[-1], 1) * (right - _MARGIN)

    def y(value: float) -> float:
        return bottom - (value - low) / max(high - low, 1e-9) * (bottom - 10)

    def line(values: np.ndarray, style: str) -> str:
        points = " ".join(f"{x(t):.1f},{y(value):.1f}" for t, value in zip(times, values, strict=True))
        return f'<polyline points="{points}" fill="none" {style}/>'

    def label(left: float, top: float, text: str, anchor: str) -> str:
        return f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}" font-size="13">{text}</text>'

    parts = [line(image, 'stroke="#bbb"') for image in d.T]
    parts.append(line(np.median(d, axis=1), 'stroke="black" stroke-width="2"'))
    parts.append(f'<path d="M{_MARGIN},{y(limit):.1f}H{right}" stroke="#c00" stroke-dasharray="6 4"/>')
    parts.append(f'<path d="M{_MARGIN},10V{bottom}H{right}" fill="none" stroke="black"/>')
    parts += [label(_MARGIN - 6, y(value) + 4, f"{10**value:.2g}", "end") for value in (low, limit, high)]
    parts += [label(x(t), bottom + 18, str(t), "middle") for t in times[:: max(1, len(times) // 8)]]
    parts.append(label((_MARGIN + right) / 2, _HEIGHT - 6, "timestep t", "middle"))
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="d over t">{"".join(parts)}</svg>'
