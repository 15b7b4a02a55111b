"""Measures of drift as users write them, and such as fail."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

Arrays = list[np.ndarray[Any, Any]]


def largest(wanted: Arrays, found: Arrays) -> dict[str, float]:
    return {"largest": max(float(np.abs(a - b).max()) for a, b in zip(wanted, found, strict=True))}


def raises(wanted: Arrays, found: Arrays) -> dict[str, float]:
    raise ValueError("these cannot be compared")


def gives_a_list(wanted: Arrays, found: Arrays) -> list[float]:
    return [1.0]


def raises_at_other_answers(wanted: Arrays, found: Arrays) -> dict[str, float]:
    if not all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True)):
        raise KeyError("other")
    return {"largest": 0.0}


def aborts_at_other_answers(wanted: Arrays, found: Arrays) -> dict[str, float]:
    """Leaves a process behind that holds the pipe which its own one has answered through."""
    if not all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True)):
        if os.fork():
            os.abort()
        time.sleep(600)
    return {"largest": 0.0}


def no_number_at_other_answers(wanted: Arrays, found: Arrays) -> dict[str, float]:
    same = all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))
    return {"largest": 0.0 if same else float("nan")}


def hangs(wanted: Arrays, found: Arrays) -> dict[str, float]:
    time.sleep(600)
    return {}


def takes_all_memory(wanted: Arrays, found: Arrays) -> dict[str, float]:
    held = []
    while True:
        held.append(b"x" * (1 << 24))
        time.sleep(0.005)


NO_FUNCTION = 7
