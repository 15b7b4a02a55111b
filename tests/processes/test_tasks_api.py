"""Tasks over HTTP, asked as a client would."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import headrace as hr
from conftest import ROOT, Server, serving, wait_for_end, wait_until

AGENTS = ROOT / "tests" / "agents"


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("agents")
    env = {"AGENT_NOTES": str(folder / "notes")}
    with serving(folder, "agents_app.py", "--lease-s", "2", "--concurrency", "4", verb="up", cwd=AGENTS, env=env) as up:
        yield up


def notes_file(server: Server) -> Path:
    """What the agents leave their lines in: beside the server's log."""
    return server.log_file.with_name("notes")


def notes(server: Server) -> list[str]:
    path = notes_file(server)
    return path.read_text().splitlines() if path.exists() else []


def submit(server: Server, agent: str, headers: dict[str, str] | None = None, **body: Any) -> str:
    answer = server.client.post("/agent/submit", json={"agent": agent, **body}, headers=headers)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


def status(server: Server, ident: str) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get(f"/agent/status/{ident}").json()
    return found


def until(server: Server, ident: str, *states: str) -> dict[str, Any]:
    found: dict[str, Any] = wait_until(
        lambda: task if (task := status(server, ident))["status"] in states else None, 20, f"{ident} is {states}"
    )
    return found


def events(server: Server, ident: str, after: str = "") -> list[tuple[str, dict[str, Any]]]:
    found, event_id = [], ""
    headers = {"Last-Event-ID": after} if after else {}
    with server.client.stream("GET", f"/agent/events/{ident}", headers=headers) as answer:
        for line in answer.iter_lines():
            if line.startswith("id: "):
                event_id = line[4:]
            elif line.startswith("data: "):
                found.append((event_id, json.loads(line[6:])))
    return found


def test_a_task_is_accepted_and_its_result_is_there_later(agents: Server) -> None:
    ident = submit(agents, "shout", message="hello")
    task = until(agents, ident, "completed")
    assert task["result"] == {"text": "HELLO", "length": 5}
    assert task["attempt"] == 1
    assert task["steps"] == 1
    assert {"error", "created_at", "updated_at", "ttl_ms", "poll_interval_ms"} <= task.keys()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"agent": "shout", "message": 3}, "message"),
        ({"agent": "shout"}, "input"),
        ({"agent": "shout", "message": "a", "input": "b"}, "message"),
        ({"agent": "squares", "input": {"steps": "x"}}, "input.steps"),
        ({"agent": "squares", "input": {"steps": 1, "nix": 1}}, "input"),
        ({"agent": "squares", "message": "x"}, "message"),
        ({"agent": "nobody", "message": "a"}, "agent"),
        ({"message": "a"}, "agent"),
        ({"agent": "shout", "message": "a", "priority": "high"}, "priority"),
        ({"agent": "shout", "message": "a", "timeout_s": 0}, "timeout_s"),
        ({"agent": "shout", "message": "a", "mesage": "b"}, "mesage"),
        (["shout"], "body"),
    ],
)
def test_what_is_wrong_is_refused_by_its_field(agents: Server, body: Any, field: str) -> None:
    for path in ("/agent/submit", "/agent/run"):
        answer = agents.client.post(path, json=body)
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]["field"] == field


def test_a_body_must_be_json(agents: Server) -> None:
    assert agents.client.post("/agent/submit", content="x").status_code == 415
    answer = agents.client.post("/agent/submit", content="{", headers={"content-type": "application/json"})
    assert answer.status_code == 400


def test_one_key_is_one_task(agents: Server) -> None:
    key = {"Idempotency-Key": "job-1"}
    ident = submit(agents, "shout", key, message="once")
    assert submit(agents, "shout", key, message="once") == ident
    until(agents, ident, "completed")
    assert submit(agents, "shout", key, message="once") == ident
    other = agents.client.post("/agent/submit", json={"agent": "shout", "message": "other"}, headers=key)
    assert other.status_code == 422
    assert other.json()["error"]["field"] == "Idempotency-Key"


