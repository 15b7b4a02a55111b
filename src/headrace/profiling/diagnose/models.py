"""What a model is kept waiting by: batches of one, and its data."""

from __future__ import annotations

import re
from collections.abc import Mapping

from headrace.profiling.diagnose.explained import Claim, Explained, duration, percent, times
from headrace.profiling.diagnose.kinds import MODELS, weights
from headrace.profiling.diagnose.once import once
from headrace.profiling.diagnose.view import by_frame, enough, pace, place, total_s, users
from headrace.profiling.record import Call, Frame, Record, Stack

# Python, torch and the dispatcher cost 5 to 15 µs of processor time for a module, whatever is in the batch.
_MODULE_S = 20e-6
_FORWARDS = 200
_SHARE = 0.3
_INPUT = 0.3
_INPUT_S = 0.0005
_BATCHES = 5
_FORWARD = re.compile(r"(^|\.)(_wrapped_call_impl|_call_impl)$")
_LOADER_FILE = re.compile(r"[/\\](torch[/\\]utils[/\\]data|datasets|webdataset)[/\\]")
_MAKES_BATCHES = re.compile(
    r"(^|\.)((iter_|load_|read_|next_|get_)?(batch(es)?|samples|examples)|\w*[lL]oader\.__next__)$"
)


@once
def small_batches(record: Record) -> list[Claim]:
    """A model is called hundreds of times, its modules take 20 µs each at most, and that is 30 % of the time."""
    if not enough(record):
        return []
    known = {number for number, frame in enumerate(record.frames) if _is_forward(frame)}
    share = sum(stack.seconds for stack in record.cpu if not known.isdisjoint(stack.frames)) / total_s(record)
    modules = max((call.calls for call in record.calls if call.frame in known), default=0)
    forwards = _forwards(record)
    each_s = sum(seconds for _, seconds in forwards.values()) / modules * pace(record) if modules else 0.0
    caller = max(forwards, key=lambda frame: forwards[frame][1], default=None)
    if caller is None or forwards[caller][0] < _FORWARDS or each_s > _MODULE_S or share < _SHARE:
        return []
    calls, seconds = forwards[caller]
    line = _line(record, caller, known)
    finding = Explained(
        "small_batches",
        "warning",
        "the model is called for very little at a time",
        f"{calls:,} forwards of {duration(seconds / calls)}, {percent(share)} of the time, called from "
        f"{place(record, caller, line)}; {modules:,} calls of modules took {duration(each_s)} each, which is mostly "
        "the fixed cost of a call",
        "put several items into one forward (stack or pad them; in a server `headrace serve` and "
        "`DynamicBatcher` do it), under `torch.inference_mode()`",
        record.frames[caller].file,
        line,
        share=share,
    )
    return [Claim(finding, weights(record, MODELS))]


def _forwards(record: Record) -> dict[int, tuple[int, float]]:
    """By function of the user's that calls modules of torch from outside of any: how often, and for how long."""
    calls = by_frame(record)
    found: dict[int, tuple[int, float]] = {}
    for call in record.calls:
        if not _is_forward(record.frames[call.frame]):
            continue
        for caller, numbers in call.callers.items():
            if record.frames[caller].kind == "user" and not _is_module(record, calls, caller):
                before = found.get(caller, (0, 0.0))
                found[caller] = (before[0] + numbers[0], before[1] + numbers[3])
    return found


def _is_module(record: Record, calls: Mapping[int, Call], frame: int) -> bool:
    """Whether a function of the user's is a module's own forward."""
    return frame in calls and any(_is_forward(record.frames[caller]) for caller in calls[frame].callers)


def _line(record: Record, frame: int, known: set[int]) -> int:
    """Where in a function most of the time of forwards was seen."""
    lines: dict[int, float] = {}
    for stack in record.cpu:
        if not known.isdisjoint(stack.frames):
            for each, line in zip(stack.frames, stack.lines, strict=True):
                if each == frame:
                    lines[line] = lines.get(line, 0.0) + stack.seconds
    return max(lines, key=lambda line: lines[line]) if lines else record.frames[frame].line


def _is_forward(frame: Frame) -> bool:
    return frame.kind != "user" and _FORWARD.search(frame.function) is not None


@once
def loading(record: Record) -> list[Claim]:
    """30 % of the time or more goes by in taking the next batch."""
    seen = [
        (stack, position)
        for stack in (*record.cpu, *record.waiting)
        if (position := _loader(record, stack)) is not None
    ]
    seconds = sum(stack.seconds for stack, _ in seen)
    share = min(1.0, seconds / total_s(record))
    if share < _INPUT or not seen:
        return []
    stack, position = max(seen, key=lambda each: each[0].seconds)
    batches = sum(call.calls for call in record.calls if call.frame == stack.frames[position])
    if batches and (batches < _BATCHES or seconds / batches < _INPUT_S):
        return []
    counted = f"{times(batches)} {duration(seconds / batches)}: " if batches else ""
    inner = users(record, stack)
    most = f"; most of it in {place(record, stack.frames[inner], stack.lines[inner])}" if inner >= 0 else ""
    caller = _caller(record, stack, position)
    finding = Explained(
        "input_bound",
        "warning",
        f"the loop waits for its data, {percent(share)} of the time",
        f"{counted}{duration(seconds)} of {duration(record.wall_s)} in {place(record, stack.frames[position])}{most}",
        "load in other processes while the model runs (`num_workers`, `persistent_workers=True`), do less per item, or "
        "prepare the batches once and store them",
        record.frames[stack.frames[caller]].file if caller >= 0 else "",
        stack.lines[caller] if caller >= 0 else 0,
        share=share,
    )
    taken = {number: 1.0 for number, each in enumerate(record.cpu) if _loader(record, each) is not None}
    return [Claim(finding, taken)]


def _loader(record: Record, stack: Stack) -> int | None:
    """Position of the call that takes the next batch: a DataLoader's, or of an iterator of the user's that is named so
    in a program that runs a model."""
    for position, number in enumerate(stack.frames):
        frame = record.frames[number]
        if frame.kind != "user" and _LOADER_FILE.search(frame.file) and frame.function.endswith("__next__"):
            return position
        if frame.kind == "user" and _MAKES_BATCHES.search(frame.function) and _runs_a_model(record):
            return position
    return None


@once
def _runs_a_model(record: Record) -> bool:
    return any(_is_forward(frame) for frame in record.frames)


def _caller(record: Record, stack: Stack, position: int) -> int:
    """The last frame of the user's above it."""
    for above in range(position - 1, -1, -1):
        if record.frames[stack.frames[above]].kind == "user":
            return above
    return -1
