"""The autoencoder's training: losses, data, exact resume, world size, files, mistakes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import train_autoencoder
from models.autoencoder import training_loop
from models.autoencoder.data import DatasetSettings, Images, split_images
from models.autoencoder.evaluation import evaluate, fine_energy, measure_latents, ssim
from models.autoencoder.losses import PatchDiscriminator, adaptive_weight, hinge_discriminator_loss
from models.autoencoder.lpips import BLOCKS, LPIPS, load_lpips
from models.autoencoder.training_settings import TrainingSettings, adversarial_factor, lr_factor, share_done
from models.autoencoder.vqgan import VQModel, load_decoder, load_encoder
from tests.compat import fill_deterministic, relative_error
from utils.checkpoint import CheckpointFolder, load_safetensors, load_torch, save_torch
from utils.config import UserError, settings
from utils.ema import EMA
from utils.images import read_image, to_float, write_image

OVERRIDES = [
    "autoencoder=vq_f4_small",
    "autoencoder.ddconfig.ch=16",
    "autoencoder.ddconfig.ch_mult=[1,1,2]",
    "autoencoder.n_embed=32",
    "dataset.image_size=16",
    "dataset.validation_share=0.2",
    "training.steps=6",
    "training.batch_size=4",
    "training.num_workers=0",
    "training.optimizer.lr=1.0e-3",
    "training.warmup_steps=0",
    "training.quantization_start=2",
    "training.revive_codes_every=2",
    "training.discriminator_start=3",
    "training.discriminator_channels=16",
    "training.discriminator_layers=1",
    "training.steps_between_logging=2",
    "training.steps_between_checkpoints=2",
    "training.device=cpu",
]


@pytest.fixture
def run(compose, face_folder):
    """run(folder name, *overrides) -> metrics of a training run in face_folder / name."""

    def _run(name: str, *overrides: str) -> dict[str, float]:
        folders = (f"dataset.samples_root={face_folder / 'faces'}", f"output_dir={face_folder / name}")
        return train_autoencoder.main.__wrapped__(compose("train_autoencoder_config", *OVERRIDES, *folders, *overrides))

    return _run


def differing_keys(a: dict, b: dict, prefix: str = "") -> list[str]:
    """Keys, dotted, at which two nested checkpoints differ in any bit."""
    if a.keys() != b.keys():
        return [f"{prefix}{sorted(map(str, a.keys() ^ b.keys()))}"]
    found = []
    for key in a:
        if isinstance(a[key], dict):
            found += differing_keys(a[key], b[key], f"{prefix}{key}.")
        elif not (torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]):
            found.append(f"{prefix}{key}")
    return found


# Losses


def test_hinge_loss_numbers():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    # real: (0 + 0.5) / 2, fake: (0 + 1) / 2
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_adaptive_weight_is_the_ratio_of_gradient_norms(scale):
    layer = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight((layer**2).sum(), 0.5 * layer.sum(), layer, scale)
    assert weight.item() == pytest.approx(10.0 / (0.5 * math.sqrt(2.0) + 1e-4), rel=1e-5)
    assert not weight.requires_grad
    assert adaptive_weight(layer.sum() * 1e6, 0 * layer.sum(), layer).item() == 1e4


def test_each_network_has_an_optimiser_of_its_own(run, face_folder):
    """Resumed once, so that the rates are those of the configuration and not only of the checkpoint."""
    own = ("training.discriminator_optimizer.lr=3.0e-4", "training.discriminator_optimizer.betas=[0.9,0.99]")
    for steps in (4, 5):
        run("out", *own, "training.lr_schedule=constant", f"training.steps={steps}")
    state = load_torch(CheckpointFolder(face_folder / "out" / "checkpoints").paths()[-1])
    (network,), (discriminator,) = (state[name]["param_groups"] for name in ("optimizer", "optimizer_discriminator"))
    assert (network["lr"], discriminator["lr"]) == pytest.approx((1e-3, 3e-4))
    assert discriminator["betas"] == (0.9, 0.99)


def test_the_adversarial_weight_rises(compose):
    cfg = compose("train_autoencoder_config", "training.discriminator_start=10").training
    cfg = OmegaConf.masked_copy(cfg, [k for k in cfg if k not in train_autoencoder.GROUPS])
    at_once = settings(cfg, TrainingSettings, "t")
    assert [adversarial_factor(at_once, step) for step in (0, 9, 10, 11)] == [0, 0, 1, 1]
    rising = replace(at_once, discriminator_warmup=3)
    assert [adversarial_factor(rising, step) for step in (9, 10, 12, 13, 14)] == [0, 0.25, 0.75, 1, 1]
    assert adversarial_factor(replace(rising, discriminator_start=None), 100) == 0


def test_discriminator_sees_patches():
    net = PatchDiscriminator(channels=16, layers=2)
    images = torch.zeros(1, 3, 64, 64, requires_grad=True)
    logits = net(images)
    assert logits.shape == (1, 1, 14, 14)
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    # The receptive field of one logit, back to front; 70 with three layers, as published
    field = 1
    for convolution in reversed(convolutions):
        field = (field - 1) * convolution.stride[0] + convolution.kernel_size[0]
    assert field == 34


# Data


def test_split_is_disjoint_repeatable_and_without_excluded_identities(face_folder):
    (face_folder / "excluded.txt").write_text("id1\n\nid4\nnobody\n")
    dataset = DatasetSettings(str(face_folder / "faces"), 16, str(face_folder / "excluded.txt"), 0.25, True, True)
    training, validation = split_images(dataset, seed=0)
    assert (training, validation) == split_images(dataset, seed=0)
    assert len(validation) == 3 and len(training) == 9
    assert {name.split("/")[0] for name in training + validation} == {"id0", "id2", "id3", "id5"}
    assert not set(training) & set(validation)
    assert validation != split_images(dataset, seed=1)[1]


def test_images_in_memory_and_decoded_on_demand_are_the_same(face_folder):
    names = ["id0/0.png", "id3/2.png"]
    cached, decoded = (Images(face_folder / "faces", names, 32, cache) for cache in (True, False))
    assert cached.pixels is not None and decoded.pixels is None
    batch = cached.__getitems__([(1, False), (0, True)])
    assert torch.equal(batch, decoded.__getitems__([(1, False), (0, True)]))
    original = torch.from_numpy(read_image(face_folder / "faces" / names[0]))
    assert torch.equal(batch[1], original.flip(1))
    assert not torch.equal(batch[1], original)


# Measures


def test_evaluation_and_latent_statistics(face_folder):
    names = [f"id{i}/{k}.png" for i in range(6) for k in range(3)]
    images = Images(face_folder / "faces", names, 16, cache=True)
    config = {"ch": 16, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 3, "resolution": 16}
    model = fill_deterministic(VQModel(config, n_embed=16, embed_dim=3))
    real = to_float(images.pixels)
    with torch.no_grad():
        output = model(real)
    error = output.images.clamp(-1, 1) - real
    measured = evaluate(model, images, batch_size=5, device=torch.device("cpu"))
    assert measured["l1"] == pytest.approx(error.abs().mean().item(), rel=1e-5)
    psnr = 10 * torch.log10(4 / error.square().mean(dim=(1, 2, 3)))
    assert measured["psnr"] == pytest.approx(psnr.mean().item(), rel=1e-5)
    mean, std = measure_latents(model, images, batch_size=5, device=torch.device("cpu"))
    rows = output.latents.permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.allclose(mean, rows.mean(dim=0), atol=1e-5)
    assert std == pytest.approx((rows - rows.mean(dim=0)).square().mean().sqrt().item(), rel=1e-5)


def test_learning_rate_follows_steps_or_minutes(compose):
    cfg = compose("train_autoencoder_config", "dataset.samples_root=x").training
    cfg = settings(
        OmegaConf.masked_copy(cfg, [k for k in cfg if k not in train_autoencoder.GROUPS]), TrainingSettings, "t"
    )
    cfg = replace(cfg, steps=100, max_minutes=10.0, warmup_steps=3, lr_schedule="cosine")
    share, factor = share_done, lr_factor
    assert share(cfg, 50, 2.0) == 0.5
    assert share(cfg, 50, 10.0) == 1.0
    assert [factor(cfg, step, 0.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(cfg, 50, 0.5) == pytest.approx(0.5)
    assert factor(cfg, 50, 1.0) == pytest.approx(0.0)
    assert factor(replace(cfg, lr_schedule="constant"), 50, 1.0) == 1.0


# Runs


def test_a_run_writes_everything_and_is_not_repeated(run, face_folder, monkeypatch, caplog):
    metrics = run("out")
    out = face_folder / "out"
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 6 and metrics["images"] == 14
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6]
    assert read_image(out / "previews" / "step_00000006.png").shape == (2 + 18, 2 + 8 * 18, 3)  # 4 pairs of 16 pixels

    # The files are the averaged weights, centred: they reconstruct as well as was measured
    encoder, decoder = load_encoder(out / "vq_encoder.safetensors"), load_decoder(out / "vq_decoder.safetensors")
    dataset = DatasetSettings(str(face_folder / "faces"), 16, None, 0.2, True, True)
    training, validation = split_images(dataset, seed=0)
    with torch.no_grad():
        real = to_float(Images(dataset.samples_root, validation, 16, cache=True).pixels)
        l1 = (decoder(encoder(real)).clamp(-1, 1) - real).abs().mean().item()
        latents = encoder(to_float(Images(dataset.samples_root, training, 16, cache=True).pixels))
    assert l1 == pytest.approx(metrics["l1"], rel=1e-4)
    assert (latents * encoder.latent_scale).std(correction=0).item() == pytest.approx(1.0, rel=1e-3)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-3 / encoder.latent_scale

    before = (out / "vq_encoder.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(training_loop, "split_images", None)  # a finished run reads no data
    assert run("out") == metrics and "other settings" not in caplog.text
    assert run("out", "training.revive_codes_every=3") == metrics
    assert "other settings, and left as it is: training.revive_codes_every" in caplog.text
    assert (out / "vq_encoder.safetensors").stat().st_mtime_ns == before


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(run, face_folder, monkeypatch):
    run("whole")

    class Killed(Exception):
        pass

    save = CheckpointFolder.save

    def save_once(self, step, state):
        save(self, step, state)
        raise Killed

    for _ in range(2):  # killed after step 2 (as quantisation begins) and after step 4 (amid the adversarial part)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(CheckpointFolder, "save", save_once)
            run("parts")
    run("parts")

    whole, parts = (
        load_torch(face_folder / name / "checkpoints" / "step_00000006.ckpt") for name in ("whole", "parts")
    )
    assert whole["ema"]["num_updates"] == 6
    for state in (whole, parts):
        del state["minutes"], state["config"]
    assert differing_keys(whole, parts) == []
    (tensors, metadata), (other_tensors, other_metadata) = (
        load_safetensors(face_folder / name / "vq_decoder.safetensors") for name in ("whole", "parts")
    )
    assert differing_keys(tensors, other_tensors) == [] and metadata == other_metadata


def test_training_lowers_the_error_and_uses_the_codebook(run, face_folder):
    for k in range(24):  # black on one side of an edge, white on the other: quickly learnt
        image = np.zeros((16, 16, 3), np.uint8)
        image[:, k // 2 + 2 :] = 255
        write_image(face_folder / "edges" / "a" / f"{k}.png", image)
    run(
        "out",
        f"dataset.samples_root={face_folder / 'edges'}",
        "training.steps=40",
        "training.optimizer.lr=5.0e-3",
        "training.quantization_start=20",
        "training.discriminator_start=null",
        "training.steps_between_logging=10",
        "training.steps_between_checkpoints=40",
    )
    lines = [json.loads(line) for line in (face_folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["l1"] < 0.5 * lines[0]["l1"]
    assert "perplexity" not in lines[1] and lines[-1]["perplexity"] > 8


def test_minutes_end_a_run(run, face_folder):
    metrics = run("short", "training.max_minutes=1.0e-6", "training.quantization_start=0")
    assert metrics["steps"] == 1
    assert (face_folder / "short" / "vq_decoder.safetensors").is_file()


def test_a_run_that_ends_before_quantisation_still_has_a_codebook(run, face_folder, caplog):
    metrics = run("short", "training.max_minutes=1.0e-6", "autoencoder.n_embed=512")
    assert metrics["steps"] == 1
    assert "before training.quantization_start=2: the codebook is placed now" in caplog.text
    codes = load_decoder(face_folder / "short" / "vq_decoder.safetensors").quantize.embedding.weight
    # Codes spread like the latents; untouched, all lie within 1/512 of one point
    assert codes.std(dim=0).norm() > 0.5 * metrics["latent_std"]


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(run, run_script, face_folder):
    together = [
        *OVERRIDES,
        f"dataset.samples_root={face_folder / 'faces'}",
        f"output_dir={face_folder / 'two'}",
        "training.batch_size=2",
    ]
    run_script("train_autoencoder.py", *together, processes=2)
    metrics = run("one")
    one, two = (load_torch(face_folder / name / "checkpoints" / "step_00000006.ckpt") for name in ("one", "two"))
    for part in ("model", "discriminator"):
        for name, tensor in one[part].items():
            assert relative_error(two[part][name], tensor) < 2e-2, name
    assert json.loads((face_folder / "two" / "metrics.json").read_text())["l1"] == pytest.approx(
        metrics["l1"], rel=1e-2
    )
    again = run_script("train_autoencoder.py", *together)
    assert "this run is finished (6 steps)" in again.stderr


# Mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.samples_root=/nowhere", "dataset.samples_root: no such folder: /nowhere"),
        ("dataset.exclude_identities_file=/nowhere.txt", "dataset.exclude_identities_file: no such file: /nowhere.txt"),
        ("dataset.validation_share=1.0", "dataset.validation_share: 1.0; it must be"),
        ("dataset.image_size=18", "dataset.image_size: 18 is not a multiple of 4"),
        ("autoencoder.ddconfig.ch=18", "autoencoder.ddconfig.norm_groups: 18 channels"),
        ("training.precision=fp8", "training.precision: 'fp8' is not one of fp32, bf16, fp16"),
        ("training.lr_schedule=linear", "training.lr_schedule: 'linear' is not one of cosine, constant"),
        ("training.batch_size=0", "training.batch_size: 0; it must be at least 1"),
        ("training.quantization_start=6", "training.quantization_start: 6 is not below training.steps"),
        ("training.steps=many", "training.steps"),
    ],
)
def test_mistakes_are_one_line(run, override, message):
    with pytest.raises(UserError, match=message):
        run("out", override)


def test_every_identity_excluded(run, face_folder):
    (face_folder / "all.txt").write_text("\n".join(f"id{i}" for i in range(6)))
    with pytest.raises(UserError, match=r"no image of .* is left to train on \(18 found, 18 of excluded identities"):
        run("out", f"dataset.exclude_identities_file={face_folder / 'all.txt'}")


def test_a_folder_of_another_run_is_not_continued(run, face_folder):
    run("out", "training.steps=3")
    with pytest.raises(UserError, match=r"holds a run with another n_embed \(32, now 64\)"):
        run("out", "autoencoder.n_embed=64")
    CheckpointFolder(face_folder / "other" / "checkpoints").save(1, {"kind": "diffusion"})
    with pytest.raises(UserError, match="holds a run of another kind"):
        run("other")


def test_ema_decay_reaches_the_average(run, face_folder):
    run("out", "training.steps=3", "ema@training.ema=constant", "training.ema.decay=0.0")
    state = load_torch(face_folder / "out" / "checkpoints" / "step_00000003.ckpt")
    assert all(torch.equal(state["ema"]["model"][name], tensor) for name, tensor in state["model"].items())
    assert EMA(torch.nn.Linear(1, 1), decay=0.0, power=None).decay_at(5) == 0.0


def test_unknown_keys_stop_the_script(run_script):
    done = run_script("train_autoencoder.py", "dataset.sample_root=x", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: dataset.sample_root: unknown key; the key is dataset.samples_root")


def test_ssim_by_its_formula():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    assert torch.allclose(ssim(noise, noise), torch.ones(2), atol=1e-5)
    assert ssim(noise, noise.flip(0)).abs().max() < 0.1
    flat, other = torch.full((1, 3, 32, 32), 0.5), torch.full((1, 3, 32, 32), 0.1)
    c1 = 0.02**2  # no structure: the luminance term alone
    expected = (2 * 0.5 * 0.1 + c1) / (0.5**2 + 0.1**2 + c1)
    assert ssim(flat, other).item() == pytest.approx(expected, abs=1e-4)
    assert ssim(noise[..., :8, :8], noise[..., :8, :8]).allclose(torch.ones(2), atol=1e-5)


def test_fine_energy_is_that_of_fine_stripes():
    x = torch.arange(32) * 2 * torch.pi
    coarse, fine = torch.sin(x * 4 / 32), torch.sin(x * 12 / 32)  # 1/8 and 3/8 cycles a pixel
    image = (coarse + 0.5 * fine).expand(1, 1, 32, 32)
    assert fine_energy(image).item() == pytest.approx(0.5**2 / 2 * 32 * 32, rel=1e-4)
    assert fine_energy(coarse.expand(1, 1, 32, 32)).item() == pytest.approx(0.0, abs=1e-3)


def write_lpips(folder):
    """Files in the form of torchvision's and the authors', with random weights."""
    torch.manual_seed(0)
    network = LPIPS()
    state = {
        f"features.{name}": torch.randn_like(value) * 0.05 for name, value in network.features.state_dict().items()
    }
    save_torch({**state, "classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16.pth")
    linear = {f"lin{i}.model.1.weight": torch.rand(1, widths[-1], 1, 1) for i, widths in enumerate(BLOCKS)}
    save_torch(linear, folder / "vgg.pth")
    return state, linear


def test_lpips_by_its_definition(tmp_path):
    state, linear = write_lpips(tmp_path)
    network = load_lpips(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    assert torch.equal(network(a, a), torch.zeros(2))
    # by hand: the first block alone
    mean, std = (torch.tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    features = []
    for images in (a, b):
        h = (images - mean) / std
        for layer in (0, 2):
            weight, bias = (state[f"features.{layer}.{kind}"] for kind in ("weight", "bias"))
            h = torch.relu(torch.nn.functional.conv2d(h, weight, bias, padding=1))
        features.append(h / h.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-10))
    first = ((features[0] - features[1]).square() * linear["lin0.model.1.weight"]).sum(dim=1).mean(dim=(1, 2))
    for parameter in list(network.lins)[1:]:
        parameter.zero_()
    torch.testing.assert_close(network(a, b), first)
    with pytest.raises(UserError, match=r"vgg16\.pth: no lin0"):
        load_lpips(tmp_path / "vgg16.pth", tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match=r"VGG-16 of torchvision.*missing"):
        load_lpips(tmp_path / "vgg.pth", tmp_path / "vgg.pth")


def test_the_perceptual_loss_is_trained_with_where_its_files_are(run, tmp_path, caplog):
    write_lpips(tmp_path)
    files = [f"training.lpips_vgg={tmp_path / 'vgg16.pth'}", f"training.lpips_linear={tmp_path / 'vgg.pth'}"]
    with_it, without = run("with", *files, "training.steps=3"), run("without", "training.steps=3")
    assert with_it["lpips"] > 0 and "lpips" not in without and with_it["l1"] != without["l1"]
    assert [record for record in caplog.records if "no perceptual loss" in record.getMessage()]
    with pytest.raises(UserError, match=r"training\.lpips_weight: 0, but the files of the perceptual loss are given"):
        run("absent", "training.lpips_weight=0", files[0])
    with pytest.raises(UserError, match=r"training\.lpips_vgg: no such file"):
        run("absent", "training.lpips_vgg=/nowhere", "training.lpips_linear=/nowhere")
