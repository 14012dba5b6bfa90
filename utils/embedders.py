"""Embedders: recognisers with all that turns a picture into their input, one file of configs/embedder/ each.

Legend: n images, H W height and width, S side of the network's input, D width of the embedding.
"""

import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from recognition.backbones import InputAdapter, backbone_of
from recognition.backbones.adapter import MEAN, STD
from recognition.embedding import embed_images
from recognition.onnx import OnnxRecogniser
from utils.checkpoint import strict_load, weights_sha256, with_counters
from utils.config import UserError, existing_file
from utils.networks import FACENET, NetworkFile, open_network_file

FACENET_SIZE, FACENET_FEATURES = 160, 512


class Embedder:
    """Faces => unit vectors. Faces are aligned crops as align.py makes them; other sizes than S are resized."""

    def __init__(self, network: nn.Module, sha256: str) -> None:
        """`network` takes float32 (n, 3, S, S) RGB in [-1, 1]; `sha256` tells its weights and input apart."""
        self.network = network
        self.sha256 = sha256
        self.width: int = network.num_features
        self.input_size: int = network.input_size

    def embed(
        self,
        images: np.ndarray | Sequence[str | Path],
        *,
        root: str | Path = ".",
        batch_size: int = 64,
        flip: bool = True,
        device: torch.device | str | None = None,
        progress: str | None = None,
    ) -> np.ndarray:
        """uint8 (n, H, W, 3) RGB, or n paths below `root` => float32 (n, D), rows of length 1.

        flip: add the mirror image's embedding, as the verification protocol does. Errors and the other parameters are
        those of `recognition.embedding.embed_images`.
        """
        return embed_images(
            self.network, images, root=root, batch_size=batch_size, flip=flip, device=device, progress=progress
        )


def backbone_embedder(
    checkpoint: str,
    network: str | None = None,
    input_size: int | None = None,
    channel_order: str | None = None,
    mean: float = MEAN,
    std: float = STD,
) -> Embedder:
    """An IR, IR-SE or iresnet recogniser out of any file that `utils.networks` knows.

    network: the backbone that the file must hold; None: the one it holds. input_size: side in pixels, likewise.
    channel_order: RGB or BGR, as it was trained; None: as the file says (AdaFace's Lightning checkpoints: BGR), else
    RGB. mean, std: it takes (pixel - mean) / std. UserError where the file is missing or says otherwise.
    """
    file = _open(checkpoint)
    backbone = backbone_of(file)
    for key, wanted, found in (
        ("network", network, backbone.config["name"]),
        ("input_size", input_size, backbone.input_size),
        ("channel_order", channel_order, file.channel_order),
    ):
        if wanted is not None and found is not None and wanted != found:
            raise UserError(f"embedder.{key}: {wanted}, but {checkpoint} holds {found}; another file, or embedder=own")
    return _adapted(backbone, channel_order or file.channel_order or "RGB", mean, std)


def facenet_embedder(
    checkpoint: str, input_size: int = FACENET_SIZE, channel_order: str = "RGB", mean: float = MEAN, std: float = 128.0
) -> Embedder:
    """facenet-pytorch's InceptionResnetV1 with the weights in `checkpoint` (20180402-114759-vggface2.pt, ...).

    Its classifier (`logits`) is left aside. Raises UserError where the package is not installed or the file does not
    fit.
    """
    file = _open(checkpoint)
    if file.kind != FACENET:
        raise file.mismatch(FACENET)
    with torch.device("meta"):  # without its slow initialisation: every tensor is in the file
        network = _inception_resnet()
    network.to_empty(device="cpu")
    strict_load(network, with_counters(network, file.state), str(checkpoint), file.looks_like)
    network.input_size, network.num_features = input_size, FACENET_FEATURES
    return _adapted(network.eval(), channel_order, mean, std)


def onnx_embedder(
    checkpoint: str, input_size: int = 112, channel_order: str = "RGB", mean: float = MEAN, std: float = STD
) -> Embedder:
    """Any ONNX recogniser; `input_size` serves files that leave it open. Raises UserError as `OnnxRecogniser`."""
    path = existing_file(checkpoint, "embedder.checkpoint", "an ONNX recogniser, such as w600k_r50.onnx")
    graph = OnnxRecogniser(path, input_size)
    return _adapted(graph, channel_order, mean, std, hashlib.sha256(path.read_bytes()).hexdigest())


def _open(checkpoint: str) -> NetworkFile:
    path = existing_file(checkpoint, "embedder.checkpoint", "recognition.train writes backbone.safetensors")
    if path.suffix == ".onnx":
        raise UserError(f"embedder: {path} is an ONNX file; give embedder=insightface_onnx")
    return open_network_file(path)


def _adapted(network: nn.Module, channel_order: str, mean: float, std: float, weights: str | None = None) -> Embedder:
    adapter = InputAdapter(network, channel_order, mean, std).eval()
    weights = weights or weights_sha256(network.state_dict())
    described = f"{weights} {network.input_size} {channel_order} {float(mean)} {float(std)}"
    return Embedder(adapter, hashlib.sha256(described.encode()).hexdigest())


def _inception_resnet() -> nn.Module:
    """The network of facenet-pytorch with random weights.

    The package's own __init__ imports torchvision's compiled operators, which this network does not need: its module is
    imported as part of a package that only knows the folder.
    """
    name = "_facenet_pytorch_models"
    spec = importlib.util.find_spec("facenet_pytorch")
    if spec is None:
        raise UserError("embedder: facenet needs the package facenet-pytorch: pip install --no-deps facenet-pytorch")
    if name not in sys.modules:
        folder = importlib.machinery.ModuleSpec(name, None, is_package=True)
        folder.submodule_search_locations = [str(Path(next(iter(spec.submodule_search_locations))) / "models")]
        sys.modules[name] = importlib.util.module_from_spec(folder)
    return importlib.import_module(f"{name}.inception_resnet_v1").InceptionResnetV1()
