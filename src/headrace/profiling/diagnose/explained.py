"""What a rule returns: a finding, the share of the run's time that it accounts for; and how numbers are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.profiling.finding import Finding
from headrace.profiling.record import Record


class Explained(Finding, frozen=True, kw_only=True):
    """A finding of the diagnosis.

    Args:
        share: of the run's time, 0 to 1, that it accounts for; findings are ordered by it.
    """

    share: float = 0.0


Rule = Callable[[Record], Sequence[Explained]]


@dataclass(frozen=True)
class Claim:
    """A finding that says why, and the running stacks that it explains: who only says where leaves them alone.

    Args:
        weights: number of `Record.cpu` → the part of it, 0 to 1.
    """

    finding: Explained
    weights: dict[int, float] = field(default_factory=dict)


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1%"


def duration(seconds: float) -> str:
    """To be read by people: 1.24 s, 12.3 ms, 4.1 µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            value = seconds / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"
