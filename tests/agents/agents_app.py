"""Agents for the tests: each shows one thing, and leaves a line per run of a body where the test can count it."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pydantic

import headrace as hr


def note(line: str) -> None:
    """Append a line to the file of ``AGENT_NOTES``; what is written survives any kill of this process."""
    if path := os.environ.get("AGENT_NOTES"):
        with Path(path).open("a") as out:
            out.write(line + "\n")


class Answer(pydantic.BaseModel):
    text: str
    length: int


@hr.agent
async def shout(ctx: Any, message: str) -> Answer:
    """One step."""
    text = await ctx.step("upper", str.upper, message)
    return Answer(text=text, length=len(text))


async def slow_square(ctx: Any, number: int, pause_s: float) -> int:
    note(f"begin {ctx.task_id} {number} {ctx.attempt}")
    await asyncio.sleep(pause_s)
    note(f"end {ctx.task_id} {number} {ctx.attempt}")
    return number * number


@hr.agent
async def squares(ctx: Any, steps: int, pause_s: float = 0.2) -> int:
    """As many steps as asked for, one after the other."""
    total = 0
    for number in range(steps):
        total += await ctx.step(f"square {number}", slow_square, ctx, number, pause_s)
        await ctx.emit("CUSTOM", name="progress", value=(number + 1) / steps)
    return total


@hr.agent
async def confirm(ctx: Any, what: str) -> str:
    """Asks before it does something."""
    before = await ctx.step("prepare", str.strip, what)
    sure = await ctx.ask(f"really {before}?", bool)
    return f"{before}: {'done' if sure else 'left'}"


@hr.agent
async def nap(ctx: Any, seconds: float) -> float:
    """Sleeps durably."""
    began = await ctx.step("begin", time.time)
    await ctx.sleep(seconds)
    ended: float = await ctx.step("end", time.time)
    return ended - float(began)


@hr.agent
async def fail(ctx: Any, message: str = "no") -> None:
    """Fails at once."""
    note(f"fail {ctx.task_id}")
    raise ValueError(message)


@hr.agent
async def picky(ctx: Any, number: int) -> None:
    """Refuses what its schema allows, and says what to do."""
    raise hr.InvalidInput(f"{number} is odd", field="number", hint="give an even one")


@hr.track_llm_call("tiny-model", provider="local")
def answer_with(words: str) -> dict[str, Any]:
    return {"text": words, "usage": {"total_tokens": 70}}


@hr.track_tool("reverse")
async def reverse(text: str) -> str:
    return text[::-1]


@hr.agent
async def metered(ctx: Any, message: str) -> str:
    """Counts what it does as any program may."""
    answer = await ctx.step("ask", answer_with, message)
    return str(await ctx.step("reverse", reverse, answer["text"]))


class Flaky(Exception):
    pass


@hr.agent(retries=2, retry_on=Flaky)
async def flaky(ctx: Any, times: int) -> int:
    """Fails so often, then succeeds; its step is not repeated."""
    await ctx.step("once", note, f"once {ctx.task_id}")
    failures = flaky_failures[ctx.task_id] = flaky_failures.get(ctx.task_id, 0) + 1
    if failures <= times:
        raise Flaky(f"failure {failures}")
    return failures


flaky_failures: dict[str, int] = {}


@hr.agent
async def crash(ctx: Any) -> None:
    """Kills its worker."""
    note(f"crash {ctx.task_id}")
    os._exit(9)


@hr.agent
async def hang(ctx: Any, message: str = "") -> None:
    """Runs until it is interrupted."""
    note(f"hang {ctx.task_id}")
    try:
        await asyncio.sleep(3600)
    finally:
        note(f"interrupted {ctx.task_id}")


@hr.agent
async def large(ctx: Any, size: int) -> int:
    """A step of so many characters."""
    text: str = await ctx.step("large", lambda: "x" * size)
    return len(text)


@hr.agent
async def shifty(ctx: Any) -> str:
    """Its steps depend on a file: what happens when code changes under a task."""
    name = Path(os.environ["AGENT_NOTES"]).with_name("step-name").read_text()
    await ctx.step(name, note, f"step {name}")
    if name == "first":
        raise RuntimeError("again")
    return name


async def use_key(ctx: Any) -> str:
    key: str = ctx.idempotency_key
    note(f"key {key}")
    return key


@hr.agent
async def keys(ctx: Any) -> list[str]:
    """The keys of idempotency of two steps at once."""
    return list(await asyncio.gather(ctx.step("a", use_key, ctx), ctx.step("b", use_key, ctx)))


@hr.agent
async def leak(ctx: Any) -> None:
    """Fails as a client library does that quotes the key it was given."""
    raise PermissionError(f"401: incorrect key {os.environ['SOME_API_KEY']}")
