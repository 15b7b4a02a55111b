"""Asking the admin port of a server on this machine, from a command. The key, where the server has some, comes from
``HEADRACE_API_KEY``; proxies are for other addresses."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from typing import Any

import msgspec

from headrace.errors import Fault, HeadraceError, ServiceError, Unauthorized, from_fault

_HINT = "is the server running, and this its admin port? Its startup message names it"


def ask(url: str, path: str, *, method: str = "GET", timeout_s: float = 5.0) -> bytes:
    """The body of an answer.

    Args:
        url: of the admin port, for example ``http://localhost:8001``.
        path: with its query.

    Raises:
        Unauthorized: the server wants a key.
        HeadraceError: what the server says instead.
        ServiceError: it does not answer, or not as ours do.
    """
    key = os.environ.get("HEADRACE_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        body = b"" if method == "POST" else None
        asked = urllib.request.Request(f"{url.rstrip('/')}{path}", body, headers, method=method)
        with opener.open(asked, timeout=timeout_s) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        if error.code == Unauthorized.status:
            raise Unauthorized("the server wants a key", hint="put it into HEADRACE_API_KEY") from None
        raise _told(url, error.code, error.read()) from None
    except (OSError, ValueError) as error:
        raise ServiceError(f"no answer from {url}: {getattr(error, 'reason', error)}", hint=_HINT) from None


def _told(url: str, status: int, body: bytes) -> HeadraceError:
    try:
        told = msgspec.json.decode(body, type=dict[str, dict[str, Any]])["error"]
        return from_fault(Fault(told["code"], told["message"], told.get("field"), told.get("hint")))
    except (msgspec.MsgspecError, KeyError):
        return ServiceError(f"no answer from {url}: HTTP {status}", hint=_HINT)
