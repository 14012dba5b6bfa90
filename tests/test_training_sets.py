"""Several sets in one training set, and the batches that are drawn from them by weight."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from recognition.augment import Augmentation
from recognition.datasets import IdentityDataset, StepBatches, load_batches
from recognition.training_sets import DatasetSettings, SetPart, open_training_set, read_training_set
from utils.config import UserError, settings
from utils.data.formats.writers import write_labelled
from utils.distributed import seed_for
from utils.images import write_image


def level(root: str, person: str, number: int) -> int:
    """The grey level of an image of `sets`, which tells all of them apart."""
    return {"real": 0, "made": 100}[root] + 20 * int(person[1:]) + 3 * number


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """real: p0 .. p3, 3 images each; made: p2 .. p4, 4 images each; flat 8 x 8 images, each of its own level."""
    folder = tmp_path_factory.mktemp("sets")
    for root, people, images in (("real", range(4), 3), ("made", range(2, 5), 4)):
        for k in people:
            for i in range(images):
                image = np.full((8, 8, 3), level(root, f"p{k}", i), np.uint8)
                write_image(folder / root / f"p{k}" / f"{i}.png", image)
    return folder


def opened(*entries: dict, **kwargs):
    return open_training_set(settings({"sets": list(entries), **kwargs}, DatasetSettings, "dataset"))


def test_people_of_two_sets_are_different_people_unless_said_otherwise(sets: Path, caplog) -> None:
    entries = ({"root": str(sets / "real")}, {"root": str(sets / "made")})
    with caplog.at_level(logging.INFO):
        apart = opened(*entries)
    assert apart.identities == [f"real/p{k}" for k in range(4)] + [f"made/p{k}" for k in (2, 3, 4)]
    assert apart.labels.tolist() == [k for k in range(4) for _ in range(3)] + [k for k in (4, 5, 6) for _ in range(4)]
    assert apart.parts == [SetPart("real", 0, 12), SetPart("made", 12, 24)]
    assert "made: 12 images of 3 identities" in caplog.text
    assert "24 images of 7 identities; 2 names stand in more than one set and are different people" in caplog.text
    for index in range(24):
        root, person = apart.identities[apart.labels[index]].split("/")
        assert apart.pixels(index)[0, 0, 0] == level(root, person, index % 3 if index < 12 else (index - 12) % 4)
    assert apart.images.describe(int(apart.rows[13])) == str(sets / "made" / "p2" / "1.png")
    assert apart.images.names[int(apart.rows[13])] == "made/p2/1.png"

    caplog.clear()
    with caplog.at_level(logging.INFO):
        together = opened(*entries, merge_identities=True)
    assert together.identities == ["p0", "p1", "p2", "p3", "p4"]
    assert together.labels[12:].tolist() == [2] * 4 + [3] * 4 + [4] * 4
    assert "2 names stand in more than one set and are the same people" in caplog.text


def test_exclusions_belong_to_each_set_and_formats_may_differ(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("p3\n")
    write_labelled(read_training_set(sets / "made").images, tmp_path / "packed", "tfrecord")
    joined = opened(
        {"root": str(sets / "real"), "exclude_identities_file": str(tmp_path / "out.txt")},
        {"root": str(tmp_path / "packed"), "name": "made", "min_images_per_identity": 4},
    )
    assert joined.identities == ["real/p0", "real/p1", "real/p2", "made/p2", "made/p3", "made/p4"]
    assert len(joined) == 9 + 12
    for index in range(len(joined)):
        root, person = joined.identities[joined.labels[index]].split("/")
        assert joined.pixels(index)[0, 0, 0] == level(root, person, index % 3 if index < 9 else (index - 9) % 4)


def test_names_of_sets(sets: Path) -> None:
    real = {"root": str(sets / "real")}
    assert [part.name for part in opened(real, real, {**real, "name": "real-2"}).parts] == ["real", "real-3", "real-2"]
    single = opened({**real, "weight": 2.0})
    assert single.identities == ["p0", "p1", "p2", "p3"] and single.parts == []


@pytest.mark.parametrize(
    ("entries", "others", "message"),
    [
        ([], {}, r"dataset\.sets: holds no set"),
        ([{}], {}, r"dataset\.sets\[0\]\.root: not set"),
        ([{"root": "real"}, {"root": "none"}], {}, r"dataset\.sets\[1\]\.root: no such folder"),
        ([{"root": "real", "weigth": 1}], {}, r"dataset\.sets\[0\]\.weigth: unknown key; did you mean .*weight"),
        ([{"root": "real", "weight": "x"}], {}, r"dataset\.sets\[0\]\.weight: "),
        ([{"root": "real", "weight": 1}, {"root": "made"}], {}, r"dataset\.sets\[1\]\.weight: None; give every set"),
        ([{"root": "real", "weight": 1}, {"root": "made", "weight": 0}], {}, r"sets\[1\]\.weight: 0.*above 0"),
        ([{"root": "real", "name": "a"}, {"root": "made", "name": "a"}], {}, r"dataset\.sets: the name 'a'"),
        ([{"root": "real", "min_images_per_identity": 9}], {}, r"dataset\.sets\[0\]\.root: .* holds 0 of 4"),
        ([{"root": "real"}], {"root": "made"}, r"dataset\.root: .*made; with dataset\.sets"),
        (
            [{"root": "real"}],
            {"min_images_per_identity": 2},
            r"dataset\.min_images_per_identity: 2; with dataset\.sets",
        ),
    ],
)
def test_sets_that_cannot_be(sets: Path, monkeypatch, entries: list, others: dict, message: str) -> None:
    monkeypatch.chdir(sets)
    with pytest.raises(UserError, match=message):
        opened(*entries, **others)


# Batches

PARTS = [SetPart("real", 0, 30, 3.0), SetPart("made", 30, 50, 1.0)]


def batches(parts=PARTS, **kwargs) -> StepBatches:
    values = {"num_images": 50, "batch_size": 8, "first_step": 0, "last_step": 10, "seed": 1, **kwargs}
    return StepBatches(**values, parts=parts)


def test_every_batch_holds_each_sets_share() -> None:
    steps = list(batches())
    assert batches().shares == {"real": 6, "made": 2}
    assert all(Counter(index < 30 for _, index in step) == {True: 6, False: 2} for step in steps)
    # A pass of the first set takes 5 steps, one of the second 10: each image once
    first = [item for step in steps[:5] for item in step if item[1] < 30]
    assert sorted(index for _, index in first) == list(range(30)) and {number for number, _ in first} == {0}
    second = [item for step in steps for item in step if item[1] >= 30]
    assert sorted(index for _, index in second) == list(range(30, 50))
    assert len({tuple(index < 30 for _, index in step) for step in steps}) > 5  # mixed within the batch


def test_weighted_order_does_not_depend_on_processes_or_restarts() -> None:
    whole = list(batches())
    parts = [batches(batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    assert list(batches(first_step=7)) == whole[7:]
    one = batches()
    assert [one.batch(step) for step in (9, 0, 4)] == [whole[9], whole[0], whole[4]]
    assert list(batches(seed=2)) != whole


def test_sets_without_weights_are_one() -> None:
    parts = [SetPart("real", 0, 30), SetPart("made", 30, 50)]
    steps = list(batches(parts, last_step=6))
    assert steps == list(batches((), last_step=6))
    assert len({index for step in steps for _, index in step}) == 48


@pytest.mark.parametrize(
    ("weights", "shares"), [((1, 1), (4, 4)), ((0.7, 0.3), (6, 2)), ((5, 6), (4, 4)), ((2, 5), (2, 6))]
)
def test_shares_are_rounded_to_the_nearest(weights: tuple, shares: tuple) -> None:
    parts = [SetPart("a", 0, 30, weights[0]), SetPart("b", 30, 50, weights[1])]
    assert Counter(int(index >= 30) for _, index in batches(parts).batch(0)) == dict(enumerate(shares))


def test_weights_that_give_nothing_or_too_much() -> None:
    with pytest.raises(UserError, match=r"dataset\.sets\[1\]\.weight: 0\.01 is 0\.08 of the 8 images of a step"):
        batches([SetPart("a", 0, 30, 0.99), SetPart("b", 30, 50, 0.01)])
    with pytest.raises(UserError, match=r"dataset\.sets\[1\]\.weight: 1 is 4 of the 8 images .* b holds only 3"):
        batches([SetPart("a", 0, 47, 1.0), SetPart("b", 47, 50, 1.0)])


# The loader


class Threads(Dataset):
    """How many threads torch takes in a worker."""

    def __getitem__(self, index: int) -> int:
        return torch.get_num_threads()

    def __len__(self) -> int:
        return 1


def test_a_worker_has_one_thread() -> None:
    assert [int(n) for n in DataLoader(Threads(), num_workers=1)] == [1]


def test_load_batches_gives_the_items_in_order_whatever_the_workers(sets: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    source = opened({"root": str(sets / "real"), "weight": 1}, {"root": str(sets / "made"), "weight": 1})
    augment = Augmentation(flip=0.5, crop=0.5, photometric=0.5)
    results = []
    for workers, cached in ((0, False), (2, False), (0, True)):
        dataset = IdentityDataset(source, size=8, augment=augment, seed=3, cache_in_memory=cached)
        order = StepBatches(24, batch_size=6, first_step=1, last_step=5, seed=3, parts=source.parts)
        results.append(list(load_batches(dataset, order, num_workers=workers)))
    assert caplog.text.count("every step's 6 images: 3 of real, 3 of made") == 3
    for step, ((pixels, labels), *others) in enumerate(zip(*results, strict=True), start=1):
        assert pixels.dtype == torch.uint8 and pixels.shape == (6, 8, 8, 3) and labels.dtype == torch.int64
        assert labels.tolist() == [source.labels[index] for _, index in order.batch(step)]
        assert all(torch.equal(pixels, p) and torch.equal(labels, own) for p, own in others)
    number, index = order.batch(4)[0]
    generator = np.random.Generator(np.random.PCG64(seed_for(3, "augment", number, index)))
    assert np.array_equal(results[0][3][0][0].numpy(), augment(source.pixels(index), generator))


def test_an_unreadable_image_is_named_by_the_loader(sets: Path, tmp_path: Path) -> None:
    for k in range(2):
        write_image(tmp_path / f"p{k}" / "0.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "p1" / "0.png").write_bytes(b"no image")
    source = read_training_set(tmp_path)
    dataset = IdentityDataset(source, size=8, augment=Augmentation(), seed=0)
    order = StepBatches(2, batch_size=2, first_step=0, last_step=1, seed=0)
    with pytest.raises(UserError, match=r"p1/0\.png: not an image"):
        list(load_batches(dataset, order, num_workers=0))
