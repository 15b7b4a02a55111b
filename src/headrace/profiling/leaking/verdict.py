"""From the counts of a run to what grows: one judgement per run, by rules as plain functions.

A rule looks at the trends of a few columns and says whether its kind of leak may be there. What one run suggests is a
suspicion; `leak.py` runs as many calls again before it becomes a verdict.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import msgspec

from headrace.profiling.leaking.counts import Recorder
from headrace.profiling.leaking.trend import Trend, levelled_at, trend

Kind = Literal["graph", "tensors", "python", "threads", "fds", "native", "fragmentation"]
# unsure: something rises, but not in the way of a leak; more calls will tell.
State = Literal["quiet", "unsure", "growing"]


class Measure(msgspec.Struct, frozen=True):
    """How a column is judged.

    Args:
        floor: growth per call that counts.
        least: growth over the run that counts.
    """

    floor: float
    least: float
    unit: str


MEASURES = {
    "traced": Measure(2, 256, "bytes"),
    "blocks": Measure(0.01, 3, "blocks"),
    "heap": Measure(16, 2048, "bytes"),
    "heap_free": Measure(16, 2048, "bytes"),
    "resident": Measure(64, 1 << 18, "bytes"),
    "threads": Measure(0.01, 3, "threads"),
    "files": Measure(0.01, 3, "descriptors"),
    "tasks": Measure(0.01, 3, "tasks"),
    "tensors": Measure(0.01, 3, "tensors"),
    "tensor_bytes": Measure(16, 1024, "bytes"),
    "nodes": Measure(0.1, 4, "autograd nodes"),
    "cuda": Measure(16, 1024, "bytes"),
    "cuda_reserved": Measure(1024, 1 << 21, "bytes"),
}
# Entries of a container: see `containers.py`.
ENTRIES = Measure(0.02, 5, "entries")


class Suspicion(msgspec.Struct, frozen=True):
    """What a run suggests. ``kind`` and ``measure`` are empty when it is quiet."""

    state: State
    kind: Kind | None = None
    measure: str = ""
    trend: Trend = Trend("flat")


class Run:
    """The samples of a stretch of calls, with the trend of each column, taken when it is asked for."""

    def __init__(self, recorder: Recorder, start: int, end: int) -> None:
        self._recorder = recorder
        self.start = start
        self.end = end
        self._trends: dict[str, Trend] = {}

    def trend(self, name: str) -> Trend:
        if name not in self._trends:
            measure = MEASURES[name]
            xs, ys = self._recorder.series(name, self.start, self.end)
            self._trends[name] = trend(xs, ys, floor=measure.floor, least=measure.least)
        return self._trends[name]

    def without_beginning(self) -> Run:
        """The last three quarters: what happened once, as the run began, is gone."""
        return Run(self._recorder, self.start + (self.end - self.start) // 4, self.end)


def suspect(run: Run) -> Suspicion:
    """The first kind that grows; else the first that may. The order is that of causes: a thread holds objects, a
    graph holds tensors, tensors and objects hold memory of C."""
    found = [suspicion for rule in _RULES if (suspicion := rule(run)).state != "quiet"]
    growing = [each for each in found if each.state == "growing"]
    return next(iter(growing or found), Suspicion("quiet"))


def _of(kind: Kind, measure: str, trend: Trend) -> Suspicion:
    if not trend.rises:
        return Suspicion("quiet")
    return Suspicion("growing" if trend.shape == "growing" else "unsure", kind, measure, trend)


def _surest(*suspicions: Suspicion) -> Suspicion:
    order: list[State] = ["growing", "unsure", "quiet"]
    return min(suspicions, key=lambda each: order.index(each.state))


def threads(run: Run) -> Suspicion:
    return _of("threads", "threads", run.trend("threads"))


def files(run: Run) -> Suspicion:
    return _of("fds", "files", run.trend("files"))


def graph(run: Run) -> Suspicion:
    return _of("graph", "nodes", run.trend("nodes"))


def tensors(run: Run) -> Suspicion:
    # Bytes first: they say how long there is.
    return _surest(*(_of("tensors", name, run.trend(name)) for name in ("cuda", "tensor_bytes", "tensors")))


def python(run: Run) -> Suspicion:
    """Traced bytes, if blocks or malloc agree.

    A queue that was full before tracing began looks like growth until all that is in it has been seen.
    """
    traced = run.trend("traced")
    agrees = (
        run.trend("blocks").rises
        or run.trend("heap").slope >= 0.5 * traced.slope
        or run.trend("resident").slope >= 0.5 * traced.slope
    )
    return _of("python", "traced", traced) if agrees else Suspicion("quiet")


def native(run: Run) -> Suspicion:
    """Memory of C that no Python object explains.

    What malloc has in use moves by itself as rooms are found and merged, so the resident pages must rise too, or what
    is in use must rise with hardly any deviation. Pages that rise while malloc neither uses nor keeps more were mapped
    past it.
    """
    if run.trend("traced").rises:
        return Suspicion("quiet")
    heap, pages = run.trend("heap"), run.trend("resident")
    if heap.rises:
        low, high = heap.interval
        even = heap.shape == "growing" and high - low <= 0.1 * heap.slope
        return _of("native", "heap", heap) if even or pages.rises else Suspicion("quiet")
    return Suspicion("quiet") if _kept_free(run) else _of("native", "resident", pages)


def fragmentation(run: Run) -> Suspicion:
    """Pages that malloc keeps although nothing uses them, more and more."""
    if run.trend("traced").rises or run.trend("heap").rises or not _kept_free(run):
        return Suspicion("quiet")
    return _of("fragmentation", "resident", run.trend("resident"))


def gpu_fragmentation(run: Run) -> Suspicion:
    """Memory of a GPU that torch keeps although no tensor uses it. (The driver's notes of it grow in C's memory.)"""
    if run.trend("cuda").rises:
        return Suspicion("quiet")
    return _of("fragmentation", "cuda_reserved", run.trend("cuda_reserved"))


def _kept_free(run: Run) -> bool:
    """Whether what lies free in malloc explains the growth of pages."""
    free = run.trend("heap_free")
    return free.rises and free.slope >= 0.3 * run.trend("resident").slope


_RULES: tuple[Callable[[Run], Suspicion], ...] = (
    threads,
    files,
    graph,
    tensors,
    python,
    gpu_fragmentation,
    native,
    fragmentation,
)


class Cycles(msgspec.Struct, frozen=True):
    """What each call leaves in reference cycles."""

    objects: float
    bytes: float


def cycles(recorder: Recorder, start: int, end: int) -> Cycles | None:
    """What the garbage collector has to free after each call, ``None`` if most calls leave nothing.

    Args:
        start, end: samples.
    """
    calls, objects = recorder.series("freed_objects", start, end)
    _, sizes = recorder.series("freed_bytes", start, end)
    steps = [after - before for before, after in itertools.pairwise(objects)]
    if not steps or sum(step > 0 for step in steps) < len(steps) / 2:
        return None
    count = calls[-1] - calls[0]
    found = Cycles((objects[-1] - objects[0]) / count, (sizes[-1] - sizes[0]) / count)
    return found if found.bytes >= _LEAST_CYCLE_BYTES else None


_LEAST_CYCLE_BYTES = 128


def settled(recorder: Recorder, start: int) -> int | None:
    """The call from which memory stays level after it rose, ``None`` if it never rose for more than a few calls.

    The first calls of the warm-up count: a pool that is full after ten calls has levelled off too.
    """
    found = None
    for name, least in (("traced", 4096), ("tensor_bytes", 4096), ("cuda", 4096), ("threads", 3), ("files", 3)):
        calls, values = recorder.series(name, start)
        at = levelled_at(values, least)
        if at is not None and at >= _LEAST_WARM_UP:
            found = max(found or 0, int(calls[at]))
    return found


_LEAST_WARM_UP = 5
