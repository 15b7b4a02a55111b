"""Writes what Prometheus, Alertmanager and Grafana read: configuration, rules and their tests, dashboards.

prometheus.yml      what is scraped
rules/GROUP.yml     alerts, and what they compute beforehand
tests/GROUP.yml     for `promtool test rules tests/*.yml`
alertmanager.yml    who is told
grafana/            dashboards, and what makes Grafana find them and Prometheus
headrace.key        the key of the API, where it asks for one; for its owner's eyes only
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.monitoring import alertmanager, cases_fleet, cases_requests, prometheus
from headrace.monitoring.alert import Alert, Record, Rule
from headrace.monitoring.alertmanager import Routing
from headrace.monitoring.dashboards import dashboards, provisioning
from headrace.monitoring.prometheus import KEY_FILE, Scraping
from headrace.monitoring.rules import groups
from headrace.monitoring.scenarios import Scenario, promtool_file, templates
from headrace.monitoring.thresholds import Thresholds
from headrace.monitoring.words import duration
from headrace.monitoring.yamltext import dump

_MADE = "Made by `headrace ops render`; what is changed here is lost when it is made again."


def render(
    directory: Path,
    thresholds: Thresholds | None = None,
    scraping: Scraping | None = None,
    routing: Routing | None = None,
    *,
    api_key: str = "",
) -> list[Path]:
    """Write all files into a directory, which is made if it is not there.

    Args:
        api_key: what Prometheus shows to the servers; needed where ``scraping.keyed``.

    Returns:
        The files, in the order of their names.

    Raises:
        ConfigError: a threshold that no value of its metric can pass.
    """
    t, scraping = thresholds or Thresholds(), scraping or Scraping()
    contents = {
        "prometheus.yml": dump(prometheus.configuration(scraping, t.job), _MADE),
        "alertmanager.yml": dump(alertmanager.configuration(routing or Routing()), _MADE),
    }
    grafana = provisioning(scraping.url, scraping.interval_s)
    contents |= {f"grafana/provisioning/{name}": text for name, text in grafana.items()}
    contents |= {f"grafana/dashboards/{name}": text for name, text in dashboards().items()}
    cases = scenarios(t)
    for name, rules in groups(t).items():
        contents[f"rules/{name}.yml"] = dump(rule_file(name, rules, t), _MADE)
        contents[f"tests/{name}.yml"] = dump(scenario_file(f"../rules/{name}.yml", rules, cases[name], t), _MADE)
    for name, text in contents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if scraping.keyed:
        _write_secret(directory / KEY_FILE, api_key)
        contents[KEY_FILE] = ""
    return sorted(directory / name for name in contents)


def rule_file(name: str, rules: Sequence[Rule], t: Thresholds) -> dict[str, Any]:
    """One group of rules as Prometheus reads it."""
    return {"groups": [{"name": f"headrace-{name}", "rules": [_rule(rule, t) for rule in rules]}]}


def scenario_file(path: str, rules: Sequence[Rule], cases: Sequence[Scenario], t: Thresholds) -> dict[str, Any]:
    """The tests of one group, whose rules are at ``path``."""
    return promtool_file(path, [rule for rule in rules if isinstance(rule, Alert)], cases, t)


def scenarios(t: Thresholds) -> Mapping[str, list[Scenario]]:
    """All scenarios by group of rules."""
    return {**cases_requests.cases(t), **cases_fleet.cases(t)}


def _rule(rule: Rule, t: Thresholds) -> dict[str, Any]:
    if isinstance(rule, Record):
        return {"record": rule.name, "expr": rule.expr, "labels": dict(rule.labels)}
    assert isinstance(rule, Alert)
    return {
        "alert": rule.name,
        "expr": rule.expr,
        "for": duration(rule.for_s),
        "labels": {**rule.labels, "severity": rule.severity},
        "annotations": templates(rule, t),
    }


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # one that others could read would stay readable
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
