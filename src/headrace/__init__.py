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
    from headrace.profiling.leak import find_leak
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
    "metrics_app",
    "serve",
    "start_metrics_server",
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
    "MetricsMiddleware": "tracking.export",
    "Prediction": "client",
    "Task": "tasks_client",
    "TaskEvent": "tasks_client",
    "Tasks": "tasks_client",
    "__version__": "version",
    "agent": "define",
    "find_leak": "profiling.leak",
    "metrics_app": "tracking.export",
    "serve": "library",
    "start_metrics_server": "tracking.export",
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
