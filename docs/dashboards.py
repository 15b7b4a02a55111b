"""Builds the Grafana dashboards that headrace ships, with Grafana's own SDK. ``--check`` only compares.

python docs/dashboards.py [--check]

What they show stands in `boards`; here it becomes JSON, in `src/headrace/monitoring/dashboards/`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from boards.agents import AGENTS
from boards.machine import MACHINE
from boards.panels import Board, Panel, Query
from boards.serving import SERVING
from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as builder
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model

BOARDS = (SERVING, AGENTS, MACHINE)
TARGET = Path(__file__).parent.parent / "src" / "headrace" / "monitoring" / "dashboards"

_SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
# What the values of these labels mean is the same everywhere, and so is their colour.
_COLOURS = {
    "success": "green",
    "error": "red",
    "timeout": "orange",
    "rejected": "yellow",
    "cancelled": "blue",
    "replayed": "purple",
    "overloaded": "orange",
    "expired": "red",
    "abandoned": "blue",
    "invalid": "yellow",
}


def dashboard(board: Board) -> str:
    """The JSON of one dashboard."""
    made = (
        builder.Dashboard(board.title)
        .uid(f"headrace-{board.name}")
        .description(board.text)
        .tags(["headrace"])
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(
            builder.DashboardLink("headrace")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["headrace"])
            .as_dropdown(True)
            .keep_time(True)
        )
        .with_variable(builder.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for name, label, query in board.variables:
        made.with_variable(_choice(name, label, query))
    ident = 0
    for row in board.rows:
        ident += 1
        made.with_row(builder.Row(row.title).id(ident))
        for panel in row.panels:
            ident += 1
            made.with_panel(_panel(panel).id(ident))
    return JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(made.build()) + "\n"


def _choice(name: str, label: str, query: str) -> builder.QueryVariable:
    """Any number of the values that a label has. All of them are written out: so it stays with what is headrace's."""
    return (
        builder.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel) -> Any:
    made: Any = _figure(panel) if panel.kind == "figure" else _lines(panel)
    made.title(panel.title).description(panel.text).unit(panel.unit).datasource(_SOURCE)
    made.height(4 if panel.kind == "figure" else 8).span(panel.width)
    steps = [model.Threshold(value=None, color="green")]
    if panel.limit is not None:
        steps.append(model.Threshold(value=panel.limit, color="red"))
    made.thresholds(builder.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
    for index, query in enumerate(panel.queries):
        made.with_target(_target(query, chr(ord("A") + index), instant=panel.kind == "figure"))
    return made


def _target(query: Query, ref_id: str, instant: bool) -> prometheus.Dataquery:
    made = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(ref_id).datasource(_SOURCE)
    if query.exemplars and not instant:
        made.exemplar(True)
    return made.instant() if instant else made.range()


def _figure(panel: Panel) -> stat.Panel:
    coloured = panel.limit is not None or panel.words
    made = (
        stat.Panel()
        .graph_mode(common.BigValueGraphMode.NONE)
        .color_mode(common.BigValueColorMode.VALUE if coloured else common.BigValueColorMode.NONE)
        .reduce_options(common_builder.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value("–")
    )
    if panel.words:
        results = {
            value: model.ValueMappingResult(text=text, color=colour, index=index)
            for index, (value, (text, colour)) in enumerate(panel.words.items())
        }
        made.mappings([model.ValueMap(options=results)])
    return made


def _lines(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .min(0)
        .line_width(1)
        .fill_opacity(40 if panel.kind == "stack" else 10)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            common_builder.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.TABLE)
            .placement(common.LegendPlacement.BOTTOM)
            .calcs(["mean", "max", "lastNotNull"])
        )
        .tooltip(
            common_builder.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(common.SortOrder.DESCENDING)
            .hide_zeros(True)
        )
    )
    if panel.kind == "stack":
        made.stacking(common_builder.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if panel.limit is not None:
        made.thresholds_style(common_builder.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED))
    if any(query.legend in ("{{status}}", "{{reason}}") for query in panel.queries):
        for name, colour in _COLOURS.items():
            fixed = model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})
            made.override_by_name(name, [fixed])
    return made


def main() -> int:
    wanted = {f"headrace-{board.name}.json": dashboard(board) for board in BOARDS}
    found = {path.name: path.read_text() for path in TARGET.glob("*.json")}
    stale = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if "--check" in sys.argv:
        if stale:
            print(f"not current: {', '.join(stale)}; run python docs/dashboards.py")
        return 1 if stale else 0
    TARGET.mkdir(exist_ok=True)
    for name in stale:
        if name in wanted:
            (TARGET / name).write_text(wanted[name])
        else:
            (TARGET / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
