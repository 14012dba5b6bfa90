"""What files say of where they come from: the training set, the head, the code."""

import subprocess

import pytest

from recognition.backbones import build_backbone, save_backbone
from recognition.export import main as export
from recognition.heads import CosFace
from recognition.provenance import describe_provenance, training_provenance
from utils.checkpoint import read_metadata
from utils.checkpoint.__main__ import convert, inspect
from utils.version import code_version

NUMBERS = {"identities": 7, "images": 40, "images_per_step": 8, "steps": 5}


def git(folder, *words: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_code_version_is_the_commit_where_there_is_one(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.2.3"\n')
    assert code_version(project) == "1.2.3"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    assert code_version(project) == "1.2.3"  # somebody else's repository, in which the project lies
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-qm", "x")
    commit = git(project, "rev-parse", "--short", "HEAD").strip()
    assert code_version(project) == f"1.2.3+g{commit}"
    (project / "pyproject.toml").write_text('version = "1.2.4"\n')
    assert code_version(project) == f"1.2.4+g{commit}.dirty"


def test_a_backbone_says_what_it_was_trained_on(tmp_path, compose):
    provenance = training_provenance(CosFace(16, 7, scale=32.0, margin=0.25), **NUMBERS)
    head = {"name": "CosFace", "scale": 32.0, "margin": 0.25}
    assert provenance == {**NUMBERS, "head": head, "code": code_version()}
    backbone = build_backbone("ir_18", input_size=32, num_features=16, width=0.125)
    file, copy, graph = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "a.onnx"
    save_backbone(backbone, file, "RGB", provenance=provenance)
    assert read_metadata(file) == {
        "kind": "recognition_backbone",
        "config": backbone.config,
        "channel_order": "RGB",
        "provenance": provenance,
    }
    convert(file, copy)
    assert read_metadata(copy) == read_metadata(file)
    line = (
        "trained on: identities 7, images 40, steps 5, images_per_step 8, "
        f"head (name CosFace, scale 32.0, margin 0.25), code {code_version()}"
    )
    assert line in inspect(file) and line in inspect(copy)

    save_backbone(backbone, copy)
    assert not any(line.startswith("trained on") for line in inspect(copy))
    pytest.importorskip("onnx")
    export.__wrapped__(compose("recognition_export_config", f"checkpoint={file}", f"output={graph}"))
    assert any(line.startswith('provenance: {"identities": 7, "images": 40') for line in inspect(graph))


def test_a_foreign_value_is_shown_as_it_is():
    assert describe_provenance("someone's network") == "someone's network"
    assert describe_provenance(["a", 1]) == "['a', 1]"
