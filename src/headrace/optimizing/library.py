"""The ladder from a program: `optimize` takes a model that is there already as well as the name of one."""

from __future__ import annotations

import pickle
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from headrace.errors import ConfigError
from headrace.optimizing import run
from headrace.optimizing.ladder import Objective, Result, Wish, climb
from headrace.optimizing.words import Report, Row
from headrace.runners.opened import Instance


class Ladder:
    """A climbed ladder. What was built is kept until this object is gone, so that it can still be saved.

    Args:
        artifact: where an artifact has been made, ``None`` as long as none was.
    """

    def __init__(self, result: Result, folder: Path, artifact: Path | None) -> None:
        self.artifact = artifact
        self._result = result
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @property
    def report(self) -> Report:
        """All that was found, as in ``report.json``."""
        return self._result.report

    @property
    def rows(self) -> list[Row]:
        """One for each rung, the model as it is among them."""
        return self.report.rows

    @property
    def chosen(self) -> str:
        """The rung that won; ``fp32``, the model as it is, where none did."""
        return self.report.chosen

    def save(self, directory: str | Path) -> Path:
        """Make an artifact of the chosen rung, which ``headrace serve`` takes, with the report beside it.

        Raises:
            ConfigError: something else is there, or the rung needs the module's code and nobody has said its factory.
            LoadError: the artifact does not answer as the rung did.
        """
        self.artifact = Path(directory)
        run.save(self._result, self.artifact)
        return self.artifact

    def __repr__(self) -> str:
        return f"Ladder(chosen={self.chosen!r}, rungs={[row.rung for row in self.rows]})"


def optimize(
    model: Any,
    samples: str | Path | Iterable[Any],
    *,
    task: str = "auto",
    preset: str = "balanced",
    max_drift: Mapping[str, float] | None = None,
    drift: str | Callable[..., Any] = "",
    objective: Objective = "latency",
    rungs: str | Sequence[str] = (),
    device: str = "auto",
    threads: int = 0,
    cap_s: float = 0.0,
    cap_bytes: int = 0,
    effort: float = 1.0,
    out: str | Path | None = None,
    resume: bool = False,
    factory: str | Callable[..., Any] = "",
    tell: Callable[[Row], None] | None = None,
) -> Ladder:
    """Build, time and compare the ways to run a model, as ``headrace optimize`` does; prints nothing.

    Args:
        model: a Hugging Face directory or id, ``module:factory``, a TorchScript ``.pt``, an exported ``.pt2``; a
            function or class at the top of a module that makes a `torch.nn.Module`; or a `torch.nn.Module` as it is in
            memory, which the ladder's processes get through a private file, so its classes must stand in modules that
            can be imported.
        samples: a file of samples, or the inputs themselves: texts, numbers in lists or arrays, tensors, dictionaries
            of such by parameter.
        drift: ``module:function``, or a function at the top of a module, that measures drift instead of the task's
            measures: of two lists of arrays, wanted and found, it gives a dictionary of numbers, the less the better,
            which ``max_drift`` bounds.
        rungs: ids in a list or joined by commas; those that suit the machine when empty.
        cap_s, cap_bytes: time of a build or an answer, and memory of a process; 0 for the usual.
        out: directory for an artifact; without one, `Ladder.save` makes it.
        resume: keep the rows of an earlier climb to the same ``out``.
        factory: of a model that is an object: ``module:function``, or that function, which makes such a module with any
            weights. An artifact holds weights and no pickled code; without a factory only rungs that are exported
            (ort, openvino, aot) can be saved.
        tell: called with each row as it is done.

    Raises:
        ConfigError: an option is wrong, or the model cannot be handed to other processes.
        LoadError, InvalidInput, Unavailable: the model or the samples cannot be used.
    """
    if resume and out is None:
        raise ConfigError("there is nothing to resume without a directory", field="resume", hint="give out")
    folder = Path(tempfile.mkdtemp(prefix="headrace-ladder-"))
    try:
        target, instance = _target(model, folder, _name(factory, "factory"))
        wish = Wish(
            target,
            _samples(samples, folder),
            task=task,
            preset=preset,
            max_drift=dict(max_drift or {}),
            objective=objective,
            rungs=_rungs(rungs),
            device=device,
            threads=threads,
            cap_s=cap_s,
            cap_bytes=cap_bytes,
            effort=effort,
            drift=_name(drift, "drift"),
            instance=instance,
        )
        tell = tell or _say_nothing
        place = None if out is None else Path(out)
        if place is None:
            result = climb(wish, folder / "work", tell=tell)
        else:
            result = run.into(wish, place, resume=resume, tell=tell)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Ladder(result, folder, place)


def _say_nothing(row: Row) -> None:
    pass


def _rungs(wanted: str | Sequence[str]) -> list[str]:
    words = wanted.split(",") if isinstance(wanted, str) else wanted
    return [each.strip() for each in words if each.strip()]


def _target(model: Any, folder: Path, factory: str) -> tuple[str, Instance | None]:
    """What the ladder's processes open, and what it is called."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        return _hand_over(model, folder, factory)
    if factory:
        raise ConfigError("a factory is for a model that is an object", field="factory")
    if isinstance(model, (str, Path)):
        return str(model), None
    return _name(model, "model"), None


def _hand_over(model: Any, folder: Path, factory: str) -> tuple[str, Instance]:
    import torch

    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        raise ConfigError(
            "a TorchScript module cannot be handed over as an object",
            field="model",
            hint="torch.jit.save(model, 'model.pt'), and give that path",
        )
    for part in model.modules():
        _importable(type(part), "model")
    file = folder / "instance.pt"
    try:
        torch.save(model, file)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"the model cannot be handed to other processes: {type(error).__name__}: {error}", field="model", hint=_NAME
        ) from None
    path = [str(Path(each or ".").resolve()) for each in sys.path]
    kind = type(model)
    return f"{kind.__module__}.{kind.__qualname__}", Instance(str(file), path, factory)


_NAME = 'give "module:factory", a function that makes it'


def _name(thing: Any, field: str) -> str:
    """``module:name`` of something at the top of a module, or what is written so already."""
    if isinstance(thing, str):
        return thing
    if not callable(thing) or not hasattr(thing, "__qualname__"):
        raise ConfigError(
            f"{field} cannot be of type {type(thing).__name__}", field=field, hint='give "module:function"'
        )
    _importable(thing, field)
    return f"{thing.__module__}:{thing.__qualname__}"


def _importable(thing: Any, field: str) -> None:
    """Refuse what other processes could not import: what stands in the script itself, or in a function."""
    if thing.__module__ == "__main__":
        raise ConfigError(
            f"{thing.__qualname__} stands in the script itself, which the ladder's processes do not import",
            field=field,
            hint="move it to a module beside the script",
        )
    if "<" in thing.__qualname__:
        raise ConfigError(
            f"{thing.__qualname__} stands in a function, from which other processes cannot import it",
            field=field,
            hint="move it to the top of its module",
        )


def _samples(samples: str | Path | Iterable[Any], folder: Path) -> Path:
    """A file of samples. Raises `ConfigError`, which names the sample that is none."""
    if isinstance(samples, (str, Path)):
        return Path(samples)
    file = folder / "samples.jsonl"
    with file.open("wb") as lines:
        for number, sample in enumerate(samples):
            try:
                lines.write(msgspec.json.encode({"input": _plain(sample)}) + b"\n")
            except (TypeError, ValueError, msgspec.MsgspecError) as error:
                raise ConfigError(f"cannot be written down: {error}", field=f"samples[{number}]") from None
    return file


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists; what JSON has a word for, as it is."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).tolist()
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
