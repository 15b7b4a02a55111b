"""The events of all watched tasks through one connection, however many clients watch.

Events are announced on a channel per task; the stream of the task is the truth. A watcher reads the stream from where
its client left off, then follows the announcements, and goes back to the stream whenever it may have missed one: their
numbers are consecutive.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
from collections.abc import AsyncGenerator

from headrace.tasks.delivery import RedisConnection, RedisError
from headrace.tasks.store import Event, Store, events_channel

_log = logging.getLogger(__name__)

# A client that reads more slowly goes back to the stream instead of holding more in memory.
_MOST_WAITING = 256
# A watcher that hears nothing looks into the stream this often; its client gets a sign of life.
IDLE_S = 15.0
_RECONNECT_S = 0.5
_CONFIRM_S = 5.0
_FINAL = (b'{"type":"RUN_FINISHED"', b'{"type":"RUN_ERROR"')


def is_final(payload: bytes) -> bool:
    """Whether an event is the last one of its task."""
    return payload.startswith(_FINAL)


class _Watcher:
    def __init__(self) -> None:
        self.waiting: collections.deque[Event] = collections.deque()
        self.behind = False
        self._news = asyncio.Event()

    def tell(self, event: Event) -> None:
        if len(self.waiting) >= _MOST_WAITING:
            self.fall_behind()
        else:
            self.waiting.append(event)
            self._news.set()

    def fall_behind(self) -> None:
        self.waiting.clear()
        self.behind = True
        self._news.set()

    async def wait(self) -> bool:
        """False when nothing came for `IDLE_S`."""
        if not self.waiting and not self.behind:
            self._news.clear()
            try:
                async with asyncio.timeout(IDLE_S):
                    await self._news.wait()
            except TimeoutError:
                return False
        return True


class Hub:
    """All watchers of one gateway."""

    def __init__(self, connection: RedisConnection, store: Store) -> None:
        self._connection = connection
        self._store = store
        self._watchers: dict[str, set[_Watcher]] = {}
        self._confirmed: dict[str, asyncio.Event] = {}
        self._subscription: object | None = None
        self._closed = False

    @property
    def watchers(self) -> int:
        return sum(map(len, self._watchers.values()))

    def close(self) -> None:
        """End all watching, now and from now on."""
        self._closed = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.fall_behind()

    async def run(self) -> None:
        """Listen for ever, through outages."""
        while True:
            try:
                async with self._connection.pubsub() as subscription:
                    # It cannot be listened to without a channel. And this connects it: were watchers to use it before,
                    # each would open a connection, and what all but the last had subscribed to would never be heard.
                    await subscription.subscribe("{hr}:nothing")
                    self._subscription = subscription
                    await self._listen(subscription)
            except (RedisError, OSError) as error:
                _log.warning("lost the events of the task store: %s; watchers go on when it is back", error)
            finally:
                self._subscription = None
                for event in self._confirmed.values():
                    event.clear()
            await asyncio.sleep(_RECONNECT_S)

    async def watch(self, ident: str, after: str = "0-0") -> AsyncGenerator[Event | None, None]:
        """Events of a task past a stream id, in order, each once; ``None`` as a sign of life while there are none.

        It ends with the final event. Raises `RedisError` while the store is away and something has to be read from it.
        """
        channel, watcher = events_channel(ident), _Watcher()
        self._watchers.setdefault(channel, set()).add(watcher)
        try:
            await self._subscribe(channel)
            last, number = after, 0
            while not self._closed:
                watcher.behind = False
                while events := await self._store.events(ident, last):
                    for event in events:
                        last, number = event.id, event.number
                        yield event
                        if is_final(event.payload):
                            return
                while not watcher.behind:
                    if not await watcher.wait():
                        yield None
                        break
                    while watcher.waiting and not watcher.behind:
                        event = watcher.waiting.popleft()
                        if _order(event.id) <= _order(last):
                            continue
                        if event.number != number + 1:
                            watcher.fall_behind()
                            break
                        last, number = event.id, event.number
                        yield event
                        if is_final(event.payload):
                            return
        finally:
            watchers = self._watchers[channel]
            watchers.discard(watcher)
            if not watchers:
                del self._watchers[channel]
                self._confirmed.pop(channel, None)
                with contextlib.suppress(RedisError, OSError):
                    if self._subscription is not None:
                        await self._subscription.unsubscribe(channel)  # type: ignore[attr-defined]

    async def _subscribe(self, channel: str) -> None:
        """Hear a channel before its stream is read, so that nothing falls between. Without it the stream is looked at
        again and again (`IDLE_S`)."""
        confirmed = self._confirmed.get(channel)
        if confirmed is None:
            confirmed = self._confirmed[channel] = asyncio.Event()
            if self._subscription is not None:
                await self._subscription.subscribe(channel)  # type: ignore[attr-defined]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CONFIRM_S):
                await confirmed.wait()

    async def _listen(self, subscription: object) -> None:
        if self._confirmed:
            await subscription.subscribe(*self._confirmed)  # type: ignore[attr-defined]
        while True:
            message = await subscription.get_message(timeout=30.0)  # type: ignore[attr-defined]
            if message is None:
                continue
            channel = message["channel"].decode()
            if message["type"] == "subscribe":
                if channel in self._confirmed:
                    self._confirmed[channel].set()
                # What was said before it is in the stream only.
                for watcher in self._watchers.get(channel, ()):
                    watcher.fall_behind()
            elif message["type"] == "message":
                ident, number, payload = message["data"].split(b" ", 2)
                event = Event(ident.decode(), int(number), payload)
                for watcher in self._watchers.get(channel, ()):
                    watcher.tell(event)


def _order(ident: str) -> tuple[int, int]:
    """A stream id as something that can be compared."""
    milliseconds, _, count = ident.partition("-")
    return int(milliseconds), int(count or 0)
