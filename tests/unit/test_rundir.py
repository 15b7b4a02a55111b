"""The runtime directory: made whole, swept only when dead, shared by those who belong together."""

from __future__ import annotations

import asyncio
import multiprocessing
from pathlib import Path

import pytest

from headrace.config import Config, ModelConfig
from headrace.rundir import RunDir


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = Path(f"/tmp/hr-{tmp_path.name[-12:]}")
    place.symlink_to(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    yield tmp_path  # type: ignore[misc]
    place.unlink()


def _make(count: int) -> int:
    made = [RunDir.create(Config()) for _ in range(count)]
    whole = sum((each.path / "config.json").exists() for each in made)
    for each in made:
        each.remove()
    return whole


def test_servers_that_start_at_once_do_not_sweep_one_another() -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(_make, [30] * 4) == [30] * 4


def test_a_new_configuration_is_noticed_and_never_half_read() -> None:
    run_dir = RunDir.create(Config())
    seen = {run_dir.config_version()}
    for port in range(1, 20):
        run_dir.write_config(Config(port=port))
        assert run_dir.config().port == port
        seen.add(run_dir.config_version())
    assert len(seen) == 20
    run_dir.remove()
    assert run_dir.config_version() == (0, 0)


def test_a_broken_pid_file_hides_no_other() -> None:
    run_dir = RunDir.create(Config())
    run_dir.note_pid("a", 1)
    run_dir.note_pid("b", 2)
    (run_dir.path / "pids" / "c").write_text("")
    assert sorted(run_dir.pids()) == [1, 2]
    run_dir.forget_pid("a")
    run_dir.forget_pid("a")
    assert run_dir.pids() == [2]
    run_dir.remove()


def test_a_directory_that_cannot_be_used_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nonexistent")
    run_dir = RunDir.create(Config())
    assert run_dir.path.exists()
    run_dir.remove()


def test_processes_of_one_application_share_a_directory_and_others_do_not() -> None:
    one, other = (Config(models={"m": ModelConfig(name="m", target=target)}) for target in ("a:a", "b:b"))

    async def main() -> None:
        first, second, third = [await RunDir.join(config) for config in (one, one, other)]
        assert first.path == second.path != third.path
        assert first.take_slot()[0] == "http.0"
        assert second.take_slot()[0] == "http.1"
        assert second.slots_taken() == 2
        lock = first.try_lock()
        assert lock is not None
        assert second.try_lock() is None
        second.leave()
        first.clear_vacant_slots()
        assert first.slots_taken() == 1
        for each in (first, third):
            each.leave()
            each.remove()

    asyncio.run(main())
