"""Naming what holds an object, and which containers grow: on objects made here, without running anything."""

from __future__ import annotations

import functools
import operator
import queue
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from headrace.profiling.leaking.containers import Looks, length_of, limit_of, resolve
from headrace.profiling.leaking.holders import name_of, threads_of
from headrace.profiling.leaking.lines import is_users

in_the_module: list[object] = []
nested: dict[str, dict[str, list[object]]] = {"inner": {"list": []}}


def name(get: Callable[[], object]) -> str:
    """The name of what a function returns; no variable of the test's own holds it."""
    holder = next(map(name_of, map(operator.call, [get])))
    return "" if holder is None else holder.text


class Plain:
    shared: list[object] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.own: list[object] = []


class Slotted:
    __slots__ = ("own",)

    def __init__(self) -> None:
        self.own: list[object] = []


plain, slotted = Plain(), Slotted()


def positional(first: int = 1, seen: list[object] = []) -> None:  # noqa: B006
    pass


def keyword(*, seen: list[object] = []) -> None:  # noqa: B006
    pass


def with_attribute() -> None:
    pass


with_attribute.cache = []  # type: ignore[attr-defined]


def suspended() -> Iterator[int]:
    waiting: list[object] = [object()]
    yield id(waiting)


@pytest.mark.parametrize(
    ("get", "expected"),
    [
        (lambda: in_the_module, f"global `in_the_module` of {__name__}"),
        (lambda: plain.own, "attribute `own` of Plain"),
        (lambda: slotted.own, "attribute `own` of Slotted"),
        (lambda: Plain.shared, "class attribute `shared` of Plain"),
        (lambda: positional.__defaults__[1], "default argument `seen` of positional"),  # type: ignore[index]
        (lambda: keyword.__kwdefaults__["seen"], "default argument `seen` of keyword"),
        (lambda: with_attribute.cache, "attribute `cache` of function with_attribute"),  # type: ignore[attr-defined]
        (lambda: nested["inner"]["list"], f"global `nested` of {__name__}"),
    ],
)
def test_an_object_is_named_as_the_source_names_it(get: Any, expected: str) -> None:
    assert name(get) == expected


def make_closure() -> Any:
    taken_along: list[object] = []
    return lambda: taken_along


def test_a_variable_of_a_closure_is_named_with_its_function() -> None:
    closure = make_closure()
    assert name(closure) == "closure variable `taken_along` of make_closure.<lambda>"


def test_a_local_variable_of_what_still_runs_is_named() -> None:
    generator = suspended()
    next(generator)
    frame: Any = generator.gi_frame  # type: ignore[attr-defined]
    assert name(lambda: frame.f_locals["waiting"]) == "local variable `waiting` of suspended"


def test_an_attribute_of_a_librarys_object_is_named_with_who_holds_that() -> None:
    assert name(lambda: registry.data) == f"attribute `data` of WeakSet in global `registry` of {__name__}"


registry: Any = weakref.WeakSet()


def test_a_cache_of_functools_is_named_by_its_function_and_size() -> None:
    @functools.lru_cache(maxsize=50)
    def remembered(key: int) -> list[int]:
        return [key]

    for key in range(20):
        remembered(key)
    looks = Looks()
    looks.look(0)
    for key in range(20, 40):
        remembered(key)
    looks.look(20)
    ((growth, cache),) = [pair for pair in resolve(looks.grown()) if pair[0].rate == 1 and pair[0].length == 40]
    holder = name_of(cache)
    assert holder is not None
    assert holder.text.startswith("lru_cache of test_a_cache_of_functools")
    assert holder.text.endswith("remembered(), maxsize=50")
    limit = limit_of(cache)
    assert limit is not None
    assert (limit.most, limit.certain, growth.length) == (50, True, 40)


def test_nobody_holds_what_nobody_holds() -> None:
    assert name(object) == ""


def test_a_container_that_grows_is_seen_even_if_the_collector_does_not_track_it() -> None:
    counts: dict[str, int] = {str(number): number for number in range(10)}
    looks = Looks()
    looks.look(0)
    for step in range(1, 3):
        counts.update({f"{step} {number}": number for number in range(30)})
        looks.look(10 * step)
    (growth,) = [growth for growth, container in resolve(looks.grown()) if container is counts]
    assert (growth.length, growth.rates, growth.steady) == (70, (3, 3), True)


def test_a_container_that_stopped_is_not_growing() -> None:
    items = list(range(10))
    looks = Looks()
    looks.look(0)
    items += range(30)
    looks.look(10)
    looks.look(20)
    assert items not in [container for _, container in resolve(looks.grown())]


class Bounded:
    """A cache that says how large it becomes."""

    def __init__(self) -> None:
        self.maxsize = 100
        self.limit = 3  # of something else
        self.entries: OrderedDict[int, int] = OrderedDict()


def test_limits() -> None:
    bounded = Bounded()
    waiting: queue.Queue[int] = queue.Queue(maxsize=7)

    def limit(container: object) -> tuple[int, bool] | None:
        found = limit_of(container)
        return found and (found.most, found.certain)

    assert limit(deque([1], maxlen=9)) == (9, True)
    assert limit(bounded.entries) == (100, False)
    assert limit(waiting.queue) == (7, False)
    assert limit(deque([1])) is None
    assert limit(plain.own) is None


def test_a_length_is_not_asked_of_the_programs_own_code() -> None:
    class Odd(list[int]):
        def __len__(self) -> int:
            raise AssertionError("nobody should ask")

    assert length_of(Odd([1, 2, 3])) == 3


def test_threads_are_named_by_what_they_run() -> None:
    before = {thread.ident or 0 for thread in threading.enumerate()}
    over = threading.Event()

    def wait() -> None:
        over.wait()

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert (threads_of(before) or "").startswith("threads of `test_threads_are_named_by_what_they_run.wait` (")
        assert (threads_of(before) or "").endswith("), 3 alive")
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert threads_of(before) is None


def test_code_of_libraries_is_not_the_users() -> None:
    assert is_users(__file__)
    assert not is_users(threading.__file__)
    assert not is_users(pytest.__file__)
    assert not is_users("<frozen importlib._bootstrap>")
