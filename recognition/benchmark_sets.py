"""Which pairs to measure a recogniser on, opened by name, and their embeddings in memory.

Legend: m images, P pairs, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from recognition.embedding import embed_images
from utils import distributed
from utils.config import UserError, existing_file, existing_folder
from utils.data.formats.benchmarks import ALIASES, LAYOUTS, open_benchmarks
from utils.data.formats.pairs import VerificationPairs, read_bin


def open_sets(
    *,
    benchmarks_dir: str | None = None,
    bin_files: Sequence[str] = (),
    pairs_file: str | None = None,
    root: str | None = None,
    layout: str = "lfw",
    skip_missing: bool = False,
    keys: tuple[str, str] = ("", "dataset."),
) -> dict[str, VerificationPairs]:
    """Every set that is named, by the name that tables give it.

    Args:
        benchmarks_dir: the five benchmarks, as `<name>.bin` or a folder each.
        bin_files: insightface's files.
        pairs_file, root, layout: a list and its images, in one of LAYOUTS; some layouts find their list in `root`.
        keys: what stands before the names of the settings in messages: all but root and layout, and those two.

    Raises:
        UserError: a path that is not there, a set that cannot be read or has fewer pairs than folds, two of one name.
    """
    sets: dict[str, VerificationPairs] = {}

    def add(name: str, pairs: VerificationPairs) -> None:
        if name in sets:
            raise UserError(f"{sets[name].path} and {pairs.path} are both called {name}; test them in two commands")
        if not 2 <= pairs.num_folds <= len(pairs.issame):
            raise UserError(
                f"{pairs.path}: {len(pairs.issame)} pairs in {pairs.num_folds} folds; at least two folds of a pair "
                "each are wanted"
            )
        sets[name] = pairs

    if benchmarks_dir is not None:
        folder = existing_folder(benchmarks_dir, f"{keys[0]}benchmarks_dir", "with lfw.bin and others")
        for name, pairs in open_benchmarks(folder, skip_missing=skip_missing).items():
            add(name, pairs)
    for path in bin_files:
        file = existing_file(path, f"{keys[0]}bin_files" if keys[0] else "bin_file")
        add(_benchmark_name(file.stem), read_bin(file))
    if pairs_file is not None or root is not None:
        if layout not in LAYOUTS:
            raise UserError(f"{keys[1]}layout: {layout!r} is not one of {', '.join(LAYOUTS)}")
        images = existing_folder(root, f"{keys[1]}root", "the images of pairs_file")
        pairs_path = None if pairs_file is None else Path(pairs_file).expanduser()
        if pairs_path is not None and not pairs_path.exists():
            raise UserError(f"{keys[0]}pairs_file: no such file: {pairs_path}")
        own_list = pairs_path is not None and layout in ("lfw", "list")  # any list may have these forms
        add(pairs_path.stem if own_list else layout, LAYOUTS[layout](images, pairs_path, skip_missing=skip_missing))
    return sets


def _benchmark_name(stem: str) -> str:
    return next((name for name, aliases in ALIASES.items() if stem.lower() in aliases), stem)


def embed_pairs(
    network: nn.Module,
    pairs: VerificationPairs,
    *,
    batch_size: int,
    flip: bool,
    device: torch.device | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """Embeddings (2 P, D), rows 2i and 2i+1 those of pair i. Each image is embedded once, by one of the processes.

    Every process calls this. `progress`: label of a bar on rank 0.
    """
    mine = distributed.share(range(len(pairs)))
    part = embed_images(
        network,
        [partial(pairs.pixels, index) for index in mine],
        batch_size=batch_size,
        flip=flip,
        device=device,
        progress=progress if distributed.is_main() else None,
    )
    embeddings = np.empty((len(pairs), part.shape[1]), np.float32)
    for some, rows in distributed.all_gather_objects((mine, part)):
        embeddings[some] = rows
    return embeddings[pairs.pairs.reshape(-1)]
