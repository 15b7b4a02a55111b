"""The user's own class or function as a runner.

The types of ``run`` become the JSON Schema that front ends validate with, and items are converted to them here. This
file imports torch only if the user's module already has.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import msgspec
import pydantic

from headrace.config import ModelConfig
from headrace.core import ModelInfo, Runner
from headrace.errors import InvalidInput, LoadError
from headrace.runners import Loaded

_ANYTHING_BUT_NULL: dict[str, Any] = {"not": {"type": "null"}}


def open_user(config: ModelConfig, device: str) -> Loaded:
    """Import ``module:callable`` (the current directory first) and load it."""
    thing = _instantiate(import_target(config.target), config.target)
    if _is_torch_module(thing):
        from headrace.runners.module import open_module

        return open_module(config, thing, device)
    runner = as_runner(thing, config.target)
    item_type, output_type = _annotations(runner.run)
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(item_type)
    runner.load(device)
    prepare = _prepare(adapter, item_type, getattr(runner, "prepare", None))
    info = ModelInfo(
        name=config.name,
        task="custom",
        platform="python",
        device=device,
        item_schema=msgspec.json.encode(_schema(adapter) if item_type is not Any else _ANYTHING_BUT_NULL),
        output_schema=msgspec.json.encode(_schema(pydantic.TypeAdapter(output_type))),
        streams=hasattr(runner, "stream"),
    )
    parts: dict[str, Any] = {
        name: getattr(runner, name) for name in ("cost", "finish", "stream") if hasattr(runner, name)
    }
    if config.example:
        example = prepare(_example(config))
        parts["example"] = lambda length: example
    return Loaded(runner, info, prepare=prepare, **parts)


def import_target(target: str) -> Any:
    """The object that ``module:attribute`` names."""
    module_name, _, attribute = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name.removesuffix(".py"))
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise LoadError(
                f"there is no module {module_name!r}",
                field="target",
                hint=f"looked in {here} and in installed packages",
            ) from None
        raise
    except AttributeError:
        raise LoadError(f"{module_name} has no {attribute!r}", field="target") from None
    return found


class _FunctionRunner:
    """A plain function list → list."""

    def __init__(self, function: Callable[[list[Any]], list[Any]]) -> None:
        self.run = function

    def load(self, device: str) -> None:
        """Nothing to load: the function's module is imported already."""


def _instantiate(thing: Any, target: str) -> Any:
    """Call what must be called to get a runner: a class, or a factory without parameters."""
    if not callable(thing) or _is_torch_module(thing):
        return thing
    if not inspect.isclass(thing):
        if hasattr(thing, "run"):
            return thing
        required = [
            parameter
            for parameter in inspect.signature(thing).parameters.values()
            if parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_KEYWORD,)
        ]
        if required:
            return thing
    try:
        return thing()
    except TypeError as error:
        raise LoadError(f"{target} cannot be made without arguments: {error}", field="target") from error


def as_runner(thing: Any, target: str) -> Runner:
    """Something with ``run`` as it is, a function list → list wrapped.

    Raises:
        LoadError: it is neither, or its ``run`` is async.
    """
    run = getattr(thing, "run", None)
    if run is None and hasattr(thing, "stream"):
        thing.run = run = _collect(thing.stream)
    if run is None:
        if not callable(thing):
            raise LoadError(
                f"{target} is a {type(thing).__name__}, neither a function nor something with run()", field="target"
            )
        thing = _FunctionRunner(thing)
        run = thing.run
    if inspect.iscoroutinefunction(run):
        raise LoadError(f"{target}: run must be an ordinary function, not async", field="target")
    if not hasattr(thing, "load"):
        thing.load = lambda device: None
    return cast(Runner, thing)


def _collect(stream: Callable[[list[Any]], Iterable[list[Any]]]) -> Callable[[list[Any]], list[Any]]:
    """``run`` of a model that has only ``stream``: the chunks of each item as a list."""

    def run(inputs: list[Any]) -> list[Any]:
        answers: list[Any] = [[] for _ in inputs]
        for chunks in stream(inputs):
            for index, chunk in enumerate(chunks):
                if isinstance(chunk, BaseException):
                    answers[index] = chunk
                elif chunk is not None and isinstance(answers[index], list):
                    answers[index].append(chunk)
        return answers

    run.__annotations__["inputs"] = typing.get_type_hints(stream).get("inputs", list[Any])
    return run


def _is_torch_module(thing: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(thing, torch.nn.Module)


def _annotations(run: Callable[..., Any]) -> tuple[Any, Any]:
    """Types of one input and one output of ``run(inputs: list[I]) -> list[O]``; `Any` where it does not say."""
    try:
        hints = typing.get_type_hints(run, include_extras=True)
    except NameError:
        return Any, Any
    output = hints.pop("return", Any)
    parameters = [name for name in inspect.signature(run).parameters if name in hints]
    return _element(hints[parameters[0]] if parameters else Any), _element(output)


def _element(kind: Any) -> Any:
    arguments = typing.get_args(kind)
    return arguments[0] if typing.get_origin(kind) in (list, typing.List) and arguments else Any  # noqa: UP006 - seen in users' code


def _schema(adapter: pydantic.TypeAdapter[Any]) -> dict[str, Any]:
    try:
        return adapter.json_schema()
    except pydantic.errors.PydanticInvalidForJsonSchema:
        return {}


def _prepare(
    adapter: pydantic.TypeAdapter[Any], item_type: Any, own: Callable[[Any], Any] | None
) -> Callable[[Any], Any]:
    def prepare(item: Any) -> Any:
        if item_type is not Any:
            try:
                item = adapter.validate_python(item)
            except pydantic.ValidationError as error:
                first = error.errors(include_url=False, include_context=False)[0]
                where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
                raise InvalidInput(first["msg"], field=f"input{where}") from None
        return own(item) if own else item

    return prepare


def _example(config: ModelConfig) -> Any:
    try:
        return msgspec.json.decode(config.example)
    except msgspec.DecodeError as error:
        raise LoadError(f"the example of {config.name} is not JSON: {error}", field="example") from None
