"""Identity blocks => one folder an identity: python split_identity_blocks.py input_dir=... output_dir=...

A block `<identity>.png` becomes `<identity>/0.png`, `<identity>/1.png`, ... in the order of its tiles, without the
black filler of its last row. A folder appears whole or not at all, so the same command goes on after a kill;
under torchrun the blocks are split over ranks.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from omegaconf import DictConfig
from tqdm import tqdm

from utils import distributed
from utils.config import UserError, entry_point, existing_folder, settings
from utils.images import (
    block_tile_size,
    default_threads,
    image_size,
    list_images,
    read_block,
    read_image,
    recorded_tile_size,
    write_image,
)
from utils.logging import get_logger

logger = get_logger("split")


@dataclass
class SplitSettings:
    """The keys of configs/split_config.yaml."""

    input_dir: str
    output_dir: str
    tile_size: int | None
    threads: int | None


def tile_size_of(file: Path, tile_size: int | None) -> int:
    """Side of a block's tiles; UserError where its size is no whole number of tiles."""
    height, width = image_size(file)
    size = tile_size or block_tile_size(width)
    if size is None:
        raise UserError(f"tile_size: {file.name} is {width} pixels wide, not 4 x 128 or 5 x 112; say the tiles' side")
    if height % size or width % size:
        raise UserError(f"tile_size: {file.name}, {width} x {height} pixels, is no whole number of tiles of {size}")
    return size


def split_block(file: Path, folder: Path, tile_size: int) -> int:
    """Write the tiles of a block into a new folder and return how many; the folder must not exist."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tiles = read_block(read_image(file), tile_size)
    for index, tile in enumerate(tiles):
        write_image(unfinished / f"{index}.png", tile)
    os.replace(unfinished, folder)
    return len(tiles)


def split_blocks(options: SplitSettings) -> int:
    """Split every block whose identity has no folder yet; returns the number of images this rank wrote."""
    root = existing_folder(options.input_dir, "input_dir", "the folder of identity blocks")
    files = list_images(root)
    if any(root.glob("*.tar")):
        raise UserError(
            f"input_dir: {root} holds WebDataset shards, not blocks; recognition.train reads them as they are"
        )
    if not files:
        raise UserError(f"input_dir: no images in {root}; it holds one block an identity")
    identities: dict[str, str] = {}
    for file in files:
        other = identities.setdefault(str(PurePosixPath(file).with_suffix("")), file)
        if other != file:
            raise UserError(f"input_dir: {other} and {file} are blocks of the same identity; rename one")
    tile_size = options.tile_size or recorded_tile_size(root)
    if (
        tile_size is None
        and all("/" in file for file in files)
        and block_tile_size(image_size(root / files[0])[1]) is None
    ):
        raise UserError(
            f"input_dir: {root} holds folders of images ({files[0]}), not blocks; there is nothing to split"
        )
    sizes = {identity: tile_size_of(root / file, tile_size) for identity, file in identities.items()}
    todo = [identity for identity in identities if not (Path(options.output_dir) / identity).exists()]
    distributed.barrier()  # all ranks have looked before one writes: they must share out the same list
    mine = distributed.share(todo)
    logger.info("%s: %d blocks, %d of them split before", root, len(identities), len(identities) - len(todo))

    def split(identity: str) -> int:
        return split_block(root / identities[identity], Path(options.output_dir) / identity, sizes[identity])

    with ThreadPoolExecutor(options.threads or default_threads()) as pool:
        counts = tqdm(pool.map(split, mine), total=len(mine), unit="block", disable=not distributed.is_main())
        return sum(counts)


@entry_point("split_config")
def main(cfg: DictConfig) -> None:
    counts = distributed.all_gather_objects(split_blocks(settings(cfg, SplitSettings, "")))
    logger.info("%d images written to %s", sum(counts), cfg.output_dir)


if __name__ == "__main__":
    main()
