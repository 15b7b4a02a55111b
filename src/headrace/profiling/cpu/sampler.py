"""The sampler: a thread of this process that looks, some ten times a second, at what all others and all tasks do.

    sampler = Sampler(budget=0.01)
    sampler.start()
    ...
    seen = sampler.stop()      # seen.cpu, seen.waiting, seen.blocks, seen.gil

It may run in a live server: it keeps to its budget by looking less often, draws some of many tasks, and changes nothing
but that a busy event loop gets one empty callback for a look. What it does not see: functions of C by their own name,
other processes, threads that run no Python, and what runs for less than the switch interval between two waits.

That last is because it needs the interpreter's lock to look. Whoever runs Python gives the lock up when it begins to
wait, or after the switch interval, 5 ms, at the latest: of handlers that take 2 ms nothing but the end is ever seen.
With `switch_s` the interval is shorter for as long as the sampler runs.
"""

from __future__ import annotations

import _thread
import os
import random
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

from headrace import clock
from headrace.errors import ConfigError, SetupError
from headrace.profiling.cpu.awaits import Awaits
from headrace.profiling.cpu.loops import Loops
from headrace.profiling.cpu.places import Places
from headrace.profiling.cpu.tally import Tally
from headrace.profiling.cpu.threads import Thread, Threads
from headrace.profiling.record import Block, Frame, Gil, Stack
from headrace.stats import median

BUDGET = 0.01
MOST_HZ = 100.0
# Pauses differ, or a program that does something a hundred times a second would always be seen doing the same.
_JITTER = 0.2
_LONGEST_PAUSE_S = 1.0
_KEPT_LATENESS = 10_000
# Of the switch interval. Who is woken later asks the kernel why.
_PROMPT = 0.2
_IMPORTING = ("<frozen importlib._bootstrap>", "_find_and_load")


