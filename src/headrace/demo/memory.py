"""What has been indexed: files, passages, their words and vectors, in one SQLite file that many processes may use.

    models     id, probe: its vector of `PROBE`, which tells a model from others whatever they are called
    files      id, path, digest of the content, model that the vectors are of
    passages   id, file, line, quote, vector (float32, of length 1)
    words      full text of the passages; triggers keep it

A question is compared with every passage twice. By meaning: the cosine of the two vectors. By words: the share of the
question's words that the passage has, where a rare word counts for more (its inverse document frequency). Both are
numbers up to 1; the order is that of their sum. Knows neither how files are read nor who makes the vectors.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.demo.reading import Text

Vectors = NDArray[np.float32]

PROBE = "Every model has a view of this sentence."
# What counts as an answer: it is near in meaning, or has at least half of what the question's words are worth.
# Measured with all-MiniLM-L6-v2 (FP32) on headrace's docs, 297 passages. Something was near enough for 23 of 24
# questions that are answered there (its words found the last), for 17 of 18 asked in other words than the answer's, and
# for 1 of 24 about cakes, cats and capitals. At 0.30 it was 23, 12 and 1, at 0.20 it was 23, 17 and 11. Among more
# passages one is near by chance more easily: with the 3,021 of the sources it was 9 of those 24, and at 0.30 none. The
# best share of words was 0.47 for those 24. Other models have other scales.
_NEAR = 0.25
_SHARE = 0.5
# Two vectors of one sentence by one model, alone or in a batch, on this device or another, are nearer than this.
_SAME_MODEL = 0.99
_MOST_WORDS = 64
_SCAN = 10_000
_PATIENCE_S = 30.0

_TABLES = """
CREATE TABLE models (id INTEGER PRIMARY KEY, probe BLOB);
CREATE TABLE files (id INTEGER PRIMARY KEY, path TEXT UNIQUE, digest TEXT, model INTEGER);
CREATE TABLE passages (id INTEGER PRIMARY KEY, file INTEGER, line INTEGER, quote TEXT, vector BLOB);
CREATE INDEX passages_of_a_file ON passages (file);
CREATE VIRTUAL TABLE words USING fts5 (quote, content = passages, content_rowid = id);
CREATE TRIGGER learn AFTER INSERT ON passages BEGIN
  INSERT INTO words (rowid, quote) VALUES (new.id, new.quote);
END;
CREATE TRIGGER forget AFTER DELETE ON passages BEGIN
  INSERT INTO words (words, rowid, quote) VALUES ('delete', old.id, old.quote);
