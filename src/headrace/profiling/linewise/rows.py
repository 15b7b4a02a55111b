"""What is followed line by line, and what was counted: functions by where they begin, lines by their number.

A function is known by its file, its first line and its name, not by its code object: a function within a function gets
a new one with every import, and a script that has not run yet has none. Nothing here watches anything.
"""

from __future__ import annotations

import functools
import linecache
import os
import threading
import types
from collections import Counter
from collections.abc import Iterable, Iterator

from headrace.profiling.record import Frame, Line

Name = tuple[str, int, str]  # absolute file, first line, name without what it is nested in
Place = tuple[str, int, str]  # file as the code has it, first line, qualified name
Cells = dict[int, list[float]]  # line → [hits, seconds]
Counts = dict[tuple[Place, int], tuple[int, float]]


@functools.lru_cache(4096)
def _absolute(file: str) -> str:
    return file if file.startswith("<") else os.path.abspath(file)


def name_of(code: types.CodeType) -> Name:
    return _absolute(code.co_filename), code.co_firstlineno, code.co_name


def name_of_frame(frame: Frame) -> Name:
    return _absolute(frame.file), frame.line, frame.function.rpartition(".")[2]


class Wanted:
    """The functions to follow. Each may be asked for several times at once.

    Attributes:
        first_lines: where they begin: what a call is checked against first, since it is cheapest.
    """

    def __init__(self) -> None:
        self.first_lines: frozenset[int] = frozenset()
        self._names: Counter[Name] = Counter()
        self._lock = threading.Lock()

    def add(self, names: Iterable[Name]) -> None:
        with self._lock:
            self._names.update(names)
            self._refresh()

    def drop(self, names: Iterable[Name]) -> None:
        with self._lock:
            self._names.subtract(names)
            self._names += Counter()  # without those that nobody wants any more
            self._refresh()

    def _refresh(self) -> None:
        self.first_lines = frozenset(line for _, line, _ in self._names)

    def has(self, code: types.CodeType) -> bool:
        return name_of(code) in self._names


class Rows:
    """Hits and seconds of every line, by thread: two threads never write to one cell."""

    def __init__(self) -> None:
        self._cells: dict[tuple[int, Place], Cells] = {}
        self._codes: dict[Place, types.CodeType] = {}

    def of(self, code: types.CodeType) -> Cells:
        """Where the calling thread counts this function."""
        place = (code.co_filename, code.co_firstlineno, code.co_qualname)
        key = (threading.get_ident(), place)
        cells = self._cells.get(key)
        if cells is None:
            self._codes.setdefault(place, code)
            cells = self._cells.setdefault(key, {})
        return cells

    def counts(self) -> Counts:
        """All threads together."""
        found: Counts = {}
        for (_, place), cells in list(self._cells.items()):
            for line, (hits, seconds) in list(cells.items()):
                before = found.get((place, line), (0, 0.0))
                found[place, line] = (before[0] + int(hits), before[1] + seconds)
        return found

    def executable(self, place: Place) -> set[int]:
        """Lines of a function that can be hit; without those of functions in it, and without its ``def``."""
        code = self._codes[place]
        return {line for _, _, line in code.co_lines() if line is not None} - {code.co_firstlineno}


def lines_between(rows: Rows, before: Counts, names: set[Name], cost_s: float) -> list[Line]:
    """What was counted since ``before`` of the functions with these names, their lines in order.

    A line that could have run and did not is there too, with no hits.

    Args:
        cost_s: of watching one hit: taken off.
    """
    now: dict[Place, dict[int, tuple[int, float]]] = {}
    for (place, line), (hits, seconds) in rows.counts().items():
        was = before.get((place, line), (0, 0.0))
        if (hits, seconds) != was and _name_of_place(place) in names:
            now.setdefault(place, {})[line] = (hits - was[0], seconds - was[1])
    return [line for place in sorted(now) for line in _lines_of(place, now[place], rows.executable(place), cost_s)]


def _lines_of(
    place: Place, counted: dict[int, tuple[int, float]], executable: set[int], cost_s: float
) -> Iterator[Line]:
    file, _, function = place
    for line in sorted(executable | counted.keys()):
        hits, seconds = counted.get(line, (0, 0.0))
        source = linecache.getline(file, line).rstrip()
        yield Line(file, line, function, hits, max(0.0, seconds - hits * cost_s), source)


def _name_of_place(place: Place) -> Name:
    file, line, function = place
    return _absolute(file), line, function.rpartition(".")[2]
