# ruff: noqa: T201 - a program, which prints what it finds
"""The frame reader under whatever octets there are: `python -m tests.fuzz.frames [--seconds S] [--seed N]`.

What must hold is `check`. An input that breaks it is printed, and tried again with `--again HEX`. With `--atheris`
Google's fuzzer leads in place of our own; it has to be importable.
"""

from __future__ import annotations

import argparse
import importlib
import io
import random
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from heliograph.protocols import binary
from heliograph.protocols.binary import (
    ErrorResponse,
    FrameReader,
    Frames,
    Status,
    enhanced_frame,
    item_frame,
    items,
    simple_frame,
)
from tests.fuzz.guided import Broken, explore

LIMITS = ((5120, 5120), (256, 2048), (20, 60), (1, 1), (60, 20))
"""Of payloads, and of those with command 2. The low ones bring short inputs to where long ones matter."""

TOKEN = b"ab" * 32
PAYLOAD = b'{"aps":{"alert":"?"}}'

Row = tuple[bytes, bytes, int, int | None, int | None]


def check(data: bytes) -> None:
    """Two octets choose limits and cuts, the rest is what a client writes. Raises whatever is wrong."""
    if len(data) < 2:
        return
    limits, stream = LIMITS[data[0] % len(LIMITS)], data[2:]
    whole = _read([stream], limits)
    assert whole == _plainly(stream, limits), "it is not what Apple's pages say"
    assert _read(_cut(stream, random.Random(data[1])), limits) == whole, "it depends on how the octets arrive"
    traced = sys.gettrace()
    sys.settrace(None)  # an octet at a time shows nothing that is new, slowly
    try:
        if len(stream) <= _BY_OCTETS:
            assert _read([stream[at : at + 1] for at in range(len(stream))], limits) == whole, "octet by octet differs"
        _check_rows(whole[0], limits)
    finally:
        sys.settrace(traced)


_BY_OCTETS = 1500


def _read(pieces: Iterable[bytes], limits: tuple[int, int]) -> tuple[list[Row], ErrorResponse | None, bool]:
    """Everything that a connection takes, its one error, and whether an unfinished frame is left."""
    max_payload, max_item_payload = limits
    reader = FrameReader(max_payload=max_payload, max_item_payload=max_item_payload)
    longest = max(1 + 4 + 4 + 2 + 100 + 2 + max_payload, 5 + 5 * 3 + 100 + max_item_payload + 4 + 4 + 1)
    rows: list[Row] = []
    error: ErrorResponse | None = None
    whole = b""
    for piece in pieces:
        whole += piece
        frames, now = reader.receive(piece)
        assert error is None or (not frames and now is None), "something came after the error"
        assert 0 <= reader.held < longest, f"{reader.held} octets are held, and the longest frame has {longest}"
        assert len(reader._held) < longest
        if frames:
            rows += _rows(frames)
        error = error or now
    if error is not None:
        assert reader.held == len(reader._held) == 0, "something is held behind the error"
        frames, now = reader.receive(b"\1" * 300)
        assert not frames, "something came after the error"
        assert now is None, "there are two errors"
    elif not reader._left and reader.held:
        # What is held is the end of what came, and without it nothing is unfinished.
        assert whole.endswith(reader._held)
        before = FrameReader(max_payload=max_payload, max_item_payload=max_item_payload)
        frames, now = before.receive(whole[: -reader.held])
        assert (_rows(frames), now, before.held) == (rows, None, 0), "what is held is not the unfinished frame"
    return rows, error, bool(reader.held)


def _rows(frames: Frames) -> list[Row]:
    columns = frames.tokens, frames.payloads, frames.identifiers, frames.expirations, frames.priorities
    return list(zip(*columns, strict=True))


def _check_rows(rows: Sequence[Row], limits: tuple[int, int]) -> None:
    for token, payload, identifier, expiration, priority in rows:
        assert 1 <= len(bytes.fromhex(token.decode())) <= 100
        assert token == token.lower()
        assert 1 <= len(payload) <= max(limits)
        assert 0 <= identifier < 2**32
        assert expiration is None or 0 <= expiration < 2**32
        assert priority in (None, 1, 5, 10)
    written = [
        item_frame(items(token, payload, identifier, expiration, priority))
        for token, payload, identifier, expiration, priority in rows
    ]
    frames, error = FrameReader().receive(b"".join(written))
    assert (_rows(frames), error) == (list(rows), None), "written again it is something else"


