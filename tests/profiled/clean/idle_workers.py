"""Threads that wait for work which seldom comes, beside a main thread that is busy."""

from __future__ import annotations

import queue
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from balanced import round_of_work


def consume(jobs: queue.Queue[int | None], done: list[int]) -> None:
    while (job := jobs.get()) is not None:
        done.append(job)


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    jobs: queue.Queue[int | None] = queue.Queue()
    done: list[int] = []
    threads = [threading.Thread(target=consume, args=(jobs, done)) for _ in range(4)]
    for thread in threads:
        thread.start()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(abs, range(3)))
        for number in range(400 + draw.randrange(40)):
            round_of_work(draw)
            if number % 50 == 0:
                jobs.put(number)
    for _ in threads:
        jobs.put(None)
    for thread in threads:
        thread.join()
    print(len(done))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
