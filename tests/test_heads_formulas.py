"""Every head against its paper's formula, written here in numpy with angles in float64, and against its slopes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recognition import heads
from recognition.heads import CosineHead, embedding_norms

SCALE = 8.0  # low enough that every class has a part in the loss
SEED = 5
# Named as their configurations, with the published values
HEADS: dict[str, Callable[..., CosineHead]] = {
    "adaface": heads.AdaFace,
    "arcface": heads.ArcFace,
    "arcface_easy": partial(heads.ArcFace, easy_margin=True),
    "cosface": heads.CosFace,
    "curricularface": heads.CurricularFace,
    "elasticface_arc": heads.ElasticFaceArc,
    "elasticface_arc_plus": partial(heads.ElasticFaceArc, sigma=0.0175, plus=True),
    "elasticface_cos": heads.ElasticFaceCos,
    "elasticface_cos_plus": partial(heads.ElasticFaceCos, sigma=0.02, plus=True),
    "normface": heads.NormFace,
    "softmax": heads.Softmax,
}

# theta_y of each sample: beside the class centre, usual ones, beyond a right angle, and where theta_y + m passes pi
ANGLES = [0.04, 0.3, 0.9, 1.4, 1.75, 2.3, 2.8, 3.12]
NORMS = [27.0, 15.0, 22.0, 0.5, 31.0, 18.0, 150.0, 12.0]
LABELS = [0, 1, 2, 3, 4, 0, 1, 2]


@dataclass
class Batch:
    embeddings: np.ndarray  # (B, D) float64
    weight: np.ndarray  # (K, D) float64
    labels: np.ndarray  # (B,)


@pytest.fixture
def batch() -> Batch:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((5, 6))
    centres = (weight / np.linalg.norm(weight, axis=1, keepdims=True))[LABELS]
    across = rng.standard_normal(centres.shape)
    across -= (across * centres).sum(axis=1, keepdims=True) * centres
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    angles = np.array(ANGLES)[:, None]
    embeddings = np.array(NORMS)[:, None] * (np.cos(angles) * centres + np.sin(angles) * across)
    return Batch(embeddings, weight, np.array(LABELS))


def make(name: str) -> CosineHead:
    """A head of 5 classes of 6 numbers, with running statistics as they are in the middle of a training."""
    head = HEADS[name](6, 5) if name == "softmax" else HEADS[name](6, 5, scale=SCALE)
    if name == "curricularface":
        head.t.fill_(0.4)
    if name == "adaface":
        head.norm_mean.fill_(21.0)
        head.norm_std.fill_(6.0)
    return head


def constants(name: str, batch: Batch) -> np.ndarray | float | None:
    """What a head takes from the batch without gradient: drawn margins (B,), t, or AdaFace's z (B,)."""
    unit = batch.embeddings / np.linalg.norm(batch.embeddings, axis=1, keepdims=True)
    centres = batch.weight / np.linalg.norm(batch.weight, axis=1, keepdims=True)
    own = (unit * centres[batch.labels]).sum(axis=1)  # (B,)
    if name.startswith("elasticface"):
        mean = 0.5 if "arc" in name else 0.35
        sigma = {"arc": 0.05, "cos": 0.05, "arc_plus": 0.0175, "cos_plus": 0.02}[name.removeprefix("elasticface_")]
        normal = torch.randn(len(own), generator=torch.Generator().manual_seed(SEED)).numpy().astype(np.float64)
        margins = mean + sigma * normal
        if name.endswith("plus"):
            largest_first = sorted(margins, reverse=True)
            harder = [sum(other < cosine for other in own) for cosine in own]  # how many samples are harder
            margins = np.array([largest_first[count] for count in harder])
        return margins
    if name == "curricularface":
        return 0.01 * own.mean() + 0.99 * 0.4
    if name == "adaface":
        norms = np.clip(np.linalg.norm(batch.embeddings, axis=1), 0.001, 100)
        mean = 0.01 * norms.mean() + 0.99 * 21.0
        std = 0.01 * norms.std(ddof=1) + 0.99 * 6.0
        return np.clip((norms - mean) / (std + 0.001) * 0.333, -1, 1)
    return None


def formula(name: str, batch: Batch, held: np.ndarray | float | None) -> np.ndarray:
    """Scaled logits (B, K), from the papers."""
    rows = np.arange(len(batch.labels))
    if name == "softmax":
        return batch.embeddings @ batch.weight.T
    x = batch.embeddings / np.linalg.norm(batch.embeddings, axis=1, keepdims=True)
    w = batch.weight / np.linalg.norm(batch.weight, axis=1, keepdims=True)
    cosines = x @ w.T
    theta = np.arccos(cosines[rows, batch.labels])  # (B,)

    def additive(m: np.ndarray | float) -> np.ndarray:
        return np.where(theta + m < np.pi, np.cos(theta + m), np.cos(theta) - m * np.sin(m))

    logits = cosines.copy()
    if name == "arcface":
        target = additive(0.5)
    elif name == "arcface_easy":
        target = np.where(theta < np.pi / 2, np.cos(theta + 0.5), np.cos(theta))
    elif name == "cosface":
        target = np.cos(theta) - 0.4
    elif name.startswith("elasticface_arc"):
        target = additive(held)
    elif name.startswith("elasticface_cos"):
        target = np.cos(theta) - held
    elif name == "curricularface":
        target = additive(0.5)
        hard = cosines > target[:, None]
        logits[hard] = cosines[hard] * (held + cosines[hard])
    elif name == "adaface":
        g_angle, g_add = -0.4 * held, 0.4 * held + 0.4
        target = np.cos(np.clip(theta + g_angle, 0, np.pi)) - g_add
    elif name == "normface":
        target = np.cos(theta)
    logits[rows, batch.labels] = target
    return SCALE * logits


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]))


