"""A file as the rules see it: its tree, walked once, and answers to where a node stands and what a name means.

Scopes are modules, classes, functions and lambdas; comprehensions belong to the scope around them and count as loops.
This module knows nothing of torch, and never imports what it reads.
"""

from __future__ import annotations

import ast
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef
Loop = ast.For | ast.AsyncFor | ast.While | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (*_FUNCTIONS, ast.ClassDef, ast.Lambda)
_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Value:
    """What a name is bound to: an expression, what is unpacked from it (``part``), or an ``item`` that a loop takes."""

    expression: ast.expr
    part: bool = False
    item: bool = False


@dataclass(eq=False)
class Scope:
    """A module, class, function or lambda.

    Attributes:
        values: what names and dotted names (``self.model``) are bound to here.
        opaque: names bound here to what is not looked into: arguments, exceptions, ``with … as``, ``+=``.
    """

    node: ast.AST
    outer: Scope | None
    calls: list[ast.Call] = field(default_factory=list)
    values: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))
    opaque: set[str] = field(default_factory=set)

    @property
    def function(self) -> Function | None:
        return self.node if isinstance(self.node, _FUNCTIONS) else None

    def binds(self, name: str) -> bool:
        return name in self.opaque or name in self.values


class Source:
    """A parsed file.

    Attributes:
        aliases: local name → dotted name of what is imported under it, wherever in the file.
        functions: name → every function or method of that name.
        strings: every string constant.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: this is no Python that this interpreter reads.
    """

    def __init__(self, file: str, text: bytes) -> None:
        self.file = file
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the compiler thinks of a stranger's backslashes
            self.tree = ast.parse(text)
        self.lines = text.decode("utf-8", "replace").splitlines()
        self.parents: dict[ast.AST, ast.AST] = {}
        self.scopes: dict[ast.AST, Scope] = {}
        self.aliases: dict[str, str] = {}
        self.functions: dict[str, list[Function]] = defaultdict(list)
        self.classes: dict[str, ast.ClassDef] = {}
        self.loops: list[Loop] = []
        self.augmented: list[ast.AugAssign] = []
        self.tests: list[ast.expr] = []
        self.strings: set[str] = set()
        self._members: dict[ast.ClassDef, list[Scope]] = defaultdict(list)
        self.top = Scope(self.tree, None)
        self.scopes[self.tree] = self.top
        self._walk()

    # What the walk collects.

    def _walk(self) -> None:
        stack: list[tuple[ast.AST, Scope]] = [(self.tree, self.top)]
        while stack:
            node, scope = stack.pop()
            kind = type(node)
            if note := _NOTES.get(kind):
                note(self, node, scope)
            inner, body = scope, None
            if kind in _NEW_SCOPES:
                inner = self.scopes[node] = Scope(node, scope)
                self._arguments(node, inner)
                body = set(_body(node))
            for name in node._fields:
                value = getattr(node, name, None)
                for child in value if type(value) is list else (value,):
                    if isinstance(child, ast.AST) and child._fields:  # operators and contexts have none
                        self.parents[child] = node
                        stack.append((child, scope if body is None or child not in body else inner))

    def _call(self, node: ast.Call, scope: Scope) -> None:
        scope.calls.append(node)

    def _constant(self, node: ast.Constant, scope: Scope) -> None:
        if type(node.value) is str and len(node.value) < 100:
            self.strings.add(node.value)

    def _assign(self, node: ast.Assign, scope: Scope) -> None:
        for target in node.targets:
            _bind(scope, target, node.value)

    def _assign_one(self, node: ast.AnnAssign | ast.NamedExpr, scope: Scope) -> None:
        if node.value is not None:
            _bind(scope, node.target, node.value)

    def _augment(self, node: ast.AugAssign, scope: Scope) -> None:
        scope.opaque.add(key(node.target))
        self.augmented.append(node)

    def _loop(self, node: Loop, scope: Scope) -> None:
        self.loops.append(node)
        if isinstance(node, (ast.For, ast.AsyncFor)):
            self._through(node, scope)

    def _through(self, node: ast.For | ast.AsyncFor | ast.comprehension, scope: Scope) -> None:
        for target, iterable in goes_through(node):
            _bind(scope, target, iterable, item=True)

    def _while(self, node: ast.While, scope: Scope) -> None:
        self.loops.append(node)
        self.tests.append(node.test)

    def _test(self, node: ast.If | ast.IfExp | ast.Assert, scope: Scope) -> None:
        self.tests.append(node.test)

    def _with(self, node: ast.withitem, scope: Scope) -> None:
        if node.optional_vars is not None:
            _bind(scope, node.optional_vars, None)

    def _except(self, node: ast.ExceptHandler, scope: Scope) -> None:
        scope.opaque.add(node.name or "")

    def _function(self, node: Function, scope: Scope) -> None:
        self.functions[node.name].append(node)
        scope.opaque.add(node.name)

    def _class(self, node: ast.ClassDef, scope: Scope) -> None:
        self.classes[node.name] = node

    def _import(self, node: ast.Import, scope: Scope) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            self.aliases[name] = alias.name if alias.asname else name

    def _import_from(self, node: ast.ImportFrom, scope: Scope) -> None:
        for alias in node.names:
            self.aliases[alias.asname or alias.name] = f"{'.' * node.level}{node.module or ''}.{alias.name}"

    @staticmethod
    def _arguments(node: ast.AST, scope: Scope) -> None:
        if isinstance(node, (*_FUNCTIONS, ast.Lambda)):
            scope.opaque.update(argument.arg for argument in arguments(node))

    # Where a node stands.

    def around(self, node: ast.AST) -> Iterator[ast.AST]:
        """The nodes that contain this one, from the inside."""
        while (parent := self.parents.get(node)) is not None:
            yield parent
            node = parent

    def scope(self, node: ast.AST) -> Scope:
        """The scope in which a node is evaluated: that of a decorator or a default is the one around its function."""
        below = node
        for parent in self.around(node):
            if parent in self.scopes and (not isinstance(parent, _SCOPES) or below in _body(parent)):
                return self.scopes[parent]
            below = parent
        return self.top

    def loops_around(self, node: ast.AST) -> list[Loop]:
        """The loops of its own scope that run this node each time, from the inside.

        What a ``for`` or the first ``for`` of a comprehension goes through is evaluated once, and so is no part of it.
        """
        found: list[Loop] = []
        scope, below = self.scope(node).node, node
        for parent in self.around(node):
            if parent is scope:
                break
            if isinstance(parent, _LOOPS) and self._repeats(parent, below, node):
                found.append(parent)
            below = parent
        return found

    def _repeats(self, loop: Loop, below: ast.AST, node: ast.AST) -> bool:
        if isinstance(loop, ast.While):
            return below not in loop.orelse
        if isinstance(loop, (ast.For, ast.AsyncFor)):
            return below in loop.body
        return not self._is_first_iterable(node, loop)

    def _is_first_iterable(self, node: ast.AST, loop: _Comprehension) -> bool:
        first = loop.generators[0].iter
        return node is first or first in self.around(node)

    def rare(self, node: ast.AST, loop: ast.AST | None) -> bool:
        """Whether a node may not run in each turn of a loop: under an ``if`` or ``except``, or before leaving it.

        ``None``: anywhere in its function.
        """
        below = node
        for parent in self.around(node):
            if parent is loop or isinstance(parent, _SCOPES):
                return loop is not None and self._leaves(below)
            if isinstance(parent, (ast.If, ast.IfExp)) and below is not parent.test:
                return True
            if isinstance(parent, (ast.ExceptHandler, ast.Match)):
                return True
            if isinstance(parent, ast.Try) and below in parent.orelse:
                return True
            if isinstance(parent, ast.BoolOp) and below is not parent.values[0]:
                return True
            if loop is not None and isinstance(below, ast.stmt) and self._leaves(below):
                return True
            below = parent
        return False

    def _leaves(self, statement: ast.AST) -> bool:
        """Whether the block goes on to leave its loop or function: what stands there runs once."""
        parent = self.parents.get(statement)
        for name in ("body", "orelse", "finalbody"):
            block = getattr(parent, name, None)
            if isinstance(block, list) and statement in block:
                after = block[block.index(statement) :]
                return any(isinstance(each, (ast.Break, ast.Return, ast.Raise)) for each in after)
        return False

    def holder(self, scope: Scope) -> ast.ClassDef | None:
        """The class that a function is a method of."""
        outer = scope.outer
        while outer is not None and not isinstance(outer.node, ast.ClassDef):
            outer = outer.outer
        return outer.node if outer is not None and isinstance(outer.node, ast.ClassDef) else None

    def _inside(self, owner: ast.ClassDef) -> list[Scope]:
        if not self._members:
            for each in self.scopes.values():
                if (holder := self.holder(each)) is not None:
                    self._members[holder].append(each)
        return self._members[owner]

    # What names mean.

    def dotted(self, node: ast.AST, scope: Scope) -> str:
        """The full name of what an expression names through imports (``torch.cuda.empty_cache``), else nothing."""
        name = key(node)
        head, _, rest = name.partition(".")
        if head not in self.aliases or self._hidden(head, scope):
            return ""
        return f"{self.aliases[head]}.{rest}" if rest else self.aliases[head]

    def builtin(self, node: ast.AST, scope: Scope, name: str) -> bool:
        """Whether an expression is the builtin of that name."""
        if not (isinstance(node, ast.Name) and node.id == name) or name in self.aliases or name in self.classes:
            return False
        return not self._hidden(name, scope) and not self.top.binds(name)

    def _hidden(self, name: str, scope: Scope) -> bool:
        seen: Scope | None = scope
        while seen is not None:
            if seen is not self.top and seen.binds(name):
                return True
            seen = seen.outer
        return False

    def values(self, name: str, scope: Scope) -> list[Value] | None:
        """Everything a name may be bound to where it is read; ``None`` when some of it cannot be known.

        For ``self.x`` this is what all methods of the class bind it to.
        """
        if name.startswith("self."):
            owner = self.holder(scope)
            if owner is None:
                return None
            scopes = self._inside(owner)
            if any(name in each.opaque for each in scopes):
                return None
            return [value for each in scopes for value in each.values.get(name, [])] or None
        seen: Scope | None = scope
        while seen is not None:
            if seen.binds(name) and (seen is scope or not isinstance(seen.node, ast.ClassDef)):
                return None if name in seen.opaque else seen.values[name]
            seen = seen.outer
        return None


