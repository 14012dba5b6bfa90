"""Results of recognition.test as tables in Markdown and LaTeX, published rows beside the measured ones.

A report is what recognition.test writes of one network: `name`, `sets` (name => summary of a VerificationResult and
the pairs it was measured on), and where they were tested `mean`, `rfw` and `ijb`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recognition import ijb
from recognition.published import ROWS
from recognition.verification import FAR_LEVELS
from utils.data.formats.benchmarks import FIVE, RFW_GROUPS, TITLES

Report = Mapping[str, Any]
NOTHING = "–"
RFW_SET = "RFW {}"  # what the sets of a report are called that are groups of RFW
LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
LATEX |= {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}


@dataclass
class Table:
    """Cells as text, ready for either form."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        text = "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)
        return text + "".join(f"\n{note}\n" for note in self.notes)

    def latex(self) -> str:
        """A `tabular` that needs no package, its notes as comments above."""
        comments = "".join(f"% {note}\n" for note in [self.title, *self.notes])
        lines = [" & ".join(_escape(cell) for cell in line) + r" \\" for line in (self.head, *self.rows)]
        columns = "l" + "r" * (len(self.head) - 1)
        body = "\n".join(["\\hline", lines[0], "\\hline", *lines[1:], "\\hline"])
        return f"{comments}\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n"


