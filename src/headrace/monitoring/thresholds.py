"""When it is too much: the numbers behind the alert rules."""

from __future__ import annotations

from dataclasses import dataclass


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
        memory_window_s, memory_horizon_s: what is drawn on for how long by a straight line; ``memory_for_s`` must be
            longer than a quarter of the window, or a start looks like growth.
        agent_objective, serving_objective: share of requests that must go well over 30 days.
        runbooks: where the pages about the alerts are; their names are appended.
    """

    job: str = "headrace"
    window_s: float = 300.0
    min_requests: int = 20

    error_ratio: float = 0.05
    error_for_s: float = 120.0
    few_requests: int = 3
    few_window_s: float = 3600.0
    few_for_s: float = 120.0
    agent_latency_s: float = 30.0
    serving_latency_s: float = 5.0
    latency_for_s: float = 300.0
    llm_failure_ratio: float = 0.10
    llm_failure_for_s: float = 180.0

    queue_size: int = 100
    queue_for_s: float = 60.0
    shed_ratio: float = 0.10
    shed_for_s: float = 300.0

    target_down_for_s: float = 60.0
    worker_down_for_s: float = 120.0
    no_worker_for_s: float = 60.0
    restarts: int = 3
    restart_window_s: float = 600.0
    restart_for_s: float = 60.0
    memory_limit_bytes: int = 0
    memory_window_s: float = 3600.0
    memory_horizon_s: float = 4 * 3600.0
    memory_for_s: float = 1800.0
    gpu_memory_ratio: float = 0.90
    gpu_memory_for_s: float = 300.0

    store_down_for_s: float = 60.0
    no_progress_s: float = 600.0
    lease_losses: int = 3
    lease_window_s: float = 900.0
    lease_for_s: float = 60.0

    agent_objective: float = 0.99
    serving_objective: float = 0.99
    burn_for_s: float = 120.0

    runbooks: str = "docs/runbooks"