class Samples(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen. The fields have the meaning of those of `record.Record`.

    Args:
        seconds: how long it was looked.
        samples: how often.
    """

    frames: list[Frame]
    cpu: list[Stack]
    waiting: list[Stack]
    blocks: list[Block]
    gil: Gil | None
    seconds: float
    samples: int
    rate_hz: float
    sampling_cpu_s: float
    import_s: float
    notes: list[str]


class Sampler:
    """Samples this process until it is stopped.

    Args:
        budget: processor time that it may take: 0.01 is 1 % of one core.
        rate_hz: looks per second at most.
        seconds: it stops by itself after this time; what it has seen stays to be fetched.
        places: shared with others that number functions, who must not use it while it runs.
        credit_s: processor time that it may take before the budget counts. Everything is seen for the first time then,
            which takes longest; without it little is seen of a second.
        skipped: identifiers of threads that are not looked at; its own is added.
        switch_s: the switch interval meanwhile, if it is longer now; see above. Threads that compute in Python at once
            take turns that much more often.
        on_look: called after each look, on the sampler's thread and from its budget; it may say after how many seconds
            it wants to be called again, if that is sooner.

    Raises:
        ConfigError: a number makes no sense.
    """

    def __init__(
        self,
        *,
        budget: float = BUDGET,
        rate_hz: float = MOST_HZ,
        seconds: float | None = None,
        credit_s: float = 0.0,
        places: Places | None = None,
        skipped: set[int] | None = None,
        switch_s: float | None = None,
        on_look: Callable[[Mapping[int, Thread], float], float | None] | None = None,
    ) -> None:
        if not 0 < budget <= 1:
            raise ConfigError(f"a budget of {budget:g} cores is none", field="budget", hint="0.01 is 1 % of a core")
        if not 0 < rate_hz <= 10_000:
            raise ConfigError(f"it cannot be looked {rate_hz:g} times a second", field="rate_hz", hint="100 is much")
        if seconds is not None and not seconds > 0:
            raise ConfigError("no time is left to look", field="seconds")
        self._budget, self._shortest_s, self._most_s = budget, 1 / rate_hz, seconds
        self._credit_s = credit_s
        self._usual_s = sys.getswitchinterval()
        self._late = _Late(min(self._usual_s, switch_s or self._usual_s))
        self.places = places or Places()
        self._on_look = on_look
        self._cpu, self._waiting = Tally(), Tally()
        self._skipped = set() if skipped is None else skipped
        self._threads = Threads(self.places, self._skipped)
        self._awaits = Awaits(self.places, self._waiting)
        self._loops = Loops(self.places)
        self._draw = random.Random()
        self._began = self._last = self._spent_s = 0.0
        self._samples = self._runnable = 0
        self._crowded_s = 0.0
        self._failure = ""
        self._stopping = False
        self._wake, self._ended = _thread.allocate_lock(), _thread.allocate_lock()

    def start(self) -> None:
        """Begin. Raises `SetupError` if it has begun before: what was seen is of one stretch of time."""
        if self._began:
            raise SetupError("this sampler has run already", hint="make a new one")
        self._wake.acquire()
        self._ended.acquire()
        self._began = self._last = clock.perf_counter()
        # Not a `threading.Thread`: nothing that the program counts, follows or waits for.
        self._skipped.add(_thread.start_new_thread(self._run, ()))

    def stop(self) -> Samples:
        """End, and give what was seen."""
        self._stopping = True
        with suppress(RuntimeError):  # stopped before
            self._wake.release()
        with self._ended:
            return self.samples()

    def samples(self) -> Samples:
        """What was seen so far."""
        cpu, waiting = self._cpu.stacks(self.places), self._waiting.stacks(self.places)
        seconds = self._last - self._began
        gil = None
        if self._samples:
            crowded = self._crowded_s / seconds
            gil = Gil(self._runnable / self._samples, self._late.median(), crowded, self._late.switch_s)
        return Samples(
            frames=list(self.places.frames),
            cpu=cpu,
            waiting=waiting,
            blocks=list(self._loops.blocks),
            gil=gil,
            seconds=seconds,
            samples=self._samples,
            rate_hz=self._samples / seconds if seconds > 0 else 0.0,
            sampling_cpu_s=self._spent_s,
            import_s=_importing_s([*cpu, *waiting], self.places.frames),
            notes=[f"the sampler ended early: {self._failure}"] if self._failure else [],
        )

    def _run(self) -> None:
        self._skipped.add(_thread.get_ident())
        shortened = self._late.switch_s < self._usual_s
        try:
            if shortened:
                sys.setswitchinterval(self._late.switch_s)
            self._look_until_woken()
        except Exception as error:  # the program must not suffer for it
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._failure = f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}:{place.lineno})"
        finally:
            if shortened:
                sys.setswitchinterval(self._usual_s)
            self._loops.end(clock.perf_counter())
            self._ended.release()

    def _look_until_woken(self) -> None:
        self._late.open()
        spent, owed_s = clock.thread_time(), 0.0
        pause = self._shortest_s * self._draw.random()
        due = clock.perf_counter() + pause
        while not self._wake.acquire(timeout=pause):
            now = clock.perf_counter()
            if self._most_s is not None and now - self._began >= self._most_s:
                break
            soon = self._look(now)
            self._late.note(now - due)
            # Each look is paid for by the pause after it: the budget holds whatever a look costs.
            before, spent = spent, clock.thread_time()
            self._spent_s = spent
            paid = min(self._credit_s, spent - before)
            self._credit_s -= paid
            owed_s += max(self._shortest_s, (spent - before - paid) / self._budget)
            pause = min(_LONGEST_PAUSE_S, owed_s if soon is None else soon)
            owed_s = max(0.0, owed_s - pause)
            pause *= 1 + _JITTER * (2 * self._draw.random() - 1)
            due = clock.perf_counter() + pause
        self._late.close()

    def _look(self, now: float) -> float | None:
        if self._stopping:
            return None
        before, gap = self._last, now - self._last
        self._last = now
        threads = self._threads.look(gap)
        loops = self._awaits.look(gap)
        self._loops.look(before, now, loops, threads)
        running = 0
        for thread in threads.values():
            if not thread.places:
                continue  # it is in our own code
            if thread.running:
                running += 1
                self._cpu.add(thread.name, "", thread.places, gap)
            elif thread.reason == "loop":
                # What it waits for, its tasks say; without any it waits for its sockets.
                if not loops:
                    self._waiting.add(thread.name, "socket", thread.sits, gap)
            elif thread.reason != "idle":
                self._waiting.add(thread.name, thread.reason, thread.sits, gap)
        self._samples += 1
        self._runnable += running
        self._crowded_s += gap if running > 1 else 0.0
        soon = self._on_look(threads, now) if self._on_look is not None else None
        self._threads.let_go()
        return soon


class _Late:
    """How late the sampler's own thread is woken, for want of the interpreter's lock and not of a processor.

    The kernel says how long the thread stood in the queue for a processor; the rest is the lock.

    Args:
        switch_s: the switch interval meanwhile.
    """

    def __init__(self, switch_s: float) -> None:
        self.switch_s = switch_s
        self._prompt_at_most_s = _PROMPT * switch_s
        self._seconds: list[float] = []
        self._file = -1
        self._queued_s = self._prompt_s = 0.0

    def open(self) -> None:
        with suppress(OSError):  # not Linux
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
            self._queued_s = self._queued()

    def note(self, late_s: float) -> None:
        """Of the look that has just ended. (Not before it: asking the kernel lets others run.)"""
        if late_s < self._prompt_at_most_s:
            self._prompt_s += late_s
        else:
            # What it stood in the queue since it was asked last, less what is known of the times between.
            before, self._queued_s = self._queued_s, self._queued()
            queued = max(0.0, self._queued_s - before - self._prompt_s)
            self._prompt_s = 0.0
            late_s = max(0.0, late_s - queued)
        if len(self._seconds) < _KEPT_LATENESS:
            self._seconds.append(late_s)

    def median(self) -> float:
        return median(list(self._seconds)) if self._seconds else 0.0

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _queued(self) -> float:
        if self._file < 0:
            return 0.0
        return int(os.pread(self._file, 100, 0).split()[1]) / 1e9


def _importing_s(stacks: list[Stack], frames: list[Frame]) -> float:
    importing = {n for n, frame in enumerate(frames) if (frame.file, frame.function) == _IMPORTING}
    return sum(stack.seconds for stack in stacks if not importing.isdisjoint(stack.frames))
