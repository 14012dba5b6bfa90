"""The recipes of published recognisers, configs/experiment/recognition_*.yaml: their values, and that they train."""

import re

import pytest
import torch
from omegaconf import OmegaConf

from recognition.augment import Augmentation
from recognition.datasets import IdentityDataset, read_training_set
from recognition.training_loop import TrainingSettings, train
from utils.checkpoint import read_metadata
from utils.config import CONFIG_DIR, instantiate, plain, settings

RECIPES = ("uiface", "admis", "dcface", "idperturb", "idiff_face")
GROUPS = ("optimizer", "lr_schedule")
ADAFACE = {"flip": 0.5, "crop": 0.2, "low_resolution": 0.2, "photometric": 0.2}
CROPS = {"flip": 0.5, "resized_crop": 0.2}
MEANS = {  # the published mean, and the five accuracies where the source gives them
    "uiface": (93.27, (99.27, 94.29, 89.58, 90.95, 92.25)),
    "admis": (92.09, (99.17, 92.79, 87.67, 89.42, 91.43)),
    "dcface": (89.94, (98.60, 88.21, 83.33, 88.18, 91.38)),
    "idperturb": (93.62, ()),
    "idiff_face": (88.20, (98.00, 85.47, 80.45, 86.43, 90.65)),
}


@pytest.fixture(params=RECIPES)
def recipe(request):
    return request.param


def test_headers_say_what_to_run_and_what_to_expect(recipe):
    lines = (CONFIG_DIR / f"experiment/recognition_{recipe}.yaml").read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert f"-m recognition.train experiment=recognition_{recipe} dataset.root=FACES" in header
    assert "-m recognition.test checkpoint=" in header and f"output_dir=outputs/recognition_{recipe}/test" in header
    for word in ("Hardware", "Cost", "Published", "Expect"):
        assert sum(line.startswith(f"# {word}: ") for line in lines) == 1
    mean, sets = MEANS[recipe]
    published = header.split("# Published: ")[1].split("# Expect")[0]
    assert published.startswith(f"{mean:.2f}, the mean of LFW")
    for accuracy in sets:
        assert f" {accuracy:.2f}" in published
    assert not sets or sum(sets) / len(sets) == pytest.approx(mean, abs=0.011)
    assert "not measured here" in header


def test_values(compose, recipe):
    cfg = compose("recognition_train_config", f"experiment=recognition_{recipe}", "dataset.root=faces")
    training = cfg.training
    idiff = recipe == "idiff_face"
    assert cfg.output_dir == f"outputs/recognition_{recipe}"
    assert cfg.backbone.name == ("iresnet50" if idiff else "ir_50")
    head = "CosFace" if idiff else "ArcFace"
    assert (cfg.head._target_, cfg.head.scale) == (f"recognition.heads.{head}", 64.0)
    assert cfg.head.margin == (0.35 if idiff else 0.5)
    probabilities = {key: value for key, value in cfg.augment.items() if value and not key.startswith("rand_augment_")}
    wanted = {"idiff_face": {"flip": 0.5, "rand_augment": 1.0}, "admis": CROPS, "dcface": CROPS}
    assert probabilities == wanted.get(recipe, ADAFACE)
    assert (cfg.augment.rand_augment_operations, cfg.augment.rand_augment_magnitude) == (4, 16)
    optimizer = instantiate(training.optimizer, "training.optimizer")([torch.nn.Parameter(torch.ones(1))])
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.SGD) and (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
    assert group["lr"] == (0.05 if idiff else 0.1) and training.decay_batch_norm
    assert (training.epochs, training.batch_size) == ((200, 128) if idiff else (40, 64))
    assert training.gradient_clip == (5.0 if idiff else None)
    schedule = instantiate(training.lr_schedule, "training.lr_schedule")
    if idiff:
        assert (schedule.factor, schedule.patience, schedule.stop_patience) == (0.1, 4, 6)
        assert instantiate(cfg.backbone, "backbone", width=0.125, input_size=32).dropout.p == 0.4
    else:
        rates = [schedule.at(10 * epoch, 10, 40) for epoch in (0, 21, 22, 27, 28, 31, 32, 39)]
        assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize(
    ("recipe_and_head", "margin"),
    [
        (("dcface", "head=adaface"), 0.4),
        (("idiff_face", "head=elasticface_cos"), 0.35),
        (("idiff_face", "head=elasticface_arc", "head.margin=0.5"), 0.5),
    ],
)
def test_the_heads_that_headers_name_have_their_margins(compose, recipe_and_head, margin):
    name, *overrides = recipe_and_head
    header = (CONFIG_DIR / f"experiment/recognition_{name}.yaml").read_text()
    assert " ".join(overrides) in header
    head = compose("recognition_train_config", f"experiment=recognition_{name}", *overrides).head
    assert (head.margin, head.scale) == (margin, 64.0)


def test_two_steps_at_an_eighth_of_the_width(compose, face_folder, tmp_path, recipe):
    small = ("backbone.width=0.125", "backbone.input_size=32", "training.epochs=1", "training.steps_per_epoch=2")
    small += ("training.batch_size=4", "training.num_workers=0", "training.device=cpu")
    cfg = compose("recognition_train_config", f"experiment=recognition_{recipe}", "dataset.root=faces", *small)
    torch.manual_seed(0)
    source = read_training_set(face_folder / "faces")
    backbone = instantiate(cfg.backbone, "backbone")
    before = {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}
    head = instantiate(cfg.head, "head", in_features=backbone.num_features, num_classes=len(source.identities))
    dataset = IdentityDataset(source, size=32, augment=settings(cfg.augment, Augmentation, "augment"), seed=0)
    optimizer, schedule = (instantiate(cfg.training[name], f"training.{name}") for name in GROUPS)
    own = OmegaConf.masked_copy(cfg.training, [key for key in cfg.training if key not in GROUPS])
    loop = settings(own, TrainingSettings, "training")

    def validate(network: torch.nn.Module) -> dict[str, float]:
        return {"lfw": 0.5}

    metrics = train(backbone, head, dataset, optimizer, schedule, loop, tmp_path / "run", plain(cfg), validate)
    assert metrics["steps"] == 2 and torch.isfinite(torch.tensor(metrics["loss"]))
    moved = [name for name, parameter in backbone.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > 0.9 * len(before)
    provenance = read_metadata(tmp_path / "run/backbone.safetensors")["provenance"]
    assert provenance["head"]["name"] == type(head).__name__ and provenance["identities"] == 6


def test_published_numbers_are_those_of_the_generators_recipes():
    """A number that stands in two files is the same in both."""
    for name in ("uiface", "admis"):
        text = (CONFIG_DIR / f"experiment/{name}.yaml").read_text()
        assert f"{MEANS[name][0]:.2f} (10k" in re.search(r"# Published: .*", text)[0]
