"""The public verification sets as they are distributed: CFP, AgeDB, CALFW, CPLFW and RFW beside LFW and `.bin` files.

Images keep the names of the distribution and are aligned as training images are (align.py keeps names); their ending
may differ. Where a list is not inside the folder of the images, `pairs_file` says where it is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from utils.config import UserError
from utils.data.formats.labelled import read_lines
from utils.data.formats.pairs import PairList, VerificationPairs, read_bin, read_pairs
from utils.images import IMAGE_SUFFIXES

# The five whose plain mean the field reports, in the order of its tables, with the number of their pairs
FIVE = {"lfw": 6000, "cfp_fp": 7000, "cplfw": 6000, "agedb_30": 6000, "calfw": 6000}
TITLES = {"lfw": "LFW", "cfp_fp": "CFP-FP", "cplfw": "CPLFW", "agedb_30": "AgeDB-30", "calfw": "CALFW"}
# Other names that folders and files of these sets go by
ALIASES = {
    "lfw": ("lfw",),
    "cfp_fp": ("cfp_fp", "cfp-fp", "cfp-dataset", "cfp"),
    "cplfw": ("cplfw",),
    "agedb_30": ("agedb_30", "agedb-30", "agedb"),
    "calfw": ("calfw",),
}
RFW_GROUPS = ("African", "Asian", "Caucasian", "Indian")
FLAGS = ("0", "1", "-1")  # 1: one person
AGEDB_NAME = re.compile(r"(\d+)_(.+)_(\d+)_[mf]")  # number, person, age, sex


def read_lfw(root: Path, pairs_file: Path | None = None, *, skip_missing: bool = False) -> VerificationPairs:
    """LFW (Huang et al., 2007): `pairs.txt`, and `<person>/<person>_<nnnn>.<ext>` in `root` or its folder `images`."""
    images = root / "images" if (root / "images").is_dir() else root
    return read_pairs(_listed(root, pairs_file, "pairs.txt"), images, skip_missing=skip_missing)


def read_cfp(
    root: Path, pairs_file: Path | None = None, *, skip_missing: bool = False, kind: str = "FP"
) -> VerificationPairs:
    """CFP (Sengupta et al., WACV 2016): its folder `Protocol`, and the images of `Data/Images/<person>/<pose>/`.

    `Protocol/Split/<kind>/<fold>/same.txt` and `diff.txt` hold `i,j`: lines of `Protocol/Pair_list_F.txt` and, in the
    protocol FP, of `Pair_list_P.txt` (frontal to profile); FF takes both from the first. A fold is its genuine pairs,
    then its impostor pairs. `pairs_file` is the folder `Protocol`, where that is not in `root`.
    """
    protocol = pairs_file or next((p for p in (root / "Protocol", root) if (p / "Split").is_dir()), root / "Protocol")
    second = "Pair_list_P.txt" if kind == "FP" else "Pair_list_F.txt"
    split = protocol / "Split" / kind
    folds = sorted(path for path in split.iterdir() if path.is_dir()) if split.is_dir() else []
    if not folds:
        raise UserError(f"{protocol}: not the folder Protocol of CFP; it holds Split/{kind}/<fold>/same.txt")
    pairs = PairList(protocol, root, ("Data/Images", "Images", ""))
    numbered = [_cfp_images(protocol / name) for name in ("Pair_list_F.txt", second)]
    for fold in folds:
        for name, issame in (("same.txt", True), ("diff.txt", False)):
            for number, line in _lines(fold / name):
                fields = [field.strip() for field in line.split(",")]
                if len(fields) != 2 or any(f not in images for f, images in zip(fields, numbered, strict=True)):
                    raise UserError(f"{fold / name} line {number}: {line!r}; two numbers of its image lists are wanted")
                one, other = (images[field] for field, images in zip(fields, numbered, strict=True))
                pairs.add((one, other), issame)
    return pairs.finish(skip_missing=skip_missing, num_folds=len(folds))


def _cfp_images(path: Path) -> dict[str, str]:
    """Number => path below the images, of a list of CFP; its lines are `1 ../Data/Images/001/frontal/01.jpg`."""
    images = {}
    for number, line in _lines(path):
        fields = line.split()
        if len(fields) != 2 or not fields[0].isdecimal():
            raise UserError(f"{path} line {number}: {line!r}; a number and a path are wanted")
        images[fields[0]] = _without_ending(fields[1].rpartition("Images/")[2])
    return images


def read_agedb(root: Path, pairs_file: Path | None = None, *, skip_missing: bool = False) -> VerificationPairs:
    """AgeDB (Moschoglou et al., CVPRW 2017): `<number>_<person>_<age>_<sex>.<ext>`, and a list of its 30-year protocol.

    A line holds two images and a flag, before or behind them (1: one person); an image is a path, a file name or its
    number. Ten folds. Without `pairs_file` it is the one text file in `root` with 30 in its name. Where the names tell
    who is on the images, they must agree with the flags.
    """
    path = _listed(root, pairs_file, "*30*.txt")
    folders = ("", "images", "imgs", "AgeDB", "01_DB")
    pairs = PairList(path, root, folders)
    by_number = _agedb_numbers(root, folders)
    for number, line, *names, issame in _flagged(path):
        one, other = (by_number.get(name) or _nearest_name(pairs, name) for name in names)
        people = [AGEDB_NAME.fullmatch(PurePosixPath(name).name) for name in (one, other)]
        if all(people) and (people[0][2] == people[1][2]) != issame:
            raise UserError(
                f"{path} line {number}: {line!r}: the flag says {'one person' if issame else 'two people'}, the names "
                "say otherwise; 1 stands for one person"
            )
        pairs.add((one, other), issame)
    return pairs.finish(skip_missing=skip_missing)


def _agedb_numbers(root: Path, folders: Sequence[str]) -> dict[str, str]:
    """Number of an image => its name below the folder it is in."""
    found = {}
    for folder in folders:
        files = sorted((root / folder).iterdir()) if (root / folder).is_dir() else []
        for file in files:
            match = AGEDB_NAME.fullmatch(file.stem)
            if match and file.suffix.lower() in IMAGE_SUFFIXES:
                found[match[1]] = file.stem
    return found


def read_list(root: Path, pairs_file: Path | None = None, *, skip_missing: bool = False) -> VerificationPairs:
    """Any list of `path1 path2 flag` or `flag path1 path2`, paths below `root`; ten folds."""
    path = _listed(root, pairs_file, "*.txt")
    pairs = PairList(path, root)
    for _, _, one, other, issame in _flagged(path):
        pairs.add((_without_ending(one), _without_ending(other)), issame)
    return pairs.finish(skip_missing=skip_missing)


def read_two_lines(
    root: Path, pairs_file: Path | None = None, *, skip_missing: bool = False, name: str = "CALFW"
) -> VerificationPairs:
    """CALFW (Zheng et al., 2017) and CPLFW (Zheng and Deng, 2018): two lines a pair, `<image> <flag>`; ten folds.

    The flag is 0 for two people and above 0 for one. The list is `pairs_<name>.txt`.
    """
    path = _listed(root, pairs_file, f"pairs_{name}.txt")
    pairs = PairList(path, root, ("", "aligned images", "aligned_images", "images"))
    lines = list(_lines(path))
    if len(lines) % 2:
        raise UserError(f"{path}: {len(lines)} lines; two are wanted for each pair")
    for (number, first), (_, second) in zip(lines[0::2], lines[1::2], strict=True):
        fields = [first.rsplit(None, 1), second.rsplit(None, 1)]
        if any(len(field) != 2 or not field[1].isdecimal() for field in fields):
            raise UserError(f"{path} line {number}: {first!r}, {second!r}; `image flag` is wanted twice")
        flags = {int(field[1]) > 0 for field in fields}
        if len(flags) != 1:
            raise UserError(f"{path} line {number}: {first!r}, {second!r}: the two lines of a pair have one flag")
        pairs.add((_without_ending(fields[0][0]), _without_ending(fields[1][0])), flags.pop())
    return pairs.finish(skip_missing=skip_missing)


LAYOUTS: dict[str, Callable[..., VerificationPairs]] = {
    "lfw": read_lfw,
    "cfp_fp": read_cfp,
    "cfp_ff": functools.partial(read_cfp, kind="FF"),
    "agedb_30": read_agedb,
    "calfw": read_two_lines,
    "cplfw": functools.partial(read_two_lines, name="CPLFW"),
    "list": read_list,
}


def open_benchmarks(folder: str | Path, *, skip_missing: bool = False) -> dict[str, VerificationPairs]:
    """Those of the five benchmarks that `folder` holds, in the order of `FIVE`: `<name>.bin`, else a folder `<name>`.

    Raises UserError where it holds none, and as their readers do.
    """
    folder = Path(folder)
    entries = {path.name.lower(): path for path in sorted(folder.iterdir())}
    found = {}
    for name, aliases in ALIASES.items():
        packed = next((entries[f"{a}.bin"] for a in aliases if f"{a}.bin" in entries), None)
        unpacked = next((entries[a] for a in aliases if a in entries and entries[a].is_dir()), None)
        if packed is not None:
            found[name] = read_bin(packed)
        elif unpacked is not None:
            found[name] = LAYOUTS[name](unpacked, skip_missing=skip_missing)
    if not found:
        names = ", ".join(f"{name}.bin" for name in FIVE)
        raise UserError(f"benchmarks_dir: {folder} holds none of {names}, nor folders of these names")
    return found


def open_rfw(root: str | Path, *, skip_missing: bool = False) -> dict[str, VerificationPairs]:
    """RFW (Wang et al., ICCV 2019): the pairs of its four groups.

    `[data/]<group>/<person>/<person>_<nnnn>.<ext>`, and `<group>_pairs.txt` (lines as LFW's, without a first line of
    counts; ten folds) in `root`, `<group>` or `txts/<group>`; or `<group>.bin`. Raises UserError where a group is
    missing.
    """
    root = Path(root)
    found = {}
    for group in RFW_GROUPS:
        if (root / f"{group}.bin").is_file():
            found[group] = read_bin(root / f"{group}.bin")
            continue
        places = (root / group, root / "txts" / group, root)
        lists = [place / f"{group}_pairs.txt" for place in places if (place / f"{group}_pairs.txt").is_file()]
        images = [place for place in (root / "data" / group, root / group) if place.is_dir()]
        if not lists or not images:
            lacking = f"{group}_pairs.txt" if not lists else f"the folder {group}"
            raise UserError(f"rfw_dir: {root} lacks {lacking}; the groups are {', '.join(RFW_GROUPS)}")
        found[group] = read_pairs(lists[0], images[0], skip_missing=skip_missing)
    return found


def _listed(root: Path, pairs_file: Path | None, pattern: str) -> Path:
    """`pairs_file`, or the one file in `root` that fits `pattern`."""
    if pairs_file is not None:
        return pairs_file
    found = sorted(root.glob(pattern))
    if len(found) != 1:
        state = f"holds {', '.join(p.name for p in found)}" if found else f"holds no {pattern}"
        raise UserError(f"pairs_file: not set, and {root} {state}; give pairs_file=LIST")
    return found[0]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Number and text of the lines that are not blank."""
    return [(number, line.strip()) for number, line in enumerate(read_lines(path), start=1) if line.strip()]


