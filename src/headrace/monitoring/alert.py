"""What a rule is, whose requests there are, and the expressions that several rules share.

Every expression keeps to the same manners. `error` and `timeout` are failures; `rejected` and `cancelled` stand neither
above nor below the line, since they say nothing about the service. Both sides of a ratio are summed over the labels
that the alert keeps (`job` and, say, `model`): a bare division matches each series with itself. A ratio needs a number
of requests behind it. Counters are read with `rate` and `increase` only, so that restarts do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace import metrics
from headrace.monitoring.words import Severity, Unit, duration

FAILED = 'status=~"error|timeout"'
FINISHED = 'status=~"success|error|timeout"'


@dataclass(frozen=True)
class Record:
    """A value that is computed once for several rules."""

    name: str
    expr: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Alert:
    """One alert.

    Args:
        for_s: seconds that the expression must hold.
        summary: what happens, for people; ``{label}`` stands for a label of the alert, ``{value}`` for its value.
        action: what to look at first.
        unit: of the value, for the summary.
        labels: on top of those that the expression leaves.
    """

    name: str
    expr: str
    for_s: float
    severity: Severity
    summary: str
    action: str
    unit: Unit = "number"
    labels: Mapping[str, str] = field(default_factory=dict)


Rule = Record | Alert


@dataclass(frozen=True)
class Family:
    """Requests of one kind: where they are counted and timed.

    Args:
        part: value of the label ``part`` of its alerts.
        noun: what a request is called.
        requests: counter with the label ``status``.
        durations: histogram.
        apart: buckets of what is in ``durations`` too, and is left out of the latency alert.
    """

    part: str
    noun: str
    requests: metrics.Metric
    durations: metrics.Metric
    apart: str


# A task of the batch lane waits until there is time for it: that is what the lane is for. The labels of
# agent_request_duration_seconds are fixed and have no lane, so the same tasks are taken off by a second histogram.
AGENTS = Family(
    "agents",
    "tasks",
    metrics.AGENT_REQUESTS,
    metrics.AGENT_DURATION,
    f'{metrics.TASK_DURATION.name}_bucket{{lane="batch"}}',
)
# What is refused at the door is answered within milliseconds: it would hide how long the others wait.
SERVING = Family(
    "serving", "requests", metrics.REQUESTS, metrics.REQUEST_DURATION, f"{metrics.REFUSAL_DURATION.name}_bucket"
)


def failure_ratio(family: Family, window: str) -> str:
    name = family.requests.name
    return (
        f"sum by (job, model) (rate({name}{{{FAILED}}}[{window}]))\n"
        f"  / sum by (job, model) (rate({name}{{{FINISHED}}}[{window}]))"
    )


def finished(family: Family, window: str) -> str:
    return f"sum by (job, model) (increase({family.requests.name}{{{FINISHED}}}[{window}]))"


def early(series: str, window_s: float) -> str:
    """A series as it was in the first tenth of a window that ends now; nothing if it is younger than that."""
    return f"last_over_time({series}[{duration(window_s / 10)}] offset {duration(window_s * 0.9)})"
