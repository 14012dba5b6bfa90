import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.drawn_face import LANDMARKS, draw_face
from utils import alignment_job
from utils.alignment import TEMPLATE, FaceAligner, norm_crop, similarity_matrix, warp
from utils.alignment_job import AlignSettings, find_layout, merge_reports, run_alignment
from utils.config import UserError
from utils.images import read_block, read_image, write_block, write_image
from utils.mtcnn import MTCNN, _crop, _summed_area, _suppress

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def aligner() -> FaceAligner:
    return FaceAligner(min_face_size=32)


def test_similarity_matrix_agrees_with_the_published_numbers():
    with np.load(DATA / "alignment.npz", allow_pickle=False) as arrays:
        for landmarks, matrix in zip(arrays["landmarks"], arrays["matrix"], strict=True):
            np.testing.assert_allclose(similarity_matrix(landmarks), matrix, atol=1e-9)


def test_similarity_matrix_never_reflects():
    mirrored = TEMPLATE * [-1, 1]
    matrix = similarity_matrix(mirrored)
    assert np.linalg.det(matrix[:, :2]) > 0
    np.testing.assert_allclose(similarity_matrix(TEMPLATE), [[1, 0, 0], [0, 1, 0]], atol=1e-9)


@pytest.mark.parametrize("landmarks", [np.full((5, 2), 3.0), np.full((5, 2), np.nan), np.zeros((4, 2))])
def test_landmarks_without_a_transform_are_refused(landmarks):
    with pytest.raises(ValueError, match="landmarks"):
        similarity_matrix(landmarks)


def test_warp_pins():
    image = np.zeros((4, 4, 3), np.uint8)
    image[1, 2] = (100, 200, 40)
    shifted = warp(image, np.array([[1, 0, 0.25], [0, 1, 0.5]]), 5)  # the pixel goes to (2.25, 1.5)
    assert shifted[1, 2].tolist() == [38, 75, 15] and shifted[1, 3].tolist() == [12, 25, 5]
    assert shifted[2, 2].tolist() == [38, 75, 15] and shifted[2, 3].tolist() == [12, 25, 5]
    assert shifted.astype(int).sum() == (38 + 75 + 15 + 12 + 25 + 5) * 2


def test_border_is_black_and_blends():
    bright = np.full((4, 4, 3), 200, np.uint8)
    moved = warp(bright, np.array([[1.0, 0, 1.5], [0, 1, 0]]), 8)
    assert moved[0, :, 0].tolist() == [0, 100, 200, 200, 200, 100, 0, 0]


def test_norm_crop_puts_the_landmarks_on_the_template():
    image = np.zeros((112, 112, 3), np.uint8)
    for x, y in np.rint(TEMPLATE).astype(int):
        image[y, x] = 255
    crop = norm_crop(np.rot90(image).copy(), np.stack([TEMPLATE[:, 1], 111 - TEMPLATE[:, 0]], axis=1))
    assert np.array_equal(crop, image)


def test_area_crops_equal_adaptive_pooling():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 60, 50, 3), dtype=np.uint8))
    owner = np.array([0, 1, 1, 0])
    boxes = np.array([[3.7, 4.2, 33.1, 30.9], [-5, -5, 20, 12], [48, 10, 70, 40], [60, 70, 80, 90]], np.float32)
    owner, boxes, crops = _crop(_summed_area(images), owner, boxes, 24)
    assert owner.tolist() == [0, 1, 1], "the box outside the image is dropped"
    pixels = images.permute(0, 3, 1, 2).float()
    for crop, (image, rows, columns) in zip(
        crops, [(0, (3, 30), (2, 33)), (1, (0, 12), (0, 20)), (1, (9, 40), (47, 50))], strict=True
    ):
        region = pixels[image : image + 1, :, slice(*rows), slice(*columns)]
        expected = (F.adaptive_avg_pool2d(region, 24)[0] - 127.5) / 128
        torch.testing.assert_close(crop, expected, atol=1e-5, rtol=0)


