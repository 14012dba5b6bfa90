"""1:1 verification of templates, the protocol of IJB-B (Whitelam et al., CVPRW 2017) and IJB-C (Maze et al., ICB 2018).

A template is all images of a person in one set of media. As insightface's evaluation does it: images of one medium are
averaged, media are added, the sum is normalised, and the similarity of two templates is the dot product. Three
switches stand in published tables, as N1D1F1:
    N use_norm_score      images weigh by the norm of their embedding; off: all are normalised first
    D use_detector_score  images weigh by the score of the face detector
    F use_flip_test       the embedding of the mirror image is added before all else

Legend: m images, T templates, P pairs, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recognition.verification import Rates, error_rates

FAR_LEVELS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
TEMPLATES_AT_ONCE = 1024
PAIRS_AT_ONCE = 32768  # 64 MiB of float32 embeddings, 512 wide, on each side


@dataclass
class TemplateSettings:
    """The `ijb` section of recognition_test_config.yaml."""

    use_norm_score: bool = True
    use_detector_score: bool = True
    use_flip_test: bool = True

    @property
    def switches(self) -> str:
        """As published tables name them: N1D1F1."""
        return f"N{self.use_norm_score:d}D{self.use_detector_score:d}F{self.use_flip_test:d}"


def pool_templates(
    features: np.ndarray,
    templates: np.ndarray,
    media: np.ndarray,
    scores: np.ndarray,
    *,
    use_norm_score: bool,
    use_detector_score: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of images => embeddings of templates.

    Args:
        features: (m, D), as the network gives them, not normalised.
        templates, media: (m,) numbers.
        scores: (m,) of the detector.

    Returns:
        (T,) numbers of the templates, ascending, and (T, D) float32 unit vectors.
    """
    order = np.lexsort((media, templates))  # by template, then by medium
    numbers, starts = np.unique(templates[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    pooled = np.empty((len(numbers), features.shape[1]), np.float32)
    for first in range(0, len(numbers), TEMPLATES_AT_ONCE):
        last = min(first + TEMPLATES_AT_ONCE, len(numbers))
        rows = order[starts[first] : ends[last - 1]]
        weighted = features[rows].astype(np.float64)
        if not use_norm_score:
            weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
        if use_detector_score:
            weighted *= scores[rows, None]
        new_medium = np.append(True, (np.diff(templates[rows]) != 0) | (np.diff(media[rows]) != 0))
        medium_starts = np.flatnonzero(new_medium)
        counts = np.diff(np.append(medium_starts, len(rows)))
        means = np.add.reduceat(weighted, medium_starts) / counts[:, None]
        of_template = templates[rows][medium_starts]
        sums = np.add.reduceat(means, np.flatnonzero(np.append(True, np.diff(of_template) != 0)))
        pooled[first:last] = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return numbers, pooled


def pair_similarities(numbers: np.ndarray, pooled: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cosines (P,) float32 of the templates `pairs` (P, 2), `numbers` (T,) ascending naming the rows of `pooled`."""
    similarities = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        rows = np.searchsorted(numbers, pairs[start : start + PAIRS_AT_ONCE])
        similarities[start : start + len(rows)] = np.einsum("pd,pd->p", pooled[rows[:, 0]], pooled[rows[:, 1]])
    return similarities


def evaluate_templates(
    features: np.ndarray,
    templates: np.ndarray,
    media: np.ndarray,
    scores: np.ndarray,
    pairs: np.ndarray,
    issame: np.ndarray,
    settings: TemplateSettings,
) -> Rates:
    """TAR at FAR 1e-6 to 1e-1 of the pairs of templates (P, 2), `issame` (P,) bool; the rest as `pool_templates`.

    The rate is the highest whose false accept rate does not exceed the level; insightface's script takes the point of
    the curve that is nearest to the level. Raises ValueError where the features are not finite.
    """
    if not np.isfinite(features).all():
        raise ValueError("features: not finite; the network has diverged")
    numbers, pooled = pool_templates(
        features,
        templates,
        media,
        scores,
        use_norm_score=settings.use_norm_score,
        use_detector_score=settings.use_detector_score,
    )
    return error_rates(-pair_similarities(numbers, pooled, pairs), issame, FAR_LEVELS)
