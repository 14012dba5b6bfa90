"""`python -m recognition.test` as users run it: several sets and models, resuming, comparing, and mistakes."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import recognition.test as script
from recognition import embedding_store, measurement
from recognition.backbones import build_backbone, save_backbone
from recognition.embedding import embed_images
from recognition.measurement import Computing, Model, Sets, fingerprint, measure
from recognition.validation import ValidationSettings, benchmark_validation
from recognition.verification import evaluate_pairs
from tests.test_benchmark_layouts import text
from utils.config import UserError
from utils.data.formats.benchmarks import FIVE, RFW_GROUPS
from utils.data.formats.pairs import read_bin, read_pairs, write_bin
from utils.images import read_image, to_float, write_image

SIZE = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """8 people x 4 images as LFW has them, 40 pairs of them as a list and as each of the five `.bin`, a network."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for k in range(8):
        pattern = rng.integers(0, 255, (4, 4, 3))
        for i in range(4):
            tiles = np.clip(pattern + rng.normal(0, 40, pattern.shape), 0, 255).astype(np.uint8)
            write_image(root / f"faces/p{k}/p{k}_{i + 1:04d}.png", np.kron(tiles, np.ones((4, 4, 1), np.uint8)))
    lines = []
    for fold in range(10):
        k = fold % 8
        lines += [f"p{k}\t{1 + fold // 8}\t3", f"p{k}\t2\t4"]
        lines += [f"p{k}\t1\tp{(k + 1) % 8}\t{1 + fold // 8}", f"p{k}\t2\tp{(k + 3) % 8}\t3"]
    text(root / "pairs.txt", "10\t2", *lines)
    pairs = read_pairs(root / "pairs.txt", root / "faces")
    for name in FIVE:
        write_bin(pairs, (root / "benchmarks").joinpath(f"{name}.bin"))
    torch.manual_seed(0)
    backbone = build_backbone("ir_18", input_size=SIZE, num_features=8, width=0.125)
    save_backbone(backbone, root / "net" / "backbone.safetensors")
    return root


def options(world: Path, output: Path, **kwargs) -> script.TestSettings:
    values = {"checkpoint": str(world / "net/backbone.safetensors"), "device": "cpu", "batch_size": 16, **kwargs}
    return script.TestSettings(str(output), **values)


def computing(folder: Path, keep: bool = True) -> Computing:
    return Computing(folder, 16, "fp32", torch.device("cpu"), keep)


def run(settings: script.TestSettings, folder: Path, keep: bool = True) -> tuple[list[dict], list[dict]]:
    sets = script.open_all(settings)
    found = [measure(model, sets, computing(folder, keep)) for model in script.list_models(settings, None, [])]
    return [report for report, _ in found], [curves for _, curves in found]


def test_a_bin_gives_the_numbers_of_its_folder(world: Path, tmp_path: Path) -> None:
    listed = options(world, tmp_path, dataset=script.DatasetSettings(str(world / "faces")))
    listed.pairs_file = str(world / "pairs.txt")
    packed = options(world, tmp_path, bin_file=str(world / "benchmarks/lfw.bin"))
    (one,), _ = run(listed, tmp_path / "a")
    (other,), curves = run(packed, tmp_path / "b")
    one, other = one["sets"]["pairs"], other["sets"]["lfw"]
    assert (one["num_images"], other["num_images"]) == (32, 80)
    for key in ("fold_accuracy", "threshold", "eer", "tar_at_far", "num_genuine", "num_impostor"):
        assert one[key] == other[key], key
    # and they are those of the functions below: embeddings, then the protocol
    pairs = read_bin(world / "benchmarks/lfw.bin")
    network = script.load_model(packed.checkpoint, None, 0)
    embeddings = embed_images(network, [lambda i=i: pairs.pixels(i) for i in range(80)])
    expected = evaluate_pairs(embeddings, pairs.issame)
    assert other["fold_accuracy"] == expected.fold_accuracy.tolist()
    assert other["tar_at_far"] == {"0.01": None, "0.001": None, "0.0001": None}  # 20 impostor pairs
    assert curves[0]["lfw"]["far"][0] == 0 and curves[0]["lfw"]["tar"][-1] == 1


def test_five_benchmarks_and_their_mean(world: Path, tmp_path: Path) -> None:
    (report,), curves = run(options(world, tmp_path, benchmarks_dir=str(world / "benchmarks")), tmp_path)
    assert list(report["sets"]) == list(FIVE) == list(curves[0])
    assert report["mean"]["is_mean_of_five"]
    assert report["mean"]["accuracy"] == pytest.approx(np.mean([s["accuracy"] for s in report["sets"].values()]))


