"""Apple's binary interface of 2009 to 2021 and its feedback service: both roles, octets in, columns out.

The gateway role is `FrameReader` and `error_packet`; the provider role is `simple_frame`, `enhanced_frame`,
`item_frame` and `ErrorReader`. The feedback service is `feedback_tuples` and `FeedbackReader`.

The protocol in short: a provider writes frames and hears nothing while all is well. The first bad frame is answered
with one error packet and the end of the connection: what came before it is taken, what comes after it is not. Numbers
are big-endian. A frame begins with its command:

```
0  simple     token length (2) · token · payload length (2) · payload
1  enhanced   identifier (4) · expiration (4) · token length (2) · token · payload length (2) · payload
2  items      length of all items (4) · items, each: kind (1) · length (2) · data
```

Device tokens are octets on the wire and lower-case hex everywhere else. A mistake is told as soon as the octets that
make it one are there, and always the same however they arrive.

Sources: Apple, "Binary Provider API" and "Legacy Notification Format" (Local and Remote Notification Programming
Guide). Which mistake draws which status, where several could, Apple did not publish: that order is ours.
"""

from __future__ import annotations

from binascii import hexlify, unhexlify
from collections.abc import Iterable, Sequence
from enum import IntEnum
from struct import Struct as Layout
from struct import pack

from msgspec import Struct

SIMPLE, ENHANCED, ITEMS = 0, 1, 2
"""Commands of frames."""

ERROR = 8
"""The command of an error packet."""

TOKEN, PAYLOAD, IDENTIFIER, EXPIRATION, PRIORITY = range(1, 6)
"""Kinds of items. Others are skipped."""

MAX_TOKEN_BYTES = 100

MAX_PAYLOAD_BYTES = 5120
"""What Apple takes today for VoIP, and the most for anything: who knows the push type checks again."""

ERROR_PACKET_OCTETS = 6

_MAX_UINT16 = 2**16 - 1
_MAX_UINT32 = 2**32 - 1

_HEAD_OCTETS = 5
_KINDS = (TOKEN, PAYLOAD, IDENTIFIER, EXPIRATION, PRIORITY)
_NUMBERS = (IDENTIFIER, EXPIRATION, PRIORITY)
# Apple's are of 4, 4 and 1; some clients cut an identifier to the octets that it needs.
_NUMBER_OCTETS = range(1, 5)
# Apple named 5 and 10; 1 came with HTTP/2.
_PRIORITIES = (None, 1, 5, 10)

# Where it stops, token as octets, payload, identifier, expiration, priority.
_Frame = tuple[int, bytes, bytes, int, int | None, int | None]

# Nearly every frame there is: command, identifier, expiration, token length, token, payload length.
_usual = Layout(">BIIH32sH")
_unpack_usual = _usual.unpack_from
_unpack_identifier = Layout(">xII").unpack_from
_unpack_length = Layout(">H").unpack_from
_unpack_item = Layout(">BH").unpack_from
_unpack_tuple = Layout(">IH").unpack_from


class Status(IntEnum):
    """Why the gateway closes (Apple, "Binary Provider API", codes in the error-response packet)."""

    NO_ERROR = 0
    """Never sent: the gateway keeps silent."""
    PROCESSING_ERROR = 1
    """Here: a priority that does not exist. Else for whatever has no status of its own."""
    MISSING_TOKEN = 2
    """There is none, or it has no octets; some clients do this on purpose, to see what was taken before."""
    MISSING_TOPIC = 3
    """Not from a frame: the certificate names no app."""
    MISSING_PAYLOAD = 4
    """There is none, or it has no octets."""
    INVALID_TOKEN_SIZE = 5
    """More than 100 octets."""
    INVALID_TOPIC_SIZE = 6
    """Not from a frame, as 3."""
    INVALID_PAYLOAD_SIZE = 7
    """Longer than allowed; also a frame of items too long for any payload that is allowed."""
    INVALID_TOKEN = 8
    """Not from a frame alone: no such token in this environment."""
    SHUTDOWN = 10
    """The gateway goes away. The identifier is that of the last notification taken, which is not at fault."""
    PROTOCOL_ERROR = 128
    """The frame cannot be read: an unknown command, lengths that disagree, an item twice or of a wrong size."""
    UNKNOWN = 255
    """Nobody knows why."""


