"""Where a confirmed leak comes from and who holds it: more calls, watched more closely than those that were judged.

What is done here would disturb a measurement: allocations are traced with many frames, lines are followed one by one,
the heap is walked backwards. So nothing that is measured here enters a verdict.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from headrace.profiling.leaking import containers, counts, holders, lines
from headrace.profiling.leaking.lines import Line
from headrace.profiling.leaking.verdict import MEASURES, Suspicion

_LOOKED_AT = 6  # growing containers that are named
_SECONDS = 5.0
_WATCHED_CALLS = 5


class Source(msgspec.Struct, frozen=True):
    """Lines and holder; empty where nothing was found."""

    where: list[Line] = []
    holder: str | None = None


def trace_back(
    found: Suspicion,
    function: Callable[[], None],
    calls: int,
    *,
    looks: containers.Looks,
    threads_before: set[int],
    tasks: set[asyncio.Task[Any]],
) -> Source:
    """Find the lines and the holder of a leak.

    Args:
        calls: how many more may run; fewer do where they are slow.
        looks: the lengths of containers at the ends of earlier runs.
        tasks: that do not end, if there are more and more of them.
    """
    call = _Enduring(function)
    if found.kind in ("threads", "fds", "native"):
        where = _watched(found.measure, call)
        new: list[Any] = []
    else:
        where, new = _traced(found, call, calls)
    if found.kind == "tensors":
        where = _watched(found.measure, call) or where
    holder = holders.threads_of(threads_before) if found.kind == "threads" else None
    holder = holder or _tasks_of(tasks)
    if holder is None:
        holder = container_of(looks) or (_graph_of(new) if found.kind == "graph" else _object_of(new, calls))
    del new
    if holder is None and found.kind == "fds":
        holder = _files()
    return Source(where, holder)


class _Enduring:
    """Calls until one fails of what the leak has used up."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._over = False

    def __call__(self) -> bool:
        """Call, and say whether another call may follow."""
        if not self._over:
            try:
                self._call()
            except (OSError, RuntimeError, MemoryError):
                self._over = True
        return not self._over


def _watched(measure: str, call: _Enduring) -> list[Line]:
    """The lines at which a number rises, for what tracing does not see."""
    read, tensors = counts.heap_reader(), counts.Tensors()
    measures: dict[str, Callable[[], int]] = {
        "threads": counts.count_threads,
        "files": counts.count_files,
        "heap": lambda: read()[0],
        "resident": counts.resident_bytes,
        "cuda": lambda: counts.cuda_bytes()[0],
        "tensor_bytes": lambda: tensors.count()[1],
        "tensors": lambda: tensors.count()[0],
    }
    with _frozen():  # tensors are looked for among what is new
        return lines.watch_lines(call, measures[measure], MEASURES[measure].unit, _WATCHED_CALLS, _SECONDS)


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _traced(found: Suspicion, call: _Enduring, calls: int) -> tuple[list[Line], list[Any]]:
    """Run on with allocations traced: lines that grow, and objects that are new and stay."""
    remembering = lines.graphs_remember_lines() if found.kind == "graph" else contextlib.nullcontext()
    with _many_frames():
        call()  # what the last call leaves until the next one is traced as well
        with _frozen():
            growing = lines.Growing()
            made = 0
            with remembering:
                while made < calls and call():
                    made += 1
            gc.collect()
            where = growing.lines(max(1, made))
            new = gc.get_objects()
            if found.kind == "graph":
                where = lines.graph_lines(counts.Tensors(), max(1, made)) or where
    return where, new


@contextlib.contextmanager
def _many_frames() -> Iterator[None]:
    """Trace with enough frames to find the user's; where somebody traces with as many, with those."""
    before = tracemalloc.get_traceback_limit() if tracemalloc.is_tracing() else 0
    if before < lines.FRAMES:
        tracemalloc.stop()
        tracemalloc.start(lines.FRAMES)
    try:
        yield
    finally:
        if before < lines.FRAMES:
            tracemalloc.stop()
            if before:
                tracemalloc.start(before)


def container_of(looks: containers.Looks) -> str | None:
    """The growing container that is the user's, the fastest first; one of a library's where there is no other."""
    best = None
    for growth, container, holder in named(looks):
        if holder is None:
            continue
        if holder.users:
            return with_kind(container, holder)
        best = best or (with_kind(container, holder) if growth.rate >= 0.5 else None)
    return best


def named(looks: containers.Looks) -> Iterator[tuple[containers.Growth, Any, holders.Holder | None]]:
    """Containers that have grown between any two looks, each with its name."""
    pairs = containers.resolve(looks.grown()[:_LOOKED_AT])
    for pair in pairs:
        growth, container = pair
        yield growth, container, holders.name_of(container, [pairs, pair])


def with_kind(thing: Any, holder: holders.Holder) -> str:
    return holder.text if holder.text.startswith("lru_cache") else f"{type(thing).__name__}: {holder.text}"


def _graph_of(new: list[Any]) -> str | None:
    """The tensor with the largest graph."""
    tensors = [each for each in counts.Tensors().alive() if each.grad_fn is not None]
    if not tensors:
        return None
    tensor = max(tensors, key=lambda each: sum(1 for _ in counts.walk_graph([each.grad_fn])))
    holder = holders.name_of(tensor, [new, tensors])
    return f"Tensor: {holder.text}" if holder else None


def _object_of(new: list[Any], calls: int) -> str | None:
    """What holds the objects of the kind of which most are new: for what grows without a container (linked nodes)."""
    kinds = Counter(type(each) for each in new)
    for kind, count in kinds.most_common(4):
        if count < calls / 2:
            break
        if kind.__module__ == "builtins":
            continue
        one = next(each for each in new if type(each) is kind)
        holder = holders.name_of(one, [new])
        if holder is not None and holder.users:
            return f"{kind.__name__}: {holder.text}"
    return None


def _tasks_of(tasks: set[asyncio.Task[Any]]) -> str | None:
    """What the tasks that are still there run."""
    names: Counter[str] = Counter()
    for task in tasks:
        coroutine: Any = task.get_coro()
        code = getattr(coroutine, "cr_code", None)
        if code is not None:
            names[f"`{coroutine.__qualname__}` ({Path(code.co_filename).name}:{code.co_firstlineno})"] += 1
    if not names:
        return None
    name, count = names.most_common(1)[0]
    return f"asyncio tasks of {name}, {count} alive".replace(".<locals>", "")


def _files() -> str | None:
    """What most open descriptors lead to."""
    kinds: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            kinds[os.readlink(f"/proc/self/fd/{number}").partition(":[")[0]] += 1
    if not kinds:
        return None
    what, count = kinds.most_common(1)[0]
    return f"{count} open descriptors of {what}"
