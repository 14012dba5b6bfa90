"""Which network a file of weights holds, told by its keys and shapes, with the settings that rebuild it.

Known are the diffusion UNets of IDiff-Face, ADMIS and UIFace; the first stage of latent diffusion, in two files or
inside its whole checkpoint; the recognisers of TFace, face.evoLVe, CurricularFace, AdaFace, insightface and
ElasticFace; facenet-pytorch's; and what this project writes. Nothing here builds a network: the loaders of each
(`diffusion.model_file`, `models.autoencoder.vqgan`, `recognition.backbones`) do, and compare every key.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint import check_finite, find_state_dict, read_content, split_schedule
from utils.checkpoint.state_dict import PREFIXES, strip_prefixes
from utils.config import UserError
from utils.networks import autoencoder, recogniser, unet
from utils.networks.shapes import Shapes

UNET, ENCODER, DECODER, AUTOENCODER = "unet", "vq_encoder", "vq_decoder", "vq_autoencoder"
BACKBONE, FACENET = "recognition_backbone", "inception_resnet_v1"
NAMES = {
    UNET: "a diffusion UNet",
    ENCODER: "a VQ encoder",
    DECODER: "a VQ decoder",
    AUTOENCODER: "a VQ autoencoder",
    BACKBONE: "a recognition backbone",
    FACENET: "an InceptionResnetV1",
}
# Training checkpoints of this project, which hold more than one network
RUNS = {
    "diffusion": "a training checkpoint of main.py",
    "autoencoder": "a training checkpoint of train_autoencoder.py",
    "recognition_training": "a training checkpoint of recognition.train",
}
# What stands beside the first stage in a checkpoint of latent diffusion: the UNet, its average, the encoder of
# conditions, and the vectors and numbers of its schedule.
LATENT_DIFFUSION = re.compile(
    r"(model|model_ema|cond_stage_model|loss)\..*|betas|logvar|scale_factor|lvlb_weights"
    r"|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+"
)


@dataclass
class NetworkFile:
    """A file of weights and what it was recognised as."""

    path: Path
    kind: str  # UNET, ENCODER, ...
    looks_like: str  # for the reader
    config: dict[str, Any]  # arguments that rebuild the network; {} for FACENET
    state: dict[str, torch.Tensor]  # the network's keys, and those that belong to nothing known
    metadata: dict[str, Any]  # of a safetensors file
    prefixes: dict[str, int]  # what stood before the keys, and how often
    beside: dict[str, int]  # keys of other networks, by their first part, and how many
    betas: torch.Tensor | None = None  # (T,), of a diffusion file
    assumed: dict[str, Any] = field(default_factory=dict)  # settings that no shape shows
    channel_order: str | None = None  # RGB or BGR, of a recogniser; None: the file does not say

    def mismatch(self, wanted: str) -> UserError:
        """The error for a file of another network than the `wanted` kind."""
        first = ", ".join(list(self.state)[:3])
        return UserError(
            f"{self.path}: looks like {self.looks_like}, {NAMES[wanted]} is wanted; all of its keys are missing, "
            f"{len(self.state)} others are there ({first}, ...)"
        )


@dataclass(frozen=True)
class _Family:
    """Networks whose keys begin alike."""

    kind: str
    roots: str  # regular expression for the first parts of the keys
    prefixes: tuple[str, ...]  # that may stand before them, besides the general wrappers
    beside: re.Pattern[str] | None  # keys of other networks, accepted where such a prefix sets the network's own apart
    inside: re.Pattern[str] | None = None  # keys under the same prefix that the network does not need

    def __post_init__(self) -> None:
        object.__setattr__(self, "_key", re.compile(rf"(.*?\.)??(?:{self.roots})(?:\.|$)"))

    def prefix_of(self, name: str) -> str | None:
        """What stands before the network's own name of a parameter; None where it is of another network."""
        match = self._key.match(name)
        return None if match is None else match[1] or ""


HEAD = re.compile(r"head\..*")
FAMILIES = (
    _Family(UNET, unet.ROOTS, ("eps_model.",), None),
    _Family(
        AUTOENCODER, autoencoder.ROOTS, ("first_stage_model.",), LATENT_DIFFUSION, re.compile(r"(loss|model_ema)\..*")
    ),
    _Family("ir", recogniser.IR_ROOTS, ("model.",), HEAD),
    _Family("iresnet", recogniser.IRESNET_ROOTS, ("model.",), HEAD),
    _Family(FACENET, recogniser.INCEPTION_ROOTS, (), None, re.compile(r"logits\..*")),
)


def open_network_file(path: str | Path) -> NetworkFile:
    """Read a file of weights and recognise its network; nothing in the file is executed.

    Raises UserError for a missing or damaged file, one that wants to call anything, weights that are not finite,
    several networks at once, and keys of no network that is known here.
    """
    return recognise(Path(path), *read_content(path))


def recognise(path: Path, content: Any, metadata: Mapping[str, Any]) -> NetworkFile:
    """The network in what `read_content` found in `path`; see `open_network_file`."""
    if isinstance(content, dict) and content.get("kind") in RUNS:
        raise UserError(f"{path}: {RUNS[content['kind']]}, not a file of one network")
    raw = find_state_dict(content, path)
    found = (_of_this_project if metadata.get("kind") in NAMES else _of_others)(path, raw, metadata)
    check_finite(found.state, path)
    return found


