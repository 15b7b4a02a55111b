"""The tasks of a store: rows, journals, events. Every change is one script, so it happens whole or not at all.

Knows nothing of HTTP, of agents or of who runs what; `lua/common.lua` has the dictionary of its keys.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.resources
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from redis.exceptions import NoScriptError, ResponseError

from headrace.errors import InvalidInput, LeaseLost, Overloaded, TaskConflict, TaskNotFound
from headrace.metrics import LANES
from headrace.tasks.delivery import RedisConnection

END_STATES = ("completed", "failed", "cancelled")
STATES = ("pending", "running", "input_required", *END_STATES)
CONTROL = "{hr}:control"
_AGENTS = "{hr}:agents"
_SCRIPTS = ("submit", "claim", "write", "end", "retry", "answer")
_PAGE = 500
_MOST_AT_ONCE = 64
# Of the server that has the rows: those of a Cluster have a clock each.
_TIME = "return redis.call('TIME')"

to_json = msgspec.json.encode
from_json = msgspec.json.decode


class AgentSpec(msgspec.Struct, frozen=True):
    """What gateways know of an agent. Its code lives in task workers only.

    Args:
        schema: JSON Schema of its input, as JSON.
        optional: whether it can do without an input.
        message_parameter: where ``message`` goes: a key of the input, ``""`` for the whole input, ``None`` for nowhere.
    """

    name: str
    schema: msgspec.Raw
    optional: bool = False
    message_parameter: str | None = None
    description: str = ""
    timeout_s: float | None = None
    priority: str = "default"


@dataclass(frozen=True, slots=True)
class Submission:
    """What is asked for.

    Args:
        input: JSON.
        owner: digest of the key that asks, empty without keys.
        digest: of the whole request; the same `Idempotency-Key` with another one is refused.
    """

    agent: str
    input: bytes
    lane: str = "default"
    model: str = ""
    owner: str = ""
    timeout_s: float = 86_400.0
    idempotency_key: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Queued:
    """A task that is to be handed to the queue of its lane."""

    id: str
    turn: int
    lane: str
    at_ms: int | None = None

    @property
    def reference(self) -> str:
        return f"{self.id}:{self.turn}"


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a task: its id in the stream, its number, its AG-UI payload as JSON."""

    id: str
    number: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Task:
    """A task's row. Times are ms since 1970."""

    id: str
    agent: str
    state: str
    lane: str
    model: str
    owner: str
    input: bytes
    attempt: int
    turn: int
    steps: int
    created_at: int
    updated_at: int
    deadline: int
    ttl_ms: int
    result: bytes | None = None
    error: bytes | None = None
    ask: bytes | None = None

    @property
    def ended(self) -> bool:
        return self.state in END_STATES


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's right to a task, until another one claims it."""

    id: str
    fence: int
    turn: int
    agent: str
    lane: str
    model: str
    input: bytes
    created_ms: int
    claimed_ms: int
    deadline_ms: int
    journal: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Ended:
    """A task that came to its end by what was just done: to be counted, once."""

    id: str
    agent: str
    lane: str
    created_ms: int
    status: str


@dataclass(slots=True)
class Change:
    """One write of a task's owner: what is journalled, said and decided, together.

    Args:
        number: of the write within its attempt; one that is repeated has no effect.
        field: of the journal.
        what: empty, complete, fail, ask, sleep or release; ``argument`` goes with it.
        events: JSON of AG-UI events; the last one is the final event of a task that ends.
    """

    number: str
    field: str = ""
    value: bytes = b""
    what: str = ""
    argument: bytes = b""
    events: Sequence[bytes] = ()


