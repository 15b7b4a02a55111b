"""Deep-learning pitfalls that can be read from the source: `check` files and folders. What is read is never imported.

A rule says nothing rather than something false: it needs to see, in the same file, that a name is a model or a tensor.
What runs is seen by `headrace.profiling.watch`, which is the authority; this is the check that needs no run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from headrace.profiling.finding import Finding
from headrace.profiling.pitfalls import coroutines, cycles, inference, loops, training
from headrace.profiling.pitfalls.rule import Rule
from headrace.profiling.pitfalls.source import Source
from headrace.profiling.pitfalls.tensors import Tensors

RULES = (
    Rule(
        "graph_kept",
        "warning",
        rb"backward\(",
        "keep the number (`loss.item()`, every so many steps) or `loss.detach()`",
        training.graphs_kept,
    ),
    Rule(
        "grad_in_inference",
        "warning",
        rb"def _?(eval|val|predict|infer|test|run)|\.eval\(\)|LitAPI|serve\.deployment|bentoml"
        rb"|@\w+\.(post|get|put|route|api_route|websocket)\(",
        "run it under `torch.inference_mode()` (or `torch.no_grad()`)",
        inference.forwards_with_grad,
    ),
    Rule(
        "train_mode_in_inference",
        "warning",
        rb"load_state_dict\(",
        "call `model.eval()` once, after the weights are loaded",
        inference.train_mode_served,
    ),
    Rule(
        "eval_mode_in_training",
        "warning",
        rb"\.eval\(\)",
        "call `model.train()` at the start of every epoch, or after the evaluation",
        inference.eval_mode_kept,
    ),
    Rule(
        "sync_in_loop",
        "info",
        rb"cuda|mps|xpu|hpu",
        "sum up on the device and fetch every so many steps; copy results with `non_blocking=True`, or after the loop",
        loops.syncs_in_loop,
    ),
    Rule(
        "sync_per_item",
        "warning",
        rb"cuda|mps|xpu|hpu",
        "fetch the whole tensor once, before the loop: `.tolist()`",
        loops.syncs_per_item,
    ),
    Rule(
        "empty_cache_in_loop",
        "warning",
        rb"empty_cache\(",
        "leave it out: the pool is used again; for fragmentation set `PYTORCH_ALLOC_CONF=expandable_segments:True`",
        loops.caches_emptied,
    ),
    Rule(
        "cycle_holds_tensors",
        "info",
        rb"_hook\(|self\.\w+\s*(:[^=\n]+)?=\s*(lambda|self\.|partial|functools)",
        "hold the module by `weakref.ref`, use a method instead of a stored function, or `remove()` the hook",
        cycles.cycles,
    ),
    Rule(
        "loading_on_step_path",
        "warning",
        rb"backward\(",
        "load in a Dataset whose DataLoader has workers, ahead of the step",
        training.loading_on_step_path,
    ),
    Rule(
        "loader_without_workers",
        "info",
        rb"DataLoader\(",
        "set `num_workers` (2 to 4 a GPU is a start) and `pin_memory=True`, then measure",
        training.loaders_without_workers,
    ),
    Rule(
        "forward_on_event_loop",
        "warning",
        rb"\basync def\b",
        "run it in a worker: `headrace serve`, `hr.DynamicBatcher`, or `await asyncio.to_thread(…)`",
        coroutines.forwards,
    ),
    Rule(
        "tokenise_on_event_loop",
        "warning",
        rb"\basync def\b",
        "`await asyncio.to_thread(tokenizer, …)`: the fast tokenizers let other threads run meanwhile",
        coroutines.tokenising,
    ),
    Rule(
        "blocking_in_async",
        "warning",
        rb"\basync def\b",
        "await its asynchronous form (asyncio.sleep, httpx.AsyncClient, asyncio.create_subprocess_exec), or use "
        "`asyncio.to_thread`",
        coroutines.blocking_calls,
    ),
    Rule(
        "file_in_async",
        "info",
        rb"\basync def\b",
        "`await asyncio.to_thread(…)` for files that are large or on a network",
        coroutines.files,
    ),
)
_IGNORE = re.compile(r"#\s*headrace:\s*ignore\[([\w\s,]+)\]")
# Of other people, or made by a program; a folder that is asked for by its name is read all the same.
_SKIPPED = {"__pycache__", "node_modules", "site-packages", "dist-packages", "build", "dist"}


class Skipped(msgspec.Struct, frozen=True):
    """A file that could not be checked, and why."""

    file: str
    reason: str


class Report(msgspec.Struct):
    """What a check has found, in the order of files and lines.

    Args:
        files: how many were looked at.
        skipped: those that could not be read or parsed.
    """

    findings: list[Finding]
    files: int
    skipped: list[Skipped]


def check(paths: Iterable[Path | str]) -> Report:
    """Check files, and the ``*.py`` files below folders.

    Hidden folders, ``site-packages``, ``build`` and the like are left out unless they are named themselves. A file that
    is no Python of this interpreter's is reported as skipped; nothing is raised for it.
    """
    report = Report([], 0, [])
    for path in _files(paths):
        report.files += 1
        try:
            report.findings += check_text(path.read_bytes(), str(path))
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            report.skipped.append(Skipped(str(path), f"{type(error).__name__}: {error}"))
    return report


def check_text(text: bytes, file: str = "") -> list[Finding]:
    """Check one file's text.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: it cannot be parsed.
    """
    rules = [rule for rule in RULES if re.search(rule.words, text)]
    if not rules or not re.search(rb"torch|transformers|lightning|\basync def\b", text):
        return []
    source = Source(file, text)
    tensors = Tensors(source)
    found = {finding for rule in rules for finding in _apply(rule, source, tensors)}
    return sorted(found, key=lambda each: (each.line, each.column, each.code))


def _apply(rule: Rule, source: Source, tensors: Tensors) -> Iterator[Finding]:
    for node, title in rule.find(tensors):
        last = node.end_lineno or node.lineno
        written = source.lines[node.lineno - 1 : last]
        if any(rule.code in _ignored(line) for line in written):
            continue
        first = written[0] if written else ""
        column = len(first.encode()[: node.col_offset].decode("utf-8", "replace")) + 1
        yield Finding(rule.code, rule.severity, title, first.strip(), rule.advice, source.file, node.lineno, column)


def _ignored(line: str) -> set[str]:
    found = _IGNORE.search(line)
    return {each.strip() for each in found.group(1).split(",")} if found else set()


def _files(paths: Iterable[Path | str]) -> Iterator[Path]:
    seen: set[str] = set()
    for path in map(Path, paths):
        for file in _below(path) if path.is_dir() else [path]:
            real = os.path.realpath(file)
            if real not in seen:
                seen.add(real)
                yield file


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith(".") and each not in _SKIPPED)
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(place, name)
