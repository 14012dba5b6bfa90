"""Heads: published numbers, running statistics, random margins, configurations, settings that cannot work."""

import math

import pytest
import torch
import torch.nn.functional as F

from recognition import heads
from recognition.heads import AdaFace, ArcFace, CosFace, CurricularFace, ElasticFaceArc, ElasticFaceCos, Softmax
from tests.compat import load_arrays, relative_error
from utils.config import CONFIG_DIR, UserError, instantiate


@pytest.mark.parametrize("head_class", [ArcFace, CosFace])
def test_logits_and_loss_are_the_published_ones(head_class) -> None:
    arrays = {name: torch.from_numpy(array) for name, array in load_arrays("margin_heads").items()}
    head = head_class(32, 10)
    head.weight.data = arrays["kernel"].T.contiguous()
    logits = head(arrays["features"], arrays["labels"])
    name = head_class.__name__
    assert relative_error(logits.detach(), arrays[f"{name}_logits"]) < 1e-5
    assert F.cross_entropy(logits, arrays["labels"]).item() == pytest.approx(arrays[f"{name}_loss"].item(), rel=1e-5)


def target_at(head, angles: torch.Tensor) -> torch.Tensor:
    """Target logits (B,) without scale at the angles (B,) to the own class."""
    return head.target_logit(angles.cos(), torch.full_like(angles, 20.0), None)


@pytest.mark.parametrize("head", [ArcFace(3, 2), ElasticFaceArc(3, 2).eval(), CurricularFace(3, 2)])
def test_targets_fall_with_the_angle_all_the_way(head) -> None:
    out = target_at(head, torch.linspace(0, math.pi, 200))
    assert (out[1:] < out[:-1]).all()


def test_easy_margin_by_hand() -> None:
    out = target_at(ArcFace(3, 2, margin=0.5, easy_margin=True), torch.tensor([0.3, 1.5, 1.6, 3.0]))
    expected = [math.cos(0.8), math.cos(2.0), math.cos(1.6), math.cos(3.0)]
    assert torch.allclose(out, torch.tensor(expected), atol=1e-6)


def test_softmax_normalises_nothing() -> None:
    head = Softmax(2, 2)
    head.weight.data = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    assert head(torch.tensor([[2.0, 4.0]]), torch.tensor([0])).tolist() == [[10.0, -4.0]]


# Running statistics


def test_curricularface_follows_the_mean_cosine_in_training_only() -> None:
    head = CurricularFace(3, 2, t_alpha=0.1)
    head.observe(torch.tensor([0.2, 0.4]), torch.ones(2))
    assert head.t.item() == pytest.approx(0.03)
    head.observe(torch.tensor([0.8, 0.8]), torch.ones(2))
    assert head.t.item() == pytest.approx(0.9 * 0.03 + 0.1 * 0.8)
    head.eval().observe(torch.ones(2), torch.ones(2))
    assert head.t.item() == pytest.approx(0.107)
    assert list(head.state_dict()) == ["weight", "t"]


def test_adaface_follows_the_norms_in_training_only() -> None:
    head = AdaFace(3, 2, t_alpha=0.1)
    assert (head.norm_mean, head.norm_std) == (20.0, 100.0)
    head.observe(torch.zeros(2), torch.tensor([10.0, 500.0]))  # 500 counts as 100
    assert head.norm_mean.item() == pytest.approx(0.9 * 20 + 0.1 * 55)
    assert head.norm_std.item() == pytest.approx(0.9 * 100 + 0.1 * math.sqrt(2 * 45**2))
    before = [buffer.clone() for buffer in head.buffers()]
    head.observe(torch.zeros(1), torch.tensor([30.0]))  # one norm has no deviation
    head.eval().observe(torch.zeros(2), torch.tensor([1.0, 2.0]))
    assert all(torch.equal(a, b) for a, b in zip(before, head.buffers(), strict=True))
    assert list(head.state_dict()) == ["weight", "norm_mean", "norm_std"]


def test_adaface_goes_from_arcface_to_a_cosine_margin_of_twice_m_with_the_norm() -> None:
    head = AdaFace(3, 2, margin=0.4, h=0.5)
    head.norm_std.fill_(5.0)
    angle = torch.full((4,), 1.0)
    out = head.target_logit(angle.cos(), torch.tensor([1.0, 20.0, 25.0, 90.0]), None)
    expected = [math.cos(1.4), math.cos(1.0) - 0.4, math.cos(0.8) - 0.6, math.cos(0.6) - 0.8]  # z = -1, 0, 0.5, 1
    assert torch.allclose(out, torch.tensor(expected), atol=1e-4)


def test_norms_get_no_gradient() -> None:
    head, norms = AdaFace(3, 2), torch.tensor([10.0, 30.0], requires_grad=True)
    cosine = torch.tensor([0.2, 0.3], requires_grad=True)
    head.target_logit(cosine, norms, None).sum().backward()
    assert norms.grad is None and (cosine.grad > 0).all()


# Random margins


def margins_of(head, cosine: torch.Tensor, seed: int | None) -> torch.Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return cosine - head.target_logit(cosine, torch.ones_like(cosine), generator)


