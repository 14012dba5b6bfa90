"""Look at data sets and convert them.

    python -m utils.data validate PATH [--root FOLDER] [--mean-face FILE] [--threads N]
    python -m utils.data convert SRC OUT --to folders|tfrecord|rec|webdataset|bin [--root FOLDER]

PATH and SRC: class folders, a name list, TFRecord shards with their index, a .rec file, WebDataset shards, an
insightface .bin or LFW's pairs.txt; the format is told by the content. Exit status of `validate`: 1 where the set would
spoil a training run.
"""

import argparse
import sys
from pathlib import Path

from utils.config import CommandLineParser, UserError, check_writable, command_line, existing_folder
from utils.data.formats.benchmarks import LAYOUTS
from utils.data.formats.check import check_images
from utils.data.formats.labelled import LabelledImages
from utils.data.formats.pairs import FOLDS, VerificationPairs, draw_pairs, write_bin
from utils.data.formats.recognise import open_images, open_labelled
from utils.data.formats.writers import WRITERS, write_labelled
from utils.images import write_image
from utils.logging import get_logger, setup_logging

log = get_logger("data")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    commands = CommandLineParser(prog="python -m utils.data", description=__doc__)
    sub = commands.add_subparsers(dest="command", required=True)
    root = "where the images of a name list, the shards of an index or the people of pairs.txt are; else beside it"

    check = sub.add_parser("validate", help="what a data set holds, and what would spoil a training run")
    check.add_argument("path", type=Path)
    check.add_argument("--root", type=Path, help=root)
    check.add_argument("--mean-face", type=Path, default=Path("mean_face.png"), help="where the mean face is written")
    check.add_argument("--threads", type=int, help="threads that decode; else one a processor")

    change = sub.add_parser("convert", help="write a data set in another format, its images byte for byte")
    change.add_argument("src", type=Path)
    change.add_argument("out", type=Path, help="a new folder; with --to bin a new file")
    change.add_argument("--to", required=True, choices=[*WRITERS, "bin"])
    change.add_argument("--root", type=Path, help=root)
    change.add_argument("--images-per-shard", type=int, default=10_000, help="of tfrecord and webdataset")
    change.add_argument("--pairs-file", type=Path, help="bin: a list of pairs, its images in SRC; cfp: Protocol/")
    layouts = f"{', '.join(LAYOUTS)}; recognition.test reads the same"
    change.add_argument("--layout", choices=list(LAYOUTS), help=f"bin: of SRC and its list, else lfw: {layouts}")
    change.add_argument("--skip-missing", action="store_true", help="leave out pairs of the list without an image")
    change.add_argument("--pairs-per-fold", type=int, default=300, help="bin without a list: pairs of each kind drawn")
    change.add_argument("--seed", type=int, default=0, help="bin without a list: of the drawn pairs")
    return commands


def validate(options: argparse.Namespace) -> int:
    """Print what is in the data set and write its mean face; 1 where it has faults."""
    if options.threads is not None and options.threads < 1:
        raise UserError(f"--threads: {options.threads}; it must be at least 1")
    check_writable(options.mean_face, "--mean-face")
    report = check_images(open_images(options.path, options.root), threads=options.threads)
    sys.stdout.write(report.text())
    if report.mean_face is not None:
        write_image(options.mean_face, report.mean_face)
        sys.stdout.write(f"mean face: {options.mean_face}\n")
    return 1 if report.faults else 0


def convert(options: argparse.Namespace) -> int:
    """Write SRC in another format."""
    check_writable(options.out, "OUT")
    if options.to != "bin":
        data = open_labelled(options.src, options.root)
        write_labelled(data, options.out, options.to, images_per_shard=options.images_per_shard)
        sys.stdout.write(f"{len(data)} images of {len(data.identities)} identities in {options.out}\n")
        return 0
    if options.out.exists():
        raise UserError(f"OUT: {options.out} exists; name a new file")
    pairs = _pairs(options)
    if pairs.num_folds != FOLDS:
        log.warning("%s has %d folds; a .bin is read as %d", pairs.path, pairs.num_folds, FOLDS)
    write_bin(pairs, options.out)
    skipped = f", {pairs.num_skipped} left out" if pairs.num_skipped else ""
    sys.stdout.write(f"{len(pairs.issame)} pairs in {options.out}{skipped}\n")
    return 0


def _pairs(options: argparse.Namespace) -> VerificationPairs:
    """Those of a list (--pairs-file, or the one that --layout has in SRC), those that SRC is, or new ones out of its
    identities."""
    if options.pairs_file is not None or options.layout is not None:
        if options.pairs_file is not None and not options.pairs_file.exists():
            raise UserError(f"--pairs-file: no such file: {options.pairs_file}")
        existing_folder(options.src, "SRC", "the images of the pairs")
        read = LAYOUTS[options.layout or "lfw"]
        return read(options.src, options.pairs_file, skip_missing=options.skip_missing)
    data = open_images(options.src, options.root)
    return draw_pairs(data, options.pairs_per_fold, options.seed) if isinstance(data, LabelledImages) else data


def main() -> int:
    """Run the command that sys.argv names."""
    options = parser().parse_args()
    setup_logging()
    return {"validate": validate, "convert": convert}[options.command](options)


if __name__ == "__main__":
    command_line(main)
