"""The agents of `headrace up`: index a folder of text as a long task, then say where something is said.

They show what an agent looks like: functions as steps, progress as events, the served model by HTTP. A passage is found
by its words (SQLite's FTS5) and by its meaning (cosine of embeddings, every vector compared); the two orders are joined
by reciprocal rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from headrace.client import AsyncClient
from headrace.errors import HeadraceError, InvalidInput, NotReady
from headrace.tasks.registry import agent

_SUFFIXES = (".md", ".txt", ".rst", ".py")
_MOST_BYTES = 1_000_000
_PASSAGE_CHARS = 400
_BATCH = 32
_RANKS = 60  # the constant of reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)


class Passage(pydantic.BaseModel):
    """A place where something is said: ``quote`` begins at ``line`` of ``file``."""

    file: str
    line: int
    quote: str
    similarity: float


class Indexed(pydantic.BaseModel):
    folder: str
    files: int
    passages: int
    unchanged: int


@agent
async def index(ctx: Any, folder: str | None = None) -> Indexed:
    """Make a folder of text searchable: Markdown, plain text and Python files; without one, headrace's own sources."""
    root = Path(folder).expanduser() if folder else Path(__file__).parent
    if not root.is_dir():
        raise InvalidInput(f"there is no folder {str(root)!r} on this machine", field="folder")
    files: list[str] = await ctx.step("list", find_files, str(root))
    passages = unchanged = 0
    for number, file in enumerate(files, 1):
        added: int = await ctx.step(f"index {number}", index_file, file, retries=5)
        passages += max(0, added)
        unchanged += added < 0
        await ctx.emit("CUSTOM", name="progress", value={"done": number, "of": len(files), "file": file})
    return Indexed(folder=str(root), files=len(files), passages=passages, unchanged=unchanged)


@agent
async def where(ctx: Any, question: str) -> list[Passage]:
    """Where something is said: the best passages of what has been indexed, the best one first."""
    return list(await ctx.step("search", search, question, retries=5))


def find_files(root: str) -> list[str]:
    """Text files below a folder that are not hidden and not too large, in order."""
    return sorted(
        str(path)
        for path in Path(root).rglob("*")
        if path.suffix in _SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
        and path.stat().st_size <= _MOST_BYTES
    )


async def index_file(file: str) -> int:
    """Replace what is known of a file; the number of its passages, -1 if it has not changed, 0 if it is no text."""
    try:
        text = Path(file).read_text()
    except (OSError, UnicodeDecodeError):
        return 0
    digest = hashlib.sha256(text.encode()).hexdigest()
    with _database() as base:
        known = base.execute("SELECT digest FROM files WHERE file = ?", (file,)).fetchone()
    if known == (digest,):
        return -1
    passages = list(split(text))
    vectors: list[np.ndarray] = []
    async with AsyncClient(_url()) as client:
        for at in range(0, len(passages), _BATCH):
            for each in await client.predict_many([quote for _, quote in passages[at : at + _BATCH]]):
                if isinstance(each, HeadraceError):
                    raise each
                vectors.append(np.asarray(each.value, np.float32))
    with _database() as base:
        base.execute("DELETE FROM words WHERE rowid IN (SELECT id FROM passages WHERE file = ?)", (file,))
        base.execute("DELETE FROM passages WHERE file = ?", (file,))
        base.execute("REPLACE INTO files VALUES (?, ?)", (file, digest))
        for (line, quote), vector in zip(passages, vectors, strict=True):
            row = base.execute(
                "INSERT INTO passages (file, line, quote, vector) VALUES (?, ?, ?, ?)",
                (file, line, quote, vector.tobytes()),
            ).lastrowid
            base.execute("INSERT INTO words (rowid, quote) VALUES (?, ?)", (row, quote))
    return len(passages)


async def search(question: str, limit: int = 5) -> list[Passage]:
    """The best passages by words and by meaning together."""
    with _database() as base:
        rows = base.execute("SELECT id, file, line, quote, vector FROM passages").fetchall()
        if not rows:
            raise NotReady("nothing has been indexed yet", hint="run the agent index first")
        words = " OR ".join(f'"{word}"' for word in question.replace('"', " ").split())
        by_words = [
            ident
            for (ident,) in base.execute("SELECT rowid FROM words WHERE words MATCH ? ORDER BY rank LIMIT 50", (words,))
        ]
    async with AsyncClient(_url()) as client:
        asked = np.asarray((await client.predict(question)).value, np.float32)
    matrix = np.frombuffer(b"".join(row[4] for row in rows), np.float32).reshape(len(rows), -1)
    cosines = matrix @ asked / np.maximum(np.linalg.norm(matrix, axis=1) * np.linalg.norm(asked), 1e-9)
    by_meaning = [rows[int(at)][0] for at in np.argsort(-cosines)[:50]]
    scores: dict[int, float] = {}
    for order in (by_words, by_meaning):
        for rank, ident in enumerate(order):
            scores[ident] = scores.get(ident, 0.0) + 1 / (_RANKS + rank)
    place = {row[0]: at for at, row in enumerate(rows)}
    best = sorted(scores, key=lambda ident: -scores[ident])[:limit]
    return [
        Passage(file=rows[at][1], line=rows[at][2], quote=rows[at][3], similarity=round(float(cosines[at]), 3))
        for at in (place[ident] for ident in best if ident in place)
    ]


def split(text: str) -> Iterator[tuple[int, str]]:
    """Passages with the numbers of their first lines: paragraphs, long ones cut at the ends of lines."""
    start, lines = 0, list[str]()
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if lines and (not line.strip() or sum(map(len, lines)) + len(line) > _PASSAGE_CHARS):
            yield start, "\n".join(lines)
            lines = []
        if line.strip():
            if not lines:
                start = number
            lines.append(line)


@contextlib.contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    """The index, for one transaction. Any number of processes may use it."""
    folder = Path(os.environ["HEADRACE_DATA_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    base = sqlite3.connect(folder / "demo-index.sqlite", timeout=30)
    try:
        base.execute("PRAGMA journal_mode = WAL")
        base.executescript(
            "CREATE TABLE IF NOT EXISTS files (file TEXT PRIMARY KEY, digest TEXT);"
            "CREATE TABLE IF NOT EXISTS passages"
            " (id INTEGER PRIMARY KEY, file TEXT, line INT, quote TEXT, vector BLOB);"
            "CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(quote);"
        )
        with base:
            yield base
    finally:
        base.close()


def _url() -> str:
    try:
        return os.environ["HEADRACE_URL"]
    except KeyError:
        raise NotReady("no model server is known here", hint="headrace up runs one beside the agents") from None
