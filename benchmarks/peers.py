"""LitServe and mosec, to be measured beside headrace in the same run.

    python benchmarks/peers.py [--directory DIR]

by itself checks each: starts it, posts a request, compares the answer, stops it.

Both serve from a venv of their own that sees torch and transformers of this one. Each has one HTTP process and one
model worker, batches of up to 32; what they run is in `peer_litserve.py` and `peer_mosec.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from headrace.up import demo_model

HERE = Path(__file__).parent
Kind = Literal["litserve", "mosec"]
Workload = Literal["minilm", "noop", "image"]
VERSIONS = {"litserve": "0.2.19", "mosec": "0.9.8"}
# With --no-deps, so that pip brings no second FastAPI, uvicorn or msgspec: those are the ones that headrace has.
PINS = [
    *(f"{name}=={version}" for name, version in VERSIONS.items()),
    "pyzmq==27.3.0",
    "defspec==0.7.1",
    "offapi==0.1.4",
]


@dataclass(frozen=True)
class Peer:
    """A running peer.

    Args:
        url: where it listens, without a path.
        path: what to post to.
        content_type: of the bodies that `encode` makes.
        encode: a body from a text (minilm, noop) or from bytes (image, sent as they are).
        group: its process group.
    """

    url: str
    path: str
    content_type: str
    encode: Callable[[Any], bytes]
    group: int

    def pids(self) -> list[int]:
        """All its processes, for counting CPU time."""
        return _members(self.group)

    def post(self, value: Any, timeout_s: float = 30.0) -> Any:
        """The prediction for one input."""
        headers = {"Content-Type": self.content_type}
        request = urllib.request.Request(self.url + self.path, self.encode(value), headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return orjson.loads(answer.read())["prediction"]


def install(directory: Path) -> Path:
    """A venv with the peers in `directory`; an earlier one with the same contents is used again. Gives its python."""
    directory = directory.absolute()
    python = directory / "bin" / "python"
    here = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    contents, stamp = "\n".join([sys.version, *PINS, *here]), directory / "peers.txt"
    if stamp.exists() and stamp.read_text() == contents:
        return python
    if not stamp.exists() and directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is in use for something else")
    directory.mkdir(parents=True, exist_ok=True)
    stamp.write_text("")  # ours, though not complete yet
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, *PINS], check=True)
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    # Comes after its own packages in sys.path.
    (site / "zz_headrace_venv.pth").write_text("\n".join(here) + "\n")
    stamp.write_text(contents)
    return python


@contextlib.contextmanager
def start(kind: Kind, workload: Workload, port: int, threads: int, *, python: Path) -> Iterator[Peer]:
    """A peer that has answered a first request. All its processes are gone, with their files, on leaving.

    Args:
        python: what `install` gave.
        threads: torch's, in the one model worker.
    """
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))  # else what answers could be something else
    with tempfile.TemporaryDirectory(prefix="peer-") as scratch:
        argv = {
            "litserve": [str(HERE / "peer_litserve.py"), workload, str(port)],
            # Its sockets stay behind after an unclean end and would stop the next start: a new place each time.
            "mosec": [
                *(str(HERE / "peer_mosec.py"), "--address", "127.0.0.1", "--port", str(port)),
                *("--path", f"{scratch}/mosec", "--timeout", "60000", "--log-level", "error"),
            ],
        }[kind]
        env = {"WORKLOAD": workload, "MODEL": str(demo_model()), "THREADS": str(threads), "TMPDIR": scratch}
        with open(f"{scratch}/log", "wb") as log:
            process = subprocess.Popen(
                [str(python), *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **env, "OMP_NUM_THREADS": str(threads)},
                cwd=scratch,
                start_new_session=True,
            )
        try:
            if workload == "image":
                peer = Peer(f"http://127.0.0.1:{port}", "/predict", "application/octet-stream", bytes, process.pid)
            else:
                peer = Peer(f"http://127.0.0.1:{port}", "/predict", "application/json", _json, process.pid)
            _wait(peer, process, b"\0" if workload == "image" else "hello", Path(scratch, "log"))
            yield peer
        finally:
            _stop(process)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _json(text: str) -> bytes:
    return orjson.dumps({"input": text})


def _wait(peer: Peer, process: subprocess.Popen[bytes], value: Any, log: Path) -> None:
    until = time.monotonic() + 120
    error: Exception | None = None
    while process.poll() is None and time.monotonic() < until:
        try:
            peer.post(value, 5.0)
        except OSError as failed:  # refused, too slow, or a status of 400 and above
            error = failed
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"{process.args!r} did not start ({error}):\n{log.read_text(errors='replace')}")


def _members(group: int) -> list[int]:
    """Processes of a group that are alive; a zombie is not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: LitServe's own processes outlive a SIGTERM to their parent."""
    for signal_, patience_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_)
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            process.poll()
            if not _members(process.pid):
                process.wait()
                return
            time.sleep(0.05)
    raise RuntimeError(f"processes {_members(process.pid)} of {process.args!r} do not end")


def main() -> None:
    import numpy as np

    from serving import THREADS, InProcess

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--directory", type=Path, help="where the venv is kept; otherwise it is made and removed")
    options = arguments.parse_args()
    text = "Requests wait in a queue until the model is free, and the next batch forms while it is busy."
    with contextlib.ExitStack() as stack:
        directory = options.directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-venv-")))
        python = install(directory)
        expected = np.asarray(InProcess().embed([text])[0])
        for kind in get_args(Kind):
            for workload in get_args(Workload):
                port, begun = free_port(), time.monotonic()
                with start(kind, workload, port, THREADS, python=python) as peer:
                    took = time.monotonic() - begun
                    answer = peer.post(bytes(1_000_000) if workload == "image" else text)
                    group, processes = peer.group, len(peer.pids())
                if workload == "minilm":
                    vector = np.asarray(answer, dtype=np.float32)
                    answer = f"cosine {float(vector @ expected):.6f}"
                    assert vector @ expected >= 0.999, (kind, answer)
                    assert abs(float(np.linalg.norm(vector)) - 1) < 1e-3, kind
                else:
                    assert answer == {"noop": "ok", "image": 1_000_000}[workload], (kind, workload, answer)
                assert not _members(group), (kind, workload)
                with contextlib.closing(socket.socket()) as probe:
                    assert probe.connect_ex(("127.0.0.1", port)), f"{kind} still listens"
                print(f"{kind} {VERSIONS[kind]} {workload}: {answer}; {processes} processes, ready in {took:.1f} s")


if __name__ == "__main__":
    main()
