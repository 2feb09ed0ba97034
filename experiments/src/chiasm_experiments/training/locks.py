"""Locks that end with their process, and signs of life for where locks do not reach."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO

SIGN_SECONDS = 10.0
"""How often a process shows that it lives."""
QUIET_SECONDS = 60.0
"""Without a sign of life for so long, a process on another machine is taken for dead."""


class FileLock:
    """A file lock that ends with its process.

    Args:
        path: of the file, which stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.works = True
        """False once the file system was found to have no locks."""
        self._file: IO[bytes] | None = None

    def take(self, *, wait: bool = False) -> bool:
        """Whether the lock is this process's now; where there are no locks it always is.

        Args:
            wait: until it is free.
        """
        if self._file is None and self.works:
            file = self.path.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file.close()
                return False
            except OSError:
                file.close()
                self.works = False
                return True
            self._file = file
        return True

    def free(self) -> None:
        """Gives the lock back."""
        if self._file is not None:
            # closing alone would leave it with child processes, which inherit the file
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None


class Signs:
    """Which files or folders were touched since they were first seen, by this machine's clock alone."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, float]] = {}
        """For each its last sign of life, and since when that has been the last."""

    def lives(self, path: Path, quiet: float) -> bool | None:
        """Whether a path shows that its process lives; None while that cannot be said.

        Args:
            path: what the process touches.
            quiet: seconds without a sign after which it is dead.

        Raises:
            FileNotFoundError: the path is gone.
        """
        sign = path.stat().st_mtime_ns
        first, since = self._seen.setdefault(path, (sign, time.monotonic()))
        if sign != first:
            return True
        return False if time.monotonic() - since > quiet else None
