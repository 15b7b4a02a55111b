"""The rendered files before the programs that read them: promtool and amtool accept them, the rules do what their
scenarios say, and the scenarios reject the rules that are most often copied."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import programs_of
from headrace.monitoring.alert import Alert
from headrace.monitoring.prometheus import Scraping
from headrace.monitoring.render import render, rule_file, scenario_file, scenarios
from headrace.monitoring.rules import groups
from headrace.monitoring.thresholds import Thresholds
from headrace.monitoring.yamltext import dump

DEFAULTS = Thresholds()
# Numbers that share nothing with the defaults.
OTHERS = Thresholds(
    job="ml",
    window_s=120.0,
    min_requests=7,
    error_ratio=0.3,
    error_for_s=45.0,
    few_requests=5,
    few_window_s=1800.0,
    agent_latency_s=45.0,
    serving_latency_s=0.2,
    latency_for_s=60.0,
    llm_failure_ratio=0.02,
    queue_size=33,
    queue_for_s=20.0,
    shed_ratio=0.5,
    target_down_for_s=20.0,
    restarts=5,
    memory_limit_bytes=3 * 2**30,
    memory_window_s=1200.0,
    memory_for_s=400.0,
    gpu_memory_ratio=0.5,
    no_progress_s=100.0,
    lease_losses=1,
    agent_objective=0.9,
    serving_objective=0.999,
)


@pytest.fixture(scope="module")
def programs() -> dict[str, str]:
    names = ("promtool", "amtool")
    return dict(zip(names, programs_of("prometheus prometheus-alertmanager", *names), strict=True))


def run(*command: str | Path) -> str:
    """Output of a check that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("keyed", [False, True])
def test_the_programs_accept_what_is_rendered(tmp_path: Path, programs: dict[str, str], keyed: bool) -> None:
    render(tmp_path, DEFAULTS, Scraping(targets=["a:8000", "[::1]:8000"], keyed=keyed), api_key="secret")
    found = run(programs["promtool"], "check", "config", tmp_path / "prometheus.yml")
    assert f"{len(groups(DEFAULTS))} rule files found" in found
    for name, rules in groups(DEFAULTS).items():
        found = run(programs["promtool"], "check", "rules", "--lint-fatal", tmp_path / "rules" / f"{name}.yml")
        assert f"{len(rules)} rules found" in found
    assert "inhibit rules" in run(programs["amtool"], "check-config", tmp_path / "alertmanager.yml")


# A month of objectives takes promtool ten seconds; with other thresholds `make soak` waits for it too.
SCENARIOS = [
    pytest.param(
        thresholds,
        group,
        id=f"{name}-{group}",
        marks=pytest.mark.long if (name, group) == ("others", "slo") else (),
    )
    for name, thresholds in (("defaults", DEFAULTS), ("others", OTHERS))
    for group in groups(DEFAULTS)
]


@pytest.mark.parametrize(("thresholds", "group"), SCENARIOS)
def test_the_rules_do_what_their_scenarios_say(
    tmp_path: Path, programs: dict[str, str], thresholds: Thresholds, group: str
) -> None:
    render(tmp_path, thresholds)
    run(programs["promtool"], "test", "rules", tmp_path / "tests" / f"{group}.yml")


@dataclass(frozen=True)
class Wrong:
    """A rule as it is often written.

    Args:
        expr: in the place of that of the alert of this name and part.
        scenario: beginning of the name of one that must reject it.
        silent: whether it is wrong there because it does not fire, rather than because it does.
    """

    what: str
    alert: str
    part: str
    expr: str
    scenario: str
    silent: bool = False


def rate(status: str, by: str = "job, model") -> str:
    """Tasks per second whose status matches."""
    return f"sum by ({by}) (rate(agent_requests_total{{status{status}}}[5m]))"


