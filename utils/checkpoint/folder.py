"""The checkpoints of one training run."""

import re
from pathlib import Path
from typing import Any

from utils.checkpoint.files import load_torch, save_torch
from utils.config import UserError
from utils.logging import get_logger

log = get_logger(__name__)


class CheckpointFolder:
    """The checkpoints of one run: `step_<number>.ckpt`, the last `keep` of them and those named as milestones."""

    PATTERN = re.compile(r"^step_(\d+)\.ckpt$")

    def __init__(self, folder: str | Path, keep: int = 2, milestones: tuple[int, ...] = ()) -> None:
        if keep < 1:
            raise UserError(f"keep_checkpoints: {keep}; at least one checkpoint must be kept")
        self.folder, self.keep, self.milestones = Path(folder), keep, set(milestones)
        self._damaged: set[Path] = set()  # found by load_latest; none of them counts as kept

    def paths(self) -> list[Path]:
        """All complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), p) for p in self.folder.iterdir() if (match := self.PATTERN.match(p.name))]
        return [path for _, path in sorted(found)]

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state of `step` (whole or not at all), then delete what is older than the last `keep`."""
        path = save_torch({**state, "step": step}, self.folder / f"step_{step:08d}.ckpt")
        good = [p for p in self.paths() if p not in self._damaged or p == path]
        for old in good[: -self.keep]:
            if int(self.PATTERN.match(old.name)[1]) not in self.milestones:
                old.unlink()
        return path

    def load_latest(self) -> dict[str, Any] | None:
        """The newest readable state, or None in a new folder; see `load_newest`."""
        newest = self.load_newest()
        return None if newest is None else newest[1]

    def load_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """File and state of the newest readable checkpoint, or None in a new folder. A damaged file is named in a
        warning and passed over; UserError when there are checkpoints and none can be read."""
        paths = self.paths()
        for path in reversed(paths):
            try:
                return path, load_torch(path)
            except UserError as error:
                self._damaged.add(path)
                log.warning("%s; going back to the checkpoint before it", error)
        if paths:
            raise UserError(f"{self.folder}: none of its {len(paths)} checkpoints can be read")
        return None
