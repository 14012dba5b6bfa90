"""The metrics of an evaluation of embeddings, each against an independent implementation."""

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from evaluation.curation import FAR, FEW, KEPT, NEAR_ANOTHER, NEAR_TRAINING, curate
from evaluation.definitions import DEFINITIONS
from evaluation.metrics import duplicates, labelled, scores
from evaluation.metrics.duplicates import find_duplicates
from evaluation.metrics.identities import centre_cosines, identity_centres, intra_consistency, unique_identities
from evaluation.metrics.leakage import leakage, nearest_images
from evaluation.metrics.reproduction import identity_reproduction, reproduction_metrics
from evaluation.metrics.sampling import alignment_failures, switch_statistics
from evaluation.metrics.scores import (
    genuine_scores,
    impostor_pairs,
    impostor_scores,
    match_rates,
    score_summary,
)
from utils.similarity import nearest_neighbours, sum_by_label

WIDTH = 16


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def people(identities: int = 30, noise: float = 0.9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, WIDTH) of 1 to 8 images an identity, and labels (N,), in no order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(identities), rng.integers(1, 9, identities)))
    centres = rng.standard_normal((identities, WIDTH))
    return unit(centres[labels] + noise * rng.standard_normal((len(labels), WIDTH))), labels


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray]:
    return people()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop over chunks runs several times, the last of them short."""
    for name, size in {
        "evaluation.metrics.scores.ROWS_AT_ONCE": 3,
        "evaluation.metrics.scores.PAIRS_AT_ONCE": 7,
        "evaluation.metrics.identities.ROWS_AT_ONCE": 7,
        "evaluation.metrics.duplicates.BLOCK": 7,
        "evaluation.metrics.duplicates.DIRECTIONS": 3,
        "utils.similarity.ROWS_AT_ONCE": 7,
        "utils.similarity.REFERENCES_AT_ONCE": 5,
        "utils.context_selection.ROWS_AT_ONCE": 7,
    }.items():
        monkeypatch.setattr(name, size)


def all_pairs(embeddings: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Genuine and impostor cosines by the whole matrix in float64, ascending."""
    cosines = embeddings.astype(np.float64) @ embeddings.astype(np.float64).T
    once, same = np.triu(np.ones(cosines.shape, bool), 1), labels[:, None] == labels
    return np.sort(cosines[once & same]), np.sort(cosines[once & ~same])


# ------------------------------------------------------------------------------------------------------------- scores


def test_all_pairs_of_both_kinds(sample, small_chunks) -> None:
    genuine, impostor = all_pairs(*sample)
    np.testing.assert_allclose(np.sort(genuine_scores(*sample)), genuine, atol=1e-6)
    np.testing.assert_allclose(np.sort(impostor_scores(*sample, count=10**6, seed=0)), impostor, atol=1e-6)
    assert (len(genuine), len(impostor)) == (355, 10085)


@pytest.mark.parametrize("count", [1, 100, 6000, 10084])  # few; most of all there are; all but one
def test_drawn_impostor_pairs(sample, count) -> None:
    labels = sample[1]
    first, second = impostor_pairs(labels, count, seed=3)
    assert (labels[first] != labels[second]).all()
    assert len({frozenset(pair) for pair in zip(first.tolist(), second.tolist(), strict=True)}) == count
    assert all(np.array_equal(a, b) for a, b in zip((first, second), impostor_pairs(labels, count, 3), strict=True))
    assert not np.array_equal(impostor_pairs(labels, count, 4), (first, second))


def test_impostor_pairs_are_drawn_evenly() -> None:
    labels = np.array([2, 0, 0, 1, 2, 2, 0, 0])  # 4, 1 and 3 images: 19 impostor pairs
    counts = np.zeros((8, 8))
    for seed in range(800):
        np.add.at(counts, impostor_pairs(labels, 5, seed), 1)
    counts = (counts + counts.T)[np.triu(labels[:, None] != labels)]
    assert len(counts) == 19 and counts.sum() == 4000
    assert (np.abs(counts - 4000 / 19) < 4 * np.sqrt(4000 / 19)).all()


