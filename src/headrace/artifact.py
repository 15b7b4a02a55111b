"""A model made fast, as a directory: its files, what it needs, what it was measured at, how to tell that it works.

Nothing in it is a pickle. `headrace.json` says the digest of every other file; what does not match is refused with
what to do. Knows nothing of how a model is run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from headrace.core import TextSpec
from headrace.errors import LoadError

MANIFEST = "headrace.json"
GOLDEN = "golden.npz"
SCHEMA = 1

Engine = Literal["torch", "onnx", "openvino", "aot"]


class TensorSpec(msgspec.Struct, frozen=True):
    """One input.

    Args:
        dtype: as numpy calls it.
        shape: of one item; 0 where items differ.
        pad: what a shorter item is filled up with.
        mask: it says which tokens are real, and is made where an item does not bring it.
        below: its values are numbers of rows of a table with so many, as token ids are; 0 where they are not.
    """

    name: str
    dtype: str
    shape: list[int]
    pad: float = 0
    mask: bool = False
    below: int = 0

    @property
    def ragged(self) -> bool:
        """Whether items differ in length along their first dimension."""
        return bool(self.shape) and self.shape[0] == 0


class Subject(msgspec.Struct, frozen=True):
    """What is known of a model however it is run.

    Args:
        target: what it was made from.
        labels: names of a classifier's classes.
        activation: what makes scores of a classifier's logits: softmax, sigmoid or none.
        text: how texts become token ids; its tokenizer's path is relative to the artifact. ``None`` for models that
            take tensors.
        width: of an embedding.
        named: items are objects of tensors, not a bare tensor.
        ends: tokens at which what a language model writes is over.
    """

    target: str
    task: str
    inputs: list[TensorSpec]
    labels: list[str] = []
    activation: str = "softmax"
    text: TextSpec | None = None
    width: int = 0
    named: bool = True
    ends: list[int] = []


class FileDigest(msgspec.Struct, frozen=True):
    sha256: str
    size: int


class Requires(msgspec.Struct, frozen=True):
    """What a machine must have to run it.

    Args:
        isa: instruction sets, as Linux names them.
        packages: name to the version it was made with, of which the first two numbers must agree; "" where any will do.
        device: cpu or cuda; "" where any will do.
        capability: of the GPU, such as 9.0: the least, and for compiled code the only one.
    """

    isa: list[str] = []
    packages: dict[str, str] = {}
    device: str = ""
    capability: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``headrace.json``.

    Args:
        recipe: what is done to a torch module as it is loaded, in order.
        budget: the most that outputs may drift from the golden ones, by measure.
        fallback: subdirectories with other ways to run the model, tried in order where this one is refused.
        measured: the row of the report that it was chosen by.
    """

    schema: int = SCHEMA
    rung: str
    engine: Engine
    subject: Subject
    recipe: list[str] = []
    threads: int = 0
    requires: Requires = Requires()
    budget: dict[str, float] = {}
    measured: dict[str, Any] = {}
    fallback: list[str] = []
    files: dict[str, FileDigest] = {}
    headrace: str = ""


