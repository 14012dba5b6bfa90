"""Face verification, one person or two: pure functions from arrays to numbers.

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
