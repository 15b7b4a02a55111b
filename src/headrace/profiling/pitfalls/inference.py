"""Rules about evaluation and serving: gradients that nobody wants, and the wrong mode."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from headrace.profiling.pitfalls.rule import Hit, grad_is_off, is_forward, own_function
from headrace.profiling.pitfalls.source import Function, Scope, arguments, key, method, receiver, short
from headrace.profiling.pitfalls.tensors import Tensors, is_backward

_EVALUATES = re.compile(
    r"_?(eval|evaluate|evaluation|validate|validation|val|predict|infer|inference|test|run_eval|run_inference)"
    r"|_?(eval|evaluate|validate|val|predict|infer)_\w+|_?test_(model|epoch|loop|step_all)"
)
# Lightning and the Trainer of transformers call these with gradients off.
_FRAMEWORK = {"validation_step", "test_step", "predict_step", "prediction_step", "evaluation_step", "val_step"}
_ROUTES = {"post", "get", "put", "route", "api_route", "websocket"}
_SINKS = {"item", "tolist", "numpy", "argmax", "detach"}
_WANTS_GRAD = {"backward", "manual_backward", "grad", "requires_grad_", "vjp", "jacobian", "retain_grad", "zero_grad"}


def forwards_with_grad(tensors: Tensors) -> Iterator[Hit]:
    """A forward with gradients on in a function that evaluates or serves."""
    if not tensors.torch or _file_turns_grad_off(tensors):
        return
    for scope in list(tensors.source.scopes.values()):
        why = _purpose(tensors, scope)
        if not why or _wants_grad(scope):
            continue
        for call in scope.calls:
            if not is_forward(tensors, call, scope) or tensors.is_criterion(call.func, scope):
                continue
            if not grad_is_off(tensors, call, perhaps=True) and not _called_without_grad(tensors, scope):
                yield call, f"`{short(call)}` {why} with gradients on: it builds a graph that nobody uses"
                break


def _file_turns_grad_off(tensors: Tensors) -> bool:
    for scope in tensors.source.scopes.values():
        for call in scope.calls:
            first = call.args[0] if call.args else None
            off = isinstance(first, ast.Constant) and first.value is False
            name = method(call) or key(call.func)
            if off and name in ("set_grad_enabled", "requires_grad_"):
                return True
        for name, values in scope.values.items():
            if name.endswith(".requires_grad") and any(
                isinstance(each.expression, ast.Constant) and each.expression.value is False for each in values
            ):
                return True
    return False


def _purpose(tensors: Tensors, scope: Scope) -> str:
    """Why a function surely wants no gradients; empty when that is not sure."""
    function = scope.function
    if function is None or function.name in _FRAMEWORK:
        return ""
    owner = tensors.source.holder(scope)
    if _is_route(function) or (owner is not None and _serves(tensors, owner, function)):
        return "serves"
    if owner is not None and tensors.is_module_class(owner):
        return ""
    if not any(method(call) in _SINKS for call in scope.calls):
        return ""
    puts_in_eval = any(
        method(call) == "eval" and not call.args and tensors.is_model(receiver(call), scope) for call in scope.calls
    )
    return "evaluates" if _EVALUATES.fullmatch(function.name) or puts_in_eval else ""


def _is_route(function: Function) -> bool:
    for decorator in function.decorator_list:
        if method(decorator) in _ROUTES and isinstance(decorator, ast.Call) and decorator.args:
            path = decorator.args[0]
            if isinstance(path, ast.Constant) and str(path.value).startswith("/"):
                return True
    return False


def _serves(tensors: Tensors, owner: ast.ClassDef, function: Function) -> bool:
    """A method that headrace, LitServe, Ray Serve or BentoML calls with requests."""
    if tensors.is_module_class(owner):
        return False
    methods = {each.name: each for each in owner.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))}
    if "load" in methods and function.name == "run":
        return len(arguments(methods["load"])) == 2 and len(arguments(function)) == 2
    bases = [tensors.source.dotted(base, tensors.source.top) for base in owner.bases]
    marks = [
        tensors.source.dotted(each.func if isinstance(each, ast.Call) else each, tensors.source.top)
        for each in owner.decorator_list
    ]
    if any(base in ("litserve.LitAPI", "litserve.api.LitAPI") for base in bases):
        return function.name == "predict"
    if "ray.serve.deployment" in marks:
        return function.name == "__call__"
    return "bentoml.service" in marks and any(
        "api" in ast.unparse(each) and "bentoml" in ast.unparse(each) for each in function.decorator_list
    )


def _wants_grad(scope: Scope) -> bool:
    if any(key(call.func).rpartition(".")[2] in _WANTS_GRAD or method(call) in _WANTS_GRAD for call in scope.calls):
        return True
    return any(method(call) == "step" and "opt" in key(receiver(call)) for call in scope.calls)


def _called_without_grad(tensors: Tensors, scope: Scope) -> bool:
    """Whether something in this file calls the function with gradients off."""
    function = scope.function
    assert function is not None
    for each in tensors.source.scopes.values():
        for call in each.calls:
            if key(call.func).rpartition(".")[2] == function.name and grad_is_off(tensors, call, perhaps=True):
                return True
    return False


def train_mode_served(tensors: Tensors) -> Iterator[Hit]:
    """A model with dropout or batch statistics that is made and loaded here, served here, and never put into eval."""
    calls = [call for scope in tensors.source.scopes.values() for call in scope.calls]
    if not tensors.torch or any(method(call) in ("eval", "train") for call in calls):
        return
    if not any(method(call) == "load_state_dict" for call in calls) or not _has_modes(tensors):
        return
    for scope in list(tensors.source.scopes.values()):
        if not _purpose(tensors, scope) or _wants_grad(scope):
            continue
        for call in scope.calls:
            if is_forward(tensors, call, scope) and _is_made_here(tensors, call.func, scope):
                yield call, f"`{short(call)}` runs a model that was never put into eval(): dropout is on"
                break


def _has_modes(tensors: Tensors) -> bool:
    named = {call for scope in tensors.source.scopes.values() for call in scope.calls}
    return any(re.search(r"Dropout|BatchNorm|torchvision\.models", _full(tensors, call)) for call in named)


def _full(tensors: Tensors, call: ast.Call) -> str:
    return tensors.source.dotted(call.func, tensors.source.top)


def _is_made_here(tensors: Tensors, node: ast.expr, scope: Scope) -> bool:
    """Whether a model is made from a class of this file or of torchvision, which starts in train mode."""
    values = tensors.source.values(key(node), scope) if key(node) else None
    for value in values or []:
        made: ast.expr = value.expression
        while isinstance(made, ast.Call) and method(made) in ("to", "cuda", "half"):
            made = receiver(made)
        if not isinstance(made, ast.Call):
            return False
        own = isinstance(made.func, ast.Name) and made.func.id in tensors.source.classes
        if not own and not tensors.source.dotted(made.func, scope).startswith(("torch.nn.", "torchvision.models.")):
            return False
    return bool(values)


def eval_mode_kept(tensors: Tensors) -> Iterator[Hit]:
    """A training loop that goes into eval mode and never back: from then on it trains without dropout."""
    for scope in list(tensors.source.scopes.values()):
        for loop in {found[-1] for call in scope.calls if (found := tensors.source.loops_around(call))}:
            inside = [call for call in scope.calls if loop in tensors.source.loops_around(call)]
            reached = [(call, each) for call in inside for each in _with_called(tensors, call)]
            if not any(is_backward(each) for _, each in reached):
                continue
            if any(method(each) == "train" or "train" in _keywords(each) for _, each in reached):
                continue
            for call, each in reached:
                if method(each) != "eval" or each.args or tensors.source.rare(call, loop):
                    continue
                if _is_trained(tensors, call, each, inside):
                    name = f"`{short(call)}`" if call is each else f"`{short(call)}` calls `{short(each)}`, which"
                    yield call, f"{name} leaves the model in eval() mode for the steps that follow"
                    break


def _with_called(tensors: Tensors, call: ast.Call) -> list[ast.Call]:
    inner = own_function(tensors, call)
    return [call, *(inner.calls if inner is not None else [])]


def _keywords(call: ast.Call) -> str:
    return " ".join(each.arg or "" for each in call.keywords)


def _is_trained(tensors: Tensors, call: ast.Call, put: ast.Call, inside: list[ast.Call]) -> bool:
    """Whether the model that goes into eval mode is the one whose parameters this file trains."""
    name = key(receiver(put))
    if call is not put:  # the function's argument, as the loop calls it
        inner = own_function(tensors, call)
        given = [each.arg for each in arguments(inner.function)] if inner and inner.function else []
        if name not in given or given.index(name) >= len(call.args):
            return False
        name = key(call.args[given.index(name)])
    if not name or not any(name in [key(arg) for arg in each.args] or key(each.func) == name for each in inside):
        return False
    calls = [each for every in tensors.source.scopes.values() for each in every.calls]
    return any(method(each) in ("train", "parameters") and key(receiver(each)) == name for each in calls)
