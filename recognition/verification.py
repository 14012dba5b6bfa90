"""Face verification, one person or two: pure functions from arrays to numbers.

The protocol is that of LFW (Huang et al., 2007) as the ArcFace line of work runs it. Distances are squared Euclidean
between unit vectors, in [0, 4]; a pair is accepted as one person when its distance lies below the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = np.arange(0, 4, 0.01)
FAR_LEVELS = (1e-2, 1e-3, 1e-4)
ROC_POINTS = 256


@dataclass(frozen=True)
class Rates:
    """What the scores of genuine and impostor pairs say at every threshold."""

    num_genuine: int
    num_impostor: int
    tar_at_far: dict[float, float]  # share of genuine pairs accepted where at most that share of impostors is
    eer: float  # equal error rate
    roc_far: np.ndarray  # (points,) ascending
    roc_tar: np.ndarray  # (points,)

    def resolves(self, far: float) -> bool:
        """Whether `far` is at least one of the impostor pairs; below that, the rate is the one at no false accept."""
        return far * self.num_impostor >= 1 - 1e-9

    def rates(self) -> dict[str, object]:
        """Everything but the ROC, ready for JSON; a rate that the impostor pairs do not resolve is None."""
        return {
            "eer": self.eer,
            "tar_at_far": {f"{far:g}": tar if self.resolves(far) else None for far, tar in self.tar_at_far.items()},
            "smallest_far": 1 / self.num_impostor,
            "num_genuine": self.num_genuine,
            "num_impostor": self.num_impostor,
        }


@dataclass(frozen=True)
class VerificationResult(Rates):
    """What the 10-fold protocol and the ROC say about one set of pairs."""

    fold_accuracy: np.ndarray  # (folds,) accuracy on each fold at the threshold that was best on the others
    fold_thresholds: np.ndarray  # (folds,) that threshold, squared distance

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
            **self.rates(),
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
    rates = error_rates(distances, issame, FAR_LEVELS)
    return VerificationResult(**vars(rates), fold_accuracy=fold_accuracy, fold_thresholds=fold_thresholds)


def error_rates(distances: np.ndarray, issame: np.ndarray, levels: Sequence[float]) -> Rates:
    """Rates at every threshold on `distances` (P,), smaller meaning more alike; `issame` (P,) bool, both kinds in it.

    `levels`: the false accept rates at which true accept rates are given.
    """
    far, tar = roc_curve(distances, issame)
    return Rates(
        num_genuine=int(issame.sum()),
        num_impostor=int((~issame).sum()),
        tar_at_far={level: float(tar[np.searchsorted(far, level, side="right") - 1]) for level in levels},
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


def thin_roc(far: np.ndarray, tar: np.ndarray, points: int = ROC_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """About `points` points of a ROC, evenly spread over the logarithm of the false accept rate, for plots and files.

    Each is a point of the curve: the highest true accept rate that its false accept rate allows.
    """
    lowest = far[far > 0].min()
    levels = np.append(0.0, np.geomspace(lowest, 1, points))
    levels[1], levels[-1] = lowest, 1.0  # whatever geomspace rounded them to
    kept = np.unique(np.searchsorted(far, levels, side="right") - 1)
    return far[kept], tar[kept]