def _flagged(path: Path) -> list[tuple[int, str, str, str, bool]]:
    """Of each line its number, its text, two images, and the flag that stands before or behind them in the whole list.

    Fields are separated by tabs, commas or spaces.
    """
    lines = [(number, line, _fields(line)) for number, line in _lines(path)]
    last = all(len(fields) == 3 and fields[2] in FLAGS for _, _, fields in lines)
    found = []
    for number, line, fields in lines:
        if len(fields) != 3 or fields[2 if last else 0] not in FLAGS:
            raise UserError(f"{path} line {number}: {line!r}; two images and a flag 0 or 1 are wanted")
        *images, flag = fields if last else (fields[1], fields[2], fields[0])
        found.append((number, line, *images, flag == "1"))
    return found


def _fields(line: str) -> list[str]:
    separator = next((mark for mark in ("\t", ",") if mark in line), None)
    return [field.strip() for field in line.split(separator)]


def _nearest_name(pairs: PairList, name: str) -> str:
    """A name as the list has it, or its last part where only that is there."""
    name = _without_ending(name)
    last = PurePosixPath(name).name
    return name if pairs.find(name) is not None or pairs.find(last) is None else last


def _without_ending(name: str) -> str:
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix() if path.suffix.lower() in IMAGE_SUFFIXES else name
