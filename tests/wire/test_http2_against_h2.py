"""Our HTTP/2 core against h2, in memory: the same octets must mean the same to both, however they are cut.

What the two may see differently, because RFC 9113 leaves it open or h2 does something else, is listed in `_undecided`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import h2.errors
import h2.events
import h2.exceptions
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from hypothesis import given, note
from hypothesis import strategies as st

from heliograph.protocols.http2 import (
    Accepted,
    Answered,
    Cancelled,
    ClientConnection,
    Event,
    Failed,
    Field,
    GoAway,
    NotProcessed,
    Pong,
    Request,
    Requests,
    ServerConnection,
    Template,
    Unknown,
)
from heliograph.protocols.http2 import frames as f
from tests.wire import strategies as s

NOW = 1_000.0
KEPT = frozenset((b"content-type",))
TEMPLATE = Template(b"localhost", b"/3/device/", ((b"apns-topic", b"com.example"),), (b"apns-id",))


def requests(keys: Sequence[int], body: bytes = b'{"aps":{}}') -> Requests:
    return Requests(
        TEMPLATE,
        keys,
        [b"%064x" % key for key in keys],
        [body],
        prefixes=(b"00000000-0000-0000-0000-",),
        suffixes=[b"%012d" % key for key in keys],
    )


def sent_frames(octets: bytes) -> list[tuple[int, int, int, bytes]]:
    """Kind, flags, stream id and payload of each frame, a client's preface aside."""
    octets = octets.removeprefix(f.PREFACE)
    found = []
    while octets:
        high, low, kind, flags, stream_id = f.HEADER.unpack_from(octets)
        size = high << 16 | low
        found.append((kind, flags, stream_id, octets[9 : 9 + size]))
        octets = octets[9 + size :]
    return found


@dataclass
class Meaning:
    """What a connection has been told so far, in words that both implementations share."""

    ended: dict[int, tuple[list[Field], bytes]] = field(default_factory=dict)
    """Whole messages, by stream: fields with pseudo-fields, and body."""
    reset: set[int] = field(default_factory=set)
    """Streams that the peer reset while they were open."""
    refused: set[int] = field(default_factory=set)
    """Streams that this side reset for a fault of the peer."""
    pongs: int = 0
    goaway: tuple[int, int, bytes] | None = None
    failed: str = ""
    """Why this side ended the connection."""


class Side:
    """One of the two implementations, in either role."""

    def __init__(self) -> None:
        self.meaning = Meaning()

    def receive(self, octets: bytes) -> None:
        if not self.meaning.failed:
            output = self._receive(octets)
            self.meaning.refused.update(
                stream_id for kind, _, stream_id, _ in sent_frames(output) if kind == f.RST_STREAM
            )

    def _receive(self, octets: bytes) -> bytes:
        raise NotImplementedError


class Theirs(Side):
    """h2. As a client it has opened `streams` streams with whole requests."""

    def __init__(self, *, client: bool, streams: int) -> None:
        super().__init__()
        config = H2Configuration(client_side=client, header_encoding=False, normalize_inbound_headers=False)
        self.h2 = H2Connection(config)
        self.h2.local_settings.update({f.ENABLE_PUSH: 0} if client else {f.MAX_CONCURRENT_STREAMS: 1000})
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window((1 << 20) - f.DEFAULT_WINDOW)
        self._open: dict[int, tuple[list[Field], bytes]] = {}
        if client:
            fields = [(":method", "POST"), (":scheme", "https"), (":authority", "localhost"), (":path", "/")]
            for place in range(streams):
                self.h2.send_headers(2 * place + 1, fields, end_stream=True)
        else:
            self.h2.receive_data(f.PREFACE)
        self.h2.data_to_send()

    def _receive(self, octets: bytes) -> bytes:
        try:
            for event in self.h2.receive_data(octets):
                self._take(event)
        except h2.exceptions.ProtocolError as error:
            self.meaning.failed = repr(error)
        return self.h2.data_to_send()

    def _take(self, event: h2.events.Event) -> None:
        meaning = self.meaning
        if isinstance(event, h2.events.ResponseReceived | h2.events.RequestReceived):
            self._open[event.stream_id] = ([(bytes(name), bytes(value)) for name, value in event.headers], b"")
        elif isinstance(event, h2.events.DataReceived):
            fields, body = self._open[event.stream_id]
            self._open[event.stream_id] = (fields, body + event.data)
        elif isinstance(event, h2.events.StreamEnded):
            meaning.ended[event.stream_id] = self._open.pop(event.stream_id)
        elif isinstance(event, h2.events.StreamReset) and event.remote_reset:
            meaning.reset.add(event.stream_id)
        elif isinstance(event, h2.events.PingAckReceived):
            meaning.pongs += 1
        elif isinstance(event, h2.events.ConnectionTerminated):
            assert event.last_stream_id is not None
            assert event.error_code is not None
            meaning.goaway = (event.last_stream_id, int(event.error_code), event.additional_data or b"")


