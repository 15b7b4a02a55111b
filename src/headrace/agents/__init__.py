"""Agents of other frameworks as durable ones: their model requests and tool calls become steps and events of a task.

Knows of tasks only what `Context` says. A framework is imported only in the module that is named for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from headrace.errors import Unavailable

if TYPE_CHECKING:
    from headrace import metrics


class Context(Protocol):
    """What is needed of an attempt at a task. ``tokens`` is what its model requests used, also in earlier attempts."""

    tokens: int

    @property
    def task_id(self) -> str: ...

    @property
    def row(self) -> metrics.Row: ...

    def step(self, name: str, function: Callable[..., Any], /, *args: Any) -> Awaitable[Any]:
        """Take the next number, and when awaited call the function, or give what is journalled under that number."""
        ...

    async def emit(self, type: str, /, **fields: Any) -> None:  # noqa: A002 - the word of AG-UI
        ...


def is_pydantic(thing: object) -> bool:
    """Whether it is an agent of pydantic-ai, without importing that."""
    return any(
        kind.__name__ == "AbstractAgent" and kind.__module__.partition(".")[0] == "pydantic_ai"
        for kind in type(thing).__mro__
    )


def durable(
    agent: Any,
    *,
    name: str,
    module: str,
    deps: Callable[[Any], Any] | None = None,
    stream: bool = True,
) -> Callable[..., Awaitable[Any]]:
    """An agent of pydantic-ai as an async function of a context and a ``message``.

    Args:
        name, module: what the function says it is and where it comes from.
        deps: makes the agent's ``deps`` from the context, for each attempt anew.
        stream: ask models for streams and pass their text on as it comes.

    Raises:
        Unavailable: pydantic-ai is missing, or not one that this module knows.
    """
    try:
        from headrace.agents import pydantic
    except ImportError as error:
        raise Unavailable(
            f"agents of pydantic-ai need another pydantic-ai than is installed: {error}",
            hint="pip install 'headrace[agents]'",
        ) from error
    return pydantic.durable(agent, name=name, module=module, deps=deps, stream=stream)


def declare(agent: Any, row: metrics.Row) -> None:
    """Make the series of an agent of pydantic-ai that are known before it runs: its model's and its own tools'."""
    from headrace.agents import pydantic

    pydantic.declare(agent, row)
