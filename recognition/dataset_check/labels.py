"""Whether images of one identity are more alike than images of two: of eigenfaces, or of an embedder.

Legend: n images, D width of the vectors, G genuine pairs (of one identity), I impostor pairs (of two).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recognition.dataset_check.findings import Outcome
from recognition.dataset_check.mean_face import LUMA
from utils.data.formats.check import some

PERMUTATIONS = 20  # of the labels, which show what chance gives
MIN_IDENTITIES = 10  # with two images or more
# AUC is the share of genuine-impostor pairs of pairs in which the genuine one is more alike; 0.5 by chance.
CHANCE = 0.55  # eigenfaces below: rendered and LFW's people reach 0.75, shuffled ones 0.50
MAX_DEVIATION = 0.025  # of the AUC by chance, above which there are too few images for a verdict at CHANCE
UNRELATED = 0.65  # an embedder below
ALIKE = 0.5  # mean impostor cosine above which everybody looks the same to the embedder
LOW_SHARE = 0.1  # share of identities of low consistency that is told
COMPONENTS, SIDE = 40, 16  # eigenfaces, and the side in pixels that the middle of the face is shrunk to
MIDDLE = np.s_[:, 24:104, 16:96]  # rows and columns of 112 x 112
# An embedder prefers exchanged channels when its AUC's distance to 1 falls, and its FDR rises, by this factor.
PREFERENCE = 1.3


@dataclass(frozen=True)
class Separability:
    """How genuine and impostor cosines differ."""

    auc: float  # area under the ROC
    deviation: float  # standard deviation of the AUC when labels are shuffled
    genuine: tuple[float, float]  # mean and standard deviation of the cosines
    impostor: tuple[float, float]
    identities: np.ndarray  # (k,) labels with two images or more
    consistency: np.ndarray  # (k,) mean cosine of their genuine pairs

    @property
    def fdr(self) -> float:
        """Fisher's discriminant ratio (mu_g - mu_i)^2 / (sigma_g^2 + sigma_i^2)."""
        (mean_g, std_g), (mean_i, std_i) = self.genuine, self.impostor
        return (mean_g - mean_i) ** 2 / max(std_g**2 + std_i**2, 1e-12)

    def facts(self) -> dict[str, float]:
        """For the record."""
        return {
            "auc": round(self.auc, 4),
            "auc_deviation_by_chance": round(self.deviation, 4),
            "fdr": round(self.fdr, 3),
            "genuine_mean": round(self.genuine[0], 4),
            "impostor_mean": round(self.impostor[0], 4),
        }


def separability(vectors: np.ndarray, labels: np.ndarray, seed: int = 0) -> Separability | None:
    """Compare all pairs of unit vectors (n, D) with labels (n,).

    None where fewer than MIN_IDENTITIES have two images. Time and memory grow with n^2: n is a few thousand at most.
    """
    from scipy.stats import rankdata  # here: it takes a second of the start of every process

    order = np.argsort(labels, kind="stable")
    vectors, labels = vectors[order], labels[order]
    identities, counts = np.unique(labels, return_counts=True)
    if (counts > 1).sum() < MIN_IDENTITIES:
        return None
    rows, columns = np.triu_indices(len(labels), 1)
    cosines = (vectors @ vectors.T)[rows, columns]  # (G + I,)
    is_genuine = labels[rows] == labels[columns]
    ranks = np.zeros((len(labels), len(labels)), np.float32)
    ranks[rows, columns] = ranks[columns, rows] = rankdata(cosines) / len(cosines)  # in (0, 1]
    first, second = rows[is_genuine], columns[is_genuine]

    def auc(permutation: np.ndarray) -> float:
        """Mann and Whitney's U of the genuine pairs, with the images exchanged by `permutation`, over G I."""
        pairs, genuine = len(cosines), len(first)
        mean_rank = ranks[permutation[first], permutation[second]].mean(dtype=np.float64) * pairs
        return float((mean_rank - (genuine + 1) / 2) / (pairs - genuine))

    rng = np.random.default_rng(seed)
    by_chance = [auc(rng.permutation(len(labels))) for _ in range(PERMUTATIONS)]
    genuine, impostor = cosines[is_genuine], cosines[~is_genuine]
    sums = np.bincount(labels[first], genuine, minlength=int(labels.max()) + 1)[identities]
    several = counts > 1
    return Separability(
        auc=auc(np.arange(len(labels))),
        deviation=float(np.sqrt(np.mean(np.square(np.array(by_chance) - 0.5)))),
        genuine=(float(genuine.mean()), float(genuine.std())),
        impostor=(float(impostor.mean()), float(impostor.std())),
        identities=identities[several],
        consistency=(sums[several] / (counts[several] * (counts[several] - 1) / 2)),
    )


