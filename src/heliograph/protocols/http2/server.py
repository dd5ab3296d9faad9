"""The server role: whole requests out, answers in (RFC 9113). For the simulator and the Apple-shaped proxy.

A request is reported once it is whole (or its body grew past `max_body`); answers go back in any order, many at once.
What a client may cost is bounded by `Limits`, by the stream limit and by `max_body`; that it reads its answers is the
business of whoever owns the socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from heliograph.protocols.http2 import frames as f
from heliograph.protocols.http2.core import NO_LIMIT, Connection, ConnectionFault, Limits, Outgoing, StreamFault
from heliograph.protocols.http2.events import Cancelled, Event, Failed, GoAway, Request
from heliograph.protocols.http2.fields import Malformed, check_request, check_trailers
from heliograph.protocols.http2.frames import ErrorCode
from heliograph.protocols.http2.hpack import Field, HpackError, encode_static, int_octets

SERVER_LIMITS = Limits()
_REMEMBERED_GAPS = 100
_WHOLE = f.END_STREAM | f.END_HEADERS
_LARGE_BLOCK = 4096
"""Header blocks from this size on are added up; smaller ones are bounded by the number of streams."""


class Answer(NamedTuple):
    """What goes back on a stream."""

    stream_id: int
    status: int
    fields: tuple[Field, ...] = ()
    body: bytes = b""


@lru_cache(maxsize=256)
def _status_octets(status: int) -> bytes:
    return encode_static([(b":status", b"%d" % status)])


@lru_cache(maxsize=256)
def _name_octets(name: bytes) -> bytes:
    """A literal without indexing, up to where its value's length begins."""
    # With an empty value, some names would be found in the static table as whole fields.
    return encode_static([(name, b"?")])[:-2]


@lru_cache(maxsize=256)
def _head(status: int, name: bytes, value_length: int) -> bytes:
    """A block with one field beside the status, up to that one's value."""
    return _status_octets(status) + _name_octets(name) + int_octets(value_length, 7, 0)


class _Stream(Outgoing):
    """A stream that is open in one direction at least."""

    __slots__ = ("began", "body", "expected", "fields", "received", "reported", "whole")

    def __init__(self, fields: list[Field], window: int, now: float) -> None:
        self.unsent = None
        self.window = window
        self.fields = fields
        self.began = now
        self.body = b""
        self.received = 0
        """Octets charged to the stream's window, padding included."""
        self.expected: int | None = None
        self.reported = False
        self.whole = False
        """The client ended its side."""


