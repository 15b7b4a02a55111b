"""What a process holds, counted after each call: objects, memory, threads, descriptors, tensors.

The counting must not be what grows. Values go into arrays that are made, and touched, before the first call; objects
that are alive when a run begins are frozen, so that the collector and the census of tensors walk only what is new; what
the watching itself takes between two runs is taken off. torch is looked at only where the program has imported it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import tracemalloc
import weakref
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from headrace.profiling.leaking.containers import instances

# What the watching itself changes, and what is therefore corrected for it.
_BYTES = ("traced", "blocks", "heap", "heap_free", "resident")
COLUMNS = (
    "call",  # number of calls so far
    *_BYTES,  # traced Python bytes, Python blocks, bytes of malloc in use and free, anonymous resident bytes
    "threads",
    "files",  # open descriptors
    "tasks",  # asyncio tasks of the loop that runs the calls
    "tensors",
    "tensor_bytes",  # each storage once
    "nodes",  # of autograd, reachable from living tensors
    "cuda",  # bytes allocated by torch
    "cuda_reserved",
    "freed_objects",  # by the garbage collector, since the start
    "freed_bytes",
)
NONE = -1  # a value that cannot be measured here, or was not this time
_MOST_NODES = 300_000
_CENSUSES = 32  # of tensors and graphs in a run: they cost more the more is kept
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Recorder:
    """Values of up to ``most`` samples.

    Args:
        tasks: number of living asyncio tasks.
    """

    def __init__(self, most: int, *, tasks: Callable[[], int] = lambda: 0) -> None:
        self._columns = {name: array("q", bytes(8 * most)) for name in COLUMNS}
        self._most = most
        self._tasks = tasks
        self._taken_off = dict.fromkeys(_BYTES, 0)
        self._paused: tuple[int, ...] = ()
        self._census_every = 1
        self._since_census = 0
        self._heap = heap_reader()
        self.tensors = Tensors()
        self.freed = Freed()
        self.length = 0

    @property
    def full(self) -> bool:
        return self.length >= self._most

    def sample(self, call: int) -> None:
        """Empty what Python itself keeps, then count everything."""
        _clear_caches()
        gc.collect()
        self.freed.counting = False
        self._fill_in(call)
        gc.collect()  # torch's statistics of a GPU leave cycles
        self.freed.counting = True

    def _fill_in(self, call: int) -> None:
        at = self.length
        columns = self._columns
        columns["call"][at] = call
        for name, value in zip(_BYTES, self._bytes(), strict=True):
            columns[name][at] = value - self._taken_off[name] if value != NONE else NONE
        columns["threads"][at] = count_threads()
        columns["files"][at] = count_files()
        columns["tasks"][at] = self._tasks()
        census = self.tensors.count() if self._since_census % self._census_every == 0 else (NONE, NONE, NONE)
        columns["tensors"][at], columns["tensor_bytes"][at], columns["nodes"][at] = census
        self._since_census += 1
        columns["cuda"][at], columns["cuda_reserved"][at] = cuda_bytes()
        columns["freed_objects"][at] = self.freed.objects
        columns["freed_bytes"][at] = self.freed.bytes
        self.length = at + 1

    def _bytes(self) -> tuple[int, int, int, int, int]:
        used, free = self._heap()
        return tracemalloc.get_traced_memory()[0], sys.getallocatedblocks(), used, free, resident_bytes()

    def begin(self, samples: int) -> None:
        """Freeze what is alive: from here on only what is new is walked. What the bytes have changed by since `end` is
        the watching's own, and is taken off.

        Args:
            samples: about how many will be taken until `end`.
        """
        gc.unfreeze()
        if not self._paused:
            gc.collect()
        self.tensors.begin()
        gc.freeze()
        _clear_caches()
        gc.collect()  # it also empties the lists of free objects, which the watching has filled
        self._census_every = max(1, samples // _CENSUSES)
        self._since_census = 0
        if self._paused:
            for name, was, value in zip(_BYTES, self._paused, self._bytes(), strict=True):
                self._taken_off[name] += value - was
        self.freed.counting = True

    def end(self) -> None:
        self.freed.counting = False
        _clear_caches()
        gc.collect()
        self._paused = self._bytes()
        gc.unfreeze()

    def series(self, name: str, start: int = 0, end: int | None = None) -> tuple[list[float], list[float]]:
        """Numbers of the calls and values, of the samples from ``start`` that were measured."""
        end = self.length if end is None else end
        pairs = [
            (float(call), float(value))
            for call, value in zip(self._columns["call"][start:end], self._columns[name][start:end], strict=True)
            if value != NONE
        ]
        return [call for call, _ in pairs], [value for _, value in pairs]

    def last(self, name: str) -> int:
        return self._columns[name][self.length - 1] if self.length else 0


class Freed:
    """What only the garbage collector could free, counted in its own callbacks: it also runs within a call.

    Not while ``counting`` is off: what the watching leaves is its own.
    """

    def __init__(self) -> None:
        self.objects = 0
        self.bytes = 0
        self.counting = False
        self._before = 0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if not self.counting:
            return
        if phase == "start":
            self._before = tracemalloc.get_traced_memory()[0]
        else:
            self.objects += info["collected"]
            self.bytes += max(0, self._before - tracemalloc.get_traced_memory()[0])


class Tensors:
    """Living tensors: new ones by a walk over the collector's objects, those from before a run by weak references."""

    def __init__(self) -> None:
        self._before: list[weakref.ref[Any]] = []

    def begin(self) -> None:
        """Remember the tensors that are alive. Called just before they are frozen."""
        self._before = [weakref.ref(each) for each in self._new()]

    def alive(self) -> list[Any]:
        """Every tensor that Python knows of. What only C++ holds is in the graphs: see `nodes`."""
        return self._new() + [each for ref in self._before if (each := ref()) is not None]

    def _new(self) -> list[Any]:
        """Those that are not frozen."""
        kind = getattr(sys.modules.get("torch"), "Tensor", None)
        if kind is None:
            return []
        return instances(gc.get_objects(), (kind,))

    def count(self) -> tuple[int, int, int]:
        """Number, bytes of their storages, and nodes of autograd that they keep.

        One sum of losses is one tensor and all the nodes behind it.
        """
        tensors = self.alive()
        storages: dict[int, int] = {}
        for each in tensors:
            with contextlib.suppress(Exception):  # sparse, fake and wrapped tensors have no storage
                storage = each.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        roots = [each.grad_fn for each in tensors if each.grad_fn is not None]
        return len(tensors), sum(storages.values()), sum(1 for _ in walk_graph(roots))


