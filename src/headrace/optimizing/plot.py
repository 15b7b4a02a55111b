"""Latency and drift of the measured rungs as a drawing. Knows no colours: the page that it stands in has them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.optimizing.summary import clip, loss, measure_of, number, p50, plain, speed_of
from headrace.optimizing.words import Report, Row
from headrace.runners.drift import is_error

WIDTH, HEIGHT = 800, 460
LEFT, RIGHT, TOP, BOTTOM = 84, 20, 16, 58
# Less than this is the rounding of float32.
_LEAST_LOSS = 1e-7
# More than this is no measurement, and no axis can hold it beside the others.
_MOST = 1e12
_LETTER, _LINE, _DOT = 7.3, 15, 5
_LONGEST_LABEL = 28

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    row: Row
    latency: float
    loss: float


@dataclass(frozen=True)
class Axis:
    """Values from low to high on pixels from start to end; what is lower than low is drawn there."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def place(self, value: float) -> float:
        value = max(value, self.low)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        return [
            each for each in (_decades if self.log else _steps)(self.low, self.high) if self.low <= each <= self.high
        ]


def points(rows: Sequence[Row], measure: str) -> list[Point]:
    """Rows of which both are known; the baseline has lost nothing."""
    found = []
    for row in rows:
        lost = 0.0 if row.status == "baseline" else loss(measure, row.drift.get(measure, math.nan))
        latency = p50(row)
        if latency is not None and 0 < latency < _MOST and lost < _MOST:
            found.append(Point(row, latency, max(0.0, lost)))
    return found


def pareto(rows: Sequence[Row], measure: str = "") -> list[str]:
    """Rungs that no other one beats in both latency and drift, the fastest first.

    Args:
        measure: of drift; the first that the rows share when empty.
    """
    return [each.row.rung for each in _front(points(rows, measure or measure_of(rows, {})))]


def _front(some: Sequence[Point]) -> list[Point]:
    found: list[Point] = []
    for each in sorted(some, key=lambda point: (point.latency, point.loss)):
        last = found[-1] if found else None
        if last is None or each.loss < last.loss or (each.latency, each.loss) == (last.latency, last.loss):
            found.append(each)
    return found


def scatter(report: Report) -> str:
    """The drawing as an SVG element; empty where fewer than two rungs can be drawn."""
    measure = measure_of(report.rows, report.budget)
    some = points(report.rows, measure)
    if len(some) < 2:
        return ""
    bound = max(0.0, loss(measure, report.budget[measure])) if measure in report.budget else None
    if bound is not None and not bound < _MOST:  # it allows everything
        bound = None
    x, y = _latency_axis(some), _loss_axis(some, bound)
    name = measure if is_error(measure) else f"1 − {measure}"
    named = [(each.row.rung, x.place(each.latency), y.place(each.loss)) for each in some]
    taken: list[Box] = [(a - _DOT, b - _DOT, a + _DOT, b + _DOT) for _, a, b in named]
    body = [
        *_grid(x, y, any(each.loss < y.low for each in some) and y.log),
        *_titles(_batch_words(some), f"{name} (drift)"),
    ]
    if bound is not None:
        box = _budget_box(y, bound, taken)
        body += _budget(y, bound, box)
        taken.append(box)
    body += [*_front_line(some, x, y), *_dots(some, x, y, report.chosen), *_labels(named, taken)]
    label = f"Latency and drift of {len(some)} rungs"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n' + "\n".join(body) + "\n</svg>"


def _batch_words(some: Sequence[Point]) -> str:
    batches = {each.row.batch for each in some}
    if len(batches) > 1 or None in batches:
        return "p50 of a call in ms"
    (batch,) = batches
    return f"p50 of a call of {batch} item{'' if batch == 1 else 's'} in ms"


def _latency_axis(some: Sequence[Point]) -> Axis:
    values = [each.latency for each in some]
    low, high = min(values), max(values)
    if high > 8 * low:
        return Axis(low / 1.3, high * 1.3, True, LEFT, WIDTH - RIGHT)
    margin = (high - low) * 0.12 if high - low > 1e-6 * high else high * 0.5
    return Axis(max(0.0, low - margin), high + margin, False, LEFT, WIDTH - RIGHT)


def _loss_axis(some: Sequence[Point], bound: float | None) -> Axis:
    values = [each.loss for each in some] + ([bound] if bound is not None else [])
    positive = [each for each in values if each > _LEAST_LOSS]
    start, end = HEIGHT - BOTTOM, TOP
    if not positive:
        return Axis(0.0, _LEAST_LOSS, False, start, end)
    if max(positive) < 20 * min(positive):
        return Axis(0.0, max(positive) * 1.15, False, start, end)
    below = 1 if min(values) < min(positive) else 0  # a decade for those that lost nothing
    low = max(_LEAST_LOSS, 10.0 ** (math.floor(math.log10(min(positive))) - below))
    return Axis(low, max(positive) * 1.5, True, start, end)


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten, seven at most; 1, 2 and 5 where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, math.ceil((last - first) / 7))
    return [step * 10.0**power for power in range(first, last + 1, every) for step in steps]


