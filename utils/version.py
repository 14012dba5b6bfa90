"""Which code is running."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "uiface"


def code_version() -> str | None:
    """The git commit of this project, with `-modified` where files differ from it; else the version of the installed
    package; None where neither is known."""
    if _git("rev-parse", "--show-toplevel") == str(ROOT):  # not of a repository that this code lies inside of
        commit = _git("rev-parse", "HEAD")
        if commit:
            return f"{commit}-modified" if _git("status", "--porcelain", "--untracked-files=no") else commit
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    """What git answers; empty where it is not there or fails."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