def write(directory: Path, manifest: Manifest) -> Manifest:
    """Complete a directory: take the digests of its files and write the manifest, last."""
    others = [directory / name for name in manifest.fallback]  # each has a manifest of its own
    files = {
        str(path.relative_to(directory)): FileDigest(_digest(path), path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not any(map(path.is_relative_to, others))
    }
    manifest = msgspec.structs.replace(manifest, files=files)
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
    return manifest


def is_artifact(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def read(directory: Path) -> Manifest:
    """The manifest of a directory whose files are all there and unchanged.

    Raises:
        LoadError: as `parse` and `verify` do.
    """
    manifest = parse(directory)
    verify(directory, manifest)
    return manifest


def parse(directory: Path) -> Manifest:
    """The manifest alone: it says what there is to fall back to where a file is broken.

    Raises:
        LoadError: it cannot be read, is of another schema, or names something outside the directory.
    """
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
        schema = msgspec.json.decode(content, type=dict[str, Any]).get("schema")
        if schema != SCHEMA:
            raise LoadError(
                f"{path} is of schema {schema}, this headrace reads {SCHEMA}",
                field="target",
                hint="make the artifact again: headrace optimize TARGET --out DIR",
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}", field="target", hint=_AGAIN) from None
    except msgspec.DecodeError as error:
        raise LoadError(f"{path} is no manifest: {error}", field="target", hint=_AGAIN) from None
    named = [*manifest.files, *manifest.fallback, *([manifest.subject.text.tokenizer] if manifest.subject.text else [])]
    for name in map(PurePosixPath, named):
        if name.is_absolute() or ".." in name.parts:
            raise LoadError(f"{path} names {name}, which is outside its directory", field="target", hint=_AGAIN)
    return manifest


def verify(directory: Path, manifest: Manifest) -> None:
    """Compare a directory's files with its manifest.

    Raises:
        LoadError: names the file that is missing or not what it was.
    """
    for name, known in manifest.files.items():
        file = directory / name
        try:
            if file.stat().st_size == known.size and _digest(file) == known.sha256:
                continue
        except FileNotFoundError:
            raise LoadError(f"{directory} lacks its file {name}", field="target", hint=_AGAIN) from None
        except OSError as error:
            raise LoadError(f"cannot read {file}: {error.strerror}", field="target", hint=_AGAIN) from None
        raise LoadError(f"{file} is not the file that was made", field="target", hint=_AGAIN)


_AGAIN = "copy the whole directory again, or make it again with headrace optimize"


def check_machine(
    manifest: Manifest,
    *,
    packages: Mapping[str, str],
    device: str = "cpu",
    capability: str = "",
    isa: set[str] | None = None,
) -> None:
    """Refuse what this machine cannot run, before it is tried: an instruction that is not there ends the process.

    Args:
        packages: versions of the packages here, see `installed`.
        device: where it is to run, such as cuda:0.
        capability: of that GPU.
        isa: instruction sets of this processor, this machine's own by default.

    Raises:
        LoadError: says what is missing or other than it was.
    """
    needed = manifest.requires
    missing = sorted(set(needed.isa) - (processor_flags() if isa is None else isa))
    if missing:
        raise LoadError(f"this artifact needs a processor with {', '.join(missing)}", field="target", hint=_HERE)
    for name, version in needed.packages.items():
        _check_package(name, version, packages.get(name))
    if needed.device and device.partition(":")[0] != needed.device:
        raise LoadError(
            f"this artifact was made for {needed.device} and is to run on {device}",
            field="device",
            hint=f"--device {needed.device}, or headrace optimize --device {device}",
        )
    if needed.capability and not _fits(capability, needed.capability, exactly=manifest.engine == "aot"):
        raise LoadError(
            f"this artifact needs a GPU of compute capability {needed.capability}, here is {capability or 'none'}",
            field="device",
            hint=_HERE,
        )


_HERE = "run headrace optimize on this machine, or serve it on one like that it was made on"


def _check_package(name: str, version: str, here: str | None) -> None:
    exactly = f"{name}=={version.partition('+')[0]}" if version else name  # no index has a build's local part
    if here is None:
        raise LoadError(f"this artifact needs {name}", field="target", hint=f"pip install '{exactly}'")
    if version and here.split(".")[:2] != version.split(".")[:2]:
        raise LoadError(
            f"this artifact was made with {name} {version}, here is {here}",
            field="target",
            hint=f"pip install '{exactly}', or run headrace optimize again",
        )


def _fits(here: str, needed: str, exactly: bool) -> bool:
    have, want = ([int(part) for part in each.split(".")] if each else [] for each in (here, needed))
    return have == want if exactly else have >= want


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of packages, by the name that they are imported by; those that are not there are left out."""
    found = {}
    owners: Mapping[str, list[str]] | None = None
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # The builds of ONNX Runtime for other devices have names of their own.
            owners = importlib.metadata.packages_distributions() if owners is None else owners
            if name in owners:
                found[name] = importlib.metadata.version(owners[name][0])
    return found


def processor_flags() -> set[str]:
    """Instruction sets of this machine's processor, as Linux names them; the architecture alone elsewhere."""
    found = {platform.machine()}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return found | set(value.split())
    except OSError:
        pass
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
