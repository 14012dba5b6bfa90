"""Identity perturbation: its geometry, and what sample.py makes of it."""

import json
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch

from diffusion.drawing import Drawn, FaceDrawer, Job
from diffusion.identities import Identities
from diffusion.perturbation import (
    Perturbation,
    PerturbationSettings,
    check_perturbation,
    lower_bounds,
    measure_perturbation,
    perturb,
)
from models.diffusion.unet import ConditionalUNet
from tests import test_sample
from tests.test_sample import MODEL, WIDTH, close, images, manifest, run
from utils.config import UserError
from utils.contexts import uniform_contexts

files = test_sample.files  # the fixture: a tiny model and four contexts
ON = "sampling.perturbation.lower_bound=0.6"
FAST = ("sampler.num_steps=5", "sampler=ddim")


def test_lower_bounds_are_half_way_to_the_nearest():
    angles = np.radians([0, 40, 200, 290])
    contexts = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    expected = np.cos(np.radians([20, 20, 45, 35]))  # half of 40, 40, 90 and 70 degrees
    np.testing.assert_allclose(lower_bounds(contexts, contexts, 0.1), expected, atol=1e-9)
    np.testing.assert_allclose(lower_bounds(contexts, contexts, 0.8), np.maximum(expected, 0.8), atol=1e-9)
    np.testing.assert_allclose(lower_bounds(contexts[:2], contexts, 0.1), expected[:2], atol=1e-9)
    assert lower_bounds(contexts[:1], contexts[:1], 0.6).tolist() == [0.6]  # nobody else
    assert lower_bounds(np.ones((2, 1)), np.ones((2, 1)), 0.6).tolist() == [1, 1]  # the same person twice


def test_lower_bounds_do_not_depend_on_how_many_are_drawn():
    contexts = uniform_contexts(200, 128, 0)
    bounds = lower_bounds(contexts, contexts, 0.1)
    for n in (1, 2, 4, 5, 8, 50, 199):
        assert (lower_bounds(contexts[:n], contexts, 0.1) == bounds[:n]).all()


def test_perturbed_contexts_keep_length_angle_and_distance():
    contexts = uniform_contexts(30, WIDTH, 0)
    identities = Identities([f"{i}" for i in range(30)], torch.from_numpy(contexts), "", torch.from_numpy(contexts))
    perturbation = measure_perturbation(PerturbationSettings(0.6), identities, seed=3)
    samples = [(name, index) for name in identities.names for index in range(40)]
    rows, angles = perturbation.apply(identities.contexts_of([name for name, _ in samples]), samples)
    rows = rows.numpy().reshape(30, 40, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=2), 1, atol=1e-6)
    cosines = np.einsum("ikd,jd->ikj", rows, contexts)  # (30, 40, 30)
    own = cosines[np.arange(30), :, np.arange(30)]
    np.testing.assert_allclose(own, np.cos(np.array(angles).reshape(30, 40)), atol=1e-6)
    assert (cosines.argmax(axis=2) == np.arange(30)[:, None]).all()  # no image is nearer to another person
    bounds = np.array(list(perturbation.lower_bounds.values()))[:, None]
    assert (own >= bounds - 1e-6).all() and 0.6 < own.min() < 0.8
    shares = (1 - own) / (1 - bounds)  # uniform in 0 .. 1
    assert shares.mean() == pytest.approx(0.5, abs=0.03) and shares.std() == pytest.approx(12**-0.5, abs=0.02)
    turns = rows - own[..., None] * contexts[:, None]
    assert np.abs(np.einsum("ikd,id->ik", turns, contexts)).max() < 1e-6
    assert np.abs((turns / np.linalg.norm(turns, axis=2, keepdims=True)).mean(axis=(0, 1))).max() < 0.03


def test_a_perturbation_depends_on_seed_identity_and_index_alone():
    context = torch.from_numpy(uniform_contexts(1, WIDTH, 0))

    def angle(seed=0, name="a", index=0, more=()):
        perturbation = Perturbation(seed, {"a": 0.6, "b": 0.6})
        return perturbation.apply(context.repeat(1 + len(more), 1), [*more, (name, index)])[1][-1]

    assert angle() == angle(more=[("b", 3), ("a", 5)])
    assert angle() == pytest.approx(0.509535965190929, abs=1e-9)
    assert len({angle(), angle(seed=1), angle(name="b"), angle(index=1)}) == 4


def test_perturb_is_pinned():
    row, angle = perturb(np.array([0.0, 0.0, 1.0]), 0.6, np.random.default_rng(0))
    assert angle == pytest.approx(np.arccos(0.6 + 0.4 * 0.6369616873), abs=1e-9)
    assert row[2] == pytest.approx(np.cos(angle)) and np.linalg.norm(row) == pytest.approx(1)
    assert perturb(np.array([0.0, 1.0]), 1.0, np.random.default_rng(0))[1] == 0


