"""The agents of `benchmarks/tasks.py`."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import headrace as hr


@hr.agent
async def one_step(ctx: Any, message: str) -> str:
    """One journalled step, then the result."""
    return str(await ctx.step("upper", str.upper, message))


@hr.agent
async def reporter(ctx: Any, first_at: float, every_s: float, count: int) -> int:
    """Says its number and the time, so many times by a timetable. Times are of the machine's monotonic clock."""
    for number in range(count):
        await asyncio.sleep(first_at + number * every_s - time.monotonic())
        await ctx.emit("CUSTOM", name="tick", value=[number, time.monotonic()])
    return count
