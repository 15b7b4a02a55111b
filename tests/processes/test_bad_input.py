"""Whatever a client sends: a 4xx that names the field, and nothing for its neighbours to notice."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

from conftest import Server

JSON = {"Content-Type": "application/json"}

CASES: list[tuple[str, str, Any, dict[str, str], int, str, str]] = [
    # name, path, body, headers, status, code, field
    ("wrong type", "/models/classifier/predict", {"input": 3}, {}, 422, "invalid_input", "input"),
    ("wrong type inside", "/models/norm/predict", {"input": {"x": "a", "y": 1}}, {}, 422, "invalid_input", "input.x"),
    ("out of bounds", "/models/norm/predict", {"input": {"x": 1, "y": -1}}, {}, 422, "invalid_input", "input.y"),
    ("missing part", "/models/norm/predict", {"input": {"x": 1}}, {}, 422, "invalid_input", "input"),
    ("missing field", "/models/echo/predict", {}, {}, 422, "invalid_input", "input"),
    ("misspelt field", "/models/echo/predict", {"imput": "a"}, {}, 422, "invalid_input", "input"),
    ("both fields", "/models/echo/predict", {"input": 1, "inputs": [1]}, {}, 422, "invalid_input", "input"),
    ("unknown beside", "/models/echo/predict", {"input": 1, "extra": 1}, {}, 422, "invalid_input", "extra"),
    ("null", "/models/echo/predict", {"input": None}, {}, 422, "invalid_input", "input"),
    ("null body", "/models/echo/predict", b"null", JSON, 422, "invalid_input", "body"),
    ("list body", "/models/echo/predict", [1], {}, 422, "invalid_input", "body"),
    ("empty list", "/models/echo/predict", {"inputs": []}, {}, 422, "invalid_input", "inputs"),
    ("NaN", "/models/echo/predict", b'{"input": {"a": [1, NaN]}}', JSON, 422, "invalid_input", "input.a[1]"),
    ("Infinity", "/models/echo/predict", b'{"input": -Infinity}', JSON, 422, "invalid_input", "input"),
    ("not JSON", "/models/echo/predict", b"{'input': 1}", JSON, 400, "malformed_body", "body"),
    ("empty body", "/models/echo/predict", b"", JSON, 400, "malformed_body", "body"),
    ("not UTF-8", "/models/echo/predict", b'{"input": "\xff"}', JSON, 400, "malformed_body", "body"),
    ("lone surrogate", "/models/echo/predict", rb'{"input": "\ud800"}', JSON, 400, "malformed_body", "body"),
    ("deep nesting", "/models/echo/predict", b'{"input":' + b"[" * 5000, JSON, 400, "malformed_body", "body"),
    ("deep but whole", "/models/echo/predict", b'{"input":' + b"[" * 1000 + b"]" * 1000 + b"}", JSON, 422,
     "invalid_input", "input"),
    ("deep NaN", "/models/echo/predict", b'{"input":' + b"[" * 600 + b"NaN" + b"]" * 600 + b"}", JSON, 400,
     "malformed_body", "body"),
    ("no type", "/models/echo/predict", b'{"input": 1}', {}, 415, "unsupported_media_type", "Content-Type"),
    ("form", "/models/echo/predict", b"input=1", {"Content-Type": "application/x-www-form-urlencoded"}, 415,
     "unsupported_media_type", "Content-Type"),
    ("long text", "/models/echo/predict", {"input": "x" * 1001}, {}, 422, "invalid_input", "input"),
    ("long inner text", "/models/echo/predict", {"input": {"a": ["x" * 1001]}}, {}, 422, "invalid_input", "input.a[0]"),
    ("large body", "/models/echo/predict", {"input": ["x" * 900] * 1300}, {}, 413, "payload_too_large", "body"),
    ("unknown model", "/models/nope/predict", {"input": 1}, {}, 404, "model_not_found", "model"),
    ("token out of range", "/models/classifier/predict", {"input_ids": [10**6]}, {}, 422, "invalid_input", "input_ids"),
    ("token not a number", "/models/classifier/predict", {"input_ids": ["a"]}, {}, 422, "invalid_input", "input_ids"),
    ("huge token", "/models/classifier/predict", {"input_ids": [2**70]}, {}, 422, "invalid_input", "input_ids"),
    ("mask too short", "/models/classifier/predict", {"input_ids": [1, 2], "attention_mask": [1]}, {}, 422,
     "invalid_input", "attention_mask"),
    ("mask of nothing", "/models/classifier/predict", {"input_ids": [1], "attention_mask": [0]}, {}, 422,
     "invalid_input", "attention_mask"),
    ("unknown tensor", "/models/classifier/predict", {"ids": [1]}, {}, 422, "invalid_input", "ids"),
    ("both names", "/models/classifier/predict", {"input_ids": [1], "token_ids": [1]}, {}, 422, "invalid_input",
     "token_ids"),
    ("token type", "/models/classifier/predict", {"input_ids": [5], "token_type_ids": [7]}, {}, 422, "invalid_input",
     "token_type_ids"),
    ("mixed rows", "/models/classifier/predict", {"input_ids": [[1]], "attention_mask": [[1], [1]]}, {}, 422,
     "invalid_input", "attention_mask"),
    ("bad deadline", "/models/echo/predict", {"input": 1}, {"X-Request-Deadline-Ms": "soon"}, 422, "invalid_input",
     "X-Request-Deadline-Ms"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_it_is_refused_by_name(zoo: Server, case: Any) -> None:
    _, path, body, headers, status, code, field = case
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = zoo.client.post(path, headers=headers, **content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["field"], error["retryable"]) == (code, field, False)
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["message"]


@pytest.mark.parametrize("path", ["/predict", "/models/echo/predict", "/v1/embeddings"])
def test_a_get_is_told_to_post(zoo: Server, path: str) -> None:
    answer = zoo.client.get(path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/", "/predict/", "/models//predict", "/models/echo", "/docs/x"])
def test_unknown_paths_have_our_shape(zoo: Server, path: str) -> None:
    answer = zoo.client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] in ("not_found", "model_not_found")
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_health_answers_a_head_and_refuses_a_post(zoo: Server, path: str) -> None:
    assert zoo.client.head(path).status_code == 200
    refused = zoo.client.post(path)
    assert refused.status_code == 405
    assert "GET" in refused.headers["allow"]


def test_each_protocol_has_its_own_shape_of_an_unknown_model(zoo: Server) -> None:
    assert set(zoo.client.get("/v1/models/nope").json()["error"]) == {"message", "type", "param", "code"}
    assert isinstance(zoo.client.get("/v2/models/nope").json()["error"], str)
    assert zoo.client.get("/v2/models/echo/versions/7").status_code == 404


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({"input": "a"}, "model"),
        ({"model": "echo", "input": "a"}, "model"),
        ({"model": "nope", "input": "a"}, "model"),
    ],
)
def test_embeddings_errors_have_openais_shape(zoo: Server, body: Any, parameter: str) -> None:
    answer = zoo.client.post("/v1/embeddings", json=body)
    assert answer.status_code in (404, 422)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["param"] == parameter


def test_neighbours_do_not_notice(zoo: Server) -> None:
    """Good requests of the same moments, to the same model, all succeed while bad ones pour in."""
    stop, good, bad = threading.Event(), [], []

    def pour() -> None:
        with httpx.Client(base_url=zoo.url, timeout=30) as client:
            while not stop.is_set():
                bad.append(client.post("/models/shout/predict", json={"input": 3}).status_code)
                bad.append(client.post("/models/shout/predict", content=b"{", headers=JSON).status_code)
                bad.append(client.post("/models/shout/predict", json={"input": "x" * 2_000_000}).status_code)

    threads = [threading.Thread(target=pour) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(150):
        answer = zoo.predict(f"text {number}", "/models/shout/predict")
        good.append((answer.status_code, answer.json().get("prediction") == f"TEXT {number}"))
    stop.set()
    for thread in threads:
        thread.join()
    assert set(good) == {(200, True)}
    assert set(bad) == {422, 400, 413}


def test_refusals_are_counted_and_are_no_failures_of_the_service(zoo: Server) -> None:
    series = 'headrace_refused_total{model="echo",reason="invalid"}'
    failures = 'headrace_requests_total{model="echo",endpoint="predict",status="error"}'
    before, failed = zoo.metric(series), zoo.metric(failures)
    zoo.predict(None, "/models/echo/predict")
    assert zoo.metric(series) == before + 1
    assert zoo.metric(failures) == failed
