"""The diffusion loop: exact resume, world size, precision, what a run leaves behind, and bad input."""

import json
import shutil

import numpy as np
import pytest
import torch

import main as main_module
from utils.checkpoint import CheckpointFolder, load_torch, save_torch
from utils.config import UserError
from utils.data.step_sampler import StepSampler
from utils.images import read_image

TINY = [
    "dataset=folder",
    "latent_diffusion=false",
    "constants.image_size=16",
    "model.initial_channels=32",
    "model.channel_multipliers=[1,1]",
    "model.is_attention=[false,true]",
    "model.n_blocks_per_resolution=1",
    "model.context_input_channels=16",
    "model.context_channels=32",
    "training.num_workers=0",
    "training.precision=fp32",
    "training.batch_size=4",
    "training.steps=6",
    "training.checkpoint.steps_between=3",
    "training.steps_between_logging=2",
    "training.steps_between_sampling=null",
]


@pytest.fixture
def overrides(face_folder):
    return [
        *TINY,
        f"dataset.samples_root={face_folder / 'faces'}",
        f"dataset.embeddings_file_path={face_folder / 'embeddings.npz'}",
    ]


def run(cfg):
    return main_module.main.__wrapped__(cfg)


def weights(folder):
    state = load_torch(CheckpointFolder(folder / "checkpoints").paths()[-1])
    return state["step"], state["ema"], state["model"]


def test_resume_equals_uninterrupted_bit_for_bit(compose, overrides, tmp_path, monkeypatch):
    run(compose("train_config", *overrides, f"output_dir={tmp_path / 'a'}"))

    save = CheckpointFolder.save

    def save_then_die(self, step, state):
        save(self, step, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointFolder, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(compose("train_config", *overrides, f"output_dir={tmp_path / 'b'}"))
    monkeypatch.undo()
    assert weights(tmp_path / "b")[0] == 3
    run(compose("train_config", *overrides, f"output_dir={tmp_path / 'b'}"))

    (step_a, ema_a, model_a), (step_b, ema_b, model_b) = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert step_a == step_b == 6
    assert all(torch.equal(ema_a[k], ema_b[k]) for k in ema_a) and all(
        torch.equal(model_a[k], model_b[k]) for k in model_a
    )
    lines_a, lines_b = (
        [json.loads(line) for line in (tmp_path / x / "metrics.jsonl").read_text().splitlines()] for x in "ab"
    )
    assert [line["step"] for line in lines_a] == [2, 4, 6]
    # the resumed run logs step 4 as the mean of one step where the other has two
    assert lines_a[2]["loss"] == lines_b[-1]["loss"] and lines_b[-1]["step"] == 6


def test_what_a_run_leaves_behind(compose, overrides, tmp_path):
    metrics = run(
        compose("train_config", *overrides, f"output_dir={tmp_path / 'a'}", "training.steps_between_sampling=6")
    )
    assert 0.5 < metrics["loss"] < 2.0  # the zero-initialised output starts at the noise's own variance
    state = load_torch(tmp_path / "a" / "checkpoints" / "step_00000006.ckpt")
    assert state["config"]["model"]["initial_channels"] == 32 and state["latent_shape"] == [3, 16, 16]
    assert state["context_scale"] == 1.0 and state["latent_scale"] == 1.0 and state["ema_updates"] == 6
    assert any(not torch.equal(state["ema"][k], state["model"][k]) for k in state["ema"])  # it averages
    preview = read_image(tmp_path / "a" / "previews" / "step_00000006.png")
    assert preview.shape == (2 + 8 * 18, 2 + 8 * 18, 3)  # empty, five people, two new; 16 pixels and a gap of two
    assert list((tmp_path / "a" / "tensorboard").glob("events*"))
    assert run(compose("train_config", *overrides, f"output_dir={tmp_path / 'a'}")) == {}  # complete: nothing to do


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(compose, overrides, tmp_path, precision):
    metrics = run(
        compose(
            "train_config", *overrides, f"output_dir={tmp_path}", f"training.precision={precision}", "training.steps=2"
        )
    )
    assert np.isfinite(metrics["loss"])


def test_bf16_learns_what_fp32_does(compose, overrides, tmp_path):
    """Convolutions as products, attention and norms in float32 where half precision is slow: all close to fp32."""
    for precision in ("fp32", "bf16"):
        words = ["training.steps=3", f"output_dir={tmp_path / precision}", f"training.precision={precision}"]
        run(compose("train_config", *overrides, *words, "training.checkpoint.steps_between=3"))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / x / "metrics.jsonl").read_text().splitlines()]
        for x in ("fp32", "bf16")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3) and losses[0] != losses[1]
    (_, _, one), (_, _, two) = weights(tmp_path / "fp32"), weights(tmp_path / "bf16")
    assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in two.items()}


