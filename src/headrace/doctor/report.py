"""The verdicts on this machine, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace import config as configuration
from headrace import log
from headrace.config import Config
from headrace.doctor.check import Check, Status, many
from headrace.errors import ConfigError

# The worst at the end: there it stands above the prompt.
_ORDER: Sequence[Status] = ("ok", "info", "warning", "error")
_COLOURS: Mapping[Status, str] = {"ok": "32", "info": "36", "warning": "33", "error": "31;1"}


def examine(flags: Mapping[str, Any], file: Path | None = None) -> list[Check]:
    """Look at this machine as the configuration would use it; one that cannot be read is a finding.

    Args:
        flags: values given on the command line, by option name.
        file: the configuration file, if not the usual one.
    """
    try:
        from headrace.doctor.checks import judge
        from headrace.doctor.machine import read
    except ImportError as error:
        return [Check("dependencies", "error", f"this headrace is not whole: {error}", "pip install headrace")]
    config, first = _configuration(flags, file)
    for key in config.api_keys.split(","):
        log.hide(key.strip())
    found = [first, *judge(config, read(config))]
    return [Check(each.name, each.status, log.redact(each.detail), log.redact(each.fix)) for each in found]


def _configuration(flags: Mapping[str, Any], file: Path | None) -> tuple[Config, Check]:
    name = "configuration"
    try:
        config = configuration.load(flags, file=file)
        configuration.device_groups(config.devices)
    except ConfigError as error:
        return Config(), Check(name, "error", f"{error.message}; the rest is about the defaults", error.hint or "")
    used = file or Path(configuration.DEFAULT_FILE)
    detail = str(used) if used.exists() else f"defaults: there is no {used}"
    models = f"; models: {', '.join(config.models)}" if config.models else ""
    return config, Check(name, "ok", f"{detail}{models}")


def as_json(found: Sequence[Check]) -> str:
    """One document: ``{"checks": [{"name", "status", "detail", "fix"}]}``."""
    return msgspec.json.encode({"checks": found}).decode()


def as_text(found: Sequence[Check], *, coloured: bool = False) -> str:
    """A table, the worst last, each with what to do below it."""
    width = max(len(each.name) for each in found)
    lines = []
    for status in _ORDER:
        mark = f"\x1b[{_COLOURS[status]}m{status:<7}\x1b[0m" if coloured else f"{status:<7}"
        for each in (each for each in found if each.status == status):
            lines.append(f"{mark}  {each.name:<{width}}  {_printable(each.detail)}")
            if each.fix:
                lines.append(f"{'':<7}  {'':<{width}}  → {_printable(each.fix)}")
    errors, warnings, infos, well = (sum(each.status == status for each in found) for status in reversed(_ORDER))
    total = f"{many(errors, 'error')}, {many(warnings, 'warning')}, {infos} info, {well} ok"
    return "\n".join([*lines, total])


def exit_code(found: Sequence[Check]) -> int:
    """1 when something is an error, else 0."""
    return int(any(each.status == "error" for each in found))


def _printable(text: str) -> str:
    """What a driver or a server says must not steer the terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
