"""Event loops that one callback keeps from everything else.

While a loop runs a callback, a mark is put at the end of its queue. As long as the mark has not been reached, and the
loop's thread was seen in the same task, it is the same callback; when it is reached, that callback has ended. A loop
with nothing to do is left alone.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from headrace.clock import perf_counter
from headrace.profiling.cpu.places import Places
from headrace.profiling.cpu.threads import Thread
from headrace.profiling.record import Block

BLOCK_S = 0.05
_MOST_BLOCKS = 1000


class _Mark:
    """Called by the loop when its turn has come."""

    def __init__(self) -> None:
        self.reached: float | None = None
        self.thread = 0

    def __call__(self) -> None:
        self.thread = threading.get_ident()
        self.reached = perf_counter()


class _Stretch:
    """The same callback, as often as it was seen.

    Attributes:
        before: when something else was seen last.
        first, last: when it was seen.
    """

    def __init__(self, who: object, before: float, now: float, mark: _Mark) -> None:
        self.who = who
        self.before = before
        self.first = self.last = now
        self.mark = mark
        self.seen: Counter[tuple[int, ...]] = Counter()


class Loops:
    """All loops that tasks were seen of."""

    def __init__(self, places: Places) -> None:
        self.blocks: list[Block] = []
        self._places = places
        self._open: dict[Any, _Stretch | None] = {}
        self._threads: dict[Any, int] = {}

    def look(self, before: float, now: float, loops: set[Any], threads: Mapping[int, Thread]) -> None:
        """Go on with what was begun, and begin with what is new.

        Args:
            before: time of the look before this one.
        """
        for loop in loops - self._open.keys():
            self._open[loop] = None
        for loop, stretch in list(self._open.items()):
            if loop not in loops and (loop.is_closed() or not loop.is_running()):
                self._end(stretch, now)
                del self._open[loop]
                self._threads.pop(loop, None)
                continue
            thread = threads.get(self._thread_of(loop, stretch))
            who = _callback(loop, thread)
            if stretch is not None and (stretch.mark.reached is not None or stretch.who != who or who is None):
                self._end(stretch, now)
                stretch = None
            if stretch is None and (who is not None or loop not in self._threads):
                stretch = _begin(loop, who, before, now)
            if stretch is not None and thread is not None:
                stretch.last = now
                stretch.seen[thread.sits if not thread.running else thread.places] += 1
            self._open[loop] = stretch

    def end(self, now: float) -> None:
        """Nothing more is looked at."""
        for stretch in self._open.values():
            self._end(stretch, now)
        self._open.clear()

    def _thread_of(self, loop: Any, stretch: _Stretch | None) -> int:
        """Identifier of the thread that a loop runs in. Not every kind of loop tells it; its marks do."""
        if stretch is not None and stretch.mark.thread:
            self._threads[loop] = stretch.mark.thread
        told = getattr(loop, "_thread_id", None)
        if told:
            self._threads[loop] = told
        return self._threads.get(loop, 0)

    def _end(self, stretch: _Stretch | None, now: float) -> None:
        if stretch is None or stretch.who is None or not stretch.seen:
            return
        end = stretch.mark.reached or (stretch.last + now) / 2
        if end - stretch.first >= BLOCK_S and len(self.blocks) < _MOST_BLOCKS:
            way = [self._places.places[number] for number in stretch.seen.most_common(1)[0][0]]
            # It began between two looks.
            seconds = end - (stretch.before + stretch.first) / 2
            self.blocks.append(Block([each.frame for each in way], [each.line for each in way], seconds))


def _begin(loop: Any, who: object, before: float, now: float) -> _Stretch | None:
    mark = _Mark()
    try:
        loop.call_soon_threadsafe(mark)
    except RuntimeError:  # it was closed just now
        return None
    return _Stretch(who, before, now, mark)


def _callback(loop: Any, thread: Thread | None) -> object:
    """What tells one callback from another; `None` if none is running."""
    if thread is None or (thread.reason == "loop" and not thread.running):
        return None
    # Imported by whoever made the loop; a program without one shall not import it for us.
    task = sys.modules["asyncio"].current_task(loop)
    return id(task) if task is not None else "callback"
