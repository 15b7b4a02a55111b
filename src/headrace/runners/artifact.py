"""An artifact's directory as a model to serve; without torch where its engine needs none.

It is refused unless its files are what they were, this machine is one that it can run on, and it still answers the
golden items as it did. What is refused has fallbacks, each an artifact of its own, tried in order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from headrace import artifact
from headrace.artifact import Manifest, Subject, TensorSpec
from headrace.config import ModelConfig
from headrace.core import ModelInfo
from headrace.errors import ConfigError, HeadraceError, InvalidInput, LoadError
from headrace.runners import Loaded, collate, drift, huggingface, text
from headrace.runners.collate import Array, Item
from headrace.runners.devices import require_torch
from headrace.runners.way import GENERATE, Way, Writing, of_files, of_module

_log = logging.getLogger(__name__)

# Of a torch artifact: a Hugging Face directory, a file of torch's own, or the weights of what a factory makes.
MODEL = "model"
WEIGHTS = "weights.safetensors"
_ARCHIVE = "archive"
_PLATFORMS = {"onnx": "onnxruntime", "openvino": "openvino", "aot": "aotinductor"}


def open_artifact(config: ModelConfig, device: str) -> Loaded:
    """Load an artifact, or the first of its fallbacks that can be used; a warning says which, and why.

    Raises:
        LoadError: none can be used; says why of each.
        ConfigError: it is asked for another task than it was made for.
    """
    root = Path(config.target).expanduser().resolve()
    refused: list[HeadraceError] = []
    for directory in [root, *(root / name for name in artifact.parse(root).fallback)]:
        try:
            found, rung = _open(directory, config, device)
        except ConfigError:
            raise
        except Exception as error:  # engines and what they load raise whatever they like
            refused.append(_reason(directory, error))
            continue
        if refused:
            _log.warning(
                "%s: %s; using its fallback %s (%s), which may be slower; to have the first again, mend what is named",
                config.name,
                "; ".join(map(_in_words, refused)),
                directory.relative_to(root),
                rung,
            )
        return found
    if len(refused) == 1:
        raise refused[0]
    raise LoadError(
        f"nothing of {root} can be used: " + "; ".join(map(_in_words, refused)),
        field="target",
        hint="mend one of them, or run headrace optimize on this machine",
    )


def _reason(directory: Path, error: Exception) -> HeadraceError:
    if isinstance(error, HeadraceError):
        return error
    lines = str(error).strip().splitlines() or ["without a word"]
    return LoadError(
        f"{directory} cannot be run here: {type(error).__name__}: {lines[0][:500]}",
        field="target",
        hint="run headrace optimize on this machine",
    )


def _in_words(error: HeadraceError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message


def _open(directory: Path, config: ModelConfig, device: str) -> tuple[Loaded, str]:
    manifest = artifact.read(directory)
    if config.task not in ("auto", manifest.subject.task):
        raise ConfigError(
            f"{config.target} was made for {manifest.subject.task}, not for {config.task}",
            field="task",
            hint="leave --task out, or run headrace optimize --task " + config.task,
        )
    if manifest.requires.device == "cpu" and config.device == "auto":
        device = "cpu"  # a GPU that happens to be there is not what it was made for
    runner = _Runner(directory, manifest, device)
    broken = drift.breaches(_test(directory, manifest, runner), manifest.budget)
    if broken:
        raise LoadError(
            f"{directory} does not answer here as it did: {broken}",
            field="target",
            hint="run headrace optimize on this machine",
        )
    _log.info("%s runs as %s, by %s", config.name, manifest.rung, manifest.engine)
    return _loaded(directory, manifest, runner, config, device), manifest.rung


def self_test(directory: Path, device: str) -> dict[str, float]:
    """Open one artifact, without its fallbacks, and measure its drift from the golden answers, whatever is allowed.

    Raises:
        LoadError: it cannot be used here.
    """
    manifest = artifact.read(directory)
    return _test(directory, manifest, _Runner(directory, manifest, device))


def _test(directory: Path, manifest: Manifest, runner: _Runner) -> dict[str, float]:
    """Drift as the ladder measures it: of answers to items alone. Those of a batch only where a bound is for them."""
    items, wanted = read_golden(directory)
    found = [runner.way.answer([item])[0] for item in items]
    measured = drift.drift(manifest.subject.task, wanted, found, manifest.subject.activation)
    if any(name.startswith("batch_") for name in manifest.budget):
        measured |= drift.batch_drift(found, runner.way.answer(items), manifest.subject.task)
    return measured


def write_golden(directory: Path, items: Sequence[Item], outputs: Sequence[Any]) -> None:
    """Keep items, and what the model as it is answers to them, as ``in.N.NAME`` and ``out.N`` of one file."""
    found: dict[str, Any] = {}
    for number, (item, output) in enumerate(zip(items, outputs, strict=True)):
        found |= {f"in.{number}.{name}": array for name, array in item.items()}
        found[f"out.{number}"] = np.asarray(output, np.float32)
    np.savez(directory / artifact.GOLDEN, **found)


def read_golden(directory: Path) -> tuple[list[Item], list[Array]]:
    """The items, and the answers that are wanted of them."""
    with np.load(directory / artifact.GOLDEN, allow_pickle=False) as file:
        outputs = [file[f"out.{number}"] for number in range(sum(name.startswith("out.") for name in file.files))]
        items: list[Item] = [{} for _ in outputs]
        for key in file.files:
            if key.startswith("in."):
                number, _, name = key.removeprefix("in.").partition(".")
                items[int(number)][name] = file[key]
    return items, outputs


class _Runner:
    """Runs batches of prepared items on the artifact's engine; answers are arrays."""

    def __init__(self, directory: Path, manifest: Manifest, device: str) -> None:
        needed = manifest.requires
        capability = _capability(device) if needed.capability else ""
        artifact.check_machine(
            manifest, packages=artifact.installed(needed.packages), device=device, capability=capability
        )
        self._subject = manifest.subject
        self.way = _way(directory, manifest, device)

    def load(self, device: str) -> None:
        """It is where it is to run already."""

    def run(self, inputs: list[Any]) -> list[Any]:
        items = [collate.as_item(self._subject, each) for each in inputs]
        return self.way.go_on(items) if isinstance(self.way, Writing) else self.way.answer(items)


