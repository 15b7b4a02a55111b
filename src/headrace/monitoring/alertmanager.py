"""Who is told of an alert, and what is not said twice: the configuration of Alertmanager."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.monitoring.budget import BURNS
from headrace.monitoring.words import duration


@dataclass(frozen=True)
class Routing:
    """Where alerts go.

    Args:
        webhook: URL that gets them as JSON; empty: they are only shown by Alertmanager itself.
        group_wait_s: time in which the first alerts of a group are collected into one message.
        group_interval_s: least time between two messages about a group.
        repeat_s: an alert that goes on is told again after this.
    """

    webhook: str = ""
    group_wait_s: float = 30.0
    group_interval_s: float = 300.0
    repeat_s: float = 4 * 3600.0


def configuration(routing: Routing) -> dict[str, Any]:
    """The content of ``alertmanager.yml``."""
    receiver: dict[str, Any] = {"name": "headrace"}
    if routing.webhook:
        receiver["webhook_configs"] = [{"url": routing.webhook, "send_resolved": True}]
    return {
        "route": {
            "receiver": "headrace",
            "group_by": ["alertname", "model"],
            "group_wait": duration(routing.group_wait_s),
            "group_interval": duration(routing.group_interval_s),
            "repeat_interval": duration(routing.repeat_s),
        },
        "inhibit_rules": inhibitions(),
        "receivers": [receiver],
    }


def inhibitions() -> list[dict[str, Any]]:
    """What says nothing new while something else fires about the same thing."""
    same = ["job", "part", "model"]
    # Only where both say what part they speak of: a full card is no reason to hide that a process grows.
    critical = ['severity="critical"', 'part!=""']
    rules = [
        _inhibit(critical, ['severity="warning"', 'part!=""'], same),
        _inhibit(['alertname="HighErrorRate"'], ['alertname=~"AllFailed|ErrorBudgetBurn"'], same),
        _inhibit(['alertname="StoreDown"'], ['alertname="NoProgress"'], ["job"]),
    ]
    windows = [duration(burn.long_s) for burn in BURNS]
    for index, faster in enumerate(windows[:-1]):
        slower = "|".join(windows[index + 1 :])
        burning = 'alertname="ErrorBudgetBurn"'
        rules.append(_inhibit([burning, f'window="{faster}"'], [burning, f'window=~"{slower}"'], same))
    return rules


def _inhibit(source: Sequence[str], target: Sequence[str], equal: Sequence[str]) -> dict[str, Any]:
    return {"source_matchers": list(source), "target_matchers": list(target), "equal": list(equal)}
