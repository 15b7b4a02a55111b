"""Agents of pydantic-ai: every model request and every tool call is a step of the task.

A run gets one more capability, the outermost. Inside of it lies what happens once: a model request with all that hooks
and fallbacks make of it, a tool call. Outside is what every attempt does again: the agent's instructions, the checks of
arguments and of the output, output functions.

A tool that raises `ModelRetry`, `ToolFailed`, `ApprovalRequired`, `CallDeferred` or a validation error has said
something to the model or to the caller: that is its outcome, journalled as a value is. Any other exception is a
failure, which is not journalled: the next attempt tries the step again.
"""

from __future__ import annotations

import functools
import operator
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_origin

import pydantic
import pydantic_core
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.capabilities import AbstractCapability, CapabilityOrdering, WrapModelRequestHandler
from pydantic_ai.exceptions import ApprovalRequired, CallDeferred, ModelRetry, SkipModelRequest, ToolFailed
from pydantic_ai.messages import ModelResponse, ToolCallPart, ToolReturn, ToolReturnContent
from pydantic_ai.models import Model, ModelRequestContext
from pydantic_ai.tools import RunContext
from pydantic_ai.toolsets import AbstractToolset, FunctionToolset, ToolsetTool, WrapperToolset

from headrace import metrics
from headrace.agents import Context, models
from headrace.agents.models import LONGEST_DELTA, Heard
from headrace.metrics.current import status_of

_BYTES_AS_BASE64 = pydantic.ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")


def durable(
    agent: AbstractAgent[Any, Any],
    *,
    name: str,
    module: str,
    deps: Callable[[Any], Any] | None = None,
    stream: bool = True,
) -> Callable[..., Awaitable[Any]]:
    """The agent as an async function of a context and a ``message``; see `headrace.agents.durable`."""

    async def run(ctx: Any, message: str) -> Any:
        steps = _Steps(ctx)
        try:
            result = await agent.run(
                message,
                deps=deps(ctx) if deps else None,
                # The same in every attempt, for those who trace it.
                run_id=ctx.task_id,
                conversation_id=ctx.task_id,
                infer_name=False,
                capabilities=[_Journalled(steps, stream)],
            )
        finally:
            steps.close()
        return result.output

    run.__name__ = run.__qualname__ = name
    run.__module__ = module
    run.__doc__ = getattr(agent, "description", None)
    run.__annotations__ = {"message": str, "return": _result_type(agent.output_type)}
    return run


def declare(agent: AbstractAgent[Any, Any], row: metrics.Row) -> None:
    """Make the series that are known before the agent runs: its model's and its own tools'."""
    if isinstance(agent.model, Model):
        models.declare(agent.model, row)
    for toolset in agent.toolsets:
        if isinstance(toolset, FunctionToolset):
            for name in toolset.tools:
                row.by_status(metrics.TOOL_CALLS, tool_name=name)


def _result_type(wanted: Any) -> Any:
    """The annotation of a result, as far as an output type can be one: functions and markers cannot."""
    several = list(wanted) if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]
    if not several or not all(isinstance(each, type) or get_origin(each) is not None for each in several):
        return Any
    found: Any = functools.reduce(operator.or_, several)
    try:
        pydantic.TypeAdapter(found)
    except pydantic.PydanticUserError:
        return Any
    return found


class _Answer(pydantic.BaseModel):
    """What a model request ended with: a response, or a hook's wish to ask again."""

    model_config = _BYTES_AS_BASE64

    response: ModelResponse | None = None
    retry: str | None = None


class _Outcome(pydantic.BaseModel):
    """What a tool call ended with: a value, or something that it raised to say it."""

    model_config = _BYTES_AS_BASE64

    raised: Literal["", "retry", "failed", "approval", "deferred", "invalid"] = ""
    content: ToolReturnContent = None
    whole: ToolReturn | None = None
    message: str = ""
    metadata: dict[str, Any] | None = None
    kind: Literal["external", "question"] = "external"
    errors: list[dict[str, Any]] = []

    def value(self) -> Any:
        """What the tool returned; or raise what it raised."""
        match self.raised:
            case "retry":
                raise ModelRetry(self.message)
            case "failed":
                raise ToolFailed(self.message)
            case "approval":
                raise ApprovalRequired(self.metadata)
            case "deferred":
                raise CallDeferred(self.metadata, kind=self.kind)
            case "invalid":
                raise pydantic_core.ValidationError.from_exception_data(
                    self.message, [_line_error(each) for each in self.errors]
                )
        return self.content if self.whole is None else self.whole


def _line_error(error: dict[str, Any]) -> pydantic_core.InitErrorDetails:
    # As text, not as a template: braces of the message are its own.
    kind = pydantic_core.PydanticCustomError(error["type"], "{text}", {"text": error["msg"]})
    return pydantic_core.InitErrorDetails(type=kind, loc=tuple(error["loc"]), input=error["input"])


async def _outcome(call: Callable[[], Awaitable[Any]]) -> _Outcome:
    try:
        value = await call()
    except ModelRetry as said:
        return _Outcome(raised="retry", message=said.message)
    except ToolFailed as said:
        return _Outcome(raised="failed", message=said.message)
    except ApprovalRequired as said:
        return _Outcome.model_construct(raised="approval", metadata=said.metadata)
    except CallDeferred as said:
        return _Outcome.model_construct(raised="deferred", metadata=said.metadata, kind=said.kind)
    except pydantic.ValidationError as said:
        errors = said.errors(include_url=False, include_context=False)
        return _Outcome.model_construct(raised="invalid", message=said.title, errors=errors)
    # Not validated: it is read back from JSON anyway.
    if isinstance(value, ToolReturn):
        return _Outcome.model_construct(whole=value)
    return _Outcome.model_construct(content=value)


