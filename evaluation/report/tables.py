"""The tables of the report: headline figures by question, all metrics, published rows, settings and provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.definitions import DEFINITIONS, Definition
from evaluation.results import SetResult
from evaluation.verdict import COLLAPSED, TRAINED
from recognition.published import ROWS, PublishedRow

# What someone who made a data set asks, and the metrics that answer; those that no set has are left out.
QUESTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Consistent?", "an identity is one person", ("c_intra", "eer", "fmr1000", "fdr", "genuine_mean")),
    ("Diverse?", "a person has many looks", ("d_intra", "recall", "lpips", "duplicates_within")),
    ("Unique?", "identities are different people", ("u_class", "impostor_mean", "duplicates_across")),
    ("Private?", "nobody was copied", ("leakage_mean", "leakage_real_mean", "leakage_max", "leakage_share")),
    ("Realistic?", "images look like real ones", ("precision", "fid", "alignment_failures")),
)
# C_intra of three generated sets and the accuracy that they trained recognisers to: chance, chance, and a working one
# (DCFace, CVPR 2023, with its own embedder).
CONSISTENCY_GATES = ((0.59, "50 %"), (COLLAPSED, "50 %"), (TRAINED, "89 %"))
FEATURE_METRICS = ("precision", "recall", "fid", "d_intra")
SIZE_METRICS = ("precision", "recall", "fid")  # that depend on how many images there are
SAME_SIZE = 1.1  # numbers of images no further apart than by this factor count as one
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """A metric of one data set: as text, and as a bar (0..1) where it is a share."""

    text: str
    share: float | None = None
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """A metric of every data set."""

    key: str
    definition: Definition
    cells: list[Cell]


def rows(results: Sequence[SetResult], keys: Sequence[str]) -> list[Row]:
    """The metrics `keys` that any set has, in this order."""
    found = []
    for key in keys:
        values = [result.metrics.get(key) for result in results]
        if any(value is not None for value in values):
            found.append(Row(key, DEFINITIONS[key], _cells(values, DEFINITIONS[key])))
    return found


def all_rows(results: Sequence[SetResult]) -> list[Row]:
    """Every metric of every set, in the order of the definitions; ValueError for one without a definition."""
    undefined = sorted({key for result in results for key in result.metrics} - DEFINITIONS.keys())
    if undefined:
        raise ValueError(f"metrics without a definition in evaluation.definitions: {', '.join(undefined)}")
    return rows(results, list(DEFINITIONS))


def headlines(results: Sequence[SetResult]) -> list[tuple[str, str, list[Row]]]:
    """(question, what it means, rows), without questions that nothing answers."""
    answered = ((question, meaning, rows(results, keys)) for question, meaning, keys in QUESTIONS)
    return [(question, meaning, found) for question, meaning, found in answered if found]


def caveats(results: Sequence[SetResult]) -> list[str]:
    """What has to be known before the figures are compared with published ones, or with one another; a line each."""
    found = []
    networks = [r.features["name"] for r in results if not r.features["is_comparable"]]
    if networks and (told := rows(results, FEATURE_METRICS)):
        found.append(
            f"{_listed(told)} are computed in {', '.join(dict.fromkeys(networks))}, and do not compare with published "
            "figures, which are of Inception's features."
        )
    sizes = [len(result.images.files) for result in results]
    if max(sizes) > SAME_SIZE * min(sizes) and (told := rows(results, SIZE_METRICS)):
        found.append(
            f"{_listed(told)} depend on the number of images, which is {min(sizes):,} to {max(sizes):,} here: a part "
            "of a set has other ones, whatever it shows."
        )
    return found


def _listed(found: Sequence[Row]) -> str:
    return ", ".join(row.definition.title for row in found)


def _cells(values: Sequence[float | None], definition: Definition) -> list[Cell]:
    known = [value for value in values if value is not None]
    best = None
    if definition.better is not None and len(set(known)) > 1:
        best = max(known) if definition.better == "higher" else min(known)
    is_share = definition.unit == "share"
    return [
        Cell(
            format_value(value, definition.unit),
            min(1.0, max(0.0, float(value))) if is_share and value is not None else None,
            value is not None and value == best,
        )
        for value in values
    ]


def format_value(value: float | None, unit: str) -> str:
    """A metric as people read it: shares in per cent, counts with thousands, the rest to three or four digits."""
    if value is None:
        return MISSING
    if unit == "share":
        return f"{100 * value:.2f} %" if value < 0.0995 else f"{100 * value:.1f} %"
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "timestep":
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def published_rows(count: int = 8) -> list[PublishedRow]:
    """The best published rows with their sources: the mean of five benchmarks, one row a name."""
    seen: dict[str, PublishedRow] = {}
    for row in ROWS:
        if "fixed partition" not in row.name and (row.name not in seen or row.images == "10k x 50"):
            seen[row.name] = row
    return sorted(seen.values(), key=lambda row: -row.mean)[:count]


def settings(results: Sequence[SetResult]) -> list[tuple[str, list[str], bool]]:
    """(key, its value in every set, whether these differ): what the sets are of, then all of their provenance."""
    columns = []
    for result in results:
        of = {"images from": result.root, "real set": result.training_root, "embedder": result.embedder}
        columns.append(dict(flattened(of | {"features": result.features} | result.provenance)))
    keys = list(dict.fromkeys(key for column in columns for key in column))
    found = [(key, [column.get(key, MISSING) for column in columns]) for key in keys]
    return [(key, values, len(set(values)) > 1) for key, values in found]


def flattened(tree: Mapping[str, Any], start: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as text) of every leaf of nested mappings."""
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += flattened(value, f"{start}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            found.append((f"{start}{key}", "none" if value is None else text))
    return found
