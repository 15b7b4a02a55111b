"""The URL of a task store without what nobody may read: who may be told where it is, and how it is protected.

The password never leaves this module. A URL that cannot be read is not quoted either, since the part that does not fit
is most often a password that has not been percent-encoded.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence

import msgspec

_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\])(?::(?P<port>\d{1,5}))?")
_DEFAULT_PORT, _SENTINEL_PORT = 6379, 26379
# In errors, where a password stood.
HIDDEN = "***"


class Address(msgspec.Struct, frozen=True):
    """Where a store is.

    Args:
        shown: the URL without user, password, database and options.
        hosts: ``host:port`` of each; none of a Unix socket.
        local: whether only this machine can reach it.
        tls: whether the connection is encrypted.
        verified: whether the server's certificate is checked.
        password: whether the URL has one.
        certificate: whether the client shows a certificate of its own.
        problem: why the URL cannot be read; everything else is empty then.
    """

    shown: str = ""
    hosts: Sequence[str] = ()
    local: bool = True
    tls: bool = False
    verified: bool = True
    password: bool = False
    certificate: bool = False
    problem: str = ""


def parse(url: str) -> Address:
    """The parts of a URL that may be shown."""
    scheme, _, rest = url.partition("://")
    end = min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))
    netloc, tail = rest[:end], rest[end:]
    options = urllib.parse.parse_qs(tail.partition("?")[2])
    user, _, hosts = netloc.rpartition("@")
    password = bool(user.partition(":")[2]) or "password" in options
    if scheme == "unix":
        path = urllib.parse.unquote(tail.partition("?")[0])
        return Address(f"unix://{path}", password=password)
    places = [_HOST.fullmatch(host) for host in hosts.split(",")] if hosts else []
    if "@" in tail or not all(places):
        return Address(problem="the URL cannot be read: its host has characters that no host has")
    default = _SENTINEL_PORT if "sentinel" in scheme else _DEFAULT_PORT
    found = [f"{place['name']}:{place['port'] or default}" for place in places if place] or [f"localhost:{default}"]
    return Address(
        f"{scheme}://{','.join(found)}",
        found,
        all(map(_is_local, found)),
        scheme.startswith("rediss"),
        options.get("ssl_cert_reqs", ["required"])[-1] != "none",
        password,
        "ssl_certfile" in options,
    )


def without_secrets(text: str, url: str) -> str:
    """A text about a URL, without what the URL must not tell: it, its user and its passwords."""
    netloc = re.split(r"[/?#]", url.partition("://")[2])[0]
    user = netloc.rpartition("@")[0]
    options = urllib.parse.parse_qs(url.partition("?")[2])
    parts = {url, user, *user.split(":", 1)}
    parts |= {value for name, values in options.items() if "password" in name for value in values}
    parts |= {form for part in parts for form in (urllib.parse.unquote(part), urllib.parse.quote(part, safe=""))}
    for part in sorted(filter(None, parts), key=len, reverse=True):
        text = text.replace(part, HIDDEN)
    return text


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0].strip("[]")
    return name == "localhost" or name == "::1" or name.startswith("127.")
