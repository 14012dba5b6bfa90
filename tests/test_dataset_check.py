"""The check before training: every guard fires on what it is for, and none on good data (rendered, aligned people)."""

import json
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recognition import check as check_command
from recognition import train as train_command
from recognition.backbones import build_backbone, save_backbone
from recognition.dataset_check import ERROR, WARNING, CheckSettings, check_training_set
from recognition.dataset_check.counts import two_groups
from recognition.dataset_check.labels import separability
from recognition.dataset_check.mean_face import REFERENCE, fit_mean_face, render_mean_face
from recognition.dataset_check.sample import TOGETHER, choose
from recognition.datasets import DatasetSettings, open_training_set
from recognition.heads import CosFace
from recognition.training_sets import TrainingSet, read_training_set
from utils.alignment import norm_crop
from utils.config import UserError
from utils.data.formats.labelled import LabelledImages
from utils.data.rendered import render_with_landmarks, sample_identity, sample_nuisance
from utils.embedders import backbone_embedder
from utils.images import encode_image, read_image, resize, to_float, write_encoded, write_image

LEARNT, UNSEEN, EACH = 28, 18, 6  # people that the embedder learns from, others, images of each person


class Encoded(LabelledImages):
    """Images in memory."""

    def __init__(self, faces, labels):
        labels = np.asarray(labels)
        identities = [f"p{k:03d}" for k in range(labels.max() + 1)]
        super().__init__("memory", [f"p{y:03d}/{i}.bmp" for i, y in enumerate(labels)], identities, labels)
        self.content = [encode_image(np.ascontiguousarray(face), ".bmp") for face in faces]

    def encoded(self, index):
        return self.content[index]


def training_set(faces, labels) -> TrainingSet:
    images = Encoded(faces, labels)
    return TrainingSet(images, np.arange(len(images)), images.labels, images.identities)


@dataclass
class People:
    aligned: np.ndarray  # (n, 112, 112, 3) uint8
    raw: np.ndarray  # (n, 64, 64, 3), as rendered
    labels: np.ndarray

    @property
    def unseen(self):
        return self.aligned[LEARNT * EACH :], self.labels[LEARNT * EACH :] - LEARNT


def photograph(person, k):
    return render_with_landmarks(sample_identity(11, person), sample_nuisance(11, person, k, 0.7), 64)


@pytest.fixture(scope="session")
def people() -> People:
    shots = [photograph(person, k) for person in range(LEARNT + UNSEEN) for k in range(EACH)]
    aligned = np.stack([norm_crop(*shot) for shot in shots])
    return People(aligned, np.stack([image for image, _ in shots]), np.repeat(np.arange(LEARNT + UNSEEN), EACH))


