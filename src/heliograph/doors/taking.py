"""What was taken of a request: what its answer is made from, the first time and whenever the request is repeated.

It has the ids of batches and no others, so that it takes a few octets though a request may have 10,000 notifications.
Repetitions are told by `Idempotency-Key` (IETF draft-ietf-httpapi-idempotency-key-header-07).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from hashlib import sha256

import msgspec
from msgspec import Struct
from msgspec.json import encode

from heliograph.doors.answers import ManyTaken
from heliograph.doors.exchange import ErrorItem
from heliograph.doors.receipts import PLACES
from heliograph.errors import Refused, StoreError
from heliograph.model import Batch, Once

HEADER = b"idempotency-key"

# The draft has a String of Structured Fields (RFC 9651, section 3.3.3); most clients send what would be in it, bare.
_is_string = re.compile(rb'"((?:[ !#-\[\]-~]|\\["\\]){1,510})"').fullmatch
_is_bare = re.compile(rb"[!#-~][!-~]{0,254}").fullmatch
_MAX_KEY_CHARS = 255


class Wrong(Struct, frozen=True, array_like=True):
    """What is wrong in the same way with several entries of a list."""

    code: str
    detail: str
    field: str | None
    places: bytes
    """Two octets each, little-endian."""


class Taken(Struct, frozen=True, array_like=True):
    """What was taken."""

    batches: tuple[tuple[str, int], ...]
    """Each with its size."""
    single: bool
    """One notification by itself, and no list."""
    wrong: tuple[Wrong, ...] | None = None
    """With `partial`: the rest of the list."""

    def body(self) -> bytes:
        """All ids as JSON, in the caller's order; ids need no escaping."""
        between = '","'
        parts = [name + (between + name).join(PLACES[:size]) for name, size in self.batches]
        if self.wrong is None:
            return ('{"ids":["' + between.join(parts) + '"]}').encode()
        errors = sorted(self._errors(), key=_index)
        refused = {each.index for each in errors}
        ids = iter(between.join(parts).split(between))
        count = sum(size for _, size in self.batches) + len(refused)
        return encode(ManyTaken([None if index in refused else next(ids) for index in range(count)], errors))

    def _errors(self) -> Iterable[ErrorItem]:
        for each in self.wrong or ():
            for (index,) in struct.iter_unpack("<H", each.places):
                yield ErrorItem(each.code, each.detail, index, each.field)


def take_down(batches: Sequence[Batch], *, single: bool, wrong: Sequence[ErrorItem] | None) -> Taken:
    """`wrong`: as `Request.complaints` has it, with `partial`."""
    sizes = tuple([(batch.id, len(batch)) for batch in batches])
    if wrong is None:
        return Taken(sizes, single)
    alike: dict[tuple[str, str, str | None], list[int]] = {}
    for each in wrong:
        alike.setdefault((each.code, each.detail, each.field), []).append(_index(each))
    return Taken(sizes, single, tuple([Wrong(*what, struct.pack(f"<{len(of)}H", *of)) for what, of in alike.items()]))


def _index(error: ErrorItem) -> int:
    assert error.index is not None, "with something left to take, what is wrong is wrong with an entry"
    return error.index


_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.Decoder(Taken).decode


def once_key(header: bytes, caller_id: str) -> bytes:
    """Which request it is: no two callers share a word. Raises Refused."""
    if string := _is_string(header):
        word = re.sub(rb"\\(.)", rb"\1", string[1])
    else:
        word = header if _is_bare(header) else b""
    if not 0 < len(word) <= _MAX_KEY_CHARS:
        text = (
            f"Idempotency-Key must have 1 to {_MAX_KEY_CHARS} printable ASCII characters: without blanks, or in double "
            "quotes. A new UUID for each request is best."
        )
        raise Refused("BadIdempotencyKey", text, field="Idempotency-Key")
    return sha256(caller_id.encode() + b"\n" + word).digest()


def keep(key: bytes, body: bytes, taken: Taken) -> Once:
    """What is to be kept with what was taken."""
    return Once(key, sha256(body).digest(), _encode(taken))


def find_again(kept: Once, body: bytes) -> Taken | None:
    """What was taken; None where `body` is another. Raises StoreError."""
    if kept.request != sha256(body).digest():
        return None
    try:
        return _decode(kept.answer)
    except msgspec.DecodeError as error:
        raise StoreError(f"The answer that was kept for a request to be repeated cannot be read: {error}.") from error
