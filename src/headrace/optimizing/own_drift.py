"""A user's own measure of drift, in a process of its own: whatever the function does, the ladder goes on.

    python -m headrace.optimizing.own_drift drift JOB.json

It answers commands, one JSON document a line: ``measures`` of the arrays in two files, or the function's ``error``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from headrace.errors import ConfigError, HeadraceError, LoadError, to_fault
from headrace.optimizing.orphan import end_with_parent
from headrace.optimizing.process import SAID
from headrace.runners.collate import Array
from headrace.runners.user import import_target


class OwnDrift(msgspec.Struct, frozen=True):
    """What the process has to do.

    Args:
        function: ``module:function``, called with what is wanted and what was found: two lists of arrays, an item each.
    """

    function: str
    threads: int


def main(argv: list[str]) -> int:
    """Exit status `SAID` for an error that is the last line of standard error, as a `Fault` in JSON."""
    end_with_parent()
    job = msgspec.json.decode(Path(argv[1]).read_bytes(), type=OwnDrift)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        function = _imported(job.function)
    except HeadraceError as error:
        print(msgspec.json.encode(to_fault(error)).decode(), flush=True)
        return SAID
    answers.write("{}\n")
    for line in sys.stdin:
        command = json.loads(line)
        answers.write(json.dumps(_answer(function, read(command["wanted"]), read(command["found"]))) + "\n")
    return 0


def _imported(name: str) -> Callable[..., Any]:
    try:
        found = import_target(name)
    except LoadError as error:
        raise ConfigError(error.message, field="drift", hint=error.hint) from None
    if not callable(found):
        raise ConfigError(f"{name} is of type {type(found).__name__}, and no function", field="drift")
    function: Callable[..., Any] = found
    return function


def _answer(function: Callable[..., Any], wanted: list[Array], found: list[Array]) -> dict[str, Any]:
    try:
        given = function(wanted, found)
    except Exception as error:  # the user's function raises whatever it likes; where, is in the log
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    try:
        return {"measures": {str(name): float(value) for name, value in given.items()}}
    except (AttributeError, TypeError, ValueError):
        return {"error": f"it gave {given!r:.100}, and not a dictionary of numbers by their names"}


def write(path: Path, arrays: list[Array]) -> str:
    """Keep arrays in their order, where `read` finds them."""
    np.savez(path, *arrays)
    return str(path)


def read(path: str) -> list[Array]:
    with np.load(path) as file:
        return [file[f"arr_{number}"] for number in range(len(file.files))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
