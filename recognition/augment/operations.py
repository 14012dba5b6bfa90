"""The operations of a training augmentation, but for RandAugment's.

Legend: S side in pixels; images are uint8 (S, S, 3) RGB, going in and coming out; none is changed in place.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageFilter

CROP_SCALE = (0.2, 1.0)  # share of the area
CROP_RATIO = (3 / 4, 4 / 3)  # width / height
LOW_RESOLUTION_SCALE = (0.2, 1.0)  # of the side
JITTER = 0.5  # factors of brightness, contrast and saturation are uniform in 1 -+ this
LUMA = (0.299, 0.587, 0.114)
FILTERS = (
    Image.Resampling.NEAREST,
    Image.Resampling.BILINEAR,
    Image.Resampling.BOX,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
ERASED_SHARE = (0.02, 0.4)  # s_l, s_h: of the area
ERASED_RATIO = (0.3, 1 / 0.3)  # r_1, r_2: height / width
ERASING_TRIES = 100
BLUR_SIGMA = (0.1, 2.0)  # pixels at any size


def mirror(image: np.ndarray) -> np.ndarray:
    """Left and right exchanged."""
    # NumPy copies a mirrored view pixel by pixel, which takes five times as long
    image = image if image.flags.writeable else image.copy()  # torch warns of what it may not write
    return torch.from_numpy(image).flip(1).numpy()


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
    """Jitter brightness, contrast and saturation in a random order; the hue stays.

    Each moves the pixels away from, or towards, an anchor: factor pixel + (1 - factor) anchor, within 0..255.
    """
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)  # (3, S, S): whole planes are quicker
    for operation, factor in zip(generator.permutation(3), generator.uniform(1 - JITTER, 1 + JITTER, 3), strict=True):
        if operation == 0:  # brightness: black
            anchor = np.float32(0)
        elif operation == 1:  # contrast: the mean grey
            anchor = grey_levels(pixels).mean()
        else:  # saturation: each pixel's grey
            anchor = grey_levels(pixels)
        pixels *= np.float32(factor)
        pixels += np.float32(1 - factor) * anchor
        np.clip(pixels, 0, 255, out=pixels)
    levels = np.rint(pixels, out=pixels).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0))


def grey_levels(planes: np.ndarray) -> np.ndarray:
    """float32 (3, S, S) => (S, S): the luminance of ITU-R BT.601, as Pillow's greyscale has it."""
    red, green, blue = (plane * np.float32(share) for plane, share in zip(planes, LUMA, strict=True))
    red += green
    red += blue
    return red


def random_erasing(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Fill a random rectangle with random pixels (Zhong et al., AAAI 2020, algorithm 1 with their RE-R)."""
    height, width = image.shape[:2]
    for _ in range(ERASING_TRIES):  # the paper's loop has no end; one try in three or so fits
        area = height * width * generator.uniform(*ERASED_SHARE)  # S_e
        ratio = generator.uniform(*ERASED_RATIO)  # r_e
        rows, columns = int(math.sqrt(area * ratio)), int(math.sqrt(area / ratio))  # H_e, W_e
        top, left = int(generator.integers(height)), int(generator.integers(width))
        if top + rows <= height and left + columns <= width:
            image = image.copy()
            image[top : top + rows, left : left + columns] = generator.integers(
                256, size=(rows, columns, 3), dtype=np.uint8
            )
            break
    return image


def gaussian_blur(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Blur with a standard deviation from U(0.1, 2) pixels (three box filters that come near a Gaussian)."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(generator.uniform(*BLUR_SIGMA))))
