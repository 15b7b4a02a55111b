"""One call of a library takes most of the time; what follows is quick and steady."""

from __future__ import annotations

import hashlib
import random
import sys


def key(seed: int) -> bytes:
    rounds = 1_500_000 + 1000 * seed
    return hashlib.pbkdf2_hmac("sha256", b"password", b"salt", rounds)  # HERE


def sign(secret: bytes, message: bytes) -> str:
    return hashlib.sha256(secret + message).hexdigest()


def main(seed: int = 0) -> None:
    secret = key(random.Random(seed).randrange(300))
    print(len({sign(secret, b"%d" % number) for number in range(5000)}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