def _of_this_project(path: Path, raw: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> NetworkFile:
    """A file that says what it is."""
    kind = metadata["kind"]
    state, betas = split_schedule(raw) if kind == UNET else (dict(raw), None)
    config = metadata.get("config", {k: v for k, v in metadata.items() if k in ("ddconfig", "n_embed", "embed_dim")})
    looks_like = f"{NAMES[kind]} written by this project"
    order = metadata.get("channel_order")
    return NetworkFile(
        path, kind, looks_like, dict(config), state, dict(metadata), {"": len(raw)}, {}, betas, channel_order=order
    )


def _of_others(path: Path, raw: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> NetworkFile:
    """A published file, by its keys."""
    family, prefix = _most_likely(path, raw)
    own = {name[len(prefix) :]: tensor for name, tensor in raw.items() if name.startswith(prefix)}
    others = {name: tensor for name, tensor in raw.items() if not name.startswith(prefix)}
    betas = None
    if family.kind == UNET:  # its schedule stands beside it, a wrapper further out
        others = {strip_prefixes(name): tensor for name, tensor in others.items()}
        if others.keys() & own.keys():
            raise UserError(f"{path}: holds more than one network under different prefixes")
        own, betas = split_schedule({**own, **others})
        others = {}
    own = {recogniser.rename(name): tensor for name, tensor in own.items()}

    set_apart = any(prefix.endswith(p) for p in family.prefixes)
    beside = {name for name in others if set_apart and family.beside is not None and family.beside.fullmatch(name)}
    if family.kind != AUTOENCODER or all(autoencoder.halves(_shapes(own))):  # half of one has no loss beside it
        beside |= {name for name in own if family.inside is not None and family.inside.fullmatch(name)}
    state = {name: tensor for name, tensor in {**own, **others}.items() if name not in beside}
    prefixes, counts = {prefix: len(own)}, Counter(name.split(".")[0] for name in beside)
    found = NetworkFile(path, family.kind, "", {}, state, dict(metadata), prefixes, dict(counts), betas)
    DESCRIBE[family.kind](found)
    return found


def _most_likely(path: Path, raw: Mapping[str, torch.Tensor]) -> tuple[_Family, str]:
    """The family, and the prefix, that most keys have."""
    counts: Counter[tuple[int, str]] = Counter()
    for name in raw:
        for index, family in enumerate(FAMILIES):
            prefix = family.prefix_of(name)
            if prefix is not None and _is_known(prefix, family):
                counts[index, prefix] += 1
    (index, prefix), count = counts.most_common(1)[0] if counts else ((0, ""), 0)
    if count < 4:
        shown = ", ".join(list(raw)[:3])
        raise UserError(f"{path}: the keys of no network that is known here ({len(raw)}: {shown}, ...)")
    return FAMILIES[index], prefix


def _is_known(prefix: str, family: _Family) -> bool:
    while prefix:
        known = next((p for p in (*PREFIXES, *family.prefixes) if prefix.startswith(p)), None)
        if known is None:
            return False
        prefix = prefix[len(known) :]
    return True


def _shapes(state: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _describe_unet(found: NetworkFile) -> None:
    found.config, found.assumed, found.looks_like = unet.describe(_shapes(found.state))


def _describe_autoencoder(found: NetworkFile) -> None:
    shapes = _shapes(found.state)
    has_encoder, has_decoder = autoencoder.halves(shapes)
    found.kind = AUTOENCODER if has_encoder == has_decoder else ENCODER if has_encoder else DECODER
    encoder, encoder_name = autoencoder.describe_encoder(shapes)
    decoder, decoder_name = autoencoder.describe_decoder(shapes)
    if found.kind == AUTOENCODER:  # one ddconfig for both halves; only the decoder shows the width of its images
        out_ch = decoder["ddconfig"]["out_ch"]
        found.config = {**decoder, "ddconfig": {**encoder["ddconfig"], "out_ch": out_ch}}
        found.looks_like = f"{encoder_name} and {decoder_name}"
    else:
        found.config, found.looks_like = (encoder, encoder_name) if has_encoder else (decoder, decoder_name)


def _describe_ir(found: NetworkFile) -> None:
    found.config, found.looks_like = recogniser.describe_ir(_shapes(found.state))
    if "head" in found.beside:  # the margin head beside the network is AdaFace's, which learns from BGR images
        found.channel_order = "BGR"
    found.kind = BACKBONE


def _describe_iresnet(found: NetworkFile) -> None:
    found.config, found.looks_like = recogniser.describe_iresnet(_shapes(found.state))
    found.kind = BACKBONE


def _describe_facenet(found: NetworkFile) -> None:
    found.looks_like = "facenet-pytorch's InceptionResnetV1 (160 x 160 pixels => 512 numbers)"


DESCRIBE: dict[str, Callable[[NetworkFile], None]] = {
    UNET: _describe_unet,
    AUTOENCODER: _describe_autoencoder,
    "ir": _describe_ir,
    "iresnet": _describe_iresnet,
    FACENET: _describe_facenet,
}
