"""Asks other programs, and survives what they do: hang, crash, or print something else than expected."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_LAST_WORDS_S = 1.0


@dataclass(frozen=True)
class Reply:
    """What a program has said.

    Args:
        text: its standard output.
        problem: why there is none; empty when it ended well.
    """

    text: str = ""
    problem: str = ""


def ask(argv: Sequence[str], *, timeout_s: float, given: str = "", merged: bool = False) -> Reply:
    """Run a program to its end.

    Args:
        timeout_s: after so long it is killed, with all that it has started.
        given: its standard input.
        merged: take its standard error for output, too: some programs tell their version there.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merged else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Reply(problem=f"cannot be run: {error.strerror or error}")
    try:
        output, errors = process.communicate(given, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # The whole group: what it has started would hold the pipes open.
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        # One that waits for a broken driver cannot even be killed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_LAST_WORDS_S)
        return Reply(problem=f"no answer within {timeout_s:g} s")
    if process.returncode < 0:
        return Reply(output, f"crashed with {signal.Signals(-process.returncode).name}")
    if process.returncode > 0:
        said = [line.strip() for line in (errors or output).splitlines() if line.strip()]
        return Reply(output, said[-1] if said else f"ended with exit code {process.returncode}")
    return Reply(output)