def test_suppression():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 6], [0, 3, 10, 13], [0, 0, 10, 10], [2, 2, 6, 6]], np.float32)
    owner = np.array([0, 0, 0, 1, 0])
    scores = np.array([0.8, 0.9, 0.7, 0.5, 0.6], np.float32)
    # 1 beats 0 (overlap 0.6), so 0 cannot beat 2 (1 and 2 share 0.23)
    assert _suppress(owner, boxes, scores, 0.5).tolist() == [1, 2, 4, 3]
    # over the smaller box the last one lies inside the first
    assert _suppress(owner, boxes, scores, 0.7, over_smaller=True).tolist() == [1, 2, 3]


def test_detector_finds_the_drawn_face():
    images = np.stack([draw_face(), np.full((128, 128, 3), 90, np.uint8), draw_face(128, (50, 70), 0.8)])
    found = MTCNN().detect(torch.from_numpy(images))
    assert [len(faces.boxes) for faces in found] == [1, 0, 1]
    expected = [[52.04, 58.62], [77.64, 59.23], [65.52, 72.19], [54.66, 88.70], [75.38, 89.38]]
    np.testing.assert_allclose(found[0].landmarks[0], expected, atol=0.05)
    assert found[0].probabilities[0] > 0.999
    assert np.abs(found[2].landmarks[0] - (LANDMARKS * 0.8 + (50, 70))).max() < 4


def test_the_nearest_face_to_the_centre_is_taken(aligner):
    image = np.concatenate([draw_face(160, (80, 80), 1.2), draw_face(160, (50, 80))], axis=1)
    detection = aligner.detect([image])[0]
    assert detection.faces == 2
    assert np.abs(detection.landmarks - (LANDMARKS + np.array([210, 80]))).max() < 4


def test_landmarks_come_back_to_the_image(aligner):
    big, small = draw_face(256, (128, 128), 2.0), draw_face(64, (31.5, 31.5), 0.6)
    wide = np.pad(small, ((0, 0), (20, 20), (0, 0)), mode="edge")
    found = aligner.detect([big, small, wide])
    assert np.abs(found[0].landmarks - (LANDMARKS * 2 + 128)).max() < 6
    assert np.abs(found[1].landmarks - (LANDMARKS * 0.6 + 31.5)).max() < 2.5
    assert np.abs(found[2].landmarks - (LANDMARKS * 0.6 + (51.5, 31.5))).max() < 2.5
    crop, _ = aligner.align([big])[0]
    assert crop.shape == (112, 112, 3) and crop[52, 38].max() < 110 < crop[52, 55].max()


def make_folders(root: Path) -> None:
    blank = np.full((96, 96, 3), 70, np.uint8)
    for identity, images in {"a": [draw_face(), draw_face(140)], "b": [draw_face(), blank], "c": [blank]}.items():
        for index, image in enumerate(images):
            write_image(root / identity / f"{index}.jpg", image)
    (root / "b" / "2.jpg").write_bytes(b"broken")


def settings(root: Path, out: Path, **changes) -> AlignSettings:
    values = {
        "layout": "auto",
        "tile_size": None,
        "min_face_size": 40,
        "detection_size": 112,
        "detection_padding": 0.1,
        "just_resize_if_fail": False,
        "discard_identity_if_fail": False,
        "processes": 1,
        "device": "cpu",
    }
    return AlignSettings(input_dir=str(root), output_dir=str(out), **{**values, **changes})


def pngs(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))


def report(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "alignment_report.jsonl").read_text().splitlines()]


