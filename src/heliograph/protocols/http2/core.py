"""What both ends of an HTTP/2 connection share (RFC 9113).

Theory of operation
    `receive` cuts the octets into frames and hands each to the method of its kind. Connection-level matters (SETTINGS,
    PING, GOAWAY, the connection's windows, header blocks over several frames, budgets) end here; what concerns streams
    goes on to the role (`client`, `server`). Nothing is written: octets pile up in a list until `data_to_send`.

    A fault of the peer that ends the connection is raised inside as `ConnectionFault` and leaves `receive` as a
    `Failed` event with a GOAWAY in the output; one that ends a stream only is a `StreamFault` and leaves as
    RST_STREAM. So no input raises.

    Time is an argument: monotonic seconds. `wake_at` says when `tick` wants to be called.

Flow control inwards: bodies are small and bounded by `max_body`, so a stream's window is never opened again, and the
connection's is opened again as octets come.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from struct import unpack
from typing import Generic, TypeVar

from msgspec import Struct

from heliograph.protocols.http2 import frames as f
from heliograph.protocols.http2.events import Event, Failed, GoAway, Pong, SettingsChanged, WindowOpened
from heliograph.protocols.http2.fields import Malformed
from heliograph.protocols.http2.frames import ErrorCode
from heliograph.protocols.http2.hpack import Decoder, Encoder, Field, HeaderListTooLarge, HpackError

NO_LIMIT = 2**31 - 1
_REMEMBERED_RESETS = 4096


class Limits(Struct, frozen=True):
    """What a peer may cost before the connection ends with ENHANCE_YOUR_CALM, and how long it may take.

    Allowances are for each `period_s`. Real work (a whole request or answer) earns further control frames, as some
    implementations open a window for each request.
    """

    period_s: float = 10.0
    resets: int = 200
    """RST_STREAM, in either direction (rapid reset; MadeYouReset makes *us* send them)."""
    control_frames: int = 1000
    earned_by_work: int = 4
    header_octets: int = 65_536
    """Of one header block, packed; and of one header list, unpacked."""
    held_octets: int = 1 << 25
    """Server: of large header blocks of requests that are open at once; above it streams are refused."""
    settings_s: float = 10.0
    """From the connection's start to the peer's SETTINGS; also how long one header block may take."""
    message_s: float = 30.0
    """Server: from a request's header fields to its end. Client: from a request to the end of its answer."""
    idle_s: float | None = 60.0
    """Server: without an open stream and without a frame. None: for ever."""
    ping_after_s: float = 15.0
    """Client: silence with streams open, before a PING asks whether anybody is there."""
    ping_wait_s: float = 5.0
    ping_idle_s: float = 3600.0
    """Client: the same without open streams (Apple advises about an hour)."""


class ConnectionFault(Exception):
    """The peer broke the connection (RFC 9113, section 5.4.1)."""

    def __init__(self, code: ErrorCode, why: str) -> None:
        super().__init__(why)
        self.code = code


class StreamFault(Exception):
    """The peer broke one stream (RFC 9113, section 5.4.2)."""

    def __init__(self, code: ErrorCode, why: str) -> None:
        super().__init__(why)
        self.code = code


class _Block:
    """A header block that is still coming in CONTINUATION frames."""

    __slots__ = ("flags", "parts", "size", "started", "stream_id")

    def __init__(self, stream_id: int, flags: int, first: bytes, now: float) -> None:
        self.stream_id = stream_id
        self.flags = flags
        self.parts = [first]
        self.size = len(first)
        self.started = now


class Outgoing:
    """What of a stream concerns sending: the body that windows hold back."""

    __slots__ = ("unsent", "window")

    def __init__(self, unsent: bytes | None, window: int) -> None:
        self.unsent = unsent
        """What is left of the body; None while there is no body to send."""
        self.window = window
        """How much the peer allows on this stream; it may fall below 0 (section 6.9.2)."""


Stream = TypeVar("Stream", bound=Outgoing)


