"""The private store of a data directory, with the real server: one of it, and nothing lost."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from conftest import alive, wait_until
from headrace.errors import ConfigError, Unavailable
from headrace.tasks.embedded import Embedded, ensure, find_server, socket_path, stop
from headrace.tasks.keeper import try_lock

pytestmark = pytest.mark.usefixtures("needs_proc")

ASK = """
import sys
from pathlib import Path
from headrace.tasks.embedded import ensure
found = ensure(Path(sys.argv[1]))
print(found.pid, found.started, found.url)
"""


def processes_of(folder: Path) -> list[int]:
    """Servers and keepers of a data directory: whoever has one of its files open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            opened = [os.readlink(each) for each in (process / "fd").iterdir()]
            if int(process.name) != os.getpid() and any(each.startswith(f"{folder}/") for each in opened):
                found.append(int(process.name))
    return found


def kill_processes_of(folder: Path) -> int:
    """How many there were. A keeper may just have started a server that this round did not see."""
    found = [pid for pid in processes_of(folder) if alive(pid)]
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


def keeper_of(folder: Path) -> int | None:
    """The process that holds the keeper's lock."""
    for pid in processes_of(folder):
        with contextlib.suppress(OSError):
            if "keeper.py" in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
    return None


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A data directory to be; whatever runs in this test's directories has ended afterwards."""
    yield tmp_path / "data"
    wait_until(lambda: kill_processes_of(tmp_path) == 0, 10, "all processes of the test are gone")
    for each in tmp_path.iterdir():
        socket_path(each).unlink(missing_ok=True)


@contextlib.contextmanager
def client(store: Embedded) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(store.url, decode_responses=True) as connection:
        connection.ping()
        yield connection


def questions_of_keeper(connection: redis.Redis) -> int:
    """How often the keeper has asked its server something; 0 before it has come."""
    return sum(int(each["tot-cmds"]) for each in connection.client_list() if each["name"] == "headrace-keeper")


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), what=f"{pid} is dead")


def test_ten_processes_at_once_get_one_server(folder: Path) -> None:
    asking = [
        subprocess.Popen([sys.executable, "-c", ASK, str(folder)], stdout=subprocess.PIPE, text=True) for _ in range(10)
    ]
    answers = [process.communicate(timeout=25)[0].split() for process in asking]
    assert len({(pid, url) for pid, _, url in answers}) == 1
    assert sorted(started for _, started, _ in answers) == ["False"] * 9 + ["True"]
    # All who asked have ended; the server has not.
    again = ensure(folder)
    assert (str(again.pid), again.started) == (answers[0][0], False)
    assert len(processes_of(folder)) == 2
    assert stop(folder)


def test_a_server_killed_a_moment_ago_comes_back_with_everything(folder: Path) -> None:
    first = ensure(folder)
    with client(first) as connection:
        for start in range(0, 5000, 500):
            with connection.pipeline(transaction=False) as pipeline:
                for number in range(start, start + 500):
                    pipeline.xadd("entries", {"number": number, "text": "x" * 100})
                pipeline.execute()
    os.kill(first.pid, signal.SIGKILL)
    second = ensure(folder)
    assert second.started
    assert second.pid != first.pid
    assert second.url == first.url
    with client(second) as connection:
        assert [int(entry["number"]) for _, entry in connection.xrange("entries")] == list(range(5000))
    wait_until(lambda: keeper_of(folder), what="the new server has a keeper")


