"""The function that is watched: imported, checked, and called again and again, async or not."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError, LoadError


def import_function(target: str) -> Callable[[], Any]:
    """The function that ``module:callable`` names, the current directory first.

    (`runners.user` has its like; but what it imports along would be in the process that is measured.)

    Raises:
        LoadError: there is no such module, or it has no such attribute.
    """
    name, colon, path = target.partition(":")
    if not colon or not path or not name:
        raise LoadError(f"{target!r} is not module:callable", field="target")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    name = name.removesuffix(".py")
    try:
        found: Any = importlib.import_module(name)
        for part in path.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise
        raise LoadError(
            f"there is no module {name!r}", field="target", hint=f"looked in {here} and in installed packages"
        ) from None
    except AttributeError as error:
        raise LoadError(f"{target}: {error}", field="target") from None
    return check(found, target)


def check(function: Any, name: str) -> Callable[[], Any]:
    """The function if it can be called without arguments and does something when called.

    Raises:
        ConfigError: it cannot.
    """
    if not callable(function):
        raise ConfigError(f"{name} is a {type(function).__name__}, not a function", field="target")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(
            f"{name} is a generator: calling it runs nothing",
            field="target",
            hint="give a function that consumes it, for example lambda: list(generate())",
        )
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ConfigError(
            f"{name} cannot be called without arguments: {error}", field="target", hint="wrap it in a function that can"
        ) from None
    except ValueError:
        pass  # something of C that does not say what it takes
    return function  # type: ignore[no-any-return]


class Calls:
    """One function, called any number of times. All calls of an async one run on one loop, as they do in a server."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._runner: asyncio.Runner | None = None

    def __call__(self) -> None:
        outcome = self._function()
        if inspect.isawaitable(outcome):
            self.run(outcome)

    def run(self, awaitable: Any) -> None:
        if self._runner is None:
            self._runner = asyncio.Runner()
        # Not the runner's own `run`: it writes every task's repr into an exception, to set a signal handler, and what
        # that interns looks like a leak of half a thousand calls.
        self._runner.get_loop().run_until_complete(_finish(awaitable))

    def tasks(self) -> set[asyncio.Task[Any]]:
        """Tasks of the loop that have not ended."""
        return asyncio.all_tasks(self._runner.get_loop()) if self._runner else set()

    def close(self) -> None:
        """End what still runs on the loop."""
        if self._runner is not None:
            self._runner.close()


async def _finish(awaitable: Any) -> None:
    await awaitable
    await asyncio.sleep(0)  # tasks that were just cancelled get to their end
