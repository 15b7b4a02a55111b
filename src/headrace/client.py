"""A client of a headrace server, for plain and for asyncio programs: predictions.

The course of each call is written once, in `_Core`; `headrace.http_client` knows how to send and when to try again.
"""

from __future__ import annotations

import base64
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.errors import DeadlineExceeded, HeadraceError, InvalidInput, ServiceError
from headrace.http_client import Ask, AsyncHttp, Core, Steps, SyncHttp, plain, to_json, typed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float32]

__all__ = ["AsyncClient", "Client", "Prediction"]


class Prediction(msgspec.Struct, frozen=True):
    """An answer of a model.

    Args:
        latency_ms: time in the server. For a list: of the whole list, as are the other figures.
        queue_ms: wait for a place in a batch; for a list the longest of its items.
        run_ms: time of the batch in the model.
        batch_size: how many items shared that batch. These three are 0 where the server does not say.
        request_id: finds the request in the server's log.
    """

    value: Any
    latency_ms: float
    queue_ms: float
    run_ms: float
    batch_size: int
    request_id: str


class _Core(Core):
    """The course of each call."""

    def predict(self, value: Any, model: str | None, timeout_s: float | None) -> Steps[Prediction]:
        if isinstance(value, bytes | bytearray | memoryview):
            ask = Ask("POST", _predict_path(model), bytes(value), "application/octet-stream")
        else:
            ask = Ask("POST", _predict_path(model), to_json({"input": value}, "input"))
        answer = yield from self.exchange(ask, timeout_s)
        told = answer.decode(_One)
        return _prediction(told.prediction, told, answer.request_id)

    def predict_many(
        self, values: Iterable[Any], model: str | None, timeout_s: float | None
    ) -> Steps[list[Prediction | HeadraceError]]:
        if isinstance(values, str | bytes | Mapping):
            raise InvalidInput("must be a list of items; predict takes one", field="inputs")
        items = [_item(value) for value in values]
        ask = Ask("POST", _predict_path(model), to_json({"inputs": items}, "inputs"))
        answer = yield from self.exchange(ask, timeout_s)
        told = answer.decode(_Many)
        if len(told.predictions) != len(items):
            raise answer.unexpected(f"{len(told.predictions)} predictions for {len(items)} inputs")
        return [
            typed(value["error"], HeadraceError.status, answer.request_id)
            if _is_failed(value)
            else _prediction(value, told, answer.request_id)
            for value in told.predictions
        ]

    def embed(self, texts: str | Iterable[str], model: str, timeout_s: float | None) -> Steps[list[Vector]]:
        asked = [texts] if isinstance(texts, str) else list(texts)
        body = {"input": asked, "model": model, "encoding_format": "base64"}
        answer = yield from self.exchange(Ask("POST", "/v1/embeddings", to_json(body, "input")), timeout_s)
        rows = sorted(answer.decode(_Embeddings).data, key=lambda row: row.index)
        if [row.index for row in rows] != list(range(len(asked))):
            raise answer.unexpected(f"{len(rows)} vectors for {len(asked)} texts")
        try:
            return [_vector(row.embedding) for row in rows]
        except ValueError as error:
            raise answer.unexpected(str(error)) from error

    def models(self, timeout_s: float | None) -> Steps[list[str]]:
        answer = yield from self.exchange(Ask("GET", "/v1/models"), timeout_s)
        return [model.id for model in answer.decode(_Models).data]

    def ready(self, timeout_s: float | None) -> Steps[bool]:
        try:
            yield from self.exchange(Ask("GET", "/health/ready"), timeout_s, retries=0)
        except (ServiceError, DeadlineExceeded):
            return False
        return True


