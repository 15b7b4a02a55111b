"""Starts processes, sees them end, starts them again. Dumb on purpose: it knows argv, a ready probe, a restart policy.

Each child leads its own process group, so that a terminal's Ctrl-C reaches the supervisor alone and a stuck child goes
together with what it has started. Ready is the child's first `Hello` on its control channel; a `Beat` says how long
its current piece of work has been running.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from headrace.clock import SYSTEM, Clock
from headrace.core import Beat, Cancel, Drain, Frame, Hello, Outcome, Request
from headrace.errand import Errand, Errands
from headrace.errors import DeadlineExceeded, NotReady, WorkerLost, from_fault
from headrace.ipc import ChannelClosed, FrameDecoder, SocketChannel
from headrace.rundir import RunDir

_log = logging.getLogger(__name__)

BACKOFF_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# For children without which nobody is answered at all: requests that nobody accepts have no deadline yet.
SHORT_BACKOFF_S = BACKOFF_S[:4]
# A child that lived this long has earned an immediate restart again.
STABLE_S = 30.0
# A child that is suspended (SIGSTOP) and has not been heard for this long is given up.
SILENCE_S = 5.0
WATCH_S = 0.25
# A thread that only listens is woken at once, unless code of C holds the interpreter.
BEGIN_S = 3.0
# This process, among those that can be asked for something.
ITSELF = "supervisor"


@dataclass(frozen=True)
class Spec:
    """How to start one child.

    Args:
        slot: its name; also its row of metrics.
        argv: the command; slot, runtime directory and control descriptor are appended.
        env: variables on top of this process's own.
        step_timeout_s: a longer piece of work, or silence, is a hang; ``None`` for children that do not beat.
        start_timeout_s: time until it must be ready.
        pass_fds: descriptors it inherits.
        on_end: called after each end of the process, before a restart.
        backoff_s: pauses before restarts, the last for all further ones.
    """

    slot: str
    argv: Sequence[str]
    env: Mapping[str, str]
    start_timeout_s: float
    step_timeout_s: float | None = None
    pass_fds: Sequence[int] = ()
    on_end: Callable[[], None] = lambda: None
    backoff_s: Sequence[float] = BACKOFF_S


@dataclass
class _State:
    spec: Spec
    process: asyncio.subprocess.Process | None = None
    control: SocketChannel | None = None
    ready: bool = False
    restarts: int = 0
    failures: int = 0
    started: float = 0.0
    heard: float = 0.0
    busy_s: float = 0.0
    runner: asyncio.Task[None] | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    first_end: asyncio.Event = field(default_factory=asyncio.Event)
    first_ready: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class _Ask:
    """An errand that somebody waits for; ``None`` among the answers: the process has ended."""

    slot: str
    answers: asyncio.Queue[Outcome | None] = field(default_factory=asyncio.Queue)


class Supervisor:
    """Keeps a set of children running.

    Args:
        run_dir: told to every child.
        on_change: called after a child became ready or ended.
    """

    def __init__(self, run_dir: RunDir, on_change: Callable[[], None] = lambda: None, clock: Clock = SYSTEM) -> None:
        self._run_dir = run_dir
        self._on_change = on_change
        self._clock = clock
        self._children: dict[str, _State] = {}
        self._watcher = asyncio.ensure_future(self._watch())
        self._numbers = itertools.count(1)
        self._asks: dict[int, _Ask] = {}
        self._loop = asyncio.get_running_loop()
        self._errands = Errands(self._answer_from_thread)

    def start(self, spec: Spec) -> None:
        """Start a child and keep it running until `stop`."""
        state = self._children[spec.slot] = _State(spec)
        state.runner = asyncio.ensure_future(self._keep_running(state))

    def knows(self, slot: str) -> bool:
        return slot in self._children

    def is_ready(self, slot: str) -> bool:
        return self._children[slot].ready

    def pid(self, slot: str) -> int:
        """The living process of a slot, 0 while there is none."""
        process = self._children[slot].process
        return process.pid if process is not None and process.returncode is None else 0

    def pids(self) -> dict[str, int]:
        """The living processes by slot, this one among them."""
        living = {slot: pid for slot in self._children if (pid := self.pid(slot))}
        return {**living, ITSELF: os.getpid()}

    def restarts(self, slot: str) -> int:
        return self._children[slot].restarts

    def failures(self, slot: str) -> int:
        """How many times in a row the child has ended within `STABLE_S` of its start."""
        return self._children[slot].failures

    async def ask(self, slot: str, errand: Errand, *, within_s: float) -> bytes:
        """Have a process, or `ITSELF`, do something beside its work; what it answers.

        Args:
            within_s: how long it may take once it has begun.

        Raises:
            NotReady: there is no process in the slot just now.
            WorkerLost: it has ended meanwhile.
            DeadlineExceeded: it did not begin, or did not end, in time.
            HeadraceError: whatever it answers instead.
        """
        ident, ask = next(self._numbers), _Ask(slot)
        self._asks[ident] = ask
        try:
            self._send(slot, Request(ident, msgspec.msgpack.encode(errand), 0, within_s))
            outcome = await self._next(ask, BEGIN_S)
            return (outcome if outcome.last else await self._next(ask, within_s)).body
        except BaseException:
            with contextlib.suppress(NotReady, WorkerLost):
                self._send(slot, Cancel(ident))
            raise
        finally:
            del self._asks[ident]

    async def wait_ready(self, slot: str) -> bool:
        """True once the child has been ready; False if it ended before."""
        state = self._children[slot]
        waits = [asyncio.ensure_future(event.wait()) for event in (state.first_ready, state.first_end)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return state.first_ready.is_set()

    async def stop(self, slots: Sequence[str], grace_s: float) -> None:
        """Ask children to finish and end; after the grace period end them. Returns when they are gone."""
        states = [self._children[slot] for slot in slots if slot in self._children]
        for state in states:
            state.stop.set()
            with contextlib.suppress(ChannelClosed):
                if state.control:
                    state.control.send(Drain(grace_s))
        waiting = [state.runner for state in states if state.runner]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=grace_s + 0.5)
            if late:
                _log.warning("%d processes did not end within %.0f s: killed", len(late), grace_s)
            for state in states:
                self._kill(state)
            await asyncio.wait(waiting)
        for slot in slots:
            self._children.pop(slot, None)

    async def stop_all(self, grace_s: float) -> None:
        """Stop whatever is left."""
        await self.stop(list(self._children), grace_s)

    def close(self) -> None:
        self._watcher.cancel()

    def _send(self, slot: str, frame: Request | Cancel) -> None:
        if slot == ITSELF:
            self._errands.receive(frame)
            return
        control = self._children[slot].control if self.knows(slot) and self.pid(slot) else None
        if control is None:
            raise NotReady(f"{slot} does not run just now", hint="if it is one of this server's, it is being started")
        try:
            control.send(frame)
        except ChannelClosed:
            raise _lost(slot) from None

    async def _next(self, ask: _Ask, within_s: float) -> Outcome:
        try:
            async with asyncio.timeout(within_s):
                outcome = await ask.answers.get()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{ask.slot} does not answer: it is starting, suspended, or code of C holds its interpreter"
            ) from None
        if outcome is None:
            raise _lost(ask.slot)
        if outcome.fault is not None:
            raise from_fault(outcome.fault)
        return outcome

    def _answer_from_thread(self, outcome: Outcome) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            self._loop.call_soon_threadsafe(self._answer, outcome)

    def _answer(self, outcome: Outcome) -> None:
        if ask := self._asks.get(outcome.id):
            ask.answers.put_nowait(outcome)

    def _kill(self, state: _State) -> None:
        if state.process is not None and state.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(state.process.pid, signal.SIGKILL)

    async def _keep_running(self, state: _State) -> None:
        slot = state.spec.slot
        while True:
            try:
                await self._run_once(state)
            except OSError as error:
                # No process, descriptor or disk space just now: as good a reason to try again as a death.
                _log.error("%s cannot be run: %s", slot, error)
            state.first_end.set()
            # What fails its very first start will fail its second: somebody has to read the message.
            if state.stop.is_set() or not state.first_ready.is_set():
                self._on_change()
                return
            state.failures = state.failures + 1 if self._clock.monotonic() - state.started < STABLE_S else 1
            state.restarts += 1
            self._on_change()
            pause_s = state.spec.backoff_s[min(state.failures, len(state.spec.backoff_s)) - 1]
            _log.warning("%s ended; starting it again in %.1f s", slot, pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await state.stop.wait()
                return

    async def _run_once(self, state: _State) -> None:
        spec = state.spec
        state.ready, state.busy_s = False, 0.0
        state.started = state.heard = self._clock.monotonic()
        ours, theirs = socket.socketpair()
        state.control = SocketChannel(ours)
        loop, descriptor = asyncio.get_running_loop(), ours.fileno()
        try:
            try:
                process = state.process = await asyncio.create_subprocess_exec(
                    *spec.argv,
                    spec.slot,
                    str(self._run_dir.path),
                    str(theirs.fileno()),
                    env={**os.environ, **spec.env},
                    pass_fds=(theirs.fileno(), *spec.pass_fds),
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
            finally:
                theirs.close()
            if state.stop.is_set():
                self._kill(state)
            loop.add_reader(descriptor, self._read, state, ours, descriptor, FrameDecoder())
            try:
                self._run_dir.note_pid(spec.slot, process.pid)
            finally:
                code = await process.wait()
                # What it started and left behind goes with it.
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
            if code != 0 and not state.stop.is_set():
                _log.error("%s (pid %d) ended: %s", spec.slot, process.pid, _how(code))
        finally:
            state.ready = False
            loop.remove_reader(descriptor)
            state.control.close()
            self._run_dir.forget_pid(spec.slot)
            for ask in self._asks.values():
                if ask.slot == spec.slot:
                    ask.answers.put_nowait(None)
            spec.on_end()

    def _read(self, state: _State, ours: socket.socket, descriptor: int, decoder: FrameDecoder) -> None:
        try:
            data = ours.recv(1 << 16, socket.MSG_DONTWAIT)
            frames = decoder.feed(data)
        except BlockingIOError:
            return
        except OSError:
            data, frames = b"", []
        if not data:
            asyncio.get_running_loop().remove_reader(descriptor)
        for frame in frames:
            self._hear(state, frame)

    def _hear(self, state: _State, frame: Frame) -> None:
        state.heard = self._clock.monotonic()
        if isinstance(frame, Hello):
            state.ready = True
            state.first_ready.set()
            self._on_change()
        elif isinstance(frame, Beat):
            state.busy_s = frame.busy_s
        elif isinstance(frame, Outcome):
            self._answer(frame)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            for state in list(self._children.values()):
                reason = self._hang(state)
                if reason:
                    _log.error("%s %s; killing it", state.spec.slot, reason)
                    self._kill(state)

    def _hang(self, state: _State) -> str:
        """Why a child must be ended; empty when it is well."""
        spec = state.spec
        if state.process is None or state.process.returncode is not None:
            return ""
        now = self._clock.monotonic()
        silent_s = now - state.heard
        # Also while it starts: it may have taken connections already.
        if silent_s > SILENCE_S and _is_stopped(state.process.pid):
            return f"is suspended and has not been heard for {silent_s:.0f} s"
        if not state.ready:
            late = now - state.started > spec.start_timeout_s
            return f"was not ready after {spec.start_timeout_s:.0f} s" if late else ""
        if spec.step_timeout_s is None:
            return ""
        if state.busy_s + silent_s > spec.step_timeout_s and state.busy_s:
            return f"has been in one batch for more than {spec.step_timeout_s:.0f} s"
        # A batch may hold the interpreter, and with it every thread, for as long as a batch may take.
        if silent_s > max(SILENCE_S, spec.step_timeout_s):
            return f"has not been heard for {silent_s:.0f} s"
        return ""


def _lost(slot: str) -> WorkerLost:
    return WorkerLost(f"{slot} has ended meanwhile", hint="the server's log says why; it is being started again")


def _how(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exit code {code}"
    known = {number.value: number.name for number in signal.Signals}
    return f"signal {known.get(-code, -code)}"


def _is_stopped(pid: int) -> bool:
    """Linux: whether a process is suspended (SIGSTOP)."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in {"T", "t"}
    return False
