"""The report of an evaluation holds what it should, in the bytes that it may take."""

import io
import json
import re
import zlib
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from evaluation.definitions import DEFINITIONS
from evaluation.report import figures, page, pictures, read_figures, sheet, tables, write_report
from evaluation.results import Histogram
from tests.evaluated_sets import evaluated, stripes, write_folders
from utils.config import UserError
from utils.data.formats.labelled import LabelledImages
from utils.images import encode_image, image_format, write_image
from utils.plotting import canvas

IDENTITIES, IMAGES = 9, 10


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    faces = write_folders(folder / "real", 3, 5, "person")
    files = write_folders(folder / "drawn", IDENTITIES, IMAGES)
    return evaluated("drawn <set>", folder / "drawn", files, seed=3, training=(folder / "real", faces))


def data_of(html: str) -> dict:
    return json.loads(re.search('<script type="application/json" id="data">(.*)</script>', html)[1])


def inflated(text: str):
    return json.loads(zlib.decompress(b64decode(text)))


@pytest.fixture(scope="module")
def html(result, tmp_path_factory) -> str:
    plot = encode_image(stripes(0, 0, 64))
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write_report([result], path, figures=[("Guidance", "a sweep", plot)]).read_text()


def test_holds_every_identity_and_image(html, result):
    (found,) = data_of(html)["sets"]
    assert [figures[0] for figures, *_ in found["identities"]] == result.identities.names.tolist()
    figures_, files, seeds, thumbnails = found["identities"][4]
    assert figures_[1:4] == [
        IMAGES,
        round(float(result.identities.consistency[4]), 4),
        round(float(result.identities.near_share[4]), 4),
    ]
    assert figures_[4] == "id_005" and figures_[6] == "person_001"
    table, rows = inflated(files), slice(4 * IMAGES, 5 * IMAGES)
    assert (table["start"], table["files"]) == ("id_004/", ".png")  # the names are the numbers in `index`
    assert table["index"] == list(range(IMAGES)) and table["switch"] == result.images.switch_t[rows].tolist()
    assert table["cosine"] == pytest.approx(result.images.centre_cosine[rows], abs=6e-4)
    assert [int(seed) for seed in inflated(seeds)] == result.images.seed[rows].tolist()
    assert inflated(found["identities"][0][1])["copy"] == {"1": "id_000/0.png"}
    assert len(thumbnails) == IMAGES and image_format(b64decode(thumbnails[0])) == "WEBP"
    shown = np.asarray(Image.open(io.BytesIO(b64decode(thumbnails[3]))).convert("RGB")).astype(float)
    assert found["size"] == 112 == shown.shape[0]
    expected = pictures.resize(stripes(4, 3), 112).astype(float)
    assert abs(shown - expected).mean() < 6
    assert {name: len(faces) for name, faces in found["training"].items()} == {f"person_00{i}": 4 for i in range(3)}


def test_names_that_are_not_their_numbers_are_all_said(tmp_path):
    files = write_folders(tmp_path / "set", 2, 2)
    result = evaluated("a", tmp_path / "set", files, seed=0)
    result.images.index = result.images.index + 7
    (found,) = data_of(write_report([result], tmp_path / "report.html").read_text())["sets"]
    table = inflated(found["identities"][1][1])
    assert (table["start"], table["files"], table["index"]) == ("id_001/", ["0.png", "1.png"], [7, 8])


def test_needs_no_other_file_and_escapes(html):
    assert "<set>" not in html and "drawn &lt;set&gt;" in html and "a recogniser &lt;small&gt;" in html
    for address in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert address.startswith(("#", "data:image/"))
    assert not re.findall(r"https?://|url\(|@import", html)
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html


def test_says_what_was_found(html):
    assert "83.0 %" in html and "4.00 %" in html and "3.250" in html
    assert "No verdict in words" in html and "Guidance" in html
    assert "0.610" in html and "settings.sampler.num_steps" in html
    assert "CASIA-WebFace (real)" in html and "UIFace" in html


def test_shows_the_verdict_and_gates_of_a_published_embedder(result, tmp_path):
    result = evaluated("a", result.root, result.images.files.tolist(), seed=0, two_stage=False)
    result.embedder["is_published"], result.verdict = True, "Trains a recogniser."
    html = write_report([result], tmp_path / "report.html").read_text()
    assert "Trains a recogniser." in html and "No verdict" not in html
    assert re.findall(r'<span style="left:([\d.]+)%">', html) == ["59.0", "80.0", "90.0"]
    assert 'id="switch"' not in html and 'class="pairs"' not in html


