"""A tokeniser in a thread, where it belongs, beside a loop that does other things."""

from __future__ import annotations

import asyncio
import random
import sys

from balanced import round_of_work
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["weir", "race", "sluice", "wheel", "flume", "penstock", "water", "mill"]


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordPiece({"[UNK]": 0, **{word: n for n, word in enumerate(WORDS, 1)}}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def encode(encoder: Tokenizer, text: str) -> int:
    return len(encoder.encode(text).ids)


async def tick() -> None:
    while True:
        await asyncio.sleep(0.01)


async def serve(draw: random.Random) -> int:
    encoder, total = tokenizer(), 0
    ticker = asyncio.create_task(tick())
    for _ in range(60 + draw.randrange(10)):
        for _ in range(8):
            round_of_work(draw)
            await asyncio.sleep(0)
        total += await asyncio.to_thread(encode, encoder, " ".join(draw.choices(WORDS, k=400)))
    ticker.cancel()
    return total


def main(seed: int = 0) -> None:
    print(asyncio.run(serve(random.Random(seed))))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
