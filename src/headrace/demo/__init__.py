"""The agents of `headrace up`: index a folder of text as a long task, then say where something is said.

They show what an agent looks like: functions as steps, progress as events, the served model by HTTP. `index` keeps a
bookmark instead of a list of files: the value of every step is small, and an attempt after a crash goes on where the
last one was, whatever has happened in the folder meanwhile.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import headrace as hr
from headrace.demo import reading
from headrace.demo.memory import PROBE, Found, Memory, Vectors, is_same, words_of
from headrace.errors import (
    ConfigError,
    DeadlineExceeded,
    HeadraceError,
    InvalidInput,
    NotReady,
    Overloaded,
    ServiceError,
)

__all__ = ["Found", "Indexed", "index", "where"]

# What passes by itself when the model is asked again. Whatever else goes wrong would go wrong again.
_PASSING = (ServiceError, Overloaded, DeadlineExceeded)
# With growing pauses at least a minute: the model's server may be stopping, after which another worker goes on.
_RETRIES = 8
_AT_ONCE = 31  # with the probe a whole batch, unless the model's options say otherwise


@dataclass
class Indexed:
    """What has come of a folder: its files, how many passages are new, how many files were known as they are, how many
    are no text, and how many were known and are gone."""

    folder: str
    files: int = 0
    passages: int = 0
    unchanged: int = 0
    skipped: int = 0
    forgotten: int = 0


@dataclass
class Part:
    """What one step of `index` has done. ``bookmark`` is its last file: the next step goes on behind it."""

    bookmark: str
    files: int
    passages: int
    unchanged: int
    skipped: int


@hr.agent
async def index(ctx: Any, folder: str | None = None) -> Indexed:
    """Make a folder of text searchable: Markdown, plain text and Python files; without one, headrace's own sources."""
    root, expected = await ctx.step("look", look_around, folder)
    total, bookmark = Indexed(root), ""
    while (part := await ctx.step("index", index_part, root, bookmark, retries=_RETRIES, retry_on=_PASSING)).files:
        bookmark = part.bookmark
        total.files += part.files
        total.passages += part.passages
        total.unchanged += part.unchanged
        total.skipped += part.skipped
        progress = {"done": total.files, "of": max(expected, total.files), "file": bookmark}
        await ctx.emit("CUSTOM", name="progress", value=progress)
    total.forgotten = await ctx.step("forget", forget_gone, root)
    return total


@hr.agent
async def where(ctx: Any, question: str) -> list[Found]:
    """Where something is said: the best passages of what has been indexed, the best one first; none if none fits."""
    if not words_of(question):
        raise InvalidInput("the question has no word in it", field="question")
    found: list[Found] | None = await ctx.step("search", search, question, retries=5, retry_on=_PASSING)
    if found is None:
        raise NotReady("nothing has been indexed with this model yet: run the agent index first")
    return found


def look_around(folder: str | None) -> tuple[str, int]:
    """The folder, without links in its path, and how many files are in it now.

    An ordinary function: as a step it runs in a thread, and holds up nobody.
    """
    path = str(Path(hr.__file__).parent) if folder is None else os.path.expanduser(folder)
    if not os.path.isdir(path) or not os.access(path, os.R_OK | os.X_OK):
        raise InvalidInput(f"there is no folder {folder!r} on this machine that can be read", field="folder")
    root = os.path.realpath(path)
    return root, sum(1 for _ in reading.find_files(root))


async def index_part(root: str, bookmark: str) -> Part:
    """Index the files behind the bookmark, as many as take a few seconds.

    It may run twice, since a step does that whose worker dies: what is known already is left as it is.
    """
    memory = _memory()
    texts, last = await asyncio.to_thread(reading.read_next, root, bookmark)
    async with _client() as client:
        probe, _ = await embed(client, [])
        new = await asyncio.to_thread(memory.unknown, probe, texts)
        probe, vectors = await embed(client, [passage.quote for text in new for passage in text.passages])
    await asyncio.to_thread(memory.keep, probe, new, vectors)
    skipped = sum(not text.digest for text in texts)
    return Part(last, len(texts), len(vectors), len(texts) - len(new), skipped)


def forget_gone(root: str) -> int:
    """Forget the files of this folder, and of no other, that are there no more; how many there were."""
    memory = _memory()
    gone = [file for file in memory.files_in(root) if not reading.is_to_be_read(file)]
    memory.forget(gone)
    return len(gone)


async def search(question: str) -> list[Found] | None:
    """The best passages; ``None`` when nothing has been indexed with the model that is served now."""
    async with _client() as client:
        probe, vectors = await embed(client, [question])
    return await asyncio.to_thread(_memory().search, probe, vectors[0], question)


async def embed(client: hr.AsyncClient, texts: list[str]) -> tuple[Vectors, Vectors]:
    """What the served model makes of `PROBE`, and of the texts: a vector and a matrix, every row of length 1.

    Raises:
        ConfigError: it is no model for embeddings.
        ServiceError: it was exchanged for another one meanwhile.
    """
    parts = [await _vectors(client, [PROBE, *texts[at : at + _AT_ONCE]]) for at in range(0, len(texts) or 1, _AT_ONCE)]
    probe = parts[0][0]
    if not all(is_same(part[0], probe) for part in parts):
        raise ServiceError("the served model was exchanged for another one just now")
    return probe, np.concatenate([part[1:] for part in parts])


async def _vectors(client: hr.AsyncClient, texts: list[str]) -> Vectors:
    rows = []
    for each in await client.predict_many(texts):
        if isinstance(each, HeadraceError):
            raise each
        rows.append(each.value)
    try:
        found = np.array(rows, np.float32)
    except (TypeError, ValueError):  # objects, texts, rows of many lengths
        found = np.empty(0, np.float32)
    if found.ndim != 2 or not found.size:
        raise ConfigError("the served model gives no vectors: serve one for embeddings", field="models")
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
    return found


def _client() -> hr.AsyncClient:
    """A client of the server beside the task workers."""
    url = os.environ.get("HEADRACE_URL")
    if not url:
        raise ConfigError("no model server is known here: headrace up runs one, or HEADRACE_URL names one", field="url")
    return hr.AsyncClient(url, api_key=os.environ.get("HEADRACE_API_KEY"))


def _memory() -> Memory:
    return Memory(Path(os.environ["HEADRACE_DATA_DIR"]))
