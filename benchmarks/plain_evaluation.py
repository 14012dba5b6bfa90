"""The metrics of an evaluation written plainly, as the baseline of benchmarks.evaluation: whole matrices at once, a
mask over all images for every identity, scikit-learn and scipy. Each returns the figures that its counterpart returns.

Legend: N images, K identities, M training identities, D width, F width of features.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_curve

Figures = dict[str, float]


def genuine(embeddings: np.ndarray, labels: np.ndarray) -> Figures:
    scores = []
    for identity in range(labels.max() + 1):
        rows = embeddings[labels == identity]
        scores.append((rows @ rows.T)[np.triu_indices(len(rows), 1)])
    found = np.concatenate(scores)
    return {"pairs": len(found), "mean": found.mean(dtype=np.float64)}


def impostor(embeddings: np.ndarray, labels: np.ndarray, count: int, seed: int) -> Figures:
    cosines = embeddings @ embeddings.T  # (N, N)
    others = cosines[np.triu(labels[:, None] != labels, 1)]
    found = np.random.default_rng(seed).permutation(others)[:count]
    return {"pairs": len(found), "std": found.std(dtype=np.float64)}


def rates(genuine_scores: np.ndarray, impostor_scores: np.ndarray) -> Figures:
    truth = np.append(np.ones(len(genuine_scores)), np.zeros(len(impostor_scores)))
    far, tar, _ = roc_curve(truth, np.append(genuine_scores, impostor_scores))
    means = genuine_scores.mean(), impostor_scores.mean()
    return {
        "eer": np.interp(0, far - (1 - tar), far),
        "fmr100": (1 - tar)[far <= 0.01].min(),
        "fmr1000": (1 - tar)[far <= 0.001].min(),
        "fdr": (means[0] - means[1]) ** 2 / (genuine_scores.var() + impostor_scores.var()),
    }


def c_intra(embeddings: np.ndarray, labels: np.ndarray, r: float) -> Figures:
    shares = []
    for identity in range(labels.max() + 1):
        rows = embeddings[labels == identity]
        centre = rows.mean(axis=0)
        shares.append((1 - rows @ (centre / np.linalg.norm(centre)) < r).mean())
    return {"c_intra": np.mean(shares)}


def u_class(centres: np.ndarray, r: float) -> Figures:
    near = 1 - centres @ centres.T < r  # (K, K)
    kept: list[int] = []
    for identity in range(len(centres)):
        if not near[identity, kept].any():
            kept.append(identity)
    return {"u_class": len(kept) / len(centres)}


def leakage(centres: np.ndarray, training_centres: np.ndarray) -> Figures:
    between = training_centres @ training_centres.T  # (M, M)
    np.fill_diagonal(between, -1)
    nearest = (centres @ training_centres.T).max(axis=1)  # of (K, M)
    return {"mean": nearest.mean(), "highest": nearest.max(), "real": between.max(axis=1).mean()}


def duplicates(embeddings: np.ndarray, labels: np.ndarray, cosine: float) -> Figures:
    copies = np.tril(embeddings @ embeddings.T > cosine, -1)  # (N, N)
    same = labels[:, None] == labels
    return {"within": (copies & same).any(axis=1).mean(), "across": (copies & ~same).any(axis=1).mean()}


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int) -> Figures:
    distances = cdist(generated, real)
    real_radii = np.sort(cdist(real, real), axis=1)[:, k]  # column 0 is the image itself
    generated_radii = np.sort(cdist(generated, generated), axis=1)[:, k]
    return {
        "precision": (distances <= real_radii).any(axis=1).mean(),
        "recall": (distances <= generated_radii[:, None]).any(axis=0).mean(),
    }


def fid(real: np.ndarray, generated: np.ndarray) -> Figures:
    real, generated = real.astype(np.float64), generated.astype(np.float64)
    covariances = np.cov(real.T), np.cov(generated.T)
    root = sqrtm(covariances[0] @ covariances[1])
    distance = np.square(real.mean(axis=0) - generated.mean(axis=0)).sum()
    return {"fid": distance + np.trace(covariances[0] + covariances[1] - 2 * root.real)}
