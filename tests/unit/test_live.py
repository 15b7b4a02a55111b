from __future__ import annotations

import pytest

from headrace.monitoring import live
from headrace.monitoring.live import Snapshot

TEXT = """\
# HELP headrace_requests_total Requests
# TYPE headrace_requests_total counter
headrace_requests_total{model="a",endpoint="predict",status="success"} %(success)s
headrace_requests_total{model="a",endpoint="predict",status="error"} %(error)s
headrace_requests_total{model="other",endpoint="predict",status="error"} 99
headrace_items_total{model="a"} %(success)s
headrace_batch_size_sum{model="a"} %(success)s
headrace_batch_size_count{model="a"} %(batches)s
headrace_request_duration_seconds_bucket{model="a",endpoint="predict",le="0.01"} %(quick)s
headrace_request_duration_seconds_bucket{model="a",endpoint="predict",le="0.1"} %(success)s
headrace_request_duration_seconds_bucket{model="a",endpoint="predict",le="+Inf"} %(success)s
headrace_refused_total{model="a",reason="overloaded"} 0
headrace_refused_total{model="a",reason="invalid"} 7
request_queue_size{model="a"} 3
headrace_requests_in_flight{model="a"} 5
process_resident_memory_bytes{process="worker.a.0"} 1048576
process_cpu_seconds_total{process="worker.a.0"} %(cpu)s
"""
WORKERS: list[dict[str, object]] = [
    {"slot": "worker.a.0", "model": "a", "state": "ready", "pid": 7, "restarts": 1, "devices": []},
    {"slot": "worker.a.1", "model": "a", "state": "starting", "pid": 8, "restarts": 0, "devices": []},
]


def look(at: float, **values: float) -> Snapshot:
    given = {"success": 0.0, "error": 0.0, "batches": 0.0, "quick": 0.0, "cpu": 0.0, **values}
    return Snapshot(at, WORKERS, live.parsed(TEXT % given))


def test_what_happened_between_two_looks_is_told_per_second() -> None:
    found = live.view(
        "http://x", look(10, success=100), look(15, success=300, error=10, batches=50, quick=100, cpu=2.5)
    )
    (model,) = found.models
    assert (model.model, model.ready, model.workers, model.waiting, model.in_flight) == ("a", 1, 2, 3, 5)
    assert (model.requests, model.failed, model.items, model.refused, model.batch) == (42, 2, 40, 0, 4)
    assert model.p50_ms == pytest.approx(10.0), "half of them are in the first bucket"
    assert model.p99_ms == pytest.approx(98.2)
    (process,) = found.processes
    assert (process.process, process.state, process.pid, process.restarts) == ("worker.a.0", "ready", 7, 1)
    assert (process.cpu, process.memory_bytes) == (0.5, 2**20)


def test_without_requests_there_are_no_times() -> None:
    (model,) = live.view("http://x", look(10, success=100), look(15, success=100)).models
    assert (model.requests, model.batch, model.p50_ms, model.p99_ms) == (0, None, None, None)
    assert "–" in live.as_text(live.view("http://x", look(10), look(15)))[3]


def test_a_server_that_began_anew_has_no_negative_rates() -> None:
    (model,) = live.view("http://x", look(10, success=100), look(15, success=20)).models
    assert model.requests == pytest.approx(4)


def test_tasks_are_shown_where_there_are_some() -> None:
    text = 'headrace_tasks_open 4\nagent_requests_total{status="error",model="a"} 10\nagent_active_requests 2\n'
    after = Snapshot(2.0, [], live.parsed(text + 'agent_requests_total{status="success",model="a"} 30\n'))
    found = live.view("http://x", Snapshot(0.0, [], {}), after)
    assert found.agents == {"open": 4, "waiting": 0, "running": 2, "ended_per_s": 20, "failed_per_s": 5}
    assert "tasks: open 4, waiting 0, running 2, ended/s 20, failed/s 5" in live.as_text(found)
    assert live.view("http://x", look(1), look(2)).agents == {}


def test_labels_may_hold_what_separates_labels() -> None:
    (series,) = live.parsed('a{b="x\\"},c=\\\\ \\n",d="e"} 1e3')["a"]
    assert series == ({"b": 'x"},c=\\ \n', "d": "e"}, 1000.0)
