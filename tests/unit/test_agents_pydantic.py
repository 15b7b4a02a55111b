"""Agents of pydantic-ai on a real context whose journal lies in memory: what is asked, called, said, and how often."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pydantic
import pytest
from pydantic_ai import Agent, BinaryContent, DeferredToolRequests, ModelRetry, RunContext, ToolOutput, ToolReturn
from pydantic_ai.capabilities import AbstractCapability, HandleDeferredToolCalls, ModelFallback, ProcessEventStream
from pydantic_ai.exceptions import ModelHTTPError, ToolFailed
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import DeferredToolResults

import headrace as hr
from headrace import log, metrics
from headrace.agents import durable
from headrace.agents.models import hide_keys
from headrace.errors import CodeChanged, ConfigError, ValueTooLarge
from headrace.tasks.context import Context, Suspended
from headrace.tasks.registry import load_app, make, registered
from headrace.tasks.store import Claim

pytestmark = pytest.mark.anyio
Reply = str | list[tuple[str, dict[str, Any]]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Killed(BaseException):
    """The process is gone at this point."""


class Attempts:
    """A task: its journal outlives its attempts.

    Args:
        agent: of pydantic-ai.
        most_writes: after so many writes of an attempt its process is killed.
    """

    def __init__(self, agent: Agent[Any, Any], **options: Any) -> None:
        self.function = durable(agent, name="tested", module=__name__, **options)
        self.made = make(self.function)
        self.journal: dict[str, bytes] = {}
        self.events: list[dict[str, Any]] = []
        self.row = metrics.Row()
        self.most_writes: int | None = None
        self.most_bytes = 100_000
        self.writes = 0
        self.context: Context

    async def run(self, message: str = "go") -> Any:
        claim = Claim("task", 1, 1, "tested", "default", "", b"", 0, 0, 0, dict(self.journal))
        self.writes = 0
        self.context = Context(claim, self._write, max_value_bytes=self.most_bytes, row=self.row)
        return await self.function(self.context, message)

    async def _write(self, field: str = "", value: bytes = b"", events: Sequence[bytes] = ()) -> None:
        await asyncio.sleep(0)
        if self.most_writes is not None and self.writes >= self.most_writes:
            raise Killed
        self.writes += 1
        if field:
            assert field not in self.journal, f"step {field} is journalled twice"
            self.journal[field] = value
        self.events += [msgspec.json.decode(event) for event in events]

    @property
    def steps(self) -> list[str]:
        return sorted(self.journal, key=lambda key: [int(part) for part in key.partition(":")[0].split(".")])

    def said(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    def metric(self, name: str, *labels: str) -> float:
        return metrics.Reader(rows=[self.row]).values()[name, labels][0]


class Script:
    """A model that says what is written, by how often it has spoken in the conversation; and counts its requests."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = replies
        self.asked: Counter[int] = Counter()
        self.seen: list[list[ModelMessage]] = []

    def _next(self, messages: list[ModelMessage]) -> Reply:
        turn = sum(isinstance(each, ModelResponse) for each in messages)
        self.asked[turn] += 1
        self.seen.append(list(messages))
        return self.replies[turn]

    def answer(self, messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        reply = self._next(messages)
        if isinstance(reply, str):
            return ModelResponse(parts=[TextPart(reply)])
        return ModelResponse(parts=[ToolCallPart(name, arguments) for name, arguments in reply])

    async def stream(self, messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
        reply = self._next(messages)
        if isinstance(reply, str):
            for word in reply.split(" "):
                yield word + " "
        else:
            for index, (name, arguments) in enumerate(reply):
                yield {
                    index: DeltaToolCall(name, msgspec.json.encode(arguments).decode(), tool_call_id=f"call-{index}")
                }

    def model(self, name: str = "scripted", *, streams: bool = True) -> FunctionModel:
        return FunctionModel(self.answer, stream_function=self.stream if streams else None, model_name=name)


def returned(messages: list[ModelMessage]) -> list[Any]:
    """What the model has been told of its tool calls."""
    return [part.content for each in messages for part in each.parts if isinstance(part, ToolReturnPart)]


async def test_what_is_journalled_is_neither_asked_nor_called_again() -> None:
    script = Script([("add", {"a": 1, "b": 2})], "three")
    agent = Agent(script.model())
    calls = Counter[str]()

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        calls["add"] += 1
        return a + b

    task = Attempts(agent)
    assert await task.run() == "three "
    assert task.steps == ["1:model", "2:tool add", "3:model"]
    tokens, said = task.context.tokens, list(task.events)
    assert tokens > 0

    assert await task.run() == "three "
    assert task.context.tokens == tokens, "what earlier attempts used counts in the end"
    assert (script.asked, calls) == ({0: 1, 1: 1}, {"add": 1})
    assert task.events == said, "nobody hears anything twice"
    assert task.metric("llm_api_calls_total", "function", "scripted", "success") == 2
    assert task.metric("tool_calls_total", "add", "success") == 1
    assert task.metric("tool_calls_total", "add", "error") == 0


@pytest.mark.parametrize("streams", [True, False])
async def test_a_kill_at_any_moment_repeats_only_what_was_in_flight(streams: bool) -> None:
    moment, ended = 0, False
    while not ended:
        script = Script([("one", {}), ("two", {})], [("one", {})], "all done")
        agent = Agent(script.model(streams=streams))
        calls = Counter[str]()

        @agent.tool_plain
        async def one() -> str:
            calls["one"] += 1  # noqa: B023
            return "1"

        @agent.tool_plain
        async def two() -> str:
            calls["two"] += 1  # noqa: B023
            await asyncio.sleep(0)
            return "2"

        task = Attempts(agent)
        task.most_writes = moment
        try:
            await task.run()
            ended = True
        except Killed:
            pass
        done = list(task.journal)
        asked, called = script.asked.copy(), calls.copy()
        task.most_writes = None
        assert (await task.run()).strip() == "all done"
        assert task.steps == ["1:model", "2:tool one", "3:tool two", "4:model", "5:tool one", "6:model"]
        for turn, number in enumerate((1, 4, 6)):
            if f"{number}:model" in done:
                assert script.asked[turn] == asked[turn] == 1, f"killed after {moment} writes"
        finished = Counter(key.partition("tool ")[2] for key in done if "tool" in key)
        for name, wanted in (("one", 2), ("two", 1)):
            assert calls[name] - called[name] == wanted - finished[name], f"killed after {moment} writes"
        moment += 1
    assert moment > 20


async def test_tools_that_run_together_are_numbered_as_the_model_named_them() -> None:
    script = Script([("slow", {}), ("refused", {"n": "no number"}), ("quick", {})], "done")
    gate = asyncio.Event()

    class Late(AbstractCapability[Any]):
        """Lets the first tool start only when the last one has ended."""

        async def before_tool_execute(self, ctx: Any, *, call: Any, tool_def: Any, args: Any) -> Any:
            if call.tool_name == "slow":
                await gate.wait()
            return args

    agent = Agent(script.model(), capabilities=[Late()])

    @agent.tool_plain
    async def slow() -> str:
        return "slow"

    @agent.tool_plain
    async def refused(n: int) -> int:
        return n

    @agent.tool_plain
    async def quick() -> str:
        gate.set()
        return "quick"

    task = Attempts(agent)
    await task.run()
    assert list(task.journal) == ["1:model", "4:tool quick", "2:tool slow", "5:model"]
    assert returned(script.seen[-1])[0] == "slow"
    assert returned(script.seen[-1])[2] == "quick"


async def told(tool: Callable[[], Any]) -> tuple[list[Any], list[Any]]:
    """What the model is told of a tool: at first, and by an attempt that has the call in its journal."""
    heard = []
    journal: dict[str, bytes] = {}
    for _ in range(2):
        script = Script([("tool", {})], "fine")
        agent = Agent(script.model())
        agent.tool_plain(tool, name="tool")
        task = Attempts(agent)
        task.journal = {key: value for key, value in journal.items() if not key.startswith("3:")}
        await task.run()
        journal = task.journal
        (told,) = ([part for part in each.parts if not isinstance(part, TextPart)] for each in script.seen[-1][-1:])
        heard.append([(type(part).__name__, part.content, getattr(part, "outcome", "")) for part in told])
    return heard[0], heard[1]


async def test_a_wish_to_be_asked_again_is_what_the_call_ended_with() -> None:
    calls = Counter[str]()

    def retry() -> str:
        calls["retry"] += 1
        raise ModelRetry("take another one")

    first, again = await told(retry)
    assert calls == {"retry": 1}
    assert first == again == [("ToolReturnPart", "take another one", "retried")]


async def test_a_failure_that_the_model_shall_see_is_what_the_call_ended_with() -> None:
    def fail() -> str:
        raise ToolFailed("it is gone")

    first, again = await told(fail)
    assert first == again == [("ToolReturnPart", "it is gone", "failed")]


async def test_a_validation_error_says_the_same_from_the_journal() -> None:
    def parse() -> int:
        return pydantic.TypeAdapter(dict[str, int]).validate_python({"a": "{braces}"})["a"]

    try:
        first, again = await told(parse)
    except pydantic.ValidationError:
        pytest.skip("this pydantic-ai lets a tool's own validation errors through")
    assert first == again
    assert "valid integer" in str(first)


class Found(pydantic.BaseModel):
    name: str
    score: float


@pytest.mark.parametrize(
    "value",
    [
        None,
        "text",
        [1, {"a": None}],
        Found(name="x", score=0.5),
        {"kind": "binary", "label": "not a picture"},
        BinaryContent(b"\x00\xff", media_type="image/png"),
        [BinaryContent(b"\xfe", media_type="image/png"), "caption"],
        ToolReturn("value", content=["seen", BinaryContent(b"\xff", media_type="image/png")], metadata={"n": 1}),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_whatever_a_tool_gives_the_model_sees_the_same_after_a_crash(value: Any) -> None:
    first, again = await told(lambda: value)
    assert first == again


async def test_a_tool_that_breaks_is_called_again_in_the_next_attempt() -> None:
    script = Script([("shaky", {})], "done")
    agent = Agent(script.model())
    calls = Counter[str]()

    @agent.tool_plain
    def shaky() -> str:
        calls["shaky"] += 1
        if calls["shaky"] == 1:
            raise ConnectionError("no route")
        return "there"

    task = Attempts(agent)
    with pytest.raises(ConnectionError):
        await task.run()
    assert task.steps == ["1:model"]
    assert await task.run() == "done "
    assert script.asked == {0: 1, 1: 1}
    assert task.metric("tool_calls_total", "shaky", "error") == 1


async def test_calls_that_wait_for_an_approval_are_the_output() -> None:
    script = Script([("erase", {"path": "/x"})])
    agent = Agent(script.model(), output_type=[str, DeferredToolRequests])
    agent.tool_plain(lambda path: "gone", name="erase", requires_approval=True)
    task = Attempts(agent)
    for _ in range(2):
        output = await task.run()
        assert [call.tool_name for call in output.approvals] == ["erase"]
    assert msgspec.json.decode(task.made.encode(output))["approvals"][0]["tool_name"] == "erase"
    assert not task.said("TOOL_CALL_RESULT")


async def test_a_call_that_is_approved_within_the_run_is_made_once() -> None:
    script = Script([("erase", {"path": "/x"})], "erased")
    calls = Counter[str]()

    def approve(ctx: RunContext[Any], requests: DeferredToolRequests) -> DeferredToolResults:
        return requests.build_results(approve_all=True)

    agent = Agent(script.model(), capabilities=[HandleDeferredToolCalls(handler=approve)])

    @agent.tool_plain(requires_approval=True)
    def erase(path: str) -> str:
        calls["erase"] += 1
        return "gone"

    task = Attempts(agent)
    for _ in range(2):
        assert await task.run() == "erased "
    assert calls == {"erase": 1}


async def test_a_person_may_be_asked_for_an_approval() -> None:
    script = Script([("erase", {"path": "/x"})], "erased")
    calls = Counter[str]()

    async def ask(ctx: RunContext[Context], requests: DeferredToolRequests) -> DeferredToolResults:
        sure = await ctx.deps.ask("really?", bool)
        return requests.build_results(approvals={call.tool_call_id: sure for call in requests.approvals})

    agent = Agent(script.model(), deps_type=Context, capabilities=[HandleDeferredToolCalls(handler=ask)])

    @agent.tool_plain(requires_approval=True)
    def erase(path: str) -> str:
        calls["erase"] += 1
        return "gone"

    task = Attempts(agent, deps=lambda context: context)
    with pytest.raises(Suspended) as suspended:
        await task.run()
    assert not calls
    question = msgspec.json.decode(suspended.value.change.argument)
    task.journal[question["field"]] = b"true"
    for _ in range(2):
        assert await task.run() == "erased "
    assert calls == {"erase": 1}
    assert script.asked == {0: 1, 1: 1}


async def test_a_tool_may_ask_a_person() -> None:
    script = Script([("look", {}), ("send", {"text": "hello"})], "sent")
    calls = Counter[str]()
    agent = Agent(script.model(), deps_type=Context)

    @agent.tool_plain
    async def look() -> str:
        calls["look"] += 1
        return "seen"

    @agent.tool
    async def send(ctx: RunContext[Context], text: str) -> str:
        calls["asked"] += 1
        return "gone" if await ctx.deps.ask(f"send {text}?", bool) else "kept"

    task = Attempts(agent, deps=lambda context: context)
    with pytest.raises(Suspended) as suspended:
        await task.run()
    question = msgspec.json.decode(suspended.value.change.argument)
    assert question["prompt"] == "send hello?"
    task.journal[question["field"]] = b"true"
    for _ in range(2):
        assert await task.run() == "sent "
    assert calls == {"look": 1, "asked": 2}
    assert returned(script.seen[-1]) == ["seen", "gone"]


async def test_an_agent_that_looks_at_its_stream_sees_it_and_so_does_everybody_else() -> None:
    script = Script([("add", {})], "some words")
    seen = []

    async def look(ctx: RunContext[Any], events: AsyncIterable[Any]) -> None:
        async for event in events:
            seen.append(type(event).__name__)  # noqa: PERF401 - a hook of an author's

    agent = Agent(script.model(), capabilities=[ProcessEventStream(look)])
    agent.tool_plain(lambda: 3, name="add")
    task = Attempts(agent)
    for _ in range(2):
        assert await task.run() == "some words "
    assert script.asked == {0: 1, 1: 1}
    assert "PartStartEvent" in seen
    assert "FunctionToolResultEvent" in seen
    assert "".join(event["delta"] for event in task.said("TEXT_MESSAGE_CONTENT")).strip() == "some words"
    assert task.metric("llm_api_calls_total", "function", "scripted", "success") == 2


async def test_a_request_that_another_model_answered_is_one_step() -> None:
    down = Counter[str]()

    def refuse(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        down["asked"] += 1
        raise ModelHTTPError(429, "primary")

    script = Script([("ping", {})], "pong")
    primary = FunctionModel(refuse, model_name="primary")
    agent = Agent(primary, capabilities=[ModelFallback(script.model("spare"))])
    agent.tool_plain(lambda: "ping", name="ping")
    task = Attempts(agent)
    for _ in range(2):
        assert (await task.run()).strip() == "pong"
    assert task.steps == ["1:model", "2:tool ping", "3:model"]
    assert (down["asked"], script.asked) == (2, {0: 1, 1: 1})
    assert task.metric("llm_api_calls_total", "function", "primary", "rejected") == 2
    assert task.metric("llm_api_calls_total", "function", "spare", "success") == 2


@pytest.mark.parametrize("streams", [True, False])
async def test_what_a_model_says_is_one_message_under_an_id_of_its_own(streams: bool) -> None:
    words = " ".join(["word"] * 5_000)
    task = Attempts(Agent(Script(words).model(streams=streams)))
    await task.run()
    kinds = [event["type"] for event in task.events if event["type"].startswith("TEXT")]
    assert kinds[0] == "TEXT_MESSAGE_START"
    assert kinds[-1] == "TEXT_MESSAGE_END"
    assert set(kinds[1:-1]) == {"TEXT_MESSAGE_CONTENT"}
    assert len({event["messageId"] for event in task.events if "messageId" in event}) == 1
    deltas = [event["delta"] for event in task.said("TEXT_MESSAGE_CONTENT")]
    assert "".join(deltas).strip() == words
    assert 2 < len(deltas) < 100, "in portions, not word by word"


async def test_calls_of_tools_are_told_with_their_arguments_and_results() -> None:
    script = Script([("look", {"where": "x" * 25_000})], "seen")
    agent = Agent(script.model())
    agent.tool_plain(lambda where: {"long": "y" * 25_000}, name="look")
    task = Attempts(agent)
    await task.run()
    assert [event["toolCallName"] for event in task.said("TOOL_CALL_START")] == ["look"]
    arguments = "".join(event["delta"] for event in task.said("TOOL_CALL_ARGS"))
    assert msgspec.json.decode(arguments) == {"where": "x" * 25_000}
    (result,) = task.said("TOOL_CALL_RESULT")
    assert result["toolCallId"] == task.said("TOOL_CALL_START")[0]["toolCallId"]
    assert len(result["content"]) == 10_000


async def test_an_output_that_comes_as_a_call_is_no_tool() -> None:
    agent = Agent(Script([("final_result", {"name": "x", "score": 1})]).model(), output_type=Found)
    task = Attempts(agent)
    output = await task.run()
    assert output == Found(name="x", score=1)
    assert msgspec.json.decode(task.made.encode(output)) == {"name": "x", "score": 1.0}
    assert task.steps == ["1:model"]
    assert not task.said("TOOL_CALL_START")


async def test_a_value_that_is_too_large_fails_the_step() -> None:
    script = Script([("big", {})], "never said")
    agent = Agent(script.model())
    agent.tool_plain(lambda: "x" * 200_000, name="big")
    with pytest.raises(ValueTooLarge):
        await Attempts(agent).run()


async def test_other_tools_than_in_an_earlier_attempt_are_noticed() -> None:
    task = Attempts(Agent(Script("hello").model()))
    task.journal = {"1:tool other": b"null"}
    with pytest.raises(CodeChanged):
        await task.run()


async def test_the_agent_s_dependencies_are_made_from_the_context() -> None:
    script = Script([("key", {})], "done")
    agent = Agent(script.model(), deps_type=Context)

    @agent.tool
    def key(ctx: RunContext[Context]) -> str:
        return ctx.deps.idempotency_key

    task = Attempts(agent, deps=lambda context: context)
    await task.run()
    assert returned(script.seen[-1]) == ["task:2"]


@pytest.mark.parametrize(
    ("output_type", "wanted"),
    [
        (str, str),
        (Found, Found),
        ([str, Found], str | Found),
        (list[Found], list[Found]),
        (Found | None, Found | None),
        (ToolOutput(Found), Any),
        (lambda text: text, Any),
    ],
    ids=["str", "model", "either", "list", "optional", "marker", "function"],
)
def test_the_result_is_written_by_the_output_type(output_type: Any, wanted: Any) -> None:
    function = durable(Agent(Script().model(), output_type=output_type), name="x", module="m")
    assert function.__annotations__["return"] == wanted


def test_an_agent_is_registered_where_it_stands_and_given_back(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "only_pydantic.py").write_text(
        "import headrace as hr\n"
        "from pydantic_ai import Agent\n"
        "helper = Agent('test', name='helper', description='Helps.')\n"
        "assert hr.agent(helper, timeout_s=5) is helper\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for _ in range(2):  # a module that is imported already counts as well
        spec = load_app("only_pydantic")["helper"].spec()
    assert (spec.message_parameter, spec.description, spec.timeout_s) == ("", "Helps.", 5)
    assert msgspec.json.decode(spec.schema) == {"type": "string"}


def test_an_agent_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="has no name"):
        hr.agent(Agent("test"))


def test_a_function_has_no_deps() -> None:
    async def mine(ctx: Any) -> None: ...

    with pytest.raises(ConfigError, match="only an agent of pydantic-ai"):
        hr.agent(mine, deps=lambda ctx: ctx)


def test_functions_are_agents_as_before() -> None:
    @hr.agent(name="with-brackets")
    async def first(ctx: Any) -> None: ...

    @hr.agent
    async def without_brackets(ctx: Any) -> None: ...

    assert registered()["with-brackets"].function is first
    assert registered()["without_brackets"].function is without_brackets


def test_without_pydantic_ai_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['pydantic_ai'] = None\n"
        "import headrace as hr\n"
        "class AbstractAgent: name = 'x'\n"
        "AbstractAgent.__module__ = 'pydantic_ai.agent'\n"
        "try: hr.agent(AbstractAgent())\n"
        "except hr.Unavailable as error: print(error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "pip install 'headrace[agents]'\n"


def test_functions_alone_do_not_load_pydantic_ai() -> None:
    code = "import sys, headrace; headrace.agent; print('pydantic_ai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


def test_a_key_given_in_code_is_kept_out_of_sight() -> None:
    model = OpenAIChatModel("m", provider=OpenAIProvider(base_url="http://127.0.0.1:1/v1", api_key="a-key-in-code"))
    hide_keys(model)
    assert log.redact("your key a-key-in-code is wrong") == "your key [redacted] is wrong"
