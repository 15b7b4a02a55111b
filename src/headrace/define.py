"""`headrace.agent`: whatever can be an agent, made one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar, overload

from headrace import agents
from headrace.errors import ConfigError
from headrace.tasks import registry

_Thing = TypeVar("_Thing")


@overload
def agent(
    thing: _Thing,
    /,
    *,
    name: str | None = ...,
    retries: int = ...,
    retry_on: type[Exception] | tuple[type[Exception], ...] = ...,
    timeout_s: float | None = ...,
    priority: str = ...,
    deps: Callable[[Any], Any] | None = ...,
    stream: bool = ...,
) -> _Thing: ...


@overload
def agent(
    *,
    name: str | None = ...,
    retries: int = ...,
    retry_on: type[Exception] | tuple[type[Exception], ...] = ...,
    timeout_s: float | None = ...,
    priority: str = ...,
) -> Callable[[_Thing], _Thing]: ...


def agent(
    thing: Any = None,
    /,
    *,
    name: str | None = None,
    retries: int = 0,
    retry_on: type[Exception] | tuple[type[Exception], ...] = Exception,
    timeout_s: float | None = None,
    priority: str = "default",
    deps: Callable[[Any], Any] | None = None,
    stream: bool = True,
) -> Any:
    """Make something an agent that runs as tasks; it is given back as it was.

    An async function, as ``@agent`` or ``@agent(retries=2)``: its first parameter is the context. One more receives the
    whole input of a task, several take an input that is an object of keywords.

    An `Agent` of pydantic-ai, as ``agent(my_agent, name="support")``: a task's ``message`` is the prompt, its result
    the output. Each model request and each tool call is a step, so that none that has ended is ever repeated.

    Args:
        name: in requests and metrics; the function's or the agent's own by default.
        retries: how often it is run again after one of the exceptions ``retry_on``; finished steps are not.
        timeout_s: deadline of its tasks, unless a request names another.
        priority: lane of its tasks, unless a request names another: interactive, default or batch.
        deps: pydantic-ai only: makes the agent's ``deps`` from the context, for each attempt anew.
        stream: pydantic-ai only: whether models are asked for streams, so that text is sent to watchers as it is made.

    Raises:
        ConfigError: it cannot be an agent, or its name is taken by another.
        Unavailable: pydantic-ai is not one that headrace knows.
    """
    if not agents.is_pydantic(thing):
        if deps is not None or not stream:
            raise ConfigError(
                "only an agent of pydantic-ai has deps and a stream",
                field="deps" if deps is not None else "stream",
                hint="a function makes what it needs itself",
            )
        return registry.agent(
            thing, name=name, retries=retries, retry_on=retry_on, timeout_s=timeout_s, priority=priority
        )
    label = name or thing.name
    if not label:
        raise ConfigError("an agent of pydantic-ai has no name", field="name", hint="agent(my_agent, name=…)")
    # It counts as defined where it was registered, as a function does where it stands.
    module = str(sys._getframe(1).f_globals.get("__name__", __name__))
    function = agents.durable(thing, name=label, module=module, deps=deps, stream=stream)
    registry.agent(
        function,
        name=label,
        retries=retries,
        retry_on=retry_on,
        timeout_s=timeout_s,
        priority=priority,
        declare=lambda row: agents.declare(thing, row),
    )
    return thing