def walk_graph(roots: list[Any]) -> Iterator[Any]:
    """Every node behind these, each once, up to a bound."""
    seen = set(roots)
    stack = list(seen)
    while stack and len(seen) < _MOST_NODES:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    yield from stack


# An attribute that C asks for by a name of its own leaves that name in the interpreter's cache of look-ups, up to four
# thousand of them: to every statistic a leak of 60 bytes a call.
_clear_caches: Callable[[], None] = (
    getattr(sys, "_clear_internal_caches", None) or getattr(sys, "_clear_type_cache", None) or (lambda: None)
)


def cuda_bytes() -> tuple[int, int]:
    """Bytes that torch's tensors have, and that it has from the driver, on all GPUs; 0 where none is in use."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return 0, 0
    cards = range(torch.cuda.device_count())
    return sum(map(torch.cuda.memory_allocated, cards)), sum(map(torch.cuda.memory_reserved, cards))


def count_threads() -> int:
    """All threads of the process, also those that Python knows nothing of."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return psutil.Process().num_threads()


def count_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # the folder itself
    except OSError:
        return psutil.Process().num_fds()


def resident_bytes() -> int:
    """Memory that is no file's: pages of libraries come and go as they are first used."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return int(psutil.Process().memory_info().rss)
    try:
        _, resident, shared = os.read(file, 128).split()[:3]
    finally:
        os.close(file)
    return (int(resident) - int(shared)) * _PAGE


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    )


def heap_reader() -> Callable[[], tuple[int, int]]:
    """A function that reads what C's malloc has handed out and what lies free in it, in bytes.

    Tried first: where another allocator is loaded in its place, glibc's own numbers stand still. Then, and where there
    is no glibc, it reads `NONE`.
    """
    try:
        libc = ctypes.CDLL(None)
        read = libc.mallinfo2
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    except (OSError, AttributeError):
        return lambda: (NONE, NONE)
    read.restype, read.argtypes = _Mallinfo, []

    def heap() -> tuple[int, int]:
        info = read()
        return info.uordblks + info.hblkhd, info.fordblks

    before, _ = heap()
    block = libc.malloc(1 << 16)
    after, _ = heap()
    libc.free(block)
    return heap if after - before >= 1 << 16 else lambda: (NONE, NONE)
