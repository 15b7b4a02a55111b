"""What a report says, in words and numbers: the same on a terminal, in Markdown and on a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headrace.optimizing.words import Cell, Predicted, Report, Row
from headrace.runners.drift import is_error

# What a task's drift is shown by, where its budget bounds it: means say more than the worst of some hundred samples.
_TELLING = ("kl_mean", "cos_mean", "relative_error", "cos_min")
_FAILED = ("build_failed", "crashed", "out_of_memory", "timeout")
DASH = "–"
# How a language model writes, and how to read that.
WRITING = ("tokens/s", "first ms", "of bound")
READING_OF_WRITING = (
    "tokens/s: after the first one, of all texts; first ms: until the first token of all; of bound: of the steps that "
    "memory could deliver, if each read the weights and nothing else"
)
# How near a model that encodes comes to what the device can multiply.
REACHING = ("of peak",)
READING_OF_REACHING = (
    "of peak: of the operations in a second that large products of matrices reach on this device, in float32 on a CPU, "
    "in bfloat16 on a GPU; a rung with fewer bits can do more"
)


def plain(text: str) -> str:
    """One line without anything that a terminal or a parser would take for a command."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def number(value: float) -> str:
    """Three digits that mean something, in eight characters at most."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def drift_number(value: float) -> str:
    """Agreements lie near 1: five digits, more where five would say that nothing is lost."""
    if 0.999 < value < 1:
        return f"{value:.7g}"
    return f"{value:.5g}" if 1e-3 <= abs(value) < 1e5 else number(value)


def size(count: int | None) -> str:
    if count is None:
        return DASH
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{number(value)} TiB"


def parameters(count: int) -> str:
    """A number of weights as people say it: 1.05 B, 22.7 M."""
    for least, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= least:
            return f"{number(count / least)}{unit}"
    return str(count)


def share(value: float | None) -> str:
    return DASH if value is None else f"{number(value * 100)} %"


def optional(value: float | None) -> str:
    return DASH if value is None else number(value)


def seconds(value: float | None) -> str:
    return DASH if value is None else f"{number(value)} s"


def times(value: float) -> str:
    """A ratio, so that neighbours in a column can be compared: two decimals as long as they fit."""
    return f"{value:.2f}" if 0.01 <= value < 1000 else number(value)


def speed(ratio: float | None, interval: tuple[float, float] | None) -> str:
    if ratio is None:
        return DASH
    return f"{times(ratio)}×" + (f" [{times(interval[0])}, {times(interval[1])}]" if interval else "")


def speed_of(row: Row) -> str:
    return "1×" if row.status == "baseline" else speed(row.speedup, row.speedup_ci)


def p50(row: Row) -> float | None:
    return (row.latency_ms or {}).get("p50")


def writes(report: Report) -> bool:
    """Whether the report is of a language model, which is timed by the tokens that it writes."""
    return report.task == "generate"


def main_cell(row: Row) -> Cell | None:
    """What was timed at the objective's batch."""
    return next((cell for cell in row.cells if cell.batch == row.batch and cell.lengths == "all"), None)


def reaches(report: Report) -> bool:
    """Whether it is known of what the device can multiply."""
    return any(cell.share_of_peak is not None for row in report.rows for cell in row.cells)


def cell_heads(report: Report) -> list[str]:
    """Columns of what was timed, beside the rung's name."""
    near = WRITING if writes(report) else REACHING if reaches(report) else ()
    return ["items a call", "which", "speed-up", "by processor time", "p50 ms", "p95 ms", "items/s", *near, "pairs"]


def cell_values(report: Report, row: Row, cell: Cell) -> list[str]:
    """What stands under `cell_heads`."""
    near = writing(cell) if writes(report) else (share(cell.share_of_peak),) if reaches(report) else ()
    alone = row.status == "baseline"
    return [
        str(cell.batch),
        items_of(cell),
        "1×" if alone else speed(cell.ratio, cell.interval),
        "1×" if alone else speed(cell.cpu_ratio, None),
        *(number(each) for each in (cell.p50_ms, cell.p95_ms, cell.throughput)),
        *near,
        str(cell.pairs),
    ]