def test_a_stream_has_every_event_once_and_goes_on_from_any(agents: Server) -> None:
    ident = submit(agents, "squares", input={"steps": 3, "pause_s": 0.05})
    seen = events(agents, ident)
    order = [tuple(map(int, event_id.split("-"))) for event_id, _ in seen]
    assert order == sorted(set(order))
    kinds = [event["type"] for _, event in seen]
    assert kinds.count("STEP_FINISHED") == 3
    assert [event["value"] for _, event in seen if event.get("name") == "progress"] == pytest.approx([1 / 3, 2 / 3, 1])
    assert kinds[-1] == "RUN_FINISHED"
    assert kinds.count("RUN_FINISHED") == 1
    assert seen[-1][1]["result"] == 5
    for at in (0, 4, len(seen) - 1):
        assert events(agents, ident, after=seen[at][0]) == seen[at + 1 :]


def test_a_websocket_shows_the_task_and_closes_after_its_end(agents: Server) -> None:
    ident = submit(agents, "squares", input={"steps": 2, "pause_s": 0.2})
    with connect(f"ws://127.0.0.1:{agents.port}/agent/ws/{ident}") as socket:
        frames = [json.loads(message) for message in socket]  # until it is closed as it should be
    assert frames[0]["task_id"] == ident
    assert frames[-1]["status"] == "completed"
    assert frames[-1]["result"] == 1
    assert [frame["type"] for frame in frames].count("STEP_FINISHED") == 2
    second = frames[2]["id"]
    with connect(f"ws://127.0.0.1:{agents.port}/agent/ws/{ident}?after={second}") as socket:
        assert json.loads(socket.recv(timeout=10))["status"] == "completed"
        assert json.loads(socket.recv(timeout=10))["id"] == frames[3]["id"]


def test_a_websocket_of_an_unknown_task_says_so(agents: Server) -> None:
    with connect(f"ws://127.0.0.1:{agents.port}/agent/ws/nix") as socket:
        assert json.loads(socket.recv(timeout=10))["error"]["code"] == "task_not_found"
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=10)
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 4404
    for path in ("status", "events"):
        assert agents.client.get(f"/agent/{path}/nix").status_code == 404


def test_cancelling_interrupts_the_code(agents: Server) -> None:
    ident = submit(agents, "hang")
    wait_until(lambda: f"hang {ident}" in notes(agents))
    for _ in range(2):
        assert agents.client.post(f"/agent/cancel/{ident}").json()["status"] == "cancelled"
    wait_until(lambda: f"interrupted {ident}" in notes(agents))
    assert [event["type"] for _, event in events(agents, ident)][-1] == "RUN_ERROR"
    done = submit(agents, "shout", message="x")
    until(agents, done, "completed")
    assert agents.client.post(f"/agent/cancel/{done}").status_code == 409


def test_a_failed_task_goes_on_from_its_journal_or_afresh(agents: Server) -> None:
    name = notes_file(agents).with_name("step-name")
    name.write_text("first")
    ident = submit(agents, "shifty")
    assert until(agents, ident, "failed")["error"]["message"] == "RuntimeError: again"
    assert agents.client.post(f"/agent/retry/{ident}").status_code == 202
    until(agents, ident, "failed")
    assert notes(agents).count("step first") == 1, "the journal has it"
    name.write_text("second")
    agents.client.post(f"/agent/retry/{ident}")
    assert until(agents, ident, "failed")["error"]["code"] == "code_changed"
    assert agents.client.post(f"/agent/retry/{ident}?fresh=1").status_code == 202
    assert until(agents, ident, "completed")["result"] == "second"
    assert agents.client.post(f"/agent/retry/{ident}").status_code == 409
    final = [event["type"] for _, event in events(agents, ident) if event["type"] in ("RUN_FINISHED", "RUN_ERROR")]
    assert final == ["RUN_FINISHED"], "what was final before a retry is so no more"


def test_a_task_that_asks_waits_for_its_answer(agents: Server) -> None:
    ident = submit(agents, "confirm", message=" it ")
    task = until(agents, ident, "input_required")
    assert task["input_required"] == {"prompt": "really it?", "schema": {"type": "boolean"}}
    wrong = agents.client.post(f"/agent/input/{ident}", json={"input": "yes"})
    assert wrong.status_code == 422
    assert wrong.json()["error"]["field"] == "input"
    assert agents.client.post(f"/agent/input/{ident}", json={"input": True}).status_code == 202
    assert until(agents, ident, "completed")["result"] == "it: done"
    assert agents.client.post(f"/agent/input/{ident}", json={"input": True}).status_code == 409


