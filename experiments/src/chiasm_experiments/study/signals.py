"""Ctrl-C and SIGTERM while a study runs: the first asks it to end, a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Signals:
    """Which signal asked the process to end."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """As a shell tells it: 128 and the signal's number."""
        return 0 if self.asked is None else 128 + self.asked

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or signal.Signals(number)


@contextmanager
def listening() -> Iterator[Signals]:
    """Takes both signals; in a thread that is not the first, which gets none, nothing."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals._hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
