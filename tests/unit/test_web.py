"""What every HTTP part shares."""

from __future__ import annotations

import pytest

from headrace.errors import Forbidden, HeadraceError, MethodNotAllowed, Overloaded, Unauthorized, UnsupportedMediaType
from headrace.web import Keys, error_headers, is_json, refuse_other_sites, require_known_type


def test_no_keys_let_everybody_in() -> None:
    assert not Keys("")
    assert not Keys(" , ")
    Keys("").check({})


@pytest.mark.parametrize(
    "headers",
    [{b"authorization": b"Bearer two"}, {b"authorization": b"bearer  two"}, {b"x-api-key": b"one"}],
)
def test_one_of_the_keys_opens(headers: dict[bytes, bytes]) -> None:
    Keys("one, two").check(headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Basic one"},
        {b"x-api-key": b"one, two"},
        {b"x-api-key": b""},
    ],
)
def test_anything_else_does_not(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(Unauthorized):
        Keys("one, two").check(headers)


@pytest.mark.parametrize(
    ("error", "header"),
    [
        (Overloaded("", retry_after_s=1.2), (b"retry-after", b"2")),
        (Overloaded("", retry_after_s=0.1), (b"retry-after", b"1")),
        (Unauthorized(""), (b"www-authenticate", b"Bearer")),
        (MethodNotAllowed(""), (b"allow", b"POST")),
    ],
)
def test_headers_of_errors(error: HeadraceError, header: tuple[bytes, bytes]) -> None:
    assert error_headers(error) == [header]


def test_a_type_is_asked_for() -> None:
    assert is_json(b"application/json; charset=utf-8")
    assert not is_json(b"text/json")
    for kind in (b"", b"text/plain", b"application/x-www-form-urlencoded"):
        with pytest.raises(UnsupportedMediaType):
            require_known_type({b"content-type": kind}, files=True)
    require_known_type({b"content-type": b"application/octet-stream"}, files=True)
    require_known_type({}, binary=True)
    with pytest.raises(Forbidden):
        require_known_type({b"origin": b"https://evil.example", b"host": b"here"}, binary=True)


@pytest.mark.parametrize("origin", [b"null", b"https://evil.example", b"http://here.evil.example"])
def test_pages_of_other_sites_are_refused(origin: bytes) -> None:
    refuse_other_sites({b"host": b"here:8000", b"origin": b"http://here:8000"})
    refuse_other_sites({b"host": b"here:8000"})
    with pytest.raises(Forbidden):
        refuse_other_sites({b"host": b"here:8000", b"origin": origin})