@pytest.fixture(scope="module")
def perturbed(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("perturbed") / "out"
    run(files, out, ON, *FAST, "sampling.batch_size=5")
    return out


def test_angles_stand_in_the_manifest(files, perturbed):
    lines = manifest(perturbed)
    columns = ["file", "identity", "index", "seed", "switch_t", "sha256", "angle"]
    assert all(list(line) == columns for line in lines)
    contexts = np.load(files / "contexts.npy")
    contexts /= np.linalg.norm(contexts, axis=1, keepdims=True)
    bounds = dict(zip(sorted({line["identity"] for line in lines}), lower_bounds(contexts, contexts, 0.6), strict=True))
    assert all(0 <= line["angle"] <= np.arccos(bounds[line["identity"]]) for line in lines)
    assert len({line["angle"] for line in lines}) == 12


def test_noise_stays_and_the_context_turns(files, perturbed, tmp_path):
    run(files, tmp_path / "plain", *FAST)
    assert [line["seed"] for line in manifest(tmp_path / "plain")] == [line["seed"] for line in manifest(perturbed)]
    assert "angle" not in manifest(tmp_path / "plain")[0]
    plain, turned = images(tmp_path / "plain"), images(perturbed)
    differences = [np.abs(plain[name] - turned[name]).mean() for name in plain]
    assert max(differences) > 2
    # a bound of 1 turns nothing: the same noise, the same context, the same images
    run(files, tmp_path / "one", "sampling.perturbation.lower_bound=1", *FAST)
    assert close(images(tmp_path / "one"), plain)
    assert {line["angle"] for line in manifest(tmp_path / "one")} == {0}


def test_batch_size_number_of_people_and_resuming_leave_an_image_alone(files, perturbed, tmp_path):
    out = tmp_path / "out"
    run(files, out, ON, *FAST, "sampling.batch_size=1", "sampling.n_contexts=1")
    assert run(files, out, ON, *FAST, "sampling.n_contexts=2")["drawn"] == 3
    assert close(images(out), {k: v for k, v in images(perturbed).items() if k[:5] in ("00000", "00001")})
    assert [line["angle"] for line in manifest(out)] == [line["angle"] for line in manifest(perturbed)][:6]
    with pytest.raises(UserError, match=r"sampling.perturbation.lower_bound: null, before 0\.6"):
        run(files, out, *FAST)


def test_uniform_contexts_cannot_grow(files, tmp_path):
    words = (ON, *FAST, "sampling.contexts_file=null", "sampling.n_samples_per_context=1")
    run(files, tmp_path, "sampling.n_contexts=2", *words)
    with pytest.raises(UserError, match=r"sampling\.n_contexts: 3, before 2"):
        run(files, tmp_path, "sampling.n_contexts=3", *words)


@pytest.mark.parametrize(
    "choice", [["sampler=two_stage"], ["sampler=two_stage_fixed"], ["sampler=ddim", "sampler.eta=1"]]
)
def test_every_sampler_takes_it(files, tmp_path, monkeypatch, choice):
    """The contexts that reach the sampler are those that the manifest tells of."""
    drawn: dict[tuple[str, int], torch.Tensor] = {}
    original = FaceDrawer.draw

    def draw(drawer: FaceDrawer, jobs: Iterable[Job]) -> Iterator[Drawn]:
        jobs = list(jobs)
        drawn.update({job.key: job.context for job in jobs})
        return original(drawer, jobs)

    monkeypatch.setattr(FaceDrawer, "draw", draw)
    words = ("sampling.n_contexts=2", "sampling.n_samples_per_context=2", *choice)
    run(files, tmp_path / "on", ON, *words)
    assert len(images(tmp_path / "on")) == 4
    lines, contexts = manifest(tmp_path / "on"), np.load(files / "contexts.npy")
    own = contexts[[int(line["identity"]) for line in lines]]
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    contexts = torch.stack([drawn[line["identity"], line["index"]] for line in lines]).numpy()
    cosines = (contexts * own).sum(axis=1)
    np.testing.assert_allclose(np.arccos(cosines), [line["angle"] for line in lines], atol=1e-4)
    fixed = json.loads((tmp_path / "on" / "dataset.json").read_text())["settings"]
    assert fixed["sampling.perturbation.lower_bound"] == 0.6


@pytest.mark.parametrize(
    ("model", "bound", "message"),
    [
        ({"is_context_conditional": False, "condition_type": "AdaGN"}, 0.6, "0.6, but the model takes no context"),
        ({"n_context_classes": 5}, 0.6, "0.6, but the model takes classes"),
        ({}, 1.2, "1.2; a cosine from 0 to 1"),
        ({}, -0.1, "-0.1; a cosine from 0 to 1"),
    ],
)
def test_mistakes(model, bound, message):
    unet = ConditionalUNet(**{**{k: v for k, v in MODEL.items() if k != "_target_"}, **model})
    check_perturbation(PerturbationSettings(None), unet)
    with pytest.raises(UserError, match=rf"sampling\.perturbation\.lower_bound: {message}"):
        check_perturbation(PerturbationSettings(bound), unet)


def test_a_bound_that_is_no_number(files, tmp_path):
    with pytest.raises(UserError, match=r"sampling\.perturbation: "):
        run(files, tmp_path, "sampling.perturbation.lower_bound=high", *FAST)
