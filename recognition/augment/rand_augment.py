"""RandAugment (Cubuk et al., 2020) with the 13 operations that IDiff-Face trains its recognisers with.

Their paper's operations for natural images, without those that move a face up or down, and with greyscale. Geometry
takes the nearest pixel and leaves black behind. Legend: S side in pixels, m magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

BINS = 31  # bin 0 does nothing (or next to it), bin 30 is the strongest
Picture = Image.Image


@dataclass(frozen=True)
class Operation:
    """What one operation does, `apply(picture, m)`, and its m at bin 0 and bin 30, linear between."""

    apply: Callable[[Picture, float], Picture]
    weakest: float = 0.0
    strongest: float = 0.0
    signed: bool = False  # m is negated in one half of the cases

    def magnitude(self, bin: int) -> float:
        """m of a bin in 0 .. BINS - 1."""
        return self.weakest + (self.strongest - self.weakest) * bin / (BINS - 1)


def shear_x(picture: Picture, m: float) -> Picture:
    """Every row moves by m of its distance from the upper edge, to the left for m above 0."""
    return picture.transform(picture.size, Image.Transform.AFFINE, (1, m, 0, 0, 1, 0), Image.Resampling.NEAREST)


def translate_x(picture: Picture, m: float) -> Picture:
    """Move to the right by m of the width, in whole pixels."""
    pixels = int(m * picture.width)
    return picture.transform(picture.size, Image.Transform.AFFINE, (1, 0, -pixels, 0, 1, 0), Image.Resampling.NEAREST)


def enhanced(kind: type) -> Callable[[Picture, float], Picture]:
    """One of Pillow's enhancements with the factor 1 + m: 0 takes the property away, 1 leaves it, 1.9 is the most."""
    return lambda picture, m: kind(picture).enhance(1 + m)


# m in shares of the side (shear, translation), degrees, factors off 1, bits kept, the level from which it is inverted
OPERATIONS: dict[str, Operation] = {
    "identity": Operation(lambda picture, m: picture),
    "shear_x": Operation(shear_x, 0.0, 0.3, signed=True),
    "translate_x": Operation(translate_x, 0.0, 150 / 331, signed=True),
    "rotate": Operation(lambda picture, m: picture.rotate(m, Image.Resampling.NEAREST), 0.0, 30.0, signed=True),
    "brightness": Operation(enhanced(ImageEnhance.Brightness), 0.0, 0.9, signed=True),
    "colour": Operation(enhanced(ImageEnhance.Color), 0.0, 0.9, signed=True),
    "contrast": Operation(enhanced(ImageEnhance.Contrast), 0.0, 0.9, signed=True),
    "sharpness": Operation(enhanced(ImageEnhance.Sharpness), 0.0, 0.9, signed=True),
    "posterise": Operation(lambda picture, m: ImageOps.posterize(picture, round(m)), 8.0, 4.0),
    "solarise": Operation(lambda picture, m: ImageOps.solarize(picture, m), 255.0, 0.0),
    "autocontrast": Operation(lambda picture, m: ImageOps.autocontrast(picture)),
    "equalise": Operation(lambda picture, m: ImageOps.equalize(picture)),
    "greyscale": Operation(lambda picture, m: picture.convert("L").convert("RGB")),
}


def rand_augment(
    image: np.ndarray, generator: np.random.Generator, num_operations: int = 4, largest_bin: int = 16
) -> np.ndarray:
    """`num_operations` drawn with replacement, each at a bin uniform in 1 .. largest_bin, one after the other.

    uint8 (S, S, 3) => the same.
    """
    choices = generator.integers(len(OPERATIONS), size=num_operations)
    bins = generator.integers(1, largest_bin + 1, size=num_operations)
    negative = generator.random(num_operations) < 0.5
    operations = list(OPERATIONS.values())
    picture = Image.fromarray(np.ascontiguousarray(image))
    for choice, bin, minus in zip(choices, bins, negative, strict=True):
        operation = operations[choice]
        m = operation.magnitude(int(bin))
        picture = operation.apply(picture, -m if operation.signed and minus else m)
    return np.asarray(picture)
