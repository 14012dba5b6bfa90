"""Contexts from drawn faces: detection filters, drawing, going on after a kill, two processes, the whole command."""

import json
import shutil

import hydra
import numpy as np
import pytest
import torch

import create_sample_identity_contexts as script
from diffusion import drawn_faces
from diffusion.drawn_faces import MISFIT, NO_FACE, SEVERAL, UNSURE, DetectionSettings
from id_augment import IdAugmentSettings, augment
from models.diffusion.unet import ConditionalUNet
from recognition.backbones import build_backbone, load_backbone, save_backbone
from recognition.embedding import embed_images
from tests.compat import fill_deterministic
from tests.drawn_face import LANDMARKS, draw_face
from utils.alignment import TEMPLATE, Detection, FaceAligner, alignment_error
from utils.checkpoint import save_torch
from utils.config import CONFIG_DIR, UserError
from utils.contexts import read_contexts, uniform_contexts, write_embeddings
from utils.images import list_images, read_image, write_image
from utils.similarity import cosine_at_fmr

MODEL = {
    "initial_channels": 32,
    "channel_multipliers": [1, 1],
    "is_attention": [False, True],
    "n_blocks_per_resolution": 1,
    "condition_type": "AdaGN",
    "is_context_conditional": False,
    "learn_empty_context": False,
}


def save_generator(folder, **changes) -> None:
    """A checkpoint of a tiny model in pixels of 16 x 16."""
    model = {**MODEL, **changes}
    unet = fill_deterministic(ConditionalUNet(**model))
    config = {
        "model": {"_target_": "models.diffusion.unet.ConditionalUNet", **model},
        "diffusion": {"_target_": "diffusion.schedule.NoiseSchedule", "num_timesteps": 1000, "kind": "linear"},
        "latent_diffusion": False,
    }
    record = {
        "kind": "diffusion",
        "step": 3,
        "model": unet.state_dict(),
        "ema": unet.state_dict(),
        "config": config,
        "latent_scale": 1.0,
        "latent_shape": [3, 16, 16],
        "context_scale": 1.0,
    }
    save_torch(record, folder / "checkpoints" / "step_00000003.ckpt")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An unconditional generator, a conditional one and a recogniser, none of them trained."""
    folder = tmp_path_factory.mktemp("models")
    save_generator(folder / "run")
    save_generator(folder / "conditional", is_context_conditional=True, context_input_channels=16, context_channels=32)
    torch.manual_seed(0)
    save_backbone(build_backbone("ir_18", input_size=16, num_features=16, width=0.125), folder / "backbone.safetensors")
    return folder


@pytest.fixture
def words(models):
    """The command line of a small run, whose output_dir is still to be said."""
    return [
        "source=two_stage",
        f"source.checkpoint.path={models / 'run'}",
        f"source.recogniser={models / 'backbone.safetensors'}",
        "source.align=null",
        "sampler.num_steps=3",
        "source.batch_size=4",
        "n_contexts=6",
        "max_similarity_among=0.75",
    ]


@pytest.fixture
def run(compose, words):
    """run(folder, *overrides) -> names and contexts, drawn in this process."""

    def _run(folder, *overrides):
        cfg = compose("create_contexts_config", *words, f"output_dir={folder}", *overrides)
        script.main.__wrapped__(cfg)
        return read_contexts(folder / "contexts.npy")

    return _run


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """What the command gives in one go."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = hydra.compose("create_contexts_config", [*words.__wrapped__(models), f"output_dir={folder}"])
    script.main.__wrapped__(cfg)
    return folder


def record(folder) -> dict:
    return json.loads((folder / "contexts.json").read_text())


def close_to(folder, finished) -> bool:
    """The same contexts but for rounding, of the same candidates."""
    contexts, expected = (read_contexts(f / "contexts.npy")[1] for f in (folder, finished))
    lines = [(f / "contexts.jsonl").read_text() for f in (folder, finished)]
    return lines[0] == lines[1] and np.abs(contexts - expected).max() < 0.02  # a pixel may round to its neighbour


# --------------------------------------------------------------------------------------------------------- detection


def test_alignment_error():
    assert alignment_error(TEMPLATE) == pytest.approx(0, abs=1e-9)
    assert alignment_error(TEMPLATE @ np.array([[0, 3.0], [-3.0, 0]]) + 40) == pytest.approx(0, abs=1e-9)
    profile = TEMPLATE.copy()
    profile[2, 0] += 30  # the nose points to the side
    assert alignment_error(profile) > 8
    assert alignment_error(LANDMARKS) < 6


