"""What bounds a kernel: its launch, memory or arithmetic. By the operator's shapes where they were recorded, else by
name; and unknown where neither says.

Only matrix products and attention are estimated: they are what can be bound by arithmetic. A card's own ridge is not in
a trace, so one is assumed for each width of number.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from headrace.profiling.device.gaps import Idle
from headrace.profiling.device.timeline import Bound, Kernel
from headrace.profiling.device.trace import Operator, Span

_COMMUNICATION = re.compile(r"nccl|rccl|allreduce|all_reduce|allgather|reduce_scatter", re.I)
_MEMORY_FIRST = re.compile(r"gemv|splitk_?reduce|dot_kernel|Memcpy|Memset", re.I)
_COMPUTE = re.compile(
    r"gemm|cutlass|xmma|nvjet|cublas|cudnn.*(fprop|dgrad|wgrad)|implicit_|winograd|convolve|conv\dd|fft"
    r"|flash|fmha|attention|triton_tem_",
    re.I,
)
_MEMORY = re.compile(
    r"elementwise|reduce|softmax|norm|copy|cat(array|_)|gather|scatter|index|embedding|dropout|fill|transpose|permute"
    r"|triton_(poi|red|per)|multi_tensor_apply|adam|sgd|cast|sort|scan|topk|arange|where|nll_loss|pool|upsample|unroll"
    r"|distribution",
    re.I,
)
_WIDTHS = {"double": 8, "float": 4, "int": 4, "long int": 8, "c10::BFloat16": 2, "c10::Half": 2}
_EIGHT_BIT = ("Float8", "signed char", "unsigned char")
# Operations per byte from which on arithmetic is what bounds. Cards of data centres since 2020 lie between 150 and 400
# for 16-bit numbers in tensor cores, between 10 and 20 for 32-bit ones without.
RIDGES = {1: 400.0, 2: 200.0, 4: 20.0, 8: 10.0}
_LONGEST_NAME = 160


def short_name(name: str) -> str:
    name = name.removeprefix("void ")
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def bound_by_name(name: str) -> Bound:
    """By what a kernel of this name is bound if it is large; ``unknown`` if the name does not say."""
    if _COMMUNICATION.search(name):
        return "communication"
    if _MEMORY_FIRST.search(name):
        return "memory"
    if _COMPUTE.search(name):
        return "compute"
    return "memory" if _MEMORY.search(name) else "unknown"


def estimate(operator: Operator) -> tuple[float, float, int] | None:
    """Operations, bytes that must be moved at least, and the width of the numbers in bytes; ``None`` if unknown."""
    shapes = operator.shapes
    width = _width(operator.types)
    if width is None:
        return None
    name = operator.name
    if name in ("aten::mm", "aten::bmm", "aten::_scaled_mm", "aten::_int_mm") and len(shapes) >= 2:
        return _product(shapes[0], shapes[1], width)
    if name in ("aten::addmm", "aten::baddbmm", "aten::_addmm_activation") and len(shapes) >= 3:
        return _product(shapes[1], shapes[2], width)
    if "attention" in name and "backward" not in name and len(shapes) >= 3:
        return _attention(name, shapes[0], shapes[1], width)
    return None


def _width(types: Sequence[Any]) -> int | None:
    for each in types:
        if isinstance(each, str) and each in _WIDTHS:
            return _WIDTHS[each]
        if isinstance(each, str) and any(word in each for word in _EIGHT_BIT):
            return 1
    return None


def _product(left: Any, right: Any, width: int) -> tuple[float, float, int] | None:
    if not (_has_sizes(left, 2) and _has_sizes(right, 2) and left[-1] == right[-2]):
        return None
    batch = math.prod(left[:-2])
    rows, inner, columns = left[-2], left[-1], right[-1]
    moved = batch * (rows * inner + inner * columns + rows * columns) * width
    return 2.0 * batch * rows * inner * columns, float(moved), width


def _attention(name: str, query: Any, key: Any, width: int) -> tuple[float, float, int] | None:
    if not (_has_sizes(query, 4) and _has_sizes(key, 4)):
        return None
    keys = key[1] if name.startswith("aten::_flash_attention") else key[2]  # there the heads come after the length
    return 4.0 * math.prod(query) * keys, float((2 * math.prod(query) + 2 * math.prod(key)) * width), width


def _has_sizes(shape: Any, least: int) -> bool:
    """A list of tensors has a list of lists in this place, a number an empty one."""
    return isinstance(shape, list) and len(shape) >= least and all(isinstance(size, int) for size in shape)


def judge(kernels: list[Span], operators: dict[int, Operator], most: int) -> list[Kernel]:
    """Kernels by name, those that took longest first."""
    total = sum(kernel.end - kernel.start for kernel in kernels)
    by_name: dict[str, list[Span]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel)
    found = [_judge_one(name, calls, operators, total) for name, calls in by_name.items()]
    return sorted(found, key=lambda kernel: -kernel.seconds)[:most]


def _judge_one(name: str, calls: list[Span], operators: dict[int, Operator], total: float) -> Kernel:
    seconds = sum(call.end - call.start for call in calls)
    names: Counter[str] = Counter()
    operations = moved = known_s = 0.0
    for call in calls:
        operator = operators.get(call.operator) if call.operator is not None else None
        if operator is not None:
            names[operator.name] += 1
            estimated = _estimate_of(name, operator)
            if estimated is not None:
                operations, moved = operations + estimated[0], moved + estimated[1]
                known_s += call.end - call.start
    bound, by = _bound_of(calls, operators)
    return Kernel(
        name=short_name(name),
        operator=names.most_common(1)[0][0] if names else "",
        calls=len(calls),
        seconds=seconds,
        share=seconds / total if total else 0.0,
        bound=bound,
        by=by,
        operations_per_s=operations / known_s if known_s else None,
        bytes_per_s=moved / known_s if known_s else None,
    )


def _estimate_of(name: str, operator: Operator) -> tuple[float, float, int] | None:
    """Only for the kernel that does the operator's work, not for what prepares it or adds up after it."""
    return estimate(operator) if _COMPUTE.search(name) or "gemv" in name else None


