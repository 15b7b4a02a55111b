"""Who holds an object: the variable that keeps it alive, found by walking back along references.

The line that allocates is where memory comes from; the holder is what has to be mended. The walk goes backwards, a few
steps and a bounded number of objects, and stops at what has a name in the source: a module's global, a variable that
a closure has taken along, a default argument, an attribute, a local variable of something that still runs. A thread's
own storage (`threading.local`) cannot be found that way: no object refers to it.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from headrace.profiling.leaking.containers import attributes
from headrace.profiling.leaking.lines import is_users

_DEEPEST = 6
_MOST_OBJECTS = 60  # whose referrers are asked for; each asks the whole heap
_MOST_REFERRERS = 200
_SUSPENDED = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)


class Holder(msgspec.Struct, frozen=True):
    """A name in the source.

    Args:
        text: for example "closure variable `losses` of loss_graph.f".
        users: whether it lies in the user's own code, not in a library.
        whole: whether it can be told from others; an attribute of a library's object is named with what holds that.
    """

    text: str
    users: bool
    whole: bool = True


def name_of(target: Any, ours: Iterable[Any] = ()) -> Holder | None:
    """The nearest name that holds an object, one in the user's code before one in a library's.

    Args:
        ours: objects of the caller that refer to the target and do not count.
    """
    ignored = {id(each) for each in ours}
    level: list[tuple[Any, str]] = [(target, "")]
    seen, asked, best = {id(target)}, 0, None
    ignored |= {id(level), id(seen)}
    for _ in range(_DEEPEST):
        following: list[tuple[Any, str]] = []
        ignored.add(id(following))
        for child, inner in level:
            if asked >= _MOST_OBJECTS:
                break
            asked += 1
            for name, onward in _names(child, ignored):
                if name is not None:
                    text = f"{inner} in {name.text}" if inner else name.text
                    if name.users:
                        return Holder(text, True)
                    best = best or Holder(text, False)
                if onward is not None and id(onward) not in seen and len(seen) < _MOST_REFERRERS * _DEEPEST:
                    seen.add(id(onward))
                    # The object on the way is part of the name where it has one: "attribute `data` of WeakSet in …".
                    following.append((onward, text if name is not None and not inner else inner))
        level = following
    return best


def _names(child: Any, ignored: set[int]) -> Iterator[tuple[Holder | None, Any]]:
    """For each referrer of an object: its name if it has one, and the object to go on from if that is not enough."""
    ours = sys._getframe(1)
    referrers = gc.get_referrers(child)
    ignored.add(id(referrers))
    found: list[tuple[Holder | None, Any]] = []
    for referrer in referrers[:_MOST_REFERRERS]:
        if id(referrer) in ignored or referrer is ours or _is_frame_of_ours(referrer):
            continue
        name = _name(referrer, child)
        if name is None:
            found.append((None, referrer))
        elif name.users or name.whole:
            found.append((name, None))
        else:
            found.append((name, _owner(referrer)))
    # Names first, those of what outlives a function before its local variables; then what is only on the way.
    yield from (pair for pair in found if pair[0] is not None)
    yield from _local_names(child)
    yield from (pair for pair in found if pair[0] is None)


def _is_frame_of_ours(referrer: Any) -> bool:
    return type(referrer) is types.FrameType and referrer.f_code.co_filename.startswith(_HERE)


_HERE = str(Path(__file__).parents[1])


def _name(referrer: Any, child: Any) -> Holder | None:
    """What a referrer calls the child, ``None`` if it has no word for it."""
    kind = type(referrer)
    if kind is dict:
        return _key_name(referrer, child)
    if kind is types.CellType:
        return _closure_name(referrer)
    if kind is tuple:
        return _default_name(referrer, child)
    if kind is functools._lru_cache_wrapper:
        function = referrer.__wrapped__
        most = referrer.cache_info().maxsize
        return Holder(f"lru_cache of {_qualified(function)}(), maxsize={most}", _users_function(function))
    if kind is types.FrameType or kind in _SUSPENDED:
        frame = referrer if kind is types.FrameType else _frame_of(referrer)
        return None if frame is None else _local_name(frame, child)
    return _attribute_name(referrer, child)


def _key_name(space: dict[Any, Any], child: Any) -> Holder | None:
    """The name of a value, where the dictionary is that of a module, a class, a function or an instance."""
    key = next((key for key, value in list(space.items()) if value is child and isinstance(key, str)), None)
    if key is None:
        return None
    module = sys.modules.get(str(space.get("__name__")))
    if module is not None and vars(module) is space:
        return Holder(f"global `{key}` of {module.__name__}", _users_module(module.__name__))
    for owner in gc.get_referrers(space)[:_MOST_REFERRERS]:
        if isinstance(owner, type) and key in vars(owner) and vars(owner)[key] is child:
            return Holder(f"class attribute `{key}` of {owner.__qualname__}", _users_module(owner.__module__))
        if type(owner) is types.FunctionType:
            if owner.__kwdefaults__ is space:
                return Holder(f"default argument `{key}` of {_qualified(owner)}", _users_function(owner))
            if owner.__globals__ is space:  # code that was executed in a dictionary of its own
                return Holder(f"global `{key}` of {owner.__module__}", _users_function(owner))
            if owner.__dict__ is space:
                return Holder(f"attribute `{key}` of function {_qualified(owner)}", _users_function(owner))
        if attributes(owner) is space:
            return _of_instance(owner, key)
    return None


def _of_instance(owner: Any, key: str) -> Holder:
    kind = type(owner)
    users = _users_module(kind.__module__)
    return Holder(f"attribute `{key}` of {kind.__qualname__}", users, whole=False)


def _attribute_name(owner: Any, child: Any) -> Holder | None:
    """The attribute of an instance whose values lie in itself, or in slots."""
    if issubclass(type(owner), (list, dict, set, frozenset)) and attributes(owner) is None:
        return None
    for key, value in list((attributes(owner) or {}).items()):
        if value is child:
            return _of_instance(owner, key)
    for kind in type(owner).__mro__:
        for key, member in list(vars(kind).items()):
            if type(member) is types.MemberDescriptorType:
                try:
                    value = member.__get__(owner)
                except AttributeError:
                    continue
                if value is child:
                    return _of_instance(owner, key)
    return None


def _closure_name(cell: types.CellType) -> Holder | None:
    """The variable of a cell: the functions that share it know its name."""
    for cells in gc.get_referrers(cell)[:_MOST_REFERRERS]:
        if type(cells) is not tuple:
            continue
        for function in gc.get_referrers(cells)[:_MOST_REFERRERS]:
            if type(function) is types.FunctionType and function.__closure__ is cells:
                key = function.__code__.co_freevars[next(i for i, each in enumerate(cells) if each is cell)]
                return Holder(f"closure variable `{key}` of {_qualified(function)}", _users_function(function))
    return None


def _default_name(defaults: tuple[Any, ...], child: Any) -> Holder | None:
    for function in gc.get_referrers(defaults)[:_MOST_REFERRERS]:
        if type(function) is types.FunctionType and function.__defaults__ is defaults:
            code = function.__code__
            names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
            key = names[next(index for index, each in enumerate(defaults) if each is child)]
            return Holder(f"default argument `{key}` of {_qualified(function)}", _users_function(function))
    return None


def _local_names(child: Any) -> list[tuple[Holder | None, Any]]:
    """Local variables of functions that run now, in any thread: until somebody asks for it, such a frame is no object
    that could be found as a referrer."""
    found: list[tuple[Holder | None, Any]] = []
    for frame in sys._current_frames().values():
        up: types.FrameType | None = frame
        while up is not None:
            if not up.f_code.co_filename.startswith(_HERE):
                name = _local_name(up, child)
                if name is not None and name.users:
                    found.append((name, None))
            up = up.f_back
    return found


def _local_name(frame: types.FrameType, child: Any) -> Holder | None:
    if frame.f_code.co_name == "<module>":
        return None
    code = frame.f_code
    for key, value in list(frame.f_locals.items()):
        if value is child and key in code.co_varnames:
            return Holder(f"local variable `{key}` of {code.co_qualname}", is_users(code.co_filename))
    return None


def _frame_of(suspended: Any) -> types.FrameType | None:
    return next(
        (frame for name in ("gi_frame", "cr_frame", "ag_frame") if (frame := getattr(suspended, name, None))), None
    )


def _owner(referrer: Any) -> Any:
    """The instance behind an attribute dictionary."""
    if type(referrer) is dict:
        return next((each for each in gc.get_referrers(referrer) if attributes(each) is referrer), None)
    return referrer


def _qualified(function: Any) -> str:
    return str(getattr(function, "__qualname__", function)).replace(".<locals>", "")


def _users_function(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and is_users(code.co_filename)


def _users_module(name: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None)
    return is_users(file) if file else name == "__main__"


def threads_of(before: set[int]) -> str | None:
    """What the threads that were started since run, for example "threads of `poll` (service.py:12), 40 of them"."""
    new = [each for each in threading.enumerate() if each.ident not in before]
    names: dict[str, int] = {}
    for thread in new:
        function = getattr(thread, "_target", None) or type(thread).run
        code = getattr(function, "__code__", None)
        place = f" ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else ""
        name = f"`{_qualified(function)}`{place}"
        names[name] = names.get(name, 0) + 1
    if not names:
        return None
    most = max(names, key=lambda name: names[name])
    return f"threads of {most}, {names[most]} alive"
