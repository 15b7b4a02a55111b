from __future__ import annotations

from pathlib import Path

import pytest

from headrace import config
from headrace.errors import ConfigError


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text("port = 1\nmax_queue = 2\nworkers = 3\n")
    loaded = config.load({"port": "9"}, environment={"HEADRACE_PORT": "8", "HEADRACE_MAX_QUEUE": "7"}, file=file)
    assert (loaded.port, loaded.max_queue, loaded.workers, loaded.max_batch_size) == (9, 7, 3, 32)


def test_a_models_own_table_beats_the_shared_value_and_a_flag_beats_both(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text(
        'max_queue = 2\n[models.a]\ntarget = "m:a"\nmax_queue = 5\nworkers = 2\n[models.b]\ntarget = "m:b"\n'
    )
    loaded = config.load({"workers": "4"}, environment={}, file=file)
    assert [(m.name, m.max_queue, m.workers) for m in loaded.models.values()] == [("a", 5, 4), ("b", 2, 4)]
    assert loaded.default_model == "a"


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ("prot = 1", "prot", "port"),
        ("port = 70000", "port", ""),
        ('port = "many"', "port", ""),
        ("[models.a]\nmax_batch = 3", "max_batch", "max_batch_size"),
        ("[models.a]\nworkers = 1", "models.a.target", "module:callable"),
        ('[models."a b"]\ntarget = "m:a"', "name", ""),
        ("models = 3", "models", ""),
        ("port = ", "config", ""),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, field: str, hint: str) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(environment={}, file=file)
    assert caught.value.field == field
    assert hint in (caught.value.hint or "")


def test_the_source_of_a_wrong_value_is_named() -> None:
    with pytest.raises(ConfigError, match="HEADRACE_PORT"):
        config.load(environment={"HEADRACE_PORT": "x"})
    with pytest.raises(ConfigError, match="--device"):
        config.load({"device": "gpu"}, environment={})


def test_misspelt_variables_are_found() -> None:
    assert config.unknown_variables({"HEADRACE_PROT": "1", "HEADRACE_PORT": "1", "HOME": "/"}) == ["HEADRACE_PROT"]


def test_every_option_has_help() -> None:
    assert [option.name for option in config.options() if not option.help] == []


def test_a_target_on_the_command_line_stands_over_the_models_own_table(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text('[models.a]\ntarget = "m:old"\nmax_queue = 5\n[models.b]\ntarget = "m:b"\n')
    loaded = config.load(targets={"b": "m:new"}, environment={}, file=file)
    assert [(m.name, m.target, m.max_queue) for m in loaded.models.values()] == [
        ("b", "m:new", 1000),
        ("a", "m:old", 5),
    ]


@pytest.mark.parametrize(
    ("target", "name"),
    [("module:_factory", "factory"), ("org/model", "model"), ("a.b:C.d", "C.d"), ("m:__", "model"), ("x.pt", "x")],
)
def test_a_name_is_made_from_the_target(target: str, name: str) -> None:
    assert config.name_of(target) == name
    config.load(targets={name: target}, environment={})


def test_keys_have_no_flag() -> None:
    from headrace.cli import main

    flags = {flag for command in main.commands.values() for parameter in command.params for flag in parameter.opts}
    assert "--admin-port" in flags
    assert not [flag for flag in flags if "key" in flag]


def test_cores_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert 1 <= config.usable_cpus() <= 3


def test_an_option_that_was_given_is_read_as_its_type() -> None:
    assert config.given("admin_port", {"admin_port": "-1"}) == -1
    assert config.given("admin_port", {}) is None
    with pytest.raises(ConfigError):
        config.given("admin_port", {"admin_port": "none"})
