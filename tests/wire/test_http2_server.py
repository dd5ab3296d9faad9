"""The server role, rule by rule, against a client made of hand-written octets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliograph.protocols.http2 import (
    Answer,
    Cancelled,
    Event,
    Failed,
    GoAway,
    Limits,
    Request,
    ServerConnection,
    SettingsChanged,
)
from heliograph.protocols.http2.core import Connection
from tests.wire import frames_by_hand as by_hand
from tests.wire.frames_by_hand import (
    CODES,
    PREFACE,
    SETTINGS_ACK,
    Frame,
    block,
    continuation,
    data,
    goaway,
    headers,
    integer,
    literal,
    ping,
    priority,
    raw,
    rst_stream,
    settings,
    window_update,
)

NOW = 1_000.0
FIELDS = ((b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", b"/3/device/aa"))
BODY = b'{"aps":{}}'
PRIORITY = b"\0\0\0\0\x0f"


def request(stream_id: int, body: bytes | None = None, more: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """A whole request."""
    octets = headers(stream_id, block(*FIELDS, *more), end=body is None)
    return octets if body is None else octets + data(stream_id, body, end=True)


def begun(stream_id: int, more: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """A request whose body is still to come."""
    return headers(stream_id, block(*FIELDS, *more), end=False)


class Heard(NamedTuple):
    """An answer as the client reads it."""

    fields: list[tuple[bytes, bytes]]
    body: bytes
    ended: bool


class Server:
    """A server connection, with a client played by the test: it writes by hand and reads with `hpack`."""

    def __init__(self, **options: Any) -> None:
        self.core = ServerConnection(NOW, **options)
        self.events: list[Event] = []
        self.hpack = hpack.Decoder()

    def greeted(self, **values: int) -> Server:
        """The whole greeting, both ways."""
        self.receive(PREFACE, settings(**values), SETTINGS_ACK)
        self.frames()
        return self

    def receive(self, *octets: bytes, now: float = NOW) -> list[Event]:
        events = self.core.receive(b"".join(octets), now)
        self.events += events
        return events

    def tick(self, now: float) -> list[Event]:
        events = self.core.tick(now)
        self.events += events
        return events

    def answer(self, *answers: Answer) -> None:
        self.core.respond(answers)

    def frames(self) -> list[Frame]:
        """What is to go out now."""
        return by_hand.parse(self.core.data_to_send())

    def resets(self) -> list[tuple[int, str]]:
        return [(frame.stream_id, frame.code) for frame in self.frames() if frame.kind == "RST_STREAM"]

    def heard(self) -> dict[int, Heard]:
        """The answers that are to go out now, by stream; of a long one perhaps the beginning only."""
        found: dict[int, Heard] = {}
        pending = b""
        for frame in self.frames():
            heard = found.get(frame.stream_id, Heard([], b"", ended=False))
            heard = heard._replace(ended=heard.ended or "END_STREAM" in frame.flags)
            if frame.kind in ("HEADERS", "CONTINUATION"):
                pending += frame.payload
                if "END_HEADERS" in frame.flags:
                    fields = [(bytes(name), bytes(value)) for name, value in self.hpack.decode(pending, raw=True)]
                    heard = heard._replace(fields=fields)
                    pending = b""
                found[frame.stream_id] = heard
            elif frame.kind == "DATA":
                assert heard.fields, "DATA before HEADERS"
                found[frame.stream_id] = heard._replace(body=heard.body + frame.payload)
        return found

    @property
    def asked(self) -> list[int]:
        """The streams of the requests that were reported, in order."""
        return [event.stream_id for event in self.events if isinstance(event, Request)]

    @property
    def cancelled(self) -> list[int]:
        return [event.stream_id for event in self.events if isinstance(event, Cancelled)]

    @property
    def failed(self) -> Failed | None:
        return next((event for event in self.events if isinstance(event, Failed)), None)


# -- the greeting --------------------------------------------------------------------------------------------------


def test_the_server_begins_with_its_settings() -> None:
    greeting, window = Server(max_streams=7).frames()
    assert greeting.settings == {"max_streams": 7, "max_header_list": 65_536}
    assert (window.kind, window.stream_id) == ("WINDOW_UPDATE", 0)


def test_a_greeting_may_come_octet_by_octet() -> None:
    new = Server()
    for octet in PREFACE + settings(max_streams=3) + request(1):
        new.receive(bytes((octet,)))
    assert new.events == [SettingsChanged(3), Request(1, list(FIELDS), b"")]


@pytest.mark.parametrize(
    "octets",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00", PREFACE[:-1] + b"x", b"P\0"],
)
def test_a_wrong_preface_ends_the_connection_at_its_first_wrong_octet(octets: bytes) -> None:
    new = Server()
    new.receive(octets)
    assert new.failed
    assert new.frames()[-1].code == "PROTOCOL_ERROR"


def test_half_a_preface_is_waited_for() -> None:
    new = Server()
    assert new.receive(PREFACE[:10]) == []
    assert not new.failed
    new.receive(PREFACE[10:], settings())
    assert new.events == [SettingsChanged(2**31 - 1)]


@pytest.mark.parametrize(
    "octets",
    [ping(), SETTINGS_ACK, request(1), window_update(0, 1), raw(0xBB, 0, 0), priority(1, 3)],
    ids=["PING", "SETTINGS acknowledgement", "HEADERS", "WINDOW_UPDATE", "unknown kind", "PRIORITY"],
)
def test_a_client_that_does_not_begin_with_settings_is_none(octets: bytes) -> None:
    new = Server()
    new.receive(PREFACE, octets, settings(), request(1))
    assert new.failed
    assert new.asked == []
    assert new.frames()[-1].code == "PROTOCOL_ERROR"


def test_settings_and_pings_are_acknowledged() -> None:
    new = Server().greeted()
    new.receive(settings(), ping(b"01234567"), settings(window=5), ping(b"x" * 8, ack=True))
    assert [(frame.kind, frame.flags, frame.payload) for frame in new.frames()] == [
        ("SETTINGS", ("ACK",), b""),
        ("PING", ("ACK",), b"01234567"),
        ("SETTINGS", ("ACK",), b""),
    ]


# -- requests ------------------------------------------------------------------------------------------------------


def test_a_request_is_reported_once_it_is_whole() -> None:
    new = Server().greeted()
    assert new.receive(begun(1)) == []
    assert new.receive(data(1, b'{"aps"')) == []
    assert new.receive(data(1, b":{}}", end=True)) == [Request(1, list(FIELDS), BODY)]


def test_a_request_without_a_body_is_whole_at_once() -> None:
    new = Server().greeted()
    assert new.receive(request(1)) == [Request(1, list(FIELDS), b"")]


def test_a_request_may_come_in_many_frames() -> None:
    new = Server().greeted()
    octets = block(*FIELDS, (b"apns-topic", b"com.example.app"))
    new.receive(headers(1, octets[:20], end=False, whole=False, padding=9, priority=PRIORITY))
    new.receive(
        continuation(1, b"", whole=False), continuation(1, octets[20:50], whole=False), continuation(1, octets[50:])
    )
    new.receive(data(1, BODY[:3], padding=0), data(1, b"", padding=255), data(1, BODY[3:]), data(1, end=True))
    assert new.events[-1] == Request(1, [*FIELDS, (b"apns-topic", b"com.example.app")], BODY)


def test_many_requests_in_one_read_are_reported_in_the_order_in_which_they_ended() -> None:
    new = Server().greeted()
    new.receive(begun(1), begun(3), request(5, BODY), data(3, BODY, end=True), data(1, BODY, end=True))
    assert new.asked == [5, 3, 1]


def test_trailers_end_a_request() -> None:
    new = Server().greeted()
    new.receive(begun(1), data(1, BODY), headers(1, block((b"x-checksum", b"1"))))
    assert new.events[-1] == Request(1, list(FIELDS), BODY)


def test_streams_may_be_opened_with_gaps() -> None:
    new = Server().greeted()
    new.receive(request(7), request(9), request(101), request(2**31 - 1))
    assert new.asked == [7, 9, 101, 2**31 - 1]


def test_a_clients_table_is_kept_over_requests() -> None:
    new = Server().greeted()
    entry = literal(b"authorization", b"bearer x", first=0x40)
    new.receive(headers(1, block(*FIELDS) + entry), headers(3, block(*FIELDS) + b"\xbe"))
    assert new.events[-1] == Request(3, [*FIELDS, (b"authorization", b"bearer x")], b"")


def test_a_refused_or_malformed_request_still_changes_the_table() -> None:
    new = Server(max_streams=1).greeted()
    entry = literal(b"authorization", b"bearer x", first=0x40)
    new.receive(begun(1), headers(3, block(*FIELDS) + entry), data(1, end=True))
    new.answer(Answer(1, 200))
    new.receive(headers(5, b"\xbe"), headers(7, block(*FIELDS) + b"\xbe"))
    assert new.events[-1] == Request(7, [*FIELDS, (b"authorization", b"bearer x")], b"")


def test_priority_frames_are_ignored_even_on_streams_that_are_not_open() -> None:
    new = Server().greeted()
    new.receive(priority(1, 3), priority(99), priority(2, 1), request(1), priority(1), raw(0xCC, 0xFF, 5, b"unknown"))
    assert new.asked == [1]
    assert not new.failed


def test_a_length_that_the_body_has_is_taken() -> None:
    new = Server().greeted()
    new.receive(request(1, BODY, [(b"content-length", b"10")]), request(3, None, [(b"content-length", b"0")]))
    new.receive(begun(5, [(b"content-length", b"3")]), data(5, b"a", padding=5), data(5, b"bc"), headers(5, b""))
    assert new.asked == [1, 3, 5]


# -- the stream limit ----------------------------------------------------------------------------------------------


def test_a_stream_over_the_limit_is_refused_and_the_others_go_on() -> None:
    new = Server(max_streams=2).greeted()
    new.receive(begun(1), request(3), request(5), data(1, BODY, end=True))
    assert new.resets() == [(5, "REFUSED_STREAM")]
    assert new.asked == [3, 1]
    new.receive(data(5, b"late"), headers(5, b""), window_update(5, 1), rst_stream(5, 8))
    assert not new.failed


def test_an_answered_stream_makes_room_for_another() -> None:
    new = Server(max_streams=1).greeted()
    for stream_id in range(1, 20, 2):
        new.receive(request(stream_id, BODY))
        new.answer(Answer(stream_id, 200))
    assert new.asked == list(range(1, 20, 2))
    assert new.resets() == []


def test_a_limit_of_1_counts_before_it_is_acknowledged() -> None:
    new = Server(max_streams=1)
    new.receive(PREFACE, settings(), request(1), request(3))
    assert new.resets() == [(3, "REFUSED_STREAM")]
    assert new.asked == [1]


def test_a_lowered_limit_counts_only_after_the_client_acknowledged_it() -> None:
    new = Server(max_streams=3).greeted()
    new.core.set_max_streams(1)
    (change,) = new.frames()
    assert change.settings == {"max_streams": 1}
    new.receive(request(1), request(3), request(5))
    assert new.resets() == []
    new.receive(SETTINGS_ACK)
    new.answer(Answer(1, 200), Answer(3, 200))
    new.frames()
    new.receive(request(7))
    assert new.resets() == [(7, "REFUSED_STREAM")]
    new.answer(Answer(5, 200))
    new.receive(request(9))
    assert new.asked == [1, 3, 5, 9]


def test_a_raised_limit_counts_from_when_it_is_told() -> None:
    new = Server(max_streams=1).greeted()
    new.core.set_max_streams(3)
    new.receive(request(1), request(3), SETTINGS_ACK, request(5))
    assert new.asked == [1, 3, 5]


def test_each_acknowledgement_is_for_the_oldest_settings() -> None:
    new = Server(max_streams=1).greeted()
    new.core.set_max_streams(5)
    new.core.set_max_streams(2)
    new.receive(SETTINGS_ACK, *map(request, (1, 3, 5, 7, 9)), SETTINGS_ACK)
    assert new.asked == [1, 3, 5, 7, 9]
    new.answer(*[Answer(stream_id, 200) for stream_id in (1, 3, 5)])
    new.receive(request(11))
    assert new.resets() == [(11, "REFUSED_STREAM")]


def test_a_limit_that_is_lowered_and_raised_again_allows_what_was_told_last() -> None:
    new = Server(max_streams=4).greeted()
    new.core.set_max_streams(1)
    new.core.set_max_streams(3)
    new.receive(SETTINGS_ACK, *map(request, (1, 3, 5, 7)))
    assert new.asked == [1, 3, 5]
    assert new.resets() == [(7, "REFUSED_STREAM")]


def test_an_acknowledgement_that_nobody_waits_for_is_ignored() -> None:
    new = Server().greeted()
    new.receive(SETTINGS_ACK, SETTINGS_ACK, request(1))
    assert new.asked == [1]


# -- malformed requests --------------------------------------------------------------------------------------------


def without(name: bytes) -> list[tuple[bytes, bytes]]:
    return [field for field in FIELDS if field[0] != name]


def with_field(name: bytes, value: bytes) -> bytes:
    return headers(1, block(*FIELDS, (name, value)))


MALFORMED: dict[str, bytes] = {
    "no fields": headers(1, b""),
    "no :method": headers(1, block(*without(b":method"))),
    "no :scheme": headers(1, block(*without(b":scheme"))),
    "no :path": headers(1, block(*without(b":path"))),
    "an empty :path": headers(1, block(*without(b":path"), (b":path", b""))),
    ":method twice": with_field(b":method", b"POST"),
    ":path twice": with_field(b":path", b"/"),
    ":authority twice": with_field(b":authority", b"localhost"),
    "a pseudo-field of answers": with_field(b":status", b"200"),
    "an unknown pseudo-field": with_field(b":foo", b"x"),
    "a pseudo-field after an ordinary one": headers(1, block((b"x", b"x"), *FIELDS)),
    "CONNECT": headers(1, block((b":method", b"CONNECT"), (b":authority", b"localhost"))),
    "an upper-case name": with_field(b"Apns-topic", b"x"),
    "an empty name": with_field(b"", b"x"),
    "a space in a name": with_field(b"apns topic", b"x"),
    "a colon in a name": with_field(b"apns:topic", b"x"),
    "a control character in a name": with_field(b"apns\x1ftopic", b"x"),
    "a name beyond ASCII": with_field(b"apns\xfctopic", b"x"),
    "NUL in a value": with_field(b"apns-topic", b"a\0b"),
    "CR in a value": with_field(b"apns-topic", b"a\rb"),
    "LF in a value": with_field(b"apns-topic", b"a\nb"),
    "CR and LF in :path": headers(1, block(*without(b":path"), (b":path", b"/\r\nx: y"))),
    "a space before a value": with_field(b"apns-topic", b" x"),
    "a tab after a value": with_field(b"apns-topic", b"x\t"),
    "connection": with_field(b"connection", b"close"),
    "keep-alive": with_field(b"keep-alive", b"1"),
    "proxy-connection": with_field(b"proxy-connection", b"close"),
    "transfer-encoding": with_field(b"transfer-encoding", b"chunked"),
    "upgrade": with_field(b"upgrade", b"h2c"),
    "te other than trailers": with_field(b"te", b"gzip"),
    "te that is more than trailers": with_field(b"te", b"trailers, deflate"),
    "a host that is not :authority": with_field(b"host", b"elsewhere"),
    "content-length not a number": with_field(b"content-length", b"1x"),
    "content-length below 0": with_field(b"content-length", b"-1"),
    "two content-lengths": headers(1, block(*FIELDS, (b"content-length", b"0"), (b"content-length", b"1"))),
    "content-length without DATA": with_field(b"content-length", b"1"),
    "less DATA than content-length": request(1, b"ab", [(b"content-length", b"3")]),
    "more DATA than content-length": request(1, b"abc", [(b"content-length", b"2")]),
    "more DATA than content-length, not the last": begun(1, [(b"content-length", b"2")]) + data(1, b"abc"),
    "less DATA than content-length, then trailers": begun(1, [(b"content-length", b"2")]) + headers(1, b""),
    "a pseudo-field in trailers": begun(1) + headers(1, block((b":path", b"/"))),
    "an upper-case name in trailers": begun(1) + headers(1, block((b"X", b"x"))),
    "a connection's field in trailers": begun(1) + headers(1, block((b"connection", b"x"))),
    "trailers that do not end": begun(1) + headers(1, block((b"x", b"x")), end=False),
}


@pytest.mark.parametrize("octets", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_is_not_reported_and_its_stream_is_reset(octets: bytes) -> None:
    new = Server().greeted()
    new.receive(octets)
    assert new.asked == []
    assert new.resets() == [(1, "PROTOCOL_ERROR")]
    assert new.core.open_streams == 0
    new.receive(data(1, b"late"), headers(1, b""), request(3))
    assert new.asked == [3], "the connection goes on"
    assert new.cancelled == []


def test_te_trailers_and_a_host_that_is_the_authority_are_fine() -> None:
    new = Server().greeted()
    new.receive(request(1, None, [(b"te", b"trailers"), (b"host", b"localhost")]))
    assert new.asked == [1]


def test_a_request_without_authority_is_fine() -> None:
    new = Server().greeted()
    new.receive(headers(1, block(*without(b":authority"), (b"host", b"localhost"))))
    new.receive(headers(3, block(*without(b":authority"))))
    assert new.asked == [1, 3]


def test_more_fields_than_we_take_reset_the_stream_and_the_connection_goes_on() -> None:
    new = Server().greeted()
    entry = literal(b"x" * 3000, b"", first=0x40)
    new.receive(headers(1, block(*FIELDS) + entry + b"\xbe" * 30), headers(3, block(*FIELDS) + b"\xbe"))
    assert new.resets() == [(1, "ENHANCE_YOUR_CALM")]
    assert new.events[-1] == Request(3, [*FIELDS, (b"x" * 3000, b"")], b"")


def test_more_trailers_than_we_take_reset_the_stream() -> None:
    new = Server().greeted()
    entry = literal(b"x" * 3000, b"", first=0x40)
    new.receive(begun(1), headers(1, entry + b"\xbe" * 30))
    assert new.resets() == [(1, "ENHANCE_YOUR_CALM")]
    assert new.asked == []


# -- closed and half-closed streams --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "octets", [data(1, b"more"), data(1, end=True), headers(1, b"")], ids=["DATA", "end", "HEADERS"]
)
def test_more_of_a_request_that_ended_resets_its_stream(octets: bytes) -> None:
    new = Server().greeted()
    new.receive(request(1, BODY), octets)
    assert new.resets() == [(1, "STREAM_CLOSED")]
    assert new.events[-1] == Cancelled(1, CODES.index("STREAM_CLOSED"))
    new.answer(Answer(1, 200))
    assert new.frames() == []


def test_a_half_closed_stream_may_still_see_window_updates_priorities_and_a_reset() -> None:
    new = Server().greeted()
    new.receive(request(1), window_update(1, 5), priority(1, 3))
    assert (new.frames(), new.cancelled) == ([], [])
    assert new.receive(rst_stream(1, 8)) == [Cancelled(1, 8)]


@pytest.mark.parametrize("octets", [data(1, b"x"), request(1), headers(1, b"")], ids=["DATA", "request", "trailers"])
def test_frames_on_an_answered_stream_end_the_connection(octets: bytes) -> None:
    new = Server().greeted()
    new.receive(request(1))
    new.answer(Answer(1, 200))
    new.receive(octets)
    assert new.frames()[-1].code == "STREAM_CLOSED"


def test_an_answered_stream_may_still_see_window_updates_priorities_and_a_reset() -> None:
    new = Server().greeted()
    new.receive(request(1))
    new.answer(Answer(1, 200))
    new.receive(window_update(1, 5), priority(1), rst_stream(1, 0), request(3))
    assert (new.asked, new.cancelled) == ([1, 3], [])


def test_a_client_that_resets_a_stream_and_then_sends_on_it_is_broken() -> None:
    new = Server().greeted()
    new.receive(begun(1), rst_stream(1, 8), data(1, b"x"))
    assert new.frames()[-1].code == "STREAM_CLOSED"


def test_a_request_that_was_cancelled_before_it_was_whole_is_never_heard_of() -> None:
    new = Server().greeted()
    assert new.receive(begun(1), data(1, b"x"), rst_stream(1, 8)) == []
    assert new.core.open_streams == 0


# -- large bodies --------------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_reported_cut_and_its_rest_thrown_away() -> None:
    new = Server(max_body=10).greeted()
    new.receive(begun(1), data(1, b"0123456"))
    assert new.receive(data(1, b"789abc")) == [Request(1, list(FIELDS), b"0123456789", truncated=True)]
    assert new.receive(data(1, b"def"), data(1, end=True)) == []
    new.answer(Answer(1, 413))
    assert new.heard() == {1: Heard([(b":status", b"413")], b"", ended=True)}


def test_a_body_of_just_the_limit_is_whole() -> None:
    new = Server(max_body=10).greeted()
    new.receive(request(1, b"0123456789"))
    assert new.events[-1] == Request(1, list(FIELDS), b"0123456789")


def test_an_answer_before_the_end_of_the_request_ends_it_without_blame() -> None:
    new = Server(max_body=10).greeted()
    new.receive(begun(1), data(1, b"0123456789abc"))
    new.answer(Answer(1, 413, (), b"{}"))
    frames = new.frames()
    assert [(frame.kind, frame.stream_id) for frame in frames] == [("HEADERS", 1), ("DATA", 1), ("RST_STREAM", 1)]
    assert frames[-1].code == "NO_ERROR"
    new.receive(data(1, b"still coming"), data(1, end=True), request(3))
    assert not new.failed
    assert new.asked == [1, 3]


def test_a_stream_takes_no_more_than_its_window() -> None:
    new = Server(max_body=10).greeted()
    new.receive(begun(1), *[data(1, bytes(16_000))] * 4)
    assert new.frames() == []
    new.receive(data(1, bytes(1535)))
    assert new.resets() == []
    new.receive(data(1, b"x"))
    assert new.resets() == [(1, "FLOW_CONTROL_ERROR")]
    assert new.events[-1] == Cancelled(1, CODES.index("FLOW_CONTROL_ERROR"))


def test_padding_counts_against_the_streams_window() -> None:
    new = Server().greeted()
    new.receive(begun(1), *[data(1, b"x", padding=255)] * 256)
    assert new.resets() == [(1, "FLOW_CONTROL_ERROR")]


def test_the_connections_window_is_opened_again_as_bodies_come() -> None:
    new = Server().greeted()
    received = opened = 0
    for stream_id in range(1, 400, 2):
        new.receive(request(stream_id, bytes(16_000)))
        new.answer(Answer(stream_id, 200))
        received += 16_000
        opened += sum(f.number for f in new.frames() if f.kind == "WINDOW_UPDATE" and not f.stream_id)
        assert received - opened < 1 << 20
    assert len(new.asked) == 200


def test_octets_on_a_stream_that_was_reset_count_against_the_connections_window() -> None:
    new = Server(max_streams=0).greeted()
    new.receive(begun(1))
    received = opened = 0
    for _ in range(150):
        new.receive(data(1, bytes(16_000)))
        received += 16_000
        opened += sum(f.number for f in new.frames() if f.kind == "WINDOW_UPDATE" and not f.stream_id)
    assert not new.failed
    assert received - opened < 1 << 20


# -- answers -------------------------------------------------------------------------------------------------------


def test_answers_go_out_with_status_fields_and_body() -> None:
    new = Server().greeted()
    new.receive(request(1), request(3), request(5))
    fields = ((b"apns-id", b"x" * 36), (b"content-type", b"application/json"))
    new.answer(Answer(5, 200, fields[:1]), Answer(1, 410, fields, b'{"reason":"Unregistered"}'), Answer(3, 299))
    assert new.heard() == {
        5: Heard([(b":status", b"200"), *fields[:1]], b"", ended=True),
        1: Heard([(b":status", b"410"), *fields], b'{"reason":"Unregistered"}', ended=True),
        3: Heard([(b":status", b"299")], b"", ended=True),
    }
    assert new.core.open_streams == 0


def test_a_field_of_any_length_is_spelt_right() -> None:
    new = Server().greeted()
    for place, length in enumerate((0, 1, 126, 127, 128, 254, 255, 300, 20_000)):
        stream_id = 2 * place + 1
        new.receive(request(stream_id))
        new.answer(Answer(stream_id, 200, ((b"x-long", b"v" * length),)))
        assert new.heard()[stream_id] == Heard([(b":status", b"200"), (b"x-long", b"v" * length)], b"", ended=True)


def test_a_header_block_larger_than_a_frame_goes_on_in_continuation() -> None:
    new = Server().greeted()
    new.receive(request(1))
    new.answer(Answer(1, 200, ((b"x-long", b"v" * 40_000),), b"x"))
    kinds = [(frame.kind, sorted(frame.flags)) for frame in new.frames()]
    assert kinds == [("HEADERS", []), ("CONTINUATION", []), ("CONTINUATION", ["END_HEADERS"]), ("DATA", ["END_STREAM"])]


def test_an_answer_waits_for_its_streams_window() -> None:
    new = Server().greeted(window=4)
    new.receive(request(1))
    new.answer(Answer(1, 400, (), b"0123456789"))
    assert new.heard() == {1: Heard([(b":status", b"400")], b"0123", ended=False)}
    new.receive(window_update(1, 4))
    assert [(frame.payload, frame.flags) for frame in new.frames()] == [(b"4567", ())]
    new.receive(window_update(1, 4))
    assert [(frame.payload, frame.flags) for frame in new.frames()] == [(b"89", ("END_STREAM",))]
    assert new.core.open_streams == 0


def test_an_answer_waits_for_the_connections_window() -> None:
    new = Server().greeted(window=1 << 20)
    new.receive(request(1), request(3))
    new.answer(Answer(1, 200, (), b"x" * 60_000), Answer(3, 200, (), b"y" * 10_000))
    heard = new.heard()
    assert (len(heard[1].body), heard[1].ended) == (60_000, True)
    assert (len(heard[3].body), heard[3].ended) == (5_535, False)
    new.receive(window_update(0, 10_000))
    assert [(frame.stream_id, len(frame.payload), frame.flags) for frame in new.frames()] == [
        (3, 4_465, ("END_STREAM",))
    ]


def test_an_answer_larger_than_a_frame_is_cut_into_frames() -> None:
    new = Server().greeted(window=1 << 20, max_frame=20_000)
    new.receive(request(1))
    new.answer(Answer(1, 200, (), b"x" * 50_000))
    assert [len(frame.payload) for frame in new.frames() if frame.kind == "DATA"] == [20_000, 20_000, 10_000]


def test_a_changed_initial_window_changes_the_windows_of_open_streams() -> None:
    new = Server().greeted(window=4)
    new.receive(request(1))
    new.answer(Answer(1, 200, (), b"0123456789"))
    new.frames()
    new.receive(settings(window=1))
    assert [frame.kind for frame in new.frames()] == ["SETTINGS"]
    new.receive(window_update(1, 3))
    assert new.frames() == [], "the window is 0 now, not 3"
    new.receive(settings(window=6))
    assert [frame.payload for frame in new.frames() if frame.kind == "DATA"] == [b"45678"]


def test_an_answer_on_a_stream_whose_window_was_opened_before_uses_it() -> None:
    new = Server().greeted(window=0)
    new.receive(request(1), window_update(1, 4))
    new.answer(Answer(1, 200, (), b"0123"))
    assert new.heard() == {1: Heard([(b":status", b"200")], b"0123", ended=True)}


def test_a_cancelled_request_is_told_and_a_late_answer_goes_nowhere() -> None:
    new = Server().greeted()
    new.receive(request(1, BODY), request(3))
    assert new.receive(rst_stream(1, 8)) == [Cancelled(1, 8)]
    new.answer(Answer(1, 200), Answer(3, 200))
    assert list(new.heard()) == [3]


def test_a_cancelled_answer_that_waits_for_a_window_is_not_continued() -> None:
    new = Server().greeted(window=4)
    new.receive(request(1), request(3))
    new.answer(Answer(1, 200, (), b"01234567"), Answer(3, 200, (), b"abcdefgh"))
    new.frames()
    assert new.receive(rst_stream(1, 8)) == [Cancelled(1, 8)]
    new.receive(window_update(3, 4), settings(window=100))
    assert [(frame.stream_id, frame.payload) for frame in new.frames() if frame.kind == "DATA"] == [(3, b"efgh")]


def test_a_second_answer_goes_nowhere() -> None:
    new = Server().greeted(window=4)
    new.receive(request(1), request(3))
    new.answer(Answer(1, 200), Answer(1, 500), Answer(3, 200, (), b"01234567"), Answer(3, 500))
    assert {stream_id: heard.fields for stream_id, heard in new.heard().items()} == {
        1: [(b":status", b"200")],
        3: [(b":status", b"200")],
    }


def test_an_answer_to_a_request_that_never_came_goes_nowhere() -> None:
    new = Server().greeted()
    new.answer(Answer(1, 200), Answer(2, 200))
    assert new.frames() == []


def test_our_own_reset_ends_a_stream_without_an_answer() -> None:
    new = Server().greeted()
    new.receive(request(1), request(3), begun(5))
    new.core.reset([1, 5, 99], CODES.index("REFUSED_STREAM"))
    assert new.resets() == [(1, "REFUSED_STREAM"), (5, "REFUSED_STREAM")]
    new.receive(data(5, b"x", end=True))
    new.answer(Answer(1, 200), Answer(3, 200), Answer(5, 200))
    assert list(new.heard()) == [3]
    assert new.cancelled == [], "we know what we did"


# -- GOAWAY --------------------------------------------------------------------------------------------------------


def test_goaway_names_the_newest_stream_and_what_is_open_is_still_answered() -> None:
    new = Server().greeted()
    new.receive(request(1), begun(3))
    new.core.goaway(debug=b'{"reason":"Shutdown"}')
    (frame,) = new.frames()
    assert (frame.kind, frame.last_stream_id, frame.code, frame.payload[8:]) == (
        "GOAWAY",
        3,
        "NO_ERROR",
        b'{"reason":"Shutdown"}',
    )
    new.receive(data(3, BODY, end=True))
    new.answer(Answer(1, 200), Answer(3, 200))
    assert list(new.heard()) == [1, 3]


def test_streams_that_come_after_goaway_are_ignored() -> None:
    new = Server().greeted()
    new.receive(request(1))
    new.core.goaway()
    new.frames()
    assert (
        new.receive(request(3), begun(5), data(5, BODY), window_update(5, 3), data(5, end=True), rst_stream(3, 8)) == []
    )
    assert new.frames() == []
    assert new.core.open_streams == 1
    assert not new.failed


def test_streams_ignored_after_goaway_still_change_the_table() -> None:
    new = Server().greeted()
    new.receive(begun(1))
    new.core.goaway()
    new.receive(headers(3, block(*FIELDS) + literal(b"x-new", b"entry", first=0x40)), headers(1, b"\xbe"))
    assert new.asked == [1]


def test_goaway_below_open_streams_drops_them_and_ignores_their_rest() -> None:
    new = Server().greeted()
    new.receive(request(1), begun(3), request(5))
    new.core.goaway(last_stream_id=1)
    assert new.frames()[-1].last_stream_id == 1
    assert new.core.open_streams == 1
    new.receive(data(3, BODY), data(3, end=True), window_update(5, 1), rst_stream(5, 8))
    assert not new.failed
    new.answer(Answer(1, 200), Answer(3, 200), Answer(5, 200))
    assert list(new.heard()) == [1]


def test_goaway_twice_first_as_a_warning_then_for_good() -> None:
    new = Server().greeted()
    new.core.goaway(last_stream_id=2**31 - 1)
    new.receive(request(1), request(3))
    new.core.goaway()
    new.receive(request(5))
    assert [frame.last_stream_id for frame in new.frames()] == [2**31 - 1, 3]
    assert new.asked == [1, 3]


def test_a_second_goaway_never_names_a_higher_stream() -> None:
    new = Server().greeted()
    new.receive(request(1), request(3))
    new.core.goaway(last_stream_id=1)
    new.core.goaway(last_stream_id=3)
    assert [frame.last_stream_id for frame in new.frames()] == [1, 1]


def test_a_fault_after_goaway_names_the_same_last_stream() -> None:
    new = Server().greeted()
    new.receive(request(1))
    new.core.goaway()
    new.receive(request(3), raw(6, 0, 0, b"bad"))
    assert [(frame.code, frame.last_stream_id) for frame in new.frames()] == [("NO_ERROR", 1), ("FRAME_SIZE_ERROR", 1)]


def test_streams_ignored_after_goaway_are_remembered_in_bounds() -> None:
    new = Server().greeted()
    new.core.goaway()
    new.receive(*map(request, range(1, 20_001, 2)))
    assert new.failed or len(new.core._reset_ids) <= 4096


def test_a_clients_goaway_is_told_and_its_open_requests_are_answered() -> None:
    new = Server().greeted()
    new.receive(request(1), begun(3))
    assert new.receive(goaway(0, 0, b"bye")) == [GoAway(0, 0, b"bye")]
    new.receive(data(3, end=True))
    new.answer(Answer(1, 200), Answer(3, 200))
    assert list(new.heard()) == [1, 3]


# -- time ----------------------------------------------------------------------------------------------------------


def test_half_a_greeting_is_waited_for_10_s() -> None:
    new = Server()
    assert new.core.wake_at() == NOW + 10
    new.receive(PREFACE, settings(max_streams=3)[:-1], now=NOW + 9)
    assert new.tick(NOW + 9.9) == []
    new.tick(NOW + 10)
    assert new.failed
    assert new.frames()[-1].kind == "GOAWAY"


def test_an_idle_connection_is_closed_after_60_s() -> None:
    new = Server().greeted()
    assert new.core.wake_at() == NOW + 60
    new.receive(ping(), now=NOW + 50)
    assert new.core.wake_at() == NOW + 110
    assert new.tick(NOW + 109) == []
    new.tick(NOW + 110)
    assert new.failed
    assert new.frames()[-1].code == "NO_ERROR"


def test_a_connection_may_be_idle_for_ever_if_so_wanted() -> None:
    new = Server(limits=Limits(idle_s=None)).greeted()
    assert new.core.wake_at() is None
    assert new.tick(NOW + 1e6) == []


def test_a_connection_with_an_open_stream_is_not_idle() -> None:
    new = Server().greeted()
    new.receive(request(1))
    assert new.core.wake_at() is None
    assert new.tick(NOW + 1000) == []
    new.answer(Answer(1, 200))
    assert list(new.heard()) == [1]


def test_a_header_block_has_10_s_to_end() -> None:
    new = Server().greeted()
    new.receive(headers(1, b"", whole=False), now=NOW + 5)
    assert new.core.wake_at() == NOW + 15
    new.receive(continuation(1, block(*FIELDS), whole=False), now=NOW + 14)
    assert new.tick(NOW + 14.9) == []
    new.tick(NOW + 15)
    assert new.failed


def test_a_body_has_30_s_to_come_and_then_its_stream_is_reset() -> None:
    new = Server().greeted()
    new.receive(begun(1), now=NOW + 5)
    new.receive(request(3), data(1, b"dribble"), now=NOW + 30)
    assert new.core.wake_at() == NOW + 35
    assert new.tick(NOW + 34.9) == []
    assert new.tick(NOW + 35) == []
    assert new.resets() == [(1, "CANCEL")]
    assert new.asked == [3]
    new.receive(data(1, b"late", end=True), now=NOW + 36)
    assert not new.failed


def test_a_body_that_was_cut_has_its_deadline_as_well_and_the_request_is_cancelled() -> None:
    new = Server(max_body=3).greeted()
    new.receive(begun(1), data(1, b"0123456789"))
    assert new.tick(NOW + 30) == [Cancelled(1, CODES.index("CANCEL"))]


def test_an_answer_that_the_client_does_not_let_out_is_given_up() -> None:
    new = Server().greeted(window=4)
    new.receive(request(1), now=NOW + 1)
    new.answer(Answer(1, 200, (), b"01234567"))
    new.frames()
    assert new.core.wake_at() == NOW + 31
    new.receive(ping(), now=NOW + 30)
    new.tick(NOW + 31)
    assert new.resets() == [(1, "CANCEL")]
    assert new.core.open_streams == 0


def test_each_request_has_its_own_deadline() -> None:
    new = Server().greeted()
    for late in range(5):
        new.receive(begun(2 * late + 1), now=NOW + late)
    for late in range(5):
        assert new.core.wake_at() == NOW + late + 30
        new.tick(NOW + late + 30)
        assert new.resets() == [(2 * late + 1, "CANCEL")]


def test_requests_that_nobody_can_answer_any_more_are_cancelled_when_the_connection_ends() -> None:
    new = Server().greeted()
    new.receive(request(1), begun(3), request(5))
    events = new.core.eof(NOW)
    assert [event.stream_id for event in events if isinstance(event, Cancelled)] == [1, 5]
    assert isinstance(events[-1], Failed)
    assert not events[-1].ours
    assert new.core.eof(NOW) == []
    new.answer(Answer(1, 200))
    new.core.goaway()
    assert new.frames()[2:] == []


# -- what ends the connection --------------------------------------------------------------------------------------

OK = block(*FIELDS)
BROKEN: dict[str, tuple[bytes, str]] = {
    "an even stream": (headers(2, OK), "PROTOCOL_ERROR"),
    "a stream below one that was opened": (request(5) + request(3), "PROTOCOL_ERROR"),
    "DATA on a stream that was passed over": (request(5) + data(3, b"x"), "STREAM_CLOSED"),
    "a stream on stream 0": (headers(0, OK), "PROTOCOL_ERROR"),
    "DATA on stream 0": (data(0, b"x"), "PROTOCOL_ERROR"),
    "PRIORITY on stream 0": (priority(0, 1), "PROTOCOL_ERROR"),
    "RST_STREAM on stream 0": (rst_stream(0, 8), "PROTOCOL_ERROR"),
    "SETTINGS on a stream": (raw(4, 0, 1), "PROTOCOL_ERROR"),
    "PING on a stream": (raw(6, 0, 1, bytes(8)), "PROTOCOL_ERROR"),
    "GOAWAY on a stream": (raw(7, 0, 1, bytes(8)), "PROTOCOL_ERROR"),
    "PUSH_PROMISE": (begun(1) + raw(5, 4, 1, b"\0\0\0\2" + OK), "PROTOCOL_ERROR"),
    "DATA on an idle stream": (data(1, b"x"), "PROTOCOL_ERROR"),
    "RST_STREAM on an idle stream": (rst_stream(1, 8), "PROTOCOL_ERROR"),
    "WINDOW_UPDATE on an idle stream": (window_update(1, 8), "PROTOCOL_ERROR"),
    "CONTINUATION on an idle stream": (continuation(1, OK), "PROTOCOL_ERROR"),
    "CONTINUATION after a whole block": (begun(1) + continuation(1, b""), "PROTOCOL_ERROR"),
    "a block broken off by DATA": (headers(1, OK, whole=False) + data(1), "PROTOCOL_ERROR"),
    "a block broken off by PRIORITY": (headers(1, OK, whole=False) + priority(1), "PROTOCOL_ERROR"),
    "a block broken off by another stream": (headers(1, OK, whole=False) + headers(3, OK), "PROTOCOL_ERROR"),
    "a block broken off by an unknown frame": (headers(1, OK, whole=False) + raw(0xBB, 0, 1), "PROTOCOL_ERROR"),
    "a block that goes on elsewhere": (headers(1, OK, whole=False) + continuation(3, b""), "PROTOCOL_ERROR"),
    "a frame that is too large": (begun(1) + raw(0, 0, 1, bytes(16_385)), "FRAME_SIZE_ERROR"),
    "an unknown frame that is too large": (raw(0xBB, 0, 1, bytes(16_385)), "FRAME_SIZE_ERROR"),
    "SETTINGS of 7 octets": (raw(4, 0, 0, bytes(7)), "FRAME_SIZE_ERROR"),
    "a SETTINGS acknowledgement with content": (raw(4, 1, 0, bytes(6)), "FRAME_SIZE_ERROR"),
    "PING of 7 octets": (raw(6, 0, 0, bytes(7)), "FRAME_SIZE_ERROR"),
    "RST_STREAM of 5 octets": (begun(1) + raw(3, 0, 1, bytes(5)), "FRAME_SIZE_ERROR"),
    "WINDOW_UPDATE of 3 octets": (raw(8, 0, 0, bytes(3)), "FRAME_SIZE_ERROR"),
    "GOAWAY of 7 octets": (raw(7, 0, 0, bytes(7)), "FRAME_SIZE_ERROR"),
    "PRIORITY of 6 octets": (raw(2, 0, 1, bytes(6)), "FRAME_SIZE_ERROR"),
    "a stream that depends on itself": (priority(3, 3), "PROTOCOL_ERROR"),
    "a request whose stream depends on itself": (headers(1, OK, priority=b"\0\0\0\1\x0f"), "PROTOCOL_ERROR"),
    "a request too short for its priority": (raw(1, 0x20 | 5, 1, bytes(3)), "FRAME_SIZE_ERROR"),
    "padded DATA without its padding's length": (begun(1) + raw(0, 8, 1), "FRAME_SIZE_ERROR"),
    "DATA that is all padding and more": (begun(1) + raw(0, 8, 1, b"\4abc"), "PROTOCOL_ERROR"),
    "HEADERS that are all padding and more": (raw(1, 8 | 5, 1, b"\7abc"), "PROTOCOL_ERROR"),
    "index 0": (headers(1, OK + b"\x80"), "COMPRESSION_ERROR"),
    "an index behind the table": (headers(1, OK + b"\xbe"), "COMPRESSION_ERROR"),
    "a block that ends inside a field": (headers(1, OK[:-1]), "COMPRESSION_ERROR"),
    "a bad block on a stream that is refused": (headers(1, OK + b"\xff\x80\x80\x80\x80\x80\x80"), "COMPRESSION_ERROR"),
    "a table larger than we allow": (headers(1, integer(4097, 5, 0x20) + OK), "COMPRESSION_ERROR"),
    "a size update behind a field": (headers(1, OK + b"\x20"), "COMPRESSION_ERROR"),
    "a window update of 0 on the connection": (window_update(0, 0), "PROTOCOL_ERROR"),
    "a connection's window beyond all bounds": (window_update(0, 2**31 - 1), "FLOW_CONTROL_ERROR"),
    "an initial window beyond all bounds": (settings(window=2**31), "FLOW_CONTROL_ERROR"),
    "an initial window that makes a stream's too large": (
        begun(1) + window_update(1, 1) + settings(window=2**31 - 1),
        "FLOW_CONTROL_ERROR",
    ),
    "push neither on nor off": (settings(enable_push=2), "PROTOCOL_ERROR"),
    "a frame size that is too small": (settings(max_frame=16_383), "PROTOCOL_ERROR"),
    "a frame size that is too large": (settings(max_frame=1 << 24), "PROTOCOL_ERROR"),
}


@pytest.mark.parametrize("octets,code", BROKEN.values(), ids=BROKEN)
def test_a_broken_connection_ends_with_its_code_and_the_last_stream_that_was_seen(octets: bytes, code: str) -> None:
    new = Server().greeted()
    new.receive(octets, request(99))
    assert new.failed
    assert new.failed.ours
    assert CODES[new.failed.code] == code
    last = new.frames()[-1]
    assert (last.kind, last.code) == ("GOAWAY", code)
    assert last.last_stream_id in (0, 1, 5)
    assert new.core.over
    assert 99 not in new.asked
    assert new.core.wake_at() is None
    assert new.receive(request(101)) == []
    assert new.tick(NOW + 1000) == []
    assert new.frames() == []


def test_what_came_before_the_fault_is_reported_and_cancelled() -> None:
    new = Server().greeted()
    new.receive(request(1), begun(3), raw(6, 0, 0, b"bad"))
    assert (new.asked, new.cancelled) == ([1], [1])
    assert isinstance(new.events[-1], Failed)


@pytest.mark.parametrize("push", [0, 1])
def test_a_client_may_say_whether_it_wants_push(push: int) -> None:
    new = Server().greeted(enable_push=push)
    new.receive(request(1))
    assert new.asked == [1]


def test_a_window_update_of_0_on_a_stream_resets_that_stream() -> None:
    new = Server().greeted()
    new.receive(request(1), request(3), window_update(1, 0))
    assert new.resets() == [(1, "PROTOCOL_ERROR")]
    assert new.events[-1] == Cancelled(1, CODES.index("PROTOCOL_ERROR"))
    new.answer(Answer(1, 200), Answer(3, 200))
    assert list(new.heard()) == [3]


def test_a_streams_window_beyond_all_bounds_resets_that_stream() -> None:
    new = Server().greeted()
    new.receive(request(1), request(3), window_update(1, 2**31 - 1))
    assert new.resets() == [(1, "FLOW_CONTROL_ERROR")]
    assert new.cancelled == [1]


# -- the short way of whole requests ---------------------------------------------------------------------------------

STEPS = st.one_of(
    st.tuples(st.just("whole"), st.sampled_from([BODY, b"", b"x" * 100]), st.sampled_from([(), "good", "bad"])),
    st.tuples(st.just("malformed"), st.just(BODY), st.just(())),
    st.tuples(st.just("large fields"), st.just(BODY), st.just(())),
    st.tuples(st.just("gap"), st.just(BODY), st.just(())),
    st.tuples(st.just("padded"), st.just(BODY), st.just(())),
    st.tuples(st.just("open"), st.just(BODY), st.sampled_from([(), "good", "bad"])),
    st.tuples(st.just("close"), st.sampled_from([BODY, b"", b"x" * 100]), st.just(())),
    st.tuples(st.just("answer"), st.just(b""), st.just(())),
    st.tuples(st.just("goaway"), st.just(b""), st.just(())),
    st.tuples(st.just("fewer streams"), st.just(b""), st.just(())),
)


@given(st.lists(STEPS, max_size=20), st.integers(1, 400))
def test_a_request_means_the_same_by_the_short_way_and_by_the_long_one(
    steps: list[tuple[str, bytes, Any]], cut: int
) -> None:
    limits = Limits(header_octets=2000)
    servers = [Server(max_streams=8, max_body=64, limits=limits).greeted() for _ in range(2)]
    short, long = servers
    core = long.core

    def base_frames(buffer: bytes, start: int, now: float, events: list[Event]) -> int:
        return start + Connection._frames(core, buffer[start:], now, events)

    core._read = base_frames  # type: ignore[method-assign]
    stream_id, octets, still_open = 1, b"", 0
    for what, body, length in steps:
        more = ((b"content-length", b"%d" % (len(body) + (length == "bad"))),) if length else ()
        if what == "whole":
            octets = request(stream_id, body, more)
        elif what == "malformed":
            octets = request(stream_id, body, ((b"Upper", b"case"),))
        elif what == "large fields":
            octets = request(stream_id, body, ((b"x", b"y" * 1900), (b"z", b"y" * 1900)))
        elif what == "gap":
            stream_id += 4
            octets = request(stream_id, body)
        elif what == "padded":
            octets = begun(stream_id) + data(stream_id, body, end=True, padding=3)
        elif what == "open":
            octets, still_open = begun(stream_id, more), stream_id
        elif what == "close":
            octets = data(still_open or 99, body, end=True)
        else:
            for server in servers:
                if what == "answer":
                    server.answer(*[Answer(each.stream_id, 200) for each in server.events if isinstance(each, Request)])
                elif what == "goaway":
                    server.core.goaway()
                else:
                    server.core.set_max_streams(2)
            continue
        stream_id += 2 * (what != "close")
        for server in servers:
            for start in range(0, len(octets), cut):
                server.receive(octets[start : start + cut])
        assert short.events == long.events
        assert short.frames() == long.frames()
        assert short.core.open_streams == long.core.open_streams


def test_whole_requests_that_come_together_open_the_window_again() -> None:
    server = Server(max_streams=1000).greeted()
    for number in range(100):
        server.receive(request(2 * number + 1, b"x" * 16_000))
        server.answer(Answer(2 * number + 1, 200))
    opened = [frame for frame in server.frames() if frame.kind == "WINDOW_UPDATE"]
    assert sum(isinstance(each, Request) for each in server.events) == 100
    assert len(opened) == 3


@pytest.mark.parametrize("size", [0, 126, 127, 128, 20_000])
def test_an_answer_with_one_field_is_spelt_right_however_long(size: int) -> None:
    server = Server().greeted()
    server.receive(request(1, BODY))
    server.answer(Answer(1, 200, ((b"apns-id", b"a" * size),)))
    assert server.heard()[1] == Heard([(b":status", b"200"), (b"apns-id", b"a" * size)], b"", ended=True)


def test_the_reserved_bit_makes_no_stream_beyond_the_last_one() -> None:
    server = Server().greeted()
    last = 2**31 - 1
    server.receive(request(last, BODY))
    *_, failed = server.receive(request(last + 2, BODY))  # as stream 1, which was passed over
    assert isinstance(failed, Failed)
    assert failed.code == CODES.index("PROTOCOL_ERROR")