SLOW_DISK = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int slowly(long call, int file) {
    struct timespec delay = {0, 400000000};
    char line[32];
    int log = open(getenv("SYNCHRONISED"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    write(log, line, snprintf(line, sizeof line, "%d\n", getpid()));
    close(log);
    nanosleep(&delay, 0);
    return syscall(call, file);
}

int fdatasync(int file) { return slowly(SYS_fdatasync, file); }
int fsync(int file) { return slowly(SYS_fsync, file); }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_server_killed_while_its_disk_takes_its_time_has_lost_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.c").write_text(SLOW_DISK)
    library, log = tmp_path / "slow.so", tmp_path / "synchronised"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "slow.c"], check=True, capture_output=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("SYNCHRONISED", str(log))
    store = ensure(folder)
    monkeypatch.delenv("LD_PRELOAD")
    keeper = wait_until(lambda: keeper_of(folder))
    with client(store) as connection:
        (appended,) = (folder / "appendonlydir").glob("*.incr.aof")
        written, size, until = 0, appended.stat().st_size, time.monotonic() + 20
        while log.read_text().split().count(str(keeper)) < 3:
            assert time.monotonic() < until, "the keeper synchronises"
            connection.xadd("entries", {"number": written, "text": "x" * 100})
            written += 1
            assert appended.stat().st_size > size + 100, "what has been answered has been written"
            size = appended.stat().st_size
    kill(store.pid)
    with client(ensure(folder)) as connection:
        assert [int(entry["number"]) for _, entry in connection.xrange("entries")] == list(range(written))


def test_an_entry_half_written_when_the_power_went_hides_no_other(folder: Path) -> None:
    store = ensure(folder)
    with client(store) as connection:
        for number in range(100):
            connection.rpush("entries", number)
    kill(store.pid)
    (written,) = (folder / "appendonlydir").glob("*.incr.aof")
    os.truncate(written, written.stat().st_size - 3)
    with client(ensure(folder)) as connection:
        assert connection.lrange("entries", 0, -1) == [str(number) for number in range(99)]
        assert connection.rpush("entries", 99) == 100


def test_data_that_cannot_be_read_is_an_error_with_the_servers_words(folder: Path) -> None:
    store = ensure(folder)
    with client(store) as connection:
        connection.set("a", 1)
    kill(store.pid)
    (written,) = (folder / "appendonlydir").glob("*.incr.aof")
    written.write_bytes(b"nonsense\r\n" + written.read_bytes())
    with pytest.raises(Unavailable, match=r"ended as it started(.|\n)*Bad file format reading the append only file"):
        ensure(folder)


def test_what_a_crash_left_at_the_sockets_place_does_not_hurt(folder: Path) -> None:
    store = ensure(folder)
    kill(store.pid)
    assert socket_path(folder).is_socket()
    assert ensure(folder).started
    assert stop(folder)
    wait_until(lambda: not socket_path(folder).exists(), what="the socket goes with the server")
    socket_path(folder).write_text("no socket at all")
    assert ensure(folder).started
    assert socket_path(folder).is_socket()


def test_only_the_owner_can_reach_it(folder: Path) -> None:
    ensure(folder)
    with client(ensure(folder)) as connection:
        connection.set("a", 1)
        assert connection.config_get("port") == {"port": "0"}

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.lstat().st_mode)

    assert mode(folder) == 0o700
    assert mode(socket_path(folder)) == 0o600
    assert [path.name for path in folder.rglob("*") if mode(path) & 0o077] == []


def test_two_directories_have_two_servers(folder: Path) -> None:
    other = folder.with_name("other data, its name's long: " + "ü" * 60) / ("deep " * 20) / ("deeper " * 20)
    one, two = ensure(folder), ensure(other)
    assert one.started
    assert two.started
    with client(one) as first, client(two) as second:
        first.set("a", 1)
        assert second.get("a") is None
        assert second.config_get("dir") == {"dir": str(other)}
    assert stop(other)
    with client(one) as first:
        assert first.get("a") == "1"


def test_a_copy_of_a_directory_has_a_server_of_its_own(folder: Path) -> None:
    one = ensure(folder)
    with client(one) as connection:
        connection.set("a", 1)
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    two = ensure(copy)
    assert two.started
    assert two.url != one.url
    with client(two) as connection:
        assert connection.get("a") == "1"
    assert stop(copy)


def test_processes_with_different_runtime_directories_meet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Path("/tmp") / f"hr-{os.getpid()}"
    there.mkdir()
    try:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(there))
        one = ensure(folder)
        assert socket_path(folder).parent == there
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        two = ensure(folder)
        assert (two.pid, two.url, two.started) == (one.pid, one.url, False)
        assert stop(folder)
    finally:
        shutil.rmtree(there)


