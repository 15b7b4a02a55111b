"""One thing found in a program: where, with what evidence, and what to do about it."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["info", "warning"]


class Finding(msgspec.Struct, frozen=True):
    """What was found, and where.

    Args:
        code: stable, for scripts and for ``# headrace: ignore[code]``.
        severity: ``info``: good to know. ``warning``: costs time or memory, or makes answers wrong.
        title: what is wrong, one sentence.
        evidence: what shows it: numbers where it was measured, the source line where it was read.
        advice: what to do next.
        file: of the user's code; empty where there is none.
        line: from 1; 0 where there is none.
        column: from 1, in characters; 0 where only the line is known.
    """

    code: str
    severity: Severity
    title: str
    evidence: str
    advice: str
    file: str = ""
    line: int = 0
    column: int = 0
