"""benchmarks.study: numbers, table and picture from given files; stages that are skipped and resumed; bad input."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from benchmarks.study import __main__ as study_main
from benchmarks.study import settings
from benchmarks.study.plot import draw, plot_study
from benchmarks.study.results import VariantResult, markdown, to_json
from benchmarks.study.run import Study
from benchmarks.study.settings import check
from diffusion.model_file import ModelFile, save_model_file
from diffusion.schedule import NoiseSchedule
from models.diffusion.unet import ConditionalUNet
from utils import config, stages
from utils.config import UserError
from utils.contexts import write_rows

WIDTH = 16
MODEL = {
    "initial_channels": 32,
    "channel_multipliers": [1, 1],
    "is_attention": [False, True],
    "n_blocks_per_resolution": 1,
    "context_input_channels": WIDTH,
    "context_channels": 32,
    "learn_empty_context": True,
}
PEOPLE, IMAGES = 3, 4
FEW = ["~variants.fixed_500", "~variants.fixed_600", "~variants.fixed_700"]


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What a study reads: a model that draws pixels, contexts, an embedder's file, training embeddings, pairs."""
    folder = tmp_path_factory.mktemp("demo")
    model = ModelFile(
        ConditionalUNet(**MODEL),
        NoiseSchedule(),
        MODEL,
        latent_diffusion=False,
        latent_shape=(3, 8, 8),
        is_published=False,
    )
    (folder / "diffusion").mkdir()
    save_model_file(model, folder / "diffusion/model.safetensors")
    rng = np.random.default_rng(0)
    names = [f"new_{k}" for k in range(PEOPLE)]
    write_rows(folder / "contexts.npy", folder / "context_names.txt", names, unit(rng.standard_normal((PEOPLE, WIDTH))))
    (folder / "embeddings").mkdir()
    np.save(folder / "embeddings/embeddings.npy", unit(rng.standard_normal((4, WIDTH))))
    (folder / "backbone.safetensors").write_bytes(b"weights")
    (folder / "pairs.txt").write_text("10\t1\n")
    (folder / "faces").mkdir()
    return folder


@pytest.fixture
def arguments(demo, tmp_path):
    return [
        f"checkpoint={demo / 'diffusion/model.safetensors'}",
        "decoder=null",
        f"contexts={demo / 'contexts.npy'}",
        f"evaluate.real.embeddings_file={demo / 'embeddings/embeddings.npy'}",
        f"evaluate.embedder.checkpoint={demo / 'backbone.safetensors'}",
        f"test.pairs_file={demo / 'pairs.txt'}",
        f"test.dataset.root={demo / 'faces'}",
        f"output_dir={tmp_path / 'study'}",
        "seeds=[0,1]",
    ]


@pytest.fixture(scope="module", autouse=True)
def composed_once():
    """What composes the same way in most tests here takes a tenth of a second each time."""

    @functools.cache
    def cached(config_name, overrides, key):
        return config.compose(config_name, overrides, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "compose", lambda name, overrides, key: cached(name, tuple(overrides), key))
        yield


