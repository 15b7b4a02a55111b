"""From what a client wrote to what a worker takes: one reader per model, made from the worker's `ModelInfo`.

Everything that is wrong with an item is found here, before it reaches a model, and named by its field.
"""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Any

import jsonschema_rs
import msgspec
import numpy as np

from headrace.config import ModelConfig
from headrace.core import ModelInfo
from headrace.errors import InvalidInput, UnsupportedMediaType
from headrace.ipc import encode_value
from headrace.runners.text import ALIASES, TextPreparer, cost

# Tokenising a text of this length takes about a millisecond; longer ones leave the event loop.
_INLINE_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Item:
    """An encoded item and its length in tokens, 0 where only the worker knows."""

    body: bytes
    cost: int


class ItemReader:
    """Checks and encodes the items of one model."""

    def __init__(self, config: ModelConfig, info: ModelInfo) -> None:
        self.info = info
        self._max_chars = config.max_input_chars
        self._text = TextPreparer(info.text) if info.text else None
        schema = msgspec.json.decode(info.item_schema)
        self._schema = None if self._text else jsonschema_rs.validator_for(schema)
        self._is_binary = isinstance(schema, dict) and schema.get("format") == "binary"
        # What says nothing of its items, or only that they are not null, may take bytes.
        self.takes_bytes = self._text is None and (self._is_binary or not set(schema) - {"not", "title", "description"})

    async def read(self, value: Any, field: str) -> Item:
        """Read one item.

        Raises:
            InvalidInput: of the wrong type or too long; names the place inside the item.
        """
        if isinstance(value, str) and len(value) > self._max_chars:
            raise InvalidInput(f"has {len(value)} characters, at most {self._max_chars} may be sent", field=field)
        if self._text is None:
            return self._read_any(value, field)
        if isinstance(value, dict):
            return self.read_tensors(value, field)
        if isinstance(value, bytes):
            return self._read_bytes(value, field)
        if not isinstance(value, str):
            raise InvalidInput(f"must be a text, not {_kind(value)}", field=field)
        if len(value) <= _INLINE_CHARS:
            ids = self._text.text(value, field)
        else:
            ids = await asyncio.to_thread(self._text.text, value, field)
        return Item(encode_value(ids), len(ids))

    def read_tensors(self, named: dict[str, Any], field: str = "") -> Item:
        """Read one item given as named lists of numbers."""
        named = {ALIASES.get(name, name): value for name, value in named.items()}
        if self._text is None:
            return self._read_any(named, field or "input")
        prepared = self._text.tensors(named, field)
        return Item(encode_value(prepared), cost(prepared))

    def read_ids(self, ids: list[Any], field: str) -> Item:
        """Read one item given as a bare list of token ids, as the OpenAI API allows.

        Raises:
            InvalidInput: the model takes no tokens.
        """
        if self._text is None:
            raise InvalidInput("this model does not take token ids", field=field)
        try:
            prepared = self._text.tensors({"input_ids": ids})
        except InvalidInput as error:
            raise InvalidInput(error.message, field=field) from None
        return Item(encode_value(prepared), len(ids))

    def _read_any(self, value: Any, field: str) -> Item:
        assert self._schema is not None
        if isinstance(value, bytes):
            return self._read_bytes(value, field)
        if isinstance(value, np.ndarray):
            return Item(encode_value(value), 0)  # the worker knows whether it takes arrays
        if self._is_binary and isinstance(value, str):
            return self._read_bytes(_from_base64(value, field), field)
        if self.takes_bytes and isinstance(value, dict) and value.keys() == {"base64"}:
            return self._read_bytes(_from_base64(value["base64"], f"{field}.base64"), field)
        if not self._schema.is_valid(value):
            problem = next(iter(self._schema.iter_errors(value)))
            raise InvalidInput(problem.message, field=_place(field, problem.instance_path))
        try:
            self._check_lengths(value, field)
            return Item(encode_value(value), 0)
        except RecursionError:
            raise InvalidInput("is nested too deeply", field=field) from None

    def _read_bytes(self, value: bytes, field: str) -> Item:
        if not self.takes_bytes:
            raise UnsupportedMediaType(
                f"{self.info.name} does not take raw bytes", field="Content-Type", hint="send JSON; see /docs"
            )
        if not value:
            raise InvalidInput("is empty", field=field)
        return Item(encode_value(value), 0)

    def _check_lengths(self, value: Any, field: str) -> None:
        if isinstance(value, str):
            if len(value) > self._max_chars:
                raise InvalidInput(f"has {len(value)} characters, at most {self._max_chars} may be sent", field=field)
        elif isinstance(value, dict):
            for key, child in value.items():
                self._check_lengths(child, f"{field}.{key}")
        elif isinstance(value, list) and value and isinstance(value[0], (str, dict, list)):
            for index, child in enumerate(value):
                self._check_lengths(child, f"{field}[{index}]")


def _from_base64(value: Any, field: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError):
        raise InvalidInput("must be base64", field=field) from None


def _place(field: str, path: list[Any]) -> str:
    return field + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")
