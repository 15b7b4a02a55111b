"""Error budgets: how fast the share of failures that an objective allows is used up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.monitoring.alert import FINISHED, Alert, Family, Record, Rule, early, failure_ratio, finished
from headrace.monitoring.thresholds import Thresholds
from headrace.monitoring.words import Severity, duration, number


@dataclass(frozen=True)
class Burn:
    """One pair of windows: the long one says that it matters, the short one that it still goes on."""

    short_s: float
    long_s: float
    factor: float
    severity: Severity


MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0
BUDGET_DAYS = 30
BURNS = (
    Burn(5 * MINUTE, HOUR, 14.4, "critical"),
    Burn(30 * MINUTE, 6 * HOUR, 6, "critical"),
    Burn(2 * HOUR, DAY, 3, "warning"),
    Burn(6 * HOUR, 3 * DAY, 1, "warning"),
)


def burns(objective: float) -> list[Burn]:
    """The pairs that can fire: with a wide budget even a total failure does not burn it fast."""
    return [burn for burn in BURNS if burn.factor * (1 - objective) < 1]


def error_budget(t: Thresholds, family: Family, objective: float) -> Sequence[Rule]:
    """Alerts on how fast the share of failures that the objective allows in 30 days is used up, and what they read."""
    part = {"part": family.part}
    windows = sorted({window for burn in burns(objective) for window in (burn.short_s, burn.long_s)})
    ratios = [
        Record(f"headrace:failure_ratio:rate{duration(window)}", failure_ratio(family, duration(window)), part)
        for window in windows
    ]
    volumes = [
        Record(f"headrace:finished:increase{duration(burn.long_s)}", finished(family, duration(burn.long_s)), part)
        for burn in burns(objective)
    ]
    return [*ratios, *volumes, *(_burn_alert(t, family, objective, burn) for burn in burns(objective))]


def _burn_alert(t: Thresholds, family: Family, objective: float, burn: Burn) -> Alert:
    short, long = duration(burn.short_s), duration(burn.long_s)
    bound, part = number(burn.factor * (1 - objective)), f'{{part="{family.part}"}}'
    began = early(f"{family.requests.name}{{{FINISHED}}}", burn.long_s)
    return Alert(
        "ErrorBudgetBurn",
        f"headrace:failure_ratio:rate{long}{part} > {bound}\n"
        f"and\nheadrace:failure_ratio:rate{short}{part} > {bound}\n"
        f"and\nheadrace:finished:increase{long}{part} >= {t.min_requests}\n"
        # A window longer than the history shrinks to it: without this all pairs would fire together on the first day.
        f"and on (job, model)\ncount by (job, model) ({began})",
        t.burn_for_s,
        burn.severity,
        f"{{model}} uses up its error budget: {{value}} of its {family.noun} failed in {long}",
        f"Over {long} and {short} it fails {burn.factor:g} times as often as an objective of {100 * objective:g}% "
        f"allows: the budget of {BUDGET_DAYS} days lasts {BUDGET_DAYS / burn.factor:.3g}.",
        "percent",
        {"part": family.part, "window": long},
    )
