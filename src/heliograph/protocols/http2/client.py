"""The client role, shaped for many alike requests (RFC 9113; Apple, "Sending notification requests to APNs").

How a request is spelt
    A `Template` holds what requests share. Its fields enter the peer's dynamic table with the first request and cost
    an octet each afterwards; the path, and what varies, are literals that leave the table alone. So the frames of all
    requests of a `Requests` but the first differ in a few places only, and are put together in one loop.

How an answer is read
    Most answers are one HEADERS frame that ends its stream and says 200. A block that was once decoded to just that,
    without touching the dynamic table, and whose last value is the only thing that varies (`apns-id`, which is ours),
    is a *plain shape*: further blocks with the same beginning are 200s and are not decoded again. Runs of such
    frames are found with strided comparisons, hundreds at a time.

Where a stream is
    `_plain` maps the id of a stream whose request is out and of whose answer nothing has come to its key, and that
    is all there is of it. Any other open stream (its body had to wait, its answer has begun) is in `_streams`, and
    stays there. A key is in one of the two, once, until it leaves in an event. `_plain` is in the order of stream ids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from struct import Struct as Layout
from typing import NamedTuple

from heliograph.protocols.http2 import frames as f
from heliograph.protocols.http2.core import NO_LIMIT, Connection, ConnectionFault, Limits, Outgoing, StreamFault
from heliograph.protocols.http2.events import (
    Accepted,
    Answered,
    Event,
    Failed,
    GoAway,
    Key,
    NotProcessed,
    Unknown,
)
from heliograph.protocols.http2.fields import Malformed, check_answer, check_trailers
from heliograph.protocols.http2.frames import ErrorCode
from heliograph.protocols.http2.hpack import Field, huffman, int_octets

_RUN_AT_LEAST = 8
"""Alike frames in a row for which the strided comparison is tried; below, a frame at a time is cheaper."""
_RUN_AT_MOST = 1024
_COARSE_S = 0.25
"""Streams opened within this time share a deadline, so that there are few deadlines to keep."""
_SHAPES = 64
"""Plain shapes that are remembered: with Huffman coding, a UUID has some dozen lengths."""

CLIENT_LIMITS = Limits(resets=1 << 30, control_frames=10_000)
"""Towards a server that we chose and verified: resets end streams that we opened, and so are bounded by them."""


class Template(NamedTuple):
    """What many POST requests have in common."""

    authority: bytes
    path: bytes
    """The beginning of the path; each request adds its own end."""
    fields: tuple[Field, ...] = ()
    """Fields that are the same in all requests and worth a place in the peer's table."""
    varying: tuple[bytes, ...] = ()
    """Names of fields of which each request has its own value."""


class Requests(NamedTuple):
    """Requests that share a template, as columns: request `i` is made of the `i`-th of each.

    A varying field's value is its prefix (one for all) and the request's suffix. All suffixes have one length.
    `bodies` and `literals` have one entry for all or one each.
    """

    template: Template
    keys: Sequence[Key]
    """What events call these requests."""
    paths: Sequence[bytes]
    bodies: Sequence[bytes]
    literals: Sequence[tuple[Field, ...]] = ((),)
    """More fields, not worth a place in the peer's table."""
    prefixes: tuple[bytes, ...] = ()
    suffixes: Sequence[bytes] = ()


class _Spelling(NamedTuple):
    """A template's octets for one state of the peer's dynamic table."""

    generation: int
    before_path: bytes
    """Up to and including the octet that says: the path follows, as a literal."""
    after_path: bytes


class _Stream(Outgoing):
    """A stream that is more than a key: its body had to wait, or its answer has begun."""

    __slots__ = ("answer", "expected", "fields", "key", "status")

    def __init__(self, key: Key, unsent: bytes, window: int) -> None:
        super().__init__(unsent, window)
        self.key = key
        self.status = 0
        self.fields: list[Field] = []
        self.answer = bytearray()
        self.expected: int | None = None


class _Opened(NamedTuple):
    """Streams opened at about the same time, for their deadline."""

    at: float
    first: int
    last: int


