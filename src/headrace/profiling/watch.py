"""Watches a program that uses torch, and says what it does that costs time, memory or right answers.

    with watch_torch() as watch:
        train()
    for finding in watch.findings:
        print(finding.file, finding.line, finding.title, finding.evidence)

It sees what runs, and so is the authority where `headrace.profiling.lint` can only read. It does not see inside
compiled graphs and C++ extensions, nor into other processes, and of code without modules only the backward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from headrace.clock import perf_counter
from headrace.errors import SetupError, Unavailable
from headrace.profiling.finding import Finding
from headrace.profiling.watching.forwards import Forwards
from headrace.profiling.watching.loading import Loading, allocator_retries
from headrace.profiling.watching.patches import Patches
from headrace.profiling.watching.syncs import Syncs
from headrace.profiling.watching.verdicts import Seen, judge

_ACTIVE = threading.Lock()


class Watch:
    """What is seen, while it is watched and afterwards."""

    def __init__(self, torch: Any, min_calls: int, min_share: float) -> None:
        self._torch = torch
        self._bounds = (min_calls, min_share)
        self._patches = Patches()
        self._syncs, self._forwards, self._loading = Syncs(), Forwards(torch), Loading()
        self._began = self._retries = 0.0
        self._result: tuple[Seen, list[Finding]] | None = None

    @property
    def findings(self) -> list[Finding]:
        """So far; after the end, of the whole. Warnings first."""
        return self._result[1] if self._result is not None else judge(self._seen())

    @property
    def steps(self) -> int:
        """Calls of ``backward``, or of models where there are none."""
        return self._seen().steps if self._result is None else self._result[0].steps

    @property
    def seconds(self) -> float:
        """How long it has been watched."""
        return self._seen().seconds if self._result is None else self._result[0].seconds

    def _seen(self) -> Seen:
        cuda = self._torch.cuda
        in_use = cuda.is_initialized()
        return Seen(
            self._syncs,
            self._forwards,
            self._loading,
            perf_counter() - self._began,
            allocator_retries(self._torch) - int(self._retries),
            cuda.memory_reserved() if in_use else 0,
            cuda.memory_allocated() if in_use else 0,
            *self._bounds,
        )

    def _start(self, stack: ExitStack) -> None:
        torch = self._torch
        self._syncs.patch(self._patches, torch)
        self._forwards.patch(self._patches, lambda: self._syncs.hear(torch))
        self._loading.patch(self._patches, torch)
        self._patches.add(torch, "compile", self._before_compiling)
        self._retries = allocator_retries(torch)
        stack.callback(self._judge)
        self._forwards.start()
        stack.callback(self._forwards.stop)
        stack.callback(self._syncs.stop, torch)
        stack.callback(self._patches.remove)
        self._patches.install()
        self._began = perf_counter()

    def _before_compiling(self, original: Any) -> Any:
        def compile(*args: Any, **kwargs: Any) -> Any:  # noqa: A001
            self._patches.mind_compiler()
            return original(*args, **kwargs)

        return compile

    def _judge(self) -> None:
        seen = self._seen()
        self._result = (seen, judge(seen))


@contextmanager
def watch_torch(*, min_calls: int = 20, min_share: float = 0.05) -> Iterator[Watch]:
    """Watch everything that uses torch in this process, in all threads, until the end of the block.

    Finds, by line of the caller's own code: waits for the device in a loop; graphs that are kept; forwards with
    gradients on that no backward follows; inference in train mode; reference cycles that hold tensors;
    ``empty_cache`` in a loop; a CUDA allocator that runs out of room; loops that wait for their DataLoader.

    Args:
        min_calls: a line that waits for the device less often is not named.
        min_share: of the time, waited at one line, several times a step: from here on it is a warning, below it is
            good to know.

    Yields:
        A `Watch`; its ``findings`` are complete once the block has ended, also by an exception.

    Raises:
        SetupError: something is watched already.
        Unavailable: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise Unavailable("watch_torch needs torch", hint="pip install 'headrace[torch]'") from None
    if not _ACTIVE.acquire(blocking=False):
        raise SetupError("watch_torch is active already", hint="one block at a time, in all threads together")
    watch = Watch(torch, min_calls, min_share)
    with ExitStack() as stack:
        stack.callback(_ACTIVE.release)
        watch._start(stack)
        yield watch