def slopes(name: str, batch: Batch, field: str) -> np.ndarray:
    """The gradient of the formula's cross-entropy by central differences, float64, shaped as `batch.<field>`."""
    held, values = constants(name, batch), getattr(batch, field)
    gradient = np.empty_like(values)
    for index in np.ndindex(values.shape):
        losses = []
        for step in (1e-6, -1e-6):
            moved = values.copy()
            moved[index] += step
            losses.append(cross_entropy(formula(name, Batch(**{**vars(batch), field: moved}), held), batch.labels))
        gradient[index] = (losses[0] - losses[1]) / 2e-6
    return gradient


def tensors(batch: Batch, head: CosineHead) -> tuple[torch.Tensor, torch.Tensor]:
    head.weight.data = torch.tensor(batch.weight, dtype=torch.float32)
    return torch.tensor(batch.embeddings, dtype=torch.float32, requires_grad=True), torch.from_numpy(batch.labels)


@pytest.mark.parametrize("name", HEADS)
def test_logits_and_gradients_are_the_formulas(batch: Batch, name: str) -> None:
    head = make(name)
    embeddings, labels = tensors(batch, head)
    logits = head(embeddings, labels, torch.Generator().manual_seed(SEED))
    np.testing.assert_allclose(logits.detach(), formula(name, batch, constants(name, batch)), rtol=1e-5, atol=2e-5)
    F.cross_entropy(logits, labels).backward()
    for actual, field in ((embeddings.grad, "embeddings"), (head.weight.grad, "weight")):
        expected = slopes(name, batch, field)
        sizes = np.linalg.norm(expected, axis=1, keepdims=True)
        errors = np.abs(actual.numpy() - expected) / np.maximum(sizes, 1e-4)
        assert errors.max() < 2e-3, f"{field}: {errors.max(axis=1)}"


@pytest.mark.parametrize("name", [name for name in HEADS if name != "softmax"])
def test_gradients_in_float64_from_cosines_to_logits(batch: Batch, name: str) -> None:
    head = make(name)
    if name in ("curricularface", "adaface"):
        head.eval()  # their statistics stand still while the differences are taken
    x, w = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (batch.embeddings, batch.weight))
    cosines = torch.tensor(x @ w.T, requires_grad=True)
    labels, norms = torch.from_numpy(batch.labels), torch.tensor(NORMS, dtype=torch.float64)

    def logits(cosines: torch.Tensor) -> torch.Tensor:
        return head.logits(cosines, labels, norms, torch.Generator().manual_seed(SEED))

    assert torch.autograd.gradcheck(logits, cosines, eps=1e-7, atol=1e-5)


def test_the_batch_reaches_every_branch(batch: Batch) -> None:
    angles = np.array(ANGLES)
    assert (angles + 0.5 > np.pi).any() and (angles < np.pi / 2).any() and (angles > np.pi / 2).any()
    z = constants("adaface", batch)
    assert (angles - 0.4 * z < 0).any() and (angles - 0.4 * z > np.pi).any() and (np.abs(z) == 1).any()
    held = constants("curricularface", batch)
    differs = ~np.isclose(formula("curricularface", batch, held), formula("arcface", batch, None))
    assert differs.any() and not differs.all()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("shards", [(0, 5), (0, 2, 5), (0, 1, 4, 5)])
def test_steps_over_shards_of_the_classes_are_the_whole_forward(
    batch: Batch, name: str, shards: tuple[int, ...]
) -> None:
    whole, head = make(name), make(name)
    embeddings, labels = tensors(batch, whole)
    tensors(batch, head)
    expected = whole(embeddings, labels, torch.Generator().manual_seed(SEED))

    parts = [head.cosine(embeddings, head.weight[low:high]) for low, high in pairwise(shards)]
    own = torch.cat(parts, dim=1).gather(1, labels[:, None]).squeeze(1)
    norms = embedding_norms(embeddings)
    head.observe(own, norms)
    target = head.target_logit(own, norms, torch.Generator().manual_seed(SEED))
    logits = torch.cat([head.other_logits(part, target) for part in parts], dim=1)
    logits = head.scale * logits.scatter(1, labels[:, None], target[:, None])
    assert torch.allclose(logits, expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(head.buffers(), whole.buffers(), strict=True))


@pytest.mark.parametrize("name", HEADS)
def test_float32_under_autocast(batch: Batch, name: str) -> None:
    plain, mixed = make(name), make(name)
    embeddings, labels = tensors(batch, plain)
    tensors(batch, mixed)
    halves = embeddings.bfloat16()  # as a backbone under autocast gives them
    expected = plain(halves.float(), labels, torch.Generator().manual_seed(SEED))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = mixed(halves, labels, torch.Generator().manual_seed(SEED))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", HEADS)
def test_gradients_stay_finite_at_the_class_centre_and_opposite(name: str) -> None:
    head = make(name)
    embeddings = torch.cat([head.weight[:2], -head.weight[:2]]).detach().requires_grad_()
    labels = torch.tensor([0, 1, 0, 1])
    F.cross_entropy(head(embeddings, labels), labels).backward()
    assert embeddings.grad.isfinite().all() and head.weight.grad.isfinite().all()
