"""Times of two processes in turns, and what can be said of their ratio.

A machine that others use changes its speed from second to second; a ratio of neighbours in time changes little. So a
rung is never compared with a number of an hour ago: the baseline runs beside it, A B B A, and the median of the ratios
counts, with a bootstrap interval around it (Efron, 1979, the percentile method).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from headrace import stats
from headrace.optimizing.process import Process
from headrace.optimizing.words import Cell as Timed

_RESAMPLES = 2000


class Cell(msgspec.Struct, frozen=True):
    """One way of asking: batches of so many items, drawn from the samples by a seed, the same for both sides.

    Args:
        batches: numbers of items; one entry is one call.
        rounds: pairs of runs of all batches.
    """

    batch: int
    batches: list[list[int]]
    rounds: int


def cells(numbers: Sequence[int], sizes: Sequence[int], rounds: int, seed: int = 0) -> list[Cell]:
    """Cells of the sizes, their items drawn from these numbers: in each the lengths are those of the samples."""
    found = []
    for size in sizes:
        draw = random.Random(seed + size)
        calls = max(1, min(8, 32 // size))
        batches = [[draw.choice(numbers) for _ in range(size)] for _ in range(calls)]
        found.append(Cell(size, batches, rounds))
    return found


def alone(cell: Cell, seen: Sequence[float]) -> Timed:
    """The baseline's own times of a cell, from all the pairs that it was part of."""
    ordered = sorted(seen)
    p50_s = stats.median(ordered)
    p95_ms = stats.percentile(ordered, 0.95) * 1e3
    return Timed(cell.batch, 1.0, (1.0, 1.0), 1.0, p50_s * 1e3, p95_ms, cell.batch / p50_s, len(ordered))


def compare(baseline: Process, candidate: Process, cell: Cell, seen: list[float]) -> Timed:
    """Run a cell on both sides in turns; the baseline's own times are added to ``seen``. Raises `Failed`."""
    command = {"do": "time", "batches": cell.batches}
    for side in (baseline, candidate):  # each shape once before it counts
        side.ask(command)
    ratios, cpu_ratios, each = [], [], []
    for number in range(cell.rounds):
        sides = (baseline, candidate) if number % 2 == 0 else (candidate, baseline)
        answers = {side: side.ask(command) for side in sides}
        ratios.append(answers[baseline]["wall_s"] / answers[candidate]["wall_s"])
        cpu_ratios.append(answers[baseline]["cpu_s"] / max(answers[candidate]["cpu_s"], 1e-6))
        each += answers[candidate]["each_s"]
        seen += answers[baseline]["each_s"]
    ordered = sorted(each)
    return Timed(
        batch=cell.batch,
        ratio=stats.median(ratios),
        interval=interval(ratios),
        cpu_ratio=stats.median(cpu_ratios),
        p50_ms=stats.median(ordered) * 1e3,
        p95_ms=stats.percentile(ordered, 0.95) * 1e3,
        throughput=cell.batch / stats.median(ordered),
        pairs=len(ratios),
    )


def interval(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the median, by percentiles."""
    draw = random.Random(seed)
    medians = sorted(stats.median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    tail = (1 - confidence) / 2
    return stats.percentile(medians, tail), stats.percentile(medians, 1 - tail)
