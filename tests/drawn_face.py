"""A face drawn with nine soft ellipses: the least that the detector takes for one."""

import numpy as np

LANDMARKS = np.array([(-13, -6), (13, -6), (0, 10), (-10, 23), (10, 23)], float)  # relative to the centre, at scale 1


def draw_face(size: int = 128, centre: tuple[float, float] = (64, 64), scale: float = 1.0) -> np.ndarray:
    """uint8 (size, size, 3) grey."""
    y, x = np.mgrid[:size, :size].astype(float)
    x, y = (x - centre[0]) / scale, (y - centre[1]) / scale
    image = np.full((size, size), 90.0)

    def ellipse(
        x0: float, y0: float, width: float, height: float, value: float | np.ndarray, cover: float = 1.0
    ) -> None:
        distance = np.minimum(((x - x0) / width) ** 2 + ((y - y0) / height) ** 2, 50)
        image[...] += cover / (1 + np.exp(4 * (distance - 1))) * (value - image)

    ellipse(0, -6, 37, 47, 50)  # hair
    ellipse(0, 4, 31, 40, 185 - 0.6 * np.abs(x))  # skin
    for side in (-1, 1):
        ellipse(13 * side, -14, 9, 2.2, 80)  # brow
        ellipse(13 * side, -7, 6.5, 4, 120, 0.7)  # eye socket
        ellipse(13 * side, -6, 4, 2.6, 45)  # eye
        ellipse(4 * side, 11, 2.5, 2, 100)  # nostril
    ellipse(0, 2, 3, 11, 215, 0.6)  # nose
    ellipse(0, 23, 11, 3.2, 105)  # mouth
    return np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
