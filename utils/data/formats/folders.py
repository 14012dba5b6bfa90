"""Image files: class folders `<root>/<identity>/<image>`, and name lists such as CASIA's `image_names.pkl`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.config import UserError, existing_folder
from utils.contexts import read_names
from utils.data.formats.labelled import LabelledImages, check_inside, labels_by, parent_of
from utils.images import list_images, read_bytes
from utils.logging import get_logger

log = get_logger(__name__)


class ImageFiles(LabelledImages):
    """Labelled image files below `root`; their names are their paths."""

    def __init__(
        self,
        path: str | Path,
        root: Path,
        names: Sequence[str],
        identities: Sequence[str],
        labels: np.ndarray,
        format: str = "class folders",
    ) -> None:
        super().__init__(path, names, identities, labels)
        self.root, self.format = root, format

    def encoded(self, index: int) -> bytes:
        return read_bytes(os.path.join(self.root, self.names[index]))

    def describe(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])  # of every image that is read: no Path for it


def read_class_folders(root: str | Path) -> ImageFiles:
    """List `<root>/<identity>/...`: every folder directly below `root` is an identity, whatever lies deeper is its own.

    Identities are sorted by name, images by identity and name. Raises UserError where a folder cannot be read or none
    holds an image.
    """
    root = Path(root)
    try:
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        for name in folders:
            next((root / name).iterdir(), None)  # list_images would pass over a folder that it may not enter
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error
    images = [name for name in list_images(root) if "/" in name]
    if not images:
        blocks = any(root.glob("*.png"))
        hint = "; identity blocks are split by split_identity_blocks.py first" if blocks else ""
        raise UserError(f"{root} holds no identities; folders of images are wanted, one a person{hint}")
    number = {name: label for label, name in enumerate(folders)}
    images.sort(key=lambda name: number[name.split("/", 1)[0]])
    return ImageFiles(root, root, images, folders, np.array([number[name.split("/", 1)[0]] for name in images]))


def read_name_list(path: str | Path, root: str | Path | None = None) -> ImageFiles:
    """The images that a list names, in its order: CASIA's `image_names.pkl` (paths relative to `root`), or a
    text file with one path a line. The identity of an image is its parent folder.

    `root`: the folder that the paths are relative to; None: the folder of the list. Names without a file are left out
    with a warning. Raises UserError for names outside the root, without a folder, or when no file is there.
    """
    path = Path(path)
    root = path.parent if root is None else existing_folder(root, "root", "the folder that the names are relative to")
    names = [name.strip().replace("\\", "/").removeprefix("./") for name in read_names(path)]
    names = [name for name in names if name]
    for name in names:
        check_inside(name, path)  # before any of them is looked for
    present = set(list_images(root))
    found = [name for name in names if name in present]
    if not found:
        example = f"the first is {names[0]!r}" if names else "there are none"
        raise UserError(f"{path}: no image of its {len(names)} names is below {root} ({example}); give the right root")
    if len(found) < len(names):
        missing = next(name for name in names if name not in present)
        log.warning("%s: %d names without an image are left out, first %s", path, len(names) - len(found), missing)
    loose = next((name for name in found if not parent_of(name)), None)
    if loose is not None:
        raise UserError(f"{path}: {loose} has no folder, which would tell its identity")
    return ImageFiles(path, root, found, *labels_by([parent_of(name) for name in found]), format="name list")
