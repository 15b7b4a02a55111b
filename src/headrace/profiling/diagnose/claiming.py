"""The rules that say why, together: what they explain is not told again by rules that only say where."""

from __future__ import annotations

from collections.abc import Callable

from headrace.profiling.diagnose import calling, gpu, kinds, looping, models, starting, threads, waiting
from headrace.profiling.diagnose.explained import Claim
from headrace.profiling.diagnose.once import once
from headrace.profiling.record import Record

# In the order in which findings of an equal share are told.
CLAIMS: list[Callable[[Record], list[Claim]]] = [
    gpu.idle,
    models.loading,
    models.small_batches,
    looping.tokenising,
    looping.blocked,
    threads.contention,
    threads.locks,
    waiting.children,
    waiting.io,
    starting.claims,
    kinds.claims,
    calling.repeated,
    calling.differing,
]


@once
def left(record: Record) -> list[float]:
    """Of each running stack, the part that none of these findings explains."""
    parts = [1.0] * len(record.cpu)
    for claims in CLAIMS:
        for claim in claims(record):
            for number, weight in claim.weights.items():
                parts[number] = min(parts[number], 1.0 - weight)
    return parts
