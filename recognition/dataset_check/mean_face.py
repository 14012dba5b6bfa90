"""Whether faces stand where the aligned template puts them, seen in the mean of many images.

In the mean of aligned faces eyes, brows, nose and mouth are dark spots at the places of the template; the mean of
others is a smear, or shows them elsewhere. The mean is compared with a reference, mean_face.png, which is the mean of
rendered people aligned on their true landmarks; this command makes it anew:

    python -m recognition.dataset_check.mean_face

Legend: S = 112, the side of the template in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from recognition.dataset_check.findings import Outcome
from utils.alignment import norm_crop
from utils.config import command_line
from utils.data.formats.check import FACE_SIZE
from utils.data.rendered import render_with_landmarks, sample_identity, sample_nuisance
from utils.images import read_image, write_image

REFERENCE = Path(__file__).with_name("mean_face.png")
LUMA = np.array([0.299, 0.587, 0.114])
FINE, COARSE = 1.0, 4.0  # sigmas of the band of scales that is compared, in pixels of S / 2
# Where brows, eyes, nose and mouth are, rows 36..104 and columns 20..92 of S, in pixels of S / 2
WINDOW = np.s_[18:52, 10:46]
SCALES = 2.0 ** (np.arange(-8, 5) / 8)  # 0.5 to 1.4: size of the face, the template's being 1

# Correlations of rendered faces with the reference are 0.99, of LFW aligned by MTCNN 0.6 (it has other noses), with 10
# images 0.8 and 0.5; unaligned rendered faces give 0.1, LFW's own crops 0.2, LFW 4 pixels off 0.3, upside down -0.4.
ALIGNED = 0.4
FACE_FOUND = 0.6  # the same, at the best place and size: 0.75 for LFW, 0.4 for a smear
MAX_SHIFT = 4.5  # pixels of S; LFW: 2
SCALE_RANGE = (0.75, 1.3)  # LFW: 0.84
MIN_IMAGES = 20


@dataclass(frozen=True)
class Fit:
    """How a mean face and the reference agree."""

    correlation: float  # at the template's place and size, -1 to 1
    best_correlation: float  # at the best place and size
    scale: float  # size of the face there, the template's being 1
    shift: tuple[float, float]  # of the face's centre there, (right, down) in pixels of S


def check_mean_face(mean_face: np.ndarray | None, num_images: int) -> tuple[Outcome, bool]:
    """Compare the mean of `num_images` images, uint8 (S, S, 3), with the reference.

    Returns the outcome, and whether the images show faces at the template's place.
    """
    outcome = Outcome()
    if mean_face is None or num_images < MIN_IMAGES:
        outcome.facts["mean_face"] = f"none made: {num_images} images, {MIN_IMAGES} are needed"
        return outcome, False
    fit = fit_mean_face(mean_face)
    outcome.facts["mean_face"] = {
        "correlation": round(fit.correlation, 3),
        "best_correlation": round(fit.best_correlation, 3),
        "best_scale": round(fit.scale, 3),
        "best_shift": [round(value, 1) for value in fit.shift],
    }
    seen = f"the mean face agrees with that of aligned faces by {fit.correlation:.2f} ({ALIGNED} or more is usual)"
    right, down = fit.shift
    off = max(abs(right), abs(down)) > MAX_SHIFT or not SCALE_RANGE[0] <= fit.scale <= SCALE_RANGE[1]
    if fit.best_correlation >= FACE_FOUND and (off or fit.correlation < ALIGNED):
        outcome.warning(
            "alignment",
            f"{seen}, best {abs(right):.0f} pixels to the {'right' if right > 0 else 'left'}, {abs(down):.0f} "
            f"{'down' if down > 0 else 'up'} and {fit.scale:.2f} times as large ({fit.best_correlation:.2f})",
            "crops with more background, of another template, or not aligned",
            "align.py puts faces where recognisers and benchmarks have them",
        )
        return outcome, False
    if fit.correlation < ALIGNED:
        outcome.warning(
            "alignment",
            f"{seen}, and nowhere by more than {fit.best_correlation:.2f}",
            "images that are not aligned, or show no faces",
            "look at mean_face.png; align.py aligns them",
        )
        return outcome, False
    return outcome, True


def fit_mean_face(mean_face: np.ndarray, reference: np.ndarray | None = None) -> Fit:
    """Correlate the band-passed mean face, uint8 (S, S, 3), with the reference's over places and sizes.

    The normalised cross-correlation knows neither brightness nor contrast, so that the tone of skin, the light and
    the number of images matter little. `reference`: uint8 (S, S, 3); None: mean_face.png.
    """
    template = _unit(_band_pass(_reference() if reference is None else reference @ LUMA)[WINDOW])
    grey = mean_face @ LUMA
    here = float((_unit(_band_pass(grey)[WINDOW]) * template).sum())
    centre = np.array([(part.start + part.stop) / 2 for part in WINDOW])  # (row, column) in pixels of S / 2
    best = Fit(here, here, 1.0, (0.0, 0.0))
    for scale in SCALES:
        side = 2 * round(FACE_SIZE / scale / 2)
        resized = Image.fromarray(grey.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
        image = _band_pass(np.asarray(resized, np.float64))
        if min(image.shape) < max(template.shape):
            continue
        places = np.lib.stride_tricks.sliding_window_view(image, template.shape)  # (rows, columns, *window)
        deviation = np.sqrt(places.var(axis=(2, 3)) * template.size)
        correlation = np.einsum("abij,ij->ab", places, template) / np.maximum(deviation, 1e-9)
        row, column = np.unravel_index(correlation.argmax(), correlation.shape)
        if correlation[row, column] > best.best_correlation:
            found = (np.array([row, column]) + np.array(template.shape) / 2) * FACE_SIZE / side
            down, right = 2 * (found - centre)
            best = Fit(here, float(correlation[row, column]), FACE_SIZE / side, (float(right), float(down)))
    return best


def render_mean_face(people: int, images: int, seed: int = 0) -> np.ndarray:
    """The mean of `images` aligned photographs of each of so many rendered people and of their mirror images, grey:
    uint8 (S, S, 3)."""
    total = np.zeros((FACE_SIZE, FACE_SIZE), np.float64)
    for person in tqdm(range(people), desc="rendering", unit="person"):
        identity = sample_identity(seed, person)
        for k in range(images):
            total += norm_crop(*render_with_landmarks(identity, sample_nuisance(seed, person, k), 96)) @ LUMA
    mean = total / (people * images)
    return np.repeat(np.rint((mean + mean[:, ::-1]) / 2).astype(np.uint8)[..., None], 3, axis=2)


@cache
def _reference() -> np.ndarray:
    return read_image(REFERENCE) @ LUMA


def _band_pass(grey: np.ndarray) -> np.ndarray:
    """(2 h, 2 w) => (h, w): half the resolution, without what is finer than FINE or coarser than COARSE."""
    height, width = grey.shape
    half = grey.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
    return _blur(half, FINE) - _blur(half, COARSE)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    radius = int(3 * sigma) + 1
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        padding = [(radius, radius) if axis == k else (0, 0) for k in (0, 1)]
        padded = np.pad(image, padding, mode="edge")
        image = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=axis) @ kernel
    return image


def _unit(values: np.ndarray) -> np.ndarray:
    """Mean 0, length 1; zeros where all values are the same."""
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-9)


def main() -> int:
    """Write mean_face.png."""
    write_image(REFERENCE, render_mean_face(people=300, images=2))
    return 0


if __name__ == "__main__":
    command_line(main)
