"""Readers of the public verification sets, each on a miniature of its distribution."""

import sys
from pathlib import Path

import numpy as np
import pytest

from recognition.benchmark_sets import open_sets
from utils.config import UserError
from utils.data.__main__ import main
from utils.data.formats.benchmarks import (
    LAYOUTS,
    RFW_GROUPS,
    open_benchmarks,
    open_rfw,
    read_agedb,
    read_cfp,
    read_lfw,
    read_list,
    read_two_lines,
)
from utils.data.formats.pairs import VerificationPairs, read_bin, write_bin
from utils.images import write_image


def image(path: Path) -> None:
    """A PNG whose grey level is that of its path, whatever its ending is called."""
    write_image(path, np.full((4, 4, 3), sum(path.as_posix().encode()) % 251, np.uint8))


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def named(pairs: VerificationPairs) -> list[tuple[str, str, bool]]:
    return [(pairs.names[a], pairs.names[b], bool(s)) for (a, b), s in zip(pairs.pairs, pairs.issame, strict=True)]


def make_lfw(root: Path) -> None:
    for name in ("A_B/A_B_0001", "A_B/A_B_0002", "C/C_0001"):
        image(root / f"{name}.png")
    text(root / "pairs.txt", "2\t1", "A_B\t1\t2", "A_B\t1\tC\t1", "A_B\t2\t1", "A_B\t2\tC\t1")


def make_cfp(root: Path) -> None:
    for person in ("001", "002"):
        for pose in ("frontal", "profile"):
            for k in ("01", "02"):
                image(root / f"Data/Images/{person}/{pose}/{k}.png")
    for letter, pose in (("F", "frontal"), ("P", "profile")):
        names = [f"../Data/Images/{person}/{pose}/{k}.jpg" for person in ("001", "002") for k in ("01", "02")]
        text(root / f"Protocol/Pair_list_{letter}.txt", *(f"{i} {name}" for i, name in enumerate(names, start=1)))
    for kind in ("FP", "FF"):
        text(root / f"Protocol/Split/{kind}/01/same.txt", "1,2", "3,4")
        text(root / f"Protocol/Split/{kind}/01/diff.txt", "1,3")
        text(root / f"Protocol/Split/{kind}/02/same.txt", "4,3")
        text(root / f"Protocol/Split/{kind}/02/diff.txt", "2,4")


def make_agedb(root: Path) -> None:
    for name in ("0_MariaCallas_35_f", "1_MariaCallas_65_f", "20_JoanOfArc_19_f"):
        image(root / f"{name}.png")
    text(root / "agedb_30_pairs.txt", "0_MariaCallas_35_f.jpg 1_MariaCallas_65_f.jpg 1", "1 20 0")


def make_two_lines(root: Path, name: str, folder: str) -> None:
    for k in (1, 2, 3):
        image(root / folder / f"Jo_Doe_{k}.png")
    lines = ("Jo_Doe_1.jpg 7", "Jo_Doe_2.jpg 7", "Jo_Doe_1.jpg 0", "Jo_Doe_3.jpg 0")
    text(root / f"pairs_{name}.txt", *lines)


def test_lfw(tmp_path: Path) -> None:
    make_lfw(tmp_path)
    pairs = read_lfw(tmp_path)
    assert named(pairs)[1] == ("A_B/A_B_0001.png", "C/C_0001.png", False)
    assert (pairs.num_folds, len(pairs), [f.name for f in pairs.files]) == (
        2,
        3,
        [n.split("/")[1] for n in pairs.names],
    )


def test_cfp(tmp_path: Path) -> None:
    make_cfp(tmp_path)
    pairs = read_cfp(tmp_path)
    f, p = "Data/Images/{}/frontal/{}.png", "Data/Images/{}/profile/{}.png"
    assert named(pairs) == [
        (f.format("001", "01"), p.format("001", "02"), True),
        (f.format("002", "01"), p.format("002", "02"), True),
        (f.format("001", "01"), p.format("002", "01"), False),
        (f.format("002", "02"), p.format("002", "01"), True),
        (f.format("001", "02"), p.format("002", "02"), False),
    ]
    assert pairs.num_folds == 2
    assert named(read_cfp(tmp_path, kind="FF"))[0] == (f.format("001", "01"), f.format("001", "02"), True)
    # the aligned copy elsewhere, as align.py writes one of Data/Images
    (tmp_path / "Data/Images").rename(tmp_path / "aligned")
    moved = read_cfp(tmp_path / "aligned", tmp_path / "Protocol")
    assert named(moved)[0] == ("001/frontal/01.png", "001/profile/02.png", True)
    with pytest.raises(UserError, match=r"not the folder Protocol of CFP.*Split/FP"):
        read_cfp(tmp_path / "aligned")
    text(tmp_path / "Protocol/Split/FP/01/same.txt", "1,9")
    with pytest.raises(UserError, match=r"same\.txt line 1: '1,9'"):
        read_cfp(tmp_path / "aligned", tmp_path / "Protocol")


