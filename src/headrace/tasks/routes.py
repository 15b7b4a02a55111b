"""Tasks over HTTP: the endpoints under ``/agent``, with server-sent events and WebSocket.

Bodies are read by hand, as on the hot path of serving: one shape of errors, whatever is wrong with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import math
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec
import orjson
from fastapi import APIRouter, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.websockets import WebSocketDisconnect

from headrace.config import Config
from headrace.errors import DeadlineExceeded, HeadraceError, InvalidInput, TaskNotFound
from headrace.tasks.delivery import RedisError
from headrace.tasks.gateway import Gateway
from headrace.tasks.store import Event, Task, from_json
from headrace.web import error_object, parse_json, read_body, refuse_other_sites, require_json_post

_POLL_MS = 1000
# Codes of a WebSocket that is closed for a reason of ours: 4000 and the HTTP status.
_CLOSE = 4000
_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # nginx would collect the events otherwise
# Errors that a task ends with and that say something else than "the agent failed".
_STATUS = {"deadline_exceeded": 504, "invalid_input": 422, "not_ready": 503}


def add_routes(app: FastAPI, gateway: Gateway, config: Config) -> None:
    """Serve the tasks of a gateway."""
    router = APIRouter(prefix="/agent", tags=["agents"])
    body: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/json": {"schema": _SUBMIT}}}}

    async def read(request: Request) -> Any:
        headers = dict(request.scope["headers"])
        require_json_post(request.method, headers)
        return parse_json(await read_body(headers, request.receive, config.max_body_bytes))

    @router.post("/submit", status_code=202, summary="Start a task", openapi_extra=body)
    async def submit(request: Request) -> JSONResponse:
        ident, state = await gateway.submit(
            await read(request),
            owner=owner_of(request.scope),
            idempotency_key=request.headers.get("idempotency-key", ""),
        )
        return JSONResponse({"task_id": ident, "status": state}, 202, {"location": f"/agent/status/{ident}"})

    @router.post("/run", summary="Start a task and wait for its result", openapi_extra=body)
    async def run(request: Request) -> JSONResponse:
        wait_s = _wait_s(request, config.request_timeout_s)
        owner = owner_of(request.scope)
        ident, _ = await gateway.submit(
            await read(request), owner=owner, idempotency_key=request.headers.get("idempotency-key", "")
        )
        try:
            async with asyncio.timeout(wait_s):
                task = await _until_ended(gateway, ident, owner)
        except TimeoutError:
            late = DeadlineExceeded(
                f"task {ident} is not done yet; it goes on", hint=f"GET /agent/status/{ident} has its result later"
            )
            return JSONResponse({"error": error_object(late, _request_id(request)), "task_id": ident}, late.status)
        return _run_answer(task, _request_id(request))

    @router.get("/status/{ident}", summary="A task as it is now")
    async def status(request: Request, ident: str) -> dict[str, Any]:
        return describe(await gateway.get(ident, owner_of(request.scope)))

    @router.get("/tasks", summary="Tasks, the newest first")
    async def tasks(
        request: Request, status: str = "", agent: str = "", after: str = "", limit: int = 50
    ) -> dict[str, Any]:
        found, further = await gateway.tasks(
            owner_of(request.scope), status=status, agent=agent, after=after, limit=limit
        )
        return {"tasks": [describe(task) for task in found], "next": further}

    @router.post("/cancel/{ident}", summary="End a task")
    async def cancel(request: Request, ident: str) -> dict[str, Any]:
        refuse_other_sites(dict(request.scope["headers"]))
        return describe(await gateway.cancel(ident, owner_of(request.scope)))

    @router.post("/retry/{ident}", summary="Run a failed or cancelled task once more", status_code=202)
    async def retry(request: Request, ident: str, fresh: bool = False) -> dict[str, Any]:
        refuse_other_sites(dict(request.scope["headers"]))
        return describe(await gateway.retry(ident, owner_of(request.scope), fresh=fresh))

    answer_body = {"requestBody": {"required": True, "content": {"application/json": {"schema": _ANSWER}}}}

    @router.post("/input/{ident}", summary="Answer what a task asks", status_code=202, openapi_extra=answer_body)
    async def answer(request: Request, ident: str) -> dict[str, Any]:
        given = await read(request)
        if not isinstance(given, dict) or set(given) != {"input"}:
            raise InvalidInput("must be an object with input", field="body", hint='for example {"input": true}')
        return describe(await gateway.answer(ident, owner_of(request.scope), given["input"]))

    @router.get("/events/{ident}", summary="Events of a task as they happen (server-sent events, AG-UI)")
    async def events(request: Request, ident: str, after: str = "") -> StreamingResponse:
        after = request.headers.get("last-event-id", "") or after
        stream = await gateway.events(ident, owner_of(request.scope), after)
        return StreamingResponse(_server_sent(stream), headers=_STREAM_HEADERS, media_type="text/event-stream")

    @router.websocket("/ws/{ident}")
    async def websocket(socket: WebSocket, ident: str, after: str = "") -> None:
        await socket.accept()
        try:
            refuse_other_sites(dict(socket.scope["headers"]))
            await _watch(socket, gateway, ident, after)
        except HeadraceError as error:
            await _close(socket, error)
        except (RedisError, TimeoutError):
            await socket.close(1012)  # come back: another gateway, or this one in a moment
        except (WebSocketDisconnect, RuntimeError):  # it hung up, perhaps while we were sending
            return

    @app.get("/agents", tags=["agents"], summary="The agents there are, and what they take")
    async def agents() -> dict[str, Any]:
        return {
            "agents": [
                {
                    "name": spec.name,
                    "description": spec.description,
                    "priority": spec.priority,
                    "input": msgspec.json.decode(bytes(spec.schema)),
                }
                for spec in (await gateway.specs()).values()
            ]
        }

    app.include_router(router)


def owner_of(scope: Any) -> str:
    """Whose tasks a request may see: a digest of its key, empty where the server asks for none."""
    key = scope.get("headrace.key", b"")
    return hashlib.sha256(b"owner:" + key).hexdigest()[:32] if key else ""


def describe(task: Task) -> dict[str, Any]:
    """A task as clients see it."""
    shown: dict[str, Any] = {
        "task_id": task.id,
        "agent": task.agent,
        "status": task.state,
        "result": from_json(task.result) if task.result is not None else None,
        "error": from_json(task.error) if task.error is not None else None,
        "attempt": task.attempt,
        "steps": task.steps,
        "priority": task.lane,
        "model": task.model or None,
        "created_at": _time(task.created_at),
        "updated_at": _time(task.updated_at),
        "deadline": _time(task.deadline),
        "ttl_ms": task.ttl_ms,
        "poll_interval_ms": _POLL_MS,
    }
    if task.ask is not None:
        ask = from_json(task.ask)
        shown["input_required"] = {"prompt": ask["prompt"], "schema": ask["schema"]}
    return shown


async def _until_ended(gateway: Gateway, ident: str, owner: str) -> Task:
    """The task once it has ended, or waits for an input."""
    after = ""
    while True:
        with contextlib.suppress(RedisError):  # an outage: the task goes on, and so does its watcher
            async with contextlib.aclosing(await gateway.events(ident, owner, after)) as events:
                async for event in events:
                    if event is None:
                        continue
                    after = event.id
                    if event.payload.startswith(b'{"type":"CUSTOM"') and b'"name":"input_required"' in event.payload:
                        break
            task = await gateway.get(ident, owner)
            if task.ended or task.ask is not None:
                return task
        await asyncio.sleep(0.2)


def _run_answer(task: Task, request_id: str | None) -> JSONResponse:
    if task.state == "completed":
        return JSONResponse({"result": from_json(task.result or b"null"), "task_id": task.id})
    if task.ask is not None:
        return JSONResponse(describe(task), 202)
    problem = from_json(task.error or b'{"code":"cancelled","message":"it was cancelled"}')
    status = 409 if task.state == "cancelled" else _STATUS.get(problem["code"], 500)
    error = {**problem, "retryable": False, "request_id": request_id}
    return JSONResponse({"error": error, "task_id": task.id}, status)


async def _server_sent(stream: AsyncGenerator[Event | None, None]) -> AsyncIterator[bytes]:
    try:
        async with contextlib.aclosing(stream) as events:
            async for event in events:
                if event is None:
                    yield b": still at work\n\n"
                else:
                    yield b"id: %b\ndata: %b\n\n" % (event.id.encode(), event.payload)
    except (RedisError, TimeoutError):
        # The client comes back with the id of its last event, here or elsewhere.
        yield b": the task store is away; come back\n\nretry: 1000\n\n"


async def _watch(socket: WebSocket, gateway: Gateway, ident: str, after: str) -> None:
    owner = owner_of(socket.scope)
    task = await gateway.get(ident, owner)
    stream = await gateway.events(ident, owner, after)
    shown = describe(task)
    await _send(socket, {"type": "STATE_SNAPSHOT", "snapshot": shown, **shown})
    hung_up = asyncio.ensure_future(_until_hung_up(socket))
    try:
        async with contextlib.aclosing(stream) as events:
            while True:
                coming = asyncio.ensure_future(_next(events))
                await asyncio.wait({coming, hung_up}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
                    return
                more, event = coming.result()
                if not more:
                    break
                if event is not None:
                    await _send(socket, await _frame(gateway, ident, owner, event))
    finally:
        hung_up.cancel()
    await socket.close(1000)


async def _next(events: AsyncGenerator[Event | None, None]) -> tuple[bool, Event | None]:
    try:
        return True, await anext(events)
    except StopAsyncIteration:
        return False, None


async def _frame(gateway: Gateway, ident: str, owner: str, event: Event) -> dict[str, Any]:
    """An event as a frame; one that changes the task's state carries the task as well."""
    frame = {"id": event.id, **orjson.loads(event.payload)}
    return {**describe(await gateway.get(ident, owner)), **frame} if _changes_state(frame) else frame


