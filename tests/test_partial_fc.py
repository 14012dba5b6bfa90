"""The sharded and the sampled classifier against the head in one piece, with 1, 2 and 3 processes."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recognition import heads, partial_fc
from recognition.partial_fc import PartialFC, sample_rows, shard
from tests.processes import together
from utils import distributed
from utils.config import UserError

K, D, B = 11, 8, 12  # classes, width, global batch

HEADS: dict[str, Callable[[], heads.CosineHead]] = {
    "arcface": lambda: heads.ArcFace(D, K, scale=16.0, margin=0.3),
    "arcface_easy": lambda: heads.ArcFace(D, K, scale=16.0, margin=0.3, easy_margin=True),
    "cosface": lambda: heads.CosFace(D, K, scale=16.0, margin=0.2),
    "normface": lambda: heads.NormFace(D, K, scale=16.0),
    "softmax": lambda: heads.Softmax(D, K),
    "elastic_arc": lambda: heads.ElasticFaceArc(D, K, scale=16.0),
    "elastic_cos_plus": lambda: heads.ElasticFaceCos(D, K, scale=16.0, plus=True),
    "curricularface": lambda: heads.CurricularFace(D, K, scale=16.0, t_alpha=0.5),
    "adaface": lambda: heads.AdaFace(D, K, scale=16.0, t_alpha=0.5),
}


def build(name: str) -> heads.CosineHead:
    torch.manual_seed(0)
    head = HEADS[name]()
    torch.nn.init.normal_(head.weight)
    return head


def batch() -> tuple[Tensor, Tensor]:
    """Embeddings (B, D) and labels (B,), some classes twice and one four times."""
    generator = torch.Generator().manual_seed(1)
    embeddings = 3 * torch.randn(B, D, generator=generator)
    return embeddings, torch.tensor([0, 10, 3, 3, 7, 5, 5, 5, 5, 2, 9, 10])


def margins() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def computed(name: str) -> dict[str, Tensor | float]:
    """What this process computes with its part of the batch; the same code in one process and in three."""
    rank, world_size = distributed.rank(), distributed.world_size()
    embeddings, labels = batch()
    part = slice(rank * B // world_size, (rank + 1) * B // world_size)
    embeddings = embeddings[part].clone().requires_grad_()
    classifier = PartialFC(build(name))
    classifier.begin_step(labels[part], 0, torch.optim.SGD(classifier.parameters(), lr=0.1))
    result = classifier(embeddings, labels[part], margins())
    result.loss.backward()
    return {
        "loss": result.loss.detach(),
        "hits": result.hits,
        "cosines": result.cosines,
        "norms": result.norms,
        "gradient_norm": classifier.gradient_norm(),
        "embeddings": embeddings.grad,
        "weight": classifier.head.weight.grad,
        "buffers": dict(classifier.head.named_buffers()),
    }


def computed_by_all_heads() -> dict[str, dict]:
    return {name: computed(name) for name in HEADS}


def expected(name: str) -> dict[str, Tensor | float]:
    """The same by the head in one piece and PyTorch's cross-entropy."""
    head = build(name)
    embeddings, labels = batch()
    embeddings.requires_grad_()
    loss = F.cross_entropy(head(embeddings, labels, margins()), labels)
    loss.backward()
    cosines = head.cosine(embeddings).detach()
    return {
        "loss": loss.detach(),
        "hits": cosines.argmax(dim=1) == labels,
        "cosines": cosines[torch.arange(B), labels],
        "norms": embeddings.detach().norm(dim=1),
        "gradient_norm": head.weight.grad.norm(),
        "embeddings": embeddings.grad,
        "weight": head.weight.grad,
        "buffers": dict(head.named_buffers()),
    }


