"""Times of two processes in turns, and what can be said of their ratio.

A machine that others use changes its speed from second to second; a ratio of neighbours in time changes little. So a
rung is never compared with a number of an hour ago: the baseline runs beside it, A B B A, and the median of the ratios
counts, with a bootstrap interval around it (Efron, 1979, the percentile method).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import msgspec

from headrace import stats
from headrace.optimizing.process import Process
from headrace.optimizing.words import Cell as Timed
from headrace.stats import interval

# A turn of one side is as long at least, or a rung that needs a millisecond would be timed as it wakes up.
LEAST_TURN_S = 0.1
# Short and long items are timed apart where the longest tenth is so many times as long as the shortest; few pairs will
# do for that, since nothing is decided by them.
_UNLIKE = 2.0
_PAIRS_OF_A_THIRD = 4
# Lengths that are met for the first time under the clock.
_NEW_LENGTHS = 8


class Cell(msgspec.Struct, frozen=True):
    """One way of asking: batches of so many items, drawn from the samples by a seed, the same for both sides.

    Args:
        batches: numbers of items; one entry is one call.
        rounds: pairs of runs of all batches.
        lengths: which items: ``all``, the ``short`` third or the ``long`` one.
        length: their median, ``None`` where items have no length.
    """

    batch: int
    batches: list[list[int]]
    rounds: int
    lengths: str = "all"
    length: int | None = None


def cells(
    lengths: Mapping[int, int], rounds: Mapping[int, int], *, thirds_of: Sequence[int] = (), most_calls: int = 8
) -> list[Cell]:
    """Cells of the sizes that ``rounds`` names, their items drawn from all, so that lengths are the samples'; after
    them, where lengths are unlike, cells of the short third and of the long one.

    Args:
        lengths: of items by number.
        rounds: pairs by size.
        thirds_of: sizes at which short and long items are timed apart.
    """
    ordered = sorted(lengths, key=lambda number: (lengths[number], number))
    third = max(1, len(ordered) // 3)
    found = [_cell(size, "all", sorted(lengths), lengths, pairs, most_calls) for size, pairs in rounds.items()]
    values = sorted(lengths.values())
    if stats.percentile(values, 0.9) >= _UNLIKE * stats.percentile(values, 0.1):
        for size in thirds_of:
            for name, numbers in (("short", ordered[:third]), ("long", ordered[-third:])):
                found.append(_cell(size, name, numbers, lengths, _PAIRS_OF_A_THIRD, most_calls))
    return found


def _cell(
    size: int, name: str, numbers: Sequence[int], lengths: Mapping[int, int], pairs: int, most_calls: int
) -> Cell:
    draw = random.Random(size)
    calls = max(1, min(most_calls, 32 // size))
    batches = [[draw.choice(numbers) for _ in range(size)] for _ in range(calls)]
    length = round(stats.median([lengths[number] for number in numbers])) if max(lengths.values()) > 1 else None
    return Cell(size, batches, pairs, name, length)


class Bound(msgspec.Struct, frozen=True):
    """What this machine could do at most with a rung and a cell; 0 where that means nothing or is not known.

    Args:
        steps_per_s: of a language model: what memory delivers over what one step of the rung reads.
        calls_per_s: of a model that encodes: operations that the device does in a second over those of a mean call.
    """

    steps_per_s: float = 0.0
    calls_per_s: float = 0.0


# One call: its wall time ``s``, and of a language model ``prefill_s``, ``decode_s`` and ``steps``.
Call = dict[str, float]


def alone(cell: Cell, seen: Sequence[Call], bound: Bound) -> Timed:
    """The baseline's own times of a cell, from all the pairs that it was part of."""
    return _timed(cell, seen, 1.0, (1.0, 1.0), 1.0, len(seen), bound)


def new_shape_ms(process: Process, lengths: Mapping[int, int], met: int) -> float | None:
    """What one item of a length that was not met before takes longer, that once, in milliseconds: the median of a few.

    A server meets every length; of the same batches again and again no time would say so.

    Args:
        lengths: of items by number.
        met: the length that the process has met; where there is no other, the answer is ``None``.
    """
    of_length: dict[int, int] = {}
    for number, length in lengths.items():
        if length != met:
            of_length.setdefault(length, number)
    if not of_length:
        return None
    longer = process.ask({"do": "meet", "items": list(of_length.values())[:_NEW_LENGTHS]})["longer_s"]
    return round(max(0.0, stats.median(longer)) * 1e3, 3)


def compare(baseline: Process, candidate: Process, cell: Cell, seen: list[Call], bound: Bound) -> Timed:
    """Run a cell on both sides in turns; the baseline's own times are added to ``seen``. Raises `Failed`."""
    command = {"do": "time", "batches": cell.batches, "least_s": LEAST_TURN_S}
    for side in (baseline, candidate):  # each shape once before it counts
        side.ask(command)
    ratios, cpu_ratios = [], []
    calls: list[Call] = []
    for number in range(cell.rounds):
        sides = (baseline, candidate) if number % 2 == 0 else (candidate, baseline)
        answers = {side: side.ask(command) for side in sides}
        ratios.append(answers[baseline]["wall_s"] / answers[candidate]["wall_s"])
        cpu_ratios.append(answers[baseline]["cpu_s"] / max(answers[candidate]["cpu_s"], 1e-6))
        calls += answers[candidate]["calls"]
        seen += answers[baseline]["calls"]
    return _timed(cell, calls, stats.median(ratios), interval(ratios), stats.median(cpu_ratios), len(ratios), bound)


def _timed(
    cell: Cell,
    calls: Sequence[Call],
    ratio: float,
    bounds: tuple[float, float],
    cpu_ratio: float,
    pairs: int,
    bound: Bound,
) -> Timed:
    ordered = sorted(call["s"] for call in calls)
    p50_s = stats.median(ordered)
    mean_s = sum(ordered) / len(ordered)
    found = Timed(
        batch=cell.batch,
        ratio=ratio,
        interval=bounds,
        cpu_ratio=cpu_ratio,
        p50_ms=p50_s * 1e3,
        p95_ms=stats.percentile(ordered, 0.95) * 1e3,
        throughput=cell.batch / p50_s,
        pairs=pairs,
        share_of_peak=1 / mean_s / bound.calls_per_s if bound.calls_per_s else None,
        lengths=cell.lengths,
        length=cell.length,
    )
    if "decode_s" not in calls[0]:
        return found
    steps = stats.median([call["steps"] / call["decode_s"] for call in calls])
    return msgspec.structs.replace(
        found,
        prefill_ms=stats.median([call["prefill_s"] for call in calls]) * 1e3,
        tokens_per_s=steps * cell.batch,
        share_of_bandwidth=steps / bound.steps_per_s if bound.steps_per_s else None,
    )
