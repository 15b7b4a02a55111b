"""Tells the store which agents an author's module defines, from a process that ends with that.

Gateways never import that module: it may bring torch and more.
"""

from __future__ import annotations

import asyncio
import logging
import sys

import msgspec

from headrace import log
from headrace.config import Config
from headrace.errors import HeadraceError
from headrace.tasks.delivery import RedisError, connection
from headrace.tasks.registry import load_app
from headrace.tasks.service import find_store
from headrace.tasks.store import Store

_log = logging.getLogger("headrace.tasks.describe")  # __name__ is __main__ here

_PATIENCE_S = 5.0


async def publish(config: Config) -> None:
    """Import and tell. A store that is away hears it from the first task worker instead."""
    specs = [agent.spec() for agent in load_app(config.app).values()]
    try:
        async with asyncio.timeout(_PATIENCE_S), connection(find_store(config)) as opened:
            store = Store(opened, result_ttl_s=config.result_ttl_s, max_tasks=config.max_tasks)
            await store.open()
            await store.publish_agents(specs)
    except (RedisError, OSError, TimeoutError) as error:
        _log.warning("the task store does not answer (%s); task workers will tell it of their agents", error)


def main() -> int:
    """``python -m headrace.tasks.describe``, with the configuration as JSON on standard input."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=Config)
    log.set_up("describe", level=config.log_level, style=config.log_format)
    try:
        asyncio.run(publish(config))
    except HeadraceError as error:
        _log.error("%s%s", error.message, f" ({error.hint})" if error.hint else "", exc_info=error.__cause__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
