"""sample.py on a tiny random model: determinism, resuming, two processes, files, and what users get wrong."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch

import sample
from diffusion.generator import CheckpointChoice, load_generator
from diffusion.sampling_run import image_seed
from models.autoencoder.vqgan import VQDecoder
from models.diffusion.unet import ConditionalUNet
from tests.compat import fill_deterministic
from utils.checkpoint import save_safetensors, save_torch
from utils.config import CONFIG_DIR, UserError
from utils.images import read_block, read_image

ROOT = Path(__file__).parent.parent
WIDTH = 16  # of the contexts
MODEL = {
    "_target_": "models.diffusion.unet.ConditionalUNet",
    "initial_channels": 32,
    "channel_multipliers": [1, 1],
    "is_attention": [False, True],
    "n_blocks_per_resolution": 1,
    "context_input_channels": WIDTH,
    "context_channels": 32,
    "learn_empty_context": True,
}
DIFFUSION = {"_target_": "diffusion.schedule.NoiseSchedule", "num_timesteps": 1000, "kind": "linear"}
DDCONFIG = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small run no faster on two, and much slower where the other is taken."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run folder with one checkpoint (EMA and live weights differ), a decoder to 16 x 16 pixels, four contexts."""
    folder = tmp_path_factory.mktemp("files")
    unet = fill_deterministic(ConditionalUNet(**{k: v for k, v in MODEL.items() if k != "_target_"}))
    ema = unet.state_dict()
    record = {
        "kind": "diffusion",
        "step": 7,
        "model": {name: 0.9 * tensor for name, tensor in ema.items()},
        "ema": ema,
        "config": {"model": MODEL, "diffusion": DIFFUSION, "latent_diffusion": True},
        "latent_scale": 0.5,
        "latent_shape": [3, 8, 8],
        "context_scale": 4.0,
    }
    save_torch(record, folder / "run" / "checkpoints" / "step_00000007.ckpt")
    decoder = fill_deterministic(VQDecoder(DDCONFIG, n_embed=32))
    metadata = {"kind": "vq_decoder", "ddconfig": DDCONFIG, "embed_dim": 3, "n_embed": 32, "latent_scale": 0.5}
    save_safetensors(decoder.state_dict(), folder / "vq_decoder.safetensors", metadata)
    np.save(folder / "contexts.npy", np.random.default_rng(0).standard_normal((4, WIDTH)).astype(np.float32))
    return folder


def overrides(files: Path, save_dir: Path, *more: str) -> list[str]:
    return [
        f"checkpoint.path={files / 'run'}",
        f"VQDecoder_path={files / 'vq_decoder.safetensors'}",
        f"sampling.contexts_file={files / 'contexts.npy'}",
        f"sampling.save_dir={save_dir}",
        "sampling.n_samples_per_context=3",
        "sampling.calibration.n_contexts=3",
        *more,
    ]


def run(files: Path, save_dir: Path, *more: str) -> dict:
    """sample.py in this process: ten steps, unless `more` says otherwise."""
    if not any(word.startswith(("sampler=ddpm", "sampler.num_steps")) for word in more):
        more = (*more, "sampler.num_steps=10")
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = hydra.compose("sample_ddim_config", overrides(files, save_dir, *more))
    return sample.main.__wrapped__(cfg)


def manifest(save_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (save_dir / "manifest.jsonl").read_text().splitlines()]


def images(save_dir: Path) -> dict[str, np.ndarray]:
    return {record["file"]: read_image(save_dir / record["file"]).astype(int) for record in manifest(save_dir)}


def drawn_files(save_dir: Path) -> set[str]:
    return {path.relative_to(save_dir).as_posix() for path in save_dir.rglob("*.png")}


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A data set of 4 people x 3 images, drawn five at a time."""
    save_dir = tmp_path_factory.mktemp("finished") / "out"
    run(files, save_dir, "sampling.batch_size=5")
    return save_dir


def close(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Equal but for rounding, which may move a few latents to another code."""
    return a.keys() == b.keys() and all(np.abs(a[name] - b[name]).mean() < 0.5 for name in a)


