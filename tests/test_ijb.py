"""IJB: a synthetic miniature, its protocol against brute force, and lists that do not fit."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_curve as sklearn_roc
from sklearn.preprocessing import normalize

from recognition import ijb
from recognition.ijb import TemplateSettings, evaluate_templates, pair_similarities, pool_templates
from utils.alignment import TEMPLATE
from utils.config import UserError
from utils.data.formats.ijb import read_ijb
from utils.images import read_image, write_image

SWITCHES = [TemplateSettings(n, d, True) for n in (False, True) for d in (False, True)]


@pytest.fixture(scope="module")
def people() -> dict[str, np.ndarray]:
    """40 templates of 20 people, 1 to 5 images each in 1 to 3 media, in no order; all pairs of templates."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(20, 16))
    features, templates, media = [], [], []
    for template in range(40):
        for _ in range(rng.integers(1, 6)):
            length = rng.uniform(0.5, 3)
            features.append(length * (directions[template % 20] + rng.normal(0, 1.0, 16)))
            templates.append(100 + 7 * template)
            media.append(rng.integers(1, 4) * 1000 + template % 3)
    order = rng.permutation(len(features))
    a, b = np.triu_indices(40, 1)
    return {
        "features": np.array(features, np.float32)[order],
        "templates": np.array(templates)[order],
        "media": np.array(media)[order],
        "scores": rng.uniform(0.3, 1, len(order)).astype(np.float32),
        "pairs": np.stack([100 + 7 * a, 100 + 7 * b], 1).astype(np.int32),
        "issame": a % 20 == b % 20,
    }


def brute_force(people: dict[str, np.ndarray], settings: TemplateSettings) -> np.ndarray:
    """Cosines (P,) by the definition, a template at a time."""
    pooled = {}
    for template in np.unique(people["templates"]):
        media_means = []
        inside = people["templates"] == template
        for medium in np.unique(people["media"][inside]):
            rows = []
            for index in np.flatnonzero(inside & (people["media"] == medium)):
                row = people["features"][index].astype(float)
                row = row if settings.use_norm_score else row / np.linalg.norm(row)
                rows.append(row * people["scores"][index] if settings.use_detector_score else row)
            media_means.append(sum(rows) / len(rows))
        pooled[template] = normalize([sum(media_means)])[0]
    return np.array([pooled[a] @ pooled[b] for a, b in people["pairs"]])


@pytest.mark.parametrize("settings", SWITCHES, ids=lambda s: s.switches)
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_templates_against_brute_force(people, settings, chunk, monkeypatch) -> None:
    monkeypatch.setattr(ijb, "TEMPLATES_AT_ONCE", chunk)
    monkeypatch.setattr(ijb, "PAIRS_AT_ONCE", 13 * chunk)
    expected = brute_force(people, settings)
    numbers, pooled = pool_templates(
        *(people[key] for key in ("features", "templates", "media", "scores")),
        use_norm_score=settings.use_norm_score,
        use_detector_score=settings.use_detector_score,
    )
    np.testing.assert_allclose(pair_similarities(numbers, pooled, people["pairs"]), expected, atol=1e-5)
    rates = evaluate_templates(**people, settings=settings)
    fpr, tpr, _ = sklearn_roc(people["issame"], expected, drop_intermediate=False)
    assert rates.tar_at_far == {level: tpr[fpr <= level].max() for level in ijb.FAR_LEVELS}
    assert (rates.num_genuine, rates.num_impostor) == (20, 760)
    assert [rates.resolves(level) for level in ijb.FAR_LEVELS] == [False] * 3 + [False, True, True]


def test_the_switches_matter_and_have_names(people) -> None:
    found = {s.switches: round(evaluate_templates(**people, settings=s).eer, 6) for s in SWITCHES}
    assert list(found) == ["N0D0F1", "N0D1F1", "N1D0F1", "N1D1F1"]
    assert TemplateSettings(True, True, False).switches == "N1D1F0"
    cosines = {s.switches: brute_force(people, s) for s in SWITCHES}
    assert all(np.abs(cosines["N1D1F1"] - cosines[name]).max() > 0.01 for name in ("N0D0F1", "N0D1F1", "N1D0F1"))


