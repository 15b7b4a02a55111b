"""Language models of pydantic-ai while they are asked: counted, heard as they speak, their keys kept out of sight.

Knows nothing of steps: what is asked here is asked for real.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelResponse, PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta
from pydantic_ai.models import CompletedStreamedResponse, Model, ModelRequestParameters, StreamedResponse
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import RunContext

from headrace import log, metrics
from headrace.agents import Context
from headrace.clock import SYSTEM, Clock
from headrace.metrics.current import status_of

# Every event is a write to the store: what a model says is passed on in portions of so much time.
_PORTION_S = 0.05
# An event may not be as large as a step's value.
LONGEST_DELTA = 10_000


class Heard(WrapperModel):
    """A model whose requests are counted, and whose text is sent to everybody who watches.

    Args:
        model: what is asked.
        stream: ask for a stream where the model has any, so that text is sent while it is made.
    """

    def __init__(self, model: Model, context: Context, *, stream: bool, clock: Clock = SYSTEM) -> None:
        super().__init__(model)
        self._context = context
        self._stream = stream and _streams(model)
        self._clock = clock
        declare(model, context.row)

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        with self._counted():
            if not self._stream:
                response = await self.wrapped.request(messages, model_settings, model_request_parameters)
                for part in response.parts:
                    if isinstance(part, TextPart):
                        async with _Speech(self._context) as speech:
                            speech.say(part.content)
                return response
            opened = self.wrapped.request_stream(messages, model_settings, model_request_parameters)
            async with opened as answer, _Speech(self._context) as speech:
                await _listen(answer, speech)
            return answer.get()

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None = None,
    ) -> AsyncGenerator[StreamedResponse]:
        # Only where the agent's own capabilities look at the stream: they see it once it is whole.
        with self._counted():
            opened = self.wrapped.request_stream(messages, model_settings, model_request_parameters, run_context)
            async with opened as answer, _Speech(self._context) as speech:
                await _listen(answer, speech)
        yield CompletedStreamedResponse(
            answer.get(), model_request_parameters=model_request_parameters, replay_events=True
        )

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        hide_keys(self.wrapped)
        began, status = self._clock.monotonic(), "error"
        try:
            yield
            status = "success"
        except BaseException as error:
            status = status_of(error)
            hide_keys(self.wrapped)  # one that was fetched for this request is known only now
            raise
        finally:
            row, model = self._context.row, self.wrapped.model_name
            row.by_status(metrics.LLM_CALLS, provider=self.wrapped.system, model=model)[status].inc()
            row.histogram(metrics.LLM_DURATION, model=model).observe(self._clock.monotonic() - began)


def declare(model: Model, row: metrics.Row) -> None:
    """Make a model's series, so that they are there at 0 before its first request."""
    row.by_status(metrics.LLM_CALLS, provider=model.system, model=model.model_name)
    row.histogram(metrics.LLM_DURATION, model=model.model_name)


class _Speech:
    """One message of an assistant as AG-UI events, under an id of its own; none at all while it has no text."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._id = uuid.uuid4().hex
        self._begun = False
        self._text = ""
        self._over = asyncio.Event()

    async def __aenter__(self) -> _Speech:
        self._passing_on = asyncio.ensure_future(self._pass_on())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if kind is None or issubclass(kind, Exception):
            await self._passing_on
        else:
            # Interrupted: nothing more is said, and its last write is over before others follow.
            self._passing_on.cancel()
            await asyncio.wait({self._passing_on})

    def say(self, text: str) -> None:
        self._text += text

    async def _pass_on(self) -> None:
        while not self._over.is_set():
            await self._flush()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PORTION_S):
                    await self._over.wait()
        await self._flush()
        if self._begun:
            await self._context.emit("TEXT_MESSAGE_END", message_id=self._id)

    async def _flush(self) -> None:
        # What is said meanwhile belongs to the next portion.
        text, self._text = self._text, ""
        if text and not self._begun:
            self._begun = True
            await self._context.emit("TEXT_MESSAGE_START", message_id=self._id, role="assistant")
        for start in range(0, len(text), LONGEST_DELTA):
            delta = text[start : start + LONGEST_DELTA]
            await self._context.emit("TEXT_MESSAGE_CONTENT", message_id=self._id, delta=delta)


async def _listen(answer: AsyncIterator[Any] | StreamedResponse, speech: _Speech) -> None:
    async for event in answer:
        if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
            speech.say(event.part.content)
        elif isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
            speech.say(event.delta.content_delta)


def _streams(model: Model) -> bool:
    return all(
        each.stream_function is not None
        if isinstance(each, FunctionModel)
        else type(each).request_stream is not Model.request_stream
        for each in _all(model)
    )


def hide_keys(model: Model) -> None:
    """Keep a model's keys out of log lines and of the errors of tasks: providers quote them when they refuse them."""
    for each in _all(model):
        provider = getattr(each, "provider", None)
        for owner in (each, provider, getattr(each, "client", None), getattr(provider, "client", None)):
            for name in ("api_key", "auth_token"):
                if isinstance(key := getattr(owner, name, None), str):
                    log.hide(key)


def _all(model: Model) -> list[Model]:
    """A model and those that it asks in its turn."""
    inner = [model.wrapped] if isinstance(model, WrapperModel) else getattr(model, "models", [])
    return [model, *(found for each in inner for found in _all(each))]
