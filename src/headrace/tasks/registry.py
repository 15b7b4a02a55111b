"""Agents as their authors write them: any async function whose first parameter is the context.

`agent` registers one; a task worker imports the author's module and takes what it finds. Knows nothing of the store.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import typing
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pydantic

from headrace.errors import ConfigError, InvalidInput, LoadError
from headrace.metrics import LANES, Row
from headrace.tasks.store import AgentSpec

Function = Callable[..., Awaitable[Any]]
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")


@dataclass(frozen=True)
class Agent:
    """A registered function and how it is to be run; ``declare`` makes the series that it will count."""

    name: str
    function: Function
    retries: int = 0
    retry_on: tuple[type[Exception], ...] = (Exception,)
    timeout_s: float | None = None
    priority: str = "default"
    _parameters: list[inspect.Parameter] = field(default_factory=list, repr=False)
    _reader: pydantic.TypeAdapter[Any] | None = field(default=None, repr=False)
    _writer: pydantic.TypeAdapter[Any] = field(default_factory=lambda: pydantic.TypeAdapter(Any), repr=False)
    declare: Callable[[Row], None] | None = None

    def spec(self) -> AgentSpec:
        """What gateways need to check an input before it is accepted."""
        schema: Any = {"type": ["null", "object"], "maxProperties": 0}
        if self._reader is not None:
            schema = self._reader.json_schema()
        texts = [each.name for each in self._parameters if each.annotation in (str, "str")]
        message = "" if len(self._parameters) == 1 else texts[0] if texts else None
        return AgentSpec(
            self.name,
            msgspec.Raw(msgspec.json.encode(schema)),
            all(each.default is not each.empty for each in self._parameters),
            message,
            inspect.getdoc(self.function) or "",
            self.timeout_s,
            self.priority,
        )

    def arguments(self, given: bytes) -> tuple[list[Any], dict[str, Any]]:
        """Arguments of a call from an input as JSON, empty for none; the gateway has checked it by the schema.

        Raises:
            InvalidInput: it fits the schema but not the type, such as a validator of the author's own.
        """
        if self._reader is None or (not given and len(self._parameters) == 1):
            return [], {}
        try:
            value = self._reader.validate_json(given or b"{}")
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise InvalidInput(first["msg"], field=".".join(["input", *map(str, first["loc"])])) from None
        if len(self._parameters) == 1:
            return [value], {}
        return [], {each.name: getattr(value, each.name) for each in self._parameters}

    def encode(self, value: Any) -> bytes:
        """A result as JSON, by the return annotation. Raises `pydantic_core.PydanticSerializationError`."""
        return self._writer.dump_json(value)


_agents: dict[str, Agent] = {}


def agent(
    function: Function | None = None,
    *,
    name: str | None = None,
    retries: int = 0,
    retry_on: type[Exception] | tuple[type[Exception], ...] = Exception,
    timeout_s: float | None = None,
    priority: str = "default",
    declare: Callable[[Row], None] | None = None,
) -> Any:
    """Make an async function an agent: ``@agent`` or ``@agent(retries=2)``. The function itself is given back.

    Args:
        function: its first parameter is the context. One more receives the whole input of a task, several take an
            input that is an object of keywords.
        name: in requests and metrics; the function's own by default.
        retries: how often it is run again after one of the exceptions ``retry_on``; finished steps are not.
        timeout_s: deadline of its tasks, unless a request names another.
        priority: lane of its tasks, unless a request names another: interactive, default or batch.
        declare: makes the series of metrics that the agent will count, so that they are there at 0.

    Raises:
        ConfigError: the function cannot be one, or its name is taken by another.
    """

    def register(function: Function) -> Function:
        made = make(function, name=name, retries=retries, retry_on=retry_on, timeout_s=timeout_s, priority=priority)
        made = replace(made, declare=declare)
        known = _agents.get(made.name)
        if known is not None and (known.function.__module__, known.function.__qualname__) != (
            function.__module__,
            function.__qualname__,
        ):
            raise ConfigError(f"there are two agents {made.name!r}", field="name", hint="give one @agent(name=…)")
        _agents[made.name] = made
        return function

    return register if function is None else register(function)


def make(
    function: Function,
    *,
    name: str | None = None,
    retries: int = 0,
    retry_on: type[Exception] | tuple[type[Exception], ...] = Exception,
    timeout_s: float | None = None,
    priority: str = "default",
) -> Agent:
    """The agent that a function is, without registering it. Raises `ConfigError`."""
    label = str(name or getattr(function, "__name__", ""))
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"agent {label!r} is not an async function", field="function", hint="async def NAME(ctx, …)")
    if not _NAME.match(label):
        raise ConfigError(f"{label!r} cannot be an agent's name", field="name", hint="letters, digits, . _ -")
    if priority not in LANES:
        raise ConfigError(f"{priority!r} is no priority", field="priority", hint=", ".join(LANES))
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters:
        raise ConfigError(f"agent {label!r} takes no context", field="function", hint=f"async def {label}(ctx, …)")
    if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD, each.POSITIONAL_ONLY) for each in parameters[1:]):
        raise ConfigError(f"agent {label!r} has parameters without a name", field="function", hint="name each one")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ConfigError(f"agent {label!r} has an annotation that is nowhere defined: {error}", field=label) from None
    taken = [each.replace(annotation=hints.get(each.name, Any)) for each in parameters[1:]]
    return Agent(
        label,
        function,
        retries,
        retry_on if isinstance(retry_on, tuple) else (retry_on,),
        timeout_s,
        priority,
        taken,
        _reader(label, taken),
        pydantic.TypeAdapter(hints.get("return", Any)),
    )


def _reader(name: str, parameters: list[inspect.Parameter]) -> pydantic.TypeAdapter[Any] | None:
    if not parameters:
        return None
    if len(parameters) == 1:
        return pydantic.TypeAdapter(parameters[0].annotation)
    fields: dict[str, Any] = {
        each.name: (each.annotation, ... if each.default is each.empty else each.default) for each in parameters
    }
    model = pydantic.create_model(name, __config__=pydantic.ConfigDict(extra="forbid"), **fields)
    return pydantic.TypeAdapter(model)


def registered() -> dict[str, Agent]:
    """All agents of the modules imported so far."""
    return dict(_agents)


def load_app(app: str) -> dict[str, Agent]:
    """Import a file (``app.py``) or a module (``package.module``), the current directory first, and give its agents.

    Raises:
        LoadError: it cannot be imported, or defines none; with the reason.
    """
    before = set(_agents)
    try:
        module = _import(app)
    except LoadError:
        raise
    except Exception as error:  # whatever the author's module does when it is imported
        raise LoadError(f"{app} cannot be imported: {type(error).__name__}: {error}", field="app") from error
    if not _agents.keys() - before and not any(one.function.__module__ == module.__name__ for one in _agents.values()):
        raise LoadError(f"{app} defines no agent", field="app", hint="decorate an async function with @headrace.agent")
    return registered()


def _import(app: str) -> ModuleType:
    path = Path(app)
    if path.suffix == ".py":
        if not path.is_file():
            raise LoadError(f"there is no file {app}", field="app")
        folder, name = str(path.resolve().parent), path.stem
    else:
        folder, name = str(Path.cwd()), app
    # Under -P nothing of the current directory is found by itself.
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)
