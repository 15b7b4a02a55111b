"""How values are written: for Prometheus, and for the people whom an alert calls."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

Severity = Literal["critical", "warning"]
Unit = Literal["number", "percent", "seconds", "bytes"]

_UNITS_MS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
# What Prometheus makes of a value; `say` makes the same of it.
_TEMPLATES: Mapping[Unit, str] = {
    "number": '{{ printf "%.4g" $value }}',
    "percent": "{{ $value | humanizePercentage }}",
    "seconds": '{{ printf "%.3g" $value }} s',
    "bytes": "{{ $value | humanize1024 }}B",
}


def duration(seconds: float) -> str:
    """Seconds as Prometheus writes them, in one unit: ``5m``, ``90s``, ``500ms``; at least a millisecond."""
    milliseconds = max(1, round(seconds * 1000))
    unit, size = next((unit, size) for unit, size in _UNITS_MS.items() if milliseconds % size == 0)
    return f"{milliseconds // size}{unit}"


def number(value: float) -> str:
    """A bound in an expression: 0.144 rather than 0.14400000000000002."""
    return str(int(value)) if value == int(value) else f"{value:.10g}"


def template(text: str, unit: Unit) -> str:
    """A text with ``{label}`` and ``{value}`` as a template of Prometheus."""
    return re.sub(r"\{(\w+)\}", lambda m: _TEMPLATES[unit] if m[1] == "value" else f"{{{{ $labels.{m[1]} }}}}", text)


def say(text: str, unit: Unit, labels: Mapping[str, str], value: float) -> str:
    """What Prometheus makes of such a template."""
    return re.sub(r"\{(\w+)\}", lambda m: _say(value, unit) if m[1] == "value" else labels.get(m[1], ""), text)


def _say(value: float, unit: Unit) -> str:
    if unit == "percent":
        return f"{100 * value:.4g}%"
    if unit == "seconds":
        return f"{value:.3g} s"
    if unit == "bytes":
        power = min(8, int(math.log(value, 1024))) if value > 1 else 0
        return f"{value / 1024**power:.4g}{['', 'ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei', 'Zi', 'Yi'][power]}B"
    return f"{value:.4g}"
