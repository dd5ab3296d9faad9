"""A batch's immutable body as bytes: what every database stores in one column.

One octet says which form follows. Form 2 is a head and then all payloads in a row; a head is its length (4 octets,
big-endian) and msgpack, an array in the order of `_Head`. So whoever wants to know of a place what is no payload reads
the head alone, which is short (`Places`). A batch that came by a connection with a name, or with ids of its callers',
has a head with a few members more (`_Marked`); all others are as they ever were. In form 1, of older files, the
payloads are the array's last member.

Device tokens are stored as the octets that their hex digits spell, and lengths only where they differ, so that a
thousand notifications cost few calls.
"""

from __future__ import annotations

import binascii
import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise

import msgspec

from heliograph.errors import StoreError
from heliograph.model import MAX_BATCH, Batch, DeviceToken, Environment, Headers, Origin

_FORM_1, _FORM_2 = b"\x01", b"\x02"
_HEAD_AT = 5
"""Octets before the head: the form, and the head's length."""

HEAD_GUESS = 40_000
"""Octets at a body's beginning that mostly have the whole head in them: a thousand device tokens take 32,000."""


class _Head(msgspec.Struct, frozen=True, array_like=True):
    headers: tuple[Headers, ...]
    headers_of: bytes | None
    digits: int
    """Hex digits of each device token, an even number; 0: `digits_of` has them one by one."""
    digits_of: bytes
    tokens: bytes
    """All device tokens' digits in a row, as octets; with one digit 0 more where their number is odd."""
    octets_of: bytes
    """Octets of each payload; empty: all share one."""


class _Marked(_Head, frozen=True, array_like=True):
    """With what few have; of those that lack it, the members are not there."""

    connection: str | None = None
    identifiers: bytes = b""
    apns_ids: dict[int, str] = {}


class _Whole(_Head, frozen=True, array_like=True):
    """Form 1."""

    payloads: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Marked).decode
_decode_whole = msgspec.msgpack.Decoder(_Whole).decode


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
    if batch.origin is not None and len(batch.origin.identifiers) not in {0, 4 * count}:
        raise ValueError("identifiers have 4 octets for each notification, or there are none")
    if batch.apns_ids and not 0 <= min(batch.apns_ids) <= max(batch.apns_ids) < count:
        raise ValueError("apns_ids are of notifications of the batch")

    lengths = set(map(len, batch.tokens))
    digits = lengths.pop() if len(lengths) == 1 else 0
    if digits % 2:
        digits = 0
    tokens = b"".join(batch.tokens)
    if len(tokens) % 2:
        tokens += b"0"
    members = (
        batch.headers,
        batch.headers_of,
        digits,
        b"" if digits else _lengths(batch.tokens),
        binascii.unhexlify(tokens),
        b"" if len(batch.payloads) == 1 else _lengths(batch.payloads),
    )
    if batch.origin is not None:
        head = _encode(_Marked(*members, batch.origin.connection, batch.origin.identifiers, dict(batch.apns_ids)))
    elif batch.apns_ids:
        head = _encode(_Marked(*members, apns_ids=dict(batch.apns_ids)))
    else:
        head = _encode(_Head(*members))
    return b"".join((_FORM_2, len(head).to_bytes(_HEAD_AT - 1, "big"), head, *batch.payloads))


def unpack(id: str, app: str, environment: Environment, created_at: float, body: bytes) -> Batch:
    """The batch that `pack` was given. Raises StoreError when `body` is not what `pack` made."""
    try:
        packed, joined = _open(body)
        if packed.digits:
            # With one separator a token, hexlify and split do in C what a thousand slices would do here.
            tokens = binascii.hexlify(packed.tokens, b" ", packed.digits // 2).split()
        else:
            tokens = _cut(binascii.hexlify(packed.tokens), packed.digits_of)
        payloads = _cut(joined, packed.octets_of) if packed.octets_of else [joined]
        if len(payloads) not in {1, len(tokens)}:
            raise ValueError("it has neither one payload nor one each")
        origin, apns_ids = None, {}
        if isinstance(packed, _Marked):
            if packed.connection is not None:
                origin = Origin(packed.connection, packed.identifiers)
            apns_ids = packed.apns_ids
            if packed.identifiers and len(packed.identifiers) != 4 * len(tokens):
                raise ValueError("it has not as many identifiers as device tokens")
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
        origin=origin,
        apns_ids=apns_ids,
    )


