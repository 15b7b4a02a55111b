"""What a rule is, and what several of them ask about loops and modes."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from headrace.profiling.finding import Severity
from headrace.profiling.pitfalls.source import Loop, Scope, key, keyword, method
from headrace.profiling.pitfalls.tensors import Tensors, is_backward

# Where a rule applies, and what is wrong there in one sentence.
Hit = tuple[ast.expr | ast.stmt, str]


@dataclass(frozen=True)
class Rule:
    """One pitfall.

    Args:
        words: a file without any of these (a regular expression over bytes) is not even parsed for this rule.
        find: yields the places.
    """

    code: str
    severity: Severity
    words: bytes
    advice: str
    find: Callable[[Tensors], Iterator[Hit]]


_NO_GRAD = re.compile(r"(^|\.)(no_grad|inference_mode|_no_grad|disable_gradient)$")
_PERHAPS = re.compile(r"grad|infer|eval|frozen", re.IGNORECASE)


def grad_is_off(tensors: Tensors, node: ast.AST, perhaps: bool = False) -> bool:
    """Whether a node is inside ``no_grad``, ``inference_mode`` or ``set_grad_enabled(False)``, in its own function.

    Args:
        perhaps: also where a context or a decorator only sounds as if it did that.
    """
    function = tensors.source.scope(node).function
    contexts: list[ast.expr] = [] if function is None else list(function.decorator_list)
    for parent in tensors.source.around(node):
        if parent is function:
            break
        if isinstance(parent, (ast.With, ast.AsyncWith)):
            contexts += [item.context_expr for item in parent.items]
    return any(_turns_off(each, perhaps) for each in contexts)


def _turns_off(context: ast.expr, perhaps: bool) -> bool:
    called = context.func if isinstance(context, ast.Call) else context
    name = key(called)
    if _NO_GRAD.search(name):
        return True
    if perhaps and _PERHAPS.search(name):
        return True
    first = context.args[0] if isinstance(context, ast.Call) and context.args else None
    return name.endswith("set_grad_enabled") and isinstance(first, ast.Constant) and first.value is False


def is_forward(tensors: Tensors, call: ast.AST, scope: Scope) -> bool:
    """Whether a call runs a model; a criterion is one too."""
    return isinstance(call, ast.Call) and tensors.is_model(call.func, scope)


def own_function(tensors: Tensors, call: ast.Call) -> Scope | None:
    """The scope of the function of this file that a plain call runs, when there is only one of that name."""
    if not isinstance(call.func, ast.Name):
        return None
    found = tensors.source.functions.get(call.func.id, [])
    return tensors.source.scopes[found[0]] if len(found) == 1 else None


def is_step(tensors: Tensors, call: ast.Call, scope: Scope, trains: bool = False) -> bool:
    """Whether a call is a step of the work: a forward, a backward, or a function of this file that does one, once.

    Args:
        trains: a backward only.
    """

    def does(each: ast.Call, where: Scope) -> bool:
        return is_backward(each) or (not trains and is_forward(tensors, each, where))

    inner = own_function(tensors, call)
    return does(call, scope) or (
        inner is not None and any(does(each, inner) and not tensors.source.loops_around(each) for each in inner.calls)
    )


def hot_loops(tensors: Tensors, scope: Scope, trains: bool = False) -> set[Loop]:
    """The loops of a scope whose every turn is a step: not those over epochs, nor over models."""
    found = set()
    for call in scope.calls:
        loops = tensors.source.loops_around(call)
        if loops and not tensors.source.rare(call, loops[0]) and is_step(tensors, call, scope, trains):
            found.add(loops[0])
    return {loop for loop in found if not _makes_models(tensors, scope, loop)}


def _makes_models(tensors: Tensors, scope: Scope, loop: Loop) -> bool:
    """Whether a loop goes over models, each made in its turn."""
    return any(
        loop in tensors.source.loops_around(call) and tensors.is_model(call, scope) and method(call) != "train"
        for call in scope.calls
        if not _changes_mode(call)
    )


def _changes_mode(call: ast.Call) -> bool:
    return method(call) in ("eval", "train", "to", "cuda", "cpu", "half", "float")


def flag(call: ast.Call, name: str, position: int) -> object:
    """A constant argument by name or place; ``...`` when it is given as something else, ``None`` when it is not."""
    given = keyword(call, name)
    if given is None and len(call.args) > position:
        given = call.args[position]
    if given is None:
        return None
    return given.value if isinstance(given, ast.Constant) else ...
