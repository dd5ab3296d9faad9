"""A batch's immutable body as bytes: what every database stores in one column.

One octet says which form follows; form 1 is msgpack, an array in the order of `_Body`. Device tokens are stored as the
octets that their hex digits spell, and lengths only where they differ, so that a thousand notifications cost few calls.
"""

from __future__ import annotations

import binascii
import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise

import msgspec

from heliograph.errors import StoreError
from heliograph.model import MAX_BATCH, Batch, Environment, Headers

_FORM = b"\x01"


class _Body(msgspec.Struct, frozen=True, array_like=True):
    headers: tuple[Headers, ...]
    headers_of: bytes | None
    digits: int
    """Hex digits of each device token, an even number; 0: `digits_of` has them one by one."""
    digits_of: bytes
    tokens: bytes
    """All device tokens' digits in a row, as octets; with one digit 0 more where their number is odd."""
    octets_of: bytes
    """Octets of each payload; empty: all share one."""
    payloads: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Body)


def pack(batch: Batch) -> bytes:
    """Everything of `batch` but what a database keeps in columns of its own: id, app, environment, created_at.

    Raises ValueError when the batch's columns do not fit together or a device token is not hex. Digits above 9 come
    back in lower case.
    """
    count = len(batch.tokens)
    if not 1 <= count <= MAX_BATCH:
        raise ValueError(f"a batch has 1 to {MAX_BATCH} device tokens, not {count}")
    if len(batch.payloads) not in {1, count}:
        raise ValueError(f"a batch of {count} has one payload for all or one each, not {len(batch.payloads)}")
    if not batch.headers:
        raise ValueError("a batch has at least one set of headers")
    if batch.headers_of is not None and (len(batch.headers_of) != count or max(batch.headers_of) >= len(batch.headers)):
        raise ValueError("headers_of has the position of one of the batch's headers for each notification")

    lengths = set(map(len, batch.tokens))
    digits = lengths.pop() if len(lengths) == 1 else 0
    if digits % 2:
        digits = 0
    tokens = b"".join(batch.tokens)
    if len(tokens) % 2:
        tokens += b"0"
    return _FORM + _encoder.encode(
        _Body(
            headers=batch.headers,
            headers_of=batch.headers_of,
            digits=digits,
            digits_of=b"" if digits else _lengths(batch.tokens),
            tokens=binascii.unhexlify(tokens),
            octets_of=b"" if len(batch.payloads) == 1 else _lengths(batch.payloads),
            payloads=b"".join(batch.payloads),
        )
    )


def unpack(id: str, app: str, environment: Environment, created_at: float, body: bytes) -> Batch:
    """The batch that `pack` was given. Raises StoreError when `body` is not what `pack` made."""
    try:
        if body[:1] != _FORM:
            raise ValueError("it has an unknown form")
        packed = _decoder.decode(memoryview(body)[1:])
        if packed.digits:
            # With one separator a token, hexlify and split do in C what a thousand slices would do here.
            tokens = binascii.hexlify(packed.tokens, b" ", packed.digits // 2).split()
        else:
            tokens = _cut(binascii.hexlify(packed.tokens), packed.digits_of)
        payloads = _cut(packed.payloads, packed.octets_of) if packed.octets_of else [packed.payloads]
        if len(payloads) not in {1, len(tokens)}:
            raise ValueError("it has neither one payload nor one each")
    except (ValueError, struct.error, msgspec.DecodeError) as error:
        raise StoreError(f"The stored body of batch {id}0000 cannot be read: {error}") from error
    return Batch(
        id=id,
        app=app,
        environment=environment,
        created_at=created_at,
        headers=packed.headers,
        tokens=tokens,
        payloads=payloads,
        headers_of=packed.headers_of,
    )


def _lengths(entries: Sequence[bytes]) -> bytes:
    return struct.pack(f"<{len(entries)}I", *map(len, entries))


def _cut(joined: bytes, lengths: bytes) -> list[bytes]:
    ends = list(accumulate(struct.unpack(f"<{len(lengths) // 4}I", lengths), initial=0))
    if not 0 <= len(joined) - ends[-1] <= 1:  # a digit that only made their number even belongs to none
        raise ValueError("its parts are not as long as it says")
    return [joined[start:end] for start, end in pairwise(ends)]