@pytest.mark.slow
def test_two_processes_compute_what_one_does(compose, run_script, overrides, tmp_path):
    common = [*overrides, "training.steps=3", "training.optimizer.lr=1e-3"]
    run(compose("train_config", *common, f"output_dir={tmp_path / 'one'}", "training.batch_size=8"))
    run_script("main.py", *common, f"output_dir={tmp_path / 'two'}", "training.batch_size=4", processes=2)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / x / "metrics.jsonl").read_text().splitlines()]
        for x in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    (_, _, one), (_, _, two) = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert set(one) == set(two)
    # Adam's first steps turn rounding in tiny gradients into steps of their own, so single weights may differ more
    difference = sum((one[k] - two[k]).square().sum().item() for k in one) ** 0.5
    assert difference < 1e-4 * sum(one[k].square().sum().item() for k in one) ** 0.5


def test_a_size_that_does_not_suit_the_network_is_named(compose, overrides, tmp_path):
    cfg = compose("train_config", *overrides, f"output_dir={tmp_path}", "constants.image_size=17")
    with pytest.raises(UserError, match=r"constants\.image_size: 17; autoencoder and network need a multiple of 2"):
        run(cfg)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["uiface", "idiff_face", "idiff_face_cpd25", "idiff_face_cpd50", "admis", "unconditional", "faces_cpu"],
)
def test_presets_take_two_steps(compose, overrides, tmp_path, name):
    short = ["training.steps=2", "training.steps_between_logging=1"]
    if name == "faces_cpu":
        short.append("training.lr_scheduler.warmup_steps=0")
    cfg = compose("train_config", f"experiment={name}", *overrides, *short, f"output_dir={tmp_path}")
    assert np.isfinite(run(cfg)["loss"])
    assert CheckpointFolder(tmp_path / "checkpoints").paths()[-1].name == "step_00000002.ckpt"


