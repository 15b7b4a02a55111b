"""The process of a model worker: loads the target, warms it up, listens for front ends, and ends well."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

from headrace.calibration import Calibration, calibrate, meet_shapes
from headrace.child import Child
from headrace.clock import perf_counter
from headrace.config import ModelConfig
from headrace.errors import HeadraceError
from headrace.ipc import ChannelClosed, SocketChannel
from headrace.isolation import DeviceLost
from headrace.runners import Loaded, open_target
from headrace.runners.devices import limit_threads, pick_device
from headrace.serving.names import parse_worker
from headrace.serving.worker import Worker

_log = logging.getLogger("headrace.serving.worker_process")  # __name__ is __main__ here

BEAT_S = 0.5
# Statuses for the supervisor's log: of our own, outside those of the shell and of Python.
_CANNOT_START, _BROKEN, _DEVICE_LOST = 3, 70, 71


def listen(worker: Worker, path: Path) -> None:
    """Accept front ends on a Unix socket. The path appears only when it accepts, and never over a living one."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    listener.bind(str(temporary))
    listener.listen(128)
    os.rename(temporary, path)

    def accept() -> None:
        pause = threading.Event()
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                _log.error("cannot accept a front end: %s; trying again", error)
                pause.wait(0.5)
                continue
            with contextlib.suppress(ChannelClosed):
                worker.attach(SocketChannel(connection))

    threading.Thread(target=accept, name="accept", daemon=True).start()


def _warm_up(loaded: Loaded, config: ModelConfig) -> Calibration | None:
    if loaded.example is None:
        return None
    measured = calibrate(
        loaded.runner.run,
        loaded.example,
        loaded.cost,
        max_batch_size=config.max_batch_size,
        max_batch_tokens=config.max_batch_tokens,
    )
    _log.info(
        "%s warmed up: best batch %d, overhead %.0f tokens, %.0f tokens/s",
        config.name,
        measured.batch_size,
        measured.overhead_tokens,
        measured.tokens_per_s,
    )
    if loaded.lengths:
        began = perf_counter()
        met, there_are = meet_shapes(
            loaded.runner.run,
            loaded.example,
            loaded.lengths,
            batch_size=measured.batch_size,
            max_batch_tokens=config.max_batch_tokens,
        )
        rest = "" if met == there_are else f"; the other {there_are - met} as they come"
        _log.info("%s has met %d shapes in %.1f s%s", config.name, met, perf_counter() - began, rest)
    return measured


def _load(config: ModelConfig, index: int) -> tuple[Loaded, Calibration | None]:
    bound_to = len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) if config.devices else 0
    loaded = open_target(config, pick_device(config.device, index, bound_to))
    if "torch" in sys.modules:
        limit_threads(int(os.environ["OMP_NUM_THREADS"]))
    return loaded, _warm_up(loaded, config)


def _beat_for_ever(child: Child, worker: Worker) -> None:
    pause = threading.Event()
    while True:
        child.tell(worker.beat())
        pause.wait(BEAT_S)


def _end_with_thread(problem: threading.ExceptHookArgs) -> None:
    """A worker that has lost one of its threads would beat on and answer nothing: end it, so that it is replaced."""
    trace = "".join(traceback.format_exception(problem.exc_type, problem.exc_value, problem.exc_traceback))
    _log.error("a thread of the worker failed; ending the process\n%s", trace)
    os._exit(_BROKEN)


def main(argv: list[str]) -> int:
    """``python -m headrace.serving.worker_process NUMBER SLOT RUN_DIR CONTROL_FD``; the slot is ``worker.MODEL.INDEX``,
    the number names the socket."""
    path_number = int(argv[0])
    child = Child(argv[1:])
    threading.excepthook = _end_with_thread
    name, index = parse_worker(child.slot)
    config = child.config.models[name]
    path = child.run_dir.socket(path_number)
    worker: Worker | None = None

    def drain(grace_s: float) -> None:
        if worker is None:
            os._exit(0)
        path.unlink(missing_ok=True)
        worker.drain()

    # Ctrl-C in a terminal and systemd's SIGTERM reach the whole group: the supervisor says when this process may end,
    # since front ends need it to answer what they have accepted.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child.watch(drain)
    try:
        loaded, calibration = _load(config, index)
        worker = Worker(loaded, config, child.row, calibration)
        listen(worker, path)
    except HeadraceError as error:
        _log.error("%s cannot start: %s%s", name, error.message, f" ({error.hint})" if error.hint else "")
        return _CANNOT_START
    except Exception:
        _log.error("%s cannot start:\n%s", name, traceback.format_exc())
        return _CANNOT_START
    child.tell(worker.hello)
    threading.Thread(target=_beat_for_ever, args=(child, worker), name="beat", daemon=True).start()
    try:
        worker.serve()
    except DeviceLost as error:
        _log.error("the device is lost (%s); ending the process, another one takes its place", error)
        return _DEVICE_LOST
    close = getattr(loaded.runner, "close", None)
    if close is not None:
        close()
    return 0


if __name__ == "__main__":
    # Threads that still serve a vanished front end must not hold up the end of the process.
    try:
        code = main(sys.argv[1:])
    except BaseException:
        _log.error("the worker failed:\n%s", traceback.format_exc())
        code = _BROKEN
    sys.stderr.flush()
    os._exit(code)