def test_the_server_outlives_its_starter_and_has_none_of_its_files(folder: Path) -> None:
    read, write = os.pipe()
    command = [sys.executable, "-c", ASK, str(folder)]
    pid = int(
        subprocess.run(command, stdout=subprocess.PIPE, pass_fds=(write,), check=True, timeout=25).stdout.split()[0]
    )
    os.close(write)
    assert os.read(read, 1) == b"", "nobody holds the other end any more"
    os.close(read)
    assert alive(pid)
    assert os.getsid(pid) != os.getsid(0)


def test_stop_saves_and_ends(folder: Path) -> None:
    assert not stop(folder)
    assert not folder.exists()
    store = ensure(folder)
    keeper = wait_until(lambda: keeper_of(folder))
    with client(store) as connection:
        connection.set("a", 1)
        assert stop(folder)
    wait_until(lambda: not alive(store.pid) and not alive(keeper), what="server and keeper have ended")
    assert not stop(folder)
    with client(ensure(folder)) as connection:
        assert connection.get("a") == "1"


def test_a_store_in_use_is_not_stopped_by_who_asks_politely(folder: Path) -> None:
    store = ensure(folder)
    with client(store) as connection:
        wait_until(lambda: questions_of_keeper(connection), what="the keeper is there")
        assert not stop(folder, only_if_unused=True)
        assert alive(store.pid)
    # Neither while somebody is about to connect.
    door = try_lock(folder / "door", fcntl.LOCK_SH)
    assert door is not None
    assert not stop(folder, only_if_unused=True)
    os.close(door)
    # The keeper, which is connected too, does not count.
    assert stop(folder, only_if_unused=True)
    wait_until(lambda: not alive(store.pid), what="the server has ended")


def test_a_store_that_nobody_uses_ends_by_itself(folder: Path) -> None:
    store = ensure(folder, idle_exit_s=1.2)
    with client(store) as connection:
        connection.set("a", 1)
        keeper = wait_until(lambda: keeper_of(folder))
        # Three questions a look, five looks a second: twice the limit.
        wait_until(lambda: questions_of_keeper(connection) > 36, what="the keeper has looked for twice the limit")
        assert alive(store.pid)
    wait_until(lambda: not alive(store.pid) and not alive(keeper), 10, "the unused server and its keeper have ended")
    assert "nobody has been connected for 1.2 s" in (folder / "store.log").read_text()
    with client(ensure(folder)) as connection:
        assert connection.get("a") == "1"


def test_who_comes_and_goes_keeps_the_store_running(folder: Path) -> None:
    store = ensure(folder, idle_exit_s=1.2)

    def looks() -> int:
        with client(store) as connection:
            return questions_of_keeper(connection)

    # One question a look, as it sees at once that somebody has been there: twice the limit.
    wait_until(lambda: looks() > 12, what="the keeper has looked for twice the limit")
    assert alive(store.pid)


def test_without_its_keeper_the_server_works_and_the_next_caller_brings_a_new_one(folder: Path) -> None:
    store = ensure(folder)
    kill(wait_until(lambda: keeper_of(folder)))
    with client(store) as connection:
        connection.set("a", 1)
    assert ensure(folder, idle_exit_s=0.6).pid == store.pid
    wait_until(lambda: not alive(store.pid), 10, "the new keeper ends the unused server")


def test_a_server_whose_socket_was_swept_away_is_started_anew(folder: Path) -> None:
    first = ensure(folder, idle_exit_s=3)
    with client(first) as connection:
        connection.set("a", 1)
        wait_until(lambda: questions_of_keeper(connection), what="the keeper is there")
        socket_path(folder).unlink()
        second = ensure(folder)
    assert second.started
    assert second.pid != first.pid
    with client(second) as connection:
        assert connection.get("a") == "1"


def test_power_safe_holds_from_the_next_call_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with client(ensure(folder)) as connection:
        # Written before it is answered, and synchronised by the keeper.
        assert connection.config_get("appendfsync") == {"appendfsync": "no"}
        assert connection.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert not ensure(folder, power_safe=True).started
        assert connection.config_get("appendfsync") == {"appendfsync": "always"}
        assert "appendfsync=no; now with always" in caplog.text
        assert stop(folder)
    with client(ensure(folder, power_safe=True)) as connection:
        assert connection.config_get("appendfsync") == {"appendfsync": "always"}