def test_folders_lose_only_the_failed_images(tmp_path):
    make_folders(tmp_path / "in")
    summary = run_alignment(settings(tmp_path / "in", tmp_path / "out"))
    assert pngs(tmp_path / "out") == ["a/0.png", "a/1.png", "b/0.png"]
    lines = report(tmp_path / "out")
    assert [(line["file"], line["status"]) for line in lines] == [
        ("a/0.jpg", "aligned"),
        ("a/1.jpg", "aligned"),
        ("b/0.jpg", "aligned"),
        ("b/1.jpg", "failed"),
        ("b/2.jpg", "failed"),
        ("c/0.jpg", "failed"),
    ]
    assert lines[0]["faces"] == 1 and lines[0]["probability"] > 0.99 and np.shape(lines[0]["landmarks"]) == (5, 2)
    assert lines[3]["reason"] == "no face found" and "b/2.jpg" in lines[4]["reason"]
    assert summary["images"] == 6 and summary["aligned"] == 3 and summary["rate"] == 0.5 and summary["identities"] == 3
    assert json.loads((tmp_path / "out" / "alignment_summary.json").read_text()) == summary


def test_failures_can_be_resized_or_cost_the_identity(tmp_path):
    make_folders(tmp_path / "in")
    run_alignment(settings(tmp_path / "in", tmp_path / "resized", just_resize_if_fail=True))
    assert pngs(tmp_path / "resized") == ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "c/0.png"]
    assert read_image(tmp_path / "resized/b/1.png").shape == (112, 112, 3)
    assert [line["status"] for line in report(tmp_path / "resized")].count("resized") == 2
    run_alignment(settings(tmp_path / "in", tmp_path / "strict", discard_identity_if_fail=True))
    assert pngs(tmp_path / "strict") == ["a/0.png", "a/1.png"]
    assert [line["status"] for line in report(tmp_path / "strict")] == ["aligned"] * 2 + ["discarded"] * 4


def test_blocks_give_blocks(tmp_path):
    blank = np.zeros((128, 128, 3), np.uint8) + 60
    tiles = [draw_face(), blank, *[draw_face(scale=0.9 + 0.05 * k) for k in range(5)]]
    write_image(tmp_path / "in" / "7.png", write_block(np.stack(tiles), 4))
    write_image(tmp_path / "in" / "8.png", write_block(np.stack([blank]), 4))
    run_alignment(settings(tmp_path / "in", tmp_path / "out"))
    assert pngs(tmp_path / "out") == ["7.png"]
    block = read_image(tmp_path / "out" / "7.png")
    assert block.shape == (224, 560, 3) and len(read_block(block, 112)) == 6
    statuses = [(line["file"], line["index"], line["status"]) for line in report(tmp_path / "out")]
    assert statuses[:3] == [("7.png", 0, "aligned"), ("7.png", 1, "failed"), ("7.png", 2, "aligned")]
    assert statuses[-1] == ("8.png", 0, "failed") and len(statuses) == 8


