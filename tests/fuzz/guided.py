"""Coverage-guided input in a hundred lines, for pure Python: what reaches new code is kept and changed further.

Coverage is which line of a file follows which, and roughly how often. Everything follows from one seed.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from msgspec import Struct

_NUMBERS = (0, 1, 2, 5, 10, 31, 32, 33, 100, 101, 127, 128, 255, 256, 257, 2048, 2049, 5119, 5120, 5121, 2**16 - 1)
_LARGE = (2**16, 2**31 - 1, 2**31, 2**32 - 1)


class Found(Struct, frozen=True):
    """What a run came to."""

    inputs: int
    corpus: int
    """Of these that showed something new."""
    pairs: int
    """Lines that were seen one behind the other."""


class Broken(Exception):
    """The check failed on this input; the cause is chained."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data.hex())
        self.data = data


def explore(
    check: Callable[[bytes], object],
    file: str,
    seeds: Sequence[bytes],
    words: Sequence[bytes],
    *,
    seconds: float,
    chance: random.Random,
) -> Found:
    """Call `check` with ever new inputs, led by what they reach in `file`. Raises Broken.

    `words` are octets that mean something where these inputs are read.
    """
    until = time.monotonic() + seconds
    tracer = _Tracer(file)
    corpus: list[bytes] = []
    seen: set[int] = set()
    pairs: set[int] = set()
    inputs = 0
    while inputs < len(seeds) or time.monotonic() < until:
        data = seeds[inputs] if inputs < len(seeds) else mutate(_choose(corpus, chance), corpus, words, chance)
        inputs += 1
        try:
            counts = tracer.run(check, data)
        except Exception as error:
            raise Broken(data) from error
        # How often only by its order of magnitude: otherwise each further frame would be news.
        features = {pair << 6 | count.bit_length() for pair, count in counts.items()}
        if not features <= seen:
            seen |= features
            pairs |= counts.keys()
            corpus.append(data)
    return Found(inputs, len(corpus), len(pairs))


def mutate(data: bytes, corpus: Sequence[bytes], words: Sequence[bytes], chance: random.Random) -> bytes:
    """Something like it."""
    made = bytearray(data)
    for _ in range(1 << chance.randrange(5)):
        at = chance.randint(0, len(made))
        size = min(chance.choice((1, 2, 4, 8, 40, 200)), len(made) - at)
        match chance.randrange(9):
            case 0 if at < len(made):
                made[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(made):
                made[at] = chance.randrange(256)
            case 2:
                number, width = _number(len(made) - at, chance)
                made[at : at + width] = number.to_bytes(width)
            case 3:
                del made[at : at + size]
            case 4:
                made[at:at] = chance.randbytes(chance.choice((1, 2, 5, 30)))
            case 5:
                made[at:at] = made[at : at + size] * chance.choice((1, 2, 10))
            case 6:
                made[at:at] = chance.choice(words)
            case 7:
                other = chance.choice(corpus or words)
                start = chance.randint(0, len(other))
                made[at:] = other[start:]
            case _:
                made += chance.choice(words)
    return bytes(made[:_LONGEST])


_LONGEST = 24_000


def _choose(corpus: Sequence[bytes], chance: random.Random) -> bytes:
    """New ones more often, as little has been tried with them; and short ones, which are quick."""
    one, other = (corpus[-1 - int(len(corpus) * chance.random() ** 2)] for _ in range(2))
    return min(one, other, key=len)


def _number(left: int, chance: random.Random) -> tuple[int, int]:
    """A big-endian number that is likely to matter as a length, and its octets."""
    match chance.randrange(3):
        case 0:
            return chance.choice((*_NUMBERS, *_LARGE)), 4
        case 1:
            return chance.choice(_NUMBERS), 2
        case _:
            return max(0, min(left + chance.randint(-4, 4), 2**16 - 1)), chance.choice((2, 4))


class _Tracer:
    def __init__(self, file: str) -> None:
        self._file = file
        self._counts: Counter[int] = Counter()
        self._line = 0

    def run(self, check: Callable[[bytes], object], data: bytes) -> Counter[int]:
        """How often each pair of lines was seen."""
        self._counts, self._line = Counter(), 0
        before = sys.gettrace()
        sys.settrace(self._on_call)
        try:
            check(data)
        finally:
            sys.settrace(before)
        return self._counts

    def _on_call(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._on_line if frame.f_code.co_filename == self._file else None

    def _on_line(self, frame: FrameType, event: str, arg: object) -> Any:
        line = frame.f_lineno
        self._counts[self._line << 16 | line] += 1
        self._line = line
        return self._on_line
