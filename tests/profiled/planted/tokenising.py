"""A server tokenises long texts in its handler, on the event loop."""

from __future__ import annotations

import asyncio
import random
import sys

from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["weir", "race", "sluice", "wheel", "flume", "penstock", "water", "mill"]


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordPiece({"[UNK]": 0, **{word: n for n, word in enumerate(WORDS, 1)}}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


async def embed(encoder: Tokenizer, text: str) -> int:
    ids = encoder.encode(text).ids  # HERE
    await asyncio.sleep(0.002)
    return len(ids)


async def client(encoder: Tokenizer, texts: list[str]) -> int:
    return sum([await embed(encoder, text) for text in texts])


async def serve(seed: int) -> None:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=4000 + draw.randrange(1000))) for _ in range(30)]
    encoder = tokenizer()
    print(sum(await asyncio.gather(*(client(encoder, texts) for _ in range(4)))))


def main(seed: int = 0) -> None:
    asyncio.run(serve(seed))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