def test_rates_are_those_of_scikit_learn(sample) -> None:
    genuine, impostor = all_pairs(*sample)
    genuine, impostor = genuine.round(2), impostor.round(2)  # many ties
    found = score_summary(np.random.default_rng(0).permutation(genuine), impostor)
    truth = np.append(np.ones(len(genuine)), np.zeros(len(impostor)))
    far, tar, thresholds = roc_curve(truth, np.append(genuine, impostor), drop_intermediate=False)
    eer = brentq(lambda x: 1 - x - np.interp(x, far, tar), 0, 1)
    assert found.eer == pytest.approx(eer, abs=1e-12)
    assert found.fmr100 == pytest.approx((1 - tar)[far <= 0.01].min(), abs=1e-12)
    assert found.fmr1000 == pytest.approx((1 - tar)[far <= 0.001].min(), abs=1e-12)
    assert (impostor > found.fmr1000_cosine).mean() <= 0.001 < (impostor >= found.fmr1000_cosine).mean()
    means = genuine.mean(), impostor.mean()
    assert (found.genuine_mean, found.impostor_mean) == pytest.approx(means)
    assert found.fdr == pytest.approx((means[0] - means[1]) ** 2 / (genuine.var() + impostor.var()))
    thin_far, thin_tar = found.roc
    assert (np.diff(thin_far) > 0).all() and thin_far[-1] == thin_tar[-1] == 1
    highest = {}
    for x, y in zip(far, tar, strict=True):
        highest[x] = y  # ascending: the last is the highest
    assert [highest[x] for x in thin_far] == pytest.approx(thin_tar, abs=1e-12)
    assert thresholds[0] == np.inf and set(found.metrics()) <= set(DEFINITIONS)


@pytest.mark.parametrize("seed", range(20))
def test_equal_error_rate_of_few_scores(seed) -> None:
    rng = np.random.default_rng(seed)
    genuine, impostor = rng.integers(2, 9, rng.integers(1, 9)) / 8, rng.integers(0, 7, rng.integers(1, 9)) / 8
    truth = np.append(np.ones(len(genuine)), np.zeros(len(impostor)))
    far, tar, _ = roc_curve(truth, np.append(genuine, impostor), drop_intermediate=False)
    after = int(np.argmax(far >= 1 - tar))  # linear between the points around the diagonal
    gap = far - (1 - tar)
    share = gap[after - 1] / (gap[after - 1] - gap[after])
    assert score_summary(genuine, impostor).eer == pytest.approx(far[after - 1] + share * (far[after] - far[after - 1]))


def test_rates_by_hand() -> None:
    genuine, impostor = np.array([0.1, 0.5, 0.8, 0.9]), np.array([0.0, 0.1, 0.4, 0.8])
    false, true = match_rates(genuine, impostor, np.array([0, 1, 2, 4]))
    assert false.tolist() == [0, 0.25, 0.5, 1] and true.tolist() == [0.25, 0.75, 0.75, 1]
    perfect = score_summary(np.full(5, 0.9, np.float32), np.full(1000, 0.1, np.float32))
    assert (perfect.eer, perfect.fmr100, perfect.fmr1000, perfect.fdr) == (0, 0, 0, None)
    hopeless = score_summary(np.full(5, 0.1), np.full(1000, 0.9))
    assert (hopeless.eer, hopeless.fmr100) == (1, 1)


def test_rates_that_few_pairs_do_not_resolve() -> None:
    few = score_summary(np.array([0.5, 0.7]), np.linspace(0, 0.4, 999))
    assert few.fmr100 == 0 and few.fmr1000 is None and few.fmr1000_cosine is None
    none = score_summary(np.empty(0, np.float32), np.array([0.25]))
    assert (none.eer, none.fdr, none.genuine_mean, none.impostor_mean, none.num_genuine) == (None, None, None, 0.25, 0)


# --------------------------------------------------------------------------------------------------------- identities


