"""The demo's index: what is found, what is forgotten, and who may use it at once."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from headrace.demo.memory import Memory, Vectors, words_of
from headrace.demo.reading import Passage, Text

WIDTH = 8
PROBE: Vectors = np.eye(WIDTH, dtype=np.float32)[0]


def axis(number: int) -> Vectors:
    """A meaning that has nothing to do with the other axes."""
    return np.eye(WIDTH, dtype=np.float32)[number]


def text(file: str, *quotes: str, digest: str = "d1") -> Text:
    return Text(file, digest, [Passage(line, quote) for line, quote in enumerate(quotes, 1)])


def keep(memory: Memory, *texts: Text, probe: Vectors = PROBE, meaning: int = 1) -> None:
    """Index texts, all passages with one meaning."""
    passages = sum(len(each.passages) for each in texts)
    vectors = np.tile(np.eye(len(probe), dtype=np.float32)[meaning], (passages, 1))
    memory.keep(probe, texts, vectors)


def found(memory: Memory, question: str, meaning: int = 7) -> list[str]:
    """Quotes that are found; without a meaning of theirs, by their words alone."""
    hits = memory.search(PROBE, axis(meaning), question, limit=100)
    assert hits is not None
    return [hit.quote for hit in hits]


def check(memory: Memory) -> None:
    """The index of words is that of the passages, and every passage belongs to a file."""
    with contextlib.closing(sqlite3.connect(memory.file)) as base:
        base.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
        assert base.execute("SELECT count(*) FROM passages WHERE file NOT IN (SELECT id FROM files)").fetchone() == (0,)
        assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "data")


def test_before_anything_is_indexed_there_is_nothing_to_search(memory: Memory) -> None:
    assert memory.search(PROBE, axis(1), "anything") is None
    keep(memory, text("/a/empty.md"))
    assert memory.search(PROBE, axis(1), "anything") is None


def test_it_is_found_by_meaning_and_by_words(memory: Memory) -> None:
    keep(memory, text("/a/roses.md", "Roses want sun.", "Cut them in March."), meaning=1)
    keep(memory, text("/a/bread.md", "Let the dough rest."), meaning=2)
    (first, second) = memory.search(PROBE, axis(1), "what do flowers need?") or []
    assert (first.file, first.line, first.quote, first.similarity, first.words) == (
        "/a/roses.md", 1, "Roses want sun.", 1.0, 0.0,
    )  # fmt: skip
    assert (second.line, second.quote) == (2, "Cut them in March.")
    assert found(memory, "dough") == ["Let the dough rest."]


def test_what_is_near_neither_in_meaning_nor_in_words_is_not_returned(memory: Memory) -> None:
    keep(memory, *(text(f"/a/{number}.md", f"Rule {number} of the house is rule {number}.") for number in range(20)))
    assert found(memory, "what is the capital of France?") == []
    assert found(memory, "the rule of France") == []  # half its words, but common ones
    assert found(memory, "rule 7") == ["Rule 7 of the house is rule 7."]
    aslant = np.float32([0.0, 0.24, 0.0, 0.0, 0.0, 0.0, 0.0, np.sqrt(1 - 0.24**2)])
    assert memory.search(PROBE, aslant, "paraphrase") == []
    aslant = np.float32([0.0, 0.26, 0.0, 0.0, 0.0, 0.0, 0.0, np.sqrt(1 - 0.26**2)])
    assert len(memory.search(PROBE, aslant, "paraphrase") or []) == 5


@pytest.mark.parametrize("question", ["", "   ", "?!…", '"" * ^ ( ) { } : + -', "\0", "🙂", "—"])
def test_a_question_without_a_word_has_none(memory: Memory, question: str) -> None:
    assert words_of(question) == []
    keep(memory, text("/a/x.md", "Something."))
    assert found(memory, question) == []


@pytest.mark.parametrize(
    "question",
    [
        'say "dough"', '"dough', "dough*", "dough AND", "NEAR(dough, 3)", "NOT dough", "quote: dough", "^dough",
        "dough\0", "\0dough", "dough'; DROP TABLE words; --", "{dough}", "(dough", "- dough", "_ dough", "DOUGH",
        "dóugh", "ⅷ dough", "dough \u0301", "dough " * 100,
    ],
)  # fmt: skip
def test_words_mean_nothing_to_the_full_text_search(memory: Memory, question: str) -> None:
    keep(memory, text("/a/bread.md", "dough"), text("/a/roses.md", "Roses want sun."))
    assert "Roses want sun." not in found(memory, question)
    hits = memory.search(PROBE, axis(1), question) or []
    assert {hit.quote: hit.words > 0 for hit in hits}["dough"]
    check(memory)


def test_a_name_with_underscores_is_one_word_and_other_scripts_have_words(memory: Memory) -> None:
    keep(memory, text("/a/x.md", "See max_wait_ms.", "Wait at most 5 ms.", "Ждать пять минут.", "Die Straße ist naß."))
    assert found(memory, "max_wait_ms") == ["See max_wait_ms."]
    assert found(memory, "минут") == ["Ждать пять минут."]
    assert found(memory, "STRAßE") == ["Die Straße ist naß."]


def test_thousands_of_words_are_no_reason_to_fail(memory: Memory) -> None:
    keep(memory, text("/a/x.md", "needle"))
    assert found(memory, "needle " + " ".join(f"w{number}" for number in range(10_000))) == []
    assert len(words_of("needle " + " ".join(f"w{number}" for number in range(10_000)))) < 100


def test_a_file_is_indexed_anew_only_when_it_has_changed(memory: Memory) -> None:
    old, new = text("/a/x.md", "It was red.", "And old."), text("/a/x.md", "It is blue.", digest="d2")
    other = text("/a/y.md", "Something red.")
    keep(memory, old, other)
    assert memory.unknown(PROBE, [old, new, other]) == [new]
    keep(memory, new)
    assert memory.unknown(PROBE, [old, new, other]) == [old]
    assert found(memory, "red") == ["Something red."]
    assert found(memory, "blue") == ["It is blue."]
    check(memory)


def test_what_is_no_text_any_more_is_forgotten(memory: Memory) -> None:
    keep(memory, text("/a/x.md", "It was red."))
    gone = text("/a/x.md", digest="")
    assert memory.unknown(PROBE, [gone]) == [gone]
    keep(memory, gone)
    assert memory.files_in("/a") == []
    check(memory)


def test_a_part_is_kept_as_a_whole_or_not_at_all(memory: Memory) -> None:
    keep(memory, text("/a/x.md", "It was red."))
    texts = [text("/a/x.md", "It is blue.", digest="d2"), text("/a/y.md", "So is this.", "And this.")]
    with pytest.raises(ValueError, match="zip"):
        memory.keep(PROBE, texts, np.stack([axis(1), axis(1)]))  # one too few
    assert memory.files_in("/a") == ["/a/x.md"]
    assert found(memory, "red") == ["It was red."]
    check(memory)


def test_a_folder_has_its_own_files_and_those_below_and_no_others(memory: Memory) -> None:
    inside = ["/data/a/x.md", "/data/a/b/y.md", "/data/a/%_[*].md", "/data/a/ü.md"]
    outside = ["/data/ab/x.md", "/data/a.md", "/data/a0/x.md", "/data/A/x.md", "/x/data/a/x.md"]
    keep(memory, *(text(path, "Here.") for path in [*inside, *outside]))
    assert sorted(memory.files_in("/data/a")) == sorted(inside)
    assert memory.files_in("/data/a/b") == ["/data/a/b/y.md"]
    assert memory.files_in("/data/%") == []
    assert len(memory.files_in("/")) == len(inside + outside)
    memory.forget(inside)
    assert sorted(memory.files_in("/")) == sorted(outside)
    assert len(found(memory, "here")) == len(outside)
    check(memory)


@pytest.mark.parametrize("width", [WIDTH, 3, 300])
def test_another_model_knows_nothing_until_its_own_index_is_made(memory: Memory, width: int) -> None:
    texts = [text("/a/x.md", "Roses want sun."), text("/a/y.md", "Let the dough rest.")]
    keep(memory, *texts)
    other = np.roll(np.eye(width, dtype=np.float32)[0], 2)
    asked = np.eye(width, dtype=np.float32)[1]
    assert memory.search(other, asked, "roses") is None
    assert memory.unknown(other, texts) == texts
    keep(memory, texts[0], probe=other)
    (hit,) = memory.search(other, asked, "roses dough") or []
    assert hit.quote == "Roses want sun."
    assert found(memory, "dough", meaning=1) == ["Let the dough rest."], "the rest is still there for the first model"
    keep(memory, texts[1], probe=other)
    assert memory.search(PROBE, axis(1), "roses") is None
    check(memory)


def test_noise_makes_no_other_model(memory: Memory) -> None:
    keep(memory, text("/a/x.md", "Roses want sun."))
    noisy = PROBE + np.float32(0.01)
    noisy /= np.linalg.norm(noisy)
    assert memory.unknown(noisy, [text("/a/x.md", "Roses want sun.")]) == []
