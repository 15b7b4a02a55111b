"""The dashboards' queries, asked of a real Prometheus that scrapes a real server which has served something."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from agents.scripted_llm import Line, ScriptedLLM
from conftest import AGENTS, MODELS, Server, free_port, programs_of, serving, submit, wait_for_end, wait_until
from headrace.monitoring.dashboards import dashboards

SETTINGS = """
global:
  scrape_interval: 500ms
scrape_configs:
  - job_name: headrace
    static_configs:
      - targets: ["127.0.0.1:{port}"]
  - job_name: prometheus
    static_configs:
      - targets: ["127.0.0.1:{own}"]
"""
BOARDS = {name: json.loads(text) for name, text in dashboards().items()}
TARGETS = [
    (name, panel["title"], target)
    for name, board in BOARDS.items()
    for panel in board["panels"]
    for target in panel.get("targets", [])
]
# Of these nothing has to be there on a machine without a GPU, or while nothing is refused or padded.
MAY_BE_EMPTY = {
    ("headrace-machine.json", "Fullest card"),
    ("headrace-machine.json", "GPU memory"),
    ("headrace-machine.json", "GPU memory used and total"),
    ("headrace-machine.json", "GPU utilisation"),
    ("headrace-machine.json", "GPU power"),
    ("headrace-serving.json", "Time to refuse"),
    ("headrace-serving.json", "Padding"),
}


@pytest.fixture(scope="module")
def prometheus_program() -> str:
    return programs_of("prometheus", "prometheus")[0]


@dataclass
class Prometheus:
    """A running one."""

    client: httpx.Client

    def ask(self, path: str, **arguments: str) -> Any:
        answer = self.client.get(f"/api/v1/{path}", params=arguments)
        body = answer.json()
        assert body["status"] == "success", f"{arguments}: {body['error']}"
        assert not body.get("warnings"), f"{arguments}: {body['warnings']}"
        return body["data"]

    def values(self, expr: str) -> list[float]:
        return [float(each["value"][1]) for each in self.ask("query", query=expr)["result"]]


@contextlib.contextmanager
def scraping(program: str, folder: Path, port: int) -> Iterator[Prometheus]:
    """Prometheus of our own, which scrapes this port and itself."""
    own = free_port()
    settings, log = folder / "prometheus.yml", folder / "prometheus.log"
    settings.write_text(SETTINGS.format(port=port, own=own))
    arguments = [
        f"--config.file={settings}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{own}",
        "--enable-feature=exemplar-storage",
    ]
    with log.open("wb") as out:
        process = subprocess.Popen([program, *arguments], stdout=out, stderr=out, cwd=folder)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{own}", timeout=10) as client:
            made = Prometheus(client)

            def scrapes() -> bool:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.HTTPError, json.JSONDecodeError):
                    return made.values("count(headrace_build_info)") == [1.0]
                return False

            wait_until(scrapes, 15, f"it scrapes the server: {log}")
            yield made
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def watched(prometheus_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A server of a model and of agents that has done some of everything, watched from its beginning."""
    folder = tmp_path_factory.mktemp("watched")
    config = folder / "headrace.toml"
    config.write_text('[models.picky]\ntarget = "models:Picky"\n')
    with ScriptedLLM() as llm:
        env = {"LLM_URL": llm.url, "AGENT_NOTES": str(folder / "notes"), "PYTHONPATH": str(MODELS)}
        env["OPENAI_API_KEY"] = "unused"
        options = ("assistant_app.py", "--config", str(config))
        with (
            serving(folder, *options, verb="up", cwd=AGENTS, env=env) as server,
            scraping(prometheus_program, folder, server.port) as prometheus,
        ):
            use(server, llm)
            wait_until(
                lambda: (
                    prometheus.values("sum(headrace_requests_total)") == [80.0]
                    and prometheus.values("sum(agent_requests_total)") == [4.0]
                    and prometheus.values('count_over_time(up{job="headrace"}[1m])') > [5.0]
                ),
                15,
                "Prometheus has seen all of it",
            )
            yield prometheus


