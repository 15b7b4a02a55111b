"""Standard logging, as one JSON object a line or as a console line, with the ids of the moment attached.

A warning says what happened, what headrace does now, and what the operator can do.
"""

from __future__ import annotations

import contextvars
import datetime
import functools
import logging
import os
import re
import sys

import msgspec

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("headrace_request_id", default="")
task_id: contextvars.ContextVar[str] = contextvars.ContextVar("headrace_task_id", default="")

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


# Keys of the well-known providers, and what stands where a key is sent.
_KEYS = re.compile(
    r"\b(?:sk|pk|rk|xai|gsk|hf|ghp|gho|AIza)[-_][A-Za-z0-9_-]{16,}|\bAIza[A-Za-z0-9_-]{30,}"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
_SECRET_NAME = re.compile(r"(?:KEYS?|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)


@functools.cache
def _secrets() -> list[str]:
    """Values of this process's variables that are named like secrets, longest first."""
    values = {
        part.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name) for part in value.split(",")
    }
    return sorted((value for value in values if len(value) >= 8), key=len, reverse=True)


def hide(secret: str) -> None:
    """Let `redact` take out this value too: a key that the code was given."""
    known = _secrets()
    if len(secret) >= 8 and secret not in known:
        known.append(secret)
        known.sort(key=len, reverse=True)


def redact(text: str) -> str:
    """Take out what must not be read by others: keys of providers, passwords in URLs, values of variables named like a
    secret (``…_KEY``, ``…_TOKEN``, ``…_PASSWORD``)."""
    for secret in _secrets():
        text = text.replace(secret, "[redacted]")
    return _KEYS.sub("[redacted]", text)


class _Json(logging.Formatter):
    def __init__(self, process_name: str) -> None:
        super().__init__()
        self.process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "at": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self.process_name,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if ident := getattr(record, "request_id", "") or request_id.get():
            line["request_id"] = ident
        if task := task_id.get():
            line["task_id"] = task
        line |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return redact(msgspec.json.encode(line, enc_hook=str).decode())


class _Console(logging.Formatter):
    def __init__(self, process_name: str) -> None:
        super().__init__()
        self.process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        ident = getattr(record, "request_id", "") or request_id.get() or task_id.get()
        text = f"{at} {record.levelname.lower():7} {self.process_name}: {record.getMessage()}"
        if ident:
            text += f" [{ident}]"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return redact(text)


def set_up(process_name: str, *, level: str = "info", style: str = "auto") -> None:
    """Send everything to standard error.

    Args:
        process_name: shown in each line; also the name that `ps` users look for in the log.
        level: debug, info, warning or error.
        style: ``json``, ``console``, or ``auto`` (console on a terminal, JSON elsewhere).
    """
    if style == "auto":
        style = "console" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Console(process_name) if style == "console" else _Json(process_name))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Others log every request or every start at INFO, which buries our own lines.
    for noisy in ("httpx", "urllib3", "filelock", "uvicorn", "docket"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
