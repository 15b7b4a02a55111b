"""The supervisor with real processes that are a few lines each."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from conftest import alive
from headrace.config import Config
from headrace.rundir import RunDir
from headrace.supervisor import Spec, Supervisor

GOOD = """
import sys, threading
from headrace.child import Child
from headrace.core import Hello, Beat
child = Child(sys.argv[1:])
done = threading.Event()
child.watch(lambda grace_s: done.set())
child.tell(Hello())
while not done.wait(0.1):
    child.tell(Beat(1, float(open(sys.argv[2] + "/busy").read())))
"""
STUBBORN = GOOD.replace("done.set()", "None")
NEVER_READY = "import time; time.sleep(60)"
FAILS = "import sys; sys.exit(3)"


@contextlib.asynccontextmanager
async def supervising() -> AsyncIterator[tuple[Supervisor, RunDir]]:
    run_dir = RunDir.create(Config())
    (run_dir.path / "busy").write_text("0")
    supervisor = Supervisor(run_dir)
    try:
        yield supervisor, run_dir
    finally:
        await supervisor.stop(list(supervisor._children), 3.0)
        supervisor.close()
        run_dir.remove()


def spec(code: str, **options: Any) -> Spec:
    return Spec("slot", (sys.executable, "-c", code), {}, **{"start_timeout_s": 20.0, **options})


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 28))


def pid(supervisor: Supervisor) -> int:
    process = supervisor._children["slot"].process
    assert process
    return process.pid


async def until(condition: Any) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.02)


def test_a_killed_child_is_started_again() -> None:
    async def main() -> None:
        async with supervising() as (supervisor, _):
            supervisor.start(spec(GOOD))
            assert await supervisor.wait_ready("slot")
            first = pid(supervisor)
            os.kill(first, signal.SIGKILL)
            await until(lambda: pid(supervisor) != first and supervisor.is_ready("slot"))
            assert supervisor.restarts("slot") == 1

    run(main())


def test_a_child_that_fails_its_first_start_is_not_started_again() -> None:
    async def main() -> None:
        async with supervising() as (supervisor, _):
            supervisor.start(spec(FAILS))
            assert not await supervisor.wait_ready("slot")
            assert supervisor.restarts("slot") == 0

    run(main())


def test_a_child_that_does_not_become_ready_is_ended() -> None:
    async def main() -> None:
        async with supervising() as (supervisor, _):
            supervisor.start(spec(NEVER_READY, start_timeout_s=0.5))
            assert not await supervisor.wait_ready("slot")

    run(main())


def test_work_that_takes_too_long_is_a_hang() -> None:
    async def main() -> None:
        async with supervising() as (supervisor, run_dir):
            supervisor.start(spec(GOOD, step_timeout_s=5.0))
            assert await supervisor.wait_ready("slot")
            first = pid(supervisor)
            (run_dir.path / "busy").write_text("4")
            await asyncio.sleep(0.6)
            assert pid(supervisor) == first, "long is not too long"
            (run_dir.path / "busy").write_text("5.5")
            await until(lambda: pid(supervisor) != first)

    run(main())


def test_stop_is_orderly_for_the_willing_and_final_for_the_rest() -> None:
    async def main() -> None:
        for code, grace_s in ((GOOD, 10.0), (STUBBORN, 0.3)):
            async with supervising() as (supervisor, _):
                supervisor.start(spec(code))
                assert await supervisor.wait_ready("slot")
                child = pid(supervisor)
                async with asyncio.timeout(5):
                    await supervisor.stop(["slot"], grace_s)
                assert not alive(child)

    run(main())


def test_what_a_child_started_goes_with_it(tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    code = GOOD.replace(
        "child.tell(Hello())",
        f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(note)!r}, 'w').write(str(p.pid))\n"
        "child.tell(Hello())",
    )

    async def main() -> None:
        async with supervising() as (supervisor, _):
            supervisor.start(spec(code))
            assert await supervisor.wait_ready("slot")
            grandchild = int(note.read_text())
            assert alive(grandchild)
            os.kill(pid(supervisor), signal.SIGKILL)
            await until(lambda: not alive(grandchild))

    run(main())


def test_a_child_that_is_suspended_while_it_starts_is_given_up() -> None:
    async def main() -> None:
        async with supervising() as (supervisor, _):
            supervisor.start(spec(NEVER_READY, start_timeout_s=600.0))
            await until(lambda: supervisor.pid("slot"))
            os.kill(supervisor.pid("slot"), signal.SIGSTOP)
            async with asyncio.timeout(12):
                assert not await supervisor.wait_ready("slot")

    run(main())


def test_a_child_that_cannot_be_spawned_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process to be had, just now: as good a reason to try again as a death."""

    async def main() -> None:
        async with supervising() as (supervisor, _):
            supervisor.start(spec(GOOD))
            assert await supervisor.wait_ready("slot")
            first = pid(supervisor)
            real, failed = asyncio.create_subprocess_exec, []

            async def refuse(*arguments: Any, **options: Any) -> Any:
                if len(failed) < 2:
                    failed.append(1)
                    raise BlockingIOError(11, "Resource temporarily unavailable")
                return await real(*arguments, **options)

            monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
            os.kill(first, signal.SIGKILL)
            await until(lambda: len(failed) == 2 and supervisor.is_ready("slot") and pid(supervisor) != first)
            assert supervisor.failures("slot") == 3

    run(main())


def test_an_end_by_a_signal_without_a_name_is_an_end() -> None:
    from headrace.supervisor import _how

    assert _how(3) == "exit code 3"
    assert _how(-9) == "signal SIGKILL"
    assert _how(-40) == "signal 40"
