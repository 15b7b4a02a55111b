"""More clients than the model can serve: those who are let in are served in time, the others are told at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

from conftest import Server, serving, wait_until
from headrace.loadgen import driver


def resident_mib(server: Server) -> float:
    pid = server.pid_of("http.0")
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def test_512_clients_against_a_room_of_200(tmp_path: Path) -> None:
    arguments = ("models:Slow", "--max-batch-size", "8", "--max-queue", "200")
    with serving(tmp_path, *arguments, env={"SLOW_PAUSE_S": "0.03"}) as server:
        plan = driver.Plan(url=server.url, bodies=[b'{"input":"x"}'], duration_s=6.0, warmup_s=3.0)
        before = resident_mib(server)
        (level,) = asyncio.run(driver.measure(plan, [driver.Level(concurrency=512)])).levels
        assert set(level.errors) == {"429"}
        assert level.n > 500, "those who are let in are served at the model's own rate"
        assert level.p99_ms <= 2 * 200 / level.achieved_rate * 1e3
        in_time = server.metric('headrace_refusal_duration_seconds_bucket{model="Slow",le="0.01"}')
        assert in_time >= 0.99 * server.metric('headrace_refusal_duration_seconds_count{model="Slow"}')
        assert resident_mib(server) < before + 30
        wait_until(lambda: server.metric('request_queue_size{model="Slow"}') == 0, 1.0, "normal within a second")
        assert server.predict("after").status_code == 200


def test_what_cannot_be_answered_within_its_deadline_is_refused_when_it_comes(tmp_path: Path) -> None:
    arguments = ("models:Slow", "--max-batch-size", "1", "--max-queue", "1000")
    with serving(tmp_path, *arguments, env={"SLOW_PAUSE_S": "0.1"}) as server:
        plan = driver.Plan(url=server.url, bodies=[b'{"input":"x"}'], duration_s=3.0, warmup_s=0.0)

        async def ask_meanwhile() -> tuple[int, float]:
            load = asyncio.ensure_future(driver.measure(plan, [driver.Level(concurrency=40)]))
            await asyncio.sleep(1.5)
            answer = await asyncio.to_thread(server.predict, "urgent", headers={"X-Request-Deadline-Ms": "500"})
            await load
            return answer.status_code, float(answer.headers.get("retry-after", 0))

        status, retry_after_s = asyncio.run(ask_meanwhile())
        assert status == 429, "about four seconds are waiting already"
        assert 2 <= retry_after_s <= 5
        assert server.metric('headrace_refused_total{model="Slow",reason="expired"}') == 0
