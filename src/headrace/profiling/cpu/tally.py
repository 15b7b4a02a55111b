"""Time by stack. A stack that was seen once is kept as the numbers of its places, and seen again costs an addition."""

from __future__ import annotations

from headrace.profiling.cpu.places import Places
from headrace.profiling.record import Stack

# A server has as many tasks as requests: beyond so many names nobody is helped by another one.
_MOST_OWNERS = 500
# Nor by another way into the same place.
_MOST_STACKS = 50_000
_OTHERS = "others"

# Owner, what it waits for, places.
Key = tuple[str, str, tuple[int, ...]]


class Tally:
    """Seconds and samples of every stack of one kind."""

    def __init__(self) -> None:
        self._cells: dict[Key, list[float]] = {}
        self._owners: set[str] = set()

    def add(self, owner: str, waits_for: str, places: tuple[int, ...], seconds: float) -> None:
        if owner not in self._owners:
            if len(self._owners) >= _MOST_OWNERS:
                owner = _OTHERS
            self._owners.add(owner)
        cell = self._cells.get((owner, waits_for, places))
        if cell is None and len(self._cells) >= _MOST_STACKS:
            owner, places = _OTHERS, places[-1:]
            cell = self._cells.get((owner, waits_for, places))
        if cell is None:
            cell = self._cells[owner, waits_for, places] = [0.0, 0]
        cell[0] += seconds
        cell[1] += 1

    def stacks(self, places: Places) -> list[Stack]:
        """Those with most time first. Places of one line are one."""
        found: dict[tuple[str, str, tuple[int, ...], tuple[int, ...]], list[float]] = {}
        for (owner, waits_for, numbers), (seconds, samples) in list(self._cells.items()):
            way = [places.places[number] for number in numbers]
            key = (owner, waits_for, tuple(each.frame for each in way), tuple(each.line for each in way))
            cell = found.setdefault(key, [0.0, 0])
            cell[0] += seconds
            cell[1] += samples
        stacks = [
            Stack(list(frames), list(lines), seconds, int(samples), owner, waits_for)
            for (owner, waits_for, frames, lines), (seconds, samples) in found.items()
        ]
        return sorted(stacks, key=lambda stack: -stack.seconds)
