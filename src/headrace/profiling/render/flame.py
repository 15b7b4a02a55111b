"""Stacks as a tree that a browser can draw: merged from the root, what is too small to be seen left out.

The largest nodes are kept, parents before children, so that what is left out of a node is its own remainder. Knows
nothing of pages.
"""

from __future__ import annotations

import heapq
import itertools
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from headrace.profiling.record import Frame, Record, Stack

# No node is smaller than a tenth of a pixel of a wide screen, and no page grows beyond some hundred kilobytes.
MOST_NODES = 20_000
LEAST_SHARE = 1 / 20_000
# Function, file, line, kind.
_Words = tuple[str, str, int, str]

_IMPORTING = "<frozen importlib"
_LINES = 3
_OWNERS = 3


class Tree(msgspec.Struct):
    """Nodes as columns, the largest first; the first is the root, its own parent.

    Args:
        frames: [function, file, line, kind] of each frame that occurs; kinds ``thread`` and ``wait`` are no functions.
        frame: number in ``frames``; parent: number of a node.
        total, own: seconds, with and without what is above it; of a comparison those after.
        before: seconds of the run before; empty where nothing is compared.
        samples: how often it was seen.
        lines: of the lines being run in it those with most seconds: [line, seconds, …].
        owners: how many tasks or threads were seen in it, and the numbers of some in ``names``; not kept for running
            stacks, whose threads are nodes.
        left_out: nodes that would have been too small.
    """

    frames: list[_Words] = []
    frame: list[int] = []
    parent: list[int] = []
    total: list[float] = []
    own: list[float] = []
    before: list[float] = []
    samples: list[int] = []
    lines: list[list[float]] = []
    owners: list[list[int]] = []
    names: list[str] = []
    left_out: int = 0


def cpu(record: Record, path: Callable[[Frame], str]) -> Tree:
    """Running stacks, by thread where there are several.

    Args:
        path: a frame's file as people know it.
    """
    names = _Names(by_line=True)
    pools = thread_names(stack.owner for stack in record.cpu)
    rows = _rows(record, record.cpu, path, names)
    if len(set(pools.values())) > 1:
        for row in rows:
            row.frames.insert(0, names.number(pools[row.owner], "", 0, "thread"))
            row.lines.insert(0, 0)
    return _grown(rows, names)


def waiting(record: Record, path: Callable[[Frame], str]) -> Tree:
    """Chains of awaits and threads that wait; each ends in what it waits for."""
    names = _Names(by_line=True)
    return _grown(_rows(record, record.waiting, path, names), names, owners=True)


def difference(
    before: tuple[Record, Sequence[Stack], Callable[[Frame], str]],
    after: tuple[Record, Sequence[Stack], Callable[[Frame], str]],
    factors: tuple[float, float] = (1.0, 1.0),
) -> Tree:
    """One tree of two runs. A function is the same if its name and its file are; its lines may have moved.

    Args:
        before, after: a record, some of its stacks, and what tells a frame's file.
        factors: of the seconds of each.
    """
    names = _Names(by_line=False)
    rows = []
    for side, (record, stacks, path) in enumerate((before, after)):
        for row in _rows(record, stacks, path, names):
            seconds = row.weights[0] * factors[side]
            row.weights = (0.0, seconds) if side else (seconds, 0.0)
            rows.append(row)
    return _grown(rows, names, sides=2)


class _Row(msgspec.Struct):
    """A stack with frames of the tree; ``weights`` are one for each side of a comparison, the later one last."""

    frames: list[int]
    lines: list[int]
    weights: tuple[float, ...]
    samples: int
    owner: str


class _Names:
    """Frames of a tree, each once.

    Args:
        by_line: whether functions of one name and file are told apart by where they begin.
    """

    def __init__(self, *, by_line: bool) -> None:
        self._by_line = by_line
        self._known: dict[tuple[str, str, int], int] = {}
        self.frames: list[_Words] = []

    def number(self, function: str, file: str, line: int, kind: str) -> int:
        words = (function, file, line, kind)
        number = self._known.setdefault((function, file, line if self._by_line else 0), len(self.frames))
        if number == len(self.frames):
            self.frames.append(words)
        self.frames[number] = words  # where it is now
        return number


def _rows(record: Record, stacks: Sequence[Stack], path: Callable[[Frame], str], names: _Names) -> list[_Row]:
    numbers = [names.number(_called(each, path(each)), path(each), each.line, each.kind) for each in record.frames]
    # How Python imports is of no interest; what is imported is a frame of its own.
    machinery = {number for number, each in enumerate(record.frames) if each.file.startswith(_IMPORTING)}
    rows = []
    for stack in stacks:
        lines = [*stack.lines, *[0] * (len(stack.frames) - len(stack.lines))]
        if machinery.isdisjoint(stack.frames):
            frames = [numbers[number] for number in stack.frames]
        else:
            kept = [at for at, number in enumerate(stack.frames) if number not in machinery]
            frames, lines = [numbers[stack.frames[at]] for at in kept], [lines[at] for at in kept]
        if stack.waits_for:
            frames.append(names.number(f"waits for: {stack.waits_for}", "", 0, "wait"))
            lines.append(0)
        rows.append(_Row(frames, lines, (stack.seconds,), stack.samples, stack.owner))
    return rows


