"""Identity reproduction (IDiff-Face, Boutros et al., ICCV 2023): do faces drawn from a photograph's embedding verify as
its person?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from recognition.verification import VerificationResult, evaluate_pairs

COMBINATIONS = ("real_real", "real_variation", "variation_real", "variation_variation")


def identity_reproduction(
    real: np.ndarray, variations: np.ndarray, issame: np.ndarray, num_folds: int = 10
) -> dict[str, VerificationResult]:
    """The verification protocol with one or both images of every pair replaced by one generated from its embedding.

    Args:
        real: (2 P, D) embeddings of photographs; rows 2i and 2i+1 are pair i.
        variations: (2 P, D) of one generated image each, in the same order.
        issame: (P,) bool; num_folds: see recognition.verification.evaluate_pairs, which raises ValueError.

    Returns the result of each of COMBINATIONS, named for the first and the second image of the pairs.
    """
    if real.shape != variations.shape:
        raise ValueError(f"variations {variations.shape}: one for each of {real.shape} real embeddings is wanted")
    sources = {"real": real, "variation": variations}
    results = {}
    for name in COMBINATIONS:
        first, second = (sources[kind] for kind in name.split("_"))
        pairs = np.empty_like(real)
        pairs[0::2], pairs[1::2] = first[0::2], second[1::2]
        results[name] = evaluate_pairs(pairs, issame, num_folds)
    return results


def reproduction_metrics(results: Mapping[str, VerificationResult]) -> dict[str, float | int | None]:
    """Accuracies by the keys of evaluation.definitions."""
    return {f"reproduction_{name}": results[name].accuracy for name in COMBINATIONS}
