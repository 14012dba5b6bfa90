"""One network on all sets: embeddings into their store, then the numbers and curves of each set.

Legend: m images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recognition.embedding import embed_images
from recognition.embedding_store import EmbeddingStore
from recognition.ijb import TemplateSettings, evaluate_templates
from recognition.onnx import OnnxRecogniser
from recognition.rfw import group_fairness
from recognition.tables import RFW_SET
from recognition.verification import Rates, evaluate_pairs, thin_roc
from utils import distributed
from utils.checkpoint import weights_sha256
from utils.data.formats.benchmarks import FIVE, RFW_GROUPS
from utils.data.formats.ijb import TemplateImages
from utils.data.formats.pairs import VerificationPairs

Images = VerificationPairs | TemplateImages


@dataclass
class Sets:
    """What there is to test on."""

    pairs: dict[str, VerificationPairs] = field(default_factory=dict)  # groups of RFW among them, as RFW_SET
    templates: list[TemplateImages] = field(default_factory=list)
    ijb: TemplateSettings = field(default_factory=TemplateSettings)


@dataclass(frozen=True)
class Model:
    """A row of the tables."""

    name: str
    load: Callable[[], nn.Module]  # in eval mode, taking RGB in [-1, 1]
    flip: bool  # whether mirror images are added, where a set has no switch of its own
    facts: Mapping[str, Any]  # what the report says of it

    @property
    def folder(self) -> str:
        """Its name as one of a folder."""
        return folder_name(self.name)


@dataclass(frozen=True)
class Computing:
    """How embeddings are computed, and where they are kept."""

    folder: Path
    batch_size: int
    precision: str
    device: torch.device
    keep: bool


def measure(model: Model, sets: Sets, computing: Computing) -> tuple[dict[str, Any], dict[str, Any]]:
    """Report (see recognition.tables) and curves (see recognition.roc_plot) of one network, on every process."""
    network = model.load().to(computing.device)
    sha256 = fingerprint(network)
    report: dict[str, Any] = {"name": model.name, **model.facts, "flip": model.flip, "sets": {}}
    curves: dict[str, Any] = {}

    def embedded(name: str, images: Images, flip: bool, normalise: bool, evaluate: Callable[[Any], Rates]) -> Rates:
        described = {"network": sha256, "images_sha256": state_of(images), "flip": flip, "normalise": normalise}
        folder = computing.folder / model.folder / folder_name(name)
        store = EmbeddingStore(folder, images, {**described, "precision": computing.precision})
        embed = partial(
            embed_images,
            network,
            batch_size=computing.batch_size,
            flip=flip,
            normalise=normalise,
            precision=computing.precision,
            device=computing.device,
        )
        store.fill(embed, f"{model.name}: {name}")
        result = distributed.on_main(lambda: evaluate(store.load()))
        if distributed.is_main() and not computing.keep:
            store.delete()
        return result

    for name, pairs in sets.pairs.items():
        result = embedded(name, pairs, model.flip, True, lambda rows, pairs=pairs: _on_pairs(rows, pairs))
        report["sets"][name] = {
            "pairs": str(pairs.path),
            "num_images": len(pairs),
            "num_skipped_pairs": pairs.num_skipped,
            **result.summary(),
        }
        curves[name] = _curve(result, f"{100 * result.accuracy:.2f} %")
    for images in sets.templates:
        rates = embedded(
            images.name,
            images,
            sets.ijb.use_flip_test,
            False,
            lambda rows, images=images: _on_templates(rows, images, sets.ijb),
        )
        found = {"switches": sets.ijb.switches, "num_images": len(images), **rates.rates()}
        report.setdefault("ijb", {})[images.name] = found
        curves[images.name] = _curve(rates, f"EER {100 * rates.eer:.2f} %")

    accuracies = {name: found["accuracy"] for name, found in report["sets"].items()}
    of = [name for name in FIVE if name in accuracies]
    if len(of) > 1:
        mean = sum(accuracies[name] for name in of) / len(of)
        report["mean"] = {"accuracy": mean, "of": of, "is_mean_of_five": len(of) == len(FIVE)}
    if RFW_SET.format(RFW_GROUPS[0]) in accuracies:
        report["rfw"] = group_fairness({group: accuracies[RFW_SET.format(group)] for group in RFW_GROUPS})
    return report, curves


def _on_pairs(rows: Any, pairs: VerificationPairs) -> Rates:
    return evaluate_pairs(rows[pairs.pairs.reshape(-1)], pairs.issame, pairs.num_folds)


def _on_templates(rows: Any, images: TemplateImages, settings: TemplateSettings) -> Rates:
    return evaluate_templates(
        rows, images.templates, images.media, images.scores, images.pairs, images.issame, settings
    )


def _curve(rates: Rates, label: str) -> dict[str, Any]:
    far, tar = thin_roc(rates.roc_far, rates.roc_tar)
    return {"far": far.tolist(), "tar": tar.tolist(), "label": label}


def fingerprint(network: nn.Module) -> str:
    """What tells a network's embeddings from another's: its weights, and the input that it is given."""
    graphs = [module.sha256 for module in network.modules() if isinstance(module, OnnxRecogniser)]
    weights = graphs[0] if graphs else weights_sha256(network.state_dict())
    described = f"{weights} {network.input_size} {getattr(network, 'channel_order', 'RGB')}"
    return hashlib.sha256(described.encode()).hexdigest()


def state_of(images: Images) -> str:
    """A hash over names, sizes and times of the files of a set: it changes with them."""
    digest = hashlib.sha256()
    for name, path in zip(images.names, images.files, strict=False):
        status = path.stat()
        digest.update(f"{name}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def folder_name(name: str) -> str:
    """`name` with letters, digits, dots, dashes and underscores alone."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "_"
