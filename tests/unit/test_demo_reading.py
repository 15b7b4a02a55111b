"""Which files the demo reads, in what order, and how it cuts them into passages."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from headrace.demo import reading
from headrace.demo.reading import Passage, find_files, read, read_next, split

# In order. A dash and a dot come before the slash of "a/…", and "a" before both.
NAMES = ["B.md", "a/a.txt", "a/b/c.py", "a/b/d.rst", "a/z.md", "a-b.md", "a.md", "ü/straße.md"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in NAMES:
        write(root / name, f"This is {name}.\n")
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def names(texts: list[reading.Text], folder: Path) -> list[str]:
    return [os.path.relpath(text.file, folder) for text in texts]


def test_files_come_in_order_and_behind_each_of_them_comes_the_rest(folder: Path) -> None:
    assert list(find_files(str(folder))) == NAMES
    for at, name in enumerate(NAMES):
        assert list(find_files(str(folder), name)) == NAMES[at + 1 :]


def test_a_bookmark_keeps_its_place_when_its_file_has_gone_or_become_a_folder(folder: Path) -> None:
    (folder / "a/b/c.py").unlink()
    assert list(find_files(str(folder), "a/b/c.py")) == NAMES[3:]
    write(folder / "a/b/c.py/inner.md", "A folder now.\n")
    assert list(find_files(str(folder), "a/b/c.py")) == ["a/b/c.py/inner.md", *NAMES[3:]]
    for name in ("a/a.txt", "a/b/c.py/inner.md", "a/b/d.rst", "a/z.md"):
        (folder / name).unlink()
    for name in ("a/b/c.py", "a/b", "a"):
        (folder / name).rmdir()
    (folder / "a").touch()
    assert list(find_files(str(folder), "a/b/c.py")) == NAMES[5:]


def test_what_is_hidden_too_large_or_no_text_by_its_name_is_left_out(folder: Path) -> None:
    write(folder / ".git/notes.md", "hidden\n")
    write(folder / ".hidden.md", "hidden\n")
    write(folder / "picture.png", "no text\n")
    write(folder / "long.md", "x" * (reading.MOST_BYTES + 1))
    os.mkfifo(folder / "pipe.txt")
    (folder / "a/back").symlink_to(folder)
    (folder / "broken.md").symlink_to(folder / "nowhere.md")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.md")).write_text("a name that is no UTF-8\n")
    assert list(find_files(str(folder))) == NAMES


def test_a_folder_that_cannot_be_read_is_passed_over(folder: Path) -> None:
    assert list(find_files(str(folder / "nowhere"))) == []


def test_a_part_is_bounded_and_the_parts_make_the_whole(folder: Path) -> None:
    many = [f"b/{number:03}.txt" for number in range(2 * reading.MOST_FILES)]
    for name in many:
        write(folder / name, name)
    bookmark, seen, parts = "", list[str](), list[int]()
    while (part := read_next(str(folder), bookmark))[0]:
        bookmark = part[1]
        parts.append(len(part[0]))
        seen += names(part[0], folder)
    assert seen == [*NAMES[:-1], *many, NAMES[-1]]
    assert parts == [reading.MOST_FILES, reading.MOST_FILES, len(NAMES)]
    assert read_next(str(folder), bookmark) == ([], bookmark)


def test_what_comes_behind_the_bookmark_is_read_and_what_comes_before_it_is_not(folder: Path) -> None:
    write(folder / "a.txt", "before\n")
    write(folder / "b.txt", "behind\n")
    texts, _ = read_next(str(folder), "a.txt")
    assert names(texts, folder) == ["b.txt", "ü/straße.md"]


def test_a_part_is_bounded_by_its_text_too(folder: Path) -> None:
    write(folder / "a/a.txt", "word " * 40_000)
    texts, bookmark = read_next(str(folder), "")
    assert names(texts, folder) == ["B.md", "a/a.txt"]
    assert bookmark == "a/a.txt"


@pytest.mark.parametrize("content", [b"caf\xe9\n", b"\xff\xfe\x00", b"bin\0ary", b"x" * (reading.MOST_BYTES + 1)])
def test_what_is_no_text_has_no_passages(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.txt").write_bytes(content)
    for path in (tmp_path / "file.txt", tmp_path / "gone.txt"):
        text = read(str(path))
        assert (text.digest, text.passages) == ("", [])


def test_a_mark_of_byte_order_is_not_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_bytes(b"\xef\xbb\xbfFirst.\r\nSecond.\r\n\r\nThird.\r\n")
    assert read(str(tmp_path / "file.txt")).passages == [Passage(1, "First.\nSecond."), Passage(4, "Third.")]


def test_an_empty_file_is_a_text_without_passages(tmp_path: Path) -> None:
    (tmp_path / "empty.py").touch()
    text = read(str(tmp_path / "empty.py"))
    assert text.digest
    assert text.passages == []


def test_passages_are_paragraphs_with_the_numbers_of_their_lines() -> None:
    text = "\n# Head\n\nOne\ntwo.\n   \nThree.\n\x0c\nFour\u2028still four.\n"
    assert list(split(text)) == [
        Passage(2, "# Head"),
        Passage(4, "One\ntwo."),
        Passage(7, "Three."),
        Passage(9, "Four\u2028still four."),
    ]


def test_a_long_paragraph_is_cut_at_the_ends_of_its_lines() -> None:
    lines = [f"line {number} {'x' * 90}" for number in range(1, 11)]
    found = list(split("\n".join(lines)))
    assert [passage.line for passage in found] == [1, 5, 9]
    assert "\n".join(passage.quote for passage in found) == "\n".join(lines)


def test_no_passage_is_longer_than_said_with_the_ends_of_its_lines() -> None:
    found = list(split("x\n" * 1000))
    assert max(len(passage.quote) for passage in found) in (reading.PASSAGE_CHARS - 1, reading.PASSAGE_CHARS)


def test_a_long_line_is_cut_between_words_and_nothing_of_it_is_lost() -> None:
    line = " ".join(f"word{number}" for number in range(500)) + " " + "y" * 1000
    found = list(split(f"Before.\n{line}\nAfter."))
    assert max(len(passage.quote) for passage in found) <= reading.PASSAGE_CHARS
    assert {passage.line for passage in found[1:-1]} == {2}
    assert (found[0], found[-1]) == (Passage(1, "Before."), Passage(3, "After."))
    inner = [passage.quote for passage in found[1:-1]]
    assert "".join(inner) == line
    assert re.findall(r"word\d+", " ".join(inner)) == [f"word{number}" for number in range(500)]
