"""The words in which dashboards are written: rows of panels as plain data. Knows nothing of how Grafana writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from boards.promql import quantile
from headrace.metrics import Metric
from headrace.monitoring.thresholds import Thresholds

# What the alerts call too much, unless they are told otherwise.
USUAL = Thresholds()

JOB = ("job", "Job", "label_values(headrace_build_info, job)")


@dataclass(frozen=True)
class Query:
    """One expression and what its lines are called.

    Args:
        exemplars: whether Prometheus may have ids of single requests for it.
    """

    expr: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        unit: Grafana's id of a unit.
        text: how to read it and what to do about it.
        kind: lines over time, the same stacked, or the present value as a figure.
        width: of 24 columns.
        limit: from here on it is red.
        words: text and colour to show instead of a value.
    """

    title: str
    unit: str
    text: str
    queries: Sequence[Query]
    kind: Literal["lines", "stack", "figure"] = "lines"
    width: int = 8
    limit: float | None = None
    words: Mapping[str, tuple[str, str]] | None = None


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Board:
    """A dashboard.

    Args:
        name: of its file, and the end of its uid.
        variables: name, label and query of each choice beside the data source.
    """

    name: str
    title: str
    text: str
    variables: Sequence[tuple[str, str, str]]
    rows: Sequence[Row]


def one(expr: str, legend: str, metric: Metric | None = None) -> list[Query]:
    """A single query, with exemplars where this histogram keeps some."""
    return [Query(expr, legend, bool(metric and metric.exemplar))]


def percentiles(metric: Metric, apart: Metric | None = None) -> list[Query]:
    """Of all servers and models together."""
    return [
        Query(quantile(q, metric, apart=apart), f"p{100 * q:g}", exemplars=bool(metric.exemplar))
        for q in (0.5, 0.95, 0.99)
    ]


def figure(
    title: str,
    unit: str,
    text: str,
    expr: str,
    *,
    width: int = 4,
    limit: float | None = None,
    words: Mapping[str, tuple[str, str]] | None = None,
) -> Panel:
    """One number, as it is at the end of what is shown."""
    return Panel(title, unit, text, one(expr, title), "figure", width, limit, words)