@pytest.mark.parametrize("spare", [10_000, 14_321, 40_000, 90_000, 400_000])
def test_never_takes_more_than_it_may(html, result, tmp_path, spare):
    fixed = len(html.encode()) - len(re.search('id="data">(.*)</script>', html)[1])
    max_bytes = fixed + spare
    plot = encode_image(stripes(0, 0, 64))
    path = write_report(
        [result], tmp_path / "report.html", max_bytes=max_bytes, figures=[("Guidance", "a sweep", plot)]
    )
    assert path.stat().st_size <= max_bytes
    held = [len(thumbnails) for _, _, _, thumbnails in data_of(path.read_text())["sets"][0]["identities"]]
    assert len(held) == IDENTITIES and sum(held) <= IDENTITIES * IMAGES
    if spare == 40_000:
        assert 0 < sum(held) < IDENTITIES * IMAGES


class Noise(LabelledImages):
    """Ten thousand identities that share one picture, which hardly compresses."""

    def __init__(self, files: list[str]) -> None:
        folders = [file.partition("/")[0] for file in files]
        names, labels = np.unique(folders, return_inverse=True)
        super().__init__("noise", files, names.tolist(), labels)
        self.picture = encode_image(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))

    def encoded(self, index: int) -> bytes:
        return self.picture


def test_ten_thousand_identities_fit(tmp_path, monkeypatch):
    files = [f"{i:05d}/{k}.png" for i in range(10_000) for k in range(5)]
    monkeypatch.setattr(pictures, "open_labelled", lambda root: Noise(files))
    result = evaluated("noise", tmp_path, files, seed=0)
    path = write_report([result], tmp_path / "report.html", max_bytes=4_500_000)
    assert 4_000_000 < path.stat().st_size <= 4_500_000
    (found,) = data_of(path.read_text())["sets"]
    assert len(found["identities"]) == 10_000 and found["size"] == 64
    with_pictures = {figures[0] for figures, _, _, thumbnails in found["identities"] if thumbnails}
    worst = result.identities.names[np.argsort(result.identities.consistency)]
    assert {*worst[:8], *worst[-8:]} <= with_pictures and len(with_pictures) < 1000


def test_order_is_stratified_at_every_beginning():
    key = np.random.default_rng(0).normal(size=1000)
    other = np.where(np.arange(1000) % 7 == 0, np.nan, np.arange(1000.0))
    order = sheet.stratified_order(key)
    assert sorted(order) == list(range(1000))
    ranks = np.argsort(np.argsort(key))
    for count in (10, 50, 300):
        gaps = np.diff(np.sort(ranks[order[:count]]))
        assert gaps.max() <= 2 * 1024 / 2 ** np.floor(np.log2(count))
    ends = sheet.stratified_order(key, [key, other])[: 4 * sheet.ENDS].tolist()
    assert ends[:4] == [int(key.argmin()), int(key.argmax()), 1, 999]
    assert not np.isnan(other[ends[2::4]]).any()
    assert sheet.stratified_order(np.array([np.nan])).tolist() == [0]


def test_sets_sample_the_same_identities(result, tmp_path):
    other = evaluated("other", result.root, result.images.files.tolist(), seed=8)
    path = write_report([result, other], tmp_path / "report.html", max_bytes=130_000)
    held = [
        {figures[0] for figures, _, _, thumbnails in found["identities"] if thumbnails}
        for found in data_of(path.read_text())["sets"]
    ]
    assert path.stat().st_size <= 130_000
    assert 0 < len(held[0] & held[1]) == min(map(len, held)) < IDENTITIES


def test_large_figures_are_scaled_down():
    plot = encode_image(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8))
    assert pictures.shrink_figure(plot, len(plot)) == (plot, "image/png")
    small, media_type = pictures.shrink_figure(plot, 5_000)
    assert len(small) <= 5_000 and media_type == "image/webp"
    assert Image.open(io.BytesIO(small)).size in ((75, 50), (150, 100))


