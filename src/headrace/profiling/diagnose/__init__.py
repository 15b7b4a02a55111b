"""What a saved run says in words: rules are plain functions over a `Record`, and none of them measures anything.

Rules that say why come first, and what they explain is not told again by those that only say where. Below sensible
bounds nothing is said: that a run has no finding is an answer.
"""

from __future__ import annotations

from collections.abc import Callable

from headrace.profiling.diagnose.claiming import CLAIMS
from headrace.profiling.diagnose.explained import Claim, Explained, Rule
from headrace.profiling.diagnose.once import forget
from headrace.profiling.diagnose.running import children, hot_spots, slow_calls
from headrace.profiling.finding import Finding
from headrace.profiling.record import Record


def _said(claims: Callable[[Record], list[Claim]]) -> Rule:
    return lambda record: [claim.finding for claim in claims(record)]


RULES: list[Rule] = [*(_said(claims) for claims in CLAIMS), slow_calls, hot_spots, children]


def diagnose(record: Record) -> list[Finding]:
    """What the run spends its time on, and what to do about it, by the share of the time that each explains.

    Every finding is an `Explained`, with its ``share``; its evidence has the numbers that it rests on. An empty list
    is a valid answer.
    """
    try:
        found: list[Explained] = [finding for rule in RULES for finding in rule(record)]
    finally:
        forget()
    return [*sorted(found, key=lambda finding: -finding.share)]


__all__ = ["RULES", "Explained", "Rule", "diagnose"]
