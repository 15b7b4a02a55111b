"""Whether a function leaks: `find_leak`, and what it is told.

A function runs in this process; a function's name in processes of its own, which measures cleaner, and there a leak
must show again in a second, fresh one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.errors import ConfigError
from headrace.profiling.leaking import process
from headrace.profiling.leaking.report import LeakReport
from headrace.profiling.leaking.search import Plan, search
from headrace.profiling.leaking.trend import LEAST


def find_leak(
    fn: Callable[[], Any] | str,
    *,
    iterations: int = 100,
    setup: Callable[[], Any] | str | None = None,
    warm_up: int | None = None,
    time_limit_s: float = 300.0,
) -> LeakReport:
    """Say whether a function leaks, what, where, and who holds it.

    Args:
        fn: without arguments, async or not; what it returns is dropped. Called in this process, on an event loop of its
            own; its name, ``"module:callable"``, in fresh processes.
        iterations: calls of the first run. A leak is confirmed by as many again, and by up to eight times as many where
            they take less than half a second. Memory of C wants at least 40.
        setup: called once before; a name if ``fn`` is one.
        warm_up: calls before the first run [default: a fifth of them, 5 to 50].
        time_limit_s: seconds for all of it; what cannot be said by then is ``inconclusive``.

    Raises:
        ConfigError: a number or the function makes no sense.
        LoadError: there is no function of that name.
        RunnerError: a function given by name raised, or its process died. (Raised in this process: its own exception.)
    """
    plan = make_plan(iterations, warm_up, time_limit_s)
    if isinstance(fn, str):
        if setup is not None and not isinstance(setup, str):
            raise ConfigError("in another process, setup must be a name", field="setup", hint="module:callable")
        return process.find(fn, setup, plan)
    if isinstance(setup, str):
        raise ConfigError("setup is a name, but the function is not", field="setup", hint="give both as functions")
    return search(fn, setup, plan)


def make_plan(iterations: int, warm_up: int | None, time_limit_s: float) -> Plan:
    """A plan from what the user asked for. Raises `ConfigError` for a number that makes no sense."""
    if iterations < LEAST:
        raise ConfigError(f"{iterations} calls tell nothing", field="iterations", hint=f"at least {LEAST}, better 100")
    if warm_up is not None and warm_up < 0:
        raise ConfigError("a warm-up cannot have less than no calls", field="warm_up")
    if not time_limit_s > 0:
        raise ConfigError("no time is left to look", field="time_limit_s")
    return Plan(iterations, max(5, min(50, iterations // 5)) if warm_up is None else warm_up, time_limit_s)
