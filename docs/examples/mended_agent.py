"""slow_agent.py as docs/profile.md mends it: compared in a step, and only with tickets that can be like it."""

from __future__ import annotations

import functools
import random
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import headrace as hr


@dataclass
class Match:
    number: int
    ratio: float


@hr.agent
async def acknowledge(ctx: Any, text: str) -> str:
    """What a customer hears at once."""
    return f"We have got your message of {len(text.split())} words."


@hr.agent
async def similar(ctx: Any, text: str) -> list[Match]:
    """The old tickets that are most like this one."""
    return await ctx.step("closest", closest, text)


def closest(text: str, least: float = 0.6) -> list[Match]:
    words = text.split()
    shared = Counter(number for word in words for number in having().get(word, ()))
    found = []
    for number, most in shared.items():
        ticket = archive()[number]
        if 2 * most < least * (len(words) + len(ticket)):
            continue  # not even if all words that they share stood in the same order
        ratio = SequenceMatcher(None, words, ticket).ratio()
        if ratio >= least:
            found.append(Match(number, ratio))
    return sorted(found, key=lambda match: -match.ratio)[:5]


@functools.cache
def having() -> dict[str, list[int]]:
    """By word: the tickets that have it."""
    found: dict[str, list[int]] = {}
    for number, ticket in enumerate(archive()):
        for word in set(ticket):
            found.setdefault(word, []).append(number)
    return found


@functools.cache
def archive() -> list[list[str]]:
    """What a database would give, read once: the words of 5,000 tickets."""
    chance = random.Random(7)
    vocabulary = [f"word{number}" for number in range(400)]
    return [chance.choices(vocabulary, k=80) for _ in range(5000)]


if __name__ == "__main__":
    for words in archive()[:5]:
        print(closest(" ".join(words)))