class ServerConnection(Connection[_Stream]):
    """One connection from a client."""

    def __init__(
        self, now: float, *, max_streams: int = 1000, max_body: int = 16_384, limits: Limits = SERVER_LIMITS
    ) -> None:
        super().__init__(
            now,
            our_settings={f.MAX_CONCURRENT_STREAMS: max_streams, f.MAX_HEADER_LIST_SIZE: limits.header_octets},
            limits=limits,
            max_body=max_body,
        )
        self._greeted = False
        self._most_at_once = min(max_body, f.DEFAULT_FRAME_SIZE)
        """Octets of a body that go the short way."""
        self._large: dict[int, int] = {}
        """Octets of large header blocks, by stream; may hold streams that have ended."""
        self._highest = 0
        self._gaps: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED_GAPS)
        """Ranges of ids that were passed over, and so are closed without ever having been open."""
        self._limit = max_streams
        """Streams that the client may open now: the highest of the limits that it may be following."""
        self._acknowledged = False
        self._last_served: int | None = None
        """After our GOAWAY: the last stream that we act on."""
        self._now = now
        """Of the last `receive` or `tick`: answers come without a time of their own."""

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    # -- answers -------------------------------------------------------------------------------------------------

    def respond(self, answers: Iterable[Answer]) -> None:
        """Answer requests. An answer to a stream that is gone (the client cancelled it) goes nowhere."""
        out, streams, encoder, pack = self._out, self._streams, self._encoder, f.HEADER.pack
        for stream_id, status, fields, body in answers:
            stream = streams.get(stream_id)
            if stream is None or stream.unsent is not None:
                continue
            if len(fields) == 1 and not body and len(fields[0][1]) < 127 and stream.whole and encoder.settled:
                name, value = fields[0]
                head = _head(status, name, len(value))
                out.append(pack(0, len(head) + len(value), f.HEADERS, _WHOLE, stream_id) + head + value)
                self._work += 1
                self._heard = self._now
                del streams[stream_id]
                continue
            # We put nothing into the client's table; a smaller one must be acknowledged all the same (RFC 7541, 4.2).
            block = encoder.start() + _status_octets(status)
            for name, value in fields:
                size = len(value)
                block += _name_octets(name) + (bytes((size,)) if size < 127 else int_octets(size, 7, 0)) + value
            self._work += 1
            if not body or len(body) <= min(stream.window, self._send_window, self._peer_frame):
                out.append(f.header_block(stream_id, block, self._peer_frame, end_stream=not body))
                if body:
                    self._send_window -= len(body)
                    out.append(f.frame(f.DATA, f.END_STREAM, stream_id, body))
                self._answered(stream_id, stream)
            else:
                out.append(f.header_block(stream_id, block, self._peer_frame, end_stream=False))
                stream.unsent = body
                stream.began = self._now
                self._send_body(stream_id, stream)

    def _on_body_sent(self, stream_id: int, stream: _Stream) -> None:
        self._answered(stream_id, stream)

    def _answered(self, stream_id: int, stream: _Stream) -> None:
        del self._streams[stream_id]
        self._heard = self._now  # not idle, though nothing was heard
        if not stream.whole:  # the answer did not need the rest of the request: RFC 9113, section 8.1
            self._send_reset(stream_id, ErrorCode.NO_ERROR)

    def reset(self, stream_ids: Iterable[int], code: int) -> None:
        """End streams without an answer, by our own will."""
        for stream_id in stream_ids:
            if self._streams.pop(stream_id, None) is not None:
                self._send_reset(stream_id, code)

    def goaway(self, code: int = 0, debug: bytes = b"", last_stream_id: int | None = None) -> None:
        """Take no new streams; those above `last_stream_id` (default: the newest) are not acted on any more."""
        if self._over:
            return
        last = self._highest if last_stream_id is None else last_stream_id
        self._last_served = last if self._last_served is None else min(last, self._last_served)
        self._out.append(f.goaway(self._last_served, code, debug))
        for stream_id in [stream_id for stream_id in self._streams if self._is_left(stream_id)]:
            del self._streams[stream_id]

    def set_max_streams(self, count: int) -> None:
        """Tell the client a new stream limit. A higher one holds at once, a lower one once it is acknowledged."""
        values = {f.MAX_CONCURRENT_STREAMS: count}
        self._limit = max(self._limit, count)
        self._acks_due.append(values)
        self._out.append(f.settings(values))

    # -- requests ------------------------------------------------------------------------------------------------

    def receive(self, data: bytes, now: float) -> list[Event]:
        self._now = now
        return super().receive(data, now)

    def _frames(self, buffer: bytes, now: float, events: list[Event]) -> int:
        if self._greeted:
            return self._read(buffer, 0, now, events)
        size = len(f.PREFACE)
        if buffer[:size] != f.PREFACE[: len(buffer)]:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "not HTTP/2: the connection preface is wrong")
        if len(buffer) < size:
            return 0
        self._greeted = True
        return self._read(buffer, size, now, events)

    def _read(self, buffer: bytes, start: int, now: float, events: list[Event]) -> int:
        """As the base's `_frames`, with a short way for requests of one HEADERS and one DATA."""
        unpack_header = f.HEADER.unpack_from
        streams, size = self._streams, len(buffer)
        while size - start >= f.HEADER_OCTETS and not self._over:
            high, low, kind, flags, stream_id = unpack_header(buffer, start)
            length = high << 16 | low
            if length > f.DEFAULT_FRAME_SIZE:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} octets")
            payload = start + f.HEADER_OCTETS
            end = payload + length
            if end > size:
                break
            if self._block is not None:
                pass
            elif kind == f.DATA and flags == f.END_STREAM:
                stream = streams.get(stream_id)
                if stream is not None and not (stream.received or stream.reported) and length <= self._most_at_once:
                    self._whole_body(stream_id, stream, buffer[payload:end], now, events)
                    start = end
                    continue
            elif (
                kind == f.HEADERS
                and flags == f.END_HEADERS
                and 0 < self._highest == stream_id - 2 <= f.MAX_STREAM_ID - 2  # not the first, and odd as that one
                and length < _LARGE_BLOCK
                and len(streams) < self._limit
                and self._last_served is None
            ):
                self._begin(stream_id, buffer[payload:end], now, events)
                start = end
                continue
            self._frame(kind, flags, stream_id & NO_LIMIT, buffer[payload:end], now, events)
            start = end
        return start

    def _begin(self, stream_id: int, block: bytes, now: float, events: list[Event]) -> None:
        """What `_headers_frame` does with a new stream that nothing speaks against."""
        self._block_octets = len(block)
        try:
            fields = self._decode(block)
        except HpackError as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, str(error)) from None
        self._highest = stream_id
        try:
            if fields is None:
                raise StreamFault(ErrorCode.ENHANCE_YOUR_CALM, "more header fields than we take")
            expected = check_request(fields)
        except Malformed as error:
            self._stream_fault(stream_id, StreamFault(ErrorCode.PROTOCOL_ERROR, str(error)), now, events)
        except StreamFault as fault:
            self._stream_fault(stream_id, fault, now, events)
        else:
            stream = self._streams[stream_id] = _Stream(fields, self._peer_window, now)
            stream.expected = expected

    def _whole_body(self, stream_id: int, stream: _Stream, body: bytes, now: float, events: list[Event]) -> None:
        """What `_data_frame` does with a body that is in one frame."""
        self._charge(len(body))
        if stream.expected is not None and stream.expected != len(body):
            fault = StreamFault(ErrorCode.PROTOCOL_ERROR, "not as much DATA as content-length says")
            self._stream_fault(stream_id, fault, now, events)
            return
        stream.received = len(body)
        stream.reported = stream.whole = True
        events.append(Request(stream_id, stream.fields, body))

    def _is_idle(self, stream_id: int) -> bool:
        return not stream_id & 1 or stream_id > self._highest

    def _last_peer_stream(self) -> int:
        return self._highest if self._last_served is None else self._last_served

    def _on_message(self, stream_id: int, flags: int, fields: list[Field] | None, events: list[Event]) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._trailers(stream_id, stream, flags, fields, events)
            return
        if not self._is_idle(stream_id):
            if any(first <= stream_id <= last for first, last in self._gaps):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a stream id below one that was used before")
            self._closed_stream_frame(stream_id)
            return
        if not stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a client opened a stream with an even id")
        if stream_id > self._highest + 2:
            self._gaps.append((self._highest + 1, stream_id - 1))
        self._highest = stream_id
        if self._is_left(stream_id):
            self._spend_control(self._now)
            return
        if len(self._streams) >= self._limit or self._is_too_much(stream_id):
            self._refuse(stream_id)
            return
        if fields is None:
            raise StreamFault(ErrorCode.ENHANCE_YOUR_CALM, "more header fields than we take")
        expected = check_request(fields)
        stream = _Stream(fields, self._peer_window, self._now)
        stream.expected = expected
        self._streams[stream_id] = stream
        if flags & f.END_STREAM:
            self._ended(stream_id, stream, events)

    def _is_left(self, stream_id: int) -> bool:
        """Above what our GOAWAY said that we act on: ignored, not reset (section 6.8)."""
        return self._last_served is not None and stream_id > self._last_served

    def _closed_stream_frame(self, stream_id: int) -> None:
        if not self._is_left(stream_id):
            super()._closed_stream_frame(stream_id)

    def _is_too_much(self, stream_id: int) -> bool:
        """Whether large header blocks of open requests hold more memory than one connection may."""
        if self._block_octets < _LARGE_BLOCK:
            return False
        self._large = {other: size for other, size in self._large.items() if other in self._streams}
        if sum(self._large.values()) + self._block_octets > self.limits.held_octets:
            return True
        self._large[stream_id] = self._block_octets
        return False

    def _refuse(self, stream_id: int) -> None:
        if self._acknowledged:
            self._reset_stream(stream_id, ErrorCode.REFUSED_STREAM, self._now)
        else:  # it may not know our limit yet, which is no fault of its own
            self._send_reset(stream_id, ErrorCode.REFUSED_STREAM)
            self._spend_control(self._now)

    def _trailers(
        self, stream_id: int, stream: _Stream, flags: int, fields: list[Field] | None, events: list[Event]
    ) -> None:
        if stream.whole:
            raise StreamFault(ErrorCode.STREAM_CLOSED, "HEADERS after the end of the request")
        if fields is None:
            raise StreamFault(ErrorCode.ENHANCE_YOUR_CALM, "more trailer fields than we take")
        if not flags & f.END_STREAM:
            raise Malformed("trailers that do not end the stream")
        check_trailers(fields)
        self._ended(stream_id, stream, events)

    def _on_data(self, stream_id: int, flags: int, data: bytes, charged: int, events: list[Event]) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            self._closed_stream_frame(stream_id)
            return
        if stream.whole:
            raise StreamFault(ErrorCode.STREAM_CLOSED, "DATA after the end of the request")
        stream.received += charged
        if stream.received > f.DEFAULT_WINDOW:
            raise StreamFault(ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the stream's window allows")
        if stream.expected is not None:
            stream.expected -= len(data)
            if stream.expected < 0:
                raise Malformed("more DATA than content-length says")
        if not stream.reported:
            room = self.max_body - len(stream.body)
            stream.body += data[:room]
            if len(data) > room:
                stream.reported = True
                events.append(Request(stream_id, stream.fields, stream.body, truncated=True))
        if flags & f.END_STREAM:
            self._ended(stream_id, stream, events)

    def _ended(self, stream_id: int, stream: _Stream, events: list[Event]) -> None:
        if stream.expected:
            raise Malformed("less DATA than content-length says")
        stream.whole = True
        if not stream.reported:
            stream.reported = True
            events.append(Request(stream_id, stream.fields, stream.body))

    def _on_reset(self, stream_id: int, code: int, events: list[Event]) -> None:
        self._dropped(stream_id, code, events)

    def _on_stream_fault(self, stream_id: int, fault: StreamFault, events: list[Event]) -> None:
        self._dropped(stream_id, fault.code, events)

    def _dropped(self, stream_id: int, code: int, events: list[Event]) -> None:
        stream = self._streams.pop(stream_id, None)
        if stream is not None and stream.reported:
            events.append(Cancelled(stream_id, code))

    def _settings_acknowledged(self, values: dict[int, int]) -> None:
        self._acknowledged = True
        self._limit = max([due[f.MAX_CONCURRENT_STREAMS] for due in (values, *self._acks_due)])

    def _on_goaway(self, event: GoAway, events: list[Event]) -> None:
        """The client opens no more streams; those that are open are answered."""

    def _on_over(self, why: str, events: list[Event]) -> None:  # noqa: ARG002
        for stream_id, stream in self._streams.items():
            if stream.reported:
                events.append(Cancelled(stream_id, ErrorCode.CANCEL))
        self._streams.clear()
        self._blocked.clear()

    # -- time ----------------------------------------------------------------------------------------------------

    def _due(self) -> float | None:
        """When the connection itself runs out of time."""
        limits = self.limits
        if not self._settled:
            return self._started + limits.settings_s
        if self._block is not None:
            return self._block.started + limits.settings_s
        if limits.idle_s is not None and not self._streams:
            return self._heard + limits.idle_s
        return None

    def wake_at(self) -> float | None:
        """When `tick` is to be called next; None: not before something else happens."""
        if self._over:
            return None
        due = self._due()
        for stream in self._streams.values():
            if not stream.whole or stream.unsent:  # the oldest comes first: a dict keeps the order of opening
                message_due = stream.began + self.limits.message_s
                return message_due if due is None else min(due, message_due)
        return due

    def tick(self, now: float) -> list[Event]:
        """End what took too long: a greeting, a header block, a request or the reading of an answer, idleness."""
        events: list[Event] = []
        if self._over:
            return events
        self._now = now
        due = self._due()
        if due is not None and now >= due:
            if not self._settled or self._block is not None:
                self._fail(ErrorCode.PROTOCOL_ERROR, "the client took too long", events)
            else:
                self._out.append(f.goaway(self._last_peer_stream(), ErrorCode.NO_ERROR))
                self._end(Failed(ErrorCode.NO_ERROR, "idle for too long", ours=True), events)
            return events
        try:
            for stream_id, stream in list(self._streams.items()):
                if (not stream.whole or stream.unsent) and now >= stream.began + self.limits.message_s:
                    self._dropped(stream_id, ErrorCode.CANCEL, events)
                    self._reset_stream(stream_id, ErrorCode.CANCEL, now)
        except ConnectionFault as fault:
            self._fail(fault.code, str(fault), events)
        return events
