"""The Open Inference Protocol's bodies, made and read by hand, by hypothesis and by ``tritonclient`` itself."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from headrace.config import ModelConfig
from headrace.core import ModelInfo, TextSpec
from headrace.errors import HeadraceError, InvalidInput, MalformedBody, RunnerError, UnsupportedMediaType
from headrace.ipc import decode_value
from headrace.serving.items import ItemReader
from headrace.serving.protocols import inference
from headrace.serving.protocols.inference import Inference, Output, Tensor

TEXT = ModelInfo("mini", "embed", "transformers", "cpu", text=TextSpec("tokenizer.json", 128, 1000), width=4)
LOGITS = ModelInfo("mini", "logits", "transformers", "cpu", text=TEXT.text)
CLASSIFY = ModelInfo("mini", "classify", "transformers", "cpu", b"{}", b'{"type":"object"}', text=TEXT.text)
MODULE = ModelInfo("net", "custom", "pytorch", "cpu", tensors=True)
DATATYPES = {
    "BOOL": "?",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}


def python(item: Any, output: Any = None) -> ModelInfo:
    return ModelInfo("mine", "custom", "python", "cpu", orjson.dumps(item), orjson.dumps(output or {}))


ANY = python({"not": {"type": "null"}})
STRING = python({"type": "string"}, {"type": "string"})
NUMBER = python({"type": "number"}, {"type": "number"})
NUMBERS = python({"type": "array", "items": {"type": "number"}}, {"type": "array", "items": {"type": "number"}})
IMAGE = python({"type": "string", "format": "binary"}, {"type": "string"})
PERSON = python(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tall": {"type": "boolean"}},
        "required": ["name", "age"],
    }
)


def tensor(name: str, datatype: str, shape: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, **more}


def pack(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(each)) + each for each in elements)


def body(inputs: Any, tail: bytes | None = None, **more: Any) -> tuple[bytes, int | None]:
    head = orjson.dumps({"inputs": inputs, **more})
    return head + (tail or b""), None if tail is None else len(head)


def read(info: ModelInfo, inputs: Any, tail: bytes | None = None, **more: Any) -> Inference:
    return inference.read(*body(inputs, tail, **more), info)


def binary(name: str, datatype: str, shape: list[int], data: bytes) -> tuple[dict[str, Any], bytes]:
    return tensor(name, datatype, shape, parameters={"binary_data_size": len(data)}), data


def answer(info: ModelInfo, values: list[Any], wanted: list[Output] | None = None) -> dict[str, Any]:
    """The outputs of a JSON answer, by name."""
    content, length = inference.write(Inference("", [], wanted or [], False, False), info, info.name, values)
    assert length is None
    return {output["name"]: output for output in orjson.loads(content)["outputs"]}


# What models say of themselves.


@pytest.mark.parametrize(
    ("info", "inputs", "outputs"),
    [
        (TEXT, [("input", "BYTES", [-1])], [("output", "FP32", [-1, 4])]),
        (LOGITS, [("input", "BYTES", [-1])], [("output", "FP32", [-1, -1])]),
        (CLASSIFY, [("input", "BYTES", [-1])], [("output", "BYTES", [-1])]),
        (MODULE, [("input", "FP32", [-1, -1])], [("output", "FP32", [-1, -1])]),
        (STRING, [("input", "BYTES", [-1])], [("output", "BYTES", [-1])]),
        (NUMBER, [("input", "FP64", [-1])], [("output", "FP64", [-1])]),
        (NUMBERS, [("input", "FP64", [-1, -1])], [("output", "FP64", [-1, -1])]),
        (IMAGE, [("input", "BYTES", [-1])], [("output", "BYTES", [-1])]),
        (ANY, [("input", "BYTES", [-1])], [("output", "BYTES", [-1])]),
        (python({"type": "integer"}, {"type": "boolean"}), [("input", "INT64", [-1])], [("output", "BOOL", [-1])]),
        (
            PERSON,
            [("name", "BYTES", [-1]), ("age", "INT64", [-1]), ("tall", "BOOL", [-1])],
            [("output", "BYTES", [-1])],
        ),
        (
            python({"type": "object", "properties": {"a": {"type": "number"}, "b": {"$ref": "#/$defs/B"}}}, True),
            [("input", "BYTES", [-1])],
            [("output", "BYTES", [-1])],
        ),
        (
            python({"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, {"type": "array"}),
            [("input", "INT64", [-1, -1, -1])],
            [("output", "BYTES", [-1])],
        ),
    ],
)
def test_a_model_is_described_by_its_types(info: ModelInfo, inputs: Any, outputs: Any) -> None:
    assert inference.describe(info) == ([Tensor(*each) for each in inputs], [Tensor(*each) for each in outputs])


def test_metadata_are_what_the_protocol_asks_for() -> None:
    assert inference.metadata(TEXT) == {
        "name": "mini",
        "versions": ["1"],
        "platform": "transformers",
        "inputs": [{"name": "input", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 4]}],
    }
    assert inference.server_metadata("1.2") == {
        "name": "headrace",
        "version": "1.2",
        "extensions": ["binary_tensor_data"],
    }


# Items.


@pytest.mark.parametrize(
    ("info", "given", "items"),
    [
        (TEXT, tensor("input", "BYTES", [2], data=["a", "ü"]), ["a", "ü"]),
        (TEXT, tensor("input", "BYTES", [2, 1], data=[["a"], ["b"]]), ["a", "b"]),
        (NUMBER, tensor("input", "FP32", [2], data=[1, 2.5]), [1.0, 2.5]),
        (NUMBER, tensor("input", "INT8", [2, 1], data=[1, -2]), [1, -2]),
        (NUMBERS, tensor("input", "FP64", [2, 2], data=[1, 2, 3, 4]), [[1, 2], [3, 4]]),
        (NUMBERS, tensor("input", "FP16", [2, 2], data=[[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (ANY, tensor("input", "BYTES", [2], data=['{"a":[1]}', "3"]), [{"a": [1]}, 3]),
        (IMAGE, tensor("input", "BYTES", [1], data=["aGk="]), ["aGk="]),
        (MODULE, tensor("input", "FP32", [2], data=[1.5, 2]), [1.5, 2.0]),
    ],
)
def test_json_data_become_items(info: ModelInfo, given: dict[str, Any], items: list[Any]) -> None:
    found = read(info, [given])
    assert found == Inference("", items, [], False, False)
    assert [type(each) for each in found.items] == [type(each) for each in items]


def test_binary_tensors_follow_in_the_order_of_the_inputs() -> None:
    parts = [
        binary("age", "UINT16", [2], struct.pack("<HH", 3, 400)),
        binary("name", "BYTES", [2, 1], pack(b"Ann", "Zoë".encode())),
        binary("tall", "BOOL", [2], b"\x00\x01"),
    ]
    found = read(PERSON, [each for each, _ in parts], b"".join(data for _, data in parts), id="7")
    assert found.id == "7"
    assert found.named
    assert found.items == [{"age": 3, "name": "Ann", "tall": False}, {"age": 400, "name": "Zoë", "tall": True}]


def test_an_input_that_the_schema_does_not_require_may_be_left_out() -> None:
    given = [tensor("name", "BYTES", [1], data=["A"]), tensor("age", "INT64", [1], data=[3])]
    assert read(PERSON, given).items == [{"name": "A", "age": 3}]


def test_token_tensors_become_lists_by_name() -> None:
    ids, mask = binary("input_ids", "INT64", [2, 2], np.array([[1, 2], [3, 4]]).tobytes())
    given = [ids, tensor("attention_mask", "INT32", [2, 2], data=[1, 1, 1, 0])]
    found = read(TEXT, given, mask)
    assert found.named
    assert found.items == [
        {"input_ids": [1, 2], "attention_mask": [1, 1]},
        {"input_ids": [3, 4], "attention_mask": [1, 0]},
    ]


def test_a_module_takes_tensors_of_any_name_and_shape() -> None:
    data = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    given, tail = binary("input", "FP32", [2, 3, 2], data.tobytes())
    found = read(MODULE, [given], tail)
    assert not found.named
    np.testing.assert_array_equal(np.stack(found.items), data)
    found = read(MODULE, [{**given, "name": "x"}, tensor("y", "INT64", [2], data=[5, 6])], tail)
    assert found.named
    assert found.items == [{"x": data[0].tolist(), "y": 5}, {"x": data[1].tolist(), "y": 6}]


def test_an_untyped_model_takes_arrays_as_well_as_documents() -> None:
    (item,) = read(ANY, [tensor("input", "FP32", [1, 2], data=[1, 2])]).items
    assert item.dtype == np.float32
    assert item.tolist() == [1, 2]


def test_bfloat16_is_the_upper_half_of_a_float32() -> None:
    numbers = np.array([[1.5, -2.0, np.inf]], np.float32)
    given, tail = binary("input", "BF16", [1, 3], (numbers.view(np.uint32) >> 16).astype("<u2").tobytes())
    (item,) = read(MODULE, [given], tail).items
    assert item.dtype == np.float32
    np.testing.assert_array_equal(item, numbers[0])


def test_raw_bytes_reach_a_model_that_takes_them() -> None:
    given, tail = binary("input", "BYTES", [2], pack(b"\xff\xd8", b"\x00"))
    assert read(IMAGE, [given], tail).items == [b"\xff\xd8", b"\x00"]


def test_what_a_request_wants_back() -> None:
    outputs = [{"name": "a", "parameters": {"binary_data": False, "other": 1}}, {"name": "b"}]
    found = read(
        ANY, [tensor("input", "BYTES", [1], data=["1"])], outputs=outputs, parameters={"binary_data_output": True}
    )
    assert found.outputs == [Output("a", False), Output("b", None)]
    assert found.binary_default


# Everything that can be wrong with a request.

GOOD = tensor("input", "BYTES", [1], data=["x"])
REGION = {"shared_memory_region": "r", "shared_memory_byte_size": 4}


def changed(**parts: Any) -> list[dict[str, Any]]:
    return [{**GOOD, **parts}]


@pytest.mark.parametrize(
    ("info", "inputs", "more", "field", "message"),
    [
        (STRING, None, {}, "inputs", "at least one tensor"),
        (STRING, [], {}, "inputs", "at least one tensor"),
        (STRING, [3], {}, "inputs[0]", "object"),
        (STRING, [GOOD], {"input": 1}, "input", "unknown"),
        (STRING, [GOOD], {"id": 3}, "id", "string"),
        (STRING, [GOOD], {"parameters": []}, "parameters", "object"),
        (STRING, [GOOD], {"parameters": {"binary_data_output": 1}}, "parameters.binary_data_output", "true or false"),
        (STRING, changed(extra=1), {}, "inputs[0].extra", "unknown"),
        (STRING, changed(name=""), {}, "inputs[0].name", "name"),
        (STRING, changed(name="x"), {}, "inputs[0].name", "unknown input x; the model takes input"),
        (TEXT, changed(name="x"), {}, "inputs[0].name", "takes input or input_ids, attention_mask, token_type_ids"),
        (STRING, [GOOD, GOOD], {}, "inputs[1].name", "twice"),
        (TEXT, [GOOD, tensor("input_ids", "INT64", [1, 1], data=[1])], {}, "inputs[1].name", "unknown input"),
        (TEXT, [tensor("attention_mask", "INT64", [1, 1], data=[1])], {}, "inputs", "input_ids is missing"),
        (PERSON, [tensor("name", "BYTES", [1], data=["A"])], {}, "inputs", "age is missing"),
        (STRING, changed(datatype="STRING"), {}, "inputs[0].datatype", "one of BOOL"),
        (STRING, changed(datatype=3), {}, "inputs[0].datatype", "one of BOOL"),
        (STRING, changed(datatype="FP32", data=[1]), {}, "inputs[0].datatype", "input is BYTES, not FP32"),
        (NUMBER, [GOOD], {}, "inputs[0].datatype", "FP64, not BYTES"),
        (python({"type": "integer"}), changed(datatype="FP32", data=[1]), {}, "inputs[0].datatype", "INT64, not FP32"),
        (STRING, changed(shape=1), {}, "inputs[0].shape", "non-negative integers"),
        (STRING, changed(shape=[-1]), {}, "inputs[0].shape", "non-negative integers"),
        (STRING, changed(shape=[True]), {}, "inputs[0].shape", "non-negative integers"),
        (STRING, changed(shape=[1.0]), {}, "inputs[0].shape", "non-negative integers"),
        (STRING, changed(shape=[]), {}, "inputs[0].shape", "1 to 32 dimensions"),
        (STRING, changed(shape=[1] * 33), {}, "inputs[0].shape", "1 to 32 dimensions"),
        (STRING, changed(shape=[0], data=[]), {}, "inputs[0].shape", "at least one"),
        (STRING, changed(shape=[2**63, 0], data=[]), {}, "inputs[0].shape", "at least one"),
        (STRING, changed(shape=[1, 1, 1]), {}, "inputs[0].shape", "1 dimension"),
        (NUMBERS, [tensor("input", "FP32", [1], data=[1])], {}, "inputs[0].shape", "2 dimensions"),
        (STRING, changed(shape=[1, 2], data=["a", "b"]), {}, "inputs[0].shape", "1 dimension"),
        (ANY, changed(shape=[1, 2], data=["1", "2"]), {}, "inputs[0].shape", "1 dimension"),
        (
            PERSON,
            [tensor("name", "BYTES", [1], data=["A"]), tensor("age", "INT64", [2], data=[1, 2])],
            {},
            "inputs[1].shape",
            "2 items where name has 1",
        ),
        (STRING, changed(data="x"), {}, "inputs[0].data", "list"),
        (STRING, changed(data=None), {}, "inputs[0].data", "list"),
        (STRING, changed(data=["x", "y"]), {}, "inputs[0].data", "2 elements, its shape 1"),
        (STRING, changed(shape=[2**60, 2**60]), {}, "inputs[0].data", "1 elements, its shape"),
        (STRING, changed(data=[1]), {}, "inputs[0].data[0]", "made of strings"),
        (STRING, [tensor("input", "BYTES", [1])], {}, "inputs[0].data", "missing"),
        (NUMBER, [tensor("input", "FP32", [2], data=[1, "1"])], {}, "inputs[0].data[1]", "made of numbers"),
        (NUMBER, [tensor("input", "FP32", [1], data=[True])], {}, "inputs[0].data[0]", "made of numbers"),
        (NUMBER, [tensor("input", "FP32", [1], data=[None])], {}, "inputs[0].data[0]", "made of numbers"),
        (NUMBER, [tensor("input", "INT8", [1], data=[1.0])], {}, "inputs[0].data[0]", "made of integers"),
        (NUMBER, [tensor("input", "INT8", [2], data=[127, 128])], {}, "inputs[0].data[1]", "128 does not fit in INT8"),
        (NUMBER, [tensor("input", "UINT64", [1], data=[-1])], {}, "inputs[0].data[0]", "fit in UINT64"),
        (NUMBER, [tensor("input", "FP32", [2], data=[1, 1e39])], {}, "inputs[0].data[1]", "fit in FP32"),
        (NUMBER, [tensor("input", "FP16", [1], data=[65520])], {}, "inputs[0].data[0]", "fit in FP16"),
        (NUMBER, [tensor("input", "BF16", [1], data=[1])], {}, "inputs[0].data", "no JSON form"),
        (MODULE, [tensor("input", "BOOL", [1], data=[1])], {}, "inputs[0].data[0]", "made of booleans"),
        (MODULE, [tensor("a", "BYTES", [1], data=["1"])], {}, "inputs[0].datatype", "FP32, not BYTES"),
        (NUMBERS, [tensor("input", "FP32", [2, 2], data=[[1, 2], [3]])], {}, "inputs[0].data", "nested"),
        (NUMBERS, [tensor("input", "FP32", [2, 2], data=[[1, 2], 3])], {}, "inputs[0].data", "nested"),
        (NUMBERS, [tensor("input", "FP32", [2, 2], data=[[1, 2, 3, 4]])], {}, "inputs[0].data", "nested"),
        (NUMBERS, [tensor("input", "FP32", [1, 1], data=[[[1]]])], {}, "inputs[0].data[0]", "made of numbers"),
        (ANY, changed(data=["{"]), {}, "inputs[0].data[0]", "not JSON"),
        (STRING, changed(parameters=3), {}, "inputs[0].parameters", "object"),
        (STRING, changed(parameters=REGION), {}, "inputs[0].parameters.shared_memory_region", "shared memory"),
        (STRING, changed(parameters={"binary_data_size": 5}), {}, "inputs[0].data", "send one of them"),
        (STRING, [GOOD], {"outputs": {}}, "outputs", "list"),
        (STRING, [GOOD], {"outputs": ["output"]}, "outputs[0]", "object"),
        (STRING, [GOOD], {"outputs": [{}]}, "outputs[0].name", "name"),
        (STRING, [GOOD], {"outputs": [{"name": "o", "data": []}]}, "outputs[0].data", "unknown"),
        (STRING, [GOOD], {"outputs": [{"name": "o"}, {"name": "o"}]}, "outputs[1].name", "twice"),
        (TEXT, [GOOD], {"outputs": [{"name": "logits"}]}, "outputs[0].name", "the model gives output"),
        (
            STRING,
            [GOOD],
            {"outputs": [{"name": "o", "parameters": {"binary_data": "yes"}}]},
            "outputs[0].parameters.binary_data",
            "true or false",
        ),
        (
            STRING,
            [GOOD],
            {"outputs": [{"name": "o", "parameters": {"classification": 3}}]},
            "outputs[0].parameters.classification",
            "not supported",
        ),
        (
            STRING,
            [GOOD],
            {"outputs": [{"name": "o", "parameters": REGION}]},
            "outputs[0].parameters.shared_memory_region",
            "shared memory",
        ),
    ],
)
def test_a_wrong_request_names_its_place(info: ModelInfo, inputs: Any, more: Any, field: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(info, inputs, **more)
    assert caught.value.field == field
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "field", "message"),
    [
        ("FP32", [2], b"1234", "inputs[0].shape", "holds 8 bytes of FP32, 4 came"),
        ("FP32", [2**62, 2**62], b"1234", "inputs[0].shape", "bytes of FP32, 4 came"),
        ("BOOL", [2], b"\x01\x02", "inputs[0].data[1]", "0 or 1"),
        ("BYTES", [2], pack(b"a"), "inputs[0].shape", "holds 2 elements, 1 came"),
        ("BYTES", [2**63], pack(b"1"), "inputs[0].shape", "elements, 1 came"),
        ("BYTES", [1], pack(b"1", b"2"), "inputs[0].shape", "holds 1 elements, 2 came"),
        ("BYTES", [1], b"\x01\x00", "inputs[0].data[0]", "2 bytes are left, its length takes 4"),
        ("BYTES", [2], pack(b"1") + b"\xff\xff\xff\xffa", "inputs[0].data[1]", "4294967295 bytes where 1 are left"),
        ("BYTES", [1], pack(b"\xff"), "inputs[0].data[0]", "not JSON"),
    ],
)
def test_wrong_bytes_name_their_place(datatype: str, shape: list[int], data: bytes, field: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(ANY, [binary("input", datatype, shape, data)[0]], data)
    assert caught.value.field == field
    assert message in caught.value.message


def test_text_must_be_utf8() -> None:
    given, tail = binary("input", "BYTES", [2], pack(b"ok", b"a\xff"))
    with pytest.raises(InvalidInput, match="not UTF-8 at byte 1") as caught:
        read(STRING, [given], tail)
    assert caught.value.field == "inputs[0].data[1]"


@pytest.mark.parametrize("size", [-1, 1.0, True, "4"])
def test_a_binary_size_is_a_number(size: Any) -> None:
    with pytest.raises(InvalidInput, match="number of bytes") as caught:
        read(STRING, [tensor("input", "BYTES", [1], parameters={"binary_data_size": size})], b"")
    assert caught.value.field == "inputs[0].parameters.binary_data_size"


def test_lengths_must_add_up() -> None:
    given, tail = binary("input", "BYTES", [1], pack(b"a"))
    content, length = body([given], tail)
    for wrong in (0, -1, len(content) + 1):
        with pytest.raises(MalformedBody, match="where the body has") as caught:
            inference.read(content, wrong, STRING)
        assert caught.value.field == "Inference-Header-Content-Length"
    with pytest.raises(MalformedBody, match="1 bytes after the last tensor"):
        inference.read(content + b"x", length, STRING)
    with pytest.raises(MalformedBody, match="says 5 where 4 bytes are left") as caught:
        inference.read(content[:-1], length, STRING)
    assert caught.value.field == "inputs[0].parameters.binary_data_size"
    with pytest.raises(MalformedBody, match="not JSON"):
        inference.read(content, None, STRING)
    with pytest.raises(MalformedBody, match="where 0 bytes are left"):
        inference.read(content[:length], None, STRING)
    with pytest.raises(InvalidInput, match="NaN") as found:
        inference.read(b'{"inputs":[{"data":[NaN]}]}', None, NUMBER)
    assert found.value.field == "inputs[0].data[0]"
    with pytest.raises(InvalidInput, match="must be an object"):
        inference.read(b"[]", None, STRING)


def test_the_length_header() -> None:
    assert inference.json_length({}) is None
    assert inference.json_length({inference.LENGTH_HEADER: b"12"}) == 12
    for value in (b"", b"-1", b"1.0", b"9" * 40, "٣".encode()):
        with pytest.raises(MalformedBody, match="number of bytes"):
            inference.json_length({inference.LENGTH_HEADER: value})


# Answers.


@pytest.mark.parametrize(
    ("info", "values", "datatype", "shape", "data"),
    [
        (TEXT, [np.array([1, 2], np.float32)] * 2, "FP32", [2, 2], [1.0, 2.0, 1.0, 2.0]),
        (NUMBER, [1, 2.5], "FP64", [2], [1.0, 2.5]),
        (NUMBER, [1, 2], "FP64", [2], [1.0, 2.0]),
        (ANY, [1, -2], "INT64", [2], [1, -2]),
        (ANY, [2**64 - 1], "UINT64", [1], [2**64 - 1]),
        (ANY, [2**64 - 1, -1], "BYTES", [2], ["18446744073709551615", "-1"]),
        (ANY, [True, False], "BOOL", [2], [True, False]),
        (ANY, [True, 1], "BYTES", [2], ["true", "1"]),
        (ANY, ["a", "ü"], "BYTES", [2], ["a", "ü"]),
        (ANY, ["a", 1], "BYTES", [2], ['"a"', "1"]),
        (ANY, [None, "a"], "BYTES", [2], ["null", '"a"']),
        (ANY, [[1.5, 2], [3, 4]], "FP64", [2, 2], [1.5, 2.0, 3.0, 4.0]),
        (ANY, [[], []], "FP64", [2, 0], []),
        (ANY, [[1], [1, 2]], "BYTES", [2], ["[1]", "[1,2]"]),
        (ANY, [["x"], [1]], "BYTES", [2], ['["x"]', "[1]"]),
        (ANY, [np.zeros(1), np.zeros(2)], "BYTES", [2], ["[0.0]", "[0.0,0.0]"]),
        (ANY, [[np.ones(1), np.zeros(1)]], "FP64", [1, 2, 1], [1.0, 0.0]),
        (ANY, [np.array([1], ">i2")], "INT16", [1, 1], [1]),
        (ANY, [np.asfortranarray([[1, 2], [3, 4]])], "INT64", [1, 2, 2], [1, 2, 3, 4]),
        (ANY, [np.array([1j])], "BYTES", [1], None),
        (MODULE, [np.array([True])], "BOOL", [1, 1], [True]),
        (MODULE, [np.array([np.nan], np.float16)], "FP16", [1, 1], [None]),
        (CLASSIFY, [{"label": "a", "score": 0.5}], "BYTES", [1], ['{"label":"a","score":0.5}']),
        (ANY, [{"a": np.ones(1)}, {"b": np.ones(1)}], "BYTES", [2], ['{"a":[1.0]}', '{"b":[1.0]}']),
        (ANY, [{}], "BYTES", [1], ["{}"]),
    ],
)
def test_answers_become_a_tensor(info: ModelInfo, values: list[Any], datatype: str, shape: Any, data: Any) -> None:
    if data is None:
        with pytest.raises(RunnerError):  # complex numbers have no JSON form in any protocol of ours
            answer(info, values)
        return
    expected = {"name": "output", "datatype": datatype, "shape": shape, "data": data}
    assert answer(info, values) == {"output": expected}


def test_deeply_nested_answers_are_json() -> None:
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    assert answer(ANY, [deep])["output"]["datatype"] == "BYTES"


def test_dictionaries_of_arrays_become_one_output_each() -> None:
    values = [{"a": np.array([1.0, row]), "b": np.arange(row)} for row in (1, 2)]
    found = answer(MODULE, values)
    assert found["a"] == {"name": "a", "datatype": "FP64", "shape": [2, 2], "data": [1.0, 1.0, 1.0, 2.0]}
    assert found["b"] == {"name": "b", "datatype": "BYTES", "shape": [2], "data": ["[0]", "[0,1]"]}
    assert list(answer(MODULE, values, [Output("b")])) == ["b"]
    with pytest.raises(InvalidInput, match="unknown output c; the model gives a, b") as caught:
        answer(MODULE, values, [Output("a"), Output("c")])
    assert caught.value.field == "outputs[1].name"


def test_binary_outputs_follow_the_json_in_order() -> None:
    wanted = [Output("b"), Output("a", False), Output("c", True)]
    values = [{"a": np.float32([1]), "b": np.int16([2]), "c": np.array([True])}]
    content, length = inference.write(Inference("i", [], wanted, True, False), MODULE, "other", values)
    head = orjson.loads(content[:length])
    assert head == {
        "id": "i",
        "model_name": "other",
        "model_version": "1",
        "outputs": [
            {"name": "b", "datatype": "INT16", "shape": [1, 1], "parameters": {"binary_data_size": 2}},
            {"name": "a", "datatype": "FP32", "shape": [1, 1], "data": [1.0]},
            {"name": "c", "datatype": "BOOL", "shape": [1, 1], "parameters": {"binary_data_size": 1}},
        ],
    }
    assert content[length:] == b"\x02\x00\x01"


def test_bytes_that_are_no_text_are_not_put_into_json() -> None:
    assert answer(ANY, [b"text"])["output"]["data"] == ["text"]
    with pytest.raises(InvalidInput, match="no form") as caught:
        answer(ANY, [b"\xff"])
    assert caught.value.field == "outputs[0]"
    content, length = inference.write(Inference("", [], [], True, False), ANY, "m", [b"\xff", "a"])
    assert content[length:] == pack(b"\xff", b"a")


def test_errors_are_one_sentence() -> None:
    assert inference.error_body(InvalidInput("is wrong", field="inputs[0]", hint="mend it")) == {
        "error": "inputs[0]: is wrong (mend it)"
    }
    assert inference.error_body(MalformedBody("broken")) == {"error": "broken"}


# The front end's side.


def test_paths() -> None:
    assert inference.is_model_path(["m"])
    assert inference.is_model_path(["m", "versions", "1"])
    for wrong in ([], [""], ["m", "versions", "2"], ["m", "versions"], ["m", "other", "1"], ["", "versions", "1"]):
        assert not inference.is_model_path(wrong)


@pytest.mark.parametrize(
    ("info", "inputs", "expected"),
    [
        (NUMBER, [tensor("input", "FP32", [2], data=[1, 2])], [1.0, 2.0]),
        (NUMBERS, [tensor("input", "FP32", [1, 2], data=[1, 2])], [[1.0, 2.0]]),
        (MODULE, [tensor("x", "FP32", [1, 2], data=[1, 2])], [{"x": [1.0, 2.0]}]),
        (IMAGE, [tensor("input", "BYTES", [1], data=["aGk="])], [b"hi"]),
        (ANY, [tensor("input", "INT8", [1], data=[3])], [3]),
    ],
)
def test_the_item_reader_takes_the_items(info: ModelInfo, inputs: Any, expected: list[Any]) -> None:
    content, _ = body(inputs)
    exchange = inference.Request.read(content, {}, info)
    reader = ItemReader(ModelConfig(name="m", target="m:f"), info)
    found = [asyncio.run(exchange.read(index, reader)) for index in range(len(exchange.values))]
    assert [decode_value(item.body) for item in found] == expected
    assert orjson.loads(exchange.write(expected)[0])["model_name"] == info.name


def test_a_wrong_item_is_named_by_its_row() -> None:
    info = python({"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}})
    reader = ItemReader(ModelConfig(name="m", target="m:f"), info)
    exchange = inference.Request.read(body([tensor("age", "INT8", [2], data=[1, -1])])[0], {}, info)
    with pytest.raises(InvalidInput) as caught:
        asyncio.run(exchange.read(1, reader))
    assert caught.value.field == "item[1].age"
    reader = ItemReader(ModelConfig(name="m", target="m:f"), NUMBER)
    given, tail = binary("input", "FP64", [1], np.array([np.nan]).tobytes())
    content, length = body([given], tail)
    exchange = inference.Request.read(content, {inference.LENGTH_HEADER: str(length).encode()}, NUMBER)
    with pytest.raises((InvalidInput, UnsupportedMediaType)) as refused:
        asyncio.run(exchange.read(0, reader))
    assert refused.value.field == "inputs[0].data[0]"


# Any tensor comes back as it went; any bytes give items or an error of ours.


def encode(name: str, datatype: str, array: np.ndarray[Any, Any], as_binary: bool, nested: bool) -> tuple[Any, bytes]:
    shape = list(array.shape)
    if as_binary:
        return binary(name, datatype, shape, array.tobytes())
    return tensor(name, datatype, shape, data=array.tolist() if nested else array.ravel().tolist()), b""


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, np.ndarray[Any, Any]]:
    datatype = draw(st.sampled_from(sorted(DATATYPES)))
    shape = draw(stn.array_shapes(min_dims=2, max_dims=5, max_side=4))
    finite = {"allow_nan": False, "allow_infinity": False} if datatype.startswith("FP") else {}
    dtype = np.dtype(DATATYPES[datatype])
    return datatype, draw(stn.arrays(dtype, shape, elements=stn.from_dtype(dtype, **finite)))


@given(tensors(), st.booleans(), st.booleans())
def test_any_tensor_is_read_as_it_was_written(
    made: tuple[str, np.ndarray[Any, Any]], as_binary: bool, nested: bool
) -> None:
    datatype, array = made
    given, tail = encode("input", datatype, array, as_binary, nested)
    items = read(MODULE, [given], tail).items
    assert all(item.dtype == array.dtype for item in items)
    np.testing.assert_array_equal(np.stack(items), array)


@given(tensors(), st.booleans())
def test_any_tensor_is_written_as_it_can_be_read(made: tuple[str, np.ndarray[Any, Any]], as_binary: bool) -> None:
    datatype, array = made
    content, length = inference.write(Inference("", [], [], as_binary, False), MODULE, "m", list(array))
    (output,) = orjson.loads(content[:length])["outputs"]
    output = {**output, "name": "input"}
    assert output["datatype"] == datatype
    items = read(MODULE, [output], content[length:] if length else None).items
    np.testing.assert_array_equal(np.stack(items), array)


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=9))
def test_any_bytes_are_read_as_they_were_written(elements: list[bytes]) -> None:
    given, tail = binary("input", "BYTES", [len(elements)], pack(*elements))
    assert read(IMAGE, [given], tail).items == elements


INFOS = st.sampled_from([TEXT, LOGITS, CLASSIFY, MODULE, STRING, NUMBER, NUMBERS, IMAGE, ANY, PERSON])


@given(st.binary(max_size=200), st.none() | st.integers(-2, 220), INFOS)
def test_rubbish_is_refused_as_such(content: bytes, length: int | None, info: ModelInfo) -> None:
    with pytest.raises(HeadraceError):
        inference.read(content, length, info)


LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(width=64) | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)
TENSORS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["input", "input_ids", "name", "age", "x"]) | VALUES,
        "datatype": st.sampled_from([*DATATYPES, "BF16", "BYTES"]) | VALUES,
        "shape": st.lists(st.integers(0, 3), max_size=3) | st.lists(st.integers(-1, 2**64 - 1), max_size=3) | VALUES,
    },
    optional={
        "data": st.lists(st.integers(-3, 300) | st.text(max_size=2), max_size=4) | VALUES,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(0, 20) | VALUES}) | VALUES,
    },
)
REQUESTS = st.fixed_dictionaries(
    {"inputs": st.lists(TENSORS, max_size=3) | VALUES},
    optional={"outputs": st.lists(st.fixed_dictionaries({"name": st.text(max_size=3)}), max_size=2) | VALUES},
)


@given(REQUESTS, st.binary(max_size=24), INFOS)
def test_almost_right_requests_are_read_or_refused(request: Any, tail: bytes, info: ModelInfo) -> None:
    head = orjson.dumps(request)
    try:
        found = inference.read(head + tail, len(head) if tail else None, info)
    except (InvalidInput, MalformedBody) as error:
        orjson.dumps(inference.error_body(error))
    else:
        assert found.items


@given(
    st.lists(
        VALUES | stn.arrays(stn.integer_dtypes(endianness="<") | stn.floating_dtypes(endianness="<"), (2,)),
        min_size=1,
        max_size=4,
    )
)
def test_any_answers_can_be_written(values: list[Any]) -> None:
    content, length = inference.write(Inference("", [], [], True, False), ANY, "m", values)
    sizes = [output["parameters"]["binary_data_size"] for output in orjson.loads(content[:length])["outputs"]]
    assert sum(sizes) == len(content) - (length or 0)


def test_deep_nesting_is_refused() -> None:
    for content in (b"[" * 100_000, b'{"inputs":' + b"[" * 900 + b"]" * 900 + b"}"):
        with pytest.raises(HeadraceError):
            inference.read(content, None, ANY)


# The client that this protocol is here for.


def from_triton(inputs: list[Any], outputs: list[Any] | None = None, **more: Any) -> tuple[bytes, int | None]:
    client = pytest.importorskip("tritonclient.http")
    content, length = client.InferenceServerClient.generate_request_body(inputs, outputs, **more)
    assert isinstance(content, bytes)
    return content, length


def triton_input(name: str, datatype: str, array: np.ndarray[Any, Any], as_binary: bool) -> Any:
    client = pytest.importorskip("tritonclient.http")
    made = client.InferInput(name, list(array.shape), datatype)
    return made.set_data_from_numpy(array, binary_data=as_binary)


@pytest.mark.parametrize("as_binary", [False, True])
@pytest.mark.parametrize("datatype", DATATYPES)
def test_tritonclient_sends_and_gets_every_datatype(datatype: str, as_binary: bool) -> None:
    client = pytest.importorskip("tritonclient.http")
    array = np.array([[0, 1, 1], [1, 0, 1]], DATATYPES[datatype])
    outputs = [client.InferRequestedOutput("output", binary_data=as_binary)]
    content, length = from_triton([triton_input("input", datatype, array, as_binary)], outputs, request_id="r")
    found = inference.read(content, length, MODULE)
    np.testing.assert_array_equal(np.stack(found.items), array)
    written, json_length = inference.write(found, MODULE, "net", found.items)
    result = client.InferResult.from_response_body(written, header_length=json_length)
    assert result.get_response()["id"] == "r"
    assert result.as_numpy("output").dtype == array.dtype
    np.testing.assert_array_equal(result.as_numpy("output"), array)


@pytest.mark.parametrize("as_binary", [False, True])
def test_tritonclient_sends_and_gets_texts(as_binary: bool) -> None:
    client = pytest.importorskip("tritonclient.http")
    texts = np.array(["a", "Zoë", ""], np.object_)
    outputs = [client.InferRequestedOutput("output", binary_data=as_binary)]
    content, length = from_triton([triton_input("input", "BYTES", texts, as_binary)], outputs)
    found = inference.read(content, length, STRING)
    assert found.items == ["a", "Zoë", ""]
    written, json_length = inference.write(found, STRING, "mine", found.items)
    result = client.InferResult.from_response_body(written, header_length=json_length).as_numpy("output")
    assert [each.decode() if as_binary else each for each in result] == found.items


def test_tritonclient_gets_binary_when_it_asks_for_nothing() -> None:
    client = pytest.importorskip("tritonclient.http")
    ids = np.array([[1, 2], [3, 4]])
    inputs = [triton_input(name, "INT64", array, True) for name, array in (("input_ids", ids), ("attention_mask", ids))]
    content, length = from_triton(inputs, sequence_id=3, priority=1, timeout=5)
    found = inference.read(content, length, TEXT)
    assert found.binary_default
    assert found.items == [{"input_ids": row, "attention_mask": row} for row in ids.tolist()]
    vectors = np.random.default_rng(0).random((2, 4), np.float32)
    written, json_length = inference.write(found, TEXT, "mini", list(vectors))
    assert json_length
    result = client.InferResult.from_response_body(written, header_length=json_length)
    np.testing.assert_array_equal(result.as_numpy("output"), vectors)


def test_what_tritonclient_asks_for_and_is_not_here_is_refused() -> None:
    client = pytest.importorskip("tritonclient.http")
    given = triton_input("input", "FP32", np.ones((1, 2), np.float32), True)
    for output, field in (
        (client.InferRequestedOutput("output", class_count=2), "classification"),
        (client.InferRequestedOutput("output"), "shared_memory_region"),
    ):
        if field == "shared_memory_region":
            output.set_shared_memory("r", 8)
        with pytest.raises(InvalidInput, match="not supported") as caught:
            inference.read(*from_triton([given], [output]), MODULE)
        assert caught.value.field == f"outputs[0].parameters.{field}"
    given = client.InferInput("input", [1, 2], "FP32").set_shared_memory("r", 8)
    with pytest.raises(InvalidInput, match="shared memory"):
        inference.read(*from_triton([given]), MODULE)
