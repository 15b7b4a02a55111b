"""A server of OpenAI's chat protocol that says what is written for it, on loopback, and remembers what it was asked.

Which line of a script comes next is told by the conversation itself: by how often the assistant has spoken in it. So a
request that is made twice is answered alike, and seen in `asked`.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOLD_S = 25.0


@dataclass
class Line:
    """One response.

    Args:
        hold: a stream says its first word and waits until this is set.
    """

    text: str = ""
    calls: Sequence[tuple[str, dict[str, Any]]] = ()
    status: int = 200
    hold: threading.Event | None = None


@dataclass
class ScriptedLLM:
    """Scripts by model. ``asked`` counts by model, the user's message and the number of the line."""

    scripts: dict[str, list[Line]] = field(default_factory=dict)
    asked: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> ScriptedLLM:
        llm = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                line = llm._next(body)
                try:
                    if line.status != 200:
                        self._answer_json(line.status, _refusal(self.headers["Authorization"]))
                    elif body.get("stream"):
                        self._answer_stream(_chunks(body["model"], line), line.hold)
                    else:
                        self._answer_json(200, _whole(body["model"], line))
                except ConnectionError:
                    self.close_connection = True  # whoever asked has been killed

            def _answer_json(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _answer_stream(self, chunks: Iterator[dict[str, Any]], hold: threading.Event | None) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                for number, chunk in enumerate(chunks):
                    if hold is not None and number == 2:
                        hold.wait(HOLD_S)
                    self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="scripted llm")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for line in [line for lines in self.scripts.values() for line in lines]:
            if line.hold is not None:
                line.hold.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def _next(self, body: dict[str, Any]) -> Line:
        messages = body["messages"]
        number = sum(each["role"] == "assistant" for each in messages)
        first = next(each["content"] for each in messages if each["role"] == "user")
        self.asked[body["model"], first, number] += 1
        self.bodies.append(body)
        return self.scripts[body["model"]][number]


def _refusal(authorization: str) -> dict[str, Any]:
    """As providers do it: with the key."""
    key = authorization.removeprefix("Bearer ")
    return {"error": {"message": f"Incorrect API key provided: {key}.", "type": "invalid_request_error", "code": key}}


def _whole(model: str, line: Line) -> dict[str, Any]:
    message = {"role": "assistant", "content": line.text or None}
    if line.calls:
        message["tool_calls"] = _calls(line)
    return _frame(model, "chat.completion", message=message, finish_reason=_reason(line)) | {"usage": _USAGE}


def _chunks(model: str, line: Line) -> Iterator[dict[str, Any]]:
    kind = "chat.completion.chunk"
    yield _frame(model, kind, delta={"role": "assistant", "content": ""}, finish_reason=None)
    for word in line.text.split(" ") if line.text else ():
        yield _frame(model, kind, delta={"content": word + " "}, finish_reason=None)
    for index, call in enumerate(_calls(line)):
        yield _frame(model, kind, delta={"tool_calls": [{"index": index, **call}]}, finish_reason=None)
    yield _frame(model, kind, delta={}, finish_reason=_reason(line))
    yield _frame(model, kind) | {"choices": [], "usage": _USAGE}


_USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}


def _frame(model: str, kind: str, **choice: Any) -> dict[str, Any]:
    return {
        "id": "scripted",
        "object": kind,
        "created": 1_700_000_000,
        "model": model,
        "choices": [{"index": 0, **choice}],
    }


def _calls(line: Line) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call-{index}",  # the same in every response, as some servers do it
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for index, (name, arguments) in enumerate(line.calls)
    ]


def _reason(line: Line) -> str:
    return "tool_calls" if line.calls else "stop"
