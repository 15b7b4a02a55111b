"""What tracing itself costs in a call: measured on calls that do nothing, and taken off what was traced.

One part of it falls into the called function's own time, the other into that of its caller. Functions of C and of
Python differ. It is an average: in a loop that fits a cache a call costs less than in a program that fills it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from headrace.clock import perf_counter
from headrace.profiling.cpu.tracing import Edge, Graph, Node, Tracer
from headrace.profiling.record import Frame

_CALLS = 1000
_REPEATS = 7
_ROUNDS = 50
_CLOSE = 1e-4


class Costs(NamedTuple):
    """Seconds of one call.

    Args:
        inside: in the called function; ``outside``: in who calls. ``c_``: of functions of C.
    """

    inside: float = 0.0
    outside: float = 0.0
    c_inside: float = 0.0
    c_outside: float = 0.0


def measure() -> Costs:
    """Measure on this thread; takes about 10 ms. Nothing may be traced meanwhile."""
    function: Callable[[], object] = _Nothing.of_python
    c_function: Callable[[], object] = "".isascii
    return Costs(*_cost(function, "_Nothing.of_python"), *_cost(c_function, "isascii"))


class _Nothing:
    @staticmethod
    def of_python() -> None:
        return None


def _cost(function: Callable[[], object], name: str) -> tuple[float, float]:
    """What one call costs inside and outside of it. The least of several times: nothing makes a call too cheap."""
    alone = min(_timed(function) for _ in range(_REPEATS))
    inside = traced = float("inf")
    for _ in range(_REPEATS):
        tracer = Tracer()
        tracer.start()
        try:
            traced = min(traced, _timed(function))
        finally:
            tracer.stop()
        inside = min(inside, tracer.own_s(name) / _CALLS)
    return inside, max(0.0, (traced - alone) / _CALLS - inside)


def _timed(function: Callable[[], object]) -> float:
    began = perf_counter()
    for _ in range(_CALLS):
        function()
    return perf_counter() - began


def take_off(graph: Graph, frames: list[Frame], costs: Costs) -> tuple[Graph, float]:
    """The graph without what tracing cost, and how much that was, in seconds."""
    own = {number: _own_without(number, node, frames, costs) for number, node in graph.items()}
    calling = {number: node.all.own_s for number, node in graph.items()}
    outgoing: dict[int, list[tuple[int, float]]] = {number: [] for number in graph}
    for number, node in graph.items():
        is_c = frames[number].kind == "builtin"
        for caller, edge in node.callers.items():
            if caller in graph:
                own[caller] -= edge.calls * (costs.c_outside if is_c else costs.outside)
                outgoing[caller].append((number, edge.cumulative_s))
    own = {number: max(0.0, seconds) for number, seconds in own.items()}
    left = _shares_left(graph, own, outgoing)
    found = {}
    for number, node in graph.items():
        own_left = own[number] / calling[number] if calling[number] > 0 else 1.0
        callers = {caller: _scaled(edge, own_left, left[number]) for caller, edge in node.callers.items()}
        found[number] = Node(_scaled(node.all, own_left, left[number]), callers)
    return found, sum(calling.values()) - sum(own.values())


def _own_without(number: int, node: Node, frames: list[Frame], costs: Costs) -> float:
    inside = costs.c_inside if frames[number].kind == "builtin" else costs.inside
    return node.all.own_s - node.all.calls * inside


def _shares_left(graph: Graph, own: dict[int, float], outgoing: dict[int, list[tuple[int, float]]]) -> dict[int, float]:
    """Of each function's cumulative time, what is left.

    It is made of its own and of the times of those it calls, of which as much is left there as everywhere. Functions
    call each other in circles, so it is found by approximation.
    """
    left = dict.fromkeys(graph, 1.0)
    for _ in range(_ROUNDS):
        moved = 0.0
        for number, node in graph.items():
            whole = node.all.own_s + sum(seconds for _, seconds in outgoing[number])
            now = own[number] + sum(seconds * left[called] for called, seconds in outgoing[number])
            share = min(1.0, now / whole) if whole > 0 else 1.0
            moved = max(moved, abs(share - left[number]))
            left[number] = share
        if moved < _CLOSE:
            break
    return left


def _scaled(edge: Edge, own: float, cumulative: float) -> Edge:
    own_s = edge.own_s * own
    return Edge(edge.calls, edge.primitive, own_s, max(own_s, edge.cumulative_s * cumulative))
