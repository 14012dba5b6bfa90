"""All metrics of a set out of arrays alone: matched identities, curation's parts, histograms."""

from pathlib import Path

import numpy as np
import pytest

from evaluation.feature_networks import own_features
from evaluation.generated_set import GeneratedSet
from evaluation.material import Material, RealMaterial, rows_for_features
from evaluation.measure import Bench, measure
from evaluation.real_set import EmbeddedNames, RealSet, match_identities
from evaluation.settings import EvaluationSettings
from utils.config import UserError
from utils.data.formats.selected import SelectedImages

PEOPLE, IMAGES, WIDTH = 40, 4, 32
EMBEDDER = {"name": "none", "sha256": "", "is_published": True}


def named(identities: list[str]) -> EmbeddedNames:
    names = [f"{name}/{k}" for name in identities for k in range(IMAGES)]
    return EmbeddedNames(Path("faces"), names, identities, np.arange(len(names)) // IMAGES)


def embed(centres: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Unit rows about each centre (K, WIDTH), IMAGES each."""
    rows = centres.repeat(IMAGES, axis=0) + noise * np.random.default_rng(seed).standard_normal(
        (IMAGES * PEOPLE, WIDTH)
    )
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def sets() -> tuple[Material, Bench]:
    """Generated images of the real people, in reversed order, a little farther from their centres."""
    centres = np.random.default_rng(0).standard_normal((PEOPLE, WIDTH))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    real_names = [f"r{k:02d}" for k in range(PEOPLE)]
    source = RealSet(named(real_names), False, None, None, [])
    embeddings = embed(centres, 0.02, 1)
    rows = np.arange(len(embeddings))
    real = RealMaterial.of(source, embeddings, rows, embeddings)
    names = [f"g{k:02d}" for k in range(PEOPLE)]
    generated = GeneratedSet("set", "faces", SelectedImages(named(names), rows), switch_t=np.where(rows % 2, 600, -1))
    found = embed(centres[::-1], 0.05, 2)
    matches = {k: PEOPLE - 1 - k for k in range(PEOPLE)}
    material = Material(generated, rows, rows // IMAGES, names, found, rows, found, matches)
    options = EvaluationSettings("", neighbours=3, diversity_neighbours=2, reproduction_pairs=8)
    return material, Bench(options, 0.3, EMBEDDER, own_features(), real, None)


def test_matched_identities_have_diversity_and_reproduction(sets):
    result = measure(*sets, "set")
    metrics = result.metrics
    for kind in ("real_real", "real_variation", "variation_real", "variation_variation"):
        assert metrics[f"reproduction_{kind}"] > 0.95
    assert metrics["d_intra"] > 0.9  # real images lie nearer to the centre than generated ones
    assert metrics["leakage_share"] == 1.0 and metrics["leakage_real_share"] == 0.0
    assert result.identities.training_name.tolist() == [f"r{k:02d}" for k in reversed(range(PEOPLE))]
    assert result.verdict.startswith("C_intra 1.000, consistent")
    assert metrics["switched"] == 0.5 and metrics["switch_t_mean"] == 600
    assert result.histograms["switch_t"].counts.sum() == IMAGES * PEOPLE / 2
    assert result.warnings == []


def test_identities_of_one_image_are_told(sets):
    """Their image is their centre: C_intra is 1 of noise, too."""
    material, bench = sets
    kept = np.ones(len(material.labels), bool)
    kept[1:IMAGES] = False
    result = measure(material.select(kept), bench, "set")
    assert result.identities.near_share[0] == 1
    assert [warning for warning in result.warnings if "one image" in warning and "consistent" in warning] == [
        f"1 of {PEOPLE} identities have one image, which is its own centre: they count as consistent whatever it shows"
    ]


def test_wrong_matches_show(sets):
    material, bench = sets
    swapped = Material(**{**vars(material), "matches": {k: k for k in range(PEOPLE)}})
    metrics = measure(swapped, bench, "set").metrics
    assert metrics["reproduction_real_real"] > 0.95 and metrics["reproduction_real_variation"] < 0.7
    assert metrics["d_intra"] < 0.1


def test_a_part_is_measured_as_a_set_of_its_own(sets):
    material, bench = sets
    kept = np.isin(material.labels, [3, 5, 6]) & (np.arange(len(material.rows)) != 13)
    part = material.select(kept)
    assert part.names == ["g03", "g05", "g06"] and part.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 4
    assert part.matches == {0: PEOPLE - 4, 1: PEOPLE - 6, 2: PEOPLE - 7}
    np.testing.assert_array_equal(part.features, material.embeddings[kept])
    result = measure(part, bench, "part")
    assert result.images.files.tolist() == [material.files[row] for row in np.flatnonzero(kept)]
    assert result.identities.num_images.tolist() == [3, 4, 4]
    assert any("identity reproduction is left out" in warning for warning in result.warnings)  # three people


def test_too_few_images_are_said_and_not_guessed(sets):
    material, bench = sets
    part = material.select(np.arange(len(material.rows)) < 2)
    result = measure(part, bench, "part")
    assert result.metrics["precision"] is None and result.metrics["d_intra"] is None
    assert result.metrics["eer"] is None and result.metrics["num_impostor"] == 0
    assert any(warning.startswith("FID is of 2 images in features 32 wide") for warning in result.warnings)


def test_which_images_give_features():
    labels = np.arange(100) // 4
    rows, is_drawn = rows_for_features(labels, np.array([3, 24]), 10, seed=0)
    assert {*range(12, 16), *range(96, 100)} < set(rows.tolist()) and len(rows) <= 18
    assert np.count_nonzero(is_drawn) == 10 and len(rows) > 10
    np.testing.assert_array_equal(rows, rows_for_features(labels, np.array([3, 24]), 10, seed=0)[0])
    np.testing.assert_array_equal(rows[is_drawn], rows_for_features(labels, np.array([], np.int64), 10, seed=0)[0])
    rows, is_drawn = rows_for_features(labels, np.array([], np.int64), 100, seed=0)
    assert rows.tolist() == list(range(100)) and is_drawn.all()


def test_matched_images_do_not_weigh_in_figures_of_the_whole(sets):
    """FID, precision and recall are of the drawn images; D_intra is of the matched ones, too."""
    material, bench = sets
    is_drawn = np.arange(len(material.rows)) % 3 == 0
    drawn = material.features[is_drawn]
    found = measure(Material(**{**vars(material), "is_drawn": is_drawn}), bench, "set").metrics
    alone = measure(
        Material(**{**vars(material), "feature_rows": np.flatnonzero(is_drawn), "features": drawn, "matches": {}}),
        bench,
        "set",
    ).metrics
    whole = measure(material, bench, "set").metrics
    for key in ("fid", "precision", "recall"):
        assert found[key] == alone[key]
    assert found["fid"] != whole["fid"] and found["d_intra"] == whole["d_intra"]
    kept = Material(**{**vars(material), "is_drawn": is_drawn}).select(is_drawn | (material.labels < 3))
    np.testing.assert_array_equal(kept.drawn_features, drawn)


@pytest.mark.parametrize(
    ("match", "expected"), [(None, {}), ("names", {1: 0}), ("{tmp}/context_names.txt", {0: 2, 1: 0})]
)
def test_who_was_drawn_from_whom(tmp_path, match, expected):
    (tmp_path / "context_names.txt").write_text("carl\nanna\n")
    match = match and match.format(tmp=tmp_path)
    assert match_identities(match, ["00000", "anna", "00007"], ["anna", "berta", "carl"]) == expected


def test_nobody_was_drawn_from_anybody():
    with pytest.raises(UserError, match=r"real\.match: names: no generated identity \(such as a\) has a real one"):
        match_identities("names", ["a"], ["b"])
