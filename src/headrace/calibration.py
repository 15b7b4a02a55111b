"""Warm up a model and measure which batches suit it here: the numbers that the batcher decides with.

A batch is taken to cost ``fixed + per_token × padded tokens`` seconds. Sizes and lengths are measured in turns, so that
a slow moment of the machine touches all of them, and the least time of each counts: noise only ever adds. The first
batch of a size and length may be compiled, or captured, for: one that takes much longer than the size before is timed
once more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from headrace import stats
from headrace.clock import perf_counter
from headrace.isolation import is_out_of_memory

LENGTHS = (32, 128)
ROUNDS = 3
BUDGET_S = 4.0
# Twice the items take twice as long at most.
UNLIKE = 3.0
# First batches may take so long in all before no larger ones are tried, and so long to meet the rest of the shapes.
FIRST_S = 60.0
SHAPES_S = 30.0
# The smallest size that reaches this share of the best rate wins: a larger batch only makes its members wait.
NEAR_BEST = 0.95


class Calibration(msgspec.Struct, frozen=True):
    """What the measurement says.

    Args:
        batch_size: smallest batch size that is within 5 % of the best throughput seen.
        overhead_tokens: fixed cost of a batch in tokens.
        tokens_per_s: rate at that batch size, padding included; 0 when nothing was measured.
    """

    batch_size: int
    overhead_tokens: float = 64.0
    tokens_per_s: float = 0.0


def calibrate(
    run: Callable[[list[Any]], list[Any]],
    example: Callable[[int], Any],
    cost: Callable[[Any], int],
    *,
    max_batch_size: int,
    max_batch_tokens: int,
) -> Calibration:
    """Warm the model up and measure it: about four seconds at most, and what the first batch of each shape takes.

    Args:
        run: answers a batch; what it raises is passed on, since a model that fails its warm-up must not be served.
        example: makes a prepared item of about the given length.
        cost: true length of such an item.
    """
    run([example(1)])
    items = list({cost(item): item for item in map(example, LENGTHS)}.items())
    sizes = [*_powers_of_two(max_batch_size), max_batch_size]
    times: dict[tuple[int, int], float] = {}
    first_s = timed_s = 0.0
    for _ in range(ROUNDS):
        for length, item in items:
            before = 0.0
            for size in sizes:
                if size > 1 and size * length > max_batch_tokens:
                    break
                new = (length, size) not in times
                if new and size > 1 and first_s > FIRST_S:
                    break
                try:
                    seconds = _time(run, [item] * size)
                    if new and seconds > UNLIKE * before:
                        first_s += seconds
                        seconds = _time(run, [item] * size)
                except Exception as error:
                    # A size that does not fit is an answer, too; a single item that does not is a failed warm-up.
                    if size == 1 or not is_out_of_memory(error):
                        raise
                    sizes = [smaller for smaller in sizes if smaller < size]
                    max_batch_size = sizes[-1]
                    break
                times[length, size] = before = min(seconds, times.get((length, size), seconds))
                timed_s += seconds
                # A doubled batch takes up to twice as long: stop growing where the rounds would leave the budget.
                if seconds * 2 * ROUNDS > BUDGET_S / 4:
                    break
        if timed_s > BUDGET_S:
            break
    return _conclude(times, max_batch_size)


def meet_shapes(
    run: Callable[[list[Any]], list[Any]],
    example: Callable[[int], Any],
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_batch_tokens: int,
) -> tuple[int, int]:
    """Run a batch of each shape that a model is captured, or compiled, for, so that no client waits for that.

    The largest comes first: the others find room in what it needed. Then they come from the smallest on, as what is met
    in time should be what few clients at once meet.

    Args:
        lengths: those that batches are filled up to; their sizes are filled up to powers of two.

    Returns:
        How many shapes were met within `SHAPES_S`, and how many there are.
    """
    sizes = [*_powers_of_two(batch_size), batch_size]
    shapes = [(size, length) for size in sizes for length in lengths if size * length <= max_batch_tokens or size == 1]
    largest = max(shapes, key=math.prod)
    started = perf_counter()
    met = 0
    for size, length in [largest, *(shape for shape in shapes if shape != largest)]:
        if perf_counter() - started > SHAPES_S:
            break
        try:
            run([example(length)] * size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            met += 1
    return met, len(shapes)


def _powers_of_two(below: int) -> Iterator[int]:
    return itertools.takewhile(lambda size: size < below, (2**k for k in range(20)))


def _conclude(times: dict[tuple[int, int], float], max_batch_size: int) -> Calibration:
    shortest = min(length for length, _ in times)
    rates = {size: size / seconds for (length, size), seconds in times.items() if length == shortest}
    best = max(rates.values())
    largest = max(rates)
    size = min(size for size, rate in rates.items() if rate >= NEAR_BEST * best)
    # If the largest size tried was still the best and the budget, not the limit, ended the search, leave it open.
    if size == largest and largest < max_batch_size:
        size = max_batch_size
    fixed, per_token = stats.fit_line([(length * n, seconds) for (length, n), seconds in times.items()])
    overhead = min(max(fixed, 0.0) / per_token, 1e6) if per_token > 0 else 1e6
    return Calibration(size, round(overhead, 1), round(shortest * rates.get(size, best), 1))


def _time(run: Callable[[list[Any]], list[Any]], batch: list[Any]) -> float:
    start = perf_counter()
    run(batch)
    return perf_counter() - start
