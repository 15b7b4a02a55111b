"""Computes until it is ended; ``waiting`` beside it sits in a socket. Says when it is ready."""

from __future__ import annotations

import socket
import threading


def compute() -> None:
    while True:
        sum(range(500))  # COMPUTE


def wait() -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        mine.recv(1)  # RECEIVE


if __name__ == "__main__":
    threading.Thread(target=wait, name="waiting", daemon=True).start()
    print("ready", flush=True)
    compute()
