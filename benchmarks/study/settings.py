"""The settings of a study, checked before anything is drawn: every script's configuration is composed once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from benchmarks.study.metrics import MetricSettings, Reference, read_reference
from diffusion.generator import CheckpointChoice, FaceGenerator, load_generator
from diffusion.identities import load_identities
from diffusion.sampling_settings import SamplingSettings, check_settings, fixed_settings
from recognition.published import ROWS, PublishedRow
from utils import distributed
from utils.checkpoint import file_sha256
from utils.config import UserError, compose, existing_file, instantiate, plain, settings
from utils.stages import overrides, path_for_scripts

HALF_MILLION = ("10k x 50", "0.5 M")  # how recognition.published calls the size that variants compare with
SECTIONS = ("sample", "align", "train", "test")  # handed to the scripts
CHOICES = "choices"  # the key of a section that holds config groups


@dataclass
class VariantSettings:
    """An entry of `variants`."""

    title: str
    overrides: list[str]  # of sample.py
    published: str | None = None  # a name in recognition.published


@dataclass
class EmbedSettings:
    """The section `embed`: encode.py's embedder."""

    checkpoint: str
    embedder: str = "own"


@dataclass
class StudySettings:
    """The top level of study_config.yaml but for what is handed to the scripts."""

    output_dir: str
    checkpoint: str
    decoder: str | None
    contexts: str
    variants: dict[str, VariantSettings]
    embed: EmbedSettings
    demo_dir: str | None = None  # where the configuration's default paths are
    training_embeddings: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    processes: int = 2
    only: list[str] | None = None
    metrics: MetricSettings = field(default_factory=MetricSettings)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds: {self.seeds}; one or more different whole numbers are wanted, as in seeds=[0,1,2]")
        if self.processes < 1:
            raise UserError(f"processes: {self.processes}; give at least 1")
        if self.training_embeddings is None and self.metrics.r is None:
            raise UserError("metrics.r: not set, and without training_embeddings it cannot be calibrated; give either")
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
    train: list[str]  # recognition.train's but for folders and seed
    test: list[str]  # recognition.test's but for networks and folder
    reference: Reference
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
            "embed": vars(options.embed),
            "metrics": vars(options.metrics),
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
    hint = "a finished `make demo` has one (demo_dir), or give the path"
    for key, path in (("contexts", own.contexts), ("checkpoint", own.checkpoint)):
        if not Path(path).expanduser().exists():
            raise UserError(f"{key}: no such file or folder: {path}; {hint}")
    embedder = existing_file(own.embed.checkpoint, "embed.checkpoint", hint)
    training = own.training_embeddings and existing_file(own.training_embeddings, "training_embeddings", hint)
    inputs = {"embed.checkpoint": file_sha256(embedder)}
    if training is not None:
        inputs["training_embeddings"] = file_sha256(training)
    inputs |= _test_inputs(sections["test"])

    train, test = _script(sections["train"], "train"), _script(sections["test"], "test")
    nowhere = ["output_dir=none"]
    compose("recognition_train_config", [*train, *nowhere], "train")
    compose("recognition_test_config", [*test, *nowhere, "checkpoint=none"], "test")
    align = None if sections["align"] is None else _script(sections["align"], "align")
    if align is not None:
        compose("align_config", [*align, *nowhere, "input_dir=none"], "align")
    return Plan(
        own,
        _variants(own, sections["sample"], published),
        align,
        train,
        test,
        read_reference(own.metrics, training),
        inputs,
    )


def _variants(
    own: StudySettings, section: Mapping[str, Any], published: Mapping[str, PublishedRow | None]
) -> list[Variant]:
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
        arguments = [*overrides(given), *_script(section, "sample"), *variant.overrides]
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
    """A section as overrides of its script, config groups first."""
    if not isinstance(section, Mapping):
        raise UserError(f"{key}: {section!r}; a section of the script's keys is wanted")
    rest = {name: value for name, value in section.items() if name != CHOICES}
    return [*overrides(section.get(CHOICES) or {}), *overrides(rest)]


def _test_inputs(section: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the lists and files of images that the section `test` names; a folder's, of its files' names and sizes.

    UserError for a path that does not exist.
    """
    named = {key: section.get(key) for key in ("pairs_file", "bin_file", "benchmarks_dir", "rfw_dir")}
    named["dataset.root"] = (section.get("dataset") or {}).get("root")
    named = {f"test.{key}": value for key, value in named.items() if value is not None}
    found = {}
    for key, value in named.items():
        path = Path(str(value)).expanduser()
        if path.is_file():
            found[key] = file_sha256(path)
        elif path.is_dir():
            files = sorted((f.relative_to(path).as_posix(), f.stat().st_size) for f in path.rglob("*") if f.is_file())
            found[key] = hashlib.sha256(str(files).encode()).hexdigest()
        else:
            raise UserError(f"{key}: no such file or folder: {value}")
    if not found:
        raise UserError("test: names no set; give test.pairs_file and test.dataset.root, or test.benchmarks_dir")
    return found
