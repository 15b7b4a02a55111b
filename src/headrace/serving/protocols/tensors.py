"""Which tensors a model takes and gives in the Open Inference Protocol, made from what its worker says of its items.

The first dimension of every tensor counts the items. Knows no bytes: `inference.py` reads and writes those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from headrace.core import ModelInfo
from headrace.errors import InvalidInput

Array = npt.NDArray[Any]

_CODES = {
    "BOOL": "?",
    **{f"UINT{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
    **{f"INT{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": f"<f{size}" for size in (2, 4, 8)},
    "BF16": "<u2",  # numpy has none: its bits are the upper half of a float32's
}
DTYPES = {name: np.dtype(code) for name, code in _CODES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}
_BYTES = frozenset({"BYTES"})
_BOOL = frozenset({"BOOL"})
INTEGERS = frozenset(name for name in DTYPES if "INT" in name)
NUMBERS = INTEGERS | {"FP16", "BF16", "FP32", "FP64"}
# What numpy takes; no tensor that means something has more.
MAX_DIMENSIONS = 32


@dataclass(frozen=True)
class Tensor:
    """One input or output as the metadata tell it; -1 is any length."""

    name: str
    datatype: str
    shape: list[int]


@dataclass(frozen=True)
class Given:
    """A tensor that a client sent, checked: an array of its shape, or the flat elements of a BYTES tensor."""

    field: str
    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Array | list[Any]


@dataclass(frozen=True)
class Slot:
    """An input: how it is advertised, the datatypes that it takes, and what makes one value of each row."""

    tensor: Tensor
    accepts: frozenset[str]
    rows: Callable[[Given], list[Any]]
    any_shape: bool = False


@dataclass(frozen=True)
class Form:
    """A set of inputs that make an item together; with ``other``, tensors of any name go there."""

    slots: dict[str, Slot]
    required: frozenset[str]
    named: bool = False
    other: Slot | None = None


def outputs_of(info: ModelInfo) -> list[Tensor]:
    if info.width:
        return [Tensor("output", "FP32", [-1, info.width])]
    if info.task == "logits" or info.tensors:
        return [Tensor("output", "FP32", [-1, -1])]
    slot = _typed_slot("output", _schema(info.output_schema))
    return [slot.tensor if slot else Tensor("output", "BYTES", [-1])]


@functools.lru_cache(maxsize=256)
def forms_of(info: ModelInfo) -> list[Form]:
    """Every way to send items to a model, the advertised one first."""
    if info.text:
        text = Slot(Tensor("input", "BYTES", [-1]), _BYTES, _texts)
        names = ("input_ids", "attention_mask", "token_type_ids")
        tokens = {name: Slot(Tensor(name, "INT64", [-1, -1]), INTEGERS, _lists) for name in names}
        return [_form(text), Form(tokens, frozenset({"input_ids"}), named=True)]
    if info.tensors:
        floats = Tensor("input", "FP32", [-1, -1])
        one = Slot(floats, NUMBERS | _BOOL, _arrays, any_shape=True)
        # A dictionary is checked against the item's schema, which knows lists only.
        other = Slot(floats, NUMBERS | _BOOL, _lists, any_shape=True)
        return [_form(one), Form({}, frozenset(), named=True, other=other)]
    schema = _schema(info.item_schema)
    properties = schema.get("properties")
    if schema.get("type") == "object" and isinstance(properties, dict) and properties:
        slots = {name: _scalar_slot(name, each) for name, each in properties.items()}
        known = {name: slot for name, slot in slots.items() if slot}
        if len(known) == len(slots):
            return [Form(known, frozenset(schema.get("required", ())), named=True)]
    return [_form(_typed_slot("input", schema) or _document_slot(schema))]


def _form(slot: Slot) -> Form:
    return Form({slot.tensor.name: slot}, frozenset({slot.tensor.name}))


def _schema(encoded: bytes) -> dict[str, Any]:
    schema = orjson.loads(encoded)
    return schema if isinstance(schema, dict) else {}


def _scalar_slot(name: str, schema: Any) -> Slot | None:
    match schema:
        case {"type": "string", "format": "binary"}:
            return None
        case {"type": "string"}:
            return Slot(Tensor(name, "BYTES", [-1]), _BYTES, _texts)
        case {"type": "number"}:
            return Slot(Tensor(name, "FP64", [-1]), NUMBERS, _lists)
        case {"type": "integer"}:
            return Slot(Tensor(name, "INT64", [-1]), INTEGERS, _lists)
        case {"type": "boolean"}:
            return Slot(Tensor(name, "BOOL", [-1]), _BOOL, _lists)
    return None


def _typed_slot(name: str, schema: dict[str, Any]) -> Slot | None:
    """A scalar, or numbers in lists of any depth."""
    inner, shape = schema, [-1]
    while isinstance(inner, dict) and inner.get("type") == "array":
        inner, shape = inner.get("items", {}), [*shape, -1]
    slot = _scalar_slot(name, inner)
    if slot is None or len(shape) == 1:
        return slot
    if not slot.accepts <= NUMBERS or len(shape) > MAX_DIMENSIONS:
        return None
    return Slot(Tensor(name, slot.tensor.datatype, shape), slot.accepts, _lists)


def _document_slot(schema: dict[str, Any]) -> Slot:
    """What has no tensor of its own: bytes, or JSON. A model that says nothing of its items takes arrays as well."""
    tensor = Tensor("input", "BYTES", [-1])
    if schema.get("format") == "binary":
        return Slot(tensor, _BYTES, _elements)
    if schema.keys() <= {"not", "title", "description"}:
        return Slot(tensor, _BYTES | NUMBERS | _BOOL, _documents, any_shape=True)
    return Slot(tensor, _BYTES, _documents)


def _elements(given: Given) -> list[Any]:
    """As they came: bytes, or the strings of a JSON tensor, which `ItemReader` takes for base64."""
    return list(given.values)


def _texts(given: Given) -> list[Any]:
    return [_text(value, f"{given.field}.data[{index}]") for index, value in enumerate(given.values)]


def _text(value: bytes | str, field: str) -> str:
    try:
        return value if isinstance(value, str) else value.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"is not UTF-8 at byte {error.start}", field=field) from None


def _documents(given: Given) -> list[Any]:
    if given.datatype != "BYTES":
        return _arrays(given)
    documents = []
    for index, value in enumerate(given.values):
        try:
            documents.append(orjson.loads(value))
        except orjson.JSONDecodeError as error:
            raise InvalidInput(
                f"is not JSON: {error}",
                field=f"{given.field}.data[{index}]",
                hint="each element of this tensor is one item as a JSON document",
            ) from None
    return documents


def _arrays(given: Given) -> list[Any]:
    return list(given.values) if len(given.shape) > 1 else _lists(given)


def _lists(given: Given) -> list[Any]:
    assert isinstance(given.values, np.ndarray)
    rows: list[Any] = given.values.tolist()
    return rows
