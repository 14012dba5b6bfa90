"""Training and testing recognisers: what a step sees, augmentation, embeddings, scripts."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import recognition.test as script
from recognition.augment import Augmentation, crop_on_black, low_resolution, photometric, resized_crop
from recognition.backbones import build_backbone, save_backbone
from recognition.datasets import IdentityDataset, StepBatches, read_training_set
from recognition.embedding import embed_images
from utils.config import UserError
from utils.images import write_image


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """8 identities x 6 images of 32 x 32: each identity is a coarse pattern of colours, each image it plus noise."""
    root = tmp_path_factory.mktemp("people")
    rng = generator()
    for k in range(8):
        pattern = rng.integers(0, 255, (4, 4, 3))
        for i in range(6):
            tiles = np.clip(pattern + rng.normal(0, 30, pattern.shape), 0, 255).astype(np.uint8)
            write_image(root / f"p{k}" / f"p{k}_{i + 1:04d}.png", np.kron(tiles, np.ones((8, 8, 1), np.uint8)))
    return root


# Order of the data


def batches(**kwargs) -> list[list[tuple[int, int]]]:
    return list(
        StepBatches(**{"num_images": 10, "batch_size": 4, "first_step": 0, "last_step": 6, "seed": 1, **kwargs})
    )


def test_a_pass_shows_no_image_twice_and_the_next_pass_has_another_order() -> None:
    steps = batches()
    first, second = steps[0] + steps[1], steps[2] + steps[3]
    assert {number for number, _ in first} == {0} and {number for number, _ in second} == {1}
    assert len({index for _, index in first}) == 8
    assert [i for _, i in first] != [i for _, i in second]
    assert batches(seed=2) != steps


def test_order_does_not_depend_on_processes_or_restarts() -> None:
    parts = [batches(batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == batches()
    assert batches(first_step=3) == batches()[3:]


def test_batches_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"training\.batch_size: 6 on each of 2 processes.*10 images"):
        batches(batch_size=6, world_size=2)
    with pytest.raises(UserError, match=r"training\.batch_size: 1"):
        batches(batch_size=1)


def test_identity_folders(people: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(people, root)
    (root / "p0" / "p0_0001.png").unlink()
    (root / "empty").mkdir()
    (tmp_path / "out.txt").write_text("p3\n\nnobody\n")
    folders = read_training_set(root, exclude_identities_file=tmp_path / "out.txt", min_images_per_identity=6)
    assert folders.identities == ["p1", "p2", "p4", "p5", "p6", "p7"]
    assert [folders.images.names[row] for row in folders.rows[:2]] == ["p1/p1_0001.png", "p1/p1_0002.png"]
    assert folders.labels.tolist() == [k for k in range(6) for _ in range(6)]


def test_identity_folders_that_cannot_be_used(people: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root: no such folder"):
        read_training_set(tmp_path / "none")
    with pytest.raises(UserError, match=r"dataset\.root: .* holds no identities"):
        read_training_set(tmp_path)
    write_image(tmp_path / "p0.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="split_identity_blocks"):
        read_training_set(tmp_path)
    with pytest.raises(UserError, match=r"holds 0 of 8 identities.*fewer than 7 images"):
        read_training_set(people, min_images_per_identity=7)
    (tmp_path / "out.txt").write_text("".join(f"p{k}\n" for k in range(7)))
    with pytest.raises(UserError, match="holds 1 of 8 identities"):
        read_training_set(people, exclude_identities_file=tmp_path / "out.txt")
    with pytest.raises(UserError, match="exclude_identities_file: no such file"):
        read_training_set(people, exclude_identities_file=tmp_path / "none.txt")


# Augmentation


def random_image(size: int = 48) -> np.ndarray:
    return generator(7).integers(1, 255, (size, size, 3), dtype=np.uint8)


def test_probabilities() -> None:
    image = random_image()
    off = Augmentation(flip=0.0)
    flips = Augmentation(flip=1.0)
    assert np.array_equal(off(image, generator()), image)
    assert np.array_equal(flips(image, generator()), image[:, ::-1])
    some = Augmentation(flip=0.3)
    share = np.mean([not np.array_equal(some(image, generator(s)), image) for s in range(400)])
    assert 0.24 < share < 0.36
    with pytest.raises(UserError, match=r"augment\.crop: 1\.5"):
        Augmentation(crop=1.5)


def test_everything_on_keeps_type_and_size_and_depends_on_the_generator_alone() -> None:
    every = Augmentation(flip=1.0, resized_crop=1.0, crop=1.0, low_resolution=1.0, photometric=1.0)
    image = random_image()
    first = every(image, generator(3))
    assert first.dtype == np.uint8 and first.shape == image.shape
    assert np.array_equal(first, every(image, generator(3)))
    assert not np.array_equal(first, every(image, generator(4)))


def test_crop_stays_at_its_place_on_black() -> None:
    image, areas = random_image(), []
    for seed in range(200):
        result = crop_on_black(image, generator(seed))
        kept = result.any(axis=2)
        rows, columns = np.flatnonzero(kept.any(1)), np.flatnonzero(kept.any(0))
        assert kept[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert np.array_equal(result[kept], image[kept])
        areas.append(kept.mean())
        assert 0.7 < len(columns) / len(rows) < 1.43
    assert 0.18 < min(areas) < 0.25 and max(areas) > 0.85


def test_resized_crop_fills_the_image_with_a_part_of_it() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64)[None, :, None], (64, 64, 3)).astype(np.uint8)
    result = resized_crop(ramp, generator(1))
    assert result.shape == ramp.shape
    assert np.ptp(result[0, :, 0].astype(int)) < 250
    assert (np.diff(result[0, :, 0].astype(int)) >= 0).all()


def test_low_resolution_loses_detail_and_keeps_the_mean() -> None:
    image = random_image()
    results = [low_resolution(image, generator(seed)) for seed in range(20)]
    assert all(r.shape == image.shape and r.dtype == np.uint8 for r in results)
    assert np.mean([r.std() for r in results]) < 0.7 * image.std()
    assert abs(np.mean([r.mean() for r in results]) - image.mean()) < 3


def test_photometric_keeps_grey_grey_and_changes_brightness_within_half() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    levels = np.array([photometric(grey, generator(seed)) for seed in range(300)])
    assert (np.ptp(levels, axis=-1) == 0).all()
    assert 50 <= levels.min() < 60 and 140 < levels.max() <= 150


# Embeddings


def test_embeddings_are_unit_rows_and_blind_to_mirroring(people: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("ir_18", input_size=16, num_features=8, width=0.125).train()
    images = generator().integers(0, 255, (5, 40, 40, 3), dtype=np.uint8)
    embeddings = embed_images(backbone, images, batch_size=2)
    assert embeddings.dtype == np.float32 and embeddings.shape == (5, 8)
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert np.allclose(embeddings, embed_images(backbone, images[:, :, ::-1], batch_size=5), atol=1e-5)
    one_sided = embed_images(backbone, images, flip=False)
    assert not np.allclose(embeddings, one_sided, atol=1e-3)
    assert backbone.training
    # (x / 255 - 0.5) / 0.5, and nothing else, goes into the network
    with torch.no_grad():
        raw = backbone.eval()(torch.full((1, 3, 16, 16), 0.2))[0].numpy()
    grey = np.full((1, 16, 16, 3), 153, np.uint8)
    assert np.allclose(embed_images(backbone, grey, flip=False)[0], raw / np.linalg.norm(raw), atol=1e-5)


def test_paths_and_arrays_give_the_same(people: Path) -> None:
    backbone = build_backbone("ir_18", input_size=32, num_features=8, width=0.125)
    folders = read_training_set(people)
    dataset = IdentityDataset(folders, size=32, augment=Augmentation(flip=0.0), seed=0)
    images = np.stack([dataset[0, i][0] for i in range(7)])
    expected = embed_images(backbone, images, batch_size=3)
    assert np.allclose(embed_images(backbone, folders.images.names[:7], root=people, batch_size=7), expected, atol=1e-5)
    functions = [partial(folders.pixels, index) for index in range(7)]
    assert np.allclose(embed_images(backbone, functions, batch_size=7), expected, atol=1e-5)
    assert embed_images(backbone, []).shape == (0, 8)


def test_a_diverged_backbone_is_named() -> None:
    backbone = build_backbone("ir_18", input_size=16, num_features=8, width=0.125)
    nn.init.constant_(backbone.output_layer[3].bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        embed_images(backbone, np.zeros((1, 16, 16, 3), np.uint8))


# The scripts


def test_models_to_test(compose, tmp_path: Path) -> None:
    file = tmp_path / "run" / "backbone.safetensors"
    save_backbone(build_backbone("ir_18", input_size=16, width=0.125), file)
    node = compose(
        "recognition_test_config", "backbone=ir_18", "backbone.width=0.125", "backbone.input_size=16"
    ).backbone
    assert script.load_model(str(file), None, 0).config["width"] == 0.125
    with pytest.raises(UserError, match=r"backbone: .* shows which network it is"):
        script.list_models(script.TestSettings("o", str(file)), node, [])
    with pytest.raises(UserError, match="backbone: not set"):
        script.list_models(script.TestSettings("o", None), None, [])
    with pytest.raises(UserError, match="checkpoint: no such file"):
        script.list_models(script.TestSettings("o", str(tmp_path / "none.pth")), None, [])
    weights = [script.load_model(None, node, seed).state_dict()["output_layer.3.weight"] for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    names = [script.default_name(path) for path in (None, str(file), "a/ir.pth")]
    assert names == ["untrained", "run", "ir"]


@pytest.mark.slow
def test_train_and_test_from_the_command_line_in_two_processes(run_script, people: Path, tmp_path: Path) -> None:
    train_args = [
        *(f"dataset.root={people}", "dataset.cache_in_memory=true", f"output_dir={tmp_path / 'run'}", "head=cosface"),
        *("backbone=ir_18", "backbone.width=0.125", "backbone.input_size=16", "backbone.num_features=16"),
        *("training.batch_size=6", "training.epochs=8", "training.lr_schedule.milestones=[6]"),
        *("training.device=cpu", "head.scale=16", "training.optimizer.lr=0.03", "backbone.dropout=0"),
        "training.num_workers=0",
        *(f"augment.{name}=0" for name in ("crop", "low_resolution", "photometric")),
    ]
    run_script("recognition.train", *train_args, processes=2)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["identities"]) == (32, 8)
    assert metrics["history"][-1]["accuracy"] > 0.5

    lines = [f"p{k}\t1\t{i}" for k in range(8) for i in (2, 3)]
    lines += [f"p{k}\t1\tp{(k + i) % 8}\t2" for k in range(8) for i in (1, 3)]
    order = [line for pair in zip(lines[:16], lines[16:], strict=True) for line in pair]
    (tmp_path / "pairs.txt").write_text("4\t4\n" + "\n".join(order) + "\n")
    test_args = [f"dataset.root={people}", f"pairs_file={tmp_path / 'pairs.txt'}", "device=cpu"]
    checkpoint = f"checkpoint={tmp_path / 'run' / 'backbone.safetensors'}"
    done = run_script("recognition.test", checkpoint, *test_args, f"output_dir={tmp_path / 'test'}")
    assert done.stdout == (tmp_path / "test" / "results.md").read_text()
    report = json.loads((tmp_path / "test" / "results.json").read_text())
    assert (report["name"], report["num_genuine"], report["num_impostor"], report["num_folds"]) == ("run", 16, 16, 4)
    assert report["accuracy"] > 0.75
    assert (tmp_path / "test" / "roc.png").stat().st_size > 1000

    other = ("checkpoint=null", "backbone=iresnet18", *test_args, f"output_dir={tmp_path / 'test'}")
    failed = run_script("recognition.test", *other, check=False)
    assert failed.returncode == 2 and "holds the results of" in failed.stderr

    failed = run_script(
        "recognition.test", "checkpoint=null", *test_args, f"output_dir={tmp_path / 'none'}", check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.strip() == (
        "error: backbone: not set; say which network gets random weights, as in backbone=ir_50"
    )
