"""What an agent's code gets from its context: values of one type always, steps that are not repeated, refusals."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import decimal
import functools
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pydantic
import pytest

from headrace import metrics
from headrace.errors import CodeChanged, InvalidInput, StepFailed, ValueTooLarge
from headrace.tasks.context import Context, Suspended
from headrace.tasks.store import Claim


class Notebook:
    """A task's journal and events in memory, for as many attempts as a test makes."""

    def __init__(self) -> None:
        self.journal: dict[str, bytes] = {}
        self.events: list[dict[str, Any]] = []
        self.attempts = 0

    async def __call__(self, field: str = "", value: bytes = b"", events: Sequence[bytes] = ()) -> None:
        if field:
            assert field not in self.journal, "journalled once"
            self.journal[field] = value
        self.events += [json.loads(event) for event in events]

    def attempt(self, code: Callable[[Context], Awaitable[Any]], max_value_bytes: int = 4096) -> Any:
        """What the code gives with the journal as it is now."""
        self.attempts += 1
        claim = Claim("t1", self.attempts, 1, "agent", "default", "", b"", 0, 0, 10**15, dict(self.journal))

        async def run() -> Any:
            self.row = metrics.Row()
            return await code(Context(claim, self, max_value_bytes=max_value_bytes, row=self.row))

        return asyncio.run(run())

    def names(self) -> list[str]:
        return [event.get("stepName") or event.get("name") or event["type"] for event in self.events]


@dataclasses.dataclass
class Point:
    x: int
    at: datetime.datetime


class Hit(pydantic.BaseModel):
    where: Point
    tags: set[str] = set()


NOON = datetime.datetime(2026, 1, 2, 12, 0, tzinfo=datetime.UTC)


def a_dataclass() -> Point:
    return Point(1, NOON)


def a_model() -> Hit:
    return Hit(where=Point(2, NOON), tags={"a"})


def a_list_of_models() -> list[Hit]:
    return [a_model()]


def a_tuple() -> tuple[int, str, Point]:
    return 1, "two", Point(3, NOON)


def a_moment() -> datetime.datetime:
    return NOON


def a_duration() -> datetime.timedelta:
    return datetime.timedelta(seconds=90)


def a_decimal() -> decimal.Decimal:
    return decimal.Decimal("1.10")


def an_id() -> uuid.UUID:
    return uuid.UUID(int=7)


def a_path() -> Path:
    return Path("/tmp/x")


def keyed_by_numbers() -> dict[int, frozenset[str]]:
    return {1: frozenset("ab")}


def perhaps() -> Hit | None:
    return None


async def later() -> Point:
    return Point(4, NOON)


@pytest.mark.parametrize(
    "function",
    [
        *(a_dataclass, a_model, a_list_of_models, a_tuple, a_moment, a_duration, a_decimal, an_id, a_path),
        *(keyed_by_numbers, perhaps, later, functools.partial(a_tuple)),
    ],
)
def test_a_value_comes_back_as_what_it_was_the_first_time_and_every_other(function: Callable[[], Any]) -> None:
    made = function()
    expected = asyncio.run(made) if asyncio.iscoroutine(made) else made
    notebook = Notebook()
    for _ in range(3):
        value = notebook.attempt(lambda ctx: ctx.step("s", function))
        assert value == expected
        assert type(value) is type(expected)
    assert notebook.names() == ["s", "s"], "began and finished once"


def test_without_an_annotation_the_first_run_sees_plain_json_as_all_others_do() -> None:
    def bare():  # type: ignore[no-untyped-def]  # as many authors write it
        return (1, Point(1, NOON))

    notebook = Notebook()
    first, second = (notebook.attempt(lambda ctx: ctx.step("s", bare)) for _ in range(2))
    assert first == second == [1, {"x": 1, "at": "2026-01-02T12:00:00Z"}]


class Closed:
    """Nothing that JSON knows."""


def unwritable() -> Any:
    return {"a": Closed()}


def not_a_number() -> float:
    return float("nan")


def not_what_it_says() -> int:
    return "text"  # type: ignore[return-value]


def bytes_of_no_text() -> bytes:
    return b"\xff"


@pytest.mark.parametrize("function", [unwritable, not_a_number, not_what_it_says, bytes_of_no_text])
def test_a_value_that_is_no_json_of_its_type_fails_the_step_and_is_not_kept(function: Callable[[], Any]) -> None:
    notebook = Notebook()
    with pytest.raises(StepFailed, match="'s' cannot be kept as JSON") as failed:
        notebook.attempt(lambda ctx: ctx.step("s", function))
    assert failed.value.hint
    assert notebook.journal == {}
    assert notebook.names() == ["s"], "it has begun, and not finished"


