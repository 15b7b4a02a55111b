"""The load driver against small servers of its own, whose behaviour is known exactly."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.errors import ConfigError
from headrace.loadgen import driver, report

ANSWER = b'{"prediction":1,"latency_ms":1.0,"timings":{"queue_ms":2.000,"run_ms":1.000,"batch_size":3}}'


@contextlib.asynccontextmanager
async def server(behave: Any) -> AsyncIterator[str]:
    """An HTTP server whose ``behave(number)`` gives (seconds, status, body), or None to hang up."""
    count = 0
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                count += 1
                answer = behave(count)
                if answer is None:
                    break
                seconds, status, body = answer
                await asyncio.sleep(seconds)
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
        writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with running:
        yield f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}"
        for writer in writers:
            writer.close()
        await asyncio.sleep(0.01)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 25))


def measure(behave: Any, level: driver.Level, **options: Any) -> driver.LevelResult:
    async def main() -> driver.LevelResult:
        async with server(behave) as url:
            plan = driver.Plan(url, driver.DEFAULT_BODIES, **{"duration_s": 1.0, "warmup_s": 0.1, **options})
            return (await driver.measure(plan, [level])).levels[0]

    return run(main())


def test_a_closed_loop_is_as_fast_as_the_answers() -> None:
    found = measure(lambda n: (0.05, 200, ANSWER), driver.Level(concurrency=4))
    assert 50 <= found.achieved_rate <= 82
    assert 49 <= found.p50_ms <= 80
    assert (found.errors, found.queue_p50_ms, found.batch_size_mean) == ({}, 2.0, 3.0)


def test_an_open_loop_keeps_its_rate_whatever_the_answers_take() -> None:
    found = measure(lambda n: (0.3, 200, ANSWER), driver.Level(rate=100))
    assert 70 <= found.achieved_rate <= 130
    assert 299 <= found.p50_ms <= 400


def test_a_stall_shows_in_every_request_that_was_due_meanwhile() -> None:
    """Coordinated omission: a server that stops for half a second must not look fast."""
    start = time.monotonic()

    def behave(number: int) -> Any:
        until = start + 0.8
        return (max(0.0, until - time.monotonic()), 200, ANSWER)

    found = measure(behave, driver.Level(rate=200), duration_s=1.0, warmup_s=0.0)
    assert found.p50_ms > 200


def test_errors_are_counted_by_kind() -> None:
    def behave(number: int) -> Any:
        return [(0, 200, ANSWER), (0, 429, b"{}"), None, (5, 200, b"{}")][number % 4]

    found = measure(behave, driver.Level(concurrency=4), timeout_s=0.2)
    assert set(found.errors) == {"429", "connection", "timeout"}
    assert found.n > 0


def test_wrong_answers_are_errors() -> None:
    def check(index: int, status: int, body: bytes) -> None:
        assert b"9" in body

    found = measure(lambda n: (0.01, 200, ANSWER), driver.Level(concurrency=1), check=check)
    assert found.n == 0
    assert found.errors["wrong"] > 10


def test_saturation_is_found_in_both_loops() -> None:
    async def main(levels: list[driver.Level]) -> driver.Results:
        async with server(lambda n: (0.0, 200, ANSWER)) as url:
            plan = driver.Plan(url, driver.DEFAULT_BODIES, duration_s=0.4, warmup_s=0.1)
            return await driver.measure(plan, levels)

    closed = run(main([driver.Level(concurrency=1), driver.Level(concurrency=2)]))
    assert closed.saturation["rate"] == max(level.achieved_rate for level in closed.levels)
    opened = run(main([driver.Level(rate=50), driver.Level(rate=20_000)]))
    assert opened.saturation["at"] == {"rate": 50}
    assert opened.saturation["reached"]
    fields = {"rate", "achieved_rate", "p50_ms", "p90_ms", "p99_ms", "p999_ms", "errors", "n"}
    assert fields <= set(msgspec.json.decode(report.as_json(opened))["levels"][0])
    assert "saturation" in report.as_table(opened)


@pytest.mark.parametrize("text", ["", "a", "0", "-1", "1,x"])
def test_levels_are_positive_numbers(text: str) -> None:
    with pytest.raises(ConfigError):
        driver.levels(concurrency=text)


def test_samples_are_read_and_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text('{"input": "a"}\n\n{"input": "b"}\n')
    assert driver.read_samples(file) == [b'{"input":"a"}', b'{"input":"b"}']
    for bad, words in (("{", "line 1 is not JSON"), ("[1]", "line 1 must be an object"), ("", "no samples")):
        file.write_text(bad)
        with pytest.raises(ConfigError, match=words):
            driver.read_samples(file)


def test_a_server_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="cannot reach"):
        run(driver.measure(driver.Plan("http://127.0.0.1:9", driver.DEFAULT_BODIES), [driver.Level(concurrency=1)]))
    with pytest.raises(ConfigError, match="not an http URL"):
        run(driver.measure(driver.Plan("localhost", driver.DEFAULT_BODIES), [driver.Level(concurrency=1)]))
