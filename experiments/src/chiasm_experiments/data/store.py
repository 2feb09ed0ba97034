"""Features of frozen encoders on the disk, by content, shared by all processes of a machine.

    FOLDER/IDENTITY/identity.json    what gave these features: weights, layers, preprocessing, number format
    FOLDER/IDENTITY/NAME.data        packs of features as raw tensors, and
    FOLDER/IDENTITY/NAME.index       where in the pack each image's stand (see `packs`)
    FOLDER/IDENTITY/claims           locked byte by byte: what some process is computing just now

Nothing is overwritten and nothing is trusted: an entry counts from the moment its record stands in the index, and what
does not have its checksum is struck out. Locks are the kernel's, which a killed process no longer holds.

Shape letters: V views of one image, L layers, N tokens, D width.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm_experiments.data.packs import Entry, Pack, PackWriter

LOOK_SECONDS = 10.0
"""How long a process goes without looking for packs that others have made or dropped, while it finds what it asks."""


def default_folder() -> Path:
    """`$CHIASM_CACHE`, else `chiasm` in the user's folder of caches."""
    named = os.environ.get("CHIASM_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chiasm"


def digest_of(key: str) -> bytes:
    """16 bytes that stand for an image's key."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


class FeatureStore:
    """A folder of features, limited in size.

    Args:
        folder: made where it is missing.
        limit: bytes; packs that were not used for longest are dropped beyond it.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        # many packs, so that dropping one frees little; few, so that each can be kept open
        self.pack_bytes = min(2**32, max(2**16, limit // 32))
        self._room = 0

    def shelf(self, identity: str, view: tuple[int, int, int], dtype: torch.dtype, share: float = 1.0) -> Shelf:
        """The features of one encoder.

        Args:
            identity: equal only for equal weights, layers, preprocessing and number format.
            view: the shape of one view's features, `(L, N, D)`.
            dtype: their number format.
            share: of the images that are kept, where not all fit: those whose digest is below it, the same in every
                process.
        """
        about = json.dumps({"identity": identity, "view": view, "dtype": str(dtype)}, indent=1)
        folder = self.folder / hashlib.sha256(about.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), (folder / "identity.json").open("x") as file:
            file.write(about)
        return Shelf(self, folder, view, dtype, share)

    def make_room(self, size: int) -> None:
        """Called before bytes are written: drops packs until they fit."""
        self._room -= size
        if self._room >= 0:
            return
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            packs = sorted(_packs(self.folder), key=lambda pack: pack[0])
            free = self.limit - size - sum(size for _, size, _ in packs)
            # some space ahead, so that this is looked at rarely
            wanted = min(self.limit // 64, self.pack_bytes)
            while packs and free < wanted:
                _, freed, index = packs.pop(0)
                index.unlink(missing_ok=True)  # first, so that no record is left without its bytes
                index.with_suffix(".data").unlink(missing_ok=True)
                free += freed
            # other processes write as well: each looks again after its part of what is free
            self._room = max(0, min(free, wanted) // 4)

    @property
    def bytes(self) -> int:
        """What all packs take."""
        return sum(size for _, size, _ in _packs(self.folder))


@dataclass(frozen=True, slots=True)
class Found:
    """Where an image's features stand."""

    digest: bytes
    pack: Pack
    row: int
    entry: Entry


class Shelf:
    """What one encoder gave, by image. Made by `FeatureStore.shelf`."""

    def __init__(
        self, store: FeatureStore, folder: Path, view: tuple[int, int, int], dtype: torch.dtype, share: float
    ) -> None:
        self.store = store
        self.folder = folder
        self.view = view
        self.dtype = dtype
        self.share = share
        self.view_bytes = view[0] * view[1] * view[2] * dtype.itemsize
        self._packs: dict[str, Pack] = {}
        self._numbers: list[Pack | None] = []
        self._places: dict[bytes, int] = {}
        self._looked = -LOOK_SECONDS
        self._touched: dict[str, float] = {}
        self._writer: PackWriter | None = None
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Shelf, (self.store, self.folder, self.view, self.dtype, self.share)

    def forked(self) -> None:
        """To be called first in a process that was forked: no thread that held the lock lives there."""
        self._lock = threading.RLock()

    # reading

    def keeps(self, key: str) -> bool:
        """Whether an image belongs to the share that is kept."""
        return int.from_bytes(digest_of(key)[8:], "little") < self.share * 2**64

    def views(self, key: str) -> int | None:
        """How many views of an image have their features here; None where they are not known."""
        found = self._find(digest_of(key))
        return None if found is None else found.entry.size // self.view_bytes

    def find(self, keys: Iterable[str]) -> dict[str, Found]:
        """Where the features of images stand, of those that are known; those of one pack behind each other."""
        found = {key: self._find(digest_of(key)) for key in keys}
        known = [(key, item) for key, item in found.items() if item is not None]
        return dict(sorted(known, key=lambda pair: pair[1].pack.path.name))

    def read(self, found: Sequence[Found], into: Tensor) -> list[bool]:
        """Reads features to where they are wanted; False for each that is gone by now.

        Args:
            found: as `find` says, in its order.
            into: `[V, L, N, D]` on the CPU, V the views of them all.
        """
        array: Any = into.flatten().view(torch.uint8).numpy()
        whole: list[bool] = []
        first = 0
        for _, group in groupby(found, key=lambda item: item.pack.path.name):
            items = list(group)
            size = sum(item.entry.size for item in items)
            pack = items[0].pack
            right = pack.read([item.entry for item in items], array[first : first + size])
            first += size
            whole += right
            now = time.monotonic()
            if any(right) and now - self._touched.get(pack.path.name, -60) >= 60:
                self._touched[pack.path.name] = now
                pack.touch()
        for item, kept in zip(found, whole, strict=True):
            if not kept:
                item.pack.strike(item.row)
                self._places.pop(item.digest, None)
        return whole

    def get(self, key: str) -> Tensor | None:
        """An image's features, `[V, L, N, D]` on the CPU; None where they are not known."""
        found = list(self.find([key]).values())
        if not found:
            return None
        read_VLND = torch.empty(found[0].entry.size // self.view_bytes, *self.view, dtype=self.dtype)
        return read_VLND if self.read(found, read_VLND)[0] else None

    def look(self) -> None:
        """Takes note of what processes have written and dropped since."""
        with self._lock:
            self._look()

    def _look(self) -> None:
        self._looked = time.monotonic()
        try:
            listing = [(item.name, item.path, item.stat().st_size) for item in os.scandir(self.folder)]
        except FileNotFoundError:  # dropped while it was listed; the next look sees it
            return
        names = set()
        for name, path, size in listing:
            if not name.endswith(".index"):
                continue
            names.add(name)
            pack = self._packs.get(name)
            if pack is None:
                try:
                    pack = Pack(Path(path))
                except OSError:
                    continue
                self._packs[name] = pack
                self._numbers.append(pack)
            if size > pack.seen * 64:
                number = self._numbers.index(pack)
                for row, digest in pack.news(size):
                    self._places[digest] = number << 32 | row
        for name in self._packs.keys() - names:
            # not closed here: what was found in it is still read, by this thread or another
            self._numbers[self._numbers.index(self._packs.pop(name))] = None

    def _find(self, digest: bytes, *, look: bool = True) -> Found | None:
        """Where an entry stands; one that is not known yet is looked for."""
        place = self._places.get(digest)
        if look and (place is None or time.monotonic() - self._looked > LOOK_SECONDS):
            self.look()
            place = self._places.get(digest)
        if place is None:
            return None
        pack, row = self._numbers[place >> 32], place & 0xFFFFFFFF
        entry = pack.entry(row) if pack else None
        if pack is None or entry is None:
            self._places.pop(digest, None)
            return None
        return Found(digest, pack, row, entry)

    # writing

    def put(self, key: str, features_VLND: Tensor) -> None:
        """Keeps an image's features, which lie on the CPU; says so once where the disk takes no more."""
        data = _bytes(features_VLND.to(self.dtype).contiguous())
        try:
            with self._lock:
                self.store.make_room(len(data))
                self._appendable().append(digest_of(key), data)
        except OSError as error:
            warnings.warn(f"the feature cache at {str(self.store.folder)!r} takes no more: {error}", stacklevel=2)
            self.share = 0.0
            self._end()

    def close(self) -> None:
        """Gives all files back; the next call opens them again."""
        with self._lock:
            self._end()
            for pack in self._packs.values():
                pack.close()
            self._packs.clear()
            self._numbers.clear()
            self._places.clear()

    def _end(self) -> None:
        """Lets another process append to the pack that this one began."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _appendable(self) -> PackWriter:
        """The pack to append to: the one begun, one that another process left unfinished, or a new one."""
        if self._writer is not None and (self._writer.size >= self.store.pack_bytes or self._writer.gone):
            self._end()
        if self._writer is None:
            for _, size, index in _packs(self.folder.parent, self.folder.name):
                if size < self.store.pack_bytes:
                    with contextlib.suppress(OSError):
                        self._writer = PackWriter(index)
                        return self._writer
            self._writer = PackWriter(self.folder / f"{uuid.uuid4().hex}.index")
        return self._writer

    # who computes what

    def claim(self, keys: Iterable[str]) -> list[str]:
        """Of these keys those that this process is to compute: unknown, and claimed by no other process."""
        claims, mine = _claims(str(self.folder), os.getpid()), []
        for key in keys:
            if claims.take(digest_of(key)):
                mine.append(key)
        self.look()  # what another process finished between our look and our claim
        known = {key for key in mine if self._find(digest_of(key), look=False) is not None}
        self.release(known)
        return [key for key in mine if key not in known]

    def release(self, keys: Iterable[str]) -> None:
        """Gives claims back: the features stand on the shelf, or could not be computed."""
        claims = _claims(str(self.folder), os.getpid())
        for key in keys:
            claims.give(digest_of(key))


class _Claims:
    """Locks on single bytes of an empty file, each byte standing for an image; they end with their process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, digest: bytes) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._byte(digest))
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks: processes then compute the same, and either's result is taken
            pass
        return True

    def give(self, digest: bytes) -> None:
        with contextlib.suppress(OSError):
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._byte(digest))

    @staticmethod
    def _byte(digest: bytes) -> int:
        return int.from_bytes(digest[:8], "little") >> 2


@cache
def _claims(folder: str, process: int) -> _Claims:
    """One open file in a process: closing any other would end all its locks on the file. A fork has no claim."""
    return _Claims(Path(folder) / "claims")


def _packs(root: Path, folder: str = "*") -> Iterator[tuple[float, int, Path]]:
    """When each pack was last used, its bytes, and its index."""
    for data in root.glob(f"{folder}/*.data"):
        with contextlib.suppress(FileNotFoundError):
            status = data.stat()
            yield status.st_mtime, status.st_size, data.with_suffix(".index")


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(array)
