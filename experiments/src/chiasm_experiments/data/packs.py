"""Pairs of files that grow by appending: raw entries in `NAME.data`, and a record for each in `NAME.index`.

One process appends to a pack, any number read it. An entry's record is written after its bytes, so that a process that
is killed leaves bytes without a record, which nobody sees. After a power cut pages may be missing: the checksum tells.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RECORD = 64
"""Bytes of a record: eight little-endian words, the digest in the first two and a check of the others in the last."""
_MAGIC = np.uint64(0x43484941534D0001)  # a page of zeros is no record
_ALIGN = 64
_WORDS = struct.Struct("<8Q")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where an entry's bytes stand in its pack."""

    offset: int
    size: int
    checksum: int


def checksum(data: memoryview) -> int:
    """The sum of the words: a lost page, a cut end or one changed bit changes it. About ten times as fast as CRC-32."""
    words = len(data) // 8 * 8
    total = int(np.frombuffer(data[:words], "<u8").sum(dtype=np.uint64)) if words else 0
    return (total + int.from_bytes(data[words:], "little")) % 2**64


class Pack:
    """A pack to read from.

    Args:
        path: of the index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen = 0
        """Records looked at so far."""
        with ExitStack() as opened:
            self._index = _open(opened, path, os.O_RDWR)
            self._data = _open(opened, path.with_suffix(".data"), os.O_RDWR)
            self.close = weakref.finalize(self, opened.pop_all().close)
            """Gives its files back, as dropping the last reference does."""
        self._mapped: np.ndarray | None = None

    def news(self, size: int) -> Iterator[tuple[int, bytes]]:
        """Row and digest of each valid record behind those seen, in an index of `size` bytes."""
        first, last = self.seen, size // RECORD
        self.seen = max(first, last)
        if last <= first:
            return
        raw = os.pread(self._index, (last - first) * RECORD, first * RECORD)
        raw = raw[: len(raw) // RECORD * RECORD]
        for row in np.flatnonzero(_valid(raw)):
            yield first + int(row), raw[row * RECORD : row * RECORD + 16]

    def entry(self, row: int) -> Entry | None:
        """What a record says; None where it has been struck out."""
        raw = os.pread(self._index, RECORD, row * RECORD)
        if len(raw) < RECORD:
            return None
        *words, check = _WORDS.unpack(raw)
        return Entry(*words[2:5]) if check == (sum(words) + int(_MAGIC)) % 2**64 else None

    def read(self, entries: Sequence[Entry], into: np.ndarray) -> list[bool]:
        """Reads entries to where they are wanted, one behind the other; False for each that is damaged.

        All of them by few operations on whole arrays, during which Python's other threads go on: one that has a GPU to
        keep busy would wait for every small step between.

        Args:
            entries: at least one.
            into: uint8, as long as they are together.
        """
        size = os.fstat(self._data).st_size
        if any(entry.offset + entry.size > size for entry in entries):  # the file was cut
            return [entry.offset + entry.size <= size and self._read([entry], part)[0]
                    for entry, part in zip(entries, _parts(into, entries), strict=True)]  # fmt: skip
        return self._read(entries, into)

    def _read(self, entries: Sequence[Entry], into: np.ndarray) -> list[bool]:
        # the file as rows of a length that divides every entry; features have a whole number of 64 bytes
        step = math.gcd(*(entry.offset for entry in entries), *(entry.size for entry in entries))
        ends = max(entry.offset + entry.size for entry in entries)
        mapped = self._mapped  # which another thread may replace meanwhile, by a shorter one too
        if mapped is None or len(mapped) < ends:
            mapped = self._mapped = np.frombuffer(mmap.mmap(self._data, 0, access=mmap.ACCESS_READ), np.uint8)
        rows = [np.arange(entry.offset // step, (entry.offset + entry.size) // step) for entry in entries]
        # `clip`, which changes no index here, lets numpy write where it is wanted without a copy between
        np.take(
            mapped[: len(mapped) // step * step].reshape(-1, step),
            np.concatenate(rows),
            axis=0,
            out=into.reshape(-1, step),
            mode="clip",
        )
        if step % 8:
            return [checksum(part.data) == entry.checksum
                    for entry, part in zip(entries, _parts(into, entries), strict=True)]  # fmt: skip
        sums = into.reshape(-1, step).view("<u8").sum(axis=1, dtype=np.uint64)
        starts = np.cumsum([0, *map(len, rows[:-1])])
        found = np.add.reduceat(sums, starts, dtype=np.uint64)
        return [int(one) == entry.checksum for one, entry in zip(found, entries, strict=True)]

    def strike(self, row: int) -> None:
        """Makes a record invalid for every process, because its entry is damaged."""
        os.pwrite(self._index, bytes(RECORD), row * RECORD)

    def touch(self) -> None:
        """Notes that the pack is in use."""
        os.utime(self._data)


class PackWriter:
    """A pack to append to, which no other process appends to while this one lives.

    Args:
        path: of the index; a new pack is made where there is none.

    Raises:
        BlockingIOError: another process appends to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as opened:
            self._data = _open(opened, path.with_suffix(".data"), os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._index = _open(opened, path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            self.close = weakref.finalize(self, opened.pop_all().close)
            """Lets another process append."""
        # what a killed writer left behind its last record
        os.ftruncate(self._index, os.fstat(self._index).st_size // RECORD * RECORD)
        self.size = os.fstat(self._data).st_size

    @property
    def gone(self) -> bool:
        """Whether the pack has been dropped from the folder."""
        return os.fstat(self._index).st_nlink == 0 or os.fstat(self._data).st_nlink == 0

    def append(self, digest: bytes, data: memoryview) -> None:
        """Writes an entry, then its record."""
        offset = -(-self.size // _ALIGN) * _ALIGN
        done = 0
        while done < len(data):
            done += os.pwrite(self._data, data[done:], offset + done)
        self.size = offset + len(data)
        words = np.zeros(8, "<u8")
        words[:2] = np.frombuffer(digest, "<u8")
        words[2:5] = offset, len(data), checksum(data)
        words[7:] = words[:7].sum(dtype=np.uint64, keepdims=True) + _MAGIC
        os.write(self._index, words.tobytes())


def _open(opened: ExitStack, path: Path, flags: int) -> int:
    file = os.open(path, flags, 0o666)
    opened.callback(os.close, file)
    return file


def _valid(raw: bytes) -> np.ndarray:
    words = np.frombuffer(raw, "<u8").reshape(-1, 8)
    found: np.ndarray = words[:, 7] == words[:, :7].sum(axis=1, dtype=np.uint64) + _MAGIC
    return found


def _parts(array: np.ndarray, entries: Sequence[Entry]) -> list[np.ndarray]:
    return np.split(array, np.cumsum([entry.size for entry in entries[:-1]]))
