"""One stretch of this process's life, sampled and traced, as a record."""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

from headrace import clock
from headrace.errors import SetupError
from headrace.profiling.cpu import costs as tracing_costs
from headrace.profiling.cpu.arguments import Arguments
from headrace.profiling.cpu.costs import Costs
from headrace.profiling.cpu.longest import Longest, unmark
from headrace.profiling.cpu.places import Places
from headrace.profiling.cpu.sampler import Sampler, Samples
from headrace.profiling.cpu.threads import Thread
from headrace.profiling.cpu.tracing import Graph, Tracer
from headrace.profiling.record import Call, Machine, Record

# Who waits for a profile wants more samples than a server that runs on: still nothing beside what tracing costs.
BUDGET = 0.03
MOST_HZ = 200.0
_CREDIT_S = 0.02
_RESUMED = "coroutines and generators count as called each time they go on"
UNKNOWN = Machine("", "", 0, "", "")


class Recording:
    """Begin and end on one thread, which is the one that is traced.

    Args:
        trace: count calls too.
        on_look: called after each look of the sampler, on its thread.
    """

    def __init__(
        self, *, trace: bool = True, budget: float = BUDGET, on_look: Callable[[float], None] | None = None
    ) -> None:
        self.places = Places()
        self._on_look = on_look
        skipped: set[int] = set()
        self._sampler = Sampler(
            budget=budget, rate_hz=MOST_HZ, credit_s=_CREDIT_S, places=self.places, on_look=self._look, skipped=skipped
        )
        self._tracer = Tracer(skipped) if trace else None
        self._costs = tracing_costs.measure() if trace else Costs()
        self._longest = Longest() if trace else None
        in_main = threading.current_thread() is threading.main_thread()
        self._arguments = Arguments() if trace and in_main else None
        self._graph: Graph = {}
        self._samples: Samples | None = None
        self._ended = 0.0
        self._tracing_ended = False

    def start(self) -> None:
        """Raises `SetupError` if something else profiles this thread."""
        self._started = clock.wall()
        self._sampler.start()  # first, so that its thread is known as one that is not traced
        self._cpu_s, self._children_s = clock.process_time(), _children_s()
        self._began = clock.perf_counter()
        if self._tracer is not None:
            try:
                self._tracer.start()
            except SetupError:
                self._sampler.stop()
                raise

    def stop_tracing(self) -> None:
        """The rest is only sampled. Calls that have not returned yet will not be counted."""
        if self._tracing_ended:
            return
        self._tracing_ended = True
        if self._arguments is not None:
            self._arguments.stop()
        if self._tracer is not None:
            self._tracer.stop()

    def drop_in_child(self) -> None:
        """In a forked process, which has this thread only: nothing of the parent's goes on here."""
        sys.settrace(None)
        if self._tracer is not None:
            sys.setprofile(None)
            with suppress(ValueError):
                self._tracer.stop()

    def stop(self) -> None:
        """End. `stop_tracing` comes first."""
        if self._ended:
            return
        self._ended = clock.perf_counter()
        self._cpu_s = clock.process_time() - self._cpu_s
        self._children_s = _children_s() - self._children_s
        self._samples = self._sampler.stop()
        unmark()

    def record(self, command: str, arguments: list[str] | None = None) -> Record:
        """What was seen: after the end all of it, before it the samples so far."""
        samples = self._samples or self._sampler.samples()
        ended = self._samples is not None
        calls, tracing_s = self._calls() if ended else ([], 0.0)
        return Record(
            command=command,
            arguments=arguments or [],
            directory=os.getcwd(),
            started=self._started,
            pid=os.getpid(),
            machine=UNKNOWN,
            wall_s=(self._ended or clock.perf_counter()) - self._began,
            cpu_s=self._cpu_s if ended else clock.process_time() - self._cpu_s,
            children_cpu_s=self._children_s if ended else _children_s() - self._children_s,
            rate_hz=samples.rate_hz,
            sampling_cpu_s=samples.sampling_cpu_s,
            tracing_s=tracing_s,
            frames=list(self.places.frames),
            cpu=samples.cpu,
            waiting=samples.waiting,
            calls=calls,
            blocks=samples.blocks,
            gil=samples.gil,
            import_s=samples.import_s,
            notes=[
                *samples.notes,
                *(self._tracer.notes if self._tracer else []),
                *([_RESUMED] if not self.places.resumed.isdisjoint(c.frame for c in calls) else []),
            ],
        )

    def _look(self, threads: Mapping[int, Thread], now: float) -> float | None:
        if self._longest is not None:
            self._longest.look(threads, now)
        if self._on_look is not None:
            self._on_look(now)
        return self._arguments.look(now, len(threads)) if self._arguments is not None else None

    def _calls(self) -> tuple[list[Call], float]:
        if self._tracer is None:
            return [], 0.0
        places = self.places
        graph, tracing_s = tracing_costs.take_off(self._tracer.graph(places), places.frames, self._costs)
        longest = {places.of_code(code): s for code, s in self._longest.seconds()} if self._longest else {}
        again = {places.of_code(code): share for code, share in self._arguments.repeated()} if self._arguments else {}
        calls = []
        for number, node in sorted(graph.items(), key=lambda each: -each[1].all.cumulative_s):
            all_ = node.all
            seen: float | None = longest.get(number)
            if all_.primitive == 1:
                seen = all_.cumulative_s
            elif seen is not None:
                seen = max(seen, all_.cumulative_s / max(1, all_.primitive))
            callers = {caller: tuple(edge) for caller, edge in node.callers.items() if caller in graph}
            calls.append(
                Call(number, *all_, callers=callers, repeated=again.get(number), longest_s=seen)  # type: ignore[arg-type]
            )
        return calls, tracing_s


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
