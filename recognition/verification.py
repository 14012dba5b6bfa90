"""Face verification, one person or two: pure functions from arrays to numbers, and the reader of LFW's `pairs.txt`.

The protocol is that of LFW (Huang et al., 2007) as the ArcFace line of work runs it. Distances are squared Euclidean
between unit vectors, in [0, 4]; a pair is accepted as one person when its distance lies below the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.checkpoint import write_atomically
from utils.config import UserError
from utils.images import IMAGE_SUFFIXES

THRESHOLDS = np.arange(0, 4, 0.01)
FAR_LEVELS = (1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class VerificationResult:
    """What the 10-fold protocol and the ROC say about one set of pairs."""

    fold_accuracy: np.ndarray  # (folds,) accuracy on each fold at the threshold that was best on the others
    fold_thresholds: np.ndarray  # (folds,) that threshold, squared distance
    num_genuine: int
    num_impostor: int
    tar_at_far: dict[float, float]  # share of genuine pairs accepted where at most that share of impostors is
    eer: float  # equal error rate
    roc_far: np.ndarray  # (points,) ascending
    roc_tar: np.ndarray  # (points,)

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the folds."""
        return float(self.fold_accuracy.mean())

    @property
    def accuracy_std(self) -> float:
        """Standard deviation over the folds (ddof 0)."""
        return float(self.fold_accuracy.std())

    @property
    def threshold(self) -> float:
        """Mean threshold over the folds, squared distance of unit vectors."""
        return float(self.fold_thresholds.mean())

    def summary(self) -> dict[str, object]:
        """Everything but the ROC, ready for JSON."""
        return {
            "accuracy": self.accuracy,
            "accuracy_std": self.accuracy_std,
            "threshold": self.threshold,
            "eer": self.eer,
            "tar_at_far": {f"{far:g}": tar for far, tar in self.tar_at_far.items()},
            "num_genuine": self.num_genuine,
            "num_impostor": self.num_impostor,
            "num_folds": len(self.fold_accuracy),
            "fold_accuracy": self.fold_accuracy.tolist(),
        }


def evaluate_pairs(embeddings: np.ndarray, issame: np.ndarray, num_folds: int = 10) -> VerificationResult:
    """Run the verification protocol.

    Args:
        embeddings: (2 P, D); rows 2i and 2i+1 are pair i. They are normalised here first.
        issame: (P,) bool, True where both images show one person.
        num_folds: the pairs are cut into this many consecutive folds, unshuffled: the protocol's lists are in order.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, fewer pairs than folds, only one kind of pair.
    """
    distances, issame = pair_distances(embeddings, issame)
    if not 2 <= num_folds <= len(issame):
        raise ValueError(f"num_folds: {num_folds}; there are {len(issame)} pairs, so it must be in 2..{len(issame)}")
    fold_accuracy, fold_thresholds = cross_validated_accuracy(distances, issame, num_folds)
    far, tar = roc_curve(distances, issame)
    return VerificationResult(
        fold_accuracy=fold_accuracy,
        fold_thresholds=fold_thresholds,
        num_genuine=int(issame.sum()),
        num_impostor=int((~issame).sum()),
        tar_at_far={level: float(tar[far <= level].max()) for level in FAR_LEVELS},
        eer=equal_error_rate(far, tar),
        roc_far=far,
        roc_tar=tar,
    )


