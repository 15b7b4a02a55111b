"""The same job for arq, with the store in ``ARQ_SOCKET``: no journal, no events, no fence.

``python -m arq peer_arq.WorkerSettings`` is a worker, ``python peer_arq.py JOBS AT_ONCE`` asks for jobs.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from typing import Any

from arq import create_pool
from arq.connections import RedisSettings


async def one_step(ctx: Any, message: str) -> str:
    return message.upper()


class WorkerSettings:
    """arq's way to be configured."""

    functions = (one_step,)
    redis_settings = RedisSettings(unix_socket_path=os.environ.get("ARQ_SOCKET"))
    max_jobs = 8
    poll_delay = 0.01


async def drive(count: int, at_once: int) -> dict[str, float]:
    """Enqueue jobs and wait for their results, so many at once."""
    pool = await create_pool(WorkerSettings.redis_settings)
    left = iter(range(count))
    enqueue_s: list[float] = []

    async def client() -> None:
        for number in left:
            began = time.perf_counter()
            job = await pool.enqueue_job("one_step", f"job {number}")
            enqueue_s.append(time.perf_counter() - began)
            assert job
            await job.result(timeout=60, poll_delay=0.01)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return {"seconds": time.perf_counter() - began, "enqueue_p50_ms": statistics.median(enqueue_s) * 1e3}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(drive(int(sys.argv[1]), int(sys.argv[2])))))
