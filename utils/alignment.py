"""Face alignment: five landmarks, a similarity transform, a 112 x 112 crop on the ArcFace template.

Legend: H W height and width. Landmarks are (5, 2) as (x, y) in pixels, the centre of the first pixel being (0, 0): left
eye, right eye, nose, left and right mouth corner, left and right as seen in the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from utils.images import resize
from utils.mtcnn import MTCNN, Faces

CROP_SIZE = 112
# Where ArcFace (Deng et al., CVPR 2019) and its successors put the landmarks at 112 x 112. The template 8 px to the
# left, which also circulates, belongs to crops of 96 x 112.
TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
# Bounds the memory of one detection: 32 photographs of 256 x 256.
PIXELS_AT_ONCE = 2**21


def similarity_matrix(landmarks: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift, without reflection, that bring landmarks (5, 2) nearest to the template: (2, 3).

    The least-squares solution (Umeyama, PAMI 1991). In the plane a rotation with scale is the multiplication by one
    complex number, so it is a linear regression. Raises ValueError where the landmarks coincide or are not finite.
    """
    landmarks = np.asarray(landmarks, np.float64)
    if landmarks.shape != (5, 2) or not np.isfinite(landmarks).all():
        raise ValueError(f"landmarks are five finite points (5, 2), got {landmarks.tolist()}")
    source, target = (points[:, 0] + 1j * points[:, 1] for points in (landmarks, TEMPLATE))
    centred = source - source.mean()
    spread = np.vdot(centred, centred).real
    if spread < 1e-12:
        raise ValueError(f"the five landmarks coincide at {landmarks[0].tolist()}")
    turn = np.vdot(centred, target) / spread
    shift = target.mean() - turn * source.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def alignment_error(landmarks: np.ndarray) -> float:
    """How far landmarks (5, 2) stay from the template once aligned: RMS distance in pixels of the 112 x 112 crop.

    Frontal faces lie near it; profiles and wrong landmarks do not. ValueError as `similarity_matrix`.
    """
    matrix = similarity_matrix(landmarks)
    aligned = np.asarray(landmarks, np.float64) @ matrix[:, :2].T + matrix[:, 2]
    return float(np.sqrt(np.square(aligned - TEMPLATE).sum(axis=1).mean()))


def warp(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Apply an affine transform (2, 3) of pixel coordinates to uint8 (H, W, 3): (size, size, 3).

    Bilinear; pixels outside the image count as black, and pixel centres are whole numbers (the convention of OpenCV's
    warpAffine).
    """
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    inverse = np.linalg.inv(np.vstack([matrix, (0, 0, 1)]))[:2]
    x, y = np.tensordot(inverse, np.stack([x, y, np.ones_like(x)]), axes=1)  # each (size, size): where to look
    height, width = image.shape[:2]
    padded = np.pad(image, ((1, 2), (1, 2), (0, 0)))  # one black pixel before, two behind: the neighbours always exist
    x, y = np.clip(x, -1, width) + 1, np.clip(y, -1, height) + 1
    left, top = x.astype(np.int64), y.astype(np.int64)
    right_share, lower_share = (x - left)[..., None], (y - top)[..., None]
    upper = padded[top, left] * (1 - right_share) + padded[top, left + 1] * right_share
    lower = padded[top + 1, left] * (1 - right_share) + padded[top + 1, left + 1] * right_share
    return np.rint(upper * (1 - lower_share) + lower * lower_share).astype(np.uint8)


def norm_crop(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Align uint8 (H, W, 3) by its landmarks (5, 2): the crop (112, 112, 3), black where the image does not reach."""
    return warp(image, similarity_matrix(landmarks), CROP_SIZE)


@dataclass
class Detection:
    """What the detector said of one image: the chosen face and how many there were. `landmarks` None: no face."""

    landmarks: np.ndarray | None = None  # (5, 2)
    probability: float | None = None
    faces: int = 0


class FaceAligner:
    """Finds the face nearest the centre of an image and aligns it.

    min_face_size: least side of a face in pixels, as the detector sees it (after detection_size).
    detection_size: images whose shorter side is smaller are enlarged to it for the detector, which misses small faces.
    detection_padding: edge pixels repeated on every side for the detector, as a share of the shorter side: it misses
        faces that fill the image. Crops are always cut from the image itself.
    """

    def __init__(
        self,
        *,
        min_face_size: float = 20,
        detection_size: int = 112,
        detection_padding: float = 0.1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.detector = MTCNN(min_face_size).to(device)
        self.detection_size = detection_size
        self.detection_padding = detection_padding

    def detect(self, images: Sequence[np.ndarray]) -> list[Detection]:
        """Detect in uint8 (H, W, 3) images, each of any size; those of one size share batches."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(image.shape[:2], []).append(index)
        results: list[Detection] = [Detection()] * len(images)
        for (height, width), indices in groups.items():
            scale = max(1.0, self.detection_size / min(height, width))
            enlarged = (round(height * scale), round(width * scale))
            padding = round(self.detection_padding * min(enlarged))
            batch = max(1, PIXELS_AT_ONCE // ((enlarged[0] + 2 * padding) * (enlarged[1] + 2 * padding)))
            for start in range(0, len(indices), batch):
                part = indices[start : start + batch]
                seen = resize(np.stack([images[index] for index in part]), enlarged)
                seen = np.pad(seen, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="edge")
                ratio = np.array([width / enlarged[1], height / enlarged[0]], np.float32)
                for index, faces in zip(part, self.detector.detect(torch.from_numpy(seen)), strict=True):
                    results[index] = _nearest_centre(faces, seen.shape[1:3], padding, ratio)
        return results

    def align(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray | None, Detection]]:
        """Align uint8 (H, W, 3) images: for each the crop (112, 112, 3), or None where no face was found, and why."""
        return [
            (None if detection.landmarks is None else norm_crop(image, detection.landmarks), detection)
            for image, detection in zip(images, self.detect(images), strict=True)
        ]


def _nearest_centre(faces: Faces, seen: tuple[int, int], padding: int, ratio: np.ndarray) -> Detection:
    """Choose the face whose box centre is nearest the image's centre; landmarks go back to the image's own pixels."""
    if len(faces.boxes) == 0:
        return Detection()
    centres = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2
    chosen = int(np.square(centres - np.array(seen[::-1]) / 2).sum(axis=1).argmin())
    # A pixel's centre lies half a pixel inside it, before and after enlarging.
    landmarks = (faces.landmarks[chosen] - padding + 0.5) * ratio - 0.5
    return Detection(landmarks, float(faces.probabilities[chosen]), len(faces.boxes))
