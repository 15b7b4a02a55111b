"""Models in files of torch's own: TorchScript (`torch.jit.save`) and exported programs (`torch.export.save`).

Both are programs, to be taken from whom one trusts; neither is unpickled here. A pickled checkpoint, which can run any
code as it is read, is refused, and so is an exported program with a pickled part.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import msgspec

from headrace.errors import LoadError, Unavailable

SCRIPTED = {".pt", ".ts"}
EXPORTED = {".pt2"}
_NOT_PICKLED = "save it with torch.export.save(torch.export.export(model, example, dynamic_shapes=…), path)"


def is_archive(target: str) -> bool:
    """Whether a target is the path of such a file, whether or not it is there."""
    path = Path(target).expanduser()
    return path.suffix in SCRIPTED | EXPORTED and (path.is_file() or ":" not in target)


def read_scripted(path: Path) -> Any:
    """The `torch.jit.ScriptModule` of a file, on the CPU.

    Raises:
        LoadError: there is no such file, or it is something else.
    """
    import torch

    if not path.exists():
        raise LoadError(f"there is no file {path}", field="target")
    if not any("/code/" in name for name in _names(path)):
        raise LoadError(
            f"{path} is not a TorchScript archive (a pickled checkpoint is never loaded)",
            field="target",
            hint="save it with torch.jit.save(torch.jit.trace(model, example), path), or give module:factory",
        )
    with warnings.catch_warnings():
        # torch announces TorchScript's retirement at every load; the user's file is TorchScript all the same.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.jit.load(str(path), map_location="cpu")
        except RuntimeError as error:
            raise LoadError(f"cannot load {path}: {error}", field="target") from error


def read_exported(path: Path) -> Any:
    """The `torch.export.ExportedProgram` of a file.

    Raises:
        LoadError: there is no such file, it is something else, or a part of it is pickled.
    """
    import torch

    if not path.exists():
        raise LoadError(f"there is no file {path}", field="target")
    names = _names(path)
    if any("/data/aotinductor/" in name for name in names):
        raise LoadError(f"{path} is compiled already", field="target", hint=f"give what it was made of, or {_OR}")
    if not any(name.endswith("/models/model.json") for name in names):
        raise LoadError(f"{path} is not an exported program", field="target", hint=_NOT_PICKLED)
    _refuse_pickles(path, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reader's notes to its own developers
        try:
            return torch.export.load(path)
        except Exception as error:  # the reader raises whatever it meets
            raise LoadError(f"cannot load {path}: {type(error).__name__}: {_first(error)}", field="target") from error


_OR = _NOT_PICKLED.replace("save it with", "a file made with")


def _names(path: Path) -> list[str]:
    """What is in the file; nothing if it is no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return []


def _refuse_pickles(path: Path, names: list[str]) -> None:
    """torch's reader unpickles what says that it is pickled: weights of special kinds, constants that are objects, and
    example inputs that hold more than tensors."""
    import torch

    with zipfile.ZipFile(path) as archive:
        for name in names:
            if name.endswith("_config.json") and "/data/" in name:
                try:
                    entries = msgspec.json.decode(archive.read(name), type=_Config).config
                except msgspec.DecodeError as error:
                    raise LoadError(f"{path}: {name} cannot be read: {error}", field="target") from None
                for part, entry in entries.items():
                    if entry.use_pickle or not entry.path_name.startswith(("weight_", "tensor_")):
                        raise _pickled(path, part)
            elif "/data/sample_inputs/" in name:
                try:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                except Exception:  # whatever it is: it is no plain tensors
                    raise _pickled(path, "its example inputs") from None


class _Entry(msgspec.Struct):
    path_name: str
    use_pickle: bool


class _Config(msgspec.Struct):
    config: dict[str, _Entry]


def _pickled(path: Path, part: str) -> LoadError:
    return LoadError(
        f"{path}: {part} is pickled, and what is pickled is never loaded",
        field="target",
        hint="export a module whose weights, constants and example inputs are plain tensors, or give module:factory",
    )


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["without a word"])[0][:300]


def as_exported(script: Any, example: tuple[Any, ...]) -> Any:
    """A TorchScript module as an exported program, whose sizes may differ from the example's.

    Raises:
        Unavailable: the converter does not know something of it.
    """
    from torch._export.converter import TS2EPConverter

    try:
        return TS2EPConverter(script, example).convert()
    except Exception as error:  # the converter raises whatever it meets
        raise Unavailable(
            f"this TorchScript archive cannot be exported: {type(error).__name__}: {_first(error)}",
            hint="give module:factory, which has the module itself",
        ) from None
