"""headrace: from "it runs" to "it survives production traffic".

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.client import AsyncClient, Client, Prediction
    from headrace.define import agent
    from headrace.dynamic import DynamicBatcher
    from headrace.errors import (
        ConfigError,
        DeadlineExceeded,
        HeadraceError,
        InvalidInput,
        LoadError,
        Overloaded,
        RunnerError,
        TaskCancelled,
        TaskFailed,
        Unavailable,
    )
    from headrace.library import App, serve
    from headrace.optimizing.library import Ladder, optimize
    from headrace.profiling.block import profiling
    from headrace.profiling.leak import find_leak
    from headrace.profiling.linewise import profile_lines, run_lines
    from headrace.profiling.memory import memory_diff, memory_usage
    from headrace.profiling.timing import timed, timeit
    from headrace.profiling.watch import watch_torch
    from headrace.tasks_client import AsyncTasks, Task, TaskEvent, Tasks
    from headrace.tracking.export import MetricsMiddleware, metrics_app, start_metrics_server
    from headrace.tracking.track import track_llm_call, track_request, track_tool
    from headrace.version import __version__

__all__ = [
    "App",
    "AsyncClient",
    "AsyncTasks",
    "Client",
    "ConfigError",
    "DeadlineExceeded",
    "DynamicBatcher",
    "HeadraceError",
    "InvalidInput",
    "Ladder",
    "LoadError",
    "MetricsMiddleware",
    "Overloaded",
    "Prediction",
    "RunnerError",
    "Task",
    "TaskCancelled",
    "TaskEvent",
    "TaskFailed",
    "Tasks",
    "Unavailable",
    "__version__",
    "agent",
    "find_leak",
    "memory_diff",
    "memory_usage",
    "metrics_app",
    "optimize",
    "profile_lines",
    "profiling",
    "run_lines",
    "serve",
    "start_metrics_server",
    "timed",
    "timeit",
    "track_llm_call",
    "track_request",
    "track_tool",
    "watch_torch",
]

_HOMES = {
    "App": "library",
    "AsyncClient": "client",
    "AsyncTasks": "tasks_client",
    "Client": "client",
    "DynamicBatcher": "dynamic",
    "Ladder": "optimizing.library",
    "MetricsMiddleware": "tracking.export",
    "Prediction": "client",
    "Task": "tasks_client",
    "TaskEvent": "tasks_client",
    "Tasks": "tasks_client",
    "__version__": "version",
    "agent": "define",
    "find_leak": "profiling.leak",
    "memory_diff": "profiling.memory",
    "memory_usage": "profiling.memory",
    "metrics_app": "tracking.export",
    "optimize": "optimizing.library",
    "profile_lines": "profiling.linewise",
    "profiling": "profiling.block",
    "run_lines": "profiling.linewise",
    "serve": "library",
    "start_metrics_server": "tracking.export",
    "timed": "profiling.timing",
    "timeit": "profiling.timing",
    "track_llm_call": "tracking.track",
    "track_request": "tracking.track",
    "track_tool": "tracking.track",
    "watch_torch": "profiling.watch",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    return getattr(importlib.import_module(f"headrace.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