class _Bad(Exception):
    pass


def _plainly(stream: bytes, limits: tuple[int, int]) -> tuple[list[Row], ErrorResponse | None, bool]:
    """The same as `_read`, from all that came at once: slow, and short enough to be compared with Apple's pages."""
    source = io.BytesIO(stream)
    rows: list[Row] = []

    def take(size: int) -> bytes:
        octets = source.read(size)
        if len(octets) < size:
            raise EOFError
        return octets

    def number(size: int) -> int:
        return int.from_bytes(take(size))

    try:
        while source.tell() < len(stream):
            rows.append(_one_plainly(take, number, *limits))
    except EOFError:
        return rows, None, True
    except _Bad as bad:
        return rows, ErrorResponse(*bad.args), False
    return rows, None, False


def _one_plainly(take: Callable[[int], bytes], number: Callable[[int], int], most: int, most_item: int) -> Row:
    """A frame. Raises EOFError, and _Bad with status and identifier."""
    command = number(1)
    if command not in (0, 1, 2):
        raise _Bad(Status.PROTOCOL_ERROR, 0)
    if command == 2:
        return _items_plainly(take, number, most_item)
    identifier, expiration = (number(4), number(4)) if command == 1 else (0, None)
    size = number(2)
    if not 1 <= size <= 100:
        raise _Bad(Status.INVALID_TOKEN_SIZE if size else Status.MISSING_TOKEN, identifier)
    token = take(size)
    size = number(2)
    if not 1 <= size <= most:
        raise _Bad(Status.INVALID_PAYLOAD_SIZE if size else Status.MISSING_PAYLOAD, identifier)
    return token.hex().encode(), take(size), identifier, expiration, None


def _items_plainly(take: Callable[[int], bytes], number: Callable[[int], int], most: int) -> Row:
    left = number(4)
    too_long = left - (3 + 100 + 3 + most + 3 + 4 + 3 + 4 + 3 + 1)
    if too_long > 2**16 - 1:
        raise _Bad(Status.PROTOCOL_ERROR, 0)
    if too_long <= 0:
        body = io.BytesIO(take(left))
        take, number = body.read, lambda size: int.from_bytes(body.read(size))
    found: dict[int, bytes] = {}
    sound = True
    while left >= 3:
        kind, size = number(1), number(2)
        left -= 3 + size
        if left < 0 or (too_long > 0 and kind == 3 and not 1 <= size <= 4):
            left = -1
            break
        sound = sound and not (kind in found and 1 <= kind <= 5)
        data = take(size)
        found.setdefault(kind, data)
        if too_long > 0 and kind == 3:
            raise _Bad(Status.INVALID_PAYLOAD_SIZE, int.from_bytes(data))
    if too_long > 0:
        raise _Bad(Status.PROTOCOL_ERROR if left else Status.INVALID_PAYLOAD_SIZE, 0)
    sizes = {kind: len(found[kind]) for kind in (3, 4, 5) if kind in found}
    known = {kind: int.from_bytes(found[kind]) for kind, size in sizes.items() if 1 <= size <= 4}
    identifier, expiration, priority = known.get(3, 0), known.get(4), known.get(5)
    token, payload = found.get(1, b""), found.get(2, b"")
    for status, wrong in (
        (Status.PROTOCOL_ERROR, left or not sound or len(known) < len(sizes)),
        (Status.MISSING_TOKEN, not token),
        (Status.INVALID_TOKEN_SIZE, len(token) > 100),
        (Status.MISSING_PAYLOAD, not payload),
        (Status.INVALID_PAYLOAD_SIZE, len(payload) > most),
        (Status.PROCESSING_ERROR, priority not in (None, 1, 5, 10)),
    ):
        if wrong:
            raise _Bad(status, identifier)
    return token.hex().encode(), payload, identifier, expiration, priority


