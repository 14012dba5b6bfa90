"""Identity embeddings and contexts: reading what users hold, writing what the project makes, drawing new identities.

An embedding is a unit vector that a recogniser gives to one image; a context is the unit vector that stands for an
identity (the normalised mean of its embeddings, or a new one).

Legend: n rows, D width. All arrays that leave this module are float32 (n, D) with rows of length 1.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from utils import safe_pickle
from utils.checkpoint import save_torch, write_atomically, write_text
from utils.config import UserError
from utils.context_selection import ContextSelector
from utils.similarity import sum_by_label

# Names of identities that a file does not name; the width is fixed so that a name does not depend on their count.
NUMBERED = "{:05d}"
DRAWS_AT_ONCE = 1024
DRAWS_PER_CONTEXT = 200  # how often a context may be drawn, on average, before the search is given up


def read_embeddings(path: str | Path, names_path: str | Path | None = None) -> tuple[list[str], np.ndarray]:
    """Image names (relative paths with forward slashes) and their embeddings (n, D).

    `path` is one of: a `.npy` of (n, D) whose names stand in `names_path` (a text file with one a line, or a pickled
    list; None: `image_names.txt` or `image_names.pkl` beside it); an `.npz` with `names` and `embeddings`; a dictionary
    from name to vector (a pickle, an `.npy` with objects or a torch archive, as IDiff-Face writes them); a folder with
    one `.npy` an image, whose names have no ending then.
    Raises UserError where file, names and rows do not fit together or a row is no direction.
    """
    path = Path(path)
    names, rows = _read(path)
    if names_path is not None or names is None:
        names_path = _names_beside(path, ("image_names.txt", "image_names.pkl")) if names_path is None else names_path
        if names_path is None:
            raise UserError(
                f"{path}: its rows have no names; put image_names.txt or image_names.pkl beside it, or give "
                "dataset.images_name_file_path"
            )
        names = read_names(Path(names_path))
    names = [name.replace("\\", "/").removeprefix("./") for name in names]
    return _checked(path, names, rows)


def read_contexts(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Identity names and contexts (n, D), from the formats of `read_embeddings`.

    A `.npy` of (n, D) takes its names from the file beside it (`context_names.txt` for `contexts.npy`), where there is
    one; else they are numbers. A single vector (D,) is one context.
    """
    path = Path(path)
    names, rows = _read(path)
    if names is None:
        beside = _names_beside(path, (f"{path.stem.removesuffix('s')}_names.txt",))
        if beside is None and path.name == "embeddings.npy" and _names_beside(path, ("image_names.txt",)):
            raise UserError(f"{path}: one embedding an image, not one context an identity; contexts.npy is beside it")
        names = [NUMBERED.format(row) for row in range(len(rows))] if beside is None else read_names(beside)
    return _checked(path, names, rows)


def _names_beside(path: Path, candidates: Sequence[str]) -> Path | None:
    return next((path.with_name(name) for name in candidates if path.with_name(name).is_file()), None)


def _read(path: Path) -> tuple[list[str] | None, np.ndarray]:
    """Names, or None where the format has none, and rows as they are in the file."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.npy") if not file.name.startswith("."))
        if not files:
            raise UserError(f"{path}: no .npy files in this folder")
        names = [file.relative_to(path).with_suffix("").as_posix() for file in files]
        return names, _stack(names, [_vector(safe_pickle.load(file), str(file)) for file in files], path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder of embeddings")
    value = safe_pickle.load(path)
    if isinstance(value, dict) and {"names", "embeddings"} <= set(value):
        return [_name(name) for name in value["names"]], _array(value["embeddings"], str(path))
    if isinstance(value, dict):
        names = [_name(name) for name in value]
        vectors = [_vector(vector, f"{path}: {name}") for name, vector in zip(names, value.values(), strict=True)]
        return names, _stack(names, vectors, path)
    rows = _array(value, str(path))
    return None, rows[None] if rows.ndim == 1 else rows


def read_names(path: Path) -> list[str]:
    """A text file with one name a line, or a pickled list of names; UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of names")
    if path.suffix in (".pkl", ".pickle"):
        names = safe_pickle.load(path)
        if not isinstance(names, list | tuple | np.ndarray):
            raise UserError(f"{path}: holds a {type(names).__name__}; a list of names is wanted")
        return [_name(name) for name in names]
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8; a list of names is wanted") from error


