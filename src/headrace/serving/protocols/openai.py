"""The OpenAI embeddings API, so that its clients work unchanged.

Source of the shapes: the published OpenAPI description of ``POST /v1/embeddings`` and ``GET /v1/models``.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.core import ModelInfo
from headrace.errors import HeadraceError, InvalidInput
from headrace.serving.items import Item, ItemReader
from headrace.serving.protocols.native import to_json

_KNOWN = {"input", "model", "encoding_format", "dimensions", "user"}


def model_name(body: Any) -> str:
    """The model that a body asks for.

    Raises:
        InvalidInput: it names none.
    """
    if not isinstance(body, dict):
        raise InvalidInput("the body must be an object", field="body")
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise InvalidInput("must name a model; GET /v1/models lists them", field="model")
    return name


def parse(body: dict[str, Any], info: ModelInfo) -> Texts:
    """What an embeddings request asks for. One bad item fails the whole request, as clients of this API expect.

    Raises:
        InvalidInput: names the parameter.
    """
    extra = next((key for key in body if key not in _KNOWN), None)
    if extra is not None:
        raise InvalidInput("unknown parameter", field=extra)
    if not info.width:
        raise InvalidInput(f"{info.name} does not make embeddings", field="model")
    if body.get("encoding_format", "float") not in ("float", "base64"):
        raise InvalidInput("must be float or base64", field="encoding_format")
    if body.get("dimensions") not in (None, info.width):
        raise InvalidInput(f"this model has {info.width} dimensions and no others", field="dimensions")
    given = body.get("input")
    if isinstance(given, str):
        return Texts([given], ["input"])
    if not isinstance(given, list) or not given:
        raise InvalidInput("must be a text, a list of texts, or lists of token ids", field="input")
    if all(type(value) is int for value in given):
        return Texts([given], ["input"])
    return Texts(given, [f"input[{index}]" for index in range(len(given))])


@dataclass(frozen=True)
class Texts:
    """Texts or lists of token ids, each with its place in the body."""

    values: list[Any]
    places: list[str]

    async def read(self, index: int, reader: ItemReader) -> Item:
        """Check and encode one item. Raises `InvalidInput`."""
        value, place = self.values[index], self.places[index]
        return reader.read_ids(value, place) if isinstance(value, list) else await reader.read(value, place)


def write(body: dict[str, Any], tokens: int, vectors: list[Any]) -> bytes:
    encode: Callable[[Any], Any] = _base64 if body.get("encoding_format") == "base64" else lambda vector: vector
    return to_json(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": encode(vector)}
                for index, vector in enumerate(vectors)
            ],
            "model": body["model"],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def error_body(error: HeadraceError) -> dict[str, Any]:
    """An error in this API's shape."""
    kind = "invalid_request_error" if error.status < 500 and error.status != 429 else "server_error"
    if error.status == 429:
        kind = "rate_limit_error"
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    if error.field:
        message = f"{error.field}: {message}"
    return {"error": {"message": message, "type": kind, "param": error.field, "code": error.code}}


def model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "headrace"}


def _base64(vector: Any) -> str:
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