def _steps(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= rough)
    return [step * count for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _grid(x: Axis, y: Axis, clamped: bool) -> Iterator[str]:
    yield f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>'
    for value in x.ticks():
        at = x.place(value)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        yield f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>'
    for value in y.ticks():
        at = y.place(value)
        least = "≤ " if clamped and value == y.low else ""
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{least}{value:g}</text>'


def _titles(across: str, up: str) -> Iterator[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{across}</text>'
    yield (
        f'<text class="axis" x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">'
        f"{html.escape(plain(up))}</text>"
    )


def _budget(y: Axis, bound: float, box: Box) -> Iterator[str]:
    at = y.place(bound)
    yield f'<line class="budget" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
    yield f'<text class="budget" x="{box[0]:.1f}" y="{box[3] - 4:.1f}">{_budget_text(bound)}</text>'


def _budget_text(bound: float) -> str:
    return f"budget {bound:g}"


def _budget_box(y: Axis, bound: float, dots: Sequence[Box]) -> Box:
    """Where the line's name stands: at one of its ends, above or below, out of the way of dots if it can be."""
    at, wide = y.place(bound), len(_budget_text(bound)) * _LETTER
    lefts, tops = (WIDTH - RIGHT - 6 - wide, LEFT + 6), (at - _LINE - 2, at + 2)
    inside = [top for top in tops if top > TOP and top + _LINE < HEIGHT - BOTTOM]
    boxes = [(left, top, left + wide, top + _LINE) for top in inside for left in lefts]
    return next((box for box in boxes if not any(_overlap(box, each) for each in dots)), boxes[0])


def _front_line(some: Sequence[Point], x: Axis, y: Axis) -> Iterator[str]:
    line = " ".join(f"{x.place(each.latency):.1f},{y.place(each.loss):.1f}" for each in _front(some))
    yield f'<polyline class="front" points="{line}"/>'


def _dots(some: Sequence[Point], x: Axis, y: Axis, chosen: str) -> Iterator[str]:
    for each in some:
        row = each.row
        kind = "chosen" if row.rung == chosen else row.status if row.status in ("ok", "baseline") else "out"
        told = f"{row.rung}: {row.status}, p50 {number(each.latency)} ms, {speed_of(row)}, drift {number(each.loss)}"
        yield (
            f'<circle class="dot {kind}" cx="{x.place(each.latency):.1f}" cy="{y.place(each.loss):.1f}" r="{_DOT}">'
            f"<title>{html.escape(plain(told))}</title></circle>"
        )


def _labels(named: Sequence[tuple[str, float, float]], taken: list[Box]) -> Iterator[str]:
    """Names beside their dots, further away with a line to them where others are in the way."""
    for rung, x, y in named:
        text = clip(plain(rung), _LONGEST_LABEL)
        box = next((box for box in _places(text, x, y) if not any(_overlap(box, each) for each in taken)), None)
        if box is None:  # its tooltip still says what it is
            continue
        taken.append(box)
        left, top, right, bottom = box
        near = min(max(x, left), right), min(max(y, top), bottom)
        if math.dist(near, (x, y)) > 2 * _DOT:
            yield f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near[0]:.1f}" y2="{near[1]:.1f}"/>'
        yield f'<text class="label" x="{left:.1f}" y="{bottom - 4:.1f}">{html.escape(text)}</text>'


def _places(text: str, x: float, y: float) -> Iterator[Box]:
    """Where a label could stand inside the frame, the nearest first."""
    wide = len(text) * _LETTER
    for gap in range(_DOT + 3, 240, 10):
        for left, top in (
            (x + gap, y - _LINE / 2),
            (x - gap - wide, y - _LINE / 2),
            (x - wide / 2, y - gap - _LINE),
            (x - wide / 2, y + gap),
            (x + gap * 0.7, y - gap - _LINE / 2),
            (x + gap * 0.7, y + gap - _LINE / 2),
            (x - gap * 0.7 - wide, y - gap - _LINE / 2),
            (x - gap * 0.7 - wide, y + gap - _LINE / 2),
        ):
            if left > LEFT and left + wide < WIDTH - RIGHT and top > TOP and top + _LINE < HEIGHT - BOTTOM:
                yield left, top, left + wide, top + _LINE


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