def test_a_sleeping_task_holds_no_worker(agents: Server) -> None:
    ident = submit(agents, "nap", input=3.0)
    wait_until(lambda: status(agents, ident)["status"] == "pending" and status(agents, ident)["attempt"] == 1)
    assert 2.9 < until(agents, ident, "completed")["result"] < 8


def test_retries_repeat_no_finished_step(agents: Server) -> None:
    ident = submit(agents, "flaky", input=1)
    assert until(agents, ident, "completed")["result"] == 2
    assert notes(agents).count(f"once {ident}") == 1


def test_what_is_too_large_says_what_to_do(agents: Server) -> None:
    ident = submit(agents, "large", input=300_000)
    assert until(agents, ident, "failed")["error"]["code"] == "value_too_large"


def test_an_error_keeps_its_field_and_its_hint(agents: Server) -> None:
    wanted = {"code": "invalid_input", "message": "3 is odd", "field": "number", "hint": "give an even one"}
    ident = submit(agents, "picky", input=3)
    assert wait_for_end(agents, ident)["error"] == wanted
    with hr.Tasks(agents.url) as tasks, pytest.raises(hr.TaskFailed) as caught:
        tasks.result(ident)
    assert (caught.value.reason, caught.value.field, caught.value.hint) == (
        "invalid_input",
        "number",
        "give an even one",
    )
    answer = agents.client.post("/agent/run", json={"agent": "picky", "input": 3})
    assert answer.status_code == 422
    assert answer.json()["error"].items() >= wanted.items()


def test_run_waits_for_the_result_and_no_longer_than_asked(agents: Server) -> None:
    assert agents.client.post("/agent/run", json={"agent": "shout", "message": "a"}).json()["result"]["text"] == "A"
    failed = agents.client.post("/agent/run", json={"agent": "fail", "message": "because"})
    assert failed.status_code == 500
    assert failed.json()["error"]["message"] == "ValueError: because"
    late = agents.client.post("/agent/run", json={"agent": "hang"}, headers={"X-Request-Deadline-Ms": "300"})
    assert late.status_code == 504
    ident = late.json()["task_id"]
    assert status(agents, ident)["status"] == "running", "the task goes on"
    agents.client.post(f"/agent/cancel/{ident}")


def test_a_flood_in_one_lane_does_not_hold_up_another(agents: Server) -> None:
    flood = [submit(agents, "hang", priority="batch") for _ in range(10)]
    ident = submit(agents, "shout", message="now", priority="interactive")
    until(agents, ident, "completed")
    assert sum(status(agents, each)["status"] == "pending" for each in flood) == 8, "two places in this lane"
    for each in flood:
        agents.client.post(f"/agent/cancel/{each}")


def test_the_list_is_in_pages_and_can_be_filtered(agents: Server) -> None:
    made = [submit(agents, "shout", message=str(number)) for number in range(5)]
    for ident in made:
        until(agents, ident, "completed")
    found: list[str] = []
    after = ""
    while len(found) < 5:
        page = agents.client.get("/agent/tasks", params={"agent": "shout", "limit": 2, "after": after}).json()
        found += [task["task_id"] for task in page["tasks"]]
        after = page["next"]
    assert found[:5] == made[::-1]
    failed = agents.client.get("/agent/tasks?status=failed").json()["tasks"]
    assert {task["status"] for task in failed} <= {"failed"}
    assert agents.client.get("/agent/tasks?status=nix").status_code == 422


def test_every_task_is_counted_once_at_its_end(agents: Server) -> None:
    series = 'agent_requests_total{status="success",model="shout"}'
    before = agents.metric(series)
    until(agents, submit(agents, "shout", message="x"), "completed")
    wait_until(lambda: agents.metric(series) == before + 1)
    text = agents.client.get("/metrics").text
    for name in (
        'agent_request_duration_seconds_bucket{model="shout",le="600.0"}',
        'agent_tokens_per_request_count{model="shout"}',
        'headrace_task_queue_depth{lane="batch"}',
        'agent_requests_total{status="timeout",model="crash"} 0',
        "agent_active_requests ",
    ):
        assert name in text