@lru_cache(maxsize=64)
def _stream_ids(length: int) -> Layout:
    """Reads the stream id of a frame of so many octets in all."""
    return Layout(f">5xI{length - 9}x")


class ClientConnection(Connection[_Stream]):
    """One connection to a server: requests in, events out."""

    _RECV_WINDOW = 1 << 24

    def __init__(
        self,
        now: float,
        *,
        keep: frozenset[bytes] = frozenset(),
        max_body: int = 16_384,
        limits: Limits = CLIENT_LIMITS,
    ) -> None:
        """`keep`: names of fields for whose sake a 200 is reported as Answered, with all its fields."""
        # Without a dynamic table for answers, each block stands alone and equal answers look equal.
        super().__init__(now, our_settings={f.HEADER_TABLE_SIZE: 0, f.ENABLE_PUSH: 0}, limits=limits, max_body=max_body)
        self._out.insert(0, f.PREFACE)
        self._keep = keep
        self._plain: dict[int, Key] = {}
        self._next_id = 1
        self._last_taken = NO_LIMIT
        """The last stream that the server will act on, as its GOAWAY says."""
        self._going = False
        self._opened: deque[_Opened] = deque()
        self._pinged: float | None = None
        self._spellings: dict[Template, _Spelling] = {}
        self._shapes: dict[int, list[bytes]] = {}
        """Plain shapes, by the length of a block: beginnings of blocks that mean 200 and nothing else."""

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def open_streams(self) -> int:
        return len(self._plain) + len(self._streams)

    @property
    def usable(self) -> bool:
        """Whether this connection will ever take requests again."""
        return not (self._going or self._over or self._next_id > f.MAX_STREAM_ID)

    @property
    def capacity(self) -> int:
        """How many streams may be opened now; flow control may allow fewer. 0 until the server's SETTINGS came."""
        if not self._settled or not self.usable or self._send_window <= 0:
            return 0
        free = min(self._peer_streams - self.open_streams, (f.MAX_STREAM_ID - self._next_id) // 2 + 1)
        return max(free, 0)

    def submit(self, requests: Requests, now: float) -> int:
        """Open streams for as many requests from the front as the server's limits allow; returns how many.

        The rest is not looked at; offer it again when events have come, or to another connection.
        """
        count = min(len(requests.keys), self.capacity)
        if not count:
            return 0
        first = self._next_id
        taken = 0
        while taken < count:
            spelling = self._spellings.get(requests.template)
            if spelling is not None and spelling.generation == self._encoder.generation:
                taken = self._open_alike(requests, spelling, taken, count)
                if taken == count:
                    break
            if not self._open_one(requests, taken):
                break
            taken += 1
        if taken:
            self._note_opened(now, first, self._next_id - 2)
        return taken

    def _open_alike(self, requests: Requests, spelling: _Spelling, start: int, stop: int) -> int:
        """The hot loop: requests whose body goes out whole. Returns the place of the first that was not taken."""
        template, keys, paths, bodies, literals, prefixes, suffixes = requests
        encoder = self._encoder
        shared_literals = len(literals) == 1
        tail = spelling.after_path + (self._spell_literals(literals[0]) if shared_literals else b"")
        # What comes after the path differs in the suffix only: put the constant octets around it once.
        between = b""
        varying = len(template.varying)
        if varying:
            width = len(suffixes[start])
            tail += encoder.literal_head(template.varying[0], len(prefixes[0]) + width) + prefixes[0]
            if varying > 1:
                between = encoder.literal_head(template.varying[1], len(prefixes[1]) + width) + prefixes[1]
        else:
            width = 0
        if varying > 2:
            return start
        shared = bodies[0] if len(bodies) == 1 else None
        before, path_size = spelling.before_path, len(template.path)
        limit = min(self._peer_window, self._peer_frame)
        window, plain, stream_id = self._send_window, self._plain, self._next_id
        path_width = body_size = -1
        length = 0
        head = constant_path = body_head = b""
        common_tail = tail
        spelt: dict[tuple[Field, ...], bytes] = {}
        parts: list[bytes] = []
        place = start
        for place in range(start, stop):
            path = paths[place]
            if len(path) != path_width:
                path_width = len(path)
                size_octets = int_octets(path_size + path_width, 7, 0)
                constant_path = before + size_octets + template.path
                length = len(constant_path) + path_width + len(common_tail) + varying * width + len(between)
                if length > self._peer_frame:
                    break
                head = length.to_bytes(3, "big") + b"\x01\x04"
            if not shared_literals:
                fields = literals[place]
                own_literals = spelt.get(fields) or spelt.setdefault(fields, self._spell_literals(fields))
                if length + len(own_literals) > self._peer_frame:
                    break
                head = (length + len(own_literals)).to_bytes(3, "big") + b"\x01\x04"
                tail = own_literals + common_tail
            body = bodies[place] if shared is None else shared
            if len(body) != body_size:
                if not 0 < len(body) <= limit:
                    break
                body_size = len(body)
                body_head = body_size.to_bytes(3, "big") + b"\0\1"
            if window < body_size:
                break
            window -= body_size
            sid = stream_id.to_bytes(4, "big")
            if varying == 1:
                parts += (head, sid, constant_path, path, tail, suffixes[place], body_head, sid, body)
            elif varying == 0:
                parts += (head, sid, constant_path, path, tail, body_head, sid, body)
            else:
                suffix = suffixes[place]
                parts += (head, sid, constant_path, path, tail, suffix, between, suffix, body_head, sid, body)
            plain[stream_id] = keys[place]
            stream_id += 2
        else:
            place = stop
        self._send_window = window
        self._next_id = stream_id
        self._out.append(b"".join(parts))
        return place

    def _open_one(self, requests: Requests, place: int) -> bool:
        """Open one stream the long way: it may teach the peer's table, and its body may have to wait for windows."""
        template = requests.template
        body = requests.bodies[place if len(requests.bodies) > 1 else 0]
        if len(body) > self._send_window and self.open_streams:
            return False  # the window opens as the server reads what is under way; only a lone body goes in pieces
        encoder = self._encoder
        fixed = ((b":method", b"POST"), (b":scheme", b"https"), (b":authority", template.authority))
        block = [encoder.start(), *[encoder.index(field) for field in fixed]]
        block.append(encoder.literal(b":path", template.path + requests.paths[place]))
        block += [encoder.index(field) for field in template.fields]
        literals = requests.literals[place if len(requests.literals) > 1 else 0]
        block += [encoder.index_name(name, value) for name, value in literals]
        for name, prefix in zip(template.varying, requests.prefixes, strict=True):
            block.append(encoder.index_name(name, prefix + requests.suffixes[place]))
        self._spellings[template] = self._spell(template)
        stream_id = self._next_id
        self._next_id += 2
        self._out.append(f.header_block(stream_id, b"".join(block), self._peer_frame, end_stream=not body))
        if not body:
            self._plain[stream_id] = requests.keys[place]
            return True
        stream = self._streams[stream_id] = _Stream(requests.keys[place], body, self._peer_window)
        self._send_body(stream_id, stream)
        return True

    def _spell_literals(self, fields: tuple[Field, ...]) -> bytes:
        return b"".join([self._encoder.literal(name, value) for name, value in fields])

    def _spell(self, template: Template) -> _Spelling:
        known = self._encoder.known
        fixed = ((b":method", b"POST"), (b":scheme", b"https"), (b":authority", template.authority))
        before = b"".join([known(field) for field in fixed])
        # `literal_head` with a length of 0 is the name and one octet of length, which depends on the path.
        path_name = self._encoder.literal_head(b":path", 0)[:-1]
        after = b"".join([known(field) for field in template.fields])
        if len(self._spellings) > 64:
            self._spellings.clear()
        return _Spelling(self._encoder.generation, before + path_name, after)

    def _on_body_sent(self, stream_id: int, stream: _Stream) -> None:
        """The stream stays where it is, until its answer has come."""

    def _note_opened(self, now: float, first: int, last: int) -> None:
        opened = self._opened
        if opened and now - opened[-1].at < _COARSE_S:
            opened[-1] = opened[-1]._replace(last=last)
            return
        # What is older than the oldest open stream has no deadline left to keep.
        oldest = min(next(iter(self._plain), NO_LIMIT), min(self._streams, default=NO_LIMIT))
        while opened and opened[0].last < oldest:
            opened.popleft()
        opened.append(_Opened(now, first, last))

    # -- answers, the common kind --------------------------------------------------------------------------------

    def _frames(self, buffer: bytes, now: float, events: list[Event]) -> int:
        accepted: list[Key] = []
        self._pinged = None
        try:
            return self._read(buffer, now, accepted, events)
        finally:
            if accepted:
                self._work += len(accepted)
                events.insert(0, Accepted(accepted))

    def _read(self, buffer: bytes, now: float, accepted: list[Key], events: list[Event]) -> int:
        """As the base's, with a short way for plain 200s."""
        unpack_header = f.HEADER.unpack_from
        shapes, plain = self._shapes, self._plain
        start, size = 0, len(buffer)
        while size - start >= f.HEADER_OCTETS and not self._over:
            high, low, kind, flags, stream_id = unpack_header(buffer, start)
            length = high << 16 | low
            if length > f.DEFAULT_FRAME_SIZE:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} octets")
            body = start + f.HEADER_OCTETS
            end = body + length
            if end > size:
                break
            if kind == f.HEADERS and flags == f.END_STREAM | f.END_HEADERS and self._block is None:
                for shape in shapes.get(length, ()):
                    if buffer.startswith(shape, body):
                        break
                else:
                    shape = b""
                if shape:
                    if size - start >= (length + 9) * _RUN_AT_LEAST:
                        taken = self._read_run(buffer, start, length + 9, shape, accepted)
                        if taken:
                            start += taken * (length + 9)
                            continue
                    if stream_id in plain:
                        accepted.append(plain.pop(stream_id))
                        start = end
                        continue
            self._frame(kind, flags, stream_id & NO_LIMIT, buffer[body:end], now, events)
            start = end
        return start

    def _read_run(self, buffer: bytes, start: int, length: int, shape: bytes, accepted: list[Key]) -> int:
        """Take a run of frames of one length that begin alike; returns how many were taken."""
        if buffer[start + length : start + length + 5] != buffer[start : start + 5]:
            return 0
        count = min((len(buffer) - start) // length, _RUN_AT_MOST)
        for place, octet in (*enumerate(buffer[start : start + 5]), *enumerate(shape, f.HEADER_OCTETS)):
            column = buffer[start + place : start + count * length : length]
            count = min(count, len(column) - len(column.lstrip(bytes((octet,)))))
        if count < 2:
            return 0
        ids = _stream_ids(length).iter_unpack(memoryview(buffer)[start : start + count * length])
        before = len(accepted)
        try:
            accepted.extend(map(self._plain.pop, map(itemgetter(0), ids)))
        except KeyError:  # a stream that is not plain: those before it were taken, it goes the long way
            return len(accepted) - before
        return count

    def _decode(self, block: bytes) -> list[Field] | None:
        changed = self._decoder.changed
        fields = super()._decode(block)
        if self._decoder.changed != changed:
            self._shapes.clear()  # they may have spoken of entries that are somebody else's now
        elif fields:
            self._learn_shape(block, fields)
        return fields

    def _learn_shape(self, block: bytes, fields: list[Field]) -> None:
        """Remember a block that means a plain 200 and ends with `apns-id` as a literal.

        The shape ends with that value's length octet; as shapes are kept by the length of the block, the value fills
        the rest exactly. What it says is not looked at: it is our own id coming back.
        """
        name, value = fields[-1]
        if fields[0] != (b":status", b"200") or name != b"apns-id":
            return
        names = [each for each, _ in fields]
        if names.count(name) > 1 or b"content-length" in names or not self._keep.isdisjoint(names):
            return
        for octets, first in ((value, 0), (huffman(value), 0x80)):
            tail = int_octets(len(octets), 7, first) + octets
            if block.endswith(tail):
                check_answer(fields)
                shapes = self._shapes.setdefault(len(block), [])
                shape = block[: len(block) - len(octets)]
                if shape not in shapes and sum(map(len, self._shapes.values())) < _SHAPES:
                    shapes.append(shape)
                return

    # -- answers, any kind ---------------------------------------------------------------------------------------

    def _is_idle(self, stream_id: int) -> bool:
        return not stream_id & 1 or stream_id >= self._next_id

    def _closed_stream_frame(self, stream_id: int) -> None:
        if stream_id <= self._last_taken:  # what GOAWAY handed back may be answered all the same: too late
            super()._closed_stream_frame(stream_id)

    def _take_stream(self, stream_id: int) -> _Stream | None:
        """The open stream as an object; None if it is closed."""
        stream = self._streams.get(stream_id)
        if stream is None and stream_id in self._plain:
            stream = self._streams[stream_id] = _Stream(self._plain.pop(stream_id), b"", self._peer_window)
        return stream

    def _on_message(self, stream_id: int, flags: int, fields: list[Field] | None, events: list[Event]) -> None:
        if self._is_idle(stream_id):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "an answer on a stream that was not opened")
        stream = self._take_stream(stream_id)
        if stream is None:
            self._closed_stream_frame(stream_id)
            return
        if fields is None:
            raise StreamFault(ErrorCode.ENHANCE_YOUR_CALM, "an answer with more header fields than we take")
        ends = bool(flags & f.END_STREAM)
        if stream.status:
            check_trailers(fields)
            if not ends:
                raise Malformed("trailers that do not end the stream")
        else:
            status, length = check_answer(fields)
            if status < 200:
                if ends or status == 101:
                    raise Malformed("an interim answer that ends the stream, or 101")
                return
            stream.status = status
            stream.fields = [field for field in fields if field[0] != b":status"]
            stream.expected = length
        if ends:
            self._answered(stream_id, stream, events)

    def _on_data(self, stream_id: int, flags: int, data: bytes, charged: int, events: list[Event]) -> None:  # noqa: ARG002
        stream = self._streams.get(stream_id)
        if stream is None or not stream.status:
            if stream_id in self._plain or stream is not None:
                raise StreamFault(ErrorCode.PROTOCOL_ERROR, "DATA before the answer's header fields")
            self._closed_stream_frame(stream_id)
            return
        room = self.max_body - len(stream.answer)
        stream.answer += data[:room]
        if stream.expected is not None:
            stream.expected -= len(data)
            if stream.expected < 0:
                raise StreamFault(ErrorCode.PROTOCOL_ERROR, "more DATA than content-length says")
        if len(data) > room:  # nothing that Apple says is so long: what came is what we tell
            stream.expected, stream.unsent = None, b""
            self._send_reset(stream_id, ErrorCode.CANCEL)
            self._answered(stream_id, stream, events)
        elif flags & f.END_STREAM:
            self._answered(stream_id, stream, events)

    def _answered(self, stream_id: int, stream: _Stream, events: list[Event]) -> None:
        if stream.expected and (stream.answer or stream.status not in (204, 304)):
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "less DATA than content-length says")
        del self._streams[stream_id]
        self._work += 1
        if stream.unsent:  # answered before it was asked: RFC 9113, section 8.1
            self._send_reset(stream_id, ErrorCode.CANCEL)
        if stream.status == 200 and not stream.answer and not any(name in self._keep for name, _ in stream.fields):
            events.append(Accepted([stream.key]))
        else:
            events.append(Answered(stream.key, stream.status, stream.fields, bytes(stream.answer)))

    def _drop(self, stream_id: int) -> list[Key]:
        """Forget a stream; its key, in a list, or nothing where it was closed already."""
        if stream_id in self._plain:
            return [self._plain.pop(stream_id)]
        stream = self._streams.pop(stream_id, None)
        return [] if stream is None else [stream.key]

    def _on_reset(self, stream_id: int, code: int, events: list[Event]) -> None:
        keys = self._drop(stream_id)
        if not keys:
            return
        if code == ErrorCode.REFUSED_STREAM:
            events.append(NotProcessed(keys, "RST_STREAM REFUSED_STREAM"))
        else:
            events.append(Unknown(keys, f"RST_STREAM {f.code_name(code)}"))

    def _on_stream_fault(self, stream_id: int, fault: StreamFault, events: list[Event]) -> None:
        keys = self._drop(stream_id)
        if keys:
            events.append(Unknown(keys, f"a malformed answer: {fault}"))

    def _enable_push(self, value: int) -> None:
        if value:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a server that sets ENABLE_PUSH")

    def _on_goaway(self, event: GoAway, events: list[Event]) -> None:
        # A second GOAWAY may only lower the last stream id (section 6.8); what was handed back stays handed back.
        self._going = True
        self._last_taken = last = min(self._last_taken, event.last_stream_id)
        keys = [self._plain.pop(stream_id) for stream_id in [s for s in self._plain if s > last]]
        keys += [self._streams.pop(stream_id).key for stream_id in [s for s in self._streams if s > last]]
        if keys:
            events.append(NotProcessed(keys, f"GOAWAY {f.code_name(event.code)}"))

    def _on_over(self, why: str, events: list[Event]) -> None:
        keys = [*self._plain.values(), *[stream.key for stream in self._streams.values()]]
        self._plain.clear()
        self._streams.clear()
        self._blocked.clear()
        if keys:
            events.append(Unknown(keys, why))

    # -- time ----------------------------------------------------------------------------------------------------

    def wake_at(self) -> float | None:
        """When `tick` is to be called next; None: not before something else happens."""
        if self._over:
            return None
        if not self._settled:
            return self._started + self.limits.settings_s
        times = [self._heard + (self.limits.ping_after_s if self.open_streams else self.limits.ping_idle_s)]
        if self._pinged is not None:
            times = [self._pinged + self.limits.ping_wait_s]
        if self._opened and self.open_streams:
            times.append(self._opened[0].at + self.limits.message_s)
        if self._block is not None:
            times.append(self._block.started + self.limits.settings_s)
        return min(times)

    def tick(self, now: float) -> list[Event]:
        """Whatever is due at this time: deadlines of streams, PING, SETTINGS that never came."""
        events: list[Event] = []
        if self._over:
            return events
        limits = self.limits
        if not self._settled and now >= self._started + limits.settings_s:
            self._fail(ErrorCode.SETTINGS_TIMEOUT, "the server's SETTINGS did not come in time", events)
            return events
        if self._block is not None and now >= self._block.started + limits.settings_s:
            self._fail(ErrorCode.PROTOCOL_ERROR, "a header block did not end in time", events)
            return events
        if self._pinged is not None:
            if now >= self._pinged + limits.ping_wait_s:
                self._end(Failed(ErrorCode.NO_ERROR, "the server went silent", ours=True), events)
                return events
        elif now >= self._heard + (limits.ping_after_s if self.open_streams else limits.ping_idle_s):
            self.ping(b"heliogr?")
            self._pinged = now
        self._expire(now, events)
        return events

    def _expire(self, now: float, events: list[Event]) -> None:
        keys: list[Key] = []
        while self._opened and now >= self._opened[0].at + self.limits.message_s:
            group = self._opened.popleft()
            for stream_id in range(group.first, group.last + 1, 2):
                dropped = self._drop(stream_id)
                if dropped:
                    keys += dropped
                    self._send_reset(stream_id, ErrorCode.CANCEL)
        if keys:
            events.append(Unknown(keys, "no answer in time"))

    def goodbye(self) -> None:
        """Take no more requests and tell the server; open streams may still be answered."""
        if not self._going and not self._over:
            self._going = True
            self._out.append(f.goaway(0, ErrorCode.NO_ERROR))
