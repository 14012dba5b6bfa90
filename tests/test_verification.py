"""The verification protocol: published numbers, rates by hand, and the reader of LFW's pairs.txt."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn.metrics import roc_curve as sklearn_roc

from recognition.verification import equal_error_rate, error_rates, evaluate_pairs, roc_curve, thin_roc
from tests.compat import load_arrays
from utils.config import UserError
from utils.data.formats.pairs import read_pairs


def test_folds_are_the_published_ones() -> None:
    arrays = load_arrays("verification")
    result = evaluate_pairs(arrays["embeddings"], arrays["issame"])
    assert np.allclose(result.fold_accuracy, arrays["fold_accuracy"], atol=1e-12)
    assert np.allclose(result.fold_thresholds, arrays["best_thresholds"], atol=1e-12)
    assert result.accuracy == pytest.approx(arrays["fold_accuracy"].mean())
    assert result.accuracy_std == pytest.approx(arrays["fold_accuracy"].std(ddof=0))
    assert result.threshold == pytest.approx(arrays["best_thresholds"].mean())
    assert (result.num_genuine, result.num_impostor) == (arrays["issame"].sum(), (~arrays["issame"]).sum())


def test_rows_are_normalised_first() -> None:
    arrays = load_arrays("verification")
    scales = np.random.default_rng(0).uniform(0.5, 20, (len(arrays["embeddings"]), 1))
    result = evaluate_pairs(arrays["embeddings"] * scales, arrays["issame"])
    assert np.allclose(result.fold_accuracy, arrays["fold_accuracy"])


def test_roc_and_rates_by_hand() -> None:
    # genuine 0.1, 0.2, 0.5, 0.9; impostor 0.2, 0.6, 0.7, 1.0
    distances = np.array([0.1, 0.2, 0.5, 0.9, 0.2, 0.6, 0.7, 1.0])
    issame = np.array([True] * 4 + [False] * 4)
    far, tar = roc_curve(distances, issame)
    assert far.tolist() == [0, 0, 0.25, 0.25, 0.5, 0.75, 0.75, 1]  # both 0.2 come in at once
    assert tar.tolist() == [0, 0.25, 0.5, 0.75, 0.75, 0.75, 1, 1]
    assert equal_error_rate(far, tar) == 0.25
    # between (far 0, tar 0.5) and (far 0.5, tar 1): false accepts equal false rejects at 0.25
    assert equal_error_rate(np.array([0, 0, 0.5, 1]), np.array([0, 0.5, 1, 1])) == 0.25


def test_tar_at_far_is_the_best_rate_that_the_level_allows() -> None:
    angles = np.concatenate(
        [np.full(90, 0.2), np.full(10, 1.2), np.full(2, 1.0), np.full(198, 2.0)]
    )  # 100 genuine first
    pairs = np.stack([np.stack([np.ones(300), np.zeros(300)], 1), np.stack([np.cos(angles), np.sin(angles)], 1)], 1)
    result = evaluate_pairs(pairs.reshape(600, 2), np.arange(300) < 100)
    assert result.tar_at_far == {1e-2: 1.0, 1e-3: 0.9, 1e-4: 0.9}
    # 200 impostor pairs tell nothing about one false accept in a thousand
    assert result.summary()["tar_at_far"] == {"0.01": 1.0, "0.001": None, "0.0001": None}
    assert result.summary()["smallest_far"] == 1 / 200


def test_rates_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    issame = rng.random(4000) < 0.4
    scores = np.round(rng.normal(issame * 1.5, 1), 2)  # with ties
    fpr, tpr, _ = sklearn_roc(issame, scores, drop_intermediate=False)
    far, tar = roc_curve(-scores, issame)
    assert np.array_equal(far, fpr) and np.array_equal(tar, tpr)
    rates = error_rates(-scores, issame, (1e-1, 1e-2, 1e-3))
    assert rates.tar_at_far == {level: tpr[fpr <= level].max() for level in (1e-1, 1e-2, 1e-3)}
    crossing = brentq(lambda x: 1 - x - np.interp(x, fpr, tpr), 0, 1)
    assert rates.eer == pytest.approx(crossing, abs=1e-9)


def test_a_thin_roc_is_points_of_the_whole_one() -> None:
    rng = np.random.default_rng(1)
    issame = np.arange(5000) < 1000
    far, tar = roc_curve(rng.normal(2 - issame), issame)
    thin_far, thin_tar = thin_roc(far, tar, 64)
    assert 40 < len(thin_far) <= 65 and (thin_far[0], thin_far[-1], thin_tar[-1]) == (0, 1, 1)
    for one, other in zip(thin_far, thin_tar, strict=True):
        assert other == tar[far <= one].max()
    assert thin_far[1] == 1 / 4000


@pytest.mark.parametrize(
    ("embeddings", "issame", "folds", "message"),
    [
        (np.ones((5, 2)), np.array([True, False]), 2, r"\(5, 2\)"),
        (np.full((8, 2), np.nan), np.array([True, False] * 2), 2, "8 of 8 rows are not finite"),
        (np.ones((8, 2)), np.ones(4, bool), 2, "4 of 4 pairs are genuine"),
        (np.ones((8, 2)), np.array([True, False] * 2), 10, "num_folds: 10"),
    ],
)
def test_bad_arrays_are_named(embeddings, issame, folds, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_pairs(embeddings, issame, folds)


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    for person, count in {"Ann_Lee": 3, "Bo": 2, "Van Gogh": 1}.items():
        (tmp_path / "faces" / person).mkdir(parents=True)
        for k in range(1, count + 1):
            (tmp_path / "faces" / person / f"{person}_{k:04d}.{'png' if k == 2 else 'jpg'}").touch()
    return tmp_path / "faces"


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "pairs.txt").write_text(text)
    return tmp_path / "pairs.txt"


def test_read_pairs_with_tabs_spaces_and_header(tmp_path: Path, faces: Path) -> None:
    pairs = read_pairs(
        write(tmp_path, "2\t1\nAnn_Lee\t1\t3\nBo\t1\tVan Gogh\t1\n\nAnn_Lee 1 2\nAnn_Lee 2 Bo 2\n"), faces
    )
    names = [tuple(pairs.names[image].rpartition("/")[2] for image in pair) for pair in pairs.pairs]
    assert names == [
        ("Ann_Lee_0001.jpg", "Ann_Lee_0003.jpg"),
        ("Bo_0001.jpg", "Van Gogh_0001.jpg"),
        ("Ann_Lee_0001.jpg", "Ann_Lee_0002.png"),
        ("Ann_Lee_0002.png", "Bo_0002.png"),
    ]
    assert pairs.issame.tolist() == [True, False, True, False]
    assert (pairs.num_folds, pairs.num_skipped) == (2, 0)


def test_without_a_fold_count_there_are_ten(tmp_path: Path, faces: Path) -> None:
    for header in ("", "1\n"):
        pairs = read_pairs(write(tmp_path, header + "Ann_Lee\t1\t3\nBo\t1\tAnn_Lee\t1\n"), faces)
        assert (pairs.num_folds, len(pairs.pairs)) == (10, 2)


def test_missing_images_are_counted_and_named_or_skipped(tmp_path: Path, faces: Path) -> None:
    text = "2\t2\nAnn_Lee\t1\t3\nAnn_Lee\t1\t9\nBo\t1\tAnn_Lee\t1\nBo\t7\tNobody\t1\n"
    with pytest.raises(UserError, match=r"lacks 3 images.*Ann_Lee/Ann_Lee_0009.*leave out the 2 pairs"):
        read_pairs(write(tmp_path, text), faces)
    pairs = read_pairs(tmp_path / "pairs.txt", faces, skip_missing=True)
    assert pairs.issame.tolist() == [True, False]
    assert pairs.num_skipped == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2\t1\nAnn_Lee\t1\n", "line 2: 'Ann_Lee\\\\t1'"),
        ("2\t1\nAnn_Lee\tx\t3\n", "line 2"),
        ("2\t1\nAnn_Lee\t1\t3\n", "1 genuine and 0 impostor"),
        ("", "0 genuine and 0 impostor"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, faces: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pairs(write(tmp_path, text), faces)


def test_missing_list_and_folder(tmp_path: Path, faces: Path) -> None:
    with pytest.raises(UserError, match="pairs_file: no such file"):
        read_pairs(tmp_path / "none.txt", faces)
    with pytest.raises(UserError, match=r"dataset\.root: no such folder"):
        read_pairs(write(tmp_path, "2\t1\n"), tmp_path / "none")
