"""Programs that leak, each in one way, in a line that is marked, and held by what `HOLDERS` says."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import logging
import os
import random
import socket
import threading
from typing import Any

kept: list[bytes] = []
table: dict[int, bytes] = {}
log = logging.getLogger("planted")
log.propagate = False


def list_grows() -> None:
    kept.append(random.randbytes(200))  # LEAK list_grows


def every_fifth() -> None:
    every_fifth.calls += 1  # type: ignore[attr-defined]
    if every_fifth.calls % 5 == 0:  # type: ignore[attr-defined]
        rare.append(random.randbytes(1000))  # LEAK every_fifth


rare: list[bytes] = []
every_fifth.calls = 0  # type: ignore[attr-defined]


class Service:
    """A cache as an attribute of an object that lives as long as the program."""

    def __init__(self) -> None:
        self.cache: dict[int, str] = {}

    def handle(self) -> None:
        key = len(self.cache)
        self.cache[key] = f"answer to {key} " * 20  # LEAK dict_cache


service = Service()
dict_cache = service.handle


@functools.cache
def squared(number: int) -> str:
    return str(number) * 50  # LEAK unbounded_lru


def unbounded_lru() -> None:
    squared(random.getrandbits(60))


def make_closure() -> Any:
    losses: list[float] = []

    def step() -> None:
        losses.append(random.random())  # LEAK closure

    return step


closure = make_closure()


def default_argument(seen: list[str] = []) -> None:  # noqa: B006
    seen.append(f"request {len(seen)} from somewhere")  # LEAK default_argument


class Bus:
    listeners: list[Any] = []  # noqa: RUF012

    @classmethod
    def subscribe(cls, listener: Any) -> None:
        cls.listeners.append(listener)


def handler_list() -> None:
    text = random.randbytes(300)
    Bus.subscribe(lambda: text)  # LEAK handler_list


def log_handlers() -> None:
    log.addHandler(logging.NullHandler())  # LEAK log_handlers


class Node:
    def __init__(self, following: Node | None) -> None:
        self.following = following
        self.payload = random.randbytes(100)


head: Node | None = None


def linked_nodes() -> None:
    global head
    head = Node(head)  # LEAK linked_nodes


pause = threading.Event()


def wait_for_ever() -> None:
    pause.wait()


def thread_leak() -> None:
    threading.Thread(target=wait_for_ever, daemon=True).start()  # LEAK thread_leak


def fd_leak() -> None:
    os.open("/dev/null", os.O_RDONLY)  # LEAK fd_leak


sockets: list[socket.socket] = []


def socket_leak() -> None:
    sockets.append(socket.socket())  # LEAK socket_leak


async def poll_for_ever() -> None:
    await asyncio.Event().wait()


polls: set[asyncio.Task[None]] = set()


async def task_leak() -> None:
    polls.add(asyncio.create_task(poll_for_ever()))  # LEAK task_leak


libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def native_leak() -> None:
    block = libc.malloc(3000)  # LEAK native_leak
    libc.memset(block, 1, 3000)
    other = libc.malloc(9000)
    libc.free(other)


_local = threading.local()


def thread_local() -> None:
    if not hasattr(_local, "seen"):
        _local.seen = []
    _local.seen.append(random.randbytes(500))  # LEAK thread_local


# Program → (kind, what is in the holder's name, empty where there is none).
HOLDERS = {
    "list_grows": ("python", "list: global `kept` of planted"),
    "every_fifth": ("python", "list: global `rare` of planted"),
    "dict_cache": ("python", "dict: attribute `cache` of Service"),
    "unbounded_lru": ("python", "lru_cache of squared(), maxsize=None"),
    "closure": ("python", "list: closure variable `losses` of make_closure.step"),
    "default_argument": ("python", "list: default argument `seen` of default_argument"),
    "handler_list": ("python", "list: class attribute `listeners` of Bus"),
    "log_handlers": ("python", "list: attribute `handlers` of Logger in global `log` of planted"),
    "linked_nodes": ("python", "Node: global `head` of planted"),
    "thread_leak": ("threads", "threads of `wait_for_ever`"),
    "fd_leak": ("fds", "open descriptors of /dev/null"),
    "socket_leak": ("fds", "list: global `sockets` of planted"),
    "task_leak": ("python", "asyncio tasks of `poll_for_ever`"),
    "native_leak": ("native", ""),
    "thread_local": ("python", ""),
}
