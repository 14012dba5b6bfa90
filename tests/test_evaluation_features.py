"""The metrics of an evaluation of features and of images, each against an independent implementation."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from evaluation.definitions import DEFINITIONS
from evaluation.metrics import neighbours
from evaluation.metrics.frechet import FeatureStatistics, frechet_distance, statistics_of
from evaluation.metrics.identities import diversity
from evaluation.metrics.neighbours import ball_radii, precision_recall, within_balls
from evaluation.metrics.perceptual import drawn_identities, intra_class_lpips, mean_pairwise_lpips
from models.autoencoder.lpips import LPIPS


def features(count: int, seed: int, shift: float = 0.0, width: int = 6) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, width)) + shift).astype(np.float32)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("at_once", [1, 700, 2**24])  # one row, a few, all
def test_precision_and_recall(k, at_once, monkeypatch) -> None:
    monkeypatch.setattr(neighbours, "DISTANCES_AT_ONCE", at_once)
    real, generated = features(90, 0), features(70, 1, 0.8) * 0.8
    real_radii = NearestNeighbors(n_neighbors=k + 1).fit(real).kneighbors(real)[0][:, k]  # the first is the row itself
    generated_radii = NearestNeighbors(n_neighbors=k + 1).fit(generated).kneighbors(generated)[0][:, k]
    distances = cdist(generated, real)
    found = precision_recall(real, generated, k)
    assert found.precision == np.mean([(row <= real_radii).any() for row in distances])
    assert found.recall == np.mean([(row <= generated_radii).any() for row in distances.T])
    assert 0 < found.recall < 1 and found.precision > 0 and (found.num_real, found.num_generated) == (90, 70)
    np.testing.assert_allclose(ball_radii(real, k), real_radii, rtol=1e-5)
    assert set(found.metrics()) <= set(DEFINITIONS)


def test_precision_and_recall_far_from_the_origin() -> None:
    near = precision_recall(features(90, 0), features(70, 1, 0.5), 3)
    far = precision_recall(features(90, 0) + 1000, features(70, 1, 0.5) + 1000, 3)  # rounded to 6e-5 each
    assert (far.precision, far.recall) == (near.precision, near.recall)


def test_copies_have_balls_of_no_size() -> None:
    rows = np.array([[0.0], [0.0], [3.0]], np.float32)
    assert ball_radii(rows, 1).tolist() == [0, 0, 3] and ball_radii(rows, 2).tolist() == [3, 3, 3]
    inside = within_balls(np.array([[0.0], [0.5], [4.0]], np.float32), rows[:2], np.zeros(2, np.float32))
    assert inside.tolist() == [True, False, False]


def test_d_intra() -> None:
    rng = np.random.default_rng(0)
    real, generated = features(60, 0), features(90, 1) * 0.9
    real_labels, generated_labels = rng.integers(0, 4, 60), rng.permutation(np.arange(90) % 5)
    real_labels[real_labels == 1] = 3  # identity 1 has no real images, 4 neither: not looked at
    shares = []
    for identity in (0, 2, 3):
        ours = generated[generated_labels == identity]
        radii = np.sort(cdist(ours, ours), axis=1)[:, 4]  # with itself in column 0, the 4th other one
        theirs = real[real_labels == identity]
        shares.append(
            np.mean([any(np.linalg.norm(x - y) <= r for y, r in zip(ours, radii, strict=True)) for x in theirs])
        )
    found = diversity(real, real_labels, generated, generated_labels, 4)
    assert found.identities.tolist() == [0, 2, 3]
    np.testing.assert_allclose(found.shares, shares)
    assert found.metrics() == {"d_intra": pytest.approx(np.mean(shares))} and 0 < np.mean(shares) < 1


@pytest.mark.parametrize("count", [200, 5])  # fewer rows than columns: singular covariances
def test_frechet_distance(count) -> None:
    a, b = features(count, 0, width=8), features(count + 7, 1, 0.5, width=8) * 1.5
    root = sqrtm(np.cov(a.T.astype(np.float64)) @ np.cov(b.T.astype(np.float64)))
    expected = (
        np.square(a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)).sum()
        + np.trace(np.cov(a.T.astype(np.float64)))
        + np.trace(np.cov(b.T.astype(np.float64)))
        - 2 * np.trace(root).real
    )
    found = frechet_distance(statistics_of(a), statistics_of(b, rows_at_once=3))
    assert found == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(statistics_of(a), statistics_of(a)) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_axes_by_hand() -> None:
    a, b = FeatureStatistics(2, 11), FeatureStatistics(2, 11)
    a.scatter, b.scatter, b.mean = 10 * np.diag([4.0, 9.0]), 10 * np.diag([1.0, 16.0]), np.array([3.0, 4.0])
    assert frechet_distance(a, b) == pytest.approx(25 + (2 - 1) ** 2 + (3 - 4) ** 2)


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    rows = features(100, 0, shift=50)
    parts = [FeatureStatistics(6), statistics_of(rows[:1]), statistics_of(rows[1:60], 7), statistics_of(rows[60:])]
    whole = FeatureStatistics(6)
    for part in parts:
        whole.merge(part)
    whole.update(rows[:0])
    assert whole.count == 100
    np.testing.assert_allclose(whole.mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(rows.T.astype(np.float64)), rtol=1e-10)


@pytest.fixture(scope="module")
def network() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_lpips_within_an_identity(network, batch_size) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    floats = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    pairs = network(floats[[0, 0, 0, 1, 1, 2]], floats[[1, 2, 3, 2, 3, 3]]).tolist()
    assert mean_pairwise_lpips(network, images, batch_size) == pytest.approx(np.mean(pairs), rel=1e-4)
    found = intra_class_lpips(network, [images, images[:2]], batch_size)
    assert found.per_identity == pytest.approx([np.mean(pairs), pairs[0]], rel=1e-4)
    assert found.metrics() == {"lpips": pytest.approx((np.mean(pairs) + pairs[0]) / 2, rel=1e-4)}


def test_lpips_needs_pairs(network) -> None:
    with pytest.raises(ValueError, match="1 of an identity make no pair"):
        mean_pairwise_lpips(network, np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="there are none"):
        intra_class_lpips(network, [])


def test_identities_drawn_for_lpips() -> None:
    sizes = np.full(500, 3)
    sizes[:50] = 1
    drawn = drawn_identities(sizes, seed=0)
    assert len(set(drawn)) == 100 and (np.diff(drawn) > 0).all() and drawn.min() >= 50
    assert drawn.tolist() == drawn_identities(sizes, seed=0).tolist() != drawn_identities(sizes, seed=1).tolist()
    assert drawn_identities(sizes[:60], seed=0).tolist() == list(range(50, 60))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ball_radii(features(3, 0), 3), r"k: 3; it lies in 1\.\.2, for 3 images"),
        (lambda: precision_recall(features(9, 0), features(9, 0, width=5), 3), r"\(9, 6\) and \(9, 5\)"),
        (lambda: statistics_of(features(1, 0)).covariance, "2 images or more, there are 1"),
        (lambda: FeatureStatistics(5).update(features(3, 0)), r"\(3, 6\): \(n, 5\) are wanted"),
        (lambda: FeatureStatistics(6).update(np.full((2, 6), np.nan)), "not all of 2 rows are finite"),
        (lambda: FeatureStatistics(6).merge(FeatureStatistics(5)), "width 5 and 6"),
        (
            lambda: diversity(features(2, 0), np.array([0, 1]), features(4, 0), np.array([0, 0, 0, 1]), 2),
            "identity 1 has 1 images; k = 2 needs 3 or more",
        ),
        (lambda: diversity(features(0, 0), np.empty(0, int), features(4, 0), np.zeros(4, int), 2), "no real images"),
    ],
)
def test_what_cannot_be(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