def test_a_type_that_cannot_be_written_is_refused_before_the_step_is_made() -> None:
    made = []

    def opened() -> Closed:
        made.append(1)
        return Closed()

    with pytest.raises(StepFailed, match="Closed") as failed:
        Notebook().attempt(lambda ctx: ctx.step("s", opened))
    assert failed.value.hint
    assert made == [], "what it does would have been done in vain"


def test_an_annotation_that_has_changed_is_not_a_wrong_value() -> None:
    notebook = Notebook()
    notebook.journal["1:s"] = b'"text"'
    with pytest.raises(StepFailed, match="does not fit its type any more") as failed:
        notebook.attempt(lambda ctx: ctx.step("s", not_what_it_says))
    assert failed.value.hint
    assert "fresh=1" in failed.value.hint


def test_steps_that_are_done_are_not_made_again_and_the_rest_goes_on() -> None:
    notebook, made = Notebook(), []

    def work(name: str) -> str:
        made.append(name)
        if name == "b" and made.count("b") == 1:
            raise OSError("away")
        return name.upper()

    async def code(ctx: Context) -> list[str]:
        return [await ctx.step(name, work, name) for name in "abc"]

    with pytest.raises(OSError, match="away"):
        notebook.attempt(code)
    assert notebook.attempt(code) == ["A", "B", "C"]
    assert made == ["a", "b", "b", "c"]
    assert notebook.journal == {"1:a": b'"A"', "2:b": b'"B"', "3:c": b'"C"'}
    counts = metrics.Reader(rows=[notebook.row]).values()
    assert [counts["headrace_task_steps_total", ("agent", how)] for how in metrics.STEP_STATUSES] == [[2], [0], [1]]


def test_steps_of_one_moment_have_numbers_in_the_order_of_their_calls() -> None:
    async def give(value: int, pause_s: float) -> int:
        await asyncio.sleep(pause_s)
        return value

    async def code(ctx: Context) -> list[int]:
        return list(await asyncio.gather(ctx.step("slow", give, 1, 0.05), ctx.step("fast", give, 2, 0)))

    notebook = Notebook()
    assert notebook.attempt(code) == [1, 2]
    assert list(notebook.journal) == ["2:fast", "1:slow"], "journalled as they end"
    assert notebook.attempt(code) == [1, 2]


def test_other_steps_than_before_are_changed_code() -> None:
    notebook = Notebook()
    notebook.attempt(lambda ctx: ctx.step("search", len, "abc"))
    with pytest.raises(CodeChanged, match="step 1 is 'write' now and was 'search'") as changed:
        notebook.attempt(lambda ctx: ctx.step("write", len, "abc"))
    assert changed.value.hint
    with pytest.raises(CodeChanged):
        notebook.attempt(lambda ctx: ctx.ask("sure?"))


def test_a_step_is_tried_again_for_the_exceptions_it_names_and_no_others() -> None:
    made = []

    def work() -> int:
        made.append(1)
        if len(made) < 2:
            raise ConnectionError("away")
        return len(made)

    assert Notebook().attempt(lambda ctx: ctx.step("s", work, retries=1, retry_on=ConnectionError)) == 2
    made.clear()
    with pytest.raises(ConnectionError):
        Notebook().attempt(lambda ctx: ctx.step("s", work, retries=5, retry_on=(ValueError, KeyError)))
    assert len(made) == 1


def test_a_step_has_its_own_time_limit() -> None:
    with pytest.raises(TimeoutError):
        Notebook().attempt(lambda ctx: ctx.step("s", asyncio.sleep, 3600, timeout_s=0.01))


def test_a_key_of_idempotency_is_the_steps_own_and_the_same_in_each_attempt() -> None:
    seen: list[str] = []

    async def code(ctx: Context) -> None:
        async def use(fail: bool) -> None:
            seen.append(ctx.idempotency_key)
            if fail:
                raise OSError

        await ctx.step("a", use, False)
        await ctx.step("b", use, len(seen) < 2)

    notebook = Notebook()
    with pytest.raises(OSError):  # noqa: PT011 - our own, two lines above
        notebook.attempt(code)
    notebook.attempt(code)
    assert seen[1] == seen[2]
    assert len(set(seen)) == 2


