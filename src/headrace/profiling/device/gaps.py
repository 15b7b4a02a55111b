"""Why a GPU had nothing to run: its idle time cut into pieces, each with the cause that the host's doing shows.

Before the kernel that ends a gap stands the call that launched it. Until that call the host was late: it sat in a call
that waits or copies, took a batch from a DataLoader, or did something that leaves no mark. A short time without marks
is what a call costs in Python and in torch, and belongs to what came before it; a long one is the host's own.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from headrace.profiling.device.timeline import Cause, Gap, Where
from headrace.profiling.device.trace import SMALL_BYTES, TICK_S, Mark, Span, Trace, union

# Between two calls of a host that does nothing else lie 5 to 50 µs of Python and torch, with the profiler on.
_QUICK_S = 100e-6
_MOST_WHERE = 3


@dataclass(slots=True)
class Piece:
    """A part of a gap."""

    start: float
    end: float
    cause: Cause
    what: str = ""


@dataclass(slots=True)
class Idle:
    """A gap: between two kernels, before the first or after the last; ``kernel`` ended it."""

    start: float
    end: float
    kernel: Span | None
    pieces: list[Piece]


def find_gaps(trace: Trace, device: int) -> list[Idle]:
    """All gaps of a device within the window, in order, each cut into its pieces."""
    kernels = trace.kernels[device]
    starts = [kernel.start for kernel in kernels]
    copies = [copy for copy in trace.copies.get(device, []) if copy.bytes > SMALL_BYTES]
    moving = union(copies, trace.window)
    host = _Host(trace)
    found = []
    for start, end in _between(union(kernels, trace.window), trace.window):
        at = bisect.bisect_left(starts, end)
        kernel = kernels[at] if at < len(kernels) and end < trace.window[1] else None
        pieces = [part for piece in host.pieces(start, end, kernel) for part in _without_copies(piece, moving, copies)]
        found.append(Idle(start, end, kernel, _joined(pieces)))
    return found


def _between(busy: list[tuple[float, float]], window: tuple[float, float]) -> Iterator[tuple[float, float]]:
    position = window[0]
    for start, end in [*busy, (window[1], window[1])]:
        if start > position + TICK_S:
            yield position, start
        position = max(position, end)


class _Host:
    """What the launching threads did in a gap."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._marks = trace.marks
        self._ends: list[float] = []  # of all marks up to each: a search needs them in order
        latest = float("-inf")
        for mark in self._marks:
            latest = max(latest, mark.end)
            self._ends.append(latest)

    def pieces(self, start: float, end: float, kernel: Span | None) -> list[Piece]:
        launched = end
        if kernel is not None:
            call = self._trace.launches.get(kernel.correlation) if kernel.correlation is not None else None
            launched = min(max(call.start, start), end) if call is not None else start
        found = list(self._late(start, launched))
        # From the call to the kernel's start: it shows only because the host was late, or else it is the GPU's own.
        if launched < end:
            found.append(Piece(launched, end, found[-1].cause if found else "launch", found[-1].what if found else ""))
        return found

    def _late(self, start: float, launched: float) -> Iterator[Piece]:
        """The time until the launch: marks, and what lies between them."""
        at = bisect.bisect_right(self._ends, start)
        before = self._marks[at - 1] if at else None
        position = start
        while position < launched:
            mark = self._marks[at] if at < len(self._marks) else None
            at += 1
            if mark is not None and mark.end <= position:
                continue
            until = launched if mark is None else min(max(mark.start, position), launched)
            if until > position:
                quiet_from = before.end if before is not None else self._trace.window[0]
                quiet_to = mark.start if mark is not None else self._trace.window[1]
                yield self._quiet(position, until, quiet_to - quiet_from, before)
            if mark is None or mark.start >= launched:
                return
            stop = min(mark.end, launched)
            yield Piece(max(until, position), stop, mark.kind, self._said(mark))
            position, before = stop, mark

    def _quiet(self, start: float, end: float, length: float, before: Mark | None) -> Piece:
        if before is not None and length <= _QUICK_S:
            return Piece(start, end, before.kind, self._said(before))
        return Piece(start, end, "host", self._annotation((start + end) / 2))

    def _said(self, mark: Mark) -> str:
        if mark.kind in ("launch", "copy"):
            return ""
        operator = self._trace.operators.get(mark.operator) if mark.operator is not None else None
        return f"{mark.name} in {operator.name}" if operator is not None else mark.name

    def _annotation(self, when: float) -> str:
        """The innermost of the user's own around that time."""
        around = [span for span in self._trace.annotations if span.start <= when < span.end]
        return around[-1].name if around else ""


def _without_copies(piece: Piece, moving: list[tuple[float, float]], copies: list[Span]) -> Iterator[Piece]:
    """The piece, with what the copying engine did meanwhile taken out of it and called so."""
    at = max(0, bisect.bisect_right(moving, (piece.start, float("inf"))) - 1)
    position = piece.start
    while at < len(moving) and moving[at][0] < piece.end:
        start, end = max(moving[at][0], position), min(moving[at][1], piece.end)
        at += 1
        if end <= start:
            continue
        if start > position:
            yield Piece(position, start, piece.cause, piece.what)
        first = bisect.bisect_right(copies, start, key=lambda copy: copy.start) - 1
        yield Piece(start, end, "copy", copies[max(0, first)].name)
        position = end
    if position < piece.end:
        yield Piece(position, piece.end, piece.cause, piece.what)


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one cause are one piece."""
    found: list[Piece] = []
    for piece in pieces:
        if found and (found[-1].cause, found[-1].what) == (piece.cause, piece.what):
            found[-1].end = piece.end
        else:
            found.append(piece)
    return found


def by_cause(idle: list[Idle], window: tuple[float, float]) -> list[Gap]:
    """All pieces of each cause together, the largest first."""
    pieces: dict[Cause, list[Piece]] = defaultdict(list)
    gaps: Counter[Cause] = Counter()
    for each in idle:
        gaps.update({piece.cause for piece in each.pieces})
        for piece in each.pieces:
            pieces[piece.cause].append(piece)
    length = window[1] - window[0]
    found = [_gap(cause, of_it, gaps[cause], window[0], length) for cause, of_it in pieces.items()]
    return sorted(found, key=lambda gap: -gap.seconds)


def _gap(cause: Cause, pieces: list[Piece], count: int, began: float, length: float) -> Gap:
    seconds = sum(piece.end - piece.start for piece in pieces)
    longest = max(pieces, key=lambda piece: piece.end - piece.start)
    where: Counter[str] = Counter()
    for piece in pieces:
        if piece.what:
            where[piece.what] += piece.end - piece.start  # type: ignore[assignment]
    return Gap(
        cause,
        seconds,
        seconds / length,
        count,
        longest.end - longest.start,
        longest.start - began,
        [Where(what, amount) for what, amount in where.most_common(_MOST_WHERE)],
    )