class Store:
    """Reads and writes tasks.

    Args:
        connection: open, and closed by whoever opened it.
        result_ttl_s: how long what has ended is kept.
        max_tasks: most tasks that are not at their end.

    Every method raises `RedisError` when the store does not answer.
    """

    def __init__(self, connection: RedisConnection, *, result_ttl_s: float, max_tasks: int) -> None:
        self._connection = connection
        self._ttl_ms = int(result_ttl_s * 1000)
        self._max_tasks = max_tasks
        common = _read("common")
        self._scripts = {name: common + _read(name) for name in _SCRIPTS}
        self._hashes = {
            name: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in self._scripts.items()
        }
        self._client: Any = None

    async def open(self) -> None:
        """Take the connection's client, which it shares."""
        async with self._connection.client() as client:
            self._client = _Turns(client)

    async def ping(self) -> None:
        """Raises `RedisError`."""
        await self._client.get("{hr}:done")

    async def is_in_cluster(self) -> bool:
        """Whether the server is a node of a Cluster, as far as it says."""
        try:
            return bool((await self._client.info("cluster")).get("cluster_enabled"))
        except ResponseError:  # not everybody may ask
            return False

    async def submit(self, wanted: Submission) -> tuple[Queued | None, str, str]:
        """Accept a task.

        Returns:
            What to hand to the queue (``None`` when there is nothing to), the task's id, its state.

        Raises:
            Overloaded: so many tasks are not finished.
            InvalidInput: the key of idempotency belongs to another request.
        """
        ident = uuid.uuid4().hex
        keyed = f"{{hr}}:idem:{wanted.owner}:{wanted.idempotency_key}" if wanted.idempotency_key else ""
        reply = await self._run(
            "submit",
            ident,
            *(
                ident,
                wanted.agent,
                wanted.lane,
                wanted.model,
                wanted.input,
                wanted.owner,
                int(wanted.timeout_s * 1000),
                self._max_tasks,
                "1" if keyed else "",
                wanted.digest,
                to_json({"type": "CUSTOM", "name": "queued", "value": {"task_id": ident, "agent": wanted.agent}}),
            ),
            key=keyed or None,
        )
        if reply[0] == b"new":
            return Queued(ident, int(reply[1]), wanted.lane), ident, "pending"
        if reply[0] == b"known":
            known, state, turn, lane = (_text(each) for each in reply[1:])
            return (Queued(known, int(turn), lane) if state == "pending" else None), known, state
        if reply[0] == b"conflict":
            raise InvalidInput("belongs to a task with another body", field="Idempotency-Key", hint="use a new key")
        raise self._full(int(reply[1]))

    async def sent(self, *queued: Queued) -> None:
        """Note that tasks are in their queues."""
        await self._client.zrem("{hr}:unsent", *(each.id for each in queued))

    async def claim(self, ident: str, turn: int, message: str, most_crashes: int) -> Claim | Ended | None:
        """Take a task up; ``None`` when there is nothing to do for this delivery."""
        poison = _problem("attempts_exhausted", f"its worker died {most_crashes} times while it ran")
        late = _problem("deadline_exceeded", "its deadline passed before it was done")
        reply = await self._run("claim", ident, ident, turn, most_crashes, self._ttl_ms, *poison, *late, message)
        if reply[0] == b"stop":
            return None
        if reply[0] == b"ended":
            return Ended(ident, _text(reply[2]), _text(reply[4]), int(reply[3]), _text(reply[1]))
        row = _pairs(reply[1])
        return Claim(
            id=ident,
            fence=int(row["fence"]),
            turn=turn,
            agent=row["agent"].decode(),
            lane=row["lane"].decode(),
            model=row["model"].decode(),
            input=row["input"],
            created_ms=int(row["created"]),
            claimed_ms=int(row["updated"]),
            deadline_ms=int(row["deadline"]),
            journal=_pairs(reply[2]),
        )

    async def write(self, claim: Claim, change: Change) -> Queued | None:
        """The owner's change.

        Returns:
            For a task that is to go on later, what to hand to the queue then.

        Raises:
            LeaseLost: another worker has the task.
            TaskConflict: it is not running any more, most likely because somebody has ended it.
        """
        reply = await self._run(
            "write",
            claim.id,
            *(claim.id, claim.fence, change.number, change.field, change.value, change.what, change.argument),
            self._ttl_ms,
            *change.events,
        )
        if reply[0] == 0:
            if reply[1] == b"fence":
                raise LeaseLost("another worker has this task now")
            raise TaskConflict(f"the task is {_text(reply[1])}")
        if change.what in ("sleep", "release"):
            return Queued(claim.id, int(reply[1]), claim.lane, int(change.argument) if change.argument else None)
        return None

    async def state_of(self, ident: str) -> tuple[int, str]:
        """Fence and state: what the lease watch looks at."""
        fence, state = await self._client.hmget(_task_key(ident), "fence", "state")
        return int(fence or 0), _text(state or b"")

    async def end(self, ident: str, state: str, code: str, message: str, *, late_only: bool = False) -> Ended | str:
        """End a task from outside its worker.

        Returns:
            The end, to be counted; or the state that it has, which does not change any more.

        Raises:
            TaskNotFound
        """
        reply = await self._run(
            "end", ident, ident, state, *_problem(code, message), self._ttl_ms, "late" if late_only else "", CONTROL
        )
        if reply[0] == b"done":
            status = "cancelled" if state == "cancelled" else "timeout"
            return Ended(ident, _text(reply[1]), _text(reply[3]), int(reply[2]), status)
        if reply[0] == b"missing":
            raise _unknown(ident)
        return _text(reply[1])

    async def retry(self, ident: str, *, fresh: bool) -> Queued:
        """Queue a failed or cancelled task once more.

        Raises:
            TaskNotFound, TaskConflict, Overloaded
        """
        event = to_json({"type": "CUSTOM", "name": "retried", "value": {"fresh": fresh}})
        reply = await self._run("retry", ident, ident, "1" if fresh else "", self._max_tasks, event)
        if reply[0] == b"queued":
            return Queued(ident, int(reply[1]), _text(reply[2]))
        if reply[0] == b"missing":
            raise _unknown(ident)
        if reply[0] == b"full":
            raise self._full(int(reply[1]))
        raise TaskConflict(f"the task is {_text(reply[1])}", hint="only a failed or cancelled task can be retried")

    async def answer(self, task: Task, field: str, value: bytes) -> Queued:
        """Answer what a task asked for.

        Raises:
            TaskNotFound, TaskConflict
        """
        event = to_json({"type": "CUSTOM", "name": "input_received", "value": {}})
        reply = await self._run("answer", task.id, task.id, field, value, event)
        if reply[0] == b"queued":
            return Queued(task.id, int(reply[1]), _text(reply[2]))
        if reply[0] == b"missing":
            raise _unknown(task.id)
        raise TaskConflict(f"the task is {_text(reply[1])}", hint="it waits for no input")

    async def get(self, ident: str) -> Task:
        """Raises `TaskNotFound`."""
        row, steps, ttl = await self._read_rows([ident]).__anext__()
        if not row:
            raise _unknown(ident)
        return self._task(ident, row, steps, ttl)

    async def tasks(self, after: tuple[int, str] | None, limit: int) -> tuple[list[Task], tuple[int, str] | None]:
        """Tasks from the newest on.

        Args:
            after: time of creation and id of the last one that is known: those behind it are wanted.

        Returns:
            Up to ``limit`` of them, and what to go on from, ``None`` at the end.
        """
        highest, ties = "+inf", 0
        if after is not None:
            # Many may be of one millisecond, in the order of their ids then.
            highest = str(after[0])
            ties = await self._client.zcount("{hr}:all", highest, highest)
        rows_found = await self._client.zrevrangebyscore("{hr}:all", highest, "-inf", 0, limit + ties, withscores=True)
        found = [(ident, int(at)) for ident, at in rows_found if after is None or (int(at), _text(ident)) < after]
        found = found[:limit]
        tasks, gone = [], []
        rows = self._read_rows([_text(ident) for ident, _ in found])
        for ident, _ in found:
            row, steps, ttl = await rows.__anext__()
            if row:
                tasks.append(self._task(_text(ident), row, steps, ttl))
            else:
                gone.append(ident)
        if gone:
            await self._client.zrem("{hr}:all", *gone)
        return tasks, (found[-1][1], _text(found[-1][0])) if len(found) == limit else None

    async def events(self, ident: str, after: str = "0-0", count: int = _PAGE) -> list[Event]:
        """Events past a stream id, oldest first, at most ``count``."""
        found = await self._client.xrange(_events_key(ident), f"({after}", "+", count=count)
        return [Event(_text(key), int(fields[b"n"]), fields[b"e"]) for key, fields in found]

    async def publish_agents(self, specs: Sequence[AgentSpec]) -> None:
        """Tell every gateway what there is to run."""
        if specs:
            await self._client.hset(_AGENTS, mapping={spec.name: to_json(spec) for spec in specs})

    async def agents(self) -> dict[str, AgentSpec]:
        """What there is to run."""
        found = await self._client.hgetall(_AGENTS)
        return {_text(name): from_json(spec, type=AgentSpec) for name, spec in found.items()}

    async def overdue(self, grace_ms: int) -> tuple[list[Queued], list[str]]:
        """What has been left lying for longer than the grace: tasks that are in no queue, tasks past their deadline."""
        now = await self.now_ms()
        unsent = await self._client.zrangebyscore("{hr}:unsent", "-inf", now - grace_ms, 0, _PAGE)
        late = await self._client.zrangebyscore("{hr}:open", "-inf", now - grace_ms, 0, _PAGE)
        queued = []
        for ident in map(_text, unsent):
            state, turn, lane = await self._client.hmget(_task_key(ident), "state", "turn", "lane")
            if state == b"pending":
                queued.append(Queued(ident, int(turn), _text(lane)))
            else:
                await self._client.zrem("{hr}:unsent", ident)
        return queued, [_text(ident) for ident in late]

    async def take_sweep(self, holder: str, for_s: float) -> bool:
        """Whether this process is the one that tidies up just now."""
        return bool(await self._client.set("{hr}:sweep", holder, nx=True, px=int(for_s * 1000)))

    async def depths(self) -> dict[str, tuple[int, float]]:
        """Per lane: tasks that wait, and seconds that the oldest has waited."""
        now = await self.now_ms()
        found = {}
        for lane in LANES:
            key = f"{{hr}}:queue:{lane}"
            oldest = await self._client.zrange(key, 0, 0, withscores=True)
            count = await self._client.zcard(key) if oldest else 0
            found[lane] = (count, max(0.0, (now - oldest[0][1]) / 1000) if oldest else 0.0)
        return found

    async def totals(self) -> tuple[int, int]:
        """Tasks that are not at their end, and how many have ever ended."""
        return await self._client.zcard("{hr}:open"), int(await self._client.get("{hr}:done") or 0)

    async def now_ms(self) -> int:
        """The store's clock: all times in it are by this one."""
        seconds, microseconds = await self._client.eval(_TIME, 1, "{hr}:done")
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def _run(self, name: str, ident: str, *arguments: Any, key: str | None = None) -> list[Any]:
        keys = [
            _task_key(ident),
            f"{{hr}}:journal:{ident}",
            _events_key(ident),
            "{hr}:open",
            "{hr}:all",
            "{hr}:unsent",
            *(f"{{hr}}:queue:{lane}" for lane in LANES),
            "{hr}:done",
            *([key] if key else []),
        ]
        try:
            reply = await self._client.evalsha(self._hashes[name], len(keys), *keys, *arguments)
        except NoScriptError:  # a new server, or one that was flushed
            reply = await self._client.eval(self._scripts[name], len(keys), *keys, *arguments)
        return list(reply)

    async def _read_rows(self, idents: Sequence[str]) -> Any:
        """Row, number of steps and time to live of each."""
        pipeline = self._client.pipeline(transaction=False)
        for ident in idents:
            pipeline.hgetall(_task_key(ident))
            pipeline.hlen(f"{{hr}}:journal:{ident}")
            pipeline.pttl(_task_key(ident))
        async with self._client.turn:
            replies = await pipeline.execute() if idents else []
        for at in range(0, len(replies), 3):
            yield {_text(name): value for name, value in replies[at].items()}, replies[at + 1], replies[at + 2]

    def _task(self, ident: str, row: dict[str, bytes], steps: int, ttl_ms: int) -> Task:
        return Task(
            id=ident,
            agent=row["agent"].decode(),
            state=row["state"].decode(),
            lane=row["lane"].decode(),
            model=row["model"].decode(),
            owner=row["owner"].decode(),
            input=row["input"],
            attempt=int(row["fence"]),
            turn=int(row["turn"]),
            steps=steps,
            created_at=int(row["created"]),
            updated_at=int(row["updated"]),
            deadline=int(row["deadline"]),
            ttl_ms=ttl_ms if ttl_ms > 0 else self._ttl_ms,
            result=row.get("result"),
            error=row.get("error"),
            ask=row.get("ask"),
        )

    def _full(self, open_: int) -> Overloaded:
        return Overloaded(f"{open_} tasks are not finished and {self._max_tasks} may be")


