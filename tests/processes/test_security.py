"""Who may come in, and who is not waited for."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from conftest import Server, serving, wait_until
from headrace.serving import protocol

KEY = "correct-horse"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"HEADRACE_API_KEYS": f"other-key, {KEY}"}
    with serving(tmp_path_factory.mktemp("locked"), "models:echo", env=env, ready=False) as server:
        wait_until(lambda: "\nready:" in server.log, 30)
        yield server


PUBLIC = [("POST", "/predict"), ("POST", "/models/echo/predict"), ("POST", "/v1/embeddings"), ("GET", "/v1/models"),
          ("POST", "/v2/models/echo/infer"), ("GET", "/v2/models/echo"), ("GET", "/metrics"), ("GET", "/docs"),
          ("GET", "/openapi.json"), ("GET", "/nothing")]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PUBLIC)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"X-API-Key": KEY[:-1]}])
def test_without_a_key_nothing_is_answered(locked: Server, method: str, path: str, headers: dict[str, str]) -> None:
    answer = locked.client.request(method, path, headers=headers, json={"input": 1} if method == "POST" else None)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    assert "error" in answer.json()


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {"X-API-Key": "other-key"}])
def test_each_key_opens(locked: Server, headers: dict[str, str]) -> None:
    assert locked.client.post("/predict", json={"input": 1}, headers=headers).json()["prediction"] == 1
    assert locked.client.get("/metrics", headers=headers).status_code == 200


def test_health_needs_no_key_and_keys_are_never_logged(locked: Server) -> None:
    assert locked.client.get("/health/live").status_code == 200
    assert locked.client.get("/health/ready").status_code == 200
    assert KEY not in locked.log


def test_the_admin_port_asks_for_a_key_too(locked: Server) -> None:
    assert httpx.get(f"{locked.admin}/admin/workers").status_code == 401
    assert httpx.get(f"{locked.admin}/admin/workers", headers={"X-API-Key": KEY}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"Host": "evil.example"}, "Host"),
        ({"Host": "evil.example:8001"}, "Host"),
        ({"Host": "127.0.0.1.evil.example"}, "Host"),
        ({"Origin": "https://evil.example"}, "Origin"),
        ({"Origin": "null"}, "Origin"),
    ],
)
def test_the_admin_port_answers_this_machine_only(zoo: Server, headers: dict[str, str], field: str) -> None:
    answer = httpx.post(f"{zoo.admin}/admin/reload", headers=headers)
    assert (answer.status_code, answer.json()["error"]["field"]) == (403, field)


def test_the_admin_port_does_not_listen_to_the_network_without_a_key(tmp_path: Path) -> None:
    with serving(tmp_path, "models:echo", "--admin-host", "0.0.0.0", ready=False) as server:
        assert server.process.wait(20) == 2
        assert "without a key" in server.log


def raw(server: Server) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(protocol.HEAD_TIMEOUT_S + 8)
    return connection


def test_a_head_that_does_not_end_is_not_waited_for(zoo: Server) -> None:
    with raw(zoo) as silent, raw(zoo) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n")
        start = time.monotonic()
        assert silent.recv(100) == b""
        assert slow.recv(100) == b""
        assert time.monotonic() - start < protocol.HEAD_TIMEOUT_S + 5


def test_a_head_without_bounds_is_refused(zoo: Server) -> None:
    with raw(zoo) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        answer = b""
        try:
            for _ in range(40):
                connection.sendall(b"X-Padding: " + b"x" * 8000 + b"\r\n")
            answer = connection.recv(100)
        except (BrokenPipeError, ConnectionResetError):
            answer = answer or b"HTTP/1.1 431"
        assert answer.startswith(b"HTTP/1.1 431")


def test_requests_that_follow_one_another_on_a_connection_are_all_answered(zoo: Server) -> None:
    request = (
        b"POST /models/echo/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b'Content-Length: 11\r\n\r\n{"input":1}'
    )
    with raw(zoo) as connection:
        connection.sendall(request * 3)
        received = b""
        while received.count(b'"prediction":1') < 3:
            part = connection.recv(65536)
            assert part
            received += part