@pytest.fixture(scope="session")
def embedder(people, tmp_path_factory):
    """A small recogniser that some seconds of training teach the first LEARNT people."""
    path = tmp_path_factory.mktemp("embedder") / "backbone.safetensors"
    torch.manual_seed(0)
    backbone = build_backbone("ir_18", input_size=32, num_features=64, width=0.125)
    head = CosFace(64, LEARNT, scale=16.0, margin=0.2)
    images = to_float(resize(people.aligned[: LEARNT * EACH], 32))
    images, labels = torch.cat([images, images.flip(-1)]), torch.from_numpy(people.labels[: LEARNT * EACH]).repeat(2)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(70):
        optimizer.param_groups[0]["lr"] = 0.1 if step < 45 else 0.01
        batch = torch.randperm(len(images))[:32]
        loss = F.cross_entropy(head(backbone(images[batch]), labels[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_backbone(backbone, path)
    return backbone_embedder(str(path))


def findings(source, tmp_path, embedder=None, **settings):
    """What the check says, as `severity check`, and its outcome."""
    options = CheckSettings(**{"errors": "warn", **settings})
    (outcome,) = check_training_set(source, options, input_size=112, output_dir=tmp_path, embedder=embedder)
    return [f"{finding.severity} {finding.check}" for finding in outcome.findings], outcome


def test_good_data_is_silent(people, embedder, tmp_path):
    found, outcome = findings(training_set(people.aligned, people.labels), tmp_path)
    assert found == []
    facts = outcome.facts
    assert facts["identities"] == LEARNT + UNSEEN
    assert facts["images"] == facts["images_looked_at"] == len(people.labels)
    assert facts["mean_face"]["correlation"] > 0.9 and facts["channels"]["share_redder_than_blue"] > 0.95
    assert facts["pixel_labels"]["auc"] > 0.65 and "verdict" not in facts["pixel_labels"]
    report = json.loads((tmp_path / "dataset_check.json").read_text())
    assert report["facts"] == facts and report["findings"] == []
    assert read_image(tmp_path / "mean_face.png").shape == (112, 112, 3)

    found, outcome = findings(training_set(*people.unseen), tmp_path, embedder)
    assert found == []
    assert outcome.facts["embeddings"]["auc"] > 0.9
    assert outcome.facts["embeddings_channels_exchanged"]["auc"] < outcome.facts["embeddings"]["auc"]


def test_shuffled_labels(people, embedder, tmp_path):
    rng = np.random.default_rng(0)
    found, outcome = findings(training_set(people.aligned, rng.permutation(people.labels)), tmp_path)
    assert found == ["warning labels"] and outcome.facts["pixel_labels"]["auc"] < 0.53
    faces, labels = people.unseen
    found, outcome = findings(training_set(faces, rng.permutation(labels)), tmp_path, embedder)
    assert found == ["error labels"] and "labels that are shuffled" in outcome.findings[0].line()


def test_one_identity_in_all_folders(people, embedder, tmp_path):
    shots = np.stack([norm_crop(*photograph(500, k)) for k in range(60)])
    labels = np.repeat(np.arange(12), 5)
    found, outcome = findings(training_set(shots, labels), tmp_path, embedder)
    assert found == ["error identities"] and "collapsed into one person" in outcome.findings[0].line()


def test_some_identities_are_mixed_up(people, embedder, tmp_path):
    faces, labels = people.unseen
    labels = labels.copy()
    mixed = np.flatnonzero(labels < 5)
    labels[mixed] = np.arange(len(mixed)) % 5  # each of five folders gets an image or two of every one of five people
    found, outcome = findings(training_set(faces, labels), tmp_path, embedder)
    assert found == ["warning identities"]
    assert set(outcome.facts["low_consistency"]["identities"]) <= {f"p{k:03d}" for k in range(5)}


def test_bgr_given_as_rgb(people, embedder, tmp_path):
    faces, labels = people.unseen
    found, outcome = findings(training_set(faces[..., ::-1], labels), tmp_path)
    assert found == ["error channel order"] and "BGR was written as RGB" in outcome.findings[0].line()
    found, outcome = findings(training_set(faces[..., ::-1], labels), tmp_path, embedder)
    assert found == ["error channel order"] * 2
    assert "with red and blue exchanged the embedder tells people apart better" in outcome.findings[1].line()
    half = np.where(np.arange(len(faces))[:, None, None, None] % 2, faces, faces[..., ::-1])
    assert findings(training_set(half, labels), tmp_path)[0] == ["warning channel order"]


def test_grey_sets_have_no_channel_order(people, embedder, tmp_path):
    faces, labels = people.unseen
    grey = np.repeat(faces.mean(axis=3, keepdims=True).astype(np.uint8), 3, axis=3)
    found, outcome = findings(training_set(grey, labels), tmp_path, embedder)
    assert not [line for line in found if "channel" in line]
    assert outcome.facts["share_grey"] == 1 and "embeddings_channels_exchanged" not in outcome.facts


def moved(faces, box):
    """The part `box` (left, top, right, bottom) of each face, its surroundings repeating the border, at 112 x 112."""
    padded = np.pad(faces, ((0, 0), (40, 40), (40, 40), (0, 0)), mode="edge")
    left, top, right, bottom = (value + 40 for value in box)
    return resize(np.ascontiguousarray(padded[:, top:bottom, left:right]), 112)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda people: resize(people.raw, 112), "not aligned"),
        (lambda people: moved(people.aligned, (8, 0, 120, 112)), "8 pixels to the left, 0 .* 1.00 times"),
        (lambda people: moved(people.aligned, (0, -6, 112, 106)), "6 down and 1.00 times"),
        (lambda people: moved(people.aligned, (-20, -20, 132, 132)), "crops with more background"),
        (lambda people: people.aligned[:, ::-1], "not aligned"),
        (lambda people: np.random.default_rng(0).integers(0, 255, people.aligned.shape, dtype=np.uint8), "no faces"),
    ],
    ids=["as rendered", "shifted left", "shifted down", "background", "upside down", "noise"],
)
def test_images_that_are_not_aligned(people, tmp_path, change, words):
    found, outcome = findings(training_set(change(people), people.labels), tmp_path)
    assert found == ["warning alignment"]
    assert re.search(words, outcome.findings[0].line())
    assert outcome.facts["pixel_labels"] == outcome.facts["channels"] == "none made: no aligned faces"


