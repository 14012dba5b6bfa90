"""Which version of this project is running."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def code_version(root: Path = ROOT) -> str:
    """The version in pyproject.toml, in a git checkout with the commit: `0.1.0+g3667e6f`, `.dirty` if files differ."""
    found = re.search(r'^version = "(.+)"$', (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    version = found[1] if found else "unknown"
    commit = _git(root, "describe", "--always", "--dirty=.dirty", "--exclude=*")
    # The project may lie in somebody else's repository, whose commits say nothing of it
    if commit is None or Path(_git(root, "rev-parse", "--show-toplevel") or "/").resolve() != root.resolve():
        return version
    return f"{version}+g{commit}"


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None where git or the repository is not there."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