END;
PRAGMA journal_mode = WAL;
"""


@dataclass(frozen=True)
class Found:
    """A place where something is said.

    Args:
        line: of ``file``, where ``quote`` begins.
        similarity: of its meaning to the question's, a cosine.
        words: share of the question's words that it has, rare ones counting for more; from 0 to 1.
    """

    file: str
    line: int
    quote: str
    similarity: float
    words: float


def words_of(question: str) -> list[str]:
    """Its words, each once. Letters, digits and underscores only: they mean nothing to the full-text search."""
    return list(dict.fromkeys(re.findall(r"\w+", question.lower())))[:_MOST_WORDS]


def is_same(probe: Vectors, other: Vectors) -> bool:
    """Whether two vectors of `PROBE` are of the same model."""
    return probe.shape == other.shape and float(probe @ other) > _SAME_MODEL


class Memory:
    """The index in a folder. Every method is a transaction, and blocks: call it from a thread.

    Vectors that are given have length 1; ``probe`` is the one that their model makes of `PROBE`.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "demo-memory.sqlite"

    def unknown(self, probe: Vectors, texts: Sequence[Text]) -> list[Text]:
        """Those that are not indexed as they are now, or with another model."""
        with self._open() as base:
            model = _model(base, probe)
            known = "SELECT 1 FROM files WHERE path = ? AND digest = ? AND model = ?"
            return [text for text in texts if not base.execute(known, (text.file, text.digest, model)).fetchone()]

    def keep(self, probe: Vectors, texts: Sequence[Text], vectors: Vectors) -> None:
        """Replace what is known of files: all of them or none. What is no text is forgotten.

        Args:
            vectors: one for each passage of all the texts, in order.
        """
        at = 0
        with self._open("IMMEDIATE") as base:
            model = _model(base, probe)
            if model is None:
                model = base.execute("INSERT INTO models (probe) VALUES (?)", (probe.tobytes(),)).lastrowid
            for text in texts:
                _forget(base, text.file)
                if not text.digest:
                    continue
                file = base.execute(
                    "INSERT INTO files (path, digest, model) VALUES (?, ?, ?)", (text.file, text.digest, model)
                ).lastrowid
                own = vectors[at : (at := at + len(text.passages))]
                base.executemany(
                    "INSERT INTO passages (file, line, quote, vector) VALUES (?, ?, ?, ?)",
                    [(file, *passage, vector.tobytes()) for passage, vector in zip(text.passages, own, strict=True)],
                )

    def forget(self, files: Sequence[str]) -> None:
        """Keep nothing of these files."""
        with self._open("IMMEDIATE") as base:
            for file in files:
                _forget(base, file)

    def files_in(self, folder: str) -> list[str]:
        """What is known of a folder and those below, whichever folder it was indexed with."""
        begin = folder.rstrip("/") + "/"
        with self._open() as base:
            # "0" is what follows "/": no pattern, in which a name could have a meaning.
            found = base.execute("SELECT path FROM files WHERE path >= ? AND path < ?", (begin, begin[:-1] + "0"))
            return [path for (path,) in found]

    def search(self, probe: Vectors, asked: Vectors, question: str, limit: int = 5) -> list[Found] | None:
        """The best passages, the best one first; none where nothing is good enough.

        Args:
            asked: the question's vector.

        Returns:
            ``None`` when nothing has been indexed with this model.
        """
        with self._open() as base:
            ids, meaning = _meanings(base, _model(base, probe), asked)
            if not len(ids):
                return None
            shares = _shares(base, ids, words_of(question))
            good = np.flatnonzero((meaning >= _NEAR) | (shares >= _SHARE))
            best = good[np.argsort(-(meaning + shares)[good], kind="stable")][:limit]
            found = []
            for at in best:
                place = "SELECT path, line, quote FROM passages JOIN files ON files.id = file WHERE passages.id = ?"
                path, line, quote = base.execute(place, (int(ids[at]),)).fetchone()
                found.append(Found(path, line, quote, round(float(meaning[at]), 3), round(float(shares[at]), 3)))
            return found

    @contextlib.contextmanager
    def _open(self, kind: str = "DEFERRED") -> Iterator[sqlite3.Connection]:
        if not self.file.exists():
            self._make()
        with contextlib.closing(sqlite3.connect(self.file, timeout=_PATIENCE_S, isolation_level=None)) as base:
            base.execute(f"BEGIN {kind}")
            yield base
            base.execute("COMMIT")

    def _make(self) -> None:
        """Others must never see half of it, nor be there while it is switched to WAL: for that SQLite does not wait."""
        folder = self.file.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.file.with_suffix(".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.file.exists():
                return
            with tempfile.TemporaryDirectory(prefix="demo-memory-", dir=folder) as scratch:
                made = Path(scratch) / self.file.name
                with contextlib.closing(sqlite3.connect(made)) as base:
                    base.executescript(_TABLES)
                made.rename(self.file)


def _model(base: sqlite3.Connection, probe: Vectors) -> int | None:
    for ident, known in base.execute("SELECT id, probe FROM models"):
        if is_same(np.frombuffer(known, np.float32), probe):
            return int(ident)
    return None


def _forget(base: sqlite3.Connection, path: str) -> None:
    base.execute("DELETE FROM passages WHERE file = (SELECT id FROM files WHERE path = ?)", (path,))
    base.execute("DELETE FROM files WHERE path = ?", (path,))


def _meanings(
    base: sqlite3.Connection, model: int | None, asked: Vectors
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """All passages of a model, and their cosines to what is asked."""
    rows = base.execute(
        "SELECT passages.id, vector FROM passages JOIN files ON files.id = file WHERE model = ?", (model,)
    )
    ids, cosines = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    while part := rows.fetchmany(_SCAN):
        ids.append(np.array([ident for ident, _ in part]))
        cosines.append(np.frombuffer(b"".join(vector for _, vector in part), np.float32).reshape(len(part), -1) @ asked)
    return np.concatenate(ids), np.concatenate(cosines)


def _shares(base: sqlite3.Connection, ids: NDArray[np.int64], words: Sequence[str]) -> NDArray[np.float64]:
    """For each passage the share of the words that it has, each word weighted by how rare it is."""
    shares, total = np.zeros(len(ids)), 0.0
    for word in words:
        rows = base.execute("SELECT rowid FROM words WHERE words MATCH ?", (f'"{word}"',)).fetchall()
        has = np.isin(ids, np.array(rows, np.int64))
        weight = np.log1p(len(ids) / (1 + np.count_nonzero(has)))
        shares += weight * has
        total += weight
    return shares / (total or 1.0)
