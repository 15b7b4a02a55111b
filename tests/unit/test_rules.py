"""Alert rules as data: what they read exists, what they say is true, and each is shown firing and silent."""

from __future__ import annotations

import dataclasses
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from headrace import config, metrics
from headrace.cli import main
from headrace.errors import ConfigError
from headrace.monitoring import alertmanager, prometheus
from headrace.monitoring.alert import Alert, Record
from headrace.monitoring.alertmanager import Routing
from headrace.monitoring.budget import BURNS, burns
from headrace.monitoring.prometheus import Scraping
from headrace.monitoring.render import render, scenarios
from headrace.monitoring.rules import alerts, groups
from headrace.monitoring.scenarios import Scenario
from headrace.monitoring.thresholds import Thresholds, from_table
from headrace.monitoring.words import duration, say, template
from headrace.monitoring.yamltext import dump

DEFAULTS = Thresholds()
RULES = [rule for rules in groups(DEFAULTS).values() for rule in rules]
ALERTS = alerts(DEFAULTS)
SCENARIOS = [each for found in scenarios(DEFAULTS).values() for each in found]
PAGES = ROOT / "docs" / "runbooks"
BY_NAME = {metric.name: metric for metric in metrics.CATALOGUE}
# Labels that Prometheus itself or a recording rule adds.
ADDED = {"job", "instance", "part", "le"}
VALUES = {
    "status": set(metrics.STATUSES) | set(metrics.STEP_STATUSES),
    "lane": set(metrics.LANES),
    "state": set(metrics.WORKER_STATES),
    "reason": set(metrics.REFUSAL_REASONS),
}


def key(alert: Alert) -> tuple[str, ...]:
    """What tells an alert from all others."""
    return (alert.name, alert.labels.get("part", ""), alert.labels.get("window", ""))


