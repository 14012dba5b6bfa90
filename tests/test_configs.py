"""Every file in configs/ composes, and what it describes can be built."""

import dataclasses

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from create_sample_identity_contexts import CHEAP_SOURCES
from diffusion.drawn_faces import DetectionSettings, DrawnFacesSettings
from utils.config import CONFIG_DIR, UserError, instantiate

PRIMARY = sorted(path.stem for path in CONFIG_DIR.glob("*_config.yaml"))
# Which entry point an experiment is for: the one that its header's command names.
SCRIPTS = {
    "train_autoencoder.py": "train_autoencoder_config",
    "recognition.train": "recognition_train_config",
    "main.py": "train_config",
}
EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
GROUPS = sorted(path for path in CONFIG_DIR.glob("*/*.yaml") if path.parent.name != "experiment")


def group(name: str) -> list[str]:
    return [path.stem for path in GROUPS if path.parent.name == name]


@pytest.mark.parametrize("name", PRIMARY)
def test_every_entry_point_composes(compose, name):
    cfg = compose(name)
    assert {"output_dir", "output"} & set(cfg.keys())  # (`in cfg` is false for a value that is still missing)
    assert OmegaConf.to_container(cfg, resolve=False)


def test_every_group_is_used_by_a_test_below():
    tested = {"model", "diffusion", "sampler", "dataset", "optimizer", "lr_scheduler", "ema", "autoencoder", "backbone"}
    assert {path.parent.name for path in GROUPS} == tested | {
        *("head", "source", "embedder", "augment", "lr_schedule", "features", "scale")
    }


@pytest.mark.parametrize("name", group("model"))
def test_models(compose, name):
    cfg = compose("train_config", f"model={name}")
    with torch.device("meta"):
        unet = instantiate(cfg.model, "model")
    assert sum(p.numel() for p in unet.parameters()) > 50e6


@pytest.mark.parametrize("name", group("diffusion"))
def test_schedules(compose, name):
    schedule = instantiate(compose("train_config", f"diffusion={name}").diffusion, "diffusion")
    assert schedule.betas.shape == (schedule.num_timesteps,)


@pytest.mark.parametrize("name", group("sampler"))
def test_samplers(compose, name):
    cfg = compose("sample_ddim_config", f"sampler={name}", "sampling.sample_config.cfg_scale=1.5")
    assert instantiate(cfg.sampler, "sampler").guidance_scale == 1.5


@pytest.mark.parametrize("name", group("source"))
def test_sources_of_contexts_have_the_keys_of_their_settings(compose, name):
    classes = {source: cls for source, (cls, _) in CHEAP_SOURCES.items()} | {"two_stage": DrawnFacesSettings}
    section = compose("create_contexts_config", f"source={name}").source
    assert section.name == name
    assert set(section) - {"name"} == {field.name for field in dataclasses.fields(classes[name])}
    if name == "two_stage":
        assert set(section.align) == {field.name for field in dataclasses.fields(DetectionSettings)}


@pytest.mark.parametrize("name", group("features"))
def test_feature_networks_have_the_keys_of_their_functions(compose, name):
    section = compose("evaluate_config", f"features={name}").features
    if "weights" in set(section):  # (`in section` is false for a value that is still missing)
        with pytest.raises(UserError, match=r"features\.weights: not set"):
            instantiate(section, "features")
        section.weights = "none.pth"
        with pytest.raises(UserError, match=r"features\.weights: no such file"):
            instantiate(section, "features")
    else:
        assert instantiate(section, "features").network is None


@pytest.mark.parametrize("name", group("dataset"))
def test_datasets(compose, face_folder, name):
    cfg = compose("train_config", f"dataset={name}", "constants.image_size=16")
    cfg.dataset.samples_root = str(face_folder / "faces")
    cfg.dataset.embeddings_root = None
    cfg.dataset.embeddings_file_path = str(face_folder / "embeddings.npz")
    dataset = instantiate(cfg.dataset, "dataset")
    assert len(dataset) == 18 and dataset[(0, False)][0].shape == (3, 16, 16)


@pytest.mark.parametrize("name", group("optimizer"))
@pytest.mark.parametrize("schedule", group("lr_scheduler"))
def test_optimisers_and_their_schedules(compose, name, schedule):
    cfg = compose(
        "train_config", f"optimizer@training.optimizer={name}", f"lr_scheduler@training.lr_scheduler={schedule}"
    ).training
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = instantiate(cfg.optimizer, "training.optimizer")([parameter])
    scheduler = instantiate(cfg.lr_scheduler, "training.lr_scheduler")(optimizer)
    parameter.grad = torch.ones(2)
    optimizer.step()
    scheduler.step()
    assert parameter.detach()[0] < 1 and scheduler.get_last_lr()[0] > 0


