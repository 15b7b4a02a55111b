"""Our own protocol: ``input`` is one item, ``inputs`` a list, named tensors stand directly in the body.

Files come as raw bytes or as a multipart form, answers in chunks as server-sent events.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import orjson

from headrace.core import Timings
from headrace.errors import HeadraceError, InvalidInput, MalformedBody, RunnerError
from headrace.runners.text import ALIASES
from headrace.serving.items import Item, ItemReader
from headrace.web import error_object

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


@dataclass(frozen=True)
class Wanted:
    """The items of a body as the client wrote them, before any of them is looked at.

    Args:
        values: one each.
        places: how each is named in errors.
        many: whether the client sent a list, and gets one.
        named: whether each value is a dictionary of tensors by name.
    """

    values: list[Any]
    places: list[str]
    many: bool = False
    named: bool = False

    async def read(self, index: int, reader: ItemReader) -> Item:
        """Check and encode one item. Raises `InvalidInput`."""
        if not self.named:
            return await reader.read(self.values[index], self.places[index])
        try:
            return reader.read_tensors(self.values[index])
        except HeadraceError as error:
            if self.many and error.field:
                error.field = f"{error.field.removeprefix('input.')}[{index}]"
            raise


def parse(body: Any) -> Wanted:
    """The items of a decoded JSON body.

    Raises:
        InvalidInput: the body is none of ours.
    """
    if not isinstance(body, dict):
        raise InvalidInput('the body must be an object such as {"input": …}', field="body")
    if "input" in body or "inputs" in body:
        return _parse_inputs(body)
    if not body or not all(isinstance(value, list) for value in body.values()):
        raise InvalidInput('missing; send {"input": …} or {"inputs": […]}', field="input")
    return _parse_tensors(body)


def parse_files(kind: bytes, body: bytes) -> Wanted:
    """The items of a body that is no JSON: raw bytes are one item, each part of a multipart form is one.

    Raises:
        MalformedBody: the form cannot be read, or holds nothing.
    """
    if not kind.lower().startswith(b"multipart/form-data"):
        return Wanted([body], ["body"])
    parts = _parts(kind, body)
    if not parts:
        raise MalformedBody("the form has no parts", field="body")
    names = [name for name, _ in parts]
    return Wanted([content for _, content in parts], names, many=len(parts) > 1)


def _parse_inputs(body: dict[str, Any]) -> Wanted:
    name = "inputs" if "inputs" in body else "input"
    if len(body) > 1:
        extra = next(key for key in body if key != name)
        raise InvalidInput(f"unknown beside {name}", field=extra)
    value = body[name]
    if value is None:
        raise InvalidInput("must not be null", field=name)
    if name == "input":
        return Wanted([value], ["input"])
    if not isinstance(value, list) or not value:
        raise InvalidInput("must be a list of at least one item", field="inputs")
    return Wanted(value, [f"inputs[{index}]" for index in range(len(value))], many=True)


def _parse_tensors(body: dict[str, Any]) -> Wanted:
    """1-D tensors are one item, 2-D a batch; all must agree."""
    for alias, name in ALIASES.items():
        if alias in body and name in body:
            raise InvalidInput(f"is another name of {name}: send one of them", field=alias)
    named = {ALIASES.get(name, name): value for name, value in body.items()}
    first = next(iter(named))
    rows = {name: len(value) for name, value in named.items() if value and isinstance(value[0], list)}
    if not rows:
        return Wanted([named], ["input"], named=True)
    for name in named:
        if rows.get(name) != rows.get(first):
            raise InvalidInput(f"has {rows.get(name, 'no')} rows where {first} has {len(named[first])}", field=name)
    items = [{name: value[index] for name, value in named.items()} for index in range(rows[first])]
    return Wanted(items, [f"[{index}]" for index in range(len(items))], many=True, named=True)


def _parts(kind: bytes, body: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of the parts of a multipart form, in order."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    _, options = parse_options_header(kind)
    boundary = options.get(b"boundary")
    if not boundary:
        raise MalformedBody("the form does not say its boundary", field="Content-Type")
    parts: list[tuple[str, bytearray]] = []
    header: list[bytearray] = [bytearray(), bytearray()]

    def on_header_end() -> None:
        if header[0].lower() == b"content-disposition":
            _, found = parse_options_header(bytes(header[1]))
            parts[-1] = (found.get(b"name", b"part").decode("utf-8", "replace"), parts[-1][1])
        header[:] = [bytearray(), bytearray()]

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": lambda: parts.append(("part", bytearray())),
            "on_part_data": lambda data, start, end: parts[-1][1].extend(data[start:end]),
            "on_header_field": lambda data, start, end: header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: header[1].extend(data[start:end]),
            "on_header_end": on_header_end,
        },
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise MalformedBody(f"the form cannot be read: {error}", field="body") from None
    return [(name, bytes(content)) for name, content in parts]


def write_one(value: Any, timings: Timings | None, latency_ms: float) -> bytes:
    return b"".join((b'{"prediction":', to_json(value), b',"latency_ms":%.3f' % latency_ms, _timings([timings]), b"}"))


def write_many(values: list[Any], timings: list[Timings | None], latency_ms: float) -> tuple[int, bytes]:
    """Status and body; a failed item is an error in its place, and only if all failed is the answer a failure."""
    errors = [value for value in values if isinstance(value, HeadraceError)]
    parts = [
        b'{"error":' + to_json(error_object(value)) + b"}" if isinstance(value, HeadraceError) else to_json(value)
        for value in values
    ]
    status, head = 200, b""
    if len(errors) == len(values):
        status, head = errors[0].status, b'"error":' + to_json(error_object(errors[0])) + b","
    body = (b"{", head, b'"predictions":[', b",".join(parts), b'],"latency_ms":%.3f' % latency_ms, _timings(timings))
    return status, b"".join((*body, b"}"))


def event(name: str, data: bytes) -> bytes:
    """One server-sent event; ``data`` is JSON, which has no line breaks. The nameless are chunks of the answer."""
    return (b"event: %s\n" % name.encode() if name else b"") + b"data: " + data + b"\n\n"


def last_event(timings: Timings | None, latency_ms: float) -> bytes:
    return event("done", b'{"latency_ms":%.3f' % latency_ms + _timings([timings]) + b"}")


def server_timing(timings: list[Timings | None], latency_ms: float) -> bytes:
    """Value of the ``Server-Timing`` header, which browsers and proxies show."""
    known = [each for each in timings if each]
    if not known:
        return b"total;dur=%.3f" % latency_ms
    return b"queue;dur=%.3f, run;dur=%.3f, total;dur=%.3f" % (
        max(each.queue_ms for each in known),
        max(each.run_ms for each in known),
        latency_ms,
    )


def _timings(timings: list[Timings | None]) -> bytes:
    """The slowest of each, so that a list shows what held it up."""
    known = [each for each in timings if each]
    if not known:
        return b""
    return b',"timings":{"queue_ms":%.3f,"run_ms":%.3f,"batch_size":%d}' % (
        max(each.queue_ms for each in known),
        max(each.run_ms for each in known),
        max(each.batch_size for each in known),
    )


def to_json(value: Any) -> bytes:
    """JSON of an answer: arrays as lists, bytes as base64, NaN as null (JSON has none).

    Raises:
        RunnerError: the model's answer holds something that has no JSON form.
    """
    try:
        return orjson.dumps(value, default=_default, option=_OPTIONS)
    except TypeError:
        pass
    try:
        return orjson.dumps(_plain(value), default=_default, option=_OPTIONS)
    except TypeError as error:
        raise RunnerError(f"the model's answer has no JSON form: {error}") from None


def _plain(value: Any) -> Any:
    """Arrays that orjson refuses (of another byte order, for example) as lists."""
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _default(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):  # arrays in a layout or type that orjson does not take
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")
