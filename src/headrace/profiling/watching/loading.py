"""Times how long the program waits for its DataLoaders, and counts how often it empties the cache of CUDA memory."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from headrace.clock import perf_counter
from headrace.profiling.watching.patches import Patches, Place, users_place


class LoaderSite:
    """A line that takes batches.

    Attributes:
        batches: taken after the first of each pass, which starts the workers.
        waited_s: for these.
        seconds: from one batch to the next, added up.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.batches = 0
        self.waited_s = 0.0
        self.seconds = 0.0


class Loading:
    """What was seen of DataLoaders and of the cache, by line of the user's code."""

    def __init__(self) -> None:
        self.loaders: dict[Place, LoaderSite] = {}
        self.emptied: Counter[Place] = Counter()
        self._lock = threading.Lock()

    def patch(self, patches: Patches, torch: Any) -> None:
        from torch.utils.data import dataloader

        patches.add(dataloader._BaseDataLoaderIter, "__next__", functools.partial(self._taking, patches))
        for device in (torch.cuda, torch.mps, torch.xpu):
            patches.add(device, "empty_cache", functools.partial(self._emptying, patches))

    def _taking(self, patches: Patches, original: Any) -> Callable[[Any], Any]:
        @functools.wraps(original)
        def take(iterator: Any) -> Any:
            if not patches.on:
                return original(iterator)
            place = users_place()
            start = perf_counter()
            batch = original(iterator)
            end = perf_counter()
            before = vars(iterator).get("_headrace_taken")
            iterator._headrace_taken = end
            if place is not None and before is not None:
                with self._lock:
                    site = self.loaders.setdefault(place, LoaderSite(getattr(iterator, "_num_workers", 0)))
                    site.batches += 1
                    site.waited_s += end - start
                    site.seconds += end - before
            return batch

        return take

    def _emptying(self, patches: Patches, original: Any) -> Callable[[], None]:
        @functools.wraps(original)
        def empty_cache() -> None:
            place = users_place() if patches.on else None
            if place is not None:
                with self._lock:
                    self.emptied[place] += 1
            original()

        return empty_cache


def allocator_retries(torch: Any) -> int:
    """How often, on any GPU, the allocator had to give back its pool to find room; 0 where CUDA is not in use."""
    if not torch.cuda.is_initialized():
        return 0
    devices = range(torch.cuda.device_count())
    return sum(int(torch.cuda.memory_stats(each).get("num_alloc_retries", 0)) for each in devices)
