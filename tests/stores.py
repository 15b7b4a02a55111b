"""Stores of every kind that a URL can name, as real servers: plain, with TLS, a Cluster, and behind Sentinel."""

from __future__ import annotations

import contextlib
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from conftest import free_port, wait_until

# As a generated one may be: it has to be quoted in a URL.
PASSWORD = "s3cret/@:%+"
_QUOTED = urllib.parse.quote(PASSWORD, safe="")


def make_certificate(folder: Path) -> Path:
    """A certificate of its own authority for 127.0.0.1; its key lies beside it as ``key.pem``."""
    certificate = folder / "certificate.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=headrace-test"
    )
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key.pem"), "-out", str(certificate)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True, timeout=20)
    return certificate


class Node:
    """One server of our own, with a password.

    Args:
        certificate: with one it speaks TLS only.
        options: more of the server's.
    """

    def __init__(self, program: str, folder: Path, *options: str, certificate: Path | None = None) -> None:
        self.port = free_port()
        self._folder = folder
        self._certificate = certificate
        listen = ["--port", str(self.port)]
        if certificate is not None:
            listen = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            listen += ["--tls-cert-file", str(certificate), "--tls-key-file", str(certificate.with_name("key.pem"))]
            listen += ["--tls-ca-cert-file", str(certificate), "--tls-replication", "yes", "--tls-cluster", "yes"]
        secret = ["--requirepass", PASSWORD, "--masterauth", PASSWORD]
        where = ["--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"]
        where += ["--repl-diskless-sync-delay", "0"]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen([program, *listen, *secret, *where, *options], stdout=log, stderr=log)
        wait_until(self._answers, 20, f"the server answers: {folder / 'log'}")

    @property
    def url(self) -> str:
        tls = f"?ssl_ca_certs={urllib.parse.quote(str(self._certificate))}" if self._certificate else ""
        return f"redis{'s' if tls else ''}://:{_QUOTED}@127.0.0.1:{self.port}/0{tls}"

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        with redis.Redis.from_url(self.url, decode_responses=True) as client:
            yield client

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self._folder / "log").read_text()
        with contextlib.suppress(redis.RedisError), self.client() as client:
            return bool(client.ping())
        return False


class Nodes:
    """Servers that are stopped together; ``url`` names them all."""

    def __init__(self) -> None:
        self.url = ""
        self.nodes: list[Node] = []
        self._others: list[subprocess.Popen[bytes]] = []

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()
        for process in self._others:
            process.kill()
            process.wait()


class Cluster(Nodes):
    """A Redis Cluster of three masters, and of a replica of each if there shall be any."""

    def __init__(self, program: str, folder: Path, *, certificate: Path | None = None, replicas: bool = False) -> None:
        super().__init__()
        try:
            self._start(program, folder, certificate, replicas)
        except BaseException:
            self.stop()
            raise
        self.url = self.nodes[0].url.replace("://", "+cluster://", 1)

    def _start(self, program: str, folder: Path, certificate: Path | None, replicas: bool) -> None:
        buses = [free_port() for _ in range(6 if replicas else 3)]
        for number, bus in enumerate(buses):
            options = ["--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", "1000"]
            self.nodes.append(Node(program, folder / str(number), *options, certificate=certificate))
        masters = self.nodes[:3]
        for number, node in enumerate(masters):
            with node.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", number * 5462, min(number * 5462 + 5461, 16383))
                client.execute_command("CONFIG", "SET", "cluster-allow-replica-migration", "no")
        with self.nodes[0].client() as client:
            for node, bus in zip(self.nodes[1:], buses[1:], strict=True):
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        wait_until(lambda: all(map(self._whole, self.nodes)), 20, "the nodes know one another")
        for master, replica in zip(masters, self.nodes[3:], strict=False):
            with master.client() as client, replica.client() as follower:
                follower.execute_command("CLUSTER", "REPLICATE", client.execute_command("CLUSTER", "MYID"))

    def owner(self, key: str) -> Node:
        """The master that has a key."""
        with self.nodes[0].client() as client:
            slot = int(client.execute_command("CLUSTER", "KEYSLOT", key))
        return self.nodes[slot // 5462]

    def _whole(self, node: Node) -> bool:
        with node.client() as client:
            found = client.cluster("info")
            return bool(found["cluster_state"] == "ok" and int(found["cluster_known_nodes"]) == len(self.nodes))


class Sentinel(Nodes):
    """A master, as many replicas as wanted, and one Sentinel, which promotes one when the master is gone."""

    def __init__(self, program: str, folder: Path, *, replicas: int = 0) -> None:
        super().__init__()
        try:
            self._start(program, folder, replicas)
        except BaseException:
            self.stop()
            raise

    def _start(self, program: str, folder: Path, replicas: int) -> None:
        master = Node(program, folder / "master")
        self.nodes.append(master)
        for number in range(replicas):
            self.nodes.append(Node(program, folder / f"replica-{number}", "--replicaof", f"127.0.0.1 {master.port}"))
        # A Sentinel that meets them later asks for news every ten seconds only.
        wait_until(lambda: self._followers(master) == replicas, 20, "the replicas follow")
        port = free_port()
        settings = folder / "sentinel.conf"
        settings.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor tasks 127.0.0.1 {master.port} 1\n"
            f'sentinel auth-pass tasks "{PASSWORD}"\n'
            "sentinel down-after-milliseconds tasks 500\nsentinel failover-timeout tasks 3000\n"
        )
        with (folder / "sentinel.log").open("wb") as log:
            self._others.append(subprocess.Popen([program, str(settings), "--sentinel"], stdout=log, stderr=log))
        self.url = f"redis+sentinel://:{_QUOTED}@127.0.0.1:{port}/tasks/0"
        self._sentinel = port
        wait_until(lambda: len(self._replicas()) == replicas, 20, "Sentinel knows the replicas")

    def master(self) -> int:
        """Port of the node that is the master now."""
        with redis.Redis(port=self._sentinel, decode_responses=True) as client:
            return int(client.sentinel_get_master_addr_by_name("tasks")[1])

    def _followers(self, master: Node) -> int:
        with master.client() as client:
            found = client.info("replication")
            return sum(each["state"] == "online" for name, each in found.items() if name.startswith("slave"))

    def _replicas(self) -> list[Any]:
        with contextlib.suppress(redis.RedisError), redis.Redis(port=self._sentinel, decode_responses=True) as client:
            found = client.sentinel_slaves("tasks")
            return [each for each in found if each["master-link-status"] == "ok" and not each["is_disconnected"]]
        return []


KINDS = ("redis", "tls", "cluster", "sentinel")


@contextlib.contextmanager
def started(kind: str, program: str, folder: Path) -> Iterator[Node | Nodes]:
    """Servers of a kind, with as little as it takes. The Cluster speaks TLS, too."""
    made: Node | Nodes
    if kind == "redis":
        made = Node(program, folder / kind)
    elif kind == "tls":
        made = Node(program, folder / kind, certificate=make_certificate(folder))
    elif kind == "cluster":
        made = Cluster(program, folder / kind, certificate=make_certificate(folder))
    else:
        made = Sentinel(program, folder / kind)
    try:
        yield made
    finally:
        made.stop()
