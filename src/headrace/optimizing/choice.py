"""What becomes of a rung that was timed, and which of all is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from headrace.optimizing import drift, rungs, summary
from headrace.optimizing.words import Noise, Row
from headrace.runners.recipe_words import BY_SHAPE

# A gain below this is not worth another way to run a model.
LEAST_GAIN = 1.05
_WIDE = 0.2


def judge(
    row: Row, budget: Mapping[str, float], objective: str, rows: Mapping[str, Row], noise: Noise
) -> tuple[str, str]:
    """Status and reason of a measured rung."""
    broken = drift.breaches(row.drift, budget)
    if broken:
        return "inaccurate", broken
    if objective == "memory":
        base = rows[rungs.BASELINE].peak_bytes or 0
        if (row.peak_bytes or 0) * LEAST_GAIN < base:
            return "ok", ""
        return "not_faster", f"takes {(row.peak_bytes or 0) / max(base, 1):.2f} of the baseline's memory"
    ratio, low, high = standing(row, noise)
    if low > LEAST_GAIN:
        return "ok", "ranked by processor time: the machine is too busy for wall time" if noise.noisy else ""
    if ratio > LEAST_GAIN and high - low > _WIDE:
        return "noisy", f"between {low:.2f} and {high:.2f} times the baseline's speed: cannot tell"
    return "not_faster", f"{ratio:.2f} times the baseline's speed"


def outdone(rows: Sequence[Row], objective: str, noise: Noise) -> list[Row]:
    """Rungs of few bits that are surely slower than one in half precision, with the status and reason for it: for less
    speed nobody gives away more of a model's answers. Where memory is the objective they have their use."""
    if objective == "memory":
        return []
    fit = {row.rung: standing(row, noise) for row in rows if row.status == "ok"}
    halves = [ident for ident in fit if (rung := rungs.find(ident)).halved and not rung.quantized]
    if not halves:
        return []
    best = max(halves, key=lambda ident: fit[ident][0])
    ratio, least, _ = fit[best]
    return [
        msgspec.structs.replace(
            row,
            status="not_faster",
            reason=f"{fit[row.rung][0]:.2f} times the baseline's speed, and {best} is {ratio:.2f} times as fast",
        )
        for row in rows
        if row.rung in fit and rungs.find(row.rung).quantized and fit[row.rung][2] < least
    ]


def standing(row: Row, noise: Noise) -> tuple[float, float, float]:
    """How many times as fast as the baseline a rung was at the objective's batch, with its interval: by wall time, on a
    machine too busy for that by processor time."""
    cell = summary.main_cell(row)
    assert cell is not None, "only what was timed is judged"
    scale = cell.cpu_ratio / cell.ratio if noise.noisy else 1.0
    low, high = cell.interval
    return cell.ratio * scale, low * scale, high * scale


def choose(rows: Sequence[Row], objective: str, noise: Noise) -> str:
    """The best row for an objective; of those that are as good within their intervals, the simplest, and of those that
    are as simple the one that is ready soonest."""
    fit = [row for row in rows if row.status == "ok"]
    if not fit:
        return rungs.BASELINE
    if objective == "memory":
        return min(fit, key=lambda row: row.peak_bytes or 0).rung
    stand = {row.rung: standing(row, noise) for row in fit}
    _, least, _ = max(stand.values())
    equals = [row for row in fit if stand[row.rung][0] >= least]
    return min(equals, key=lambda row: (*simplicity(row.rung), (row.load_s or 0.0) + (row.first_s or 0.0))).rung


def simplicity(ident: str) -> tuple[bool, int, int]:
    """Less is simpler: what is not compiled for each shape anew, which stops a server for seconds at each; then few
    parts, then what stands early on the ladder."""
    parts = ident.split("+")
    return not BY_SHAPE.isdisjoint(parts), len(parts), max(list(rungs.RUNGS).index(part) for part in parts)