def _cut(stream: bytes, chance: random.Random) -> list[bytes]:
    cuts = sorted(chance.randint(0, len(stream)) for _ in range(chance.choice((1, 2, 5, 20))))
    return [stream[start:stop] for start, stop in pairwise((0, *cuts, len(stream)))]


def _item(kind: int, data: bytes) -> bytes:
    return struct.pack(">BH", kind, len(data)) + data


_FRAMES = [
    b"",
    simple_frame(TOKEN, PAYLOAD),
    enhanced_frame(TOKEN, PAYLOAD, 7, 2**31),
    item_frame(items(TOKEN, PAYLOAD, 7, 2**31, 5)),
    item_frame([(9, b"?"), *reversed(items(TOKEN, PAYLOAD, 7, None, 10))]),
    item_frame([(1, b"\xab"), (2, b"{}"), (1, b"\xab")]),
    item_frame([(3, b"\1"), *items(b"ab" * 100, PAYLOAD)]),
    enhanced_frame(b"ab", b"{}", 1, 0),
    enhanced_frame(b"ab" * 100, b"x" * 5120, 2**32 - 1, 2**32 - 1),
    simple_frame(b"ab" * 101, b"{}"),
    item_frame(items(b"ab" * 100, b"x" * 5120, 1, 2, 1)),
    struct.pack(">BI", 2, 60_000) + _item(9, b"x" * 500) + _item(3, b"\0\0\0\7"),
    struct.pack(">BI", 2, 2**32 - 1),
    b"\3",
]
STREAMS = [*_FRAMES, b"".join(_FRAMES[:5]), enhanced_frame(TOKEN, PAYLOAD, 1, 1) * 50]
"""What clients write: sound frames of each kind and size, and some that are not."""
_SEEDS = [bytes((limits, 1)) + stream for stream in STREAMS for limits in range(len(LIMITS))]

WORDS = [
    simple_frame(TOKEN, PAYLOAD),
    enhanced_frame(TOKEN, PAYLOAD, 7, 2**31),
    enhanced_frame(b"ab", b"{", 7, 0),
    item_frame(items(TOKEN, PAYLOAD, 7, 2**31, 10)),
    item_frame(items(b"ab", b"{")),
    item_frame([]),
    *(_item(kind, b"\0\0\0\5") for kind in range(7)),
    *(_item(kind, b"\5") for kind in range(7)),
    _item(1, bytes(32)),
    _item(2, PAYLOAD),
    b"\2\0\0\0",
    b"\2\0\0\x20\0",
    b"\1" + bytes(8) + b"\0\x20",
    b"\0\0\x20",
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.frames")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--again", type=bytes.fromhex, metavar="HEX")
    parser.add_argument("--atheris", action="store_true")
    given = parser.parse_args()
    if given.again is not None:
        check(given.again)
        return
    print(f"again with --seed {given.seed}", flush=True)
    if given.atheris:
        _atheris(given.seconds, given.seed)
    began = time.monotonic()
    chance = random.Random(given.seed)
    try:
        found = explore(check, binary.__file__, _SEEDS, WORDS, seconds=given.seconds, chance=chance)
    except Broken as broken:
        traceback.print_exception(broken.__cause__)
        sys.exit(f"again with --again {broken.data.hex()}")
    took = time.monotonic() - began
    print(f"{found.inputs:,} inputs in {took:.0f} s, {found.corpus:,} kept, {found.pairs} pairs of lines")


def _atheris(seconds: float, seed: int) -> None:
    """Does not return. libFuzzer prints what breaks it, and leaves it in a file."""
    atheris = importlib.import_module("atheris")
    for each in (*vars(FrameReader).values(), enhanced_frame, item_frame):
        if callable(each) and hasattr(each, "__code__"):
            atheris.instrument_func(each)
    options = [f"-max_total_time={seconds:.0f}", f"-seed={seed or 1}", "-max_len=24000", "-len_control=20"]
    corpus = Path("corpus")
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(_SEEDS):
        (corpus / f"seed-{number}").write_bytes(data)
    atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", str(corpus)], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
