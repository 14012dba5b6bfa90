import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import encode
from encode import EncodeSettings
from recognition.backbones import build_backbone, save_backbone
from recognition.embedding import embed_images
from utils.config import UserError
from utils.contexts import read_contexts, read_embeddings
from utils.images import write_image


@pytest.fixture
def options(tmp_path) -> EncodeSettings:
    torch.manual_seed(0)
    save_backbone(build_backbone("iresnet18", input_size=32, num_features=16, width=0.125), tmp_path / "b.safetensors")
    generator = np.random.default_rng(0)
    for name in ("b/0", "b/1", "a/0", "a/1", "c/d/0"):
        write_image(tmp_path / "in" / f"{name}.png", generator.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    folders = (str(tmp_path / "b.safetensors"), str(tmp_path / "in"), str(tmp_path / "out"))
    return EncodeSettings(*folders, backbone=None, input_size=112, flip=True, batch_size=2, device="cpu")


def test_embeddings_and_contexts_are_written(options, monkeypatch):
    monkeypatch.setattr(encode, "PART_SIZE", 2)
    encode.encode(options)
    out = Path(options.output_dir)
    names, embeddings = read_embeddings(out / "embeddings.npy")
    assert names == ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "c/d/0.png"]
    backbone = encode.load_backbone(options.checkpoint)
    np.testing.assert_allclose(embeddings, embed_images(backbone, names, root=options.input_dir), atol=1e-5)
    identities, contexts = read_contexts(out / "contexts.npy")
    assert identities == ["a", "b", "c/d"]
    mean = embeddings[2] + embeddings[3]
    np.testing.assert_allclose(contexts[1], mean / np.linalg.norm(mean), atol=1e-5)
    assert not (out / ".parts").exists()


def test_width_and_uncropped_images_are_told(options, caplog):
    caplog.set_level("INFO")
    write_image(Path(options.input_dir) / "a" / "0.png", np.zeros((40, 60, 3), np.uint8))
    encode.encode(options)
    assert "a/0.png is 60 x 40 pixels, not a square crop" in caplog.text
    assert "model.context_input_channels=16" in caplog.text


def test_a_killed_run_resumes(options, monkeypatch):
    monkeypatch.setattr(encode, "PART_SIZE", 2)
    embedded = []

    def embed_or_die(backbone, images, **kwargs):
        embedded.append(images)
        if len(embedded) == 2:
            raise KeyboardInterrupt
        return embed_images(backbone, images, **kwargs)

    monkeypatch.setattr(encode, "embed_images", embed_or_die)
    with pytest.raises(KeyboardInterrupt):
        encode.encode(options)
    encode.encode(options)
    assert embedded == [["a/0.png", "a/1.png"], ["b/0.png", "b/1.png"], ["b/0.png", "b/1.png"], ["c/d/0.png"]]
    encode.encode(options)
    assert len(embedded) == 4, "nothing is left to do"
    # a new image starts anew
    write_image(Path(options.input_dir) / "e" / "0.png", np.full((40, 40, 3), 9, np.uint8))
    encode.encode(options)
    assert len(embedded) == 7
    description = json.loads((Path(options.output_dir) / "encoder.json").read_text())
    assert description["images"] == 6


def test_embeddings_made_otherwise_are_not_overwritten(options, tmp_path):
    encode.encode(options)
    before = (Path(options.output_dir) / "embeddings.npy").read_bytes()
    with pytest.raises(UserError, match=r"flip: False, but the embeddings in .* were made with True; give another"):
        encode.encode(replace(options, flip=False))
    torch.manual_seed(1)
    save_backbone(build_backbone("iresnet18", input_size=32, num_features=16, width=0.125), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"checkpoint: .* of other content; give another output_dir"):
        encode.encode(options)
    assert (Path(options.output_dir) / "embeddings.npy").read_bytes() == before


def test_mistakes_are_named(options, tmp_path):
    for changes, message in (
        ({"checkpoint": str(tmp_path / "absent")}, "checkpoint: no such file"),
        ({"input_dir": str(tmp_path / "absent")}, "input_dir: no such folder"),
        ({"batch_size": 0}, "batch_size: 0"),
    ):
        with pytest.raises(UserError, match=message):
            encode.encode(replace(options, **changes))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="input_dir: no images"):
        encode.encode(replace(options, input_dir=str(tmp_path / "empty")))
    (tmp_path / "in" / "a" / "0.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"a/0\.png: not an image"):
        encode.encode(options)
    assert not (tmp_path / "out" / "embeddings.npy").exists()


def test_a_published_file_is_named_by_the_config_group(compose, tmp_path):
    from utils.checkpoint import save_torch

    images, file = tmp_path / "faces", tmp_path / "ir_18.pth"
    write_image(images / "a" / "0.png", np.full((32, 32, 3), 90, np.uint8))
    save_torch(build_backbone("ir_18").state_dict(), file)
    cfg = compose(
        "encode_config", "backbone=ir_18", f"checkpoint={file}", f"input_dir={images}", f"output_dir={tmp_path / 'out'}"
    )
    encode.main.__wrapped__(cfg)
    assert np.load(tmp_path / "out" / "embeddings.npy").shape == (1, 512)
