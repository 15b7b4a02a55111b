"""The Open Inference Protocol v2 over HTTP, with its binary tensor extension: bytes to items, answers to bytes.

A request's tensors are columns: the first dimension counts the items, row by row. Source of the shapes: the protocol's
own description (KServe, Triton) and the bytes that ``tritonclient`` sends and reads. Sequences, priorities and
time-outs of a request are not looked at; shared memory and classification are refused. Knows nothing of sockets.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.core import ModelInfo
from headrace.errors import HeadraceError, InvalidInput, MalformedBody
from headrace.serving.items import Item, ItemReader
from headrace.serving.protocols.native import to_json
from headrace.serving.protocols.tensors import (
    DTYPES,
    INTEGERS,
    MAX_DIMENSIONS,
    NAMES,
    NUMBERS,
    Array,
    Form,
    Given,
    Tensor,
    forms_of,
    outputs_of,
)
from headrace.web import parse_json

VERSIONS = ("1",)
LENGTH_HEADER = b"inference-header-content-length"

_LENGTH = struct.Struct("<I")
_REQUEST_KEYS = {"id", "parameters", "inputs", "outputs", "model_name", "model_version"}
_INPUT_KEYS = {"name", "datatype", "shape", "parameters", "data"}
_OUTPUT_KEYS = {"name", "parameters"}


@dataclass(frozen=True)
class Output:
    """An output that the client asks for; ``binary`` is ``None`` where only the request as a whole says."""

    name: str
    binary: bool | None = None


@dataclass(frozen=True)
class Inference:
    """A request, taken apart.

    Args:
        id: the client's own name for it, sent back.
        items: one value per row, as `ItemReader.read` takes them.
        outputs: what is asked for; empty means all.
        binary_default: whether outputs that do not say are sent as binary.
        named: whether each item is a dictionary of tensors by name.
    """

    id: str
    items: list[Any]
    outputs: list[Output]
    binary_default: bool
    named: bool


# The model's side: what it takes and gives.


def describe(info: ModelInfo) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of a model. A model without types, or of many, may answer with other outputs than these."""
    return [slot.tensor for slot in forms_of(info)[0].slots.values()], outputs_of(info)


def metadata(info: ModelInfo, versions: Sequence[str] = VERSIONS) -> dict[str, Any]:
    inputs, outputs = describe(info)
    return {
        "name": info.name,
        "versions": list(versions),
        "platform": info.platform,
        "inputs": [vars(tensor) for tensor in inputs],
        "outputs": [vars(tensor) for tensor in outputs],
    }


def server_metadata(version: str) -> dict[str, Any]:
    return {"name": "headrace", "version": version, "extensions": ["binary_tensor_data"]}


# The client's side: from a body to items.


def read(body: bytes, json_length: int | None, info: ModelInfo) -> Inference:
    """Take a request apart.

    Args:
        body: all of it.
        json_length: value of the ``Inference-Header-Content-Length`` header; without one, all of the body is JSON.
        info: the model that it is for.

    Raises:
        MalformedBody: lengths do not add up, or it is not JSON.
        InvalidInput: names the tensor and the part of it that is wrong.
    """
    if json_length is not None and not 0 < json_length <= len(body):
        raise MalformedBody(
            f"says {json_length} where the body has {len(body)} bytes", field="Inference-Header-Content-Length"
        )
    request = _object(parse_json(body[:json_length]), "body")
    _only(request, _REQUEST_KEYS, "")
    ident = request.get("id", "")
    if not isinstance(ident, str):
        raise InvalidInput("must be a string", field="id")
    binary = _flag(_parameters(request, ""), "binary_data_output", "parameters")
    outputs = _read_outputs(request.get("outputs", []), info)
    given = _read_inputs(request.get("inputs"), b"" if json_length is None else memoryview(body)[json_length:])
    form = _choose(forms_of(info), given)
    columns = [_rows(form, tensor) for tensor in given]
    items = columns[0]
    if form.named:
        names = [tensor.name for tensor in given]
        items = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return Inference(ident, items, outputs, bool(binary), form.named)


def json_length(headers: Mapping[bytes, bytes]) -> int | None:
    """Length of the JSON part, from lower-case headers.

    Raises:
        MalformedBody: it is no number.
    """
    value = headers.get(LENGTH_HEADER)
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise MalformedBody("must be a number of bytes", field="Inference-Header-Content-Length")
    return int(value)


