"""Eigenfaces against a direct singular value decomposition, and from folders."""

import numpy as np
import pytest
import torch

from recognition.eigenfaces import EigenfaceSettings, fit_eigenfaces, fit_rows, read_faces
from utils.config import UserError
from utils.images import to_float


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(5, 8, 8, 3))
    return np.clip(128 + 25 * np.tensordot(rng.normal(size=(40, 5)), basis, 1), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("colour", ["grey", "rgb"])
def test_against_a_direct_decomposition(pixels: np.ndarray, colour: str) -> None:
    plain, whitened = fit_eigenfaces(pixels, 4, colour)
    vectors = pixels.astype(np.float64) / 127.5 - 1
    vectors = vectors @ (0.299, 0.587, 0.114) if colour == "grey" else vectors.transpose(0, 3, 1, 2)
    vectors = vectors.reshape(40, -1)
    centred = vectors - vectors.mean(axis=0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ directions[:4].T
    signs = np.sign((plain.components.numpy() * directions[:4]).sum(axis=1))
    images = to_float(pixels)
    np.testing.assert_allclose(plain(images).numpy(), expected * signs, atol=1e-4)
    np.testing.assert_allclose(whitened(images).numpy(), expected * signs / (values[:4] / np.sqrt(39)), atol=1e-4)
    np.testing.assert_allclose(whitened(images).var(dim=0, correction=1), 1, atol=1e-4)
    assert (plain.input_size, plain.num_features) == (8, 4)


def test_directions_without_variance_stay_finite() -> None:
    pixels = np.zeros((10, 4, 4, 3), np.uint8)
    pixels[::2] = 200  # one direction, and seven of none
    _, whitened = fit_eigenfaces(pixels, 8, "grey")
    assert torch.isfinite(whitened(to_float(pixels))).all()


def test_from_folders_without_the_people_of_the_test(face_folder, tmp_path) -> None:
    root = str(face_folder / "faces")
    (tmp_path / "out.txt").write_text("id0\nid1\n")
    images, rows = read_faces(root, EigenfaceSettings(components=4, exclude_identities_file=str(tmp_path / "out.txt")))
    assert {images.names[row].split("/")[0] for row in rows} == {"id2", "id3", "id4", "id5"}
    few = EigenfaceSettings(components=4, max_images=6, size=16)
    first, again, other = (fit_rows(images, rows, few, seed)["plain"].mean for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(UserError, match=r"eigenfaces\.components: 128, but there are 18 images"):
        read_faces(root, EigenfaceSettings())
    with pytest.raises(UserError, match=r"baseline_root: .*no such file"):
        read_faces(str(tmp_path / "none"), EigenfaceSettings())
    for kwargs, message in (({"colour": "bgr"}, "eigenfaces.colour: 'bgr'"), ({"components": 0}, "components: 0")):
        with pytest.raises(UserError, match=message):
            EigenfaceSettings(**kwargs)
