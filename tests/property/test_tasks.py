"""Whatever clients, workers and dead workers do with tasks, in whatever order: legal states, one end, each step once.

Hypothesis plays all of them against the scripts of the store, on a real server, and keeps beside it what the contract
says must be there. A worker that was given up for dead keeps its claim, and may wake up and write at any time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import tempfile
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from headrace.errors import HeadraceError, InvalidInput, LeaseLost, Overloaded, TaskConflict
from headrace.tasks import embedded
from headrace.tasks.delivery import connection
from headrace.tasks.store import END_STATES, Change, Claim, Ended, Queued, Store, Submission

MOST_TASKS, MOST_CRASHES = 3, 3
FINAL = ("RUN_FINISHED", "RUN_ERROR")
LEGAL = {
    "pending": {"running", "failed", "cancelled"},
    "running": {"running", "pending", "input_required", "completed", "failed", "cancelled"},
    "input_required": {"pending", "failed", "cancelled"},
    "completed": set[str](),
    "failed": {"pending"},
    "cancelled": {"pending"},
}
CHOICE = st.integers(0, 11)
# What an owner may do with its task. It sleeps until long from now, or, by a clock that is ahead, until long ago.
DEEDS = ("step", "complete", "fail", "ask", "ask", "sleep", "doze", "release")
UNTIL = {"sleep": 10**13, "doze": 1}


@dataclass
class Owner:
    """A worker that has claimed a task, perhaps long ago."""

    claim: Claim
    last: Change | None = None
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def next_number(self) -> str:
        """It need not differ from those of another owner."""
        return str(next(self.numbers))


@dataclass
class Expected:
    """What the contract says of one task."""

    id: str
    turn: int
    late: bool
    state: str = "pending"
    fence: int = 0
    crashes: int = 0
    message: str = ""
    last: str = ""
    asleep: bool = False
    journal: dict[str, bytes] = field(default_factory=dict)
    events: list[str] = field(default_factory=lambda: ["queued"])
    owners: list[Owner] = field(default_factory=list)

    def enter(self, state: str) -> None:
        assert state in LEGAL[self.state], f"{self.state} -> {state}"
        self.state, self.asleep = state, False

    @property
    def ended(self) -> bool:
        return self.state in END_STATES

    @property
    def waits(self) -> bool:
        """For a worker; one that sleeps waits for its time."""
        return self.state == "pending" and not self.asleep


class Tasks(RuleBasedStateMachine):
    """Args: url: of a server that may be emptied."""

    def __init__(self, url: str, runner: asyncio.Runner) -> None:
        super().__init__()
        self._runner = runner
        self._tasks: list[Expected] = []
        self._keys: dict[tuple[str, str], tuple[str, Expected]] = {}
        self._ended = 0
        self._serial = itertools.count(1)
        self._wait(self._open(url))

    async def _open(self, url: str) -> None:
        self._connection = connection(url)
        await self._connection.__aenter__()
        async with self._connection.client() as client:
            await client.flushall()  # type: ignore[attr-defined]  # missing from docket's protocol
        self._store = Store(self._connection, result_ttl_s=60.0, max_tasks=MOST_TASKS)
        await self._store.open()

    def teardown(self) -> None:
        self._wait(self._connection.__aexit__(None, None, None))

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    def _pick(self, choice: int, *states: str) -> Expected:
        """One of the newest tasks, in one of some states if there are such."""
        fit = [task for task in self._tasks if not states or task.state in states] or self._tasks
        return fit[-1 - choice % min(3, len(fit))]

    def _any(self, *states: str) -> bool:
        return any(task.state in states for task in self._tasks)

    def _open_count(self) -> int:
        return sum(not task.ended for task in self._tasks)

    # What clients do.

    @initialize()
    def begin(self) -> None:
        """One task runs and one waits."""
        for _ in range(2):
            self.submit("", "d", "m", False)
        self.take_up(1)

    @rule(
        key=st.sampled_from(["", "k"]),
        digest=st.sampled_from("de"),
        owner=st.sampled_from("mn"),
        late=st.sampled_from([False] * 7 + [True]),
    )
    def submit(self, key: str, digest: str, owner: str, late: bool) -> None:
        wanted = Submission(
            "agent",
            b"1",
            owner=owner,
            timeout_s=0.0 if late else 3600.0,
            idempotency_key=key,
            digest=digest if key else "",
        )
        known = self._keys.get((owner, key)) if key else None
        if known is not None and known[0] != digest:
            with pytest.raises(InvalidInput):
                self._wait(self._store.submit(wanted))
        elif known is not None:
            task = known[1]
            queued, ident, state = self._wait(self._store.submit(wanted))
            assert (ident, state) == (task.id, task.state)
            assert queued == (Queued(task.id, task.turn, "default") if task.state == "pending" else None)
        elif self._open_count() >= MOST_TASKS:
            with pytest.raises(Overloaded):
                self._wait(self._store.submit(wanted))
        else:
            queued, ident, state = self._wait(self._store.submit(wanted))
            assert (queued, state) == (Queued(ident, 1, "default"), "pending")
            self._tasks.append(Expected(ident, 1, late))
            if key:
                self._keys[owner, key] = (digest, self._tasks[-1])

    @precondition(lambda self: self._open_count())
    @rule(choice=CHOICE)
    def cancel(self, choice: int) -> None:
        self._cancel(self._pick(choice, "pending", "running", "input_required"))

    @precondition(lambda self: self._any("failed", "cancelled"))
    @rule(choice=CHOICE, fresh=st.booleans())
    def retry(self, choice: int, fresh: bool) -> None:
        self._retry(self._pick(choice, "failed", "cancelled"), fresh)

    @precondition(lambda self: self._any("input_required"))
    @rule(choice=CHOICE)
    def answer(self, choice: int) -> None:
        task = self._pick(choice, "input_required")
        row = self._wait(self._store.get(task.id))
        place = json.loads(row.ask)["field"]
        queued = self._wait(self._store.answer(row, place, b"true"))
        task.enter("pending")
        task.turn += 1
        task.journal[place] = b"true"
        task.events.append("input_received")
        assert queued == Queued(task.id, task.turn, "default")

    @rule(choice=CHOICE, what=st.sampled_from(["cancel", "retry", "answer"]))
    def come_at_a_wrong_time(self, choice: int, what: str) -> None:
        """Clients do what the state of a task, if not by chance, does not allow; or answer another question."""
        task = self._pick(choice)
        if what == "cancel":
            self._cancel(task)
        elif what == "retry":
            self._retry(task, fresh=True)
        else:
            task = self._pick(choice, "input_required")
            row = self._wait(self._store.get(task.id))
            with pytest.raises(TaskConflict):
                self._wait(self._store.answer(row, "0:another question", b"true"))

    def _cancel(self, task: Expected) -> None:
        ended = self._wait(self._store.end(task.id, "cancelled", "cancelled", "it was cancelled"))
        if task.ended:
            assert ended == task.state, "an end is not changed"
        else:
            assert isinstance(ended, Ended)
            self._end(task, "cancelled", "RUN_ERROR")

    def _retry(self, task: Expected, fresh: bool) -> None:
        if task.state not in ("failed", "cancelled"):
            with pytest.raises(TaskConflict):
                self._wait(self._store.retry(task.id, fresh=fresh))
        elif self._open_count() >= MOST_TASKS:
            with pytest.raises(Overloaded):
                self._wait(self._store.retry(task.id, fresh=fresh))
        else:
            queued = self._wait(self._store.retry(task.id, fresh=fresh))
            task.enter("pending")
            task.turn, task.crashes, task.last = task.turn + 1, 0, ""
            task.events = [event for event in task.events if event not in FINAL] + ["retried"]
            if fresh:
                task.journal = {}
            assert queued == Queued(task.id, task.turn, "default")

    # What the queues and workers do.

    @precondition(lambda self: self._any("pending"))
    @rule(choice=CHOICE)
    def take_up(self, choice: int) -> None:
        """A message comes that nobody has had."""
        task = self._pick(choice, "pending")
        self._claim(task, task.turn, f"{next(self._serial)}-0")

    @precondition(lambda self: self._any("running"))
    @rule(choice=CHOICE)
    def take_over(self, choice: int) -> None:
        """A worker is silent for too long: its message goes to another one."""
        task = self._pick(choice, "running")
        self._claim(task, task.turn, task.message)

    @rule(choice=CHOICE, old=st.integers(0, 2), known=st.booleans())
    def deliver_in_vain(self, choice: int, old: int, known: bool) -> None:
        """A message of whatever turn, for whatever state; perhaps that of an owner who wrote its last word and has not
        acknowledged it."""
        task = self._pick(choice)
        if known and task.owners:
            self._claim(task, task.owners[-1].claim.turn, task.message)
        else:
            self._claim(task, max(1, task.turn - old), f"{next(self._serial)}-0")

    def _claim(self, task: Expected, turn: int, message: str) -> None:
        claim = self._wait(self._store.claim(task.id, turn, message, MOST_CRASHES))
        taken_over = task.state == "running" and message == task.message
        if turn != task.turn or not (task.state == "pending" or taken_over):
            assert claim is None
        elif task.late:
            assert isinstance(claim, Ended)
            assert claim.status == "timeout"
            self._end(task, "failed", "RUN_ERROR")
        elif task.crashes >= MOST_CRASHES:
            assert isinstance(claim, Ended)
            assert claim.status == "error"
            self._end(task, "failed", "RUN_ERROR")
        else:
            assert isinstance(claim, Claim)
            assert claim.journal == task.journal, "nothing that was journalled has to be done again"
            task.enter("running")
            task.fence, task.crashes, task.message, task.last = task.fence + 1, task.crashes + 1, message, ""
            assert claim.fence == task.fence
            task.owners.append(Owner(claim))
            task.events.append("RUN_STARTED")

    @precondition(lambda self: self._any("running"))
    @rule(choice=CHOICE)
    def make_a_step(self, choice: int) -> None:
        task = self._pick(choice, "running")
        self._write_anew(task, task.owners[-1], "step")

    @precondition(lambda self: self._any("running"))
    @rule(choice=CHOICE, what=st.sampled_from(DEEDS))
    def write(self, choice: int, what: str) -> None:
        """The owner of a task decides what becomes of it."""
        task = self._pick(choice, "running")
        self._write_anew(task, task.owners[-1], what)

    @precondition(lambda self: any(task.owners and task.state != "running" for task in self._tasks))
    @rule(choice=CHOICE, what=st.sampled_from(DEEDS))
    def write_too_late(self, choice: int, what: str) -> None:
        """The newest owner of a task that is not running any more has not heard of that."""
        left = [task for task in self._tasks if task.owners and task.state != "running"]
        task = left[-1 - choice % len(left)]
        self._write_anew(task, task.owners[-1], what)

    @precondition(lambda self: any(len(task.owners) > 1 for task in self._tasks))
    @rule(choice=CHOICE, who=CHOICE, what=st.sampled_from(DEEDS))
    def wake_up(self, choice: int, who: int, what: str) -> None:
        """A former owner, which was given up for dead, goes on as if nothing had happened."""
        claimed = [task for task in self._tasks if len(task.owners) > 1]
        task = claimed[choice % len(claimed)]
        self._write_anew(task, task.owners[who % (len(task.owners) - 1)], what)

    @precondition(lambda self: any(owner.last for task in self._tasks for owner in task.owners))
    @rule(choice=CHOICE)
    def write_once_more(self, choice: int) -> None:
        """An owner has not heard the reply to its last write, and repeats it."""
        written = [(task, owner) for task in self._tasks for owner in task.owners if owner.last]
        task, owner = written[-1 - choice % len(written)]
        assert owner.last
        self._write(task, owner, owner.last)

    def _write_anew(self, task: Expected, owner: Owner, what: str) -> None:
        place = f"{len(task.journal) + 1}:step {next(self._serial)}"
        change = Change(owner.next_number(), what="sleep" if what in UNTIL else what.removeprefix("step"))
        if what == "step":
            change.field, change.value, change.events = place, b"1", [_event(f"step {place}")]
        elif what == "ask":
            change.argument, change.events = json.dumps({"field": place}).encode(), [_event("input_required")]
        elif what in UNTIL:
            change.argument = str(UNTIL[what]).encode()
        elif what != "release":
            kind = "RUN_FINISHED" if what == "complete" else "RUN_ERROR"
            change.argument, change.events = b"1", [json.dumps({"type": kind}).encode()]
        owner.last = change
        self._write(task, owner, change)

    @rule()
    def tidy_up(self) -> None:
        """Someone looks for what was left lying, and ends what is late."""
        queued, late = self._wait(self._store.overdue(-1000))
        assert {each.reference for each in queued} == {f"{task.id}:{task.turn}" for task in self._tasks if task.waits}
        assert set(late) == {task.id for task in self._tasks if task.late and not task.ended}
        for task in [task for task in self._tasks if not task.ended]:
            ended = self._wait(self._store.end(task.id, "failed", "deadline_exceeded", "late", late_only=True))
            if task.late:
                assert isinstance(ended, Ended)
                self._end(task, "failed", "RUN_ERROR")
            else:
                assert ended == task.state

    def _write(self, task: Expected, owner: Owner, change: Change) -> None:
        done: Queued | HeadraceError | None
        try:
            done = self._wait(self._store.write(owner.claim, change))
        except (LeaseLost, TaskConflict) as refused:
            done = refused
        if owner.claim.fence != task.fence:
            assert isinstance(done, LeaseLost)
        elif change.number == task.last:
            assert not isinstance(done, HeadraceError), "it was done before, and only that"
        elif task.state != "running":
            assert isinstance(done, TaskConflict)
        else:
            assert not isinstance(done, HeadraceError)
            self._apply(task, change, done)

    def _apply(self, task: Expected, change: Change, queued: Queued | None) -> None:
        task.last = change.number
        if change.what in ("complete", "fail"):
            kind = "RUN_FINISHED" if change.what == "complete" else "RUN_ERROR"
            self._end(task, "completed" if change.what == "complete" else "failed", kind)
            return
        if change.field:
            task.journal[change.field] = change.value
        task.events += [json.loads(event)["name"] for event in change.events]
        if change.what:
            task.enter("input_required" if change.what == "ask" else "pending")
            task.turn, task.crashes = task.turn + 1, task.crashes - 1
            until = int(change.argument) if change.what == "sleep" else None
            task.asleep = until == UNTIL["sleep"]
            assert queued == (None if change.what == "ask" else Queued(task.id, task.turn, "default", until))

    def _end(self, task: Expected, state: str, event: str) -> None:
        task.enter(state)
        task.events.append(event)
        self._ended += 1

    # What must hold after each.

    @invariant()
    def the_store_holds_what_the_contract_says(self) -> None:
        self._wait(self._check())

    async def _check(self) -> None:
        assert await self._store.totals() == (self._open_count(), self._ended)
        rows = {row.id: row for row in (await self._store.tasks(None, 100))[0]}
        assert rows.keys() == {task.id for task in self._tasks}
        for task in self._tasks:
            row = rows[task.id]
            assert (row.state, row.attempt, row.turn) == (task.state, task.fence, task.turn)
            assert (row.result is not None) == (task.state == "completed")
            assert (row.error is not None) == (task.state in ("failed", "cancelled"))
            assert (row.ask is not None) == (task.state == "input_required")
            assert row.steps == len(task.journal)
            events = await self._store.events(task.id)
            names = [_name(event.payload) for event in events]
            assert names == task.events, "each event once, in order, and a step's if and only if it is journalled"
            assert [names.index(name) for name in names if name in FINAL] == ([len(names) - 1] if task.ended else [])
            numbers = [event.number for event in events]
            assert numbers == sorted(set(numbers))
        depth, _ = (await self._store.depths())["default"]
        assert depth == sum(task.waits for task in self._tasks)


def _event(name: str) -> bytes:
    return json.dumps({"type": "CUSTOM", "name": name}).encode()


def _name(payload: bytes) -> str:
    event = json.loads(payload)
    return str(event["name"] if event["type"] == "CUSTOM" else event["type"])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="hr-store-"))
    try:
        yield embedded.ensure(folder).url
    finally:
        embedded.stop(folder)
        shutil.rmtree(folder, ignore_errors=True)


def test_tasks_take_legal_ways_only_and_end_once(url: str) -> None:
    few = settings(max_examples=30, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    with asyncio.Runner() as runner:
        # Whatever makes one when it is called will do.
        run_state_machine_as_test(lambda: Tasks(url, runner), settings=few)  # type: ignore[arg-type]