class _Call:
    """A tool call whose step has its number already, before anybody knows when it will be made."""

    def __init__(self, context: Context, name: str) -> None:
        self.work: Callable[[], Awaitable[_Outcome]] | None = None
        self.step = context.step(f"tool {name}", self.run)

    async def run(self) -> _Outcome:
        assert self.work is not None
        return await self.work()


class _Steps:
    """The steps of a run.

    Tools that a model calls together run together, and nothing says in which order they get here. So their numbers are
    taken in the order in which the model named them, as soon as its response is known.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._reserved: dict[str, list[_Call]] = {}

    async def model(self, handler: WrapModelRequestHandler, request: ModelRequestContext) -> ModelResponse:
        """A model's response to a request; it is asked unless the journal has it."""
        outputs = {tool.name for tool in request.model_request_parameters.output_tools}

        async def ask() -> _Answer:
            try:
                response = await handler(request)
            except SkipModelRequest as skipped:
                response = skipped.response
            except ModelRetry as wish:
                return _Answer(retry=wish.message)
            for call in _calls(response, outputs):
                await self._announce(call)
            return _Answer.model_construct(response=response)

        answer: _Answer = await self.context.step("model", ask)
        if answer.response is None:
            raise ModelRetry(answer.retry or "")
        self.context.tokens += answer.response.usage.total_tokens
        self.close()  # some servers begin anew with the ids of calls in every response
        for call in _calls(answer.response, outputs):
            self._reserved.setdefault(call.tool_call_id, []).append(_Call(self.context, call.tool_name))
        return answer.response

    async def tool(self, ident: str | None, name: str, work: Callable[[], Awaitable[Any]]) -> Any:
        """What a tool call gives or raises; it is made unless the journal has its outcome."""
        # A call has no number yet when it is made again after its approval, or when no model named it.
        reserved = self._reserved.get(ident or "")
        call = reserved.pop(0) if reserved else _Call(self.context, name)
        call.work = lambda: self._call(ident or uuid.uuid4().hex, name, work)
        outcome: _Outcome = await call.step
        return outcome.value()

    def close(self) -> None:
        """Drop the steps of calls that were never made, such as those whose arguments were refused."""
        for call in (call for calls in self._reserved.values() for call in calls):
            if isinstance(call.step, Coroutine):
                call.step.close()
        self._reserved.clear()

    async def _call(self, ident: str, name: str, work: Callable[[], Awaitable[Any]]) -> _Outcome:
        status = "error"
        try:
            outcome = await _outcome(work)
            status = "error" if outcome.raised else "success"
        except BaseException as error:
            status = status_of(error)
            raise
        finally:
            self.context.row.by_status(metrics.TOOL_CALLS, tool_name=name)[status].inc()
        if outcome.raised not in ("approval", "deferred"):
            await self.context.emit(
                "TOOL_CALL_RESULT",
                message_id=uuid.uuid4().hex,
                tool_call_id=ident,
                content=_shown(outcome),
                role="tool",
            )
        return outcome

    async def _announce(self, call: ToolCallPart) -> None:
        ident, arguments = call.tool_call_id, call.args_as_json_str()
        await self.context.emit("TOOL_CALL_START", tool_call_id=ident, tool_call_name=call.tool_name)
        for start in range(0, len(arguments), LONGEST_DELTA):
            delta = arguments[start : start + LONGEST_DELTA]
            await self.context.emit("TOOL_CALL_ARGS", tool_call_id=ident, delta=delta)
        await self.context.emit("TOOL_CALL_END", tool_call_id=ident)


def _calls(response: ModelResponse, outputs: set[str]) -> list[ToolCallPart]:
    """The calls of tools; those that are the output itself belong to the result."""
    return [part for part in response.tool_calls if part.tool_name not in outputs]


def _shown(outcome: _Outcome) -> str:
    value = outcome.message if outcome.raised else outcome.content if outcome.whole is None else outcome.whole
    if isinstance(value, ToolReturn):
        value = value.return_value
    text = value if isinstance(value, str) else pydantic_core.to_json(value, fallback=str, bytes_mode="base64").decode()
    return text if len(text) <= LONGEST_DELTA else text[: LONGEST_DELTA - 1] + "…"


@dataclass
class _Journalled(AbstractCapability[Any]):
    """Puts the steps of a run around its model requests and its tools."""

    steps: _Steps
    stream: bool

    def get_ordering(self) -> CapabilityOrdering:
        return CapabilityOrdering(position="outermost")

    async def wrap_model_request(
        self, ctx: RunContext[Any], *, request_context: ModelRequestContext, handler: WrapModelRequestHandler
    ) -> ModelResponse:
        return await self.steps.model(handler, request_context)

    def get_wrapper_model(self, model: Model) -> Model:
        return Heard(model, self.steps.context, stream=self.stream)

    def get_wrapper_toolset(self, toolset: AbstractToolset[Any]) -> AbstractToolset[Any]:
        return _Tools(toolset, self.steps)


@dataclass
class _Tools(WrapperToolset[Any]):
    """All tools of a run."""

    steps: _Steps

    async def get_tools(self, ctx: RunContext[Any]) -> dict[str, ToolsetTool[Any]]:
        tools = await self.wrapped.get_tools(ctx)
        for name in tools:
            self.steps.context.row.by_status(metrics.TOOL_CALLS, tool_name=name)
        return tools

    async def call_tool(
        self, name: str, tool_args: dict[str, Any], ctx: RunContext[Any], tool: ToolsetTool[Any]
    ) -> Any:
        return await self.steps.tool(ctx.tool_call_id, name, lambda: self.wrapped.call_tool(name, tool_args, ctx, tool))
