"""Results of stages that runs have in common: each is trained once, lies in one folder, and is referred to.

STORE/KEY/                     a finished stage: weights, result.json, metrics.jsonl; it appears whole, by a rename
STORE/.KEY@HOST/               one that a run trains, with its checkpoints
STORE/.KEY.lock                held by that run, and free again when it dies: another then goes on from there
RUN/stages/NAME/shared.json    where the result of a run's stage lies
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from chiasm_experiments.training.files import has_parts, read_json, write_json
from chiasm_experiments.training.guide import StoppedError
from chiasm_experiments.training.locks import QUIET_SECONDS, SIGN_SECONDS, FileLock, Signs
from chiasm_experiments.training.workers import Workers

T = TypeVar("T")

REFERENCE = "shared.json"
POLL_SECONDS = 0.5


def stage_folder(own: Path) -> Path:
    """Where the result of a run's stage lies: its own folder, or the one that it refers to.

    Raises:
        CheckpointError: the reference is damaged.
    """
    file = own / REFERENCE
    return Path(os.path.normpath(own / read_json(file)["folder"])) if file.is_file() else own


def refer(own: Path, key: str, folder: Path) -> None:
    """Makes a stage's own folder refer to a shared result; the path is relative, so that a study can be moved."""
    shutil.rmtree(own, ignore_errors=True)
    write_json(own / REFERENCE, {"key": key, "folder": os.path.relpath(folder, own)})


@dataclass(slots=True)
class Claim:
    """A stage in the store: finished, or this run's to train.

    Args:
        folder: where its result lies, or where to train it.
        result: where it lies in the end.
        workers: all of them hold an equal claim.
    """

    folder: Path
    result: Path
    workers: Workers
    _shown: float = field(default_factory=time.monotonic)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return has_parts(self.folder)

    def alive(self) -> None:
        """Called by the first worker after each step."""
        if time.monotonic() - self._shown > SIGN_SECONDS:
            self._shown = time.monotonic()
            os.utime(self.folder)

    def publish(self) -> bool:
        """Moves what was trained to its place; False where another run's equal result stood there already."""
        first = True
        if self.workers.first and self.folder != self.result:
            try:
                self.folder.rename(self.result)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                shutil.rmtree(self.folder)
                first = False
        self.folder = self.result
        return bool(_from_first(self.workers, first))


@contextmanager
def claim(
    store: Path,
    key: str,
    workers: Workers,
    waiting: Callable[[], None],
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Claim]:
    """The stage of a key, finished by whoever trains it or for this run to train; called on every worker.

    A run that finds another at work waits, and goes on from that one's last checkpoint if it dies. Where the file
    system's locks do not reach another machine, or do not work at all, both train in folders of their own, and the
    first result counts.

    Args:
        store: the folder of all shared stages.
        key: of the stage.
        workers: this worker among all.
        waiting: told on the first worker, again and again, while another run trains the stage.
        stopping: asked on the first worker meanwhile whether to wait no longer.

    Raises:
        StoppedError: `stopping` said so.
    """
    seeker = _Seeker(store, key) if workers.first else None
    with contextlib.ExitStack() as held:
        if seeker is not None:
            store.mkdir(parents=True, exist_ok=True)
            held.callback(seeker.lock.free)
        while True:
            found = _from_first(workers, seeker.look() if seeker is not None else None)
            if found is not None:
                break
            if _from_first(workers, workers.first and stopping()):
                raise StoppedError("stopped while another run trained a stage that this one needs")
            if workers.first:
                waiting()
            time.sleep(POLL_SECONDS)
        yield Claim(Path(found), store / key, workers)


class _Seeker:
    """Looks for a stage's folder on behalf of one run."""

    def __init__(self, store: Path, key: str) -> None:
        self.store = store
        self.key = key
        self.lock = FileLock(store / f".{key}.lock")
        self.signs = Signs()

    def look(self) -> str | None:
        """The folder of the finished stage or the one to train it in; None while another run trains it."""
        result = self.store / self.key
        if not has_parts(result) and not self.lock.take():
            return None
        if has_parts(result):  # it may have been finished just before the lock was free
            return str(result)
        # without locks no folder can be told from that of a live run in another process
        owner = platform.node() if self.lock.works else f"{platform.node()}-{os.getpid()}"
        own = self.store / f".{self.key}@{owner}"
        others = [] if own.is_dir() else sorted(self.store.glob(f".{self.key}@*"))
        lives = [self._lives(other) for other in others]
        if None in lives and True not in lives:
            return None
        for other, living in zip(others, lives, strict=True):
            if living is False:
                with contextlib.suppress(OSError):  # another run was quicker
                    other.rename(own)
                    break
        own.mkdir(exist_ok=True)
        return str(own)

    def _lives(self, folder: Path) -> bool | None:
        """Whether a folder's run shows that it lives; None while that cannot be said."""
        try:
            return self.signs.lives(folder, QUIET_SECONDS)
        except FileNotFoundError:  # it was published or taken over
            return True


def _from_first(workers: Workers, value: T) -> T:
    """The first worker's value, on every worker."""
    if workers.size == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]