def pair_distances(embeddings: np.ndarray, issame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check and turn (2 P, D) embeddings into (P,) squared distances of unit vectors; issame (P,) as bool."""
    embeddings = np.asarray(embeddings)
    issame = np.asarray(issame).astype(bool)
    if embeddings.ndim != 2 or issame.ndim != 1 or len(embeddings) != 2 * len(issame):
        raise ValueError(f"embeddings {embeddings.shape} and issame {issame.shape}: (2 P, D) and (P,) are wanted")
    if not np.isfinite(embeddings).all():
        bad = int((~np.isfinite(embeddings)).any(axis=1).sum())
        raise ValueError(f"embeddings: {bad} of {len(embeddings)} rows are not finite; the network has diverged")
    if issame.all() or not issame.any():
        raise ValueError(f"issame: {int(issame.sum())} of {len(issame)} pairs are genuine; both kinds are needed")
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.maximum(norms, np.finfo(embeddings.dtype).tiny)
    return np.square(unit[0::2] - unit[1::2]).sum(axis=1), issame


def cross_validated_accuracy(
    distances: np.ndarray, issame: np.ndarray, num_folds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Per fold: the accuracy at the threshold of 0:4:0.01 that is best (first maximum) on all the other folds.

    Returns (folds,) accuracies and (folds,) thresholds.
    """
    correct = (distances[:, None] < THRESHOLDS) == issame[:, None]  # (P, thresholds)
    folds = np.array_split(correct, num_folds)
    hits = np.stack([fold.sum(axis=0) for fold in folds])  # (folds, thresholds)
    sizes = np.array([len(fold) for fold in folds])
    best = (hits.sum(axis=0) - hits).argmax(axis=1)  # (folds,) first maximum over the other folds
    return hits[np.arange(num_folds), best] / sizes, THRESHOLDS[best]


def roc_curve(distances: np.ndarray, issame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true accept rates (points,) as the threshold passes every distinct distance; from (0, 0) to (1, 1)."""
    order = np.argsort(distances, kind="stable")
    ordered, genuine = distances[order], issame[order]
    last_of_ties = np.append(ordered[1:] != ordered[:-1], True)
    tar = np.cumsum(genuine)[last_of_ties] / genuine.sum()
    far = np.cumsum(~genuine)[last_of_ties] / (~genuine).sum()
    return np.append(0.0, far), np.append(0.0, tar)


def equal_error_rate(far: np.ndarray, tar: np.ndarray) -> float:
    """The rate at which false accepts equal false rejects, linear between the two points of the ROC around it."""
    gap = far - (1.0 - tar)  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    if gap[after] == 0:
        return float(far[after])
    share = gap[after - 1] / (gap[after - 1] - gap[after])
    return float(far[after - 1] + share * (far[after] - far[after - 1]))


def plot_roc(results: Mapping[str, VerificationResult], path: str | Path) -> None:
    """Write a PNG with the ROC of every result, false accepts on a logarithmic axis down to one impostor pair."""
    figure = Figure(figsize=(6, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        axes.step(result.roc_far, result.roc_tar, where="post", label=f"{name} ({100 * result.accuracy:.2f} %)")
    lowest = 1 / max(result.num_impostor for result in results.values())
    axes.set(xscale="log", xlim=(lowest, 1), ylim=(0, 1), xlabel="false accept rate", ylabel="true accept rate")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


@dataclass(frozen=True)
class Pairs:
    """A verification set: P pairs of images."""

    paths: list[tuple[Path, Path]]
    issame: np.ndarray  # (P,) bool
    num_folds: int
    num_skipped: int  # pairs of the list that were left out because an image is missing


def read_pairs(pairs_file: str | Path, root: str | Path, *, skip_missing: bool = False) -> Pairs:
    """Read LFW's `pairs.txt` and find its images `<root>/<person>/<person>_<nnnn>.<ext>`.

    The first line holds `folds <tab> pairs`: each fold has that many genuine lines (`person n1 n2`), then as many
    impostor lines (`person1 n1 person2 n2`). A file whose first line holds one number (a
    development list), or that has no such line, counts as 10 folds.

    Args:
        skip_missing: leave out pairs with a missing image instead of refusing the list.

    Raises:
        UserError: a missing file or folder, a line that is neither form, missing images.
    """
    pairs_file, root = Path(pairs_file), Path(root)
    if not pairs_file.is_file():
        raise UserError(f"pairs_file: no such file: {pairs_file}")
    if not root.is_dir():
        raise UserError(f"dataset.root: no such folder: {root}")
    lines = pairs_file.read_text(encoding="utf-8").splitlines()
    num_folds, first = 10, 0
    if lines and lines[0].split() and all(field.isdigit() for field in lines[0].split()) and len(lines[0].split()) <= 2:
        header = [int(field) for field in lines[0].split()]
        first = 1
        if len(header) == 2:
            num_folds = header[0]

    folder_files: dict[str, dict[str, Path]] = {}

    def find(person: str, number: str) -> Path | None:
        if person not in folder_files:
            folder = root / person
            files = sorted(folder.iterdir()) if folder.is_dir() else []
            folder_files[person] = {file.stem: file for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
        return folder_files[person].get(f"{person}_{int(number):04d}")

    paths: list[tuple[Path, Path]] = []
    issame: list[bool] = []
    missing: list[str] = []
    num_skipped = 0
    for number, line in enumerate(lines[first:], start=first + 1):
        if not line.strip():
            continue
        fields = line.strip().split("\t") if "\t" in line else line.split()
        if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
            wanted = [(fields[0], fields[1]), (fields[0], fields[2])]
        elif len(fields) == 4 and fields[1].isdigit() and fields[3].isdigit():
            wanted = [(fields[0], fields[1]), (fields[2], fields[3])]
        else:
            raise UserError(
                f"pairs_file: {pairs_file} line {number}: {line.strip()!r}; "
                "`person n1 n2` or `person1 n1 person2 n2` is wanted, separated by tabs"
            )
        found = [find(*image) for image in wanted]
        absent = [f"{person}/{person}_{int(n):04d}" for (person, n), f in zip(wanted, found, strict=True) if not f]
        missing += absent
        if absent:
            num_skipped += 1
            continue
        paths.append((found[0], found[1]))
        issame.append(len(fields) == 3)
    if missing and not skip_missing:
        raise UserError(
            f"dataset.root: {root} lacks {len(set(missing))} images of {pairs_file.name}, first {missing[0]}.*; "
            f"complete the folder, or set dataset.skip_missing=true to leave out the {num_skipped} pairs they are in"
        )
    if not paths or all(issame) or not any(issame):
        raise UserError(
            f"pairs_file: {pairs_file}: {sum(issame)} genuine and {len(issame) - sum(issame)} impostor pairs with both "
            f"images under {root}; both kinds are needed"
        )
    return Pairs(paths, np.array(issame), num_folds, num_skipped)