def test_a_collapsed_network_hits_nothing() -> None:
    """All cosines are equal then, to the own class too."""
    classifier = PartialFC(build(next(iter(HEADS))))
    with torch.no_grad():
        classifier.head.weight.copy_(torch.ones_like(classifier.head.weight))
    embeddings, labels = batch()
    assert not classifier(torch.ones_like(embeddings), labels, margins()).hits.any()


def same(parts: list[dict], reference: dict) -> None:
    """Results of all processes are those of one: common ones on each, gradients one part after the other."""
    for name in ("loss", "cosines", "norms", "gradient_norm"):
        for part in parts:
            torch.testing.assert_close(part[name], reference[name], rtol=1e-5, atol=1e-6, msg=name)
    for part in parts:
        assert torch.equal(part["hits"], reference["hits"])
        for name, buffer in reference["buffers"].items():
            torch.testing.assert_close(part["buffers"][name], buffer, rtol=1e-5, atol=1e-6)
    for name in ("embeddings", "weight"):
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined, reference[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_one_process_computes_what_the_head_and_cross_entropy_do(name: str) -> None:
    same([computed(name)], expected(name))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_compute_together_what_one_does(tmp_path: Path, processes: int) -> None:
    parts = together(processes, tmp_path, computed_by_all_heads)
    for name in HEADS:
        same([part[name] for part in parts], expected(name))


def test_loss_of_logits_that_would_overflow() -> None:
    head = heads.NormFace(D, K, scale=1e4)
    embeddings = torch.randn(B, D)
    labels = torch.arange(B) % K
    reference = F.cross_entropy(head(embeddings, labels), labels)
    torch.testing.assert_close(PartialFC(head)(embeddings, labels).loss, reference)


def test_shards_are_consecutive_and_even() -> None:
    for world_size in (1, 2, 3, 7):
        parts = [shard(100, rank, world_size) for rank in range(world_size)]
        assert [row for part in parts for row in part] == list(range(100))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_settings_that_cannot_work(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"sample_rate: 1\.5"):
        PartialFC(build("arcface"), sample_rate=1.5)
    monkeypatch.setattr(distributed, "world_size", lambda: 12)
    with pytest.raises(UserError, match="dataset: 11 identities on 12 processes"):
        PartialFC(build("arcface"))


# Sampling


def test_samples_hold_all_positives_and_random_others() -> None:
    positives = torch.tensor([3, 40, 99])
    draws = [sample_rows(positives, 100, 0.1, torch.Generator().manual_seed(seed)) for seed in range(500)]
    assert all(len(rows) == 10 and torch.equal(rows, rows.unique()) for rows in draws)
    assert all(torch.isin(positives, rows).all() for rows in draws)
    counts = torch.bincount(torch.cat(draws), minlength=100)
    others = torch.ones(100, dtype=torch.bool).index_fill(0, positives, False)
    # 7 of 97 others a draw: 36.1 +- 5.8 in 500
    assert counts[others].min() > 12 and counts[others].max() < 62
    many = sample_rows(torch.arange(0, 60, 2), 100, 0.1, torch.Generator().manual_seed(0))
    assert many.tolist() == list(range(0, 60, 2))
    assert len(sample_rows(positives[:0], 4, 0.01, torch.Generator())) == 1


def train_sampled(optimizer_class: type, steps: int, **kwargs) -> list[dict]:
    """Weights and momenta of all rows after each step at rate 0.5, and the rows that took part."""
    classifier = PartialFC(build("cosface"), sample_rate=0.5, seed=3)
    optimizer = optimizer_class(classifier.parameters(), lr=0.1, **kwargs)
    embeddings, labels = batch()
    states = []
    for step in range(steps):
        picked = torch.arange(step, B, 4)
        classifier.begin_step(labels[picked], step, optimizer)
        optimizer.zero_grad()
        classifier(embeddings[picked], labels[picked]).loss.backward()
        optimizer.step()
        classifier.end_step(optimizer)
        state = classifier.whole_state(optimizer)
        momenta = {name: value.clone() for name, value in state.items() if value.dim()}
        states.append({"rows": classifier.index, "weight": classifier.whole_weight().clone(), "momenta": momenta})
    return states


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs", "names"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum_buffer"}),
        (torch.optim.AdamW, {}, {"exp_avg", "exp_avg_sq"}),
    ],
)
def test_rows_that_are_not_sampled_keep_weights_and_momentum(optimizer_class, kwargs, names) -> None:
    states = train_sampled(optimizer_class, 4, **kwargs)
    assert set(states[0]["momenta"]) == names
    for before, after in pairwise(states):
        rows = after["rows"]
        assert len(rows) == 6  # round(0.5 * 11), more than the positives
        others = torch.ones(K, dtype=torch.bool).index_fill(0, rows, False)
        assert torch.equal(before["weight"][others], after["weight"][others])
        assert (before["weight"][rows] != after["weight"][rows]).any(dim=1).all()
        for name in names:
            assert torch.equal(before["momenta"][name][others], after["momenta"][name][others])
            assert (before["momenta"][name][rows] != after["momenta"][name][rows]).any(dim=1).all()


