"""Rules about what a hot loop must not do: wait for the device, or throw away its memory pool."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from headrace.profiling.pitfalls.rule import Hit, hot_loops
from headrace.profiling.pitfalls.source import Loop, Scope, goes_through, key, method, receiver, short
from headrace.profiling.pitfalls.tensors import ONE, SOME, Tensors

_FETCHES = ("item", "tolist", "numpy", "cpu")
# A place, the words for it, and the tensor that it waits for.
_Sync = tuple[ast.expr, str, ast.expr]


def syncs_in_loop(tensors: Tensors) -> Iterator[Hit]:
    """Waiting for the device in every step of a training, or for a sum over the batches of an evaluation.

    Other fetches of an inference are its results.
    """
    for scope in tensors.source.scopes.values() if tensors.gpu else ():
        hot = hot_loops(tensors, scope)
        trains = hot_loops(tensors, scope, trains=True) if hot else set()
        for node, words, tensor in _syncs(tensors, scope) if hot else ():
            loops = tensors.source.loops_around(node)
            if not loops or loops[0] not in hot or tensors.source.rare(node, loops[0]):
                continue
            sums_up = any(isinstance(each, ast.AugAssign) for each in tensors.source.around(node))
            if (loops[0] in trains or sums_up) and not _is_item(tensors, tensor, loops[0], scope):
                yield node, f"`{words}` waits for the device in every step"


def syncs_per_item(tensors: Tensors) -> Iterator[Hit]:
    """Fetching a tensor from the device number by number."""
    for scope in tensors.source.scopes.values() if tensors.gpu else ():
        for node, words, tensor in _syncs(tensors, scope):
            loops = tensors.source.loops_around(node)
            if loops and _is_item(tensors, tensor, loops[0], scope):
                yield node, f"`{words}` fetches one number at a time: one wait for the device each"


def _syncs(tensors: Tensors, scope: Scope) -> Iterator[_Sync]:
    yield from _fetches(tensors, scope)
    yield from _conversions(tensors, scope)
    yield from _branches(tensors, scope)


def _fetches(tensors: Tensors, scope: Scope) -> Iterator[_Sync]:
    for call in scope.calls:
        name = method(call)
        to_cpu = name == "to" and [each.value for each in call.args if isinstance(each, ast.Constant)] == ["cpu"]
        if to_cpu or (name in _FETCHES and not call.args):
            on = receiver(call)
            if tensors.kind(on, scope) >= SOME and not tensors.is_model(on, scope):
                yield call, short(call), on


def _conversions(tensors: Tensors, scope: Scope) -> Iterator[_Sync]:
    """``float(x)``, ``int(x)``, ``bool(x)``, ``print(x)`` and ``print(f"{x}")``."""
    for call in scope.calls:
        if any(tensors.source.builtin(call.func, scope, name) for name in ("float", "int", "bool")):
            given = call.args[:1]
        elif tensors.source.builtin(call.func, scope, "print"):
            texts = [each for each in call.args if isinstance(each, ast.JoinedStr)]
            inside = [part.value for text in texts for part in text.values if isinstance(part, ast.FormattedValue)]
            given = [*call.args, *inside]
        else:
            continue
        for each in given:
            if tensors.kind(each, scope) == ONE:
                yield call, short(call), each
                break


def _branches(tensors: Tensors, scope: Scope) -> Iterator[_Sync]:
    for test in tensors.source.tests:
        for each in _truths(test):
            if tensors.source.scope(test) is scope and tensors.kind(each, scope) == ONE:
                yield test, f"if {short(test)}", each
                break


def _truths(test: ast.expr) -> list[ast.expr]:
    if isinstance(test, ast.BoolOp):
        return [inner for each in test.values for inner in _truths(each)]
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _truths(test.operand)
    return [test]


def _is_item(tensors: Tensors, tensor: ast.expr, loop: Loop, scope: Scope) -> bool:
    """Whether a tensor is one number after another of a larger one, as the loop goes on."""
    if isinstance(tensor, ast.Subscript):
        used = {each.id for each in ast.walk(tensor.slice) if isinstance(each, ast.Name)}
        return bool(used & _counted(loop)) and not isinstance(tensor.slice, ast.Slice)
    if not isinstance(tensor, ast.Name):
        return False
    for part in _parts(loop):
        for target, iterable in goes_through(part):
            if isinstance(target, ast.Name) and target.id == tensor.id:
                return tensors.kind(iterable, scope) == ONE
    return False


def _parts(loop: Loop) -> list[ast.For | ast.AsyncFor | ast.comprehension]:
    if isinstance(loop, (ast.For, ast.AsyncFor)):
        return [loop]
    return [] if isinstance(loop, ast.While) else list(loop.generators)


def _counted(loop: Loop) -> set[str]:
    """The names that a loop binds."""
    return {each.id for part in _parts(loop) for each in ast.walk(part.target) if isinstance(each, ast.Name)}


def caches_emptied(tensors: Tensors) -> Iterator[Hit]:
    """``empty_cache`` in every step: the next step asks the driver for the same memory again."""
    for scope in tensors.source.scopes.values():
        calls = [call for call in scope.calls if key(call.func).endswith("empty_cache")]
        hot = hot_loops(tensors, scope) if calls else set()
        for call in calls:
            name = tensors.source.dotted(call.func, scope)
            loops = tensors.source.loops_around(call)
            if name not in ("torch.cuda.empty_cache", "torch.mps.empty_cache", "torch.xpu.empty_cache"):
                continue
            if loops and loops[0] in hot and not tensors.source.rare(call, loops[0]):
                yield call, f"`{short(call)}` gives the memory pool back in every step"
