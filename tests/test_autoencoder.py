"""VQ autoencoder: published names and numbers, quantiser, codebook upkeep, files."""

import math

import pytest
import torch
import yaml

from models.autoencoder.modules import Encoder
from models.autoencoder.quantization import (
    VectorQuantizer,
    kmeans_codebook,
    nearest_codes,
    perplexity,
    revive_dead_codes,
)
from models.autoencoder.vqgan import (
    FFHQ256_DDCONFIG,
    VQDecoder,
    VQEncoder,
    VQModel,
    load_decoder,
    load_encoder,
    save_autoencoder,
)
from tests.compat import deterministic_tensor, fill_deterministic, load_arrays, load_json, load_shapes, relative_error
from utils.checkpoint import save_safetensors
from utils.config import CONFIG_DIR, UserError

TINY = {**FFHQ256_DDCONFIG, "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "resolution": 32}


@pytest.fixture(scope="module")
def small():
    """The reference arrays and both halves on deterministic weights."""
    config = load_json("tiny_config")["vq_small"]
    encoder = fill_deterministic(VQEncoder(ddconfig=config["ddconfig"], embed_dim=config["embed_dim"]))
    decoder = fill_deterministic(VQDecoder(**config))
    return {key: torch.as_tensor(value) for key, value in load_arrays("vq_small").items()}, encoder, decoder


@pytest.mark.parametrize(("half", "cls"), [("encoder", VQEncoder), ("decoder", VQDecoder)])
def test_published_names_and_shapes(half, cls):
    with torch.device("meta"):
        module = cls()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == load_shapes(f"first_stage_{half}_state_dict")


def test_published_size_is_what_the_config_file_describes():
    config = yaml.safe_load((CONFIG_DIR / "autoencoder" / "vq_f4.yaml").read_text())
    assert config == {"ddconfig": FFHQ256_DDCONFIG, "n_embed": 8192, "embed_dim": 3}


@torch.no_grad()
def test_reference_numbers(small):
    arrays, encoder, decoder = small
    latents = encoder(arrays["image"])
    assert relative_error(latents, arrays["latent"]) < 1e-4
    quantized = decoder.quantize(arrays["latent"])
    assert torch.equal(quantized.indices, arrays["indices"])
    assert relative_error(quantized.latents, arrays["quantized"]) < 1e-4
    assert quantized.loss.item() == pytest.approx(arrays["commitment_loss"].item(), rel=1e-4)
    assert relative_error(decoder(latents), arrays["decoded"]) < 1e-4
    assert relative_error(decoder(latents, quantize=False), arrays["decoded_without_quantization"]) < 1e-4


@torch.no_grad()
def test_joined_model_equals_its_halves(small):
    arrays, encoder, decoder = small
    config = load_json("tiny_config")["vq_small"]
    model = fill_deterministic(VQModel(**config))
    assert set(model.state_dict()) == set(encoder.state_dict()) | set(decoder.state_dict())
    output = model(arrays["image"])
    assert torch.equal(output.latents, encoder(arrays["image"]))
    assert torch.equal(output.images, decoder(output.latents))
    assert output.indices.shape == (2 * 16 * 16,)


def test_quantizer_straight_through_and_loss():
    quantizer = VectorQuantizer(n_embed=2, embed_dim=1)
    quantizer.embedding.weight.data = torch.tensor([[0.0], [1.0]])
    z = torch.tensor([0.2, 0.9]).view(1, 1, 1, 2).requires_grad_()
    quantized = quantizer(z)
    assert quantized.indices.tolist() == [0, 1]
    assert torch.equal(quantized.latents.detach().flatten(), torch.tensor([0.0, 1.0]))
    # ((0.2)^2 + (0.1)^2) / 2 at the latents' term and a quarter of it at the codebook's
    assert quantized.loss.item() == pytest.approx(1.25 * 0.025)
    (gradient,) = torch.autograd.grad(quantized.latents.sum(), z, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(z))
    quantized.loss.backward()
    assert torch.allclose(z.grad.flatten(), torch.tensor([0.2, -0.1]))
    assert torch.allclose(quantizer.embedding.weight.grad.flatten(), 0.25 * torch.tensor([-0.2, 0.1]))


def test_nearest_codes_match_the_full_distance_table_across_chunks():
    generator = torch.Generator().manual_seed(0)
    rows, codes = torch.randn(3000, 3, generator=generator), torch.randn(4096, 3, generator=generator)
    nearest = nearest_codes(rows, codes)  # 1024 rows a chunk
    table = (rows[:, None].double() - codes.double()).square().sum(-1)
    chosen = table.gather(1, nearest[:, None]).flatten()
    assert torch.allclose(chosen, table.min(dim=1).values, atol=1e-6)
    assert nearest_codes(torch.zeros(1, 3), torch.zeros(4, 3)).item() == 0


def test_kmeans_finds_separate_groups_and_copes_with_few_rows():
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    rows = (centres[:, None] + 0.1 * torch.randn(3, 200, 2, generator=generator)).flatten(0, 1)
    codes = kmeans_codebook(rows, 24, generator=generator, iterations=10)
    distance = (rows - codes[nearest_codes(rows, codes)]).norm(dim=1)
    assert distance.mean() < 0.1  # 24 codes within groups of deviation 0.1
    few = kmeans_codebook(rows[:5], 16, generator=generator, iterations=0)
    assert few.shape == (16, 2) and len(few.unique(dim=0)) == 16


def test_dead_codes_are_redrawn_from_latents():
    codebook, average = torch.zeros(4, 2), torch.ones(4, 2)
    counts, rows = torch.tensor([5, 0, 1, 0]), torch.tensor([[7.0, 8.0]])
    assert revive_dead_codes(counts, rows, [codebook, average], torch.Generator().manual_seed(0)) == 2
    assert codebook.tolist() == [[0, 0], [7, 8], [0, 0], [7, 8]]
    assert average.tolist() == [[1, 1], [7, 8], [1, 1], [7, 8]]
    assert revive_dead_codes(torch.ones(4), rows, [codebook], torch.Generator()) == 0


@torch.no_grad()
def test_shifting_the_latents_changes_nothing_else():
    model = fill_deterministic(VQModel(TINY, n_embed=64, embed_dim=3))
    images, offset = deterministic_tensor("images", (1, 3, 32, 32)), torch.tensor([0.5, -1.0, 2.0])
    before = model(images)
    model.shift_latents(offset)
    after = model(images)
    assert torch.allclose(after.latents, before.latents + offset.view(1, 3, 1, 1), atol=1e-5)
    assert torch.equal(after.indices, before.indices)
    assert relative_error(after.images, before.images) < 1e-4


def test_perplexity():
    assert perplexity(torch.tensor([3, 3, 3, 3])) == pytest.approx(4.0)
    assert perplexity(torch.tensor([5, 0, 0, 0])) == pytest.approx(1.0)
    assert perplexity(torch.tensor([3, 1])) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_files_round_trip(tmp_path):
    model = fill_deterministic(VQModel(TINY, n_embed=16, embed_dim=3))
    paths = save_autoencoder(model, tmp_path, latent_scale=2.5)
    assert [path.name for path in paths] == ["vq_encoder.safetensors", "vq_decoder.safetensors"]
    encoder, decoder = load_encoder(paths[0]), load_decoder(paths[1])
    assert encoder.latent_scale == decoder.latent_scale == 2.5
    assert not encoder.training and not any(p.requires_grad for p in decoder.parameters())
    images = deterministic_tensor("images", (1, 3, 16, 16))
    assert torch.equal(decoder(encoder(images)), model(images).images)


def test_published_files_load_strictly(tmp_path):
    shapes = load_shapes("first_stage_encoder_state_dict")
    state = {f"module.{name}": torch.full(shape, 0.5) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "first_stage_encoder_state_dict.pt")
    encoder = load_encoder(tmp_path / "first_stage_encoder_state_dict.pt")
    assert encoder.latent_scale == 1.0
    assert all((p == 0.5).all() for p in encoder.parameters())
    del state["module.quant_conv.bias"]
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(UserError, match=r"short.pt: does not fit VQEncoder: 1 missing \(quant_conv.bias\)"):
        load_encoder(tmp_path / "short.pt")


def test_wrong_files_are_named(tmp_path):
    encoder_path, _ = save_autoencoder(VQModel(TINY, n_embed=16, embed_dim=3), tmp_path, latent_scale=1.0)
    with pytest.raises(UserError, match="looks like a VQ encoder written by this project, a VQ decoder is wanted"):
        load_decoder(encoder_path)
    with pytest.raises(UserError, match="no such autoencoder file"):
        load_encoder(tmp_path / "missing.safetensors")
    save_safetensors({"weight": torch.zeros(1)}, tmp_path / "other.safetensors", {"kind": "recognition_backbone"})
    with pytest.raises(UserError, match=r"looks like a recognition backbone .*, a VQ encoder is wanted"):
        load_encoder(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ch": 48}, "48 channels, a width of ch . ch_mult, are not a multiple of 32"),
        ({"double_z": True}, "double_z"),
        ({"resolution": 30}, "30 cannot be halved 2 times"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Encoder(**{**TINY, **change})


def test_group_norms_follow_norm_groups():
    encoder = Encoder(**{**TINY, "ch": 16, "norm_groups": 4})
    assert {(m.num_groups, m.eps) for m in encoder.modules() if isinstance(m, torch.nn.GroupNorm)} == {(4, 1e-6)}
    encoder = Encoder(**{**TINY, "ch": 16})
    assert {m.num_groups for m in encoder.modules() if isinstance(m, torch.nn.GroupNorm)} == {16, 32}


def test_attention_stands_where_the_resolution_says():
    encoder = Encoder(**{**TINY, "attn_resolutions": [16]})
    assert [len(level.attn) for level in encoder.down] == [0, 1, 0]
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 8, 8)