def test_manifest_tells_every_image(finished):
    lines = manifest(finished)
    assert [(line["identity"], line["index"]) for line in lines] == [
        (f"{i:05d}", k) for i in range(4) for k in range(3)
    ]
    assert {line["file"] for line in lines} == drawn_files(finished)
    assert all(set(line) == {"file", "identity", "index", "seed", "switch_t", "sha256"} for line in lines)
    assert all(line["seed"] == image_seed(0, line["identity"], line["index"]) for line in lines)
    assert lines[0]["sha256"] == hashlib.sha256((finished / lines[0]["file"]).read_bytes()).hexdigest()
    assert sorted(p.name for p in finished.iterdir() if p.is_file()) == [
        "README.md",
        "attention_change.npz",
        "calibration.json",
        "dataset.json",
        "manifest.jsonl",
        "preview.html",
    ]


def test_seed_of_an_image_is_pinned():
    assert image_seed(0, "00001", 2) == 8566384096468031
    assert len({image_seed(s, name, k) for s in range(2) for name in ("a", "b") for k in range(2)}) == 8


def test_people_differ_and_so_do_their_images(finished):
    pixels = list(images(finished).values())
    assert all(np.abs(a - b).mean() > 2 for i, a in enumerate(pixels) for b in pixels[:i])


def test_series_belong_to_the_switches(finished):
    lines = manifest(finished)
    threshold = json.loads((finished / "calibration.json").read_text())["threshold"]
    with np.load(finished / "attention_change.npz", allow_pickle=False) as series:
        assert series["timesteps"].tolist() == [800, 700, 600, 500]
        assert series["d"].shape == (4, 12)
        assert series["identity"].tolist() == [line["identity"] for line in lines]
        for line, d in zip(lines, series["d"].T, strict=True):
            under = series["timesteps"][d < threshold]
            assert line["switch_t"] == (under[0] if len(under) else -1)


def test_calibration_moves_the_median_to_the_target(finished):
    calibration = json.loads((finished / "calibration.json").read_text())
    d, t = np.array(calibration["d"]), np.array(calibration["timesteps"])
    assert d.shape == (4, 3) and calibration["target_t"] == 700
    switched = (d[t >= 700] < calibration["threshold"]).any(axis=0)
    assert switched.sum() == 2  # of three: the median and the one before it
    assert "<svg" in (finished / "preview.html").read_text()


def test_batch_size_and_number_of_people_leave_an_image_alone(files, finished, tmp_path):
    run(files, tmp_path / "out", "sampling.batch_size=1", "sampling.n_contexts=2")
    few = images(tmp_path / "out")
    assert len(few) == 6
    assert close(few, {name: pixels for name, pixels in images(finished).items() if name in few})