# What is noted of which kind of node; most kinds need nothing, and a large file has a million nodes.
_NOTES: dict[type[ast.AST], Callable[[Source, Any, Scope], None]] = {
    ast.Call: Source._call,
    ast.Constant: Source._constant,
    ast.Assign: Source._assign,
    ast.AnnAssign: Source._assign_one,
    ast.NamedExpr: Source._assign_one,
    ast.AugAssign: Source._augment,
    ast.For: Source._loop,
    ast.AsyncFor: Source._loop,
    ast.While: Source._while,
    ast.ListComp: Source._loop,
    ast.SetComp: Source._loop,
    ast.DictComp: Source._loop,
    ast.GeneratorExp: Source._loop,
    ast.comprehension: Source._through,
    ast.If: Source._test,
    ast.IfExp: Source._test,
    ast.Assert: Source._test,
    ast.withitem: Source._with,
    ast.ExceptHandler: Source._except,
    ast.FunctionDef: Source._function,
    ast.AsyncFunctionDef: Source._function,
    ast.ClassDef: Source._class,
    ast.Import: Source._import,
    ast.ImportFrom: Source._import_from,
}
_NEW_SCOPES = frozenset(_SCOPES)


def key(node: ast.AST) -> str:
    """``x``, ``self.model``: a name or a chain of attributes from a name; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def method(call: ast.AST) -> str:
    """The name of a called attribute: ``backward`` in ``loss.backward()``; empty for other calls."""
    return call.func.attr if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else ""


def receiver(call: ast.Call) -> ast.expr:
    """What a method is called on."""
    assert isinstance(call.func, ast.Attribute)
    return call.func.value


def arguments(node: Function | ast.Lambda) -> list[ast.arg]:
    given = node.args
    rest = [each for each in (given.vararg, given.kwarg) if each is not None]
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *rest]


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in call.keywords if each.arg == name), None)


def goes_through(loop: ast.For | ast.AsyncFor | ast.comprehension) -> list[tuple[ast.expr, ast.expr]]:
    """What a loop binds, each with what it goes through, looking into ``enumerate`` and ``zip``."""
    target, iterable = loop.target, loop.iter
    inner = target.elts if isinstance(target, (ast.Tuple, ast.List)) else []
    if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Name) and iterable.args:
        if iterable.func.id == "enumerate" and len(inner) == 2:
            return [(inner[0], iterable), (inner[1], iterable.args[0])]
        if iterable.func.id == "zip" and len(inner) == len(iterable.args):
            return list(zip(inner, iterable.args, strict=True))
    return [(target, iterable)]


def short(node: ast.AST, most: int = 60) -> str:
    """An expression as it could have been written, cut where it is long."""
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _body(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.Lambda):
        return [node.body]
    return list(node.body) if isinstance(node, (*_FUNCTIONS, ast.ClassDef)) else []


def _bind(scope: Scope, target: ast.expr, value: ast.expr | None, part: bool = False, item: bool = False) -> None:
    if isinstance(target, (ast.Tuple, ast.List)):
        pairs: list[tuple[ast.expr, ast.expr | None, bool]] = [(each, value, True) for each in target.elts]
        if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts) and not (part or item):
            pairs = [(each, one, False) for each, one in zip(target.elts, value.elts, strict=True)]
        for each, one, is_part in pairs:
            _bind(scope, each, one, is_part, item)
    elif isinstance(target, ast.Starred):
        scope.opaque.add(key(target.value))
    elif name := key(target):
        if value is None:
            scope.opaque.add(name)
        else:
            scope.values[name].append(Value(value, part, item))
