"""The search for a leak in this process: run, count after each call, judge the trend, and believe it if it holds on.

The way to a verdict: warm up; a run; while something rises, as many calls again as there were so far, until two runs
that follow one another say the same, or it stops; after that, where calls are quick, several times as many, for a cache
that just had not been full. Only then the lines and the holder are looked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import math
import resource
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec

from headrace.clock import perf_counter
from headrace.errors import ConfigError
from headrace.profiling.leaking import attribution, containers, report
from headrace.profiling.leaking.calls import Calls, check
from headrace.profiling.leaking.counts import Recorder, resident_bytes
from headrace.profiling.leaking.report import LeakReport, Limit, Verdict
from headrace.profiling.leaking.trend import LEAST, TELLING, Trend
from headrace.profiling.leaking.verdict import ENTRIES, MEASURES, Run, Suspicion, cycles, settled, suspect

_MOST_SAMPLES = 200  # of the first run
_DOUBLINGS = 4
_AHEAD = 8  # times as many calls as the first run, where they are quick
_AHEAD_S = 0.5
_AHEAD_BYTES = 64 << 20
_AHEAD_THINGS = 200  # threads or descriptors
_HOLDS_ON = 0.4  # share of the earlier growth that a later run must still show
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
_REASONS = {
    "graph": "every call keeps tensors together with the graph that they were computed by",
    "tensors": "every call keeps tensors",
    "python": "every call keeps Python objects",
    "threads": "threads are started and do not end",
    "fds": "descriptors are opened and not closed",
    "native": "memory is taken outside of Python and not given back",
    "fragmentation": "memory is taken from the system and lies free, more and more, while what is in use does not grow",
}


class Plan(msgspec.Struct, frozen=True):
    """How to search.

    Args:
        iterations: calls of the first run.
        warm_up: calls before it.
        time_limit_s: for everything.
        thorough: whether to look ahead, and for the lines and the holder. A second process need not.
    """

    iterations: int
    warm_up: int
    time_limit_s: float
    thorough: bool = True


def search(fn: Callable[[], Any], setup: Callable[[], Any] | None, plan: Plan) -> LeakReport:
    """Search in this process. Raises `ConfigError`, or what the function raises."""
    check(fn, getattr(fn, "__qualname__", repr(fn)))
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        raise ConfigError(
            "a leak cannot be searched on a running event loop", hint="await asyncio.to_thread(find_leak, fn)"
        )
    calls = Calls(fn)
    tracing, frozen = tracemalloc.is_tracing(), gc.get_freeze_count()
    if not tracing:
        tracemalloc.start()
    try:
        if setup is not None:
            Calls(setup)()
        with Search(calls, plan) as found:
            return found.report()
    finally:
        calls.close()
        if not tracing:
            tracemalloc.stop()
        if frozen:
            gc.freeze()  # somebody had, and we have undone it


class _Full(msgspec.Struct, frozen=True):
    """A container that is filling up to a limit of its own."""

    growth: containers.Growth
    limit: containers.Limit
    holder: str

    @property
    def calls_left(self) -> float:
        """Until it is full, and a fifth more to see that it stays so."""
        return 1.2 * (self.limit.most - self.growth.length) / self.growth.rate + 20


class Search:
    """The state of one search: what has been called, counted and concluded so far."""

    def __init__(self, calls: Calls, plan: Plan) -> None:
        self._calls = calls
        self._plan = plan
        self._every = max(1, plan.iterations // _MOST_SAMPLES)
        samples = plan.iterations * (1 + 2**_DOUBLINGS + _AHEAD) + plan.warm_up
        self.recorder = Recorder(samples // self._every + 16, tasks=lambda: len(calls.tasks()))
        self._looks = containers.Looks()
        self._threads = {thread.ident or 0 for thread in threading.enumerate()}
        self._until = perf_counter() + plan.time_limit_s
        self._made = 0
        self._call_s = 0.0
        self._pace_s = 1e-6  # per call of the last run, the counting included
        self._first = 0  # sample after the warm-up
        self.runs: list[Run] = []
        self._stopped = ""
        self._memory_left = report.memory_left()[1]
        self._resident = resident_bytes()

    def __enter__(self) -> Search:
        gc.callbacks.append(self.recorder.freed)
        return self

    def __exit__(self, *error: object) -> None:
        self.recorder.end()
        gc.callbacks.remove(self.recorder.freed)

    # What runs.

    def _go(self, count: int) -> None:
        """Make calls and count after them, until there are enough, time is over, or something runs out."""
        self.recorder.begin(count // self._every)
        started, before = perf_counter(), self._made
        for _ in range(count):
            if self._stopped or self.recorder.full:
                break
            begun = perf_counter()
            try:
                self._calls()
            except (OSError, RuntimeError, MemoryError) as error:
                if not self._exhausted(error):
                    raise
                break
            self._call_s += perf_counter() - begun
            self._made += 1
            if self._made % self._every == 0:
                self.recorder.sample(self._made)
            self._stopped = self._stopped or self._near_a_limit()
        self._pace_s = max(1e-6, (perf_counter() - started) / max(1, self._made - before))
        self.recorder.end()

    def _exhausted(self, error: Exception) -> bool:
        """Whether a call failed of what it, or an earlier one, had used up: that is a result, not an error."""
        number = error.errno if isinstance(error, OSError) else 0
        if number in _EXHAUSTED or isinstance(error, MemoryError) or "can't start new thread" in str(error):
            self._stopped = f"call {self._made + 1} failed: {error}"
        return bool(self._stopped) and self.recorder.length - self._first >= LEAST

    def _near_a_limit(self) -> str:
        if perf_counter() > self._until:
            return "the time limit was reached"
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if most != resource.RLIM_INFINITY and self.recorder.last("files") > 0.7 * most:
            return f"{self.recorder.last('files')} of {most} descriptors are open"
        if self.recorder.last("resident") - self._resident > 0.6 * self._memory_left:
            return "more than half of the memory that was left is used up"
        return ""

    def _run(self, count: int, looks: int = 1) -> Run:
        """Make calls as one run, and look at the containers ``looks`` times, at the end and evenly before."""
        start = self.recorder.length
        for part in range(looks):
            self._go((part + 1) * count // looks - part * count // looks)
            self._looks.look(self._made)
        self.runs.append(Run(self.recorder, start, self.recorder.length))
        return self.runs[-1]

    def _affordable(self, count: int) -> int:
        """As many calls as asked for, or as there is time for when some is kept for tracing back."""
        return min(count, int(0.8 * (self._until - perf_counter()) / self._pace_s))

    # What is concluded.

    def report(self) -> LeakReport:
        """Run until there is a verdict."""
        self._go(self._plan.warm_up)
        self._first, self._call_s = self.recorder.length, 0.0
        self._looks.look(self._made)
        run = self._run(self._plan.iterations, looks=2)
        if run.end - run.start < LEAST:
            return self._as_report("inconclusive", f"{self._stopped} after {self._made} calls, the warm-up included")
        found = self._suspect(run)
        full = self._filling_up(found)
        if full is not None and full.limit.certain:
            return self._bounded(full)
        found, agreeing = self._follow(found)
        if agreeing and self._plan.thorough and not self._stopped:
            if full is not None and full.calls_left * self._pace_s > 4 * _AHEAD_S:
                return self._bounded(full)
            found, agreeing = self._look_ahead(found, full)
        if found.state == "quiet":
            return self._quiet()
        if not agreeing:
            why = self._stopped or f"after {self._made} calls {found.measure} still rises, but not steadily"
            return self._as_report("inconclusive", why, found)
        return self._leak(found, agreeing)

    def _suspect(self, run: Run, before: Suspicion | None = None) -> Suspicion:
        """What a run suggests; a container that gets longer all the time counts where bytes do not show it."""
        found = suspect(run)
        if found.state != "growing" and (before is None or before.kind in (None, "python")):
            found = self._lengthening() or found
        weaker = (
            before is not None
            and found.measure == before.measure
            and found.trend.slope < _HOLDS_ON * before.trend.slope
        )
        return msgspec.structs.replace(found, state="unsure") if weaker and found.state == "growing" else found

    def _lengthening(self) -> Suspicion | None:
        for growth, container, holder in attribution.named(self._looks):
            if growth.steady and holder and holder.users and containers.limit_of(container) is None:
                trend = Trend("growing", growth.rate, (min(growth.rates), max(growth.rates)))
                return Suspicion("growing", "python", "entries", trend)
        return None

    def _follow(self, found: Suspicion) -> tuple[Suspicion, int]:
        """Run on until two runs agree, or nothing grows: what is left of the suspicion, and how many runs agree."""
        before = None
        for _ in range(_DOUBLINGS + 1):
            grows = found.state == "growing"
            if found.state == "quiet":
                break
            if grows and before is not None and before.state == "growing" and before.kind == found.kind:
                return found, 2
            if self._stopped and perf_counter() < self._until:
                # What it has used up is missing to run on: that is a confirmation of its own.
                sure = found if grows else before
                return (sure, 1) if sure is not None and sure.state == "growing" else (found, 0)
            count = self._affordable(self._made - self._plan.warm_up)
            if count < max(LEAST, self._plan.iterations // 2):
                self._stopped = self._stopped or "there was no time to confirm it"
                break
            before = found
            found = self._suspect(self._run(count).without_beginning(), before)
        return found, 0

    def _look_ahead(self, found: Suspicion, full: _Full | None) -> tuple[Suspicion, int]:
        """Where calls are quick, many more: most caches are full by then."""
        room = _AHEAD_THINGS if found.measure in ("threads", "files") else _AHEAD_BYTES
        count = min(_AHEAD * self._plan.iterations, _AHEAD_S / self._pace_s, room / max(found.trend.slope, 1e-9))
        if full is not None:
            count = max(count, full.calls_left)
        # A quarter of the run is left out when it is judged; too few would take a sure finding back.
        if count < max(math.ceil(TELLING / 0.75) * self._every, self._plan.iterations // 2):
            return found, 2
        for _ in range(2):  # a second time where the first does not tell
            later = self._suspect(self._run(self._affordable(int(count))).without_beginning(), found)
            if later.state == "growing" and later.kind == found.kind:
                return later, 3
            if later.state == "quiet":
                break
        return later, 0

    def _filling_up(self, found: Suspicion) -> _Full | None:
        """The container that is filling up to a limit of its own, if that explains what grows."""
        if found.kind not in (None, "python", "tensors", "graph", "native"):
            return None
        best = None
        for growth, container, holder in attribution.named(self._looks):
            limit = containers.limit_of(container)
            if holder is None or (found.state == "quiet" and not holder.users):
                continue
            if limit is None and holder.users and growth.steady:
                return None
            if limit is not None and growth.length < limit.most and best is None:
                best = _Full(growth, limit, attribution.with_kind(container, holder))
        return best

    # What is told.

    def _bounded(self, full: _Full) -> LeakReport:
        growth, limit = full.growth, full.limit
        how = "" if limit.certain else ", as it says; that was not waited for"
        return msgspec.structs.replace(
            self._as_report("bounded", f"still filling, {growth.length} of {limit.most} ({limit.by}{how})"),
            holder=full.holder,
            growth_per_iteration=growth.rate,
            interval=(min(growth.rates), max(growth.rates)),
            unit=ENTRIES.unit,
        )

    def _quiet(self) -> LeakReport:
        freed = cycles(self.recorder, self._first, self.recorder.length)
        if freed is not None:
            reason = (
                f"nothing is kept, but each call leaves {freed.objects:.3g} objects, {freed.bytes:,.0f} bytes, in "
                "reference cycles that only the garbage collector frees"
            )
            return self._as_report("cycles", reason)
        at = settled(self.recorder, 0)
        if at is not None:
            return self._as_report("warm_up", f"memory rose until call {at} and is level since")
        return self._as_report("no_leak", "nothing grows")

    def _leak(self, found: Suspicion, agreeing: int) -> LeakReport:
        if found.kind == "fragmentation":
            report = self._as_report("fragmentation", _REASONS["fragmentation"], found)
            return msgspec.structs.replace(report, agreeing=agreeing)
        report = self._as_report("leak", _REASONS[found.kind or "python"], found)
        source = attribution.Source()
        if self._plan.thorough:
            source = attribution.trace_back(
                found,
                self._calls,
                max(5, min(40, self._plan.iterations // 4, self._affordable(40) // 4)),
                looks=self._looks,
                threads_before=self._threads,
                tasks=self._calls.tasks() if self.runs[-1].trend("tasks").rises else set(),
            )
        return msgspec.structs.replace(report, agreeing=agreeing, where=source.where, holder=source.holder)

    def _as_report(self, verdict: Verdict, reason: str, found: Suspicion | None = None) -> LeakReport:
        """A report with the numbers of everything after the warm-up; of Python memory where nothing is suspected."""
        # What has levelled off is described by the end.
        run = Run(self.recorder, self._first, self.recorder.length) if found else self.runs[-1].without_beginning()
        name = found.measure if found and found.measure else "traced"
        if found is not None and name == "entries":
            trend, unit = found.trend, ENTRIES.unit
        else:
            trend, unit = run.trend(name), MEASURES[name].unit
        seconds = self._call_s / max(1, self._made - self._plan.warm_up)
        return LeakReport(
            verdict,
            kind=found.kind if found and verdict == "leak" and found.kind != "fragmentation" else None,
            growth_per_iteration=trend.slope,
            interval=trend.interval,
            unit=unit,
            reason=reason,
            limit=self._limit(found, run, seconds) if found and verdict in ("leak", "fragmentation") else None,
            iterations=max(0, self._made - self._plan.warm_up),
            warm_up=min(self._made, self._plan.warm_up),
            seconds_per_iteration=seconds,
            agreeing=1,
        )

    def _limit(self, found: Suspicion, run: Run, seconds: float) -> Limit | None:
        last = self.recorder.last
        if found.measure == "threads":
            return report.limit_of_threads(run.trend("threads").slope, last("threads"), seconds)
        if found.measure == "files":
            return report.limit_of_files(run.trend("files").slope, last("files"), seconds)
        on_gpu = max(run.trend(name).slope for name in ("cuda", "cuda_reserved"))
        limits = [
            report.limit_of_memory(max(run.trend(name).slope for name in ("traced", "heap", "resident")), seconds),
            report.limit_of_gpu_memory(on_gpu, seconds) if on_gpu > 0 else None,
        ]
        return min(filter(None, limits), key=lambda each: each.iterations, default=None)