def test_small_shifts_are_forgiven(people):
    for box in ((2, 0, 114, 112), (0, -2, 112, 110), (-5, -5, 117, 117)):
        fit = fit_mean_face(moved(people.aligned, box).mean(axis=0).astype(np.uint8))
        assert fit.correlation > 0.4 and 0.75 <= fit.scale <= 1.3 and max(map(abs, fit.shift)) < 4.5


def test_the_reference_is_what_its_code_renders():
    again = render_mean_face(people=12, images=2, seed=1)
    assert fit_mean_face(again).correlation > 0.8
    own = fit_mean_face(read_image(REFERENCE))
    assert own.correlation == pytest.approx(1) and (own.scale, own.shift) == (1.0, (0.0, 0.0))


def test_channels_and_labels_need_enough_images(people, tmp_path):
    outcome = findings(training_set(people.aligned[:12], people.labels[:12]), tmp_path)[1]
    assert outcome.findings == []
    assert outcome.facts["mean_face"] == "none made: 12 images, 20 are needed"
    outcome = findings(training_set(people.aligned[:60], people.labels[:60]), tmp_path)[1]
    assert outcome.facts["pixel_labels"]["verdict"] == "none made: too few images"


# Folders


def folders(root, faces, counts):
    """`root`/<k>/<i>.jpg with counts[k] images, none twice."""
    number = 0
    for k, count in enumerate(counts):
        (root / f"{k:03d}").mkdir(parents=True)
        for i in range(count):
            write_image(root / f"{k:03d}/{i}.jpg", np.roll(faces[number % len(faces)], number // len(faces), axis=2))
            number += 1
    return root


def test_a_half_empty_folder_tree(people, tmp_path):
    small = resize(people.aligned, 32)
    whole = read_training_set(folders(tmp_path / "whole", small, [5] * 12))
    options = {"output_dir": tmp_path, "input_size": 32}
    assert not check_training_set(whole, CheckSettings(), **options)[0].findings
    half = read_training_set(folders(tmp_path / "half", small, [5] * 6 + [0] * 6))
    with pytest.raises(UserError, match=r"^dataset: .*half: empty identities: 6 of 12 identities have no image "
                       r"\(006; 007; 008; \.\.\.\).*half-empty folder tree.*check\.errors=warn goes on$"):  # fmt: skip
        check_training_set(half, CheckSettings(), **options)
    (outcome,) = check_training_set(half, CheckSettings(errors="warn"), **options)
    assert outcome.facts["identities_without_images"] == 6
    stopped = read_training_set(folders(tmp_path / "stopped", small, [10] * 8 + [2] * 4))
    (outcome,) = check_training_set(stopped, CheckSettings(), **options)
    assert [finding.check for finding in outcome.findings] == ["images per identity"]
    assert "4 of 12 identities have about 2 images, the others about 10" in outcome.findings[0].line()


def test_counts_in_two_groups():
    rng = np.random.default_rng(0)
    assert two_groups(np.array([50] * 70 + [5] * 30)) == (30, 5.0, 50.0)
    assert two_groups(np.r_[rng.integers(40, 51, 70), rng.integers(2, 6, 30)])[0] == 30
    for counts in (
        np.full(50, 20),
        np.ceil(rng.geometric(0.3, 1000)),  # LFW's kind
        np.ceil(rng.lognormal(3, 0.8, 1000)),  # CASIA-WebFace's kind
        rng.integers(1, 100, 1000),
        np.array([50] * 95 + [5] * 5),  # too few to tell
        np.array([50, 5]),
    ):
        assert two_groups(counts) is None


def test_unreadable_copied_and_small_files(people, tmp_path):
    root = folders(tmp_path / "faces", people.aligned, [5] * 10 + [1])
    write_encoded(root / "000/0.jpg", (root / "000/0.jpg").read_bytes()[:700])
    write_encoded(root / "003/copy.jpg", (root / "002/1.jpg").read_bytes())
    source = read_training_set(root)
    with pytest.raises(UserError, match=r"unreadable files: 1 of 52 .*000/0\.jpg: .*training stops at the first"):
        check_training_set(source, CheckSettings(), input_size=112, output_dir=tmp_path)
    found, outcome = findings(source, tmp_path, max_unreadable=0.02)
    assert found == ["warning unreadable files", "warning duplicates"]
    assert "002/1.jpg and 003/copy.jpg" in outcome.findings[1].line()
    assert outcome.facts["identities_with_one_image"] == 1
    flat = np.ascontiguousarray(people.aligned[:30, :100])
    found, outcome = findings(training_set(flat, np.arange(30)), tmp_path)
    assert found[:3] == ["warning single images", "warning sizes", "warning sizes"]
    assert "30 of 30 images are smaller than the network's input of 112" in outcome.findings[2].line()


def test_what_is_looked_at_is_spread_over_all_identities():
    labels = np.repeat(np.arange(50), 40)
    chosen = choose(labels, 160)
    assert len(chosen) == 160 and (np.diff(chosen) > 0).all()
    counts = np.bincount(labels[chosen], minlength=50)
    assert sorted(set(counts)) == [0, TOGETHER] and (counts > 0).sum() == 160 / TOGETHER
    assert np.array_equal(choose(labels, 160), chosen) and not np.array_equal(choose(labels, 160, seed=1), chosen)
    assert set(np.bincount(labels[choose(labels, 800)])) == {16}
    assert np.array_equal(choose(labels, 5000), np.arange(2000))
    million = np.repeat(np.arange(20_000), 50)
    assert len(np.unique(million[choose(million, 2048)])) == 256


def test_separability_by_hand():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(12), 3))
    vectors = rng.standard_normal((12, 8))[labels] + rng.standard_normal((36, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = separability(vectors, labels)
    rows, columns = np.triu_indices(36, 1)
    cosines, same = (vectors @ vectors.T)[rows, columns], labels[rows] == labels[columns]
    assert found.auc == pytest.approx(roc_auc_score(same, cosines), abs=1e-5)
    assert found.genuine == pytest.approx((cosines[same].mean(), cosines[same].std()))
    assert found.impostor == pytest.approx((cosines[~same].mean(), cosines[~same].std()))
    first = np.flatnonzero(labels == 0)
    assert found.consistency[0] == pytest.approx(cosines[(np.isin(rows, first)) & (np.isin(columns, first))].mean())
    assert 0.02 < found.deviation < 0.1
    assert separability(vectors, np.arange(36)) is None


# Commands


def test_commands(people, embedder, compose, tmp_path, monkeypatch):
    root = folders(tmp_path / "faces", people.aligned[..., ::-1], [4] * 10)
    cfg = compose("recognition_check_config", f"dataset.root={root}", f"output_dir={tmp_path / 'check'}")
    with pytest.raises(UserError, match="channel order: 0 % of 40 colour images"):
        check_command.main.__wrapped__(cfg)
    assert json.loads((tmp_path / "check/dataset_check.json").read_text())["findings"][0]["severity"] == ERROR

    def start(*overrides):
        defaults = (f"dataset.root={root}", f"output_dir={tmp_path / 'run'}", "backbone=ir_18", "backbone.width=0.125")
        cfg = compose("recognition_train_config", *defaults, "backbone.input_size=32", *overrides)
        return train_command.main.__wrapped__(cfg)

    monkeypatch.setattr(train_command, "train", lambda *arguments, **hooks: "trained")
    with pytest.raises(UserError, match=r"channel order.*check\.errors=warn goes on"):
        start()
    assert start("check.errors=warn") == start("check.enabled=false") == "trained"
    with pytest.raises(UserError, match="embedder: only the check of the images uses it"):
        start("check.enabled=false", "embedder=own", "embedder.checkpoint=x")
    with pytest.raises(UserError, match=r"embedder\.checkpoint: no such file"):
        start("embedder=own", "embedder.checkpoint=x")


def test_sets_that_are_joined_are_looked_at_one_by_one(people, tmp_path):
    folders(tmp_path / "good", people.aligned, [5] * 12)
    folders(tmp_path / "bad", people.aligned[..., ::-1], [5] * 12)
    entries = [{"root": str(tmp_path / name)} for name in ("good", "bad")]
    source = open_training_set(DatasetSettings(sets=entries))
    first, second = check_training_set(source, CheckSettings(errors="warn"), input_size=112, output_dir=tmp_path)
    assert (first.facts["images"], second.facts["identities"]) == (60, 12)
    assert [finding.check for finding in second.findings] == ["channel order"]
    report = json.loads((tmp_path / "1_dataset_check.json").read_text())
    assert report["root"] == str(tmp_path / "bad") and report["findings"][0]["check"] == "channel order"


@pytest.mark.parametrize(
    ("key", "value"),
    [("images", 0), ("images", "some"), ("embedded_images", 0), ("max_unreadable", 2.0), ("errors", "ignore")],
)
def test_settings(key, value):
    with pytest.raises(UserError, match=rf"check\.{key}: {value!r}"):
        CheckSettings(**{key: value})
    assert WARNING != ERROR