def _name(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _array(value: Any, where: str) -> np.ndarray:
    """Numbers as float32; UserError for anything else."""
    if isinstance(value, torch.Tensor):
        value = value.float().numpy()
    array = np.asarray(value)
    if array.dtype.kind != "f":
        raise UserError(f"{where}: holds {array.dtype} {array.shape}; embeddings are floating-point numbers")
    return array.astype(np.float32)


def _vector(value: Any, where: str) -> np.ndarray:
    vector = _array(value, where)
    vector = vector[0] if vector.ndim == 2 and len(vector) == 1 else vector
    if vector.ndim != 1:
        raise UserError(f"{where}: has shape {vector.shape}; one vector is wanted")
    return vector


def _stack(names: Sequence[str], vectors: Sequence[np.ndarray], path: Path) -> np.ndarray:
    for name, vector in zip(names, vectors, strict=True):
        if len(vector) != len(vectors[0]):
            raise UserError(f"{path}: {name} is {len(vector)} wide, {names[0]} {len(vectors[0])}")
    return np.stack(vectors) if vectors else np.empty((0, 0), np.float32)


def _checked(path: Path, names: list[str], rows: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names and unit rows; UserError where they do not fit or a row is zero or not finite."""
    if rows.ndim != 2 or rows.size == 0:
        raise UserError(f"{path}: has shape {rows.shape}; embeddings are (number, width)")
    if len(names) != len(rows):
        raise UserError(f"{path}: {len(rows)} rows, but {len(names)} names")
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))
        raise UserError(f"{path}: the name {twice} stands for two rows")
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms < 1e-12))
    if len(bad):
        what = "is zero" if np.isfinite(norms[bad[0]]) else "has numbers that are not finite"
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise UserError(f"{path}: row {bad[0]}, {names[bad[0]]}, {what}{more}")
    return names, (rows / norms[:, None]).astype(np.float32)


def mean_contexts(names: Sequence[str], embeddings: np.ndarray) -> tuple[list[str], np.ndarray]:
    """One context an identity: the normalised mean of its unit embeddings (n, D).

    The identity of `a/b/1.png` is `a/b`; an image outside any folder is an identity of its own. Sorted by name.
    """
    identities = [identity_of(name) for name in names]
    unique, index = np.unique(np.array(identities), return_inverse=True)
    sums = sum_by_label(embeddings, index, len(unique))
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    if (norms < 1e-12).any():
        raise UserError(f"{unique[norms[:, 0].argmin()]}: the embeddings of its images cancel out; it has no mean")
    return unique.tolist(), (sums / norms).astype(np.float32)


def identity_of(name: str) -> str:
    """The identity that an image's path names: its folder, or the image itself where there is none."""
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix() if path.parent == PurePosixPath(".") else path.parent.as_posix()


def write_embeddings(output_dir: str | Path, names: Sequence[str], embeddings: np.ndarray) -> None:
    """Write embeddings.npy + image_names.txt (n rows) and contexts.npy + context_names.txt (one row an identity)."""
    output_dir = Path(output_dir)
    write_rows(output_dir / "embeddings.npy", output_dir / "image_names.txt", names, embeddings)
    write_rows(output_dir / "contexts.npy", output_dir / "context_names.txt", *mean_contexts(names, embeddings))


def write_dictionary(path: str | Path, names: Sequence[str], rows: np.ndarray) -> None:
    """Write {name: (D,) float32} as a torch archive, IDiff-Face's form, whole or not at all."""
    vectors = {name: row.astype(np.float32) for name, row in zip(names, rows, strict=True)}
    save_torch(vectors, path)


def write_rows(path: str | Path, names_path: str | Path, names: Sequence[str], rows: np.ndarray) -> None:
    """Write (n, D) float32 and its names, one a line; each file whole or not at all, the rows last."""
    if len(names) != len(rows):
        raise ValueError(f"{len(rows)} rows, but {len(names)} names")
    write_text(names_path, "".join(f"{name}\n" for name in names))
    save_rows(path, rows)


def rows_digest(names: Sequence[str], rows: np.ndarray) -> str:
    """SHA-256 of named rows (n, D), whatever file they came from."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape") + rows.tobytes()).hexdigest()


def save_rows(path: str | Path, rows: np.ndarray) -> None:
    """Write (n, D), or one vector (D,), as a float32 `.npy`, whole or not at all."""

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, np.save would append .npy to it
            np.save(file, rows.astype(np.float32), allow_pickle=False)

    write_atomically(path, save)


def uniform_blocks(width: int, seed: int) -> Iterator[np.ndarray]:
    """Directions drawn uniformly, without end: blocks (DRAWS_AT_ONCE, width) of normalised Gaussian vectors."""
    generator = np.random.default_rng(seed)
    while True:
        rows = generator.standard_normal((DRAWS_AT_ONCE, width))
        yield (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def uniform_contexts(count: int, width: int, seed: int) -> np.ndarray:
    """(count, width) directions drawn uniformly: normalised Gaussian vectors (IDiff-Face, ICCV 2023).

    The first rows do not depend on `count`.
    """
    blocks = islice(uniform_blocks(width, seed), -(-count // DRAWS_AT_ONCE))
    return np.concatenate([np.empty((0, width), np.float32), *blocks])[:count]


def gaussian_contexts(
    reference: np.ndarray,
    count: int,
    seed: int,
    *,
    max_similarity: float | None = None,
    shrinkage: float | None = None,
) -> np.ndarray:
    """New identities that are distributed like known ones: (count, D).

    Directions of a Gaussian with the mean and covariance of `reference` (n, D), unit contexts of real identities. Real
    contexts fill a small part of the sphere, which uniform ones miss.

    max_similarity: no new context has a higher cosine with another new one or with a reference; nearer ones are drawn
        again. None: the cosine that one in a thousand pairs of different references exceeds.
    shrinkage: share of a sphere of equal variance that is mixed into the covariance, which few references determine
        badly. None: the share with the least expected error (Ledoit and Wolf, 2004).

    The first rows do not depend on `count`. Raises UserError where so many different identities do not exist under
    max_similarity; the search is bounded.
    """
    reference = np.asarray(reference, np.float64)
    if reference.ndim != 2 or len(reference) < 2:
        raise UserError(f"reference: {reference.shape}; at least two contexts (number, width) are needed for a spread")
    if max_similarity is None:
        cosines = reference @ reference.T
        max_similarity = float(np.quantile(cosines[np.triu_indices(len(reference), 1)], 0.999))
    root = _root(_covariance(reference, shrinkage))
    mean = reference.mean(axis=0)
    generator = np.random.default_rng(seed)
    selector = ContextSelector(count, max_among=max_similarity, max_known=max_similarity, known=reference)
    for _ in range(-(-DRAWS_PER_CONTEXT * count // DRAWS_AT_ONCE)):
        if selector.is_full:
            break
        drawn = mean + generator.standard_normal((DRAWS_AT_ONCE, len(mean))) @ root
        selector.offer(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
    if not selector.is_full:
        raise UserError(
            f"max_similarity: {max_similarity:.3f} leaves room for {len(selector)} of {count} new identities in "
            f"{DRAWS_PER_CONTEXT * count} draws; raise it or ask for fewer"
        )
    return selector.rows


def _covariance(rows: np.ndarray, shrinkage: float | None) -> np.ndarray:
    """Covariance (D, D) of (n, D), shrunk towards the sphere of the same total variance."""
    count, width = rows.shape
    centred = rows - rows.mean(axis=0)
    covariance = centred.T @ centred / count
    sphere = np.trace(covariance) / width * np.eye(width)
    if shrinkage is None:
        # Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, section 3.
        distance = np.square(covariance - sphere).sum()  # d^2
        error = (np.square(np.square(centred).sum(axis=1)).sum() / count - np.square(covariance).sum()) / count  # b^2
        shrinkage = min(1.0, error / distance) if distance > 0 else 1.0
    return (1 - shrinkage) * covariance + shrinkage * sphere


def _root(covariance: np.ndarray) -> np.ndarray:
    """A matrix R with R^T R = covariance."""
    values, vectors = np.linalg.eigh(covariance)
    return np.sqrt(values.clip(min=0))[:, None] * vectors.T
