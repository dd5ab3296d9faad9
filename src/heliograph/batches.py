"""Ids and batches: how columns of notifications become `model.Batch` values. Pure.

RFC 9562, section 5.7 (UUIDv7): 48 bits of UNIX milliseconds, then random bits, of which the last 16 are ours: the place
of a notification in its batch, counted from 1, zero for the batch itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from heliograph.model import MAX_BATCH, MAX_BATCH_BYTES, Batch, Environment, Headers, Origin

MAX_KINDS = 256
"""Distinct header sets in one batch: which one a notification uses is one octet."""

_PLACE_DIGITS = 4
_is_id = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").fullmatch


def new_batch_id(now: float, random: bytes) -> str:
    """The id of a new batch; `now` is UNIX seconds, `random` has eight octets."""
    bits = int.from_bytes(random, "big")
    head = (int(now * 1000) << 16) | 0x7000 | (bits & 0xFFF)
    tail = 0x8000_0000_0000 | (bits >> 12 & 0x3FFF_FFFF_FFFF)
    text = f"{head:016x}{tail:012x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def notification_id(batch_id: str, index: int) -> str:
    """The id of the notification at `index` of a batch."""
    return f"{batch_id}{index + 1:04x}"


def parse_id(text: str) -> tuple[str, int] | None:
    """The batch id and the index that a notification's id names, in any case of letters; None if it cannot be one."""
    text = text.lower()
    if not _is_id(text):
        return None
    index = int(text[-_PLACE_DIGITS:], 16) - 1
    return (text[:-_PLACE_DIGITS], index) if 0 <= index < MAX_BATCH else None


def make_batches(
    new_id: Callable[[], str],
    app: str,
    environment: Environment,
    created_at: float,
    headers: Sequence[Headers],
    tokens: Sequence[bytes],
    payloads: Sequence[bytes],
    origin: Origin | None = None,
) -> Iterator[Batch]:
    """Cut columns into batches, in order.

    `headers` and `payloads` have one entry for all or one each.
    """
    if len(tokens) == 1:
        yield Batch(new_id(), app, environment, created_at, tuple(headers), tokens, payloads, origin=origin)
        return
    start = 0
    while start < len(tokens):
        stop = _cut(start, tokens, payloads)
        kinds, kind_of = _kinds(headers if len(headers) == 1 else headers[start:stop])
        if len(kinds) > MAX_KINDS:
            stop = start + MAX_KINDS
            kinds, kind_of = _kinds(headers[start:stop])
        yield Batch(
            id=new_id(),
            app=app,
            environment=environment,
            created_at=created_at,
            headers=kinds,
            tokens=tokens[start:stop],
            payloads=payloads if len(payloads) == 1 else payloads[start:stop],
            headers_of=kind_of,
            origin=None if origin is None else origin.part(start, stop),
        )
        start = stop


def _cut(start: int, tokens: Sequence[bytes], payloads: Sequence[bytes]) -> int:
    """Where the batch that begins at `start` ends."""
    stop = min(start + MAX_BATCH, len(tokens))
    if len(payloads) == 1 or sum(map(len, payloads[start:stop])) <= MAX_BATCH_BYTES // 2:
        return stop
    room = MAX_BATCH_BYTES
    for place in range(start, stop):
        room -= len(payloads[place]) + len(tokens[place]) // 2
        if room < 0 and place > start:
            return place
    return stop


def _kinds(headers: Sequence[Headers]) -> tuple[tuple[Headers, ...], bytes | None]:
    """The distinct header sets, and which notification uses which."""
    if headers.count(headers[0]) == len(headers):  # compares by identity first: fast where they are one object
        return (headers[0],), None
    places: dict[Headers, int] = {}
    kind_of = [places.setdefault(each, len(places)) for each in headers]
    return tuple(places), bytes(kind_of) if len(places) <= MAX_KINDS else b""