@pytest.mark.parametrize("name", group("lr_schedule"))
def test_rates_of_recognition(compose, name):
    cfg = compose("recognition_train_config", f"lr_schedule@training.lr_schedule={name}").training
    schedule = instantiate(cfg.lr_schedule, "training.lr_schedule")
    assert schedule.at(0, steps_per_epoch=10, epochs=40) == 1.0
    assert set(cfg.lr_schedule) - {"_target_"} == {field.name for field in dataclasses.fields(schedule)}


def test_the_small_recogniser_takes_other_groups_as_they_are(compose):
    def chosen(*overrides):
        cfg = compose("recognition_train_config", *overrides)
        return cfg.augment, cfg.head, cfg.training.lr_schedule

    schedules = group("lr_schedule") * 3
    for augment, head, schedule in zip(group("augment") * 2, group("head"), schedules, strict=False):
        groups = [f"augment={augment}", f"head={head}", f"lr_schedule@training.lr_schedule={schedule}"]
        alone = chosen(*groups, "training.lr_schedule.warmup_epochs=1")
        assert chosen("experiment=recognition_cpu", *groups) == alone


@pytest.mark.parametrize("name", group("scale"))
def test_sizes_of_a_study_have_all_sections(compose, name):
    cfg = compose("study_config", f"scale={name}", "checkpoint=model", "++test.benchmarks_dir=null")
    assert {"sample", "align", "train", "test"} <= set(cfg) and cfg.sample.sampling.image_size == 112


@pytest.mark.parametrize("name", group("ema"))
def test_averages(compose, name):
    cfg = compose("train_config", f"ema@training.ema={name}").training
    assert instantiate(cfg.ema, "training.ema")(torch.nn.Linear(1, 1)).decay >= 0.999


@pytest.mark.parametrize("name", group("autoencoder"))
def test_autoencoders(compose, name):
    from models.autoencoder.vqgan import VQModel

    cfg = compose("train_autoencoder_config", f"autoencoder={name}")
    with torch.device("meta"):
        model = VQModel(**OmegaConf.to_container(cfg.autoencoder))
        expected = (1, 4, 8, 8) if name == "vq_f8" else (1, 3, 16, 16)
        assert model.encode(torch.zeros(1, 3, 64, 64)).shape == expected


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments(compose, name):
    header = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text()
    assert "#   " in header and "Cost" in header  # its command and what it costs
    script = next(config for name, config in SCRIPTS.items() if name in header)
    cfg = compose(script, f"experiment={name}")
    if script == "train_config":
        with torch.device("meta"):
            instantiate(cfg.model, "model")


def test_every_leaf_is_said_once():
    """A key that stands twice in a file is a mistake that YAML does not report."""

    class Strict(yaml.SafeLoader):
        pass

    def no_duplicates(loader, node):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: {keys}"
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, no_duplicates)
    for path in CONFIG_DIR.rglob("*.yaml"):
        yaml.load(path.read_text(), Strict)


def flatten(node, prefix=""):
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_missing() and not child._is_none():
            yield from flatten(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_train_config_has_the_keys_that_users_know(compose):
    keys = set(flatten(compose("train_config")))
    for key in [
        "precision",
        "batch_size",
        "num_workers",
        "steps",
        "steps_between_sampling",
        "steps_between_logging",
        "steps_of_checkpoints",
        "context_dropout",
        "context_permutation",
        "checkpoint.restore",
        "checkpoint.path",
        "checkpoint.VQEncoder",
        "checkpoint.VQDecoder",
    ]:
        assert f"training.{key}" in keys
    assert {"latent_diffusion", "constants.image_size", "dataset.samples_root", "dataset.embeddings_file_path"} <= keys
    assert {"dataset.images_name_file_path", "dataset.sample_file_ending", "dataset.embeddings_root"} <= keys
    sample = set(flatten(compose("sample_ddim_config")))
    assert {
        "VQEncoder_path",
        "VQDecoder_path",
        "checkpoint.path",
        "checkpoint.global_step",
        "checkpoint.use_non_ema",
    } <= sample
    for key in ["contexts_file", "save_dir", "n_contexts", "n_samples_per_context", "batch_size", "seed", "save_mode"]:
        assert f"sampling.{key}" in sample
    for key in ("cfg_scale", "MSE_th", "step_th"):
        assert f"sampling.sample_config.{key}" in sample