class Client(SyncHttp[_Core]):
    """Asks a headrace server and waits. May be shared between threads; close it, or use it in ``with``.

    Every method raises the error that the server names (`headrace.errors`), `DeadlineExceeded` when its time is up, and
    `ServiceError` when there is no connection.

    Args:
        base_url: where the server is, for example ``http://localhost:8000``.
        api_key: sent as ``Authorization: Bearer``; never shown.
        timeout_s: time for a call, its retries included; each call may name its own.
        retries: how often a call is repeated after 429, 503 or a connection that broke before an answer began.
        clock: what the deadline is measured with.
        sleep: how to wait between two tries.
        jitter: source of the spread of waits.
    """

    _core_type = _Core

    def predict(self, input: Any, *, model: str | None = None, timeout_s: float | None = None) -> Prediction:  # noqa: A002
        """Have one item computed.

        Args:
            input: what the model takes: anything that has a JSON form, an array (sent as nested lists), or bytes, which
                are sent as they are.
            model: its name; the server's default model if ``None``.
            timeout_s: time for this call, retries included.
        """
        return self._run(self._core.predict(input, model, timeout_s))

    def predict_many(
        self, inputs: Iterable[Any], *, model: str | None = None, timeout_s: float | None = None
    ) -> list[Prediction | HeadraceError]:
        """Have several items computed in one request. An item that failed is its error, in its place.

        Raises:
            HeadraceError: the request failed, or every item did: then the error of the first.
        """
        return self._run(self._core.predict_many(inputs, model, timeout_s))

    def embed(self, texts: str | Iterable[str], *, model: str, timeout_s: float | None = None) -> list[Vector]:
        """Vectors of texts, in their order. One text that fails is the failure of all."""
        return self._run(self._core.embed(texts, model, timeout_s))

    def models(self, *, timeout_s: float | None = None) -> list[str]:
        """Names of the server's models."""
        return self._run(self._core.models(timeout_s))

    def ready(self, *, timeout_s: float | None = None) -> bool:
        """Whether every model is warm. Asks once: nobody listening, or no answer in time, is also a no."""
        return self._run(self._core.ready(timeout_s))


class AsyncClient(AsyncHttp[_Core]):
    """`Client` for asyncio: the same arguments, methods and errors. Belongs to one event loop."""

    _core_type = _Core

    async def predict(self, input: Any, *, model: str | None = None, timeout_s: float | None = None) -> Prediction:  # noqa: A002
        """As `Client.predict`."""
        return await self._run(self._core.predict(input, model, timeout_s))

    async def predict_many(
        self, inputs: Iterable[Any], *, model: str | None = None, timeout_s: float | None = None
    ) -> list[Prediction | HeadraceError]:
        """As `Client.predict_many`."""
        return await self._run(self._core.predict_many(inputs, model, timeout_s))

    async def embed(self, texts: str | Iterable[str], *, model: str, timeout_s: float | None = None) -> list[Vector]:
        """As `Client.embed`."""
        return await self._run(self._core.embed(texts, model, timeout_s))

    async def models(self, *, timeout_s: float | None = None) -> list[str]:
        """As `Client.models`."""
        return await self._run(self._core.models(timeout_s))

    async def ready(self, *, timeout_s: float | None = None) -> bool:
        """As `Client.ready`."""
        return await self._run(self._core.ready(timeout_s))


class _Timings(msgspec.Struct, frozen=True):
    queue_ms: float = 0.0
    run_ms: float = 0.0
    batch_size: int = 0


class _Timed(msgspec.Struct, kw_only=True):
    latency_ms: float = 0.0
    timings: _Timings = _Timings()


class _One(_Timed):
    prediction: Any


class _Many(_Timed):
    predictions: list[Any]


class _Embedding(msgspec.Struct):
    index: int
    embedding: str


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _prediction(value: Any, told: _Timed, request_id: str) -> Prediction:
    timings = told.timings
    return Prediction(value, told.latency_ms, timings.queue_ms, timings.run_ms, timings.batch_size, request_id)


def _is_failed(value: Any) -> bool:
    """Whether an item of a list is an error. A model's own answer would have to imitate its whole shape."""
    told = value.get("error") if isinstance(value, dict) and len(value) == 1 else None
    return isinstance(told, dict) and {"code", "message", "retryable"} <= told.keys()


def _predict_path(model: str | None) -> str:
    return "/predict" if model is None else f"/models/{urllib.parse.quote(model, safe='')}/predict"


def _item(value: Any) -> Any:
    """An item of a list: bytes have no JSON form but the one that the server takes for bytes."""
    return {"base64": plain(bytes(value))} if isinstance(value, bytes | bytearray | memoryview) else value


def _vector(text: str) -> Vector:
    import numpy as np

    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