def _capability(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    require_torch()
    import torch

    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def _way(directory: Path, manifest: Manifest, device: str) -> Way:
    # A worker's share of the cores, where there is one; else as many as it was measured with.
    share = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    threads = int(share) if share.isdigit() else manifest.threads
    if manifest.engine == "torch":
        require_torch()
        return of_module(_module(directory, manifest), manifest.recipe, device, manifest.subject)
    return of_files(manifest.engine, directory, manifest.recipe, device, threads, manifest.subject)


def archived(file: Path) -> str:
    """Where an artifact keeps the file that its module is read from."""
    return f"{MODEL}/{_ARCHIVE}{file.suffix}"


def _module(directory: Path, manifest: Manifest) -> Any:
    """The model as it is, of the artifact's own weights."""
    from headrace.runners.subject import open_subject

    subject = manifest.subject
    if subject.text:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        return open_subject(str(directory / MODEL), subject.task, []).module
    items, _ = read_golden(directory)
    if found := [name for name in manifest.files if name.startswith(f"{MODEL}/{_ARCHIVE}.")]:
        return open_subject(str(directory / found[0]), subject.task, list(items)).module
    from safetensors.torch import load_model

    opened = open_subject(subject.target, subject.task, list(items))
    load_model(opened.module, directory / MODEL / WEIGHTS)
    return opened.module


def _loaded(directory: Path, manifest: Manifest, runner: _Runner, config: ModelConfig, device: str) -> Loaded:
    subject = manifest.subject
    if subject.text is None:
        return _of_tensors(directory, manifest, runner, config, device)
    spec = msgspec.structs.replace(
        subject.text,
        tokenizer=str(directory / subject.text.tokenizer),
        max_tokens=min(subject.text.max_tokens, config.max_batch_tokens),
    )
    text.TextPreparer(spec)  # front ends make their own; what is wrong with it must be said at load
    info = ModelInfo(
        name=config.name,
        task=subject.task,
        platform=_platform(manifest),
        device=device,
        item_schema=msgspec.json.encode({"type": "string", "maxLength": config.max_input_chars}),
        output_schema=msgspec.json.encode(huggingface.OUTPUT_SCHEMAS[subject.task]),
        text=spec,
        width=subject.width,
    )
    ids = np.arange(spec.max_tokens, dtype=np.int32) % max(1, spec.vocabulary // 2)
    finish: Callable[[Any], Any] = np.asarray
    if subject.task == "classify":
        finish = _classify(subject)
    elif subject.task == GENERATE:
        finish = _write(subject, spec.tokenizer)
    lengths = [length for length in runner.way.lengths if length <= spec.max_tokens]
    return Loaded(runner, info, cost=text.cost, finish=finish, example=lambda length: ids[:length], lengths=lengths)


def _platform(manifest: Manifest) -> str:
    """What runs it."""
    return _PLATFORMS.get(manifest.engine, "transformers" if manifest.subject.text else "pytorch")


def _classify(subject: Subject) -> Callable[[Any], dict[str, Any]]:
    """Logits to scores by label, as for a model that was not made fast."""

    def classify(logits: Array) -> dict[str, Any]:
        row = drift.shares(logits, subject.activation).tolist()
        best = max(range(len(row)), key=row.__getitem__)
        scores = dict(zip(subject.labels, row, strict=True))
        return {"label": subject.labels[best], "score": row[best], "scores": scores}

    return classify


def _write(subject: Subject, tokenizer: str) -> Callable[[Any], dict[str, Any]]:
    """Tokens that were written to their text, up to the one that ends it."""
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(tokenizer)

    def write(tokens: Array) -> dict[str, Any]:
        (ended,) = np.nonzero(np.isin(tokens, subject.ends))
        own = tokens[: ended[0]] if len(ended) else tokens
        return {"text": words.decode(own.tolist()), "tokens": len(own)}

    return write


def _of_tensors(directory: Path, manifest: Manifest, runner: _Runner, config: ModelConfig, device: str) -> Loaded:
    subject = manifest.subject
    info = ModelInfo(
        name=config.name,
        task="custom",
        platform=_platform(manifest),
        device=device,
        item_schema=msgspec.json.encode(_schema(subject)),
        tensors=True,
    )
    items, _ = read_golden(directory)

    def example(wanted: int) -> Item:
        return min(items, key=lambda item: abs(collate.length(item, subject) - wanted))

    return Loaded(
        runner,
        info,
        prepare=lambda value: prepare(subject, value),
        cost=lambda item: collate.length(item, subject),
        finish=np.asarray,
        example=example,
    )


def _schema(subject: Subject) -> dict[str, Any]:
    tensor: dict[str, Any] = {"type": ["array", "number"]}
    wanted = [spec.name for spec in subject.inputs if not spec.mask]
    named: dict[str, Any] = {
        "type": "object",
        "properties": {spec.name: tensor for spec in subject.inputs},
        "required": wanted,
        "additionalProperties": False,
    }
    return {"anyOf": [tensor, named]} if len(wanted) == 1 else named


def prepare(subject: Subject, value: Any) -> Item:
    """One item as clients may write it → arrays as the model takes them. A bare tensor is the only input there is.

    Raises:
        InvalidInput: names the tensor: unknown, missing, of another shape or kind, or with ids outside its table.
    """
    wanted = [spec.name for spec in subject.inputs if not spec.mask]
    if not isinstance(value, dict):
        if len(wanted) > 1:
            raise InvalidInput(f"must be an object of {', '.join(wanted)}", field="input")
        (spec,) = (spec for spec in subject.inputs if not spec.mask)
        return {spec.name: _tensor(value, spec, "input")}
    specs = {spec.name: spec for spec in subject.inputs}
    for name in value:
        if name not in specs:
            raise InvalidInput(f"the model takes {', '.join(specs)}", field=f"input.{name}")
    for name in wanted:
        if name not in value:
            raise InvalidInput("missing", field=f"input.{name}")
    item = {name: _tensor(each, specs[name], f"input.{name}") for name, each in value.items()}
    size = collate.length(item, subject)
    for name, array in item.items():
        if specs[name].ragged and len(array) != size:
            raise InvalidInput(f"has {len(array)} entries where others have {size}", field=f"input.{name}")
    return item


def _tensor(value: Any, spec: TensorSpec, field: str) -> Array:
    try:
        array = np.asarray(value)
    except ValueError:
        raise InvalidInput("rows differ in length: not a tensor", field=field) from None
    if array.ndim == len(spec.shape) + 1 and spec.ragged and array.shape[0] == 1:
        array = array[0]  # tokenizers return one text as a batch of one
    if len(spec.shape) != array.ndim or any(a and a != b for a, b in zip(spec.shape, array.shape, strict=True)):
        shape = ", ".join(str(each or "any") for each in spec.shape)
        raise InvalidInput(f"has shape {list(array.shape)}, the model takes [{shape}]", field=field)
    if not array.size:
        raise InvalidInput("is empty", field=field)
    whole = np.dtype(spec.dtype).kind in "iub"
    if array.dtype.kind not in ("iub" if whole else "iubf"):
        raise InvalidInput("must be whole numbers" if whole else "must be numbers", field=field)
    if whole and array.dtype.kind == "u" and int(array.max()) > np.iinfo(np.int64).max:
        raise InvalidInput("integers must fit in 64 bits with a sign", field=field)
    # On a GPU an id without a row ends the process, elsewhere the answer may be anything.
    if spec.below and not 0 <= int(array.min()) <= int(array.max()) < spec.below:
        raise InvalidInput(f"ids go from 0 to {spec.below - 1}", field=field)
    with np.errstate(over="ignore"):
        return array.astype(spec.dtype)
