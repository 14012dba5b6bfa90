"""One run at a time in a folder."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from utils.config import UserError
from utils.logging import get_logger

log = get_logger(__name__)

LOCK_FILE = ".lock"
PATIENCE = 5.0  # seconds, for a run that is just being ended
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """An flock on `<folder>/.lock`, where its holder is named.

    The system lets go of it when the holding process ends, in whatever way: a file that a killed run left behind blocks
    nobody.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        """`key`: the setting that names the folder, for messages."""
        self.path, self.key = Path(folder) / LOCK_FILE, key
        self._file: TextIO | None = None

    def acquire(self) -> None:
        """Take the lock; the folder is made where missing.

        Raises UserError where another process holds it, OSError where the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + PATIENCE
        while self._file is None:
            file = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.key}: {self.path.parent} is in use by {holder}; wait for it to end, or give another"
                    ) from None
                time.sleep(0.1)
                continue
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                log.warning("%s: this file system knows no locks; take care that only one run uses it", self.key)
            if self._is_current(file):
                self._file = file
            else:
                file.close()  # its holder has deleted it while we waited
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def _is_current(self, file: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Delete the file and let go of it; nothing where the lock is not held."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
