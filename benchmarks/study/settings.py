"""The settings of a study, checked before anything is drawn: every script's configuration is composed once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from diffusion.generator import CheckpointChoice, FaceGenerator, load_generator
from diffusion.identities import load_identities
from diffusion.sampling_settings import SamplingSettings, check_settings, fixed_settings
from evaluation.settings import EvaluationSettings
from recognition.published import ROWS, PublishedRow
from utils import distributed
from utils.checkpoint import file_sha256
from utils.config import UserError, compose, instantiate, plain, settings
from utils.stages import overrides, path_for_scripts

HALF_MILLION = ("10k x 50", "0.5 M")  # how recognition.published calls the size that variants compare with
SECTIONS = ("sample", "align", "evaluate", "train", "test")  # handed to the scripts
# Keys of the sections that name what is measured on or by
INPUTS = (
    *("evaluate.embedder.checkpoint", "evaluate.real.embeddings_file", "evaluate.real.root"),
    *("test.pairs_file", "test.dataset.root", "test.bin_file", "test.benchmarks_dir", "test.rfw_dir"),
)
HINT = "a finished `make demo` has one (demo_dir), or give the path"
CHOICES = "choices"  # the key of a section that holds config groups


@dataclass
class VariantSettings:
    """An entry of `variants`."""

    title: str
    overrides: list[str]  # of sample.py
    published: str | None = None  # a name in recognition.published


@dataclass
class StudySettings:
    """The top level of study_config.yaml but for what is handed to the scripts."""

    output_dir: str
    checkpoint: str
    decoder: str | None
    contexts: str
    variants: dict[str, VariantSettings]
    demo_dir: str | None = None  # where the configuration's default paths are
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    processes: int = 2
    only: list[str] | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds: {self.seeds}; one or more different whole numbers are wanted, as in seeds=[0,1,2]")
        if self.processes < 1:
            raise UserError(f"processes: {self.processes}; give at least 1")
        titles = [variant.title for variant in self.variants.values()]
        if len(set(titles)) != len(titles):
            raise UserError(f"variants: the titles {', '.join(titles)} are not all different")
        unknown = [name for name in self.only or [] if name not in self.variants]
        if unknown or self.only == []:
            raise UserError(f"only: {unknown or self.only}; the variants are {', '.join(self.variants)}")


@dataclass
class Variant:
    """A row of the study."""

    name: str
    title: str
    sample: list[str]  # sample.py's overrides but for its folder
    drawn_with: dict[str, Any]  # all that decides how its images look
    published: PublishedRow | None


@dataclass
class Plan:
    """What a study does."""

    options: StudySettings
    variants: list[Variant]
    align: list[str] | None  # align.py's overrides; None: faces are aligned as drawn
    evaluate: list[str]  # evaluate.py's but for folders
    train: list[str]  # recognition.train's but for folders and seed
    test: list[str]  # recognition.test's but for networks and folder
    inputs: dict[str, str]  # hashes of the files that decide about the figures

    @property
    def chosen(self) -> list[Variant]:
        """The variants to run now."""
        return [v for v in self.variants if self.options.only is None or v.name in self.options.only]

    def settings_of(self, variant: Variant) -> dict[str, Any]:
        """All that decides what a variant's folder holds, but for the seeds, which may grow."""
        options = self.options
        return {
            "sample": variant.drawn_with,
            "align": self.align,
            "evaluate": self.evaluate,
            "train": self.train,
            "processes": options.processes,  # batch sizes are a process's own
            "test": self.test,
            "inputs": self.inputs,
        }


def check(cfg: DictConfig) -> Plan:
    """Settings => what is to be done. UserError for everything that can be known to be wrong beforehand."""
    if distributed.world_size() > 1:
        raise UserError("processes: the study starts torchrun itself; start it with plain python and give processes=N")
    if 0 < torch.cuda.device_count() < cfg.processes:  # fewer would train with another batch size
        raise UserError(f"processes: {cfg.processes}, but there are {torch.cuda.device_count()} GPUs; give so many")
    own = settings(OmegaConf.masked_copy(cfg, [k for k in cfg if k not in SECTIONS]), StudySettings, "")
    missing = [key for key in OmegaConf.missing_keys(cfg) if key.split(".")[0] in SECTIONS]
    if missing:
        raise UserError(f"{missing[0]}: not set; give {missing[0]}=VALUE on the command line")
    sections = {name: plain(cfg[name]) for name in SECTIONS}
    published = {name: _published(name, variant.published) for name, variant in own.variants.items()}
    for key, path in (("contexts", own.contexts), ("checkpoint", own.checkpoint)):
        if not Path(path).expanduser().exists():
            raise UserError(f"{key}: no such file or folder: {path}; {HINT}")
    inputs = _inputs(sections)
    if not any(key.startswith("test.") for key in inputs):
        raise UserError("test: names no set; give test.pairs_file and test.dataset.root, or test.benchmarks_dir")
    scripts = {name: _script(section, name) for name, section in sections.items() if (name, section) != ("align", None)}
    variants = _variants(own, scripts.pop("sample"), published)
    _check_scripts(scripts)
    return Plan(own, variants, scripts.get("align"), scripts["evaluate"], scripts["train"], scripts["test"], inputs)


