"""What is taken out of lines that others read."""

from __future__ import annotations

import pytest

from headrace import log


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-abcdefghijklmnopqrstuvwx",
        "hf_abcdefghijklmnopqrstuvwxyz",
        "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    ],
)
def test_keys_of_providers_are_taken_out(secret: str) -> None:
    assert log.redact(f"401: {secret} is wrong") == "401: [redacted] is wrong"


def test_passwords_in_urls_and_headers_are_taken_out() -> None:
    assert log.redact("redis://:hunter2@host:6379/0") == "redis://[redacted]@host:6379/0"
    assert log.redact("Authorization: Bearer abcdefgh12345") == "Authorization: Bearer [redacted]"


def test_ordinary_text_stays_as_it_is() -> None:
    text = "http://localhost:8000/v1 took 3 s; task 0dce0289a3924e0fa121d53562026ca2, skill-based"
    assert log.redact(text) == text