def _escape(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def all_tables(reports: Sequence[Report]) -> list[Table]:
    """The tables that these reports fill, the shortest summary first."""
    made = [overview(reports), rfw_table(reports), ijb_table(reports), details(reports)]
    return [table for table in made if table is not None]


def markdown(tables: Sequence[Table]) -> str:
    """One document; a table that stands alone needs no title."""
    if len(tables) == 1:
        return tables[0].markdown()
    return "\n".join(f"## {table.title}\n\n{table.markdown()}" for table in tables)


def latex(tables: Sequence[Table]) -> str:
    """One file to \\input, or to cut into pieces."""
    return "\n".join(table.latex() for table in tables)


def shows_published(reports: Sequence[Report]) -> bool:
    """Whether a report holds the mean of the five, which alone compares with published rows."""
    return any(report.get("mean", {}).get("is_mean_of_five") for report in reports)


def overview(reports: Sequence[Report]) -> Table | None:
    """Accuracy on every set and the mean of the five; None where there is but one set."""
    names = _ordered({name for report in reports for name in report["sets"] if not _is_rfw(name)})
    if len(names) < 2:
        return None
    notes = _skip_notes(reports, names)
    head = ["model", *(TITLES.get(name, name) for name in names)]
    means = [report.get("mean") for report in reports]
    of = sorted({len(mean["of"]) for mean in means if mean})
    published = shows_published(reports)
    if of:
        head.append("mean" if of == [len(FIVE)] else f"mean of {' or '.join(map(str, of))}")
    if of and of != [len(FIVE)]:
        held = {name for mean in means if mean for name in mean["of"]}
        lacking = ", ".join(TITLES[name] for name in FIVE if name not in held) or "some in some rows"
        notes.append(f"The mean is not that of the five benchmarks, which papers report: {lacking} not tested.")
    if published:
        head += ["training images", "source"]
        notes += _size_notes(reports)
        notes.append("Rows with a source are as reported there, not measured here.")
    rows = []
    for report, mean in zip(reports, means, strict=True):
        row = [report["name"], *(_accuracy(report["sets"].get(name)) for name in names)]
        row += [f"{100 * mean['accuracy']:.2f}" if mean else NOTHING] if of else []
        rows.append(row + ([NOTHING, "measured here"] if published else []))
    for row in ROWS if published else ():
        values = dict(zip(FIVE, row.sets, strict=True)) if row.sets else {}
        cells = [f"{values[name]:.2f}" if name in values else NOTHING for name in names]
        source = f"{row.source}; {row.note}" if row.note else row.source
        rows.append([row.name, *cells, f"{row.mean:.2f}", row.images, source])
    return Table("Accuracy, per cent (10 folds, mean ± standard deviation)", head, rows, notes)


def rfw_table(reports: Sequence[Report]) -> Table | None:
    """Accuracy by group of RFW, and what it says about bias; None where it was not tested."""
    if not any("rfw" in report for report in reports):
        return None
    head = ["model", *RFW_GROUPS, "mean", "std over groups", "skewed error ratio"]
    rows = []
    for report in reports:
        found = report.get("rfw")
        cells = [NOTHING] * (len(head) - 1)
        if found is not None:
            ratio = found["skewed_error_ratio"]
            cells = [_accuracy(report["sets"].get(RFW_SET.format(group))) for group in RFW_GROUPS]
            cells += [f"{100 * found['mean']:.2f}", f"{100 * found['std']:.2f}"]
            cells += [NOTHING if ratio is None else f"{ratio:.2f}"]
        rows.append([report["name"], *cells])
    notes = ["The standard deviation has n - 1 below it; the ratio is the largest error over the smallest."]
    notes += _skip_notes(reports, [RFW_SET.format(group) for group in RFW_GROUPS])
    return Table("RFW, accuracy by group, per cent", head, rows, notes)


def ijb_table(reports: Sequence[Report]) -> Table | None:
    """TAR at fixed FAR on IJB; None where it was not tested."""
    measured = [(report["name"], name, found) for report in reports for name, found in report.get("ijb", {}).items()]
    if not measured:
        return None
    levels = [f"{level:g}" for level in ijb.FAR_LEVELS]
    head = ["model", "set", "switches", *(f"TAR@FAR {level}" for level in levels), "EER", "genuine", "impostor"]
    rows = [
        [
            *(model, name.upper().replace("IJB", "IJB-"), found["switches"]),
            *(_rate(found["tar_at_far"][level]) for level in levels),
            *(_rate(found["eer"]), str(found["num_genuine"]), str(found["num_impostor"])),
        ]
        for model, name, found in measured
    ]
    notes = ["N: images weigh by the norm of their embedding, D: by the detector's score, F: flip test; 1 on, 0 off."]
    return Table("IJB, 1:1, per cent", head, rows, notes + _resolution_notes([found for _, _, found in measured]))


def details(reports: Sequence[Report]) -> Table | None:
    """Every number of every set; the column of the set is left out where there is but one."""
    names = _ordered({name for report in reports for name in report["sets"]})
    if not names:
        return None
    levels = [f"{far:g}" for far in FAR_LEVELS]
    numbers = ["accuracy", "EER", *(f"TAR@FAR {level}" for level in levels), "threshold", "genuine", "impostor"]
    rows = []
    for name in names:
        for report in reports:
            found = report["sets"].get(name)
            if found is None:
                continue
            rows.append(
                [
                    *([TITLES.get(name, name)] if len(names) > 1 else []),
                    report["name"],
                    _accuracy(found),
                    _rate(found["eer"]),
                    *(_rate(found["tar_at_far"][level]) for level in levels),
                    f"{found['threshold']:.3f}",
                    str(found["num_genuine"]),
                    str(found["num_impostor"]),
                ]
            )
    head = [*(["set"] if len(names) > 1 else []), "model", *numbers]
    found = [found for report in reports for found in report["sets"].values()]
    notes = [*_resolution_notes(found), *_skip_notes(reports, names)]
    return Table("Rates by set, per cent", head, rows, notes)


def _is_rfw(name: str) -> bool:
    return name in {RFW_SET.format(group) for group in RFW_GROUPS}


def _ordered(names: set[str]) -> list[str]:
    """The five in the order of tables, then the others by name."""
    return [name for name in FIVE if name in names] + sorted(names - set(FIVE))


def _accuracy(found: Mapping[str, Any] | None) -> str:
    return NOTHING if found is None else f"{100 * found['accuracy']:.2f} ± {100 * found['accuracy_std']:.2f}"


def _rate(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.2f}"


def _resolution_notes(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which false accept rates are less than one impostor pair."""
    fewest: dict[str, int] = {}
    for summary in found:
        for level, rate in summary["tar_at_far"].items():
            if rate is None:
                fewest[level] = min(fewest.get(level, summary["num_impostor"]), summary["num_impostor"])
    return [
        f"{NOTHING}: FAR {level} needs {round(1 / float(level)):,} impostor pairs; there are {number:,}"
        f"{' where fewest' if len({summary['num_impostor'] for summary in found}) > 1 else ''}."
        for level, number in sorted(fewest.items(), key=lambda item: -float(item[0]))
    ]


def _skip_notes(reports: Sequence[Report], names: Sequence[str]) -> list[str]:
    """Pairs of the sets `names` that were left out, and how genuine and impostor pairs then compare."""
    notes = {}
    for report in reports:
        for name, found in report["sets"].items():
            if name in names and found["num_skipped_pairs"]:
                notes[name] = (
                    f"{TITLES.get(name, name)}: {found['num_skipped_pairs']} pairs left out, their images are missing; "
                    f"{found['num_genuine']} genuine and {found['num_impostor']} impostor pairs remain."
                )
    return list(notes.values())


def _size_notes(reports: Sequence[Report]) -> list[str]:
    """Sets that go by a benchmark's name and have another number of pairs."""
    notes = {}
    for report in reports:
        for name, count in FIVE.items():
            found = report["sets"].get(name)
            total = count if found is None else found["num_genuine"] + found["num_impostor"]
            if total != count:
                notes[name] = f"{TITLES[name]} has {count} pairs, here {total}: published rows are on all of them."
    return list(notes.values())