class Connection(ABC, Generic[Stream]):
    """The shared half of `ClientConnection` and `ServerConnection`; not for use by itself."""

    _RECV_WINDOW = 1 << 20
    """The connection's inward window, in octets."""

    def __init__(self, now: float, *, our_settings: dict[int, int], limits: Limits, max_body: int) -> None:
        self.limits = limits
        self.max_body = max_body
        self._inbox = b""
        self._out: list[bytes] = []
        self._over = False
        self._block: _Block | None = None
        self._block_octets = 0
        """Of the last whole header block."""
        # A peer that never shrinks its table to the 0 that we announce keeps the default of 4096, which costs speed
        # but breaks nothing (RFC 7541, section 4.2, wants a size update first).
        self._decoder = Decoder(4096, limits.header_octets)
        self._encoder = Encoder(4096)
        self._started = self._heard = now
        self._settled = False
        """The peer's first SETTINGS came."""
        self._acks_due: deque[dict[int, int]] = deque((our_settings,))
        self._streams: dict[int, Stream] = {}
        """Open streams by id; a role may keep others elsewhere."""
        self._blocked: dict[int, None] = {}
        """Streams whose body waits for a window, in order."""
        self._send_window = f.DEFAULT_WINDOW
        self._recv_window = self._RECV_WINDOW
        self._peer_window = f.DEFAULT_WINDOW
        """INITIAL_WINDOW_SIZE of the peer: what each new stream may send."""
        self._peer_frame = f.DEFAULT_FRAME_SIZE
        self._peer_streams = NO_LIMIT
        self._period_began = now
        self._resets = self._controls = self._work = 0
        self._reset_ids: dict[int, None] = {}
        """The last streams that we reset, in order: what the peer had sent by then still comes, and is ignored."""
        self._out.append(f.settings(our_settings))
        self._out.append(f.window_update(0, self._RECV_WINDOW - f.DEFAULT_WINDOW))

    # -- what a role fills in ------------------------------------------------------------------------------------

    @abstractmethod
    def _on_message(self, stream_id: int, flags: int, fields: list[Field] | None, events: list[Event]) -> None:
        """A header block that ended; `fields` is None where the list was larger than we allow."""

    @abstractmethod
    def _on_data(self, stream_id: int, flags: int, data: bytes, charged: int, events: list[Event]) -> None: ...

    @abstractmethod
    def _on_reset(self, stream_id: int, code: int, events: list[Event]) -> None: ...

    @abstractmethod
    def _on_stream_fault(self, stream_id: int, fault: StreamFault, events: list[Event]) -> None: ...

    @abstractmethod
    def _on_body_sent(self, stream_id: int, stream: Stream) -> None:
        """All of a body is out."""

    @abstractmethod
    def _on_goaway(self, event: GoAway, events: list[Event]) -> None: ...

    @abstractmethod
    def _on_over(self, why: str, events: list[Event]) -> None:
        """The connection is over: end all streams."""

    @abstractmethod
    def _is_idle(self, stream_id: int) -> bool:
        """Never opened so far by either side (RFC 9113, section 5.1)."""

    # -- octets in, events out -----------------------------------------------------------------------------------

    def receive(self, data: bytes, now: float) -> list[Event]:
        """What these octets of the peer mean. Never raises."""
        events: list[Event] = []
        if self._over:
            return events
        self._heard = now
        buffer = self._inbox + data if self._inbox else data
        try:
            used = self._frames(buffer, now, events)
            self._inbox = buffer[used:]
        except ConnectionFault as fault:
            self._fail(fault.code, str(fault), events)
        return events

    def data_to_send(self) -> bytes:
        """The octets that are to go out now; each is returned once."""
        out = self._out
        if not out:
            return b""
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        return data

    def eof(self, now: float) -> list[Event]:  # noqa: ARG002 - the same shape as tick
        """The socket is gone."""
        events: list[Event] = []
        if not self._over:
            self._end(Failed(ErrorCode.NO_ERROR, "the connection was closed", ours=False), events)
        return events

    def ping(self, payload: bytes) -> None:
        """Ask for a Pong; `payload` has eight octets."""
        if not self._over:
            self._out.append(f.frame(f.PING, 0, 0, payload))

    @property
    def over(self) -> bool:
        """Nothing more will happen on this connection."""
        return self._over

    # -- frames --------------------------------------------------------------------------------------------------

    def _frames(self, buffer: bytes, now: float, events: list[Event]) -> int:
        """Handle every whole frame; returns the octets used."""
        unpack_header = f.HEADER.unpack_from
        start, size = 0, len(buffer)
        while size - start >= f.HEADER_OCTETS and not self._over:
            high, low, kind, flags, stream_id = unpack_header(buffer, start)
            length = high << 16 | low
            if length > f.DEFAULT_FRAME_SIZE:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} octets")
            end = start + f.HEADER_OCTETS + length
            if end > size:
                break
            self._frame(kind, flags, stream_id & NO_LIMIT, buffer[start + 9 : end], now, events)
            start = end
        return start

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes, now: float, events: list[Event]) -> None:
        if not self._settled and (kind != f.SETTINGS or flags & f.ACK):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        block = self._block
        if block is not None and (kind != f.CONTINUATION or stream_id != block.stream_id):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a header block was broken off")
        try:
            if kind == f.DATA:
                self._data_frame(flags, stream_id, payload, now, events)
            elif kind == f.HEADERS:
                self._headers_frame(flags, stream_id, payload, now, events)
            elif kind == f.CONTINUATION:
                self._continuation_frame(flags, stream_id, payload, now, events)
            elif kind == f.RST_STREAM:
                self._rst_stream_frame(stream_id, payload, now, events)
            elif kind == f.WINDOW_UPDATE:
                self._window_update_frame(stream_id, payload, now, events)
            elif kind == f.SETTINGS:
                self._settings_frame(flags, stream_id, payload, now, events)
            elif kind == f.PING:
                self._ping_frame(flags, stream_id, payload, now, events)
            elif kind == f.GOAWAY:
                self._goaway_frame(stream_id, payload, now, events)
            elif kind == f.PRIORITY:
                self._priority_frame(stream_id, payload, now)
            elif kind == f.PUSH_PROMISE:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE, which nobody may send us")
            else:
                self._spend_control(now)  # unknown kinds are ignored (section 4.1), not free
        except Malformed as error:
            self._stream_fault(stream_id, StreamFault(ErrorCode.PROTOCOL_ERROR, str(error)), now, events)
        except StreamFault as fault:
            self._stream_fault(stream_id, fault, now, events)

    def _stream_fault(self, stream_id: int, fault: StreamFault, now: float, events: list[Event]) -> None:
        self._on_stream_fault(stream_id, fault, events)
        self._reset_stream(stream_id, fault.code, now)

    def _need_stream(self, stream_id: int) -> None:
        if not stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a stream's frame on stream 0")

    def _need_connection(self, stream_id: int) -> None:
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a connection's frame on a stream")

    def _unpad(self, flags: int, payload: bytes) -> bytes:
        if not flags & f.PADDED:
            return payload
        if not payload:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a padded frame without its padding's length")
        if payload[0] >= len(payload):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "more padding than frame")
        return payload[1 : len(payload) - payload[0]]

    def _data_frame(self, flags: int, stream_id: int, payload: bytes, now: float, events: list[Event]) -> None:
        self._need_stream(stream_id)
        charged = len(payload)
        data = self._unpad(flags, payload)
        self._charge(charged)
        if not data and not flags & f.END_STREAM:
            self._spend_control(now)
        if self._is_idle(stream_id):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "DATA on an idle stream")
        self._on_data(stream_id, flags, data, charged, events)

    def _charge(self, octets: int) -> None:
        """Take these octets of DATA off the connection's window."""
        self._recv_window -= octets
        if self._recv_window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the connection's window allows")
        if self._recv_window < self._RECV_WINDOW // 2:
            self._out.append(f.window_update(0, self._RECV_WINDOW - self._recv_window))
            self._recv_window = self._RECV_WINDOW

    def _headers_frame(self, flags: int, stream_id: int, payload: bytes, now: float, events: list[Event]) -> None:
        self._need_stream(stream_id)
        block = self._unpad(flags, payload) if flags & f.PADDED else payload
        if flags & f.WITH_PRIORITY:
            if len(block) < 5:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            self._check_dependency(stream_id, block)
            block = block[5:]
        if flags & f.END_HEADERS:
            self._block_ended(flags, stream_id, block, events)
        else:
            self._block = _Block(stream_id, flags, block, now)

    def _continuation_frame(self, flags: int, stream_id: int, payload: bytes, now: float, events: list[Event]) -> None:
        block = self._block
        if block is None:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        block.parts.append(payload)
        block.size += len(payload)
        if block.size > self.limits.header_octets:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "a header block larger than we take")
        if len(payload) < 64:
            self._spend_control(now)
        if flags & f.END_HEADERS:
            self._block = None
            self._block_ended(block.flags, stream_id, b"".join(block.parts), events)

    def _block_ended(self, flags: int, stream_id: int, block: bytes, events: list[Event]) -> None:
        self._block_octets = len(block)
        try:
            self._on_message(stream_id, flags, self._decode(block), events)
        except HpackError as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, str(error)) from None

    def _decode(self, block: bytes) -> list[Field] | None:
        """The block's fields; None where they are more than we allow. Raises HpackError."""
        try:
            return self._decoder.decode(block)
        except HeaderListTooLarge:
            return None

    def _rst_stream_frame(self, stream_id: int, payload: bytes, now: float, events: list[Event]) -> None:
        self._need_stream(stream_id)
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM not of 4 octets")
        if self._is_idle(stream_id):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "RST_STREAM on an idle stream")
        self._spend_reset(now)
        self._on_reset(stream_id, int.from_bytes(payload, "big"), events)

    def _window_update_frame(self, stream_id: int, payload: bytes, now: float, events: list[Event]) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE not of 4 octets")
        self._spend_control(now)
        increment = int.from_bytes(payload, "big") & NO_LIMIT
        if stream_id:
            if self._is_idle(stream_id):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE on an idle stream")
            if not increment:
                raise StreamFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            self._on_stream_window(stream_id, increment)
            return
        if not increment:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        self._send_window += increment
        if self._send_window > f.MAX_WINDOW:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window grew past 2**31-1")
        if self._send_window - increment <= 0:
            events.append(WindowOpened())
        self._send_blocked()

    def _settings_frame(self, flags: int, stream_id: int, payload: bytes, now: float, events: list[Event]) -> None:
        self._need_connection(stream_id)
        self._spend_control(now, max(1, len(payload) // 6))
        if flags & f.ACK:
            if payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a SETTINGS acknowledgement with content")
            if self._acks_due:
                self._settings_acknowledged(self._acks_due.popleft())
            return
        if len(payload) % 6:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS not a multiple of 6 octets")
        for place in range(0, len(payload), 6):
            self._setting(*unpack(">HI", payload[place : place + 6]))
        self._settled = True
        self._out.append(f.SETTINGS_ACK)
        self._send_blocked()
        events.append(SettingsChanged(self._peer_streams))

    def _setting(self, key: int, value: int) -> None:
        if key == f.HEADER_TABLE_SIZE:
            self._encoder.resize(value)
        elif key == f.ENABLE_PUSH:
            self._enable_push(value)
        elif key == f.MAX_CONCURRENT_STREAMS:
            self._peer_streams = min(value, NO_LIMIT)
        elif key == f.INITIAL_WINDOW_SIZE:
            if value > f.MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "an initial window over 2**31-1")
            change = value - self._peer_window
            self._peer_window = value
            self._on_initial_window(change)
        elif key == f.MAX_FRAME_SIZE:
            if not f.DEFAULT_FRAME_SIZE <= value < 1 << 24:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame size out of range")
            self._peer_frame = value

    def _enable_push(self, value: int) -> None:
        if value > 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")

    def _settings_acknowledged(self, values: dict[int, int]) -> None:
        """The peer now follows settings of ours."""

    def _ping_frame(self, flags: int, stream_id: int, payload: bytes, now: float, events: list[Event]) -> None:
        self._need_connection(stream_id)
        if len(payload) != 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "PING not of 8 octets")
        self._spend_control(now)
        if flags & f.ACK:
            events.append(Pong(payload))
        else:
            self._out.append(f.frame(f.PING, f.ACK, 0, payload))

    def _goaway_frame(self, stream_id: int, payload: bytes, now: float, events: list[Event]) -> None:
        self._need_connection(stream_id)
        if len(payload) < 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY shorter than 8 octets")
        self._spend_control(now)
        last, code = unpack(">II", payload[:8])
        event = GoAway(last & NO_LIMIT, code, payload[8:])
        events.append(event)
        self._on_goaway(event, events)

    def _priority_frame(self, stream_id: int, payload: bytes, now: float) -> None:
        self._need_stream(stream_id)
        self._spend_control(now)
        if len(payload) != 5:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "PRIORITY not of 5 octets")
        self._check_dependency(stream_id, payload)

    def _check_dependency(self, stream_id: int, priority: bytes) -> None:
        """Priorities are ignored (RFC 9113, section 5.3.2), nonsense is not: RFC 7540, section 5.3.1."""
        if int.from_bytes(priority[:4], "big") & NO_LIMIT == stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a stream that depends on itself")

    # -- bodies, as windows allow --------------------------------------------------------------------------------

    def _send_body(self, stream_id: int, stream: Stream) -> None:
        """Send what windows allow of a body; what is left waits in `_blocked`."""
        while stream.unsent and (size := min(len(stream.unsent), stream.window, self._send_window)) > 0:
            size = min(size, self._peer_frame)
            chunk, stream.unsent = stream.unsent[:size], stream.unsent[size:]
            stream.window -= size
            self._send_window -= size
            self._out.append(f.frame(f.DATA, 0 if stream.unsent else f.END_STREAM, stream_id, chunk))
        if stream.unsent:
            self._blocked[stream_id] = None
        else:
            self._blocked.pop(stream_id, None)
            self._on_body_sent(stream_id, stream)

    def _send_blocked(self) -> None:
        """The connection's window opened, or those of all streams."""
        for stream_id in list(self._blocked):
            if self._send_window <= 0:
                return
            stream = self._streams.get(stream_id)
            if stream is None:
                del self._blocked[stream_id]
            else:
                self._send_body(stream_id, stream)

    def _on_stream_window(self, stream_id: int, increment: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:  # closed, or nothing is left to send
            return
        stream.window += increment
        if stream.window > f.MAX_WINDOW:
            raise StreamFault(ErrorCode.FLOW_CONTROL_ERROR, "a stream's window grew past 2**31-1")
        if stream.unsent:
            self._send_body(stream_id, stream)

    def _on_initial_window(self, change: int) -> None:
        for stream in self._streams.values():
            stream.window += change
            if stream.window > f.MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "a stream's window grew past 2**31-1")

    # -- budgets and ends ----------------------------------------------------------------------------------------

    def _new_period(self, now: float) -> None:
        if now - self._period_began > self.limits.period_s:
            self._period_began = now
            self._resets = self._controls = self._work = 0

    def _spend_control(self, now: float, count: int = 1) -> None:
        self._new_period(now)
        self._controls += count
        if self._controls > self.limits.control_frames + self._work * self.limits.earned_by_work:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "more control frames than work")

    def _spend_reset(self, now: float) -> None:
        self._new_period(now)
        self._resets += 1
        if self._resets > self.limits.resets:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many streams were reset")

    def _reset_stream(self, stream_id: int, code: int, now: float) -> None:
        """Send RST_STREAM for what the peer did; it counts, whoever's frame it is."""
        self._send_reset(stream_id, code)
        self._spend_reset(now)

    def _send_reset(self, stream_id: int, code: int) -> None:
        self._out.append(f.rst_stream(stream_id, code))
        self._reset_ids[stream_id] = None
        if len(self._reset_ids) > _REMEMBERED_RESETS:
            del self._reset_ids[next(iter(self._reset_ids))]

    def _closed_stream_frame(self, stream_id: int) -> None:
        """A frame on a stream that has ended: ignored where we reset it, else against section 5.1."""
        if stream_id not in self._reset_ids:
            raise ConnectionFault(ErrorCode.STREAM_CLOSED, "a frame on a closed stream")

    def _last_peer_stream(self) -> int:
        return 0

    def _fail(self, code: ErrorCode, why: str, events: list[Event]) -> None:
        """End the connection for the peer's fault."""
        self._out.append(f.goaway(self._last_peer_stream(), code, why.encode()))
        self._end(Failed(code, why, ours=True), events)

    def _end(self, event: Failed, events: list[Event]) -> None:
        self._over = True
        self._inbox = b""
        self._block = None
        self._on_over(event.why, events)
        events.append(event)
