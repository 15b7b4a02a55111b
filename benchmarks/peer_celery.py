"""The same job for Celery, with the store in ``PEER_SOCKET``: no journal, no events, no fence.

``python -m celery -A peer_celery worker`` is a worker with two processes, ``python peer_celery.py JOBS AT_ONCE`` asks
for jobs. A job is acknowledged when it is done and a process holds one at a time, as it is with headrace's tasks.
"""

from __future__ import annotations

import collections
import gc
import json
import os
import sys
import time
from typing import Any

from celery import Celery

STORE = f"redis+socket://{os.environ.get('PEER_SOCKET', '')}"
WARM_UP = 20
app = Celery("peer_celery", broker=STORE, backend=STORE)
app.conf.update(
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    worker_pool="prefork",
    worker_concurrency=2,
    broker_connection_retry_on_startup=True,
)


@app.task  # type: ignore[untyped-decorator]
def one_step(message: str) -> str:
    return message.upper()


def drive(count: int, at_once: int) -> dict[str, Any]:
    """Enqueue jobs and wait for their results, the oldest first, with so many on their way."""
    enqueue_s: list[float] = []
    done_s: list[float] = []
    waiting: collections.deque[tuple[int, float, Any]] = collections.deque()

    def take() -> None:
        number, began, result = waiting.popleft()
        assert result.get(timeout=60) == f"JOB {number}"
        done_s.append(time.perf_counter() - began)

    start = time.perf_counter()
    for number in range(count):
        if len(waiting) == at_once:
            take()
        began = time.perf_counter()
        waiting.append((number, began, one_step.delay(f"job {number}")))
        enqueue_s.append(time.perf_counter() - began)
    while waiting:
        take()
    return {"seconds": time.perf_counter() - start, "enqueue_s": enqueue_s, "done_s": done_s}


if __name__ == "__main__":
    count, at_once = map(int, sys.argv[1:])
    drive(WARM_UP, 1)
    gc.freeze()
    gc.disable()
    print(json.dumps({**drive(count, at_once), "jobs": WARM_UP + count}))
