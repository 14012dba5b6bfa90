"""Making a file of identity contexts: candidates from a source, limits on how alike they may be, the files.

<output_dir>/contexts.npy        (n, D) float32, what sample.py reads as sampling.contexts_file
<output_dir>/context_names.txt   their names, one a line
<output_dir>/contexts.jsonl      what each was made of
<output_dir>/contexts.json       settings, limits, hashes of what was read, tries and rejections; written last
"""

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from utils import distributed
from utils.checkpoint import read_json, write_json, write_text
from utils.config import UserError
from utils.context_limits import LIMITS, ContextSettings, Limits, check_limits, read_limits
from utils.context_selection import ContextSelector
from utils.context_sources import Candidates, ContextSource
from utils.contexts import NUMBERED, write_rows
from utils.logging import get_logger
from utils.similarity import nearest_cosines

log = get_logger(__name__)

RECORD, ORIGINS = "contexts.json", "contexts.jsonl"
HOPELESS = 512  # tries after which at least one context must have been found
SPARE = 1.1  # how many more candidates are asked for than should be needed


def create_contexts(settings: ContextSettings, source_settings: dict[str, Any], source: ContextSource) -> list[str]:
    """Make the contexts of `settings` from `source` and write them; returns their names. Run by every process.

    `source_settings`: the section `source`, for the record. A folder that is finished is left as it is; the same
    command goes on where one was killed. Raises UserError where the folder holds other contexts, an input does not fit,
    or so many contexts are not to be had within the tries; what was drawn is kept then.
    """
    _check(settings, source)
    searches: list[ContextSearch] = []  # on the first process, which decides

    def begin() -> list[str] | None:
        limits = read_limits(settings, source)
        known = _finished(settings, source, limits.inputs)
        if known is None:
            limits.measure(settings)
            searches.append(ContextSearch(settings, source.count, limits))
        return known

    known = distributed.on_main(begin)
    if known is not None:
        return known
    while count := distributed.on_main(lambda: searches[0].ask(source.least)):
        candidates = source.draw(count)
        if distributed.is_main():
            searches[0].look_at(candidates)
    return distributed.on_main(lambda: _write(settings, source_settings, source, searches[0]))


def _check(settings: ContextSettings, source: ContextSource) -> None:
    """UserError for numbers that make no sense."""
    if settings.n_contexts is None and source.count is None:
        raise UserError("n_contexts: not set; this source has any number of contexts, say how many")
    if settings.n_contexts is not None and settings.n_contexts < 1:
        raise UserError(f"n_contexts: {settings.n_contexts}; give at least 1")
    if settings.n_contexts is not None and source.count is not None and settings.n_contexts > source.count:
        raise UserError(f"n_contexts: {settings.n_contexts}, but the source has {source.count} identities")
    if settings.tries_per_context < 1:
        raise UserError(f"tries_per_context: {settings.tries_per_context}; give at least 1")
    check_limits(settings)


def _description(settings: ContextSettings, source: ContextSource, inputs: dict[str, str]) -> dict[str, Any]:
    """What decides the contexts: not the paths, nor what only bounds the search."""
    left_out = ("output_dir", "training_identities", "calibration_embeddings", "tries_per_context")
    kept = {key: value for key, value in asdict(settings).items() if key not in left_out}
    return json.loads(json.dumps({"settings": {**kept, **source.settings}, "inputs": inputs}))  # as a file has it


def _finished(settings: ContextSettings, source: ContextSource, inputs: dict[str, str]) -> list[str] | None:
    """The names in a folder that is finished, None in a new one; UserError where it holds other contexts."""
    folder = Path(settings.output_dir)
    if not (folder / RECORD).is_file():
        if (folder / "contexts.npy").exists() and not (folder / ORIGINS).exists():
            raise UserError(f"output_dir: {folder} holds contexts that were not made here; give a new folder")
        return None
    known = read_json(folder / RECORD, "give another output_dir")
    description = _description(settings, source, inputs)
    for part in ("settings", "inputs"):
        for key in sorted({*description[part], *known[part]}):
            was, now = known[part].get(key), description[part].get(key)
            if was != now:
                told = f"{now}, before {was}" if part == "settings" else "another content than before"
                raise UserError(f"{key}: {told}; {folder} holds the contexts made with it: give another output_dir")
    source.clean()
    log.info("%s: made before", folder)
    return (folder / "context_names.txt").read_text(encoding="utf-8").splitlines()


