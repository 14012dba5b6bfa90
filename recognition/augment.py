"""Training augmentation of aligned faces, one image at a time, every random number from the generator that is passed.

Legend: S side in pixels; images are uint8 (S, S, 3) RGB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

from utils.config import UserError

CROP_SCALE = (0.2, 1.0)  # share of the area
CROP_RATIO = (3 / 4, 4 / 3)  # width / height
LOW_RESOLUTION_SCALE = (0.2, 1.0)  # of the side
JITTER = 0.5  # factors of brightness, contrast and saturation are uniform in 1 -+ this
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
FILTERS = (
    Image.Resampling.NEAREST,
    Image.Resampling.BILINEAR,
    Image.Resampling.BOX,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)


@dataclass
class Augmentation:
    """Probabilities of the operations, each drawn on its own, applied in the order of the fields.

    `crop`, `low_resolution` and `photometric` are those of AdaFace (Kim et al., CVPR 2022); `resized_crop`
    instead blows the crop up to the whole image, as ADMIS trains (FRCSyn, CVPR 2024).
    """

    flip: float = 0.5
    resized_crop: float = 0.0
    crop: float = 0.0
    low_resolution: float = 0.0
    photometric: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                raise UserError(f"augment.{field.name}: {getattr(self, field.name)}; a probability in [0, 1] is wanted")

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Augment uint8 (S, S, 3); the result may be a view of `image`."""
        draws = generator.random(5)
        if draws[0] < self.flip:
            image = image[:, ::-1]
        if draws[1] < self.resized_crop:
            image = resized_crop(image, generator)
        if draws[2] < self.crop:
            image = crop_on_black(image, generator)
        if draws[3] < self.low_resolution:
            image = low_resolution(image, generator)
        if draws[4] < self.photometric:
            image = photometric(image, generator)
        return image


def crop_box(height: int, width: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width) of CROP_SCALE of the area and CROP_RATIO, inside the image."""
    for _ in range(10):
        area = height * width * generator.uniform(*CROP_SCALE)
        ratio = math.exp(generator.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(generator.integers(height - box_height + 1))
            left = int(generator.integers(width - box_width + 1))
            return top, left, box_height, box_width
    return 0, 0, height, width  # faces are square, so the whole image has a ratio within the range


def crop_on_black(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Keep a random box at its place and size; black everything else."""
    top, left, height, width = crop_box(*image.shape[:2], generator)
    box = np.s_[top : top + height, left : left + width]
    result = np.zeros_like(image)
    result[box] = image[box]
    return result


def resized_crop(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Blow a random box up to the whole image, bilinearly."""
    top, left, height, width = crop_box(*image.shape[:2], generator)
    picture = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
    return np.asarray(picture.resize(image.shape[1::-1], Image.Resampling.BILINEAR))


def low_resolution(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Shrink the side by U(0.2, 1) and blow it up again, each way with a filter drawn from FILTERS."""
    side = max(1, int(image.shape[0] * generator.uniform(*LOW_RESOLUTION_SCALE)))
    down, up = (FILTERS[k] for k in generator.integers(len(FILTERS), size=2))
    picture = Image.fromarray(np.ascontiguousarray(image)).resize((side, side), down)
    return np.asarray(picture.resize(image.shape[1::-1], up))


def photometric(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Jitter brightness, contrast and saturation in a random order; the hue stays."""
    pixels = image.astype(np.float32)  # 0..255
    for operation, factor in zip(generator.permutation(3), generator.uniform(1 - JITTER, 1 + JITTER, 3), strict=True):
        if operation == 0:  # brightness: towards black
            anchor = np.float32(0)
        elif operation == 1:  # contrast: towards the mean grey
            anchor = (pixels @ LUMA).mean()
        else:  # saturation: towards each pixel's grey
            anchor = (pixels @ LUMA)[..., None]
        pixels = np.clip(anchor + np.float32(factor) * (pixels - anchor), 0, 255)
    return np.rint(pixels).astype(np.uint8)
