"""HTTP/2 written and read by hand, for tests: knows nothing of `heliograph.protocols.http2` (RFC 9113, RFC 7541).

Builders give a frame's octets, right or wrong as asked. `parse` gives the frames of what we sent in words, and
`pieces` says how each field of a header block was spelt. What the fields mean is for the `hpack` package to say.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

KINDS = (
    "DATA",
    "HEADERS",
    "PRIORITY",
    "RST_STREAM",
    "SETTINGS",
    "PUSH_PROMISE",
    "PING",
    "GOAWAY",
    "WINDOW_UPDATE",
    "CONTINUATION",
)
_FLAGS = {
    "DATA": {0x1: "END_STREAM", 0x8: "PADDED"},
    "HEADERS": {0x1: "END_STREAM", 0x4: "END_HEADERS", 0x8: "PADDED", 0x20: "PRIORITY"},
    "SETTINGS": {0x1: "ACK"},
    "PING": {0x1: "ACK"},
    "CONTINUATION": {0x4: "END_HEADERS"},
}
CODES = (
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
)
SETTING_IDS = {
    "table_size": 1,
    "enable_push": 2,
    "max_streams": 3,
    "window": 4,
    "max_frame": 5,
    "max_header_list": 6,
}


# -- writing -------------------------------------------------------------------------------------------------------


def raw(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream_id) + payload


def _padded(payload: bytes, padding: int | None) -> tuple[int, bytes]:
    return (0, payload) if padding is None else (0x8, bytes((padding,)) + payload + bytes(padding))


def data(stream_id: int, body: bytes = b"", *, end: bool = False, padding: int | None = None) -> bytes:
    flags, payload = _padded(body, padding)
    return raw(0, flags | end, stream_id, payload)


def headers(
    stream_id: int,
    block: bytes,
    *,
    end: bool = True,
    whole: bool = True,
    padding: int | None = None,
    priority: bytes | None = None,
) -> bytes:
    """`whole`: END_HEADERS; `end`: END_STREAM; `priority`: its five octets."""
    flags, payload = _padded((priority or b"") + block, padding)
    return raw(1, flags | end | whole << 2 | (priority is not None) << 5, stream_id, payload)


def continuation(stream_id: int, block: bytes, *, whole: bool = True) -> bytes:
    return raw(9, whole << 2, stream_id, block)


def priority(stream_id: int, on: int = 0, weight: int = 16) -> bytes:
    return raw(2, 0, stream_id, struct.pack(">IB", on, weight - 1))


def rst_stream(stream_id: int, code: int) -> bytes:
    return raw(3, 0, stream_id, struct.pack(">I", code))


def settings(**values: int) -> bytes:
    return raw(4, 0, 0, b"".join(struct.pack(">HI", SETTING_IDS[name], value) for name, value in values.items()))


SETTINGS_ACK = raw(4, 1, 0)


def ping(payload: bytes = b"12345678", *, ack: bool = False) -> bytes:
    return raw(6, ack, 0, payload)


def goaway(last_stream_id: int, code: int = 0, debug: bytes = b"") -> bytes:
    return raw(7, 0, 0, struct.pack(">II", last_stream_id, code) + debug)


def window_update(stream_id: int, increment: int) -> bytes:
    return raw(8, 0, stream_id, struct.pack(">I", increment))


# -- header blocks -------------------------------------------------------------------------------------------------


def integer(number: int, prefix_bits: int, first: int = 0) -> bytes:
    full = (1 << prefix_bits) - 1
    if number < full:
        return bytes((first | number,))
    out = [first | full]
    number -= full
    while number > 127:
        out.append(number % 128 + 128)
        number //= 128
    return bytes((*out, number))


def literal(name: bytes, value: bytes, *, first: int = 0x00) -> bytes:
    """A field in letters. `first` says how: 0x00 leaves the table alone, 0x40 makes an entry, 0x10 is never indexed."""
    return bytes((first,)) + integer(len(name), 7) + name + integer(len(value), 7) + value


def block(*fields: tuple[bytes, bytes]) -> bytes:
    return b"".join(literal(name, value) for name, value in fields)


# -- reading -------------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """What was sent, in words."""

    kind: str
    stream_id: int
    flags: tuple[str, ...]
    payload: bytes

    def __repr__(self) -> str:
        shown = self.payload.hex(" ") if len(self.payload) < 33 else f"{len(self.payload)} octets"
        return f"<{' '.join([self.kind, str(self.stream_id), *self.flags])}: {shown}>"

    @property
    def number(self) -> int:
        """The last four octets: a window's increment, an error code."""
        return int(struct.unpack(">I", self.payload[-4:])[0])

    @property
    def code(self) -> str:
        """The error code of RST_STREAM or GOAWAY."""
        at = {"RST_STREAM": 0, "GOAWAY": 4}[self.kind]
        return CODES[struct.unpack_from(">I", self.payload, at)[0]]

    @property
    def last_stream_id(self) -> int:
        return int(struct.unpack_from(">I", self.payload)[0])

    @property
    def settings(self) -> dict[str, int]:
        names = {number: name for name, number in SETTING_IDS.items()}
        return {names[key]: value for key, value in struct.iter_unpack(">HI", self.payload)}


def parse(octets: bytes) -> list[Frame]:
    """Whole frames and nothing else; a preface in front is passed over. Fails on what HTTP/2 does not know."""
    octets = octets.removeprefix(PREFACE)
    found = []
    while octets:
        size = int.from_bytes(octets[:3], "big")
        kind = KINDS[octets[3]]
        known = _FLAGS.get(kind, {})
        assert not octets[4] & ~sum(known), f"flags {octets[4]:#x} on {kind}"
        assert len(octets) >= 9 + size, f"{kind} is cut off"
        flags = tuple(name for bit, name in known.items() if octets[4] & bit)
        found.append(Frame(kind, int(struct.unpack_from(">I", octets, 5)[0]), flags, octets[9 : 9 + size]))
        octets = octets[9 + size :]
    return found


class Piece(NamedTuple):
    """How one field, or a change of the table's size, is spelt in a block."""

    how: str
    """`indexed`, `entry` (a literal that enters the table), `literal`, `never` or `size`."""
    number: int
    """The index of the field or of its name, 0 where the name is spelt out; or the new size."""
    octets: int


def pieces(octets: bytes) -> Iterator[Piece]:
    at = 0
    while at < len(octets):
        start, first = at, octets[at]
        how, bits = (
            ("indexed", 7)
            if first & 0x80
            else ("entry", 6)
            if first & 0x40
            else ("size", 5)
            if first & 0x20
            else ("never", 4)
            if first & 0x10
            else ("literal", 4)
        )
        index, at = _integer_at(octets, at, bits)
        if how in ("entry", "never", "literal"):
            for _ in range(1 if index else 2):
                size, at = _integer_at(octets, at, 7)
                at += size
        yield Piece(how, index, at - start)
    assert at == len(octets), "a block that ends inside a field"


def _integer_at(octets: bytes, at: int, prefix_bits: int) -> tuple[int, int]:
    full = (1 << prefix_bits) - 1
    number = octets[at] & full
    at += 1
    if number == full:
        weight = 1
        while True:
            number += octets[at] % 128 * weight
            weight *= 128
            at += 1
            if octets[at - 1] < 128:
                break
    return number, at
