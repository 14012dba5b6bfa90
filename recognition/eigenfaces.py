"""Eigenfaces (Turk and Pentland, 1991): the baseline that every trained recogniser should leave behind.

Principal components of aligned crops, compared by cosine like embeddings.
Legend: n images, B batch, S side in pixels, C 1 for grey and 3 for RGB, K components.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from utils import distributed
from utils.config import UserError
from utils.data.face_dataset import read_identity_list
from utils.data.formats.labelled import LabelledImages
from utils.data.formats.recognise import open_labelled
from utils.distributed import seed_for
from utils.images import load_images, to_float
from utils.logging import get_logger

log = get_logger(__name__)

COLOURS = ("grey", "rgb")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow turns RGB into grey


@dataclass
class EigenfaceSettings:
    """The `eigenfaces` section of recognition_test_config.yaml."""

    components: int = 128
    colour: str = "grey"
    size: int = 112
    max_images: int = 10_000
    exclude_identities_file: str | None = None

    def __post_init__(self) -> None:
        if self.colour not in COLOURS:
            raise UserError(f"eigenfaces.colour: {self.colour!r} is not one of {', '.join(COLOURS)}")
        for key in ("components", "size", "max_images"):
            if getattr(self, key) < 1:
                raise UserError(f"eigenfaces.{key}: {getattr(self, key)}; it must be at least 1")


class Eigenfaces(nn.Module):
    """Images => coordinates on the principal components, as a network is called: (B, 3, S, S) in [-1, 1] => (B, K)."""

    def __init__(self, mean: np.ndarray, components: np.ndarray, *, size: int, colour: str) -> None:
        """`mean` (C S S,) and `components` (K, C S S), of images in [-1, 1]."""
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("components", torch.as_tensor(components, dtype=torch.float32))
        self.input_size, self.num_features, self.colour = size, len(components), colour

    def forward(self, images: Tensor) -> Tensor:
        return (flatten(images, self.colour) - self.mean) @ self.components.T


def flatten(images: Tensor, colour: str) -> Tensor:
    """(B, 3, S, S) RGB => (B, C S S)."""
    if colour == "grey":
        images = (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(dim=1)
    return images.flatten(1)


def fit_eigenfaces(pixels: np.ndarray, components: int, colour: str, seed: int = 0) -> tuple[Eigenfaces, Eigenfaces]:
    """Plain and whitened eigenfaces of uint8 (n, S, S, 3) images; whitened coordinates have variance 1.

    Above 500 pixels or images scikit-learn draws the start of a randomised decomposition, from `seed`. Raises UserError
    where there are not more images than components.
    """
    from sklearn.decomposition import PCA  # slow to import, and only this baseline needs it

    _check_count(len(pixels), components)
    vectors = flatten(to_float(pixels), colour).numpy()
    pca = PCA(components, random_state=seed).fit(vectors)
    kept = {"size": pixels.shape[1], "colour": colour}
    # directions in which the images do not vary have no scale
    scale = np.sqrt(np.maximum(pca.explained_variance_, np.finfo(np.float32).eps * pca.explained_variance_[0]))
    plain = Eigenfaces(pca.mean_, pca.components_, **kept)
    return plain, Eigenfaces(pca.mean_, pca.components_ / scale[:, None], **kept)


def read_faces(root: str, settings: EigenfaceSettings) -> tuple[LabelledImages, np.ndarray]:
    """The images at `root`, in any format of labelled images, and the numbers of those to use.

    Raises UserError where there are none, or not more than components.
    """
    try:
        images = open_labelled(root)
    except UserError as error:
        raise UserError(f"baseline_root: {error}") from error
    key = "eigenfaces.exclude_identities_file"
    excluded = read_identity_list(settings.exclude_identities_file, key, images.identities)
    kept = [label for label, identity in enumerate(images.identities) if identity not in excluded]
    rows = np.flatnonzero(np.isin(images.labels, kept))
    _check_count(min(len(rows), settings.max_images), settings.components)
    return images, rows


def fit_rows(images: LabelledImages, rows: np.ndarray, settings: EigenfaceSettings, seed: int) -> dict[str, Eigenfaces]:
    """`plain` and `whitened`, computed from at most `max_images` of the images `rows`, drawn by `seed`."""
    chosen = rows
    if len(rows) > settings.max_images:
        rng = np.random.default_rng(seed_for(seed, "eigenfaces"))
        chosen = np.sort(rng.choice(rows, settings.max_images, replace=False))
    readers = [partial(images.pixels, int(index)) for index in chosen]
    label = "reading images" if distributed.is_main() else None
    pixels = load_images(readers, settings.size, progress=label)
    plain, whitened = fit_eigenfaces(pixels, settings.components, settings.colour, seed)
    log.info("eigenfaces of %d of %d images, %s", len(chosen), len(rows), settings.colour)
    return {"plain": plain, "whitened": whitened}


def _check_count(images: int, components: int) -> None:
    if images <= components:
        raise UserError(f"eigenfaces.components: {components}, but there are {images} images; more images are wanted")
