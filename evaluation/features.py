"""Embeddings and features of images, computed once: shared out among processes, kept by what they depend on.

    <output_dir>/cache/<what>-<hash>/<first image>.npy

The hash is over the content of the images, the network and how it was used: a killed evaluation goes on, and the next
one in the same folder computes nothing anew, wherever the images lie and whatever other sets it compares.

Legend: n images, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from evaluation.feature_networks import FeatureNetwork, pool_features
from recognition.embedding import embed_images
from recognition.embedding_store import EmbeddingStore, Reader
from utils import distributed
from utils.data.formats.labelled import EncodedImages
from utils.embedders import Embedder
from utils.images import default_threads

CACHE = "cache"
DIGESTED_AT_ONCE = 1024


@dataclass(frozen=True)
class Extraction:
    """How and with what images are embedded, and where the rows are kept."""

    output_dir: Path
    embedder: Embedder
    features: FeatureNetwork
    flip: bool
    batch_size: int
    precision: str
    device: torch.device

    def embed(self, images: EncodedImages, digests: np.ndarray, progress: str) -> EmbeddingStore:
        """The embeddings of images whose content_digests are (n, 16), all there when this returns. Every process."""
        compute = partial(
            embed_images,
            self.embedder.network,
            batch_size=self.batch_size,
            flip=self.flip,
            precision=self.precision,
            device=self.device,
        )
        described = {"network": self.embedder.sha256, "flip": self.flip}
        return self._fill("embeddings", images, digests, described, compute, progress)

    def features_of(self, images: EncodedImages, digests: np.ndarray, progress: str) -> EmbeddingStore:
        """The features of images, likewise, by a feature network that is not the embedder."""
        network = self.features.network.to(self.device)
        settings = {"batch_size": self.batch_size, "precision": self.precision, "device": self.device}
        compute = partial(pool_features, network, **settings)
        return self._fill("features", images, digests, {"network": self.features.sha256}, compute, progress)

    def _fill(
        self,
        what: str,
        images: EncodedImages,
        digests: np.ndarray,
        described: dict[str, Any],
        compute: Callable[[list[Reader]], np.ndarray],
        progress: str,
    ) -> EmbeddingStore:
        content = hashlib.sha256(np.ascontiguousarray(digests).tobytes()).hexdigest()
        described = {**described, "precision": self.precision, "content": content}
        name = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        store = EmbeddingStore(self.output_dir / CACHE / f"{what}-{name}", images, described)
        store.fill(compute, f"{progress}, {what}")
        return store


def content_digests(images: EncodedImages, progress: str) -> np.ndarray:
    """What tells the content of every image: uint8 (n, 16). Every process calls this and reads a share of the files.

    Raises UserError for a file that cannot be read.
    """
    starts = range(0, len(images), DIGESTED_AT_ONCE)
    mine = {}
    bar = tqdm(total=len(images), desc=f"{progress}, reading", unit="image", disable=not distributed.is_main(), delay=2)
    with bar, ThreadPoolExecutor(default_threads()) as pool:
        for start in distributed.share(starts):
            part = range(start, min(len(images), start + DIGESTED_AT_ONCE))
            mine[start] = b"".join(pool.map(images.digest, part))
            bar.update(len(part) * distributed.world_size())
    found = {start: digest for part in distributed.all_gather_objects(mine) for start, digest in part.items()}
    return np.frombuffer(b"".join(found[start] for start in starts), np.uint8).reshape(-1, 16)
