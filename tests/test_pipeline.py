"""The demo: all scripts in a row at a tiny size; stages skipped, resumed, started over; people and pairs."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from demo import people
from demo.collect import write_report
from demo.pipeline import Pipeline
from utils import stages
from utils.config import CONFIG_DIR, UserError
from utils.images import write_image
from utils.stages import Stages, overrides, to_text

TINY = {
    "processes": 1,
    "people": {"train": 8, "images_per_person": 4, "test": 8, "images_per_test_person": 4, "image_size": 96},
    "pairs": {"genuine": 16, "folds": 4},
    "identities": {"count": 4, "images": 2, "max_similarity": 0.99},
    "render": {"processes": 1},
    "align": {"processes": 1, "just_resize_if_fail": True},  # a model after six steps draws no faces
    "recogniser": {
        "training": {"epochs": 2, "batch_size": 8, "lr_schedule": {"milestones": [1]}},
        "backbone.width": 0.125,
    },
    "autoencoder": {
        "autoencoder.n_embed": 32,
        "dataset": {"image_size": 32},
        "training": {"steps": 8, "batch_size": 4, "warmup_steps": 2, "quantization_start": 4},
    },
    "diffusion": {
        "constants": {"image_size": 32},
        "training": {
            "steps": 6,
            "batch_size": 4,
            "steps_between_logging": 2,
            "steps_between_sampling": None,
            "lr_scheduler": {"warmup_steps": 1},
        },
    },
    "sampling": {"sampling": {"batch_size": 8, "image_size": 128}},
    "two_stage": {"sampler.num_steps": 10, "sampling": {"calibration": {"n_contexts": 2}}},
    "one_stage": {"sampler.num_steps": 10},
}


def demo_config(**changes):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("demo_config")
    for section, values in changes.items():
        merge(cfg, section, values)
    return cfg


def merge(node, key, value):
    """Like OmegaConf.update, but keys that hold dots are plain keys."""
    if isinstance(value, dict) and isinstance(node.get(key), type(node)):
        for name, inner in value.items():
            merge(node[key], name, inner)
    else:
        OmegaConf.set_struct(node, False)
        node[key] = value


def start_here(arguments, threads):
    """Run a script in this process, which spares its imports; its exit status."""
    before = sys.argv
    GlobalHydra.instance().clear()
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            runpy.run_path(str(stages.ROOT / arguments[0]), run_name="__main__")
    except SystemExit as error:
        return error.code or 0
    finally:
        sys.argv = before
    return 0


@pytest.mark.slow
def test_from_rendered_faces_to_accuracy(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "start", start_here)
    monkeypatch.chdir(stages.ROOT)
    cfg = demo_config(**TINY)
    pipeline = Pipeline(cfg, tmp_path / "demo")
    pipeline.run()
    table = write_report(pipeline)

    metrics = json.loads((tmp_path / "demo/metrics.json").read_text())
    assert list(metrics["accuracy"]) == ["rendered", "two_stage", "one_stage", "untrained"]
    for row in metrics["accuracy"].values():
        assert (row["genuine"], row["impostor"], row["people"]) == (16, 16, 8)
        assert 0.0 <= row["accuracy"] <= 1.0 and row["accuracy"] * 32 == pytest.approx(round(row["accuracy"] * 32))
    assert metrics["counts"]["rendered"]["identities"] == 8
    assert metrics["mtcnn"]["rendered, training"]["tried"] == 32
    assert metrics["mtcnn"]["rendered, training"]["rate"] > 0.8
    assert metrics["switch"]["samples"] == 8
    assert metrics["seconds"]["total"] >= metrics["seconds"]["diffusion"] > 0
    assert table.count("\n") == 4 and "two_stage" in table
    report = (tmp_path / "demo/report.html").read_text()
    assert "python main.py" in report and "Two-stage sampling" in report

    # Nobody is in two places
    names = [{p.name for p in (tmp_path / "demo/faces" / part).iterdir() if p.is_dir()} for part in ("train", "test")]
    assert len(names[0]) == len(names[1]) == 8 and not names[0] & names[1]

    # The second run has nothing to do
    again = Pipeline(cfg, tmp_path / "demo")
    again.run()
    assert again.stages.ran == 0 and len(again.stages.records) == len(pipeline.stages.records)


def note(log, name):
    def work(run):
        log.append(name)
        return f"{name} is done"

    return work


def run_two(folder, log, first="a", second="b", broken=False):
    line = Stages(folder, 1, "`make demo`")

    def fail(run):
        (folder / "two").mkdir(exist_ok=True)
        (folder / "two/part").touch()
        raise UserError("no")

    (folder / "one").mkdir(parents=True, exist_ok=True)
    line.run("one", "One", first, ["one"], note(log, "one"))
    line.run("two", "Two", second, ["two"], fail if broken else note(log, "two"))
    return line


def test_stages_run_once_and_start_over_with_other_settings(tmp_path):
    log = []
    (tmp_path / "two").mkdir()
    run_two(tmp_path, log)
    assert log == ["one", "two"]
    (tmp_path / "one").mkdir(exist_ok=True)
    (tmp_path / "two").mkdir(exist_ok=True)
    assert run_two(tmp_path, log).ran == 0
    assert run_two(tmp_path, log, second="other").ran == 1
    assert log == ["one", "two", "two"] and not (tmp_path / "two").exists()
    # What comes before decides about what comes after
    assert run_two(tmp_path, log, first="other", second="other").ran == 2


def test_a_stopped_stage_keeps_what_it_has(tmp_path):
    log = []
    with pytest.raises(UserError):
        run_two(tmp_path, log, broken=True)
    assert (tmp_path / "two/part").exists()
    line = run_two(tmp_path, log)
    assert (tmp_path / "two/part").exists()
    assert line.records[1].attempts == 2 and line.records[1].outcome == "two is done"


def test_a_failing_script_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "start", lambda arguments, threads: 2)
    line = Stages(tmp_path, 1, "`make demo`")
    told = r"stage 'x': its command ended with status 2: python main\.py a=1 .* the same `make demo`"
    with pytest.raises(UserError, match=told):
        line.run("x", "X", None, [], lambda run: run.script("main.py", {"a": 1}))


def test_overrides():
    tree = {"backbone": "ir_18", "backbone.width": 0.5, "training": {"epochs": 3, "milestones": [1, 2]}, "x": None}
    assert overrides(tree) == [
        "backbone=ir_18",
        "backbone.width=0.5",
        "training.epochs=3",
        "training.milestones=[1,2]",
        "x=null",
    ]
    assert to_text(True) == "true" and to_text("null") == "'null'"
    assert to_text("my faces/a") == "my faces/a" and to_text("it's") == "'it\\'s'" and to_text("a=b,c") == "'a=b,c'"


def class_folders(root: Path, counts: list[int]) -> Path:
    rng = np.random.default_rng(0)
    for number, count in enumerate(counts):
        for k in range(count):
            write_image(root / f"person {number}" / f"{k}.jpg", rng.integers(0, 255, (20, 16, 3), dtype=np.uint8))
    return root


def test_user_folders(tmp_path):
    with pytest.raises(UserError, match="data: no such folder"):
        Pipeline(demo_config(data=str(tmp_path / "nowhere")), tmp_path)
    few = class_folders(tmp_path / "few", [4] * 3 + [1])
    with pytest.raises(UserError, match=r"4 identity folders, 3 of them with 4 or more images; at least 30 identities"):
        people.read_class_folders(few)
    write_image(tmp_path / "flat/1.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="1 images without identity folders"):
        people.read_class_folders(tmp_path / "flat")

    found = people.read_class_folders(class_folders(tmp_path / "data", [5] * 33 + [2]))
    assert len(found) == 33
    train, test = people.split_people(sorted(found), 100, 20, seed=1)
    assert (len(train), len(test)) == (22, 11) and not set(train) & set(test)
    assert people.split_people(sorted(found), 8, 9, seed=1)[1] == people.split_people(sorted(found), 12, 9, seed=1)[1]
    assert people.import_people(tmp_path / "data", found, test, tmp_path / "copy", most=3) == 33
    assert json.loads((tmp_path / "copy/people.json").read_text())["00000"] == test[0]
    numbers = people.name_as_lfw(tmp_path / "copy", tmp_path / "lfw")
    assert numbers["00010"] == [1, 2, 3] and (tmp_path / "lfw/00010/00010_0003.png").is_file()


def test_pairs(tmp_path):
    images = {f"{p:03d}": list(range(1, 6)) for p in range(20)}
    folds = people.draw_pairs(images, folds=10, genuine=100, seed=0)
    assert len(folds) == 10
    seen: list[set] = []
    for genuine, impostor in folds:
        assert len(genuine) == len(impostor) == 10
        assert len(set(genuine)) == 10 and all(a < b for _, a, b in genuine)
        assert all(p != q for p, _, q, _ in impostor)
        seen.append({p for p, *_ in genuine} | {p for pair in impostor for p in (pair[0], pair[2])})
    assert all(not a & b for i, a in enumerate(seen) for b in seen[:i])
    people.write_pairs(tmp_path / "pairs.txt", folds)
    lines = (tmp_path / "pairs.txt").read_text().splitlines()
    assert lines[0] == "10\t10" and len(lines) == 201 and len(lines[1].split("\t")) == 3
    assert folds == people.draw_pairs(images, folds=10, genuine=100, seed=0)
    with pytest.raises(UserError, match="3 test people"):
        people.draw_pairs({"a": [1, 2], "b": [1, 2], "c": [1, 2]}, folds=10, genuine=10, seed=0)