def test_centres_and_consistency(sample, small_chunks) -> None:
    embeddings, labels = sample
    centres = identity_centres(embeddings, labels)
    cosines = centre_cosines(embeddings, labels, centres)
    shares, means = [], []
    for identity in range(30):
        rows = embeddings[labels == identity].astype(np.float64)
        centre = rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0))
        np.testing.assert_allclose(centres[identity], centre, atol=1e-7)
        shares.append(np.mean([1 - row @ centre < 0.3 for row in rows]))
        means.append(np.mean(rows @ centre))
    found = intra_consistency(cosines, labels, 0.3)
    np.testing.assert_allclose(found.near_share, shares, atol=1e-12)
    np.testing.assert_allclose(found.mean_cosine, means, atol=1e-6)
    assert found.c_intra == pytest.approx(np.mean(shares)) and 0.5 < found.c_intra < 0.95
    assert intra_consistency(cosines, labels, 0.1).c_intra < found.c_intra


def test_an_image_at_the_radius_is_not_nearer() -> None:
    assert intra_consistency(np.array([0.75, 0.5], np.float32), np.array([0, 0]), 0.25).c_intra == 0
    assert intra_consistency(np.array([0.75, 0.5], np.float32), np.array([0, 1]), 0.2500001).c_intra == 0.5


@pytest.mark.parametrize("r", [0.05, 0.3, 0.6, 1.2])
def test_unique_identities(r, small_chunks) -> None:
    centres = unit(np.random.default_rng(1).standard_normal((60, 4)))
    kept: list[int] = []
    for i in range(60):
        if all(1 - centres[i].astype(np.float64) @ centres[j] >= r for j in kept):
            kept.append(i)
    share, mask = unique_identities(centres, r)
    assert np.flatnonzero(mask).tolist() == kept and share == len(kept) / 60


def test_neighbours_and_sums_in_chunks(sample, small_chunks) -> None:
    embeddings, labels = sample
    cosines = embeddings.astype(np.float64) @ embeddings.T
    np.testing.assert_allclose(nearest_neighbours(embeddings, embeddings)[0], 1, atol=1e-6)
    np.fill_diagonal(cosines, -2)
    found, which = nearest_neighbours(embeddings[:50], embeddings, skip_own=True)
    assert which.tolist() == cosines[:50].argmax(axis=1).tolist()
    np.testing.assert_allclose(found, cosines[:50].max(axis=1), atol=1e-6)
    opposite = np.array([[1, 0], [-1, 0]], np.float32)
    assert [x.tolist() for x in nearest_neighbours(opposite, opposite, skip_own=True)] == [[-1, -1], [1, 0]]
    assert [x.tolist() for x in nearest_neighbours(opposite[:1], opposite[:1], skip_own=True)] == [[-1], [-1]]
    expected = np.stack([embeddings[labels == k].astype(np.float64).sum(axis=0) for k in range(30)])
    np.testing.assert_allclose(sum_by_label(embeddings, labels, 31), np.vstack([expected, np.zeros(WIDTH)]), atol=1e-12)


# ------------------------------------------------------------------------------------------------- leakage and copies


def test_leakage(sample, small_chunks) -> None:
    generated, training = identity_centres(*sample), identity_centres(*people(40, seed=1))
    across, between = generated.astype(np.float64) @ training.T, training.astype(np.float64) @ training.T
    np.fill_diagonal(between, -1)
    found = leakage(generated, training, r=0.4)
    assert found.nearest.tolist() == across.argmax(axis=1).tolist()
    assert found.real_nearest.tolist() == between.argmax(axis=1).tolist()
    expected = {
        "leakage_mean": across.max(axis=1).mean(),
        "leakage_max": across.max(),
        "leakage_share": (across.max(axis=1) > 0.6).mean(),
        "leakage_real_mean": between.max(axis=1).mean(),
        "leakage_real_max": between.max(),
        "leakage_real_share": (between.max(axis=1) > 0.6).mean(),
    }
    assert found.metrics() == pytest.approx(expected, abs=1e-6) and set(expected) <= set(DEFINITIONS)
    assert leakage(generated, training[:1], r=0.4).metrics()["leakage_real_mean"] is None


def test_nearest_images(sample, small_chunks) -> None:
    embeddings, labels = sample
    training = people(40, seed=1)[0]
    rows, theirs, cosines = nearest_images(embeddings, labels, training, 5)
    full = embeddings.astype(np.float64) @ training.T
    best = sorted(((full[labels == k].max()) for k in range(30)), reverse=True)[:5]
    np.testing.assert_allclose(cosines, best, atol=1e-6)
    np.testing.assert_allclose(full[rows, theirs], best, atol=1e-6)
    assert len(set(labels[rows])) == 5 and len(nearest_images(embeddings, labels, training, 99)[0]) == 30


