"""Programs that do not leak, although memory, or some number, moves in each of them."""

from __future__ import annotations

import ctypes
import functools
import json
import random
import threading
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


# Nothing stays.


def nothing() -> None:
    pass


def allocates_much() -> None:
    rows = [{"number": number, "text": str(number) * 10} for number in range(500)]
    json.loads(json.dumps(rows))


def arrays() -> None:
    a = np.random.default_rng(0).normal(size=(100, 100))
    (a @ a.T).sum()


def temporary_native() -> None:
    for block in [libc.malloc(random.randrange(100, 20_000)) for _ in range(30)]:
        libc.free(block)


def threads_that_end() -> None:
    thread = threading.Thread(target=nothing)
    thread.start()
    thread.join()


async def awaits() -> None:
    import asyncio

    await asyncio.gather(*(asyncio.sleep(0) for _ in range(5)))


def opens_and_closes() -> None:
    with open("/dev/null", "rb") as file:
        file.read()


# What stays is replaced.

last: list[bytes] = [b""]


def jitter() -> None:
    last[0] = random.randbytes(random.randrange(100_000))


window: deque[bytes] = deque([b""] * 10, maxlen=10)


def full_window() -> None:
    window.append(random.randbytes(random.randrange(2000)))


class Cache:
    """Throws out the oldest of 64 entries."""

    def __init__(self) -> None:
        self.entries: OrderedDict[int, bytes] = OrderedDict()

    def put(self) -> None:
        self.entries[random.getrandbits(60)] = random.randbytes(500)
        if len(self.entries) > 64:
            self.entries.popitem(last=False)


cache = Cache()
evicting = cache.put

batch: list[bytes] = []


def flushed() -> None:
    """A saw-tooth."""
    batch.append(random.randbytes(500))
    if len(batch) >= 25:
        batch.clear()


# What stays is bounded by what there is.


@functools.cache
def expensive(key: int) -> bytes:
    return random.randbytes(1000)


def few_keys() -> None:
    expensive(random.randrange(20))


def ten_keys_each_late() -> None:
    ten_keys_each_late.calls += 1  # type: ignore[attr-defined]
    expensive(1000 + min(9, ten_keys_each_late.calls // 8))  # type: ignore[attr-defined]


ten_keys_each_late.calls = 0  # type: ignore[attr-defined]

pool: list[ThreadPoolExecutor] = []


def thread_pool() -> None:
    if not pool:
        pool.append(ThreadPoolExecutor(8))
    list(pool[0].map(str, range(20)))


buffers: list[bytearray] = []


def warm_pool() -> None:
    if len(buffers) < 40:
        buffers.append(bytearray(5000))


# What stays has a limit that has not been reached.


@functools.lru_cache(maxsize=4000)
def remembered(key: int) -> bytes:
    return random.randbytes(300)


def lru_filling() -> None:
    remembered(random.getrandbits(60))


history: deque[bytes] = deque(maxlen=4000)


def deque_filling() -> None:
    history.append(random.randbytes(300))


numbers: deque[int] = deque(maxlen=4000)


def small_deque_filling() -> None:
    numbers.append(7)


class Ring:
    """Says how large it becomes, but no type sees to it."""

    def __init__(self, maxsize: int) -> None:
        self.maxsize = maxsize
        self.items: list[bytes] = []

    def put(self) -> None:
        self.items.append(random.randbytes(300))
        if len(self.items) > self.maxsize:
            self.items.pop(0)


ring = Ring(100_000)
large_ring = ring.put


# Cycles.


class Part:
    def __init__(self) -> None:
        self.whole = self
        self.payload = random.randbytes(2000)


def cycles() -> None:
    Part()


class Closing(Part):
    def __del__(self) -> None:
        self.payload = b""


def cycles_with_del() -> None:
    Closing()


# Fragmentation: a block that is twice as large never fits into the holes of those before it.

_blocks: list[int] = []


def fragments() -> None:
    """In use stays what it was, but the holes cannot be used again."""
    if not _blocks:
        for _ in range(2600):
            _blocks.append(_fill(20_000))
            _fill(1500)  # keeps two holes from becoming one
        _blocks.reverse()
    for _ in range(2):
        libc.free(_blocks.pop())
    _fill(40_000)


def _fill(size: int) -> Any:
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    return block


QUIET = (
    "nothing", "allocates_much", "arrays", "temporary_native", "threads_that_end", "awaits", "opens_and_closes",
    "jitter", "full_window", "evicting", "flushed", "few_keys", "ten_keys_each_late", "thread_pool", "warm_pool",
)  # fmt: skip
# Program → what the holder of the report says.
BOUNDED = {
    "lru_filling": "lru_cache of remembered(), maxsize=4000",
    "deque_filling": "deque: global `history` of harmless",
    "small_deque_filling": "deque: global `numbers` of harmless",
    "large_ring": "list: attribute `items` of Ring",
}
CYCLES = ("cycles", "cycles_with_del")
