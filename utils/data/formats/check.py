"""What a data set holds, and what in it would spoil a training run.

Legend: n images, K identities.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from utils import distributed
from utils.config import UserError
from utils.data.formats.labelled import EncodedImages, LabelledImages
from utils.data.formats.pairs import VerificationPairs
from utils.images import centre_square, decode_image, default_threads, image_format, resize

FACE_SIZE = 112  # of the mean face, pixels
IMAGES_AT_ONCE = 1024  # bounds the memory for small images that wait to be added up
EXAMPLES = 3


@dataclass
class Scan:
    """What one pass over the images found."""

    digests: np.ndarray  # (n, 2) uint64, of the encoded bytes; zeros where they cannot be read
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) => images
    formats: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)  # messages, one an image
    missing: list[int] = field(default_factory=list)  # images without a digest
    mean_face: np.ndarray | None = None  # (FACE_SIZE, FACE_SIZE, 3) uint8


@dataclass
class Report:
    """The result of `check_images`."""

    facts: list[tuple[str, str]]  # what, how much
    faults: list[str]  # what would spoil a training run, a line each
    mean_face: np.ndarray | None  # (FACE_SIZE, FACE_SIZE, 3) uint8; None where no image can be read

    def text(self) -> str:
        """A line for every fact, then one for every fault."""
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts]
        return "".join(f"{line}\n" for line in [*lines, *(f"fault: {fault}" for fault in self.faults)])


def check_images(data: EncodedImages, *, threads: int | None = None) -> Report:
    """Read and decode every image, with `threads` threads (None: one a processor).

    Faults are: images that cannot be read, fewer than two identities, identities without images, the same bytes under
    two identities. Duplicates within an identity, identities with one image and sizes that differ are facts.
    """
    scan = scan_images(data, threads)
    facts = [("format", data.format), ("images", str(len(data)))]
    faults = []
    if scan.unreadable:
        faults.append(f"{len(scan.unreadable)} of {len(data)} images cannot be read: {some(scan.unreadable)}")
    if isinstance(data, LabelledImages):
        some_facts, some_faults = _identities(data)
        facts += some_facts
        faults += some_faults
    if isinstance(data, VerificationPairs):
        same = int(data.issame.sum())
        facts.append(("pairs", f"{len(data.issame)}: {same} genuine, {len(data.issame) - same} impostor"))
    facts += [
        ("sizes", _counts({f"{width} x {height}": n for (width, height), n in scan.sizes.items()})),
        ("encodings", _counts(scan.formats)),
    ]
    copies, shared = duplicates(data, scan)
    facts += [
        ("duplicates", f"{copies} images have the bytes of an earlier one"),
        ("unreadable", str(len(scan.unreadable))),
    ]
    if shared:
        faults.append(f"the same bytes under two identities, {len(shared)} times: {some(shared)}")
    return Report(facts, faults, scan.mean_face)


def scan_images(
    data: EncodedImages, threads: int | None = None, on_face: Callable[[int, np.ndarray], None] | None = None
) -> Scan:
    """One pass over all images, `threads` at a time.

    on_face: called in these threads with the number of each readable image and its centre as it counts in the mean
    face, uint8 (FACE_SIZE, FACE_SIZE, 3) RGB.
    """
    scan = Scan(np.zeros((len(data), 2), np.uint64))
    total = np.zeros((FACE_SIZE, FACE_SIZE, 3), np.float64)

    def look(index: int) -> tuple[bytes | None, str, tuple[int, int], np.ndarray] | tuple[bytes | None, str]:
        digest = None
        try:
            encoded = data.encoded(index)
            digest = hashlib.blake2b(encoded, digest_size=16).digest()
            pixels = decode_image(encoded, data.describe(index))
            small = resize(centre_square(pixels), FACE_SIZE)
            if on_face is not None:
                on_face(index, small)
            return digest, image_format(encoded), (pixels.shape[1], pixels.shape[0]), small
        except UserError as error:
            return digest, str(error)

    bar = tqdm(total=len(data), desc="reading images", unit="image", disable=not distributed.is_main())
    with bar, ThreadPoolExecutor(threads or default_threads()) as pool:
        for start in range(0, len(data), IMAGES_AT_ONCE):
            rows = range(start, min(len(data), start + IMAGES_AT_ONCE))
            for index, (digest, text, *readable) in zip(rows, pool.map(look, rows), strict=True):
                if digest is None:
                    scan.missing.append(index)
                else:
                    scan.digests[index] = np.frombuffer(digest, np.uint64)
                if readable:
                    size, small = readable
                    scan.formats[text] += 1
                    scan.sizes[size] += 1
                    total += small
                else:
                    scan.unreadable.append(text)
                bar.update()
    readable = len(data) - len(scan.unreadable)
    if readable:
        scan.mean_face = np.rint(total / readable).astype(np.uint8)
    return scan


def _identities(data: LabelledImages) -> tuple[list[tuple[str, str]], list[str]]:
    counts = np.bincount(data.labels, minlength=len(data.identities))  # (K,) images of each
    present = counts[counts > 0]
    facts = [("identities", str(len(present)))]
    if len(present):
        middle = f"{np.median(present):g}"
        facts.append(("images per identity", f"minimum {present.min()}, median {middle}, maximum {present.max()}"))
    single = [data.identities[label] for label in np.flatnonzero(counts == 1)]
    facts.append(("with one image", f"{len(single)} identities" + (f": {some(single)}" if single else "")))
    empty = [data.identities[label] for label in np.flatnonzero(counts == 0)]
    faults = [f"{len(empty)} identities have no image: {some(empty)}"] if empty else []
    if len(present) < 2:
        faults.append(f"{len(present)} identities with images; training wants two or more")
    return facts, faults


def duplicates(data: EncodedImages, scan: Scan) -> tuple[int, list[str]]:
    """How many images repeat the bytes of an earlier one, and the groups of equal bytes under several identities."""
    rows = np.setdiff1d(np.arange(len(data)), scan.missing)
    if not len(rows):
        return 0, []
    _, first, group = np.unique(scan.digests[rows], axis=0, return_index=True, return_inverse=True)
    group = group.reshape(-1)
    copies = len(rows) - len(first)
    if not isinstance(data, LabelledImages):
        return copies, []
    first_row = rows[first[group]]  # (rows,) the earliest image with the same bytes
    other = np.flatnonzero(data.labels[first_row] != data.labels[rows])
    one_each = other[np.unique(group[other], return_index=True)[1]]
    return copies, [f"{data.names[first_row[i]]} and {data.names[rows[i]]}" for i in one_each]


def _counts(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f", and {len(ordered) - EXAMPLES} more" if len(ordered) > EXAMPLES else ""
    return ", ".join(f"{name} ({n} images)" for name, n in ordered[:EXAMPLES]) + more or "none"


def some(items: list[str]) -> str:
    """The first few of `items`, for a message."""
    return "; ".join(items[:EXAMPLES]) + ("; ..." if len(items) > EXAMPLES else "")
