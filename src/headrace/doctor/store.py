"""What the task store says of itself.

It is asked in a process of its own, which gets the URL on its standard input: the client libraries are heavy, a look-up
of a host's name cannot be interrupted, and a command line can be read by everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace.clock import monotonic, wall
from headrace.config import Config
from headrace.doctor.address import Address, parse, without_secrets
from headrace.doctor.ask import ask
from headrace.errors import Unavailable
from headrace.tasks import embedded

ANSWER_S = 2.0
# For the imports of that process besides.
_PROCESS_S = 20.0


class Node(msgspec.Struct, frozen=True):
    """One server: of a Cluster, one of its masters. What it does not tell is empty or ``None``.

    Args:
        where: ``host:port``, of a Cluster's node.
        product: ``Valkey`` or ``Redis``.
        policy: ``maxmemory_policy``.
        most_bytes: ``maxmemory``; 0 is no limit.
        append_only: whether it writes the append-only file.
        fsync: ``appendfsync``.
        write_problem: whether its last write to the disk failed.
        in_cluster: whether it keeps only a part of the keys.
        clock_s: its clock minus this machine's.
        clock_error_s: by how much that may be wrong.
    """

    where: str = ""
    product: str = "Redis"
    version: str = ""
    role: str = "master"
    policy: str = "noeviction"
    used_bytes: int = 0
    most_bytes: int = 0
    append_only: bool = True
    fsync: str | None = None
    write_problem: bool = False
    loading: bool = False
    replicas: int = 0
    in_cluster: bool = False
    clock_s: float = 0.0
    clock_error_s: float = 0.0


class Answer(msgspec.Struct, frozen=True):
    """What came back.

    Args:
        problem: why nothing did.
        seconds: how long it took.
    """

    problem: str = ""
    seconds: float = 0.0
    cluster: bool = False
    nodes: Sequence[Node] = ()


class Store(msgspec.Struct, frozen=True):
    """The store of the configuration.

    Args:
        embedded: whether it is the private one of the data directory.
        address: where it is; ``None`` for an embedded one that does not run now.
        answer: what it says; ``None`` if nobody could be asked.
        program: of an embedded one.
        program_version: its own words.
        problem: why there is no program.
    """

    embedded: bool = True
    address: Address | None = None
    answer: Answer | None = None
    program: str = ""
    program_version: str = ""
    problem: str = ""


def read_store(config: Config, data_dir: Path) -> Store:
    """Look at the store that the configuration names; none is started."""
    if config.redis_url:
        named = parse(config.redis_url)
        return Store(False, named, None if named.problem else question(config.redis_url))
    url = _running(data_dir)
    address = parse(url) if url else None
    answer = question(url) if url else None
    try:
        program = embedded.find_server()
    except Unavailable as error:
        return Store(True, address, answer, problem=error.message)
    reply = ask([str(program), "--version"], timeout_s=5.0)
    problem = f"{program}: {reply.problem}" if reply.problem else ""
    return Store(True, address, answer, str(program), reply.text.strip(), problem)


def question(url: str) -> Answer:
    """Ask a store, from a process of its own."""
    reply = ask([sys.executable, "-P", "-m", __name__], timeout_s=_PROCESS_S, given=url)
    if reply.problem:
        return Answer(f"it could not be asked: {without_secrets(reply.problem, url)}")
    return msgspec.json.decode(reply.text, type=Answer)


def _running(data_dir: Path) -> str:
    """URL of the embedded store if one runs; empty otherwise. It wrote down where it listens."""
    with contextlib.suppress(OSError):
        path = Path(os.fsdecode((data_dir / "lock").read_bytes()))
        # Another name came along with a copied folder, and belongs to the original's server.
        if path.name == embedded.socket_path(data_dir).name and path.is_socket():
            return f"unix://{urllib.parse.quote(str(path))}"
    return ""


async def _answer(url: str) -> Answer:
    from headrace.tasks.delivery import RedisError, connection

    started = monotonic()
    try:
        async with asyncio.timeout(ANSWER_S), connection(url) as store, store.client() as given:
            client: Any = given
            if not store.is_cluster:
                nodes = [await _node(client)]
            else:
                masters = client.get_primaries()
                nodes = [await _node(client, f"{each.host}:{each.port}", target_nodes=[each]) for each in masters]
            return Answer(seconds=monotonic() - started, cluster=store.is_cluster, nodes=nodes)
    except TimeoutError:
        return Answer(f"no answer within {ANSWER_S:g} s")
    except (RedisError, OSError, ValueError) as error:
        said = str(error) or type(error).__name__
        return Answer(without_secrets(said.splitlines()[0], url))


async def _node(client: Any, where: str = "", **target: Any) -> Node:
    """Ask one server. What is asked beside INFO may be forbidden by whoever runs it."""
    from headrace.tasks.delivery import RedisError

    info = await client.execute_command("INFO", **target)
    before = wall()
    seconds, micros = await client.execute_command("TIME", **target)
    after = wall()
    fsync = None
    with contextlib.suppress(RedisError):
        fsync = (await client.execute_command("CONFIG GET", "appendfsync", **target)).get("appendfsync")
    return Node(
        where=where,
        product="Valkey" if "valkey_version" in info else "Redis",
        version=str(info.get("valkey_version") or info.get("redis_version", "")),
        role=str(info.get("role", "")),
        policy=str(info.get("maxmemory_policy", "")),
        used_bytes=int(info.get("used_memory", 0)),
        most_bytes=int(info.get("maxmemory", 0)),
        append_only=bool(info.get("aof_enabled", 0)),
        fsync=fsync,
        write_problem="err" in (info.get("aof_last_write_status"), info.get("aof_last_bgrewrite_status")),
        loading=bool(info.get("loading", 0)),
        replicas=int(info.get("connected_slaves", 0)),
        in_cluster=bool(info.get("cluster_enabled", 0)),
        clock_s=int(seconds) + int(micros) / 1e6 - (before + after) / 2,
        clock_error_s=(after - before) / 2,
    )


async def _tell(url: str) -> None:
    answer = await _answer(url)
    sys.stdout.write(msgspec.json.encode(answer).decode())
    sys.stdout.flush()
    # The end of the loop would wait for a look-up of a name for as long as that takes.
    os._exit(0)


if __name__ == "__main__":
    # ``python -m headrace.doctor.store``: a URL on standard input, an `Answer` as JSON on standard output.
    asyncio.run(_tell(sys.stdin.read().strip()))