ERROR, NO_SUCCESS = '="error"', '!="success"'
FAILED, FINISHED, EVERY = '=~"error|timeout"', '=~"success|error|timeout"', '=~".*"'
_ENOUGH = 'sum by (job, model) (increase(agent_requests_total{status=~"success|error|timeout"}[5m])) >= 20'
WRONG = [
    Wrong(
        "a ratio that divides each series by itself",
        "HighErrorRate",
        "agents",
        'rate(agent_requests_total{status="error"}[5m]) / rate(agent_requests_total[5m]) > 0.05',
        "few of the tasks fail",
    ),
    Wrong(
        "the same for language models",
        "LLMAPIFailureRate",
        "llm",
        'rate(llm_api_calls_total{status="error"}[5m]) / rate(llm_api_calls_total[5m]) > 0.1',
        "few calls of a language model fail",
    ),
    Wrong(
        "errors alone, without timeouts",
        "HighErrorRate",
        "agents",
        f"{rate(ERROR)} / {rate(FINISHED)} > 0.05 and {_ENOUGH}",
        "all tasks time out",
        silent=True,
    ),
    Wrong(
        "all that is no success",
        "HighErrorRate",
        "agents",
        f"{rate(NO_SUCCESS)} / {rate(EVERY)} > 0.05 and {_ENOUGH}",
        "half of the tasks are cancelled",
    ),
    Wrong(
        "cancelled ones below the line",
        "HighErrorRate",
        "agents",
        f"{rate(FAILED)} / {rate(EVERY)} > 0.05 and {_ENOUGH}",
        "many tasks fail among more that are cancelled",
        silent=True,
    ),
    Wrong(
        "no number of requests behind the ratio",
        "HighErrorRate",
        "agents",
        f"{rate(FAILED)} / {rate(FINISHED)} > 0.05",
        "one of three tasks fails",
    ),
    Wrong(
        "each server by itself",
        "HighErrorRate",
        "agents",
        f"{rate(FAILED, 'job, model, instance')} / {rate(FINISHED, 'job, model, instance')} > 0.05",
        "all tasks fail on a server that gets hardly any",
    ),
    Wrong(
        "counters as they stand",
        "HighErrorRate",
        "agents",
        'sum by (job, model) (agent_requests_total{status=~"error|timeout"})\n'
        '/ sum by (job, model) (agent_requests_total{status=~"success|error|timeout"}) > 0.05',
        "no tasks at night",
    ),
    Wrong(
        "a p99 of each process",
        "HighP99Latency",
        "agents",
        "histogram_quantile(0.99, rate(agent_request_duration_seconds_bucket[5m])) > 30",
        "tasks are fast, but for one on a quiet server",
    ),
    Wrong(
        "the mean instead of the p99",
        "HighP99Latency",
        "agents",
        "sum by (job, model) (rate(agent_request_duration_seconds_sum[5m]))\n"
        "/ sum by (job, model) (rate(agent_request_duration_seconds_count[5m])) > 30",
        "three in a hundred tasks are slow",
        silent=True,
    ),
    Wrong(
        "the batch lane with the others",
        "HighP99Latency",
        "agents",
        "histogram_quantile(0.99, sum by (job, model, le) (rate(agent_request_duration_seconds_bucket[5m]))) > 30",
        "the batch lane is busy for an hour",
    ),
    Wrong(
        "refusals with the others",
        "HighP99Latency",
        "serving",
        "histogram_quantile(0.99, sum by (job, model, le) (rate(headrace_request_duration_seconds_bucket[5m]))) > 5",
        "requests are slow behind many that are refused",
        silent=True,
    ),
    Wrong(
        "the queue of each worker",
        "QueueBacklog",
        "serving",
        "request_queue_size > 100",
        "two servers with six tenths of the bound each",
        silent=True,
    ),
    Wrong(
        "the longest that the queue has been",
        "QueueBacklog",
        "serving",
        "sum by (job) (max_over_time(request_queue_size[5m])) > 100",
        "a queue that was long for a moment",
    ),
    Wrong(
        "a card of 16 GiB, which is larger",
        "GPUMemoryHigh",
        "",
        "gpu_memory_used_bytes > 16 * 1024 * 1024 * 1024 * 0.9",
        "a large card is used by a third",
    ),
    Wrong(
        "a card of 16 GiB, which is smaller",
        "GPUMemoryHigh",
        "",
        "gpu_memory_used_bytes > 16 * 1024 * 1024 * 1024 * 0.9",
        "a small card is full",
        silent=True,
    ),
    Wrong(
        "a straight line through a start",
        "MemoryGrowth",
        "",
        "predict_linear(process_resident_memory_bytes[1h], 14400) > 2 * process_resident_memory_bytes",
        "a process grows while it warms up",
    ),
    Wrong(
        "every exporter's process",
        "MemoryGrowth",
        "",
        "predict_linear(process_resident_memory_bytes[1h], 14400) > 2 * process_resident_memory_bytes\n"
        "and process_resident_memory_bytes offset 1h",
        "an exporter of others grows",
    ),
    Wrong(
        "no rule for a server that is gone",
        "TargetDown",
        "",
        "headrace_build_info == 0",
        "a server is gone",
        silent=True,
    ),
    Wrong(
        "tasks wait, whatever gets done",
        "NoProgress",
        "tasks",
        "sum by (job) (max by (job, lane) (headrace_task_queue_depth)) > 0",
        "tasks wait while long ones go on",
    ),
    Wrong(
        "each server's count of the one store",
        "NoProgress",
        "tasks",
        "sum by (job) (headrace_task_queue_depth) > 0 unless sum by (job) (increase(agent_requests_total[10m])) > 0\n"
        "unless sum by (job) (increase(headrace_task_steps_total[10m])) > 0",
        "tasks wait and nothing gets done",
    ),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.what)