def _called(frame: Frame, file: str) -> str:
    """A module's own code is called the same in all of them."""
    return f"{frame.function} {file}" if frame.function == "<module>" else frame.function


def thread_names(owners: Iterable[str]) -> dict[str, str]:
    """What threads are called in a tree: those of one pool, which differ by a number, are one."""
    pools: dict[str, list[str]] = defaultdict(list)
    for owner in dict.fromkeys(owners):
        pools[re.sub(r"[-_ ]?\d+( \(.*\))?$", "", owner)].append(owner)
    return {
        owner: f"thread {owner or '?'}" if len(same) == 1 else f"{len(same)} threads {pool}"
        for pool, same in pools.items()
        for owner in same
    }


class _Range(NamedTuple):
    """Rows that make one node: they lie side by side. What takes most comes first."""

    less: float
    order: int
    low: int
    high: int
    depth: int
    frame: int
    parent: int


def _grown(rows: list[_Row], names: _Names, sides: int = 1, owners: bool = False) -> Tree:
    """The tree of these rows, from the root, always the largest node next.

    The time of a node is a difference of two running sums, its children are found by halving.
    """
    found = Tree()
    known: dict[str, int] | None = {} if owners else None
    if not rows:
        return found
    rows.sort(key=lambda row: row.frames)
    sums = [[0.0, *itertools.accumulate(row.weights[side] for row in rows)] for side in range(sides)]
    samples = [0, *itertools.accumulate(row.samples for row in rows)]
    least = max(each[-1] for each in sums) * LEAST_SHARE
    ahead = [_Range(0.0, 0, 0, len(rows), 0, names.number("all", "", 0, "root"), 0)]
    order = itertools.count(1)
    while ahead and len(found.frame) < MOST_NODES:
        here = heapq.heappop(ahead)
        number, children = len(found.frame), _children(rows, here)
        _add(found, here, sums, ended=children[0][0] if children else here.high)
        found.samples.append(samples[here.high] - samples[here.low])
        found.lines.append(_lines(rows[here.low : here.high], here.depth) if here.depth else [])
        if known is not None:
            found.owners.append(_owners(rows[here.low : here.high], known))
        for low, high in children:
            size = max(each[high] - each[low] for each in sums)
            if size >= least:
                frame = rows[low].frames[here.depth]
                heapq.heappush(ahead, _Range(-size, next(order), low, high, here.depth + 1, frame, number))
            else:
                found.left_out += 1
    found.left_out += len(ahead)
    found.names = list(known or ())
    _keep_used(found, names.frames)
    return found


def _children(rows: Sequence[_Row], here: _Range) -> list[tuple[int, int]]:
    """Where those lie that agree in the next frame too. A stack that ends here lies before those that go on."""
    found, depth = [], here.depth
    low = bisect_left(rows, True, here.low, here.high, key=lambda row: len(row.frames) > depth)
    while low < here.high:
        high = bisect_right(rows, rows[low].frames[depth], low, here.high, key=lambda row: row.frames[depth])
        found.append((low, high))
        low = high
    return found


def _add(found: Tree, here: _Range, sums: Sequence[Sequence[float]], ended: int) -> None:
    """A node with its times; rows before ``ended`` go no further."""
    found.frame.append(here.frame)
    found.parent.append(here.parent)
    found.total.append(_rounded(sums[-1][here.high] - sums[-1][here.low]))
    found.own.append(_rounded(sums[-1][ended] - sums[-1][here.low]))
    if len(sums) > 1:
        found.before.append(_rounded(sums[0][here.high] - sums[0][here.low]))


def _lines(rows: Sequence[_Row], depth: int) -> list[float]:
    """The lines that these were at in the frame of a depth, those with most seconds."""
    seconds: dict[int, float] = defaultdict(float)
    at = depth - 1
    for row in rows:
        seconds[row.lines[at]] += row.weights[-1]
    best = sorted(((each, line) for line, each in seconds.items() if line > 0 and each > 0), reverse=True)
    return [part for each, line in best[:_LINES] for part in (line, _rounded(each))]


def _owners(rows: Sequence[_Row], known: dict[str, int]) -> list[int]:
    """How many, and the numbers of some."""
    owners = dict.fromkeys(row.owner for row in rows)
    return [len(owners), *(known.setdefault(each, len(known)) for each in itertools.islice(owners, _OWNERS))]


def _rounded(seconds: float) -> float:
    return round(max(0.0, seconds), 6)


def _keep_used(found: Tree, frames: Sequence[_Words]) -> None:
    """Frames of nodes that were left out are not carried along."""
    used = {old: new for new, old in enumerate(dict.fromkeys(found.frame))}
    found.frame = [used[each] for each in found.frame]
    found.frames = [frames[each] for each in used]