def test_a_suspended_server_is_an_error_in_time(folder: Path) -> None:
    store = ensure(folder)
    os.kill(store.pid, signal.SIGSTOP)
    with pytest.raises(Unavailable, match=r"does not answer within 0\.5 s"):
        ensure(folder, timeout_s=0.5)
    with pytest.raises(Unavailable, match=r"does not answer within 0\.5 s"):
        stop(folder, timeout_s=0.5)
    os.kill(store.pid, signal.SIGCONT)
    assert ensure(folder).pid == store.pid


def test_nobody_is_let_in_while_the_store_is_being_ended(folder: Path) -> None:
    folder.mkdir()
    door = try_lock(folder / "door")
    assert door is not None
    with pytest.raises(Unavailable, match="is being ended"):
        ensure(folder, timeout_s=0.2)
    os.close(door)


def test_a_program_that_does_not_run_is_an_error_with_its_words(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "valkey-server"
    broken.write_text("#!/bin/sh\necho 'this machine is too old'\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(Unavailable, match=r"ended as it started(.|\n)*this machine is too old"):
        ensure(folder, program=broken)
    with pytest.raises(Unavailable, match=r"ended as it started(.|\n)*not found"):
        ensure(folder, program=tmp_path / "missing")
    assert ensure(folder, program=find_server()).started


def _a_file(folder: Path) -> None:
    folder.write_text("")


def _below_a_file(folder: Path) -> None:
    folder.parent.joinpath("file").write_text("")
    folder.symlink_to(folder.parent / "file" / "data")


def _read_only(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is unwritable to root")
    folder.mkdir(mode=0o500)


def _open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def _too_long(folder: Path) -> None:
    folder.symlink_to("x" * 300)


@pytest.mark.parametrize("spoil", [_a_file, _below_a_file, _read_only, _open_to_all, _too_long])
def test_a_directory_that_cannot_be_used_is_an_error_that_names_it(folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder)
    with pytest.raises(ConfigError, match="data directory /") as caught:
        ensure(folder)
    assert caught.value.field == "data_dir"
    assert caught.value.hint


FULL = """
import contextlib, sys
from pathlib import Path
from headrace.errors import Unavailable
from headrace.tasks.embedded import ensure, socket_path, stop
from headrace.tasks.keeper import Connection, Refused

disk = Path(sys.argv[1])
folder, filler = disk / "data", disk / "filler"

def fill():
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass

def refused(call, what):
    try:
        call()
    except (Unavailable, Refused) as error:
        assert what in str(error), error
    else:
        raise AssertionError("not refused")

def push():
    for _ in range(100):
        store.ask("RPUSH", "entries", "x" * 1000)

fill()
refused(lambda: ensure(folder), "no space left")
filler.unlink()
assert ensure(folder).started
with Connection(str(socket_path(folder)), 5) as store:
    fill()
    refused(push, "MISCONF")
    acknowledged = store.ask("LLEN", "entries")
    refused(lambda: ensure(folder), "cannot write")
    refused(lambda: stop(folder), "data that it cannot write")
    filler.unlink()
    while store.info()["aof_last_write_status"] == "err":
        pass
    assert stop(folder)
assert ensure(folder).started
with Connection(str(socket_path(folder)), 5) as store:
    assert store.ask("LLEN", "entries") == acknowledged != "0"
assert stop(folder)
"""


def test_on_a_full_disk_nothing_acknowledged_is_lost(folder: Path, tmp_path: Path) -> None:
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=4m,mode=700 tmpfs "$0"'
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("unshare") or subprocess.run([*inside, mount, disk], capture_output=True).returncode:
        pytest.skip("may not make a small file system here")
    command = [*inside, f'{mount} && exec "$@"', disk, sys.executable, "-c", FULL, disk]
    result = subprocess.run(command, capture_output=True, text=True, timeout=25)
    assert result.returncode == 0, result.stderr
