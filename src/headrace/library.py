"""Serving from a program: `serve` runs a server, `App` is an application to mount into one's own."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from headrace import config, live_profile
from headrace.errors import ConfigError, LoadError
from headrace.serving.embedded import EmbeddedFrontEnd
from headrace.serving.server import serve as serve_config


def serve(target: Any = None, *, name: str | None = None, **options: Any) -> int:
    """Serve a model until Ctrl-C or SIGTERM, as ``headrace serve`` does; to be called in the main thread.

    Args:
        target: as on the command line, or a class or function at the top of a module. What is defined in the script
            itself is imported by the workers: guard the call with ``if __name__ == "__main__":``.
        name: the model's name in paths and metrics.
        options: those of the configuration, for example ``port=8000, workers=2``.

    Returns:
        The exit status: 0 after an orderly end.

    Raises:
        ConfigError: an option is wrong, or the port is in use.
        LoadError: the target is nothing that a worker could import.
    """
    main = sys.modules.get("__main__")
    if main is not None and getattr(main.__spec__, "name", "") == "headrace.serving.worker_process":
        raise LoadError(
            "the script calls headrace.serve when it is imported", hint='put the call under if __name__ == "__main__":'
        )
    return asyncio.run(
        serve_config(
            load(target, name, options), lambda url, admin_url: print(f"ready: {url}"), profiler=live_profile.NAME
        )
    )


class App(EmbeddedFrontEnd):
    """An ASGI application that serves models, to mount into your own; see `serving/embedded.py`.

    Args:
        target, name, options: as for `serve`; without a target the models of `headrace.toml`.
    """

    def __init__(self, target: Any = None, *, name: str | None = None, **options: Any) -> None:
        super().__init__(load(target, name, options))


def load(target: Any, name: str | None, options: dict[str, Any]) -> config.Config:
    """The configuration for a target given from Python."""
    known = {option.name for option in config.options()}
    for option in options:
        if option not in known:
            raise ConfigError(f"there is no option {option!r}", field=option, hint="docs/configuration.md lists them")
    if target is None:
        return config.load(options)
    path = target if isinstance(target, str) else importable(target)
    return config.load(options, targets={name or config.name_of(path): path})


def importable(thing: Any) -> str:
    """``module:name`` by which another process gets the same class or function."""
    module, qualified = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "")
    if not module or not qualified or "<" in qualified:
        raise LoadError(
            f"{thing!r} has no name that another process could import",
            field="target",
            hint="give a class or function at the top of a module",
        )
    if module != "__main__":
        return f"{module}:{qualified}"
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:
        raise LoadError(f"{qualified} is defined in no file", field="target", hint="put it into a module")
    script = Path(file).resolve()
    if script.parent != Path.cwd():
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(script.parent), os.environ.get("PYTHONPATH")]))
    return f"{script.stem}:{qualified}"