class ErrorResponse(Struct, frozen=True):
    """What an error packet says."""

    status: int
    """A `Status`, or a number that Apple has not published."""
    identifier: int
    """The frame's own, 0 where it has none (command 0 never has) or where it could not be read."""


class Frames(Struct, frozen=True):
    """Sound frames in the order they came, as columns: one entry a notification."""

    tokens: list[bytes]
    """Lower-case hex, 1 to 100 octets each."""
    payloads: list[bytes]
    """Not empty and not too long; nothing else is known of them."""
    identifiers: list[int]
    """As the provider chose them, 0 where it sent none. They need not be unique or grow."""
    expirations: list[int | None]
    """UNIX seconds, 0: try once, None: not said."""
    priorities: list[int | None]
    """1, 5 or 10; None: not said, and Apple took that for 10."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"<{len(self.tokens)} frames>"


class FrameReader:
    """The gateway's side of one connection: reads frames up to the first bad one.

    `max_payload` is what a payload may have in octets, `max_item_payload` the same with command 2. Apple's pages said
    256 and 2048; since June 2014 the gateway took 2048 with any command.
    """

    __slots__ = ("_ended", "_held", "_left", "_longest", "_max_item_payload", "_max_payload", "_skip", "_wanted")

    def __init__(self, *, max_payload: int = MAX_PAYLOAD_BYTES, max_item_payload: int = MAX_PAYLOAD_BYTES) -> None:
        self._max_payload = max_payload
        self._max_item_payload = max_item_payload
        # All items that there are, each once.
        self._longest = 5 * 3 + MAX_TOKEN_BYTES + max_item_payload + 4 + 4 + 1
        self._held = bytearray()
        self._wanted = 1
        self._left = 0
        self._skip = 0
        self._ended = False

    @property
    def held(self) -> int:
        """Octets of an unfinished frame: 0 between frames, and never more than the longest sound frame has."""
        return len(self._held) + (_HEAD_OCTETS if self._left else 0)

    def receive(self, data: bytes) -> tuple[Frames, ErrorResponse | None]:
        """What is complete with these octets, and the error to tell if the frame after that is bad.

        Once there was an error, all that follows is thrown away. Raises nothing, whatever the octets are.
        """
        frames = Frames([], [], [], [], [])
        if self._ended:
            return frames, None
        if self._held or self._left:
            self._held += data
            if len(self._held) < self._wanted:
                # So that an octet at a time costs no more than it brings.
                return frames, None
            data = bytes(self._held)
            self._held.clear()
        error = self._read_on(data) if self._left else self._read(data, frames)
        if error is not None:
            self._ended = True
            self._left = 0
            self._held.clear()
        return frames, error

    def _read(self, data: bytes, frames: Frames) -> ErrorResponse | None:
        """Read frames until one is unfinished or bad. This runs for every frame there is."""
        tokens: list[bytes] = []
        payloads, identifiers = frames.payloads, frames.identifiers
        expirations, priorities = frames.expirations, frames.priorities
        max_payload = self._max_payload
        error: ErrorResponse | None = None
        at, end = 0, len(data)
        last = end - _usual.size
        while at < end:
            while at < last:
                command, identifier, expiration, token_size, token, size = _unpack_usual(data, at)
                start = at + 45
                stop = start + size
                if command != ENHANCED or token_size != 32 or stop > end or not 0 < size <= max_payload:
                    break
                tokens.append(token)
                payloads.append(data[start:stop])
                identifiers.append(identifier)
                expirations.append(expiration)
                at = stop
            priorities += [None] * (len(tokens) - len(priorities))
            if at == end:
                break
            read = self._read_items if data[at] == ITEMS else self._read_lengths
            one = read(data, at)
            if one is None or isinstance(one, ErrorResponse):
                error = one
                break
            at, token, payload, identifier, expiration, priority = one
            tokens.append(token)
            payloads.append(payload)
            identifiers.append(identifier)
            expirations.append(expiration)
            priorities.append(priority)
        frames.tokens.extend(map(hexlify, tokens))
        return error

    def _keep(self, data: bytes, at: int, wanted: int) -> None:
        """The frame at `at` is unfinished: look at it again once it has as many octets."""
        self._held += data[at:]
        self._wanted = wanted

    def _read_lengths(self, data: bytes, at: int) -> _Frame | ErrorResponse | None:
        """Commands 0 and 1, and those that do not exist; None: unfinished, and kept."""
        identifier, expiration, head = 0, None, 3
        command = data[at]
        there = len(data) - at
        if command == ENHANCED:
            head = 11
        elif command != SIMPLE:
            return ErrorResponse(Status.PROTOCOL_ERROR, 0)
        if there < head:
            self._keep(data, at, head)
            return None
        if command == ENHANCED:
            identifier, expiration = _unpack_identifier(data, at)
        (token_size,) = _unpack_length(data, at + head - 2)
        if not 0 < token_size <= MAX_TOKEN_BYTES:
            return ErrorResponse(Status.INVALID_TOKEN_SIZE if token_size else Status.MISSING_TOKEN, identifier)
        head += token_size + 2
        if there < head:
            self._keep(data, at, head)
            return None
        start = at + head
        (size,) = _unpack_length(data, start - 2)
        if not 0 < size <= self._max_payload:
            return ErrorResponse(Status.INVALID_PAYLOAD_SIZE if size else Status.MISSING_PAYLOAD, identifier)
        if there < head + size:
            self._keep(data, at, head + size)
            return None
        stop = start + size
        return stop, data[start - 2 - token_size : start - 2], data[start:stop], identifier, expiration, None

    def _read_items(self, data: bytes, at: int) -> _Frame | ErrorResponse | None:
        """Command 2; None: unfinished, and kept."""
        start = at + _HEAD_OCTETS
        if len(data) < start:
            self._keep(data, at, _HEAD_OCTETS)
            return None
        size = int.from_bytes(data[at + 1 : start])
        if size > self._longest:
            if size > self._longest + _MAX_UINT16:
                # No payload is as long as that: what stands here is no length.
                return ErrorResponse(Status.PROTOCOL_ERROR, 0)
            self._left = size
            return self._read_on(data[start:])
        stop = start + size
        if len(data) < stop:
            self._keep(data, at, _HEAD_OCTETS + size)
            return None

        items: dict[int, bytes] = {}
        readable = True
        at = start
        while at < stop - 2:
            kind, size = _unpack_item(data, at)
            begin = at + 3
            at = begin + size
            if at > stop:
                break
            if kind not in items:
                items[kind] = data[begin:at]
            elif kind in _KINDS:
                readable = False
        numbers: list[int | None] = []
        for kind in _NUMBERS:
            octets = items.get(kind)
            if octets is not None and len(octets) not in _NUMBER_OCTETS:
                readable, octets = False, None
            numbers.append(None if octets is None else int.from_bytes(octets))
        identifier, expiration, priority = numbers
        identifier = identifier or 0
        if not readable or at != stop:
            return ErrorResponse(Status.PROTOCOL_ERROR, identifier)
        token, payload = items.get(TOKEN), items.get(PAYLOAD)
        if not token:
            return ErrorResponse(Status.MISSING_TOKEN, identifier)
        if len(token) > MAX_TOKEN_BYTES:
            return ErrorResponse(Status.INVALID_TOKEN_SIZE, identifier)
        if not payload:
            return ErrorResponse(Status.MISSING_PAYLOAD, identifier)
        if len(payload) > self._max_item_payload:
            return ErrorResponse(Status.INVALID_PAYLOAD_SIZE, identifier)
        if priority not in _PRIORITIES:
            return ErrorResponse(Status.PROCESSING_ERROR, identifier)
        return stop, token, payload, identifier, expiration, priority

    def _read_on(self, data: bytes) -> ErrorResponse | None:
        """Go through the items of a frame too long to be held, only to find its identifier; None: not there yet."""
        at, there = 0, len(data)
        while True:
            skipped = min(self._skip, there - at)
            self._skip -= skipped
            self._left -= skipped
            at += skipped
            if not self._left:
                return ErrorResponse(Status.INVALID_PAYLOAD_SIZE, 0)
            if self._skip:
                self._wanted = 1
                return None
            if self._left < 3:
                return ErrorResponse(Status.PROTOCOL_ERROR, 0)
            if there - at < 3:
                self._keep(data, at, 3)
                return None
            kind, size = _unpack_item(data, at)
            if 3 + size > self._left or (kind == IDENTIFIER and size not in _NUMBER_OCTETS):
                return ErrorResponse(Status.PROTOCOL_ERROR, 0)
            if kind == IDENTIFIER:
                if there - at < 3 + size:
                    self._keep(data, at, 3 + size)
                    return None
                return ErrorResponse(Status.INVALID_PAYLOAD_SIZE, int.from_bytes(data[at + 3 : at + 3 + size]))
            self._skip = 3 + size


def error_packet(status: int, identifier: int) -> bytes:
    """What the gateway says before it closes, 6 octets. Give it to the socket at once: old clients read only once."""
    return pack(">BBI", ERROR, status, identifier)


# -- the provider's side ----------------------------------------------------------------------------------------------


def simple_frame(token: bytes, payload: bytes) -> bytes:
    """Command 0. The token is hex, here and in the others; what the gateway would refuse can be built as well.

    Raises ValueError where the token is no hex, struct.error where something does not fit its field.
    """
    octets = unhexlify(token)
    return pack(">BH", SIMPLE, len(octets)) + octets + pack(">H", len(payload)) + payload


def enhanced_frame(token: bytes, payload: bytes, identifier: int, expiration: int) -> bytes:
    """Command 1; `expiration` is UNIX seconds, 0: try once. Raises as `simple_frame`."""
    octets = unhexlify(token)
    head = pack(">BIIH", ENHANCED, identifier, expiration, len(octets))
    return head + octets + pack(">H", len(payload)) + payload


def item_frame(items: Iterable[tuple[int, bytes]]) -> bytes:
    """Command 2, with items (kind, data) of any kind in any order. Raises struct.error as `simple_frame`."""
    body = b"".join(pack(">BH", kind, len(data)) + data for kind, data in items)
    return pack(">BI", ITEMS, len(body)) + body


def items(
    token: bytes,
    payload: bytes,
    identifier: int | None = None,
    expiration: int | None = None,
    priority: int | None = None,
) -> list[tuple[int, bytes]]:
    """A notification as items in Apple's order, without those that are None. Raises as `simple_frame`."""
    found = [(TOKEN, unhexlify(token)), (PAYLOAD, payload)]
    if identifier is not None:
        found.append((IDENTIFIER, pack(">I", identifier)))
    if expiration is not None:
        found.append((EXPIRATION, pack(">I", expiration)))
    if priority is not None:
        found.append((PRIORITY, pack(">B", priority)))
    return found