@pytest.mark.parametrize("head_class", [ElasticFaceArc, ElasticFaceCos])
@pytest.mark.parametrize("plus", [False, True])
def test_a_seed_fixes_the_margins_whatever_the_default_generator(head_class, plus: bool) -> None:
    head, cosine = head_class(3, 2, plus=plus), torch.linspace(-0.2, 0.7, 16)
    torch.manual_seed(0)
    first, state = margins_of(head, cosine, 1), torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(margins_of(head, cosine, 1), first)
    assert not torch.equal(margins_of(head, cosine, 2), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # a generator that was given is the only one that moves
    by_default = margins_of(head, cosine, None)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert torch.equal(margins_of(head, cosine, None), by_default)


def test_margins_are_normal_around_m_and_m_outside_training() -> None:
    head, cosine = ElasticFaceCos(3, 2, margin=0.35, sigma=0.05), torch.zeros(20000)
    drawn = margins_of(head, cosine, 0)
    assert drawn.mean().item() == pytest.approx(0.35, abs=0.002)
    assert drawn.std().item() == pytest.approx(0.05, abs=0.001)
    assert (drawn.sub(0.35).abs() < 0.05).float().mean().item() == pytest.approx(0.683, abs=0.01)
    assert torch.equal(margins_of(head.eval(), cosine, 0), torch.full_like(cosine, 0.35))


def test_plus_gives_the_hardest_sample_the_largest_margin() -> None:
    cosine = torch.tensor([0.3, -0.5, 0.8, 0.1, 0.6])
    plain, plus = (margins_of(ElasticFaceCos(3, 2, plus=value), cosine, 4) for value in (False, True))
    assert torch.allclose(plus.sort().values, plain.sort().values, atol=1e-6)
    assert plus.argsort(descending=True).tolist() == cosine.argsort().tolist() == [1, 3, 0, 4, 2]


# Configurations and errors

CONFIGS = {
    "adaface": {"scale": 64.0, "margin": 0.4, "h": 0.333, "t_alpha": 0.01},
    "arcface": {"scale": 64.0, "margin": 0.5, "easy_margin": False},
    "arcface_easy": {"scale": 64.0, "margin": 0.5, "easy_margin": True},
    "arcface_small": {"scale": 32.0, "margin": 0.3, "easy_margin": False},
    "cosface": {"scale": 64.0, "margin": 0.4},
    "curricularface": {"scale": 64.0, "margin": 0.5, "t_alpha": 0.01},
    "elasticface_arc": {"scale": 64.0, "margin": 0.5, "sigma": 0.05, "plus": False},
    "elasticface_arc_plus": {"scale": 64.0, "margin": 0.5, "sigma": 0.0175, "plus": True},
    "elasticface_cos": {"scale": 64.0, "margin": 0.35, "sigma": 0.05, "plus": False},
    "elasticface_cos_plus": {"scale": 64.0, "margin": 0.35, "sigma": 0.02, "plus": True},
    "normface": {"scale": 64.0},
    "softmax": {"scale": 1.0},
}


def test_every_configuration_is_listed_and_every_head_has_one(compose) -> None:
    assert sorted(path.stem for path in (CONFIG_DIR / "head").glob("*.yaml")) == sorted(CONFIGS)
    targets = {compose("recognition_train_config", f"head={name}").head._target_.split(".")[-1] for name in CONFIGS}
    assert targets == set(heads.__all__) - {"CosineHead", "embedding_norms"}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_hold_the_published_values(compose, name: str) -> None:
    config = compose("recognition_train_config", f"head={name}").head
    head = instantiate(config, "head", in_features=4, num_classes=3)
    assert head.weight.shape == (3, 4)
    assert {key: getattr(head, key) for key in CONFIGS[name]} == CONFIGS[name]
    published = instantiate({"_target_": config._target_}, "head", in_features=4, num_classes=3)
    if name not in ("arcface_easy", "arcface_small", "elasticface_arc_plus", "elasticface_cos_plus"):
        assert {key: getattr(published, key) for key in CONFIGS[name]} == CONFIGS[name]


def test_one_identity_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes: 1"):
        ArcFace(8, 1)


@pytest.mark.parametrize(
    ("head_class", "kwargs", "message"),
    [
        (ArcFace, {"scale": 0}, r"head\.scale: 0; a number above 0"),
        (CosFace, {"scale": float("nan")}, r"head\.scale: nan; a number above 0"),
        (heads.NormFace, {"scale": "64"}, r"head\.scale: '64'"),
        (ArcFace, {"margin": 3.2}, r"head\.margin: 3\.2; a number from 0 to pi"),
        (CosFace, {"margin": -0.1}, r"head\.margin: -0\.1"),
        (AdaFace, {"margin": None}, r"head\.margin: None"),
        (CurricularFace, {"margin": True}, r"head\.margin: True"),
        (ArcFace, {"easy_margin": 1}, r"head\.easy_margin: 1; true or false"),
        (ElasticFaceArc, {"sigma": 0.0}, r"head\.sigma: 0\.0; a number above 0"),
        (ElasticFaceCos, {"plus": "yes"}, r"head\.plus: 'yes'; true or false"),
        (ElasticFaceCos, {"margin": 4}, r"head\.margin: 4"),
        (AdaFace, {"h": -1}, r"head\.h: -1; a number above 0"),
        (AdaFace, {"t_alpha": 0}, r"head\.t_alpha: 0; a number above 0 and at most 1"),
        (CurricularFace, {"t_alpha": 1.5}, r"head\.t_alpha: 1\.5"),
    ],
)
def test_settings_that_cannot_work_are_named(head_class, kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        head_class(4, 3, **kwargs)