@pytest.mark.parametrize("source", [[], ["sampling.contexts_file=null"]])
def test_a_data_set_that_grows_is_one_that_was_drawn_at_once(files, tmp_path, source):
    """The threshold, too, does not depend on how many are drawn: nothing is measured after a switch."""
    words = ("sampling.n_samples_per_context=1", "sampling.calibration.n_contexts=5", *source)
    for number in (1, 3):
        run(files, tmp_path / "grown", *words, f"sampling.n_contexts={number}")
    run(files, tmp_path / "at_once", *words, "sampling.n_contexts=3")
    for name in ("calibration.json", "manifest.jsonl"):
        assert (tmp_path / "grown" / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()


def test_another_seed_draws_other_images(files, finished, tmp_path):
    run(files, tmp_path / "out", "sampling.seed=1", "sampling.n_contexts=1")
    for name, pixels in images(tmp_path / "out").items():
        assert np.abs(pixels - images(finished)[name]).mean() > 2


def test_resumes_where_a_kill_left_it(files, finished, tmp_path):
    """A line is cut off, an image is lost, one is damaged: these are drawn again, the others are left alone."""
    out = tmp_path / "out"
    run(files, out)
    complete = images(out)
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").unlink()
    (out / ".parts").mkdir()
    with np.load(out / "attention_change.npz", allow_pickle=False) as series:
        d = series["d"].T.tolist()
    text = "".join(json.dumps({**json.loads(line), "d": row}) + "\n" for line, row in zip(lines, d, strict=True))
    (out / ".parts" / "000001_f00d-00000.jsonl").write_text(text[: text.rindex("{") + 30])  # as a kill may leave it
    (out / "attention_change.npz").unlink()
    (out / "00001" / "2.png").unlink()
    (out / "00003" / "1.png").write_bytes(b"damaged")
    untouched = (out / "00002" / "0.png").stat().st_mtime_ns

    summary = run(files, out)
    assert summary["drawn"] == 3 and summary["images"] == 12
    assert (out / "00002" / "0.png").stat().st_mtime_ns == untouched
    assert close(images(out), complete)
    assert len(manifest(out)) == 12 and not (out / ".parts").exists()
    with np.load(out / "attention_change.npz", allow_pickle=False) as series:
        assert np.allclose(series["d"].T, d, atol=1e-5)

    assert run(files, out)["drawn"] == 0


def test_a_data_set_may_grow_but_not_change(files, finished, tmp_path):
    out = tmp_path / "out"
    run(files, out, "sampling.n_contexts=2", "sampling.n_samples_per_context=2")
    assert run(files, out, "sampling.n_contexts=3")["drawn"] == 5
    assert close(images(out), {k: v for k, v in images(finished).items() if not k.startswith("00003")})
    for change, key in (
        ("sampler.num_steps=20", "sampler.num_steps: 20, before 10"),
        ("sampling.seed=3", "sampling.seed: 3, before 0"),
        ("checkpoint.use_non_ema=true", "checkpoint: "),
        ("sampling.n_contexts=1", "sampling.n_contexts: 1, before 3"),
    ):
        with pytest.raises(UserError, match=key):
            run(files, out, change)


def test_blocks_hold_the_images_of_the_folders(files, finished, tmp_path):
    out = tmp_path / "out"
    run(files, out, "sampling.save_mode=blocks", "sampling.n_contexts=2", "sampling.batch_size=4")
    assert drawn_files(out) == {"00000.png", "00001.png"}
    block = read_image(out / "00001.png")
    assert block.shape == (16, 4 * 16, 3)
    assert (block[:, 48:] == 0).all()
    tiles = read_block(block, 16)
    wanted = images(finished)
    assert all(np.abs(tiles[k].astype(int) - wanted[f"00001/{k}.png"]).mean() < 0.5 for k in range(3))
    assert [line["file"] for line in manifest(out)] == ["00000.png"] * 3 + ["00001.png"] * 3
    (out / "00000.png").unlink()
    assert run(files, out, "sampling.save_mode=blocks", "sampling.n_contexts=2")["drawn"] == 3


@pytest.mark.parametrize(
    ("choice", "switches"),
    [
        (["sampler=two_stage_fixed"], [-1]),
        (["sampler=ddim"], [None]),
        (["sampler=ddim", "sampling.sample_config.cfg_scale=1", "sampler.eta=0.5", "sampler.indexing=exact"], [None]),
        (["sampling.sample_config.MSE_th=1", "sampling.sample_config.step_th=300"], [800]),
    ],
)
def test_samplers(files, tmp_path, choice, switches):
    run(files, tmp_path / "out", "sampling.n_contexts=1", "sampling.image_size=14", *choice)
    assert sorted({line["switch_t"] for line in manifest(tmp_path / "out")}, key=str) == switches
    assert all(pixels.shape == (14, 14, 3) for pixels in images(tmp_path / "out").values())
    assert not (tmp_path / "out" / "calibration.json").exists()


def test_noise_within_sampling_is_the_images_own(files, tmp_path):
    """eta > 0 draws noise in every step; it too must not depend on the batch."""
    for size in (1, 3):
        more = ("sampler=ddim", "sampler.eta=1", "sampling.n_contexts=1")
        run(files, tmp_path / str(size), *more, f"sampling.batch_size={size}")
    assert close(images(tmp_path / "1"), images(tmp_path / "3"))


def test_uniform_contexts_and_bf16(files, tmp_path):
    more = ("sampling.contexts_file=null", "sampling.precision=bf16", "sampler=ddim", "sampler.num_steps=5")
    run(files, tmp_path / "a", "sampling.n_contexts=1", *more)
    run(files, tmp_path / "b", "sampling.n_contexts=2", *more)
    first, second = images(tmp_path / "a"), images(tmp_path / "b")
    assert len(first) == 3 and len(second) == 6
    assert all(np.abs(first[name] - second[name]).mean() < 8 for name in first)


def test_live_weights_differ_from_the_average(files):
    average, live = (
        load_generator(CheckpointChoice(str(files / "run"), 7, use_non_ema), str(files / "vq_decoder.safetensors"))
        for use_non_ema in (False, True)
    )
    assert torch.equal(live.unet.final.weight, 0.9 * average.unet.final.weight)
    assert average.weights_sha256 != live.weights_sha256
    assert (average.step, average.context_scale, average.latent_shape) == (7, 4.0, (3, 8, 8))


def test_a_damaged_newest_checkpoint_is_passed_over(files, finished, tmp_path, caplog):
    shutil.copytree(files / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000009.ckpt").write_bytes(b"cut short")
    choice = CheckpointChoice(str(tmp_path / "run"))
    assert load_generator(choice, str(files / "vq_decoder.safetensors")).step == 7
    assert "step_00000009.ckpt: not a readable checkpoint" in caplog.text and "going back" in caplog.text
    choice = CheckpointChoice(str(tmp_path / "run"), global_step=9)
    with pytest.raises(UserError, match=r"step_00000009\.ckpt: cannot be read"):
        load_generator(choice, str(files / "vq_decoder.safetensors"))


def test_another_checkpoint_is_told_by_its_step(files, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(files / "run", tmp_path / "run")
    record = torch.load(files / "run" / "checkpoints" / "step_00000007.ckpt", weights_only=True)
    save_torch({**record, "ema": record["model"], "step": 9}, tmp_path / "run" / "checkpoints" / "step_00000009.ckpt")
    with pytest.raises(UserError, match="checkpoint: step 9, before step 7"):
        run(files, tmp_path / "out", "sampler.num_steps=10", f"checkpoint.path={tmp_path / 'run'}")


def test_published_file_takes_its_schedule_from_itself(files, tmp_path):
    """A state dict as the published code writes it: prefixes, eight buffers beside the network, no configuration."""
    record = torch.load(files / "run" / "checkpoints" / "step_00000007.ckpt", weights_only=True)
    betas = torch.linspace(1e-3, 0.03, 50)
    state = {f"module.eps_model.{name}": tensor for name, tensor in record["ema"].items()}
    state |= {"betas": betas, "alphas": 1 - betas, "alpha_bars": torch.cumprod(1 - betas, 0)}
    save_torch(state, tmp_path / "published" / "ema_averaged_model_200000.ckpt")
    (tmp_path / "model.yaml").write_text(json.dumps(MODEL))  # JSON is YAML
    choice = CheckpointChoice(str(tmp_path / "published"))
    decoder = str(files / "vq_decoder.safetensors")
    generator = load_generator(choice, decoder, model_cfg_path=str(tmp_path / "model.yaml"), latent_shape=(3, 8, 8))
    assert generator.is_published and generator.step is None
    assert torch.allclose(generator.schedule.betas, betas)
    derived = load_generator(choice, decoder, latent_shape=(3, 8, 8))  # its settings are read off its shapes
    assert derived.weights_sha256 == generator.weights_sha256
    with pytest.raises(UserError, match=r"diffusion_cfg_path: .*ddpm\.yaml is not the schedule in"):
        load_generator(choice, decoder, diffusion_cfg_path=str(CONFIG_DIR / "diffusion" / "ddpm.yaml"))
    x, t = torch.zeros(1, 3, 8, 8), torch.tensor([5])
    assert torch.equal(derived.unet(x, t), generator.unet(x, t))
    with pytest.raises(UserError, match="does not fit ConditionalUNet"):
        wrong = CONFIG_DIR / "model" / "unet_cond_ca.yaml"
        load_generator(choice, decoder, model_cfg_path=str(wrong))


def test_pixel_space_needs_no_decoder(files, tmp_path):
    record = torch.load(files / "run" / "checkpoints" / "step_00000007.ckpt", weights_only=True)
    record["config"]["latent_diffusion"] = False
    save_torch({**record, "latent_scale": 1.0}, tmp_path / "run" / "step_00000001.ckpt")
    more = (f"checkpoint.path={tmp_path / 'run'}", "VQDecoder_path=null", "sampler=ddim", "sampling.n_contexts=1")
    run(files, tmp_path / "out", *more)
    assert all(pixels.shape == (8, 8, 3) for pixels in images(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("VQDncoder_path=x", "the key is VQDecoder_path"),
        ("VQDecoder_path=null", "VQDecoder_path: not set"),
        ("VQDecoder_path=nowhere.pt", "VQDecoder_path: no such file: nowhere.pt"),
        ("VQEncoder_path=nowhere.pt", "VQEncoder_path: no such file: nowhere.pt"),
        ("checkpoint.path=nowhere", "checkpoint.path: no such file or folder: nowhere"),
        ("checkpoint.path=/", "checkpoint.path: no checkpoint in /"),
        ("checkpoint.global_step=8", "checkpoint.global_step: no checkpoint of step 8"),
        ("sampling.contexts_file=nowhere.npy", "sampling.contexts_file: no such file or folder: nowhere.npy"),
        ("sampling.contexts_file={wide}", "holds contexts 17 wide; this model takes contexts 16 wide"),
        ("sampling.n_contexts=5", "sampling.n_contexts: 5; "),
        ("sampling.batch_size=0", "sampling.batch_size: 0; give at least 1"),
        ("sampling.batchsize=1", "did you mean sampling.batch_size?"),
        ("sampling.save_mode=zip", "sampling.save_mode: 'zip' is not one of folders, blocks, shards"),
        ("sampling.precision=fp8", "sampling.precision: 'fp8' is not one of"),
        ("sampling.sample_config.MSE_th=x", "sampler.threshold: 'x'; give a number"),
        ("sampling.calibration.target_t=300", "sampling.calibration.target_t: 300"),
        ("sampler=three_stage", "two_stage"),
        ("sampler.num_steps=0", "num_steps: 0"),
        ("sampler.num_steps=inf", "sampler.num_steps: inf; give a whole number"),
        ("sampling.sample_config.step_th=nan", "sampler.min_t: nan; give a whole number"),
        ("sampling.sample_config.cfg_scale=nan", "sampler.guidance_scale: nan; give a number"),
        (
            "checkpoint.path={recogniser}",
            "this project, a diffusion UNet is wanted",
        ),
        ("sampler.indexing=other", "sampler.indexing: 'other'; give one of exact, published"),
        ("model_cfg_path=x.yaml", "carries its own configuration"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(files, tmp_path, monkeypatch, capsys, mistake, message):
    wide = tmp_path / "wide.npy"
    np.save(wide, np.ones((3, WIDTH + 1), np.float32))
    recogniser = tmp_path / "backbone.safetensors"
    save_safetensors({"weight": torch.ones(2)}, recogniser, {"kind": "recognition_backbone"})
    words = overrides(files, tmp_path / "out", mistake.format(wide=wide, recogniser=recogniser))
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    with pytest.raises(SystemExit) as end:
        sample.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.rglob("*.png"))


def test_winograd_wants_fp32(files, tmp_path):
    with pytest.raises(UserError, match=r"sampling\.winograd: true, but sampling\.precision is bf16"):
        run(files, tmp_path / "out", "sampling.winograd=true", "sampling.precision=bf16")


def test_a_key_that_the_sampler_does_not_read(files, tmp_path):
    with pytest.raises(UserError, match=r"sampling\.sample_config\.MSE_th: the chosen sampler .*OneStage"):
        run(files, tmp_path / "out", "sampler=ddim", "+sampling.sample_config.MSE_th=0.1")


def test_a_foreign_folder_is_left_alone(files, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="holds other files"):
        run(files, tmp_path)


@pytest.mark.slow
def test_two_processes_draw_what_one_does(files, finished, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "sample.py"]
    command += overrides(files, out, "sampler.num_steps=10", "sampling.batch_size=2")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert close(images(out), images(finished))
    keys = ("file", "identity", "index", "seed", "switch_t")
    assert [[line[key] for key in keys] for line in manifest(out)] == [
        [line[key] for key in keys] for line in manifest(finished)
    ]
    assert not (out / ".parts").exists()