def test_validation_gives_the_accuracies_of_the_test(world: Path, tmp_path: Path) -> None:
    (report,), _ = run(options(world, tmp_path, benchmarks_dir=str(world / "benchmarks")), tmp_path)
    validate = benchmark_validation(ValidationSettings(benchmarks_dir=str(world / "benchmarks"), batch_size=16))
    network = script.load_model(str(world / "net/backbone.safetensors"), None, 0).train()
    found = validate(network)
    assert found == {name: summary["accuracy"] for name, summary in report["sets"].items()}
    assert network.training
    listed = {"pairs_file": str(world / "pairs.txt"), "root": str(world / "faces")}
    assert found["lfw"] == benchmark_validation(ValidationSettings(**listed))(network)["pairs"]
    with pytest.raises(UserError, match="validation: no pairs are named"):
        benchmark_validation(ValidationSettings())
    with pytest.raises(UserError, match=r"validation\.benchmarks_dir: no such folder"):
        benchmark_validation(ValidationSettings(benchmarks_dir=str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"validation\.batch_size: 0"):
        ValidationSettings(batch_size=0)


def test_a_killed_test_goes_on(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(embedding_store, "PART_SIZE", 24)
    settings = options(world, tmp_path, bin_files=[str(world / f"benchmarks/{n}.bin") for n in ("lfw", "calfw")])
    (expected,), _ = run(settings, tmp_path / "whole")
    real, calls = measurement.embed_images, []

    def dies(*args, **kwargs):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(len(args[1]))
        return real(*args, **kwargs)

    monkeypatch.setattr(measurement, "embed_images", dies)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "parts")
    assert calls == [24, 24, 24, 8, 24]  # lfw is whole, of calfw there is the first part
    calls.clear()
    (report,), _ = run(settings, tmp_path / "parts")
    assert calls == [24, 24, 8] and report == expected
    calls.clear()
    run(settings, tmp_path / "parts")
    assert calls == []
    settings.flip = False  # other embeddings: none of those are used
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "parts")
    assert len(calls) == 5
    monkeypatch.undo()
    run(settings, tmp_path / "parts", keep=False)
    assert not list((tmp_path / "parts").rglob("*.npy"))


