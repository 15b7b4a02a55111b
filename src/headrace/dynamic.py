"""`DynamicBatcher`: the server's batching inside an asyncio program, without a server.

batcher = hr.DynamicBatcher(model)
await batcher.start()
logits = await batcher.infer({"input_ids": ids, "attention_mask": mask})
await batcher.stop()
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from headrace.batcher import Batcher, Entry
from headrace.clock import SYSTEM, Clock
from headrace.errors import DeadlineExceeded, Draining, HeadraceError, NotReady, RunnerError
from headrace.isolation import run_batch
from headrace.runners.devices import pick_device


class DynamicBatcher:
    """Collects concurrent calls of `infer` into batches and runs them in a thread of its own.

    Args:
        model: an `nn.Module` (items are tensors or dictionaries of tensors; batches are padded, masked and run without
            gradients; the answer is `.logits` of the item where there is one), an object with ``run(inputs: list)``,
            or a function list → list.
        max_batch_size: most items in a batch.
        max_wait_ms: how long the first item of a batch waits for others, in milliseconds.
        device: where the model is moved at `start`; the best one of this machine if ``None``.
        max_queue: most calls waiting; past it `Overloaded`.
        max_batch_tokens: most tokens in a batch, padding included.
        timeout_s: a call that has no answer after so many seconds raises `DeadlineExceeded`.
    """

    def __init__(
        self,
        model: Any,
        max_batch_size: int = 32,
        max_wait_ms: float = 20.0,
        device: str | None = None,
        *,
        max_queue: int = 1000,
        max_batch_tokens: int = 16384,
        timeout_s: float = 60.0,
        clock: Clock = SYSTEM,
    ) -> None:
        self._runner, self._prepare, self._cost = _parts(model)
        self._device = device
        self._timeout_s = timeout_s
        self._clock = clock
        self._batcher = Batcher(
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            max_wait_s=max_wait_ms / 1000,
            capacity=max_queue,
        )
        self._keys = itertools.count()
        self._arrived = asyncio.Event()
        self._thread: ThreadPoolExecutor | None = None
        self._worker: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        """Load the model onto its device and begin to answer."""
        if self._worker is not None:
            return
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-batcher")
        device = self._device or pick_device("auto", 0)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._runner.load, device)
        self._stopping = False
        self._worker = asyncio.ensure_future(self._work())

    async def stop(self) -> None:
        """Answer what has been accepted, then end. New calls raise `Draining` meanwhile."""
        if self._worker is None or self._thread is None:
            return
        self._stopping = True
        self._arrived.set()
        await self._worker
        self._thread.shutdown()
        self._worker = self._thread = None

    async def __aenter__(self) -> DynamicBatcher:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def infer(self, inputs: Any) -> Any:
        """Answer one item, batched with those that others ask for at the same time.

        Raises:
            InvalidInput: the item is nothing the model takes.
            Overloaded: too many calls wait already.
            DeadlineExceeded: no answer in time.
            RunnerError: the model failed on this item; the cause is chained.
            NotReady, Draining: before `start`, after `stop`.
        """
        if self._stopping:
            raise Draining("the batcher is stopping")
        if self._worker is None:
            raise NotReady("the batcher is not running", hint="call `await batcher.start()` first")
        item = self._prepare(inputs)
        key = next(self._keys)
        now = self._clock.monotonic()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        entry = Entry(key, (item, future), max(1, self._cost(item)), now, now + self._timeout_s)
        self._batcher.offer(entry)
        self._arrived.set()
        try:
            async with asyncio.timeout(self._timeout_s):
                output = await future
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {self._timeout_s:g} s") from None
        finally:
            self._batcher.cancel(key)
        if isinstance(output, HeadraceError):
            raise output
        if isinstance(output, BaseException):
            raise RunnerError(f"the model failed on this item: {output}") from output
        return output

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            wait_s = self._batcher.wait_s(self._clock.monotonic())
            if wait_s is None and self._stopping:
                return
            if wait_s != 0.0 and not (self._stopping and wait_s is not None):
                await self._sleep(wait_s)
                continue
            batch, _ = self._batcher.take(self._clock.monotonic())
            if not batch:
                continue
            inputs = [entry.item[0] for entry in batch]
            try:
                outputs = await loop.run_in_executor(self._thread, run_batch, self._runner.run, inputs)
            except Exception as error:  # a lost device, an executor that is shut: nobody may wait for an answer
                outputs = [error] * len(batch)
            for entry, output in zip(batch, outputs, strict=True):
                future = entry.item[1]
                if not future.done():
                    future.set_result(output)

    async def _sleep(self, wait_s: float | None) -> None:
        """Until something arrives or the time is up."""
        self._arrived.clear()
        try:
            async with asyncio.timeout(wait_s):
                await self._arrived.wait()
        except TimeoutError:
            pass


def _parts(model: Any) -> tuple[Any, Any, Any]:
    """Runner, prepare and cost of whatever the user has."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        from headrace.runners import module

        return module.ModuleRunner(model), module.prepare, module.cost
    from headrace.runners.user import as_runner

    runner = as_runner(model, type(model).__name__)
    return runner, getattr(runner, "prepare", lambda item: item), getattr(runner, "cost", lambda item: 1)
