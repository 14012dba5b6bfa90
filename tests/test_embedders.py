"""Embedders: every file of configs/embedder, the input that each network gets, and what does not fit."""

import builtins

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from recognition.backbones import build_backbone, save_backbone
from recognition.embedding import embed_images
from tests.compat import fill_deterministic
from tests.onnx_file import write_onnx
from utils.checkpoint.__main__ import main as command
from utils.config import CONFIG_DIR, UserError, instantiate
from utils.embedders import _inception_resnet, backbone_embedder, facenet_embedder, onnx_embedder

SIZE, WIDTH = 16, 8
IMAGES = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
NETWORKS = {"elasticface_r100": "iresnet100", "tface_ir50": "ir_50", "adaface_ir50": "ir_50", "own": None}
NETWORKS |= {"adaface_ir101": "ir_101", "curricularface": "ir_101"}


def small(name: str = "iresnet18") -> torch.nn.Module:
    return fill_deterministic(build_backbone(name, input_size=SIZE, num_features=WIDTH, width=0.125))


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_DIR / "embedder").glob("*.yaml")))
def test_every_config_states_its_input(compose, tmp_path, name):
    cfg = compose("encode_config", f"embedder={name}", "checkpoint=file", "input_dir=a", "output_dir=b").embedder
    assert cfg.checkpoint == "file" and cfg.mean == 127.5
    assert cfg.std == (128 if name == "facenet" else 127.5)
    assert cfg.channel_order == ("BGR" if name.startswith("adaface") else None if name == "own" else "RGB")
    assert cfg.input_size == {"facenet": 160, "own": None}.get(name, 112)
    if name in NETWORKS:
        assert cfg.network == NETWORKS[name]
        save_backbone(small(), tmp_path / "b.safetensors")
        cfg.checkpoint = str(tmp_path / "b.safetensors")
        if name == "own":
            assert instantiate(cfg, "embedder").width == WIDTH
        else:
            with pytest.raises(UserError, match=rf"embedder.network: {NETWORKS[name]}, but .* holds iresnet18"):
                instantiate(cfg, "embedder")


def test_an_embedder_is_its_network_behind_one_input(tmp_path):
    network = small()
    save_backbone(network, tmp_path / "b.safetensors")
    torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, tmp_path / "b.pth")
    own = backbone_embedder(str(tmp_path / "b.safetensors"))
    bare = backbone_embedder(str(tmp_path / "b.pth"), "iresnet18", SIZE, "RGB")
    assert (own.width, own.input_size, own.sha256) == (WIDTH, SIZE, bare.sha256)
    expected = embed_images(network, IMAGES)
    assert np.array_equal(own.embed(IMAGES), expected)
    # BGR pixels scaled to -127.5 .. 127.5: the network sees other numbers, and the digest tells
    other = backbone_embedder(str(tmp_path / "b.pth"), channel_order="BGR", std=1.0)
    pixels = torch.from_numpy(IMAGES[..., ::-1].copy()).permute(0, 3, 1, 2).float() - 127.5
    with torch.no_grad():
        raw = F.normalize(network(pixels)).numpy()
    np.testing.assert_allclose(other.embed(IMAGES, flip=False), raw, atol=1e-5)
    assert other.sha256 != own.sha256


