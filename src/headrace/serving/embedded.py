"""headrace inside another ASGI server or application: the front end as an application, the workers beside it.

    ml = hr.App("my_models:Sentiment")

    app = FastAPI(lifespan=ml.lifespan)
    app.mount("/ml", ml)

or ``uvicorn headrace.asgi:app``, ``gunicorn -w 4 -k uvicorn_worker.UvicornWorker headrace.asgi:app``. However many
processes serve the application, there is one set of model workers (`pool.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

from headrace import metrics
from headrace.config import Config
from headrace.errors import ConfigError
from headrace.machine import watch_loop, watch_processes
from headrace.rundir import RunDir
from headrace.serving.app import FrontEnd
from headrace.serving.router import Router
from headrace.web import Receive, Scope, Send

_log = logging.getLogger(__name__)

# How soon a pool that has died is replaced; the lock tells that it has.
_LOOK_S = 1.0


class EmbeddedFrontEnd:
    """An ASGI application that serves models.

    Args:
        config: must name at least one model; everything about ports and processes is the host server's affair.

    It starts with its `lifespan`, or else with the first request. It is not to be used in more than one event loop.
    """

    def __init__(self, config: Config) -> None:
        if not config.models:
            raise ConfigError(
                "no model to serve", field="target", hint="name a target, or [models.NAME] in headrace.toml"
            )
        self._config = config
        self._starting = asyncio.Lock()
        self._front: FrontEnd | None = None
        self._run_dir: RunDir | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._watching: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._serve_lifespan(receive, send)
            return
        if self._front is None:
            await self.start()
        assert self._front
        await self._front(scope, receive, send)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any = None) -> AsyncIterator[None]:
        """For ``FastAPI(lifespan=…)`` of the application that this one is mounted in, which does not pass it on."""
        await self.start()
        try:
            yield
        finally:
            await self.stop()

    async def start(self) -> None:
        """Join the application's other processes, or be the first: start the workers. Does not wait for them."""
        async with self._starting:
            if self._front is not None:
                return
            self._run_dir = await RunDir.join(self._config)
            slot, row_file = self._run_dir.take_slot()
            row = metrics.Row(row_file)
            router = Router(self._config, self._run_dir, row, self._run_dir.slots_taken)
            front = FrontEnd(self._config, router, row, metrics.Reader(self._run_dir.metrics))
            _log.debug("this process is %s", slot)
            self._keeper = asyncio.ensure_future(_keep_pool(self._run_dir, self._config))
            watched = (watch_loop(row, slot), watch_processes(row, lambda: {slot: os.getpid()}))
            self._watching = [asyncio.ensure_future(each) for each in watched]
            await front.start()
            self._front = front

    async def stop(self) -> None:
        """Leave. The workers end when the last process has left."""
        if self._front is None or self._keeper is None or self._run_dir is None:
            return
        for each in (self._keeper, *self._watching):
            each.cancel()
        await self._front.stop()
        self._run_dir.leave()
        self._front = self._keeper = None

    async def _serve_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.start()
        except Exception as error:
            _log.exception("headrace cannot start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})


async def _keep_pool(run_dir: RunDir, config: Config) -> None:
    """Start the workers' process whenever nobody holds the directory's lock."""
    pool: subprocess.Popen[bytes] | None = None
    pause_s = _LOOK_S
    while True:
        if pool is not None:
            pool.poll()
        lock = run_dir.try_lock()
        if lock is not None:
            run_dir.prepare(config)
            pool = _start_pool(run_dir, lock)
            os.close(lock)
            # What ends again and again is started less and less often.
            pause_s = min(30.0, pause_s * 2)
        await asyncio.sleep(_LOOK_S if lock is None else pause_s)


def _start_pool(run_dir: RunDir, lock: int) -> subprocess.Popen[bytes]:
    # In a session of its own, so that a signal to the application's group does not reach it.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "headrace.serving.pool", str(run_dir.path), str(lock)],
        pass_fds=(lock,),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
