"""The agent of `benchmarks/tasks.py`: one step."""

from __future__ import annotations

from typing import Any

import headrace as hr


@hr.agent
async def one_step(ctx: Any, message: str) -> str:
    """One journalled step, then the result."""
    return str(await ctx.step("upper", str.upper, message))
