"""What the pixels of the images that are looked at say: files, sizes, copies, the order of the channels.

Legend: m images that are looked at, S = 112.
"""

from __future__ import annotations

import numpy as np

from recognition.dataset_check.findings import Outcome
from recognition.dataset_check.sample import ChosenImages
from utils.data.formats.check import FACE_SIZE, Scan, duplicates, some

CENTRE = np.s_[40:100, 30:82]  # of S x S: skin and little else in an aligned face
GREY_SPREAD = 3.0  # mean over pixels of the largest channel minus the smallest, 0..255; a grey JPEG has less
MIN_COLOUR_IMAGES = 20
# Skin of every tone reflects more red light than blue: of aligned rendered faces 100 % are redder in the middle.
SWAPPED, MIXED = 0.25, 0.6  # shares of the colour images that are redder than blue, below which a finding is made
ODD_SIZE = 0.01  # share of images that are not square, or small


class FaceStatistics:
    """Collects, image by image and in any thread, what later checks need of the pixels."""

    def __init__(self, count: int, kept: np.ndarray) -> None:
        """Of `count` images; `kept`: the ascending numbers of those whose pixels are needed."""
        self.spread = np.full(count, np.nan, np.float32)  # see GREY_SPREAD; NaN: unreadable
        self.redness = np.full(count, np.nan, np.float32)  # mean red minus mean blue in CENTRE, 0..255
        self.kept = kept
        self.faces = np.zeros((len(kept), FACE_SIZE, FACE_SIZE, 3), np.uint8)

    def __call__(self, index: int, face: np.ndarray) -> None:
        """Take image `index`, uint8 (S, S, 3) RGB."""
        self.spread[index] = (face.max(axis=2) - face.min(axis=2)).mean()
        middle = face[CENTRE].mean(axis=(0, 1))
        self.redness[index] = middle[0] - middle[2]
        place = np.searchsorted(self.kept, index)
        if place < len(self.kept) and self.kept[place] == index:
            self.faces[place] = face

    def readable_faces(self) -> tuple[np.ndarray, np.ndarray]:
        """The kept faces that could be read, uint8 (k, S, S, 3), and their numbers (k,)."""
        readable = ~np.isnan(self.spread[self.kept])
        return self.faces[readable], self.kept[readable]


def check_files(images: ChosenImages, scan: Scan, max_unreadable: float, input_size: int) -> Outcome:
    """Unreadable files, sizes, and the same bytes under two identities.

    max_unreadable: share of images that may be unreadable without an error. input_size: of the network, in pixels.
    """
    outcome = Outcome()
    count, unreadable = len(images), scan.unreadable
    outcome.facts["unreadable"] = len(unreadable)
    outcome.facts["sizes"] = {f"{width}x{height}": n for (width, height), n in scan.sizes.most_common(10)}
    if unreadable:
        share = len(unreadable) / count
        (outcome.error if share > max_unreadable else outcome.warning)(
            "unreadable files",
            f"{len(unreadable)} of {count} images cannot be read ({some(unreadable)})",
            "a copy or a download that was cut short",
            f"replace or remove them, training stops at the first; check.max_unreadable ({max_unreadable:g}) is the "
            "share that this check lets through",
        )
    readable = max(1, count - len(unreadable))
    odd = sum(n for (width, height), n in scan.sizes.items() if width != height)
    small = sum(n for (width, height), n in scan.sizes.items() if min(width, height) < input_size)
    if odd > ODD_SIZE * readable:
        outcome.warning(
            "sizes",
            f"{odd} of {readable} images are not square",
            "photographs that are not aligned; training takes their centred square",
            "align.py makes crops of 112 x 112",
        )
    if small > ODD_SIZE * readable:
        outcome.warning(
            "sizes",
            f"{small} of {readable} images are smaller than the network's input of {input_size} pixels",
            "a data set made for a smaller network; enlarged images hold no more than before",
            "make it at that size, or take a backbone with a smaller backbone.input_size",
        )
    copies, shared = duplicates(images, scan)
    outcome.facts["exact_duplicates"] = copies
    outcome.facts["exact_duplicates_across_identities"] = len(shared)
    if shared:
        outcome.warning(
            "duplicates",
            f"the same file stands under two identities {len(shared)} times ({some(shared)})",
            "one person under two labels, or wrong labels",
            "merge these identities or remove the copies",
        )
    return outcome


def check_channels(statistics: FaceStatistics) -> Outcome:
    """Grey sets, and red and blue exchanged. Only for images that show faces where the template has them."""
    outcome = Outcome()
    readable = ~np.isnan(statistics.spread)
    colour = readable & (statistics.spread > GREY_SPREAD)
    grey_share = 1 - colour.sum() / max(1, readable.sum())
    outcome.facts["share_grey"] = round(float(grey_share), 4)
    if colour.sum() < MIN_COLOUR_IMAGES:
        outcome.facts["channels"] = f"none made: {colour.sum()} colour images, {MIN_COLOUR_IMAGES} are needed"
        return outcome
    redder = float((statistics.redness[colour] > 0).mean())
    outcome.facts["channels"] = {"share_redder_than_blue": round(redder, 4)}
    seen = f"{100 * redder:.0f} % of {colour.sum()} colour images are redder than blue in the middle of the face"
    if redder < SWAPPED:
        outcome.error(
            "channel order",
            f"{seen}; skin of every tone is",
            "red and blue are exchanged: BGR was written as RGB (by OpenCV)",
            "write the files anew with the channels reversed",
        )
    elif redder < MIXED:
        outcome.warning(
            "channel order",
            f"{seen}; skin of every tone is",
            "red and blue are exchanged in a part of the set",
            "look at some of its images, and reverse the channels of that part",
        )
    return outcome