def _check_scripts(scripts: Mapping[str, list[str]]) -> None:
    """UserError for overrides that a script would not take."""
    for name, config, own in (
        ("align", "align_config", ["input_dir=faces"]),
        ("evaluate", "evaluate_config", ["data.root=faces"]),
        ("train", "recognition_train_config", ["dataset.root=faces"]),
        ("test", "recognition_test_config", ["checkpoint=null"]),
    ):
        if name in scripts:
            cfg = compose(config, [*scripts[name], *own, "output_dir=study"], name)
            if name == "evaluate":
                options = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in ("embedder", "features")])
                try:
                    settings(options, EvaluationSettings, "").check()
                except UserError as error:
                    raise UserError(f"{name}: {error}") from error


def _variants(own: StudySettings, shared: list[str], published: Mapping[str, PublishedRow | None]) -> list[Variant]:
    """Every variant's sampler, checked against the model and the contexts."""
    given = {
        "checkpoint.path": path_for_scripts(own.checkpoint),
        "VQDecoder_path": None if own.decoder is None else path_for_scripts(own.decoder),
        "sampling.contexts_file": path_for_scripts(own.contexts),
    }
    found: list[Variant] = []
    generators: dict[str, FaceGenerator] = {}
    for name, variant in own.variants.items():
        key = f"variants.{name}.overrides"
        arguments = [*overrides(given), *shared, *variant.overrides]
        cfg = compose("sample_ddim_config", arguments, key)
        try:
            drawn_with = _drawn_with(cfg, generators)
        except UserError as error:  # it names the key of sample.py
            raise UserError(f"{key}: {error}") from error
        found.append(Variant(name, variant.title, arguments, drawn_with, published[name]))
    return found


def _drawn_with(cfg: DictConfig, generators: dict[str, FaceGenerator]) -> dict[str, Any]:
    """What sample.py would keep of these settings; raises the UserErrors that it would raise."""
    sampling = settings(cfg.sampling, SamplingSettings, "sampling")
    if sampling.save_mode != "folders":
        raise UserError(f"sampling.save_mode: {sampling.save_mode}; a study wants folders, one an identity")
    source = {key: plain(cfg[key]) for key in ("checkpoint", "VQDecoder_path", "latent_diffusion", "latent_shape")}
    source |= {key: cfg[key] for key in ("model_cfg_path", "diffusion_cfg_path")}
    if str(source) not in generators:  # most often one for all
        choice = settings(cfg.checkpoint, CheckpointChoice, "checkpoint")
        rest = {key: value for key, value in source.items() if key not in ("checkpoint", "VQDecoder_path")}
        generators[str(source)] = load_generator(choice, cfg.VQDecoder_path, **rest)
    generator = generators[str(source)]
    identities = load_identities(generator.unet, sampling.contexts_file, sampling.n_contexts, sampling.seed)
    sampler = check_settings(generator, instantiate(cfg.sampler, "sampler"), sampling)
    sizes = {"identities": len(identities), "sampling.n_samples_per_context": sampling.n_samples_per_context}
    return fixed_settings(generator, sampler, identities, sampling) | sizes


def _published(variant: str, name: str | None) -> PublishedRow | None:
    """The row of that name, of half a million images; UserError where there is not one."""
    if name is None:
        return None
    rows = [row for row in ROWS if row.images in HALF_MILLION]
    named = [row for row in rows if row.name == name]
    if len(named) != 1:
        known = ", ".join(dict.fromkeys(row.name for row in rows))
        raise UserError(f"variants.{variant}.published: {name!r} names {len(named)} rows; there are {known}")
    return named[0]


def _script(section: Mapping[str, Any], key: str) -> list[str]:
    """A section as overrides of its script, config groups first. UserError where it is none."""
    if not isinstance(section, Mapping):
        raise UserError(f"{key}: {section!r}; a section of the script's keys is wanted")
    rest = {name: value for name, value in section.items() if name != CHOICES}
    return [*overrides(section.get(CHOICES) or {}), *overrides(rest)]


def _inputs(sections: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the files that INPUTS name, where they are set; a folder's, of its files' names and sizes.

    UserError for a path that does not exist.
    """
    cfg = OmegaConf.create(dict(sections))
    named = {key: value for key in INPUTS if (value := OmegaConf.select(cfg, key)) is not None}
    found = {}
    for key, value in named.items():
        path = Path(str(value)).expanduser()
        if path.is_file():
            found[key] = file_sha256(path)
        elif path.is_dir():
            files = sorted((f.relative_to(path).as_posix(), f.stat().st_size) for f in path.rglob("*") if f.is_file())
            found[key] = hashlib.sha256(str(files).encode()).hexdigest()
        else:
            raise UserError(f"{key}: no such file or folder: {value}; {HINT}")
    return found