def head_octets(start: bytes, size: int) -> int:
    """How many octets of a body of `size` octets `Places` needs; `start` is its first five or more."""
    if start[:1] != _FORM_2:
        return size
    return min(size, _HEAD_AT + int.from_bytes(start[1:_HEAD_AT], "big"))


class Places:
    """What a stored body says of the notifications of a batch, their payloads aside."""

    __slots__ = ("_digits", "_ends", "_head", "_marked")

    def __init__(self, start: bytes) -> None:
        """`start`: as much of the body as `head_octets` says. Raises StoreError when it is not what `pack` made."""
        try:
            self._head = _head(start)
            digits_of = self._head.digits_of
            self._ends = None if self._head.digits else list(accumulate(_read_lengths(digits_of), initial=0))
            if self._ends is not None and (self._ends[-1] + 1) // 2 > len(self._head.tokens):
                raise ValueError("it has fewer device tokens than lengths of them")
        except (ValueError, struct.error, msgspec.DecodeError) as error:
            raise StoreError(f"A stored body cannot be read: {error}") from error
        self._digits: str | None = None
        self._marked = self._head if isinstance(self._head, _Marked) else None

    @property
    def kinds(self) -> tuple[Headers, ...]:
        """The sets of headers that are used."""
        return self._head.headers if self._head.headers_of is not None else self._head.headers[:1]

    @property
    def kind_of(self) -> bytes:
        """Which of `kinds` each notification uses; empty where all use the first."""
        return self._head.headers_of or b""

    def headers(self, index: int) -> Headers:
        """Raises IndexError where there is no such place, as the next one does."""
        head = self._head
        return head.headers[0 if head.headers_of is None else head.headers_of[index]]

    def token(self, index: int) -> DeviceToken:
        digits = self._head.digits
        if self._ends is None:
            octets = digits // 2
            token = self._head.tokens[index * octets : (index + 1) * octets].hex()
        else:
            if self._digits is None:
                self._digits = self._head.tokens.hex()
            digits = self._ends[index + 1] - self._ends[index]
            token = self._digits[self._ends[index] : self._ends[index + 1]]
        if len(token) != digits:
            raise IndexError("no such place")
        return DeviceToken(token)

    @property
    def connection(self) -> str | None:
        """As in `model.Origin`."""
        return self._marked.connection if self._marked else None

    def identifier(self, index: int) -> int | None:
        """What the client calls it, if anything."""
        octets = self._marked.identifiers[4 * index : 4 * index + 4] if self._marked else b""
        return int.from_bytes(octets, "big") if len(octets) == 4 else None

    def apns_id(self, index: int) -> str | None:
        """The id that its caller brought, as it was written."""
        return self._marked.apns_ids.get(index) if self._marked else None

    def find(self, octets: bytes) -> list[int]:
        """The places whose device token's digits spell these octets, in order."""
        digits = 2 * len(octets)
        tokens, found = self._head.tokens, []
        if self._ends is not None:
            token = octets.hex()
            return [index for index in range(len(self._ends) - 1) if self.token(index) == token]
        if digits == self._head.digits:
            at = tokens.find(octets)
            while at >= 0:
                if at % len(octets) == 0:
                    found.append(at // len(octets))
                at = tokens.find(octets, at + 1)
        return found


def _open(body: bytes) -> tuple[_Head, bytes]:
    """What stands before the payloads, and those in a row."""
    if body[:1] == _FORM_1:
        whole = _decode_whole(memoryview(body)[1:])
        return whole, whole.payloads
    return _head(body), body[head_octets(body, len(body)) :]


def _head(start: bytes) -> _Head:
    form = start[:1]
    if form == _FORM_2:
        return _decode(start[_HEAD_AT : head_octets(start, len(start))])
    if form == _FORM_1:
        return _decode_whole(memoryview(start)[1:])
    raise ValueError("it has an unknown form")


def _lengths(entries: Sequence[bytes]) -> bytes:
    return struct.pack(f"<{len(entries)}I", *map(len, entries))


def _read_lengths(lengths: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(lengths) // 4}I", lengths)


def _cut(joined: bytes, lengths: bytes) -> list[bytes]:
    ends = list(accumulate(_read_lengths(lengths), initial=0))
    if not 0 <= len(joined) - ends[-1] <= 1:  # a digit that only made their number even belongs to none
        raise ValueError("its parts are not as long as it says")
    return [joined[start:end] for start, end in pairwise(ends)]
