"""Writes the tables that are made from the source: options and metrics. ``--check`` only compares.

python docs/generate.py [--check]
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from headrace import config, metrics
from headrace.monitoring.thresholds import Thresholds

HERE = Path(__file__).parent


def configuration() -> str:
    lines = [
        "# Configuration",
        "",
        "A value is taken from the first of: flag, environment variable, `headrace.toml` (or the file that `--config`",
        "names), default. The options of a model can be set at the top level, for all models, or in `[models.NAME]`.",
        "Unknown options are refused, with the nearest valid name.",
        "",
        "```toml",
        "port = 8000",
        "max_queue = 500            # for every model …",
        "",
        "[models.minilm]",
        'target = "sentence-transformers/all-MiniLM-L6-v2"',
        "max_queue = 2000           # … but this one",
        "",
        "[models.sentiment]",
        'target = "my_models:Sentiment"',
        "workers = 2",
        "```",
        "",
        "This page is made by `docs/generate.py` from `src/headrace/config.py`.",
        "",
    ]
    own = {option.name for option in config.options(config.ModelOptions)}
    for title, wanted in (("The server", False), ("A model", True)):
        lines += [f"## {title}", "", "| option | default | type | what it is |", "|---|---|---|---|"]
        for option in config.options():
            if (option.name in own) == wanted:
                default = str(option.default).lower() if option.is_switch else option.default
                shown = f"`{default}`" if default != "" else "none"
                shape = option.shape.replace("|", ", ")
                lines.append(f"| `{option.name}` | {shown} | {shape} | {option.help} |")
        lines.append("")
    lines += [
        "## Alerts",
        "",
        "`headrace ops render` writes alert rules with these numbers, unless the table `[alerts]` has others. Shares are",
        "between 0 and 1, times (`_s`) in seconds, sizes in bytes.",
        "",
        "```toml",
        "[alerts]",
        "agent_latency_s = 120.0",
        "serving_objective = 0.999",
        "```",
        "",
        "| option | default |",
        "|---|---|",
    ]
    lines += [f"| `{field.name}` | `{field.default}` |" for field in dataclasses.fields(Thresholds)]
    lines += [
        "",
        "The flag of `max_queue` is `--max-queue`, its variable `HEADRACE_MAX_QUEUE`. `target` is given in `[models.NAME]`",
        "or as the argument of `headrace serve`.",
        "",
    ]
    return "\n".join(lines)


def catalogue() -> str:
    lines = [
        "# Metrics",
        "",
        "`GET /metrics` on any front end gives one merged view over all processes, in the Prometheus text format. Counters",
        "survive the death of the process that counted, gauges do not outlive it. Every series whose labels are known is",
        "there at 0 from the start. `status` is one of success, error, timeout, rejected, cancelled; a client's own mistake",
        "(4xx) counts as rejected, since it says nothing about the service.",
        "",
        "This page is made by `docs/generate.py` from the catalogue in `src/headrace/metrics/catalogue.py`.",
        "",
        "| name | kind | labels | what it is | buckets |",
        "|---|---|---|---|---|",
    ]
    for metric in metrics.CATALOGUE:
        buckets = " ".join(f"{bound:g}" for bound in metric.buckets)
        labels = ", ".join(metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} | {buckets} |")
    return "\n".join([*lines, ""])


def main() -> int:
    stale = []
    for name, text in (("configuration.md", configuration()), ("metrics.md", catalogue())):
        path = HERE / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(text)
    if stale and "--check" in sys.argv:
        print(f"not current: {', '.join(stale)}; run python docs/generate.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
