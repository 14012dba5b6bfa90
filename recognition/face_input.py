"""One picture for a recogniser: an aligned crop as it is, or a photograph whose face is found and aligned first."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from utils.alignment import CROP_SIZE, FaceAligner
from utils.config import UserError
from utils.images import centre_square, image_size, read_image


def is_crop(path: str | Path, input_size: int) -> bool:
    """Whether an image has the size of an aligned crop: 112 x 112 pixels, or what the network takes.

    Raises UserError where the file is no image.
    """
    height, width = image_size(path)
    return height == width and height in (CROP_SIZE, input_size)


def face_crop(path: str | Path, aligner: FaceAligner | None) -> tuple[np.ndarray, str]:
    """The face in an image file, uint8 (s, s, 3) RGB, and a line on how it was taken.

    `aligner` finds the face nearest the image's centre and brings it to 112 x 112 on the template; None: the image is a
    crop already, of which the centred square is taken. Raises UserError where the file cannot be read or no face is
    found.
    """
    image = read_image(path)
    height, width = image.shape[:2]
    if aligner is None:
        return centre_square(image), f"{path}: {width} x {height} pixels, taken as an aligned crop"
    ((crop, detection),) = aligner.align([image])
    if crop is None:
        raise UserError(
            f"{path}: no face found in {width} x {height} pixels; one of at least {aligner.detector.min_face_size:g} "
            "pixels, upright, is wanted, or an aligned crop as align.py writes it"
        )
    others = f", the one nearest the centre of {detection.faces}" if detection.faces > 1 else ""
    return crop, f"{path}: face found{others} (probability {detection.probability:.3f}), aligned"