def items_of(cell: Cell) -> str:
    """Which items were timed."""
    return cell.lengths if cell.length is None else f"{cell.lengths}, {cell.length} tokens"


def writing(cell: Cell | None) -> tuple[str, ...]:
    """What stands under `WRITING`."""
    if cell is None:
        return (DASH,) * len(WRITING)
    return optional(cell.tokens_per_s), optional(cell.prefill_ms), share(cell.share_of_bandwidth)


def loss(measure: str, value: float) -> float:
    """A measure as what is lost: 0 is perfect."""
    return value if is_error(measure) else 1 - value


def measure_of(rows: Sequence[Row], budget: Mapping[str, float]) -> str:
    """The one measure to show drift by: a telling one of the budget's, else the first there is; empty without any."""
    measured = [row.drift for row in rows if row.status != "baseline"]
    bounded = [*(each for each in _TELLING if each in budget), *budget]
    known = [*bounded, *(name for each in measured for name in each)]
    return next((name for name in known if any(name in each for each in measured)), "")


def breached(row: Row, budget: Mapping[str, float]) -> list[tuple[str, float]]:
    """Measures out of bounds with their values, the worst for its bound first."""
    if "not_finite" in row.drift:
        return [("not_finite", row.drift["not_finite"])]

    def excess(name: str) -> float:
        allowed, lost = loss(name, budget[name]), loss(name, row.drift[name])
        if math.isnan(lost):
            return math.inf
        return lost / allowed if allowed > 0 else math.inf if lost > allowed else 0.0

    over = [name for name in budget if name in row.drift and excess(name) > 1]
    return [(name, row.drift[name]) for name in sorted(over, key=excess, reverse=True)]


def worst(row: Row, budget: Mapping[str, float]) -> str:
    """The measure that is furthest out of its bound; empty if none is."""
    for name, value in breached(row, budget):
        return "not finite" if name == "not_finite" else f"{name} {drift_number(value)}"
    return ""


def row_of(report: Report, rung: str) -> Row:
    return next(row for row in report.rows if row.rung == rung)


def choice(report: Report) -> str:
    """One sentence: what was chosen and why."""
    passed = [row for row in report.rows if row.status == "ok"]
    gain = "takes less memory" if report.objective == "memory" else "is faster beyond noise"
    if report.chosen == report.baseline:
        tried = sum(1 for row in report.rows if row.status != "baseline" and row.latency_ms)
        if not tried:
            return f"{report.baseline} stays: no other rung could be measured."
        return f"{report.baseline} stays: of {_count(tried)} measured, none {gain} and keeps to the budget of drift."
    row, base = row_of(report, report.chosen), row_of(report, report.baseline)
    said = [f"{speed_of(row)} the speed of {report.baseline}"]
    if report.objective == "memory":
        said.insert(
            0, f"at most {size(row.peak_bytes)} of memory where {report.baseline} takes {size(base.peak_bytes)}"
        )
    measure = measure_of(report.rows, report.budget)
    if measure in row.drift:
        said.append(f"{measure} {drift_number(row.drift[measure])}{_bound(measure, report.budget)}")
    why = f"the best for {report.objective} of {_count(len(passed))} that passed"
    if len(passed) == 1:
        why = "the only rung that passed"
    elif ties := [each.rung for each in passed if report.objective != "memory" and _beats(each, row)]:
        why = f"simpler or ready sooner than {', '.join(ties)}, which cannot be told from it by speed"
    told = f"{report.chosen} is chosen: {', '.join(said)}; {why}."
    return told + _though(row, report.baseline) + _at_first(row)