@pytest.mark.parametrize("cosine", [0.3, 0.7, 0.95])
def test_duplicates(sample, small_chunks, cosine) -> None:
    embeddings, labels = sample
    embeddings = embeddings.copy()
    embeddings[[20, 40, 60]] = embeddings[3]  # exact copies, of other identities most likely
    cosines = embeddings.astype(np.float64) @ embeddings.T
    within, across, either = (np.full(len(labels), -1) for _ in range(3))
    for image in range(len(labels)):
        for earlier in reversed(range(image)):
            if cosines[image, earlier] > cosine:
                either[image] = earlier
                (within if labels[image] == labels[earlier] else across)[image] = earlier
    found = find_duplicates(embeddings, labels, cosine)
    assert found.within.tolist() == within.tolist() and found.across.tolist() == across.tolist()
    assert found.duplicate_of.tolist() == either.tolist() and either[60] >= 0
    assert found.metrics()["duplicates_across"] == (across >= 0).mean()


def test_the_bound_of_duplicates_holds(sample, monkeypatch) -> None:
    monkeypatch.setattr(duplicates, "DIRECTIONS", 5)
    embeddings = np.vstack([sample[0], np.eye(WIDTH, dtype=np.float32)])
    bounding = duplicates._bounding(embeddings)
    assert bounding.shape == (len(embeddings), 6)
    slack = bounding @ bounding.T - embeddings @ embeddings.T
    assert slack.min() > -1e-6 and slack.max() > 0.5


# ------------------------------------------------------------------------------------- reproduction, sampling, checks


def test_identity_reproduction() -> None:
    rng = np.random.default_rng(0)
    issame = np.arange(40) % 2 == 0
    first = unit(rng.standard_normal((40, WIDTH)))
    real = np.empty((80, WIDTH), np.float32)
    real[0::2], real[1::2] = first, np.where(issame[:, None], first, unit(rng.standard_normal((40, WIDTH))))
    variations = real.copy()
    variations[1::2] = unit(rng.standard_normal((40, WIDTH)))  # second images are of nobody
    found = reproduction_metrics(identity_reproduction(real, variations, issame))
    assert found["reproduction_real_real"] == found["reproduction_variation_real"] == 1
    assert found["reproduction_real_variation"] == found["reproduction_variation_variation"] < 0.75
    assert set(found) <= set(DEFINITIONS)
    with pytest.raises(ValueError, match="one for each"):
        identity_reproduction(real, variations[:-2], issame)


def test_switch_statistics() -> None:
    found = switch_statistics(np.array([900, -1, 700, 800, -1]))
    assert (found.num_images, found.switched, found.mean, found.quartiles) == (5, 0.6, 800, (750, 800, 850))
    assert found.std == pytest.approx(np.std([900, 700, 800])) and set(found.metrics()) <= set(DEFINITIONS)
    assert switch_statistics(np.array([-1, -1])).metrics() == {
        "switched": 0,
        "switch_t_mean": None,
        "switch_t_std": None,
    }


