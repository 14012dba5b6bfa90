"""The identities of the report as JSON that never takes more bytes than it may.

What does not fit is left out level by level, in an order of which every beginning is a stratified sample: the
identities at both ends of every figure first, then evenly over consistency. The levels: the figures of each identity;
the table of its images; a strip of thumbnails; seeds; the other thumbnails and faces of the nearest training identity.

Legend: K identities, N images.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation.report.pictures import Pictures
from evaluation.results import SetResult
from utils import distributed

ENDS = 24  # identities from both ends of every figure that come first
STRIP = 8  # thumbnails in the sheet
TRAINING_FACES = 4  # of the nearest training identity
# The share of what is left that each level may take; a level that needs less leaves the rest to those after it.
SHARES = {"figures": 0.4, "files": 0.5, "strips": 0.6, "seeds": 0.4, "pictures": 1.0}


def to_json(value: Any) -> str:
    """Compact ASCII that may stand inside a <script> element; ValueError for nan and infinities."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def stratified_order(key: np.ndarray, figures: Sequence[np.ndarray] = ()) -> np.ndarray:
    """All of 0 .. K - 1, such that every beginning is a fair sample over `key` (K,): a permutation (K,).

    First the ENDS highest and lowest of each of `figures` (K,), in turn; nan stands at neither end. Then ranks by `key`
    in bit-reversed order (van der Corput), each of which halves the widest gaps that those before it left.
    """
    ends = []
    for values in figures:
        ranked = np.argsort(values, kind="stable")
        ranked = ranked[np.isfinite(values[ranked])]
        ends += [ranked[:ENDS], ranked[::-1][:ENDS]]
    width = max((len(end) for end in ends), default=0)
    first = [int(end[place]) for place in range(width) for end in ends if place < len(end)]
    ranked = np.argsort(key, kind="stable")
    bits = max(1, math.ceil(math.log2(max(2, len(key)))))
    ranks, turned = np.arange(len(key)), np.zeros(len(key), np.int64)
    for _ in range(bits):
        turned, ranks = turned * 2 + ranks % 2, ranks // 2
    rest = ranked[np.argsort(turned, kind="stable")]
    return np.array(list(dict.fromkeys([*first, *rest.tolist()])), np.int64)


@dataclass
class Budget:
    """Bytes that may still be spent."""

    left: int

    def spend(self, size: int) -> bool:
        """Take `size` bytes; False, and nothing taken, where they are not there."""
        if size > self.left:
            return False
        self.left -= size
        return True


@dataclass
class Record:
    """An identity in the page, as far as it fits: `figures` None is not in the sheet at all."""

    figures: list[Any] | None = None
    files: str | None = None  # deflated and in base64, as `seeds`
    seeds: str | None = None
    thumbnails: list[str] = field(default_factory=list)  # of the first images, WebP in base64

    def parts(self) -> list[Any]:
        return [self.figures, self.files, self.seeds, self.thumbnails]


_RECORD = len(to_json(Record([]).parts())) + 1  # bytes of a record but for its contents, with a comma