def _though(row: Row, baseline: str) -> str:
    """Where a rung that was chosen is slower all the same."""
    slower = [
        f"at {cell.batch} a call ({items_of(cell)}) {speed(cell.ratio, cell.interval)}"
        for cell in row.cells
        if cell.interval[1] < 1
    ]
    return f" Yet it is slower than {baseline} {'; '.join(slower)}." if slower else ""


def _at_first(row: Row) -> str:
    """What a server meets and no batch that is timed again and again."""
    alone = next((cell.p50_ms for cell in row.cells if cell.batch == 1 and cell.lengths == "all"), math.inf)
    if row.new_shape_ms is None or row.new_shape_ms <= alone:
        return ""
    return f" One item of a length not met before takes {number(row.new_shape_ms)} ms more, that once."


def _beats(other: Row, row: Row) -> bool:
    return (other.speedup or 0) > (row.speedup or 0)


def _count(rungs: int) -> str:
    return f"{rungs} rung{'' if rungs == 1 else 's'}"


def _bound(measure: str, budget: Mapping[str, float]) -> str:
    if measure not in budget:
        return ""
    return f" ({'at most' if is_error(measure) else 'at least'} {budget[measure]:g})"


def bounds(budget: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {'≤' if is_error(name) else '≥'} {bound:g}" for name, bound in budget.items()) or DASH


def missing(report: Report) -> dict[str, list[str]]:
    """What is to be installed or had, and the rungs that wait for it."""
    found: dict[str, list[str]] = {}
    for row in report.rows:
        if row.status == "unavailable":
            found.setdefault(plain(row.reason), []).append(row.rung)
    return found


def failed(report: Report) -> list[Row]:
    """Rungs without a measurement, and not for want of something to install."""
    return [row for row in report.rows if row.status in _FAILED or (row.status == "not_faster" and not row.cells)]


def foreseen(found: Predicted) -> list[str]:
    """What weights will take, and a warning where that may be too much."""
    rungs: dict[str, list[str]] = {}
    for rung, count in found.weights_bytes.items():
        rungs.setdefault(size(count), []).append(plain(rung))
    has = f"{'this machine' if found.device == 'cpu' else found.device} has {size(found.memory_bytes)}"
    each = "; ".join(f"{', '.join(names)} {told}" for told, names in rungs.items())
    lines = [f"{parameters(found.parameters)} parameters, weights in memory about: {each}; {has}"]
    twice = 2 * max(found.weights_bytes.values())
    if twice > found.memory_bytes:
        lines.append(f"warning: two processes hold the model at a time, about {size(twice)} where {has}")
    return lines


def control(report: Report) -> str:
    """What the machine itself adds to a ratio."""
    noise = report.noise
    if noise is None:
        return "not run"
    found = f"{report.baseline} beside itself {speed(noise.ratio, noise.interval)}"
    if not noise.noisy:
        return found
    return f"{found}: this machine is busy, and speed-ups of that order mean nothing"


def conditions(report: Report) -> Iterator[tuple[str, str]]:
    """What the numbers belong to."""
    base = row_of(report, report.baseline)
    yield "target", plain(report.target)
    yield "task", report.task
    yield "preset", report.preset
    yield "objective", report.objective
    if base.batch is not None:
        length = "" if base.length is None else f", {base.length} tokens in the median"
        yield "batch", f"{base.batch} items a call{length}"
    yield "budget of drift", bounds(report.budget)
    if report.compared_by:
        yield "drift measured by", plain(report.compared_by)
    yield "samples", ", ".join(f"{name} {value:g}" for name, value in report.samples.items())
    if report.predicted is not None:
        yield "predicted memory", "; ".join(foreseen(report.predicted))
    yield "control", control(report)
    yield "ladder took", f"{report.seconds:.0f} s"
    yield "headrace", report.headrace


def environment(value: Any) -> str:
    """A value of the environment on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(str(name))} {environment(each)}" for name, each in value.items()) or DASH
    if isinstance(value, (list, tuple)):
        return " ".join(environment(each) for each in value) or DASH
    return plain(str(value)) or DASH