@pytest.mark.parametrize("what", ["step", "event", "question"])
def test_what_is_too_large_says_so_and_what_to_do(what: str) -> None:
    async def code(ctx: Context) -> None:
        if what == "step":
            await ctx.step("s", lambda: "x" * 5000)
        elif what == "event":
            await ctx.emit("CUSTOM", name="n", value="x" * 5000)
        else:
            await ctx.ask("x" * 5000)

    notebook = Notebook()
    with pytest.raises(ValueTooLarge, match="at most 4096") as large:
        notebook.attempt(code)
    assert large.value.hint
    assert "max_value_bytes" in large.value.hint
    assert notebook.journal == {}


@pytest.mark.parametrize(
    ("type_", "fields", "field"),
    [
        ("CUSTOM", {"value": 1}, "name"),
        ("NEWS", {}, "type"),
        ("RUN_FINISHED", {}, "type"),
        ("STEP_FINISHED", {"step_name": "s"}, "type"),
        ("CUSTOM", {"name": "n", "value": Closed()}, "value"),
        ("TEXT_MESSAGE_CONTENT", {"message_id": "m"}, "delta"),
    ],
)
def test_an_event_that_is_none_is_refused_by_its_field(type_: str, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Notebook().attempt(lambda ctx: ctx.emit(type_, **fields))
    assert refused.value.field == field


def test_a_question_is_asked_once_and_its_answer_has_the_type_asked_for() -> None:
    notebook = Notebook()
    with pytest.raises(Suspended) as suspended:
        notebook.attempt(lambda ctx: ctx.ask("when?", datetime.date))
    change = suspended.value.change
    asked = json.loads(change.argument)
    assert (change.what, asked["prompt"], asked["schema"]) == ("ask", "when?", {"type": "string", "format": "date"})
    notebook.journal[asked["field"]] = b'"2026-01-02"'
    assert notebook.attempt(lambda ctx: ctx.ask("when?", datetime.date)) == datetime.date(2026, 1, 2)


@pytest.mark.parametrize(("schema", "answer"), [({"type": "integer"}, 3), (None, {"any": [1]})])
def test_a_question_may_have_a_schema_of_json_or_none(schema: Any, answer: Any) -> None:
    notebook = Notebook()
    notebook.journal["1:ask"] = json.dumps(answer).encode()
    assert notebook.attempt(lambda ctx: ctx.ask("?", schema)) == answer


def test_a_long_sleep_holds_no_worker_and_counts_from_its_first_call() -> None:
    notebook = Notebook()
    with pytest.raises(Suspended) as suspended:
        notebook.attempt(lambda ctx: ctx.sleep(3600))
    change = suspended.value.change
    assert (change.what, change.field, change.value) == ("sleep", "1:sleep", change.argument)
    notebook.journal["1:sleep"] = change.value
    with pytest.raises(Suspended) as again:
        notebook.attempt(lambda ctx: ctx.sleep(3600))
    assert again.value.change.argument == change.argument, "a crash makes it no longer"
    notebook.journal["1:sleep"] = b"1000"
    assert notebook.attempt(lambda ctx: ctx.sleep(3600)) is None


def test_steps_within_a_step_are_kept_until_it_is_done_itself() -> None:
    made: list[str] = []

    async def code(ctx: Context) -> int:
        async def inner(name: str) -> int:
            made.append(name)
            return len(name)

        async def outer(breaks: bool) -> int:
            total: int = await ctx.step("inner", inner, "one") + await ctx.step("inner", inner, "three")
            if breaks:
                raise ConnectionError
            return total

        first: int = await ctx.step("outer", outer, not made)
        return first + int(await ctx.step("last", inner, "last"))

    notebook = Notebook()
    with pytest.raises(ConnectionError):
        notebook.attempt(code)
    assert list(notebook.journal) == ["1.1:inner", "1.2:inner"]
    for _ in range(2):
        assert notebook.attempt(code) == 12
    assert made == ["one", "three", "last"]
    assert list(notebook.journal) == ["1.1:inner", "1.2:inner", "1:outer", "2:last"]


def test_a_body_that_is_tried_again_finds_its_own_steps_done() -> None:
    made: list[int] = []

    async def code(ctx: Context) -> int:
        async def inner() -> int:
            made.append(1)
            return 7

        async def outer() -> int:
            value: int = await ctx.step("inner", inner)
            tries.append(value)
            if len(tries) < 2:
                raise ConnectionError
            return value

        tries: list[int] = []
        value: int = await ctx.step("outer", outer, retries=1)
        return value

    assert Notebook().attempt(code) == 7
    assert len(made) == 1
