"""Several drivers of one study: who lives, and one at a time where they change what all of them read."""

from __future__ import annotations

import os
import platform
import secrets
import threading
from pathlib import Path
from typing import Self

from optuna.storages.journal import JournalFileSymlinkLock

from chiasm_experiments.study.folder import DRIVERS
from chiasm_experiments.training.locks import QUIET_SECONDS, SIGN_SECONDS, FileLock, Signs


class ProcessLock:
    """Held by one thread of one process at a time, and free again when that dies; may be taken again by its holder.

    Also what Optuna takes for the lock of a journal. Where the file system has no locks it is one of Optuna's, which a
    process that was killed leaves for 30 s.

    Args:
        path: of the file, which stays.
    """

    def __init__(self, path: Path) -> None:
        self._file = FileLock(path)
        self._link = JournalFileSymlinkLock(str(path))
        self._thread = threading.RLock()
        self._depth = 0

    def acquire(self) -> bool:
        """Waits until the lock is this thread's."""
        self._thread.acquire()
        try:
            if self._depth == 0:
                self._file.take(wait=True)
                if not self._file.works:
                    self._link.acquire()
        except BaseException:
            self._thread.release()
            raise
        self._depth += 1
        return True

    def release(self) -> None:
        """Gives it back, once it was released as often as taken."""
        self._depth -= 1
        try:
            if self._depth == 0:
                if not self._file.works:
                    self._link.release()
                self._file.free()
        finally:
            self._thread.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Presence:
    """That this process drives a study, as the others can see; made while the study's lock is held.

    Args:
        folder: of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / DRIVERS
        self.folder.mkdir(parents=True, exist_ok=True)
        self._signs = Signs()
        self.id = f"{platform.node()}.{os.getpid()}.{secrets.token_hex(3)}"
        self._lock = FileLock(self.folder / self.id)
        self._lock.take()
        (self.folder / self.id).touch()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name="presence", daemon=True)
        self._thread.start()

    def lives(self, driver: str) -> bool:
        """Whether a driver lives. On this machine its lock says so at once; elsewhere it must be quiet for a while."""
        file = self.folder / driver
        if not file.is_file():
            return False
        if driver.rsplit(".", 2)[0] == platform.node():
            lock = FileLock(file)
            taken = lock.take()
            lock.free()
            if lock.works:
                return not taken
        try:
            return self._signs.lives(file, QUIET_SECONDS) is not False
        except FileNotFoundError:
            return False

    def others(self) -> list[str]:
        """The other drivers that live."""
        return [name for name in self._names() if name != self.id and self.lives(name)]

    def seen(self, driver: str) -> float | None:
        """When a driver last showed that it lives, in seconds of the epoch."""
        try:
            return (self.folder / driver).stat().st_mtime
        except FileNotFoundError:
            return None

    def forget_dead(self) -> None:
        """Removes the files of drivers that died; the study's lock is held, and nothing is theirs any more."""
        for dead in [name for name in self._names() if name != self.id and not self.lives(name)]:
            (self.folder / dead).unlink(missing_ok=True)

    def close(self) -> None:
        """Says goodbye."""
        self._ended.set()
        self._thread.join()
        (self.folder / self.id).unlink(missing_ok=True)
        self._lock.free()

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def _show(self) -> None:
        while not self._ended.wait(SIGN_SECONDS):
            (self.folder / self.id).touch()
