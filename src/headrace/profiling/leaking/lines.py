"""Which lines take what is not given back: Python memory from tracemalloc, everything else by watching lines run."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import site
import sys
import sysconfig
import tracemalloc
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from headrace.clock import perf_counter
from headrace.profiling.leaking.counts import Tensors, walk_graph

FRAMES = 12  # of each allocation that are kept; the one in the user's code is wanted
_MOST_LINES = 5
_LEAST_SHARE = 0.05


def _library_folders() -> tuple[str, ...]:
    named = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [*named, *site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[2])]
    return tuple({os.path.join(os.path.realpath(folder), "") for folder in folders if folder})


_LIBRARIES = _library_folders()


@functools.lru_cache(4096)
def is_users(file: str) -> bool:
    """Whether a source file is neither a library's nor headrace's nor part of Python."""
    if file.startswith("<"):
        return file.startswith(("<stdin>", "<ipython", "<string>"))
    return not os.path.realpath(file).startswith(_LIBRARIES)


class Line(msgspec.Struct, frozen=True):
    """A line, and how much it takes per call and does not give back."""

    file: str
    line: int
    growth: float
    unit: str = "bytes"


class Growing:
    """Python memory by line, since this was made. Tracing must be on, with `FRAMES` frames."""

    def __init__(self) -> None:
        self._before = tracemalloc.take_snapshot()

    def lines(self, calls: int) -> list[Line]:
        """What has grown, per call, the largest first."""
        found: dict[tuple[str, int], float] = {}
        for each in tracemalloc.take_snapshot().compare_to(self._before, "traceback"):
            place = _users_place([(frame.filename, frame.lineno) for frame in each.traceback])
            if place:
                found[place] = found.get(place, 0.0) + each.size_diff
        return largest(found, calls)


def _users_place(frames: list[tuple[str, int]]) -> tuple[str, int] | None:
    """The innermost frame in the user's code (frames are given oldest first), or the innermost one of a library.

    ``None`` for what headrace itself takes."""
    here = str(Path(__file__).parents[1])
    if not frames or frames[-1][0].startswith(here) or frames[-1][0] == tracemalloc.__file__:
        return None
    return next((place for place in reversed(frames) if is_users(place[0])), frames[-1])


def largest(found: dict[tuple[str, int], float], calls: int, unit: str = "bytes") -> list[Line]:
    """The lines that grow most, without what is a twentieth of the first; a library's only if there are no others."""
    own = {place: amount for place, amount in found.items() if amount > 0 and is_users(place[0])}
    ordered = sorted((own or found).items(), key=lambda item: -item[1])[:_MOST_LINES]
    return [
        Line(file, line, amount / calls, unit)
        for (file, line), amount in ordered
        if amount > 0 and amount >= _LEAST_SHARE * ordered[0][1]
    ]


def watch_lines(
    call: Callable[[], bool], measure: Callable[[], int], unit: str, calls: int, seconds: float
) -> list[Line]:
    """Run the calls line by line, and see at which lines of the user's code a number rises.

    For what leaves no trace in Python: descriptors, threads, memory of C.

    Args:
        call: says whether another one may follow.
        measure: the number, in ``unit``.
        seconds: no further call is begun after that.
    """
    found: dict[tuple[str, int], float] = {}
    place: tuple[str, int] | None = None
    level = measure()
    start = level

    def settle() -> None:
        nonlocal level
        now = measure()
        if place is not None and now != level:
            found[place] = found.get(place, 0.0) + now - level
        level = measure()

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        nonlocal place
        if not is_users(frame.f_code.co_filename):
            return None
        settle()
        up = frame.f_back if event == "return" else frame
        while up is not None and not is_users(up.f_code.co_filename):
            up = up.f_back
        place = (up.f_code.co_filename, up.f_lineno) if up is not None else None
        return trace

    before, done, until = sys.gettrace(), 0, perf_counter() + seconds
    going_on = True
    while going_on and done < calls and perf_counter() < until:
        place = None
        sys.settrace(trace)
        try:
            going_on = call()
        finally:
            sys.settrace(before)
        settle()
        done += 1
    total = level - start
    # A line that takes more than is lost in all has given it back at another line.
    return largest({line: amount for line, amount in found.items() if amount <= 1.5 * total}, max(1, done), unit)


@contextlib.contextmanager
def graphs_remember_lines() -> Iterator[None]:
    """Nodes of autograd that are made in here know the lines that made them. It is slow."""
    torch: Any = sys.modules["torch"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            yield


_TRACE_LINE = re.compile(r'File "(.+)", line (\d+), in ')


def graph_lines(tensors: Tensors, calls: int) -> list[Line]:
    """Nodes that are still alive, by the lines that made them; of those made under `graphs_remember_lines`."""
    found: dict[tuple[str, int], float] = {}
    for node in walk_graph([each.grad_fn for each in tensors.alive() if each.grad_fn is not None]):
        written = node.metadata.get("traceback_")
        if written:
            frames = [(file, int(line)) for entry in written for file, line in _TRACE_LINE.findall(entry)]
            place = _users_place(frames)
            if place:
                found[place] = found.get(place, 0.0) + 1
    return largest(found, calls, "autograd nodes")
