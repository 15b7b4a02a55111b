"""Text in folders: which files there are, in what order, and their passages.

A place in a folder is the path of a file relative to it, and reading goes on behind such a place: nobody has to keep
the list of a million files. Knows nothing of the index.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

SUFFIXES = (".md", ".txt", ".rst", ".py")
MOST_BYTES = 1_000_000
PASSAGE_CHARS = 400
# What is read at a time: a few seconds of an embedding model on a CPU.
MOST_FILES = 64
_ENOUGH_CHARS = 128 * 1024


class Passage(NamedTuple):
    """Lines that belong together; the first is number ``line`` of its file, counted from 1."""

    line: int
    quote: str


@dataclass(frozen=True)
class Text:
    """A file as it was read. ``digest`` is that of its bytes; empty, without passages, for what is no text."""

    file: str
    digest: str
    passages: list[Passage]


def find_files(folder: str, after: str = "") -> Iterator[str]:
    """Text files in a folder and those below, relative to it and in order, from behind ``after`` on.

    Left out is what is hidden, too large, or named in bytes that are not UTF-8. Folders that cannot be read are passed
    over, and links to folders are not followed: they could lead back.
    """
    first, _, rest = after.partition("/")
    for entry in _entries(folder):
        if entry.name < first:
            continue
        if entry.is_dir(follow_symlinks=False):
            for inner in find_files(entry.path, rest if entry.name == first else ""):
                yield f"{entry.name}/{inner}"
        elif entry.name > first and is_to_be_read(entry.path):
            yield entry.name


def is_to_be_read(path: str) -> bool:
    """Whether there is a file of a kind and size that is indexed."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return path.endswith(SUFFIXES) and stat.S_ISREG(found.st_mode) and found.st_size <= MOST_BYTES


def read_next(folder: str, after: str) -> tuple[list[Text], str]:
    """The files behind ``after``, as many as are enough for now, and the place of the last one.

    At the end there is none, and the place stays as it was.
    """
    texts: list[Text] = []
    chars, last = 0, after
    for last in find_files(folder, after):
        texts.append(read(os.path.join(folder, last)))
        chars += sum(len(passage.quote) for passage in texts[-1].passages)
        if len(texts) >= MOST_FILES or chars >= _ENOUGH_CHARS:
            break
    return texts, last


def read(path: str) -> Text:
    """A file and its passages. No text is what has vanished, is not UTF-8, or has a null byte in it."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return Text(path, "", [])
    if "\0" in text or len(content) > MOST_BYTES:
        return Text(path, "", [])
    return Text(path, hashlib.sha256(content).hexdigest(), list(split(text)))


def split(text: str) -> Iterator[Passage]:
    """Paragraphs; those of more than `PASSAGE_CHARS` are cut at the ends of lines, and longer lines between words.

    Lines end where editors and grep say so, not at form feeds and whatever else Unicode calls a break.
    """
    start, lines, chars = 0, list[str](), 0
    for number, line in enumerate([*text.replace("\r\n", "\n").split("\n"), ""], 1):
        if lines and (not line.strip() or chars + len(line) > PASSAGE_CHARS):
            yield Passage(start, "\n".join(lines))
            lines, chars = [], 0
        if len(line) > PASSAGE_CHARS:
            yield from (Passage(number, piece) for piece in _LONG_LINE.findall(line) if piece.strip())
        elif line.strip():
            start = start if lines else number
            lines.append(line)
            chars += len(line) + 1


# As much as ends between words, or as much as there may be where there is no such end.
_LONG_LINE = re.compile(rf".{{1,{PASSAGE_CHARS}}}(?=\s|$)|.{{1,{PASSAGE_CHARS}}}", re.DOTALL)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, in order; nothing where it cannot be read."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        shown = [entry for entry in found if not entry.name.startswith(".") and _is_utf8(entry.name)]
        return sorted(shown, key=lambda entry: entry.name)
    return []


def _is_utf8(name: str) -> bool:
    """Other names can be written neither in JSON nor in SQLite."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
