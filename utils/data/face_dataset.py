"""Face images with one identity embedding each, as the diffusion model learns from them."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch.utils.data import Dataset

from utils.config import UserError, existing_file, existing_folder
from utils.contexts import read_embeddings
from utils.images import centre_square, list_images, read_image, resize, to_float
from utils.logging import get_logger

log = get_logger(__name__)


def read_identity_list(path: str | Path | None, key: str, present: Iterable[str]) -> frozenset[str]:
    """Those of the identities `present` that the file names, one a line; none for None.

    Says how many they are. UserError where the file names nobody who is here (everybody would be left in), does not
    exist or is no text.
    """
    if path is None:
        return frozenset()
    file = existing_file(path, key, "a text file with one identity a line")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {file} is not a text file in UTF-8; one identity a line is wanted") from error
    named = {line.strip() for line in lines if line.strip()}
    found = named & set(present)
    if not found:
        raise UserError(
            f"{key}: none of the {len(named)} lines of {file} names an identity that is here; one name of a folder a "
            "line is wanted (leave the key out where nobody is to be left out)"
        )
    log.info("%s: %d of the %d identities in %s are here and left out", key, len(found), len(named), file)
    return frozenset(found)


class FaceDataset(Dataset):
    """Images below `samples_root` in the order of their embeddings.

    Embeddings come as one file (`embeddings_file_path`: .npy beside `images_name_file_path`, .npz with `names` and
    `embeddings`, or a dictionary), or as a folder with one .npy an image (`embeddings_root`); with neither, the images
    below `samples_root` serve an unconditional model. `sample_file_ending` replaces the ending that the names carry.
    The identity of an image is the name of its parent folder. Embeddings without an image (a face that was not found)
    are left out and counted.

    An item `(index, flip)` is a float32 image (3, image_size, image_size) in [-1, 1] RGB: centred square, bilinear with
    antialias. `embeddings` is (n, D) float32 with unit rows, or None.
    """

    def __init__(
        self,
        samples_root: str,
        image_size: int,
        embeddings_file_path: str | None = None,
        images_name_file_path: str | None = None,
        embeddings_root: str | None = None,
        sample_file_ending: str | None = None,
        exclude_identities_file: str | None = None,
    ) -> None:
        """Reads names and embeddings, not images. UserError for a missing path, or when nothing is left to train on."""
        self.root = existing_folder(samples_root, "dataset.samples_root", "the folder of training images")
        self.image_size = image_size
        embeddings: np.ndarray | None = None
        if embeddings_file_path is not None:
            existing_file(embeddings_file_path, "dataset.embeddings_file_path", "encode.py writes one")
            if images_name_file_path is not None:
                existing_file(images_name_file_path, "dataset.images_name_file_path", "the list of image paths")
            names, embeddings = read_embeddings(embeddings_file_path, images_name_file_path)
        elif embeddings_root is not None:
            existing_folder(embeddings_root, "dataset.embeddings_root", "a folder with one .npy an image")
            names, embeddings = read_embeddings(embeddings_root)
        else:
            names = list_images(self.root)
        present = set(list_images(self.root))
        rows, self.names = self._match(names, present, sample_file_ending)
        found = len(rows)
        people = (PurePosixPath(name).parent.name for name in present)  # embeddings may lack them already
        excluded = read_identity_list(exclude_identities_file, "dataset.exclude_identities_file", people)
        keep = [i for i, name in enumerate(self.names) if PurePosixPath(name).parent.name not in excluded]
        rows, self.names = [rows[i] for i in keep], [self.names[i] for i in keep]
        if not rows:
            example = f"the first name is {names[0]!r}" if names else "there are no names"
            raise UserError(
                f"dataset.samples_root: no image of {self.root} is named in the embeddings ({example}; "
                f"{len(present)} images there, {found} matched, {found - len(keep)} excluded); "
                "check samples_root and sample_file_ending"
            )
        report = log.info if found > len(names) / 2 else log.warning  # few matches: another folder, or another ending
        report(
            "%d images of %d identities in %s (%d names without an image, %d embeddings of excluded people)",
            len(rows),
            len({PurePosixPath(name).parent.as_posix() for name in self.names}),
            self.root,
            len(names) - found,
            found - len(keep),
        )
        self.embeddings: torch.Tensor | None = None
        if embeddings is not None:
            selected = torch.from_numpy(np.ascontiguousarray(embeddings[rows], dtype=np.float32))
            self.embeddings = torch.nn.functional.normalize(selected, dim=1)  # (n, D)

    @staticmethod
    def _match(names: list[str], present: set[str], ending: str | None) -> tuple[list[int], list[str]]:
        """Rows of `names` whose image exists, and these images. FFHQ names its embeddings without ending."""
        by_stem = {str(PurePosixPath(p).with_suffix("")): p for p in present}
        rows, paths = [], []
        for row, name in enumerate(names):
            path = name if ending is None else str(PurePosixPath(name).with_suffix(ending))
            if path not in present and ending is None:
                path = by_stem.get(name, by_stem.get(str(PurePosixPath(name).with_suffix("")), path))
            if path in present:
                rows.append(row)
                paths.append(path)
        return rows, paths

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        """Image (3, H, W) float32 in [-1, 1], mirrored when `flip`, and its index."""
        index, flip = item
        pixels = resize(centre_square(read_image(self.root / self.names[index])), self.image_size)
        image = to_float(pixels)  # uint8 (H, W, 3) => float32 (3, H, W) in [-1, 1]
        return (image.flip(-1) if flip else image), index

    def same_identity(self) -> list[np.ndarray]:
        """For each image, the indices of all images of its identity (its parent folder), itself included."""
        members: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(self.names):
            members[PurePosixPath(name).parent.as_posix()].append(index)
        arrays = {identity: np.asarray(indices) for identity, indices in members.items()}
        return [arrays[PurePosixPath(name).parent.as_posix()] for name in self.names]
