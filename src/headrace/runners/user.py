"""The user's own class or function as a runner.

The types of ``run`` become the JSON Schema that front ends validate with, and items are converted to them here. This
file imports torch only if the user's module already has.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
import pydantic

from headrace.config import ModelConfig
from headrace.core import ModelInfo, Runner
from headrace.errors import InvalidInput, LoadError
from headrace.runners import Loaded

_ANYTHING_BUT_NULL: dict[str, Any] = {"not": {"type": "null"}}
_ARRAY: dict[str, Any] = {"type": ["array", "number"]}


def open_user(config: ModelConfig, device: str) -> Loaded:
    """Import ``module:callable`` (the current directory first) and load it."""
    thing = _instantiate(import_target(config.target), config.target)
    if _is_torch_module(thing):
        from headrace.runners.module import open_module

        return open_module(config, thing, device)
    runner = as_runner(thing, config.target)
    item_type, output_type = _annotations(runner.run)
    runner.load(device)
    own = getattr(runner, "prepare", None)
    item_schema, convert = _reader(item_type, has_own=own is not None)

    def prepare(item: Any) -> Any:
        return own(convert(item)) if own else convert(item)

    info = ModelInfo(
        name=config.name,
        task="custom",
        platform="python",
        device=device,
        item_schema=msgspec.json.encode(item_schema),
        output_schema=msgspec.json.encode(_schema(_adapter(output_type), "serialization")),
        streams=hasattr(runner, "stream"),
    )
    parts: dict[str, Any] = {
        name: getattr(runner, name) for name in ("cost", "finish", "stream") if hasattr(runner, name)
    }
    if config.example:
        example = prepare(_example(config))
        parts["example"] = lambda length: example
    return Loaded(runner, info, prepare=prepare, **parts)


def import_target(target: str) -> Any:
    """The object that ``module:attribute`` names."""
    module_name, _, attribute = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name.removesuffix(".py"))
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise LoadError(
                f"there is no module {module_name!r}",
                field="target",
                hint=f"looked in {here} and in installed packages",
            ) from None
        raise
    except AttributeError:
        raise LoadError(f"{module_name} has no {attribute!r}", field="target") from None
    return found


class _FunctionRunner:
    """A plain function list → list."""

    def __init__(self, function: Callable[[list[Any]], list[Any]]) -> None:
        self.run = function

    def load(self, device: str) -> None:
        """Nothing to load: the function's module is imported already."""


def _instantiate(thing: Any, target: str) -> Any:
    """Call what must be called to get a runner: a class, or a factory without parameters."""
    if not callable(thing) or _is_torch_module(thing):
        return thing
    if not inspect.isclass(thing):
        if hasattr(thing, "run"):
            return thing
        required = [
            parameter
            for parameter in inspect.signature(thing).parameters.values()
            if parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_KEYWORD,)
        ]
        if required:
            return thing
    try:
        return thing()
    except TypeError as error:
        raise LoadError(f"{target} cannot be made without arguments: {error}", field="target") from error


def as_runner(thing: Any, target: str) -> Runner:
    """Something with ``run`` as it is, a function list → list wrapped.

    Raises:
        LoadError: it is neither, or its ``run`` is async.
    """
    run = getattr(thing, "run", None)
    if run is None and hasattr(thing, "stream"):
        thing.run = run = _collect(thing.stream)
    if run is None:
        if not callable(thing):
            raise LoadError(
                f"{target} is a {type(thing).__name__}, neither a function nor something with run()", field="target"
            )
        thing = _FunctionRunner(thing)
        run = thing.run
    if inspect.iscoroutinefunction(run):
        raise LoadError(f"{target}: run must be an ordinary function, not async", field="target")
    if not hasattr(thing, "load"):
        thing.load = lambda device: None
    return cast(Runner, thing)


def _collect(stream: Callable[[list[Any]], Iterable[list[Any]]]) -> Callable[[list[Any]], list[Any]]:
    """``run`` of a model that has only ``stream``: the chunks of each item as a list."""

    def run(inputs: list[Any]) -> list[Any]:
        answers: list[Any] = [[] for _ in inputs]
        for chunks in stream(inputs):
            for index, chunk in enumerate(chunks):
                if isinstance(chunk, BaseException):
                    answers[index] = chunk
                elif chunk is not None and isinstance(answers[index], list):
                    answers[index].append(chunk)
        return answers

    run.__annotations__["inputs"] = typing.get_type_hints(stream).get("inputs", list[Any])
    return run


