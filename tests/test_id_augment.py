"""id_augment.py: copies of context faces among the images of a data set."""

import json
import sys

import numpy as np
import pytest

import id_augment
from id_augment import IdAugmentSettings, augment
from recognition.datasets import read_training_set
from utils.images import read_image, write_image


@pytest.fixture
def folders(tmp_path):
    """Faces of four contexts, and a data set of three identities, of which one has no face."""
    rng = np.random.default_rng(0)
    for name in ("00000", "00001", "00003", "00004"):
        write_image(tmp_path / "contexts" / "faces" / f"{name}.png", rng.integers(0, 255, (16, 16, 3), np.uint8))
    for name in ("00000", "00001", "00002"):
        for k in range(3):
            write_image(tmp_path / "data" / name / f"{k}.png", rng.integers(0, 255, (16, 16, 3), np.uint8))
    return tmp_path / "contexts", tmp_path / "data"


def listing(data):
    return {path.relative_to(data).as_posix(): path.read_bytes() for path in sorted(data.rglob("*.png"))}


def options(folders, copies=5):
    return IdAugmentSettings(str(folders[0]), str(folders[1]), copies)


def test_copies_among_the_images(folders, caplog):
    contexts, data = folders
    before = listing(data)
    summary = augment(options(folders))
    after = listing(data)
    new = {name: content for name, content in after.items() if name not in before}
    assert {name: after[name] for name in before} == before
    assert set(new) == {f"{identity}/id_augment_{k}.png" for identity in ("00000", "00001") for k in range(5)}
    assert all(new[name] == (contexts / "faces" / f"{name[:5]}.png").read_bytes() for name in new)
    record = json.loads((data / "id_augment.json").read_text())
    assert record == {
        "contexts_dir": str(contexts),
        "copies": 5,
        "identities": 3,
        "images": 10,
        "missing_faces": ["00002"],
        "unused_faces": 2,
    }
    assert summary.missing_faces == ["00002"]
    assert "1 of 3 identities have no face" in caplog.text and "00002" in caplog.text
    assert np.bincount(read_training_set(data).labels).tolist() == [8, 8, 3]  # what the recogniser trains on


def test_again_is_the_same_as_once(folders):
    _, data = folders
    augment(options(folders))
    once = listing(data)
    times = {path: path.stat().st_mtime_ns for path in data.rglob("*.png")}
    (data / "00000" / "id_augment_1.png").unlink()  # as a kill may leave it
    (data / "00001" / "id_augment_2.png").write_bytes(b"cut short")
    augment(options(folders))
    assert listing(data) == once
    changed = {path.relative_to(data).as_posix() for path, t in times.items() if path.stat().st_mtime_ns != t}
    assert changed == {"00000/id_augment_1.png", "00001/id_augment_2.png"}


def test_the_number_of_copies_can_change(folders):
    _, data = folders
    before = listing(data)
    for copies in (5, 2, 0):
        augment(options(folders, copies))
        assert len(listing(data)) == 9 + 2 * copies
    assert listing(data) == before


def test_a_new_face_replaces_the_old_copies(folders):
    contexts, data = folders
    augment(options(folders, 2))
    face = np.full((16, 16, 3), 7, np.uint8)
    write_image(contexts / "faces" / "00000.png", face)
    augment(options(folders, 2))
    assert (read_image(data / "00000" / "id_augment_1.png") == face).all()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["contexts_dir=nowhere"], "contexts_dir: no such folder: nowhere/faces"),
        (["data_dir=nowhere"], "data_dir: no such folder: nowhere"),
        (["data_dir={contexts}/faces"], "holds no identity folders with images"),
        (["data_dir={contexts}"], "none of its 4 faces is named like one of the 1 identities"),
        (["copies=-1"], "copies: -1; give 0"),
        (["copies=many"], "copies: "),
        (["copy=2"], "did you mean copies?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(folders, tmp_path, monkeypatch, capsys, mistake, message):
    contexts, data = folders
    words = [f"contexts_dir={contexts}", f"data_dir={data}", f"output_dir={tmp_path / 'log'}"]
    words = [word for word in words if word.split("=")[0] not in {w.split("=")[0] for w in mistake}]
    monkeypatch.setattr(sys, "argv", ["id_augment.py", *words, *(word.format(contexts=contexts) for word in mistake)])
    with pytest.raises(SystemExit) as end:
        id_augment.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert len(listing(data)) == 9


def test_the_command(folders, tmp_path, monkeypatch):
    words = [f"contexts_dir={folders[0]}", f"data_dir={folders[1]}", f"output_dir={tmp_path / 'log'}"]
    monkeypatch.setattr(sys, "argv", ["id_augment.py", *words])
    id_augment.main()
    assert len(listing(folders[1])) == 19 and (tmp_path / "log" / "log.txt").is_file()
