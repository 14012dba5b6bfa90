"""What C_intra lets one expect, in words, where the thresholds belong to the embedder (DCFace, CVPR 2023)."""

from __future__ import annotations

from pathlib import PurePath

from evaluation.metrics.identities import RADIUS

# The embedder of DCFace's table. Its authors publish no checksum: it goes by its configuration, which holds the file to
# an IR-101, and by the name of its file, and the report says "as given".
PUBLISHED, PUBLISHED_FILE = "adaface_ir101", "webface4m"
COLLAPSED, TRAINED = 0.80, 0.90  # C_intra of sets in that table on which recognisers collapsed, and trained


def is_published(choice: str | None, checkpoint: str) -> bool:
    """Whether the embedder is AdaFace IR-101 on WebFace4M, by what the user calls it.

    choice: the file of configs/embedder/; checkpoint: the path of the weights.
    """
    return choice == PUBLISHED and PUBLISHED_FILE in PurePath(checkpoint).name.lower()


def verdict(c_intra: float, radius: float, *, published: bool) -> str | None:
    """A sentence on `c_intra` at cosine distance `radius`; None where the thresholds are of another embedder or r."""
    if not published or radius != RADIUS:
        return None
    if c_intra >= TRAINED:
        said = "consistent: in DCFace's table a set at 0.90 trained a recogniser"
    elif c_intra <= COLLAPSED:
        said = "not consistent enough: in DCFace's table recognisers trained on sets at 0.59 and 0.80 collapsed"
    else:
        said = "in between: in DCFace's table recognisers collapsed on a set at 0.80 and trained on one at 0.90"
    return f"C_intra {c_intra:.3f}, {said} (embedder AdaFace IR-101 on WebFace4M, as given)"
