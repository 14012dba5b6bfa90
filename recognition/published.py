"""Published results to compare with: the plain mean of LFW, CFP-FP, CPLFW, AgeDB-30 and CALFW, per cent.

Each row is as its source reports it; nothing here was measured by this project. The tables of UIFace and ADMIS train
IR-50 with ArcFace on every set, but for rows with a note; the other authors chose recognisers of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

UIFACE = "UIFace (ICLR 2025), appendix"
ADMIS = "README of ADMIS (FRCSyn at CVPR 2024)"
IDIFF = "README of IDiff-Face (ICCV 2023)"
AUTHORS = "its authors' paper"


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table."""

    name: str
    images: str  # identities x images of each
    mean: float  # per cent, of the five
    source: str
    sets: tuple[float, ...] | None = None  # in the order of FIVE, where the source gives them
    note: str = ""


ROWS = (
    PublishedRow("CASIA-WebFace (real)", "10.5k x 47", 95.08, ADMIS, (99.43, 97.40, 90.23, 94.80, 93.55)),
    PublishedRow("CASIA-WebFace (real)", "10.5k x 47", 95.05, UIFACE),
    PublishedRow("UIFace", "30k x 50", 94.54, UIFACE),
    PublishedRow("UIFace", "20k x 50", 94.06, UIFACE),
    PublishedRow("Vec2Face+ VFace10K", "0.5 M", 93.89, AUTHORS),
    PublishedRow("ADMIS", "30k x 50", 93.77, ADMIS, (99.52, 94.66, 89.75, 91.78, 93.13)),
    PublishedRow("IDperturb", "0.5 M", 93.62, "IDperturb (CVPR 2026)"),
    PublishedRow("UIFace", "10k x 50", 93.27, UIFACE, (99.27, 94.29, 89.58, 90.95, 92.25)),
    PublishedRow("UIFace, fixed partition t0 500", "10k x 50", 92.71, UIFACE, (99.15, 93.84, 88.48, 90.30, 91.78)),
    PublishedRow("VIGFace", "0.5 M", 92.56, AUTHORS),
    PublishedRow("UIFace, fixed partition t0 600", "10k x 50", 92.30, UIFACE, (99.07, 93.49, 88.20, 89.70, 91.05)),
    PublishedRow("CemiFace", "0.5 M", 92.30, AUTHORS),
    PublishedRow("ADMIS", "10k x 50", 92.09, ADMIS, (99.17, 92.79, 87.67, 89.42, 91.43)),
    PublishedRow("Vec2Face HSFace10K", "0.5 M", 92.00, AUTHORS),
    PublishedRow("UIFace, fixed partition t0 700", "10k x 50", 91.95, UIFACE, (98.92, 92.94, 88.13, 88.98, 90.77)),
    PublishedRow("Arc2Face", "10k x 50", 91.73, UIFACE),
    PublishedRow("DCFace", "10k x 50", 89.94, ADMIS, (98.60, 88.21, 83.33, 88.18, 91.38)),
    PublishedRow("DCFace", "10k x 50", 89.56, UIFACE, note="its own recipe"),
    PublishedRow("IDiff-Face", "10k x 50", 88.20, IDIFF, (98.00, 85.47, 80.45, 86.43, 90.65), "its own recipe"),
    PublishedRow("IDiff-Face", "10k x 50", 84.09, ADMIS, (97.10, 82.00, 76.65, 78.40, 86.32)),
    PublishedRow("UIFace, fixed partition t0 400", "10k x 50", 50.00, UIFACE, (50, 50, 50, 50, 50), "collapses"),
)
