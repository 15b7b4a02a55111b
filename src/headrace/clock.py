"""Time as a parameter: the only module that calls `time.*`.

Code that decides something by time takes a `Clock`; tests hand it a `headrace.testing.FakeClock`.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds that only move forward; comparable within one process only."""
        ...


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        return time.monotonic()


SYSTEM = SystemClock()

# Bound once for measurements on hot paths, where an attribute look-up per request is worth saving.
perf_counter = time.perf_counter
monotonic = time.monotonic
process_time = time.process_time
thread_time = time.thread_time
wall = time.time
sleep = time.sleep


def thread_cpu(native_id: int) -> float:
    """Seconds of processor time that any thread of this process has used, by the kernel's own clock of it.

    The number of such a clock is part of Linux's interface (a thread's id inverted, then three bits). Asking for it by
    `time.pthread_getcpuclockid` reads the memory of a thread that may have ended meanwhile; this fails cleanly.

    Args:
        native_id: as `threading.Thread.native_id` has it.

    Raises:
        OSError: there is no such thread (any more), or the system is not Linux.
    """
    return time.clock_gettime(~native_id << 3 | 6)
