"""Threads that talk to something slow while they hold the one lock that all of them need."""

from __future__ import annotations

import random
import sys
import threading
import time

LOCK = threading.Lock()
ROWS: list[int] = []


def store(number: int) -> None:
    with LOCK:  # HERE
        time.sleep(0.008)
        ROWS.append(number)


def work(rounds: int) -> None:
    for number in range(rounds):
        sum(each * each for each in range(1000))
        store(number)


def main(seed: int = 0) -> None:
    rounds = 25 + random.Random(seed).randrange(8)
    threads = [threading.Thread(target=work, args=(rounds,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(len(ROWS))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
