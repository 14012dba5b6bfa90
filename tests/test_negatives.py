"""Negative identity guidance: who an image is led away from, and what sample.py makes of it."""

import json
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch

from diffusion.drawing import Drawn, FaceDrawer, Job
from diffusion.identities import Identities
from diffusion.negatives import Negatives, NegativeSettings, check_negative
from diffusion.samplers import OneStage
from models.diffusion.unet import ConditionalUNet
from tests import test_sample
from tests.test_sample import MODEL, run
from utils.config import UserError

files = test_sample.files  # the fixture: a tiny model and four contexts
SHORT = (
    "sampling.n_contexts=2",
    "sampling.n_samples_per_context=1",
    "sampler=two_stage_fixed",
    "sampling.sample_config.cfg_scale=4",
)


@pytest.fixture
def people() -> Identities:
    """At 0, 10, 100 and 170 degrees on a circle; the last is in the source only."""
    angles = torch.tensor([0.0, 10.0, 100.0, 170.0], dtype=torch.float64).deg2rad()
    contexts = torch.stack([angles.cos(), angles.sin()], dim=1).float()
    return Identities(["a", "b", "c"], contexts[:3], "", contexts)


@pytest.mark.parametrize(("choice", "others"), [("most_similar", [1, 0, 3]), ("least_similar", [3, 3, 0])])
def test_by_cosine(people, choice, others):
    negatives = Negatives(NegativeSettings(choice), people, 0)
    for name, other in zip(people.names, others, strict=True):
        for index in (0, 7):
            assert torch.equal(negatives.context(name, index), people.neighbours[other])


def test_random_is_somebody_else_and_fixed_by_its_numbers(people):
    def drawn(seed: int) -> list[list[int]]:
        negatives = Negatives(NegativeSettings("random"), people, seed)
        return [[_row(people, negatives.context(name, index)) for index in range(40)] for name in people.names]

    rows = drawn(0)
    assert [set(row) for row in rows] == [{1, 2, 3}, {0, 2, 3}, {0, 1, 3}]
    assert drawn(0) == rows and drawn(1) != rows


def _row(people: Identities, context: torch.Tensor) -> int:
    return next(row for row, other in enumerate(people.neighbours) if torch.equal(other, context))


def test_reaches_the_sampler_and_joins_perturbation(files, tmp_path, monkeypatch):
    """The same negatives with and without perturbation, which turns the identity's context alone."""
    jobs: dict[str, list[Job]] = {}
    original = FaceDrawer.draw

    def draw(drawer: FaceDrawer, given: Iterable[Job]) -> Iterator[Drawn]:
        jobs[name] = list(given)
        return original(drawer, jobs[name])

    monkeypatch.setattr(FaceDrawer, "draw", draw)
    for name, words in {
        "negative": ["sampling.negative.choice=least_similar"],
        "both": ["sampling.negative.choice=least_similar", "sampling.perturbation.lower_bound=0.6"],
    }.items():
        run(files, tmp_path / name, *SHORT, *words)
    contexts = torch.nn.functional.normalize(torch.from_numpy(np.load(files / "contexts.npy")))
    farthest = (contexts @ contexts.T).argmin(dim=1)
    for one, other in zip(jobs["negative"], jobs["both"], strict=True):
        row = int(one.key[0])
        torch.testing.assert_close(one.negative, contexts[farthest[row]])
        torch.testing.assert_close(one.context, contexts[row])
        assert torch.equal(one.negative, other.negative) and one.seed == other.seed
        assert 0.6 <= one.context @ other.context < 1
    settings = json.loads((tmp_path / "both" / "dataset.json").read_text())["settings"]
    assert settings["sampling.negative.choice"] == "least_similar"
    with pytest.raises(UserError, match=r"sampling\.negative\.choice: null, before"):
        run(files, tmp_path / "negative", *SHORT)


@pytest.mark.parametrize(
    ("choice", "model", "scale", "message"),
    [
        ("nearest", {}, 1.0, "'nearest'; give one of random, most_similar, least_similar, or null"),
        ("random", {"n_context_classes": 5}, 1.0, "random, but the model takes classes"),
        ("random", {}, 0.0, r"random, but sampling\.sample_config\.cfg_scale is 0"),
    ],
)
def test_mistakes(people, choice, model, scale, message):
    unet = ConditionalUNet(**{**{k: v for k, v in MODEL.items() if k != "_target_"}, **model})
    sampler = OneStage(guidance_scale=scale)
    check_negative(NegativeSettings(None), unet, sampler, people)
    with pytest.raises(UserError, match=rf"sampling\.negative\.choice: {message}"):
        check_negative(NegativeSettings(choice), unet, sampler, people)


def test_one_context_has_no_other(people):
    alone = Identities(["a"], people.contexts[:1], "", people.neighbours[:1])
    unet = ConditionalUNet(**{k: v for k, v in MODEL.items() if k != "_target_"})
    with pytest.raises(UserError, match="there is one context only"):
        check_negative(NegativeSettings("random"), unet, OneStage(guidance_scale=1.0), alone)