def test_a_scenario_rejects(tmp_path: Path, programs: dict[str, str], wrong: Wrong) -> None:
    def replaced(alert: Alert) -> str:
        same = (alert.name, alert.labels.get("part", "")) == (wrong.alert, wrong.part)
        return wrong.expr if same else alert.expr

    ((name, got),) = dict(failures(tmp_path, programs["promtool"], replaced, wrong.scenario)).items()
    assert name.startswith(wrong.scenario)
    assert (got == "") == wrong.silent


def test_without_the_history_of_a_window_all_burns_would_fire_at_once(tmp_path: Path, programs: dict[str, str]) -> None:
    def replaced(alert: Alert) -> str:
        return alert.expr.partition("and on (job, model)\ncount")[0]

    name = "models burn their budgets fast"
    found = [got for _, got in failures(tmp_path, programs["promtool"], replaced, name)]
    for window in ("1h", "6h", "1d", "3d"):
        assert f'window="{window}"' in found[0]


def failures(folder: Path, promtool: str, replaced: Callable[[Alert], str], scenario: str) -> Iterator[tuple[str, str]]:
    """Run a scenario, known by the beginning of its name, on other expressions: name and what fired, for each check
    that fails."""
    ((group, case),) = [
        (group, case)
        for group, cases in scenarios(DEFAULTS).items()
        for case in cases
        if case.name.startswith(scenario)
    ]
    right = groups(DEFAULTS)[group]
    rules = [dataclasses.replace(rule, expr=replaced(rule)) if isinstance(rule, Alert) else rule for rule in right]
    assert rules != right
    (folder / "rules.yml").write_text(dump(rule_file(group, rules, DEFAULTS)))
    tests = folder / "tests.yml"
    tests.write_text(dump(scenario_file("rules.yml", rules, [case], DEFAULTS)))
    done = subprocess.run([promtool, "test", "rules", tests], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, "the scenario does not notice"
    said = done.stdout + done.stderr + "\n"
    blocks = re.findall(r"name: (.*?),\s+alertname: \w+, time: .*?got:\[(.*?)\]\n", said, re.DOTALL)
    assert blocks, said
    yield from ((name, got.strip()) for name, got in blocks)
