"""recognition.embed and recognition.verify: what they print and write, thresholds, and what users get wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recognition import verify
from recognition.backbones import build_backbone, save_backbone
from recognition.embed import main as embed
from recognition.face_input import face_crop, is_crop
from recognition.verify import find_threshold
from tests.drawn_face import draw_face
from utils.alignment import FaceAligner
from utils.config import UserError
from utils.contexts import read_embeddings
from utils.embedders import backbone_embedder
from utils.images import read_image, write_image


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A network of 32 pixels, two photographs with a face and one without."""
    torch.manual_seed(0)
    save_backbone(
        build_backbone("ir_18", input_size=32, num_features=16, width=0.125), tmp_path / "backbone.safetensors"
    )
    for name, scale in (("a/0.png", 1.0), ("b/0.png", 0.8)):
        write_image(tmp_path / "photos" / name, draw_face(128, scale=scale))
    write_image(tmp_path / "empty.png", np.full((128, 128, 3), 90, np.uint8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_crops_are_told_by_their_size(folder):
    for size, expected in (((112, 112), True), ((32, 32), True), ((128, 128), False), ((112, 96), False)):
        write_image(folder / "x.png", np.zeros((*size, 3), np.uint8))
        assert is_crop(folder / "x.png", input_size=32) is expected
    write_image(folder / "wide.png", draw_face(128)[:100])
    crop, how = face_crop(folder / "wide.png", None)
    assert crop.shape == (100, 100, 3) and how.endswith("128 x 100 pixels, taken as an aligned crop")
    np.testing.assert_array_equal(crop, draw_face(128)[:100, 14:114])


@pytest.mark.parametrize("align", [False, True])
def test_one_image(folder, compose, capsys, align):
    image = folder / "photos/a/0.png"
    words = ("checkpoint=backbone.safetensors", f"images={image}", "output=out/a.npy", f"align={align}", "device=cpu")
    embed.__wrapped__(compose("recognition_embed_config", *words))
    embedder = backbone_embedder("backbone.safetensors")
    pixels = read_image(image)
    if align:
        ((pixels, _),) = FaceAligner().align([pixels])
    (wanted,) = embedder.embed(pixels[None])
    np.testing.assert_allclose(np.load("out/a.npy"), wanted, atol=1e-6)
    how, length, first, written = capsys.readouterr().out.splitlines()
    assert how.endswith("face found (probability 1.000), aligned" if align else "taken as an aligned crop")
    assert length.startswith("embedding: 16 numbers, of length ") and written == "written: out/a.npy"
    assert first == "first: " + " ".join(f"{number:.4f}" for number in wanted[:8])


@pytest.mark.parametrize("output", ["out", "out/embeddings.npy"])
def test_a_folder_is_aligned_and_embedded(folder, compose, output):
    write_image(folder / "photos/b/1.png", read_image(folder / "empty.png"))
    words = ("checkpoint=backbone.safetensors", "images=photos", f"output={output}", "align=true", "device=cpu")
    embed.__wrapped__(compose("recognition_embed_config", *words))
    names, rows = read_embeddings("out/embeddings.npy")
    assert names == ["a/0.png", "b/0.png"]  # the one without a face is left out
    crops = np.stack([read_image(Path("out/aligned") / name) for name in names])
    assert crops.shape == (2, 112, 112, 3)
    np.testing.assert_allclose(rows, backbone_embedder("backbone.safetensors").embed(crops), atol=1e-5)
    words = ("checkpoint=backbone.safetensors", "images=out/aligned", "output=again", "align=true", "device=cpu")
    embed.__wrapped__(compose("recognition_embed_config", *words))
    assert not Path("again/aligned").exists()  # they were crops
    np.testing.assert_allclose(read_embeddings("again/embeddings.npy")[1], rows, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["images=absent"], "images: no such image or folder: absent"),
        (["images=photos"], "output: not set; photos is a folder, so give output=FOLDER"),
        (["images=photos", "output=x.npy"], "output: x.npy is one file; photos is a folder"),
        (["images=photos", "output=photos/out", "align=true"], "output: photos/out lies in images=photos"),
        (["images=hollow", "output=out"], "images: no images in hollow"),
        (["images=photos/a/0.png", "output=out"], "output: out; the embedding of one image goes to a file .npy"),
        (
            ["images=photos/a/0.png", "output=empty.png/x.npy"],
            "output: cannot write empty.png/x.npy .*empty.png is a file",
        ),
        (["images=photos", "output=empty.png/x"], "output: cannot write empty.png/x .*empty.png is a file"),
        (["images=photos/a/0.png", "batch_size=0"], "batch_size: 0; it must be at least 1"),
        (["images=backbone.safetensors"], "backbone.safetensors: not an image of a known format"),
        (["images=empty.png", "align=true"], "empty.png: no face found in 128 x 128 pixels; one of at least 20 pixels"),
        (["images=photos/a/0.png", "checkpoint=no"], "embedder.checkpoint: no such file: no"),
    ],
)
def test_mistakes_of_embed(folder, compose, overrides, message):
    (folder / "hollow").mkdir()
    cfg = compose("recognition_embed_config", "checkpoint=backbone.safetensors", "device=cpu", *overrides)
    with pytest.raises(UserError, match=message):
        embed.__wrapped__(cfg)


def results(path: Path, sets: dict[str, float], checkpoint: str = "backbone.safetensors", **more) -> Path:
    """results.json as recognition.test writes it, with thresholds by set (squared distances)."""
    numbers = {"accuracy": 0.9, "num_genuine": 30, "num_impostor": 20, "num_folds": 5}
    report = {"checkpoint": checkpoint, "flip": True, "channel_order": None, **more}
    report["sets"] = {name: {"threshold": threshold, **numbers} for name, threshold in sets.items()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report))
    return path


