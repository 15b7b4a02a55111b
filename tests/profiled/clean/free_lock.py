"""A lock that is taken often, held for a moment, and never waited for."""

from __future__ import annotations

import random
import sys
import threading

from balanced import round_of_work

LOCK = threading.Lock()


def counted(counts: dict[str, int]) -> None:
    with LOCK:
        counts["rounds"] = counts.get("rounds", 0) + 1


def listen(stop: threading.Event, counts: dict[str, int]) -> None:
    while not stop.wait(0.01):
        counted(counts)


def main(seed: int = 0) -> None:
    draw, counts, stop = random.Random(seed), dict[str, int](), threading.Event()
    thread = threading.Thread(target=listen, args=(stop, counts))
    thread.start()
    for _ in range(450 + draw.randrange(40)):
        round_of_work(draw)
        counted(counts)
    stop.set()
    thread.join()
    print(counts["rounds"] > 400)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