def test_embeddings_of_changed_images_are_made_again(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "faces", tmp_path / "faces")
    settings = options(world, tmp_path, dataset=script.DatasetSettings(str(tmp_path / "faces")))
    settings.pairs_file = str(world / "pairs.txt")
    run(settings, tmp_path / "e")
    stored = next((tmp_path / "e").rglob("*.npy"))
    before = np.load(stored)
    write_image(tmp_path / "faces/p0/p0_0001.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    run(settings, tmp_path / "e")
    changed = np.abs(np.load(stored) - before).max(axis=1) > 1e-6
    assert changed.tolist() == [True] + [False] * 31


def test_bgr(world: Path, tmp_path: Path) -> None:
    file = str(world / "net/backbone.safetensors")
    rgb, bgr = (script.load_model(file, None, 0, order) for order in (None, "BGR"))
    image = read_image(world / "faces/p0/p0_0001.png")[None]
    np.testing.assert_allclose(embed_images(bgr, image[..., ::-1].copy()), embed_images(rgb, image), atol=1e-6)
    assert np.abs(embed_images(bgr, image) - embed_images(rgb, image)).max() > 1e-3
    assert fingerprint(rgb) != fingerprint(bgr)
    save_backbone(rgb, tmp_path / "bgr.safetensors", channel_order="BGR")
    told = script.load_model(str(tmp_path / "bgr.safetensors"), None, 0)
    np.testing.assert_array_equal(embed_images(told, image), embed_images(bgr, image))
    with pytest.raises(UserError, match=r"channel_order: RGB, but .* says BGR"):
        script.load_model(str(tmp_path / "bgr.safetensors"), None, 0, "RGB")
    with pytest.raises(UserError, match="channel_order: 'GBR'"):
        options(world, tmp_path, channel_order="GBR")


def test_rfw_by_group_and_ijb_by_templates(world: Path, tmp_path: Path) -> None:
    for group in RFW_GROUPS:
        shutil.copytree(world / "faces", tmp_path / "rfw" / group)
        lines = (world / "pairs.txt").read_text().splitlines()[1:]
        text(tmp_path / "rfw" / group / f"{group}_pairs.txt", *lines)
    crops, meta = tmp_path / "ijb/loose_crop", tmp_path / "ijb/meta"
    landmarks = "38.3 51.7 73.5 51.5 56 71.7 41.5 92.4 70.7 92.2"
    rng = np.random.default_rng(0)
    for k in range(12):
        write_image(crops / f"{k}.png", rng.integers(0, 255, (112, 112, 3), dtype=np.uint8))
    text(meta / "ijbb_name_5pts_score.txt", *(f"{k}.png {landmarks} 0.9" for k in range(12)))
    text(meta / "ijbb_face_tid_mid.txt", *(f"{k}.png {k // 2} {k}" for k in range(12)))
    text(
        meta / "ijbb_template_pair_label.txt",
        *(f"{a} {b} {int(b == a + 1)}" for a in range(5) for b in range(a + 1, 6)),
    )
    settings = options(world, tmp_path, rfw_dir=str(tmp_path / "rfw"), ijb_dir=str(tmp_path / "ijb"))
    (report,), curves = run(settings, tmp_path / "e")
    accuracies = [found["accuracy"] for found in report["sets"].values()]
    assert len(set(accuracies)) == 1 and len(accuracies) == 4
    assert report["rfw"] == {"mean": pytest.approx(accuracies[0]), "std": pytest.approx(0, abs=1e-12), **report["rfw"]}
    assert report["ijb"]["ijbb"]["switches"] == "N1D1F1" and report["ijb"]["ijbb"]["num_genuine"] == 5
    assert list(curves[0]) == [*(f"RFW {group}" for group in RFW_GROUPS), "ijbb"]
    # other weights of the same embeddings need no network
    settings.ijb.use_norm_score = False
    sets = script.open_all(settings)
    sets = Sets(templates=sets.templates, ijb=settings.ijb)
    model = script.list_models(settings, None, [])[0]
    stored = next((tmp_path / "e").rglob("ijbb/*.npy"))
    time = stored.stat().st_mtime_ns
    assert measure(model, sets, computing(tmp_path / "e"))[0]["ijb"]["ijbb"]["switches"] == "N0D1F1"
    assert stored.stat().st_mtime_ns == time


def test_rows_and_their_names(world: Path, tmp_path: Path, compose) -> None:
    file = str(world / "net/backbone.safetensors")
    node = compose(
        "recognition_test_config", "backbone=ir_18", "backbone.width=0.125", "backbone.input_size=16"
    ).backbone
    rows = script.list_models(options(world, tmp_path, checkpoint=[file, None]), node, [])
    assert [model.name for model in rows] == ["net", "untrained"]
    rows = script.list_models(options(world, tmp_path, checkpoint=[file, file], name=["a", "b"]), None, [])
    assert [model.name for model in rows] == ["a", "b"]
    only = options(world, tmp_path, checkpoint=None, baseline="eigenfaces", baseline_root=str(world / "faces"))
    only.eigenfaces.components = 5
    rows = script.list_models(only, None, [])
    described = "(grey, 5 components)"
    assert [model.name for model in rows] == [f"eigenfaces, plain {described}", f"eigenfaces, whitened {described}"]
    assert all(isinstance(model, Model) and not model.flip for model in rows)
    for kwargs, taken, message in (
        ({"checkpoint": [file, file]}, [], "two rows are called 'net'"),
        ({}, ["net"], "two rows are called 'net'"),
        ({"name": ["a", "b"]}, [], "1 names are wanted"),
        ({"checkpoint": []}, [], "checkpoint: the list is empty"),
        ({"checkpoint": [[file]]}, [], r"checkpoint: \['.*'\]; the path of a file is wanted"),
        ({"checkpoint": {"a": file}}, [], r"checkpoint: \{'a': .*; the path of a file is wanted"),
        ({"checkpoint": [file, file], "name": [1, 2]}, ["1"], "two rows are called '1'"),
        ({"name": {"a": "b"}}, [], r"name: \{'a': 'b'\}; a text, or a list of texts, is wanted"),
        ({"name": [["a"]]}, [], r"name: \[\['a'\]\]; a text, or a list of texts, is wanted"),
    ):
        with pytest.raises(UserError, match=message):
            script.list_models(options(world, tmp_path, **kwargs), None, taken)
    for kwargs, message in (
        ({"baseline": "pixels", "baseline_root": "x"}, "baseline: 'pixels'"),
        ({"baseline": "eigenfaces"}, "go together"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"precision": "fp8"}, "precision: 'fp8'"),
    ):
        with pytest.raises(UserError, match=message):
            options(world, tmp_path, **kwargs)


