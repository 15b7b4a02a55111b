"""A whole server on this machine: one supervisor, its front ends on a shared port, its model workers.

The supervisor opens the port itself, so that a port in use is known before anything loads, and lets the front ends
inherit it: a front end's death closes no connection that waits to be accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from headrace import metrics
from headrace.config import Config
from headrace.errors import ConfigError, HeadraceError
from headrace.machine import watch_gpus, watch_loop, watch_processes
from headrace.rundir import RunDir
from headrace.serving.fleet import Fleet
from headrace.serving.names import http_slot
from headrace.supervisor import SHORT_BACKOFF_S, Spec, Supervisor
from headrace.version import __version__

if TYPE_CHECKING:
    from headrace.serving.admin import AdminServer

_log = logging.getLogger(__name__)

_BACKLOG = 2048
# A front end whose event loop has not turned for so long is stuck. Its slowest step, reading a large body, takes one.
_LOOP_TIMEOUT_S = 30.0
# Options that a running server cannot change: they are how its other processes were started.
_FIXED = ("host", "port", "http_workers", "admin_host", "admin_port", "log_level", "log_format")


MODELS_ONLY = "headrace.serving.http"


async def serve(
    config: Config,
    on_ready: Callable[[str, str], None] = lambda url, admin_url: None,
    reread: Callable[[], Config] | None = None,
    *,
    front_end: str | None = MODELS_ONLY,
    others: Callable[[str], Sequence[Spec]] = lambda url: (),
    profiler: str = "",
) -> int:
    """Run until SIGTERM or SIGINT; SIGHUP reloads the models.

    Args:
        config: must name at least one model, unless there is something else to run.
        on_ready: called with the URLs of the API and of the admin port (empty without one) once every model is warm.
        reread: reads the configuration again for a reload; without it a reload keeps the options and loads anew.
        front_end: module that is the front ends' process; without one there are none, and no port.
        others: makes the further processes to keep running, from the API's URL (empty without front ends); they are
            asked to end together with the front ends.
        profiler: module that looks at a process and draws what was seen, as `serving.profiles` has it; without one the
            admin port takes no profiles.

    Returns:
        The exit status: 0 after an orderly end, 1 when a process could not start.

    Raises:
        ConfigError: no model is named, or an address cannot be listened on.
    """
    if not config.models and front_end == MODELS_ONLY:
        raise ConfigError("no model to serve", field="target", hint="headrace serve TARGET, or [models.NAME] in a file")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(config.host, config.port, "port")) if front_end else None
        admin = None
        if config.admin_port >= 0:
            if not (config.api_keys or is_loopback(config.admin_host)):
                raise ConfigError(
                    f"the admin port must not be open to others on {config.admin_host} without a key",
                    field="admin_host",
                    hint="set api_keys, or leave admin_host at 127.0.0.1",
                )
            admin = stack.enter_context(_listen(config.admin_host, config.admin_port, "admin_port"))
        run_dir = RunDir.create(config)
        stack.callback(run_dir.remove)
        processes = _Processes(front_end or "", others(_url(listener) if listener else ""), profiler)
        return await _Server(config, run_dir, listener, admin, reread or (lambda: config), processes).run(on_ready)


@dataclass(frozen=True)
class _Processes:
    """What runs beside the model workers: the front ends' module, the others, and what looks at them all."""

    front_end: str
    others: Sequence[Spec]
    profiler: str


