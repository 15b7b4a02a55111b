"""`headrace task …`, `hr.Tasks` and `hr.AsyncTasks` against a real server with its agents."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import headrace as hr
from conftest import HEADRACE, ROOT, Server, free_port, serving, wait_until
from headrace import errors

AGENTS = ROOT / "tests" / "agents"


@contextlib.contextmanager
def agents(folder: Path, **options: Any) -> Iterator[Server]:
    """A server of its own, with the agents of the tests."""
    arguments = ("agents_app.py", "--data-dir", str(folder / "data"), "--lease-s", "2")
    with serving(folder, *arguments, verb="up", cwd=AGENTS, **options) as server:
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with agents(tmp_path_factory.mktemp("agents")) as server:
        yield server


def task_command(*arguments: str, url: str = "", cwd: Path = AGENTS, **variables: str) -> list[Any]:
    env = {**os.environ, **({"HEADRACE_URL": url} if url else {}), **variables}
    return [[HEADRACE, "task", *arguments], {"env": env, "cwd": cwd, "text": True}]


def run(*arguments: str, given: str | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """A `headrace task` command, to its end."""
    argv, popen = task_command(*arguments, **options)
    return subprocess.run(argv, capture_output=True, timeout=60, input=given, **popen)


def document(done: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    """The one JSON document that a command has printed."""
    assert done.returncode == code, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout)


# The library.


def test_from_submit_to_result(server: Server) -> None:
    with hr.Tasks(server.url) as tasks:
        task = tasks.submit("shout", message="hello")
        assert tasks.result(task.task_id, timeout_s=30) == {"text": "HELLO", "length": 5}
        ended = tasks.get(task.task_id)
        assert (ended.status, ended.agent, ended.steps, ended.attempt) == ("completed", "shout", 1, 1)
        assert [event.type for event in tasks.events(task.task_id)] == [
            "CUSTOM",
            "RUN_STARTED",
            "STEP_STARTED",
            "STEP_FINISHED",
            "RUN_FINISHED",
        ]
        again = tasks.submit("shout", message="once", idempotency_key="k")
        assert tasks.submit("shout", message="once", idempotency_key="k").task_id == again.task_id
        with pytest.raises(errors.InvalidInput):
            tasks.submit("shout", message="twice", idempotency_key="k")


def test_the_same_in_asyncio(server: Server) -> None:
    async def story() -> list[Any]:
        async with hr.AsyncTasks(server.url) as tasks:
            made = [await tasks.submit("shout", message=text) for text in ("a", "bb", "ccc")]
            results = await asyncio.gather(*(tasks.result(task.task_id, 30) for task in made))
            events = [event async for event in tasks.events(made[0].task_id)]
            assert events[-1].final
            known = {task.task_id async for task in tasks.list(agent="shout", status="completed")}
            assert {task.task_id for task in made} <= known
        return [result["text"] for result in results]

    assert asyncio.run(story()) == ["A", "BB", "CCC"]


def test_a_task_that_fails_and_one_that_is_cancelled(server: Server) -> None:
    with hr.Tasks(server.url) as tasks:
        failed = tasks.submit("fail", message="oh").task_id
        with pytest.raises(hr.TaskFailed, match="ValueError: oh") as caught:
            tasks.result(failed, timeout_s=30)
        assert caught.value.reason == "agent_error"
        assert tasks.retry(failed, fresh=True).status in ("pending", "running")
        assert tasks.wait(failed, timeout_s=30).attempt == 2

        hanging = tasks.submit("hang").task_id
        with pytest.raises(hr.DeadlineExceeded, match="goes on"):
            tasks.result(hanging, timeout_s=0.2)
        assert tasks.cancel(hanging).status == "cancelled"
        assert tasks.cancel(hanging).status == "cancelled"
        with pytest.raises(hr.TaskCancelled):
            tasks.result(hanging, timeout_s=30)
        with pytest.raises(errors.TaskNotFound):
            tasks.get("nothing")


def test_a_task_that_asks(server: Server) -> None:
    with hr.Tasks(server.url) as tasks:
        task = tasks.submit("confirm", input="delete").task_id
        asked = next(event for event in tasks.events(task) if event.data.get("name") == "input_required")
        assert asked.data["value"]["prompt"] == "really delete?"
        question = tasks.get(task).input_required
        assert question
        assert (question.prompt, question.schema) == ("really delete?", {"type": "boolean"})
        with pytest.raises(hr.InvalidInput):
            tasks.answer(task, "perhaps")
        tasks.answer(task, True)
        assert tasks.result(task, timeout_s=30) == "delete: done"


def test_a_list_over_many_pages_has_every_task_once(server: Server) -> None:
    """Also those that were made in the same millisecond."""

    async def story() -> set[str]:
        async with hr.AsyncTasks(server.url) as tasks:
            made = await asyncio.gather(*(tasks.submit("shout", message=str(number)) for number in range(230)))
            return {task.task_id for task in made}

    made = asyncio.run(story())
    with hr.Tasks(server.url) as tasks:
        listed = [task.task_id for task in tasks.list(agent="shout")]
    assert len(listed) == len(set(listed))
    assert made <= set(listed)


# Commands.


def test_submit_and_wait(server: Server) -> None:
    done = document(run("submit", "shout", "hello", "--wait", "--format", "json", url=server.url))
    assert (done["status"], done["result"]) == ("completed", {"text": "HELLO", "length": 5})
    shown = run("show", done["task_id"], "--url", server.url)
    assert re.search(r"^status +completed$", shown.stdout, re.MULTILINE)
    assert '{"text": "HELLO", "length": 5}' in shown.stdout
    failed = run("submit", "fail", "no \x1b[31mred", "--wait", url=server.url)
    assert failed.returncode == 1
    assert "agent_error: ValueError: no \\x1b[31mred" in failed.stdout


def test_submit_without_waiting_says_how_to_watch(server: Server) -> None:
    done = run(
        "submit", "squares", "--input", '{"steps": 1}', "--priority", "batch", "--timeout-s", "60", url=server.url
    )
    assert done.returncode == 0, done.stderr
    ident = re.search(r"^task +(\w+)$", done.stdout, re.MULTILINE)
    assert ident
    assert f"headrace task tail {ident[1]}" in done.stderr
    tail = run("tail", ident[1], url=server.url)
    assert tail.returncode == 0
    assert re.search(r"^\d\d:\d\d:\d\d\.\d{3}  STEP_FINISHED   square 0$", tail.stdout, re.MULTILINE)
    task = document(run("show", ident[1], "--format", "json", url=server.url))
    assert (task["priority"], task["status"]) == ("batch", "completed")


def test_an_input_from_standard_input_and_one_key_for_two(server: Server) -> None:
    options = ("submit", "shout", "--input", "-", "--idempotency-key", "cli-1", "--format", "json")
    first, second = (document(run(*options, given='"piped"', url=server.url)) for _ in range(2))
    assert first["task_id"] == second["task_id"]


def test_tail_as_json_lines_goes_on_where_one_left_off(server: Server) -> None:
    done = run("submit", "shout", "x", "--tail", "--format", "json", url=server.url)
    assert done.returncode == 0
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["type"] for event in events][-1] == "RUN_FINISHED"
    ident = events[0]["value"]["task_id"]
    rest = run("tail", ident, "--after", events[1]["id"], "--format", "json", url=server.url)
    assert [json.loads(line) for line in rest.stdout.splitlines()] == events[2:]
    nothing = run("tail", ident, "--after", events[-1]["id"], url=server.url)
    assert (nothing.returncode, nothing.stdout) == (0, "")


def test_a_question_is_answered_from_elsewhere(server: Server) -> None:
    argv, options = task_command("submit", "confirm", "delete", "--wait", "--format", "json", url=server.url)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as waiting:
        assert waiting.stderr
        told = next(line for line in waiting.stderr if "waits for an answer" in line)
        ident = re.search(r"answer (\w+) VALUE", told)
        assert ident
        refused = run("answer", ident[1], "true", "--text", url=server.url)
        assert refused.returncode == 2
        assert "input: " in refused.stderr
        assert document(run("answer", ident[1], "true", "--format", "json", url=server.url))["task_id"] == ident[1]
        output, _ = waiting.communicate(timeout=30)
    assert json.loads(output)["result"] == "delete: done"
    assert waiting.returncode == 0


def test_list_cancel_and_retry(server: Server) -> None:
    made = [document(run("submit", "hang", "--format", "json", url=server.url))["task_id"] for _ in range(2)]
    listed = run("list", "--agent", "hang", "--limit", "5", url=server.url)
    assert listed.stdout.split()[:3] == ["TASK", "AGENT", "STATUS"]
    assert all(ident in listed.stdout for ident in made)
    ended = document(run("cancel", *made, "nothing", "--format", "json", url=server.url), code=2)
    assert [(task["task_id"], task["status"]) for task in ended["tasks"]] == [(each, "cancelled") for each in made]
    assert [(each["task_id"], each["code"]) for each in ended["errors"]] == [("nothing", "task_not_found")]
    found = document(run("list", "--status", "cancelled", "--limit", "1", "--format", "json", url=server.url))
    assert [task["status"] for task in found["tasks"]] == ["cancelled"]
    assert document(run("retry", made[0], "--fresh", "--format", "json", url=server.url))["status"] in (
        "pending",
        "running",
    )
    assert run("cancel", made[0], url=server.url).stdout == f"{made[0]}  cancelled\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "nothing"), "there is no task"),
        (("submit", "nobody", "x"), "there is no agent"),
        (("submit", "squares", "--input", '{"steps": "many"}'), "input.steps: "),
        (("submit", "squares", "--input", "{"), "--input is not JSON"),
        (("submit", "shout", "x", "--priority", "vip"), "priority: "),
        (("submit", "shout", "x", "--input", "1"), "exclude"),
        (("list", "--status", "odd"), "status: "),
        (("tail", "nothing"), "there is no task"),
        (("tail", "nothing", "--after", "x"), "after: "),
        (("show", "x", "--url", f"http://127.0.0.1:{free_port()}"), "is the server running"),
        (("show", "x", "--url", "localhost"), "url: "),
    ],
)
def test_what_is_wrong_is_said_in_a_line_or_two(server: Server, arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments, url=server.url)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_port_comes_from_the_configuration(server: Server, tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text(f"port = {server.port}\n")
    assert run("list", cwd=tmp_path).returncode == 0
    nobody = run("list", cwd=tmp_path, HEADRACE_PORT=str(free_port()))
    assert nobody.returncode == 2
    assert "is the server running" in nobody.stderr


def test_a_tail_that_is_interrupted_says_how_to_go_on(server: Server) -> None:
    with hr.Tasks(server.url) as tasks:
        task = tasks.submit("hang").task_id
        argv, options = task_command("tail", task, url=server.url)
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as tail:
            assert tail.stdout
            assert next(line for line in tail.stdout if "RUN_STARTED" in line)
            tail.send_signal(signal.SIGINT)
            _, said = tail.communicate(timeout=30)
        assert tail.returncode == 130
        assert re.search(rf"goes on; .*headrace task tail {task} --after \d+-\d+", said)
        assert "Traceback" not in said
        assert tasks.get(task).status == "running"
        tasks.cancel(task)


def test_the_key_comes_from_the_environment(tmp_path: Path) -> None:
    with agents(tmp_path, env={"HEADRACE_API_KEYS": "key-one,key-two"}) as server:
        refused = run("list", url=server.url)
        assert refused.returncode == 2
        assert "HEADRACE_API_KEY" in refused.stderr
        mine = document(
            run("submit", "shout", "x", "--wait", "--format", "json", url=server.url, HEADRACE_API_KEY="key-one")
        )
        assert mine["status"] == "completed"
        foreign = run("show", mine["task_id"], url=server.url, HEADRACE_API_KEY="key-two")
        assert foreign.returncode == 2
        assert "there is no task" in foreign.stderr


# What survives.


def test_a_tail_goes_on_when_its_front_end_is_killed(tmp_path: Path) -> None:
    """No event is missing, none comes twice: for the command, and for both kinds of client."""
    with agents(tmp_path) as server, hr.Tasks(server.url) as tasks:
        task = tasks.submit("squares", input={"steps": 40, "pause_s": 0.1}).task_id
        argv, options = task_command("tail", task, "--format", "json", url=server.url)

        async def watch() -> list[str]:
            async with hr.AsyncTasks(server.url) as watching:
                return [event.id async for event in watching.events(task)]

        with subprocess.Popen(argv, stdout=subprocess.PIPE, **options) as tail:
            assert tail.stdout
            lines = list(itertools.islice(tail.stdout, 20))
            first = server.pid_of("http.0")
            os.kill(first, signal.SIGKILL)
            lines += itertools.islice(tail.stdout, 40)
            second = wait_until(lambda: server.pid_of("http.0"), what="another front end")
            assert second != first
            os.kill(second, signal.SIGKILL)
            seen = asyncio.run(watch())
            lines += tail.stdout
        assert tail.returncode == 0
        ids = [json.loads(line)["id"] for line in lines]
        assert ids == seen == [event.id for event in tasks.events(task)]
        payloads = [json.loads(line) for line in lines]
        assert [each["type"] for each in payloads].count("RUN_FINISHED") == 1
        assert [each["value"] for each in payloads if each.get("name") == "progress"] == [n / 40 for n in range(1, 41)]
        assert tasks.result(task) == sum(number * number for number in range(40))