def _is_torch_module(thing: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(thing, torch.nn.Module)


def _annotations(run: Callable[..., Any]) -> tuple[Any, Any]:
    """Types of one input and one output of ``run(inputs: list[I]) -> list[O]``; `Any` where it does not say."""
    # Neither a partial nor an object that can be called has hints of its own.
    written: Any = run.func if isinstance(run, functools.partial) else run
    if not inspect.isroutine(written):
        written = written.__call__
    try:
        hints = typing.get_type_hints(written, include_extras=True)
    except NameError:
        return Any, Any
    output = hints.pop("return", Any)
    parameters = [name for name in inspect.signature(run).parameters if name in hints]
    return _element(hints[parameters[0]] if parameters else Any), _element(output)


def _element(kind: Any) -> Any:
    arguments = typing.get_args(kind)
    return arguments[0] if typing.get_origin(kind) in (list, typing.List) and arguments else Any  # noqa: UP006 - seen in users' code


def _reader(kind: Any, has_own: bool) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """The JSON Schema of one item, and what makes a ``kind`` of what the client wrote.

    Arrays and images are left to a ``prepare`` of the user's own, if there is one.
    """
    if not has_own and np.ndarray in (kind, typing.get_origin(kind)):
        return _ARRAY, _to_array
    if not has_own and _is_image(kind):
        return _schema(pydantic.TypeAdapter(bytes)), _to_image
    adapter = _adapter(kind)
    if adapter is None:
        return _ANYTHING_BUT_NULL, lambda item: item
    return _schema(adapter), functools.partial(_validate, adapter)


def _adapter(kind: Any) -> pydantic.TypeAdapter[Any] | None:
    """What pydantic knows of a type; ``None`` for one that it cannot describe, which may then be anything."""
    if kind is Any:
        return None
    try:
        return pydantic.TypeAdapter(kind)
    except pydantic.errors.PydanticUserError:  # PydanticSchemaGenerationError is one, too
        return None


def _schema(
    adapter: pydantic.TypeAdapter[Any] | None, mode: Literal["validation", "serialization"] = "validation"
) -> dict[str, Any]:
    try:
        return adapter.json_schema(mode=mode) if adapter else {}
    except pydantic.errors.PydanticInvalidForJsonSchema:
        return {}


def _validate(adapter: pydantic.TypeAdapter[Any], item: Any) -> Any:
    """Raises `InvalidInput`, which names the place inside the item."""
    try:
        return adapter.validate_python(item)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        raise InvalidInput(first["msg"], field=f"input{where}") from None


def _to_array(item: Any) -> np.ndarray[Any, Any]:
    """Raises `InvalidInput` for ragged lists and for what is no number."""
    if isinstance(item, np.ndarray):
        return item
    try:
        array = np.asarray(item)
    except ValueError:
        raise InvalidInput("rows differ in length: not an array", field="input") from None
    if array.dtype.kind not in "biuf":
        raise InvalidInput("must be numbers", field="input")
    return array


def _is_image(kind: Any) -> bool:
    """Pillow is no dependency of ours: it is looked at only where the user's type comes from it."""
    if not inspect.isclass(kind) or kind.__module__.partition(".")[0] != "PIL":
        return False
    return issubclass(kind, importlib.import_module("PIL.Image").Image)


def _to_image(item: Any) -> Any:
    """Decode the bytes of an image file.

    Raises:
        InvalidInput: they are none, or hold more pixels than Pillow's ``MAX_IMAGE_PIXELS``.
    """
    pillow: Any = importlib.import_module("PIL.Image")
    if not isinstance(item, bytes):
        raise InvalidInput("not an image: send the bytes of an image file", field="input")
    too_large = InvalidInput("the image has too many pixels", field="input")
    try:
        image = pillow.open(io.BytesIO(item))
        # Pillow itself only warns up to twice its limit. This looks at the header: nothing is decoded yet.
        if pillow.MAX_IMAGE_PIXELS is not None and image.width * image.height > pillow.MAX_IMAGE_PIXELS:
            raise too_large
        image.load()
    except (InvalidInput, pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        raise too_large from None
    except Exception:  # decoders raise SyntaxError, struct.error, EOFError and more
        raise InvalidInput("not an image", field="input") from None
    return image


def _example(config: ModelConfig) -> Any:
    try:
        return msgspec.json.decode(config.example)
    except msgspec.DecodeError as error:
        raise LoadError(f"the example of {config.name} is not JSON: {error}", field="example") from None
