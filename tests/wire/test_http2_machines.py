"""Our two roles, each in a long conversation with h2 that Hypothesis makes up, octets cut anywhere on their way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import h2.events
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from hpack import NeverIndexedHeaderTuple
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from heliograph.protocols.http2 import (
    Accepted,
    Answer,
    Answered,
    Cancelled,
    ClientConnection,
    Event,
    Failed,
    Field,
    NotProcessed,
    Request,
    Requests,
    ServerConnection,
    Template,
    Unknown,
)
from heliograph.protocols.http2 import frames as f
from tests.wire import strategies as s

TEMPLATES = [
    Template(b"localhost", b"/3/device/", ((b"apns-topic", b"com.example"),), (b"apns-id",)),
    Template(b"localhost", b"/3/device/", ((b"apns-topic", b"com.example.voip"), (b"apns-push-type", b"voip"))),
    Template(b"localhost", b"/3/device/", ((b"authorization", b"bearer " + b"e" * 200),), (b"apns-id", b"x-own-id")),
]
KEPT = b"content-type"
SIZES = st.sampled_from([0, 2, 118, 4_096, 20_000])
"""Of bodies."""


@dataclass
class Asked:
    """A request as its sender meant it, or as its receiver read it."""

    path: bytes = b""
    fields: list[Field] = field(default_factory=list)
    body: bytes = b""
    whole: bool = False


class Frames:
    """Puts octets together again for h2, which heeds an acknowledged MAX_FRAME_SIZE from its next call on only."""

    def __init__(self) -> None:
        self._partial = b""

    def cut(self, octets: bytes) -> list[bytes]:
        self._partial += octets
        pieces = []
        while len(self._partial) >= self._size():
            size = self._size()
            pieces.append(self._partial[:size])
            self._partial = self._partial[size:]
        return pieces

    def _size(self) -> int:
        if self._partial[:3] == b"PRI":
            return len(f.PREFACE)
        return 9 + int.from_bytes(self._partial[:3], "big") if len(self._partial) >= 9 else 9


class ClientMeetsH2(RuleBasedStateMachine):
    """Our client role, and h2 as a server that follows the rules but does as it likes within them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        self.client = ClientConnection(self.now, keep=frozenset((KEPT,)))
        config = H2Configuration(client_side=False, header_encoding=False, normalize_inbound_headers=False)
        self.server = H2Connection(config)
        self.server.initiate_connection()
        self.to_server = b""
        self.to_client = b""
        self.frames = Frames()
        self.acks_due = 1
        self.sent: dict[int, Asked] = {}
        """What we asked for, by key."""
        self.ends: dict[int, object] = {}
        self.stream_of: dict[int, int] = {}
        self.read: dict[int, Asked] = {}
        """What the server has read, by stream."""
        self.open: dict[int, int] = {}
        """Streams that the server may still answer, with what it began: 0 nothing, 1 its header fields."""
        self.answered: dict[int, tuple[int, list[Field], bytes]] = {}
        """What the server has said, by stream; whole where the stream is not in `open`."""
        self.reset: dict[int, int] = {}
        self.last = f.MAX_STREAM_ID
        self.unread = 0
        self.failed = False

    # -- our side

    @rule(
        template=st.sampled_from(TEMPLATES),
        count=st.integers(1, 30),
        sizes=st.one_of(SIZES.map(lambda size: [size]), st.lists(SIZES, min_size=2, max_size=5)),
        long=st.sampled_from([0, 0, 20_000]),
        width=st.sampled_from([1, 64, 200]),
        after=st.sampled_from([0, 0, 0.3]),
    )
    def submit(self, template: Template, count: int, sizes: list[int], long: int, width: int, after: float) -> None:
        self.now += after
        keys = range(len(self.sent), len(self.sent) + count)
        ends = [b"%0*x" % (width, key) for key in keys]
        suffixes = [b"%06d" % key for key in keys]
        prefixes = tuple(b"p%d-" % place for place in range(len(template.varying)))
        bodies = [b"b" * size for size in islice(cycle(sizes), 1 if len(sizes) == 1 else count)]
        literals: tuple[Field, ...] = ((b"x-long", b"l" * long),) if long else ()
        capacity = self.client.capacity
        taken = self.client.submit(
            Requests(template, keys, ends, bodies, (literals,), prefixes, suffixes if prefixes else ()), self.now
        )
        assert 0 <= taken <= min(count, capacity)
        for place, key in enumerate(keys[:taken]):
            varying = [(name, prefixes[at] + suffixes[place]) for at, name in enumerate(template.varying)]
            self.sent[key] = Asked(
                template.path + ends[place],
                sorted([*template.fields, *literals, *varying]),
                bodies[0 if len(bodies) == 1 else place],
                whole=True,
            )
            self.stream_of[key] = 2 * len(self.stream_of) + 1

    @rule(seconds=st.sampled_from([0.01, 0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = self.client.wake_at()
        events = self.client.tick(self.now)
        assert not events or (due is not None and due <= self.now)
        self._take(events)

    @rule(size=st.one_of(st.integers(0, 60), st.just(2**20)))
    def carry_to_server(self, size: int) -> None:
        self.to_server += self.client.data_to_send()
        octets, self.to_server = self.to_server[:size], self.to_server[size:]
        for piece in self.frames.cut(octets):
            for event in self.server.receive_data(piece):
                self._server_reads(event)

    @rule(size=st.one_of(st.integers(0, 60), st.just(2**20)))
    def carry_to_client(self, size: int) -> None:
        self.to_client += self.server.data_to_send()
        octets, self.to_client = self.to_client[:size], self.to_client[size:]
        self._take(self.client.receive(octets, self.now))

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Failed):
                self.failed = True
            for key in [event.key] if isinstance(event, Answered) else getattr(event, "keys", ()):
                assert key not in self.ends, "a second end"
                self.ends[key] = event
                self._check_end(key, event)

    def _check_end(self, key: int, event: Event) -> None:
        stream_id = self.stream_of[key]
        whole = stream_id in self.answered and stream_id not in self.open and stream_id not in self.reset
        if isinstance(event, Accepted | Answered):
            assert whole
            status, fields, body = self.answered[stream_id]
            kept = any(name == KEPT for name, _ in fields)
            if isinstance(event, Accepted):
                assert (status, body, kept) == (200, b"", False)
            else:
                assert (event.status, event.fields, event.body) == (status, fields, body)
                assert status != 200 or body or kept
        elif isinstance(event, NotProcessed):
            assert stream_id > self.last or self.reset.get(stream_id) == ErrorCodes.REFUSED_STREAM
        else:
            assert isinstance(event, Unknown)

    # -- the server's side

    def _server_reads(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            fields = [(bytes(name), bytes(value)) for name, value in event.headers]
            pseudo = {name: value for name, value in fields if name[:1] == b":"}
            path = pseudo.pop(b":path")
            assert pseudo == {b":method": b"POST", b":scheme": b"https", b":authority": b"localhost"}
            self.read[event.stream_id] = Asked(path, sorted(set(fields) - set(pseudo.items()) - {(b":path", path)}))
            self.open[event.stream_id] = 0
        elif isinstance(event, h2.events.DataReceived):
            self.read[event.stream_id].body += event.data
            self.unread += event.flow_controlled_length
        elif isinstance(event, h2.events.StreamEnded):
            self.read[event.stream_id].whole = True
            assert self.read[event.stream_id] == self.sent[event.stream_id // 2]
        elif isinstance(event, h2.events.StreamReset):
            self.open.pop(event.stream_id, None)
        elif isinstance(event, h2.events.SettingsAcknowledged):
            self.acks_due -= 1
        elif isinstance(event, h2.events.ConnectionTerminated):
            assert self.failed, "GOAWAY from a client that has not failed"

    def _answerable(self) -> list[int]:
        return [stream_id for stream_id in self.open if stream_id <= self.last]

    @precondition(lambda self: self._answerable() and not self.failed)
    @rule(data=st.data(), status=st.sampled_from([200, 200, 410, 503]), more=s.ORDINARY, size=SIZES)
    def answer(self, data: st.DataObject, status: int, more: list[Field], size: int) -> None:
        stream_id = data.draw(st.sampled_from(self._answerable()))
        body = b"a" * min(size, 5_000)
        if self.open[stream_id] == 0:
            if data.draw(st.booleans()):
                self.server.send_headers(stream_id, [(b":status", b"103"), *more])
            end = not body and data.draw(st.booleans())
            self.server.send_headers(stream_id, [(b":status", b"%d" % status), *more], end_stream=end)
            self.answered[stream_id] = (status, more, b"")
            self.open[stream_id] = 1
            if not end:
                return
        else:
            status, fields, before = self.answered[stream_id]
            body = body[: self.server.local_flow_control_window(stream_id)]
            last = len(before) > 8_000 or data.draw(st.booleans())
            trailers = last and data.draw(st.booleans())
            padding = data.draw(st.sampled_from([None, 0, 7])) if len(body) > 10 else None
            body = body[:-10] if padding is not None else body
            self.server.send_data(stream_id, body, end_stream=last and not trailers, pad_length=padding)
            self.answered[stream_id] = (status, fields, before + body)
            if trailers:
                self.server.send_headers(stream_id, more or [(b"x-late", b"1")], end_stream=True)
            if not last:
                return
        del self.open[stream_id]

    @precondition(lambda self: self._answerable() and not self.failed)
    @rule()
    def answer_all_plainly(self) -> None:
        for stream_id in self._answerable():
            if self.open[stream_id] == 0:
                apns_id = b"0191d5a8-0000-7000-8000-%012d" % stream_id
                self.server.send_headers(
                    stream_id,
                    [NeverIndexedHeaderTuple(b":status", b"200"), NeverIndexedHeaderTuple(b"apns-id", apns_id)],
                    end_stream=True,
                )
                self.answered[stream_id] = (200, [], b"")
                del self.open[stream_id]

    @precondition(lambda self: self.open and not self.failed)
    @rule(data=st.data(), code=st.sampled_from([ErrorCodes.REFUSED_STREAM, ErrorCodes.CANCEL, ErrorCodes.NO_ERROR]))
    def break_off(self, data: st.DataObject, code: ErrorCodes) -> None:
        stream_id = data.draw(st.sampled_from(list(self.open)))
        self.server.reset_stream(stream_id, code)
        self.reset[stream_id] = code
        del self.open[stream_id]

    @precondition(lambda self: not self.failed and not self.acks_due)
    @rule(values=s.settings_values(server=True))
    def change_settings(self, values: dict[int, int]) -> None:
        self.acks_due += 1  # one at a time: h2 takes any acknowledgement for one of the newest values
        self.server.update_settings({key: value for key, value in values.items() if key < f.MAX_HEADER_LIST_SIZE})

    @precondition(lambda self: self.unread and not self.failed)
    @rule()
    def open_windows(self) -> None:
        self.server.increment_flow_control_window(self.unread)
        self.unread = 0
        for stream_id in self.open:
            if not self.read[stream_id].whole:
                self.server.increment_flow_control_window(20_000, stream_id)

    @precondition(lambda self: not self.failed)
    @rule()
    def ping(self) -> None:
        self.server.ping(b"heliogr!")

    @precondition(lambda self: not self.failed)
    @rule(back=st.integers(0, 5))
    def go_away(self, back: int) -> None:
        # By hand: h2 takes nothing more after a GOAWAY of its own.
        highest = max([stream_id for stream_id in self.read if stream_id <= self.last], default=0)
        acted_on = max([*self.answered, *self.reset], default=0)
        self.last = min(self.last, max(highest - 2 * back, acted_on))
        self.to_client += self.server.data_to_send() + f.goaway(self.last, 0, b'{"reason":"Shutdown"}')

    # -- always

    @invariant()
    def every_request_is_open_or_has_ended(self) -> None:
        assert self.client.open_streams == len(self.sent) - len(self.ends)
        assert self.client.capacity >= 0

    @invariant()
    def an_open_stream_has_a_deadline(self) -> None:
        due = self.client.wake_at()
        if self.client.open_streams:
            assert due is not None
            assert due <= self.now + self.client.limits.message_s

    def teardown(self) -> None:
        if self.client.open_streams:
            self._take(self.client.tick(self.now + self.client.limits.message_s))
            assert self.client.open_streams == 0, "a stream without a deadline"
        self._take(self.client.eof(self.now))
        assert self.ends.keys() == self.sent.keys()


@dataclass
class Conversation:
    """A stream, as the client knows it."""

    fields: list[Field]
    body: bytes = b""
    whole: bool = False
    cancelled: bool = False
    reported: bool = False
    answer: tuple[int, list[Field], bytes] | None = None
    """What we answered."""
    read: tuple[int, list[Field], bytes] = (0, [], b"")
    ended: bool = False


class ServerMeetsH2(RuleBasedStateMachine):
    """Our server role, and h2 as a client that follows the rules but does as it likes within them."""

    MAX_BODY = 5_000
    MAX_STREAMS = 20

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        self.server = ServerConnection(self.now, max_streams=self.MAX_STREAMS, max_body=self.MAX_BODY)
        config = H2Configuration(client_side=True, header_encoding=False, normalize_inbound_headers=False)
        self.client = H2Connection(config)
        self.client.initiate_connection()
        self.frames = Frames()
        self.to_server = b""
        self.to_client = b""
        self.acks_due = 1
        self.limit_changes = 0
        self.streams: dict[int, Conversation] = {}
        self.unread = 0

    # -- the client's side

    def _sending(self) -> list[int]:
        return [id_ for id_, stream in self.streams.items() if not (stream.whole or stream.cancelled or stream.ended)]

    @precondition(
        lambda self: (
            self.client.open_outbound_streams
            # Until the server's SETTINGS come, h2 thinks that there is no limit.
            < min(self.MAX_STREAMS, self.client.remote_settings.max_concurrent_streams)
        )
    )
    @rule(fields=s.request_fields(), whole=st.booleans(), long=st.sampled_from([0, 0, 20_000]), on=st.integers(0, 3))
    def ask(self, fields: list[Field], whole: bool, long: int, on: int) -> None:
        stream_id = self.client.get_next_available_stream_id()
        fields = [*fields, (b"x-long", b"<" * long)] if long else fields
        on = 0 if long else on  # h2 cannot send both
        self.client.send_headers(
            stream_id, fields, whole, 256 if on else None, 2 * on + stream_id if on else None, bool(on) or None
        )
        self.streams[stream_id] = Conversation(fields, whole=whole)

    @precondition(lambda self: self._sending())
    @rule(data=st.data(), size=SIZES, end=st.booleans(), trailers=s.ORDINARY)
    def ask_more(self, data: st.DataObject, size: int, end: bool, trailers: list[Field]) -> None:
        stream_id = data.draw(st.sampled_from(self._sending()))
        stream = self.streams[stream_id]
        room = min(self.client.local_flow_control_window(stream_id), self.client.max_outbound_frame_size) - 300
        padding = data.draw(st.sampled_from([None, 0, 255]))
        body = b"q" * max(min(size, room), 0)
        if room > 0:
            self.client.send_data(stream_id, body, end_stream=end and not trailers, pad_length=padding)
            stream.body += body
        elif not end:
            return
        if end and (trailers or room <= 0):
            self.client.send_headers(stream_id, trailers or [(b"x-late", b"1")], end_stream=True)
        stream.whole = end

    @precondition(lambda self: any(not (stream.ended or stream.cancelled) for stream in self.streams.values()))
    @rule(data=st.data(), code=st.sampled_from([ErrorCodes.CANCEL, ErrorCodes.NO_ERROR]))
    def cancel(self, data: st.DataObject, code: ErrorCodes) -> None:
        able = [id_ for id_, stream in self.streams.items() if not (stream.ended or stream.cancelled)]
        stream_id = data.draw(st.sampled_from(able))
        self.client.reset_stream(stream_id, code)
        self.streams[stream_id].cancelled = True

    @precondition(lambda self: not self.acks_due)
    @rule(values=s.settings_values(server=False))
    def change_settings(self, values: dict[int, int]) -> None:
        self.acks_due += 1
        wanted = (f.INITIAL_WINDOW_SIZE, f.HEADER_TABLE_SIZE, f.MAX_FRAME_SIZE)
        values = {key: value for key, value in values.items() if key in wanted}
        if values.get(f.INITIAL_WINDOW_SIZE) == f.MAX_WINDOW:
            values[f.INITIAL_WINDOW_SIZE] = 2**30  # so that `open_windows` has room
        self.client.update_settings(values)

    @rule(increment=st.sampled_from([1, 500, 40_000]))
    def open_windows(self, increment: int) -> None:
        if self.client.inbound_flow_control_window + increment < 2**30:
            self.client.increment_flow_control_window(increment)
        for stream_id, stream in self.streams.items():
            if not stream.ended and not stream.cancelled:
                self.client.increment_flow_control_window(increment, stream_id)

    @rule()
    def ping(self) -> None:
        self.client.ping(b"heliogr!")

    @rule(size=st.one_of(st.integers(0, 60), st.just(2**20)))
    def carry_to_client(self, size: int) -> None:
        self.to_client += self.server.data_to_send()
        octets, self.to_client = self.to_client[:size], self.to_client[size:]
        for piece in self.frames.cut(octets):
            for event in self.client.receive_data(piece):
                self._client_reads(event)

    def _client_reads(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.SettingsAcknowledged):
            self.acks_due -= 1
        if isinstance(event, h2.events.ConnectionTerminated):
            pytest.fail(f"GOAWAY: {event}")
        stream = self.streams.get(getattr(event, "stream_id", 0))
        if stream is None:
            return
        status, fields, body = stream.read
        if isinstance(event, h2.events.ResponseReceived):
            said = [(bytes(name), bytes(value)) for name, value in event.headers]
            assert said[0][0] == b":status"
            stream.read = (int(said[0][1]), said[1:], b"")
        elif isinstance(event, h2.events.DataReceived):
            stream.read = (status, fields, body + event.data)
        elif isinstance(event, h2.events.StreamEnded):
            stream.ended = True
            assert stream.read == stream.answer
        elif isinstance(event, h2.events.StreamReset):
            # Only where we answered a request whose rest we did not need.
            assert event.error_code == ErrorCodes.NO_ERROR
            assert stream.answer is not None
            assert stream.read == stream.answer
            stream.ended = True

    # -- our side

    @rule(size=st.one_of(st.integers(0, 60), st.just(2**20)))
    def carry_to_server(self, size: int) -> None:
        self.to_server += self.client.data_to_send()
        octets, self.to_server = self.to_server[:size], self.to_server[size:]
        for event in self.server.receive(octets, self.now):
            assert not isinstance(event, Failed), event
            if isinstance(event, Request):
                stream = self.streams[event.stream_id]
                assert not stream.reported
                stream.reported = True
                assert event.fields == stream.fields
                assert event.body == stream.body[: len(event.body)]
                assert len(event.body) == self.MAX_BODY if event.truncated else stream.body == event.body
            elif isinstance(event, Cancelled):
                stream = self.streams[event.stream_id]
                assert stream.reported
                assert stream.cancelled

    def _answerable(self) -> list[int]:
        return [id_ for id_, stream in self.streams.items() if stream.reported and stream.answer is None]

    @precondition(lambda self: self._answerable())
    @rule(data=st.data(), status=st.sampled_from([200, 410, 503]), fields=s.ORDINARY, size=SIZES)
    def answer(self, data: st.DataObject, status: int, fields: list[Field], size: int) -> None:
        some = data.draw(st.sets(st.sampled_from(self._answerable()), min_size=1))
        body = b"a" * size
        self.server.respond([Answer(stream_id, status, tuple(fields), body) for stream_id in some])
        for stream_id in some:
            self.streams[stream_id].answer = (status, fields, body)

    @precondition(lambda self: self.limit_changes < 5)
    @rule(limit=st.integers(0, 20))
    def limit_streams(self, limit: int) -> None:
        self.limit_changes += 1
        self.server.set_max_streams(limit)

    @invariant()
    def no_more_is_open_than_the_client_has_opened(self) -> None:
        assert self.server.open_streams <= len(self.streams)
        due = self.server.wake_at()
        assert due is None or due <= self.now + 60

    def teardown(self) -> None:
        for stream_id in self._sending():
            self.client.reset_stream(stream_id, ErrorCodes.CANCEL)
            self.streams[stream_id].cancelled = True
        self.carry_to_server(2**24)
        for stream in self.streams.values():
            assert stream.reported or stream.cancelled
        left = self._answerable()
        self.server.respond([Answer(stream_id, 200) for stream_id in left])
        for stream_id in left:
            self.streams[stream_id].answer = (200, [], b"")
        for _ in range(20):
            self.open_windows(40_000)
            self.carry_to_server(2**24)
            self.carry_to_client(2**24)
        assert all(stream.ended or stream.cancelled for stream in self.streams.values())
        assert self.server.open_streams == 0


@pytest.mark.parametrize(
    "answers",
    [
        [f.header_block(1, b"\x08\x03103", 16_384, end_stream=False)],
        [f.header_block(stream_id, b"\x88", 16_384, end_stream=False) for stream_id in (3, 1)],
    ],
    ids=["an interim answer", "answers that begin in another order"],
)
def test_no_stream_loses_its_deadline(answers: list[bytes]) -> None:
    client = ClientConnection(0.0)
    client.receive(f.settings({}), 0.0)
    for key in range(3):
        if key == 2:
            for answer in answers:
                assert client.receive(answer, 1.5) == []
        assert client.submit(Requests(TEMPLATES[0], [key], [b"ab"], [b"{}"], ((),), (b"",), [b"1"]), float(key)) == 1
    assert client.tick(30.0) == [Unknown([0], "no answer in time")]


def test_frames_that_crossed_with_our_goaway_are_ignored() -> None:
    server = ServerConnection(0.0)
    h2_client = H2Connection(H2Configuration(client_side=True, header_encoding=False))
    h2_client.initiate_connection()
    fields = [(b":method", b"POST"), (b":scheme", b"https"), (b":path", b"/"), (b":authority", b"localhost")]
    for stream_id in (1, 3):
        h2_client.send_headers(stream_id, fields)
    assert [type(event).__name__ for event in server.receive(h2_client.data_to_send(), 0.0)] == ["SettingsChanged"]
    server.goaway(0, b"", last_stream_id=1)
    # The client has not read that yet, and goes on.
    h2_client.send_headers(5, fields)
    for stream_id in (1, 3, 5):
        h2_client.send_data(stream_id, b"{}", end_stream=True)
    h2_client.reset_stream(5)
    events = server.receive(h2_client.data_to_send(), 0.0)
    assert [(event.stream_id, event.body) for event in events if isinstance(event, Request)] == [(1, b"{}")]
    assert not server.over


TestClientMeetsH2 = pytest.mark.timeout(600)(ClientMeetsH2.TestCase)
TestClientMeetsH2.settings = settings(stateful_step_count=40, report_multiple_bugs=False)
TestServerMeetsH2 = pytest.mark.timeout(600)(ServerMeetsH2.TestCase)
TestServerMeetsH2.settings = settings(stateful_step_count=40, report_multiple_bugs=False)