class ContextSearch:
    """Keeps count of candidates until enough are found. Lives on the first process."""

    def __init__(self, settings: ContextSettings, count: int | None, limits: Limits) -> None:
        """count: how many candidates there are; None: any number."""
        wanted = count if settings.n_contexts is None else settings.n_contexts
        self.takes_all = settings.n_contexts is None
        self.is_endless = count is None
        self.max_tries = settings.tries_per_context * wanted if count is None else count
        self.limits = limits
        self.selector = ContextSelector(
            wanted,
            max_among=limits.cosines["max_similarity_among"],
            max_known=limits.cosines["max_similarity_to"],
            known=limits.known_rows,
        )
        self.tries = 0
        self.asked = 0
        self.rejected: Counter[str] = Counter()
        self.chosen: list[int] = []  # numbers of the candidates that are kept
        self.origins: list[dict[str, Any]] = []
        self.names: list[str] = []

    def ask(self, least: int) -> int:
        """How many candidates to draw next, 0 when all is done. UserError when it is not and cannot be."""
        selector = self.selector
        if selector.is_full or (self.takes_all and self.tries == self.max_tries and len(selector)):
            return 0
        left = self.max_tries - self.tries
        if left == 0 or (self.is_endless and self.tries >= HOPELESS and not len(selector)):
            raise UserError(self._why())
        rate = (len(selector) + 1) / (self.tries + 1)
        needed = math.ceil(SPARE * (selector.wanted - len(selector)) / rate)
        return min(max(min(needed, self.tries), least), left)  # at most twice as many as before: the rate may fall

    def look_at(self, candidates: Candidates) -> None:
        """Keep what may be kept of the candidates asked for."""
        verdicts = iter(self.selector.offer(candidates.rows))
        for number, origin in enumerate(candidates.origins, start=self.asked):
            if len(self.chosen) == self.selector.wanted:
                break  # all were found before this one
            reason = candidates.reasons[number - self.asked] or next(verdicts)
            self.tries += 1
            if reason:
                self.rejected[reason] += 1
                continue
            name = NUMBERED.format(len(self.chosen))
            self.names.append(name if candidates.names is None else candidates.names[number - self.asked])
            self.chosen.append(number)
            self.origins.append(origin)
        self.asked += len(candidates.origins)
        if self.rejected and not self.selector.is_full:
            log.info("%d of %d contexts after %d tries", len(self.selector), self.selector.wanted, self.tries)

    def _why(self) -> str:
        """What to say when the search ends without enough."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.rejected.most_common())
        common = self.rejected.most_common(1)[0][0]
        head = f"{len(self.selector)} of {self.selector.wanted} contexts found in {self.tries} tries ({reasons})"
        if common not in LIMITS:
            return f"n_contexts: {head}; look at what the model draws, and at the filters in source.align"
        key, limit = LIMITS[common], self.selector.limits[common]
        return (
            f"{key}: {head}; the limit is {limit:.3f}, and the cosine that it holds against is "
            f"{self.selector.typical_nearest(common):.3f} for the median candidate: raise it, ask for fewer contexts "
            "(n_contexts), or allow more tries (tries_per_context)"
        )


def _write(
    settings: ContextSettings, source_settings: dict[str, Any], source: ContextSource, search: ContextSearch
) -> list[str]:
    """Write the files, the record last."""
    folder, rows, names, limits = Path(settings.output_dir), search.selector.rows, search.names, search.limits
    lines = [{"name": n, "candidate": c, **o} for n, c, o in zip(names, search.chosen, search.origins, strict=True)]
    write_text(folder / ORIGINS, "".join(json.dumps(line) + "\n" for line in lines))
    source.finish(folder, names, search.chosen)
    write_rows(folder / "contexts.npy", folder / "context_names.txt", names, rows)
    nearest = {"among": nearest_cosines(rows, rows, skip_own=True)}
    if limits.known_rows is not None:
        nearest["to_training"] = nearest_cosines(rows, limits.known_rows)
    record = {
        **_description(settings, source, limits.inputs),
        "source": source_settings,
        "files": {key: value for key, value in asdict(settings).items() if key in limits.inputs},
        "contexts": len(names),
        "width": rows.shape[1],
        "tries": search.tries,
        "rejected": dict(search.rejected),
        "limits": limits.cosines,
        "calibration": {key: asdict(found) for key, found in limits.measured.items()},
        "nearest_cosine": {
            key: {"median": float(np.median(values)), "max": float(values.max())} for key, values in nearest.items()
        },
    }
    write_json(folder / RECORD, record)
    source.clean()
    log.info(
        "%d contexts, %d wide, after %d tries; the nearest other one at cosine %.3f (median), %.3f (most): %s",
        *(len(names), rows.shape[1], search.tries, np.median(nearest["among"]), nearest["among"].max()),
        folder / "contexts.npy",
    )
    return names
