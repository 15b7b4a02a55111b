"""Work of a kind that has a name: imports, (de)serialisation, regular expressions, logging, tracebacks, models.

A kind is known by the files of libraries below the user's code, and by names of built-in functions, which no sampler
sees: there the trace says what part of the calling function's time they are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from headrace.profiling.diagnose.explained import Claim, Explained, percent
from headrace.profiling.diagnose.once import once
from headrace.profiling.diagnose.view import SURELY, Spot, builtin_shares, enough, place, surely, total_s, users
from headrace.profiling.record import Frame, Record

_NEVER = re.compile(r"(?!)")


@dataclass(frozen=True)
class Kind:
    """How work of one kind is known, and what is said when there is much of it.

    Args:
        files: of library frames. builtins: names of built-in functions.
        floor: share of the time below which nothing is said.
    """

    code: str
    files: re.Pattern[str]
    builtins: re.Pattern[str] = _NEVER
    floor: float = 0.2
    title: str = ""
    advice: str = ""

    def has(self, frame: Frame) -> bool:
        if frame.kind == "builtin":
            return self.builtins.search(frame.function) is not None
        return frame.kind != "user" and self.files.search(frame.file) is not None


IMPORTS = Kind("slow_imports", re.compile(r"<frozen (importlib|zipimport)|[/\\]importlib[/\\]_bootstrap"), floor=0.3)
# What a model computes is not for whoever looks at Python: `small_batches` and the ladder of rungs speak of it.
MODELS = Kind(
    "models",
    re.compile(r"[/\\](torch(?![/\\]utils[/\\]data)|onnxruntime|openvino|torch_tensorrt|torchao|bitsandbytes)[/\\]"),
    re.compile(r"\b(torch|torch\.\w+|TensorBase|Tensor|torch\._C\b\S*|onnxruntime\S*|openvino\S*)\b"),
)
TOKENISING = Kind(
    "tokenising_on_loop",
    re.compile(r"[/\\](tokenizers[/\\]|tiktoken[/\\]|sentencepiece[/\\]|transformers[/\\]\S*token)"),
    re.compile(r"\btokenizers\.|\btiktoken\b|CoreBPE|[sS]entence[pP]iece"),
    floor=0.1,
)
KINDS = [
    Kind(
        "serialisation",
        re.compile(r"[/\\](json|simplejson|pydantic|marshmallow|yaml|cattrs)[/\\]|[/\\](pickle|copy|dataclasses)\.py$"),
        re.compile(r"\b(_?pickle|orjson|ujson|_json|marshal|msgspec|_yaml|Schema(Validator|Serializer))\b"),
        title="{share} of the time goes into turning objects into bytes or dictionaries and back",
        advice="do it once per object, not once per use; keep what is read often in its decoded form; drop fields that "
        "nobody reads; for JSON take orjson or msgspec, instead of copy.deepcopy copy what changes",
    ),
    Kind(
        "regular_expressions",
        re.compile(r"[/\\]re([/\\](__init__|_compiler|_parser)\.py|\.py)$|[/\\]sre_\w+\.py$"),
        re.compile(r"\b(re\.Pattern|re\.Scanner|_sre)\b"),
        title="{share} of the time goes into regular expressions",
        advice="compile the pattern once, outside the loop; make it fail early (anchor it, no nested repeats); for "
        "plain words use `in`, str.split or str.startswith",
    ),
    Kind(
        "tracebacks",
        re.compile(r"[/\\](traceback|linecache)\.py$"),
        title="{share} of the time goes into formatting tracebacks",
        advice="exceptions are raised here in the ordinary course: test for the condition first, or log without the "
        "traceback",
    ),
    Kind(
        "logging",
        re.compile(r"[/\\](logging|loguru|structlog)[/\\]"),
        title="{share} of the time goes into logging",
        advice="log once per batch instead of once per item, raise the level, or hand records to a QueueHandler",
    ),
]


@once
def weights(record: Record, kind: Kind) -> dict[int, float]:
    """Number of `Record.cpu` → the part of that stack's time that is of this kind, imports apart."""
    shares = builtin_shares(record, kind.builtins)
    known = {number for number, frame in enumerate(record.frames) if kind.has(frame)}
    importing = import_weights(record)
    found = {}
    for number, stack in enumerate(record.cpu):
        inner = users(record, stack) + 1
        if number in importing:
            continue
        if not known.isdisjoint(stack.frames[inner:]):
            found[number] = 1.0
        elif inner and record.frames[stack.frames[-1]].kind != "library" and stack.frames[inner - 1] in shares:
            found[number] = shares[stack.frames[inner - 1]]
    return found


@once
def import_weights(record: Record) -> dict[int, float]:
    """An import is one wherever it stands in the stack, also when a module of the user's own is what runs in it."""
    known = {number for number, frame in enumerate(record.frames) if IMPORTS.has(frame)}
    return {number: 1.0 for number, stack in enumerate(record.cpu) if not known.isdisjoint(stack.frames)}


def weighted_spots(record: Record, part: Mapping[int, float]) -> list[Spot]:
    """Functions of the user's by what of their time is of a kind, most first."""
    found: dict[int, Spot] = {}
    for number, weight in part.items():
        stack = record.cpu[number]
        position = users(record, stack)
        if position >= 0 and weight > 0:
            frame = stack.frames[position]
            spot = found.setdefault(frame, Spot(frame, 0.0, 0, defaultdict(float)))
            spot.seconds += stack.seconds * weight
            spot.samples += stack.samples
            spot.lines[stack.lines[position]] += stack.seconds * weight
    return sorted(found.values(), key=lambda spot: -spot.seconds)


@once
def claims(record: Record) -> list[Claim]:
    """Kinds that hold a fifth of the time or more."""
    found = []
    for kind in KINDS if enough(record) else []:
        part = weights(record, kind)
        where = weighted_spots(record, part)
        share = sum(spot.seconds for spot in where) / total_s(record)
        if share < kind.floor or surely(record, share) < SURELY * kind.floor:
            continue
        most = ", ".join(
            f"{percent(spot.seconds / total_s(record))} in {place(record, spot.frame, spot.line)}" for spot in where[:3]
        )
        names = _names(record, kind, {spot.frame for spot in where})
        finding = Explained(
            kind.code,
            "warning",
            kind.title.format(share=percent(share)),
            f"{sum(spot.samples for spot in where)} samples of running code: {most}; {names}",
            kind.advice,
            record.frames[where[0].frame].file,
            where[0].line,
            share=share,
        )
        found.append(Claim(finding, part))
    return found


def _names(record: Record, kind: Kind, callers: set[int]) -> str:
    """What was called, as far as it is known."""
    counts = {
        record.frames[call.frame].function: sum(
            numbers[0] for caller, numbers in call.callers.items() if caller in callers
        )
        for call in record.calls
        if kind.has(record.frames[call.frame])
    }
    most = sorted((name for name in counts if counts[name]), key=lambda name: -counts[name])[:3]
    return ", ".join(f"{name} {counts[name]:,} calls" for name in most) or "calls were not counted"
