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


_SCORES = "ISO/IEC 19795-1; scores as in IDiff-Face, section 4"
_DCFACE = "DCFace (CVPR 2023)"
_PRECISION = "Kynkaanniemi et al. (NeurIPS 2019), equations 1 and 2; K = 10 as UIFace, appendix A.1"
_REPRODUCTION = "IDiff-Face (ICCV 2023), the LFW experiment"

DEFINITIONS: dict[str, Definition] = {
    "num_images": Definition("images", "Images of the set.", "the files", unit="count"),
    "num_identities": Definition("identities", "Identities of the set.", "the files", unit="count"),
    "num_genuine": Definition("genuine pairs", "Pairs of images of one identity, all of them.", _SCORES, unit="count"),
    "num_impostor": Definition(
        "impostor pairs", "Pairs of images of two identities, drawn by the stated seed.", _SCORES, unit="count"
    ),
    "genuine_mean": Definition(
        "genuine cosine", "Mean cosine of the embeddings of genuine pairs.", _SCORES, "higher", "cosine"
    ),
    "impostor_mean": Definition(
        "impostor cosine", "Mean cosine of the embeddings of impostor pairs.", _SCORES, "lower", "cosine"
    ),
    "eer": Definition(
        "EER",
        "Where the false match rate of impostor pairs equals the false non-match rate of genuine pairs (cosine).",
        _SCORES,
        "lower",
    ),
    "fmr100": Definition(
        "FMR100", "Lowest false non-match rate at a false match rate of at most 1 %.", "ISO/IEC 19795-1", "lower"
    ),
    "fmr1000": Definition(
        "FMR1000", "Lowest false non-match rate at a false match rate of at most 0.1 %.", "ISO/IEC 19795-1", "lower"
    ),
    "fmr1000_cosine": Definition(
        "cosine at FMR 0.1 %",
        "The cosine that at most 0.1 % of the impostor pairs exceed; 1 minus it is the embedder's own r.",
        "ISO/IEC 19795-1",
        unit="cosine",
    ),
    "fdr": Definition(
        "FDR",
        "Fisher discriminant ratio: (mean genuine - mean impostor)^2 / (variance genuine + variance impostor).",
        "IDiff-Face, section 4",
        "higher",
        "distance",
    ),
    "radius": Definition(
        "r",
        "The cosine distance within which two embeddings are taken for one person, in C_intra, U_class and leakage.",
        "DCFace (CVPR 2023): 0.3 with AdaFace IR-101 on WebFace4M",
        unit="cosine",
    ),
    "c_intra": Definition(
        "C_intra",
        "Consistency: the share of an identity's images nearer than r (cosine distance) to its centre, the normalised "
        "mean of its embeddings; mean over identities.",
        _DCFACE,
        "higher",
    ),
    "centre_cosine_mean": Definition(
        "cosine to the centre",
        "Mean cosine of an identity's images to its centre; mean over identities.",
        _DCFACE,
        "higher",
        "cosine",
    ),
    "u_class": Definition(
        "U_class",
        "Uniqueness: the share of identity centres that a greedy pass keeps which drops a centre nearer than r (cosine "
        "distance) to one kept.",
        _DCFACE,
        "higher",
    ),
    "d_intra": Definition(
        "D_intra",
        "Diversity: the share of a real identity's images inside the k-nearest-neighbour balls (Euclidean, of "
        "features) of the images generated from its context; mean over held-out real identities.",
        _DCFACE,
        "higher",
    ),
    "precision": Definition(
        "precision",
        "Share of generated images inside the k-nearest-neighbour balls (Euclidean, of features) of real ones.",
        _PRECISION,
        "higher",
    ),
    "recall": Definition(
        "recall",
        "Share of real images inside the k-nearest-neighbour balls (Euclidean, of features) of generated ones.",
        _PRECISION,
        "higher",
    ),
    "fid": Definition(
        "FID",
        "Frechet distance of generated and real features as Gaussians.",
        "Heusel et al. (NeurIPS 2017), equation 6",
        "lower",
        "distance",
    ),
    "lpips": Definition(
        "LPIPS",
        "Mean perceptual distance (VGG) of the pairs of images of an identity; mean over at most 100 identities drawn "
        "by the stated seed.",
        "Zhang et al. (CVPR 2018); UIFace (ICLR 2025), appendix A.1",
        "higher",
        "distance",
    ),
    "leakage_mean": Definition(
        "leakage, mean",
        "Cosine of a generated identity's centre to the nearest training identity's; mean over generated identities.",
        "this project",
        "lower",
        "cosine",
    ),
    "leakage_max": Definition(
        "leakage, highest", "The highest such cosine of all generated identities.", "this project", "lower", "cosine"
    ),
    "leakage_share": Definition(
        "leaked identities",
        "Share of generated identities nearer than r (cosine distance) to a training identity.",
        "this project",
        "lower",
    ),
    "leakage_real_mean": Definition(
        "between real, mean",
        "Cosine of a training identity's centre to the nearest other one's, to compare leakage with; mean.",
        "this project",
        unit="cosine",
    ),
    "leakage_real_max": Definition(
        "between real, highest", "The highest such cosine of all training identities.", "this project", unit="cosine"
    ),
    "leakage_real_share": Definition(
        "between real, near",
        "Share of training identities nearer than r (cosine distance) to another one.",
        "this project",
    ),
    "reproduction_real_real": Definition(
        "real, real", "Verification accuracy (10 folds) of pairs of photographs.", _REPRODUCTION, "higher"
    ),
    "reproduction_real_variation": Definition(
        "real, variation",
        "Accuracy where the second image of a pair is one generated from its person's context.",
        _REPRODUCTION,
        "higher",
    ),
    "reproduction_variation_real": Definition(
        "variation, real",
        "Accuracy where the first image of a pair is one generated from its person's context.",
        _REPRODUCTION,
        "higher",
    ),
    "reproduction_variation_variation": Definition(
        "variation, variation",
        "Accuracy where both images of a pair are generated from their people's contexts.",
        _REPRODUCTION,
        "higher",
    ),
    "duplicates_within": Definition(
        "copies within identities",
        "Share of images whose embedding has a cosine above the stated one to an earlier image of the same identity.",
        "this project",
        "lower",
    ),
    "duplicates_across": Definition(
        "copies across identities",
        "Share of images whose embedding has a cosine above the stated one to an earlier image of another identity.",
        "this project",
        "lower",
    ),
    "switched": Definition(
        "switched", "Share of images whose identity was let in before stage 1 ended.", "UIFace (ICLR 2025)"
    ),
    "switch_t_mean": Definition(
        "switch step",
        "Mean timestep at which the identity was let in, of the images that switched.",
        "UIFace (ICLR 2025)",
        unit="timestep",
    ),
    "switch_t_std": Definition(
        "spread of the switch",
        "Standard deviation of that timestep over the images that switched.",
        "UIFace (ICLR 2025)",
        unit="timestep",
    ),
    "alignment_failures": Definition(
        "no face found", "Share of images in which alignment found no face.", "alignment_report.jsonl", "lower"
    ),
}
