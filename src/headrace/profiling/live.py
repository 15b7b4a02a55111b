"""This process, looked at from inside while it serves: by the sampler alone, within its budget, for some seconds."""

from __future__ import annotations

import os
import threading

from headrace import clock
from headrace.profiling.cpu.sampler import Sampler, Samples
from headrace.profiling.record import Frame, Machine, Record, Stack

# Where somebody's work begins, a request's, a task's or a batch's: the end of the file, and of the function's name.
# A coroutine that is the outermost of its task, …
TASKS = (
    ("/uvicorn/protocols/http/httptools_impl.py", "RequestResponseCycle.run_asgi"),
    ("/uvicorn/protocols/websockets/websockets_sansio_impl.py", "WebSocketsSansIOProtocol.run_asgi"),
    ("/headrace/tasks/run.py", "Run._attempts"),
)
# … and a function on the stack of a thread.
THREADS = (
    ("/headrace/serving/worker_process.py", "_load"),
    ("/headrace/serving/worker.py", "Worker._run"),
    ("/headrace/serving/worker.py", "Worker._run_stream"),
)
# With fewer samples shares mean nothing.
_FEW = 20
# Handlers of a server take a millisecond or two, and then wait: with the usual 5 ms none of 2 ms was ever seen, with
# this half of them or more. Two threads that compute in Python at once use 8 % more processor time meanwhile.
_SWITCH_S = 0.0002
# Of a processor, for the sampler's own thread: event loops that it asks and turns that are taken more often cost a
# fifth on top, and all of it is to stay within 1 %.
_BUDGET = 0.008
# Of a processor. What uses less is idle, whatever it does then.
_MUCH = 0.1


def look(seconds: float, cancelled: threading.Event) -> Record:
    """Sample this process; its record has neither a command nor a machine yet.

    Of what waits, only what somebody waits for is in it: a server has a hundred threads and tasks that wait for work.

    Args:
        cancelled: ends it earlier.
    """
    sampler = Sampler(skipped={threading.get_ident()}, switch_s=_SWITCH_S, budget=_BUDGET)
    started, began, cpu_s = clock.wall(), clock.perf_counter(), clock.process_time()
    sampler.start()
    try:
        cancelled.wait(seconds)
    finally:
        wall_s, cpu_s = clock.perf_counter() - began, clock.process_time() - cpu_s
        samples = sampler.stop()
    waiting = on_behalf(samples.frames, samples.waiting)
    return Record(
        command="",
        directory=os.getcwd(),
        started=started,
        pid=os.getpid(),
        machine=Machine("", "", 0, "", ""),
        attached=True,
        wall_s=wall_s,
        cpu_s=cpu_s,
        rate_hz=samples.rate_hz,
        sampling_cpu_s=samples.sampling_cpu_s,
        frames=samples.frames,
        cpu=samples.cpu,
        waiting=waiting,
        blocks=samples.blocks,
        gil=samples.gil,
        import_s=samples.import_s,
        notes=_notes(samples, sum(stack.seconds for stack in waiting), wall_s, cpu_s),
    )


def on_behalf(frames: list[Frame], stacks: list[Stack]) -> list[Stack]:
    """Those waits that are part of a request, a task or a batch, or stand in the program's own code."""
    begins = {number for number, frame in enumerate(frames) if _is(frame, TASKS)}
    inside = {number for number, frame in enumerate(frames) if frame.kind == "user" or _is(frame, THREADS)}

    def kept(stack: Stack) -> bool:
        if begins.isdisjoint(stack.frames):
            return not inside.isdisjoint(stack.frames)
        return stack.frames[0] in begins  # a task that waits for one of these would count it twice

    return [stack for stack in stacks if kept(stack)]


def _is(frame: Frame, places: tuple[tuple[str, str], ...]) -> bool:
    return any(frame.function == name and frame.file.endswith(end) for end, name in places)


def _notes(samples: Samples, kept_s: float, wall_s: float, cpu_s: float) -> list[str]:
    notes = list(samples.notes)
    seen_s, used_s = sum(stack.seconds for stack in samples.cpu), cpu_s - samples.sampling_cpu_s
    if used_s > _MUCH * wall_s and seen_s < used_s / 2:
        notes.append(
            f"of {used_s:.2g} s of processor time {seen_s:.2g} s were seen: the rest are short bursts, "
            "which end before a look from inside gets its turn, or threads of C: `--pid` looks from outside"
        )
    if samples.samples < _FEW:
        notes.append(f"only {samples.samples} looks, which is all that 1 % of a core allows: look for longer")
    left_s = sum(stack.seconds for stack in samples.waiting) - kept_s
    if left_s >= 1:
        notes.append(f"{left_s:,.0f} task-seconds are left out in which the server itself waited for something to do")
    return notes
