"""The UNet against the published parameter names and numbers, and the behaviour of contexts and attention maps."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf

from diffusion.attention_maps import AggregatedMap, map_change
from models.diffusion.attention import AttentionControl, SelfAttentionBlock, blend_maps
from models.diffusion.blocks import CONDITION_TYPES, ResidualBlock
from models.diffusion.context import PreparedContext
from models.diffusion.group_norm import GroupNorm
from models.diffusion.unet import ConditionalUNet
from tests.compat import fill_deterministic, load_arrays, load_json, load_shapes, relative_error
from utils.config import UserError

CONFIGS = Path(__file__).parents[1] / "configs" / "model"
SMALL = dict(
    initial_channels=32,
    channel_multipliers=[1, 1],
    is_attention=[False, True],
    n_blocks_per_resolution=1,
    context_input_channels=8,
    context_channels=32,
)


def small_unet(**settings) -> ConditionalUNet:
    return fill_deterministic(ConditionalUNet(**{**SMALL, **settings}))


def small_inputs(batch_size: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, 3, 8, 8, generator=generator)
    return x, torch.arange(batch_size) * 300, torch.randn(batch_size, 8, generator=generator)


# ------------------------------------------------------------------------------------------------- published numbers


@pytest.fixture(scope="module")
def published():
    unet = fill_deterministic(ConditionalUNet(**load_json("tiny_config")["unet_tiny"]))
    return unet, {name: torch.from_numpy(array) for name, array in load_arrays("unet_tiny").items() if array.ndim}


@torch.no_grad()
def test_published_predictions(published):
    unet, arrays = published
    x, t, context = arrays["x"], arrays["t"], arrays["context"]
    assert relative_error(unet(x, t, context), arrays["eps_cond"]) < 1e-5
    assert relative_error(unet(x, t), arrays["eps_empty"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "blend_cross", "is_mixed"),
    [("eps_injected", True, False), ("eps_self_injected", False, False), ("eps_mixed", False, True)],
)
def test_published_predictions_with_injection(published, name, blend_cross, is_mixed):
    unet, arrays = published
    x, t, context = (arrays[key].repeat(2, *[1] * (arrays[key].ndim - 1)) for key in ("x", "t", "context"))
    second_half_empty = ~arrays["flag"] if is_mixed else torch.zeros(3, dtype=torch.bool)
    maps = AggregatedMap((16, 16))
    second_half = torch.arange(6) >= 3
    control = AttentionControl(torch.arange(3).repeat(2), second_half & blend_cross, maps.add)
    empty_mask = torch.cat([torch.ones(3, dtype=torch.bool), second_half_empty])
    eps = unet(x, t, context, empty_mask=empty_mask, control=control)
    assert relative_error(eps[:3], arrays["eps_empty"]) < 1e-5
    assert relative_error(eps[3:], arrays[name]) < 1e-5
    if is_mixed:
        h = maps.h()
        assert relative_error(h[:3], arrays["attn_map_empty"]) < 1e-4
        assert relative_error(h[3:], arrays["attn_map_mixed"]) < 1e-4


@pytest.mark.parametrize(
    ("config", "published_name", "cpd", "unconditioned"),
    [
        ("unet_cond_ca_cpd25_uncond20", "unet_cond_ca_cpd25_uncond20", 0.25, 0.2),
        ("unet_cond_ca", "unet_cond_ca_cpd25", 0, 0),
        ("unet_cond_ca_cpd25", "unet_cond_ca_cpd25", 0.25, 0),
        ("unet_cond_ca_cpd50", "unet_cond_ca_cpd25", 0.5, 0),
        ("unet_cond_adagn", "unet_cond_adagn", 0, 0),
        ("unet_cond_adagn_cpd25", "unet_cond_adagn", 0.25, 0),
        ("unet_cond_adagn_cpd50", "unet_cond_adagn", 0.5, 0),
        ("unet_uncond_adagn", "unet_uncond_adagn", 0, 0),
    ],
)
def test_configs_have_published_parameters(config, published_name, cpd, unconditioned):
    with torch.device("meta"):
        unet = instantiate(OmegaConf.load(CONFIGS / f"{config}.yaml"))
    assert {name: tuple(value.shape) for name, value in unet.state_dict().items()} == load_shapes(published_name)
    assert (unet.context_dropout_probability, unet.unconditioned_probability) == (cpd, unconditioned)


def test_every_model_config_is_tested():
    tested = test_configs_have_published_parameters.pytestmark[0].args[1]
    assert {path.stem for path in CONFIGS.glob("*.yaml") if "_target_: models.diffusion.unet" in path.read_text()} >= {
        name for name, *_ in tested
    }


def test_published_size():
    with torch.device("meta"):
        unet = instantiate(OmegaConf.load(CONFIGS / "unet_cond_ca_cpd25_uncond20.yaml"))
    assert sum(parameter.numel() for parameter in unet.parameters()) == pytest.approx(216.3e6, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("condition_type", CONDITION_TYPES)
@pytest.mark.parametrize("is_conditional", [True, False])
def test_residual_block_formula(condition_type, is_conditional):
    block = fill_deterministic(ResidualBlock(32, 64, 16, condition_type, 8 if is_conditional else None))
    generator = torch.Generator().manual_seed(1)
    x, time, context = (torch.randn(s, generator=generator) for s in ((2, 32, 4, 4), (2, 16), (2, 8)))
    state = block.state_dict()

    def linear(name, value):
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, value):
        return F.group_norm(value, 32, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(name, value, padding):
        return F.conv2d(value, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    h = conv("conv1", F.silu(norm("norm1", x)), 1)
    t = linear("time_emb.1", F.silu(time))
    c = linear("context_emb.1", F.silu(context)) if is_conditional and condition_type != "CA" else torch.zeros_like(t)
    assert ("context_emb.1.weight" in state) == (is_conditional and condition_type != "CA")
    if condition_type == "AddPlusGN":
        h = norm("norm2", h + (t + c)[..., None, None])
    else:
        e = t + c if condition_type == "AdaGN" else t
        scale, shift = linear("scale_emb", e)[..., None, None], linear("shift_emb", e)[..., None, None]
        h = (1 + scale) * norm("norm2.norm", h) + shift
        if condition_type == "DiffAE" and is_conditional:
            h = h * c[..., None, None]
    expected = conv("conv2", F.silu(h), 1) + conv("shortcut", x, 0)
    terms = block.time_terms(time)
    assert relative_error(block(x, terms, context if is_conditional else None), expected) < 1e-5


def test_self_attention_formula_with_its_own_and_with_injected_weights():
    block = fill_deterministic(SelfAttentionBlock(64, heads=2, head_channels=32))
    x = torch.randn(2, 64, 3, 5, generator=torch.Generator().manual_seed(1))
    state = block.state_dict()
    h = F.group_norm(x, 32, state["norm.weight"], state["norm.bias"]).flatten(2)  # (B, C, N)
    q, k, v = (
        F.conv1d(h, state[f"attention.to_{n}.weight"], state[f"attention.to_{n}.bias"]).view(2, 2, 32, 15)
        for n in "qkv"
    )
    logits = torch.einsum("bhdq,bhdk->bhqk", q, k) / 32**0.5
    attended = torch.einsum("bhqk,bhdk->bhdq", logits.softmax(-1), v).reshape(2, 64, 15)
    out = F.conv1d(attended, state["attention.proj_out.weight"], state["attention.proj_out.bias"])
    expected = x + out.view_as(x)

    assert relative_error(block(x, None), expected) < 1e-5
    second_of_first = torch.einsum("bhqk,bhdk->bhdq", logits.softmax(-1)[[0, 0]], v).reshape(2, 64, 15)
    out = F.conv1d(second_of_first, state["attention.proj_out.weight"], state["attention.proj_out.bias"])
    control = AttentionControl(torch.tensor([0, 0]), torch.tensor([False, False]))
    assert relative_error(block(x, None, control), x + out.view_as(x)) < 1e-5


def test_blended_map_statistics():
    generator = torch.Generator().manual_seed(0)
    own, source = torch.randn(2, 3, 4, 16, generator=generator), 2 + 3 * torch.randn(2, 3, 4, 16, generator=generator)
    maps = torch.cat([own, source])
    blended = blend_maps(maps, torch.tensor([2, 3, 2, 3]))[:2]
    torch.testing.assert_close(blended.mean(-1), (own.mean(-1) + source.mean(-1)) / 2)
    torch.testing.assert_close(blended.std(-1), (own.std(-1) + source.std(-1)) / 2)
    assert torch.equal(blended.argsort(-1), own.argsort(-1))
    torch.testing.assert_close(blend_maps(maps, torch.arange(4)), maps)


def test_no_blending_is_blending_of_no_row():
    unet = small_unet().eval()
    x, t, context = small_inputs()
    source = torch.arange(len(x)) // 2 * 2
    with torch.no_grad():
        told = unet(x, t, context, control=AttentionControl(source, torch.zeros(len(x), dtype=torch.bool)))
        assert torch.equal(unet(x, t, context, control=AttentionControl(source)), told)


@pytest.mark.parametrize("side", [4, 32])  # either kernel
def test_group_norm_in_half_precision_sums_in_float32(side):
    norm = GroupNorm(64)
    torch.nn.init.normal_(norm.weight)
    x = (3 + torch.randn(2, 64, side, side, generator=torch.Generator().manual_seed(0))).bfloat16()
    found = norm(x.to(memory_format=torch.channels_last))
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(found.float(), norm(x.float())) < 3e-3


def test_a_new_network_predicts_zero():
    unet = ConditionalUNet(**SMALL)
    assert unet(*small_inputs()).abs().max() == 0


# ---------------------------------------------------------------------------------------------------------- contexts


@torch.no_grad()
@pytest.mark.parametrize("condition_type", CONDITION_TYPES)
def test_every_condition_type_reads_its_context(condition_type):
    # 64 channels: in groups of one channel the norm would take away what AddPlusGN adds
    unet = small_unet(condition_type=condition_type, initial_channels=64)
    x, t, context = small_inputs()
    eps = unet(x, t, context)
    assert eps.shape == x.shape
    assert relative_error(unet(x, t), eps) > 1e-4
    assert relative_error(unet(x, t, context.flip(0)), eps) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("condition_type", CONDITION_TYPES)
def test_unconditional(condition_type):
    unet = small_unet(condition_type=condition_type, is_context_conditional=False)
    x, t, context = small_inputs()
    assert unet(x, t).shape == x.shape
    assert not any("context" in name for name in unet.state_dict())
    with pytest.raises(ValueError, match="unconditional"):
        unet(x, t, context)


@torch.no_grad()
def test_class_contexts():
    unet = small_unet(n_context_classes=5)
    x, t, _ = small_inputs()
    assert unet.context_emb.weight.shape == (5, 32)
    assert relative_error(unet(x, t, torch.tensor([0, 1, 2])), unet(x, t, torch.tensor([0, 1, 3]))) > 1e-4
    with pytest.raises(ValueError, match=r"context: \(3,\) of torch.float32; this network takes \(3,\) integers"):
        unet(x, t, torch.zeros(3))


@torch.no_grad()
@pytest.mark.parametrize("learn_empty_context", [True, False])
def test_empty_mask_mixes_a_batch(learn_empty_context):
    unet = small_unet(learn_empty_context=learn_empty_context)
    x, t, context = small_inputs()
    mask = torch.tensor([True, False, True])
    mixed = unet(x, t, context, empty_mask=mask)
    torch.testing.assert_close(mixed[mask], unet(x, t)[mask])
    torch.testing.assert_close(mixed[~mask], unet(x, t, context)[~mask])


def test_the_empty_context_without_learning_is_zero_and_no_parameter():
    unet = small_unet(learn_empty_context=False)
    assert "empty_context_embedding" not in unet.state_dict()
    assert unet.embed_context(None, 2).abs().sum() == 0
    assert torch.equal(small_unet(learn_empty_context=True).embed_context(None, 2).std(dim=0), torch.zeros(32))


@torch.no_grad()
def test_element_mask_scales_the_survivors():
    unet = small_unet(context_dropout_probability=0.25)
    context = small_inputs()[2]
    keep = torch.rand(3, 32, generator=torch.Generator().manual_seed(0)) > 0.25
    embedding = unet.embed_context(context, 3)
    torch.testing.assert_close(unet.embed_context(context, 3, element_mask=keep), embedding * keep / 0.75)


@torch.no_grad()
def test_training_draws_masks_and_evaluation_does_not():
    unet = small_unet(context_dropout_probability=0.25, unconditioned_probability=0.2, learn_empty_context=True)
    context = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    plain = unet.embed_context(context, 4000)
    assert torch.equal(plain, unet.context_emb(context))

    unet.train()
    torch.manual_seed(0)
    drawn = unet.embed_context(context, 4000)
    is_empty = (drawn == unet.empty_context_embedding).all(dim=1)
    assert is_empty.float().mean().item() == pytest.approx(0.2, abs=0.03)
    rest, dropped = drawn[~is_empty], drawn[~is_empty] == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(rest[~dropped], (plain / 0.75)[~is_empty][~dropped])


def test_every_parameter_gets_a_gradient_whatever_is_drawn():
    unet = small_unet(learn_empty_context=True, unconditioned_probability=0.0).train()
    x, t, context = small_inputs()
    unet(x, t, context).square().mean().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())
    assert unet.empty_context_embedding.grad.abs().sum() == 0
    unet(x, t, context, empty_mask=torch.ones(3, dtype=torch.bool)).square().mean().backward()
    assert unet.empty_context_embedding.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("condition_type", ["CA", "AdaGN"])
def test_prepared_contexts_and_timesteps(condition_type):
    unet = small_unet(condition_type=condition_type, learn_empty_context=True)
    x, t, context = small_inputs()
    prepared = unet.prepare_context(context)
    torch.testing.assert_close(unet(x, t, prepared), unet(x, t, context))
    rows = [unet.prepare_context(context[row : row + 1]) for row in (2, 2, 0)]
    torch.testing.assert_close(unet(x, t, PreparedContext.stack(rows)), unet(x, t, context[[2, 2, 0]]))
    torch.testing.assert_close(unet(x, t, unet.prepare_context(None, 3)), unet(x, t))
    times = unet.prepare_time(torch.arange(1000))
    torch.testing.assert_close(unet(x, times.select(t), context), unet(x, t, context))
    with pytest.raises(ValueError, match="context: 3 contexts for a batch of 2"):
        unet(x[:2], t[:2], prepared)
    with pytest.raises(ValueError, match="empty_mask, element_mask"):
        unet(x, t, prepared, empty_mask=torch.ones(3, dtype=torch.bool))


@torch.no_grad()
def test_samples_do_not_mix_under_injection():
    unet = small_unet(learn_empty_context=True)
    x, t, context = small_inputs()

    def run(samples: list[int], is_empty: list[bool], source: list[int]) -> torch.Tensor:
        empty = torch.tensor(is_empty)
        control = AttentionControl(torch.tensor(source), ~empty)
        return unet(x[samples], t[samples], context[samples], empty_mask=empty, control=control)

    together = run([0, 0, 1, 2, 2], [True, False, True, True, False], [0, 0, 2, 3, 3])
    torch.testing.assert_close(together[[0, 2, 3]], unet(x, t))
    for row, sample in ((1, 0), (4, 2)):
        torch.testing.assert_close(together[row], run([sample] * 2, [True, False], [0, 0])[1])


@torch.no_grad()
def test_half_precision_stays_close():
    unet = small_unet()
    x, t, context = small_inputs()
    maps: list[torch.Tensor] = []
    source, blend = torch.tensor([0, 1, 0]), torch.tensor([False, False, True])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(unet(x, t, context).float(), unet(x, t, context).float()) == 0
        half = unet(x, t, context, control=AttentionControl(source, blend, maps.append))
    assert relative_error(half.float(), unet(x, t, context, control=AttentionControl(source, blend))) < 0.03
    assert len(maps) == 4 and all(logits.dtype == torch.float32 for logits in maps)


def aggregated(maps: list[torch.Tensor], image_size: tuple[int, int]) -> torch.Tensor:
    """h of the logits of every layer."""
    total = AggregatedMap(image_size)
    for logits in maps:
        total.add(logits)
    return total.h()


def test_aggregated_map_by_hand():
    # one head, one token: over 2 x 2 queries the softmax is (1, 1, 1, 3) / 6, divided by its maximum 1/3, 1/3, 1/3, 1
    logits = torch.tensor([1.0, 1.0, 1.0, 3.0]).log().view(1, 1, 4, 1)
    h = aggregated([logits, logits], (4, 4))
    assert h.shape == (1, 32, 32)
    assert [h[0, 0, 0].item(), h[0, -1, -1].item()] == pytest.approx([0.0, 1.0])
    assert h[0, 15, 31].item() == pytest.approx(
        15 / 32 - 0.5 / 32 + 1 / 64, abs=0.02
    )  # bilinear, half way down the side
    assert torch.equal(aggregated([torch.zeros(1, 1, 4, 1)], (4, 4)), torch.zeros(1, 32, 32))
    low = torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).log().view(1, 1, 9, 1)  # another resolution
    both = aggregated([logits, logits, low], (12, 12))
    assert [both[0, 0, 0].item(), both[0, -1, -1].item()] == pytest.approx([0.5, 1.0])  # 5/9 and 7/9 of 1/3 .. 7/9
    tall = aggregated([torch.rand(1, 2, 32, 3)], (16, 8))  # 8 x 4 queries
    assert tall.shape == (1, 32, 32)
    change = map_change(torch.stack([h[0], h[0]]), torch.stack([h[0], torch.zeros(32, 32)]))
    assert change.tolist() == pytest.approx([0.0, h.mean().item()])


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"condition_type": "ca"}, "condition_type: 'ca'; give one of CA, AdaGN, AddPlusGN, DiffAE"),
        ({"channel_multipliers": [1, 1, 2]}, "is_attention: 2 values for 3 channel_multipliers"),
        ({"initial_channels": 48}, "initial_channels: 48 .* multiple of 32"),
        ({"attention_head_channels": 24}, "attention_head_channels: 24 does not divide 32"),
        (
            {"attention_head_channels": 64, "channel_multipliers": [1, 2]},
            "attention_head_channels: 64 does not divide 32",
        ),
        ({"attention_heads": 0}, "attention_heads: 0"),
        ({"attention_heads": 3, "attention_head_channels": 16}, "attention_heads: 3 of 16 channels have a width of 48"),
        ({"n_blocks_per_resolution": 0}, "n_blocks_per_resolution: 0"),
        ({"context_channels": 40}, "context_channels: 40; give a multiple of 32"),
        ({"context_dropout_probability": 1.5}, "context_dropout_probability: 1.5"),
        ({"context_dropout_probability": 1}, "context_dropout_probability: 1 leaves nothing"),
        ({"unconditioned_probability": -0.1}, "unconditioned_probability: -0.1"),
        ({"n_context_classes": -1}, "n_context_classes: -1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        ConditionalUNet(**{**SMALL, **settings})


def test_wrong_inputs():
    unet = small_unet()
    x, t, context = small_inputs()
    with pytest.raises(ValueError, match=r"context: \(3, 5\) of torch.float32; this network takes \(3, 8\) floats"):
        unet(x, t, context[:, :5])
    with pytest.raises(ValueError, match=r"x: \(3, 3, 8, 7\); this network takes \(B, 3, H, W\) .* multiples of 2"):
        unet(x[..., :7], t, context)
