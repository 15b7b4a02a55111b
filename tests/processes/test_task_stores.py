"""Agents' tasks on every kind of store that a URL can name, with the real gateway and the real task worker."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from conftest import Server, Stage, Watcher, stage, submit, task_status, wait_for_end, wait_until
from headrace import metrics
from headrace.config import Config
from headrace.errors import ConfigError
from headrace.tasks.service import Service
from stores import Cluster, Node, Nodes, Sentinel, make_certificate

pytestmark = pytest.mark.usefixtures("needs_proc")


def sum_of_squares(steps: int) -> int:
    return sum(number * number for number in range(steps))


def actors(play: Stage) -> tuple[Server, Server]:
    """A gateway and a task worker."""
    gateway, worker = play.start("gateway", ready=False), play.start("task worker", "--concurrency", "2", ready=False)
    play.await_ready(gateway)
    play.await_ready(worker)
    return gateway, worker


def live_a_whole_life(play: Stage, gateway: Server) -> None:
    """A task that is watched, one that is cancelled, one that asks."""
    watched = submit(gateway, "squares", steps=5, pause_s=0.3)
    watcher = Watcher(watched, gateway.url)
    wait_until(lambda: "STEP_FINISHED" in watcher.types(), 20, "an event of a step")
    assert not watcher.done, "events are seen as they happen"
    hanging, asking = submit(gateway, "hang"), submit(gateway, "confirm", {"message": " sell "})
    wait_until(lambda: play.notes("hang", hanging), 20, "it runs")
    assert gateway.client.post(f"/agent/cancel/{hanging}").json()["status"] == "cancelled"
    # Long before anybody looks at the lease: the worker was told.
    wait_until(lambda: play.notes("interrupted", hanging), 5, "the code is interrupted")
    wait_until(lambda: task_status(gateway, asking)["status"] == "input_required", 20, "it asks")
    assert gateway.client.post(f"/agent/input/{asking}", json={"input": True}).status_code == 202
    assert wait_for_end(gateway, asking)["result"] == "sell: done"
    watcher.join(20)
    assert watcher.fault() == ""
    task = wait_for_end(gateway, watched)
    assert (task["status"], task["result"], task["attempt"]) == ("completed", sum_of_squares(5), 1)


def test_a_server_with_a_password_that_speaks_tls_only(tmp_path: Path, redis_server: str) -> None:
    store = Node(redis_server, tmp_path / "store", certificate=make_certificate(tmp_path))
    try:
        with stage(tmp_path, redis_url=store.url) as play:
            gateway, _ = actors(play)
            live_a_whole_life(play, gateway)
    finally:
        store.stop()


def lose_the_master_in_the_middle(play: Stage, gateway: Server, store: Nodes, master: Node) -> None:
    """The master dies, a replica takes its place, and the task that runs notices nothing."""
    ident = submit(gateway, "squares", steps=6, pause_s=0.5)
    watcher = Watcher(ident, gateway.url)
    # In the middle of a step nothing is on its way that a replica might not have yet.
    wait_until(lambda: play.notes("begin", ident, 2), 20, "the third step")
    master.stop()
    watcher.join(25)
    assert watcher.fault() == ""
    task = wait_for_end(gateway, ident)
    assert (task["status"], task["result"], task["attempt"]) == ("completed", sum_of_squares(6), 1)
    assert Counter(line[2] for line in play.notes("begin", ident)) == {str(number): 1 for number in range(6)}
    assert [event["stepName"] for _, event in watcher.events if event["type"] == "STEP_FINISHED"] == [
        f"square {number}" for number in range(6)
    ]


@pytest.mark.long
def test_a_cluster_whose_master_fails_in_the_middle_of_a_run(tmp_path: Path, redis_server: str) -> None:
    store = Cluster(redis_server, tmp_path / "store", replicas=True)
    try:
        with stage(tmp_path, "--lease-s", "10", redis_url=store.url) as play:
            gateway, worker = actors(play)
            lose_the_master_in_the_middle(play, gateway, store, store.owner("{hr}"))
            live_a_whole_life(play, gateway)
            assert worker.process.poll() is None
        # Any node answers for itself, which must not be taken for the whole.
        with pytest.raises(ConfigError, match="one node of a Cluster") as refused:
            asyncio.run(open_service(store.nodes[-1].url))
        assert refused.value.field == "redis_url"
    finally:
        store.stop()


async def open_service(url: str) -> None:
    async with Service(Config(redis_url=url), metrics.Row()):
        pass


@pytest.mark.long
def test_sentinel_promotes_a_replica_in_the_middle_of_a_run(tmp_path: Path, redis_server: str) -> None:
    store = Sentinel(redis_server, tmp_path / "store", replicas=1)
    try:
        with stage(tmp_path, "--lease-s", "10", redis_url=store.url) as play:
            gateway, worker = actors(play)
            master, replica = store.nodes
            assert store.master() == master.port
            lose_the_master_in_the_middle(play, gateway, store, master)
            assert store.master() == replica.port
            live_a_whole_life(play, gateway)
            assert worker.process.poll() is None
    finally:
        store.stop()