class _Server:
    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        listener: socket.socket | None,
        admin: socket.socket | None,
        reread: Callable[[], Config],
        processes: _Processes,
    ) -> None:
        self._config = config
        self._listener = listener
        self._reread = reread
        self._run_dir = run_dir
        self._row = metrics.Row(run_dir.metrics_file("supervisor"))
        self._row.gauge(metrics.BUILD_INFO, version=__version__).set(1)
        self._supervisor = Supervisor(run_dir, self._count)
        self._fleet = Fleet(config, run_dir, self._supervisor, self._row)
        count = config.http_worker_count() if listener else 0
        self._front_ends = {http_slot(index): self._front_end(index, processes.front_end) for index in range(count)}
        self._others = {
            spec.slot: dataclasses.replace(spec, on_end=partial(self._clear, spec.slot)) for spec in processes.others
        }
        self._admin_listener = admin
        self._profiler = processes.profiler
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stop = asyncio.Event()
        self._exit_now = asyncio.Event()

    async def run(self, on_ready: Callable[[str, str], None]) -> int:
        self._catch_signals()
        self._in_background(watch_processes(self._row, self._supervisor.pids))
        self._in_background(watch_gpus(self._row))
        self._in_background(watch_loop(self._row, "supervisor"))
        self._fleet.start()
        for spec in (*self._front_ends.values(), *self._others.values()):
            self._supervisor.start(spec)
        slots = [*self._fleet.slots, *self._front_ends, *self._others]
        starting = asyncio.ensure_future(self._all_ready(slots))
        stopping = asyncio.ensure_future(self._stop.wait())
        admin = self._start_admin()
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        code = 0
        if starting.done():
            if starting.result():
                on_ready(
                    _url(self._listener) if self._listener else "",
                    _url(self._admin_listener) if self._admin_listener else "",
                )
                if self._config.reload:
                    self._in_background(self._reload_on_change())
                await stopping
            else:
                code = 1
                self._stop.set()  # from here on a signal means: at once
        starting.cancel()
        stopping.cancel()
        for task in self._tasks:
            task.cancel()
        if admin:
            admin.stop()
        await self._shut_down()
        return code

    async def _all_ready(self, slots: list[str]) -> bool:
        """True once all are ready; False as soon as one has ended before it was."""
        waits = [asyncio.ensure_future(self._supervisor.wait_ready(slot)) for slot in slots]
        for wait in asyncio.as_completed(waits):
            if not await wait:
                for each in waits:
                    each.cancel()
                return False
        return True

    async def _shut_down(self) -> None:
        """Front ends first: they answer what they have accepted, for which they need the workers."""
        if self._listener:
            self._listener.close()
        grace_s = self._config.shutdown_grace_s
        orderly = asyncio.ensure_future(self._stop_in_order(grace_s))
        hurry = asyncio.ensure_future(self._exit_now.wait())
        await asyncio.wait({orderly, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not orderly.done():
            _log.warning("second signal: ending at once")
            orderly.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await orderly
            await self._supervisor.stop_all(0.0)
        self._supervisor.close()

    async def _stop_in_order(self, grace_s: float) -> None:
        await self._supervisor.stop([*self._front_ends, *self._others], grace_s)
        await self._supervisor.stop_all(grace_s)

    def _catch_signals(self) -> None:
        def end() -> None:
            (self._exit_now if self._stop.is_set() else self._stop).set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._in_background(self._reload_and_log()))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload(self) -> dict[str, Any]:
        config = self._reread()
        if not config.models and self._config.models:
            raise ConfigError("the configuration names no model any more", field="models")
        fixed = [name for name in _FIXED if getattr(config, name) != getattr(self._config, name)]
        if fixed:
            _log.warning("a reload leaves %s as they were; they need a restart", ", ".join(fixed))
        kept = {name: getattr(self._config, name) for name in _FIXED}
        config = msgspec.structs.replace(config, **kept)
        report = await self._fleet.reload(config)
        self._config = config
        return report

    async def _reload_and_log(self) -> None:
        try:
            report = await self._reload()
        except HeadraceError as error:
            _log.error("the reload failed: %s; what was served goes on being served", error.message)
        else:
            _log.info("reloaded: %s", report)

    async def _reload_on_change(self) -> None:
        """For development: look at the files beside the models twice a second."""
        seen = await asyncio.to_thread(source_files)
        while True:
            await asyncio.sleep(0.5)
            now = await asyncio.to_thread(source_files)
            if now != seen:
                changed = {name for name, _ in seen.items() ^ now.items()}
                _log.info("%s changed: reloading", ", ".join(sorted(changed)[:3]))
                seen = now
                await self._reload_and_log()

    def _start_admin(self) -> AdminServer | None:
        if self._admin_listener is None:
            return None
        from headrace.serving.admin import AdminServer, admin_app
        from headrace.serving.profiles import Profiles

        app = admin_app(
            self._config,
            self._fleet,
            self._reload,
            metrics.Reader(self._run_dir.metrics),
            Profiles(self._supervisor, self._profiler),
        )
        server = AdminServer(app, self._admin_listener)
        self._in_background(server.run_until_stopped())
        return server

    def _clear(self, slot: str) -> None:
        """Leave no stale figures of a process that has ended."""
        metrics.Row(self._run_dir.metrics_file(slot)).close()

    def _front_end(self, index: int, module: str) -> Spec:
        assert self._listener
        descriptor = self._listener.fileno()
        slot = http_slot(index)
        return Spec(
            slot=slot,
            argv=(sys.executable, "-P", "-m", module, str(descriptor)),
            # A tokenizer's own thread pool would compete with the model for the cores.
            env={"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
            # It is ready when it has found a worker of every model.
            start_timeout_s=60.0 + max((model.load_timeout_s for model in self._config.models.values()), default=0.0),
            step_timeout_s=_LOOP_TIMEOUT_S,
            pass_fds=(descriptor,),
            backoff_s=SHORT_BACKOFF_S,
            on_end=partial(self._clear, slot),
        )

    def _count(self) -> None:
        """Bring the figures on processes up to date."""
        self._fleet.count()
        restarts = sum(self._supervisor.restarts(slot) for slot in self._front_ends if self._supervisor.knows(slot))
        self._row.counter(metrics.HTTP_RESTARTS).advance_to(restarts)
        restarts = sum(self._supervisor.restarts(slot) for slot in self._others if self._supervisor.knows(slot))
        self._row.counter(metrics.TASK_WORKER_RESTARTS).advance_to(restarts)


def source_files(root: Path | None = None) -> dict[str, int]:
    """Python and TOML files below the current directory with the times of their last change, libraries left out."""
    found: dict[str, int] = {}
    for directory, folders, files in os.walk(root or Path.cwd()):
        # A virtual environment lies anywhere and has ten thousand files; caches and version control begin with a dot.
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__"))
            and name not in ("site-packages", "node_modules")
            and not Path(directory, name, "pyvenv.cfg").exists()
        ]
        for name in files:
            if name.endswith((".py", ".toml")):
                path = Path(directory, name)
                with contextlib.suppress(OSError):
                    found[str(path)] = path.stat().st_mtime_ns
    return found


def is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _listen(host: str, port: int, field: str) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            field=field,
            hint=f"another server may use it; --{field.replace('_', '-')} 0 picks a free one",
        ) from None
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if ":" in host:
        host = f"[{host}]"
    return f"http://{'localhost' if host in ('127.0.0.1', '[::1]') else host}:{port}"
