"""Says what it was started with, and ends as it is told: exit, raise, text, sigint, _exit, thread."""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import sys
import threading
import time


class Thing:
    """Known by its module's name, which is that of the program."""


def spin(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        sum(range(100))


def later() -> None:
    spin(0.05)
    print("the thread has ended")


def main() -> None:
    print(sys.argv, __name__, __file__, sys.path[0], __spec__ and __spec__.name, __package__)
    assert isinstance(pickle.loads(pickle.dumps(Thing())), Thing)
    atexit.register(print, "at exit")
    how = sys.argv[1] if len(sys.argv) > 1 else ""
    spin(0.1)
    if how == "exit":
        sys.exit(3)
    if how == "raise":
        raise ValueError("as it is told")
    if how == "text":
        sys.exit("told why")
    if how == "sigint":
        signal.raise_signal(signal.SIGINT)
    if how == "_exit":
        spin(1.5)
        sys.stdout.flush()
        os._exit(4)
    if how == "thread":
        threading.Thread(target=later).start()


if __name__ == "__main__":
    main()
