"""Programs that a search must endure."""

from __future__ import annotations

import os
import time

calls = 0


def prints() -> None:
    print("hello from the function")


def raises() -> None:
    _count()
    if calls > 7:
        raise ValueError("broken")


def dies() -> None:
    _count()
    if calls > 7:
        os.abort()


def hangs() -> None:
    _count()
    while calls > 7:
        time.sleep(1)


def slow() -> None:
    time.sleep(0.3)


def _count() -> None:
    global calls
    calls += 1
