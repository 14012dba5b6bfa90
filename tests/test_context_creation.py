"""New contexts: which are kept, where they come from, the files, and what users get wrong."""

import json
import sys

import numpy as np
import pytest

import create_sample_identity_contexts as script
from utils import context_selection
from utils.config import UserError
from utils.context_selection import NEAR_ANOTHER, NEAR_KNOWN, ContextSelector
from utils.context_sources import slerp
from utils.contexts import mean_contexts, read_contexts, uniform_contexts, write_embeddings
from utils.similarity import cosine_at_fmr, nearest_cosines

WIDTH = 16


@pytest.fixture
def run(compose, tmp_path):
    """run(*overrides, output="out") -> the folder that the command wrote, in this process."""

    def _run(*overrides: str, output: str = "out"):
        cfg = compose("create_contexts_config", f"output_dir={tmp_path / output}", *overrides)
        script.main.__wrapped__(cfg)
        return tmp_path / output

    return _run


@pytest.fixture
def people(tmp_path):
    """A folder of embeddings as encode.py writes it: 12 people with 5 images each."""
    rng = np.random.default_rng(0)
    names = [f"p{i:02d}/{k}.png" for i in range(12) for k in range(5)]
    rows = np.repeat(uniform_contexts(12, WIDTH, 1), 5, axis=0) + 0.1 * rng.standard_normal((60, WIDTH))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    write_embeddings(tmp_path / "people", names, rows)
    return tmp_path / "people", names, rows


