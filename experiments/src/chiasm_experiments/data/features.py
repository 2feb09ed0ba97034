"""Features of one frozen encoder: remembered in the process, stored on the disk, or computed now.

Shape letters: I views of all images asked for, V views of one image, L layers, N tokens, D width.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from chiasm.features import Features, Grid
from chiasm_experiments.data.joining import Span, join
from chiasm_experiments.data.store import Shelf

POLL_SECONDS = 0.002
WAIT_SECONDS = 60.0
"""How long another process may take to compute what it has claimed, before this one no longer waits for it."""
WRITES = 4
"""Batches of features that may wait to be written, so that a slow disk cannot fill the memory."""
READERS = 4
"""Threads that read from the disk at once."""


class FeatureMemo:
    """Features of frozen encoders by encoder and image, the least recently used dropped beyond a size.

    One memo may serve many runs of a process: keys hold the encoder's identity.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._items: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    def get(self, key: tuple[str, str]) -> Tensor | None:
        """The features of one image's views, `[V, L, N, D]`, where they are remembered."""
        found = self._items.get(key)
        if found is not None:
            self._items.move_to_end(key)
        return found

    def put(self, key: tuple[str, str], features_VLND: Tensor) -> None:
        """Keeps the features of one image."""
        if key in self._items:
            return
        self._items[key] = features_VLND
        self.bytes += features_VLND.nbytes
        while self.bytes > self.limit:
            _, dropped = self._items.popitem(last=False)
            self.bytes -= dropped.nbytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image whose features are asked for.

    Args:
        key: of its content.
        row: its features where they have been fetched already.
        pixels: makes what `FrozenFeatures.encode` takes; called only where the features are to be computed.
    """

    key: str
    row: Span | None
    pixels: Callable[[], Tensor]


class FrozenFeatures:
    """Where one encoder's features come from.

    Args:
        encode: what `Wanted.pixels` gives for some images, one behind the other and on the device, to features.
        identity: equal only for equal weights, layers and preprocessing.
        grid: of the tokens.
        memo: those of this process; None: nothing is remembered.
        shelf: those on the disk; None: nothing is stored.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Features],
        identity: str,
        grid: Grid,
        memo: FeatureMemo | None,
        shelf: Shelf | None,
    ) -> None:
        self.encode = encode
        self.identity = identity
        self.grid = grid
        self.memo = memo
        self.shelf = shelf
        self.computed = 0
        """Images encoded so far."""
        self._pending: dict[str, Tensor] = {}
        self._writes: list[Future[None]] = []
        self._writer: ThreadPoolExecutor | None = None
        self._readers: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # for loader processes, which only ask what is known
        return {**self.__dict__, "encode": None, "memo": None, "_pending": {}, "_writes": [], "_writer": None} | {
            "_readers": None
        }

    def views(self, key: str) -> int | None:
        """How many views of an image have known features; None where they are not known."""
        row = self._here(key)
        if row is not None:
            return len(row)
        return self.shelf.views(key) if self.shelf is not None else None

    def fetch(self, keys: Iterable[str], *, pin: bool) -> dict[str, Span]:
        """Reads from the disk what it has of some images, into one piece of memory; for another thread to do ahead."""
        if self.shelf is None:
            return {}
        shelf = self.shelf
        known = shelf.find(key for key in dict.fromkeys(keys) if key not in self._pending)
        if not known:
            return {}
        views = [found.entry.size // shelf.view_bytes for found in known.values()]
        firsts = list(accumulate(views, initial=0))
        whole_ILND = torch.empty(firsts.pop(), *shelf.view, dtype=shelf.dtype, pin_memory=pin)
        if self._readers is None:
            self._readers = ThreadPoolExecutor(READERS, "chiasm-read")
        each = -(-len(known) // READERS)
        found, parts = list(known.values()), range(0, len(known), each)
        ends = [*firsts[each::each], len(whole_ILND)]
        read = self._readers.map(
            lambda part: shelf.read(found[part[0] : part[0] + each], whole_ILND[firsts[part[0]] : part[1]]),
            zip(parts, ends, strict=True),
        )
        whole = [right for part in read for right in part]
        return {
            key: Span(whole_ILND, first, count)
            for key, first, count, right in zip(known, firsts, views, whole, strict=True)
            if right
        }

    def gather(self, wanted: Sequence[Wanted], device: torch.device) -> Features:
        """The features of images in order, `[I, L, N, D]` on the device; those that nobody has are computed, once."""
        rows: dict[str, Tensor | Span] = {}
        missing: dict[str, Wanted] = {}
        sent: dict[int, Tensor] = {}
        for item in wanted:
            if item.key in rows or item.key in missing:
                continue
            row = item.row if item.row is not None else self._here(item.key)
            if row is None:
                missing[item.key] = item
            else:
                rows[item.key] = row
            if item.row is not None and item.row.whole_ILND.is_cuda:
                sent[id(item.row.whole_ILND)] = item.row.whole_ILND
        for whole_ILND in sent.values():
            # it was sent beside what the GPU computes, and its memory is not free before that has used it
            whole_ILND.record_stream(torch.cuda.current_stream(device))
        self._take(self.fetch(missing, pin=device.type == "cuda"), rows, missing, device)
        patience = time.monotonic() + WAIT_SECONDS
        while missing:
            mine = self._claim(missing) if time.monotonic() < patience else list(missing)
            if mine:
                rows |= self._compute([missing.pop(key) for key in mine], device)
            self._take(self.fetch(missing, pin=device.type == "cuda"), rows, missing, device)
            if missing and not mine:
                time.sleep(POLL_SECONDS)
        return Features(join([rows[item.key] for item in wanted], device), self.grid)

    def flush(self) -> None:
        """Waits until everything computed so far stands on the disk."""
        for write in self._writes:
            write.result()
        self._writes.clear()

    def close(self) -> None:
        """Writes what is to be written and gives files and threads back."""
        self.flush()
        for threads in (self._writer, self._readers):
            if threads is not None:
                threads.shutdown()
        self._writer = self._readers = None
        if self.shelf is not None:
            self.shelf.close()

    def _here(self, key: str) -> Tensor | None:
        """An image's features where this process has them."""
        row = self._pending.get(key)
        if row is None and self.memo is not None:
            row = self.memo.get((self.identity, key))
        return row

    def _take(
        self, found: dict[str, Span], rows: dict[str, Tensor | Span], missing: dict[str, Wanted], device: torch.device
    ) -> None:
        """Moves what was read from the missing to the rows."""
        for key, row in found.items():
            del missing[key]
            rows[key] = row
            if self.memo is not None:
                self.memo.put((self.identity, key), row.tensor.to(device, copy=True))

    def _claim(self, missing: Iterable[str]) -> list[str]:
        if self.shelf is None:
            return list(missing)
        kept = [key for key in missing if self.shelf.keeps(key)]
        claimed = set(self.shelf.claim(kept))
        return [key for key in missing if key in claimed or not self.shelf.keeps(key)]

    def _compute(self, items: Sequence[Wanted], device: torch.device) -> dict[str, Tensor]:
        """Encodes images in one batch and lets others have the features."""
        keys = [item.key for item in items]
        try:
            pixels = [item.pixels() for item in items]
            tokens_ILND = self._encoded(pixels, device)
        except BaseException:
            self._release(keys)
            raise
        self.computed += len(keys)
        rows = dict(zip(keys, torch.split(tokens_ILND, [len(views) for views in pixels]), strict=True))
        if self.memo is not None:
            for key, row in rows.items():
                self.memo.put((self.identity, key), row.clone())
        if self.shelf is not None:
            self._store(rows, tokens_ILND)
        return rows

    @torch.no_grad()
    def _encoded(self, pixels: Sequence[Tensor], device: torch.device) -> Tensor:
        """The features of some images, `[I, L, N, D]`."""
        if device.type != "cpu":
            return self.encode(join(pixels, device)).tokens
        # rounding may depend on what else is in a batch, and a run that was killed misses other images together than
        # one that was not: it ends with the same bits only if an image is encoded by itself
        return torch.cat([self.encode(views_V3HW).tokens for views_V3HW in pixels])

    def _store(self, rows: dict[str, Tensor], tokens_ILND: Tensor) -> None:
        """Writes features; those on a GPU are copied and written while the GPU goes on."""
        assert self.shelf is not None
        if tokens_ILND.device.type != "cuda":
            self._write(rows, tokens_ILND, None)
            return
        host_ILND = torch.empty(tokens_ILND.shape, dtype=tokens_ILND.dtype, pin_memory=True)
        host_ILND.copy_(tokens_ILND, non_blocking=True)
        copied = torch.cuda.current_stream(tokens_ILND.device).record_event()
        self._pending |= rows
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "chiasm-write")
        while len(self._writes) >= WRITES:
            self._writes.pop(0).result()
        self._writes.append(self._writer.submit(self._write, rows, host_ILND, copied))

    def _write(self, rows: dict[str, Tensor], host_ILND: Tensor, copied: torch.cuda.Event | None) -> None:
        assert self.shelf is not None
        try:
            if copied is not None:
                copied.synchronize()
            parts = torch.split(host_ILND, [len(row) for row in rows.values()])
            for key, part_VLND in zip(rows, parts, strict=True):
                if self.shelf.keeps(key):
                    self.shelf.put(key, part_VLND)
        finally:
            self._release(rows)
            for key in rows:
                self._pending.pop(key, None)

    def _release(self, keys: Iterable[str]) -> None:
        if self.shelf is not None:
            self.shelf.release(keys)
