"""Time that goes into importing modules."""

from __future__ import annotations

from collections import defaultdict

from headrace.profiling.diagnose.explained import Claim, Explained, duration, percent
from headrace.profiling.diagnose.kinds import IMPORTS, import_weights
from headrace.profiling.diagnose.once import once
from headrace.profiling.diagnose.view import is_users, pace
from headrace.profiling.record import Record, Stack

# Whatever the share: a start that nobody waits for is no finding.
_LEAST_S = 0.3
# On a busy machine, or from a cold disk, even small modules take long: enough of it must be work.
_LEAST_CPU_S = 0.15
_ADVICE = (
    "import it inside the function that needs it, or import only the submodule; "
    "`python -X importtime` lists every module with its time"
)


@once
def claims(record: Record) -> list[Claim]:
    """Imports hold 30 % of the run or more."""
    part = import_weights(record)
    lines: dict[tuple[int, int], float] = defaultdict(float)
    for number in part:
        where = _importing(record, record.cpu[number])
        if where is not None:
            lines[where] += record.cpu[number].seconds
    working = sum(record.cpu[number].seconds for number in part) * pace(record)
    seconds = max(record.import_s, sum(lines.values()))
    share = min(1.0, seconds / record.wall_s) if record.wall_s else 0.0
    if share < IMPORTS.floor or seconds < _LEAST_S or working < _LEAST_CPU_S:
        return []
    most = sorted(lines, key=lambda where: -lines[where])
    listed = ", ".join(
        f"{duration(lines[where])} at line {where[1]} of {record.frames[where[0]].file}" for where in most[:3]
    )
    finding = Explained(
        IMPORTS.code,
        "warning",
        f"{percent(share)} of the run is spent importing modules",
        f"{duration(seconds)} of {duration(record.wall_s)}" + (f": {listed}" if listed else ""),
        _ADVICE,
        record.frames[most[0][0]].file if most else "",
        most[0][1] if most else 0,
        share=share,
    )
    return [Claim(finding, part)]


def _importing(record: Record, stack: Stack) -> tuple[int, int] | None:
    """The user's statement that imports, or that calls a library which does: the last one of his above an import."""
    imported = [position for position, frame in enumerate(stack.frames) if IMPORTS.has(record.frames[frame])]
    for position in range(imported[-1] - 1 if imported else -1, -1, -1):
        if is_users(record.frames[stack.frames[position]]):
            return stack.frames[position], stack.lines[position]
    return None
