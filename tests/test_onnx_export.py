"""recognition.export: ONNX files give the backbone's numbers, or are not written."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from recognition import onnx_export
from recognition.backbones import BACKBONES, build_backbone, load_backbone, save_backbone
from recognition.export import main
from recognition.onnx import OnnxRecogniser
from recognition.onnx_export import OPSETS, TOLERANCE, Deviation, check, compare, export_onnx, probe_images
from utils.checkpoint.__main__ import inspect
from utils.config import UserError
from utils.embedders import onnx_embedder

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

# The first of each family, and one with the bottlenecks of the deep ones
FAMILIES = [(name, {}) for name in {re.sub(r"\d+$", "", name): name for name in reversed(BACKBONES)}.values()]
FAMILIES.append(("ir_18", {"bottleneck": True}))
PROBES = probe_images(32)


@pytest.fixture(autouse=True)
def probes_rendered_once(monkeypatch):
    monkeypatch.setattr(onnx_export, "probe_images", lambda size: PROBES)


def small(name: str = "ir_18", **settings) -> nn.Module:
    """A backbone of 32 pixels whose batch norms have seen images, as after training."""
    torch.manual_seed(0)
    backbone = build_backbone(name, input_size=32, num_features=16, width=0.125, **settings)
    backbone.train()(torch.randn(8, 3, 32, 32))
    return backbone


@pytest.mark.parametrize(("name", "settings"), FAMILIES)
def test_every_family_gives_the_same_numbers(tmp_path, name, settings):
    backbone = small(name, **settings)
    deviation = export_onnx(backbone, tmp_path / "b.onnx")
    assert backbone.training and max(deviation.absolute, deviation.relative) < TOLERANCE
    graph = OnnxRecogniser(tmp_path / "b.onnx", input_size=8)
    assert (graph.input_size, graph.num_features, graph.batch, graph.channels_last) == (32, 16, None, False)
    backbone.eval()
    for batch in (1, 2, 5):  # images that the check has not seen
        images = torch.rand(batch, 3, 32, 32) * 2 - 1
        wanted = backbone(images)
        torch.testing.assert_close(graph(images), wanted, rtol=0, atol=float(wanted.detach().abs().max()) * TOLERANCE)


def test_the_probes_are_noise_and_faces():
    assert PROBES.shape == (8, 3, 32, 32) and PROBES.dtype == torch.float32
    assert PROBES.min() >= -1 and PROBES.max() <= 1
    rough = (PROBES[:, :, 1:] - PROBES[:, :, :-1]).abs().mean(dim=(1, 2, 3))
    assert rough[:4].min() > 0.5 and rough[4:].max() < 0.3  # noise jumps from pixel to pixel, faces do not


class Offset(nn.Module):
    """A graph whose first number is wrong by a share of the output's length."""

    def __init__(self, backbone: nn.Module, share: float) -> None:
        super().__init__()
        self.backbone, self.share = backbone, share

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = self.backbone(images).clone()
        out[:, 0] += self.share * out.norm(dim=1)
        return out


def test_deviations_are_measured():
    backbone, images = small().eval(), PROBES
    found = compare(backbone, Offset(backbone, 3e-3), images)
    assert found.relative == pytest.approx(3e-3, rel=1e-3) and 1e-3 < found.absolute < 3.1e-3
    assert compare(backbone, Offset(backbone, float("nan")), images).absolute == float("inf")
    check(Deviation(TOLERANCE, TOLERANCE), "x")
    for deviation in (Deviation(2e-4, 0), Deviation(0, 2e-4)):
        with pytest.raises(UserError, match=r"output: x is not written: .* 2\.0e-04"):
            check(deviation, "x")


def test_a_graph_with_other_numbers_is_not_left_behind(tmp_path, monkeypatch):
    backbone = small()
    monkeypatch.setattr(onnx_export, "OnnxRecogniser", lambda path, size: Offset(backbone, 2e-4))
    with pytest.raises(UserError, match=r"is not written: under onnxruntime the embeddings differ"):
        export_onnx(backbone, tmp_path / "b.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    backbone = small()
    for opset in (OPSETS[0] - 1, OPSETS[-1] + 1):
        with pytest.raises(UserError, match=f"opset: {opset}; it can be 13 to 20"):
            export_onnx(backbone, tmp_path / "b.onnx", opset=opset)
    broken = small()
    nn.init.constant_(next(broken.parameters()), float("nan"))
    with pytest.raises(UserError, match="not finite; its training has diverged"):
        export_onnx(broken, tmp_path / "b.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="needs onnx, which is not installed: pip install onnx onnxruntime"):
        export_onnx(backbone, tmp_path / "b.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_the_command(tmp_path, compose, order):
    checkpoint, output = tmp_path / "backbone.safetensors", tmp_path / "b.onnx"
    save_backbone(small("iresnet18"), checkpoint, order)
    overrides = (f"checkpoint={checkpoint}", f"output={output}", "opset=13")
    main.__wrapped__(compose("recognition_export_config", *overrides))
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    embedder = onnx_embedder(str(output))
    wanted = load_backbone(checkpoint)(images)  # both take RGB, whatever the network was trained on
    torch.testing.assert_close(
        embedder.network(images), wanted, rtol=0, atol=float(wanted.detach().abs().max()) * TOLERANCE
    )
    lines = inspect(output)
    assert "channel_order: RGB" in lines and "kind: recognition_backbone" in lines
    assert any(line.startswith('config: {"name": "iresnet18", "input_size": 32') for line in lines)
    with pytest.raises(UserError, match=r"output: .*b\.onnx exists; give another name"):
        main.__wrapped__(compose("recognition_export_config", *overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output=b.pt", "output: b.pt; name the file .onnx"),
        ("checkpoint=absent.safetensors", "checkpoint: no such file: absent.safetensors"),
        ("checkpoint=a.onnx", "checkpoint: a.onnx is ONNX already"),
        ("output=a.onnx/b.onnx", "output: cannot write a.onnx/b.onnx .*a.onnx is a file"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, compose, override, message):
    monkeypatch.chdir(tmp_path)
    Path("a.onnx").touch()
    words = ("checkpoint=x", f"output={tmp_path / 'b.onnx'}", override)
    with pytest.raises(UserError, match=message):
        main.__wrapped__(compose("recognition_export_config", *words))
