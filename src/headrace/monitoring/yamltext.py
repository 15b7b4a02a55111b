"""Plain data as YAML that people can read: enough for configuration files, and no dependency.

Strings are quoted as in JSON, which YAML understands, unless they are plainly words or have such quotes themselves;
those of several lines become literal blocks. It writes only; nothing here reads YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# What needs no quotes anywhere: a duration, or words and paths of which YAML would make nothing else.
_PLAIN = re.compile(r"\d+(ms|s|m|h|d)|[A-Za-z_/][A-Za-z0-9_./-]*( [A-Za-z0-9_./-]+)*")
_WORDS_WITH_A_MEANING = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def dump(value: Any, comment: str = "") -> str:
    """A document of mappings, lists, strings, numbers, booleans and ``None``.

    Args:
        comment: lines for its head.
    """
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    return head + "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [line for key, each in value.items() for line in _entry(f"{_scalar(str(key))}:", each)]
    if _is_list(value) and value:
        return [line for each in value for line in _item(each)]
    return [_scalar(value)]


def _entry(key: str, value: Any) -> list[str]:
    if isinstance(value, str) and _is_block(value):
        return [f"{key} |-", *(f"  {line}" if line else "" for line in value.split("\n"))]
    inner = _lines(value)
    if value and (isinstance(value, Mapping) or _is_list(value)):
        return [key, *(f"  {line}" for line in inner)]
    return [f"{key} {inner[0]}"]


def _item(value: Any) -> list[str]:
    first, *rest = _lines(value)
    return [f"- {first}", *(f"  {line}" for line in rest)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_block(text: str) -> bool:
    """Whether a literal block gives back the text as it is."""
    lines = text.split("\n")
    return len(lines) > 1 and bool(lines[-1]) and text[0] not in " \n" and all(map(str.isprintable, lines))


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS_WITH_A_MEANING:
        return value
    if isinstance(value, str) and '"' in value and value.isprintable():
        return "'" + value.replace("'", "''") + "'"
    written = json.dumps(value, ensure_ascii=False)
    return "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in written)
