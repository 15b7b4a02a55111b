"""Brings what a store has written to its disk, and ends it when nobody uses it: a process beside the server.

The server has no setting for the latter, and the wrong one for the former. With ``appendfsync everysec``, while the
disk is at work, it answers what it has not even written, for up to two seconds: killed then, it has lost what it had
acknowledged (on a disk that took 0.4 s, 1,000 to 1,700 entries in three of eight trials). With ``no`` it writes before
it answers, always, so that only a loss of power can take anything; and here the file is synchronised every second.

It is run as a file, without the package and without site-packages, because it lives as long as the server and should
cost little; so it may import the standard library only, and of that only what is small. `embedded.py` starts it and
asks its own questions through the same `Connection`. It does not know how a server is started.

    keeper.py SOCKET DATA_DIR INTERVAL_S LIMIT_S

While it lives it holds the lock on ``keeper.lock`` that it has inherited.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import sys

NAME = "headrace-keeper"
SYNCHRONISED_S = 1.0


class Refused(Exception):
    """The server answered with an error: its text."""


class Connection:
    """Questions and answers over the server's Unix socket, one at a time. No client library: it reads strings.

    Args:
        timeout_s: for each question; ``None`` waits until the server answers or ends.

    Raises:
        OSError: nobody listens there, or the server has ended, or it did not answer in time.
    """

    def __init__(self, path: str, timeout_s: float | None = None) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise
        self._answers = self._socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()
        self._socket.close()

    def ask(self, *words: str) -> str:
        """The answer; the elements of an array as lines."""
        question = [f"*{len(words)}\r\n".encode()]
        for word in map(os.fsencode, words):
            question += [f"${len(word)}\r\n".encode(), word, b"\r\n"]
        self._socket.sendall(b"".join(question))
        return self._read()

    def info(self) -> dict[str, str]:
        """The figures that the server keeps of itself."""
        lines = (line.partition(":") for line in self.ask("INFO").splitlines())
        return {name: value for name, colon, value in lines if colon}

    def others(self) -> int:
        """How many are connected besides this one, a keeper and replicas."""
        own = f"id={self.ask('CLIENT', 'ID')}"
        count = 0
        for line in self.ask("CLIENT", "LIST").splitlines():
            words = line.split(" ")
            replica = any(word.startswith("flags=") and "S" in word for word in words)
            count += words[0] != own and f"name={NAME}" not in words and not replica
        return count

    def shut_down(self) -> None:
        """Have the server write everything to disk and end; returns when it has ended."""
        # It would end all the same, and with it what it has acknowledged but could not write so far.
        if self.info().get("aof_last_write_status") == "err":
            raise Refused("it has data that it cannot write")
        try:
            # Without "SAVE": the append-only file is what counts, and it is written and synchronised in any case.
            self.ask("SHUTDOWN")
        except ConnectionError:
            return

    def ended(self, within_s: float) -> bool:
        """Whether the server ends the connection, which says nothing unasked, within some time."""
        return bool(select.select([self._socket], [], [], within_s)[0])

    def _read(self) -> str:
        line = self._answers.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("the server has ended")
        kind, rest = line[:1], line[1:-2].decode(errors="replace")
        if kind == b"-":
            raise Refused(rest)
        if kind == b"$" and rest != "-1":
            text = self._answers.read(int(rest) + 2)
            if len(text) < int(rest) + 2:
                raise ConnectionResetError("the server has ended")
            return text[:-2].decode(errors="replace")
        if kind == b"*":
            return "\n".join([self._read() for _ in range(int(rest))])
        return rest


def try_lock(path: str | os.PathLike[str], how: int = fcntl.LOCK_EX) -> int | None:
    """The lock of a file, held while the descriptor given back is open in any process; ``None`` if others have it.

    Never unlock it by `fcntl.LOCK_UN`: that would take it from the process that inherited it, too.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Files:
    """What the server appends to.

    Args:
        folder: where it keeps them; it has made it before it answers.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._seen: dict[str, tuple[int, int]] = {}

    def synchronise(self) -> None:
        """Have the disk keep whatever has been written since the last time."""
        found = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(".aof"):
                    status = entry.stat()
                    found[entry.path] = (status.st_size, status.st_mtime_ns)
        for path in found.keys() - {path for path, state in found.items() if self._seen.get(path) == state}:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # rewritten to a shorter one meanwhile
                continue
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._seen = found


def keep(path: str, folder: str, interval_s: float, limit_s: float) -> None:
    """Synchronise and watch until the server ends, or end it."""
    door, files = os.path.join(folder, "door"), Files(os.path.join(folder, "appendonlydir"))
    with Connection(path) as server:
        server.ask("CLIENT", "SETNAME", NAME)
        quiet_s, accepted, waited_s = 0.0, "", 0.0
        step_s = min(SYNCHRONISED_S, interval_s)
        while not server.ended(within_s=step_s):
            try:
                files.synchronise()
            except OSError as error:
                _say(f"what was written cannot be brought to the disk: {error}")
            waited_s += step_s
            if waited_s < interval_s:
                continue
            waited_s = 0.0
            try:
                if not os.path.exists(path):
                    # A logout takes the runtime directory along, a cleaner the temporary files. Nobody can reach the
                    # server any more, nor start another while it holds its lock.
                    _say(f"the socket {path} is gone: ending the server, so that it can be started again")
                    server.shut_down()
                    return
                # While the door is held, nobody is told that there is a server here.
                held = try_lock(door)
                if held is None:
                    quiet_s = 0.0
                    continue
                try:
                    before, accepted = accepted, server.info()["total_connections_received"]
                    # Whoever came and went in between counts, too.
                    quiet_s = quiet_s + interval_s if accepted == before and not server.others() else 0.0
                    if quiet_s >= limit_s:
                        _say(f"nobody has been connected for {limit_s:g} s: ending the server")
                        server.shut_down()
                        return
                finally:
                    os.close(held)
            except Refused as refusal:
                # Busy with a long script, or it could not write: it is in use, or somebody has to look at it.
                _say(f"the server refuses: {refusal}")
                quiet_s = 0.0


def _say(text: str) -> None:
    try:
        print(f"keeper: {text}", flush=True)
    except OSError:  # the log's disk is full
        return


if __name__ == "__main__":
    try:
        keep(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
    except OSError as error:
        _say(f"the server has ended ({error})")
