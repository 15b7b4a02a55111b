"""What no rung can do more than: bytes and products that this machine delivers in a second, and what an item needs.

The ladder's own process reads this module too, and stays without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from headrace.clock import perf_counter
from headrace.runners.collate import Item
from headrace.runners.way import Way

_TIMES = 5


class Operations(msgspec.Struct, frozen=True):
    """Floating-point operations of one item alone, counted at some lengths; a product and its sum are two.

    Args:
        lengths: up to three, rising; none where nothing could be counted.
        counted: operations at each.
    """

    lengths: list[int] = []
    counted: list[float] = []

    def of(self, length: int) -> float:
        """At any length between these, by the parabola through what was counted (Lagrange).

        The layers of a transformer grow with the length, its attention with the square.
        """
        found = 0.0
        for here, count in zip(self.lengths, self.counted, strict=True):
            for other in self.lengths:
                if other != here:
                    count *= (length - other) / (here - other)
            found += count
        return found


def operations(way: Way, items: Sequence[Item], lengths: Sequence[int]) -> Operations:
    """Count what a torch module does with its shortest, its median and its longest item.

    Args:
        lengths: of the items.
    """
    from torch.utils.flop_counter import FlopCounterMode

    by_length = dict(zip(lengths, items, strict=True))
    ordered = sorted(lengths)
    chosen = sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})
    counted = []
    try:
        for length in chosen:
            with FlopCounterMode(display=False) as counter:
                way.answer([by_length[length]])
            counted.append(float(counter.get_total_flops()))
    except Exception:  # what a user's own operators do under a counter is not known, and nothing depends on it
        return Operations()
    return Operations(chosen, counted) if all(counted) else Operations()


def operations_per_s(device: str, threads: int) -> float:
    """Of the largest products that this device gets: float32 on a CPU, bfloat16 on a GPU; the best of several."""
    import torch

    torch.set_num_threads(threads)
    size, dtype = (1536, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_s(lambda: left @ right, device)


def bytes_per_s(device: str, threads: int) -> float:
    """That are read and written by copies of something that no cache holds, the best of several."""
    import torch

    torch.set_num_threads(threads)
    source = torch.ones(1 << (28 if device == "cpu" else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return float(2 * source.numel()) / _best_s(lambda: target.copy_(source), device)


def _best_s(call: Callable[[], Any], device: str) -> float:
    import torch

    best = float("inf")
    for _ in range(_TIMES):
        began = perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, perf_counter() - began)
    return best