def test_latents_are_cached_and_a_stale_cache_is_refused(compose, overrides, face_folder, tmp_path):
    from models.autoencoder.vqgan import VQModel, save_autoencoder

    ddconfig = dict(
        double_z=False, z_channels=3, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2], num_res_blocks=1,
        attn_resolutions=[], dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder, decoder = save_autoencoder(VQModel(ddconfig, n_embed=16, embed_dim=3), tmp_path / "ae", 2.0)
    common = [
        *overrides, "latent_diffusion=true", f"training.checkpoint.VQEncoder={encoder}",
        f"training.checkpoint.VQDecoder={decoder}", "training.steps=2",
    ]  # fmt: skip
    cached = run(compose("train_config", *common, f"output_dir={tmp_path / 'a'}"))
    direct = run(compose("train_config", *common, f"output_dir={tmp_path / 'b'}", "training.cache_latents=false"))
    assert cached["loss"] == pytest.approx(direct["loss"], rel=2e-3)  # the cache is float16
    assert np.load(tmp_path / "a" / "latents" / "00000.npy", mmap_mode="r").shape == (18, 2, 3, 8, 8)
    assert load_torch(tmp_path / "a" / "checkpoints" / "step_00000002.ckpt")["latent_scale"] == 2.0
    key = (tmp_path / "a" / "latents" / "latents.json").read_text()
    another = [f"dataset.samples_root={tmp_path / 'fewer' / 'faces'}"]
    shutil.copytree(face_folder, tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer" / "faces" / "id0")
    assert run(compose("train_config", *common, f"output_dir={tmp_path / 'a'}", *another)) == {}
    assert (tmp_path / "a" / "latents" / "latents.json").read_text() == key, "a complete run makes no latents"
    run(compose("train_config", *common, f"output_dir={tmp_path / 'a'}", "training.steps=3", *another))
    assert (tmp_path / "a" / "latents" / "latents.json").read_text() != key


def test_a_run_goes_on_with_its_own_size_and_autoencoder_only(compose, overrides, tmp_path):
    run(compose("train_config", *overrides, f"output_dir={tmp_path}", "training.steps=1"))
    with pytest.raises(UserError, match=r"constants\.image_size: 32, but .* holds a run on 16"):
        run(compose("train_config", *overrides, f"output_dir={tmp_path}", "constants.image_size=32"))
    (path,) = CheckpointFolder(tmp_path / "checkpoints").paths()
    save_torch({**load_torch(path), "latent_scale": 2.0}, path)
    with pytest.raises(UserError, match=r"VQEncoder: latent_scale 1, but .* holds a run with 2"):
        run(compose("train_config", *overrides, f"output_dir={tmp_path}"))
    more = ("constants.image_size=32", f"training.checkpoint.path={path}", "training.steps=2")
    assert run(compose("train_config", *overrides, f"output_dir={tmp_path / 'finer'}", *more))["loss"] > 0


def test_a_run_goes_on_with_its_own_network_only(compose, overrides, tmp_path):
    run(compose("train_config", *overrides, f"output_dir={tmp_path}", "training.steps=1"))
    with pytest.raises(UserError, match=r"model\.context_channels: 64, but .* holds a run with 32; give another"):
        run(compose("train_config", *overrides, f"output_dir={tmp_path}", "model.context_channels=64"))
    save_torch(
        {"kind": "autoencoder", "config": {}, "step": 1}, tmp_path / "other" / "checkpoints" / "step_00000001.ckpt"
    )
    with pytest.raises(UserError, match="other holds checkpoints of kind 'autoencoder'; give another folder"):
        run(compose("train_config", *overrides, f"output_dir={tmp_path / 'other'}"))
    free = ("model.context_dropout_probability=0.5", "training.steps=2")
    assert run(compose("train_config", *overrides, f"output_dir={tmp_path}", *free))["loss"] > 0


def test_bad_input(compose, overrides, tmp_path):
    with pytest.raises(UserError, match=r"training\.lr_scheduler\.warmup_steps: 9, of a run of 6 steps; give 0 to 5"):
        late = (
            "lr_scheduler@training.lr_scheduler=cosine",
            "training.lr_scheduler.warmup_steps=9",
            "dataset.samples_root=/",
        )
        run(compose("train_config", *overrides, f"output_dir={tmp_path}", *late))
    with pytest.raises(UserError, match=r"give model\.context_input_channels=16"):
        run(compose("train_config", *overrides, f"output_dir={tmp_path}", "model.context_input_channels=512"))
    with pytest.raises(UserError, match=r"no image of .* is named in the embeddings"):
        run(
            compose(
                "train_config",
                *overrides,
                f"output_dir={tmp_path}",
                f"dataset.samples_root={tmp_path / 'faces' / 'id0'}",
            )
        )
    with pytest.raises(UserError, match=r"training.precision: 'fp8' is not one of fp32, bf16, fp16"):
        run(compose("train_config", *overrides, f"output_dir={tmp_path}", "training.precision=fp8"))
    with pytest.raises(UserError, match="no such checkpoint"):
        run(compose("train_config", *overrides, f"output_dir={tmp_path}", "training.checkpoint.path=/nowhere.ckpt"))
    (tmp_path / "out.txt").write_text("\n".join(f"id{i}" for i in range(6)))
    with pytest.raises(UserError, match="18 matched, 18 excluded"):
        run(
            compose(
                "train_config",
                *overrides,
                f"output_dir={tmp_path}",
                f"dataset.exclude_identities_file={tmp_path / 'out.txt'}",
            )
        )


def test_step_sampler_passes_over_the_data_once_an_epoch():
    sampler = StepSampler(n=10, batch_size=4, seed=3, steps=5)
    items = [item for batch in sampler for item in batch]
    assert sorted(i for i, _ in items[:10]) == list(range(10)) and sorted(i for i, _ in items[10:]) == list(range(10))
    assert items[:10] != items[10:]
    later = StepSampler(n=10, batch_size=4, seed=3, steps=5, first_step=3)
    assert [item for batch in later for item in batch] == items[12:]
    assert {flip for _, flip in items} == {False, True}
    assert not any(flip for batch in StepSampler(10, 4, 3, 5, horizontal_flip=False) for _, flip in batch)


def test_permuted_contexts_come_from_the_same_identity_at_any_world_size(compose, overrides, tmp_path, monkeypatch):
    from diffusion.first_stage import FirstStage
    from diffusion.schedule import NoiseSchedule
    from diffusion.training_batches import training_batches
    from diffusion.training_settings import TrainingSettings
    from utils import distributed
    from utils.config import instantiate

    cfg = compose("train_config", *overrides, f"output_dir={tmp_path}")
    dataset, unet = instantiate(cfg.dataset, "dataset"), instantiate(cfg.model, "model")
    settings = TrainingSettings(steps=1, batch_size=8, num_workers=0, precision="fp32", context_permutation=1.0)

    def contexts(rank, world, batch_size):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        settings.batch_size = batch_size
        device = torch.device("cpu")
        batch = next(training_batches(unet, NoiseSchedule(), dataset, FirstStage(), 1.0, settings, 0, device))
        return batch.context

    whole = contexts(0, 1, 8)
    assert torch.equal(whole, torch.cat([contexts(0, 2, 4), contexts(1, 2, 4)]))
    items = StepSampler(len(dataset), 8, settings.seed, 1)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    own = dataset.embeddings[[i for i, _ in items.local_batch(0)]]
    assert not torch.equal(whole, own) and (whole * own).sum(dim=1).min() > 0.9


def test_published_weights_are_a_start(compose, overrides, tmp_path):
    """`training.checkpoint.path` takes a file of weights alone: a published one, or a converted one."""
    from models.diffusion.unet import ConditionalUNet
    from utils.checkpoint.__main__ import convert

    torch.manual_seed(3)
    cfg = compose("train_config", *overrides, f"output_dir={tmp_path / 'run'}", "training.steps=1")
    unet = ConditionalUNet(**{name: value for name, value in cfg.model.items() if name != "_target_"})
    betas = torch.linspace(0.001, 0.02, 10)
    torch.save({**{f"eps_model.{k}": v for k, v in unet.state_dict().items()}, "betas": betas}, tmp_path / "unet.pt")
    convert(tmp_path / "unet.pt", tmp_path / "unet.safetensors")
    for name in ("unet.pt", "unet.safetensors"):
        cfg.training.checkpoint.path, cfg.output_dir = str(tmp_path / name), str(tmp_path / name.replace(".", "_"))
        run(cfg)
        step, _, model = weights(tmp_path / name.replace(".", "_"))
        changes = [(model[k] - v).abs().max().item() for k, v in unet.state_dict().items()]
        assert step == 1 and 0 < max(changes) < 1e-3, "one step of Adam from the given weights"
    cfg.model.initial_channels, cfg.output_dir = 64, str(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"training\.checkpoint\.path: .* does not fit ConditionalUNet: .* of another shape"
    ):
        run(cfg)
