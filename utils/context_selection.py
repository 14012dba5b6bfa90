"""Which new contexts are kept: first come, first kept, none too near to another or to a known identity.

Legend: n candidates, D width. Candidates are unit rows. What is kept depends on the order of the candidates alone, not
on how many are offered at once.
"""

import numpy as np

from utils.similarity import ROWS_AT_ONCE, nearest_cosines

NEAR_ANOTHER, NEAR_KNOWN = "near another context", "near a training identity"
# Cosines of float32 rows are off by less: the limit holds however a reader computes them.
ROUNDING = 1e-6
# Cosines so near to the limit are computed again in float64, so that rounding, which depends on how many rows are
# multiplied at once, does not decide.
DOUBTFUL = 1e-5


class ContextSelector:
    """Keeps the first `wanted` candidates that stay under the limits.

    max_among: highest cosine between two that are kept; None: no limit.
    max_known: highest cosine with any row of `known` (m, D); None: no limit.
    rounding: how far below its limit a cosine has to stay.
    """

    def __init__(
        self,
        wanted: int,
        *,
        max_among: float | None = None,
        max_known: float | None = None,
        known: np.ndarray | None = None,
        rounding: float = ROUNDING,
    ) -> None:
        if (max_known is None) != (known is None):
            raise ValueError("max_known and known: a limit and what it holds against are given together")
        self.wanted = wanted
        self.limits = {NEAR_ANOTHER: max_among, NEAR_KNOWN: max_known}
        self._known, self._rounding = known, rounding
        self._kept: list[np.ndarray] = []
        self._stacked = np.empty((0, 0), np.float32)
        self._nearest: dict[str, list[np.ndarray]] = {NEAR_ANOTHER: [], NEAR_KNOWN: []}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def is_full(self) -> bool:
        """Whether all that are wanted have been found."""
        return len(self) >= self.wanted

    @property
    def rows(self) -> np.ndarray:
        """What is kept, float32 (k, D)."""
        if len(self._stacked) != len(self._kept):
            self._stacked = np.stack(self._kept)
        return self._stacked

    def offer(self, candidates: np.ndarray) -> list[str]:
        """Judge candidates (n, D) in their order until all that are wanted are found.

        Returns for each one judged why it is not kept (NEAR_ANOTHER or NEAR_KNOWN); empty: it is kept.
        """
        verdicts: list[str] = []
        candidates = np.asarray(candidates, np.float32)
        for start in range(0, len(candidates), ROWS_AT_ONCE):
            if self.is_full:
                break
            verdicts += self._judge(candidates[start : start + ROWS_AT_ONCE])
        return verdicts

    def typical_nearest(self, reason: str) -> float:
        """Median over all candidates of the cosine that `reason` limits; nan before any was judged."""
        values = self._nearest[reason]
        return float(np.median(np.concatenate(values))) if values else float("nan")

    def _judge(self, chunk: np.ndarray) -> list[str]:
        count = len(chunk)
        is_known = np.zeros(count, bool)
        max_among, max_known = self.limits.values()
        if max_known is not None:
            nearest = _nearest(chunk, self._known, max_known)
            is_known = nearest > max_known - self._rounding
            self._nearest[NEAR_KNOWN].append(nearest)
        among, limit, inner = np.full(count, -1.0), np.inf, None
        if max_among is not None:
            limit = max_among - self._rounding
            among = _nearest(chunk, self.rows, max_among) if self._kept else among
            precise = chunk.astype(np.float64)
            inner = precise @ precise.T  # (n, n)
        verdicts: list[str] = []
        for row in range(count):
            if self.is_full:
                break
            verdicts.append(NEAR_KNOWN if is_known[row] else NEAR_ANOTHER if among[row] > limit else "")
            if not verdicts[-1]:
                self._kept.append(chunk[row])
                if inner is not None:
                    np.maximum(among[row + 1 :], inner[row, row + 1 :], out=among[row + 1 :])
        if inner is not None:
            self._nearest[NEAR_ANOTHER].append(among[: len(verdicts)])
        return verdicts


def _nearest(chunk: np.ndarray, references: np.ndarray, limit: float) -> np.ndarray:
    """The highest cosine of each row (n, D) with any reference: float64 (n,), exact where it is near the limit."""
    nearest = nearest_cosines(chunk, references).astype(np.float64)
    doubtful = np.abs(nearest - limit) < DOUBTFUL
    if doubtful.any():
        nearest[doubtful] = nearest_cosines(chunk[doubtful].astype(np.float64), references)
    return nearest