def series(expr: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Every series that an expression reads, with its matchers; text in quotes is not looked at."""
    functions = r"sum|max|count|rate|increase|by|on|and|or|unless|offset|absent|label_replace|\w+_over_time"
    functions += "|histogram_quantile|predict_linear"
    for name, braces in re.findall(
        r"(?<![\w\"$])([a-z_][\w:]*)(?:\{([^}]*)\})?", re.sub(r"by \(.*?\)|on \(.*?\)", "", expr)
    ):
        if not re.fullmatch(functions, name) and not re.fullmatch(r"[smhd]", name):
            yield name, dict(re.findall(r"(\w+)(?:=~|!=|=|!~)\"([^\"]*)\"", braces))


def unquoted(expr: str) -> str:
    """Without the words that `label_replace` puts in."""
    return re.sub(r'(, "[^"]*")+\)', ")", expr)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name} {dict(rule.labels)}")
def test_what_a_rule_reads_is_in_the_catalogue(rule: Alert | Record) -> None:
    recorded = {each.name for each in RULES if isinstance(each, Record)}
    read = list(series(unquoted(rule.expr)))
    assert read
    for name, matchers in read:
        if name == "up" or name in recorded:
            continue
        metric = BY_NAME.get(name) or BY_NAME[re.sub(r"_(bucket|count|sum)$", "", name)]
        assert name == metric.name or metric.kind == "histogram"
        assert set(matchers) <= {*metric.labels, *ADDED}, f"{name} has no such label"
        for label, value in matchers.items():
            assert label not in VALUES or set(value.split("|")) <= VALUES[label], f"{label} is never {value}"
        at_once = re.search(rf"{name}(\{{[^}}]*\}})?(?![\[{{\w])", rule.expr)
        assert metric.kind == "gauge" or not at_once, f"{name} is read as it stands: it begins again at a restart"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name} {dict(rule.labels)}")
def test_labels_that_a_rule_keeps_are_labels_of_what_it_reads(rule: Alert | Record) -> None:
    for kept, operand in re.findall(r"(?:sum|max|count) by \(([^)]*)\) \(([^\[]*)", rule.expr):
        names = [name for name, _ in series(operand)]
        for name in names:
            metric = BY_NAME.get(name) or BY_NAME.get(re.sub(r"_(bucket|count|sum)$", "", name))
            assert metric is None or set(kept.split(", ")) <= {*metric.labels, *ADDED}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: " ".join(key(alert)))
def test_each_alert_is_shown_firing_and_silent(alert: Alert) -> None:
    def fires_in(scenario: Scenario) -> bool:
        found = [each for check in scenario.checks for each in check.firing if each.alert == alert.name]
        return any(all(each.labels[name] == value for name, value in alert.labels.items()) for each in found)

    assert any(map(fires_in, SCENARIOS))
    assert not all(map(fires_in, SCENARIOS))


def test_scenarios_say_of_every_alert_at_every_moment_whether_it_fires(tmp_path: Path) -> None:
    render(tmp_path)
    seen = []
    for name, rules in groups(DEFAULTS).items():
        written = yaml.safe_load((tmp_path / "tests" / f"{name}.yml").read_text())
        assert written["rule_files"] == [f"../rules/{name}.yml"]
        for test in written["tests"]:
            seen.append(test["name"])
            moments: dict[str, set[str]] = {}
            for check in test["alert_rule_test"]:
                moments.setdefault(check["eval_time"], set()).add(check["alertname"])
            assert all(said == {rule.name for rule in rules if isinstance(rule, Alert)} for said in moments.values())
    assert len(seen) == len(SCENARIOS) == len(set(seen)) > 50


def test_after_two_and_a_half_hours_only_the_fastest_burn_can_fire() -> None:
    (scenario,) = [each for each in SCENARIOS if "fast, from the first hour" in each.name]
    early, later, _ = scenario.checks
    assert not [each for each in early.firing if each.alert == "ErrorBudgetBurn"]
    assert {each.labels["window"] for each in later.firing if each.alert == "ErrorBudgetBurn"} == {"1h"}


def test_each_alert_has_its_page_and_each_page_its_alert() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == {alert.name for alert in ALERTS}
    for path in PAGES.glob("*.md"):
        text = path.read_text()
        assert text.startswith(f"# {path.stem}\n")
        for heading in ("What it means", "Look first at", "What headrace does", "What you can do"):
            assert f"\n## {heading}\n" in text, f"{path.name} does not say: {heading}"


def test_what_the_pages_read_is_in_the_catalogue() -> None:
    for path in PAGES.glob("*.md"):
        for name in re.findall(
            r"\b((?:headrace|agent|llm_api|tool|gpu|process|request)_[a-z_]+)(?=[\[{)\s])", path.read_text()
        ):
            known = name in BY_NAME or re.sub(r"_(bucket|count|sum)$", "", name) in BY_NAME
            assert known or f"`{name}`" in path.read_text(), f"{path.name}: {name}"


def test_an_alert_points_to_its_page(tmp_path: Path) -> None:
    render(tmp_path, Thresholds(runbooks="https://example.org/pages/"))
    rules = [rule for path in (tmp_path / "rules").iterdir() for rule in rules_of(path)]
    for rule in rules:
        if "alert" in rule:
            assert rule["annotations"]["runbook_url"] == f"https://example.org/pages/{rule['alert']}.md"
            assert rule["labels"]["severity"] in ("critical", "warning")
    assert len([rule for rule in rules if "alert" in rule]) == len(ALERTS)


def rules_of(path: Path) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(path.read_text())["groups"]
    return list(group["rules"])


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Thresholds)])
def test_every_threshold_changes_a_rule(name: str, tmp_path: Path) -> None:
    value = getattr(DEFAULTS, name)
    other = value + "x" if isinstance(value, str) else value * 0.99 if isinstance(value, float) else value + 1

    def text(t: Thresholds) -> str:
        files = render(tmp_path, t)
        return "".join(path.read_text() for path in files if path.parent.name == "rules")

    assert text(dataclasses.replace(DEFAULTS, **{name: other})) != text(DEFAULTS)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"agent_latency_s": 600.0}, "agent_latency_s"),
        ({"serving_latency_s": 75.0}, "serving_latency_s"),
        ({"memory_for_s": 600.0}, "memory_for_s"),
        ({"memory_horizon_s": 3600.0}, "memory_for_s"),
    ],
)
def test_a_threshold_that_can_never_be_passed_is_refused(changed: dict[str, float], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        groups(dataclasses.replace(DEFAULTS, **changed))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_burns_that_even_a_total_failure_does_not_reach_are_left_out() -> None:
    assert burns(0.99) == list(BURNS)
    assert [burn.factor for burn in burns(0.9)] == [6, 3, 1]
    names = [key(alert) for alert in alerts(Thresholds(agent_objective=0.9))]
    assert ("ErrorBudgetBurn", "agents", "1h") not in names
    assert ("ErrorBudgetBurn", "serving", "1h") in names


@pytest.mark.parametrize(
    ("seconds", "written"), [(300, "5m"), (90, "90s"), (7200, "2h"), (259_200, "3d"), (0.5, "500ms"), (0, "1ms")]
)
def test_durations_are_written_in_one_unit(seconds: float, written: str) -> None:
    assert duration(seconds) == written


def test_a_summary_is_a_template_for_prometheus_and_a_sentence_for_the_tests() -> None:
    text = "{value} of {model} fail"
    assert template(text, "percent") == "{{ $value | humanizePercentage }} of {{ $labels.model }} fail"
    assert say(text, "percent", {"model": "m"}, 0.2) == "20% of m fail"
    assert say("{value}", "bytes", {}, 1.5 * 2**30) == "1.5GiB"
    assert say("{value}", "seconds", {}, 50.0) == "50 s"


def test_warnings_yield_to_critical_alerts_about_the_same_thing_only() -> None:
    for rule in alertmanager.inhibitions():
        assert "job" in rule["equal"]
    general = alertmanager.inhibitions()[0]
    assert {"part", "model"} <= set(general["equal"])
    assert all('part!=""' in general[side] for side in ("source_matchers", "target_matchers"))


def test_a_faster_burn_hushes_every_slower_one() -> None:
    pairs = set()
    for rule in alertmanager.inhibitions():
        if 'alertname="ErrorBudgetBurn"' in rule["source_matchers"]:
            (source,) = re.findall(r'window="(.*?)"', " ".join(rule["source_matchers"]))
            (targets,) = re.findall(r'window=~"(.*?)"', " ".join(rule["target_matchers"]))
            pairs |= {(source, target) for target in targets.split("|")}
    assert pairs == {("1h", "6h"), ("1h", "1d"), ("1h", "3d"), ("6h", "1d"), ("6h", "3d"), ("1d", "3d")}


def test_alerts_go_to_the_webhook_if_there_is_one() -> None:
    made = alertmanager.configuration(Routing(webhook="http://pager:9/x"))
    assert made["receivers"][0]["webhook_configs"] == [{"url": "http://pager:9/x", "send_resolved": True}]
    assert made["route"]["group_by"] == ["alertname", "model"]
    assert alertmanager.configuration(Routing())["receivers"] == [{"name": "headrace"}]


def test_every_server_is_scraped_under_the_job_that_the_rules_know() -> None:
    made = prometheus.configuration(Scraping(targets=["a:1", "b:2"], interval_s=5.0), "headrace")
    (job,) = made["scrape_configs"]
    assert (job["job_name"], job["static_configs"]) == ("headrace", [{"targets": ["a:1", "b:2"]}])
    assert "authorization" not in job
    assert made["global"]["scrape_timeout"] == "5s"


def test_the_command_writes_files_for_this_servers_port_and_key(tmp_path: Path) -> None:
    config = tmp_path / "headrace.toml"
    config.write_text('port = 8123\napi_keys = "first,second"\n')
    out = tmp_path / "out"
    (tmp_path / "out").mkdir()
    (out / "headrace.key").write_text("old")
    (out / "headrace.key").chmod(0o644)
    done = CliRunner().invoke(main, ["ops", "render", str(out), "--config", str(config), "--webhook", "http://p/"])
    assert done.exit_code == 0, done.output
    assert {str(path) for path in out.rglob("*") if path.is_file()} == set(done.output.split())
    assert (out / "headrace.key").read_text() == "first"
    assert stat.S_IMODE((out / "headrace.key").stat().st_mode) == 0o600
    scrape = yaml.safe_load((out / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"] == [{"targets": ["localhost:8123"]}]
    assert scrape["authorization"] == {"type": "Bearer", "credentials_file": "headrace.key"}
    assert "http://p/" in (out / "alertmanager.yml").read_text()


def test_the_command_wants_to_know_where_the_server_is(tmp_path: Path) -> None:
    config = tmp_path / "headrace.toml"
    config.write_text("port = 0\n")
    done = CliRunner().invoke(main, ["ops", "render", str(tmp_path / "out"), "--config", str(config)])
    assert isinstance(done.exception, ConfigError)
    assert "--target" in str(done.exception.hint)
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(main, ["ops", "render", str(tmp_path / "file" / "out")])
    assert isinstance(done.exception, ConfigError)
    for wrong in ("http://a:1", "a", "a:b"):
        done = CliRunner().invoke(main, ["ops", "render", str(tmp_path / "out"), "--target", wrong])
        assert done.exit_code == 2
    assert not (tmp_path / "out").exists()


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["5m", "a\nb", "on", "1e3", ".inf", "x: y"])
)


@given(st.recursive(LEAVES, lambda each: st.lists(each) | st.dictionaries(st.text(), each), max_leaves=20))
def test_yaml_that_is_written_is_read_as_what_it_was(value: Any) -> None:
    assert yaml.safe_load(dump(value, "a comment\nof two lines")) == value


def test_thresholds_come_from_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text("port = 9000\n[alerts]\nagent_latency_s = 60\nserving_objective = 0.999\nqueue_size = 7\n")
    found = from_table(config.table("alerts", file), "https://pages/")
    assert (found.agent_latency_s, found.serving_objective, found.queue_size) == (60, 0.999, 7)
    assert (found.runbooks, found.min_requests) == ("https://pages/", 20)
    assert config.load(file=file).port == 9000


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ({"agent_latncy_s": 1}, "alerts.agent_latncy_s"),
        ({"error_ratio": 1.5}, "alerts.error_ratio"),
        ({"min_requests": 0}, "alerts.min_requests"),
        ({"window_s": "long"}, "alerts.window_s"),
    ],
)
def test_a_wrong_threshold_is_refused_by_its_name(table: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_table(table, "")
    assert refused.value.field == field
