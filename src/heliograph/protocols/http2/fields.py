"""The rules for header fields in HTTP/2 messages (RFC 9113, section 8).

A message that breaks them is *malformed*: its stream ends with PROTOCOL_ERROR, and nothing of it is passed on.

A connection says much the same again and again, so verdicts are remembered: on the names of a message as a whole, and
on single fields. Both memories are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import filterfalse

from heliograph.protocols.http2.hpack import Field


class Malformed(Exception):
    """A message against RFC 9113, section 8. The text names the rule, never the value."""


_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch
_BAD_OCTETS = b"\0\r\n"
_CONNECTION_FIELDS = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"),
)
_REQUEST_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_NEEDED = frozenset((b":method", b":scheme", b":path"))
_KEEP = 512

_sound: set[Field] = set()
"""Fields whose value passed before; at most `_KEEP`."""


def _check_values(fields: Sequence[Field]) -> None:
    for field in filterfalse(_sound.__contains__, fields):
        name, value = field
        if len(value.translate(None, _BAD_OCTETS)) != len(value) or value.strip(b" \t") != value:
            raise Malformed("a field value has CR, LF or NUL in it, or white space around it")
        if not value and name in _NEEDED:
            raise Malformed(f"{name.decode()} is empty")
        if name == b"te" and value != b"trailers":
            raise Malformed("te is not trailers")
        if len(_sound) >= _KEEP:
            _sound.clear()
        _sound.add(field)


@lru_cache(maxsize=256)
def _check_names(names: tuple[bytes, ...], pseudo_allowed: frozenset[bytes]) -> bool:
    """Whether the message has fields that need a second look (`_second_look`)."""
    pseudo = [name for name in names if name[:1] == b":"]
    if any(name[:1] == b":" for name in names[len(pseudo) :]):
        raise Malformed("a pseudo-field comes after an ordinary one")
    if len(set(pseudo)) != len(pseudo) or not pseudo_allowed.issuperset(pseudo):
        raise Malformed("a pseudo-field comes twice or does not belong here")
    for name in names[len(pseudo) :]:
        if not _NAME(name):
            raise Malformed("a field name has an upper-case letter or a character that is not allowed")
        if name in _CONNECTION_FIELDS:
            raise Malformed("a connection-specific field")
    return b"host" in names or b"content-length" in names


@lru_cache(maxsize=256)
def _check_request_names(names: tuple[bytes, ...]) -> bool:
    """As `_check_names`."""
    second = _check_names(names, _REQUEST_PSEUDO)
    if not _NEEDED.issubset(names):
        raise Malformed(":method, :scheme or :path is missing")
    return second


def _second_look(fields: Sequence[Field]) -> int | None:
    """Fields whose values must agree with each other; returns the declared length of the body, or None."""
    length: int | None = None
    host: bytes | None = None
    for name, value in fields:
        if name == b"content-length":
            # isdigit alone would take any number of digits, and int() refuses very long ones with another error
            if not value.isdigit() or len(value) > 18 or length not in (None, int(value)):
                raise Malformed("content-length is not one number")
            length = int(value)
        elif name in (b":authority", b"host"):
            if host not in (None, value) or (name == b"host" and host is not None and fields.count((name, value)) > 1):
                raise Malformed("host comes twice or is not :authority")
            host = value
    return length


def check_request(fields: Sequence[Field]) -> int | None:
    """The declared length of the body, or None. Raises Malformed if these cannot begin a request (section 8.3.1).

    CONNECT has no use here and is refused, as it lacks :scheme and :path.
    """
    second = _check_request_names(tuple([name for name, _ in fields]))
    _check_values(fields)
    return _second_look(fields) if second else None


def check_answer(fields: Sequence[Field]) -> tuple[int, int | None]:
    """The status, and the declared length of the body or None.

    Raises Malformed if these cannot begin an answer (section 8.3.2).
    """
    second = _check_names(tuple([name for name, _ in fields]), frozenset((b":status",)))
    status = fields[0][1] if fields and fields[0][0] == b":status" else b""
    if len(status) != 3 or not status.isdigit() or status < b"100":
        raise Malformed("an answer begins with :status, of three digits")
    _check_values(fields)
    return int(status), _second_look(fields) if second else None


def check_trailers(fields: Sequence[Field]) -> None:
    """Raises Malformed if these cannot end a message (section 8.1)."""
    _check_names(tuple([name for name, _ in fields]), frozenset())
    _check_values(fields)