class ErrorReader:
    """The provider's side of one connection: reads the one error packet that may come."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = b""

    def receive(self, data: bytes) -> ErrorResponse | None:
        """The error, once, when its sixth octet is there; what follows is thrown away.

        What is no error packet is `Status.UNKNOWN` with identifier 0.
        """
        missing = ERROR_PACKET_OCTETS - len(self._held)
        self._held += data[:missing]
        if not missing or len(self._held) < ERROR_PACKET_OCTETS:
            return None
        if self._held[0] != ERROR:
            return ErrorResponse(Status.UNKNOWN, 0)
        return ErrorResponse(self._held[1], int.from_bytes(self._held[2:]))


# -- the feedback service ---------------------------------------------------------------------------------------------


def feedback_tuples(times: Sequence[int], tokens: Sequence[bytes]) -> bytes:
    """Removals as the feedback service lists them, from columns: UNIX seconds, and hex of 65535 octets at most.

    Raises ValueError where the columns differ in length or a token is no hex.
    """
    out: list[bytes] = []
    for time, token in zip(times, tokens, strict=True):
        octets = unhexlify(token)
        # A time past 2106 is somebody's mistake, and must not keep the others from being told.
        out += (pack(">IH", min(time, _MAX_UINT32), len(octets)), octets)
    return b"".join(out)


class FeedbackReader:
    """The provider's side of the feedback service: reads tuples until the service closes."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = b""

    @property
    def held(self) -> int:
        """Octets of an unfinished tuple; not 0 at the end of the stream: the list was cut short."""
        return len(self._held)

    def receive(self, data: bytes) -> tuple[list[int], list[bytes]]:
        """The columns of the tuples that are complete: UNIX seconds, tokens as lower-case hex. Raises nothing."""
        data = self._held + data
        times: list[int] = []
        tokens: list[bytes] = []
        at, end = 0, len(data)
        while at + 6 <= end:
            time, size = _unpack_tuple(data, at)
            stop = at + 6 + size
            if stop > end:
                break
            times.append(time)
            tokens.append(hexlify(data[at + 6 : stop]))
            at = stop
        self._held = data[at:]
        return times, tokens
