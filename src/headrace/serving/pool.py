"""Model workers without front ends of ours: for applications that run under another server.

Each process of the application is a front end (`embedded.py`). The first to come takes the directory's lock and starts
this process, which keeps the workers running; the others find their sockets. It ends when the last one has gone: each
holds a shared lock on the file ``users`` as long as it lives, however it ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import sys
from pathlib import Path

from headrace import log, metrics
from headrace.machine import watch_gpus, watch_processes
from headrace.rundir import RunDir
from headrace.serving.fleet import Fleet
from headrace.supervisor import Supervisor
from headrace.version import __version__

_log = logging.getLogger("headrace.serving.pool")  # __name__ is __main__ here

LOOK_S = 0.5


def main(argv: list[str]) -> int:
    """``python -m headrace.serving.pool RUN_DIR LOCK_FD``; the descriptor holds the directory's lock."""
    run_dir = RunDir(Path(argv[0]))
    config = run_dir.config()
    log.set_up("pool", level=config.log_level, style=config.log_format)
    # Whoever stops the application stops its processes; this one follows the last of them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return asyncio.run(_run(run_dir))


async def _run(run_dir: RunDir) -> int:
    config = run_dir.config()
    row = metrics.Row(run_dir.metrics_file("supervisor"))
    row.gauge(metrics.BUILD_INFO, version=__version__).set(1)
    supervisor = Supervisor(run_dir, lambda: fleet.count())
    fleet = Fleet(config, run_dir, supervisor, row)
    fleet.start()
    watching = [asyncio.ensure_future(each) for each in (watch_processes(row, supervisor.pids), watch_gpus(row))]
    users = os.open(run_dir.path / "users", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    while not _is_last(users):
        run_dir.clear_vacant_slots()
        await asyncio.sleep(LOOK_S)
    _log.info("the last process of the application has gone: ending")
    for each in watching:
        each.cancel()
    await supervisor.stop_all(config.shutdown_grace_s)
    supervisor.close()
    # Under the exclusive lock on `users`: who comes now waits until the directory is gone, and makes a new one.
    run_dir.remove()
    return 0


def _is_last(users: int) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
