"""Expressions for dashboards, made from the catalogue of metrics: an unknown label stops the build.

Every expression keeps to the manners of the alert rules. `error` and `timeout` are failures; `rejected` and `cancelled`
stand neither above nor below the line. Both sides of a ratio are summed over the same labels. A percentile is taken
over the sum of all servers, never averaged from those of each. Knows nothing of Grafana but its variables.
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace.metrics import LLM_CALLS, LLM_DURATION, Metric

FAILED = "error|timeout"
FINISHED = "success|error|timeout"

# At least four scrapes, which Grafana knows; and all that the dashboard shows.
_WINDOW = "$__rate_interval"
_RANGE = "$__range"
# Labels of what belongs to a machine or a process, where it makes a difference which server it is.
_PLACES = {"device", "process", "version"}


def series(metric: Metric, suffix: str = "", **where: str) -> str:
    """A selector: what the variables of the dashboard choose, and these labels by regular expression.

    Raises:
        ValueError: the metric has no such label.
    """
    check(metric, where)
    chosen = {"job": "$job"}
    if _PLACES & set(metric.labels):
        chosen["instance"] = "$instance"
    # The model of a call is a language model; the variable holds models that are served, or agents.
    if "model" in metric.labels and metric not in (LLM_CALLS, LLM_DURATION):
        chosen["model"] = "$model"
    matchers = [f'{label}=~"{value}"' for label, value in {**chosen, **where}.items()]
    # Every exporter has families of these names; ours have the label.
    if metric.name.startswith("process_"):
        matchers.append('process!=""')
    return f"{metric.name}{suffix}{{{', '.join(matchers)}}}"


def check(metric: Metric, labels: Iterable[str]) -> None:
    """Refuse labels that a metric does not have; Prometheus itself adds two to each, and one to buckets."""
    known = {*metric.labels, "job", "instance", *(["le"] if metric.kind == "histogram" else [])}
    if unknown := set(labels) - known:
        raise ValueError(f"{metric.name} has no label {', '.join(sorted(unknown))}")


def over(metric: Metric, how: str, by: str, inner: str) -> str:
    """Several series as one for each value of some labels."""
    labels = by.split()
    check(metric, labels)
    return f"{how} by ({', '.join(labels)}) ({inner})" if labels else f"{how}({inner})"


def value(metric: Metric, by: str = "", how: str = "sum", **where: str) -> str:
    """A gauge, as it is."""
    return over(metric, how, by, series(metric, **where))


def rate(metric: Metric, by: str = "", suffix: str = "", **where: str) -> str:
    """How fast a counter grows, per second."""
    return over(metric, "sum", by, f"rate({series(metric, suffix, **where)}[{_WINDOW}])")


def grown(metric: Metric, by: str = "", **where: str) -> str:
    """How much a counter has grown over all that is shown; whole, since Prometheus draws on to the edges of it."""
    return f"round({over(metric, 'sum', by, f'increase({series(metric, **where)}[{_RANGE}])')})"


def quantile(q: float, metric: Metric, by: str = "", apart: Metric | None = None) -> str:
    """A percentile of a histogram.

    Args:
        apart: a histogram of what is in the first one too and is left out.
    """
    labels = f"le {by}".strip()
    buckets = rate(metric, labels, "_bucket")
    if apart:
        buckets += f" - {rate(apart, labels, '_bucket')}"
    return f"histogram_quantile({q:g}, {buckets})"


def mean(metric: Metric, by: str = "") -> str:
    """The average of what a histogram has seen."""
    return ratio(rate(metric, by, "_sum"), rate(metric, by, "_count"))


def ratio(part: str, whole: str) -> str:
    """A quotient that is absent, rather than not a number, while there is nothing to divide by."""
    return f"{part} / ({whole} > 0)"


def failures(metric: Metric, by: str = "") -> str:
    """The share of what ended that failed; 0 also where no series of a failure exists yet."""
    finished = rate(metric, by, status=FINISHED)
    return ratio(f"({rate(metric, by, status=FAILED)} or 0 * {finished})", finished)
