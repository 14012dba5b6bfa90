"""Training augmentation of aligned faces, one image at a time, every random number from the generator that is passed.

Legend: S side in pixels; images are uint8 (S, S, 3) RGB, going in and coming out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recognition.augment.operations import (
    crop_on_black,
    gaussian_blur,
    low_resolution,
    mirror,
    photometric,
    random_erasing,
    resized_crop,
)
from recognition.augment.rand_augment import BINS, rand_augment
from utils.config import UserError

OPERATIONS = ("flip", "resized_crop", "crop", "low_resolution", "photometric", "rand_augment", "blur", "erasing")


@dataclass
class Augmentation:
    """Probabilities of the operations, each drawn on its own, applied in the order of the fields.

    configs/augment/ holds the published combinations. `crop`, `low_resolution` and `photometric` are those of AdaFace
    (Kim et al., CVPR 2022, section 4.1); `resized_crop` instead blows the crop up to the whole image, as ADMIS trains
    (FRCSyn, CVPR 2024); `rand_augment` (Cubuk et al., 2020) as IDiff-Face trains; `erasing` is that of Zhong et al.
    (AAAI 2020).
    """

    flip: float = 0.5
    resized_crop: float = 0.0
    crop: float = 0.0
    low_resolution: float = 0.0
    photometric: float = 0.0
    rand_augment: float = 0.0
    blur: float = 0.0
    erasing: float = 0.0
    rand_augment_operations: int = 4  # how many, one after the other
    rand_augment_magnitude: int = 16  # the largest of the 31 bins; each operation's own is uniform in 1 .. this

    def __post_init__(self) -> None:
        for name in OPERATIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name}: {getattr(self, name)}; a probability in [0, 1] is wanted")
        if self.rand_augment_operations < 1:
            raise UserError(f"augment.rand_augment_operations: {self.rand_augment_operations}; at least 1 is wanted")
        if not 1 <= self.rand_augment_magnitude < BINS:
            raise UserError(
                f"augment.rand_augment_magnitude: {self.rand_augment_magnitude}; a bin from 1 to {BINS - 1} is wanted"
            )

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Augment uint8 (S, S, 3); where nothing is to be done the result is `image` itself."""
        draws = dict(zip(OPERATIONS, generator.random(len(OPERATIONS)), strict=True))
        if draws["flip"] < self.flip:
            image = mirror(image)
        if draws["resized_crop"] < self.resized_crop:
            image = resized_crop(image, generator)
        if draws["crop"] < self.crop:
            image = crop_on_black(image, generator)
        if draws["low_resolution"] < self.low_resolution:
            image = low_resolution(image, generator)
        if draws["photometric"] < self.photometric:
            image = photometric(image, generator)
        if draws["rand_augment"] < self.rand_augment:
            image = rand_augment(image, generator, self.rand_augment_operations, self.rand_augment_magnitude)
        if draws["blur"] < self.blur:
            image = gaussian_blur(image, generator)
        if draws["erasing"] < self.erasing:
            image = random_erasing(image, generator)
        return image


__all__ = [
    "Augmentation",
    "crop_on_black",
    "gaussian_blur",
    "low_resolution",
    "mirror",
    "photometric",
    "rand_augment",
    "random_erasing",
    "resized_crop",
]