def test_agedb(tmp_path: Path) -> None:
    make_agedb(tmp_path)
    pairs = read_agedb(tmp_path)
    assert named(pairs) == [
        ("0_MariaCallas_35_f.png", "1_MariaCallas_65_f.png", True),
        ("1_MariaCallas_65_f.png", "20_JoanOfArc_19_f.png", False),
    ]
    assert pairs.num_folds == 10
    # the flag in front, paths that lead nowhere here, separated by tabs
    one, other, third = (f"AgeDB/x/{name}" for name in ("0_MariaCallas_35_f.jpg", "1_MariaCallas_65_f.jpg", "20"))
    third = "AgeDB/x/20_JoanOfArc_19_f.jpg"
    listed = text(tmp_path / "other.txt", f"1\t{one}\t{other}", f"-1\t{one}\t{third}")
    assert [issame for *_, issame in named(read_agedb(tmp_path, listed))] == [True, False]
    wrong = text(tmp_path / "wrong.txt", "0 1 0", "1 20 0")
    with pytest.raises(UserError, match=r"line 1: '0 1 0': the flag says two people, the names say otherwise"):
        read_agedb(tmp_path, wrong)
    with pytest.raises(UserError, match=r"line 1: 'a b c'; two images and a flag"):
        read_agedb(tmp_path, text(tmp_path / "wrong.txt", "a b c"))
    text(tmp_path / "second_30.txt", "")
    with pytest.raises(UserError, match=r"pairs_file: not set, and .* holds agedb_30_pairs.txt, second_30.txt"):
        read_agedb(tmp_path)


@pytest.mark.parametrize(("name", "folder"), [("CALFW", "aligned images"), ("CPLFW", "images"), ("CALFW", "")])
def test_two_lines_a_pair(tmp_path: Path, name: str, folder: str) -> None:
    make_two_lines(tmp_path, name, folder)
    place = f"{folder}/" if folder else ""
    pairs = read_two_lines(tmp_path, name=name)
    assert named(pairs) == [
        (f"{place}Jo_Doe_1.png", f"{place}Jo_Doe_2.png", True),
        (f"{place}Jo_Doe_1.png", f"{place}Jo_Doe_3.png", False),
    ]
    assert len(pairs) == 3


def test_two_lines_that_do_not_fit(tmp_path: Path) -> None:
    make_two_lines(tmp_path, "CALFW", "images")
    make_two_lines(tmp_path, "CALFW", "aligned images")
    with pytest.raises(UserError, match=r"are both there; move one folder elsewhere"):
        read_two_lines(tmp_path)
    for lines, message in (
        (["a.jpg 1"], "1 lines; two are wanted"),
        (["a.jpg 1", "b.jpg 0"], "the two lines of a pair have one flag"),
        (["a.jpg", "b.jpg"], "`image flag` is wanted twice"),
    ):
        text(tmp_path / "pairs_CALFW.txt", *lines)
        with pytest.raises(UserError, match=message):
            read_two_lines(tmp_path)


def test_any_list(tmp_path: Path) -> None:
    for name in ("a/1", "b/1", "b/2"):
        image(tmp_path / f"{name}.png")
    listed = text(tmp_path / "list.txt", "b/1.png,b/2.png,1", "a/1.png,b/1.png,0", "a/1.png,b/9.png,0")
    with pytest.raises(UserError, match=r"lacks 1 images of list.txt, first b/9"):
        read_list(tmp_path, listed)
    pairs = read_list(tmp_path, listed, skip_missing=True)
    assert named(pairs) == [("b/1.png", "b/2.png", True), ("a/1.png", "b/1.png", False)]
    assert pairs.num_skipped == 1
    with pytest.raises(UserError, match=r"refused: the name '\.\./x'"):
        read_list(tmp_path, text(tmp_path / "list.txt", "../x.png,b/2.png,1"))


def make_rfw(root: Path) -> None:
    for group in RFW_GROUPS:
        for name in ("m.1/m.1_0001", "m.1/m.1_0002", "m.2/m.2_0001"):
            image(root / "data" / group / f"{name}.png")
        text(root / "txts" / group / f"{group}_pairs.txt", "m.1\t1\t2", "m.1\t1\tm.2\t1")


def test_rfw(tmp_path: Path) -> None:
    make_rfw(tmp_path)
    groups = open_rfw(tmp_path)
    assert list(groups) == list(RFW_GROUPS)
    assert named(groups["Indian"]) == [
        ("m.1/m.1_0001.png", "m.1/m.1_0002.png", True),
        ("m.1/m.1_0001.png", "m.2/m.2_0001.png", False),
    ]
    write_bin(groups["Asian"], tmp_path / "Asian.bin")
    (tmp_path / "txts/Asian/Asian_pairs.txt").unlink()
    assert open_rfw(tmp_path)["Asian"].issame.tolist() == [True, False]
    (tmp_path / "Asian.bin").unlink()
    with pytest.raises(UserError, match=r"rfw_dir: .* lacks Asian_pairs.txt; the groups are African"):
        open_rfw(tmp_path)


