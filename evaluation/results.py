"""What an evaluation found of one data set: written by `evaluation.run`, read by `evaluation.report`.

Legend: K identities, N images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.checkpoint import write_atomically, write_text

FACTS, TABLES = "result.json", "tables.npz"


@dataclass
class Identities:
    """A row an identity; an absent column is None."""

    names: np.ndarray  # (K,) str
    num_images: np.ndarray  # (K,) int
    consistency: np.ndarray  # (K,) mean cosine of the images to their centre
    near_share: np.ndarray  # (K,) share of the images nearer than r to the centre
    neighbour: np.ndarray  # (K,) int, the identity of this set whose centre is nearest
    neighbour_cosine: np.ndarray  # (K,)
    training_name: np.ndarray | None = None  # (K,) str, the training identity whose centre is nearest
    training_cosine: np.ndarray | None = None  # (K,)
    switch_t: np.ndarray | None = None  # (K,) mean timestep of the switch, nan where no image switched


@dataclass
class Images:
    """A row an image, identity by identity; an absent column is None."""

    files: np.ndarray  # (N,) str, the image's name in its set (readers of utils.data.formats know it)
    identity: np.ndarray  # (N,) int, row of `Identities`
    centre_cosine: np.ndarray  # (N,)
    duplicate_of: np.ndarray  # (N,) int, the first image that this one is a copy of, -1 where it is none
    index: np.ndarray | None = None  # (N,) int, number within the identity, as in manifest.jsonl
    seed: np.ndarray | None = None  # (N,) int
    switch_t: np.ndarray | None = None  # (N,) int, -1 where the image did not switch


@dataclass
class Histogram:
    """Counts between edges, ascending."""

    edges: np.ndarray  # (bins + 1,)
    counts: np.ndarray  # (bins,)


@dataclass
class SetResult:
    """Everything that the report says of a data set; figures are rates and cosines, not per cent."""

    name: str
    root: str  # where its images are, a path that utils.data.formats.open_labelled opens
    metrics: dict[str, float | int | None]  # by the keys of evaluation.definitions; None: could not be had
    identities: Identities
    images: Images
    embedder: dict[str, Any]  # name, sha256, is_published
    features: dict[str, Any]  # name, sha256, is_comparable
    verdict: str | None = None  # where the embedder is one that the thresholds are published for
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)  # settings, checkpoint, code, counts; as dataset.json
    training_root: str | None = None  # the real set's images
    # (generated file, training file, cosine), most alike first
    nearest_training_images: list[tuple[str, str, float]] = field(default_factory=list)
    # genuine, impostor, centre_cosine, leakage (of generated identities), leakage_real (between real ones), switch_t
    histograms: dict[str, Histogram] = field(default_factory=dict)
    roc: tuple[np.ndarray, np.ndarray] | None = None  # false and true match rates (points,) each, ascending
    # timesteps (S,), d (n, S) of some samples, and the threshold
    attention_change: tuple[np.ndarray, np.ndarray, float] | None = None

    def save(self, folder: str | Path) -> None:
        """Write `result.json` and `tables.npz` into `folder`, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, np.ndarray] = {}
        for table in ("identities", "images"):
            columns = vars(getattr(self, table))
            arrays |= {f"{table}.{name}": np.asarray(column) for name, column in columns.items() if column is not None}
        for name, histogram in self.histograms.items():
            arrays[f"histograms.{name}.edges"], arrays[f"histograms.{name}.counts"] = histogram.edges, histogram.counts
        if self.roc is not None:
            arrays["roc.fmr"], arrays["roc.tmr"] = self.roc
        if self.attention_change is not None:
            names = ("timesteps", "d", "threshold")
            arrays |= {f"attention.{n}": np.asarray(v) for n, v in zip(names, self.attention_change, strict=True)}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # given a path, savez would append .npz to it
                np.savez_compressed(file, **arrays)

        write_atomically(folder / TABLES, write)
        left_out = {"identities", "images", "histograms", "roc", "attention_change"}
        facts = {name: value for name, value in vars(self).items() if name not in left_out}
        write_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> SetResult:
        """Read what `save` wrote."""
        folder = Path(folder)
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        facts["nearest_training_images"] = [tuple(found) for found in facts["nearest_training_images"]]
        with np.load(folder / TABLES, allow_pickle=False) as file:
            arrays = dict(file)
        parts: dict[str, dict[str, np.ndarray]] = {}
        for key, value in arrays.items():
            head, _, name = key.partition(".")
            parts.setdefault(head, {})[name] = value
        edges = {name.removesuffix(".edges") for name in parts.get("histograms", {}) if name.endswith(".edges")}
        histograms = {
            name: Histogram(arrays[f"histograms.{name}.edges"], arrays[f"histograms.{name}.counts"])
            for name in sorted(edges)
        }
        roc = (parts["roc"]["fmr"], parts["roc"]["tmr"]) if "roc" in parts else None
        attention = parts.get("attention")
        return cls(
            **facts,
            identities=Identities(**parts["identities"]),
            images=Images(**parts["images"]),
            histograms=histograms,
            roc=roc,
            attention_change=attention and (attention["timesteps"], attention["d"], float(attention["threshold"])),
        )
