"""The words of the house, each with one meaning.

A *runner* takes a list and returns a list of the same length. A *worker* is a process that hosts a runner, a *front
end* a process that speaks HTTP. A `Request` lives in memory and becomes an `Outcome`; a batch is what the device sees.
This module knows neither sockets, processes nor torch.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from headrace.errors import Fault


class Runner(Protocol):
    """The seam everything shares: a list goes in, a list of the same length comes out.

    A runner may also have, each optional:

    * ``prepare(item)``: CPU work per item before batching, for example tokenising;
    * ``cost(prepared)``: the item's length, an int ≥ 1; requests of like cost are batched together;
    * ``finish(output)``: CPU work per item after the batch;
    * ``stream(inputs)``: an iterator for clients that read answers as they are made. Each step is a list as long as
      ``inputs`` with one chunk per item, ``None`` where an item has none in this step, an exception where one fails;
    * ``close()``: called once when the worker ends.
    """

    def load(self, device: str) -> None:
        """Bring the model to ``device`` (``cpu``, ``cuda:0``, …). Called once, before `run`."""
        ...

    def run(self, inputs: list[Any]) -> list[Any]:
        """Answer a batch. An item of the answer may be an exception: that item fails alone."""
        ...


class Timings(msgspec.Struct, array_like=True, frozen=True):
    """Where a request spent its time in the worker: milliseconds waiting, milliseconds in `run`, items in its batch."""

    queue_ms: float
    run_ms: float
    batch_size: int


class Request(msgspec.Struct, array_like=True, tag="request"):
    """One item on its way to a worker.

    ``body`` is an encoded value (`ipc.encode_value`); ``cost`` is 0 when only the worker can tell. ``deadline_s`` is
    the time left, not a moment, so that the clocks of two machines need not agree. ``trace`` is the public request id.
    ``alone`` asks for a batch of its own: its last worker died of the batch that it was in. ``stream`` asks for the
    answer in chunks, each an `Outcome` of which only the last is ``last``.
    """

    id: int
    body: bytes
    cost: int
    deadline_s: float
    trace: str = ""
    alone: bool = False
    stream: bool = False


class Outcome(msgspec.Struct, array_like=True, tag="outcome"):
    """The one answer to a request, or, where a stream was asked for, one chunk of it: a body or a fault.

    A stream ends with an outcome that is ``last`` and has neither.
    """

    id: int
    body: bytes = b""
    fault: Fault | None = None
    timings: Timings | None = None
    last: bool = True


class Cancel(msgspec.Struct, array_like=True, tag="cancel"):
    """Nobody waits for this request any more: do not compute it."""

    id: int


class TextSpec(msgspec.Struct, frozen=True):
    """How a front end turns text into token ids without torch: a `tokenizers` file and the model's limits.

    ``max_tokens`` counts special tokens; ``vocabulary`` is the number of rows of the embedding table, ``token_types``
    that of the token types' (0: the model takes none). ``prefix`` goes before every text, then ``lower`` makes the
    whole lower-case; token ids that clients send themselves are left as they are.
    """

    tokenizer: str
    max_tokens: int
    vocabulary: int
    token_types: int = 0
    prefix: str = ""
    lower: bool = False


class ModelInfo(msgspec.Struct, frozen=True):
    """What a front end must know of a model without importing it.

    ``item_schema`` is the JSON Schema of one item, encoded. ``width`` is the length of the vector an embedding model
    answers with, 0 for anything else; ``streams`` whether answers can come in chunks; ``tensors`` whether items are
    tensors, bare or by name, and so are the answers.
    """

    name: str
    task: str
    platform: str
    device: str
    item_schema: bytes = b"{}"
    output_schema: bytes = b"{}"
    text: TextSpec | None = None
    width: int = 0
    streams: bool = False
    tensors: bool = False


class Hello(msgspec.Struct, array_like=True, tag="hello"):
    """A process's first frame: it is ready. A worker says what it serves."""

    model: ModelInfo | None = None


class Workload(msgspec.Struct, array_like=True, frozen=True):
    """What a worker has to do as a batch starts, in seconds of its own speed; 0 while that is unknown.

    ``backlog_s`` covers all that waits and the batch, ``batch_s`` the batch alone, ``item_s`` is the mean of one item.
    """

    backlog_s: float = 0.0
    batch_s: float = 0.0
    item_s: float = 0.0


class Beat(msgspec.Struct, array_like=True, tag="beat"):
    """Progress of the loop that does the work, from that loop.

    To the supervisor: ``step`` counts batches, ``busy_s`` is how long the current one has been running (0 when idle).
    To a front end, as a batch starts: ``began`` lists its requests in it, ``work`` says how much there is to do.
    """

    step: int
    busy_s: float = 0.0
    began: list[int] = []
    work: Workload | None = None


class Drain(msgspec.Struct, array_like=True, tag="drain"):
    """From a supervisor: take nothing new, finish what is there, then end. From a worker to a front end: send nothing
    more; from a front end to a worker, in answer: nothing more will come."""

    grace_s: float = 0.0


Frame = Hello | Request | Cancel | Outcome | Beat | Drain


class Channel(Protocol):
    """An ordered, reliable way to one peer. `ipc.SocketChannel` and `ipc.MemoryChannel` pass the same tests."""

    def send(self, *frames: Frame) -> None:
        """Hand over frames without waiting for the peer. Raises `ipc.ChannelClosed` when it is gone."""
        ...

    def recv(self, timeout_s: float | None) -> list[Frame]:
        """Everything that has arrived, waiting up to ``timeout_s`` for the first frame; empty after a time-out."""
        ...

    def close(self) -> None: ...
