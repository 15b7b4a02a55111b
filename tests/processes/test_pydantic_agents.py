"""Agents of pydantic-ai in the real program, with a language model that says what is written for it."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from agents.scripted_llm import Line, ScriptedLLM
from conftest import ROOT, Server, Watcher, alive, events_of, serving, submit, wait_for_end, wait_until
from headrace.tasks import embedded

AGENTS = ROOT / "tests" / "agents"
KEY_IN_VARIABLE = "canary_that_comes_from_a_variable"
KEY_IN_CODE = "canary_that_stands_in_code"


@pytest.fixture(scope="module")
def llm() -> Iterator[ScriptedLLM]:
    with ScriptedLLM() as server:
        yield server


@pytest.fixture(scope="module")
def agents(llm: ScriptedLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("agents")
    env = {"LLM_URL": llm.url, "AGENT_NOTES": str(folder / "notes"), "OPENAI_API_KEY": KEY_IN_VARIABLE}
    options = ("--data-dir", str(folder / "data"), "--lease-s", "2", "--log-level", "debug")
    with serving(folder, "assistant_app.py", *options, verb="up", cwd=AGENTS, env=env) as up:
        yield up


def notes(server: Server) -> list[str]:
    path = server.log_file.with_name("notes")
    return path.read_text().splitlines() if path.exists() else []


def ask(server: Server, agent: str, message: str) -> str:
    return submit(server, agent, {"message": message})


def events(server: Server, ident: str) -> list[dict[str, Any]]:
    with server.client.stream("GET", f"/agent/events/{ident}") as answer:
        return [payload for _, payload in events_of(answer.iter_lines())]


def kinds(found: list[dict[str, Any]], prefix: str) -> list[str]:
    return [event["type"].removeprefix(prefix) for event in found if event["type"].startswith(prefix)]


def test_what_an_agent_will_count_is_there_before_it_runs(agents: Server) -> None:
    for status in ("success", "error", "timeout", "rejected", "cancelled"):
        assert agents.metric(f'llm_api_calls_total{{provider="openai",model="poet",status="{status}"}}') == 0
        assert agents.metric(f'tool_calls_total{{tool_name="erase",status="{status}"}}') == 0
    assert agents.metric('llm_api_duration_seconds_count{model="poet"}') == 0


def test_an_agent_uses_its_tool_and_answers_in_its_own_type(agents: Server, llm: ScriptedLLM) -> None:
    llm.scripts["forecaster"] = [
        Line(calls=[("weather", {"city": "Oslo"})]),
        Line(calls=[("final_result", {"coat": True, "because": "3.5 degrees"})]),
    ]
    ident = ask(agents, "forecaster", "What shall I wear in Oslo?")
    task = wait_for_end(agents, ident)
    assert task["result"] == {"coat": True, "because": "3.5 degrees"}
    assert task["steps"] == 3
    (told,) = (each for each in llm.bodies[-1]["messages"] if each["role"] == "tool")
    assert json.loads(told["content"]) == {"city": "Oslo", "degrees": 3.5}

    found = events(agents, ident)
    assert kinds(found, "TOOL_CALL_") == ["START", "ARGS", "END", "RESULT"]
    assert [event["stepName"] for event in found if event["type"] == "STEP_FINISHED"] == [
        "model",
        "tool weather",
        "model",
    ]
    assert found[-1]["result"] == task["result"]

    assert agents.metric('llm_api_calls_total{provider="openai",model="forecaster",status="success"}') == 2
    assert agents.metric('llm_api_duration_seconds_count{model="forecaster"}') == 2
    assert agents.metric('tool_calls_total{tool_name="weather",status="success"}') == 1
    assert agents.metric('tool_calls_total{tool_name="weather",status="error"}') == 0
    assert agents.metric('agent_tokens_per_request_sum{model="forecaster"}') == 220
    assert agents.metric('agent_requests_total{status="success",model="forecaster"}') == 1


@pytest.mark.usefixtures("needs_proc")
def test_after_a_kill_between_tool_calls_nothing_that_ended_is_repeated(agents: Server, llm: ScriptedLLM) -> None:
    llm.scripts["traveller"] = [
        Line(calls=[("visit", {"place": "home"})]),
        # Both at once. The first one named is in flight when the worker dies, the second has ended.
        Line("on my way", calls=[("visit", {"place": "beyond"}), ("visit", {"place": "here"})]),
        Line("back again"),
    ]
    ident = ask(agents, "traveller", "See the world")
    watcher = Watcher(ident, agents.url)
    wait_until(lambda: {"end home", "begin beyond", "end here"} <= set(notes(agents)), 20, "all tools have begun")
    wait_until(
        lambda: (
            [event.get("stepName") for _, event in list(watcher.events) if event["type"] == "STEP_FINISHED"].count(
                "tool visit"
            )
            == 2
        ),
        20,
        "the tools that have ended are journalled",
    )
    worker = agents.pid_of("task.0")
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not alive(worker), 10, "the worker is dead")
    agents.log_file.with_name("open").touch()

    task = wait_for_end(agents, ident)
    assert (task["status"], task["result"].strip(), task["attempt"]) == ("completed", "back again", 2)
    assert task["steps"] == 6
    asked = {key: count for key, count in llm.asked.items() if key[0] == "traveller"}
    assert asked == {("traveller", "See the world", number): 1 for number in range(3)}
    visits = Counter(line for line in notes(agents) if line.split()[0] in ("begin", "end"))
    assert visits == {
        "begin home": 1,
        "end home": 1,
        "begin here": 1,
        "end here": 1,
        "begin beyond": 2,
        "end beyond": 1,
    }
    told = [each["content"] for each in llm.bodies[-1]["messages"] if each["role"] == "tool"]
    assert told == ["seen home", "seen beyond", "seen here"]
    assert agents.metric('agent_tokens_per_request_sum{model="traveller"}') == 330
    assert agents.metric('llm_api_calls_total{provider="openai",model="traveller",status="success"}') == 3
    watcher.join(20)
    assert not watcher.fault()


def test_a_tool_s_wish_for_another_try_reaches_the_model(agents: Server, llm: ScriptedLLM) -> None:
    llm.scripts["guesser"] = [
        Line(calls=[("guess", {"number": 3})]),
        Line(calls=[("guess", {"number": 12})]),
        Line("it was 12"),
    ]
    ident = ask(agents, "guesser", "Guess")
    assert wait_for_end(agents, ident)["result"].strip() == "it was 12"
    assert [line for line in notes(agents) if line.startswith("guess")] == ["guess 3", "guess 12"]
    told = [each["content"] for each in llm.bodies[-1]["messages"] if each["role"] == "tool"]
    assert "too small" in told[0]
    assert told[1] == "right"
    assert agents.metric('tool_calls_total{tool_name="guess",status="error"}') == 1


def test_a_call_that_needs_an_approval_is_the_result(agents: Server, llm: ScriptedLLM) -> None:
    llm.scripts["cleaner"] = [Line(calls=[("erase", {"path": "/everything"})])]
    ident = ask(agents, "cleaner", "Clean up")
    (call,) = wait_for_end(agents, ident)["result"]["approvals"]
    assert call["tool_name"] == "erase"
    assert not [line for line in notes(agents) if line.startswith("erase")]


def test_text_is_heard_while_the_model_still_speaks(agents: Server, llm: ScriptedLLM) -> None:
    hold = threading.Event()
    llm.scripts["poet"] = [Line("Roses are red", hold=hold)]
    ident = ask(agents, "poet", "A poem")
    heard: list[dict[str, Any]] = []
    with agents.client.stream("GET", f"/agent/events/{ident}") as answer:
        for _, event in events_of(answer.iter_lines()):
            heard.append(event)
            if event["type"] == "TEXT_MESSAGE_CONTENT":
                hold.set()
    assert kinds(heard, "TEXT_MESSAGE_")[:2] == ["START", "CONTENT"]
    assert heard[-1]["result"].strip() == "Roses are red"
    deltas = [event["delta"] for event in heard if event["type"] == "TEXT_MESSAGE_CONTENT"]
    assert deltas[0] == "Roses "
    assert "".join(deltas).strip() == "Roses are red"


@pytest.mark.usefixtures("needs_proc")
def test_what_a_dead_worker_had_begun_to_say_is_said_anew_under_another_id(agents: Server, llm: ScriptedLLM) -> None:
    hold = threading.Event()
    llm.scripts["poet"] = [Line("Violets are blue", hold=hold)]
    ident = ask(agents, "poet", "Another poem")
    watcher = Watcher(ident, agents.url)
    wait_until(lambda: "TEXT_MESSAGE_CONTENT" in watcher.types(), 20, "it has begun to speak")
    worker = agents.pid_of("task.0")
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not alive(worker), 10, "the worker is dead")
    hold.set()
    assert wait_for_end(agents, ident)["result"].strip() == "Violets are blue"
    assert llm.asked["poet", "Another poem", 0] == 2, "the request in flight is made again"
    watcher.join(20)
    assert not watcher.fault()
    said: dict[str, str] = {}
    for _, event in watcher.events:
        if event["type"] == "TEXT_MESSAGE_CONTENT":
            said[event["messageId"]] = said.get(event["messageId"], "") + event["delta"]
    assert [text.strip() for text in said.values()] == ["Violets", "Violets are blue"]


def test_a_model_that_is_asked_for_no_stream_is_heard_at_its_end(agents: Server, llm: ScriptedLLM) -> None:
    llm.scripts["mute"] = [Line("all at once")]
    ident = ask(agents, "mute", "Speak")
    assert wait_for_end(agents, ident)["result"] == "all at once"
    assert not llm.bodies[-1].get("stream")
    (delta,) = (event["delta"] for event in events(agents, ident) if event["type"] == "TEXT_MESSAGE_CONTENT")
    assert delta == "all at once"


def test_keys_are_found_nowhere(agents: Server, llm: ScriptedLLM) -> None:
    llm.scripts["keyed"] = [Line(status=401)]
    seen = []
    for agent, key in (("keyed", KEY_IN_VARIABLE), ("careless", KEY_IN_CODE)):
        ident = ask(agents, agent, f"Who is {agent}?")
        task = wait_for_end(agents, ident)
        assert task["status"] == "failed"
        assert "Incorrect API key provided: [redacted]" in task["error"]["message"]
        seen += [json.dumps(task), json.dumps(events(agents, ident))]
        assert llm.asked["keyed", f"Who is {agent}?", 0] == 1
        seen.append(agents.client.post("/agent/run", json={"agent": agent, "message": key[:6]}).text)
    seen.append(agents.client.get("/agent/tasks").text)
    seen.append(agents.client.get("/metrics").text)
    data = Path(agents.log_file.with_name("data"))
    store = redis.Redis.from_url(embedded.ensure(data).url)
    dump = b"\n".join(repr(content(store, key)).encode() + key for key in store.scan_iter("*"))
    store.close()
    assert b"Who is careless?" in dump
    seen.append(dump.decode())
    seen += [path.read_bytes().decode("utf-8", "replace") for path in data.rglob("*") if path.is_file()]
    logs = [path.read_text() for path in agents.log_file.parent.glob("*.log")]
    assert "Incorrect API key provided: [redacted]" in "".join(logs)
    for place in (*seen, *logs):
        for key in (KEY_IN_VARIABLE, KEY_IN_CODE):
            assert key not in place


def content(store: redis.Redis, key: bytes) -> Any:
    """All there is under a key."""
    match store.type(key):
        case b"hash":
            return store.hgetall(key)
        case b"stream":
            return store.xrange(key)
        case b"zset":
            return store.zrange(key, 0, -1, withscores=True)
        case b"set":
            return store.smembers(key)
        case b"list":
            return store.lrange(key, 0, -1)
        case b"string":
            return store.get(key)
        case b"none":
            return None  # a lease that has ended since its key was listed
        case other:
            raise AssertionError(f"{other!r} has come up: read it here")
