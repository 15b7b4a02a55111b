"""A model made fast, as a directory: its files, what it needs, what it was measured at, how to tell that it works.

Nothing in it is a pickle. `headrace.json` says the digest of every other file; what does not match is refused with
what to do. Knows nothing of how a model is run.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
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
    """

    name: str
    dtype: str
    shape: list[int]
    pad: float = 0
    mask: bool = False

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
    """

    target: str
    task: str
    inputs: list[TensorSpec]
    labels: list[str] = []
    activation: str = "softmax"
    text: TextSpec | None = None
    width: int = 0
    named: bool = True


class FileDigest(msgspec.Struct, frozen=True):
    sha256: str
    size: int


class Requires(msgspec.Struct, frozen=True):
    """What a machine must have to run it: instruction sets, packages with their versions, a kind of device.

    ``packages`` maps a name to the version it was made with; the first two numbers must agree.
    """

    isa: list[str] = []
    packages: dict[str, str] = {}
    device: str = "cpu"
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
        LoadError: names the file that is missing or not what it was, or what the manifest lacks.
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
        raise LoadError(f"cannot read {path}: {error.strerror}", field="target") from None
    except msgspec.DecodeError as error:
        raise LoadError(f"{path} is no manifest: {error}", field="target", hint=_AGAIN) from None
    for name, known in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise LoadError(f"{directory} lacks its file {name}", field="target", hint=_AGAIN)
        if file.stat().st_size != known.size or _digest(file) != known.sha256:
            raise LoadError(f"{file} is not the file that was made", field="target", hint=_AGAIN)
    return manifest


_AGAIN = "copy the whole directory again, or make it again with headrace optimize"


def check_machine(manifest: Manifest, packages: dict[str, str], isa: set[str] | None = None) -> None:
    """Refuse what this machine cannot run, before it is tried: an instruction that is not there ends the process.

    Args:
        packages: versions of the packages here; those that are not installed are left out.
        isa: instruction sets of this processor, this machine's own by default.

    Raises:
        LoadError: says what is missing or other than it was.
    """
    needed = manifest.requires
    missing = sorted(set(needed.isa) - (processor_flags() if isa is None else isa))
    if missing:
        raise LoadError(
            f"this artifact needs a processor with {', '.join(missing)}",
            field="target",
            hint="run headrace optimize on this machine, or on one like it",
        )
    for name, version in needed.packages.items():
        here = packages.get(name)
        if here is None:
            raise LoadError(f"this artifact needs {name}", field="target", hint=f"pip install '{name}=={version}'")
        if here.split(".")[:2] != version.split(".")[:2]:
            raise LoadError(
                f"this artifact was made with {name} {version}, here is {here}",
                field="target",
                hint=f"pip install '{name}=={version}', or run headrace optimize again",
            )


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
