"""Samples: a file of JSON objects, one a line, each with an ``input`` as a client would send it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec

from headrace.errors import ConfigError

LEAST = 8


def read(path: Path, most: int) -> list[Any]:
    """The inputs in the file's order, ``most`` of them drawn evenly from longer files.

    Raises:
        ConfigError: it cannot be read, a line is not such an object (names its number), or there are too few.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="samples") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            sample = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}", field="samples") from None
        if not isinstance(sample, dict) or not sample:
            raise ConfigError(
                f"{path}, line {number} is no object with an input", field="samples", hint='{"input": "some text"}'
            )
        # Named tensors may stand there directly.
        found.append(sample.get("input", sample))
    if len(found) < LEAST:
        raise ConfigError(
            f"{path} has {len(found)} samples; at least {LEAST} are needed",
            field="samples",
            hint="take some hundred real inputs: what is fast and exact enough depends on them",
        )
    step = max(1, len(found) / most)
    return [found[int(index * step)] for index in range(min(most, len(found)))]


def divide(count: int, most_calibration: int = 64) -> tuple[list[int], list[int]]:
    """Numbers for calibration and for evaluation, which have nothing in common: at most half go to the former."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    calibration = sorted(order[: min(most_calibration, count // 2)])
    return calibration, sorted(set(range(count)) - set(calibration))
