"""The same job for arq, with the store in ``PEER_SOCKET``: no journal, no events, no fence.

``python -m arq peer_arq.WorkerSettings`` is a worker, ``python peer_arq.py JOBS AT_ONCE`` asks for jobs.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from typing import Any

from arq import create_pool
from arq.connections import ArqRedis, RedisSettings

WARM_UP = 20


async def one_step(ctx: Any, message: str) -> str:
    return message.upper()


class WorkerSettings:
    """arq's way to be configured."""

    functions = (one_step,)
    redis_settings = RedisSettings(unix_socket_path=os.environ.get("PEER_SOCKET"))
    max_jobs = 8
    poll_delay = 0.01


async def drive(pool: ArqRedis, count: int, at_once: int) -> dict[str, Any]:
    """Enqueue jobs and wait for their results, so many at once."""
    left = iter(range(count))
    enqueue_s: list[float] = []
    done_s: list[float] = []

    async def client() -> None:
        for number in left:
            began = time.perf_counter()
            job = await pool.enqueue_job("one_step", f"job {number}")
            enqueue_s.append(time.perf_counter() - began)
            assert job
            assert await job.result(timeout=60, poll_delay=0.01) == f"JOB {number}"
            done_s.append(time.perf_counter() - began)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return {"seconds": time.perf_counter() - start, "enqueue_s": enqueue_s, "done_s": done_s}


async def main(count: int, at_once: int) -> dict[str, Any]:
    pool = await create_pool(WorkerSettings.redis_settings)
    await drive(pool, WARM_UP, 1)
    gc.freeze()
    gc.disable()
    return {**await drive(pool, count, at_once), "jobs": WARM_UP + count}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))))
