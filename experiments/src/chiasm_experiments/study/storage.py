"""Where Optuna keeps its record of a study: a journal in the study's folder, or a database."""

from __future__ import annotations

import os
from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend

from chiasm.errors import ConfigError
from chiasm_experiments.study.folder import JOURNAL
from chiasm_experiments.study.presence import ProcessLock


class JournalLock(ProcessLock):
    """The lock of a journal, whose taker removes the line that a killed process or machine left unfinished.

    Optuna's own would join the next line to it, and then refuse the whole journal. It also ends with its process.

    Args:
        journal: the file.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(journal.with_name(f".{journal.name}.lock"))
        self.journal = journal

    def acquire(self) -> bool:
        """Waits for the lock, then mends the journal."""
        super().acquire()
        try:
            _end_with_a_line(self.journal)
        except BaseException:
            self.release()
            raise
        return True


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The storage of a study.

    Args:
        url: of a database; None: the journal in the study's folder.
        folder: of the study; it exists.

    Raises:
        ConfigError: the database cannot be used.
    """
    if url is None:
        journal = folder / JOURNAL
        return JournalStorage(JournalFileBackend(str(journal), JournalLock(journal)))
    try:
        return get_storage(url)
    except Exception as error:  # SQLAlchemy's, the driver's, or that one is missing: all say what is wrong
        raise ConfigError(f"storage: the database {url!r} cannot be used: {error}") from error


def _end_with_a_line(journal: Path) -> None:
    """Cuts a file behind its last whole line."""
    if not journal.is_file():
        return
    with journal.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if end == 0:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
