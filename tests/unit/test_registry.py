"""What an author's function becomes."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from headrace.errors import ConfigError, InvalidInput, LoadError
from headrace.tasks.registry import load_app, make


class Order(pydantic.BaseModel):
    item: str
    count: int = 1


async def one(ctx: Any, message: str) -> str:
    return message


async def several(ctx: Any, count: int, note: str, order: Order | None = None) -> Order | None:
    return order


async def whole(ctx: Any, order: Order) -> int:
    return order.count


async def nothing(ctx: Any) -> None: ...


async def some(ctx: Any, count: int = 3) -> int:
    return count


def schema(function: Any) -> Any:
    return json.loads(bytes(make(function).spec().schema))


def test_one_parameter_receives_the_whole_input() -> None:
    assert schema(one) == {"type": "string"}
    assert make(one).arguments(b'"hi"') == (["hi"], {})
    assert make(whole).arguments(b'{"item":"a"}') == ([Order(item="a")], {})


def test_several_take_an_object_of_keywords() -> None:
    assert set(schema(several)["required"]) == {"count", "note"}
    given = make(several).arguments(b'{"count":1,"note":"n","order":{"item":"a","count":2}}')
    assert given == ([], {"count": 1, "note": "n", "order": Order(item="a", count=2)})


def test_a_message_fills_the_only_or_the_first_text() -> None:
    assert [make(each).spec().message_parameter for each in (one, whole, several, nothing)] == ["", "", "note", None]


def test_what_may_be_left_out() -> None:
    assert [make(each).spec().optional for each in (one, several, nothing, some)] == [False, False, True, True]
    assert make(some).arguments(b"") == ([], {})
    assert make(nothing).arguments(b"") == ([], {})


def test_what_fits_the_schema_and_not_the_type_is_said_by_its_place() -> None:
    with pytest.raises(InvalidInput) as error:
        make(several).arguments(b'{"count":1,"note":"n","order":{"item":5}}')
    assert error.value.field
    assert error.value.field.startswith("input.order")


def test_what_cannot_be_an_agent() -> None:
    def plain(ctx: Any) -> None: ...

    async def without() -> None: ...

    async def rest(ctx: Any, *values: int) -> None: ...

    for function, says in ((plain, "not an async function"), (without, "no context"), (rest, "without a name")):
        with pytest.raises(ConfigError, match=says):
            make(function)
    with pytest.raises(ConfigError, match="no priority"):
        make(one, priority="high")
    with pytest.raises(ConfigError, match="name"):
        make(one, name="a b")


def test_an_app_that_cannot_be_loaded_says_why() -> None:
    with pytest.raises(LoadError, match="no file"):
        load_app("nowhere.py")
    with pytest.raises(LoadError, match="No module named"):
        load_app("no_such_module_at_all")
    with pytest.raises(LoadError, match="defines no agent"):
        load_app("json.tool")
