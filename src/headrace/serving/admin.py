"""The admin port: what runs here, reload, scale, profiles. For people and programs of this machine, not for clients."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import msgspec
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response

from headrace import metrics
from headrace.config import Config
from headrace.errors import ClientGone, Draining, InvalidInput
from headrace.serving.fleet import Fleet
from headrace.serving.profiles import FORMATS, Profiles
from headrace.version import __version__
from headrace.web import Guard, make_app, parse_json, require_json_post

_T = TypeVar("_T")


class _Scale(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /admin/scale``."""

    model: str
    workers: int


def admin_app(
    config: Config,
    fleet: Fleet,
    reload: Callable[[], Awaitable[dict[str, Any]]],
    reader: metrics.Reader,
    profiles: Profiles,
) -> Any:
    """The application of the admin port.

    Args:
        reload: reads the configuration again and replaces the workers.
        profiles: of all processes.
    """
    app: FastAPI = make_app("headrace admin", __version__)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        content, kind = reader.answer(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": kind})

    @app.get("/admin/workers")
    async def workers() -> dict[str, Any]:
        return {"workers": fleet.describe(), "processes": profiles.processes()}

    @app.post("/admin/profile")
    async def profile(request: Request) -> Response:
        wanted = profiles.parse(request.query_params)
        drawn = await _while_connected(request, profiles.take(wanted))
        return Response(drawn, headers={"content-type": FORMATS[wanted.format]})

    @app.post("/admin/reload")
    async def reload_all() -> dict[str, Any]:
        return {"models": await reload()}

    @app.post("/admin/scale")
    async def scale(request: Request) -> dict[str, Any]:
        require_json_post(request.method, dict(request.scope["headers"]))
        try:
            body = msgspec.convert(parse_json(await request.body()), _Scale)
        except msgspec.ValidationError as error:
            raise InvalidInput(str(error), field="body", hint='for example {"model": "minilm", "workers": 2}') from None
        await fleet.scale(body.model, body.workers)
        return {"workers": fleet.describe()}

    return Guard(app, keys=config.api_keys, hosts={config.admin_host})


async def _while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What comes of some work. When the client hangs up, it is cancelled."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client has closed the connection")
        return working.result()
    except asyncio.CancelledError:  # by nobody but the end of the server
        raise Draining("the server is ending") from None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class AdminServer(uvicorn.Server):
    """uvicorn inside the supervisor's loop: signals stay the supervisor's."""

    def __init__(self, app: Any, listener: socket.socket) -> None:
        # Something of the console may be streaming; it must not hold up the end.
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=1
            )
        )
        self._listener = listener

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def run_until_stopped(self) -> None:
        await self.serve(sockets=[self._listener])

    def stop(self) -> None:
        self.should_exit = True