def use(server: Server, llm: ScriptedLLM) -> None:
    """Of every four requests and tasks that are finished one fails; many more requests are the client's mistake."""
    expected = [("a", 200)] * 30 + [("bad", 500)] * 10 + [(7, 422)] * 40
    for value, status in expected:
        assert server.predict(value).status_code == status
    llm.scripts["forecaster"] = [
        Line(calls=[("weather", {"city": "Oslo"})]),
        Line(calls=[("final_result", {"coat": True, "because": "3.5 degrees"})]),
    ]
    llm.scripts["poet"] = [Line(status=400)]
    idents = [submit(server, agent, {"message": "go"}) for agent in ["forecaster"] * 3 + ["poet"]]
    ends = [wait_for_end(server, ident)["status"] for ident in idents]
    assert ends == ["completed"] * 3 + ["failed"]


def chosen(prometheus: Prometheus, board: dict[str, Any]) -> dict[str, str]:
    """What Grafana puts in for the variables when all is chosen: every value that there is."""
    found: dict[str, str] = {"__rate_interval": "1m", "__range": "5m"}
    for variable in board["templating"]["list"][1:]:
        series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
        values = prometheus.ask(f"label/{label}/values", **{"match[]": filled(series, found)})
        assert values, f"no choice for {variable['name']}"
        found[variable["name"]] = "(" + "|".join(re.escape(each).replace("\\", "\\\\") for each in values) + ")"
    return found


def filled(expr: str, values: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], expr)


def test_every_query_is_answered_and_shows_something(watched: Prometheus) -> None:
    empty = []
    for name, board in BOARDS.items():
        values = chosen(watched, board)
        assert values["job"] == "(headrace)", "Prometheus itself is a job too"
        for where, title, target in TARGETS:
            if where == name:
                found = watched.values(filled(target["expr"], values))
                if all(map(math.isnan, found)) and (name, title) not in MAY_BE_EMPTY:
                    empty.append(f"{name} {title}: {target['expr']}")
    assert not empty, "\n".join(empty)


def one_of(prometheus: Prometheus, name: str, title: str) -> list[float]:
    """The values that a panel's first query has."""
    target = next(target for where, each, target in TARGETS if (where, each) == (name, title))
    return prometheus.values(filled(target["expr"], chosen(prometheus, BOARDS[name])))


@pytest.mark.parametrize("name", ["headrace-serving.json", "headrace-agents.json"])
def test_one_failure_in_four_is_a_quarter_whatever_else_was_refused(watched: Prometheus, name: str) -> None:
    # Rates are drawn on to the edges of the window, for each series a little differently.
    assert one_of(watched, name, "Failures") == [pytest.approx(0.25, abs=0.03)]


def test_figures_are_those_of_what_was_done(watched: Prometheus) -> None:
    assert one_of(watched, "headrace-serving.json", "Workers ready") == [1.0]
    assert one_of(watched, "headrace-serving.json", "Restarts") == [0.0]
    assert one_of(watched, "headrace-serving.json", "Waiting") == [0.0]
    assert one_of(watched, "headrace-agents.json", "Open") == [0.0]
    assert one_of(watched, "headrace-agents.json", "Store") == [1.0]
    assert one_of(watched, "headrace-machine.json", "Servers") == [1.0]
    (p99,) = one_of(watched, "headrace-serving.json", "p99")
    assert 0 < p99 < 5


def test_a_dot_on_a_latency_panel_is_the_id_of_a_request(watched: Prometheus) -> None:
    for name, label in (("headrace-serving.json", "request_id"), ("headrace-agents.json", "task_id")):
        values = chosen(watched, BOARDS[name])
        exprs = [target["expr"] for where, _, target in TARGETS if where == name and target.get("exemplar")]
        assert exprs
        for expr in exprs:
            found = watched.ask("query_exemplars", query=filled(expr, values), start="0", end="9999999999")
            assert any(each["labels"][label] for series in found for each in series["exemplars"]), expr