def _changes_state(event: dict[str, Any]) -> bool:
    return event["type"].startswith("RUN_") or (
        event["type"] == "CUSTOM" and event["name"] in ("queued", "retried", "input_required", "input_received")
    )


async def _until_hung_up(socket: WebSocket) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            await socket.receive_text()


async def _send(socket: WebSocket, frame: dict[str, Any]) -> None:
    await socket.send_text(orjson.dumps(frame).decode())


async def _close(socket: WebSocket, error: HeadraceError) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        await _send(socket, {"error": error_object(error)})
        await socket.close(4404 if isinstance(error, TaskNotFound) else _CLOSE + error.status)


def _wait_s(request: Request, limit_s: float) -> float:
    given = request.headers.get("x-request-deadline-ms")
    if given is None:
        return limit_s
    try:
        asked_s = float(given) / 1000
    except ValueError:
        asked_s = 0.0
    if not 0 < asked_s < math.inf:
        raise InvalidInput("must be a positive number of milliseconds", field="X-Request-Deadline-Ms")
    return min(limit_s, asked_s)


def _request_id(request: Request) -> str | None:
    found: str | None = request.scope.get("headrace.request_id")
    return found


def _time(milliseconds: int) -> str:
    at = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


_SUBMIT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "agent": {"type": "string", "description": "may be left out when there is one"},
        "message": {"type": "string", "description": "a text, for the agent's only or first text parameter"},
        "input": {"description": "the agent's whole input; see /agents"},
        "priority": {"type": "string", "enum": ["interactive", "default", "batch"]},
        "timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": 31536000},
        "model": {"type": "string", "maxLength": 200, "description": "for agents that let the client choose"},
    },
}
_ANSWER: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"input": {"description": "what the task asks for; its status has the schema"}},
    "required": ["input"],
}
