"""The procedure that the benchmark measures against computes what this project computes."""

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.plain_recognition import PlainArcFace, PlainDataset, PlainTrainer
from benchmarks.recognition import loader_table, step_table
from recognition.backbones import build_backbone
from recognition.heads import ArcFace
from utils.images import to_float, write_image


def test_the_plain_step_is_arcface_with_sgd() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("ir_18", input_size=16, num_features=8, width=0.125, dropout=0.0)
    head = ArcFace(8, 5)
    images, labels = torch.rand(6, 3, 16, 16) * 2 - 1, torch.tensor([0, 1, 2, 3, 4, 0])
    embeddings = torch.randn(6, 8)
    plain = PlainArcFace(head.weight.detach())
    ours = F.cross_entropy(head(embeddings, labels), labels)
    assert torch.allclose(F.cross_entropy(plain(embeddings, labels), labels), ours, rtol=1e-5)
    trainer = PlainTrainer(backbone, head.weight.detach(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {*backbone.parameters(), trainer.head.weight}
    losses = [trainer.step(images, labels) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_the_plain_loader_gives_the_same_pixels(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    write_image(tmp_path / "a.png", pixels)
    image, label = PlainDataset([tmp_path / "a.png"], [3], probability=0.0)[0]
    expected = to_float(pixels)
    assert label == 3 and (torch.allclose(image, expected) or torch.allclose(image, expected.flip(-1)))


def test_tables() -> None:
    steps = {
        "plain": {"images_per_second": 2.0, "peak_gib": 1.0, "losses": [2.0, 4.0]},
        "fp32": {"images_per_second": 5.0, "peak_gib": 0.5, "losses": [3.0, 3.3]},
    }
    assert step_table(steps).splitlines()[3] == "| fp32 | 5.00 | 2.50 | 0.50 | 3.1500 | 5.000 % |"
    loaders = {"plain jpg": {"images_per_second": 100.0, "peak_gib": 1.0}}
    loaders["files jpg"] = {"images_per_second": 250.4, "peak_gib": 1.0}
    assert loader_table(loaders).splitlines()[3] == "| files jpg | 250 | 2.50 | 1.00 |"
