"""When it is too much: the numbers behind the alert rules."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from headrace.errors import ConfigError

Share = Annotated[float, Meta(gt=0, lt=1)]
Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class Thresholds:
    """Bounds, windows and waiting times. Shares are between 0 and 1, sizes in bytes, times in seconds.

    Args:
        job: under which Prometheus scrapes headrace; jobs whose names begin so are taken for headrace's too.
        window_s: over which rates are taken; at least four times the interval between scrapes.
        min_requests: a ratio over fewer requests says nothing.
        few_requests, few_window_s: so many within that time, and all failed, is an alert all the same.
        queue_for_s: how long the queue must have been too long, and be it still.
        memory_limit_bytes: what a process may take; 0 means twice what it takes now.
        memory_window_s, memory_horizon_s: what is drawn on for how long by a straight line.
        memory_for_s: longer than a quarter of that window, or a start would look like growth.
        agent_objective, serving_objective: share of requests that must go well over 30 days.
        runbooks: where the pages about the alerts are; their names are appended.
    """

    job: str = "headrace"
    window_s: Seconds = 300.0
    min_requests: Count = 20

    error_ratio: Share = 0.05
    error_for_s: Seconds = 120.0
    few_requests: Count = 3
    few_window_s: Seconds = 3600.0
    few_for_s: Seconds = 120.0
    agent_latency_s: Seconds = 30.0
    serving_latency_s: Seconds = 5.0
    latency_for_s: Seconds = 300.0
    llm_failure_ratio: Share = 0.10
    llm_failure_for_s: Seconds = 180.0

    queue_size: Count = 100
    queue_for_s: Seconds = 60.0
    shed_ratio: Share = 0.10
    shed_for_s: Seconds = 300.0

    target_down_for_s: Seconds = 60.0
    worker_down_for_s: Seconds = 120.0
    no_worker_for_s: Seconds = 60.0
    restarts: Count = 3
    restart_window_s: Seconds = 600.0
    restart_for_s: Seconds = 60.0
    memory_limit_bytes: Annotated[int, Meta(ge=0)] = 0
    memory_window_s: Seconds = 3600.0
    memory_horizon_s: Seconds = 4 * 3600.0
    memory_for_s: Seconds = 1800.0
    gpu_memory_ratio: Share = 0.90
    gpu_memory_for_s: Seconds = 300.0

    store_down_for_s: Seconds = 60.0
    no_progress_s: Seconds = 600.0
    lease_losses: Count = 3
    lease_window_s: Seconds = 900.0
    lease_for_s: Seconds = 60.0

    agent_objective: Share = 0.99
    serving_objective: Share = 0.99
    burn_for_s: Seconds = 120.0

    runbooks: str = "docs/runbooks"


def from_table(table: Mapping[str, Any], runbooks: str) -> Thresholds:
    """What the table ``[alerts]`` of the configuration says, the defaults elsewhere.

    Raises:
        ConfigError: names the field that is unknown or out of its bounds.
    """
    known = [field.name for field in dataclasses.fields(Thresholds)]
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "docs/configuration.md lists them"
            raise ConfigError(f"[alerts] has an unknown option {name!r}", field=f"alerts.{name}", hint=hint)
    try:
        return msgspec.convert({"runbooks": runbooks, **table}, Thresholds)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        raise ConfigError(message, field=f"alerts.{where.rstrip('`')}") from None
