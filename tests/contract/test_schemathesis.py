"""Whatever a generator of requests makes of our OpenAPI document, the server is not at fault: no 500."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings

from conftest import Server

# Models that fail by design, and modules, which alone know the shapes that they take: their 500 is the right answer.
FAIL = {f"/models/{name}/predict" for name in ("picky", "short", "doubler", "linear", "masked", "scripted")}
QUIET = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_no_request_makes_the_server_fail(zoo: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{zoo.url}/openapi.json")
    tried = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path in FAIL:
            continue
        tried.add((operation.method, operation.path))

        @QUIET
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            answer = case.call()
            assert answer.status_code < 500, f"{case.method} {case.path} {case.body!r}: {answer.text}"
            if answer.status_code >= 400:
                assert answer.json()["error"]

        ask()
    assert {("post", "/predict"), ("post", "/models/norm/predict"), ("get", "/health/ready")} <= tried
