"""`timed` on everything that can be called, and `timeit`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Generator, Iterator

import pytest

from headrace.clock import perf_counter
from headrace.profiling.timing import repeat, timed, timeit


def spin(seconds: float) -> None:
    until = perf_counter() + seconds
    while perf_counter() < until:
        pass


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="headrace.timing")
    return caplog


def seconds(said: pytest.LogCaptureFixture) -> float:
    (record,) = said.records
    return float(vars(record)["seconds"])


def test_a_function_keeps_its_value_and_its_time_is_logged(said: pytest.LogCaptureFixture) -> None:
    @timed
    def double(value: int, *, plus: int = 0) -> int:
        """Twice."""
        spin(0.01)
        return 2 * value + plus

    assert double(3, plus=1) == 7
    assert (double.__name__, double.__doc__) == ("double", "Twice.")
    assert 0.01 <= seconds(said) < 1
    assert "double took " in said.text


def test_a_coroutine_is_timed_with_what_it_awaits(said: pytest.LogCaptureFixture) -> None:
    @timed("fetching")
    async def fetch() -> str:
        await asyncio.sleep(0.02)
        return "page"

    assert asyncio.iscoroutinefunction(fetch)
    assert asyncio.run(fetch()) == "page"
    assert seconds(said) >= 0.02
    assert said.messages[0].startswith("fetching took ")


def test_a_generator_is_timed_without_its_consumer(said: pytest.LogCaptureFixture) -> None:
    @timed
    def count(most: int) -> Generator[int, str, str]:
        heard = []
        for number in range(most):
            spin(0.005)
            heard.append((yield number))
        return "-".join(heard)

    def consume() -> Generator[int, str, None]:
        nonlocal result
        result = yield from count(3)

    result = ""
    consumer = consume()
    taken = [next(consumer)]
    for word in ("a", "b"):
        spin(0.05)
        taken.append(consumer.send(word))
    with pytest.raises(StopIteration):
        consumer.send("c")
    assert taken == [0, 1, 2]
    assert result == "a-b-c"
    assert 0.015 <= seconds(said) < 0.1
    assert "for 3 items" in said.text


def test_exceptions_go_into_a_generator_and_out_of_it(said: pytest.LogCaptureFixture) -> None:
    closed = []

    @timed
    def careful() -> Iterator[int]:
        try:
            yield 1
        except KeyError:
            yield 2
        finally:
            closed.append(True)

    generator = careful()
    next(generator)
    assert generator.throw(KeyError("x")) == 2  # type: ignore[attr-defined]
    generator.close()  # type: ignore[attr-defined]
    assert closed == [True]
    assert "raised" not in said.text

    @timed
    def failing() -> Iterator[int]:
        yield 1
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        list(failing())
    assert "raised OSError" in said.text


def test_an_async_generator_goes_on_as_before(said: pytest.LogCaptureFixture) -> None:
    @timed
    async def pages() -> AsyncIterator[str]:
        for name in "ab":
            await asyncio.sleep(0.01)
            yield name

    async def read() -> list[str]:
        return [page async for page in pages()]

    assert asyncio.run(read()) == ["a", "b"]
    assert seconds(said) >= 0.02
    assert "for 2 items" in said.text


def test_a_block_knows_its_time_while_it_runs_and_after_an_exception(said: pytest.LogCaptureFixture) -> None:
    def divide(by: int) -> None:
        with division:
            spin(0.01)
            assert division.seconds >= 0.01
            _ = 1 / by

    division = timed("division")
    with pytest.raises(ZeroDivisionError):
        divide(0)
    after = division.seconds
    assert 0.01 <= after == division.seconds
    assert "division took " in said.text
    assert "raised ZeroDivisionError" in said.text


def test_nothing_is_written_below_the_level(said: pytest.LogCaptureFixture) -> None:
    said.set_level(logging.WARNING, logger="headrace.timing")
    with timed("quiet"):
        pass
    assert not said.records


def test_a_call_is_repeated_until_it_is_known() -> None:
    calls = []

    def slow(value: int) -> int:
        calls.append(value)
        spin(0.004)
        return value + 1

    found = repeat(slow, (41,), {}, most_s=0.2)
    assert found.result == 42
    assert found.calls_per_run == 1
    assert len(calls) == found.runs + found.warm_up
    assert found.runs >= 5
    assert 0.004 <= found.least_s <= found.median_s <= found.p95_s
    assert found.spread_s <= found.p95_s
    assert f"{found.runs} runs after" in str(found)


def test_a_short_call_is_timed_many_times_in_a_row() -> None:
    found = repeat(len, ("abc",), {}, most_s=0.1)
    assert found.calls_per_run > 100
    assert found.median_s < 1e-5


def test_calls_of_a_coroutine_share_a_loop() -> None:
    loops = set()

    async def ask(value: str) -> str:
        loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0.005)
        return value

    found = repeat(ask, (), {"value": "yes"}, most_s=0.1)
    assert found.result == "yes"
    assert found.median_s >= 0.005
    assert len(loops) == 1


def test_what_is_timed_may_fail() -> None:
    with pytest.raises(ZeroDivisionError):
        timeit(lambda: 1 / 0)