def test_filters():
    settings = DetectionSettings()
    good = TEMPLATE.astype(np.float32)
    assert settings.fault(Detection(good, 0.99, 1)) == ""
    assert settings.fault(Detection()) == NO_FACE
    assert settings.fault(Detection(good, 0.9, 1)) == UNSURE
    assert settings.fault(Detection(good, 0.99, 2)) == SEVERAL
    squeezed = good * [0.3, 1.0]  # a head turned far
    assert settings.fault(Detection(squeezed, 0.99, 1)) == MISFIT
    assert DetectionSettings(max_misfit=99).fault(Detection(squeezed, 0.99, 1)) == ""


def test_filters_on_pictures():
    """The drawn face passes; nothing, two faces and a turned head do not."""
    one = draw_face()
    two = np.concatenate([one, one], axis=1)
    pictures = [one, np.full_like(one, 128), two]
    detections = FaceAligner().detect(pictures)
    settings = DetectionSettings(min_probability=0.7)
    assert [settings.fault(found) for found in detections] == ["", NO_FACE, SEVERAL]


# ----------------------------------------------------------------------------------------------------------- drawing


def test_the_command_draws_contexts_and_keeps_their_faces(models, finished):
    names, contexts = read_contexts(finished / "contexts.npy")
    assert names == [f"{k:05d}" for k in range(6)] and contexts.shape == (6, 16)
    assert np.triu(contexts.astype(float) @ contexts.T, 1).max() <= 0.75
    assert list_images(finished / "faces") == [f"{name}.png" for name in names]
    faces = np.stack([read_image(finished / "faces" / f"{name}.png") for name in names])
    assert faces.shape == (6, 16, 16, 3)
    embedded = embed_images(load_backbone(models / "backbone.safetensors"), faces)
    np.testing.assert_allclose(embedded, contexts, atol=1e-5)
    told = record(finished)
    origins = [json.loads(line) for line in (finished / "contexts.jsonl").read_text().splitlines()]
    assert [origin["candidate"] for origin in origins] == [0, 1, 2, 5, 7, 9] and told["tries"] == 10
    assert told["rejected"] == {"near another context": told["tries"] - 6}
    assert set(told["inputs"]) == {"source.checkpoint", "source.recogniser"}
    assert len({origin["seed"] for origin in origins}) == 6
    assert not (finished / ".candidates").exists()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_does_not_matter(run, finished, tmp_path, batch_size):
    run(tmp_path / "out", f"source.batch_size={batch_size}")
    assert close_to(tmp_path / "out", finished)


def test_seed_and_number(run, finished, tmp_path):
    _, other = run(tmp_path / "seed", "seed=1")
    assert np.abs(other - read_contexts(finished / "contexts.npy")[1]).max() > 0.01
    _, fewer = run(tmp_path / "fewer", "n_contexts=3")
    np.testing.assert_allclose(fewer, read_contexts(finished / "contexts.npy")[1][:3], atol=0.02)


