"""Who is trained on and who is tested: people from a user's class folders, and pairs of those held out."""

import json
import os
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from utils.checkpoint import write_text
from utils.config import UserError, existing_folder
from utils.images import list_images, read_image, write_image

MIN_TRAIN_PEOPLE, MIN_TEST_PEOPLE, MIN_IMAGES = 20, 10, 4
LARGEST_SIDE = 512  # of an imported photograph, in pixels; its face ends up at 112


def read_class_folders(data: str | Path) -> dict[str, list[str]]:
    """Images (paths relative to `data`) of every identity folder in `data` with at least MIN_IMAGES of them, sorted.

    Raises UserError when the folder is missing or holds too few such identities.
    """
    root = existing_folder(data, "data", "a folder with one folder of images an identity")
    people: dict[str, list[str]] = {}
    for name in list_images(root):
        people.setdefault(name.rpartition("/")[0], []).append(name)
    flat = len(people.pop("", []))
    enough = {person: images for person, images in people.items() if len(images) >= MIN_IMAGES}
    needed = MIN_TRAIN_PEOPLE + MIN_TEST_PEOPLE
    if len(enough) < needed:
        found = f"{len(people)} identity folders, {len(enough)} of them with {MIN_IMAGES} or more images"
        if not people and flat:
            found = f"{flat} images without identity folders"
        raise UserError(
            f"data: {root} holds {found}; at least {needed} identities with {MIN_IMAGES} images each are needed "
            f"({MIN_TRAIN_PEOPLE} to train on, {MIN_TEST_PEOPLE} to test on), laid out as <data>/<identity>/<image>.jpg"
        )
    return enough


def split_people(people: list[str], train: int, test: int, seed: int) -> tuple[list[str], list[str]]:
    """At most `train` people to learn from and `test` others to test on, drawn with `seed`.

    Where there are too few for both, a third is held out.
    """
    order = [people[i] for i in np.random.default_rng(seed).permutation(len(people))]
    if len(order) < train + test:
        test = min(test, max(MIN_TEST_PEOPLE, len(order) // 3))
    return sorted(order[test : test + train]), sorted(order[:test])


def import_people(data: str | Path, people: dict[str, list[str]], chosen: list[str], to: Path, most: int) -> int:
    """Copy up to `most` images of each chosen person to `to`, shrunk to LARGEST_SIDE; returns their number.

    Folders become 00000, 00001, ... as those of rendered people; `to/people.json` keeps their own names.
    """
    count = 0
    for number, person in enumerate(chosen):
        for index, name in enumerate(people[person][:most]):
            image = Image.fromarray(read_image(Path(data) / name))
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
            write_image(to / f"{number:05d}" / f"{index:03d}.png", np.asarray(image))
            count += 1
    names = {f"{number:05d}": person for number, person in enumerate(chosen)}
    write_text(to / "people.json", json.dumps(names, indent=1) + "\n")
    return count


def draw_pairs(images: dict[str, list[int]], folds: int, genuine: int, seed: int) -> list[tuple[list, list]]:
    """Verification pairs, (genuine, impostor) of each fold; no person appears in two folds (as in LFW).

    images: the image numbers of each person. genuine: how many genuine pairs are wanted in all; as many impostor pairs.
    Every fold gets the same number, as the format asks; few people give fewer folds and pairs.

    Returns:
        per fold, genuine (person, n1, n2) and impostor (person1, n1, person2, n2); lists of equal length.

    Raises:
        UserError: fewer than four people with two images.
    """
    people = sorted(person for person, numbers in images.items() if len(numbers) >= 2)
    folds = min(folds, len(people) // 2)
    if folds < 2:
        raise UserError(f"data: {len(people)} test people with two or more faces; verification needs at least 4")
    rng = np.random.default_rng(seed)
    people = [people[i] for i in rng.permutation(len(people))]
    groups = [sorted(people[i::folds]) for i in range(folds)]
    same = [[(p, a, b) for p in group for a, b in combinations(sorted(images[p]), 2)] for group in groups]
    different = [
        [(p, a, q, b) for p, q in combinations(group, 2) for a in images[p] for b in images[q]] for group in groups
    ]
    size = min(max(1, genuine // folds), *(len(pairs) for pairs in same), *(len(pairs) for pairs in different))

    def choose(pairs: list) -> list:
        return [pairs[i] for i in sorted(rng.choice(len(pairs), size, replace=False))]

    return [(choose(a), choose(b)) for a, b in zip(same, different, strict=True)]


def write_pairs(path: Path, folds: list[tuple[list, list]]) -> None:
    """LFW's pairs.txt: `folds <tab> pairs`, then the genuine and the impostor lines of each fold."""
    lines = [f"{len(folds)}\t{len(folds[0][0])}"]
    for genuine, impostor in folds:
        lines += ["\t".join(str(value) for value in pair) for pair in (*genuine, *impostor)]
    write_text(path, "\n".join(lines) + "\n")


def name_as_lfw(faces: Path, to: Path) -> dict[str, list[int]]:
    """Link (or copy) `faces/<person>/<image>` to `to/<person>/<person>_<nnnn>`; the image numbers of each person."""
    numbers: dict[str, list[int]] = {}
    for name in list_images(faces):
        person = name.rpartition("/")[0]
        numbers.setdefault(person, []).append(len(numbers.get(person, [])) + 1)
        target = to / person / f"{person}_{numbers[person][-1]:04d}{Path(name).suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(faces / name, target)
        except OSError:
            shutil.copyfile(faces / name, target)
    return numbers