def read(folder):
    """Names, rows, the record and the origins of a finished folder."""
    names, rows = read_contexts(folder / "contexts.npy")
    record = json.loads((folder / "contexts.json").read_text())
    return names, rows, record, [json.loads(line) for line in (folder / "contexts.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------- similarity


@pytest.mark.parametrize("chunk", [3, 1024])
def test_nearest_cosines(monkeypatch, chunk):
    monkeypatch.setattr("utils.similarity.ROWS_AT_ONCE", chunk)
    monkeypatch.setattr("utils.similarity.REFERENCES_AT_ONCE", chunk)
    references = uniform_contexts(20, 8, 0)
    cosines = references.astype(float) @ references.T
    np.testing.assert_allclose(nearest_cosines(references[:7], references[7:]), cosines[:7, 7:].max(axis=1), atol=1e-6)
    np.fill_diagonal(cosines, -2)
    np.testing.assert_allclose(nearest_cosines(references, references, skip_own=True), cosines.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(
        nearest_cosines(references[:7], references, skip_own=True), cosines[:7].max(axis=1), atol=1e-6
    )
    assert nearest_cosines(references[:1], references[:1], skip_own=True).tolist() == [-1]


@pytest.mark.parametrize("chunk", [7, 1024])
def test_cosine_at_fmr_counts_every_impostor_pair_once(monkeypatch, chunk, people):
    monkeypatch.setattr("utils.similarity.ROWS_AT_ONCE", chunk)
    _, names, rows = people
    labels = [name.split("/")[0] for name in names]
    pairs = [(i, j) for i in range(60) for j in range(i) if labels[i] != labels[j]]
    cosines = np.sort([float(rows[i].astype(float) @ rows[j]) for i, j in pairs])
    for fmr in (0.001, 0.01, 0.1):
        found = cosine_at_fmr(labels, rows, fmr)
        assert found.impostor_pairs == len(pairs) == 60 * 59 // 2 - 12 * 10
        assert (cosines > found.cosine + 1e-6).mean() <= fmr < (cosines > found.cosine - 1e-6).mean()
        assert found.cosine == pytest.approx(cosines[-int(fmr * len(pairs)) - 1], abs=1e-6)
    assert not found.is_sample and found.images == 60


def test_cosine_at_fmr_of_a_large_set_is_that_of_a_seeded_draw(people):
    _, names, rows = people
    labels = [name.split("/")[0] for name in names]
    a, b, other = (cosine_at_fmr(labels, rows, 0.01, seed=seed, max_images=40) for seed in (0, 0, 1))
    assert a == b and a.is_sample and a.images == 40
    assert other.cosine != a.cosine
    with pytest.raises(UserError, match="less than one of the 4 impostor pairs of 4 images of 2 identities"):
        cosine_at_fmr(["a", "a", "b", "b"], rows[:4], 0.001)


# --------------------------------------------------------------------------------------------------------- selection


def greedy(candidates: np.ndarray, wanted: int, among: float, known: np.ndarray, to: float) -> tuple[list[int], list]:
    """The rule in its plainest form."""
    kept, verdicts = [], []
    for row, candidate in enumerate(candidates):
        if len(kept) == wanted:
            break
        if max(candidate @ k for k in known) > to:
            verdicts.append(NEAR_KNOWN)
        elif any(candidate @ candidates[k] > among for k in kept):
            verdicts.append(NEAR_ANOTHER)
        else:
            verdicts.append("")
            kept.append(row)
    return kept, verdicts


@pytest.mark.parametrize("at_once", [1, 7, 300])
@pytest.mark.parametrize("wanted", [25, 1000])
def test_selection_is_greedy_whatever_is_offered_at_once(monkeypatch, at_once, wanted):
    monkeypatch.setattr(context_selection, "ROWS_AT_ONCE", 50)
    candidates, known = uniform_contexts(300, 8, 0), uniform_contexts(20, 8, 1)
    kept, verdicts = greedy(candidates, wanted, 0.5, known, 0.7)
    selector = ContextSelector(wanted, max_among=0.5, max_known=0.7, known=known)
    found = [v for start in range(0, 300, at_once) for v in selector.offer(candidates[start : start + at_once])]
    assert found == verdicts
    np.testing.assert_array_equal(selector.rows, candidates[kept])
    assert selector.is_full == (len(kept) == wanted) and len({*verdicts}) == 3


def test_a_limit_is_kept_even_by_a_hair():
    """Two candidates whose cosine is the limit, but for rounding: a reader must not find it exceeded."""
    candidates = np.array([[1, 0, 0], [0.5, np.sqrt(0.75), 0], [0.49999, 0.0, np.sqrt(1 - 0.49999**2)]], np.float32)
    assert ContextSelector(3, max_among=0.5).offer(candidates) == ["", NEAR_ANOTHER, ""]


# ----------------------------------------------------------------------------------------------------------- sources


def test_uniform(run):
    names, rows, record, origins = read(run("n_contexts=1500", f"source.width={WIDTH}", "seed=4"))
    np.testing.assert_allclose(rows, uniform_contexts(1500, WIDTH, 4), atol=1e-6)
    assert names[0] == "00000" and names[-1] == "01499" and origins[7] == {"name": "00007", "candidate": 7}
    assert record["tries"] == 1500 and record["rejected"] == {}
    assert record["settings"]["seed"] == 4 and record["settings"]["source.width"] == WIDTH


def test_rejection_among_and_to_training_identities(run, people):
    folder, names, rows = people
    limits = ("max_similarity_among=0.6", "max_similarity_to=0.5", "n_contexts=40", f"source.width={WIDTH}")
    _, contexts, record, origins = read(run(*limits, f"training_identities={folder / 'embeddings.npy'}"))
    cosines = contexts.astype(float) @ contexts.T
    assert np.triu(cosines, 1).max() <= 0.6
    known = mean_contexts(names, rows)[1]
    assert (contexts.astype(float) @ known.T).max() <= 0.5
    drawn = uniform_contexts(2000, WIDTH, 0)
    kept, verdicts = greedy(drawn, 40, 0.6, known, 0.5)
    np.testing.assert_allclose(contexts, drawn[kept], atol=1e-6)
    assert [origin["candidate"] for origin in origins] == kept
    assert record["tries"] == len(verdicts)
    assert record["rejected"] == {reason: verdicts.count(reason) for reason in (NEAR_ANOTHER, NEAR_KNOWN)}
    assert record["nearest_cosine"]["to_training"]["max"] <= 0.5
    # the file of contexts holds the same people
    again = run(*limits, f"training_identities={folder / 'contexts.npy'}", output="again")
    np.testing.assert_array_equal(read(again)[1], contexts)


def test_a_false_match_rate_as_the_limit(run, people):
    folder, names, rows = people
    _, contexts, record, _ = read(
        run(
            f"source.width={WIDTH}",
            "n_contexts=30",
            "max_similarity_among=fmr:0.05",
            f"calibration_embeddings={folder / 'embeddings.npy'}",
        )
    )
    cosine = cosine_at_fmr([name.split("/")[0] for name in names], rows, 0.05).cosine
    assert record["limits"] == {"max_similarity_among": cosine, "max_similarity_to": None}
    assert record["calibration"]["max_similarity_among"]["impostor_pairs"] == 1650
    assert np.triu(contexts.astype(float) @ contexts.T, 1).max() <= cosine
    assert record["rejected"][NEAR_ANOTHER] > 0


@pytest.mark.parametrize("image", ["mean", "first", "random"])
def test_authentic(run, people, image):
    folder, names, rows = people
    words = ("source=authentic", f"source.embeddings={folder / 'embeddings.npy'}", f"source.image={image}")
    identities, contexts, _, origins = read(run(*words))
    assert identities == [f"p{i:02d}" for i in range(12)]
    if image == "mean":
        np.testing.assert_allclose(contexts, mean_contexts(names, rows)[1], atol=1e-6)
        assert all(origin["images"] == 5 for origin in origins)
        return
    chosen = [origin["image"] for origin in origins]
    np.testing.assert_allclose(contexts, rows[[names.index(name) for name in chosen]], atol=1e-6)
    assert [name.split("/")[0] for name in chosen] == identities
    if image == "first":
        assert all(name.endswith("/0.png") for name in chosen)
    else:
        assert len({name.split("/")[1] for name in chosen}) > 2
        other = read(run(*words, "seed=1", output="other"))[3]
        assert [origin["image"] for origin in other] != chosen


def test_authentic_identities_that_look_alike(run, people, tmp_path):
    """The one that comes second is left out; as many as asked for must be found."""
    folder, names, rows = people
    rows[5:10] = rows[0:5]  # p01 is p00
    write_embeddings(tmp_path / "people", names, rows)
    words = ("source=authentic", f"source.embeddings={folder / 'embeddings.npy'}", "max_similarity_among=0.95")
    identities, _, record, _ = read(run(*words))
    assert identities == ["p00", *(f"p{i:02d}" for i in range(2, 12))] and record["rejected"] == {NEAR_ANOTHER: 1}
    assert read(run(*words, "n_contexts=3", output="three"))[0] == ["p00", "p02", "p03"]
    with pytest.raises(UserError, match=r"max_similarity_among: 11 of 12 contexts found in 12 tries"):
        run(*words, "n_contexts=12", output="twelve")


def test_interpolated(run, people):
    folder, _, _ = people
    names, known = read_contexts(folder / "contexts.npy")
    words = ("source=interpolated", f"source.contexts={folder / 'contexts.npy'}", "source.t_min=0.2", "n_contexts=300")
    _, contexts, _, origins = read(run(*words, "source.t_max=0.4"))
    np.testing.assert_allclose(np.linalg.norm(contexts, axis=1), 1, atol=1e-6)
    for context, origin in zip(contexts, origins, strict=True):
        first, second = (known[names.index(name)].astype(float) for name in origin["between"])
        whole, part = (np.arccos(np.clip(first @ other, -1, 1)) for other in (second, context))
        assert origin["between"][0] != origin["between"][1] and 0.2 <= origin["t"] <= 0.4
        assert part == pytest.approx(origin["t"] * whole, abs=1e-3)
        assert np.arccos(context @ second) == pytest.approx((1 - origin["t"]) * whole, abs=1e-3)
    assert {name for origin in origins for name in origin["between"]} == set(names)


def test_slerp_is_pinned():
    start, end = np.array([[1, 0, 0]] * 3, np.float32), np.array([[0, 1, 0]] * 3, np.float32)
    expected = [[1, 0, 0], [np.cos(np.pi / 6), np.sin(np.pi / 6), 0], [0, 1, 0]]
    np.testing.assert_allclose(slerp(start, end, np.array([0, 1 / 3, 1])), expected, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- command


def test_a_finished_folder_is_left_alone(run, people):
    words = ("n_contexts=20", f"source.width={WIDTH}")
    folder = run(*words)
    before = (folder / "contexts.npy").stat().st_mtime_ns
    assert run(*words) == folder and (folder / "contexts.npy").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"n_contexts: 21, before 20; .* give another output_dir"):
        run("n_contexts=21", f"source.width={WIDTH}")
    (folder / "contexts.json").unlink()  # killed before the last file
    run("n_contexts=21", f"source.width={WIDTH}")
    assert len(read(folder)[0]) == 21
    with pytest.raises(UserError, match="holds contexts that were not made here"):
        run(*words, output="people")


def test_too_full_a_sphere_says_so(run):
    with pytest.raises(UserError) as caught:
        run("n_contexts=200", "source.width=4", "max_similarity_among=0.5", "tries_per_context=10")
    message = str(caught.value)
    assert message.startswith("max_similarity_among: ") and "of 200 contexts found in 2000 tries" in message
    assert "near another context" in message and "the limit is 0.500" in message
    assert "for the median candidate: raise it, ask for fewer contexts (n_contexts), or allow more tries" in message
    found = int(message.split(": ")[1].split()[0])
    assert 8 <= found <= 24  # spherical caps of 30 degrees on the 3-sphere
    with pytest.raises(UserError, match=r"in 1024 tries"):  # nothing at all: it ends early
        run(
            "n_contexts=2000", "source.width=4", "max_similarity_among=0.5", "max_similarity_to=-0.9999", *training(run)
        )


def training(run) -> list[str]:
    return [f"training_identities={run('n_contexts=500', 'source.width=4', output='known') / 'contexts.npy'}"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["n_contexts=0"], "n_contexts: 0; give at least 1"),
        (["n_contexts=null"], "n_contexts: not set"),
        (["tries_per_context=0"], "tries_per_context: 0"),
        (["max_similarity_among=high"], "max_similarity_among: 'high'; give a cosine"),
        (["max_similarity_among=1.5"], "max_similarity_among: 1.5; give a cosine"),
        (["max_similarity_among=fmr:2"], "max_similarity_among: 'fmr:2'; give a cosine"),
        (["max_similarity_among=fmr:0.001"], "calibration_embeddings: None"),
        (["max_similarity_among=fmr:0.0001", "calibration_embeddings={people}"], "less than one of the 1650 impostor"),
        (["max_similarity_to=0.3"], "max_similarity_to, training_identities: one is set"),
        (
            ["max_similarity_to=0.3", "training_identities={people}", "source.width=17"],
            "is 16 wide, the source",
        ),
        (["max_similarity_to=0.3", "training_identities=nowhere.npy"], "nowhere.npy: no such file"),
        (["source.width=1"], "source.width: 1"),
        (["sampler.num_steps=3"], "it belongs to source=two_stage"),
        (["source=authentic"], "source.embeddings: not set"),
        (["source=authentic", "source.embeddings=nowhere.npy"], "source.embeddings: no such file: nowhere.npy"),
        (["source=authentic", "source.embeddings={people}", "source.image=best"], "source.image: 'best' is not one of"),
        (["source=authentic", "source.embeddings={people}", "n_contexts=13"], "the source has 12 identities"),
        (["source=interpolated", "source.contexts={people}"], "one embedding an image, not one context an identity"),
        (["source=interpolated", "source.contexts={people}", "source.t_min=0.9"], "source.t_min, source.t_max: 0.9"),
        (["source=three_stage"], "authentic, interpolated, two_stage, uniform"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(people, tmp_path, monkeypatch, capsys, mistake, message):
    words = [word.format(people=people[0] / "embeddings.npy") for word in mistake]
    base = ["n_contexts=5", "source.width=16"] if not any(w.startswith("source=") for w in words) else ["n_contexts=5"]
    base = [word for word in base if word.split("=")[0] not in {w.split("=")[0] for w in words}]
    monkeypatch.setattr(sys, "argv", ["create.py", f"output_dir={tmp_path / 'out'}", *base, *words])
    with pytest.raises(SystemExit) as end:
        script.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out" / "contexts.npy").exists()


def test_another_embedder_is_told_by_its_record(people):
    """encode.py leaves encoder.json beside its embeddings."""
    from utils.context_limits import ContextSettings, read_limits
    from utils.context_sources import StreamSource

    folder = people[0]
    (folder / "encoder.json").write_text(json.dumps({"embedder_sha256": "a"}))
    settings = ContextSettings("out", 5, max_similarity_to=0.3, training_identities=str(folder / "contexts.npy"))
    source = StreamSource(iter([]), WIDTH, {}, inputs={"source.recogniser": "b"})
    with pytest.raises(UserError, match=r"embedded by another recogniser than source\.recogniser"):
        read_limits(settings, source)
    source.inputs["source.recogniser"] = "a"
    assert len(read_limits(settings, source).known_rows) == 12