class Ours(Side):
    """Our core; keys of requests are stream ids."""

    def __init__(self, *, client: bool, streams: int) -> None:
        super().__init__()
        self.core: ClientConnection | ServerConnection
        if client:
            self.core = core = ClientConnection(NOW, keep=KEPT, max_body=1 << 20)
            core.receive(f.settings({f.MAX_CONCURRENT_STREAMS: streams}), NOW)
            assert core.submit(requests(range(1, 2 * streams, 2), b""), NOW) == streams
        else:
            self.core = ServerConnection(NOW, max_body=1 << 20)
            self.core.receive(f.PREFACE, NOW)
        self.core.data_to_send()

    def _receive(self, octets: bytes) -> bytes:
        for event in self.core.receive(octets, NOW):
            self._take(event)
        return self.core.data_to_send()

    def _take(self, event: Event) -> None:
        meaning = self.meaning
        if isinstance(event, Accepted):
            meaning.ended.update((key, ([(b":status", b"200")], b"")) for key in event.keys)
        elif isinstance(event, Answered):
            meaning.ended[event.key] = ([(b":status", b"%d" % event.status), *event.fields], event.body)
        elif isinstance(event, Request):
            meaning.ended[event.stream_id] = (event.fields, event.body)
        elif isinstance(event, Cancelled):
            meaning.reset.add(event.stream_id)
        elif isinstance(event, NotProcessed | Unknown):
            meaning.reset.update(event.keys)
        elif isinstance(event, Pong):
            meaning.pongs += 1
        elif isinstance(event, GoAway):
            meaning.goaway = (event.last_stream_id, event.code, event.debug)
        elif isinstance(event, Failed):
            meaning.failed = event.why


def known_difference(step: bytes, ours: Meaning, theirs: Meaning, newly_refused: set[int]) -> str | None:
    """Why the two may disagree from this step on; None if there is no reason."""
    kind, _, stream_id, _ = sent_frames(step)[0]
    if ours.failed == "the first frame is not SETTINGS":
        return "RFC 9113, section 3.4: the preface ends with SETTINGS. h2 does not insist"
    over = theirs.ended.keys() | theirs.reset | theirs.refused
    if stream_id in newly_refused and stream_id in theirs.ended:
        fields, body = theirs.ended[stream_id]
        if not body and any(name == b"content-length" and value != b"0" for name, value in fields):
            return "section 8.1.1: a content-length that is not the length is malformed. h2 looks at DATA only"
    if theirs.failed and not ours.failed and newly_refused:
        return "section 8.1.1: a malformed message is a stream error. h2 ends the connection"
    if kind in (f.DATA, f.HEADERS) and stream_id in over - ours.refused:
        return "section 5.1: a frame on a closed stream may end the stream or the connection"
    if kind == f.HEADERS and newly_refused and (b"\x03000" in step or b"\x03101" in step):
        return "section 8.6 and RFC 9110, section 15: no 101, nothing below 100. h2 looks at the first status only"
    if kind == f.RST_STREAM and ours.failed and "idle" in ours.failed:
        return "section 6.4: RST_STREAM on an idle stream ends the connection. h2 ignores it"
    if kind == f.PUSH_PROMISE and ours.failed.startswith("PUSH_PROMISE"):
        return "section 8.4: we refuse pushes from the start. h2 waits for the block's end and for our SETTINGS to hold"
    if kind == f.WINDOW_UPDATE and theirs.refused - ours.refused == {stream_id}:
        return "section 6.9.1: of a stream that has no more to send we do not count the window"
    return None


def compare(steps: list[bytes], *, client: bool, streams: int = 4) -> None:
    ours, theirs = Ours(client=client, streams=streams), Theirs(client=client, streams=streams)
    for step in filter(None, steps):
        refused = set(ours.meaning.refused)
        ours.receive(step)
        theirs.receive(step)
        mine, other = ours.meaning, theirs.meaning
        note(f"{step[:80].hex(' ')}\n  ours: {mine}\n  h2:   {other}")
        same = (bool(mine.failed), mine.ended.keys(), mine.refused, mine.pongs, mine.goaway) == (
            bool(other.failed), other.ended.keys(), other.refused, other.pongs, other.goaway
        )  # fmt: skip
        same = same and all(_alike(mine.ended[stream_id], other.ended[stream_id]) for stream_id in mine.ended)
        if not same:
            assert known_difference(step, mine, other, mine.refused - refused)
            return
        if mine.failed or mine.goaway:  # after GOAWAY, h2 takes no further frames
            return


def _alike(ours: tuple[list[Field], bytes], theirs: tuple[list[Field], bytes]) -> bool:
    # An Accepted names no fields: that is its point.
    return ours == theirs or (
        ours == ([(b":status", b"200")], b"") and theirs[0][0] == (b":status", b"200") and not theirs[1]
    )