def test_goes_on_after_a_kill(run, finished, tmp_path, monkeypatch):
    """The process ends within the second batch."""
    out, drawn = tmp_path / "out", []
    original = drawn_faces.draw_images

    def draw(drawer, seeds):
        drawn.append(len(seeds))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return original(drawer, seeds)

    monkeypatch.setattr(drawn_faces, "draw_images", draw)
    with pytest.raises(KeyboardInterrupt):
        run(out)
    assert not (out / "contexts.npy").exists() and len(list_images(out / ".candidates" / "faces")) == 4
    assert [path.name for path in (out / ".candidates").glob("batch_*")] == ["batch_000000000.npz"]
    shutil.copytree(out, tmp_path / "changed")
    run(out)
    assert close_to(out, finished)
    assert sum(drawn[2:]) == -(-record(out)["tries"] // 4) * 4 - 4  # the first batch was not drawn again
    with pytest.raises(UserError, match=r"sampler.num_steps: 4, before 3; .*changed holds faces drawn with it"):
        run(tmp_path / "changed", "sampler.num_steps=4")
    assert (tmp_path / "changed" / ".candidates" / "batch_000000000.npz").exists()


def test_a_killed_end_is_repeated(run, finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("utils.context_creation.write_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(out)
    assert (out / "faces").is_dir() and not (out / "contexts.npy").exists()
    run(out)
    assert close_to(out, finished) and not (out / ".candidates").exists()


def test_too_full_a_sphere_keeps_what_was_drawn(run, finished, tmp_path):
    """A higher limit goes on from the candidates that the lower one was not content with."""
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"max_similarity_among: \d of 6 contexts found in 12 tries"):
        run(out, "max_similarity_among=0.1", "tries_per_context=2")
    kept = {path.name for path in (out / ".candidates").glob("batch_*")}
    assert kept == {f"batch_{start:09d}.npz" for start in (0, 4, 8)}
    run(out)
    assert close_to(out, finished)


def test_no_faces_are_found_in_noise(run, tmp_path):
    """The detector at work: an untrained model draws none."""
    align = "source.align={min_face_size:20,detection_size:64,detection_padding:0.1,min_probability:0.5}"
    with pytest.raises(UserError, match=r"n_contexts: 0 of 2 contexts found in 6 tries \(6 no face found\); look at"):
        run(tmp_path, "n_contexts=2", "tries_per_context=3", align)


def test_faces_are_aligned_and_measured(run, models, tmp_path, monkeypatch):
    """Drawn faces in place of the untrained model's noise: every second picture shows one."""

    def draw(_, seeds):
        images = np.stack([draw_face(scale=1 + seed % 7 / 50) for seed in seeds])
        images[1::2] = 128
        return images

    monkeypatch.setattr(drawn_faces, "draw_images", draw)
    align = "source.align={min_face_size:20,detection_size:112,detection_padding:0.1,min_probability:0.7}"
    run(tmp_path, "n_contexts=3", "max_similarity_among=null", align)
    told = record(tmp_path)
    assert told["tries"] == 5 and told["rejected"] == {NO_FACE: 2}
    origins = [json.loads(line) for line in (tmp_path / "contexts.jsonl").read_text().splitlines()]
    assert [origin["candidate"] for origin in origins] == [0, 2, 4]
    assert all(origin["probability"] > 0.7 and 0 < origin["misfit"] < 6 for origin in origins)
    assert read_image(tmp_path / "faces" / "00000.png").shape == (112, 112, 3)
    found = FaceAligner().detect([read_image(tmp_path / "faces" / "00000.png")])[0]
    np.testing.assert_allclose(found.landmarks, TEMPLATE, atol=8)


def test_a_false_match_rate_is_kept_and_faces_serve_id_augment(run, tmp_path):
    """From the calibration set to copies among the images, as a user does it."""
    rng = np.random.default_rng(0)
    people = np.repeat(uniform_contexts(40, 16, 0), 3, axis=0) + 0.05 * rng.standard_normal((120, 16))
    people = (people / np.linalg.norm(people, axis=1, keepdims=True)).astype(np.float32)
    write_embeddings(tmp_path / "known", [f"{i // 3}/{i % 3}.png" for i in range(120)], people)
    limit = ("max_similarity_among=fmr:0.001", f"calibration_embeddings={tmp_path / 'known' / 'embeddings.npy'}")
    names, contexts = run(tmp_path / "out", "n_contexts=4", "tries_per_context=200", *limit)
    cosine = cosine_at_fmr([str(i // 3) for i in range(120)], people, 0.001).cosine
    assert (
        np.triu(contexts.astype(float) @ contexts.T, 1).max()
        <= cosine
        == record(tmp_path / "out")["limits"]["max_similarity_among"]
    )
    for name in names:
        write_image(tmp_path / "data" / name / "0.png", np.zeros((16, 16, 3), np.uint8))
    assert augment(IdAugmentSettings(str(tmp_path / "out"), str(tmp_path / "data"), 5)).images == 20


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("source.checkpoint.path={models}/conditional", "holds a model that takes contexts"),
        ("source.checkpoint.path=nowhere", "checkpoint.path: no such file or folder: nowhere"),
        ("source.recogniser=nowhere", "source.recogniser: no such file: nowhere"),
        (
            "source.recogniser={models}/run/checkpoints/step_00000003.ckpt",
            "a training checkpoint of main.py, not a file of one network",
        ),
        ("sampler=two_stage", "the two-stage sampler needs contexts"),
        ("sampling.sample_config.cfg_scale=1", "sampling.sample_config.cfg_scale: 1; an unconditional model"),
        ("sampler.num_steps=0", "num_steps: 0"),
        ("source.batch_size=0", "source.batch_size: 0"),
        ("source.image_size=0", "source.image_size: 0"),
        ("source.precision=fp8", "source.precision: 'fp8'"),
        ("source.align=true", "source.align: True; null, or a section"),
        ("source.align={{max_faces:0}}", "source.align.max_faces: 0; give 1 or more"),
        ("source.align={{min_probability:2}}", "source.align.min_probability: 2.0; give 0 to 1"),
        ("source.align={{max_face:1}}", "did you mean source.align.max_faces?"),
    ],
)
def test_mistakes(run, models, tmp_path, mistake, message):
    with pytest.raises(UserError) as caught:
        run(tmp_path / "out", mistake.format(models=models))
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.slow
def test_two_processes_draw_what_one_does(run_script, words, finished, tmp_path):
    run_script("create_sample_identity_contexts.py", *words, f"output_dir={tmp_path / 'out'}", processes=2)
    assert close_to(tmp_path / "out", finished)
    assert record(tmp_path / "out")["tries"] == record(finished)["tries"]