def _choose(forms: list[Form], given: list[Given]) -> Form:
    """The form that the tensors' names fit.

    Raises:
        InvalidInput: a tensor is unknown, missing, or of another length than the first.
    """
    names = [tensor.name for tensor in given]
    form = next((each for each in forms if each.slots.keys() & names and each.slots.keys() >= set(names)), None)
    form = form or next((each for each in forms if each.other), None)
    form = form or next((each for each in forms if each.slots.keys() & names), forms[0])
    for index, tensor in enumerate(given):
        if tensor.name not in form.slots and form.other is None:
            known = " or ".join(", ".join(each.slots) for each in forms)
            raise InvalidInput(f"unknown input {tensor.name}; the model takes {known}", field=f"{tensor.field}.name")
        if tensor.name in names[:index]:
            raise InvalidInput(f"{tensor.name} is there twice", field=f"{tensor.field}.name")
        if tensor.shape[0] != given[0].shape[0]:
            counts = f"{tensor.shape[0]} items where {given[0].name} has {given[0].shape[0]}"
            raise InvalidInput(f"has {counts}", field=f"{tensor.field}.shape")
    missing = next((name for name in form.slots if name in form.required and name not in names), None)
    if missing is not None:
        raise InvalidInput(f"{missing} is missing", field="inputs")
    return form


def _rows(form: Form, given: Given) -> list[Any]:
    """One value per item of a tensor that `_choose` let pass.

    Raises:
        InvalidInput: the model takes no such datatype or shape, or an element cannot be read.
    """
    slot = form.slots.get(given.name) or form.other
    assert slot
    if given.datatype not in slot.accepts:
        raise InvalidInput(
            f"{given.name} is {slot.tensor.datatype}, not {given.datatype}", field=f"{given.field}.datatype"
        )
    rank = len(slot.tensor.shape)
    if len(given.shape) == rank or (slot.any_shape and given.datatype != "BYTES"):
        return slot.rows(given)
    if rank == 1 and given.shape[1:] == (1,):  # what clients of Triton's batched models send
        return slot.rows(_flatten(given))
    dimensions = "1 dimension, the items" if rank == 1 else f"{rank} dimensions, the first of them the items"
    raise InvalidInput(f"{given.name} has {dimensions}", field=f"{given.field}.shape")


def _flatten(given: Given) -> Given:
    values = given.values.reshape(-1) if isinstance(given.values, np.ndarray) else given.values
    return Given(given.field, given.name, given.datatype, given.shape[:1], values)


def _read_outputs(outputs: Any, info: ModelInfo) -> list[Output]:
    if not isinstance(outputs, list):
        raise InvalidInput("must be a list", field="outputs")
    known = [tensor.name for tensor in outputs_of(info)] if info.text else None
    wanted: list[Output] = []
    for index, given in enumerate(outputs):
        field = f"outputs[{index}]"
        output = _object(given, field)
        _only(output, _OUTPUT_KEYS, field)
        name = _name(output, field)
        parameters = _parameters(output, field)
        if "classification" in parameters:
            raise InvalidInput(
                "is not supported",
                field=f"{field}.parameters.classification",
                hint="take the output as it is and pick the largest values",
            )
        if known is not None and name not in known:
            raise _unknown_output(name, known, index)
        if any(each.name == name for each in wanted):
            raise InvalidInput(f"{name} is there twice", field=f"{field}.name")
        wanted.append(Output(name, _flag(parameters, "binary_data", f"{field}.parameters")))
    return wanted


def _unknown_output(name: str, known: Sequence[str], index: int) -> InvalidInput:
    return InvalidInput(f"unknown output {name}; the model gives {', '.join(known)}", field=f"outputs[{index}].name")


