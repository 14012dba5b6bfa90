"""Stages of a long run: each one once, resumed when it was stopped, skipped when it is complete.

A stage runs scripts of the project as separate processes, as a user would. When it ends, a stamp in
`<output_dir>/stages` keeps its fingerprint (its settings, and the fingerprints of the stages before it), seconds,
commands and outcome. A stage whose stamp carries another fingerprint starts over; one that was stopped goes on, because
every script resumes.
"""

import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.checkpoint import write_json
from utils.config import UserError
from utils.logging import get_logger

ROOT = Path(__file__).resolve().parent.parent
PLAIN_VALUE = re.compile(r"[A-Za-z0-9_./+-][A-Za-z0-9_./+ -]*(?<! )")
RESERVED = ("null", "true", "false", "nan", "inf")
PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)

log = get_logger(__name__)


def to_text(value: Any) -> str:
    """A value in the grammar of Hydra's command line; strings are quoted where it needs quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(to_text(v) for v in value)}]"
    if isinstance(value, (str, Path)):
        text = str(value)
        if PLAIN_VALUE.fullmatch(text) and text.lower() not in RESERVED:
            return text
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return repr(value)


def overrides(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`{"training": {"lr": 0.1}}` => `["training.lr=0.1"]`; keys that hold dots or @ pass as they stand."""
    found: list[str] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found += overrides(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}={to_text(value)}")
    return found


def path_for_scripts(path: str | Path) -> str:
    """A path as the scripts take it, which run in the project's folder: relative to that where it is below it."""
    path = Path(path).expanduser().resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class StageRecord:
    """What the stamp of a stage holds."""

    name: str
    title: str
    fingerprint: str
    complete: bool = False
    seconds: float = 0.0
    attempts: int = 1
    commands: list[str] = field(default_factory=list)
    outcome: str = ""


class Stages:
    """The stages of one folder, in order."""

    def __init__(self, output_dir: Path, threads: int, again: str) -> None:
        """`threads`: of all processes of a command together. `again`: the command that goes on, for messages."""
        self.output_dir = output_dir
        self.threads = threads
        self.again = again
        self.records: list[StageRecord] = []
        self.ran = 0
        self._chain = ""

    def run(
        self, name: str, title: str, settings: Any, folders: Sequence[str], work: Callable[["Commands"], str]
    ) -> StageRecord:
        """Run `work` unless its stamp says that it is complete under the same settings.

        settings: everything JSON-able that decides what the stage writes.
        folders: what it writes, relative to output_dir; removed first when an earlier run had other settings.
        work: gets a `Commands` and returns one line that says what came out.
        """
        self._chain = fingerprint(self._chain, name, settings)
        stamp = self.output_dir / "stages" / f"{len(self.records) + 1:02d}_{name}.json"
        record = StageRecord(name, title, self._chain)
        before = read_stamp(stamp)
        if before is not None and before.fingerprint == self._chain:
            if before.complete and all((self.output_dir / folder).exists() for folder in folders):
                self.records.append(before)
                return before
            record.attempts = 1 if before.complete else before.attempts + 1
        else:
            for folder in folders:
                remove(self.output_dir / folder)
        log.info("[%d] %s%s", len(self.records) + 1, title, " (going on)" if record.attempts > 1 else "")
        write_json(stamp, vars(record))
        commands = Commands(record, self.threads, self.again)
        start = time.perf_counter()
        record.outcome = work(commands)
        record.seconds = round(time.perf_counter() - start, 2)
        record.complete = True
        write_json(stamp, vars(record))
        log.info("[%d] %s: %s (%.0f s)", len(self.records) + 1, title, record.outcome, record.seconds)
        self.records.append(record)
        self.ran += 1
        return record


class Commands:
    """Starts the project's scripts for one stage and notes their command lines."""

    def __init__(self, record: StageRecord, threads: int, again: str) -> None:
        self.record = record
        self.threads = threads
        self.again = again

    def script(self, script: str, *settings: Mapping[str, Any] | Sequence[str], processes: int = 1) -> None:
        """`script` is a file (`main.py`) or a module (`-m recognition.train`); `settings` become its overrides, or are.

        More than one of `processes` start it by torchrun and share the threads among them. Raises UserError when it
        fails; the script itself has said why.
        """
        given = [overrides(part) if isinstance(part, Mapping) else part for part in settings]
        arguments = [*script.split(), *(item for part in given for item in part)]
        shown = shlex.join(["python", *arguments])
        if processes > 1:
            launcher = ["--nproc_per_node", str(processes)]
            shown = shlex.join(["torchrun", "--standalone", *launcher, *arguments])
            arguments = ["-m", "torch.distributed.run", "--standalone", *launcher, *arguments]
        self.record.commands.append(shown)
        log.info("    %s", shown)
        status = start(arguments, max(1, self.threads // processes))
        if status in (130, -2):
            raise KeyboardInterrupt
        if status != 0:
            raise UserError(
                f"stage {self.record.name!r}: its command ended with status {status}: {shown} -- once the "
                f"reason above is gone, the same {self.again} goes on from here"
            )


def start(arguments: Sequence[str], threads: int) -> int:
    """Run `python <arguments>` in the project's folder with so many threads; its exit status.

    On Linux it gets SIGTERM when this process dies, however that comes: the same command, given again, must not meet
    what the dead one had begun.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, preexec_fn=_end_with_parent()).returncode


def _end_with_parent() -> Callable[[], None] | None:
    """What a new process calls before its program; None where the system does not offer it."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec it would not be safe
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def read_stamp(path: Path) -> StageRecord | None:
    """The stamp at `path`, or None where there is none that can be read."""
    try:
        return StageRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
