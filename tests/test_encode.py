"""encode.py: what it reads and writes, resuming, two processes, and what users get wrong."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import encode
from recognition.backbones import build_backbone, save_backbone
from utils import embedding_job
from utils.config import UserError
from utils.contexts import read_contexts, read_embeddings
from utils.embedders import Embedder, backbone_embedder
from utils.embedding_job import EncodeSettings, run
from utils.images import list_images, read_image, write_block, write_image

NAMES = ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "c/d/0.png"]


def save_network(path: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    save_backbone(build_backbone("iresnet18", input_size=32, num_features=16, width=0.125), path)


@pytest.fixture
def options(tmp_path) -> EncodeSettings:
    save_network(tmp_path / "b.safetensors")
    generator = np.random.default_rng(0)
    for name in sorted(NAMES, reverse=True):
        write_image(tmp_path / "in" / name, generator.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    folders = (str(tmp_path / "b.safetensors"), str(tmp_path / "in"), str(tmp_path / "out"))
    return EncodeSettings(*folders, batch_size=2, device="cpu")


@pytest.fixture
def embedder(options) -> Embedder:
    return backbone_embedder(options.checkpoint)


def test_embeddings_and_contexts_are_written(options, embedder, monkeypatch):
    monkeypatch.setattr(embedding_job, "PART_SIZE", 2)
    run(options, embedder)
    out = Path(options.output_dir)
    names, embeddings = read_embeddings(out / "embeddings.npy")
    assert names == NAMES
    np.testing.assert_allclose(embeddings, embedder.embed(names, root=options.input_dir), atol=1e-5)
    identities, contexts = read_contexts(out / "contexts.npy")
    assert identities == ["a", "b", "c/d"]
    mean = embeddings[2] + embeddings[3]
    np.testing.assert_allclose(contexts[1], mean / np.linalg.norm(mean), atol=1e-5)
    assert pickle.loads((out / "image_names.pkl").read_bytes()) == NAMES
    assert not (out / ".parts").exists()


def test_each_form_is_read_back(options, embedder, tmp_path):
    found = {}
    for form in ("uiface", "idiff", "files"):
        out = tmp_path / form
        run(replace(options, format=form, output_dir=str(out)), embedder)
        found[form] = read_embeddings(out if form == "files" else out / "embeddings.npy")
    assert found["uiface"][0] == found["idiff"][0] == [f"{name}.png" for name in found["files"][0]]
    for form in ("idiff", "files"):
        np.testing.assert_allclose(found[form][1], found["uiface"][1], atol=1e-6)
    for part in (0, 1):
        uiface, idiff = (read_contexts(tmp_path / form / "contexts.npy")[part] for form in ("uiface", "idiff"))
        assert np.array_equal(uiface, idiff)
    assert sorted(torch.load(tmp_path / "idiff/embeddings.npy", weights_only=False)) == NAMES  # a torch archive
    assert np.load(tmp_path / "files/c/d/0.npy").shape == (16,)


def test_a_name_list_gives_images_and_order(options, embedder, tmp_path):
    listed = [NAMES[3], NAMES[0]]
    (tmp_path / "image_names.pkl").write_bytes(pickle.dumps([listed[0].replace("/", "\\"), f"./{listed[1]}"], 2))
    run(replace(options, images_name_file_path=str(tmp_path / "image_names.pkl")), embedder)
    names, rows = read_embeddings(Path(options.output_dir) / "embeddings.npy")
    assert names == listed
    np.testing.assert_allclose(rows, embedder.embed(listed, root=options.input_dir), atol=1e-6)


def test_blocks_are_read_tile_by_tile(options, embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_job, "PART_SIZE", 8)
    tiles = np.random.default_rng(1).integers(1, 256, (14, 32, 32, 3), dtype=np.uint8)
    for name, part in (("q", tiles[:5]), ("p", tiles[5:11]), ("r", tiles[11:])):  # 4 columns: a last row has filler
        write_image(tmp_path / "blocks" / f"{name}.png", write_block(part, 4))
    run(replace(options, input_dir=str(tmp_path / "blocks"), tile_size=32), embedder)
    names, rows = read_embeddings(Path(options.output_dir) / "embeddings.npy")
    assert names == [f"{name}/{k}" for name, count in (("p", 6), ("q", 5), ("r", 3)) for k in range(count)]
    expected = embedder.embed(np.concatenate([tiles[5:11], tiles[:5], tiles[11:]]))
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert read_contexts(Path(options.output_dir) / "contexts.npy")[0] == ["p", "q", "r"]


def test_people_to_test_on_are_left_out(options, embedder, tmp_path, caplog):
    caplog.set_level("INFO")
    people = tmp_path / "people.txt"
    people.write_text("b\nnobody\n")
    run(replace(options, exclude_identities_file=str(people)), embedder)
    assert not any(name.startswith("b/") for name in read_embeddings(Path(options.output_dir) / "embeddings.npy")[0])
    assert "b" not in read_contexts(Path(options.output_dir) / "contexts.npy")[0]
    assert "exclude_identities_file: 1 of the 2 identities" in caplog.text
    people.write_text("nobody\n")
    with pytest.raises(UserError, match=r"exclude_identities_file: none of the 1 lines of .* names an identity"):
        run(replace(options, exclude_identities_file=str(people), output_dir=str(tmp_path / "all")), embedder)
    assert not (tmp_path / "all").exists()


def test_width_and_uncropped_images_are_told(options, embedder, caplog):
    caplog.set_level("INFO")
    write_image(Path(options.input_dir) / "a" / "0.png", np.zeros((40, 60, 3), np.uint8))
    run(options, embedder)
    assert "a/0.png is 60 x 40 pixels, not a square crop" in caplog.text
    assert "model.context_input_channels=16" in caplog.text


def test_a_killed_run_resumes(options, embedder, monkeypatch):
    monkeypatch.setattr(embedding_job, "PART_SIZE", 2)
    embedded, embed = [], embedder.embed

    def embed_or_die(images, **kwargs):
        embedded.append(images)
        if len(embedded) == 2:
            raise KeyboardInterrupt
        return embed(images, **kwargs)

    embedder.embed = embed_or_die
    with pytest.raises(KeyboardInterrupt):
        run(options, embedder)
    run(options, embedder)
    assert embedded == [NAMES[:2], NAMES[2:4], NAMES[2:4], NAMES[4:]]
    run(options, embedder)
    assert len(embedded) == 4, "nothing is left to do"
    # a new image starts anew
    write_image(Path(options.input_dir) / "e" / "0.png", np.full((40, 40, 3), 9, np.uint8))
    run(options, embedder)
    assert len(embedded) == 7
    description = json.loads((Path(options.output_dir) / "encoder.json").read_text())
    assert description["files"] == 6


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(options, embedder, run_script, monkeypatch):
    for k in range(300):  # two parts
        write_image(Path(options.input_dir) / "many" / f"{k}.png", np.full((8, 8, 3), k % 256, np.uint8))
    words = [f"{key}={getattr(options, key)}" for key in ("checkpoint", "input_dir", "device")]
    run_script("encode.py", *words, f"output_dir={options.output_dir}", processes=2)
    run(replace(options, batch_size=64, output_dir=f"{options.output_dir}1"), embedder)
    (names, rows), (names_1, rows_1) = (
        read_embeddings(Path(folder) / "embeddings.npy") for folder in (options.output_dir, f"{options.output_dir}1")
    )
    assert names == names_1 == list_images(options.input_dir) and len(names) == 305
    np.testing.assert_allclose(rows, rows_1, rtol=0, atol=1e-6)


def test_embeddings_made_otherwise_are_not_overwritten(options, embedder):
    run(options, embedder)
    before = (Path(options.output_dir) / "embeddings.npy").read_bytes()
    for change, message in (
        ({"flip": False}, r"flip: False, but the embeddings in .* were made with True; give another"),
        ({"format": "idiff"}, r"format: idiff, but the embeddings in .* were made with uiface; give another"),
    ):
        with pytest.raises(UserError, match=message):
            run(replace(options, **change), embedder)
    save_network(Path(options.checkpoint), seed=1)
    with pytest.raises(UserError, match=r"checkpoint: .* of other content; give another output_dir"):
        run(options, backbone_embedder(options.checkpoint))
    assert (Path(options.output_dir) / "embeddings.npy").read_bytes() == before


def test_mistakes_are_named(options, embedder, tmp_path):
    (tmp_path / "empty").mkdir()
    lists = {"absent": "z.png", "outside": "../b.png", "twice": f"{NAMES[0]}\n{NAMES[0]}", "none": ""}
    for name, text in lists.items():
        (tmp_path / f"{name}.txt").write_text(text)
    key = "images_name_file_path"
    for changes, message in (
        ({"input_dir": str(tmp_path / "absent")}, "input_dir: no such folder"),
        ({"input_dir": str(tmp_path / "empty")}, "input_dir: no images"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"format": "csv"}, "format: 'csv' is not one of uiface, idiff, files"),
        ({"layout": "block"}, "layout: 'block' is not one of auto, folders, blocks"),
        ({"layout": "blocks"}, "tile_size: not every image in .* is a block of tiles of 128"),
        ({key: str(tmp_path / "absent.txt")}, f"{key}: no image z.png in .* \\(1 of 1 are missing\\)"),
        ({key: str(tmp_path / "outside.txt")}, f"{key}: '../b.png' in .* leads outside input_dir"),
        ({key: str(tmp_path / "twice.txt")}, f"{key}: .* names 1 images twice"),
        ({key: str(tmp_path / "none.txt")}, f"{key}: .* names no images"),
        ({key: "a.txt", "layout": "blocks"}, f"{key}: names images, and layout=blocks reads identity blocks"),
    ):
        with pytest.raises(UserError, match=message):
            run(replace(options, **changes), embedder)
    write_image(tmp_path / "in" / "a" / "0.jpg", read_image(tmp_path / "in" / "a" / "0.png"))
    with pytest.raises(UserError, match=r"format: files would write one file for a/0.jpg and a/0.png"):
        run(replace(options, format="files"), embedder)
    (tmp_path / "in" / "a" / "0.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"a/0\.png: not an image"):
        run(options, embedder)
    assert not (tmp_path / "out" / "embeddings.npy").exists()


def test_the_command_line(options, compose, capsys, monkeypatch):
    words = [f"{key}={getattr(options, key)}" for key in ("checkpoint", "input_dir", "output_dir")]
    encode.main.__wrapped__(compose("encode_config", *words, "embedder=own", "device=cpu"))
    assert read_embeddings(Path(options.output_dir) / "embeddings.npy")[0] == NAMES
    monkeypatch.setattr("sys.argv", ["encode.py", *words, "backbone=ir_50"])
    with pytest.raises(SystemExit) as end:
        encode.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: backbone: unknown key; the key is embedder"
