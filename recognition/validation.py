"""Verification accuracy while a recogniser is trained: the `validation` section of recognition_train_config.yaml."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from recognition.benchmark_sets import embed_pairs, open_sets
from recognition.verification import evaluate_pairs
from utils.config import UserError
from utils.data.formats.pairs import VerificationPairs


@dataclass
class ValidationSettings:
    """Which pairs a training run is watched on."""

    benchmarks_dir: str | None = None  # lfw.bin, cfp_fp.bin, ... or their folders
    bin_files: list[str] = field(default_factory=list)
    pairs_file: str | None = None
    root: str | None = None  # the images of pairs_file
    layout: str = "lfw"  # of pairs_file and root
    skip_missing: bool = False
    flip: bool = True
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"validation.batch_size: {self.batch_size}; it must be at least 1")

    @property
    def is_set(self) -> bool:
        """Whether any pairs are named."""
        return bool(self.benchmarks_dir or self.bin_files or self.pairs_file or self.root)


def benchmark_validation(settings: ValidationSettings) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a backbone to the 10-fold accuracy (0..1) on each set, by its name.

    The sets are opened at once, so that what is wrong with them is said before the training. All processes call the
    function together and get the same numbers; the backbone stays where it is and keeps its mode. To choose a model by
    these numbers is to select on the sets: tell so, or use pairs of other people than the test's.

    Raises UserError as `open_sets`, and where no set is named.
    """
    if not settings.is_set:
        raise UserError(
            "validation: no pairs are named; give validation.benchmarks_dir=FOLDER, validation.bin_files=[FILE] or "
            "validation.pairs_file=LIST with validation.root=FOLDER"
        )
    sets = open_sets(
        benchmarks_dir=settings.benchmarks_dir,
        bin_files=settings.bin_files,
        pairs_file=settings.pairs_file,
        root=settings.root,
        layout=settings.layout,
        skip_missing=settings.skip_missing,
        keys=("validation.", "validation."),
    )

    def validate(backbone: nn.Module) -> dict[str, float]:
        return {name: _accuracy(backbone, pairs, name, settings) for name, pairs in sets.items()}

    return validate


def _accuracy(backbone: nn.Module, pairs: VerificationPairs, name: str, settings: ValidationSettings) -> float:
    embeddings = embed_pairs(backbone, pairs, batch_size=settings.batch_size, flip=settings.flip, progress=name)
    return evaluate_pairs(embeddings, pairs.issame, pairs.num_folds).accuracy
