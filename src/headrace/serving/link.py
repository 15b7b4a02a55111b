"""A front end's connection to one worker, and the requests that are on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from headrace.core import Beat, Cancel, Drain, Frame, Hello, ModelInfo, Outcome, Request, Workload
from headrace.errors import ClientGone, DeadlineExceeded, HeadraceError
from headrace.ipc import ChannelClosed, FrameDecoder, encode_frames

if TYPE_CHECKING:
    from headrace.serving.router import Route, Router

_log = logging.getLogger(__name__)

# A client that reads a stream so many chunks too slowly is given up: what it does not read would fill the memory.
_MOST_UNREAD_CHUNKS = 10_000


class Pending:
    """A request that has been accepted and not yet answered."""

    __slots__ = (
        "_chunks",
        "began",
        "body",
        "cost",
        "deadline",
        "future",
        "id",
        "info",
        "link",
        "retried",
        "timer",
        "trace",
    )

    def __init__(self, ident: int, body: bytes, cost: int, deadline: float, trace: str, info: ModelInfo) -> None:
        self.id = ident
        self.body = body
        self.cost = cost
        self.deadline = deadline
        self.trace = trace
        self.info = info
        self.future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.timer: asyncio.TimerHandle | None = None
        self.link: Link | None = None
        self.began = False
        self.retried = False
        self._chunks: asyncio.Queue[Outcome | HeadraceError] | None = None

    def as_stream(self) -> None:
        """Ask for the answer in chunks, before it is sent; read them with `next_chunk` instead of ``future``."""
        self._chunks = asyncio.Queue()

    @property
    def streams(self) -> bool:
        return self._chunks is not None

    async def next_chunk(self) -> Outcome:
        """The next chunk; the last has ``last`` set. Raises what the future would."""
        assert self._chunks is not None
        chunk = await self._chunks.get()
        if isinstance(chunk, HeadraceError):
            raise chunk
        return chunk

    def abandon(self) -> None:
        """The client has gone: whoever awaits this request gets `ClientGone`, and the worker is told."""
        self.fail(ClientGone("the client closed the connection"))

    def expire(self) -> None:
        self.fail(DeadlineExceeded("no answer within the request's deadline"))

    def resolve(self, outcome: Outcome) -> None:
        if self._chunks is not None:
            self._chunks.put_nowait(outcome)
            if self._chunks.qsize() > _MOST_UNREAD_CHUNKS:
                self.abandon()
        if not self.future.done():
            self.future.set_result(outcome)

    def fail(self, error: HeadraceError) -> None:
        if self._chunks is not None:
            self._chunks.put_nowait(error)
        if not self.future.done():
            self.future.set_exception(error)


class Link(asyncio.Protocol):
    """The connection to one worker. Frames of one loop tick leave in one write."""

    def __init__(self, router: Router, on_lost: Callable[[], None] = lambda: None) -> None:
        self._router = router
        self._on_lost = on_lost
        self._decoder = FrameDecoder()
        self._outgoing: list[Frame] = []
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._route: Route | None = None
        self._work = Workload()
        self._work_at = 0.0
        self._sent_since = 0
        self.info: ModelInfo | None = None
        self.pending: dict[int, Pending] = {}
        self.cost = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._decoder.feed(data):
                self._receive(frame)
        except ChannelClosed as error:
            _log.error("a worker sent rubbish (%s); closing the connection to it", error)
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._on_lost()
        if self._route:
            self._route.remove(self)

    def takes(self, info: ModelInfo) -> bool:
        """Whether the worker understands what was prepared for a worker with ``info``: it may be of another version."""
        mine = self.info
        return mine is info or (mine is not None and mine.text == info.text and mine.item_schema == info.item_schema)

    def backlog_s(self) -> float:
        """Seconds until the worker would be through with all that it has; 0 while that is unknown."""
        left_s = max(0.0, self._work.backlog_s - (self._loop.time() - self._work_at))
        return left_s + self._sent_since * self._work.item_s

    def batch_ends_in_s(self) -> float:
        return max(0.0, self._work.batch_s - (self._loop.time() - self._work_at))

    @property
    def item_s(self) -> float:
        return self._work.item_s

    def send(self, pending: Pending) -> None:
        pending.link = self
        self.pending[pending.id] = pending
        self.cost += pending.cost
        self._sent_since += 1
        left_s = max(0.0, pending.deadline - self._loop.time())
        self._write(
            Request(pending.id, pending.body, pending.cost, left_s, pending.trace, pending.retried, pending.streams)
        )

    def forget(self, ident: int) -> Pending | None:
        pending = self.pending.pop(ident, None)
        if pending:
            self.cost -= pending.cost
        return pending

    def cancel(self, ident: int) -> None:
        if self.forget(ident):
            self._write(Cancel(ident))

    def close(self) -> None:
        if self._transport:
            self._transport.abort()

    def _receive(self, frame: Frame) -> None:
        if isinstance(frame, Hello):
            if frame.model is None or (route := self._router.routes.get(frame.model.name)) is None:
                self.close()  # of a model that a reload has just taken away
                return
            self._route, self.info = route, frame.model
            route.add(self)
        elif self._route is None:
            raise ChannelClosed("a hello comes first")
        elif isinstance(frame, Outcome):
            pending = self.forget(frame.id) if frame.last else self.pending.get(frame.id)
            if pending:
                self._route.mark_begun(pending)
                pending.resolve(frame)
        elif isinstance(frame, Beat):
            for ident in frame.began:
                if found := self.pending.get(ident):
                    self._route.mark_begun(found)
            if frame.work:
                self._work, self._work_at, self._sent_since = frame.work, self._loop.time(), 0
        elif isinstance(frame, Drain):
            self._route.retire(self)
            self._write(Drain())

    def _write(self, frame: Frame) -> None:
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(frame)

    def _flush(self) -> None:
        if self._transport:
            self._transport.write(encode_frames(self._outgoing))
        self._outgoing.clear()