def _read_inputs(inputs: Any, tail: bytes | memoryview) -> list[Given]:
    """Check the tensors one by one, taking the binary ones from ``tail`` in their order."""
    if not isinstance(inputs, list) or not inputs:
        raise InvalidInput("must be a list of at least one tensor", field="inputs")
    given, offset = [], 0
    for index, each in enumerate(inputs):
        field = f"inputs[{index}]"
        tensor = _object(each, field)
        _only(tensor, _INPUT_KEYS, field)
        name, datatype, shape = _name(tensor, field), _datatype(tensor, field), _shape(tensor, field)
        size = _binary_size(tensor, field)
        if size is None:
            values = _from_json(tensor.get("data"), datatype, shape, f"{field}.data")
        else:
            if size > len(tail) - offset:
                raise MalformedBody(
                    f"says {size} where {len(tail) - offset} bytes are left of the body",
                    field=f"{field}.parameters.binary_data_size",
                    hint="Inference-Header-Content-Length must be the length of the JSON part",
                )
            values = _from_binary(tail[offset : offset + size], datatype, shape, field)
            offset += size
        given.append(Given(field, name, datatype, shape, values))
    if offset != len(tail):
        raise MalformedBody(f"has {len(tail) - offset} bytes after the last tensor", field="body")
    return given


def _binary_size(tensor: dict[str, Any], field: str) -> int | None:
    """Bytes of a binary tensor, ``None`` for one whose data are JSON."""
    size = _parameters(tensor, field).get("binary_data_size")
    if size is None and "data" not in tensor:
        raise InvalidInput("missing; send data, or parameters.binary_data_size and the bytes", field=f"{field}.data")
    if size is None:
        return None
    if type(size) is not int or size < 0:
        raise InvalidInput("must be a number of bytes", field=f"{field}.parameters.binary_data_size")
    if "data" in tensor:
        raise InvalidInput("is there beside parameters.binary_data_size: send one of them", field=f"{field}.data")
    return size


def _datatype(tensor: dict[str, Any], field: str) -> str:
    datatype = tensor.get("datatype")
    if not isinstance(datatype, str) or (datatype not in DTYPES and datatype != "BYTES"):
        raise InvalidInput(f"must be one of {', '.join(DTYPES)}, BYTES", field=f"{field}.datatype")
    return datatype


def _shape(tensor: dict[str, Any], field: str) -> tuple[int, ...]:
    """The shape; empty tensors are refused, since a batch of nothing could claim any number of items for no bytes."""
    shape = tensor.get("shape")
    field = f"{field}.shape"
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise InvalidInput("must be a list of non-negative integers", field=field)
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise InvalidInput(f"needs 1 to {MAX_DIMENSIONS} dimensions, the first of them the items", field=field)
    if 0 in shape:
        raise InvalidInput("must not hold 0: an item needs at least one element", field=field)
    return tuple(shape)


def _from_binary(data: bytes | memoryview, datatype: str, shape: tuple[int, ...], field: str) -> Array | list[Any]:
    count = math.prod(shape)
    if datatype == "BYTES":
        return _split_elements(data, count, field)
    dtype = DTYPES[datatype]
    if count * dtype.itemsize != len(data):
        raise InvalidInput(
            f"holds {count * dtype.itemsize} bytes of {datatype}, {len(data)} came", field=f"{field}.shape"
        )
    if datatype == "BOOL":
        flags = np.frombuffer(data, np.uint8)
        if flags.max() > 1:
            raise InvalidInput("bytes of BOOL are 0 or 1", field=f"{field}.data[{int((flags > 1).argmax())}]")
    array: Array = np.frombuffer(data, dtype)
    if datatype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.reshape(shape)


def _split_elements(data: bytes | memoryview, count: int, field: str) -> list[bytes]:
    """The elements of a BYTES tensor, each after its length in 4 bytes."""
    elements: list[bytes] = []
    offset = 0
    while offset < len(data):
        place = f"{field}.data[{len(elements)}]"
        if len(data) - offset < _LENGTH.size:
            raise InvalidInput(f"{len(data) - offset} bytes are left, its length takes {_LENGTH.size}", field=place)
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += _LENGTH.size
        if length > len(data) - offset:
            raise InvalidInput(f"says it has {length} bytes where {len(data) - offset} are left", field=place)
        elements.append(bytes(data[offset : offset + length]))
        offset += length
    if len(elements) != count:
        raise InvalidInput(f"holds {count} elements, {len(elements)} came", field=f"{field}.shape")
    return elements


_JSON_TYPES: dict[str, tuple[set[type], str]] = {
    "BYTES": ({str}, "strings"),
    "BOOL": ({bool}, "booleans"),
    **{name: ({int}, "integers") for name in INTEGERS},
    **{name: ({int, float}, "numbers") for name in NUMBERS - INTEGERS},
}