def run(monkeypatch, capsys, *words: str) -> list[str]:
    monkeypatch.setattr("sys.argv", ["verify", *words, "--device", "cpu"])
    assert verify.main() == 0
    return capsys.readouterr().out.splitlines()


def test_verdicts(folder, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    write_image(folder / "crop.png", generator.integers(0, 256, (112, 112, 3), dtype=np.uint8))
    images = ("photos/a/0.png", "crop.png", "--checkpoint", "backbone.safetensors")
    face, _ = face_crop(images[0], FaceAligner())
    rows = backbone_embedder("backbone.safetensors").embed(np.stack([face, read_image(images[1])]))
    cosine = float(rows[0] @ rows[1])

    lines = run(monkeypatch, capsys, *images)
    assert lines[0] == "photos/a/0.png: face found (probability 1.000), aligned"
    assert lines[1] == "crop.png: 112 x 112 pixels, taken as an aligned crop"
    assert lines[2:4] == ["network: backbone.safetensors", f"similarity: {cosine:.4f} (cosine)"]
    assert (
        lines[4].startswith("threshold: none, backbone.safetensors is not calibrated") and lines[5] == "verdict: none"
    )

    for offset, words in ((-0.01, "the same person"), (0.01, "different people")):
        lines = run(monkeypatch, capsys, *images, "--threshold", str(cosine + offset))
        assert lines[4:] == [
            f"threshold: {cosine + offset:.4f}, as given on the command line",
            f"verdict: {words}",
        ]
        file = results(folder / "results.json", {"pairs": 2 - 2 * (cosine + offset)})
        lines = run(monkeypatch, capsys, *images)
        told = f"from {file.name}, set pairs: 90.00 % of 50 pairs right, 5 folds"
        assert lines[4:] == [f"threshold: {cosine + offset:.4f}, {told}", f"verdict: {words}"]

    lines = run(monkeypatch, capsys, images[0], images[0], *images[2:], "--align", "never")
    assert lines[0] == "photos/a/0.png: 128 x 128 pixels, taken as an aligned crop"
    assert lines[3] == "similarity: 1.0000 (cosine)"


def test_which_threshold_is_taken(folder):
    own = folder / "backbone.safetensors"
    file = results(folder / "test/results.json", {"agedb_30": 1.2, "lfw": 1.5}, flip=False, channel_order="RGB")
    found = find_threshold(own, file, None, None)
    assert (found.cosine, found.flip, found.channel_order) == (0.25, False, "RGB")
    assert find_threshold(own, file, None, "agedb_30").cosine == pytest.approx(0.4)
    results(folder / "test/results.json", {"cfp_fp": 1.0, "calfw": 1.5})
    assert find_threshold(own, file, None, None).cosine == 0.5

    report = json.loads(file.read_text())
    file.write_text(json.dumps({"models": [{**report, "checkpoint": None}, {**report, "checkpoint": str(own)}]}))
    assert find_threshold(own, file, None, None).cosine == 0.5
    copy = folder / "copy.safetensors"
    copy.write_bytes(own.read_bytes())
    assert find_threshold(copy, file, None, None).cosine == 0.5  # the same network under another name
    copy.write_bytes(b"another network")
    with pytest.raises(UserError, match=r"--results: .* is of other networks than .*copy.safetensors; a threshold"):
        find_threshold(copy, file, None, None)

    moved = folder / "moved"
    moved.mkdir()
    (moved / "backbone.safetensors").write_bytes(b"x")
    results(moved / "results.json", {"lfw": 1.0}, checkpoint="gone/backbone.safetensors")
    assert find_threshold(moved / "backbone.safetensors", None, None, None).cosine == 0.5
    results(moved / "results.json", {"lfw": 1.0}, checkpoint="gone/other.safetensors")
    assert find_threshold(moved / "backbone.safetensors", None, None, None) is None


def test_mistakes_of_verify(folder, monkeypatch, capsys):
    file = results(folder / "t/results.json", {"lfw": 1.5})
    (folder / "broken.json").write_text("[1]")
    results(folder / "odd/results.json", {"lfw": 5.0})
    good = ["photos/a/0.png", "photos/b/0.png", "--checkpoint", "backbone.safetensors"]
    for words, message in (
        (good[:1], "the following arguments are required: B"),
        (good[:2], "--checkpoint: no such file: outputs/recogniser/backbone.safetensors; give the recogniser's file"),
        (["no.png", *good[1:]], "A: no such file: no.png"),
        (["empty.png", *good[1:]], "empty.png: no face found in 128 x 128 pixels"),
        ([good[0], "broken.json", *good[2:]], "broken.json: not an image of a known format"),
        ([*good, "--results", "no.json"], "--results: no such file: no.json; recognition.test writes results.json"),
        ([*good, "--results", "broken.json"], "--results: broken.json is no results.json of recognition.test"),
        ([*good, "--results", "odd/results.json"], "--results: odd/results.json has threshold 5.0 for lfw"),
        ([*good, "--results", str(file), "--set", "cfp_fp"], r"--set: cfp_fp; the sets of pairs in .* are: lfw"),
        ([*good, "--set", "lfw"], "--set: lfw, but no results.json beside backbone.safetensors is of it"),
        ([*good, "--threshold", "1.2"], "--threshold: 1.2; a cosine is between -1 and 1"),
        ([*good, "--threshold", "0.2", "--results", str(file)], "not allowed with argument"),
    ):
        monkeypatch.setattr("sys.argv", ["verify", *words])
        with pytest.raises(UserError, match=message):
            verify.main()
    assert capsys.readouterr().out == ""
