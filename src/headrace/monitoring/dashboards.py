"""The Grafana dashboards that come with headrace, and the files by which Grafana finds them.

They are built by `docs/dashboards.py` from the catalogue of metrics and lie beside this file as JSON: neither Grafana
nor its SDK is needed here.
"""

from __future__ import annotations

from importlib.resources import files

from headrace.monitoring import yamltext
from headrace.monitoring.words import duration

# Where Grafana reads them; it is told so by the provisioning file.
FOLDER = "/etc/grafana/dashboards/headrace"


def dashboards() -> dict[str, str]:
    """JSON by file name: ``headrace-serving.json``, ``headrace-agents.json``, ``headrace-machine.json``."""
    folder = files("headrace.monitoring") / "dashboards"
    found = sorted((each for each in folder.iterdir() if each.name.endswith(".json")), key=lambda each: each.name)
    return {each.name: each.read_text(encoding="utf-8") for each in found}


def provisioning(prometheus_url: str, interval_s: float = 15.0) -> dict[str, str]:
    """Grafana's provisioning files, by path below its folder ``provisioning``: a data source, and the dashboards.

    Args:
        prometheus_url: as Grafana reaches it, for example ``http://localhost:9090``.
        interval_s: between two scrapes; Grafana takes rates over four of them at least.
    """
    source = {
        "name": "headrace",
        "uid": "headrace",
        "type": "prometheus",
        "access": "proxy",
        # Grafana puts environment variables in where there is a dollar.
        "url": prometheus_url.replace("$", "$$"),
        "jsonData": {"httpMethod": "POST", "prometheusType": "Prometheus", "timeInterval": duration(interval_s)},
    }
    folder = {
        "name": "headrace",
        "folder": "headrace",
        "type": "file",
        "options": {"path": FOLDER},
    }
    return {
        "dashboards/headrace.yml": yamltext.dump(
            {"apiVersion": 1, "providers": [folder]}, f"The files headrace-*.json belong into {FOLDER}."
        ),
        "datasources/headrace.yml": yamltext.dump(
            {"apiVersion": 1, "datasources": [source]}, "Not the default: another one may be that already."
        ),
    }
