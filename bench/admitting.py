"""Frames through the parser and admission, in one process without a network: `python -m bench.admitting TASK`.

Prints `Admitted` as JSON. Admission asks a real store which device tokens are held back, and some are, though none of
those that come.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from pathlib import Path

import msgspec

from bench.pki import KEY_ID, TEAM_ID, TOPIC
from heliograph.carriers.apns import ApnsCarrier
from heliograph.doors.legacy.columns import HeaderSets
from heliograph.model import Access, App, DeviceToken, Environment, Origin, Removal, SigningKey
from heliograph.protocols.binary import FrameReader, Frames, enhanced_frame
from heliograph.relay import Relay
from heliograph.stores.sqlite import SqliteStore
from heliograph.telemetry import Telemetry

APP = "bench"
PIECE = 64 * 1024
"""Octets that are read at once."""
HELD = 10_000
WARM = 10
"""Pieces that are not measured."""


class Task(msgspec.Struct, frozen=True):
    folder: str
    """An empty one, for the store."""
    tokens: str
    key: str
    """The .p8 file's content, as text."""
    payload: str
    """JSON; each frame has another number in it, as the others of this bench."""
    number: int


class Admitted(msgspec.Struct, frozen=True):
    """CPU seconds of the process."""

    number: int
    parsing: float
    all: float


async def main() -> None:
    task = msgspec.json.decode(sys.argv[1], type=Task)
    pieces = _pieces(task)
    store = await SqliteStore.open(Path(task.folder) / "heliograph.db")
    production = Environment.PRODUCTION
    held = [Removal(APP, production, DeviceToken(os.urandom(32).hex()), int(time.time())) for _ in range(HELD)]
    await store.record((), held)
    key = SigningKey(KEY_ID, TEAM_ID, task.key.encode())
    app = App(APP, (TOPIC,), (Access(key, (production,)),))
    carrier = ApnsCarrier(lambda *_: None, clock=time.time)
    relay = Relay(store, store, carrier, {APP: app}, Telemetry(), clock=time.time)
    sets = HeaderSets(TOPIC, (TOPIC,))

    async def admit(frames: Frames) -> int:
        headers = sets.column(frames, time.time())
        origin = Origin("bench", b"".join(each.to_bytes(4) for each in frames.identifiers))
        begun = await relay.admit_until_refused(APP, production, headers, frames.tokens, frames.payloads, origin)
        assert begun.refused is None, begun.refused
        return sum(map(len, begun.batches))

    for frames in _parse(pieces[:WARM]):
        await admit(frames)
    before = time.process_time()
    number = sum(map(len, _parse(pieces)))
    parsing = time.process_time() - before
    assert number == task.number
    before = time.process_time()
    reader = FrameReader()
    number = 0
    for piece in pieces:
        frames, error = reader.receive(piece)
        assert error is None
        number += await admit(frames)
    all_of_it = time.process_time() - before
    assert number == task.number
    await carrier.aclose()
    await store.aclose()
    print(msgspec.json.encode(Admitted(number, parsing, all_of_it)).decode())


def _pieces(task: Task) -> list[bytes]:
    tokens = itertools.cycle(Path(task.tokens).read_bytes().split())
    before, after = task.payload.encode().split(b"0" * 10)
    stream = b"".join(
        enhanced_frame(token, b"%b%010d%b" % (before, number, after), number, 2**31 - 1)
        for number, token in zip(range(task.number), tokens, strict=False)
    )
    return [stream[at : at + PIECE] for at in range(0, len(stream), PIECE)]


def _parse(pieces: list[bytes]) -> list[Frames]:
    reader = FrameReader()
    return [reader.receive(piece)[0] for piece in pieces]


if __name__ == "__main__":
    asyncio.run(main())
