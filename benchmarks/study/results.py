"""What a study found, as a table and as JSON. Accuracies are rates; the table shows per cent."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.definitions import DEFINITIONS

# Figures of the faces that stand in the table, by the keys of evaluation.definitions; the others are in the JSON
COLUMNS = ("c_intra", "u_class", "eer", "leakage_mean", "leakage_share", "switched", "switch_t_mean")
FORMATS = {"share": ("{:.1f} %", 100), "cosine": ("{:.3f}", 1), "timestep": ("{:.0f}", 1)}  # by unit: text, factor


@dataclass
class VariantResult:
    """A row, as result.json keeps it."""

    name: str
    title: str
    accuracy: dict[str, float]  # by the recogniser's seed
    metrics: dict[str, float | int | None]  # of its faces, by the keys of evaluation.definitions
    sets: list[str]  # that the recognisers were tested on
    num_pairs: int  # of all of them
    seconds: float  # of all its stages
    published: dict[str, Any] | None = None  # name, mean (per cent), source

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.accuracy.values())

    @property
    def std(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None with one seed."""
        return statistics.stdev(self.accuracy.values()) if len(self.accuracy) > 1 else None


def to_json(variants: Sequence[VariantResult]) -> dict[str, Any]:
    """What study.json holds."""
    rows = [
        {
            **vars(row),
            "accuracy": {"mean": row.mean, "std": row.std, "num_seeds": len(row.accuracy), "by_seed": row.accuracy},
        }
        for row in variants
    ]
    return {"variants": rows, "seconds": sum(row.seconds for row in variants)}


def markdown(variants: Sequence[VariantResult]) -> str:
    """A row a variant that is complete, and below what the figures are."""
    if not variants:
        return "No variant is complete for all of these seeds.\n"
    shown = [key for key in COLUMNS if any(row.metrics.get(key) is not None for row in variants)]
    head = ["sampler", "accuracy, %", "seeds", *(DEFINITIONS[key].title for key in shown), "published, %"]
    lines = [head, ["---"] * len(head)]
    for row in variants:
        published = "" if row.published is None else f"{row.published['mean']:.2f}"
        figures = [figure(row.metrics, key) for key in shown]
        lines.append([row.title, percent(row.mean, row.std), str(len(row.accuracy)), *figures, published])
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return table + "".join(f"\n{note}\n" for note in notes(variants))


def percent(mean: float, std: float | None) -> str:
    """`83.52 ± 0.41`."""
    return f"{100 * mean:.2f}" if std is None else f"{100 * mean:.2f} ± {100 * std:.2f}"


def figure(metrics: Mapping[str, float | int | None], key: str) -> str:
    """A figure in its unit; empty where there is none."""
    value = metrics.get(key)
    if value is None:
        return ""
    text, factor = FORMATS[DEFINITIONS[key].unit]
    return text.format(factor * value)


def notes(variants: Sequence[VariantResult]) -> list[str]:
    """What was done and how to read it."""
    first = variants[0]
    sizes = {f"{row.metrics['num_identities']:,} people, {row.metrics['num_images']:,} images" for row in variants}
    found = [
        f"Accuracy: {', '.join(first.sets)}, {first.num_pairs:,} pairs; mean ± standard deviation (n - 1) over the "
        f"recogniser's seeds ({', '.join(first.accuracy)}). Each sampler drew once ({'; '.join(sizes)}), for the same "
        "people and from the same noise: the spread says nothing about another draw.",
        f"C_intra, U_class and leaked identities are for r = {first.metrics['radius']:.3f}.",
    ]
    sources = {f"{row.published['name']}: {row.published['source']}" for row in variants if row.published}
    if sources:
        found.append(
            "Published: mean of LFW, CFP-FP, CPLFW, AgeDB-30 and CALFW from half a million images, another model and "
            f"other tests than here; to be compared in their order alone. {'; '.join(sorted(sources))}."
        )
    return found
