"""Where new identity contexts come from, without a network: uniform, authentic and interpolated ones.

A source gives candidates one after the other, always the same ones in the same order; whoever asks keeps some of them
(utils.context_selection). The source that draws faces is diffusion.context_faces.

Legend: n rows, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.config import UserError, existing_file
from utils.contexts import (
    DRAWS_AT_ONCE,
    identity_of,
    mean_contexts,
    read_contexts,
    read_embeddings,
    rows_digest,
    uniform_blocks,
)
from utils.distributed import seed_for

IMAGES = ("mean", "first", "random")
SAME_DIRECTION = 1e-6  # 1 - |cosine| under which two contexts span no arc


@dataclass
class Candidates:
    """Some candidates in a row. Those that are no context at all have a reason in place of a row."""

    rows: np.ndarray  # (n, D) float32 unit rows of those that are
    origins: list[dict[str, Any]]  # of every candidate: what it was made of, for the record
    reasons: list[str] = field(default_factory=list)  # of every candidate: why it is no context; "" where it is one
    names: list[str] | None = None  # of every candidate; None: contexts are numbered as they are kept

    def __post_init__(self) -> None:
        self.reasons = self.reasons or [""] * len(self.origins)


class ContextSource(Protocol):
    """A source of candidates."""

    width: int  # D
    count: int | None  # how many candidates there are; None: any number
    least: int  # how many to ask for at once, at least, for the work to be done well
    settings: dict[str, Any]  # what decides its candidates beside the seed and the files, by the key that names it
    inputs: dict[str, str]  # SHA-256 of what it reads, by the key that names it

    def draw(self, count: int) -> Candidates:
        """The next `count` candidates. All processes call it together; what it returns counts on the first."""

    def finish(self, output_dir: Path, names: Sequence[str], chosen: Sequence[int]) -> None:
        """Keep what belongs to the contexts: `names`, made of the candidates of the numbers `chosen`. First process."""

    def clean(self) -> None:
        """Delete what was kept in order to go on after a kill. First process."""


@dataclass
class UniformSettings:
    """The keys of configs/source/uniform.yaml."""

    width: int = 512  # of a context


@dataclass
class AuthenticSettings:
    """The keys of configs/source/authentic.yaml."""

    embeddings: str  # file or folder of embeddings, one an image
    image_names: str | None = None  # the names of its rows; null: beside it
    image: str = "mean"  # of an identity's images: mean, first (by name) or random (one drawn)


@dataclass
class InterpolatedSettings:
    """The keys of configs/source/interpolated.yaml."""

    contexts: str  # file or folder of contexts
    t_min: float = 0.3  # t = 0 is the first of a pair, 1 the second
    t_max: float = 0.7


class StreamSource:
    """Candidates that cost nothing: taken from an endless or finite stream of blocks."""

    least = DRAWS_AT_ONCE

    def __init__(
        self,
        blocks: Iterator[Candidates],
        width: int,
        settings: dict[str, Any],
        *,
        count: int | None = None,
        inputs: dict[str, str] | None = None,
    ) -> None:
        self.width, self.count = width, count
        self.settings, self.inputs = settings, inputs or {}
        self._blocks = blocks
        self._rest: Candidates | None = None

    def draw(self, count: int) -> Candidates:
        """See ContextSource."""
        parts, found = [], 0
        while found < count:
            block = self._rest or next(self._blocks)
            take = min(count - found, len(block.origins))
            parts.append(_part(block, 0, take))
            self._rest = _part(block, take, None) if take < len(block.origins) else None
            found += take
        names = None if parts[0].names is None else [name for part in parts for name in part.names]
        rows = np.concatenate([part.rows for part in parts])
        return Candidates(rows, [origin for part in parts for origin in part.origins], names=names)

    def finish(self, output_dir: Path, names: Sequence[str], chosen: Sequence[int]) -> None:
        """Nothing beside the contexts themselves."""

    def clean(self) -> None:
        """Nothing was kept."""


def _part(block: Candidates, start: int, stop: int | None) -> Candidates:
    names = None if block.names is None else block.names[start:stop]
    return Candidates(block.rows[start:stop], block.origins[start:stop], names=names)


def uniform_source(settings: UniformSettings, seed: int) -> StreamSource:
    """Normalised Gaussian vectors (IDiff-Face, ICCV 2023). UserError for a width under 2."""
    if settings.width < 2:
        raise UserError(f"source.width: {settings.width}; a context has at least 2 numbers, as a rule 512")
    blocks = (Candidates(rows, [{} for _ in rows]) for rows in uniform_blocks(settings.width, seed))
    return StreamSource(blocks, settings.width, {"source.width": settings.width})


def authentic_source(settings: AuthenticSettings, seed: int) -> StreamSource:
    """One context an identity of an embeddings file, in the order of names: of all its images, or of one.

    UserError for an unreadable file or an unknown `image`.
    """
    if settings.image not in IMAGES:
        raise UserError(f"source.image: {settings.image!r} is not one of {', '.join(IMAGES)}")
    names, rows = read_embeddings(_known_path(settings.embeddings, "source.embeddings"), settings.image_names)
    inputs = {"source.embeddings": rows_digest(names, rows)}
    images: dict[str, list[int]] = {}
    for row in sorted(range(len(names)), key=names.__getitem__):
        images.setdefault(identity_of(names[row]), []).append(row)
    identities = sorted(images)
    if settings.image == "mean":
        identities, contexts = mean_contexts(names, rows)
        origins = [{"images": len(images[identity])} for identity in identities]
    else:
        chosen = [images[identity][0] for identity in identities]
        if settings.image == "random":
            chosen = [images[i][seed_for(seed, "image of", i) % len(images[i])] for i in identities]
        contexts, origins = rows[chosen], [{"image": names[row]} for row in chosen]
    blocks = iter([Candidates(contexts, origins, names=identities)])
    kept = {"source.image": settings.image}
    return StreamSource(blocks, rows.shape[1], kept, count=len(identities), inputs=inputs)


def interpolated_source(settings: InterpolatedSettings, seed: int) -> StreamSource:
    """Points on the great arcs between two contexts of a file, both and t drawn uniformly (spherical interpolation).

    UserError for an unreadable file, fewer than two different contexts, or a range of t that is none within 0 .. 1.
    """
    if not 0 <= settings.t_min <= settings.t_max <= 1:
        raise UserError(f"source.t_min, source.t_max: {settings.t_min} .. {settings.t_max}; a range within 0 .. 1")
    names, rows = read_contexts(_known_path(settings.contexts, "source.contexts"))
    if len(rows) < 2 or (np.abs(rows[1:] @ rows[0]) > 1 - SAME_DIRECTION).all():
        raise UserError(f"source.contexts: {settings.contexts} holds no two contexts with an arc between them")
    blocks = _interpolations(names, rows, settings.t_min, settings.t_max, seed)
    kept = {"source.t_min": settings.t_min, "source.t_max": settings.t_max}
    return StreamSource(blocks, rows.shape[1], kept, inputs={"source.contexts": rows_digest(names, rows)})


def _interpolations(names: list[str], rows: np.ndarray, t_min: float, t_max: float, seed: int) -> Iterator[Candidates]:
    generator = np.random.default_rng(seed)
    while True:
        first = generator.integers(len(rows), size=DRAWS_AT_ONCE)
        second = (first + generator.integers(1, len(rows), size=DRAWS_AT_ONCE)) % len(rows)  # another one
        t = generator.uniform(t_min, t_max, size=DRAWS_AT_ONCE)
        spans = np.abs(np.einsum("nd,nd->n", rows[first], rows[second])) <= 1 - SAME_DIRECTION
        first, second, t = first[spans], second[spans], t[spans]
        origins = [
            {"between": [names[i], names[j]], "t": round(float(share), 6)}
            for i, j, share in zip(first, second, t, strict=True)
        ]
        yield Candidates(slerp(rows[first], rows[second], t), origins)


def slerp(start: np.ndarray, end: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Spherical interpolation (Shoemake, SIGGRAPH 1985) of unit rows (n, D) at t (n,) in 0 .. 1: float32 (n, D).

    The two of a pair must not be equal or opposite.
    """
    start, end = start.astype(np.float64), end.astype(np.float64)
    angle = np.arccos(np.clip(np.einsum("nd,nd->n", start, end), -1, 1))  # (n,)
    shares = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)]) / np.sin(angle)  # (2, n)
    rows = shares[0, :, None] * start + shares[1, :, None] * end
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _known_path(path: str, key: str) -> Path:
    """A file or folder; UserError naming `key` otherwise."""
    found = Path(path).expanduser()
    return found if found.is_dir() else existing_file(found, key, "a file or folder that encode.py or a user made")
