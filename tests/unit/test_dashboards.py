"""The shipped dashboards: current, complete, readable by Grafana's own types, and true to the catalogue of metrics."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from conftest import ROOT
from headrace.metrics import CATALOGUE
from headrace.monitoring import dashboards as shipped

BY_NAME = {metric.name: metric for metric in CATALOGUE}
# Families that no panel shows, each with the reason.
NOT_SHOWN: dict[str, str] = {}
# Ids that Grafana knows; an unknown one is shown as a text behind the number.
UNITS = {"reqps", "cpm", "cps", "short", "s", "percentunit", "bytes", "watt"}
# Labels that Prometheus itself adds to what it scrapes.
FROM_PROMETHEUS = {"job", "instance"}

TEXTS = shipped.dashboards()
BOARDS = {name: json.loads(text) for name, text in TEXTS.items()}
PANELS = [
    pytest.param(panel, id=f"{name.removesuffix('.json')}: {panel['title']}")
    for name, board in BOARDS.items()
    for panel in board["panels"]
    if panel["type"] != "row"
]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel.values[0]["targets"]]  # type: ignore[index]


def family(name: str) -> str:
    """The family of a series: a histogram's have endings."""
    return name if name in BY_NAME else re.sub(r"_(bucket|sum|count)$", "", name)


def selectors(expr: str) -> Iterator[tuple[str, str]]:
    """Every series that an expression reads, and what stands in its braces."""
    yield from re.findall(r"([a-z_]\w*)\{([^}]*)\}", expr)


def aggregations(expr: str) -> Iterator[tuple[set[str], str]]:
    """The labels of each ``by (…)``, and the operand."""
    for found in re.finditer(r"by \(([^)]*)\) \(", expr):
        end, depth = found.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(expr[end], 0)
            end += 1
        yield set(found[1].split(", ")), expr[found.end() : end - 1]


def labels_of(series: str) -> set[str]:
    metric = BY_NAME[family(series)]
    return {*metric.labels, *FROM_PROMETHEUS, *(["le"] if series.endswith("_bucket") else [])}


def test_what_is_shipped_is_what_the_builder_makes() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "dashboards.py"), "--check"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_three_and_each_has_its_own_uid() -> None:
    assert [board["title"] for board in BOARDS.values()] == [
        "headrace: agents",
        "headrace: machine",
        "headrace: serving",
    ]
    assert len({board["uid"] for board in BOARDS.values()}) == 3
    # Grafana counts these itself; a number here would take the place of somebody's own dashboard.
    assert not any("id" in board for board in BOARDS.values())


@pytest.mark.parametrize("name", BOARDS)
def test_grafana_s_own_types_read_it_and_write_the_same(name: str) -> None:
    register_default_plugins()
    read = Dashboard.from_json(BOARDS[name])
    assert JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(read) + "\n" == TEXTS[name]


@pytest.mark.parametrize("name", BOARDS)
def test_ids_are_unique_and_panels_lie_side_by_side(name: str) -> None:
    panels = BOARDS[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells
    bottom = max(y for _, y in taken) + 1
    assert len(taken) == 24 * bottom, "no holes"


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_says_what_it_is_and_what_to_do(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 60, "how to read it, and what to do"
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["legendFormat"]
        assert target["datasource"] == panel["datasource"]
    names = [target["refId"] for target in panel["targets"]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("panel", PANELS)
def test_its_queries_read_what_the_catalogue_has(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expr = target["expr"]
        found = list(selectors(expr))
        assert found
        for series, matchers in found:
            assert family(series) in BY_NAME, series
            assert (family(series) != series) == (BY_NAME[family(series)].kind == "histogram")
            labels = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", matchers))
            assert labels <= labels_of(series), f"{series} has no {labels - labels_of(series)}"
            assert 'job=~"$job"' in matchers, "another program may have a metric of that name"
        for labels, operand in aggregations(expr):
            for series, _ in selectors(operand):
                assert labels <= labels_of(series), f"{series} has no {labels - labels_of(series)}"
        kept = set.union(set(), *(labels for labels, _ in aggregations(expr)))
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, "a label that is summed away"


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_its_manners_are_those_of_the_alerts(expr: str) -> None:
    for series, matchers in selectors(expr):
        metric = BY_NAME[family(series)]
        if metric.kind != "gauge":
            inside = re.escape(f"{series}{{{matchers}}}")
            assert re.search(rf"(rate|increase)\({inside}\[\$__(rate_interval|range)\]\)", expr), "counters restart"
    if "histogram_quantile" in expr:
        assert all("le" in labels for labels, _ in aggregations(expr)), (
            "the fleet's buckets, not one server's percentile"
        )
    if " / " in expr:
        sides = {frozenset(labels) for labels, _ in aggregations(expr)}
        assert len(sides) <= 1, "summed over the same labels"
        statuses = set(re.findall(r'status=~"([^"]*)"', expr))
        assert statuses <= {"error|timeout", "success|error|timeout"}, "rejected and cancelled say nothing"


def test_every_metric_is_shown_somewhere() -> None:
    shown = {family(series) for expr in EXPRESSIONS for series, _ in selectors(expr)}
    missing = {metric.name for metric in CATALOGUE} - shown - NOT_SHOWN.keys()
    assert not missing, "add a panel in docs/boards, or a reason here"
    assert not shown & NOT_SHOWN.keys()
    assert NOT_SHOWN.keys() <= BY_NAME.keys()


@pytest.mark.parametrize("name", BOARDS)
def test_its_variables_choose_among_what_is_headrace_s(name: str) -> None:
    source, *others = BOARDS[name]["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert [each["name"] for each in others] == (["job", "instance"] if "machine" in name else ["job", "model"])
    for each in others:
        series, label = re.fullmatch(r"label_values\(([a-z_]+)(?:\{[^}]*\})?, (\w+)\)", each["query"]).groups()  # type: ignore[union-attr]
        assert label in labels_of(series)
        assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert "allValue" not in each, "All means those that are listed, not whatever there is"
    chosen = {"datasource", *(each["name"] for each in others)}
    used = set(re.findall(r"\$\{?(\w+)", TEXTS[name].replace("$__all", "")))
    assert chosen <= used, "a choice that changes nothing"
    assert used <= {*chosen, "__rate_interval", "__range"}, "unknown to Grafana"


def test_the_document_names_every_row() -> None:
    text = (ROOT / "docs" / "dashboards.md").read_text()
    for board in BOARDS.values():
        section = text.partition(f"## {board['title']}\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)[1:]
        assert rows == [panel["title"] for panel in board["panels"] if panel["type"] == "row"], board["title"]


def test_grafana_is_told_where_they_are_and_whom_to_ask() -> None:
    files = shipped.provisioning("http://prometheus.example:9090/$path", interval_s=30)
    dashboards = yaml.safe_load(files["dashboards/headrace.yml"])
    assert dashboards["apiVersion"] == 1
    (provider,) = dashboards["providers"]
    assert provider["type"] == "file"
    assert provider["options"] == {"path": shipped.FOLDER}
    sources = yaml.safe_load(files["datasources/headrace.yml"])
    (source,) = sources["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus.example:9090/$$path", "a single dollar is a variable of Grafana's"
    assert source["jsonData"]["timeInterval"] == "30s"
    assert "isDefault" not in source, "two defaults keep Grafana from starting"
