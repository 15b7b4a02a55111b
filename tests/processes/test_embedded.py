"""headrace inside other servers and programs: one set of workers, whoever serves HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from conftest import MODELS, alive, children, free_port, wait_until

BIN = Path(sys.executable).parent


@contextlib.contextmanager
def program(tmp_path: Path, *command: str, cwd: Path = MODELS, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server of somebody else's, and nothing left of it afterwards."""
    with tempfile.TemporaryDirectory(prefix="hr-") as run:
        log = tmp_path / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=cwd, stdout=out, stderr=out, env={**os.environ, "XDG_RUNTIME_DIR": run, **env}
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()
                sys.stderr.write(log.read_text())
            wait_until(lambda: not pool_pids(run), 15, "the workers are gone")
            wait_until(lambda: not list(Path(run).iterdir()), 15, "the directory is gone")


def pool_pids(run: str) -> list[int]:
    """Processes that name the runtime directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if run in path.read_text() and alive(int(path.parent.name)):
                found.append(int(path.parent.name))
    return found


def ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health/ready").status_code == 200
    return False


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    (tmp_path / "headrace.toml").write_text('[models.who]\ntarget = "mine:Who"\n')
    (tmp_path / "mine.py").write_text(
        "import os\n\nclass Who:\n    def run(self, inputs: list[str]) -> list[int]:\n"
        "        return [os.getpid()] * len(inputs)\n"
    )
    return tmp_path


def test_four_processes_of_gunicorn_share_one_worker(configured: Path) -> None:
    port = free_port()
    command = (f"{BIN}/gunicorn", "-w", "4", "-k", "uvicorn_worker.UvicornWorker", "-b", f"127.0.0.1:{port}",
               "headrace.asgi:app")  # fmt: skip
    with program(configured, *command, cwd=configured) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: ready(url), 30)
        answered = set()

        def ask() -> None:
            with httpx.Client() as client:
                answered.add(client.post(f"{url}/predict", json={"input": "x"}, timeout=20).json()["prediction"])

        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answered) == 1, "one model worker, whichever process was asked"
        assert len(children(process.pid)) >= 4
        # The process that happened to be the first is not special.
        (worker,) = answered
        processes = [pid for pid in children(process.pid) if "gunicorn" in cmdline(pid)]
        for child in processes[:2]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        wait_until(lambda: ready(url), 30)
        assert alive(worker)
        # A pool that is killed takes its workers along and is replaced.
        pool = [pid for pid in pool_pids(f"{Path(os.sep)}hr-") if "headrace.serving.pool" in cmdline(pid)]
        os.kill(pool[0], signal.SIGKILL)
        wait_until(lambda: not alive(worker), 10)
        wait_until(lambda: httpx.post(f"{url}/predict", json={"input": "x"}, timeout=20).status_code == 200, 30)


def cmdline(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def test_plain_uvicorn_serves_it(configured: Path) -> None:
    port = free_port()
    with program(configured, f"{BIN}/uvicorn", "headrace.asgi:app", "--port", str(port), cwd=configured):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: ready(url), 30)
        assert httpx.post(f"{url}/predict", json={"input": "x"}).status_code == 200
        assert 'headrace_workers{model="who",state="ready"} 1' in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize("lifespan", ["lifespan=ml.lifespan", ""])
def test_it_is_mounted_into_an_application(tmp_path: Path, lifespan: str) -> None:
    (tmp_path / "site_app.py").write_text(
        f"""
import headrace as hr
from fastapi import FastAPI

ml = hr.App("models:shout", name="loud", max_queue=7)
app = FastAPI({lifespan})

@app.get("/own")
def own() -> str:
    return "mine"

app.mount("/ml", ml)
"""
    )
    port = free_port()
    with program(tmp_path, f"{BIN}/uvicorn", "site_app:app", "--app-dir", str(tmp_path), "--port", str(port)):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: ready(f"{url}/ml"), 30)
        assert httpx.get(f"{url}/own").json() == "mine"
        assert httpx.post(f"{url}/ml/predict", json={"input": "a"}).json()["prediction"] == "A"
        assert httpx.post(f"{url}/ml/models/loud/predict", json={"input": "a"}).json()["prediction"] == "A"
        assert httpx.get(f"{url}/ml/docs").status_code == 200
        assert httpx.get(f"{url}/ml/v1/models").json()["data"][0]["id"] == "loud"
        assert "error" in httpx.get(f"{url}/ml/nothing").json()


def test_a_script_serves_its_own_class(tmp_path: Path) -> None:
    port, admin = free_port(), free_port()
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
import headrace as hr

class Length:
    def run(self, inputs: list[str]) -> list[int]:
        return [len(text) for text in inputs]

if __name__ == "__main__":
    sys.exit(hr.serve(Length, port={port}, admin_port={admin}, workers=2))
"""
    )
    with program(tmp_path, sys.executable, str(script)) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: ready(url), 30)
        assert httpx.post(f"{url}/models/Length/predict", json={"input": "four"}).json()["prediction"] == 4
        process.terminate()
        assert process.wait(20) == 0


def test_what_no_other_process_could_import_is_refused() -> None:
    import headrace as hr
    from headrace.library import load

    with pytest.raises(hr.LoadError, match="no name"):
        load(lambda inputs: inputs, None, {})
    with pytest.raises(hr.ConfigError, match="there is no option 'prot'"):
        load("models:echo", None, {"prot": 1})
