"""A search for a leak in processes of its own: nothing but the function is there, and nobody else's memory moves.

A leak, and fragmentation, must show again in a second process, from its own start. What the function prints goes to
standard error; the answer goes through a file, because a function that leaks processes would hold a pipe open.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import msgspec

from headrace.clock import perf_counter
from headrace.errors import Fault, HeadraceError, RunnerError, from_fault, to_fault
from headrace.profiling.leaking.calls import import_function
from headrace.profiling.leaking.report import LeakReport
from headrace.profiling.leaking.search import Plan, search

_FIRST_SHARE = 0.6  # of the time for the first process, which also traces back
_GRACE_S = 3.0


class Job(msgspec.Struct, frozen=True):
    """What a child is told."""

    target: str
    setup: str | None
    plan: Plan


class Answer(msgspec.Struct, frozen=True):
    """What it answers: one of both."""

    report: LeakReport | None = None
    fault: Fault | None = None


def find(target: str, setup: str | None, plan: Plan) -> LeakReport:
    """Search in one process, and where something is found, in a second one. Raises as `leak.find_leak` does."""
    until = perf_counter() + plan.time_limit_s
    first = _ask(Job(target, setup, msgspec.structs.replace(plan, time_limit_s=_FIRST_SHARE * plan.time_limit_s)))
    if first.verdict not in ("leak", "fragmentation"):
        return msgspec.structs.replace(first, processes=1)
    left = max(1.0, until - perf_counter())
    second = _ask(Job(target, setup, msgspec.structs.replace(plan, time_limit_s=left, thorough=False)))
    return confirmed(first, second)


def confirmed(first: LeakReport, second: LeakReport) -> LeakReport:
    """One report of two that should say the same."""
    if (second.verdict, second.kind) != (first.verdict, first.kind):
        other = second.verdict + (f" ({second.kind})" if second.kind else "")
        return msgspec.structs.replace(
            first,
            verdict="inconclusive",
            kind=None,
            limit=None,
            processes=1,
            reason=f"one process says {first.verdict} ({first.kind}), a second says {other}: {second.reason}",
        )
    growth = (first.growth_per_iteration + second.growth_per_iteration) / 2
    if second.unit != first.unit:  # a container's entries here, its bytes there
        growth = first.growth_per_iteration
        second = msgspec.structs.replace(second, interval=first.interval)
    return msgspec.structs.replace(
        first,
        growth_per_iteration=growth,
        interval=(min(first.interval[0], second.interval[0]), max(first.interval[1], second.interval[1])),
        agreeing=first.agreeing + second.agreeing,
        processes=2,
    )


def _ask(job: Job) -> LeakReport:
    """Run a child to its end."""
    with tempfile.TemporaryDirectory(prefix="headrace-leak-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", __name__, msgspec.json.encode(job).decode(), str(answer)]
        # Large blocks always come from, and go back to, the system: otherwise what a walk over the heap takes for a
        # moment stays behind as room in which the function's own growth does not show.
        environment = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), **os.environ}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True, env=environment)
        try:
            code = process.wait(job.plan.time_limit_s + _GRACE_S)
        except subprocess.TimeoutExpired:
            return LeakReport("inconclusive", reason=f"a call had not ended after {job.plan.time_limit_s:.3g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):  # and what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        try:
            found = msgspec.json.decode(answer.read_bytes(), type=Answer)
        except OSError:
            how = f"of {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
            hint = "perhaps it had taken all memory: try fewer --iterations" if code == -signal.SIGKILL else None
            raise RunnerError(f"the process that called {job.target} ended {how}", hint=hint) from None
    if found.report is None:
        raise from_fault(found.fault or Fault("runner_error", "no answer"))
    return found.report


def main(job_text: str, file: str) -> None:
    """The child."""
    job = msgspec.json.decode(job_text, type=Job)
    path = Path(file)
    try:
        function = import_function(job.target)
        setup = import_function(job.setup) if job.setup else None
        answer = Answer(report=search(function, setup, job.plan))
    except HeadraceError as error:
        answer = Answer(fault=to_fault(error))
    except Exception as error:
        traceback.print_exc()
        answer = Answer(fault=Fault("runner_error", f"{job.target} raised {type(error).__name__}: {error}"))
    path.with_suffix(".part").write_bytes(msgspec.json.encode(answer))
    path.with_suffix(".part").rename(path)
    sys.stdout.flush()
    os._exit(0)  # threads that were leaked would be waited for


if __name__ == "__main__":
    main(*sys.argv[1:])
