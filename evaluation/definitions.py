"""What each figure of an evaluation means, which direction is good, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """A metric as the report shows it."""

    title: str
    text: str  # how it is computed, in one or two sentences
    source: str  # paper, equation or section
    better: str | None = None  # "higher", "lower", or None where neither is
    unit: str = "share"  # share (0..1, shown as per cent), cosine, count, timestep, distance


DEFINITIONS: dict[str, Definition] = {
    "eer": Definition(
        "EER",
        "Where the false match rate of impostor pairs equals the false non-match rate of genuine pairs (cosine).",
        "ISO/IEC 19795-1; scores as in IDiff-Face, section 4",
        "lower",
    ),
    "fmr100": Definition(
        "FMR100", "Lowest false non-match rate at a false match rate of at most 1 %.", "ISO/IEC 19795-1", "lower"
    ),
    "fmr1000": Definition(
        "FMR1000", "Lowest false non-match rate at a false match rate of at most 0.1 %.", "ISO/IEC 19795-1", "lower"
    ),
    "fdr": Definition(
        "FDR",
        "Fisher discriminant ratio: (mean genuine - mean impostor)^2 / (variance genuine + variance impostor).",
        "IDiff-Face, section 4",
        "higher",
        "distance",
    ),
}
