"""A user's mistakes on the command line: one line, status 2, before any work."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from omegaconf import OmegaConf

import main as main_module
from tests.conftest import ROOT
from utils.config import UserError, check_writable, existing_file, existing_folder, instantiate, settings


@dataclass
class Inner:
    keep: int = 2


@dataclass
class Outer:
    steps: int = 10
    rate: float = 0.1
    name: str | None = None
    marks: list[int] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)


def test_a_launcher_that_is_not_installed_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_submitit_launcher", None)
    monkeypatch.setattr(sys, "argv", ["main.py", "-m", "hydra/launcher=slurm", f"output_dir={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        main_module.main()
    assert end.value.code == 2
    assert "pip install hydra-submitit-launcher" in capsys.readouterr().err


def test_settings_convert_and_nest():
    got = settings(OmegaConf.create({"steps": "3", "marks": [1, 2], "inner": {"keep": 5}}), Outer, "training")
    assert got == Outer(steps=3, marks=[1, 2], inner=Inner(keep=5))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"stepz": 3}, r"training\.stepz: unknown key; did you mean training\.steps"),
        ({"steps": "many"}, r"training\.steps: Value 'many'"),
        ({"marks": 3}, r"training\.marks: 3; a list is wanted, as in \[3\]"),
        ({"marks": ["x"]}, r"training\.marks: Value 'x'"),
        ({"steps": "???"}, r"training\.steps: not set"),
        ({"inner": {"kept": 1}}, r"training\.inner.*kept"),
        (None, "section is missing"),
    ],
)
def test_settings_name_the_key(node, message):
    with pytest.raises(UserError, match=message) as info:
        settings(None if node is None else OmegaConf.create(node), Outer, "training")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("node", ["faces", 3, ["faces"], OmegaConf.create(["faces"])])
def test_a_section_without_keys(node):
    with pytest.raises(UserError, match=r"dataset\.sets\[0\]: .*; keys with values are wanted: steps, rate, name"):
        settings(node, Outer, "dataset.sets[0]")


def test_instantiate_checks_the_signature_first():
    node = OmegaConf.create({"_target_": "torch.nn.Linear", "in_features": 3, "out_featurs": 2})
    with pytest.raises(UserError, match=r"model\.out_featurs: unknown key; did you mean model\.out_features"):
        instantiate(node, "model")
    with pytest.raises(UserError, match=r"model\.out_features: not set"):
        instantiate(OmegaConf.create({"_target_": "torch.nn.Linear", "in_features": 3}), "model")
    with pytest.raises(UserError, match="cannot import"):
        instantiate(OmegaConf.create({"_target_": "torch.nn.Lineal"}), "model")
    with pytest.raises(UserError, match="has no _target_"):
        instantiate(OmegaConf.create({"in_features": 3}), "model")
    partial = instantiate(
        OmegaConf.create({"_target_": "torch.nn.Linear", "_partial_": True, "in_features": 3}), "model"
    )
    assert partial(out_features=2).weight.shape == (2, 3)


def test_paths_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"a\.b: not set"):
        existing_file(None, "a.b")
    with pytest.raises(UserError, match=r"a\.b: \['x'\]; the path of a file is wanted"):
        existing_file(["x"], "a.b")
    with pytest.raises(UserError, match=r"a\.b: no such file: .*none; try encode\.py"):
        existing_file(tmp_path / "none", "a.b", "try encode.py")
    with pytest.raises(UserError, match="no such folder"):
        existing_folder(tmp_path / "none", "a.b")
    assert existing_folder(str(tmp_path), "a.b") == tmp_path


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new/x.npy", "a.b")
    monkeypatch.chdir(tmp_path)
    check_writable("x.npy", "a.b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    with pytest.raises(UserError, match=r"a\.b: cannot write file/x/y \(.*file is a file\); give another place"):
        check_writable("file/x/y", "a.b")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"a\.b: cannot write .*new \(no permission\)"):
        check_writable(tmp_path / "new", "a.b")


@pytest.fixture
def launch(monkeypatch, capsys):
    """launch(*arguments) -> the lines that main.py writes to standard error before it leaves with status 2."""

    def _launch(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            main_module.main()
        assert ended.value.code == 2
        return [line for line in capsys.readouterr().err.splitlines() if line]

    return _launch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.stepz=3"], "training.stepz: unknown key; did you mean training.steps?"),
        (["model=unet_cond_xx"], "unet_cond_ca"),
        (["training.steps=soon"], "training.steps: Value 'soon'"),
        (["dataset.sample_root=x"], "the key is dataset.samples_root"),
        (["dataset=folder", "dataset.samples_root=/nowhere", "latent_diffusion=false"], "no such folder: /nowhere"),
        (["training.checkpoint.VQEncoder=/nowhere.pt"], "training.checkpoint.VQEncoder: no such file: /nowhere.pt"),
        (["model.initial_channels=50"], "initial_channels"),
        (["training.steps=0"], "training.steps: 0; it is at least 1"),
        (["training.checkpoint.keep=0"], "training.checkpoint.keep: 0; it is at least 1"),
        (["training.context_permutation=2"], "training.context_permutation: 2.0; it is a share from 0 to 1"),
        (["+colour=red"], "colour: unknown key"),
        (["training.precision=fp8"], "training.precision: 'fp8' is not one of fp32, bf16, fp16"),
        (["dataset.samples_root=/"], "VQEncoder: not set"),
    ],
)
def test_command_line_mistakes(launch, tmp_path, arguments, message):
    lines = launch(f"output_dir={tmp_path}", *arguments)
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines


def test_an_experiment_may_bring_no_section_of_its_own(launch, tmp_path):
    (tmp_path / "configs/experiment").mkdir(parents=True)
    (tmp_path / "configs/experiment/mine.yaml").write_text("# @package _global_\ntrainig: {steps: 3}\n")
    (line,) = launch("--config-dir", str(tmp_path / "configs"), "experiment=mine", f"output_dir={tmp_path / 'run'}")
    assert line == "error: trainig: unknown key; did you mean training?"


def test_an_output_folder_that_cannot_be_made(launch, tmp_path):
    (tmp_path / "file").write_text("")
    (line,) = launch(f"output_dir={tmp_path / 'file' / 'run'}")
    assert line.startswith("error: output_dir: cannot write")


@pytest.mark.slow
def test_a_mistake_as_a_shell_sees_it(tmp_path):
    command = [sys.executable, "main.py", f"output_dir={tmp_path}", "training.stepz=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: training.stepz: unknown key; did you mean training.steps?\n"


@pytest.mark.slow
def test_a_sweep_runs_each_job_in_its_own_folder(run_script, tmp_path):
    done = run_script(
        "utils.data.rendered", "-m", f"output_dir={tmp_path}/sweep", "n_identities=1", "images_per_identity=1",
        "image_size=32", "processes=1", "seed=1,2",
    )  # fmt: skip
    folders = sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert [name.split("_")[0] for name in folders] == ["0", "1"], done.stderr
    assert "seed=1" in folders[0] and "seed=2" in folders[1] and str(tmp_path) not in folders[0]
    assert len(list((tmp_path / "sweep").glob("*/00000/000.png"))) == 2