def _from_json(data: Any, datatype: str, shape: tuple[int, ...], field: str) -> Array | list[Any]:
    if datatype == "BF16":
        raise InvalidInput("BF16 has no JSON form", field=field, hint="send it as binary data")
    flat = _flat(data, shape, field)
    types, wanted = _JSON_TYPES[datatype]
    if not set(map(type, flat)) <= types:
        index = next(index for index, value in enumerate(flat) if type(value) not in types)
        raise InvalidInput(f"{datatype} is made of {wanted}", field=f"{field}[{index}]")
    if datatype == "BYTES":
        return flat
    dtype = DTYPES[datatype]
    if datatype in INTEGERS:
        limits = np.iinfo(dtype)
        bad = next((index for index, value in enumerate(flat) if not limits.min <= value <= limits.max), None)
    else:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype)
        bad = None if np.isfinite(array).all() else int((~np.isfinite(array)).argmax())
    if bad is not None:
        raise InvalidInput(f"{flat[bad]} does not fit in {datatype}", field=f"{field}[{bad}]")
    return np.array(flat, dtype).reshape(shape) if datatype in INTEGERS else array.reshape(shape)


def _flat(data: Any, shape: tuple[int, ...], field: str) -> list[Any]:
    """The elements of JSON data, which may come flat or nested as the shape says. The data bound the work."""
    if not isinstance(data, list):
        raise InvalidInput("must be a list", field=field)
    flat = data
    if data and isinstance(data[0], list):
        for size, deeper in itertools.pairwise(shape):
            if len(flat) % size or not all(isinstance(row, list) and len(row) == deeper for row in flat):
                raise InvalidInput(f"is not nested as its shape {list(shape)} says", field=field)
            flat = list(itertools.chain.from_iterable(flat))
    if len(flat) != math.prod(shape):
        raise InvalidInput(f"has {len(flat)} elements, its shape {math.prod(shape)}", field=field)
    return flat


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidInput("must be an object", field=field)
    return value


def _only(given: dict[str, Any], known: set[str], field: str) -> None:
    extra = next((key for key in given if key not in known), None)
    if extra is not None:
        raise InvalidInput(f"unknown; known are {', '.join(sorted(known))}", field=_join(field, extra))


def _name(given: dict[str, Any], field: str) -> str:
    name = given.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidInput("must be a name", field=f"{field}.name")
    return name


def _parameters(given: dict[str, Any], field: str) -> dict[str, Any]:
    """Parameters, of which unknown ones are another server's business, as the protocol has it."""
    place = _join(field, "parameters")
    parameters = _object(given.get("parameters", {}), place)
    shared = next((key for key in parameters if key.startswith("shared_memory")), None)
    if shared is not None:
        raise InvalidInput(
            "shared memory is not supported", field=f"{place}.{shared}", hint="send the data in the body, as binary"
        )
    return parameters


