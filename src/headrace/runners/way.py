"""A model as one rung runs it: what drift is measured on, and what is timed, whether it encodes or goes on writing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from headrace.artifact import Subject
from headrace.errors import ConfigError, Unavailable
from headrace.runners import collate, engines, likelihood
from headrace.runners.collate import Array, Item
from headrace.runners.language import Language, left_padded
from headrace.runners.layouts import Layout, Padded, Ragged
from headrace.runners.recipe_words import BY_SHAPE, CACHES, COMPILE, GRAPHS, PACKED, REGIONAL, VARLEN

GENERATE = "generate"
# Of a text, the last tokens at which a language model's distributions are compared.
POSITIONS = 32
# What a served artifact writes at most.
MOST_TOKENS = 64
_NEW_TOKENS = {"cpu": 16, "cuda": 32}


class Way(Protocol):
    """One way to run a model.

    Args:
        size_bytes: of its files, or of the weights in memory.
        step_bytes: of weights that a language model reads for one token; 0 for others.
        lengths: to which batches are filled up, where it is compiled or captured by shape.
    """

    size_bytes: int
    step_bytes: int
    lengths: Sequence[int]

    def answer(self, items: Sequence[Item]) -> list[Array]:
        """What drift is measured on: an array for each item."""
        ...

    def work(self, items: Sequence[Item]) -> dict[str, float]:
        """Do for these items what is timed. What of that time is to be known apart is returned, in seconds."""
        ...


class Encoding:
    """A model that gives one answer for each item.

    Args:
        grouped: items of nearly one length are run together, group by group.
        layout: of an engine that is compiled or captured by shape.
    """

    step_bytes = 0

    def __init__(
        self, engine: engines.Engine, subject: Subject, grouped: bool, size_bytes: int, layout: Layout | None = None
    ) -> None:
        self.size_bytes = size_bytes
        self.lengths: Sequence[int] = layout.lengths() if layout else ()
        self._engine = engine
        self._subject = subject
        self._grouped = grouped

    def answer(self, items: Sequence[Item]) -> list[Array]:
        return collate.run(self._engine, items, self._subject, self._grouped)

    def work(self, items: Sequence[Item]) -> dict[str, float]:
        self.answer(items)
        return {}


class Writing:
    """A language model: its distributions are compared on the items' own tokens, and it is timed as it goes on.

    Args:
        new: tokens that are written after each item when it is timed.
    """

    def __init__(self, language: Language, new: int, size_bytes: int) -> None:
        self.language = language
        self.lengths: Sequence[int] = ()
        self.size_bytes = size_bytes
        self.step_bytes = language.step_bytes
        self._new = new

    def answer(self, items: Sequence[Item]) -> list[Array]:
        ids, pads = left_padded([item["input_ids"] for item in items])
        last = min(POSITIONS, ids.shape[1] - 1)
        logits = self.language.logits(ids, pads, last + 1)[:, :-1]
        found = []
        for row, item in enumerate(items):
            own = min(last, len(item["input_ids"]) - 1)
            found.append(likelihood.answer(logits[row, last - own :], ids[row, ids.shape[1] - own :]))
        return found

    def go_on(self, items: Sequence[Item]) -> list[Array]:
        """Tokens that follow each item, `MOST_TOKENS` of them."""
        ids, pads = left_padded([item["input_ids"] for item in items])
        return list(self.language.generate(ids, pads, MOST_TOKENS).tokens)

    def work(self, items: Sequence[Item]) -> dict[str, float]:
        ids, pads = left_padded([item["input_ids"] for item in items])
        made = self.language.generate(ids, pads, self._new)
        return {"prefill_s": made.prefill_s, "decode_s": made.decode_s, "steps": self._new - 1}


def of_module(module: Any, recipe: Sequence[str], device: str, subject: Subject) -> Way:
    """A torch module in float32, changed as the recipe says and moved to its device.

    Raises:
        Unavailable: a step cannot be done here, or not with this model; says why.
    """
    from headrace.runners import recipes

    words = list(recipe)
    if subject.task == GENERATE:
        return _writing(module, words, device)
    if cache := [word for word in words if word in CACHES]:
        raise Unavailable(f"{cache[0]} is for language models")
    module = recipes.apply(words, module, device)
    size = recipes.bytes_of(module)
    if GRAPHS in words:
        from headrace.runners.graphs import Captured

        layout: Layout = Ragged(subject) if VARLEN in words else Padded(subject)
        return Encoding(Captured(module, device, layout), subject, PACKED in words, size, layout)
    filled = None if BY_SHAPE.isdisjoint(words) else Padded(subject)
    engine = engines.module_engine(module, device, filled)
    return Encoding(engine, subject, PACKED in words, size, filled)


def _writing(module: Any, words: list[str], device: str) -> Way:
    from headrace.runners import recipes
    from headrace.runners.decoder import TorchLanguage

    encoding = {PACKED, VARLEN, REGIONAL, *BY_SHAPE}
    if left := [word for word in words if word in encoding]:
        raise Unavailable(f"{left[0]} is for models that encode; a step of a language model: kv-static+compile")
    caches = [word for word in words if word in CACHES] or ["kv-dynamic"]
    if len(caches) > 1:
        raise ConfigError(f"{' and '.join(caches)} exclude one another", field="rungs")
    if caches != ["kv-static"] and not {GRAPHS, COMPILE}.isdisjoint(words):
        raise Unavailable("a step is compiled, or captured, with a static cache only: kv-static+compile")
    if GRAPHS in words and not device.startswith("cuda"):
        raise Unavailable("graphs are captured on an NVIDIA GPU only")
    decoder = recipes.apply([word for word in words if word != COMPILE], module, device)
    language = TorchLanguage(
        decoder,
        device,
        caches[0],  # type: ignore[arg-type]  # one of `CACHES`
        compiled=COMPILE in words,
        captured=GRAPHS in words,
    )
    return Writing(language, _NEW_TOKENS[device.partition(":")[0]], recipes.bytes_of(decoder))


def of_files(kind: str, directory: Path, recipe: Sequence[str], device: str, threads: int, subject: Subject) -> Way:
    """What a rung was exported to: onnx, openvino or aot.

    Raises:
        Unavailable: the library for it is not installed.
    """
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if subject.task == GENERATE:
        from headrace.runners.decoder_onnx import OnnxLanguage

        return Writing(OnnxLanguage(directory, device, threads), _NEW_TOKENS[device.partition(":")[0]], size)
    if GRAPHS in recipe:
        from headrace.runners.graphs import Captured

        package = engines.open_aot(directory, device, threads, subject, captured=True)
        layout = Padded(subject)
        return Encoding(Captured(package, device, layout), subject, PACKED in recipe, size, layout)
    engine = engines.open_exported(kind, directory, device, threads, subject)
    return Encoding(engine, subject, PACKED in recipe, size)
