"""Labelled unit vectors: what is asked of them, and which rows are whose.

Legend: N rows, K identities, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNIT_TOLERANCE = 1e-3  # of a squared length: what half precision leaves of a unit vector


@dataclass(frozen=True)
class Groups:
    """The rows of every identity: those of identity k are `order[bounds[k] : bounds[k + 1]]`, ascending."""

    order: np.ndarray  # (N,)
    bounds: np.ndarray  # (K + 1,)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, identity: int) -> np.ndarray:
        return self.order[self.bounds[identity] : self.bounds[identity + 1]]

    @property
    def sizes(self) -> np.ndarray:
        """(K,) how many rows each identity has."""
        return np.diff(self.bounds)


def group_rows(labels: np.ndarray, num_identities: int | None = None) -> Groups:
    """Sort rows by label (N,), whole numbers from 0; num_identities: K, else the highest label + 1.

    Raises ValueError for labels that are not such numbers.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels {labels.shape} {labels.dtype}: (N,) whole numbers are wanted")
    highest = int(labels.max(initial=-1))
    count = highest + 1 if num_identities is None else num_identities
    if highest >= count or labels.min(initial=0) < 0:
        raise ValueError(f"labels: {labels.min()}..{highest}; they lie in 0..{count - 1}")
    bounds = np.append(0, np.bincount(labels, minlength=count).cumsum())
    return Groups(np.argsort(labels, kind="stable"), bounds)


def check_unit_rows(rows: np.ndarray, name: str = "embeddings") -> None:
    """Raise ValueError unless `rows` are (N, D) finite floating-point vectors of length 1."""
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.floating):
        raise ValueError(f"{name} {rows.shape} {rows.dtype}: (N, D) floating-point rows are wanted")
    squared = np.einsum("nd,nd->n", rows, rows)
    if not (is_unit := np.abs(squared - 1) <= UNIT_TOLERANCE).all():  # False where not finite
        bad = int(np.argmin(is_unit))
        raise ValueError(
            f"{name}: {np.count_nonzero(~is_unit)} of {len(rows)} rows are not unit vectors, the first is row {bad} "
            f"of length {np.sqrt(squared[bad]):g}"
        )


def check_labelled(rows: np.ndarray, labels: np.ndarray, name: str = "embeddings") -> None:
    """As check_unit_rows, and a label for each row."""
    check_unit_rows(rows, name)
    if len(labels) != len(rows):
        raise ValueError(f"{name}: {len(rows)} rows, but {len(labels)} labels")
