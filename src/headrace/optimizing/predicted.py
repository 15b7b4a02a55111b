"""What weights will take in memory, rung by rung, from their number: said before a large model is loaded.

Of weights alone. What is computed with them, a cache of keys and values, a library's own copies come on top.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.errors import LoadError
from headrace.optimizing import summary
from headrace.optimizing.rungs import BASELINE, BITS, Rung, find
from headrace.optimizing.words import Predicted
from headrace.runners.parameters import Counted

_FLOAT_BITS = 32.0
_SCALE_BITS = 32 / 32


def predict(counted: Counted, wanted: Sequence[Rung], device: str, memory_bytes: int, cap_bytes: int) -> Predicted:
    """Bytes of weights by rung, the baseline first."""
    each = {rung.id: weights_bytes(counted, rung) for rung in (find(BASELINE), *wanted)}
    return Predicted(counted.parameters, each, device, memory_bytes, cap_bytes)


def weights_bytes(counted: Counted, rung: Rung) -> int:
    """Of all weights: linear layers with the rung's bits, tables and all else as floats, where it is so."""
    floats = _FLOAT_BITS / 2 if rung.halved else _FLOAT_BITS
    bits = next((BITS[word] for word in rung.recipe if word in BITS), None)
    quantize = rung.options.get("quantize", "")
    if quantize == "weights":
        bits = rung.options["bits"] + _SCALE_BITS
    elif quantize:
        bits = 8.0
    if bits is None:
        return round(counted.parameters * floats / 8)
    rest = counted.parameters - counted.products + counted.shared
    if quantize == "static" and rung.engine in ("onnx", "openvino"):
        floats = bits  # these two keep tables in as many
    return round((counted.products * bits + rest * floats) / 8)


def check(found: Predicted) -> None:
    """Raises `LoadError` where the model as it is, with which all is compared, cannot be held."""
    base = found.weights_bytes[BASELINE]
    told = f"its {summary.parameters(found.parameters)} parameters take about {summary.size(base)} in float32"
    hint = "rungs are compared with the model in float32: take a machine with more memory"
    if base > found.cap_bytes:
        cap = f"more than the cap of {summary.size(found.cap_bytes)} for a process"
        raise LoadError(f"{told}, {cap}", field="target", hint=f"{hint}, or raise --cap-bytes")
    if found.device != "cpu" and 2 * base > found.memory_bytes:
        twice = f"twice that, as they run side by side, is more than the {summary.size(found.memory_bytes)} of the GPU"
        raise LoadError(f"{told}; {twice}", field="target", hint=hint)