class _Turns:
    """A client with so many commands on their way at most; others wait. Each takes a connection, of which redis-py has
    100 and refuses what is beyond them."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.turn = asyncio.Semaphore(_MOST_AT_ONCE)
        self.pipeline = client.pipeline

    def __getattr__(self, command: str) -> Any:
        send = getattr(self._client, command)

        async def in_turn(*arguments: Any, **options: Any) -> Any:
            async with self.turn:
                return await send(*arguments, **options)

        return in_turn


def _problem(code: str, message: str) -> tuple[bytes, bytes]:
    """An error as a task keeps it, and the final event that says so."""
    return error_json(code, message), error_event(code, message)


def error_json(code: str, message: str, **more: str) -> bytes:
    """What a task failed with; ``more`` is the field and the hint of an error that has them."""
    return to_json({"code": code, "message": message, **more})


def error_event(code: str, message: str) -> bytes:
    return to_json({"type": "RUN_ERROR", "message": message, "code": code})


def _unknown(ident: str) -> TaskNotFound:
    return TaskNotFound(f"there is no task {ident!r}", field="id", hint="finished tasks are kept for result_ttl_s")


def _task_key(ident: str) -> str:
    return f"{{hr}}:task:{ident}"


def _events_key(ident: str) -> str:
    return f"{{hr}}:events:{ident}"


def events_channel(ident: str) -> str:
    """Where each event of a task is announced as ``id number JSON``."""
    return _events_key(ident)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _pairs(flat: Any) -> dict[str, bytes]:
    """A hash as scripts give it: names and values in turn (or a mapping, under RESP 3)."""
    if isinstance(flat, dict):
        return {_text(name): value for name, value in flat.items()}
    return {_text(flat[at]): flat[at + 1] for at in range(0, len(flat), 2)}


def _read(name: str) -> str:
    return importlib.resources.files("headrace.tasks").joinpath("lua", f"{name}.lua").read_text()
