"""What Prometheus scrapes, and where it finds the rules: its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.monitoring.words import duration

KEY_FILE = "headrace.key"


@dataclass(frozen=True)
class Scraping:
    """What is scraped, and how often.

    Args:
        targets: ``host:port`` of each server; one address per server is enough, since each exports all its processes.
        alertmanagers: ``host:port`` of each Alertmanager.
        keyed: the API asks for a key; it is read from the file `KEY_FILE`.
        interval_s: between two scrapes, and between two evaluations of the rules.
        url: where Grafana finds Prometheus.
    """

    targets: Sequence[str] = ("localhost:8000",)
    alertmanagers: Sequence[str] = ("localhost:9093",)
    keyed: bool = False
    interval_s: float = 15.0
    url: str = "http://localhost:9090"


def configuration(scraping: Scraping, job_name: str) -> dict[str, Any]:
    """The content of ``prometheus.yml``; files are named as seen from its folder.

    Args:
        job_name: label of all targets. One job is one deployment: queues and errors are summed over it.
    """
    interval = duration(scraping.interval_s)
    job: dict[str, Any] = {
        "job_name": job_name,
        "static_configs": [{"targets": list(scraping.targets)}],
    }
    if scraping.keyed:
        job["authorization"] = {"type": "Bearer", "credentials_file": KEY_FILE}
    return {
        "global": {
            "scrape_interval": interval,
            "scrape_timeout": duration(min(10.0, scraping.interval_s)),
            "evaluation_interval": interval,
        },
        "rule_files": ["rules/*.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": list(scraping.alertmanagers)}]}]},
        "scrape_configs": [job],
    }
