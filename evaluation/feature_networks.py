"""In whose features images are compared (FID, precision, recall, D_intra): files of configs/features/."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evaluation.inception import CLASSES, InceptionPool, own_keys
from recognition.embedding_store import Reader
from utils.checkpoint import load_state_dict_file, strict_load, weights_sha256, with_counters
from utils.config import UserError, existing_file
from utils.precision import autocast


@dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features are compared. `network` None: the embeddings themselves are the features."""

    name: str
    is_comparable: bool  # with published figures
    sha256: str = ""
    network: InceptionPool | None = None


def own_features() -> FeatureNetwork:
    """The embedder's own features, where no weights of Inception are at hand."""
    return FeatureNetwork("the embedder's own features", is_comparable=False)


def inception_features(weights: str) -> FeatureNetwork:
    """The pool of Inception-v3 with the weights in a file: torchvision's inception_v3, or the `pt_inception-2015-12-05`
    of torch-fidelity and pytorch-fid. UserError where the file is missing or holds another network."""
    path = existing_file(weights, "features.weights", "torchvision's inception_v3 or pt_inception-2015-12-05")
    state = load_state_dict_file(path)
    classes = len(state["fc.weight"]) if "fc.weight" in state else 0
    if classes not in CLASSES:
        raise UserError(
            f"features.weights: {path} has no classifier of 1000 (torchvision's inception_v3) or 1008 classes "
            "(pt_inception-2015-12-05), which would tell whose weights it holds"
        )
    with torch.device("meta"):  # without random weights: every tensor is in the file
        network = InceptionPool(CLASSES[classes])
    network.to_empty(device="cpu")
    own = own_keys(state)
    strict_load(network, with_counters(network, own), f"features.weights: {path}")
    name = f"Inception-v3 ({'torchvision' if classes == 1000 else '2015-12-05'})"
    # Published FIDs are of the weights of 2015
    return FeatureNetwork(name, classes == 1008, _fingerprint(network), network.eval().requires_grad_(False))


def _fingerprint(network: InceptionPool) -> str:
    return hashlib.sha256(f"{weights_sha256(network.state_dict())} {network.weights}".encode()).hexdigest()


@torch.inference_mode()
def pool_features(
    network: InceptionPool, readers: Sequence[Reader], *, batch_size: int, precision: str, device: torch.device
) -> np.ndarray:
    """Images, uint8 (H, W, 3) of any size each, as functions that read them => float32 (n, 2048)."""
    rows = []
    for start in range(0, len(readers), batch_size):
        batch = torch.stack([network.prepare(read()) for read in readers[start : start + batch_size]])  # (B, 3, S, S)
        with autocast(device, precision):
            rows.append(network(batch.to(device)).float().cpu().numpy())
    features = np.concatenate(rows)
    if not np.isfinite(features).all():
        raise UserError("features.weights: the network gives features that are not finite")
    return features
