"""What every process that a supervisor starts has in common: its slot, its control channel, and the end of both.

The control channel is an inherited socket whose other end only the supervisor holds. Its end of file therefore means
that the supervisor is gone, however it died, and the child goes too, with every process it has started itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from headrace import log
from headrace.clock import sleep
from headrace.config import Config
from headrace.core import Cancel, Drain, Frame, Request
from headrace.errand import Errands
from headrace.ipc import ChannelClosed, SocketChannel
from headrace.metrics import Row
from headrace.metrics.current import adopt
from headrace.rundir import RunDir

_log = logging.getLogger(__name__)

# How long a stuck child outlives its supervisor before a front end ends it.
ORPHAN_GRACE_S = 1.0
_MOST_DESCRIPTORS = 65_536


class Child:
    """This process as its supervisor sees it. Made first thing in the child's `main`.

    Args:
        argv: slot, runtime directory and descriptor of the control socket, as `Supervisor` passes them.
        cleans_up: whether this child tidies up behind a supervisor that was killed. Front ends do; a model worker may
            be stuck in code of others.
    """

    def __init__(self, argv: list[str], *, cleans_up: bool = False) -> None:
        self._cleans_up = cleans_up
        self.slot, directory, descriptor = argv
        self.run_dir = RunDir(Path(directory))
        self.control = SocketChannel(socket.socket(fileno=int(descriptor)))
        self.config: Config = self.run_dir.config()
        log.set_up(self.slot, level=self.config.log_level, style=self.config.log_format)
        self.row = Row(self.run_dir.metrics_file(self.slot))
        adopt(self.row, self.run_dir.metrics)
        self._errands = Errands(self.tell)

    def watch(self, on_drain: Callable[[float], None]) -> None:
        """Listen to the supervisor from a thread: call back on `Drain`, do errands beside the work, and end the process
        when it is gone."""
        threading.Thread(target=self._listen, args=(on_drain,), name="control", daemon=True).start()

    def tell(self, frame: Frame) -> None:
        """Send to the supervisor; if it is gone, `watch` is already ending this process."""
        try:
            self.control.send(frame)
        except ChannelClosed:
            _log.debug("the supervisor is gone")

    def _listen(self, on_drain: Callable[[float], None]) -> None:
        while True:
            try:
                frames = self.control.recv(None)
            except ChannelClosed:
                self._vanish()
            for frame in frames:
                if isinstance(frame, Drain):
                    on_drain(frame.grace_s)
                elif isinstance(frame, Request | Cancel):
                    self._errands.receive(frame)

    def _vanish(self) -> None:
        """End this process and every process it has started: it leads its own process group."""
        if self._cleans_up:
            self._clean_up_after_supervisor()
        sys.stderr.flush()
        os.killpg(os.getpgid(0), signal.SIGKILL)

    def _clean_up_after_supervisor(self) -> None:
        """Give the other children a moment to go by themselves, end those that are stuck, remove the directory."""
        pids = self.run_dir.pids()
        sleep(ORPHAN_GRACE_S)
        for pid in pids:
            if pid != os.getpid():
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
        self.run_dir.remove()


def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as the system allows it; each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard if hard != resource.RLIM_INFINITY else _MOST_DESCRIPTORS, _MOST_DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)