def test_benchmarks_are_found_by_name(tmp_path: Path) -> None:
    make_lfw(tmp_path / "LFW")
    make_cfp(tmp_path / "cfp-dataset")
    make_agedb(tmp_path / "AgeDB")
    make_two_lines(tmp_path / "calfw", "CALFW", "aligned images")
    make_two_lines(tmp_path / "cplfw", "CPLFW", "images")
    folders = open_benchmarks(tmp_path)
    assert list(folders) == ["lfw", "cfp_fp", "cplfw", "agedb_30", "calfw"]
    write_bin(folders["cfp_fp"], tmp_path / "lfw.bin")  # a .bin goes first
    assert len(open_benchmarks(tmp_path)["lfw"].issame) == 5
    with pytest.raises(UserError, match=r"benchmarks_dir: .* holds none of lfw\.bin, cfp_fp\.bin"):
        open_benchmarks(tmp_path / "calfw")


@pytest.mark.parametrize("layout", ["lfw", "cfp_fp", "agedb_30", "calfw", "list"])
def test_every_layout_is_written_as_bin(tmp_path: Path, monkeypatch, capsys, layout: str) -> None:
    make_lfw(tmp_path / "lfw")
    make_cfp(tmp_path / "cfp_fp")
    make_agedb(tmp_path / "agedb_30")
    make_two_lines(tmp_path / "calfw", "CALFW", "images")
    make_agedb(tmp_path / "list")
    text(
        tmp_path / "own.txt",
        "1_MariaCallas_65_f.jpg 0_MariaCallas_35_f.jpg 1",
        "1_MariaCallas_65_f 20_JoanOfArc_19_f 0",
    )
    own = ["--pairs-file", str(tmp_path / "own.txt")] if layout == "list" else []
    source = LAYOUTS[layout](tmp_path / layout, *map(Path, own[1:]))

    command = ["utils.data", "convert", str(tmp_path / layout), str(tmp_path / "x.bin"), "--to", "bin"]
    monkeypatch.setattr(sys, "argv", [*command, "--layout", layout, *own])
    assert main() == 0
    assert capsys.readouterr().out == f"{len(source.issame)} pairs in {tmp_path / 'x.bin'}\n"
    written = read_bin(tmp_path / "x.bin")
    assert written.issame.tolist() == source.issame.tolist()
    images = [source.encoded(index) for index in source.pairs.reshape(-1).tolist()]
    assert [written.encoded(index) for index in range(len(written))] == images


def test_a_bin_of_a_list_with_gaps(tmp_path: Path, monkeypatch, capsys) -> None:
    make_two_lines(tmp_path / "calfw", "CALFW", "images")
    (tmp_path / "calfw/pairs_CALFW.txt").open("a").write("Jo_Doe_1.jpg 0\nJo_Doe_9.jpg 0\n")
    command = ["utils.data", "convert", str(tmp_path / "calfw"), str(tmp_path / "x.bin"), "--to", "bin"]
    monkeypatch.setattr(sys, "argv", [*command, "--layout", "calfw"])
    with pytest.raises(UserError, match=r"lacks 1 images of pairs_CALFW\.txt, first Jo_Doe_9"):
        main()
    monkeypatch.setattr(sys, "argv", [*command, "--layout", "calfw", "--skip-missing"])
    assert main() == 0
    assert capsys.readouterr().out == f"2 pairs in {tmp_path / 'x.bin'}, 1 left out\n"


def test_sets_by_settings(tmp_path: Path) -> None:
    make_lfw(tmp_path / "lfw")
    make_cfp(tmp_path / "cfp")
    sets = open_sets(
        benchmarks_dir=str(tmp_path), pairs_file=str(tmp_path / "lfw/pairs.txt"), root=str(tmp_path / "lfw")
    )
    assert list(sets) == ["lfw", "cfp_fp", "pairs"]
    assert list(open_sets(root=str(tmp_path / "cfp"), layout="cfp_ff")) == ["cfp_ff"]
    with pytest.raises(UserError, match="are both called cfp_fp"):
        open_sets(benchmarks_dir=str(tmp_path), root=str(tmp_path / "cfp"), layout="cfp_fp")
    with pytest.raises(UserError, match=r"dataset\.layout: 'ijb' is not one of lfw, cfp_fp"):
        open_sets(root=str(tmp_path), layout="ijb")
    with pytest.raises(UserError, match=r"validation\.pairs_file: no such file"):
        open_sets(root=str(tmp_path), pairs_file="none.txt", keys=("validation.", "validation."))
    make_two_lines(tmp_path / "calfw", "CALFW", "images")
    with pytest.raises(UserError, match="2 pairs in 10 folds"):
        open_sets(root=str(tmp_path / "calfw"), layout="calfw")
