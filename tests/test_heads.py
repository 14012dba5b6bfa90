"""Margin heads: published numbers, the monotonic continuation of ArcFace, fp32 under autocast."""

import math

import pytest
import torch
import torch.nn.functional as F

from recognition.heads import ArcFace, CosFace
from tests.compat import load_arrays, relative_error


@pytest.mark.parametrize("head_class", [ArcFace, CosFace])
def test_logits_and_loss_are_the_published_ones(head_class) -> None:
    arrays = {name: torch.from_numpy(array) for name, array in load_arrays("margin_heads").items()}
    head = head_class(32, 10)
    head.weight.data = arrays["kernel"].T.contiguous()
    logits = head(arrays["features"], arrays["labels"])
    name = head_class.__name__
    assert relative_error(logits.detach(), arrays[f"{name}_logits"]) < 1e-5
    assert F.cross_entropy(logits, arrays["labels"]).item() == pytest.approx(arrays[f"{name}_loss"].item(), rel=1e-5)


def logits_at(head, angles: list[float]) -> torch.Tensor:
    """Target logits for embeddings at the given angles to class 0; class 1 is orthogonal to the plane."""
    head.weight.data = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    angles = torch.tensor(angles)
    embeddings = 5 * torch.stack([angles.cos(), angles.sin(), torch.zeros_like(angles)], dim=1)
    return head(embeddings, torch.zeros(len(angles), dtype=torch.long))[:, 0]


def test_arcface_by_hand() -> None:
    head = ArcFace(3, 2, scale=10.0, margin=0.5)
    out = logits_at(head, [0.3, 1.0, 3.0])
    expected = [10 * math.cos(0.8), 10 * math.cos(1.5), 10 * (math.cos(3.0) - 0.5 * math.sin(math.pi - 0.5))]
    assert torch.allclose(out, torch.tensor(expected), atol=1e-4)


def test_cosface_by_hand() -> None:
    out = logits_at(CosFace(3, 2, scale=10.0, margin=0.4), [0.3, 2.0])
    assert torch.allclose(out, torch.tensor([10 * (math.cos(0.3) - 0.4), 10 * (math.cos(2.0) - 0.4)]), atol=1e-4)


def test_arcface_target_falls_with_the_angle_all_the_way() -> None:
    out = logits_at(ArcFace(3, 2), torch.linspace(0, math.pi, 200).tolist())
    assert (out[1:] < out[:-1]).all()


@pytest.mark.parametrize("head_class", [ArcFace, CosFace])
def test_float32_under_autocast(head_class) -> None:
    torch.manual_seed(0)
    head, embeddings, labels = head_class(8, 4), torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    plain = head(embeddings, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head(embeddings, labels)
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


def test_gradients_stay_finite_at_the_class_centre() -> None:
    head = ArcFace(4, 3)
    embeddings = head.weight.detach()[:1].clone().requires_grad_()
    F.cross_entropy(head(embeddings, torch.tensor([0])), torch.tensor([0])).backward()
    assert embeddings.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_one_identity_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes: 1"):
        ArcFace(8, 1)
