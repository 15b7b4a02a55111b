"""Two runs side by side: what takes more or less time, whether that is outside the noise, and whether it was worth it.

Two kinds of noise, never mixed up. How often a function is sampled varies by chance: that is known from one run. How
fast a machine is varies too: that is known only from runs that took turns, or, less well, from runs repeated later.
Knows nothing of formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from headrace import stats
from headrace.errors import ConfigError
from headrace.profiling import ledger
from headrace.profiling import record as records
from headrace.profiling.changes import Change, changes
from headrace.profiling.ledger import Run, Turns
from headrace.profiling.record import Record
from headrace.profiling.render.totals import percent, plain, seconds, short

# Fewer runs of each say nothing with any confidence: of five pairs all five must agree.
LEAST_RUNS = 5
# Of the whole run: a change that saves less has its price in code, and hardly any in time.
WORTH = 0.02

Code = Literal["faster", "slower", "cannot_tell", "unknown"]


class Side(msgspec.Struct, frozen=True):
    """A run that is compared.

    Args:
        name: as it was asked for: a name of the ledger, or a file.
        runs: of the ledger: the run last, its repeats before it; empty for a file.
    """

    name: str
    record: Record
    runs: list[Run] = []


class Measure(msgspec.Struct, frozen=True):
    """A time of the whole run, before and after.

    Args:
        what: ``wall`` or ``cpu``.
        before_s, after_s: medians.
        ratio: after over before; ``interval`` holds it with 95 % confidence, ``None`` where too few runs can tell.
        runs: of each side.
        way: ``turns``: measured in turns, without a profiler. ``repeats``: stored runs. ``single``: one run each.
    """

    what: Literal["wall", "cpu"]
    before_s: float
    after_s: float
    ratio: float
    interval: tuple[float, float] | None
    runs: int
    way: Literal["turns", "repeats", "single"]

    @property
    def code(self) -> Code:
        if self.interval is None:
            return "unknown"
        low, high = self.interval
        return "faster" if high < 1 else "slower" if low > 1 else "cannot_tell"


class Comparison(msgspec.Struct, frozen=True):
    """What is to be said of two runs.

    Args:
        code: ``faster``, ``slower``, ``cannot_tell`` (it may be noise) or ``unknown`` (noise was not measured).
        verdict, worth: in words.
        measures: of the whole run, wall time first; empty where only windows can be compared.
        changes: functions, those that changed most first.
    """

    before: str
    after: str
    code: Code
    verdict: str
    worth: str
    measures: list[Measure]
    changes: list[Change]
    notes: list[str]


def find(word: str, root: Path | None = None) -> Side:
    """A run by its name in the ledger, or by the file of its record.

    Raises:
        ConfigError: there is neither, or it cannot be read.
    """
    path = Path(word)
    if path.name != word or word.endswith(".json"):
        return Side(word, records.read(path))
    try:
        runs = ledger.named(word, root)
    except ConfigError:
        if path.is_file():
            return Side(word, records.read(path))
        raise
    return Side(word, ledger.read(runs[-1], root), runs)


def compare(before: Side, after: Side, turns: Turns | None = None, *, anyway: bool = False) -> Comparison:
    """Compare two runs.

    Args:
        turns: both commands measured in turns.
        anyway: also runs of unlike machines.

    Raises:
        ConfigError: they ran on unlike machines.
    """
    different = ledger.unlike(before.record.machine, after.record.machine)
    if different and not anyway:
        raise ConfigError(
            f"{before.name} and {after.name} did not run on the same machine: {'; '.join(different)}",
            field="machine",
            hint="measure both here, or --anyway: the difference may then be that of the machines",
        )
    measures = _measures(before, after, turns)
    found = changes(before.record, after.record)
    telling = _telling(measures)
    notes = [f"unlike machines: {each}" for each in different]
    notes += _notes(before, after, turns)
    return Comparison(
        before.name,
        after.name,
        telling.code if telling else "cannot_tell",
        _verdict(measures),
        _worth(telling, found),
        measures,
        found,
        notes,
    )


def slower_by(comparison: Comparison) -> float:
    """How much longer the run takes, as a share of its time before, where noise does not explain it; else 0.

    Without any measurement of noise, what one run each has shown counts.
    """
    worst = 0.0
    for each in comparison.measures[:1] if comparison.code == "unknown" else comparison.measures:
        if each.code in ("slower", "unknown"):
            worst = max(worst, each.ratio - 1)
    return worst


def _measures(before: Side, after: Side, turns: Turns | None) -> list[Measure]:
    if turns is not None and turns.wall_s:
        return [_of_pairs("wall", turns.wall_s), _of_pairs("cpu", turns.cpu_s)]
    if before.record.attached or after.record.attached:
        return []
    found = []
    for what, field in (("wall", "wall_s"), ("cpu", "cpu_s")):
        sides = [
            [getattr(run, field) for run in side.runs] or [getattr(side.record, field)] for side in (before, after)
        ]
        found.append(_of_runs("wall" if what == "wall" else "cpu", *sides))
    return found


def _of_pairs(what: Literal["wall", "cpu"], pairs: Sequence[tuple[float, float]]) -> Measure:
    ratios = [_ratio(*each) for each in pairs]
    middle = [stats.median([pair[side] for pair in pairs]) for side in (0, 1)]
    interval = stats.interval(ratios) if len(ratios) >= LEAST_RUNS else None
    return Measure(what, middle[0], middle[1], stats.median(ratios), interval, len(pairs), "turns")


def _of_runs(what: Literal["wall", "cpu"], before: Sequence[float], after: Sequence[float]) -> Measure:
    least = min(len(before), len(after))
    one, other = stats.median(before), stats.median(after)
    enough = least >= LEAST_RUNS and min(before) > 0
    interval = stats.ratio_interval(after, before) if enough else None
    return Measure(what, one, other, _ratio(one, other), interval, least, "repeats" if least > 1 else "single")


def _ratio(before: float, after: float) -> float:
    return after / before if before > 0 else 1.0 if after <= 0 else math.inf


def _telling(measures: Sequence[Measure]) -> Measure | None:
    """What the verdict rests on: wall time, or CPU time where only that can tell."""
    can = [each for each in measures if each.code in ("faster", "slower")]
    return next(iter([*can, *measures]), None)


# Words.


def said(measure: Measure) -> str:
    """``faster by 18 % [12, 23]``, or that it cannot be told."""
    if measure.interval is None:
        change = measure.ratio - 1
        return f"{percent(abs(change))} {'less' if change < 0 else 'more'}"
    low, high = measure.interval
    if measure.code == "cannot_tell":
        return f"cannot tell: noise {percent((high - low) / 2)}"
    ends = (1 - high, 1 - low) if measure.code == "faster" else (low - 1, high - 1)
    between = ", ".join(percent(each).removesuffix(" %") for each in ends)
    return f"{measure.code} by {percent(abs(measure.ratio - 1))} [{between}]"


def _verdict(measures: Sequence[Measure]) -> str:
    if not measures:
        return "a window on a running process has no length of its own: only shares can be compared"
    told = [f"{said(each)}: {_times(each)}" for each in measures]
    first = measures[0]
    if first.interval is None:
        count = "one run each" if first.runs == 1 else f"{first.runs} runs each, fewer than {LEAST_RUNS}"
        return f"{count} cannot tell noise: {'; '.join(f'{_times(each)}, {said(each)}' for each in measures)}"
    how = f"{first.runs} pairs in turns" if first.way == "turns" else f"{first.runs} stored runs each"
    return f"{'; '.join(told)} ({how})"


def _times(measure: Measure) -> str:
    what = "wall time" if measure.what == "wall" else "CPU time"
    return f"{what} {seconds(measure.before_s)} → {seconds(measure.after_s)}"


def _worth(telling: Measure | None, found: Sequence[Change]) -> str:
    sure = [each for each in found if each.outside and each.kind == "cpu"]
    main = max(sure, key=lambda each: abs(each.of_run), default=None)
    part = f"`{main.function}` {_amount(main)}" if main else ""
    if telling is not None and telling.code == "cannot_tell":
        return "nothing to be seen in the whole run" + (f"; by the samples {part}" if part else "")
    if telling is not None and telling.code == "slower":
        return f"not worth it by time: the run takes {percent(telling.ratio - 1)} more" + (f"; {part}" if part else "")
    if telling is not None and telling.code == "faster":
        gain = 1 - telling.ratio
        grade = "worth it" if gain >= WORTH else "hardly worth it by time alone"
        return f"{grade}: {percent(gain)} of the run is saved" + (f"; {part}" if part else "")
    if main is None:
        return _unsure(found)
    gain = -sum(each.of_run for each in sure)
    if gain <= 0:
        return f"not worth it by the samples: {part}"
    grade = "worth it by the samples" if gain >= WORTH else "hardly worth it"
    return f"{grade}: {part}; a machine that is slower as a whole does not change shares"


def _unsure(found: Sequence[Change]) -> str:
    """Where no function stands out."""
    if not any(each.noise_s for each in found):
        return ""
    maybe = [each for each in found if each.kind == "cpu" and each.noise_s and each.outside is None]
    if not maybe:
        return "no function changed by more than sampling explains"
    return (
        f"`{maybe[0].function}` {_amount(maybe[0])}: more than sampling explains, but on a machine of another speed it "
        "would look the same"
    )


def _amount(change: Change) -> str:
    how_much = seconds(abs(change.after_s - change.before_s))
    word = "less" if change.after_s < change.before_s else "more"
    shares = f"share {percent(change.share_before)} → {percent(change.share_after)}"
    return f"takes {how_much} {word}, {percent(abs(change.of_run))} of all running code before ({shares})"


def _notes(before: Side, after: Side, turns: Turns | None) -> Iterator[str]:
    one, other = before.record, after.record
    if (one.arguments or one.command) != (other.arguments or other.command):
        yield f"the commands differ: {plain(one.command)} and {plain(other.command)}"
    if one.commit or other.commit:
        yield f"commit {plain(one.commit) or 'unknown'} and {plain(other.commit) or 'unknown'}"
    if before.runs and after.runs:
        files = ledger.changed(before.runs[-1], after.runs[-1])
        if files:
            yield f"changed: {', '.join(plain(short(file, other.directory)) for file in files)}"
        elif before.runs[-1].code.keys() & after.runs[-1].code.keys():
            yield "no file of the program that was seen in both runs differs: the code is the same, as far as is known"
    yield from turns.notes if turns is not None else []
    if turns is None and any(each.runs[1:] for each in (before, after)):
        yield "repeats were not taken in turns: what else the machine did meanwhile is in there"
    if turns is None and (one.tracing_s or other.tracing_s):
        yield f"tracing took {seconds(one.tracing_s)} and {seconds(other.tracing_s)} of these runs"
