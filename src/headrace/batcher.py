"""Which of the waiting items run next: the heart of the server, without threads, sockets or torch.

The batch forms as late as possible: `take` is called when the device is free. It holds the oldest item and those of
its neighbours in length that make the batch most productive, where

    productivity = real tokens / (overhead + padded tokens)

with ``overhead`` the fixed cost of a batch expressed in tokens, measured at warm-up (`calibration.py`). On a device
with a small overhead (a CPU) batches come out narrow and without padding, on one with a large one (a GPU) full.
`docs/adr/0004-batch-formation.md` has the alternatives that were simulated.

Bounds, each kept for every batch: at most ``max_batch_size`` items; padded size (items × longest) at most
``max_batch_tokens``, except that a longer item runs alone; no item whose deadline has passed. The oldest item is in
every batch, so an item waits at most for those that were there before it; only the oldest few batches' worth are
compared by length, so a long queue moves on in order of arrival; and once younger items have passed an item in
``max_passes`` batches (a number fixed at its arrival) it goes before everything that is not overdue too.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from headrace.errors import Overloaded

# An item may be passed by PASSES_BASE batches, and by PASSES_PER_TURN more for each full batch that waited before it.
# In simulation smaller values cost up to 30 % of the throughput in a long queue and did not help the 99th percentile.
PASSES_BASE = 16
PASSES_PER_TURN = 2
# Neighbours in length are looked for among so many full batches' worth of the oldest items, and at least so many items:
# a long queue then keeps nobody much longer than it takes to serve all of it, and padding hardly grows.
WINDOW_BATCHES = 4
WINDOW_ITEMS = 64


@dataclass(slots=True, eq=False)
class Entry:
    """A waiting item.

    Args:
        key: names the item to `Batcher.cancel`; unique among those waiting.
        item: what the runner gets.
        cost: its length in tokens, at least 1.
        arrived: clock reading at its arrival.
        deadline: clock reading after which nobody waits for it.
    """

    key: Hashable
    item: Any
    cost: int
    arrived: float
    deadline: float
    passes: int = field(default=0, init=False)
    max_passes: int = field(default=0, init=False)
    seq: int = field(default=0, init=False)


class Batcher:
    """The waiting room and the rule that empties it.

    Args:
        max_batch_size: most items in a batch.
        max_batch_tokens: most tokens in a batch, padding included.
        max_wait_s: how long the oldest item waits for a batch to fill; 0 never waits.
        capacity: most items waiting.
        overhead_tokens: fixed cost of a batch, in tokens.
    """

    def __init__(
        self,
        *,
        max_batch_size: int = 32,
        max_batch_tokens: int = 16384,
        max_wait_s: float = 0.0,
        capacity: int = 1000,
        overhead_tokens: float = 64.0,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.max_wait_s = max_wait_s
        self.capacity = capacity
        self.overhead_tokens = overhead_tokens
        self._sequence = itertools.count(1)
        self._by_age: dict[int, Entry] = {}  # all that wait
        self._by_cost: list[tuple[int, int]] = []  # those in the window, by length
        self._behind: dict[int, Entry] = {}  # the younger ones
        self._seq_of: dict[Hashable, int] = {}
        self._cost = 0

    def __len__(self) -> int:
        return len(self._by_age)

    def offer(self, entry: Entry) -> None:
        """Let an item in.

        Raises:
            Overloaded: the waiting room is full.
        """
        if len(self._by_age) >= self.capacity:
            raise Overloaded(f"{self.capacity} requests are waiting already")
        entry.seq = seq = next(self._sequence)
        turns = min(len(self._by_age), self._window) // self.max_batch_size
        entry.max_passes = PASSES_BASE + PASSES_PER_TURN * turns
        self._by_age[seq] = entry
        self._seq_of[entry.key] = seq
        self._cost += entry.cost
        self._behind[seq] = entry
        self._fill_window()

    def cancel(self, key: Hashable) -> bool:
        """Forget an item that waits; False when it is not here (any more)."""
        seq = self._seq_of.get(key)
        if seq is None:
            return False
        self._remove(self._by_age[seq])
        return True

    def waiting(self) -> list[Entry]:
        """All that wait, oldest first."""
        return list(self._by_age.values())

    @property
    def cost(self) -> int:
        """Tokens of all that wait, without padding."""
        return self._cost

    def oldest(self) -> float:
        """When the item that has waited longest arrived; infinity when nothing waits."""
        return next(iter(self._by_age.values())).arrived if self._by_age else math.inf

    def wait_s(self, now: float) -> float | None:
        """Seconds until a batch is due: 0 now, ``None`` when nothing waits."""
        if not self._by_age:
            return None
        if len(self._by_age) >= self.max_batch_size:
            return 0.0
        oldest = next(iter(self._by_age.values()))
        return max(0.0, oldest.arrived + self.max_wait_s - now)

    def take(self, now: float) -> tuple[list[Entry], list[Entry]]:
        """Form a batch.

        Returns:
            The batch in order of age, and the items met on the way whose deadline has passed. Both have left the room.
        """
        expired: list[Entry] = []
        while self._by_age:
            batch = self._choose()
            late = [entry for entry in batch if entry.deadline <= now]
            for entry in late:
                self._remove(entry)
            expired += late
            if late:
                continue
            for entry in batch:
                self._remove(entry)
            batch.sort(key=lambda entry: entry.seq)
            self._count_passes(batch[-1].seq)
            return batch, expired
        return [], expired

    def _remove(self, entry: Entry) -> None:
        del self._by_age[entry.seq]
        del self._seq_of[entry.key]
        self._cost -= entry.cost
        if self._behind.pop(entry.seq, None) is None:
            del self._by_cost[bisect.bisect_left(self._by_cost, (entry.cost, entry.seq))]
            self._fill_window()

    @property
    def _window(self) -> int:
        return max(WINDOW_ITEMS, WINDOW_BATCHES * self.max_batch_size)

    def _fill_window(self) -> None:
        while self._behind and len(self._by_cost) < self._window:
            seq = next(iter(self._behind))
            bisect.insort(self._by_cost, (self._behind.pop(seq).cost, seq))

    def _count_passes(self, newest: int) -> None:
        for seq, entry in self._by_age.items():
            if seq > newest:
                return
            entry.passes += 1

    def _choose(self) -> list[Entry]:
        oldest = next(iter(self._by_age.values()))
        if self._by_cost[0][0] == self._by_cost[-1][0]:
            room = max(1, min(self.max_batch_size, self.max_batch_tokens // oldest.cost))
            return list(itertools.islice(self._by_age.values(), room))
        if oldest.passes >= oldest.max_passes:
            return self._overdue_first()
        return self._most_productive(oldest)

    def _overdue_first(self) -> list[Entry]:
        """Items that were passed over too often, oldest first, and whatever fits beside them without more padding."""
        chosen: dict[int, Entry] = {}
        longest = 0
        for seq, entry in self._by_age.items():
            if entry.passes < entry.max_passes or len(chosen) == self.max_batch_size:
                break
            if chosen and (len(chosen) + 1) * max(longest, entry.cost) > self.max_batch_tokens:
                break
            chosen[seq] = entry
            longest = max(longest, entry.cost)
        room = min(self.max_batch_size, self.max_batch_tokens // longest) - len(chosen)
        index = bisect.bisect_right(self._by_cost, (longest, max(self._by_age))) - 1
        while room > 0 and index >= 0:
            seq = self._by_cost[index][1]
            if seq not in chosen:
                chosen[seq] = self._by_age[seq]
                room -= 1
            index -= 1
        return list(chosen.values())

    def _most_productive(self, oldest: Entry) -> list[Entry]:
        """Grow a window around the oldest item in the order of length, to the better side each time; keep its best."""
        order = self._by_cost
        low = high = bisect.bisect_left(order, (oldest.cost, oldest.seq))
        real, best = oldest.cost, (0.0, low, high)
        for size in range(1, min(self.max_batch_size, len(order)) + 1):
            longest = order[high][0]
            if size > 1 and size * longest > self.max_batch_tokens:
                break
            score = real / (self.overhead_tokens + size * longest)
            if score > best[0]:
                best = (score, low, high)
            left = order[low - 1][0] if low else 0
            right = order[high + 1][0] if high + 1 < len(order) else 0
            if not left and not right:
                break
            gain_left = (real + left) / (self.overhead_tokens + (size + 1) * longest) if left else 0.0
            gain_right = (real + right) / (self.overhead_tokens + (size + 1) * right) if right else 0.0
            if gain_left >= gain_right or (size + 1) * right > self.max_batch_tokens:
                if not left:
                    break
                low, real = low - 1, real + left
            else:
                high, real = high + 1, real + right
        return [self._by_age[seq] for _, seq in order[best[1] : best[2] + 1]]