def test_alignment_failures() -> None:
    face = [[1.0, 2.0]] * 5
    lines = [
        {"status": "aligned", "landmarks": face},
        {"status": "resized", "landmarks": None},
        {"status": "failed", "landmarks": None},
        {"status": "discarded", "landmarks": face},
    ]
    found = alignment_failures(lines)
    assert found.metrics() == {"alignment_failures": 0.5} and found.counts["resized"] == 1
    with pytest.raises(ValueError, match="no lines"):
        alignment_failures([])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: genuine_scores(x * 2, y), "145 of 145 rows are not unit vectors, the first is row 0 of length 2"),
        (lambda x, y: genuine_scores(np.where(x == x[4], np.nan, x), y), "row 4 of length nan"),
        (lambda x, y: genuine_scores(x[0], y), r"\(N, D\) floating-point"),
        (lambda x, y: genuine_scores(x, y[:-1]), "145 rows, but 144 labels"),
        (lambda x, y: genuine_scores(x, y - 1), r"-1\.\.28; they lie in 0\.\.28"),
        (lambda x, y: genuine_scores(x, y / 2), "whole numbers"),
        (lambda x, y: identity_centres(x, y, 31), "identity 30 of 31 has no images"),
        (lambda x, y: identity_centres(np.array([[1.0, 0], [-1, 0]]), np.array([0, 0])), "cancel out"),
        (lambda x, y: intra_consistency(x[:, 0], y, 0), "r: 0; a cosine distance"),
        (lambda x, y: intra_consistency(x[:, 0], y + 1), "an identity without images"),
        (lambda x, y: unique_identities(x[:0]), "there are none"),
        (lambda x, y: leakage(x, x[:0]), "training_centres: there are none"),
        (lambda x, y: find_duplicates(x, y, 1.5), r"cosine: 1\.5; it lies between 0 and 1"),
        (lambda x, y: switch_statistics(y[:0]), "there are no images"),
        (lambda x, y: curate(x, y, max_among=2), "max_among: 2; a cosine"),
        (lambda x, y: curate(x, y, min_images=0), "min_images: 0"),
        (lambda x, y: curate(x, y, max_training=0.5), "given together"),
    ],
)
def test_what_cannot_be(sample, call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(*sample)


def test_rows_of_identities() -> None:
    groups = labelled.group_rows(np.array([2, 0, 2, 2]), 4)
    assert [groups[k].tolist() for k in range(len(groups))] == [[1], [], [0, 2, 3], []]
    assert groups.sizes.tolist() == [1, 0, 3, 0]
    assert scores.group_rows(np.empty(0, np.int64)).sizes.tolist() == []


# ----------------------------------------------------------------------------------------------------------- curation


def test_curation_by_brute_force(sample) -> None:
    embeddings, labels = sample
    training = identity_centres(*people(40, seed=1))
    settings = {"min_centre_cosine": 0.75, "min_images": 2, "max_among": 0.5, "max_training": 0.55}
    found = curate(embeddings, labels, training_centres=training, **settings)

    image_reasons = np.full(len(labels), KEPT, object)
    kept: list[np.ndarray] = []
    for identity in range(30):
        rows = np.flatnonzero(labels == identity)
        centre = unit(embeddings[rows].mean(axis=0, keepdims=True))[0]
        near = rows[embeddings[rows] @ centre >= 0.75]
        image_reasons[np.setdiff1d(rows, near)] = FAR
        reason = FEW
        if len(near) >= 2:
            centre = unit(embeddings[near].mean(axis=0, keepdims=True))[0]
            reason = NEAR_TRAINING if (training @ centre).max() > 0.55 else KEPT
            if reason == KEPT and any(centre @ other > 0.5 for other in kept):
                reason = NEAR_ANOTHER
            if reason == KEPT:
                kept.append(centre)
        image_reasons[near] = reason
        assert found.identity_reasons[identity] == reason
    assert found.image_reasons.tolist() == image_reasons.tolist()
    assert found.images.sum() == (image_reasons == KEPT).sum() and found.identities.sum() == len(kept)
    counts = found.counts()
    assert (
        set(counts["images"])
        == set(counts["identities"]) | {FAR}
        == {"all", "kept", FAR, FEW, NEAR_ANOTHER, NEAR_TRAINING}
    )
    assert counts["images"]["all"] == len(labels) == sum(n for k, n in counts["images"].items() if k != "all")

    left = np.unique(labels[found.images], return_inverse=True)[1]  # what is kept holds what was asked for
    centres = identity_centres(embeddings[found.images], left)
    assert unique_identities(centres, 0.5)[0] == 1 and leakage(centres, training, 0.45).metrics()["leakage_share"] == 0


def test_curation_without_limits_keeps_all_and_with_harsh_ones_nothing(sample) -> None:
    every = curate(*sample)
    assert every.images.all() and every.identities.all() and every.counts()["identities"] == {"all": 30, "kept": 30}
    nothing = curate(*sample, min_centre_cosine=1.0, min_images=9)
    assert not nothing.images.any() and nothing.counts()["identities"] == {"all": 30, "kept": 0, FEW: 30}