def eigenfaces(faces: np.ndarray) -> np.ndarray:
    """Whitened principal components of the middle of aligned faces, uint8 (n, 112, 112, 3) => unit float32 (n, D).

    Turk and Pentland (CVPR 1991); mean and contrast of each image are taken out first.
    """
    grey = np.stack([face @ LUMA.astype(np.float32) for face in faces[MIDDLE]])
    step = grey.shape[1] // SIDE
    small = grey.reshape(len(grey), SIDE, step, SIDE, step).mean(axis=(2, 4)).reshape(len(grey), -1)
    small -= small.mean(axis=1, keepdims=True)
    small /= small.std(axis=1, keepdims=True) + 1  # plus one grey level: a flat image stays flat
    small -= small.mean(axis=0)
    left, singular, _ = np.linalg.svd(small, full_matrices=False)
    vectors = left[:, : min(COMPONENTS, int((singular > 1e-3 * singular[0]).sum()))]
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def check_pixel_labels(faces: np.ndarray, labels: np.ndarray) -> Outcome:
    """Whether aligned faces uint8 (n, 112, 112, 3) of one identity look alike in their pixels.

    Eigenfaces tell people apart badly, but shuffled labels from true ones well: over all pairs the difference is many
    deviations wide.
    """
    outcome = Outcome()
    found = separability(eigenfaces(faces), labels) if len(faces) > 1 else None
    if found is None:
        outcome.facts["pixel_labels"] = f"none made: fewer than {MIN_IDENTITIES} identities with two images"
        return outcome
    outcome.facts["pixel_labels"] = found.facts()
    if found.deviation > MAX_DEVIATION:
        outcome.facts["pixel_labels"]["verdict"] = "none made: too few images"
    elif found.auc < CHANCE:
        outcome.warning(
            "labels",
            f"by their pixels (eigenfaces) two images of one identity are more alike than two of different ones in "
            f"{100 * found.auc:.1f} % of the cases, where {CHANCE:.0%} or more is usual and 50 % is chance",
            "labels that are shuffled, or folders that all show the same person",
            "embedder=own embedder.checkpoint=FILE tells which; look at the images of some identities",
        )
    return outcome


def check_embeddings(
    embeddings: np.ndarray, labels: np.ndarray, identities: list[str], swapped: np.ndarray | None
) -> Outcome:
    """Whether an embedder finds identities in unit embeddings (n, D) with labels (n,).

    identities: names by label. swapped: the embeddings of the same images with red and blue exchanged; None of grey
    images. Told are shuffled labels, identities that are one, a part of them that is inconsistent, and channels in an
    order that the embedder does not know.
    """
    outcome = Outcome()
    found = separability(embeddings, labels)
    if found is None:
        outcome.facts["embeddings"] = f"none made: fewer than {MIN_IDENTITIES} identities with two images"
        return outcome
    outcome.facts["embeddings"] = found.facts()
    exchanged = None if swapped is None else separability(swapped, labels)
    if exchanged is not None:
        outcome.facts["embeddings_channels_exchanged"] = exchanged.facts()
        better = (1 - found.auc) > PREFERENCE * (1 - exchanged.auc) and exchanged.fdr > PREFERENCE * found.fdr
        if better and exchanged.auc > UNRELATED:
            outcome.error(
                "channel order",
                f"with red and blue exchanged the embedder tells people apart better (AUC {exchanged.auc:.3f}, as they "
                f"are {found.auc:.3f})",
                "BGR was written as RGB, or embedder.channel_order is not the embedder's",
                "write the files anew with the channels reversed, or name the embedder's order",
            )
    seen = (
        f"mean cosine {found.genuine[0]:.3f} within identities, {found.impostor[0]:.3f} between them, AUC "
        f"{found.auc:.3f} where 0.5 is chance"
    )
    if found.auc < UNRELATED:
        if found.impostor[0] > ALIKE:
            outcome.error(
                "identities",
                seen,
                "identities that collapsed into one person, or an embedder to which all such faces are alike",
                "look at images of some identities; check that the embedder was trained, and on such faces",
            )
        else:
            outcome.error(
                "labels",
                seen,
                "labels that are shuffled, or an embedder that does not know such faces",
                "compare the names and labels of the source; look at images of some identities",
            )
        return outcome
    boundary = (np.median(found.consistency) + found.impostor[0]) / 2
    low = np.flatnonzero(found.consistency < boundary)
    low = low[np.argsort(found.consistency[low])]
    names = [identities[label] for label in found.identities[low].tolist()]
    outcome.facts["low_consistency"] = {"share": round(len(low) / len(found.identities), 4), "identities": names}
    if len(low) >= LOW_SHARE * len(found.identities):
        outcome.warning(
            "identities",
            f"{len(low)} of {len(found.identities)} identities are less consistent (mean cosine under {boundary:.2f}) "
            f"than half of what is usual here ({some(names)})",
            "several people in one folder, wrong labels, or generated images that lost their identity",
            "look at them; dataset.exclude_identities_file leaves identities out (dataset_check.json names them)",
        )
    return outcome
