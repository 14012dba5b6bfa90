"""What the accuracies of the groups of RFW say about bias (Wang et al., ICCV 2019; Wang and Deng, CVPR 2020)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def group_fairness(accuracies: Mapping[str, float]) -> dict[str, float | None]:
    """Mean, standard deviation and skewed error ratio of the accuracies (0..1) of groups.

    The standard deviation has n - 1 below it, as in Wang and Deng's tables. The skewed error ratio is the largest error
    of a group over the smallest one; None where the smallest is 0.
    """
    values = np.array(list(accuracies.values()), np.float64)
    errors = 1 - values
    return {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)),
        "skewed_error_ratio": float(errors.max() / errors.min()) if errors.min() > 0 else None,
    }
