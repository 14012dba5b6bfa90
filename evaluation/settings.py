"""The keys of configs/evaluate_config.yaml, checked before anything is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.generated_set import DataSettings
from evaluation.real_set import RealSettings
from utils.config import UserError, existing_file, existing_folder, settings
from utils.data.formats.writers import WRITERS
from utils.precision import check_precision

AUTO = "auto"
COSINES = ("min_cosine", "max_identity_cosine", "max_training_cosine")


@dataclass
class CurateSettings:
    """The `curate` section."""

    enabled: bool = False
    min_cosine: float | None = None
    min_images: int = 1
    max_identity_cosine: float | None = None
    max_training_cosine: float | None = None
    write: bool = False
    format: str = "folders"

    def check(self, has_real: bool) -> None:
        """Raise UserError for limits that make no sense."""
        limits = {name: getattr(self, name) for name in COSINES}
        for name, value in limits.items():
            if value is not None and not -1 < value < 1:
                raise UserError(f"curate.{name}: {value}; a cosine between -1 and 1 is wanted, or null")
        if self.min_images < 1:
            raise UserError(f"curate.min_images: {self.min_images}; it must be at least 1")
        if self.format not in WRITERS:
            raise UserError(f"curate.format: {self.format!r} is not one of {', '.join(WRITERS)}")
        named = [name for name, value in limits.items() if value is not None]
        if self.enabled and not named:
            raise UserError(f"curate.enabled: true, but none of {', '.join(f'curate.{n}' for n in COSINES)} is set")
        if not self.enabled and (named or self.write):
            key = named[0] if named else "write"
            raise UserError(f"curate.{key}: {getattr(self, key)}, but curate.enabled is false; set it to true")
        if self.max_training_cosine is not None and not has_real:
            raise UserError("curate.max_training_cosine: there is no real set; give real.root or real.embeddings_file")


@dataclass
class EvaluationSettings:
    """The top level but for the embedder and the feature network."""

    output_dir: str
    data: DataSettings = field(default_factory=DataSettings)
    sets: list[Any] | None = None  # of DataSettings
    real: RealSettings = field(default_factory=RealSettings)
    radius: Any = 0.3  # a cosine distance, or AUTO
    impostor_pairs: int = 10_000_000
    duplicate_cosine: float | None = 0.95
    neighbours: int = 10
    diversity_neighbours: int = 5
    diversity_identities: int = 500
    feature_images: int = 50_000
    reproduction_pairs: int = 30
    lpips_vgg: str | None = None
    lpips_linear: str | None = None
    lpips_identities: int = 100
    figures_dir: str | None = None
    curate: CurateSettings = field(default_factory=CurateSettings)
    flip: bool = True
    batch_size: int = 64
    precision: str = "fp32"
    seed: int = 0
    device: str = "auto"

    @property
    def has_real(self) -> bool:
        """Whether there is a real set."""
        return self.real.root is not None or self.real.embeddings_file is not None

    def check(self) -> None:
        """Raise UserError for values that make no sense, and for files of weights that are not there."""
        for key in (
            *("impostor_pairs", "neighbours", "diversity_neighbours", "diversity_identities", "feature_images"),
            *("reproduction_pairs", "lpips_identities", "batch_size"),
        ):
            if getattr(self, key) < 1:
                raise UserError(f"{key}: {getattr(self, key)}; it must be at least 1")
        if self.duplicate_cosine is not None and not 0 < self.duplicate_cosine < 1:
            raise UserError(f"duplicate_cosine: {self.duplicate_cosine}; between 0 and 1, such as 0.95, or null")
        self._check_radius()
        check_precision(self.precision)
        if (self.lpips_vgg is None) != (self.lpips_linear is None):
            raise UserError("lpips_vgg, lpips_linear: LPIPS needs both files, or give neither")
        if self.lpips_vgg is not None:
            existing_file(self.lpips_vgg, "lpips_vgg", "torchvision's vgg16-397923af.pth")
            existing_file(self.lpips_linear, "lpips_linear", "vgg.pth of the lpips package")
        if self.figures_dir is not None:
            folder = existing_folder(self.figures_dir, "figures_dir", "the output_dir of python -m utils.plotting")
            if not any(folder.glob("*.png")):
                raise UserError(f"figures_dir: no .png in {folder}; python -m utils.plotting makes them")
        self.curate.check(self.has_real)

    def _check_radius(self) -> None:
        if self.radius == AUTO:
            if not self.has_real:
                raise UserError("radius: auto is read off the real set; give real.root or real.embeddings_file")
        elif not isinstance(self.radius, int | float) or not 0 < self.radius < 2:
            raise UserError(f"radius: {self.radius!r}; a cosine distance between 0 and 2, such as 0.3, or auto")

    def listed(self) -> list[tuple[DataSettings, str]]:
        """The sets to evaluate, and the section that names each. UserError for both or neither of data and sets."""
        if self.sets is None:
            return [(self.data, "data")]
        if self.data != DataSettings():
            raise UserError("data, sets: one or the other; with sets, each says its own root")
        if not self.sets:
            raise UserError("sets: holds no set; entries such as {name: two_stage, root: FOLDER} are wanted")
        return [(settings(entry, DataSettings, f"sets[{k}]"), f"sets[{k}]") for k, entry in enumerate(self.sets)]


def check_output(output_dir: Path, names: Iterable[str], roots: Iterable[str | Path]) -> None:
    """UserError where the evaluation would write into a set that it reads: `output_dir`, or its folder of one of
    `names`, lies in one of `roots`."""
    for root in (Path(root).expanduser() for root in roots):
        if not root.is_dir():
            continue
        place = root.resolve()
        if place in (output_dir.resolve(), *output_dir.resolve().parents):
            raise UserError(f"output_dir: {output_dir} lies in {root}, where its folders would count as identities")
        for name in names:
            if (output_dir / name).resolve() == place:
                raise UserError(
                    f"output_dir: {output_dir / name} would hold the results of a set, and holds its images; "
                    "give another output_dir"
                )
