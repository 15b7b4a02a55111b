"""What a run was found to be, for people and for scripts: the table, what waited, the findings, where it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace.profiling.cpu.awaited import with_awaits
from headrace.profiling.device.text import as_text as device_as_text
from headrace.profiling.device.timeline import Timeline
from headrace.profiling.finding import Finding
from headrace.profiling.linewise.table import as_text as lines_as_text
from headrace.profiling.record import Frame, Record, Stack
from headrace.profiling.render import as_collapsed, as_html, as_speedscope, as_table, write_prof
from headrace.profiling.render.table import ranked
from headrace.profiling.render.totals import place, plain, seconds, totals

FORMATS = ("prof", "collapsed", "speedscope", "html", "json")
_CHAINS = 5
_STEPS = 6


def as_text(record: Record, findings: Sequence[Finding], sort: str, top: int) -> str:
    """The report of a run. Raises `ConfigError` if there is no such order."""
    parts = [as_table(with_awaits(record), sort, top)]
    if record.waiting:
        parts.append("\n".join(_waiting(record)))
    if record.lines:
        parts.append(lines_as_text(record.lines))
    if record.device is not None:
        parts.append(device_as_text(msgspec.convert(record.device, Timeline)))
    parts.append("\n".join(_findings(findings, record)))
    if record.notes:
        parts.append("\n".join(f"note: {plain(note)}" for note in record.notes))
    return "\n\n".join(parts)


def as_json(record: Record, findings: Sequence[Finding], sort: str, top: int, files: dict[str, str]) -> bytes:
    """The same for scripts.

    Args:
        files: what else was written, by format.
    """
    ordered = ranked(totals(with_awaits(record)), sort)
    shown = ordered[:top] if top > 0 else ordered
    return msgspec.json.encode(
        {
            "command": record.command,
            "exit_status": record.exit_status,
            "wall_s": record.wall_s,
            "cpu_s": record.cpu_s,
            "children_cpu_s": record.children_cpu_s,
            "sampling_cpu_s": record.sampling_cpu_s,
            "tracing_s": record.tracing_s,
            "rate_hz": record.rate_hz,
            "findings": [_as_dict(each) for each in findings],
            "top": [
                {
                    "function": each.frame.function,
                    "file": each.frame.file,
                    "line": each.frame.line,
                    "own_s": each.own_s,
                    "cumulative_s": each.cumulative_s,
                    "calls" if record.calls else "samples": each.calls,
                }
                for each in shown
            ],
            "waiting": [
                {
                    "seconds": stack.seconds,
                    "owner": stack.owner,
                    "waits_for": stack.waits_for,
                    "chain": _chain(record, stack, 1000),
                }
                for stack in merged(record.waiting)[: top or None]
            ],
            "lines": record.lines,
            "device": record.device,
            "notes": record.notes,
            "files": files,
        }
    )


def save(record: Record, findings: Sequence[Finding], formats: Sequence[str], folder: Path) -> dict[str, str]:
    """Write a run in these formats; where each was written. Raises `OSError`."""
    written: dict[str, str] = {}

    def note(name: str, file: str, content: bytes | None = None) -> Path:
        path = folder / file
        written[name] = str(path)
        if content is not None:
            path.write_bytes(content)
        return path

    if "prof" in formats:
        write_prof(with_awaits(record), note("prof", "profile.prof"))
    if "collapsed" in formats:
        note("collapsed", "cpu.collapsed", as_collapsed(record, "cpu").encode())
        note("collapsed_waiting", "waiting.collapsed", as_collapsed(record, "waiting").encode())
    if "speedscope" in formats:
        note("speedscope", "profile.speedscope.json", as_speedscope(record))
    if "html" in formats:
        note("html", "profile.html", as_html(record, findings).encode())
    if "json" in formats:
        note("json", "record.json", msgspec.json.encode(record))
    return written


def merged(stacks: Sequence[Stack]) -> list[Stack]:
    """Chains of several tasks or threads that wait in one place for one thing, as one; its owner says how many."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...], str], list[Stack]] = {}
    for stack in stacks:
        found.setdefault((tuple(stack.frames), tuple(stack.lines), stack.waits_for), []).append(stack)
    together = []
    for group in found.values():
        owner = group[0].owner if len(group) == 1 else f"{len(group)} of them"
        total, samples = sum(each.seconds for each in group), sum(each.samples for each in group)
        together.append(msgspec.structs.replace(group[0], seconds=total, samples=samples, owner=owner))
    return sorted(together, key=lambda stack: -stack.seconds)


def _waiting(record: Record) -> list[str]:
    chains = merged(record.waiting)
    total = sum(stack.seconds for stack in chains)
    lines = [f"waiting, {seconds(total)} of tasks and threads together:"]
    for stack in chains[:_CHAINS]:
        reason = stack.waits_for or "?"
        lines.append(f"{seconds(stack.seconds):>9}  {reason:<8}{_chain(record, stack, _STEPS)}  ({plain(stack.owner)})")
    if len(chains) > _CHAINS:
        lines.append(f"{'':>9}  and {len(chains) - _CHAINS} more")
    return lines


def _chain(record: Record, stack: Stack, most: int) -> str:
    """Its innermost steps, from the outermost function of the program's own."""
    kinds = [record.frames[number].kind for number in stack.frames]
    first = kinds.index("user") if "user" in kinds else 0
    steps = []
    for number, line in list(zip(stack.frames, stack.lines, strict=True))[first:]:
        name = record.frames[number].function
        steps.append(plain(f"{name}:{line}" if line else name))
    return " > ".join(steps if len(steps) <= most else ["…", *steps[-most:]])


def _findings(findings: Sequence[Finding], record: Record) -> list[str]:
    if not findings:
        return ["no finding: nothing stands out"]
    lines = []
    for number, each in enumerate(findings, 1):
        where = _where(each, record)
        lines.append(plain(f"{number}. {each.title}{where} [{each.code}]"))
        lines += [f"   {plain(each.evidence)}", f"   → {plain(each.advice)}"]
    return lines


def _where(finding: Finding, record: Record) -> str:
    return f"  {place(Frame('', finding.file, finding.line), record.directory)}" if finding.file else ""


def _as_dict(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "severity": finding.severity,
        "title": finding.title,
        "evidence": finding.evidence,
        "advice": finding.advice,
        "file": finding.file,
        "line": finding.line,
        "share": getattr(finding, "share", None),
    }