class SetSheet:
    """The identities of one data set for the page: `fill` spends a budget on them, `content` is what came of it."""

    def __init__(self, result: SetResult, pictures: Pictures, training: Pictures | None, address: str | None) -> None:
        """training: the real set's pictures; address: what stands before an image's name in a link, None: no links."""
        self.result, self.pictures, self.training, self.address = result, pictures, training, address
        found, images = result.identities, result.images
        self.records = [Record() for _ in found.names]
        self.training_faces: dict[str, list[str]] = {}
        self.thumbnail_size = 0
        self._order = np.argsort(images.identity, kind="stable")  # rows of `images`, identity by identity
        self._starts = np.searchsorted(images.identity[self._order], np.arange(len(found.names) + 1))
        figures = [v for v in (found.consistency, found.training_cosine, found.switch_t) if v is not None]
        self.order = [str(found.names[row]) for row in stratified_order(found.consistency, figures)]
        self._turn: list[int] = []

    def fill(self, order: Sequence[str], max_bytes: int) -> None:
        """Take in, level by level and in this order of identities, what fits into `max_bytes` of JSON."""
        row_of = {str(name): row for row, name in enumerate(self.result.identities.names)}
        self._turn = [row_of[name] for name in order if name in row_of]
        budget = Budget(max_bytes - len(to_json(self.content() | {"identities": []})) - 16)
        names = [str(name) for name in self.result.images.files]
        budget.left -= self._level(budget, "figures", self._figures)
        if budget.left <= 0:
            return
        budget.left -= self._level(budget, "files", self._files)
        self.thumbnail_size = self.pictures.best_size(names, 0.5 * budget.left)  # base64, seeds and training faces
        budget.left -= self._level(budget, "strips", self._strip)
        if self.result.images.seed is not None:
            budget.left -= self._level(budget, "seeds", self._seeds)
        budget.left -= self._level(budget, "pictures", self._pictures)

    def content(self) -> dict[str, Any]:
        """What the scripts of the page read of this set."""
        return {
            "name": self.result.name,
            "address": self.address,
            "size": self.thumbnail_size,
            "total": len(self.records),
            "training": self.training_faces,
            "identities": [record.parts() for record in self.records if record.figures is not None],
        }

    def _level(self, budget: Budget, name: str, take: Callable[[int, Budget], bool]) -> int:
        """Bytes that a level took: identity by identity in stratified order, until one does not fit."""
        allowed = Budget(int(SHARES[name] * max(0, budget.left)))
        start = allowed.left
        label = f"report, {self.result.name}: {name}"
        for row in tqdm(self._turn, desc=label, unit="identity", leave=False, disable=not distributed.is_main()):
            if (name != "figures" and self.records[row].figures is None) or not take(row, allowed):
                break
        return start - allowed.left

    def _rows(self, row: int) -> np.ndarray:
        """Rows of `images` that are of identity `row`."""
        return self._order[self._starts[row] : self._starts[row + 1]]

    def _figures(self, row: int, budget: Budget) -> bool:
        found = self.result.identities
        figures = [
            str(found.names[row]),
            int(found.num_images[row]),
            _number(found.consistency[row]),
            _number(found.near_share[row]),
            str(found.names[found.neighbour[row]]),
            _number(found.neighbour_cosine[row]),
            None if found.training_name is None else str(found.training_name[row]),
            None if found.training_cosine is None else _number(found.training_cosine[row]),
            None if found.switch_t is None else _number(found.switch_t[row], 1),
        ]
        fits = budget.spend(_RECORD + len(to_json(figures)))
        if fits:
            self.records[row].figures = figures
        return fits

    def _files(self, row: int, budget: Budget) -> bool:
        images, rows = self.result.images, self._rows(row)
        names = [str(name) for name in images.files[rows]]
        folders = {name.rpartition("/")[0] for name in names}
        start = f"{folders.pop()}/" if len(folders) == 1 and all("/" in name for name in names) else ""
        files = [name[len(start) :] for name in names]
        index = None if images.index is None else images.index[rows].tolist()
        suffix = files[0].lstrip("0123456789") if files else ""
        if index is not None and files == [f"{number}{suffix}" for number in index]:
            files = suffix  # as sample.py and align.py name them: the numbers need not be said twice
        table = {
            "start": start,
            "files": files,
            "index": index,
            "cosine": [_number(value, 3) for value in images.centre_cosine[rows]],
            "switch": None if images.switch_t is None else images.switch_t[rows].tolist(),
            "copy": {
                place: str(images.files[images.duplicate_of[image]])
                for place, image in enumerate(rows)
                if images.duplicate_of[image] >= 0
            },
        }
        data = _deflated(table)
        fits = budget.spend(len(data))
        if fits:
            self.records[row].files = data
        return fits

    def _seeds(self, row: int, budget: Budget) -> bool:
        # As text: JavaScript's numbers hold 53 bits
        data = _deflated([str(seed) for seed in self.result.images.seed[self._rows(row)]])
        fits = budget.spend(len(data))
        if fits:
            self.records[row].seeds = data
        return fits

    def _strip(self, row: int, budget: Budget) -> bool:
        return self._add_thumbnails(row, STRIP, budget)

    def _pictures(self, row: int, budget: Budget) -> bool:
        return self._add_training_faces(row, budget) and self._add_thumbnails(row, len(self._rows(row)), budget)

    def _add_thumbnails(self, row: int, count: int, budget: Budget) -> bool:
        held = self.records[row].thumbnails
        names = [str(name) for name in self.result.images.files[self._rows(row)[len(held) : count]]]
        found = [_base64(data) for data in self.pictures.thumbnails(names, self.thumbnail_size)]
        fits = budget.spend(sum(len(data) + 3 for data in found))  # quotes and a comma
        if fits:
            held += found
        return fits

    def _add_training_faces(self, row: int, budget: Budget) -> bool:
        names = self.result.identities.training_name
        if names is None or self.training is None or str(names[row]) in self.training_faces:
            return True
        identity = str(names[row])
        files = self.training.of_identity(identity)[:TRAINING_FACES]
        found = [_base64(data) for data in self.training.thumbnails(files, self.thumbnail_size)]
        fits = budget.spend(len(to_json({identity: found})))
        if fits:
            self.training_faces[identity] = found
        return fits


def sheet_json(sheets: Sequence[SetSheet], max_bytes: int) -> str:
    """Fill the sheets, and give their JSON: at most `max_bytes` of ASCII, shared fairly between the sets.

    The sets take turns in choosing identities, so that one that several have is sampled in all of them.
    """
    turns = [name for names in zip_longest(*(sheet.order for sheet in sheets)) for name in names if name is not None]
    order = list(dict.fromkeys(turns))
    left = max_bytes - len(to_json({"sets": []})) - len(sheets)
    for number, sheet in enumerate(sheets):
        sheet.fill(order, left // (len(sheets) - number))
        left -= len(to_json(sheet.content()))
    return to_json({"sets": [sheet.content() for sheet in sheets]})


def _number(value: float, digits: int = 4) -> float | None:
    """Rounded for the page; None for nan."""
    return round(float(value), digits) if math.isfinite(value) else None


def _deflated(value: Any) -> str:
    return _base64(zlib.compress(to_json(value).encode(), 9))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
