"""Every option, written once: name, type, bounds, default and help.

Command-line flags, environment variables, `headrace.toml` and the table in `docs/configuration.md` all come from the
two structs below. A value is taken from the first of: flag, environment (`HEADRACE_…`), file, default.
Durations end in `_s` (or `_ms`), sizes in `_bytes`.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from headrace.cgroups import read_limits
from headrace.errors import ConfigError

ENV_PREFIX = "HEADRACE_"
DEFAULT_FILE = "headrace.toml"

Task = Literal["auto", "embed", "classify", "logits"]
# One GPU per worker, or a list of GPUs that one worker spans.
Devices = str | list[int | list[int]]


class ModelOptions(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What can be set for each model. At the top level these are the defaults of all models."""

    task: Annotated[Task, Meta(description="what a Hugging Face model is used for; auto reads it from its files")] = (
        "auto"
    )
    workers: Annotated[
        int,
        Meta(ge=1, le=256, description="model worker processes, each with a copy of the model; per GPU with devices"),
    ] = 1
    device: Annotated[
        str, Meta(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")
    ] = "auto"
    devices: Annotated[
        Devices,
        Meta(description="GPUs to bind workers to: all, or 0,1 (one each), or 0+1,2+3 (a worker spans two)"),
    ] = ""
    threads: Annotated[
        int, Meta(ge=0, le=1024, description="CPU threads per model worker; 0 divides the cores among the workers")
    ] = 0
    max_batch_size: Annotated[int, Meta(ge=1, le=65536, description="most items in one batch")] = 32
    max_batch_tokens: Annotated[
        int, Meta(ge=1, description="most tokens in one batch, padding included; one longer item still runs, alone")
    ] = 16384
    max_wait_ms: Annotated[
        float,
        Meta(ge=0, le=60000, description="how long a free device waits for a batch to fill; 0 starts at once"),
    ] = 0.0
    max_queue: Annotated[int, Meta(ge=1, le=1_000_000, description="most requests waiting per model; past it 429")] = (
        1000
    )
    max_input_chars: Annotated[int, Meta(ge=1, description="longest text of one item, in characters")] = 1_000_000
    request_timeout_s: Annotated[
        float, Meta(gt=0, le=86400, description="deadline of a request; X-Request-Deadline-Ms can only shorten it")
    ] = 60.0
    step_timeout_s: Annotated[
        float, Meta(gt=0, le=86400, description="a batch that runs longer is a hang: its worker is killed, restarted")
    ] = 60.0
    load_timeout_s: Annotated[
        float, Meta(gt=0, le=86400, description="time to load and warm up a model, after which the start fails")
    ] = 600.0
    idempotent: Annotated[
        bool, Meta(description="a request begun on a worker that died may run once more on another one")
    ] = True
    example: Annotated[
        str, Meta(description="one input as JSON, for warm-up and for measuring the best batch size")
    ] = ""


class ModelConfig(ModelOptions, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One served model, every option resolved."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="name in paths and metrics")]
    target: Annotated[
        str, Meta(min_length=1, description="module:callable, Hugging Face directory or id, or a TorchScript .pt file")
    ]


class Config(ModelOptions, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The whole server."""

    host: Annotated[str, Meta(min_length=1, description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port of the API, health and metrics; 0 picks one")] = 8000
    http_workers: Annotated[
        int, Meta(ge=0, le=256, description="HTTP front-end processes; 0 means one per four cores, at least one")
    ] = 0
    admin_host: Annotated[str, Meta(min_length=1, description="address that the admin port listens on")] = "127.0.0.1"
    admin_port: Annotated[
        int, Meta(ge=-1, le=65535, description="port for reload and scaling; 0 picks one, -1 turns it off")
    ] = 8001
    api_keys: Annotated[
        str,
        Meta(
            description="keys that open the API, separated by commas; none leaves it open",
            extra={"secret": True},  # a command line can be read by everybody on the machine
        ),
    ] = ""
    max_body_bytes: Annotated[int, Meta(ge=1, description="largest request body")] = 16 * 1024 * 1024
    shutdown_grace_s: Annotated[
        float, Meta(ge=0, le=86400, description="time to answer what was accepted after SIGTERM or Ctrl-C")
    ] = 30.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="least severe line logged")] = (
        "info"
    )
    log_format: Annotated[
        Literal["auto", "console", "json"], Meta(description="auto is console on a terminal, JSON elsewhere")
    ] = "auto"
    debug: Annotated[bool, Meta(description="send the text of a model's exceptions to clients")] = False
    reload: Annotated[bool, Meta(description="for development: reload the models when a file beside them changes")] = (
        False
    )
    data_dir: Annotated[
        str,
        Meta(
            description="where the embedded task store keeps its files; none is the user's data folder",
            extra={"group": "tasks"},
        ),
    ] = ""
    redis_url: Annotated[
        str,
        Meta(
            pattern=r"^($|redis://|rediss://|unix://|redis\+sentinel://|rediss\+sentinel://|redis\+cluster://|rediss\+cluster://)",
            description="Redis or Valkey that keeps the tasks, redis://… or rediss://…; none starts one in data_dir",
            extra={"group": "tasks", "flag": "--redis"},
        ),
    ] = ""
    durability: Annotated[
        Literal["crash-safe", "power-safe"],
        Meta(
            description="crash-safe may lose the last second when the power fails; power-safe nothing, a few ms slower",
            extra={"group": "tasks"},
        ),
    ] = "crash-safe"
    task_workers: Annotated[int, Meta(ge=1, le=256, description="task worker processes", extra={"group": "tasks"})] = 1
    concurrency: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            description="tasks at once in each task worker process; the interactive and batch lanes have half as many "
            "places more each",
            extra={"group": "tasks"},
        ),
    ] = 8
    max_tasks: Annotated[
        int, Meta(ge=1, description="most tasks that are not finished; past it 429", extra={"group": "tasks"})
    ] = 10_000
    task_timeout_s: Annotated[
        float,
        Meta(gt=0, le=31_536_000, description="deadline of a task that names none", extra={"group": "tasks"}),
    ] = 86_400.0
    result_ttl_s: Annotated[
        float,
        Meta(
            ge=1, description="how long a finished task, its result and its events are kept", extra={"group": "tasks"}
        ),
    ] = 86_400.0
    lease_s: Annotated[
        float,
        Meta(
            ge=0.5,
            le=3600,
            description="a task worker that is silent for so long has lost its tasks to others",
            extra={"group": "tasks"},
        ),
    ] = 30.0
    max_attempts: Annotated[
        int, Meta(ge=1, description="a task that killed its worker so often has failed", extra={"group": "tasks"})
    ] = 20
    max_value_bytes: Annotated[
        int,
        Meta(ge=1024, description="largest value of a step, an event or a result, as JSON", extra={"group": "tasks"}),
    ] = 256 * 1024
    app: Annotated[
        str, Meta(description="file or module that defines agents", extra={"group": "tasks", "argument": True})
    ] = ""
    models: dict[str, ModelConfig] = {}

    @property
    def default_model(self) -> str:
        """Name of the model that `/predict` uses: the first one."""
        return next(iter(self.models), "")

    def http_worker_count(self) -> int:
        return self.http_workers or max(1, usable_cpus() // 4)


def usable_cpus() -> int:
    """Cores that this process may use: its affinity, and on Linux its control groups' quotas."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = read_limits().cores
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def device_groups(devices: Devices) -> list[list[int]] | None:
    """GPU numbers per worker; ``None`` for all that there are, an empty list where nothing is asked for.

    Raises:
        ConfigError: neither ``all`` nor a list of numbers.
    """
    if isinstance(devices, list):
        return [entry if isinstance(entry, list) else [entry] for entry in devices]
    if devices == "all":
        return None
    try:
        return [[int(number) for number in group.split("+")] for group in devices.split(",")] if devices else []
    except ValueError:
        raise ConfigError(
            f"devices is {devices!r}", field="devices", hint="all, 0,1 or 0+1,2+3; in a file also [0, 1] or [[0, 1]]"
        ) from None


class Option(msgspec.Struct, frozen=True):
    """One option as the command line, the documentation and the loader see it."""

    name: str
    type: Any
    default: Any
    help: str
    secret: bool = False
    group: str = ""
    argument: bool = False
    own_flag: str = ""

    @property
    def flag(self) -> str:
        return self.own_flag or "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def is_switch(self) -> bool:
        return _plain(self.type) is bool

    @property
    def shape(self) -> str:
        """The type in words, for help texts."""
        plain = _plain(self.type)
        if typing.get_origin(plain) is Literal:
            return "|".join(str(choice) for choice in typing.get_args(plain))
        return {bool: "true|false", int: "integer", float: "number"}.get(plain, "text")

    def read(self, value: Any, source: str) -> Any:
        """Check and convert one value; `source` says where it came from, for the error."""
        try:
            return msgspec.convert(value, self.type, strict=isinstance(value, bool))
        except msgspec.ValidationError as error:
            raise ConfigError(f"{self.name} ({source}): {error}", field=self.name, hint=self.help) from None


def options(kind: type[msgspec.Struct] = Config) -> list[Option]:
    """The options of a struct in the order of their declaration, the `models` table left out."""
    found = []
    own_group = {field.name: "model" for field in msgspec.structs.fields(ModelOptions)}
    for field in msgspec.structs.fields(kind):
        if field.name == "models":
            continue
        meta = next((m for m in typing.get_args(field.type)[1:] if isinstance(m, Meta)), None)
        extra = {"group": own_group.get(field.name, "server"), **((meta and meta.extra) or {})}
        found.append(
            Option(
                field.name,
                field.type,
                field.default,
                (meta and meta.description) or "",
                secret=extra.get("secret", False),
                group=extra.get("group", ""),
                argument=extra.get("argument", False),
                own_flag=extra.get("flag", ""),
            )
        )
    return found


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    targets: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Config:
    """Read the configuration.

    Args:
        flags: values given on the command line, by option name; ``None`` values count as not given.
        targets: models named on the command line, name → target; they come before those of the file.
        environment: defaults to `os.environ`.
        file: a TOML file that must exist; without it `headrace.toml` of the current directory is read if present.

    Raises:
        ConfigError: names the option, where its value came from, and what is allowed.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    variables = os.environ if environment is None else environment
    known = {option.name: option for option in options()}
    content = _read_file(file)
    _refuse_unknown(content, {*known, "models", "alerts"}, "headrace.toml")

    values: dict[str, Any] = {}
    for name, option in known.items():
        if name in given:
            values[name] = option.read(given[name], f"flag {option.flag}")
        elif option.variable in variables:
            values[name] = option.read(variables[option.variable], f"variable {option.variable}")
        elif name in content:
            values[name] = option.read(content[name], "headrace.toml")
    return Config(**values, models=_models(values, given, content.get("models", {}), targets or {}))


def given(name: str, flags: Mapping[str, Any], *, file: Path | None = None) -> Any:
    """The value of an option if somebody has set it anywhere, else ``None``."""
    option = next(option for option in options() if option.name == name)
    if flags.get(name) is not None:
        return option.read(flags[name], f"flag {option.flag}")
    if option.variable in os.environ:
        return option.read(os.environ[option.variable], f"variable {option.variable}")
    content = _read_file(file)
    return option.read(content[name], "headrace.toml") if name in content else None


def table(name: str, file: Path | None = None) -> dict[str, Any]:
    """A table of the file that is read elsewhere, such as ``[alerts]``; empty where there is none.

    Raises:
        ConfigError: it is no table.
    """
    found = _read_file(file).get(name, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{name} must be a table: [{name}]", field=name)
    return found


def _models(
    values: Mapping[str, Any], given: Mapping[str, Any], tables: Any, targets: Mapping[str, str]
) -> dict[str, ModelConfig]:
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError("models must be tables: [models.NAME] with target = …", field="models")
    known = {option.name: option for option in options(ModelConfig)}
    shared = {name: values[name] for name in known if name in values}
    models: dict[str, ModelConfig] = {}
    # What the command line says of a model stands over its table.
    named = {name: {**tables.get(name, {}), "target": target} for name, target in targets.items()}
    for name, table in (named | {name: table for name, table in tables.items() if name not in named}).items():
        where = f"[models.{name}]"
        _refuse_unknown(table, known, where)
        own = {key: known[key].read(value, where) for key, value in table.items()}
        if "target" not in own:
            raise ConfigError(f"{where} has no target", field=f"models.{name}.target", hint=known["target"].help)
        # A flag beats the file, also where the file speaks of one model only.
        own = {key: value for key, value in own.items() if key not in given}
        models[name] = ModelConfig(**{**shared, **own, "name": known["name"].read(name, where)})
        device_groups(models[name].devices)
    return models


def _read_file(file: Path | None) -> dict[str, Any]:
    path = file or Path(DEFAULT_FILE)
    if file is None and not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="config") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", field="config") from None


def _refuse_unknown(content: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see `headrace serve --help` for the options"
            raise ConfigError(f"{where} has an unknown option {name!r}", field=name, hint=hint)


def unknown_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """`HEADRACE_…` variables that no option reads: most often a misspelling."""
    variables = os.environ if environment is None else environment
    # Read elsewhere: by agents and by the commands about single tasks.
    known = {option.variable for option in options()} | {"HEADRACE_API_KEY", "HEADRACE_URL"}
    return sorted(name for name in variables if name.startswith(ENV_PREFIX) and name not in known)


def _plain(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def name_of(target: str) -> str:
    """A model's name from its target: the last part of a path, a hub id or a module path."""
    if ":" in target and not Path(target).exists():
        stem = target.rpartition(":")[2]
    else:
        path = Path(target)
        stem = path.stem if path.suffix in {".pt", ".ts"} else path.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem).strip("-._") or "model"
