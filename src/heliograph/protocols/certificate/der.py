"""DER, and as much of BER as programs wrote into .p12 files: indefinite lengths, OCTET STRINGs in pieces.

Source: ITU-T X.690.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from heliograph.errors import ConfigError

MAX_DEPTH = 32

_MAX_NUMBER = 64
"""Octets of an INTEGER that is counted with. Python prints none of many thousands of digits."""

INTEGER, BIT_STRING, OCTET_STRING, NULL, OID, UTF8_STRING = 0x02, 0x03, 0x04, 0x05, 0x06, 0x0C
_CONSTRUCTED = 0x20
SEQUENCE, EXPLICIT_0 = 0x30, 0xA0


class Tlv(NamedTuple):
    """A tag with what it holds. All methods raise ConfigError where something else stands there."""

    tag: int
    content: bytes
    """Without the end-of-contents of an indefinite length."""
    raw: bytes

    def __repr__(self) -> str:
        return f"<tag {self.tag:#04x} of {len(self.raw)} octets>"

    @classmethod
    def of(cls, octets: bytes) -> Tlv:
        return _read(octets, 0)[0]

    def children(self) -> list[Tlv]:
        if not self.tag & _CONSTRUCTED:
            damaged()
        return read_all(self.content)

    def part(self, place: int, tag: int) -> Tlv:
        children = self.children()
        if place >= len(children) or children[place].tag != tag:
            damaged()
        return children[place]

    def only(self) -> Tlv:
        children = self.children()
        if len(children) != 1:
            damaged()
        return children[0]

    def octets(self) -> bytes:
        """Of an OCTET STRING, whole or in pieces."""
        if self.tag == OCTET_STRING:
            return self.content
        if self.tag != OCTET_STRING | _CONSTRUCTED:
            damaged()
        return b"".join(piece.content for piece in self.children() if piece.tag == OCTET_STRING)

    def number(self) -> int:
        """An INTEGER of at least 1."""
        number = int.from_bytes(self.content[: _MAX_NUMBER + 1], "big", signed=True)
        if self.tag != INTEGER or number < 1 or len(self.content) > _MAX_NUMBER:
            damaged()
        return number


def damaged() -> NoReturn:
    raise ConfigError("The file is damaged, or cut short: export it again, and copy it as binary")


def read_all(octets: bytes) -> list[Tlv]:
    at, found = 0, []
    while at < len(octets):
        tlv, at = _read(octets, at)
        found.append(tlv)
        if len(found) > 1000:
            damaged()
    return found


def _read(octets: bytes, at: int, depth: int = MAX_DEPTH) -> tuple[Tlv, int]:
    """The tag at a place, and the place behind it."""
    start = at
    head = octets[at : at + 2]
    if len(head) < 2 or head[0] & 0x1F == 0x1F or not depth:
        damaged()
    at += 2
    tag, length = head
    if length == 0x80:
        if not tag & _CONSTRUCTED:
            damaged()
        begin = at
        while octets[at : at + 2] != b"\0\0":
            _, at = _read(octets, at, depth - 1)
        return Tlv(tag, octets[begin:at], octets[start : at + 2]), at + 2
    if length > 0x80:
        count = length & 0x7F
        length = int.from_bytes(octets[at : at + count], "big")
        at += count
    if at + length > len(octets):
        damaged()
    return Tlv(tag, octets[at : at + length], octets[start : at + length]), at + length


def tlv(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    size = (length.bit_length() + 7) // 8
    return bytes((tag, 0x80 | size)) + length.to_bytes(size, "big") + content