def test_what_an_agent_s_code_counts_itself_is_among_the_metrics(agents: Server) -> None:
    ident = submit(agents, "metered", message="abc")
    assert wait_for_end(agents, ident)["result"] == "cba"
    assert agents.metric('llm_api_calls_total{provider="local",model="tiny-model",status="success"}') == 1
    assert agents.metric('tool_calls_total{tool_name="reverse",status="success"}') == 1
    assert agents.metric('agent_tokens_per_request_sum{model="metered"}') == 70


def test_pages_of_other_sites_are_refused(agents: Server) -> None:
    elsewhere = {"Origin": "http://evil.example"}
    ident = submit(agents, "shout", message="x")
    assert agents.client.post(f"/agent/cancel/{ident}", headers=elsewhere).status_code == 403
    with connect(f"ws://127.0.0.1:{agents.port}/agent/ws/{ident}", additional_headers=elsewhere) as socket:
        assert json.loads(socket.recv(timeout=10))["error"]["code"] == "forbidden"


def test_a_full_house_says_when_to_come_back(tmp_path: Path) -> None:
    env = {"AGENT_NOTES": str(tmp_path / "notes")}
    arguments = ("agents_app.py", "--max-tasks", "3", "--concurrency", "1")
    with serving(tmp_path, *arguments, verb="up", cwd=AGENTS, env=env) as server:
        made = [submit(server, "hang") for _ in range(3)]
        refused = server.client.post("/agent/submit", json={"agent": "hang"})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert len(server.client.get("/agent/tasks").json()["tasks"]) == 3, "nothing was written"
        server.client.post(f"/agent/cancel/{made[0]}")
        submit(server, "hang")
        for task in server.client.get("/agent/tasks").json()["tasks"]:
            server.client.post(f"/agent/cancel/{task['task_id']}")


def test_a_task_belongs_to_the_key_that_made_it(tmp_path: Path) -> None:
    mine, theirs = {"Authorization": "Bearer key-of-mine"}, {"X-API-Key": "key-of-theirs"}
    env = {"HEADRACE_API_KEYS": "key-of-mine,key-of-theirs"}
    with serving(tmp_path, "agents_app.py", verb="up", cwd=AGENTS, env=env) as server:
        assert server.client.post("/agent/submit", json={"agent": "shout", "message": "x"}).status_code == 401
        made = server.client.post("/agent/submit", json={"agent": "shout", "message": "x"}, headers=mine)
        ident = made.json()["task_id"]
        for method, path in (("GET", "status"), ("GET", "events"), ("POST", "cancel"), ("POST", "retry")):
            assert server.client.request(method, f"/agent/{path}/{ident}", headers=theirs).status_code == 404
        assert server.client.get(f"/agent/status/{ident}", headers=mine).status_code == 200
        assert server.client.get("/agent/tasks", headers=theirs).json()["tasks"] == []
        url = f"ws://127.0.0.1:{server.port}/agent/ws/{ident}"
        with pytest.raises(Exception, match="403"):
            connect(url)
        with connect(url, additional_headers=mine) as socket:
            assert json.loads(socket.recv(timeout=10))["task_id"] == ident
        assert "key-of-mine" not in server.log


def test_keys_never_reach_log_or_error(tmp_path: Path) -> None:
    secret = "canary-" + os.urandom(8).hex()
    with serving(
        tmp_path, "agents_app.py", verb="up", cwd=AGENTS, env={"SOME_API_KEY": secret, "AGENT_NOTES": ""}
    ) as server:
        answer = server.client.post("/agent/run", json={"agent": "leak"})
        assert answer.status_code == 500
        assert "[redacted]" in answer.text
        ident = answer.json()["task_id"]
        shown = answer.text + json.dumps(status(server, ident)) + json.dumps(events(server, ident))
        assert secret not in shown + server.log
        kept = b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())
        assert secret.encode() not in kept