BOTH_ROLES = pytest.mark.parametrize("client", [True, False], ids=["client", "server"])


@BOTH_ROLES
@pytest.mark.parametrize("bad", [False, True], ids=["sound", "broken"])
@given(data=st.data())
def test_any_frames_mean_the_same_to_us_as_to_h2(client: bool, bad: bool, data: st.DataObject) -> None:
    compare(data.draw(s.peer_steps(server=client, streams=4, bad=bad)), client=client)


@given(s.plain_answers(40))
def test_runs_of_plain_answers_mean_the_same_to_us_as_to_h2(steps: list[bytes]) -> None:
    compare(steps, client=True, streams=40)


# -- however the octets are cut --------------------------------------------------------------------------------------


def outcome(client: bool, streams: int, pieces: list[bytes]) -> tuple[list[tuple[int, object]], list[Event], bytes]:
    """Ends of requests in no order, as an Accepted speaks of a whole read; other events, and the output, in order."""
    ours = Ours(client=client, streams=streams)
    ends: list[tuple[int, object]] = []
    others: list[Event] = []
    output = b""
    for piece in [*pieces, None]:
        events = ours.core.eof(NOW) if piece is None else ours.core.receive(piece, NOW)
        output += ours.core.data_to_send()
        for event in events:
            if isinstance(event, Accepted):
                ends += [(key, "accepted") for key in event.keys]
            elif isinstance(event, Answered):
                ends.append((event.key, event))
            elif isinstance(event, NotProcessed | Unknown):
                ends += [(key, (type(event), event.why)) for key in event.keys]
            else:
                others.append(event)
    return sorted(ends, key=lambda end: end[0]), others, output


def mangled(data: st.DataObject, octets: bytes) -> bytes:
    """With a few octets changed, in lengths too."""
    changed = bytearray(octets)
    for place, bit in data.draw(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 7)), max_size=3)):
        if changed:
            changed[place % len(changed)] ^= 1 << bit
    return bytes(changed)


@BOTH_ROLES
@given(data=st.data())
def test_octets_mean_the_same_however_they_are_cut(client: bool, data: st.DataObject) -> None:
    octets = mangled(data, b"".join(data.draw(s.peer_steps(server=client, streams=4))))
    whole = outcome(client, 4, [octets])
    assert outcome(client, 4, s.chunks(octets, [1])) == whole
    assert outcome(client, 4, data.draw(s.splits())(octets)) == whole


@given(st.data())
def test_runs_of_plain_answers_mean_the_same_however_they_are_cut(data: st.DataObject) -> None:
    octets = b"".join(data.draw(s.plain_answers(40)))
    assert outcome(True, 40, data.draw(s.splits())(octets)) == outcome(True, 40, [octets])


@given(st.data())
def test_whatever_comes_every_request_has_exactly_one_end(data: st.DataObject) -> None:
    octets = data.draw(st.one_of(st.binary(), s.peer_steps(server=True, streams=6).map(b"".join)))
    octets = mangled(data, octets)
    ends, others, _ = outcome(True, 6, data.draw(s.splits())(octets))
    assert [key for key, _ in ends] == [1, 3, 5, 7, 9, 11]
    assert [type(event) for event in others].count(Failed) == 1


@given(st.data())
def test_whatever_comes_the_server_role_ends_once_and_tells_of_requests_before_it_cancels_them(
    data: st.DataObject,
) -> None:
    octets = data.draw(st.one_of(st.binary(), s.peer_steps(server=False, streams=6).map(b"".join)))
    _, events, _ = outcome(False, 6, data.draw(s.splits())(mangled(data, octets)))
    assert [type(event) for event in events].count(Failed) == 1
    requested: set[int] = set()
    for event in events:
        if isinstance(event, Request):
            assert event.stream_id not in requested
            requested.add(event.stream_id)
        elif isinstance(event, Cancelled):
            requested.remove(event.stream_id)
    assert not requested


@BOTH_ROLES
@given(octets=st.binary(max_size=200))
def test_noise_is_an_end_and_never_an_exception(client: bool, octets: bytes) -> None:
    core: ClientConnection | ServerConnection = ClientConnection(NOW) if client else ServerConnection(NOW)
    events = [*core.receive(octets, NOW), *core.eof(NOW)]
    assert [type(event) for event in events].count(Failed) == 1
    assert core.receive(octets, NOW) == core.eof(NOW) == core.tick(NOW + 100) == []


def test_a_first_stream_with_an_even_id_ends_the_connection_as_with_h2() -> None:
    head = b"\x83\x87\x84A\tlocalhost"
    for one in (Ours(client=False, streams=4), Theirs(client=False, streams=4)):
        one.receive(f.settings({}))
        assert not one.meaning.failed
        one.receive(f.frame(f.HEADERS, f.END_HEADERS, 2, head))
        assert one.meaning.failed