def test_results_are_not_overwritten_by_others(world: Path, tmp_path: Path) -> None:
    settings = options(world, tmp_path, bin_file="lfw.bin")
    (tmp_path / "results.json").write_text(json.dumps({"inputs": script.inputs_of(settings)}))
    script.check_output(str(tmp_path), script.inputs_of(settings))
    settings.rfw_dir = "rfw"  # one more set
    script.check_output(str(tmp_path), script.inputs_of(settings))
    fewer = ("dataset.skip_missing", True)
    for key, value in (("bin_file", "other.bin"), ("checkpoint", None), ("flip", False), fewer):
        changed = {**script.inputs_of(settings), key: value}
        with pytest.raises(UserError, match=rf"{key}: .*holds the results of"):
            script.check_output(str(tmp_path), changed)
    (tmp_path / "results.json").write_text("[1")
    with pytest.raises(UserError, match=r"results\.json: damaged, not JSON .*; remove it, or give another output_dir"):
        script.check_output(str(tmp_path), script.inputs_of(settings))


def test_one_network_compared_with_earlier_rows(world: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["recognition.test", "device=cpu", *arguments])
        script.main()
        return capsys.readouterr().out

    file, bin_file = world / "net/backbone.safetensors", world / "benchmarks/lfw.bin"
    baseline = [f"baseline_root={world / 'faces'}", "eigenfaces.components=5", "eigenfaces.size=16"]
    before = command(
        *("checkpoint=null", "baseline=eigenfaces", *baseline),
        *(f"bin_file={bin_file}", f"output_dir={tmp_path / 'before'}", "keep_embeddings=false"),
    )
    assert before == (tmp_path / "before/results.md").read_text()
    shown = command(
        *(f"checkpoint={file}", f"bin_file={bin_file}", f"compare=[{tmp_path / 'before'}]"),
        f"output_dir={tmp_path / 'now'}",
    )
    rows = [line.split(" | ")[0] for line in shown.splitlines()[2:5]]
    described = "(grey, 5 components)"
    assert rows == ["| net", f"| eigenfaces, plain {described}", f"| eigenfaces, whitened {described}"]
    assert shown.splitlines()[3:5] == before.splitlines()[2:4]
    report = json.loads((tmp_path / "now/results.json").read_text())
    assert (report["name"], report["num_genuine"], report["inputs"]["bin_file"]) == ("net", 20, str(bin_file))
    assert report["accuracy"] == report["sets"]["lfw"]["accuracy"]
    assert list(json.loads((tmp_path / "now/roc.json").read_text())) == ["net"]
    (tmp_path / "now/results.json").write_text('{"accuracy": 1}')
    with pytest.raises(SystemExit) as status:
        command(
            *(f"checkpoint={file}", f"bin_file={bin_file}", f"compare=[{tmp_path / 'now'}]"),
            f"output_dir={tmp_path / 'third'}",
        )
    assert status.value.code == 2
    assert "was not written by this version of recognition.test" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(run_script, world: Path, tmp_path: Path) -> None:
    file = world / "net/backbone.safetensors"
    done = run_script(
        "recognition.test",
        *(f"checkpoint={file}", f"benchmarks_dir={world / 'benchmarks'}", f"output_dir={tmp_path / 'all'}"),
        *("device=cpu", "batch_size=16"),
        processes=2,
    )
    assert done.stdout == (tmp_path / "all/results.md").read_text()
    results = json.loads((tmp_path / "all/results.json").read_text())
    (expected,), _ = run(options(world, tmp_path, benchmarks_dir=str(world / "benchmarks")), tmp_path / "alone")
    assert {key: results[key] for key in expected} == expected
    assert results["published"][0]["name"] == "CASIA-WebFace (real)"
    assert "\\begin{tabular}" in (tmp_path / "all/results.tex").read_text()
    assert (tmp_path / "all/roc.png").stat().st_size > 1000


def test_embeddings_that_keep_their_length(world: Path) -> None:
    network = script.load_model(str(world / "net/backbone.safetensors"), None, 0)
    image = read_image(world / "faces/p0/p0_0001.png")[None]
    with torch.no_grad():
        expected = (network(to_float(image)) + network(to_float(image[:, :, ::-1].copy()))).numpy()
    kept = embed_images(network, image, normalise=False)
    np.testing.assert_allclose(kept, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(embed_images(network, image), expected / np.linalg.norm(expected), atol=1e-5)
    rough = embed_images(network, image, normalise=False, precision="bf16")
    assert 1e-6 < np.abs(rough - kept).max() < 0.1 * np.abs(kept).max() and rough.dtype == np.float32