def _flag(parameters: dict[str, Any], name: str, field: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidInput("must be true or false", field=f"{field}.{name}")
    return value


def _join(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


# From answers to a body.


@dataclass(frozen=True)
class _Made:
    """An output tensor: an array, or the flat elements of a BYTES tensor."""

    datatype: str
    shape: tuple[int, ...]
    values: Array | list[bytes]


def write(inference: Inference, info: ModelInfo, model_name: str, values: list[Any]) -> tuple[bytes, int | None]:
    """Body of the answer, and the length of its JSON part if bytes follow.

    Raises:
        InvalidInput: an output was asked for that the model does not give, or as JSON where it has no such form.
    """
    made = _tensors(values, {tensor.name: tensor for tensor in outputs_of(info)})
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for index, output in enumerate(inference.outputs or map(Output, made)):
        tensor = made.get(output.name)
        if tensor is None:
            raise _unknown_output(output.name, list(made), index)
        shown: dict[str, Any] = {"name": output.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if inference.binary_default if output.binary is None else output.binary:
            parts.append(_to_binary(tensor))
            shown["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            shown["data"] = _to_json_data(tensor, f"outputs[{index}]")
        described.append(shown)
    head: dict[str, Any] = {"model_name": model_name, "model_version": VERSIONS[0], "outputs": described}
    encoded = to_json({"id": inference.id, **head} if inference.id else head)
    return b"".join((encoded, *parts)), len(encoded) if parts else None


def error_body(error: HeadraceError) -> dict[str, Any]:
    """An error in this protocol's shape."""
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return {"error": f"{error.field}: {message}" if error.field else message}


def _tensors(values: list[Any], declared: dict[str, Tensor]) -> dict[str, _Made]:
    """One output, or one per name where all answers are dictionaries of arrays by the same names."""
    first = values[0] if values else None
    if not isinstance(first, dict) or not first or not all(_is_named_like(first, value) for value in values):
        return {"output": _column(values, declared.get("output"))}
    return {name: _column([value[name] for value in values], declared.get(name)) for name in first}


def _is_named_like(first: dict[Any, Any], value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == first.keys()
        and all(isinstance(name, str) and isinstance(part, np.ndarray) for name, part in value.items())
    )


def _column(values: list[Any], declared: Tensor | None) -> _Made:
    """One row per answer: numbers of equal shape as they are, texts and bytes likewise, the rest as JSON."""
    array = _stack(values)
    if array is not None:
        if declared and declared.datatype == "FP64" and array.dtype.kind in "iuf":
            array = array.astype(np.float64)  # a model that says float may answer 1 for 1.0
        datatype = NAMES.get(array.dtype.newbyteorder("<"))
        if datatype:
            return _Made(datatype, array.shape, np.ascontiguousarray(array, DTYPES[datatype]))
    if all(isinstance(value, (str, bytes)) for value in values):
        texts = [value.encode() if isinstance(value, str) else value for value in values]
        return _Made("BYTES", (len(values),), texts)
    return _Made("BYTES", (len(values),), [to_json(value) for value in values])


def _stack(values: list[Any]) -> Array | None:
    """The answers as one array; ``None`` if they are no numbers, or of different shapes."""
    kinds = _kinds(values)
    try:
        if kinds == {np.ndarray}:
            return np.array(values)
        if kinds == {bool}:
            return np.array(values, np.bool_)
        if kinds == {int}:
            try:
                return np.array(values, np.int64)
            except OverflowError:
                return np.array(values, np.uint64)
        return np.array(values, np.float64) if kinds <= {int, float} else None
    except (ValueError, OverflowError):  # ragged, or too large for any of them
        return None


def _kinds(values: list[Any], depth: int = 1) -> set[type]:
    """Types of all that is no list, looked at before numpy is: it would make texts of all if it met one."""
    kinds = set(map(type, values))
    if list not in kinds:
        return kinds
    if depth == MAX_DIMENSIONS:
        return {object}
    kinds.discard(list)
    return kinds.union(*(_kinds(value, depth + 1) for value in values if type(value) is list))


def _to_binary(tensor: _Made) -> bytes:
    if isinstance(tensor.values, np.ndarray):
        return tensor.values.tobytes()
    return b"".join(part for value in tensor.values for part in (_LENGTH.pack(len(value)), value))


def _to_json_data(tensor: _Made, field: str) -> Any:
    if isinstance(tensor.values, np.ndarray):
        return tensor.values.reshape(-1)
    try:
        return [value.decode() for value in tensor.values]
    except UnicodeDecodeError:
        raise InvalidInput(
            "this output is bytes, for which JSON has no form", field=field, hint='ask for {"binary_data": true}'
        ) from None


# What the front end holds while a request is on its way.


def is_model_path(parts: list[str]) -> bool:
    """Whether these are ``NAME`` or ``NAME/versions/VERSION``, of a version that there is."""
    return bool(parts and parts[0]) and (
        len(parts) == 1 or (len(parts) == 3 and parts[1] == "versions" and parts[2] in VERSIONS)
    )


@dataclass(frozen=True)
class Exchange:
    """A request and the model that it is for: `read` checks its items, `write` makes its answer."""

    inference: Inference
    info: ModelInfo

    @property
    def values(self) -> list[Any]:
        return self.inference.items

    async def read(self, index: int, reader: ItemReader) -> Item:
        """Check and encode one item. Raises `InvalidInput`."""
        value = self.inference.items[index]
        if not self.inference.named:
            return await reader.read(value, f"inputs[0].data[{index}]")
        return await reader.read(value, f"item[{index}]")

    def write(self, values: list[Any]) -> tuple[bytes, int | None]:
        return write(self.inference, self.info, self.info.name, values)


class Request:
    """The way in for a front end."""

    @staticmethod
    def read(body: bytes, headers: Mapping[bytes, bytes], info: ModelInfo) -> Exchange:
        """Raises `MalformedBody` and `InvalidInput`."""
        return Exchange(read(body, json_length(headers), info), info)
