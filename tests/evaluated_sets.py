"""Evaluated data sets for tests of the report: striped images in folders, and figures that can be told by hand."""

from pathlib import Path

import numpy as np

from evaluation.results import Histogram, Identities, Images, SetResult
from utils.images import write_image


def stripes(identity: int, image: int, size: int = 32) -> np.ndarray:
    """uint8 (size, size, 3): the colour tells the identity, the slope of the stripes the image."""
    y, x = np.mgrid[:size, :size]
    colour = np.random.default_rng(identity).integers(60, 255, 3)
    return ((np.sin((x + image * y) / 3)[..., None] * 0.3 + 0.7) * colour).astype(np.uint8)


def write_folders(root: Path, identities: int, images: int, start: str = "id") -> list[str]:
    """Write `<root>/<start>_<nnn>/<k>.png`; returns the names of the images."""
    names = [(i, k, f"{start}_{i:03d}/{k}.png") for i in range(identities) for k in range(images)]
    for identity, image, name in names:
        write_image(root / name, stripes(identity, image))
    return [name for _, _, name in names]


def evaluated(
    name: str,
    root: Path,
    files: list[str],
    *,
    seed: int,
    training: tuple[Path, list[str]] | None = None,
    two_stage=True,
) -> SetResult:
    """What an evaluation would leave of `files`; the figures are drawn by `seed`."""
    random = np.random.default_rng(seed)
    folders = [file.rpartition("/")[0] for file in files]
    names, identity = np.unique(folders, return_inverse=True)
    count = len(names)
    cosines = random.uniform(0.5, 1.0, len(files))
    switch_t = np.where(random.random(len(files)) < 0.1, -1, 500 + 20 * random.integers(0, 20, len(files)))

    def means(values: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
        """Of each identity; nan where nothing has weight."""
        with np.errstate(invalid="ignore"):
            return np.bincount(identity, values * weights) / np.bincount(identity, weights * np.ones(len(files)))

    copies = np.full(len(files), -1)
    copies[1] = 0
    edges = np.linspace(-1, 1, 21)
    people = np.unique([file.rpartition("/")[0] for file in training[1]]) if training else None
    return SetResult(
        name=name,
        root=str(root),
        metrics={"num_images": len(files), "c_intra": 0.83, "eer": 0.04, "fdr": 3.25, "fid": None},
        identities=Identities(
            names=names,
            num_images=np.bincount(identity),
            consistency=means(cosines),
            near_share=means(cosines > 0.7),
            neighbour=(np.arange(count) + 1) % count,
            neighbour_cosine=random.uniform(0, 0.5, count),
            training_name=people[np.arange(count) % len(people)] if training else None,
            training_cosine=random.uniform(0, 0.6, count) if training else None,
            switch_t=means(switch_t, switch_t >= 0) if two_stage else None,
        ),
        images=Images(
            files=np.array(files),
            identity=identity,
            centre_cosine=cosines,
            duplicate_of=copies,
            index=np.array([int(Path(file).stem) for file in files]),
            seed=random.integers(2**52, 2**53, len(files)),
            switch_t=switch_t if two_stage else None,
        ),
        embedder={"name": "a recogniser <small>", "sha256": "ab" * 32, "is_published": False},
        features={"name": "its features", "sha256": None, "is_comparable": False},
        warnings=["features are this project's own"],
        provenance={"settings": {"sampler.num_steps": 50, "latent_shape": [3, 32, 32]}, "threshold": None, "of": name},
        training_root=str(training[0]) if training else None,
        nearest_training_images=[(files[0], training[1][0], 0.61), (files[3], training[1][2], 0.5)] if training else [],
        histograms={
            key: Histogram(edges, random.integers(0, 50, 20))
            for key in ("genuine", "impostor", "centre_cosine", "leakage", "leakage_real")
        },
        roc=(np.array([0.0, 1e-4, 1e-2, 1.0]), np.array([0.1, 0.3, 0.7, 1.0])),
        attention_change=(np.array([900, 800, 700]), random.uniform(0.01, 0.1, (5, 3)), 0.03) if two_stage else None,
    )
