"""What a connection's `receive`, `tick` and `eof` tell.

Streams are spoken of by the caller's own *keys* (client) or by stream id (server). On a client connection every key
that `submit` took is reported exactly once: in Accepted, Answered, NotProcessed or Unknown.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from heliograph.protocols.http2.hpack import Field

Key = Any
"""What the caller of `submit` calls a request; never looked into."""


class Accepted(Struct, frozen=True):
    """Plain 200s: no body, and no field that the connection was asked to keep."""

    keys: list[Key]


class Answered(Struct, frozen=True):
    """A whole answer. Its body may end early if the peer sent more than `max_body` octets."""

    key: Key
    status: int
    fields: list[Field]
    """Without pseudo-fields."""
    body: bytes


class NotProcessed(Struct, frozen=True):
    """The peer certainly did not act on these (RFC 9113, section 8.7): sending again elsewhere is free."""

    keys: list[Key]
    why: str


class Unknown(Struct, frozen=True):
    """These may have been acted on; no answer will come."""

    keys: list[Key]
    why: str


class Request(Struct, frozen=True):
    """A whole request."""

    stream_id: int
    fields: list[Field]
    """As they came, pseudo-fields first."""
    body: bytes
    truncated: bool = False
    """The body was longer than `max_body`; the rest was thrown away."""


class Cancelled(Struct, frozen=True):
    """The client gave up on a request that was reported; an answer to it goes nowhere."""

    stream_id: int
    code: int


class SettingsChanged(Struct, frozen=True):
    """The peer sent SETTINGS, its first or a later one."""

    max_streams: int
    """How many streams we may have open at once; 2**31-1 where the peer sets no limit."""


class WindowOpened(Struct, frozen=True):
    """The connection's window was shut and is open again: more requests may go out."""


class GoAway(Struct, frozen=True):
    """The peer takes no new streams on this connection."""

    last_stream_id: int
    code: int
    debug: bytes
    """Apple puts JSON with a `reason` there."""


class Pong(Struct, frozen=True):
    """An answer to our `ping`."""

    payload: bytes


class Failed(Struct, frozen=True):
    """The connection is over; send what `data_to_send` has, then close the socket.

    `ours` tells whose fault it was: True where we ended it for what the peer did (or did not do in time).
    """

    code: int
    why: str
    ours: bool


Event = (
    Accepted
    | Answered
    | NotProcessed
    | Unknown
    | Request
    | Cancelled
    | SettingsChanged
    | WindowOpened
    | GoAway
    | Pong
    | Failed
)