def _bound_of(calls: Iterable[Span], operators: dict[int, Operator]) -> tuple[Bound, str]:
    """Of kernels of one name, by where most of their time lies."""
    seconds: Counter[tuple[Bound, str]] = Counter()
    for call in calls:
        seconds[bound_of(call, operators)] += call.end - call.start  # type: ignore[assignment]
    return seconds.most_common(1)[0][0]


def bound_of(kernel: Span, operators: dict[int, Operator]) -> tuple[Bound, str]:
    """By what it would be bound if it were launched in time, and whether an ``estimate`` or the ``name`` says so."""
    operator = operators.get(kernel.operator) if kernel.operator is not None else None
    estimated = _estimate_of(kernel.name, operator) if operator is not None else None
    if estimated is None:
        return bound_by_name(kernel.name), "name"
    operations, moved, width = estimated
    return ("compute" if operations / moved >= RIDGES[width] else "memory"), "estimate"


def shares(kernels: list[Span], idle: list[Idle], operators: dict[int, Operator]) -> dict[Bound, float]:
    """Share of the kernels' seconds by what bounds them, the largest first.

    A kernel is bound by its launch where it is shorter than the gap before it that the launching made.
    """
    late = {
        id(gap.kernel): sum(piece.end - piece.start for piece in gap.pieces if piece.cause == "launch")
        for gap in idle
        if gap.kernel is not None
    }
    seconds: dict[Bound, float] = defaultdict(float)
    for kernel in kernels:
        length = kernel.end - kernel.start
        seconds["launch" if late.get(id(kernel), 0.0) > length else bound_of(kernel, operators)[0]] += length
    total = sum(seconds.values())
    return {bound: part / total for bound, part in sorted(seconds.items(), key=lambda item: -item[1]) if part}


def median_length(kernels: list[Span]) -> float:
    return statistics.median(kernel.end - kernel.start for kernel in kernels)
