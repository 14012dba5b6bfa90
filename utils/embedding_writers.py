"""The forms in which embeddings are written, all of which `utils.contexts` reads. Legend: n images, D width."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from utils.checkpoint import write_atomically
from utils.contexts import mean_contexts, save_rows, write_dictionary, write_embeddings


def write_uiface(output_dir: Path, names: Sequence[str], embeddings: np.ndarray) -> None:
    """UIFace's form: embeddings.npy (n, D) and its names as text and as the pickled list that the published code reads;
    contexts.npy, one row an identity."""
    write_atomically(output_dir / "image_names.pkl", lambda path: path.write_bytes(pickle.dumps(list(names))))
    write_embeddings(output_dir, names, embeddings)


def write_idiff(output_dir: Path, names: Sequence[str], embeddings: np.ndarray) -> None:
    """IDiff-Face's form: dictionaries from name to vector, of images (embeddings.npy) and identities (contexts.npy)."""
    write_dictionary(output_dir / "contexts.npy", *mean_contexts(names, embeddings))
    write_dictionary(output_dir / "embeddings.npy", names, embeddings)


def write_files(output_dir: Path, names: Sequence[str], embeddings: np.ndarray) -> None:
    """FFHQ's form: one `.npy` (D,) an image, in the folders of the images."""
    for name, row in zip(names, embeddings, strict=True):
        save_rows(output_dir / f"{stem(name)}.npy", row)


WRITERS: dict[str, Callable[[Path, Sequence[str], np.ndarray], None]] = {
    "uiface": write_uiface,
    "idiff": write_idiff,
    "files": write_files,
}


def stem(name: str) -> str:
    """An image's name without its ending; tiles of blocks have none."""
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix() if path.suffix else name
