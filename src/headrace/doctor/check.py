"""One finding of the doctor's, and the words for it."""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["ok", "info", "warning", "error"]


class Check(msgspec.Struct, frozen=True):
    """What was looked at and how it is.

    Args:
        name: stable, for scripts: ``area`` or ``area.part``.
        status: ``error``: headrace, or what was asked of it, cannot work so. ``warning``: it works, but slower or less
            safely than it could. ``info``: good to know.
        detail: what was found, with its numbers.
        fix: what to do about it; empty when there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


def size(count: int) -> str:
    """A number of bytes in words."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"


def many(count: int, noun: str) -> str:
    """A number of things in words."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
