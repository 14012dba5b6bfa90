"""What the manifest and the alignment report say of a generated set: when samples switched, which found no face."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SwitchStatistics:
    """At which timestep the identity was let in."""

    num_images: int
    switched: float  # share of the images that switched
    mean: float | None  # timestep, of those that switched; None where none did
    std: float | None  # ddof 0
    quartiles: tuple[float, float, float] | None

    def metrics(self) -> dict[str, float | int | None]:
        """By the keys of evaluation.definitions."""
        return {"switched": self.switched, "switch_t_mean": self.mean, "switch_t_std": self.std}


@dataclass(frozen=True)
class AlignmentCounts:
    """What became of the images in alignment."""

    num_images: int
    counts: dict[str, int]  # by status
    failures: float  # share of the images in which no face was found (or that could not be read)

    def metrics(self) -> dict[str, float | int | None]:
        """By the keys of evaluation.definitions."""
        return {"alignment_failures": self.failures}


def switch_statistics(switch_t: np.ndarray) -> SwitchStatistics:
    """switch_t: (N,) the timesteps of manifest.jsonl, -1 where an image did not switch. Raises ValueError for none."""
    switch_t = np.asarray(switch_t)
    if not len(switch_t):
        raise ValueError("switch_t: there are no images")
    switched = switch_t[switch_t >= 0]
    share = len(switched) / len(switch_t)
    if not len(switched):
        return SwitchStatistics(len(switch_t), share, None, None, None)
    low, median, high = np.quantile(switched, (0.25, 0.5, 0.75)).tolist()
    return SwitchStatistics(len(switch_t), share, float(switched.mean()), float(switched.std()), (low, median, high))


def alignment_failures(lines: Iterable[Mapping[str, Any]]) -> AlignmentCounts:
    """lines: those of alignment_report.jsonl. Raises ValueError where there are none.

    An image counts as failed where it has no landmarks, whether it was left out or only resized; what was discarded
    with its identity counts for what was found in it.
    """
    lines = list(lines)
    if not lines:
        raise ValueError("alignment report: it has no lines")
    failed = sum(line.get("landmarks") is None for line in lines)  # an unreadable file's line has none
    return AlignmentCounts(len(lines), dict(Counter(line["status"] for line in lines)), failed / len(lines))