def test_a_sampled_step_is_sgd_on_the_sampled_rows() -> None:
    before = build("cosface").weight.detach()
    first, second = train_sampled(torch.optim.SGD, 2, momentum=0.9)
    assert not torch.equal(first["rows"], second["rows"])
    velocity = torch.zeros(K, D)
    embeddings, labels = batch()
    for step, state in enumerate((first, second)):
        picked, rows = torch.arange(step, B, 4), state["rows"]
        head = build("cosface")
        centres = before[rows].clone().requires_grad_()
        columns = torch.searchsorted(rows, labels[picked])
        cosines = head.cosine(embeddings[picked], centres)
        F.cross_entropy(head.scale * (cosines - 0.2 * F.one_hot(columns, len(rows))), columns).backward()
        velocity[rows] = 0.9 * velocity[rows] + centres.grad
        before = before.index_add(0, rows, velocity[rows], alpha=-0.1)
        torch.testing.assert_close(state["weight"], before)
        torch.testing.assert_close(state["momenta"]["momentum_buffer"], velocity)


def merge_and_split() -> dict:
    """Rate 0.5 on several processes: two steps, then all rows merged, and this process's part of them again."""
    partial_fc.PIECE = 2  # a shard of 3 or 4 rows takes two of them
    rank, world_size = distributed.rank(), distributed.world_size()
    classifier = PartialFC(build("arcface"), sample_rate=0.5, seed=3)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9)
    embeddings, labels = batch()
    part = slice(rank * B // world_size, (rank + 1) * B // world_size)
    for step in range(2):
        classifier.begin_step(labels[part], step, optimizer)
        optimizer.zero_grad()
        classifier(embeddings[part], labels[part]).loss.backward()
        optimizer.step()
        classifier.end_step(optimizer)
    weight, momentum = classifier.whole_weight(), classifier.whole_state(optimizer)["momentum_buffer"]
    own = (classifier.centres, classifier.momenta["momentum_buffer"], classifier.index)
    return {"weight": weight, "momentum": momentum, "own": own, "rows": (classifier.rows.start, classifier.rows.stop)}


def test_shards_merge_on_rank_0(tmp_path: Path) -> None:
    parts = together(3, tmp_path, merge_and_split)
    assert torch.equal(parts[0]["weight"], torch.cat([part["own"][0] for part in parts]))
    assert torch.equal(parts[0]["momentum"], torch.cat([part["own"][1] for part in parts]))
    assert parts[1]["weight"] is None and parts[2]["momentum"] is None
    labels = batch()[1]
    for part in parts:
        first, last = part["rows"]
        positives = labels[(labels >= first) & (labels < last)] - first
        assert torch.isin(positives, part["own"][2]).all()
    classifier = PartialFC(build("arcface"))
    assert torch.equal(classifier.part(parts[0]["weight"]), parts[0]["weight"])
