"""Every error that headrace raises, as one tree.

    HeadraceError            code (stable string) · status (HTTP) · retryable · hint (what to do next)
    ├─ SetupError            the product cannot start as asked
    │  ├─ ConfigError        an option is wrong; names the option
    │  ├─ LoadError          a target cannot be imported, read or warmed up
    │  └─ Unavailable        an extra, a device or a program is missing; says what to install
    ├─ RequestError          the caller can mend it
    │  ├─ MalformedBody 400  ├─ UnsupportedMediaType 415  ├─ PayloadTooLarge 413
    │  ├─ Unauthorized 401   ├─ Forbidden 403
    │  ├─ NotFound 404       ├─ ModelNotFound 404         ├─ MethodNotAllowed 405
    │  ├─ InvalidInput 422   ├─ Overloaded 429            ├─ DeadlineExceeded 504
    │  └─ RequestTimeout 408 └─ ClientGone 499            (the body never came; the caller hung up)
    ├─ ServiceError          the caller did nothing wrong
    │  ├─ NotReady 503       ├─ Draining 503              ├─ WorkerLost 503
    │  ├─ RunnerError 500    └─ OutOfMemory 503
    └─ TaskError             of a long job
       ├─ TaskNotFound 404   ├─ TaskConflict 409          (its state does not allow that)
       ├─ StoreDown 503      └─ ValueTooLarge 413         (a step, an event or a result)
       ├─ TaskFailed         └─ TaskCancelled             (for a client that waits for a result)
       └─ inside a worker:   StepFailed · CodeChanged · LeaseLost · AttemptsExhausted

`web.py` turns them into HTTP answers, `to_fault`/`from_fault` carry them over a socket. This module knows
neither HTTP frameworks nor sockets.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class HeadraceError(Exception):
    """Base of the tree.

    Args:
        message: what happened, one sentence.
        field: the option or the part of the body that is wrong, for example ``input[3]``.
        hint: what to do next.
        retry_after_s: seconds until another try has a chance; ``None`` when no honest figure exists.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        hint: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.hint = hint
        self.retry_after_s = retry_after_s


class SetupError(HeadraceError):
    code = "setup_error"


class ConfigError(SetupError):
    code = "config_error"


class LoadError(SetupError):
    code = "load_error"


class Unavailable(SetupError):
    code = "unavailable"


class RequestError(HeadraceError):
    code = "bad_request"
    status = 400


class MalformedBody(RequestError):
    code = "malformed_body"
    status = 400


class Unauthorized(RequestError):
    """No key, or not one of the server's."""

    code = "unauthorized"
    status = 401


class Forbidden(RequestError):
    """A page of another site, or a name that is not this server's: the admin port answers neither."""

    code = "forbidden"
    status = 403


class NotFound(RequestError):
    code = "not_found"
    status = 404


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    status = 405
    allowed = "POST"


class RequestTimeout(RequestError):
    code = "request_timeout"
    status = 408
    retryable = True


class PayloadTooLarge(RequestError):
    code = "payload_too_large"
    status = 413


class UnsupportedMediaType(RequestError):
    code = "unsupported_media_type"
    status = 415


class InvalidInput(RequestError):
    code = "invalid_input"
    status = 422


class Overloaded(RequestError):
    code = "overloaded"
    status = 429
    retryable = True


class ClientGone(RequestError):
    """The client hung up before its answer was ready. Nobody reads this answer; 499 is nginx's number for it."""

    code = "client_gone"
    status = 499


class DeadlineExceeded(RequestError):
    code = "deadline_exceeded"
    status = 504
    retryable = True


class ServiceError(HeadraceError):
    code = "service_error"
    status = 503
    retryable = True


class NotReady(ServiceError):
    code = "not_ready"


class Draining(ServiceError):
    code = "draining"


class WorkerLost(ServiceError):
    code = "worker_lost"


class OutOfMemory(ServiceError):
    code = "out_of_memory"


class RunnerError(ServiceError):
    """The user's model raised. The text stays in the log; the client sees only that it happened."""

    code = "runner_error"
    status = 500
    retryable = False


class TaskError(HeadraceError):
    code = "task_error"


class TaskNotFound(TaskError):
    code = "task_not_found"
    status = 404


class TaskConflict(TaskError):
    """The task is in a state that does not allow what was asked."""

    code = "task_conflict"
    status = 409


class StoreDown(TaskError):
    """The Redis that keeps the tasks does not answer just now."""

    code = "store_unavailable"
    status = 503
    retryable = True


class ValueTooLarge(TaskError):
    """A step, an event or a result is larger than `max_value_bytes`."""

    code = "value_too_large"
    status = 413


class TaskFailed(TaskError):
    """A task has failed: what a client that waits for its result is told.

    Args:
        reason: the code that it failed with, for example ``agent_error``, ``deadline_exceeded``, ``code_changed``.
    """

    code = "task_failed"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        field: str | None = None,
        hint: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, field=field, hint=hint, retry_after_s=retry_after_s)
        self.reason = reason


class StepFailed(TaskError):
    """A step's value cannot be encoded, or what is journalled does not fit the step's type any more."""

    code = "step_failed"


class CodeChanged(TaskError):
    """The steps of this run are not those that an earlier attempt has journalled."""

    code = "code_changed"


class TaskCancelled(TaskError):
    code = "cancelled"


class LeaseLost(TaskError):
    """Another worker has this task now, or may have: what this one still does must have no effect."""

    code = "lease_lost"


class AttemptsExhausted(TaskError):
    code = "attempts_exhausted"


class Fault(msgspec.Struct, array_like=True, frozen=True):
    """A `HeadraceError` on its way over a socket."""

    code: str
    message: str
    field: str | None = None
    hint: str | None = None
    retry_after_s: float | None = None


def to_fault(error: HeadraceError) -> Fault:
    return Fault(error.code, error.message, error.field, error.hint, error.retry_after_s)


def from_fault(fault: Fault) -> HeadraceError:
    """Rebuild the error of a fault; a code from a newer peer becomes a plain `ServiceError`."""
    kind = _BY_CODE.get(fault.code, ServiceError)
    return kind(fault.message, field=fault.field, hint=fault.hint, retry_after_s=fault.retry_after_s)


def _family(kind: type[HeadraceError]) -> dict[str, type[HeadraceError]]:
    members = {kind.code: kind}
    for child in kind.__subclasses__():
        members.update(_family(child))
    return members


_BY_CODE = _family(HeadraceError)