def test_features_of_a_diverged_network(people) -> None:
    with pytest.raises(ValueError, match="not finite"):
        evaluate_templates(**{**people, "features": people["features"] * np.nan}, settings=SWITCHES[0])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three images of 150 pixels whose landmarks stand 20 pixels to the right of the template's and 10 below."""
    rng = np.random.default_rng(0)
    landmarks = " ".join(f"{x:.4f} {y:.4f}" for x, y in TEMPLATE + np.array([20, 10]))
    for k in (1, 2, 3):
        write_image(tmp_path / f"loose_crop/{k}.png", rng.integers(0, 256, (150, 150, 3), dtype=np.uint8))
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "ijbc_name_5pts_score.txt").write_text("".join(f"{k}.png {landmarks} 0.{k}5\n" for k in (1, 2, 3)))
    (meta / "ijbc_face_tid_mid.txt").write_text("1.png 1 10\n2.png 1 11\n3.png 5 12\n")
    (meta / "ijbc_template_pair_label.txt").write_text("1 1 1\n1 5 0\n")
    return tmp_path


def test_reading_and_alignment(tree: Path) -> None:
    images = read_ijb(tree)
    assert (images.name, len(images), images.names) == ("ijbc", 3, ["1.png", "2.png", "3.png"])
    assert images.templates.tolist() == [1, 1, 5] and images.media.tolist() == [10, 11, 12]
    assert images.pairs.tolist() == [[1, 1], [1, 5]] and images.issame.tolist() == [True, False]
    np.testing.assert_allclose(images.scores, [0.15, 0.25, 0.35])
    crop = images.pixels(1)
    assert crop.shape == (112, 112, 3)
    difference = crop.astype(int) - read_image(tree / "loose_crop/2.png")[10:122, 20:132]
    assert np.abs(difference).max() <= 1  # a whole shift: the crop is cut, not blurred


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("meta/ijbc_face_tid_mid.txt", "1.png 1 10\n2.png 1 11\n", "2 lines, but the list of landmarks has 3"),
        (
            "meta/ijbc_face_tid_mid.txt",
            "1.png 1 10\n3.png 1 11\n2.png 5 12\n",
            "line 2: '3.png 1 11'; 2.png, a template",
        ),
        ("meta/ijbc_face_tid_mid.txt", "1.png 1 10\n2.png 1 x\n3.png 5 12\n", "line 2: 'x'; a whole number"),
        ("meta/ijbc_template_pair_label.txt", "1 1 1\n1 6 0\n", "1 templates have no images, first 6"),
        ("meta/ijbc_template_pair_label.txt", "1 1 1\n1 5\n", "three whole numbers a line"),
        ("meta/ijbc_template_pair_label.txt", "1 1 1\n1 5 1\n", "2 of 2 pairs are genuine"),
        ("meta/ijbc_name_5pts_score.txt", "1.png 1 2 3\n", "line 1: '1.png 1 2 3'; an image, 10 coordinates"),
        ("meta/ijbc_name_5pts_score.txt", "1.png" + " 4" * 10 + " 0.5\n", "line 1: the five landmarks coincide"),
        ("meta/ijbb_name_5pts_score.txt", "", "holds 2 files"),
    ],
)
def test_lists_that_do_not_fit(tree: Path, file: str, content: str, message: str) -> None:
    (tree / file).write_text(content)
    with pytest.raises(UserError, match=message):
        read_ijb(tree)


def test_missing_images(tree: Path) -> None:
    (tree / "loose_crop/2.png").unlink()
    with pytest.raises(UserError, match=r"loose_crop lacks 1 images of ijbc_name_5pts_score.txt, first 2.png"):
        read_ijb(tree)