class Scripts:
    """In place of the processes: notes each command and writes the files that it would leave behind."""

    def __init__(self):
        self.commands = []
        self.stop_at = None  # the number of the command that fails

    def start(self, arguments, threads):
        arguments = list(arguments)
        if "--nproc_per_node" in arguments:
            arguments = arguments[arguments.index("--nproc_per_node") + 2 :]
        script = arguments[1] if arguments[0] == "-m" else arguments[0]
        given = dict(item.split("=", 1) for item in arguments if "=" in item)
        self.commands.append((script, given))
        if self.stop_at == len(self.commands):
            return 1
        getattr(self, script.removesuffix(".py").replace(".", "_"))(given)
        return 0

    def sample(self, given):
        folder = Path(given["sampling.save_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        switch = {"ddim": None, "two_stage": 700}.get(given["sampler"], -1)
        lines = [{"file": f"new_{k}/{i}.png", "switch_t": switch} for k in range(PEOPLE) for i in range(IMAGES)]
        (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "dataset.json").write_text(json.dumps({"images": PEOPLE * IMAGES, "identities": PEOPLE}))

    def align(self, given):
        Path(given["output_dir"]).mkdir()
        (Path(given["output_dir"]) / "alignment_summary.json").write_text(json.dumps({"rate": 0.5}))

    def evaluate(self, given):
        assert (Path(given["data.samples_dir"]) / "manifest.jsonl").is_file() and Path(given["data.root"]).is_dir()
        switch = 700.0 if given["data.name"].startswith("adaptive") else None
        metrics = {"num_images": 12, "num_identities": 3, "c_intra": 0.9, "u_class": 1.0, "radius": 0.25}
        sets = {given["data.name"]: {"metrics": metrics | {"switch_t_mean": switch}}}
        Path(given["output_dir"]).mkdir()
        (Path(given["output_dir"]) / "metrics.json").write_text(json.dumps({"sets": sets}))

    def recognition_train(self, given):
        folder = Path(given["output_dir"])
        folder.mkdir(parents=True)
        (folder / "backbone.safetensors").write_bytes(b"weights")
        (folder / "metrics.json").write_text(json.dumps({"steps": 5, "training_accuracy": 0.5}))

    def recognition_test(self, given):
        folder = Path(given["output_dir"])
        folder.mkdir()
        files = given["checkpoint"].strip("[]").split(",")
        assert all(Path(stages.ROOT / file).is_file() for file in files)
        found = {"num_genuine": 6, "num_impostor": 6}
        models = [
            {"name": f"seed_{k}", "sets": {"pairs": {"accuracy": 0.8 + 0.1 * k, **found}}} for k in range(len(files))
        ]
        results = models[0] if len(models) == 1 else {"models": models}
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "roc.json").write_text("{}")


@pytest.fixture
def scripts(monkeypatch):
    found = Scripts()
    monkeypatch.setattr(stages, "start", found.start)
    return found


def run(compose, arguments, *more):
    """The last results of a study, run in this process."""
    cfg = compose("study_config", *arguments, *more)
    GlobalHydra.instance().clear()
    return list(Study(check(cfg), Path(cfg.output_dir)).run())[-1]


def test_a_study_runs_every_script_once(compose, arguments, scripts, tmp_path):
    result = run(compose, arguments)
    assert [row.name for row in result] == [
        *("one_stage", "fixed_400", "fixed_500", "fixed_600", "fixed_700", "adaptive", "adaptive_perturbed")
    ]
    counted = [script for script, _ in scripts.commands]
    expected = {"sample.py": 7, "evaluate.py": 7, "recognition.train": 14, "recognition.test": 7}
    assert {name: counted.count(name) for name in expected} == expected and len(counted) == 35
    for row in result:
        assert row.accuracy == {"0": 0.8, "1": pytest.approx(0.9)} and (row.num_pairs, row.sets) == (12, ["pairs"])

    # All else is equal
    drawn = [given for script, given in scripts.commands if script == "sample.py"]
    for given in drawn:
        given.pop("sampling.save_dir")
    changed = {key for given in drawn for key in given if len({other.get(key) for other in drawn}) > 1}
    assert changed == {"sampler", "sampling.sample_config.step_th", "sampling.perturbation.lower_bound"}
    trained = [given for script, given in scripts.commands if script == "recognition.train"]
    changed = {key for given in trained for key in given if len({other[key] for other in trained}) > 1}
    assert changed == {"dataset.root", "output_dir", "training.seed"}
    assert {Path(given["dataset.root"]).name for given in trained} == {"samples"}

    # The second time there is nothing to do; another seed trains that one alone
    scripts.commands.clear()
    assert run(compose, arguments) == result and not scripts.commands
    more = run(compose, arguments, "seeds=[1,2]")
    assert [script for script, _ in scripts.commands] == ["recognition.train", "recognition.test"] * 7
    assert {given["training.seed"] for script, given in scripts.commands if script == "recognition.train"} == {"2"}
    assert list(more[0].accuracy) == ["1", "2"] and (tmp_path / "study/adaptive/recognisers/seed_0").is_dir()


def test_a_stopped_study_goes_on(compose, arguments, scripts, tmp_path):
    scripts.stop_at = 9  # the first variant has five commands
    arguments = [*arguments, *FEW]
    with pytest.raises(UserError, match=r"stage 'seed_1': .* the same `python -m benchmarks\.study` goes on"):
        run(compose, arguments)
    done, scripts.stop_at = list(scripts.commands), None
    scripts.commands.clear()
    result = run(compose, arguments, "only=[one_stage,fixed_400]")
    assert [script for script, _ in scripts.commands] == ["recognition.train", "recognition.test"]
    assert scripts.commands[0] == done[-1] and [row.name for row in result] == ["one_stage", "fixed_400"]


def test_variants_are_shared_out_and_collected(compose, arguments, scripts):
    first = run(compose, arguments, "only=[adaptive]", *FEW)
    assert [row.name for row in first] == ["adaptive"]
    second = run(compose, arguments, "only=[one_stage]", *FEW)
    assert [row.name for row in second] == ["one_stage", "adaptive"]


def test_other_settings_are_refused(compose, arguments, scripts, tmp_path):
    run(compose, arguments, "only=[adaptive]", *FEW)
    before = sorted(path for path in (tmp_path / "study").rglob("*"))
    for change, named in (
        ("processes=1", r"\(processes\)"),
        ("sample.sampler.num_steps=14", r"\(sample\.sampler\.num_steps\)"),
    ):
        with pytest.raises(UserError, match=rf"output_dir: .*adaptive was made with other settings {named}; give"):
            run(compose, arguments, "only=[one_stage]", change, *FEW)
    assert sorted(path for path in (tmp_path / "study").rglob("*")) == before


def test_faces_are_aligned_where_the_model_does_not(compose, arguments, scripts):
    run(compose, arguments, "align={processes: 1}", "only=[adaptive]", *FEW)
    assert [script for script, _ in scripts.commands][:3] == ["sample.py", "align.py", "evaluate.py"]
    assert scripts.commands[1][1]["processes"] == "1"
    trained = [given for script, given in scripts.commands if script == "recognition.train"]
    assert {Path(given["dataset.root"]).name for given in trained} == {"faces"}


BAD = {
    "seeds=[0,0]": r"seeds: \[0, 0\]; one or more different",
    "processes=0": "processes: 0; give at least 1",
    "only=[adaptiv]": r"only: \['adaptiv'\]; the variants are one_stage, fixed_400",
    "checkpoint=nowhere": "checkpoint: no such file or folder: nowhere; a finished `make demo`",
    "contexts=nowhere.npy": "contexts: no such file or folder: nowhere.npy",
    "evaluate.embedder.checkpoint=nowhere": "evaluate.embedder.checkpoint: no such file or folder: nowhere",
    "test.pairs_file=nowhere": "test.pairs_file: no such file or folder: nowhere",
    "evaluate.real.embeddings_file=null": "evaluate: radius: auto is read off the real set",
    "evaluate.radius=3": "evaluate: radius: 3; a cosine distance between 0 and 2",
    "variants.adaptive.title=one stage": "variants: the titles one stage, fixed t0 400, one stage, adaptive",
    "+sample.sampler.num_step=3": r"variants.one_stage.overrides: sampler.num_step: unknown key.*num_steps",
    "sample.sampling.calibration.target_t=100": "variants.adaptive.overrides: sampling.calibration.target_t: 100, but",
    "+sample.sampling.save_mode=blocks": "variants.one_stage.overrides: sampling.save_mode: blocks; a study wants",
    "variants.adaptive.overrides=['sampler=two_stages']": "variants.adaptive.overrides: .*two_stages.*two_stage_fixed",
    "variants.adaptive.published=UIFaces": "variants.adaptive.published: 'UIFaces' names 0 rows; there are Vec2Face",
    "+train.training.epoch=3": "train: training.epoch: unknown key.*epochs",
    "train=3": "train: 3; a section of the script's keys is wanted",
    "+variants.new={title: a}": "variants.new.overrides: not set|variants",
}


@pytest.mark.parametrize("change", BAD)
def test_bad_input_is_told_before_anything_runs(compose, arguments, scripts, tmp_path, change):
    with pytest.raises(UserError, match=BAD[change]) as told:
        run(compose, arguments, change, *FEW)
    assert not scripts.commands and not (tmp_path / "study").exists() and "\n" not in str(told.value)


def test_a_row_may_be_added(compose, arguments):
    more = "+variants.guided={title: guided, overrides: ['sampler=ddim', 'sampling.sample_config.cfg_scale=1.0']}"
    plan = check(compose("study_config", *arguments, *FEW, more))
    names = ["one_stage", "fixed_400", "adaptive", "adaptive_perturbed", "guided"]
    assert [variant.name for variant in plan.variants] == names
    scales = [variant.drawn_with["sampler.guidance_scale"] for variant in plan.variants]
    assert scales == [0.0, 1.0, 1.0, 1.0, 1.0] and plan.variants[-1].published is None


def test_the_published_size_says_what_it_needs(compose, scripts):
    with pytest.raises(UserError, match="checkpoint: not set; give checkpoint=VALUE"):
        check(compose("study_config", "scale=published"))


def test_the_published_size_composes(compose, arguments, tmp_path):
    wide = [item for item in arguments if not item.startswith("test.")]
    small = [f"test.benchmarks_dir={tmp_path}", "sample.sampling.n_contexts=3"]
    cfg = compose("study_config", "scale=published", *wide, *small)
    plan = check(cfg)
    assert plan.variants[5].drawn_with["sampler.num_steps"] == 50 and plan.variants[5].published.mean == 93.27
    assert plan.train == ["experiment=recognition_uiface", "check.errors=warn"]


def test_the_command(compose, arguments, scripts, tmp_path, monkeypatch, capsys):
    reported = []
    monkeypatch.setattr(Study, "write_report", lambda study, done, path: reported.append((len(done), path.name)))
    monkeypatch.setattr(sys, "argv", ["study", *arguments, *FEW, "only=[one_stage,adaptive]"])
    study_main.main()
    table = (tmp_path / "study/study.md").read_text()
    assert table in capsys.readouterr().out and reported == [(2, "report.html")]
    assert "| one stage | 85.00 ± 7.07 | 2 | 90.0 % | 100.0 % |" in table and "| 700 | 93.27 |" in table
    found = json.loads((tmp_path / "study/study.json").read_text())["variants"]
    assert found[1]["accuracy"] == {
        "mean": pytest.approx(0.85),
        "std": pytest.approx(0.0707107, abs=1e-6),
        "num_seeds": 2,
        "by_seed": {"0": 0.8, "1": 0.9},
    }
    with Image.open(tmp_path / "study/study.png") as image:
        assert image.size[0] > 1000

    monkeypatch.setattr(sys, "argv", ["study", *arguments, "seeds=[]"])
    with pytest.raises(SystemExit) as left:
        study_main.main()
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------------------------- from given results


def row(name, accuracies, published=None, **metrics):
    known = {"num_identities": 200, "num_images": 1600, "c_intra": 0.9, "eer": 0.1, "radius": 0.3125, **metrics}
    seeds = {str(seed): value for seed, value in enumerate(accuracies)}
    return VariantResult(name, name, seeds, known, ["pairs"], 2400, 60.0, published)


STUDY = [
    row("one stage", [0.80, 0.82, 0.84], leakage_mean=0.6512, c_intra=0.8),
    row(
        "adaptive",
        [0.83, 0.83, 0.86],
        {"name": "UIFace", "mean": 93.27, "source": "UIFace (ICLR 2025), appendix"},
        leakage_mean=0.6,
        switched=0.95,
        switch_t_mean=789.4,
    ),
]


def test_table():
    lines = markdown(STUDY).splitlines()
    assert lines[:4] == [
        "| sampler | accuracy, % | seeds | C_intra | EER | leakage, mean | switched | switch step | published, % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| one stage | 82.00 ± 2.00 | 3 | 80.0 % | 10.0 % | 0.651 |  |  |  |",
        "| adaptive | 84.00 ± 1.73 | 3 | 90.0 % | 10.0 % | 0.600 | 95.0 % | 789 | 93.27 |",
    ]
    text = "\n".join(lines[4:])
    assert "pairs, 2,400 pairs" in text and "seeds (0, 1, 2)" in text and "200 people, 1,600 images" in text
    assert "are for r = 0.312." in text
    assert "UIFace: UIFace (ICLR 2025), appendix" in text
    assert "Published" not in markdown(STUDY[:1])


def test_one_seed_has_no_spread():
    study = [row("adaptive", [0.8])]
    assert "| adaptive | 80.00 | 1 |" in markdown(study)
    assert to_json(study)["variants"][0]["accuracy"] == {
        "mean": 0.8,
        "std": None,
        "num_seeds": 1,
        "by_seed": {"0": 0.8},
    }
    draw(study)


def test_nothing_complete(tmp_path):
    assert "No variant is complete" in markdown([]) and to_json([])["seconds"] == 0
    plot_study([], tmp_path / "study.png")
    assert not (tmp_path / "study.png").exists()


def test_picture():
    left, right = draw(STUDY).axes
    dots = [line for line in left.lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in dots] == [pytest.approx([80, 82, 84]), pytest.approx([83, 83, 86])]
    assert [label.get_text() for label in left.get_xticklabels()] == ["one stage", "adaptive"]
    bars = [container for container in left.containers]
    assert bars[0].lines[0].get_ydata()[0] == pytest.approx(82)
    assert np.ptp(bars[0].lines[2][0].get_segments()[0][:, 1]) == pytest.approx(4)  # twice the deviation
    points = [container.lines[0].get_xydata()[0].tolist() for container in right.containers]
    assert points == [pytest.approx([80, 82]), pytest.approx([90, 84])]
    assert dots[0].get_color() == right.containers[0].lines[0].get_color()