def test_a_killed_run_resumes(tmp_path, monkeypatch):
    make_folders(tmp_path / "in")
    monkeypatch.setattr(alignment_job, "IMAGES_PER_UNIT", 2)
    run_once = alignment_job.Worker.run

    def run_or_die(self, unit):
        if unit.files[0].startswith("b/2"):
            raise KeyboardInterrupt
        return run_once(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(alignment_job.Worker, "run", run_or_die)
        with pytest.raises(KeyboardInterrupt):
            run_alignment(settings(tmp_path / "in", tmp_path / "out"))
    out = tmp_path / "out"
    part = next(out.glob(alignment_job.PART_PATTERN))
    part.write_text(part.read_text()[:-40])  # the second line was cut short
    (out / "a" / "0.png").unlink()  # and a file was lost
    seen = []
    monkeypatch.setattr(alignment_job.Worker, "run", lambda self, unit: seen.append(unit.files) or run_once(self, unit))
    run_alignment(settings(tmp_path / "in", out))
    assert seen == [["a/0.jpg", "a/1.jpg"], ["b/0.jpg", "b/1.jpg"], ["b/2.jpg", "c/0.jpg"]]
    run_alignment(settings(tmp_path / "in", tmp_path / "whole"))
    assert pngs(out) == pngs(tmp_path / "whole") and not list(out.glob(".*.part"))
    assert (out / "alignment_report.jsonl").read_text() == (tmp_path / "whole" / "alignment_report.jsonl").read_text()
    seen.clear()
    assert run_alignment(settings(tmp_path / "in", out))["aligned"] == 3
    assert seen == []
    with pytest.raises(UserError, match=r"min_face_size: 24.*begun with 40"):
        run_alignment(settings(tmp_path / "in", out, min_face_size=24))


@pytest.mark.slow
def test_worker_processes_give_the_same_report(tmp_path, monkeypatch):
    make_folders(tmp_path / "in")
    monkeypatch.setattr(alignment_job, "IMAGES_PER_UNIT", 3)
    for processes in (1, 2):
        run_alignment(settings(tmp_path / "in", tmp_path / str(processes), processes=processes))
    assert pngs(tmp_path / "1") == pngs(tmp_path / "2")
    for one, two in zip(report(tmp_path / "1"), report(tmp_path / "2"), strict=True):
        assert (one["file"], one["status"]) == (two["file"], two["status"])
        if one["status"] == "aligned":  # threads differ, so sums are rounded differently
            np.testing.assert_allclose(one["landmarks"], two["landmarks"], atol=0.02)


def test_reports_of_ranks_are_joined(tmp_path):
    for rank, files in enumerate((["b", "d"], ["a", "c", "b"])):
        lines = "".join(json.dumps({"file": file, "status": f"by {rank}"}) + "\n" for file in files)
        (tmp_path / f".alignment_report.{rank}.part").write_text(lines)
    records = merge_reports(tmp_path)
    assert [record["file"] for record in records] == ["a", "b", "c", "d"]
    assert [path.name for path in tmp_path.iterdir()] == ["alignment_report.jsonl"]


def test_mistakes_are_named(tmp_path):
    def error(**changes) -> str:
        with pytest.raises(UserError) as caught:
            run_alignment(settings(tmp_path / "in", tmp_path / "out", **changes))
        return str(caught.value)

    assert error().startswith("input_dir: no such folder")
    (tmp_path / "in").mkdir()
    assert error().startswith("input_dir: no images")
    write_image(tmp_path / "in" / "block.png", np.zeros((100, 512, 3), np.uint8))
    assert error(layout="blocks").startswith("tile_size: block.png, 512 x 100 pixels")
    assert error(layout="rows").startswith("layout: rows")
    assert error(just_resize_if_fail=True, discard_identity_if_fail=True).startswith("just_resize_if_fail")
    assert error(discard_identity_if_fail=True).startswith("discard_identity_if_fail")
    assert error(device="gpu").startswith("device: gpu")
    assert error(min_face_size=0).startswith("min_face_size: 0")
    write_image(tmp_path / "in" / "a" / "1.png", np.zeros((9, 9, 3), np.uint8))
    write_image(tmp_path / "in" / "a" / "1.jpg", np.zeros((9, 9, 3), np.uint8))
    assert "a/1.jpg and a/1.png would both become a/1.png" in error()


def test_blocks_drawn_at_another_size_are_cut_by_their_record(tmp_path):
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "00000.png", np.zeros((64, 256, 3), np.uint8))
    options = settings(tmp_path / "in", tmp_path / "out", layout="auto")
    options.check()
    assert find_layout(options, ["00000.png"]) == "folders", "a picture like any other, without the record"
    (tmp_path / "in" / "dataset.json").write_text(
        '{"settings": {"sampling.save_mode": "blocks", "sampling.image_format": "png"}}'
    )
    options.check()
    assert options.tile_size == 64
    assert find_layout(options, ["00000.png"]) == "blocks"


def test_nothing_but_failures_is_a_mistake(tmp_path):
    write_image(tmp_path / "in" / "a" / "0.png", np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(UserError, match="input_dir: no image was aligned of 1 in"):
        run_alignment(settings(tmp_path / "in", tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "alignment_summary.json").read_text())["failed"] == 1
