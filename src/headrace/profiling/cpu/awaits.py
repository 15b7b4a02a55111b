"""What tasks wait for: from a task's coroutine along its awaits to a future, and on through the task that is awaited.

Time counts in task-seconds: ten tasks that sleep for a second are ten. Of many tasks a few are drawn each time, and
each stands for its share. Knows tasks of asyncio, whatever loop runs them; those of other libraries are not seen.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

from headrace.profiling.cpu import waits
from headrace.profiling.cpu.places import NOWHERE, Places
from headrace.profiling.cpu.tally import Tally

_MOST_TASKS = 32
_LONGEST = 100
_MISSING = object()
_READY = "(waits for its turn on the event loop)"
# Functions that wait for a future of their own until one of several tasks has ended: the name by which these are known
# to them.
_BRANCHES = [
    ("/asyncio/tasks.py", "wait_for", "fut"),
    ("/asyncio/tasks.py", "_wait", "fs"),
    ("/asyncio/taskgroups.py", "TaskGroup.__aexit__", "self"),
    ("/asyncio/taskgroups.py", "TaskGroup._aexit", "self"),
    ("/anyio/_backends/_asyncio.py", "TaskGroup.__aexit__", "self"),
]


class Awaits:
    """All tasks of running loops.

    Args:
        tally: gets the chains.
        most: tasks that are followed at one look.
    """

    def __init__(self, places: Places, tally: Tally, most: int = _MOST_TASKS) -> None:
        self._places = places
        self._tally = tally
        self._most = most
        self._draw = random.Random()  # the program's own numbers stay as they are
        self._branches: dict[int, str] = {}
        self._ready = places.place_of_builtin(_READY)

    def look(self, gap: float) -> set[Any]:
        """Count ``gap`` seconds for each task that waits; the running loops that tasks were seen of."""
        loops: set[Any] = set()
        running: dict[Any, bool] = {}
        tasks = _all_tasks()
        weight = gap
        if len(tasks) > self._most:
            weight = gap * len(tasks) / self._most
            tasks = self._draw.sample(tasks, self._most)
        for reference in tasks:
            task = reference()
            if task is None or task.done():
                continue
            loop = task.get_loop()
            if loop not in running:
                running[loop] = loop.is_running()
            if running[loop]:
                loops.add(loop)
                with suppress(Exception):  # something of a make that is not known: the others are counted
                    self._count(task, weight)
        return loops

    def _count(self, task: Any, weight: float) -> None:
        found = self._chain(task)
        if found is not None:
            places, waits_for = found
            self._tally.add(task.get_name(), waits_for, tuple(places), weight)

    def _chain(self, task: Any) -> tuple[list[int], str] | None:
        """The way from a task to what it waits for; `None` if it runs."""
        places: list[int] = []
        seen = set()
        while True:
            seen.add(id(task))
            coroutine = task.get_coro()
            if getattr(coroutine, "cr_running", False):
                # Whoever waits for a task that runs, waits for it still.
                return (places, "task") if places else None
            start = len(places)
            last = self._walk(coroutine, places)
            if not places:
                return None
            future: Any = getattr(task, "_fut_waiter", _MISSING)
            if future is _MISSING:  # a task of another make
                return places, "future"
            if future is None or future.done():
                places.append(self._ready)
                return places, "task"
            following = self._next(last, future)
            if following is None or id(following) in seen or len(places) > _LONGEST:
                return places, self._end(places[start:], future)
            task = following

    def _walk(self, awaited: Any, places: list[int]) -> FrameType | None:
        """Add the places of a coroutine and of what it awaits; the last frame."""
        last = None
        for _ in range(_LONGEST):
            if awaited is None:
                break
            frame, following = _step(awaited)
            if frame is not None:
                last = frame
                place = self._places.of_frame(frame)
                if place != NOWHERE:
                    places.append(place)
            awaited = following
        return last

    def _next(self, last: FrameType | None, future: Any) -> Any:
        """The task that a future stands for, or one of several."""
        if _is_task(future):
            return future
        children = getattr(future, "_children", None)
        if children is None and last is not None:
            children = self._awaited_by(last)
        if children is None:
            children = _shielded(future)
        pending = [child for child in children or () if _is_task(child) and not child.done()]
        return self._draw.choice(pending) if pending else None

    def _awaited_by(self, frame: FrameType) -> Iterable[Any] | None:
        number = self._places.of_frame(frame)
        place = self._places.places[number]
        if number == NOWHERE or not place.library:
            return None
        name = self._branches.get(place.frame)
        if name is None:
            function = self._places.frames[place.frame]
            known = [n for end, f, n in _BRANCHES if function.function == f and function.file.endswith(end)]
            name = self._branches[place.frame] = known[0] if known else ""
        if not name:
            return None
        found = frame.f_locals.get(name)
        if name == "self":
            found = getattr(found, "_tasks", None)
        return list(found) if isinstance(found, (set, list, tuple)) else [found]

    def _end(self, places: list[int], future: Any) -> str:
        place = self._places.places
        told = waits.reason("", ((place[n].tells, place[n].library) for n in reversed(places)))
        if told:
            return told
        chained = any("_chain_future" in getattr(each, "__qualname__", "") for each in _callbacks(future))
        return "thread" if chained else "future"


def _all_tasks() -> list[Any]:
    """References to all tasks of this process, done or not, without a call of Python code for each."""
    tasks = sys.modules.get("asyncio.tasks")
    found: list[Any] = []
    for name in ("_all_tasks", "_scheduled_tasks", "_eager_tasks"):
        kept = getattr(tasks, name, None)
        try:
            if isinstance(kept, set):
                found += [lambda task=task: task for task in list(kept)]
            elif kept is not None:
                found += list(kept.data)
        except RuntimeError:  # one was added meanwhile
            continue
    return found


def _step(awaited: Any) -> tuple[FrameType | None, Any]:
    """Frame of what is awaited, if it has one, and what it awaits in turn."""
    # Types are asked, not objects, which may have ways of their own to look something up.
    for kind in ("cr", "gi", "ag"):
        if hasattr(type(awaited), f"{kind}_frame"):
            return getattr(awaited, f"{kind}_frame"), getattr(
                awaited, "gi_yieldfrom" if kind == "gi" else f"{kind}_await", None
            )
    if hasattr(type(awaited), "_asyncio_future_blocking"):
        return None, None
    # What C puts in between (a step of an async generator, the awaitable of a coroutine) shows what it holds only so.
    for each in gc.get_referents(awaited):
        if any(hasattr(type(each), f"{kind}_frame") for kind in ("cr", "gi", "ag")):
            return None, each
    return None, None


def _is_task(future: Any) -> bool:
    return hasattr(type(future), "get_coro")


def _callbacks(future: Any) -> list[Any]:
    return [getattr(each[0], "func", each[0]) for each in getattr(future, "_callbacks", None) or ()]


def _shielded(future: Any) -> list[Any] | None:
    for each in _callbacks(future):
        if getattr(each, "__qualname__", "").startswith("shield."):
            return [cell.cell_contents for cell in each.__closure__ or ()]
    return None
