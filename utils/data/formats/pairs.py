"""Verification sets: insightface's `.bin`, LFW's `pairs.txt` with its folders, and pairs drawn from labelled images.

A `.bin` is a pickle of two lists: 2 P encoded images (2i and 2i + 1 are pair i) and P flags, true where both show one
person. It has no names and no identities.

Legend: m images, P pairs.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from utils import safe_pickle
from utils.checkpoint import write_atomically
from utils.config import UserError
from utils.data.formats.labelled import EncodedImages, LabelledImages, check_inside, read_lines
from utils.images import IMAGE_SUFFIXES, read_bytes

FOLDS = 10  # of the LFW protocol, where a file does not say another number
TRIES_PER_PAIR = 100


class VerificationPairs(EncodedImages):
    """m images and P pairs of them."""

    format = "verification pairs"

    def __init__(
        self,
        path: str | Path,
        names: Sequence[str],
        read: Callable[[int], bytes],
        pairs: np.ndarray,
        issame: np.ndarray,
        *,
        num_folds: int = FOLDS,
        num_skipped: int = 0,
        files: Sequence[Path] = (),
    ) -> None:
        """
        Args:
            names, read: what image i is called, and the function that reads it.
            pairs: (P, 2) int64, the two images of each pair.
            issame: (P,) bool, True where both show one person.
            num_folds: the protocol cuts the pairs into so many consecutive folds.
            num_skipped: pairs of a list that were left out because an image is missing.
            files: the files that the images are in, where that is not `path` itself.
        """
        super().__init__(path, names)
        self.pairs, self.issame = np.asarray(pairs, np.int64).reshape(-1, 2), np.asarray(issame, bool)
        self.num_folds, self.num_skipped = num_folds, num_skipped
        self.files = list(files) or [self.path]
        self._read = read

    def encoded(self, index: int) -> bytes:
        return self._read(index)


def read_bin(path: str | Path) -> VerificationPairs:
    """Read insightface's `.bin`, of Python 2 or 3. Nothing in the pickle is executed.

    Raises UserError for a missing or damaged file, one that holds other things, and pairs of one kind only.
    """
    path = Path(path)
    return pairs_of_pickle(path, safe_pickle.loads(read_bytes(path), str(path)))


def holds_pairs(value: Any) -> bool:
    """Whether the content of a pickle looks like a verification set: two lists, and not two names."""
    return isinstance(value, tuple | list) and len(value) == 2 and None not in [_list(part) for part in value]


def pairs_of_pickle(path: Path, value: Any) -> VerificationPairs:
    """The verification set that the unpickled content of the file `path` is; UserError where it is none."""
    if not holds_pairs(value):
        raise UserError(f"{path}: holds no verification set; a list of encoded images and one of flags are wanted")
    images, issame = [_bytes(item) for item in _list(value[0])], _list(value[1])
    if None in images or not all(isinstance(flag, bool | int | np.bool_ | np.integer) for flag in issame):
        raise UserError(f"{path}: holds no verification set; its images are bytes and its flags true or false")
    if len(images) != 2 * len(issame):
        raise UserError(f"{path}: {len(images)} images and {len(issame)} flags; two images a flag are wanted")
    check_both_kinds(path, np.array(issame, bool))
    names = [f"pair {i // 2} image {i % 2}" for i in range(len(images))]
    return VerificationPairs(path, names, images.__getitem__, np.arange(len(images)), np.array(issame, bool))


def _list(value: Any) -> list | None:
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    return list(value) if isinstance(value, list | tuple) else None


def _bytes(item: Any) -> bytes | None:
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 1:
        return item.tobytes()
    return item if isinstance(item, bytes) else None


def check_both_kinds(path: str | Path, issame: np.ndarray) -> None:
    """UserError unless some pairs show one person and some two."""
    if issame.all() or not issame.any():
        raise UserError(
            f"{path}: {int(issame.sum())} genuine and {int((~issame).sum())} impostor pairs; both are needed"
        )


def write_bin(pairs: VerificationPairs, path: str | Path) -> Path:
    """Write a `.bin`, whole or not at all, as any Python 3 reads it. Names, and how many folds, are not kept."""
    images = [pairs.encoded(index) for index in pairs.pairs.reshape(-1).tolist()]
    value = (images, pairs.issame.tolist())
    return write_atomically(path, lambda temporary: temporary.write_bytes(pickle.dumps(value, protocol=4)))


def draw_pairs(data: LabelledImages, pairs_per_fold: int, seed: int) -> VerificationPairs:
    """A verification set in the manner of LFW: in each of 10 folds as many genuine pairs, then as many impostor pairs.

    No identity stands in two folds and no pair twice. An identity is drawn first, then its images, so that identities
    with many images do not dominate. Raises UserError where there are too few identities or images.
    """
    if pairs_per_fold < 1:
        raise UserError(f"pairs_per_fold: {pairs_per_fold}; it must be at least 1")
    rng = np.random.default_rng(seed)
    order = np.argsort(data.labels, kind="stable")
    members = np.split(order, np.searchsorted(data.labels[order], np.arange(1, len(data.identities))))
    people = rng.permutation([label for label, images in enumerate(members) if len(images)])
    pairs: list[tuple[int, int]] = []
    for fold, part in enumerate(np.array_split(people, FOLDS)):
        several = [label for label in part if len(members[label]) > 1]

        def genuine(several: list = several) -> tuple[int, int]:
            return tuple(rng.choice(members[rng.choice(several)], 2, replace=False))

        def impostor(part: np.ndarray = part) -> tuple[int, int]:
            return tuple(rng.choice(members[label]) for label in rng.choice(part, 2, replace=False))

        for kind, draw, possible in (("genuine", genuine, several), ("impostor", impostor, len(part) > 1)):
            drawn: dict[tuple[int, int], None] = {}
            for _ in range(TRIES_PER_PAIR * pairs_per_fold if possible else 0):
                drawn[tuple(sorted(int(image) for image in draw()))] = None
                if len(drawn) == pairs_per_fold:
                    break
            if len(drawn) < pairs_per_fold:
                raise UserError(
                    f"pairs_per_fold: {pairs_per_fold}; the {len(part)} identities of fold {fold + 1} of {FOLDS} give "
                    f"{len(drawn)} {kind} pairs; ask for fewer or take a set with more identities"
                )
            pairs += drawn
    issame = np.tile(np.repeat([True, False], pairs_per_fold), FOLDS)
    return VerificationPairs(data.path, data.names, data.encoded, np.array(pairs), issame)


class PairList:
    """Gathers the pairs of a list whose images are files below `root`: every image once, what is missing counted."""

    def __init__(self, path: str | Path, root: str | Path, folders: Sequence[str] = ("",)) -> None:
        """`path`: the list. `folders`, relative to `root`: where images may be. UserError where one is not there."""
        self.path, self.root = Path(path), Path(root)
        if not self.path.exists():
            raise UserError(f"pairs_file: no such file: {path}")
        if not self.root.is_dir():
            raise UserError(f"dataset.root: no such folder: {root}")
        self._bases = [base for base in (self.root / folder for folder in folders) if base.is_dir()]
        self._files: dict[Path, dict[str, Path]] = {}  # folder => file name without ending => file
        self._number_of: dict[Path, int] = {}  # every image once, in the order of the list
        self._pairs: list[list[int]] = []
        self._issame: list[bool] = []
        self._missing: list[str] = []
        self._num_skipped = 0

    def find(self, name: str) -> Path | None:
        """The image file `name`, a path without ending: an aligned copy often has another one. None: not there.

        UserError where the name leads outside the root, and where two of the folders hold such a file.
        """
        check_inside(name, self.path)
        found = []
        for base in self._bases:
            folder = (base / name).parent
            if folder not in self._files:
                files = sorted(folder.iterdir()) if folder.is_dir() else []
                self._files[folder] = {file.stem: file for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
            file = self._files[folder].get(PurePosixPath(name).name)
            found += [file] if file is not None else []
        if len(found) > 1:
            raise UserError(f"{self.path}: {found[0]} and {found[1]} are both there; move one folder elsewhere")
        return found[0] if found else None

    def add(self, names: tuple[str, str], issame: bool) -> None:
        """One pair of images, by their names as `find` wants them."""
        found = [self.find(name) for name in names]
        absent = [name for name, file in zip(names, found, strict=True) if file is None]
        if absent:
            self._missing += absent
            self._num_skipped += 1
            return
        self._pairs.append([self._number_of.setdefault(file, len(self._number_of)) for file in found])
        self._issame.append(issame)

    def finish(self, *, skip_missing: bool, num_folds: int = FOLDS) -> VerificationPairs:
        """The set. UserError where images are missing (but for `skip_missing`), or only one kind of pair is there."""
        if self._missing and not skip_missing:
            raise UserError(
                f"{self.root} lacks {len(set(self._missing))} images of {self.path.name}, first {self._missing[0]}.*; "
                f"complete the folder, or set skip_missing, to leave out the {self._num_skipped} pairs they are in"
            )
        genuine = sum(self._issame)
        if not 0 < genuine < len(self._issame):
            raise UserError(
                f"pairs_file: {self.path}: {genuine} genuine and {len(self._issame) - genuine} impostor pairs with "
                f"both images under {self.root}; both kinds are needed"
            )
        paths = list(self._number_of)
        return VerificationPairs(
            self.path,
            [path.relative_to(self.root).as_posix() for path in paths],
            functools.partial(_read_path, paths),
            np.array(self._pairs),
            np.array(self._issame),
            num_folds=num_folds,
            num_skipped=self._num_skipped,
            files=paths,
        )


def read_pairs(pairs_file: str | Path, root: str | Path, *, skip_missing: bool = False) -> VerificationPairs:
    """Read LFW's `pairs.txt` and find its images `<root>/<person>/<person>_<nnnn>.<ext>`.

    The first line holds `folds <tab> pairs`: each fold has that many genuine lines (`person n1 n2`), then as many
    impostor lines (`person1 n1 person2 n2`). A file whose first line holds one number (a
    development list), or that has no such line, counts as 10 folds.

    Args:
        skip_missing: leave out pairs with a missing image instead of refusing the list.

    Raises:
        UserError: a missing file or folder, a line that is neither form, missing images.
    """
    pairs = PairList(pairs_file, root)
    lines = read_lines(pairs_file)
    num_folds, first = FOLDS, 0
    header = lines[0].split() if lines else []
    if 1 <= len(header) <= 2 and all(field.isdecimal() for field in header):
        first = 1
        if len(header) == 2:
            num_folds = int(header[0])
    for number, line in enumerate(lines[first:], start=first + 1):
        if not line.strip():
            continue
        fields = line.strip().split("\t") if "\t" in line else line.split()
        if len(fields) == 3 and fields[1].isdecimal() and fields[2].isdecimal():
            wanted = [(fields[0], fields[1]), (fields[0], fields[2])]
        elif len(fields) == 4 and fields[1].isdecimal() and fields[3].isdecimal():
            wanted = [(fields[0], fields[1]), (fields[2], fields[3])]
        else:
            raise UserError(
                f"pairs_file: {pairs_file} line {number}: {line.strip()!r}; "
                "`person n1 n2` or `person1 n1 person2 n2` is wanted, separated by tabs"
            )
        one, other = (f"{person}/{person}_{int(n):04d}" for person, n in wanted)
        pairs.add((one, other), issame=len(fields) == 3)
    return pairs.finish(skip_missing=skip_missing, num_folds=num_folds)


def _read_path(paths: Sequence[Path], index: int) -> bytes:
    return read_bytes(paths[index])
