"""The benchmark of the evaluation, small: its baseline finds the same figures, its set holds what it says."""

import numpy as np
import pytest

from benchmarks import evaluation
from benchmarks.evaluation import OURS, PLAIN, build, difference, load, make_set, measure, parse, table

SIZES = {"identities": 60, "small": 20, "images": 12, "width": 24, "training": 90, "impostors": 20_000, "features": 60}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    args = parse([f"--{name}={size}" for name, size in SIZES.items()] + ["--feature-width=8"])
    build(folder, args)
    jobs = [
        f"{who}/{size}/{m}"
        for who, all_ in (("ours", OURS), ("plain", PLAIN))
        for size in ("full", "small")
        for m in all_
    ]
    return args, folder, {job: measure(job, folder, args) for job in jobs}


@pytest.mark.parametrize("metric", PLAIN)
def test_the_baseline_finds_the_same(results, metric) -> None:
    found = results[2]
    loose = {"impostor": 0.02, "duplicates": 0, "u_class": 0}.get(metric, 1e-4)  # impostor pairs are other draws
    assert difference(found[f"ours/full/{metric}"]["figures"], found[f"plain/full/{metric}"]["figures"]) <= loose


def test_the_table(results) -> None:
    args, _, found = results
    lines = table(found, args).splitlines()
    assert len(lines) == 2 + len(OURS) and all(line.count("|") == 10 for line in lines)
    row = next(line for line in lines if line.startswith("| impostor |"))
    assert "| 240 images |" in row  # the baseline holds all pairs: compared at the small size
    assert all(0 < one["mib"] < 8192 and one["seconds"] > 0 and one["cpu"] > 0 for one in found.values())


def test_the_set_holds_something_to_find(results) -> None:
    args, folder, found = results
    figures = found["ours/full/all"]["figures"]
    assert figures["num_genuine"] == 60 * 12 * 11 / 2 and figures["num_impostor"] == 20_000
    assert 0 < figures["u_class"] < 1 and 0 < figures["c_intra"] < 1 and 0 < figures["leakage_share"] < 1
    assert found["ours/full/duplicates"]["figures"]["across"] > 0
    one, same, other = (make_set(20, 12, 24, 90, seed)["embeddings"] for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.allclose(one, other)
    assert np.array_equal(load("genuine", "small", folder, args)["embeddings"], one)


def test_what_cannot_be_measured(capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["--features", str(evaluation.K)])
    assert "--features: more than 10" in capsys.readouterr().err
