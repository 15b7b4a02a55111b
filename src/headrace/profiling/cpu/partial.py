"""Records on disk: whole or not at all, and before an end that comes without a word."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import msgspec

from headrace import clock
from headrace.profiling.record import Record

_LONGEST_S = 15.0


class Partial:
    """Writes what is known so far, ever more rarely: for a run that will end without a word.

    Args:
        write_it: does so.
        first_s: seconds until the first time.
    """

    def __init__(self, write_it: Callable[[], None], first_s: float) -> None:
        self._write = write_it
        self._pause_s = first_s
        self._due = clock.perf_counter() + first_s

    def look(self, now: float) -> None:
        if now >= self._due:
            self._write()
            self._pause_s = min(_LONGEST_S, 2 * self._pause_s)
            self._due = clock.perf_counter() + self._pause_s


def write(record: Record, path: Path) -> None:
    """A whole record, or none. Raises `OSError`."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(msgspec.json.encode(record))
    new.replace(path)


_AT_SIGTERM: list[Callable[[], None]] = []


def finish_at_sigterm(finish: Callable[[], None]) -> None:
    """End by SIGTERM as before, but after this: the workers of a pool, and servers, end no other way.

    A program that handles the signal itself has its own way. Only where the main thread calls it; elsewhere nothing. A
    forked process calls what its parent has given too.
    """
    with suppress(ValueError):
        if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, _end):
            signal.signal(signal.SIGTERM, _end)
            _AT_SIGTERM.append(finish)


def _end(number: int, _frame: FrameType | None) -> None:
    try:
        for finish in _AT_SIGTERM:
            finish()
    finally:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
