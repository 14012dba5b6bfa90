"""Embedding many images: what is there, in parts that can be lost and made again, and the files that come of it.

The images are embedded in parts of about 256, each kept in `<output_dir>/.parts` until all are done: a killed run goes
on with the part it was at. Parts and their batches do not depend on the number of ranks, and so neither do the numbers.
Legend: n images, D width.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import read_json, write_atomically, write_json
from utils.config import UserError, existing_file, existing_folder
from utils.contexts import read_names
from utils.data.face_dataset import read_identity_list
from utils.embedders import Embedder
from utils.embedding_writers import WRITERS
from utils.images import (
    image_size,
    list_images,
    read_block,
    read_image,
    recorded_tile_size,
    tile_of_block,
)
from utils.logging import get_logger

PART_SIZE = 256
DESCRIPTION, PARTS = "encoder.json", ".parts"
LAYOUTS = ("auto", "folders", "blocks")
logger = get_logger("encode")


@dataclass
class EncodeSettings:
    """The keys of configs/encode_config.yaml but for the embedder."""

    checkpoint: str
    input_dir: str
    output_dir: str
    images_name_file_path: str | None = None
    exclude_identities_file: str | None = None
    layout: str = "auto"
    tile_size: int | None = None
    format: str = "uiface"
    flip: bool = True
    batch_size: int = 64
    device: str = "auto"

    def check(self) -> None:
        """Raise UserError for values that make no sense, before work starts."""
        existing_folder(self.input_dir, "input_dir", "the folder of aligned faces")
        for key, options in (("layout", LAYOUTS), ("format", tuple(WRITERS))):
            if getattr(self, key) not in options:
                raise UserError(f"{key}: {getattr(self, key)!r} is not one of {', '.join(options)}")
        for key in ("batch_size", "tile_size"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"{key}: {getattr(self, key)}; it is at least 1")
        if self.images_name_file_path is not None and self.layout == "blocks":
            raise UserError(
                "images_name_file_path: names images, and layout=blocks reads identity blocks; leave one out"
            )


@dataclass
class Work:
    """What there is to embed: files in order, and how they are cut into parts."""

    files: list[str]  # below input_dir, images or blocks
    tile_size: int | None  # of blocks; None: images
    starts: list[int]  # index of the first file of each part

    def part(self, index: int) -> list[str]:
        """The files of one part."""
        stop = self.starts[index + 1] if index + 1 < len(self.starts) else len(self.files)
        return self.files[self.starts[index] : stop]


def plan(options: EncodeSettings) -> Work:
    """Look through input_dir, in an order that depends on names alone (or on the list of names).

    Raises UserError where nothing is there, a name has no image or leads outside input_dir, or a block is none.
    """
    root = Path(options.input_dir)
    if options.images_name_file_path is not None:
        files = _without_excluded(_listed(root, options.images_name_file_path), options, blocks=False)
        return Work(files, None, list(range(0, len(files), PART_SIZE)))
    files = list_images(root)
    if not files:
        raise UserError(
            f"input_dir: no images in {root}; it holds one folder of images an identity, or identity blocks"
        )
    tile_size = options.tile_size or recorded_tile_size(root)
    blocks = options.layout == "blocks" or (
        options.layout == "auto"
        and not any("/" in file for file in files)
        and tile_of_block(root / files[0], tile_size)
    )
    files = _without_excluded(files, options, blocks=bool(blocks))
    if not blocks:
        return Work(files, None, list(range(0, len(files), PART_SIZE)))
    sizes = {tile_of_block(root / file, tile_size) for file in files}
    tile = next(iter(sizes))
    if tile is None or len(sizes) > 1:
        shown = tile_size or "128 (4 columns) or 112 (5 columns)"
        raise UserError(
            f"tile_size: not every image in {root} is a block of tiles of {shown}; say tile_size, or layout=folders"
        )
    starts, filled = [], 0
    for index, file in enumerate(files):
        height, width = image_size(root / file)
        tiles = height * width // tile**2
        if not starts or filled + tiles > PART_SIZE:
            starts.append(index)
            filled = 0
        filled += tiles
    return Work(files, tile, starts)


def _without_excluded(files: list[str], options: EncodeSettings, *, blocks: bool) -> list[str]:
    """The files of the identities that exclude_identities_file does not name: folders, or blocks by their own name."""
    people = [PurePosixPath(file).stem if blocks else PurePosixPath(file).parent.name for file in files]
    excluded = read_identity_list(options.exclude_identities_file, "exclude_identities_file", people)
    kept = [file for file, person in zip(files, people, strict=True) if person not in excluded]
    if not kept:
        raise UserError(f"exclude_identities_file: {options.exclude_identities_file} leaves nobody of input_dir")
    return kept


def _listed(root: Path, path: str) -> list[str]:
    """The images that a list names, in its order."""
    file = existing_file(path, "images_name_file_path", "the list of image paths")
    names = [name.replace("\\", "/").removeprefix("./") for name in read_names(file)]
    if not names:
        raise UserError(f"images_name_file_path: {file} names no images")
    if len(set(names)) != len(names):
        raise UserError(f"images_name_file_path: {file} names {len(names) - len(set(names))} images twice")
    outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise UserError(f"images_name_file_path: {outside[0]!r} in {file} leads outside input_dir")
    absent = sorted(set(names) - set(list_images(root)))
    if absent:
        raise UserError(
            f"images_name_file_path: no image {absent[0]} in {root} ({len(absent)} of {len(names)} are missing)"
        )
    return names


def describe(options: EncodeSettings, embedder: Embedder, work: Work) -> dict[str, Any]:
    """What the embeddings depend on; a finished or begun output folder of another description is not reused."""
    images = hashlib.sha256()
    for file in work.files:
        images.update(f"{file}\0{(Path(options.input_dir) / file).stat().st_size}\n".encode())
    kept = {key: value for key, value in asdict(options).items() if key not in ("output_dir", "device", "layout")}
    return {
        **kept,
        "tile_size": work.tile_size,
        "files": len(work.files),
        "files_sha256": images.hexdigest(),
        "embedder_sha256": embedder.sha256,
    }


def run(options: EncodeSettings, embedder: Embedder) -> None:
    """Embed everything in options.input_dir and write it as options.format says; see `plan` and `WRITERS`.

    Every rank calls this. Raises UserError for what cannot be read, and for embeddings in output_dir that were made
    otherwise.
    """
    options.check()
    root, output_dir = Path(options.input_dir), Path(options.output_dir)
    work = plan(options)
    if options.format == "files":
        _check_stems(work)
    if work.tile_size is None:
        _warn_of_uncropped(root, work.files[0])
    description_file, parts = output_dir / DESCRIPTION, output_dir / PARTS
    description = describe(options, embedder, work)
    if description_file.exists():
        found = read_json(description_file)
        if found == description:
            logger.info("%s: embedded before", output_dir)
            return
        _check_same_settings(found, description, output_dir)
    files = [parts / f"{index:08d}.npz" for index in range(len(work.starts))]
    if distributed.is_main():
        _claim(parts, description)
    distributed.barrier()
    todo = [index for index, file in enumerate(files) if not file.exists()]
    distributed.barrier()  # all ranks have looked before one writes: they must share out the same list
    mine = distributed.share(todo)
    device = distributed.device(options.device)
    with tqdm(
        total=sum(len(work.part(index)) for index in mine), desc="embed", unit="file", disable=not distributed.is_main()
    ) as bar:
        for index in mine:
            part = work.part(index)
            settings = {"batch_size": options.batch_size, "flip": options.flip, "device": device}
            if work.tile_size is None:
                names, rows = part, embedder.embed(part, root=root, **settings)
            else:
                names, tiles = _read_blocks(root, part, work.tile_size)
                rows = embedder.embed(tiles, **settings)
            _save_part(files[index], names, rows)
            bar.update(len(part))
    distributed.barrier()
    if distributed.is_main():
        loaded = [_load_part(file) for file in files]
        names = [name for part_names, _ in loaded for name in part_names]
        embeddings = np.concatenate([rows for _, rows in loaded])
        WRITERS[options.format](output_dir, names, embeddings)
        write_json(description_file, description)
        shutil.rmtree(parts)
        logger.info(
            "%d embeddings, %d wide, in %s (main.py: model.context_input_channels=%d)",
            *(len(names), embedder.width, output_dir, embedder.width),
        )
    distributed.barrier()


def _read_blocks(root: Path, files: Sequence[str], tile_size: int) -> tuple[list[str], np.ndarray]:
    """Tiles of all blocks in order, uint8 (n, tile_size, tile_size, 3), and their names `<identity>/<k>`."""
    names, tiles = [], []
    for file in files:
        block = read_block(read_image(root / file), tile_size)
        identity = PurePosixPath(file).with_suffix("").as_posix()
        names += [f"{identity}/{k}" for k in range(len(block))]
        tiles.append(block)
    return names, np.concatenate(tiles)


def _save_part(file: Path, names: Sequence[str], rows: np.ndarray) -> None:
    def save(temporary: Path) -> None:
        with temporary.open("wb") as out:  # given a path, np.savez would append .npz to it
            np.savez(out, names=np.asarray(names, dtype=np.str_), embeddings=rows)

    write_atomically(file, save)


def _load_part(file: Path) -> tuple[list[str], np.ndarray]:
    with np.load(file, allow_pickle=False) as part:
        return part["names"].tolist(), part["embeddings"]


def _check_stems(work: Work) -> None:
    """Two images of one folder may differ in their ending alone; their embeddings would be one file."""
    seen: dict[str, str] = {}
    for file in work.files:
        other = seen.setdefault(PurePosixPath(file).with_suffix("").as_posix(), file)
        if other != file:
            raise UserError(f"format: files would write one file for {other} and {file}; rename one, or take uiface")


def _warn_of_uncropped(root: Path, file: str) -> None:
    height, width = image_size(root / file)
    if height != width:
        logger.warning(
            "input_dir: %s is %d x %d pixels, not a square crop; recognisers take faces as align.py makes them",
            *(file, width, height),
        )


def _check_same_settings(found: dict[str, Any], description: dict[str, Any], output_dir: Path) -> None:
    """More images are embedded anew; with another network or folder, what is there may still be needed."""
    for key in ("embedder_sha256", "input_dir", "images_name_file_path", "tile_size", "format", "flip"):
        if found.get(key) != description[key]:
            shown = "checkpoint" if key == "embedder_sha256" else key
            raise UserError(
                f"{shown}: {description[shown]}, but the embeddings in {output_dir} were made with {found.get(shown)}"
                f"{' of other content' if found.get(shown) == description[shown] else ''}; give another output_dir"
            )


def _claim(parts: Path, description: dict[str, Any]) -> None:
    """Keep the parts of a killed run with the same description; throw others away."""
    claim = parts / DESCRIPTION
    if not (claim.exists() and read_json(claim) == description):
        shutil.rmtree(parts, ignore_errors=True)
        write_json(claim, description)
