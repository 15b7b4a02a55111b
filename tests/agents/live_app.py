"""Models and agents to look at while they run: each has one place where its time goes."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from pathlib import Path
from typing import Any

import headrace as hr


class Hot:
    """Computes for as long as it is asked to, always in one function."""

    def run(self, inputs: list[float]) -> list[float]:
        return [burn(each) for each in inputs]


def burn(seconds: float) -> float:
    until = time.monotonic() + seconds
    total = 0.0
    while time.monotonic() < until:
        total += sum(range(200))
    return total


class Stuck:
    """Sits in code of C that lets nothing else of this process run."""

    def run(self, inputs: list[float]) -> list[float]:
        # Unlike CDLL, PyDLL keeps the interpreter's lock during the call.
        usleep = ctypes.PyDLL(None).usleep
        Path(os.environ["STUCK_NOTE"]).touch()
        for seconds in inputs:
            usleep(int(seconds * 1e6))
        return inputs


async def ask_the_llm(seconds: float) -> None:
    await asyncio.sleep(seconds)


@hr.agent
async def thinks(ctx: Any, seconds: float) -> None:
    """Waits in one place."""
    await ask_the_llm(seconds)


@hr.agent
async def crowd(ctx: Any, size: int, seconds: float) -> None:
    """Waits so many times at once."""
    await asyncio.gather(*(ask_the_llm(seconds) for _ in range(size)))


@hr.agent
async def blocks(ctx: Any, seconds: float) -> None:
    """Keeps the event loop from everything else."""
    burn(seconds)