def test_what_a_file_says_must_agree(tmp_path):
    save_backbone(small("ir_18"), tmp_path / "bgr.safetensors", channel_order="BGR")
    path = str(tmp_path / "bgr.safetensors")
    assert not np.allclose(backbone_embedder(path).embed(IMAGES), embed_images(small("ir_18"), IMAGES), atol=1e-2)
    for arguments, message in (
        ({"channel_order": "RGB"}, "embedder.channel_order: RGB, but .* holds BGR"),
        ({"input_size": 112}, "embedder.input_size: 112, but .* holds 16"),
        ({"channel_order": "GBR"}, "embedder.channel_order: GBR"),
        ({"std": 0.0}, "embedder.std: 0.0; it must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            backbone_embedder(path, **arguments)
    with pytest.raises(UserError, match=r"embedder\.checkpoint: no such file"):
        backbone_embedder(str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match=r"looks like a recognition backbone .*, an InceptionResnetV1 is wanted"):
        facenet_embedder(path)


def test_facenet_loads_without_its_classifier(tmp_path):
    torch.manual_seed(0)
    network = _inception_resnet().eval()
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({**state, "logits.weight": torch.ones(7, 512), "logits.bias": torch.ones(7)}, tmp_path / "vggface2.pt")
    embedder = facenet_embedder(str(tmp_path / "vggface2.pt"))
    assert (embedder.width, embedder.input_size) == (512, 160)
    image = np.random.default_rng(1).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    with torch.no_grad():
        raw = F.normalize(network((torch.from_numpy(image).permute(0, 3, 1, 2).float() - 127.5) / 128))
    np.testing.assert_allclose(embedder.embed(image, flip=False), raw.numpy(), atol=1e-5)
    del state["last_bn.bias"]
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(UserError, match=r"1 missing \(last_bn\.bias\); the file looks like facenet-pytorch's"):
        facenet_embedder(str(tmp_path / "short.pt"))


@pytest.mark.parametrize("shape", [("n", 3, SIZE, SIZE), (1, 3, SIZE, SIZE), (2, 3, "h", "w"), ("n", SIZE, SIZE, 3)])
def test_onnx(tmp_path, capsys, shape):
    pytest.importorskip("onnxruntime")
    weight = np.random.default_rng(2).standard_normal((3 * SIZE * SIZE, WIDTH)).astype(np.float32)
    write_onnx(tmp_path / "w.onnx", weight, shape)
    embedder = onnx_embedder(str(tmp_path / "w.onnx"), input_size=SIZE)
    assert (embedder.width, embedder.input_size) == (WIDTH, SIZE)
    both = [(part.astype(np.float32) - 127.5) / 127.5 for part in (IMAGES, IMAGES[:, :, ::-1])]  # RGB, and mirrored
    raw = sum((part if shape[3] == 3 else part.transpose(0, 3, 1, 2)).reshape(5, -1) @ weight for part in both)
    np.testing.assert_allclose(embedder.embed(IMAGES), raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-5)
    if "h" in shape:
        return  # inspect tries open sizes with 112 pixels
    assert command(["inspect", str(tmp_path / "w.onnx")]) == 0
    assert "an ONNX recogniser (16 pixels => 8 numbers)" in capsys.readouterr().out


def test_onnx_files_that_do_not_fit(tmp_path):
    pytest.importorskip("onnxruntime")
    for name, shape, numbers, message in (
        ("grey", ("n", 1, SIZE, SIZE), SIZE * SIZE, "a recogniser takes one batch of images of 3 channels"),
        ("oblong", ("n", 3, SIZE, 8), 3 * SIZE * 8, "takes images of 16 x 8; square ones are wanted"),
        ("other", ("n", 3, "h", "w"), SIZE, "cannot take an image"),
        ("wrong", ("n", 3, SIZE, SIZE), SIZE, "not an ONNX file that onnxruntime can run"),
    ):
        write_onnx(tmp_path / name, np.ones((numbers, WIDTH), np.float32), shape)
        with pytest.raises(UserError, match=message):
            onnx_embedder(str(tmp_path / name))
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match="not an ONNX file that onnxruntime can run"):
        onnx_embedder(str(tmp_path / "broken.onnx"))
    with pytest.raises(UserError, match="an ONNX file; give embedder=insightface_onnx"):
        backbone_embedder(str(tmp_path / "broken.onnx"))


def test_onnx_without_onnxruntime(tmp_path, monkeypatch):
    (tmp_path / "w.onnx").write_bytes(b"")
    found = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.startswith("onnxruntime"):
            raise ImportError(name)
        return found(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="needs onnxruntime, which is not installed: pip install onnxruntime"):
        onnx_embedder(str(tmp_path / "w.onnx"))
