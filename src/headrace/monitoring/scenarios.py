"""What the alerts must do, as tests that ``promtool test rules`` runs.

A scenario writes down the series that Prometheus would have scraped and says which alerts fire at which moment; all
others of its group must be silent then. It is made from the thresholds in force, so that it holds for whatever the
configuration says. The scenarios themselves are in `cases_requests` and `cases_fleet`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.monitoring.alert import Alert
from headrace.monitoring.thresholds import Thresholds
from headrace.monitoring.words import duration, number, say, template

INSTANCE = "a:8000"


@dataclass(frozen=True)
class Firing:
    """An alert that fires.

    Args:
        labels: those of the expression, and ``part`` or ``window`` where several alerts have the name; not the job.
        value: what its summary says.
    """

    alert: str
    labels: Mapping[str, str]
    value: float = 0.0


@dataclass(frozen=True)
class Check:
    """All alerts that fire at one moment."""

    at_s: float
    firing: Sequence[Firing] = ()


@dataclass
class Script:
    """The series of one scenario, still without their job: a sample every ``step_s`` for at least ``seconds``."""

    seconds: float
    step_s: float
    series: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return math.ceil(self.seconds / self.step_s)

    @property
    def end_s(self) -> float:
        return self.steps * self.step_s

    def put(self, name: str, values: str, instance: str = INSTANCE, **labels: str) -> None:
        pairs = ",".join(f'{key}="{value}"' for key, value in {**labels, "instance": instance}.items())
        self.series[f"{name}{{{pairs}}}"] = values

    def hold(self, value: float) -> str:
        return f"{number(value)}+0x{self.steps}"

    def grow(self, per_step: float, start: float = 0.0) -> str:
        return f"{number(start)}+{number(per_step)}x{self.steps}"

    def samples_in(self, seconds: float) -> int:
        return max(1, round(seconds / self.step_s))


@dataclass(frozen=True)
class Scenario:
    """One test. ``name`` is a sentence."""

    name: str
    script: Script
    checks: Sequence[Check]


def silent(name: str, script: Script) -> Scenario:
    """Nothing fires, neither at the end nor half-way."""
    return Scenario(name, script, [Check(script.end_s / 2), Check(script.end_s)])


def fires(name: str, script: Script, *firing: Firing, not_yet_s: float = 0.0) -> Scenario:
    """These fire at the end, and nothing yet at ``not_yet_s``."""
    early = [Check(not_yet_s)] if not_yet_s else []
    return Scenario(name, script, [*early, Check(script.end_s, firing)])


def promtool_file(
    rule_file: str, known: Sequence[Alert], scenarios: Sequence[Scenario], t: Thresholds
) -> dict[str, Any]:
    """A file for ``promtool test rules``.

    Args:
        rule_file: as seen from the folder of the file.
        known: the alerts of that file.
    """
    step_s = min(scenario.script.step_s for scenario in scenarios)
    return {
        "rule_files": [rule_file],
        "evaluation_interval": duration(step_s),
        "tests": [
            {
                "name": scenario.name,
                "interval": duration(scenario.script.step_s),
                "input_series": [
                    {"series": f'{series[:-1]},job="{t.job}"}}', "values": values}
                    for series, values in scenario.script.series.items()
                ],
                "alert_rule_test": list(_checks(scenario, known, t)),
            }
            for scenario in scenarios
        ],
    }


def _checks(scenario: Scenario, known: Sequence[Alert], t: Thresholds) -> Iterator[dict[str, Any]]:
    """One per moment and alert: which alerts are not expected is said as loudly."""
    for check in scenario.checks:
        names = {firing.alert for firing in check.firing}
        unknown = names - {alert.name for alert in known}
        if unknown:
            raise KeyError(f"{scenario.name}: no alert {unknown}")
        for name in sorted({alert.name for alert in known}):
            expected = [_expected(firing, known, t) for firing in check.firing if firing.alert == name]
            yield {"eval_time": duration(check.at_s), "alertname": name, "exp_alerts": expected}


def _expected(firing: Firing, known: Sequence[Alert], t: Thresholds) -> dict[str, Any]:
    (alert,) = [
        alert
        for alert in known
        if alert.name == firing.alert
        and all(firing.labels.get(key, value) == value for key, value in alert.labels.items())
    ]
    found = {"job": t.job, **firing.labels, **alert.labels, "severity": alert.severity}
    labels = {name: value for name, value in found.items() if value}
    told = {name: say(text, alert.unit, labels, firing.value) for name, text in notes(alert, t).items()}
    return {"exp_labels": labels, "exp_annotations": told}


def notes(alert: Alert, t: Thresholds) -> dict[str, str]:
    """Summary, first step and page of an alert, still with ``{label}`` and ``{value}``."""
    return {
        "summary": alert.summary,
        "description": alert.action,
        "runbook_url": f"{t.runbooks.rstrip('/')}/{alert.name}.md",
    }


def templates(alert: Alert, t: Thresholds) -> dict[str, str]:
    """The same as Prometheus reads them."""
    return {name: template(text, alert.unit) for name, text in notes(alert, t).items()}
