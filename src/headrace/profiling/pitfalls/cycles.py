"""Rule about modules that hold themselves: what they hold waits for the garbage collector, GPU memory included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from headrace.profiling.pitfalls.rule import Hit
from headrace.profiling.pitfalls.source import Scope, key, method, receiver, short
from headrace.profiling.pitfalls.tensors import Tensors

_HOOKS = re.compile(r"register_(full_|module_)?(forward|backward|state_dict|load_state_dict)(_pre|_post)?_hook")


def cycles(tensors: Tensors) -> Iterator[Hit]:
    """``self`` in a hook or a function that the module itself keeps."""
    for owner in tensors.source.classes.values():
        if not tensors.is_module_class(owner):
            continue
        text = {each.attr for each in ast.walk(owner) if isinstance(each, ast.Attribute)}
        if "remove" in text or "weakref" in tensors.source.aliases:
            continue
        methods = {each.name for each in owner.body if isinstance(each, ast.FunctionDef) and not _is_static(each)}
        for scope in tensors.source.scopes.values():
            if tensors.source.holder(scope) is owner and scope.function is not None:
                yield from _hooks(tensors, scope, methods)
                yield from _kept_functions(tensors, scope, methods)


def _hooks(tensors: Tensors, scope: Scope, methods: set[str]) -> Iterator[Hit]:
    for call in scope.calls:
        hooks = _HOOKS.fullmatch(method(call)) and call.args and _root(receiver(call)) == "self"
        if hooks and _holds_self(tensors, call.args[0], scope, methods):
            yield call, f"the hook in `{short(call)}` holds `self`, which holds the hook"


def _kept_functions(tensors: Tensors, scope: Scope, methods: set[str]) -> Iterator[Hit]:
    for name, values in scope.values.items():
        if name.startswith("self.") and name.count(".") == 1:
            for value in values:
                if not value.part and _holds_self(tensors, value.expression, scope, methods):
                    yield value.expression, f"`{name}` is a function that holds `self`"


def _root(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return key(node)


def _is_static(function: ast.FunctionDef) -> bool:
    return any(key(each) in ("staticmethod", "classmethod", "property") for each in function.decorator_list)


def _holds_self(tensors: Tensors, node: ast.expr, scope: Scope, methods: set[str]) -> bool:
    if isinstance(node, ast.Lambda):
        return any(isinstance(each, ast.Name) and each.id == "self" for each in ast.walk(node.body))
    if isinstance(node, ast.Attribute):
        return key(node) == f"self.{node.attr}" and node.attr in methods
    if isinstance(node, ast.Call) and tensors.source.dotted(node.func, scope) == "functools.partial" and node.args:
        return _holds_self(tensors, node.args[0], scope, methods)
    if isinstance(node, ast.Name):
        nested = [each for each in tensors.source.functions.get(node.id, []) if _parent(tensors, each) is scope]
        return any(isinstance(each, ast.Name) and each.id == "self" for inner in nested for each in ast.walk(inner))
    return False


def _parent(tensors: Tensors, node: ast.AST) -> Scope | None:
    return tensors.source.scopes[node].outer
