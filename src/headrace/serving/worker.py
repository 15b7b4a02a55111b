"""The model worker: hosts one runner and answers batches.

Three kinds of threads share the waiting rooms: a reader per front end fills them, the model thread empties them and
runs the model, the responder encodes and sends the answers while the next batch runs. Knows nothing of HTTP, and
nothing of the process that it lives in (`worker_process.py`).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
from collections.abc import Generator, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from headrace import metrics
from headrace.batcher import Batcher, Entry
from headrace.calibration import Calibration
from headrace.clock import SYSTEM, Clock
from headrace.config import ModelConfig
from headrace.core import Beat, Cancel, Channel, Drain, Hello, Outcome, Request, Timings, Workload
from headrace.errors import DeadlineExceeded, Fault, HeadraceError, RunnerError, to_fault
from headrace.ipc import ChannelClosed, decode_value, encode_value
from headrace.isolation import DeviceLost, is_device_lost, run_batch
from headrace.runners import Loaded
from headrace.serving.ceiling import Ceiling

_log = logging.getLogger(__name__)

# How long a draining worker waits for front ends to say that nothing more will come; one may be stopped or stuck.
FAREWELL_S = 2.0
# Share of the newest batch in the smoothed speed.
_SPEED_SHARE = 0.2


@dataclass(slots=True, eq=False)
class _Call:
    """A request together with the front end that waits for it."""

    channel: Channel
    id: int
    trace: str
    input: Any


@dataclass(slots=True)
class _Done:
    """A batch that has run, or one step of a streaming one, on its way to the responder."""

    batch: list[Entry]
    outputs: list[Any]
    began: float
    run_s: float
    stream: bool = False
    last: bool = True


class Worker:
    """One runner behind any number of channels.

    Args:
        loaded: the model.
        config: its options; sizes and limits are taken from here.
        row: where metrics go.
        calibration: what the warm-up measured.
    """

    def __init__(
        self,
        loaded: Loaded,
        config: ModelConfig,
        row: metrics.Row,
        calibration: Calibration | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        measured = calibration or Calibration(config.max_batch_size)
        self._loaded = loaded
        self._clock = clock
        # Front ends refuse at max_queue. Room beyond it is for what they re-send after another worker's death.
        capacity = 2 * config.max_queue + config.max_batch_size

        def room(size: int) -> Batcher:
            return Batcher(
                max_batch_size=size,
                max_batch_tokens=config.max_batch_tokens,
                max_wait_s=config.max_wait_ms / 1000,
                capacity=capacity,
                overhead_tokens=measured.overhead_tokens,
            )

        size = min(measured.batch_size, config.max_batch_size)
        self._room, self._streams, self._alone = room(size), room(size), room(1)
        self._rooms = (self._alone, self._room, self._streams)
        self._ceiling = Ceiling(self._rooms, config.max_batch_tokens)
        self._speed = _Speed(measured.tokens_per_s)
        self.hello = Hello(loaded.info)
        self._wakeup = threading.Condition()
        self._channels: set[Channel] = set()
        self._unacknowledged: set[Channel] = set()
        self._listening: set[Hashable] = set()
        self._draining: float | None = None
        self._done: queue.SimpleQueue[_Done | None] = queue.SimpleQueue()
        self._step = 0
        self._busy_since: float | None = None
        self._metrics = _WorkerMetrics(row, config.name)

    def attach(self, channel: Channel) -> None:
        """Serve a front end until its channel closes."""
        with self._wakeup:
            if self._draining is not None:
                channel.close()
                return
            self._channels.add(channel)
        channel.send(self.hello)
        threading.Thread(target=self._read, args=(channel,), name="reader", daemon=True).start()

    def drain(self) -> None:
        """Tell front ends to send nothing more, finish what is here; `serve` returns then."""
        with self._wakeup:
            if self._draining is not None:
                return
            self._draining = self._clock.monotonic()
            self._unacknowledged = set(self._channels)
            self._wakeup.notify_all()
        for channel in list(self._unacknowledged):
            self._send(channel, Drain())

    def beat(self) -> Beat:
        """Progress of the model thread."""
        since = self._busy_since
        return Beat(self._step, max(self._clock.monotonic() - since, 1e-6) if since is not None else 0.0)

    def serve(self) -> None:
        """Run batches in this thread until drained.

        Raises:
            DeviceLost: nothing can be computed in this process any more; the batch it happened in is not answered.
        """
        responder = threading.Thread(target=self._respond, name="responder", daemon=True)
        responder.start()
        while self.step():
            pass
        self._done.put(None)
        responder.join()

    def step(self) -> bool:
        """One batch: take, run, hand over. False once drained."""
        room, batch = self._take()
        if room is None:
            return False
        if batch:
            began = self._clock.monotonic()
            self._step, self._busy_since = self._step + 1, began
            self._announce(batch)
            if room is self._streams:
                self._run_stream(batch, began)
            else:
                self._run(batch, began)
            self._busy_since = None
        return True

    def _run(self, batch: list[Entry], began: float) -> None:
        costs = {id(entry.item.input): entry.cost for entry in batch}

        def too_large(inputs: list[Any]) -> None:
            self._metrics.out_of_memory.inc()
            # One item that does not fit by itself says nothing about batches.
            if len(inputs) > 1:
                self._ceiling.lower(len(inputs) * max(costs[id(each)] for each in inputs))
            _empty_cache()

        inputs, traces = [entry.item.input for entry in batch], [entry.item.trace for entry in batch]
        outputs = run_batch(self._loaded.runner.run, inputs, traces, too_large)
        run_s = self._clock.monotonic() - began
        self._speed.update(batch, run_s)
        self._ceiling.passed(len(batch) * max(costs.values()))
        self._done.put(_Done(batch, outputs, began, run_s))

    def _run_stream(self, batch: list[Entry], began: float) -> None:
        """Hand over chunks as they are made, until the runner ends or nobody listens any more."""
        assert self._loaded.stream is not None
        with self._wakeup:
            self._listening = {entry.key for entry in batch}
        failure: BaseException | None = None
        try:
            with contextlib.closing(_closable(self._loaded.stream([entry.item.input for entry in batch]))) as steps:
                for chunks in steps:
                    if len(chunks) != len(batch):
                        raise RunnerError(f"stream gave {len(chunks)} chunks for {len(batch)} inputs")
                    self._busy_since = now = self._clock.monotonic()
                    self._done.put(_Done(batch, chunks, began, now - began, stream=True, last=False))
                    if not self._listening:
                        break
        except (Exception, SystemExit) as error:  # of the user's code: the batch fails, not the worker
            if is_device_lost(error):
                raise DeviceLost(str(error)) from error
            _log.exception("the model failed in a stream")
            failure = error
        run_s = self._clock.monotonic() - began
        self._done.put(_Done(batch, [failure] * len(batch), began, run_s, stream=True))

    def _take(self) -> tuple[Batcher | None, list[Entry]]:
        """The next batch and the room that it comes from; no room once drained."""
        with self._wakeup:
            while True:
                now = self._clock.monotonic()
                room, wait_s = self._most_urgent(now)
                if room is None and self._may_end(now):
                    return None, []
                if room is not None and (wait_s == 0.0 or self._draining is not None):
                    batch, expired = room.take(now)
                    break
                self._wakeup.wait(wait_s if self._draining is None else 0.05)
        for entry in expired:
            self._send(entry.item.channel, _late(entry.item.id))
        return room, batch

    def _most_urgent(self, now: float) -> tuple[Batcher | None, float | None]:
        """The room to serve next, and in how many seconds: of those that are due, the one with the oldest item."""
        waits = [(wait_s, room) for room in self._rooms if (wait_s := room.wait_s(now)) is not None]
        if not waits:
            return None, None
        wait_s, room = min(waits, key=lambda each: (each[0], each[1].oldest()))
        return room, wait_s

    def _may_end(self, now: float) -> bool:
        if self._draining is None:
            return False
        return not self._unacknowledged or now > self._draining + FAREWELL_S

    def _announce(self, batch: list[Entry]) -> None:
        """Tell front ends which of their requests begin (should this process die now, only those may have run), and
        how much there is to do."""
        began: dict[Channel, list[int]] = {channel: [] for channel in list(self._channels)}
        for entry in batch:
            began.setdefault(entry.item.channel, []).append(entry.item.id)
        waiting = sum(room.cost for room in self._rooms) + sum(entry.cost for entry in batch)
        work = Workload(
            self._speed.time_for(waiting), self._speed.time_for(sum(e.cost for e in batch)), self._speed.item_s
        )
        for channel, ids in began.items():
            self._send(channel, Beat(self._step, 0.0, ids, work))

    def _respond(self) -> None:
        """Encode and send the answers of finished batches, in a thread beside the model's."""
        while (done := self._done.get()) is not None:
            outcomes: dict[Channel, list[Outcome]] = {}
            for entry, output in zip(done.batch, done.outputs, strict=True):
                if output is None and not done.last:
                    continue
                timings = Timings((done.began - entry.arrived) * 1e3, done.run_s * 1e3, len(done.batch))
                if done.stream and output is None:
                    outcome = Outcome(entry.item.id, timings=timings)
                else:
                    outcome = self._outcome(entry.item.id, output, timings)
                    outcome.last = done.last or outcome.fault is not None
                outcomes.setdefault(entry.item.channel, []).append(outcome)
            for channel, answers in outcomes.items():
                self._send(channel, *answers)
            if done.last:
                self._metrics.count(done)

    def _outcome(self, ident: int, output: Any, timings: Timings) -> Outcome:
        if not isinstance(output, BaseException):
            try:
                return Outcome(ident, encode_value(self._loaded.finish(output)), None, timings)
            except Exception as error:
                _log.exception("an answer of the model cannot be sent")
                output = error
        return Outcome(ident, fault=_fault(output), timings=timings)

    def _read(self, channel: Channel) -> None:
        try:
            while True:
                self._receive(channel, channel.recv(None))
        except ChannelClosed:
            channel.close()
            with self._wakeup:
                self._channels.discard(channel)
                self._unacknowledged.discard(channel)
                for room in self._rooms:
                    for entry in room.waiting():
                        if entry.item.channel is channel:
                            room.cancel(entry.key)
                self._wakeup.notify()

    def _receive(self, channel: Channel, frames: list[Any]) -> None:
        faults: list[Outcome] = []
        entries: list[tuple[Batcher, Entry]] = []
        now = self._clock.monotonic()
        for frame in frames:
            if isinstance(frame, Request):
                try:
                    entries.append((self._room_for(frame), self._entry(channel, frame, now)))
                except Exception as error:  # of the user's prepare() or cost()
                    faults.append(Outcome(frame.id, fault=_fault(error)))
        with self._wakeup:
            for room, entry in entries:
                try:
                    room.offer(entry)
                except HeadraceError as error:
                    faults.append(Outcome(entry.item.id, fault=to_fault(error)))
            for frame in frames:
                if isinstance(frame, Cancel):
                    self._cancel((channel, frame.id))
                elif isinstance(frame, Drain):
                    self._unacknowledged.discard(channel)
            self._wakeup.notify()
        if faults:
            channel.send(*faults)

    def _entry(self, channel: Channel, request: Request, now: float) -> Entry:
        item = self._loaded.prepare(decode_value(request.body))
        cost = max(1, request.cost or int(self._loaded.cost(item)))
        call = _Call(channel, request.id, request.trace, item)
        return Entry((channel, request.id), call, cost, now, now + request.deadline_s)

    def _room_for(self, request: Request) -> Batcher:
        if request.stream:
            return self._streams
        return self._alone if request.alone else self._room

    def _cancel(self, key: tuple[Channel, int]) -> None:
        if not any(room.cancel(key) for room in self._rooms):
            self._listening.discard(key)

    def _send(self, channel: Channel, *frames: Any) -> None:
        # A front end that has died waits for nothing; its reader thread cleans up after it.
        with contextlib.suppress(ChannelClosed):
            channel.send(*frames)


