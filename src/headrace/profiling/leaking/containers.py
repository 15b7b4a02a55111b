"""Which containers grow: their lengths at a few moments, compared.

A list that gets one entry a call is seen here when its bytes still drown in noise, or hide in room that it had taken
before. A container with a limit of its own that is not full yet looks like a leak to every statistic; here it is known.
"""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections import deque
from typing import Any

import msgspec

_LEAST = 5  # shorter ones are not looked at
_CHUNK = 20_000
_LENGTHS: dict[type, Any] = {
    list: list.__len__,
    dict: dict.__len__,
    set: set.__len__,
    deque: deque.__len__,
    bytearray: bytearray.__len__,
}
_KINDS = tuple(_LENGTHS)
# Containers that the collector does not track itself, as long as nothing in them could be part of a cycle.
_UNTRACKED = frozenset((dict, bytearray))
# Two thirds of a heap with torch in it, and all that they refer to is tracked, or does not grow.
_WITHOUT = (
    type,
    property,
    classmethod,
    staticmethod,
    weakref.ref,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
# Attributes that say how large the container beside them may become. (Not `limit`: that may be anything's.)
_LIMITS = ("maxsize", "maxlen", "max_size", "max_len", "max_length", "capacity", "max_entries", "max_items")


def length_of(container: Any) -> int:
    """Entries of a container. A subclass is not asked: that would run the program's code."""
    kind = next(each for each in _KINDS if issubclass(type(container), each))
    return int(_LENGTHS[kind](container))


def instances(objects: list[Any], of: tuple[type, ...], *, others: bool = False) -> list[Any]:
    """Those that are, or with ``others`` are not, instances of some types. No object's own code is run."""
    kinds = {kind for kind in {type(each) for each in objects} if issubclass(kind, of) != others}
    return [each for each in objects if type(each) in kinds]


def every_container() -> list[Any]:
    """All that the collector can see, and dictionaries that it does not track, one step behind what it does; some of
    these twice. Frozen objects are not seen."""
    objects = gc.get_objects()
    found = instances(objects, _KINDS)
    objects = instances(objects, _WITHOUT, others=True)
    for start in range(0, len(objects), _CHUNK):
        behind = gc.get_referents(*objects[start : start + _CHUNK])
        found += [each for each in behind if type(each) in _UNTRACKED and not gc.is_tracked(each)]
    return found


class Growth(msgspec.Struct, frozen=True):
    """A container that has grown between any two looks.

    Args:
        ident: its ``id``.
        length: at the last look.
        rates: entries per call, between each two looks.
    """

    ident: int
    length: int
    rates: tuple[float, ...]

    @property
    def rate(self) -> float:
        return sum(self.rates) / len(self.rates)

    @property
    def steady(self) -> bool:
        return len(self.rates) >= 2 and min(self.rates) >= 0.8 * max(self.rates)


class Looks:
    """Lengths at several moments; only what has grown is kept of the earlier ones."""

    def __init__(self) -> None:
        self._calls: list[int] = []
        self._lengths: list[dict[int, int]] = []

    def look(self, call: int) -> None:
        """Take all lengths. Objects must not be frozen."""
        found = every_container()
        now = {id(each): len(each) for each in found if type(each) in _LENGTHS and len(each) >= _LEAST}
        now |= {id(each): length_of(each) for each in found if type(each) not in _LENGTHS}
        now.pop(id(now), None)
        now.pop(id(found), None)
        if self._lengths:
            before = self._lengths[-1]
            first = len(self._lengths) == 1
            # What is not known from the first look was short, or did not exist: it began at nothing.
            now = {
                ident: length
                for ident, length in now.items()
                if length > before.get(ident, 0 if first else length) and ident != id(before)
            }
            if first:
                self._lengths[0] = {ident: before.get(ident, 0) for ident in now}
        self._calls.append(call)
        self._lengths.append(now)

    def grown(self, least_rate: float = 0.02) -> list[Growth]:
        """What has grown between any two looks, the fastest first."""
        if len(self._lengths) < 2:
            return []
        found = []
        for ident, length in self._lengths[-1].items():
            lengths = [each[ident] for each in self._lengths]
            rates = tuple(
                (lengths[index] - lengths[index - 1]) / (self._calls[index] - self._calls[index - 1])
                for index in range(1, len(lengths))
            )
            if min(rates) >= least_rate and length - lengths[0] >= _LEAST:
                found.append(Growth(ident, length, rates))
        return sorted(found, key=lambda each: -each.rate)


def resolve(growths: list[Growth]) -> list[tuple[Growth, Any]]:
    """The objects behind; those that are gone are left out."""
    if not growths:
        return []
    wanted = {each.ident: each for each in growths}
    found: dict[int, Any] = {}
    for each in every_container():
        if id(each) in wanted:
            found[id(each)] = each
    return [(wanted[ident], found[ident]) for ident in wanted if ident in found]


class Limit(msgspec.Struct, frozen=True):
    """How large a container may become, and whether its type sees to it or only an attribute beside it says so."""

    most: int
    by: str
    certain: bool


def limit_of(container: Any) -> Limit | None:
    """The limit of a deque, an ``lru_cache``, a queue, or of an object with an attribute like ``maxsize``."""
    if isinstance(container, deque) and container.maxlen is not None:
        return Limit(container.maxlen, "maxlen", True)
    for owner in (container, *_owners(container)):
        if type(owner) is functools._lru_cache_wrapper:
            most = owner.cache_info().maxsize
            return None if most is None else Limit(most, "maxsize", True)
        found = _attribute_limit(owner)
        if found and found[1] >= length_of(container):
            return Limit(found[1], found[0], False)
    return None


def _owners(container: Any) -> list[Any]:
    """Objects that have the container as an attribute."""
    found: list[Any] = []
    for each in gc.get_referrers(container):
        if type(each) is dict:
            found += [owner for owner in gc.get_referrers(each) if attributes(owner) is each]
        elif attributes(each) is not None or type(each) is functools._lru_cache_wrapper:
            found.append(each)
    return found


def attributes(owner: Any) -> dict[str, Any] | None:
    """The attributes of an instance, ``None`` if it has no dictionary, or is a class or a module.

    No code of its class is run.
    """
    if issubclass(type(owner), (type, types.ModuleType)):
        return None
    try:
        found = object.__getattribute__(owner, "__dict__")
    except (AttributeError, TypeError):
        return None
    return found if type(found) is dict else None


def _attribute_limit(owner: Any) -> tuple[str, int] | None:
    own = attributes(owner) or {}
    for place in (own, *(vars(kind) for kind in type(owner).__mro__ if kind is not object)):
        for name, value in list(place.items()):
            if type(value) is int and value > 0 and str(name).endswith(_LIMITS):
                return str(name), value
    return None
