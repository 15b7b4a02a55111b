"""The process of a task worker: imports the author's module, opens the store, runs tasks, ends well."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import traceback

from headrace.child import Child, raise_descriptor_limit
from headrace.core import Beat, Hello
from headrace.errors import HeadraceError
from headrace.machine import watch_loop
from headrace.tasks.delivery import RedisError
from headrace.tasks.registry import Agent, load_app
from headrace.tasks.service import Service
from headrace.tasks.worker import TaskWorker

_log = logging.getLogger("headrace.tasks.worker_process")  # __name__ is __main__ here

BEAT_S = 0.5
_CANNOT_START = 3
# Kept of the grace period for handing over what is not done by then, also code that is slow to stop.
_HAND_OVER_S = 6.0


def main(argv: list[str]) -> int:
    """``python -m headrace.tasks.worker_process SLOT RUN_DIR CONTROL_FD``."""
    child = Child(argv)
    raise_descriptor_limit()  # each task holds a connection, and what its code opens
    # The supervisor says when this process may end; the terminal's and systemd's signals reach the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        agents = load_app(child.config.app)
        return asyncio.run(_work(child, agents))
    except HeadraceError as error:
        _log.error("cannot start: %s%s", error.message, f" ({error.hint})" if error.hint else "")
        if error.__cause__ is not None:
            _log.error("%s", "".join(traceback.format_exception(error.__cause__)))
        return _CANNOT_START


async def _work(child: Child, agents: dict[str, Agent]) -> int:
    config = child.config
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    grace_s = config.shutdown_grace_s

    def drain(grace: float) -> None:
        nonlocal grace_s
        grace_s = grace
        loop.call_soon_threadsafe(stop.set)

    child.watch(drain)
    async with Service(config, child.row) as service:
        service.metrics.know(agents)
        await _publish(service, agents)
        worker = TaskWorker(
            service.connection,
            service.store,
            service.delivery,
            agents,
            name=service.name,
            concurrency=config.concurrency,
            lease_s=config.lease_s,
            max_attempts=config.max_attempts,
            max_value_bytes=config.max_value_bytes,
            row=child.row,
        )
        child.tell(Hello())
        watching = asyncio.ensure_future(watch_loop(child.row, child.slot))
        working = asyncio.ensure_future(worker.run(stop, grace_s - min(_HAND_OVER_S, grace_s / 4)))
        step = 0
        while not working.done():
            # From the loop that runs the agents: one that is blocked is silent, and is ended after a while.
            child.tell(Beat(step := step + 1))
            await asyncio.wait({working}, timeout=BEAT_S)
        watching.cancel()
        await working
    return 0


async def _publish(service: Service, agents: dict[str, Agent]) -> None:
    """Tell the gateways what there is to run, through an outage that begins just now."""
    while True:
        try:
            await service.store.publish_agents([agent.spec() for agent in agents.values()])
            return
        except RedisError as error:
            _log.warning("the task store does not answer: %s; trying again in %g s", error, BEAT_S)
            await asyncio.sleep(BEAT_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