class _Speed:
    """How fast the model works while it works: seconds per unit of cost and per item, smoothed over batches."""

    def __init__(self, tokens_per_s: float) -> None:
        self._per_cost = 1 / tokens_per_s if tokens_per_s > 0 else 0.0
        self.item_s = 0.0

    def update(self, batch: list[Entry], run_s: float) -> None:
        self._per_cost = _smooth(self._per_cost, run_s / sum(entry.cost for entry in batch))
        self.item_s = _smooth(self.item_s, run_s / len(batch))

    def time_for(self, cost: int) -> float:
        return cost * self._per_cost


def _closable(steps: Iterable[Any]) -> Generator[Any, None, None]:
    """The steps of a stream; closing this closes a generator of the user's, too."""
    yield from steps


def _smooth(old: float, new: float) -> float:
    return old + _SPEED_SHARE * (new - old) if old else new


class _WorkerMetrics:
    def __init__(self, row: metrics.Row, model: str) -> None:
        self._items = row.counter(metrics.ITEMS, model=model)
        self._queue_wait = row.histogram(metrics.QUEUE_WAIT, model=model)
        self._size = row.histogram(metrics.BATCH_SIZE, model=model)
        self._duration = row.histogram(metrics.BATCH_DURATION, model=model)
        self._padding = row.histogram(metrics.PADDING, model=model)
        self._real = row.counter(metrics.TOKENS, model=model, kind="real")
        self._padded = row.counter(metrics.TOKENS, model=model, kind="padding")
        self.out_of_memory = row.counter(metrics.OUT_OF_MEMORY, model=model)

    def count(self, done: _Done) -> None:
        costs = [entry.cost for entry in done.batch]
        real, total = sum(costs), max(costs) * len(costs)
        self._items.inc(len(costs))
        self._size.observe(len(costs))
        self._duration.observe(done.run_s)
        self._padding.observe(1 - real / total)
        self._real.inc(real)
        self._padded.inc(total - real)
        for entry in done.batch:
            self._queue_wait.observe(done.began - entry.arrived)


def _empty_cache() -> None:
    """Give memory that torch keeps for later back to the device, where the halves of a batch need it now."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _late(ident: int) -> Outcome:
    return Outcome(ident, fault=to_fault(DeadlineExceeded("the deadline passed while the request waited")))


def _fault(error: BaseException) -> Fault:
    """What may be said to the other side; the text of a user's exception travels, the front end decides who sees it."""
    if isinstance(error, HeadraceError):
        return to_fault(error)
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # a broken __str__ is the user's, too
        text = type(error).__name__
    # File names that are no UTF-8 come as lone surrogates, which no frame can carry.
    return Fault(RunnerError.code, text.encode("utf-8", "backslashreplace").decode())