def test_densities_have_area_one():
    histogram = Histogram(np.array([0.0, 0.5, 0.75, 1.0]), np.array([2, 1, 1]))
    assert figures.Density("a", histogram, "--c1").heights() == pytest.approx([1.0, 1.0, 1.0])
    span, top = figures._common_axes([figures.Density("a", Histogram(histogram.edges, np.array([0, 3, 0])), "--c1")])
    assert span == (0.5, 0.75) and top == pytest.approx(4.2)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.8768, "share", "87.7 %"),
        (0.0123, "share", "1.23 %"),
        (1234567, "count", "1,234,567"),
        (747.6, "timestep", "748"),
        (0.12345, "cosine", "0.123"),
        (18.456, "distance", "18.46"),
        (None, "share", "–"),
    ],
)
def test_values_as_text(value, unit, text):
    assert tables.format_value(value, unit) == text


def test_marks_the_better_set(result):
    other = evaluated("b", result.root, result.images.files.tolist(), seed=1)
    other.metrics = {"c_intra": 0.9, "eer": 0.06, "num_images": 3}
    rows = {row.key: row for row in tables.all_rows([result, other])}
    assert [cell.is_best for cell in rows["c_intra"].cells] == [False, True]
    assert [cell.is_best for cell in rows["eer"].cells] == [True, False]
    assert not any(cell.is_best for cell in rows["num_images"].cells + rows["fdr"].cells[1:])
    assert rows["fdr"].cells[1].text == "–" and "fid" not in rows
    settings = {key: (values, differs) for key, values, differs in tables.settings([result, other])}
    assert settings["of"] == (["drawn <set>", "b"], True)
    assert settings["settings.latent_shape"] == (["3, 32, 32", "3, 32, 32"], False)


def test_says_what_figures_do_not_compare_with(result, tmp_path):
    """Features of one's own compare with nobody's; precision, recall and FID only with those of as many images."""
    metrics = {**result.metrics, "recall": 0.5, "fid": 3.0, "d_intra": 0.4}
    whole = replace(result, metrics=metrics)
    files = result.images.files[:50]
    part = replace(whole, name="part", images=replace(result.images, files=files))
    published = {"name": "Inception-v3 (2015-12-05)", "sha256": "0", "is_comparable": True}
    (own,) = tables.caveats([whole, whole])
    assert own.startswith("recall, FID, D_intra are computed in its features, and do not compare with published")
    assert tables.caveats([replace(whole, features=published)]) == []
    (size,) = tables.caveats([replace(whole, features=published), replace(part, features=published)])
    assert size.startswith("recall, FID depend on the number of images, which is 50 to 90 here")
    assert tables.caveats([result]) == []  # it has none of these figures
    written = write_report([whole], tmp_path / "report.html").read_text()
    assert own.replace("'", "&#39;") in written


def test_questions_ask_for_defined_metrics():
    assert {key for _, _, keys in tables.QUESTIONS for key in keys} <= DEFINITIONS.keys()


def test_published_rows_are_the_best_of_each_name():
    rows = tables.published_rows()
    assert rows[0].name == "CASIA-WebFace (real)" and ("UIFace", 93.27) in [(row.name, row.mean) for row in rows]
    assert len({row.name for row in rows}) == len(rows) == 8


def test_bad_input_is_one_line(result, tmp_path):
    with pytest.raises(UserError, match="data sets: none"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(UserError, match="needs a name of its own"):
        write_report([result, result], tmp_path / "r.html")
    with pytest.raises(UserError, match="max_bytes: 20000; the page without its identities takes"):
        write_report([result], tmp_path / "r.html", max_bytes=20_000)
    changed = evaluated("a", result.root, [*result.images.files.tolist(), "id_000/77.png"], seed=0)
    with pytest.raises(UserError, match=r"no image 'id_000/77.png'; the data set has changed"):
        write_report([changed], tmp_path / "r.html")
    changed.metrics["beauty"] = 1.0
    with pytest.raises(ValueError, match=r"without a definition in evaluation\.definitions: beauty"):
        write_report([changed], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_lists_names():
    assert [page._listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_pictures_of_a_folder_bring_their_captions(tmp_path):
    figure = Figure(figsize=(1, 1))
    (tmp_path / "b.png").write_bytes(canvas.png(figure, "Guidance", "the scale s"))
    write_image(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    (title, caption, data), second = read_figures(tmp_path)
    assert (title, caption, data[:4]) == ("a", "", b"\x89PNG")
    assert second == ("Guidance", "the scale s", (tmp_path / "b.png").read_bytes())
