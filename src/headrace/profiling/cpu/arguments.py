"""Whether a function gets the same arguments again: calls of the main thread, looked at in bursts.

About one call in a hundred is looked at: for a few milliseconds every call of a Python function, then for a hundred
times as long none. Between two bursts nothing is slowed down. Arguments are compared by value where that is a matter of
built-in types; objects by their identity and what they hold directly; anything else counts as new. So the share that is
found is a lower bound. Generators and coroutines are not looked at; nor, before Python 3.13, programs of several
threads.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any

from headrace.clock import perf_counter
from headrace.profiling.cpu.places import OURS

_LONGEST_S = 0.004
# The first pauses are shorter: a program of a second shall be known too.
_PAUSES_S = (0.05, 0.1, 0.2, 0.4)
_FIRST_S = 0.02
_LEAST_CALLS = 30
_MOST_KEPT = 20_000
_MOST_ITEMS = 32
_DEEPEST = 3
_PLAIN = {int, float, complex, bool, str, bytes, type(None), range, type(...)}
_NO_CALL = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_POINTER = 8
_OPTIMIZED = inspect.CO_OPTIMIZED | inspect.CO_NEWLOCALS


class _Unknown(Exception):
    """An argument that cannot be compared."""


class _Function:
    """What was seen of one function's calls."""

    def __init__(self, code: CodeType) -> None:
        self.code = code  # kept, or another one could get its number
        count = code.co_argcount + code.co_kwonlyargcount
        count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
        self.names = code.co_varnames[:count]
        self.calls = self.repeated = 0
        self.seen: set[int] = set()

    def take(self, values: dict[str, Any]) -> None:
        self.calls += 1
        try:
            key = hash(tuple([_key(values[name], _DEEPEST) for name in self.names]))
        except Exception:  # of a class that is not what it seems: the program must not hear of it
            return
        if key in self.seen:
            self.repeated += 1
        elif len(self.seen) < _MOST_KEPT:
            self.seen.add(key)


class Arguments:
    """Looks at calls, as long as `look` is called again and again from another thread.

    Args:
        schedule: has a function called soon on the main thread; it says whether it will.
    """

    def __init__(self, schedule: Callable[[Callable[[], None]], bool] | None = None) -> None:
        self._schedule = schedule or on_main_thread()
        self._functions: dict[int, _Function] = {}
        self._due = perf_counter() + _FIRST_S
        self._began, self._bursts = 0.0, 0
        self._state = "off"

    def look(self, now: float, threads: int = 1) -> float | None:
        """Begin a burst, or end it, if it is time; seconds after which to look again, if it matters. Any thread.

        Args:
            threads: of the program. With others beside it the main thread is left alone before Python 3.13: whoever
                looks at a function's variables there writes them back, with what another thread has changed meanwhile.
        """
        if self._state == "off" and now >= self._due and (threads == 1 or sys.version_info >= (3, 13)):
            self._state = "asked"  # before it is, for it may be called at once
            if not self._schedule(self._begin):
                self._state = "ended"
            return _LONGEST_S
        if self._state == "on" and now - self._began > _LONGEST_S:
            # Nothing is called, so that no event has ended it.
            self._schedule(self._end)
        return None

    def stop(self) -> None:
        """On the main thread."""
        self._end()
        self._state = "ended"

    def _begin(self) -> None:
        if self._state == "asked" and sys.gettrace() is None:
            self._began, self._state = perf_counter(), "on"
            sys.settrace(self._trace)
        else:
            self._end()

    def _end(self) -> None:
        if sys.gettrace() == self._trace:
            sys.settrace(None)
        if self._state != "ended":
            self._due = perf_counter() + _PAUSES_S[min(self._bursts, len(_PAUSES_S) - 1)]
            self._bursts += 1
            self._state = "off"

    def _trace(self, frame: FrameType, event: str, _arg: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_flags & _OPTIMIZED == _OPTIMIZED and not code.co_flags & _NO_CALL:
            function = self._functions.get(id(code))
            if function is None:
                function = self._functions[id(code)] = _Function(code)
            function.take(frame.f_locals)
        if self._state != "on" or perf_counter() - self._began > _LONGEST_S:
            self._end()

    def repeated(self) -> list[tuple[CodeType, float]]:
        """Functions, and the share of their calls whose arguments had been seen before."""
        found = [each for each in list(self._functions.values()) if each.calls >= _LEAST_CALLS]
        return [(each.code, each.repeated / each.calls) for each in found if each.code.co_filename not in OURS]


def on_main_thread() -> Callable[[Callable[[], None]], bool]:
    """A way to have the main thread call something between two of its instructions, from any other one.

    The interpreter has it for C (`Py_AddPendingCall`); a signal would do the same, but interrupt its system calls.
    """
    try:
        import ctypes
    except ImportError:
        return lambda _: False
    kind, api = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p), ctypes.pythonapi
    main = threading.main_thread()
    kept: dict[Callable[[], None], Any] = {}

    def schedule(function: Callable[[], None]) -> bool:
        def call(_: object) -> int:
            try:
                if threading.get_ident() == main.ident:
                    function()
            except BaseException as error:
                # Of a signal that came just now. It is the program's, but must not leave a function that C has called:
                # it is raised where the program calls its next function.
                sys.settrace(_raising(error))
            return 0

        if function not in kept:
            kept[function] = kind(call)
        return bool(api.Py_AddPendingCall(kept[function], None) == 0)

    return schedule


def _raising(error: BaseException) -> Callable[[FrameType, str, object], None]:
    def trace(_frame: FrameType, _event: str, _arg: object) -> None:
        raise error

    return trace


def _key(value: Any, deepest: int) -> object:
    """Equal for equal values, as far as that can be told without running anybody's code. Raises `_Unknown`."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind in (FunctionType, BuiltinFunctionType, ModuleType, type) and not getattr(value, "__closure__", None):
        return kind, id(getattr(value, "__code__", value))
    if deepest == 0:
        raise _Unknown
    if kind in (tuple, list, set, frozenset, dict):
        if len(value) > _MOST_ITEMS:
            raise _Unknown
        if kind is dict:
            return kind, tuple([(_key(name, deepest - 1), _key(each, deepest - 1)) for name, each in value.items()])
        if kind in (set, frozenset):
            return kind, frozenset([_key(each, deepest - 1) for each in value])
        return kind, tuple([_key(each, deepest - 1) for each in value])
    return _key_of_object(value, kind)


def _key_of_object(value: Any, kind: type) -> object:
    """An object is the same if it is the same one and holds the same: a new one may lie where an old one was."""
    slots = [each for base in kind.__mro__ for each in vars(base).values() if type(each) is MemberDescriptorType]
    if kind.__basicsize__ > object.__basicsize__ + _POINTER * (len(slots) + 2) or kind.__itemsize__:
        raise _Unknown  # what C keeps in it cannot be seen
    own = _held_by_name(value)
    if len(own) + len(slots) > _MOST_ITEMS:
        return kind, id(value)
    held = [_shallow(_held_in_slot(value, slot)) for slot in slots]
    return kind, id(value), *held, *[(name, _shallow(each)) for name, each in own.items()]


def _held_by_name(value: Any) -> dict[str, Any]:
    """What an object has in its dictionary; its class's own ways of looking something up are not asked."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if type(found) is dict else {}


def _held_in_slot(value: Any, slot: MemberDescriptorType) -> object:
    try:
        return slot.__get__(value)
    except AttributeError:
        return None


def _shallow(value: Any) -> object:
    return (type(value), value) if type(value) in _PLAIN else id(value)
