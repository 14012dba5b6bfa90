"""Tables of results, pinned; published rows; bias over the groups of RFW."""

import pytest

from recognition.published import ROWS
from recognition.rfw import group_fairness
from recognition.tables import Table, all_tables, latex, markdown
from utils.data.formats.benchmarks import FIVE


def summary(accuracy: float, genuine: int = 3000, impostor: int = 3000, skipped: int = 0) -> dict:
    rates = {level: 0.9 if impostor * float(level) >= 1 else None for level in ("0.01", "0.001", "0.0001")}
    counts = {"num_genuine": genuine, "num_impostor": impostor, "num_skipped_pairs": skipped}
    return {"accuracy": accuracy, "accuracy_std": 0.005, "threshold": 1.5, "eer": 0.04, "tar_at_far": rates, **counts}


def five() -> dict:
    sets = {name: summary(0.9 + k / 100, FIVE[name] // 2, FIVE[name] // 2) for k, name in enumerate(FIVE)}
    return {"name": "mine", "sets": sets, "mean": {"accuracy": 0.92, "of": list(FIVE), "is_mean_of_five": True}}


def test_one_set_is_one_table() -> None:
    (table,) = all_tables([{"name": "my|net", "sets": {"pairs": summary(0.95)}}])
    assert markdown([table]) == (
        "| model | accuracy | EER | TAR@FAR 0.01 | TAR@FAR 0.001 | TAR@FAR 0.0001 | threshold | genuine | impostor |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| my\\|net | 95.00 ± 0.50 | 4.00 | 90.00 | 90.00 | – | 1.500 | 3000 | 3000 |\n"
        "\n–: FAR 0.0001 needs 10,000 impostor pairs; there are 3,000.\n"
    )


def test_pairs_left_out_are_told() -> None:
    (table,) = all_tables([{"name": "a", "sets": {"pairs": summary(0.95, 2990, 2905, 105)}}])
    assert table.notes[-1] == (
        "pairs: 105 pairs left out, their images are missing; 2990 genuine and 2905 impostor pairs remain."
    )
    # with several sets in every table that has one of them, and only there
    groups = {f"RFW {group}": summary(0.9) for group in ("African", "Asian", "Caucasian", "Indian")}
    groups["RFW Asian"] = summary(0.9, 2999, 3000, 1)
    rfw = group_fairness(dict.fromkeys(("African", "Asian", "Caucasian", "Indian"), 0.9))
    note = "RFW Asian: 1 pairs left out, their images are missing; 2999 genuine and 3000 impostor pairs remain."
    by_group, details = all_tables([{"name": "a", "sets": groups, "rfw": rfw}])
    assert note in by_group.notes and note in details.notes
    overview, by_group, details = all_tables([{"name": "a", "sets": {**five()["sets"], **groups}, "rfw": rfw}])
    assert note not in overview.notes and note in by_group.notes and note in details.notes


def test_the_mean_of_five_stands_beside_published_rows() -> None:
    untrained = {"name": "untrained", "sets": {"lfw": summary(0.6)}}
    overview, details = all_tables([five(), untrained])
    assert overview.head == [
        *("model", "LFW", "CFP-FP", "CPLFW", "AgeDB-30", "CALFW", "mean", "training images", "source"),
    ]
    cells = [f"{90 + k}.00 ± 0.50" for k in range(5)]
    assert overview.rows[0] == ["mine", *cells, "92.00", "–", "measured here"]
    assert overview.rows[1] == ["untrained", "60.00 ± 0.50", *["–"] * 5, "–", "measured here"]
    assert len(overview.rows) == 2 + len(ROWS)
    uiface = next(row for row in overview.rows if row[0] == "UIFace" and row[7] == "10k x 50")
    source = "UIFace (ICLR 2025), appendix"
    assert uiface == ["UIFace", "99.27", "94.29", "89.58", "90.95", "92.25", "93.27", "10k x 50", source]
    assert overview.notes == ["Rows with a source are as reported there, not measured here."]
    assert [row[:2] for row in details.rows[:3]] == [["LFW", "mine"], ["LFW", "untrained"], ["CFP-FP", "mine"]]
    assert details.notes == ["–: FAR 0.0001 needs 10,000 impostor pairs; there are 3,000 where fewest."]


def test_a_part_of_the_five_has_no_published_rows() -> None:
    report = five()
    del report["sets"]["calfw"]
    report["mean"] = {"accuracy": 0.915, "of": list(FIVE)[:4], "is_mean_of_five": False}
    overview = all_tables([report])[0]
    assert overview.head[-1] == "mean of 4" and len(overview.rows) == 1 and overview.rows[0][-1] == "91.50"
    assert overview.notes == ["The mean is not that of the five benchmarks, which papers report: CALFW not tested."]


def test_sets_that_are_not_whole_are_told() -> None:
    report = five()
    report["sets"]["lfw"] = summary(0.9, 10, 10)
    notes = all_tables([report])[0].notes
    assert "LFW has 6000 pairs, here 20: published rows are on all of them." in notes


def test_published_means_are_those_of_their_sets() -> None:
    for row in ROWS:
        if row.sets is not None:  # ADMIS cut 92.096 to 92.09
            assert sum(row.sets) / 5 == pytest.approx(row.mean, abs=0.0065), row
    means = [row.mean for row in ROWS]
    assert means == sorted(means, reverse=True)


def test_groups() -> None:
    # ArcFace with 34 layers in Wang and Deng (CVPR 2020): average 95.37, standard deviation 1.53, ratio 2.33
    found = group_fairness({"African": 0.9387, "Asian": 0.9455, "Caucasian": 0.9737, "Indian": 0.9568})
    assert (round(100 * found["mean"], 2), round(100 * found["std"], 2)) == (95.37, 1.53)
    assert round(found["skewed_error_ratio"], 2) == 2.33
    assert group_fairness({"African": 1.0, "Asian": 0.9})["skewed_error_ratio"] is None
    sets = {
        f"RFW {name}": summary(a)
        for name, a in zip(("African", "Asian", "Caucasian", "Indian"), (0.9387,) * 4, strict=True)
    }
    rfw, details = all_tables([{"name": "net", "sets": sets, "rfw": found}])
    assert rfw.rows == [["net", *["93.87 ± 0.50"] * 4, "95.37", "1.53", "2.33"]]
    assert [row[0] for row in details.rows] == list(sets)


def test_ijb() -> None:
    levels = {"1e-06": None, "1e-05": 0.5, "0.0001": 0.6, "0.001": 0.7, "0.01": 0.8, "0.1": 0.9}
    counts = {"eer": 0.03, "num_genuine": 100, "num_impostor": 500_000, "switches": "N1D1F0"}
    (table,) = all_tables([{"name": "net", "sets": {}, "ijb": {"ijbc": {"tar_at_far": levels, **counts}}}])
    assert table.head[3:5] == ["TAR@FAR 1e-06", "TAR@FAR 1e-05"]
    assert table.rows == [
        ["net", "IJB-C", "N1D1F0", "–", "50.00", "60.00", "70.00", "80.00", "90.00", "3.00", "100", "500000"]
    ]
    assert table.notes[-1] == "–: FAR 1e-06 needs 1,000,000 impostor pairs; there are 500,000."


def test_latex() -> None:
    table = Table("Two & two", ["model", "accuracy"], [["my_net 100%", "95.00 ± 0.50"]], ["a note"])
    assert latex([table]) == (
        "% Two & two\n% a note\n\\begin{tabular}{lr}\n\\hline\nmodel & accuracy \\\\\n\\hline\n"
        "my\\_net 100\\% & 95.00 $\\pm$ 0.50 \\\\\n\\hline\n\\end{tabular}\n"
    )
