"""The client role, rule by rule, against a server made of hand-written octets.

Every test ends with the same question (the `client` fixture asks it): did each request that was taken end exactly once?
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import hpack
import pytest
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

from heliograph.protocols.http2 import (
    Accepted,
    Answered,
    ClientConnection,
    Event,
    Failed,
    GoAway,
    Key,
    NotProcessed,
    Pong,
    Requests,
    SettingsChanged,
    Template,
    Unknown,
)
from tests.wire import frames_by_hand as by_hand
from tests.wire.frames_by_hand import (
    CODES,
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
ID = b"5b1c8f1e-0f4a-4b6e-8a53-2f0f6a3f"
BODY = b'{"aps":{"alert":"Hello"}}'
BEARER = (b"authorization", b"bearer " + b"t" * 180)
SHARED = (BEARER, (b"apns-topic", b"com.example.app"), (b"apns-push-type", b"alert"))
TEMPLATE = Template(b"api.push.apple.com", b"/3/device/", SHARED, (b"apns-id",))
PRIORITY = b"\0\0\0\0\x0f"
OK = b"\x88"
"""`:status: 200`, from the static table."""

huffman = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode


def apns_id(key: int) -> bytes:
    return ID + b"%04x" % key


def token(key: int, digits: int = 64) -> bytes:
    return b"%0*x" % (digits, key)


def requests(
    keys: Sequence[int],
    *,
    template: Template = TEMPLATE,
    bodies: Sequence[bytes] = (BODY,),
    paths: Sequence[bytes] | None = None,
    literals: tuple[tuple[bytes, bytes], ...] = (),
) -> Requests:
    return Requests(
        template,
        keys,
        [token(key) for key in keys] if paths is None else paths,
        bodies,
        (literals,),
        (ID,) * len(template.varying),
        [b"%04x" % key for key in keys],
    )


def plain(stream_id: int, key: int | None = None) -> bytes:
    """The common answer: 200, and the notification's own id."""
    return headers(stream_id, OK + literal(b"apns-id", apns_id(stream_id if key is None else key)))


def huffman_plain(stream_id: int, text: bytes) -> bytes:
    packed = huffman(text)
    return headers(stream_id, OK + b"\0" + integer(7, 7) + b"apns-id" + integer(len(packed), 7, 0x80) + packed)


def rejection(stream_id: int, status: bytes = b"410", reason: str = "Unregistered") -> bytes:
    body = json.dumps({"reason": reason}).encode()
    return headers(stream_id, block((b":status", status)), end=False) + data(stream_id, body, end=True)


class Sent(NamedTuple):
    """A request as the server reads it."""

    stream_id: int
    fields: list[tuple[bytes, bytes]]
    pieces: list[by_hand.Piece]
    body: bytes
    ended: bool

    def cost(self, *names: bytes) -> int:
        """Octets that these fields took in the block, names and values together."""
        spelt = [piece for piece in self.pieces if piece.how != "size"]
        return sum(piece.octets for (name, _), piece in zip(self.fields, spelt, strict=True) if name in names)

    def how(self, name: bytes) -> str:
        spelt = [piece for piece in self.pieces if piece.how != "size"]
        return next(piece.how for (other, _), piece in zip(self.fields, spelt, strict=True) if other == name)


class Client:
    """A client connection, with a server played by the test: it reads with `hpack` and answers by hand."""

    def __init__(self, **options: Any) -> None:
        self.core = ClientConnection(NOW, **options)
        self.taken: list[Key] = []
        self.ends: list[tuple[Key, Event]] = []
        self.events: list[Event] = []
        self.hpack = hpack.Decoder()

    def greeted(self, **values: int) -> Client:
        """The server's SETTINGS came, and our greeting went out."""
        self.receive(settings(**values))
        self.frames()
        return self

    def submit(self, what: Requests, now: float = NOW) -> int:
        taken = self.core.submit(what, now)
        self.taken += what.keys[:taken]
        return taken

    def opened(self, count: int, **options: Any) -> Client:
        """Streams 1, 3, 5, ... are open, by keys of the same numbers, and their frames are on the way."""
        keys = range(1, 2 * count, 2)
        assert self.submit(requests(keys, **options)) == count
        self.frames()
        return self

    def receive(self, *octets: bytes, now: float = NOW) -> list[Event]:
        return self._note(self.core.receive(b"".join(octets), now))

    def tick(self, now: float) -> list[Event]:
        return self._note(self.core.tick(now))

    def eof(self) -> list[Event]:
        return self._note(self.core.eof(NOW))

    def _note(self, events: list[Event]) -> list[Event]:
        self.events += events
        for event in events:
            if isinstance(event, Answered):
                self.ends.append((event.key, event))
            elif isinstance(event, Accepted | NotProcessed | Unknown):
                self.ends += [(key, event) for key in event.keys]
        return events

    def frames(self) -> list[Frame]:
        """What is to go out now."""
        return by_hand.parse(self.core.data_to_send())

    def sent(self) -> list[Sent]:
        """The requests that are to go out now, read as a server reads them. Bodies may have come in part only."""
        found: list[Sent] = []
        pending = b""
        for frame in self.frames():
            if frame.kind == "HEADERS":
                found.append(Sent(frame.stream_id, [], [], b"", ended=False))
            if frame.kind in ("HEADERS", "CONTINUATION"):
                pending += frame.payload
                if "END_HEADERS" in frame.flags:
                    fields = [(bytes(name), bytes(value)) for name, value in self.hpack.decode(pending, raw=True)]
                    found[-1] = found[-1]._replace(fields=fields, pieces=list(by_hand.pieces(pending)))
                    pending = b""
            if frame.kind == "DATA":
                assert found[-1].stream_id == frame.stream_id
                found[-1] = found[-1]._replace(body=found[-1].body + frame.payload)
            if "END_STREAM" in frame.flags:
                found[-1] = found[-1]._replace(ended=True)
        return found

    def end(self, key: Key) -> Event:
        """What became of a request."""
        (event,) = [event for other, event in self.ends if other == key]
        return event

    def ended(self, kind: type[Event]) -> list[Key]:
        """The requests that ended so, by key: nobody promises an order."""
        return sorted(key for key, event in self.ends if isinstance(event, kind))

    @property
    def failed(self) -> Failed | None:
        return next((event for event in self.events if isinstance(event, Failed)), None)


@pytest.fixture
def client() -> Iterator[Callable[..., Client]]:
    """Makes clients; in the end, each request that they took has ended exactly once."""
    made: list[Client] = []

    def new(**options: Any) -> Client:
        made.append(Client(**options))
        return made[-1]

    yield new
    for one in made:
        one.eof()
        assert sorted(map(repr, (key for key, _ in one.ends))) == sorted(map(repr, one.taken))
        assert one.core.open_streams == 0
        assert [type(event) for event in one.events].count(Failed) == 1, "a connection ends once"
        assert one.receive(plain(1)) == [], "and says nothing afterwards"


New = Callable[..., Client]

# -- the greeting and the stream limit -----------------------------------------------------------------------------


def test_the_client_begins_with_the_preface_and_settings_that_forbid_push_and_a_table_for_answers(client: New) -> None:
    new = client()
    first = new.core.data_to_send()
    assert first.startswith(by_hand.PREFACE)
    greeting, window = by_hand.parse(first)
    assert greeting.settings == {"table_size": 0, "enable_push": 0}
    assert (window.kind, window.stream_id) == ("WINDOW_UPDATE", 0)


def test_nothing_is_submitted_before_the_servers_settings(client: New) -> None:
    new = client()
    assert new.core.capacity == 0
    assert new.submit(requests([1, 3])) == 0
    assert new.receive(settings(max_streams=1000)) == [SettingsChanged(1000)]
    assert new.submit(requests([1, 3])) == 2


def test_a_server_that_names_no_limit_sets_none(client: New) -> None:
    assert client().receive(settings()) == [SettingsChanged(2**31 - 1)]


def test_settings_are_acknowledged_each_time(client: New) -> None:
    new = client().greeted()
    new.receive(settings(max_streams=1), settings(), settings(max_streams=5))
    assert [frame.flags for frame in new.frames() if frame.kind == "SETTINGS"] == [("ACK",)] * 3


def test_unknown_settings_are_ignored(client: New) -> None:
    new = client()
    assert new.receive(raw(4, 0, 0, b"\x00\x09\xff\xff\xff\xff\xfa\xfa\x00\x00\x00\x00")) == [
        SettingsChanged(2**31 - 1)
    ]
    assert not new.failed


def test_the_last_of_two_values_for_one_setting_counts(client: New) -> None:
    new = client()
    assert new.receive(raw(4, 0, 0, b"\0\3\0\0\0\5" + b"\0\3\0\0\0\2")) == [SettingsChanged(2)]
    assert new.core.capacity == 2


def test_one_stream_until_the_limit_is_raised_then_the_rest(client: New) -> None:
    new = client().greeted(max_streams=1)
    everything = requests(range(10))
    assert new.submit(everything) == 1
    assert new.core.capacity == 0
    assert new.submit(requests(range(1, 10))) == 0
    new.receive(settings(max_streams=1000), plain(1, 0))
    assert new.core.capacity == 1000
    assert new.submit(requests(range(1, 10))) == 9
    assert [sent.stream_id for sent in new.sent()] == list(range(1, 21, 2))


def test_a_limit_below_what_is_open_opens_nothing_until_enough_have_ended(client: New) -> None:
    new = client().greeted(max_streams=10).opened(10)
    new.receive(settings(max_streams=3))
    assert new.core.capacity == 0
    new.receive(*[plain(stream_id) for stream_id in range(1, 15, 2)])
    assert (new.core.open_streams, new.core.capacity) == (3, 0)
    new.receive(plain(15))
    assert new.submit(requests([100, 101])) == 1


def test_a_limit_lowered_to_one_leaves_open_streams_alone(client: New) -> None:
    new = client().greeted(max_streams=1000).opened(5)
    new.receive(settings(max_streams=1), *[plain(stream_id) for stream_id in range(1, 11, 2)])
    assert new.ended(Accepted) == [1, 3, 5, 7, 9]
    assert new.core.capacity == 1


def test_a_limit_of_0_holds_until_it_is_raised_again(client: New) -> None:
    new = client().greeted(max_streams=0)
    assert new.submit(requests([1])) == 0
    assert new.core.usable
    new.receive(settings(max_streams=2))
    assert new.submit(requests([1, 3, 5])) == 2
    new.receive(settings(max_streams=0), plain(1))
    assert new.submit(requests([5])) == 0
    new.receive(settings(max_streams=1), plain(3))
    assert new.submit(requests([5])) == 1


def test_the_largest_limit_there_can_be_is_taken(client: New) -> None:
    assert client().receive(settings(max_streams=2**32 - 1)) == [SettingsChanged(2**31 - 1)]


# -- how requests are spelt ----------------------------------------------------------------------------------------


def test_a_request_says_what_apple_wants_to_hear(client: New) -> None:
    new = client().greeted()
    new.submit(requests([7], literals=((b"apns-expiration", b"0"),)))
    (sent,) = new.sent()
    assert sent.fields == [
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":authority", b"api.push.apple.com"),
        (b":path", b"/3/device/" + token(7)),
        *SHARED,
        (b"apns-expiration", b"0"),
        (b"apns-id", apns_id(7)),
    ]
    assert (sent.stream_id, sent.body, sent.ended) == (1, BODY, True)


def test_all_requests_of_a_submit_mean_what_they_should(client: New) -> None:
    new = client().greeted()
    keys = range(1, 100, 2)
    new.submit(requests(keys, literals=((b"apns-expiration", b"1700000000"),)))
    sent = new.sent()
    assert [one.stream_id for one in sent] == list(keys)
    for key, one in zip(keys, sent, strict=True):
        meant = dict(one.fields)
        assert meant[b":path"] == b"/3/device/" + token(key)
        assert meant[b"apns-id"] == apns_id(key)
        assert meant[b"apns-expiration"] == b"1700000000"
        assert one.fields[4:7] == list(SHARED)
        assert (one.body, one.ended) == (BODY, True)


def test_shared_fields_enter_the_table_once_and_cost_an_octet_each_afterwards(client: New) -> None:
    new = client().greeted()
    new.submit(requests([1, 3, 5, 7]))
    first, *rest = new.sent()
    names = [b":authority", *[name for name, _ in SHARED]]
    assert [first.how(name) for name in names] == ["entry"] * 4
    for sent in rest:
        assert [sent.how(name) for name in names] == ["indexed"] * 4
        assert sent.cost(b":method", b":scheme", *names) == 6


def test_the_path_is_never_put_into_the_table(client: New) -> None:
    new = client().greeted()
    new.submit(requests([1, 3, 5]))
    for sent in new.sent():
        assert sent.how(b":path") == "literal"
        assert sent.cost(b":path") == 2 + len(b"/3/device/") + 64


def test_ids_and_expiration_enter_the_table_by_name_once_and_are_literals_afterwards(client: New) -> None:
    new = client().greeted()
    new.submit(requests([1, 3], literals=((b"apns-expiration", b"1700000000"),)))
    new.submit(requests([5], literals=((b"apns-expiration", b"1700000001"),)))
    first, *rest = new.sent()
    assert (first.how(b"apns-id"), first.how(b"apns-expiration")) == ("entry", "entry")
    for sent in rest:
        assert (sent.how(b"apns-id"), sent.how(b"apns-expiration")) == ("literal", "literal")
        assert sent.cost(b"apns-expiration") <= 3 + 10, "the name by its index"
        assert sent.cost(b"apns-id") <= 3 + 36


def test_each_request_can_have_literals_of_its_own(client: New) -> None:
    own = [((b"apns-collapse-id", b"c" * (key % 64 + 1)),) if key % 3 else () for key in range(1, 200, 2)]
    new = client().greeted()
    keys = range(1, 200, 2)
    new.submit(requests(keys)._replace(literals=own))
    sent = new.sent()
    assert [one.stream_id for one in sent] == list(keys)
    for key, fields, one in zip(keys, own, sent, strict=True):
        meant = dict(one.fields)
        assert meant.get(b"apns-collapse-id") == dict(fields).get(b"apns-collapse-id")
        assert meant[b":path"] == b"/3/device/" + token(key)
        assert meant[b"apns-id"] == apns_id(key)
        assert [name[:1] == b":" for name, _ in one.fields] == sorted(
            (name[:1] == b":" for name in meant), reverse=True
        )
        assert (one.body, one.ended) == (BODY, True)


def test_literals_of_its_own_that_need_more_than_a_frame_go_in_several(client: New) -> None:
    own = [((b"x-long", b"l" * size),) for size in (10, 20_000, 30)]
    new = client().greeted()
    new.submit(requests([1, 3, 5])._replace(literals=own))
    assert [dict(one.fields)[b"x-long"] for one in new.sent()] == [fields[0][1] for fields in own]


def test_pseudo_fields_come_first(client: New) -> None:
    new = client().greeted()
    new.submit(requests([1, 3]))
    for sent in new.sent():
        assert [name[:1] == b":" for name, _ in sent.fields] == [True] * 4 + [False] * 4


def test_two_varying_fields_get_the_same_suffix_under_their_own_prefixes(client: New) -> None:
    template = TEMPLATE._replace(varying=(b"apns-id", b"apns-collapse-id"))
    new = client().greeted()
    new.submit(Requests(template, [1, 3], [b"aa", b"bb"], [BODY], ((),), (b"id-", b"collapse-"), [b"0001", b"0002"]))
    assert [one.fields[-2:] for one in new.sent()] == [
        [(b"apns-id", b"id-0001"), (b"apns-collapse-id", b"collapse-0001")],
        [(b"apns-id", b"id-0002"), (b"apns-collapse-id", b"collapse-0002")],
    ]


@pytest.mark.parametrize("varying", [0, 3])
def test_any_number_of_varying_fields_is_spelt_right(client: New, varying: int) -> None:
    names = tuple(b"x-%d" % place for place in range(varying))
    new = client().greeted()
    assert new.submit(requests([1, 3, 5], template=TEMPLATE._replace(varying=names))) == 3
    assert [one.fields[7:] for one in new.sent()] == [[(name, apns_id(key)) for name in names] for key in (1, 3, 5)]


def test_two_templates_that_alternate_cost_no_more_than_one_after_their_first_requests(client: New) -> None:
    new = client().greeted()
    other = TEMPLATE._replace(fields=(BEARER, (b"apns-topic", b"com.example.other"), (b"apns-priority", b"5")))
    for key in range(0, 12, 2):
        new.submit(requests([key]))
        new.submit(requests([key + 1], template=other))
    sent = new.sent()
    assert [dict(one.fields)[b"apns-topic"] for one in sent] == [b"com.example.app", b"com.example.other"] * 6
    names = [b":authority", b"authorization", b"apns-topic", b"apns-push-type", b"apns-priority"]
    assert [one.cost(*names) for one in sent[2:]] == [4] * 10


def test_a_new_provider_token_costs_its_octets_once(client: New) -> None:
    new = client().greeted()
    new.submit(requests([1, 3]))
    new.sent()
    renewed = TEMPLATE._replace(fields=((b"authorization", b"bearer " + b"u" * 180), *SHARED[1:]))
    new.submit(requests([5, 7], template=renewed))
    first, second = new.sent()
    assert dict(first.fields)[b"authorization"] == b"bearer " + b"u" * 180
    assert first.cost(b"apns-topic", b"apns-push-type") == 2
    assert first.how(b"authorization") == "entry"
    assert second.cost(b"authorization") == 1


def test_more_templates_than_the_table_holds_are_still_spelt_right(client: New) -> None:
    new = client().greeted()
    templates = [
        TEMPLATE._replace(fields=(BEARER, (b"apns-topic", b"com.example.%d" % number + b"x" * 500)))
        for number in range(80)
    ]
    keys = iter(range(1, 1000))
    for _ in range(2):
        for template in templates:
            key = next(keys)
            new.submit(requests([key], template=template))
            (sent,) = new.sent()
            assert sent.fields[4:] == [*template.fields, (b"apns-id", apns_id(key))]


# -- the server's table for our fields -----------------------------------------------------------------------------


def test_a_server_without_a_table_gets_literals_after_a_size_update(client: New) -> None:
    new = client().greeted(table_size=0)
    new.hpack.max_allowed_table_size = 0
    new.submit(requests([1, 3, 5]))
    first, *rest = new.sent()
    assert first.pieces[0] == ("size", 0, 1)
    for sent in (first, *rest):
        assert "entry" not in [piece.how for piece in sent.pieces]
    assert all(piece.how != "size" for sent in rest for piece in sent.pieces)
    assert [dict(sent.fields)[b"apns-id"] for sent in (first, *rest)] == [apns_id(key) for key in (1, 3, 5)]


def test_a_table_of_100_octets_is_announced_and_not_overfilled(client: New) -> None:
    new = client().greeted(table_size=100)
    new.hpack.max_allowed_table_size = 100
    new.submit(requests([1, 3, 5]))
    first, *rest = new.sent()
    assert first.pieces[0].how == "size"
    assert first.pieces[0].number <= 100
    for sent in (first, *rest):
        assert sent.fields[4:7] == list(SHARED)
    assert new.hpack.header_table_size <= 100


def test_a_table_that_shrinks_and_grows_between_blocks_is_emptied_first(client: New) -> None:
    new = client().greeted()
    new.submit(requests([1, 3]))
    new.sent()
    new.receive(settings(table_size=0), settings(table_size=4096))
    new.submit(requests([5, 7]))
    first, second = new.sent()
    assert [(piece.how, piece.number) for piece in first.pieces[:2]] == [("size", 0), ("size", 4096)]
    assert first.how(b"apns-topic") == "entry", "what was in the table is gone"
    assert (second.how(b"apns-topic"), second.fields[4:7]) == ("indexed", list(SHARED))


def test_a_table_that_shrinks_then_grows_again_is_used_again(client: New) -> None:
    new = client().greeted()
    new.submit(requests([1]))
    new.sent()
    new.receive(settings(table_size=0))
    new.hpack.max_allowed_table_size = 0
    new.submit(requests([3, 5]))
    assert [sent.how(b"apns-topic") for sent in new.sent()] == ["literal"] * 2
    new.receive(settings(table_size=2048))
    new.hpack.max_allowed_table_size = 2048
    new.submit(requests([7, 9]))
    first, second = new.sent()
    assert first.pieces[0][:2] == ("size", 2048)
    assert (first.how(b"apns-topic"), second.how(b"apns-topic")) == ("entry", "indexed")


def test_a_table_that_shrinks_a_little_keeps_what_still_fits(client: New) -> None:
    new = client().greeted()
    new.submit(requests([1]))
    new.sent()
    new.receive(settings(table_size=400))
    new.hpack.max_allowed_table_size = 400
    new.submit(requests([3, 5]))
    sent = new.sent()
    assert [one.fields[4:] for one in sent] == [[*SHARED, (b"apns-id", apns_id(key))] for key in (3, 5)]


def test_a_larger_table_than_we_fill_needs_no_size_update(client: New) -> None:
    new = client().greeted(table_size=65_536)
    new.hpack.max_allowed_table_size = 65_536
    new.submit(requests([1, 3]))
    assert all(piece.how != "size" for sent in new.sent() for piece in sent.pieces)


# -- paths, bodies and windows -------------------------------------------------------------------------------------


def test_device_tokens_of_several_lengths_go_out_in_one_submit(client: New) -> None:
    lengths = [64, 64, 160, 100, 200, 64, 2, 126, 117, 118, 116, 0]
    new = client().greeted()
    paths = [token(key, digits) if digits else b"" for key, digits in enumerate(lengths)]
    assert new.submit(requests(range(len(lengths)), paths=paths)) == len(lengths)
    assert [dict(one.fields)[b":path"] for one in new.sent()] == [b"/3/device/" + path for path in paths]


def test_each_request_has_its_own_body_or_all_share_one(client: New) -> None:
    new = client().greeted()
    bodies = [b"a", b"bb", b"bb", b"c" * 4096, b"d" * 300, b"e"]
    new.submit(requests(range(6), bodies=bodies))
    new.submit(requests(range(6, 9), bodies=[b"shared"]))
    sent = new.sent()
    assert [one.body for one in sent] == [*bodies, b"shared", b"shared", b"shared"]
    assert all(one.ended for one in sent)


def test_a_request_without_a_body_ends_with_its_header_fields(client: New) -> None:
    new = client().greeted()
    new.submit(requests(range(4), bodies=[b"x", b"", b"y", b""]))
    frames = [frame for frame in new.frames() if frame.stream_id]
    assert [(frame.kind, frame.stream_id, "END_STREAM" in frame.flags) for frame in frames] == [
        ("HEADERS", 1, False),
        ("DATA", 1, True),
        ("HEADERS", 3, True),
        ("HEADERS", 5, False),
        ("DATA", 5, True),
        ("HEADERS", 7, True),
    ]


def test_a_body_larger_than_a_streams_window_goes_out_as_the_window_opens(client: New) -> None:
    new = client().greeted(window=10)
    new.submit(requests([1], bodies=[b"abcdefghijklmnopqrstuvwxy"]))
    assert [(one.body, one.ended) for one in new.sent()] == [(b"abcdefghij", False)]
    new.receive(window_update(1, 10))
    (more,) = new.frames()
    assert (more.kind, more.stream_id, more.payload, more.flags) == ("DATA", 1, b"klmnopqrst", ())
    new.receive(window_update(1, 4))
    new.receive(window_update(1, 100))
    assert [(frame.payload, "END_STREAM" in frame.flags) for frame in new.frames()] == [(b"uvwx", False), (b"y", True)]
    new.receive(plain(1))
    assert new.ended(Accepted) == [1]


def test_a_body_that_fits_a_streams_window_exactly_ends_there(client: New) -> None:
    new = client().greeted(window=10)
    new.submit(requests([1, 3], bodies=[b"0123456789"]))
    assert [(one.body, one.ended) for one in new.sent()] == [(b"0123456789", True)] * 2


def test_an_initial_window_of_0_lets_header_fields_out_and_bodies_wait(client: New) -> None:
    new = client().greeted(window=0)
    assert new.submit(requests([1, 3])) == 2
    assert [(one.body, one.ended) for one in new.sent()] == [(b"", False)] * 2
    new.receive(window_update(3, 1000))
    assert [frame.stream_id for frame in new.frames()] == [3]
    new.receive(settings(window=1000))
    assert [(frame.kind, frame.stream_id) for frame in new.frames()] == [("SETTINGS", 0), ("DATA", 1)]


def test_a_raised_initial_window_lets_bodies_out_that_wait(client: New) -> None:
    new = client().greeted(window=5)
    new.submit(requests([1], bodies=[b"0123456789"]))
    new.frames()
    new.receive(settings(window=7))
    assert new.frames()[-1].payload == b"56"
    new.receive(settings(window=70))
    assert (new.frames()[-1].payload, new.core.open_streams) == (b"789", 1)


def test_an_initial_window_lowered_below_what_was_sent_makes_a_streams_window_negative(client: New) -> None:
    new = client().greeted(window=100)
    new.submit(requests([1], bodies=[b"x" * 150]))
    assert new.sent()[0].body == b"x" * 100
    new.receive(settings(window=20))
    assert [frame.kind for frame in new.frames()] == ["SETTINGS"]
    new.receive(window_update(1, 80))
    assert new.frames() == []
    new.receive(window_update(1, 30))
    assert [len(frame.payload) for frame in new.frames()] == [30]
    new.receive(window_update(1, 20))
    assert [(len(frame.payload), frame.flags) for frame in new.frames()] == [(20, ("END_STREAM",))]


def test_a_lowered_initial_window_holds_for_streams_opened_later(client: New) -> None:
    new = client().greeted(window=1000)
    new.submit(requests([1]))
    new.receive(settings(window=3))
    new.submit(requests([3, 5]))
    assert [one.body for one in new.sent()] == [BODY, BODY[:3], BODY[:3]]


def test_a_lone_body_larger_than_the_connections_window_goes_out_in_parts(client: New) -> None:
    new = client().greeted(window=1 << 20)
    new.submit(requests([1], bodies=[b"x" * 70_000]))
    (sent,) = new.sent()
    assert (len(sent.body), sent.ended) == (65_535, False)
    assert new.core.capacity == 0
    new.receive(window_update(0, 65_535))
    assert [(len(frame.payload), frame.flags) for frame in new.frames()] == [(4465, ("END_STREAM",))]


def test_bodies_never_overrun_the_connections_window(client: New) -> None:
    new = client().greeted(window=1 << 20)
    taken = new.submit(requests(range(1, 101), bodies=[b"x" * 1000]))
    assert taken == 65
    assert sum(len(one.body) for one in new.sent()) == 65_000
    assert new.submit(requests([200], bodies=[b"y" * 536])) == 0
    assert new.submit(requests([200], bodies=[b"y" * 535])) == 1
    assert new.submit(requests([201], bodies=[b"z"])) == 0
    new.receive(window_update(0, 1000))
    assert new.submit(requests([201], bodies=[b"z"])) == 1


def test_a_connections_window_that_opens_is_told_though_nothing_else_came(client: New) -> None:
    new = client().greeted(window=1 << 20)
    assert new.submit(requests(range(1, 67), bodies=[b"x" * 1000])) == 65
    assert new.submit(requests([66], bodies=[b"x" * 535])) == 1
    new.receive(*[plain(stream_id) for stream_id in range(1, 132, 2)])
    assert (new.core.open_streams, new.core.capacity) == (0, 0)
    assert new.receive(window_update(0, 65_535)), "or nobody knows that there is room again"
    assert new.core.capacity > 0


def test_windows_that_open_release_bodies_in_the_order_of_their_streams(client: New) -> None:
    new = client().greeted(window=2)
    new.submit(requests([1, 3, 5], bodies=[b"aaaa", b"bbbb", b"cccc"]))
    new.frames()
    new.receive(settings(window=4))
    assert [frame.payload for frame in new.frames() if frame.kind == "DATA"] == [b"aa", b"bb", b"cc"]


def test_a_body_larger_than_a_frame_is_cut_and_a_larger_frame_size_used(client: New) -> None:
    new = client().greeted()
    new.submit(requests([1], bodies=[b"x" * 20_000]))
    assert [len(frame.payload) for frame in new.frames() if frame.kind == "DATA"] == [16_384, 3_616]
    new.receive(settings(max_frame=32_768))
    new.submit(requests([3], bodies=[b"x" * 20_000]))
    assert [len(frame.payload) for frame in new.frames() if frame.kind == "DATA"] == [20_000]


def test_a_header_block_larger_than_a_frame_goes_on_in_continuation(client: New) -> None:
    new = client().greeted(window=1 << 20)
    long = TEMPLATE._replace(fields=(*SHARED, (b"x-long", b"l" * 40_000)))
    assert new.submit(requests([1, 3], template=long)) == 2
    frames = [frame for frame in new.frames() if frame.stream_id]
    kinds = ["HEADERS", "CONTINUATION", "CONTINUATION", "DATA"]
    assert [(frame.kind, frame.stream_id) for frame in frames] == [(kind, key) for key in (1, 3) for kind in kinds]
    assert [len(frame.payload) for frame in frames[:2]] == [16_384, 16_384]
    assert [sorted(frame.flags) for frame in frames[:4]] == [[], [], ["END_HEADERS"], ["END_STREAM"]]
    for first in (0, 4):
        fields = new.hpack.decode(b"".join(frame.payload for frame in frames[first : first + 3]), raw=True)
        assert dict(fields)[b"x-long"] == b"l" * 40_000


def test_a_header_block_that_just_fills_a_frame_needs_no_continuation(client: New) -> None:
    new = client().greeted()
    new.submit(requests([1]))
    (first,) = new.sent()
    new.submit(requests([3]))
    spare = 16_384 - sum(piece.octets for piece in new.sent()[0].pieces) - 2
    new.submit(requests([5, 7], paths=[token(5, 64 + spare), token(7, 64 + spare + 1)]))
    octets = [(frame.kind, len(frame.payload)) for frame in new.frames() if frame.kind != "DATA"]
    assert octets == [("HEADERS", 16_384), ("HEADERS", 16_384), ("CONTINUATION", 1)]
    assert first.ended


# -- plain answers -------------------------------------------------------------------------------------------------


def test_a_run_of_plain_answers_is_accepted_whole(client: New) -> None:
    new = client().greeted().opened(100)
    new.receive(*[plain(stream_id) for stream_id in range(1, 200, 2)])
    assert new.ended(Accepted) == list(range(1, 200, 2))


def test_plain_answers_may_come_in_any_order(client: New) -> None:
    new = client().greeted().opened(50)
    order = [*range(99, 50, -2), *range(1, 51, 2)]
    new.receive(*[plain(stream_id) for stream_id in order])
    assert sorted(new.ended(Accepted)) == list(range(1, 100, 2))


def test_plain_answers_may_be_cut_anywhere(client: New) -> None:
    new = client().greeted().opened(20)
    octets = b"".join(plain(stream_id) for stream_id in range(1, 40, 2))
    for start in range(0, len(octets), 7):
        new.receive(octets[start : start + 7])
    assert new.ended(Accepted) == list(range(1, 40, 2))


def test_a_rejection_between_plain_answers_is_its_own(client: New) -> None:
    new = client().greeted().opened(41)
    before, after = range(1, 41, 2), range(43, 83, 2)
    new.receive(*map(plain, before), rejection(41), *map(plain, after))
    assert new.ended(Accepted) == [*before, *after]
    assert new.end(41) == Answered(41, 410, [], b'{"reason": "Unregistered"}')


@pytest.mark.parametrize(
    "between",
    [
        window_update(0, 100),
        window_update(21, 100),
        ping(ack=True),
        settings(max_streams=3),
        settings(table_size=0),
        priority(21),
        raw(0xBB, 0xFF, 21, b"unknown kind"),
        rst_stream(1, 0),
    ],
    ids=["window", "stream window", "pong", "limit", "table", "priority", "unknown kind", "reset of a closed stream"],
)
def test_other_frames_between_plain_answers_change_nothing(client: New, between: bytes) -> None:
    new = client().greeted().opened(20)
    octets = [plain(stream_id) for stream_id in range(1, 40, 2)]
    new.receive(*octets[:10], between, *octets[10:15], between, between, *octets[15:])
    assert new.ended(Accepted) == list(range(1, 40, 2))


def test_a_plain_answer_with_its_id_in_huffman_code_is_accepted(client: New) -> None:
    new = client().greeted().opened(60)
    texts = [(b"%08x" % (key * 77_777_777 % 2**32)) * 4 for key in range(60)]
    assert len({len(huffman(text)) for text in texts}) > 3
    new.receive(*[huffman_plain(2 * place + 1, text) for place, text in enumerate(texts)])
    assert new.ended(Accepted) == list(range(1, 120, 2))


def test_a_server_that_first_says_its_table_is_empty_is_understood(client: New) -> None:
    new = client().greeted().opened(20)
    first = headers(1, b"\x20" + OK + literal(b"apns-id", apns_id(1)))
    new.receive(first, *[plain(stream_id) for stream_id in range(3, 40, 2)])
    assert new.ended(Accepted) == list(range(1, 40, 2))


def test_two_servers_in_one_that_spell_answers_differently_are_both_understood(client: New) -> None:
    new = client().greeted().opened(40)
    upper = [headers(s, literal(b":status", b"200") + literal(b"apns-id", b"X" * 36)) for s in range(1, 80, 4)]
    lower = [plain(stream_id) for stream_id in range(3, 80, 4)]
    new.receive(*[octets for pair in zip(upper, lower, strict=True) for octets in pair])
    assert new.ended(Accepted) == list(range(1, 80, 2))


ENTRY = OK + b"\xbe"
"""200, and the youngest entry of the dynamic table."""


def by_entry(stream_id: int) -> bytes:
    return headers(stream_id, ENTRY + literal(b"apns-id", apns_id(stream_id)))


HARMLESS = literal(b"server", b"apple", first=0x40)
KEPT = literal(b"apns-unique-id", b"unique!", first=0x40)


@pytest.mark.parametrize(
    "change",
    [
        headers(41, OK + KEPT),
        headers(41, block((b":status", b"410")) + KEPT),
        headers(41, block((b":status", b"103")) + KEPT, end=False),
        headers(41, OK, end=False) + headers(41, KEPT),
        headers(41, OK + KEPT[:5], end=False, whole=False) + continuation(41, KEPT[5:]),
        headers(41, OK + literal(b"Upper", b"malformed") + KEPT),
        headers(41, OK + KEPT + literal(b"x" * 16_000, b"")) + headers(43, OK + b"\xbe" * 1500),
    ],
    ids=["200", "410", "interim", "trailers", "continuation", "malformed", "list too large"],
)
def test_an_answer_by_the_table_is_read_anew_once_the_table_changed(client: New, change: bytes) -> None:
    new = client(keep=frozenset((b"apns-unique-id",))).greeted().opened(40)
    new.receive(headers(1, OK + HARMLESS), *[by_entry(stream_id) for stream_id in range(3, 41, 2)])
    assert new.ended(Accepted) == list(range(1, 41, 2))
    new.receive(change, *[by_entry(stream_id) for stream_id in range(45, 79, 2)])
    assert not new.failed
    assert [new.end(key) for key in range(45, 79, 2)] == [
        Answered(key, 200, [(b"apns-unique-id", b"unique!"), (b"apns-id", apns_id(key))], b"")
        for key in range(45, 79, 2)
    ]


def test_an_answer_on_a_stream_that_we_gave_up_still_changes_the_table(client: New) -> None:
    new = client(keep=frozenset((b"apns-unique-id",))).greeted().opened(20)
    new.tick(NOW + 40)
    assert len(new.ended(Unknown)) == 20
    new.submit(requests(range(41, 81, 2)), NOW + 40)
    new.receive(headers(41, OK + HARMLESS), *[by_entry(stream_id) for stream_id in range(43, 61, 2)], now=NOW + 41)
    new.receive(headers(3, OK + KEPT), *[by_entry(stream_id) for stream_id in range(61, 81, 2)], now=NOW + 41)
    assert new.ended(Answered) == list(range(61, 81, 2))


def test_an_entry_that_the_table_lost_cannot_be_spoken_of_again(client: New) -> None:
    new = client().greeted().opened(20)
    new.receive(headers(1, OK + HARMLESS), *[by_entry(stream_id) for stream_id in range(3, 23, 2)])
    new.receive(headers(23, b"\x20" + OK), *[by_entry(stream_id) for stream_id in range(25, 40, 2)])
    assert new.failed
    assert new.frames()[-1].code == "COMPRESSION_ERROR"
    assert new.ended(Unknown) == list(range(25, 40, 2))


def test_a_200_with_a_field_to_keep_is_reported_whole(client: New) -> None:
    new = client(keep=frozenset((b"apns-unique-id",))).greeted().opened(30)
    for stream_id in range(1, 60, 2):
        more = literal(b"apns-unique-id", b"unique %d" % stream_id) if stream_id % 3 == 0 else b""
        new.receive(headers(stream_id, OK + more + literal(b"apns-id", apns_id(stream_id))))
    kept = [key for key in range(1, 60, 2) if key % 3 == 0]
    assert new.ended(Answered) == kept
    assert new.ended(Accepted) == [key for key in range(1, 60, 2) if key % 3]
    assert new.end(3) == Answered(3, 200, [(b"apns-unique-id", b"unique 3"), (b"apns-id", apns_id(3))], b"")


def test_apns_id_can_be_kept_too(client: New) -> None:
    new = client(keep=frozenset((b"apns-id",))).greeted().opened(20)
    new.receive(*[plain(stream_id) for stream_id in range(1, 40, 2)])
    assert new.ended(Answered) == list(range(1, 40, 2))


def test_a_200_with_a_body_is_reported_with_it(client: New) -> None:
    new = client().greeted().opened(3)
    new.receive(*[plain(1), headers(3, OK, end=False), data(3, b"hel"), plain(5), data(3, b"lo", end=True)])
    assert new.ended(Accepted) == [1, 5]
    assert new.end(3) == Answered(3, 200, [], b"hello")


def test_a_200_that_ends_with_empty_data_is_accepted(client: New) -> None:
    new = client().greeted().opened(200)
    for stream_id in range(1, 400, 2):
        new.receive(
            headers(stream_id, OK + literal(b"apns-id", apns_id(stream_id)), end=False) + data(stream_id, end=True)
        )
    assert new.ended(Accepted) == list(range(1, 400, 2))


def test_a_field_behind_the_id_that_we_do_not_know_changes_nothing(client: New) -> None:
    new = client().greeted().opened(20)
    for stream_id in range(1, 40, 2):
        new.receive(
            headers(stream_id, OK + literal(b"apns-id", apns_id(stream_id)) + literal(b"x-new", b"%d" % stream_id))
        )
    assert new.ended(Accepted) == list(range(1, 40, 2))


def test_an_id_that_is_longer_than_before_is_not_mistaken_for_another_field(client: New) -> None:
    new = client(keep=frozenset((b"apns-unique-id",))).greeted().opened(12)
    new.receive(*[plain(stream_id) for stream_id in range(1, 21, 2)])
    # As many octets as a plain answer, and the same until the length of the id.
    tail = literal(b"apns-unique-id", b"u")
    new.receive(headers(21, OK + literal(b"apns-id", b"i" * (36 - len(tail))) + tail), plain(23))
    assert new.end(21) == Answered(21, 200, [(b"apns-id", b"i" * (36 - len(tail))), (b"apns-unique-id", b"u")], b"")
    assert isinstance(new.end(23), Accepted)


def test_a_200_with_content_length_0_is_accepted_and_with_more_is_not(client: New) -> None:
    new = client().greeted().opened(40)
    for stream_id in range(1, 40, 2):
        new.receive(headers(stream_id, OK + literal(b"content-length", b"0") + literal(b"apns-id", apns_id(stream_id))))
    for stream_id in range(41, 80, 2):
        new.receive(headers(stream_id, OK + literal(b"content-length", b"9") + literal(b"apns-id", apns_id(stream_id))))
    assert new.ended(Accepted) == list(range(1, 40, 2))
    assert new.ended(Unknown) == list(range(41, 80, 2))


# -- answers of every other kind -----------------------------------------------------------------------------------


def test_a_rejection_comes_with_status_fields_and_body(client: New) -> None:
    new = client().greeted().opened(1)
    fields = ((b"apns-id", apns_id(1)), (b"content-type", b"application/json"), (b"content-length", b"27"))
    new.receive(headers(1, block((b":status", b"400"), *fields), end=False))
    new.receive(data(1, b'{"reason":'), data(1, b'"BadDeviceToken"}', end=True))
    assert new.end(1) == Answered(1, 400, list(fields), b'{"reason":"BadDeviceToken"}')


def test_a_rejection_may_come_without_a_body(client: New) -> None:
    new = client().greeted().opened(1)
    new.receive(headers(1, block((b":status", b"503"))))
    assert new.end(1) == Answered(1, 503, [], b"")


def test_interim_answers_are_passed_over(client: New) -> None:
    new = client().greeted().opened(2)
    hint = headers(1, block((b":status", b"103"), (b"link", b"</x>")), end=False)
    assert new.receive(hint, headers(3, block((b":status", b"100")), end=False), hint) == []
    new.receive(plain(1), rejection(3))
    assert [type(new.end(key)) for key in (1, 3)] == [Accepted, Answered]


def test_an_interim_answer_while_the_body_waits_lets_the_body_go_on(client: New) -> None:
    new = client().greeted(window=3)
    new.submit(requests([1], bodies=[b"abcdef"]))
    new.frames()
    new.receive(headers(1, block((b":status", b"100")), end=False), window_update(1, 3))
    assert [frame.payload for frame in new.frames()] == [b"def"]
    new.receive(plain(1))
    assert new.ended(Accepted) == [1]


def test_trailers_end_an_answer_and_are_not_reported(client: New) -> None:
    new = client().greeted().opened(2)
    trailers = block((b"x-checksum", b"1"))
    new.receive(headers(1, OK, end=False), headers(1, trailers))
    new.receive(headers(3, OK, end=False), data(3, b"x"), headers(3, trailers))
    assert isinstance(new.end(1), Accepted)
    assert new.end(3) == Answered(3, 200, [], b"x")


@pytest.mark.parametrize("padding", [0, 1, 255])
def test_padding_is_taken_off_answers(client: New, padding: int) -> None:
    new = client().greeted().opened(2)
    new.receive(headers(1, OK + literal(b"apns-id", apns_id(1)), padding=padding))
    new.receive(headers(3, block((b":status", b"400")), end=False, padding=padding))
    new.receive(data(3, b"because", end=True, padding=padding))
    assert isinstance(new.end(1), Accepted)
    assert new.end(3) == Answered(3, 400, [], b"because")


def test_an_answers_priority_is_passed_over(client: New) -> None:
    new = client().greeted().opened(2)
    new.receive(headers(1, OK, priority=PRIORITY), headers(3, OK, priority=PRIORITY, padding=7))
    assert new.ended(Accepted) == [1, 3]


def test_an_answers_header_block_may_come_in_several_frames(client: New) -> None:
    new = client().greeted().opened(2)
    octets = block((b":status", b"410"), (b"apns-id", apns_id(1)))
    new.receive(headers(1, octets[:5], end=False, whole=False), continuation(1, octets[5:9], whole=False))
    new.receive(continuation(1, b"", whole=False), continuation(1, octets[9:]), data(1, b"{}", end=True))
    assert new.end(1) == Answered(1, 410, [(b"apns-id", apns_id(1))], b"{}")
    new.receive(headers(3, b"", whole=False), continuation(3, OK))
    assert new.ended(Accepted) == [3]


def test_the_reserved_bit_of_a_stream_id_is_ignored(client: New) -> None:
    new = client().greeted().opened(20)
    new.receive(*[plain(stream_id | 1 << 31, stream_id) for stream_id in range(1, 40, 2)])
    assert new.ended(Accepted) == list(range(1, 40, 2))


def test_an_answer_before_the_request_is_out_ends_it_and_the_rest_is_not_sent(client: New) -> None:
    new = client().greeted(window=4)
    new.submit(requests([1, 3], bodies=[b"abcdef"]))
    new.frames()
    new.receive(headers(1, block((b":status", b"413"))))
    (reset,) = new.frames()
    assert (reset.kind, reset.stream_id) == ("RST_STREAM", 1)
    assert new.end(1) == Answered(1, 413, [], b"")
    new.receive(rst_stream(1, 0), window_update(1, 100), window_update(3, 100))
    assert [(frame.stream_id, frame.payload) for frame in new.frames()] == [(3, b"ef")]


def test_an_answer_that_begins_before_the_request_is_out_lets_the_request_go_on(client: New) -> None:
    new = client().greeted(window=4)
    new.submit(requests([1], bodies=[b"abcdef"]))
    new.frames()
    new.receive(headers(1, OK, end=False), window_update(1, 100))
    assert [(frame.kind, frame.payload) for frame in new.frames()] == [("DATA", b"ef")]
    new.receive(data(1, b"done", end=True))
    assert new.end(1) == Answered(1, 200, [], b"done")
    assert new.frames() == []


def test_a_longer_answer_than_anybody_needs_is_cut_and_the_rest_ignored(client: New) -> None:
    new = client(max_body=10).greeted().opened(2)
    new.receive(headers(1, OK, end=False), data(1, b"0123456"), data(1, b"789abc"))
    assert new.end(1) == Answered(1, 200, [], b"0123456789")
    assert [(frame.kind, frame.stream_id) for frame in new.frames()] == [("RST_STREAM", 1)]
    new.receive(data(1, b"def"), data(1, b"", end=True), plain(3))
    assert new.ended(Accepted) == [3]


def test_an_answer_of_just_the_largest_size_is_whole(client: New) -> None:
    new = client(max_body=10).greeted().opened(1)
    new.receive(headers(1, OK, end=False), data(1, b"0123456789"), data(1, end=True))
    assert new.end(1) == Answered(1, 200, [], b"0123456789")
    assert new.frames() == []


def test_a_cut_answer_to_an_unfinished_request_resets_its_stream_once(client: New) -> None:
    new = client(max_body=1).greeted(window=4)
    new.submit(requests([1], bodies=[b"abcdef"]))
    new.frames()
    new.receive(headers(1, OK, end=False), data(1, b"long"))
    assert new.end(1) == Answered(1, 200, [], b"l")
    assert [(frame.kind, frame.stream_id) for frame in new.frames()] == [("RST_STREAM", 1)]


def test_the_connections_window_is_opened_again_as_answers_come(client: New) -> None:
    new = client(max_body=60_000).greeted()
    received = 0
    opened = 0
    for round_ in range(300):
        new.submit(requests([round_]))
        stream_id = 2 * round_ + 1
        new.receive(headers(stream_id, OK, end=False), *[data(stream_id, bytes(16_000))] * 3, data(stream_id, end=True))
        received += 48_000
        opened += sum(f.number for f in new.frames() if f.kind == "WINDOW_UPDATE" and not f.stream_id)
    assert received - opened < 1 << 24
    assert new.ended(Answered) == list(range(300))


# -- resets and GOAWAY ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [*range(len(CODES)), 0xABC], ids=[*CODES, "unknown"])
def test_a_reset_stream_was_not_processed_if_refused_and_is_unknown_otherwise(client: New, code: int) -> None:
    new = client().greeted().opened(3)
    new.receive(rst_stream(3, code), plain(1), plain(5))
    end = new.end(3)
    if code == CODES.index("REFUSED_STREAM"):
        assert isinstance(end, NotProcessed)
    else:
        assert isinstance(end, Unknown)
        assert (CODES[code] if code < len(CODES) else "0xabc") in end.why
    assert new.ended(Accepted) == [1, 5]
    assert new.frames() == [], "RST_STREAM is not answered"


def test_a_reset_after_the_answer_began_leaves_the_outcome_unknown(client: New) -> None:
    new = client().greeted().opened(1)
    new.receive(headers(1, OK, end=False), rst_stream(1, 2))
    assert isinstance(new.end(1), Unknown)


def test_a_reset_while_the_body_waits_ends_the_request_and_the_rest_is_not_sent(client: New) -> None:
    new = client().greeted(window=4)
    new.submit(requests([1], bodies=[b"abcdef"]))
    new.frames()
    new.receive(rst_stream(1, CODES.index("REFUSED_STREAM")), window_update(1, 100), settings(window=100))
    assert isinstance(new.end(1), NotProcessed)
    assert [frame.kind for frame in new.frames()] == ["SETTINGS"]


def test_a_reset_after_the_answer_changes_nothing(client: New) -> None:
    new = client().greeted().opened(1)
    new.receive(plain(1), rst_stream(1, 0))
    assert new.ended(Accepted) == [1]
    assert not new.failed


def test_goaway_hands_back_what_is_above_its_last_stream_and_the_rest_is_still_answered(client: New) -> None:
    new = client().greeted().opened(10)
    events = new.receive(goaway(7))
    assert GoAway(7, 0, b"") in events
    assert new.ended(NotProcessed) == [9, 11, 13, 15, 17, 19]
    new.receive(plain(1), rejection(3), plain(7), rst_stream(5, 8))
    assert (new.ended(Accepted), new.ended(Answered), new.ended(Unknown)) == ([1, 7], [3], [5])


def test_nothing_is_submitted_after_goaway(client: New) -> None:
    new = client().greeted().opened(1)
    new.receive(goaway(2**31 - 1))
    assert (new.core.usable, new.core.capacity) == (False, 0)
    assert new.submit(requests([3])) == 0
    new.receive(settings(max_streams=1000), plain(1))
    assert new.submit(requests([3])) == 0
    assert new.ended(Accepted) == [1]


def test_goaway_also_hands_back_requests_whose_body_waits_and_sends_no_more_of_it(client: New) -> None:
    new = client().greeted(window=4)
    new.submit(requests([1, 3], bodies=[b"abcdef"]))
    new.frames()
    new.receive(goaway(1), window_update(1, 10), window_update(3, 10))
    assert new.ended(NotProcessed) == [3]
    assert [(frame.stream_id, frame.payload) for frame in new.frames()] == [(1, b"ef")]


def test_a_second_goaway_may_hand_back_more(client: New) -> None:
    new = client().greeted().opened(5)
    new.receive(goaway(2**31 - 1))
    assert new.ended(NotProcessed) == []
    new.receive(goaway(5), plain(1))
    assert new.ended(NotProcessed) == [7, 9]
    new.receive(goaway(3))
    assert new.ended(NotProcessed) == [5, 7, 9]


def test_a_second_goaway_that_names_a_higher_stream_takes_nothing_back(client: New) -> None:
    new = client().greeted().opened(4)
    new.receive(goaway(3))
    new.receive(goaway(5), goaway(2**31 - 1))
    assert new.ended(NotProcessed) == [5, 7]
    new.receive(plain(1), plain(3))
    assert new.ended(Accepted) == [1, 3]


def test_goaway_tells_apples_reason_from_its_debug_data(client: New) -> None:
    new = client().greeted().opened(1)
    debug = b'{"reason":"BadCertificateEnvironment"}'
    assert GoAway(0, 0, debug) in new.receive(goaway(0, 0, debug))
    assert new.ended(NotProcessed) == [1]


def test_goaway_with_an_error_tells_its_name_to_those_handed_back(client: New) -> None:
    new = client().greeted().opened(2)
    debug = b"Maximum active streams violated for this endpoint."
    assert GoAway(1, 7, debug) in new.receive(goaway(1, 7, debug))
    end = new.end(3)
    assert isinstance(end, NotProcessed)
    assert "REFUSED_STREAM" in end.why


def test_frames_on_streams_that_goaway_handed_back_do_no_harm_to_the_others(client: New) -> None:
    new = client().greeted().opened(3)
    new.receive(goaway(1), rst_stream(3, 7), window_update(5, 9), plain(1))
    assert new.ended(Accepted) == [1]
    assert not new.failed


def test_our_own_goodbye_takes_no_more_and_waits_for_what_is_open(client: New) -> None:
    new = client().greeted().opened(1)
    new.core.goodbye()
    new.core.goodbye()
    (frame,) = new.frames()
    assert (frame.kind, frame.code) == ("GOAWAY", "NO_ERROR")
    assert new.submit(requests([3])) == 0
    new.receive(plain(1))
    assert new.ended(Accepted) == [1]


def test_a_connection_that_has_used_up_its_stream_ids_takes_no_more(client: New) -> None:
    new = client().greeted()
    new.core._next_id = 2**31 - 5
    assert (new.core.usable, new.core.capacity) == (True, 3)
    assert new.submit(requests(range(10))) == 3
    assert [one.stream_id for one in new.sent()] == [2**31 - 5, 2**31 - 3, 2**31 - 1]
    assert (new.core.usable, new.core.capacity) == (False, 0)
    assert new.submit(requests([10])) == 0
    new.receive(*[plain(stream_id, 0) for stream_id in (2**31 - 1, 2**31 - 5, 2**31 - 3)])
    assert new.ended(Accepted) == [0, 1, 2]


# -- time ----------------------------------------------------------------------------------------------------------


def test_a_request_that_is_not_answered_in_time_is_unknown_and_its_stream_is_given_up(client: New) -> None:
    new = client().greeted().opened(2)
    new.receive(plain(1), now=NOW + 29)
    assert new.tick(NOW + 29.9) == []
    new.tick(NOW + 30)
    assert new.ended(Unknown) == [3]
    assert [(frame.stream_id, frame.code) for frame in new.frames() if frame.kind == "RST_STREAM"] == [(3, "CANCEL")]
    assert new.receive(plain(3), now=NOW + 31) == [], "a late answer is ignored"
    assert not new.failed


def test_the_deadline_is_told(client: New) -> None:
    new = client().greeted().opened(1)
    new.receive(ping(), now=NOW + 20)
    assert new.core.wake_at() == NOW + 30


def test_each_request_has_its_own_deadline(client: New) -> None:
    new = client().greeted()
    for late in range(5):
        new.submit(requests([late]), NOW + late)
    new.receive(ping(), now=NOW + 29)
    for late in range(5):
        new.tick(NOW + late + 30)
        assert new.ended(Unknown) == list(range(late + 1))


def test_a_request_whose_body_waits_has_its_deadline_too(client: New) -> None:
    new = client().greeted(window=4)
    new.submit(requests([1], bodies=[b"abcdef"]))
    new.frames()
    new.receive(ping(), now=NOW + 29)
    new.tick(NOW + 30)
    assert new.ended(Unknown) == [1]
    new.receive(window_update(1, 10), now=NOW + 30)
    assert [frame.kind for frame in new.frames()] == ["PING", "RST_STREAM"]


def test_an_answer_that_began_has_to_end_in_time(client: New) -> None:
    new = client().greeted().opened(1)
    new.receive(headers(1, OK, end=False), now=NOW + 29)
    new.tick(NOW + 30)
    assert new.ended(Unknown) == [1]


def test_a_body_that_had_to_wait_keeps_its_requests_deadline(client: New) -> None:
    new = client().greeted(window=4)
    new.submit(requests([1], bodies=[b"abcdef"]))
    new.submit(requests([3], bodies=[b"abc"]), NOW + 1)
    new.receive(window_update(1, 10), now=NOW + 1)
    new.submit(requests([5], bodies=[b"abc"]), NOW + 2)
    new.receive(plain(3), plain(5), now=NOW + 29)
    new.tick(NOW + 30)
    assert new.ended(Unknown) == [1]


def test_an_interim_answer_keeps_its_requests_deadline(client: New) -> None:
    new = client().greeted().opened(1)
    new.submit(requests([3]), NOW + 1)
    new.receive(headers(1, block((b":status", b"103")), end=False), now=NOW + 1)
    new.submit(requests([5]), NOW + 2)
    new.receive(plain(3), plain(5), now=NOW + 29)
    new.tick(NOW + 30)
    assert new.ended(Unknown) == [1]


def test_settings_that_do_not_come_in_time_end_the_connection(client: New) -> None:
    new = client()
    assert new.core.wake_at() == NOW + 10
    assert new.tick(NOW + 9.9) == []
    new.tick(NOW + 10)
    assert new.failed
    assert new.frames()[-1].code == "SETTINGS_TIMEOUT"
    assert new.core.wake_at() is None


def test_silence_with_open_streams_is_broken_by_a_ping_and_a_pong_is_enough(client: New) -> None:
    new = client().greeted().opened(1)
    assert new.core.wake_at() == NOW + 15
    assert new.tick(NOW + 14.9) == []
    assert new.frames() == []
    new.tick(NOW + 15)
    (asked,) = new.frames()
    assert (asked.kind, asked.flags) == ("PING", ())
    assert new.core.wake_at() == NOW + 20
    assert new.receive(ping(asked.payload, ack=True), now=NOW + 19) == [Pong(asked.payload)]
    assert new.tick(NOW + 20) == []
    assert new.core.wake_at() == NOW + 30
    assert new.frames() == []


def test_anything_that_the_server_says_breaks_its_silence(client: New) -> None:
    new = client().greeted().opened(2)
    new.receive(plain(1), now=NOW + 10)
    assert new.tick(NOW + 24) == []
    assert new.frames() == []
    new.tick(NOW + 25)
    assert [frame.kind for frame in new.frames()] == ["PING"]
    new.receive(window_update(0, 1), now=NOW + 26)
    assert new.tick(NOW + 29.9) == []
    assert not new.failed


def test_a_ping_is_asked_once(client: New) -> None:
    new = client().greeted().opened(1)
    for late in range(15, 20):
        new.tick(NOW + late)
    assert [frame.kind for frame in new.frames()] == ["PING"]


def test_a_ping_that_is_not_answered_ends_the_connection_and_outcomes_are_unknown(client: New) -> None:
    new = client().greeted().opened(3)
    new.tick(NOW + 15)
    new.tick(NOW + 20)
    assert new.failed
    assert new.failed.ours
    assert new.ended(Unknown) == [1, 3, 5]
    assert new.submit(requests([7])) == 0


def test_a_connection_without_streams_is_asked_after_an_hour(client: New) -> None:
    new = client().greeted()
    assert new.core.wake_at() == NOW + 3600
    assert new.tick(NOW + 3599) == []
    assert new.frames() == []
    new.tick(NOW + 3600)
    assert [frame.kind for frame in new.frames()] == ["PING"]
    new.tick(NOW + 3605)
    assert new.failed


def test_a_header_block_that_does_not_end_in_time_ends_the_connection(client: New) -> None:
    new = client().greeted().opened(1)
    new.receive(headers(1, OK, whole=False), now=NOW + 1)
    assert new.core.wake_at() == NOW + 11
    new.receive(continuation(1, b"", whole=False), now=NOW + 10)
    new.tick(NOW + 11)
    assert new.failed
    assert new.ended(Unknown) == [1]


def test_a_lost_connection_leaves_outcomes_unknown(client: New) -> None:
    new = client().greeted(window=4)
    new.submit(requests([1, 3], bodies=[b"abc", b"abcdef"]))
    new.receive(headers(1, OK, end=False))
    events = new.eof()
    assert new.ended(Unknown) == [1, 3]
    assert isinstance(events[-1], Failed)
    assert not events[-1].ours
    assert new.eof() == []


def test_requests_that_were_never_taken_are_in_no_event(client: New) -> None:
    new = client().greeted(max_streams=2)
    assert new.submit(requests([1, 3, 5])) == 2
    new.eof()
    assert new.ended(Unknown) == [1, 3]


# -- malformed answers ---------------------------------------------------------------------------------------------

MALFORMED: dict[str, bytes] = {
    "no fields": headers(1, b""),
    "no status": headers(1, block((b"apns-id", b"x"))),
    "status twice": headers(1, OK + OK),
    "status of two digits": headers(1, block((b":status", b"20"))),
    "status of four digits": headers(1, block((b":status", b"2000"))),
    "status not a number": headers(1, block((b":status", b"2x0"))),
    "status below 100": headers(1, block((b":status", b"099"))),
    "empty status": headers(1, block((b":status", b""))),
    "status after a field": headers(1, block((b"server", b"x"), (b":status", b"200"))),
    "a pseudo-field of requests": headers(1, OK + block((b":path", b"/"))),
    "an unknown pseudo-field": headers(1, OK + block((b":reason", b"x"))),
    "a pseudo-field among the others": headers(1, OK + block((b"server", b"x"), (b":reason", b"x"))),
    "an upper-case name": headers(1, OK + block((b"Apns-Id", b"x"))),
    "an empty name": headers(1, OK + block((b"", b"x"))),
    "a space in a name": headers(1, OK + block((b"apns id", b"x"))),
    "a colon in a name": headers(1, OK + block((b"apns:id", b"x"))),
    "a control character in a name": headers(1, OK + block((b"apns\x01id", b"x"))),
    "DEL in a name": headers(1, OK + block((b"apns\x7fid", b"x"))),
    "a name beyond ASCII": headers(1, OK + block((b"apns\xe9id", b"x"))),
    "a line feed at the end of a name": headers(1, OK + block((b"apns-id\n", b"x"))),
    "NUL in a value": headers(1, OK + block((b"server", b"a\0b"))),
    "CR in a value": headers(1, OK + block((b"server", b"a\rb"))),
    "LF in a value": headers(1, OK + block((b"server", b"a\nb"))),
    "a space before a value": headers(1, OK + block((b"server", b" x"))),
    "a space after a value": headers(1, OK + block((b"server", b"x "))),
    "a tab before a value": headers(1, OK + block((b"server", b"\tx"))),
    "connection": headers(1, OK + block((b"connection", b"close"))),
    "keep-alive": headers(1, OK + block((b"keep-alive", b"5"))),
    "proxy-connection": headers(1, OK + block((b"proxy-connection", b"close"))),
    "transfer-encoding": headers(1, OK + block((b"transfer-encoding", b"chunked"))),
    "upgrade": headers(1, OK + block((b"upgrade", b"websocket"))),
    "content-length not a number": headers(1, OK + block((b"content-length", b"+0"))),
    "empty content-length": headers(1, OK + block((b"content-length", b""))),
    "content-length without end": headers(1, OK + block((b"content-length", b"0" * 5000))),
    "two content-lengths": headers(1, OK + block((b"content-length", b"1"), (b"content-length", b"2"))),
    "content-length without DATA": headers(1, OK + block((b"content-length", b"1"))),
    "less DATA than content-length": headers(1, OK + block((b"content-length", b"3")), end=False)
    + data(1, b"ab", end=True),
    "more DATA than content-length": headers(1, OK + block((b"content-length", b"1")), end=False)
    + data(1, b"ab", end=True),
    "less DATA than content-length, then trailers": headers(1, OK + block((b"content-length", b"3")), end=False)
    + data(1, b"ab")
    + headers(1, b""),
    "a pseudo-field in trailers": headers(1, OK, end=False) + headers(1, OK),
    "an upper-case name in trailers": headers(1, OK, end=False) + headers(1, block((b"X", b"x"))),
    "a connection's field in trailers": headers(1, OK, end=False) + headers(1, block((b"upgrade", b"x"))),
    "trailers that do not end": headers(1, OK, end=False) + headers(1, block((b"x", b"x")), end=False),
    "an interim answer that ends": headers(1, block((b":status", b"103"))),
    "switching protocols": headers(1, block((b":status", b"101")), end=False),
    "DATA before the answer": data(1, b"x", end=True),
    "DATA after an interim answer": headers(1, block((b":status", b"100")), end=False) + data(1, b"x", end=True),
}


@pytest.mark.parametrize("octets", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_answer_leaves_its_outcome_unknown_and_resets_its_stream_only(client: New, octets: bytes) -> None:
    new = client().greeted().opened(2)
    new.receive(octets)
    assert new.ended(Unknown) == [1]
    assert [(frame.kind, frame.stream_id, frame.code) for frame in new.frames()] == [
        ("RST_STREAM", 1, "PROTOCOL_ERROR")
    ]
    new.receive(plain(3), data(1, b"late"), headers(1, b""))
    assert new.ended(Accepted) == [3]
    assert not new.failed


@pytest.mark.parametrize("octets", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_answer_is_told_as_well_while_the_body_waits(client: New, octets: bytes) -> None:
    new = client().greeted(window=3)
    new.submit(requests([1]))
    new.frames()
    new.receive(octets, window_update(1, 1000))
    assert new.ended(Unknown) == [1]
    assert [(frame.kind, frame.stream_id) for frame in new.frames()] == [("RST_STREAM", 1)]


def first_block(octets: bytes) -> bytes:
    return octets[9 : 9 + int.from_bytes(octets[:3], "big")]


AS_200 = {
    name: first_block(octets)
    for name, octets in MALFORMED.items()
    if octets[3:5] == b"\x01\x05" and first_block(octets).startswith(OK)
}


@pytest.mark.parametrize("fields", AS_200.values(), ids=AS_200)
def test_a_malformed_200_is_none_however_often_it_comes(client: New, fields: bytes) -> None:
    new = client().greeted().opened(20)
    new.receive(*[headers(stream_id, fields + literal(b"apns-id", apns_id(1))) for stream_id in range(1, 40, 2)])
    assert new.ended(Unknown) == list(range(1, 40, 2))


def test_more_fields_than_we_take_leave_the_outcome_unknown(client: New) -> None:
    new = client().greeted().opened(2)
    entry = literal(b"x" * 3000, b"", first=0x40)
    new.receive(headers(1, OK + entry + b"\xbe" * 30), plain(3))
    assert new.ended(Unknown) == [1]
    assert [(frame.stream_id, frame.code) for frame in new.frames()] == [(1, "ENHANCE_YOUR_CALM")]
    assert new.ended(Accepted) == [3]


def test_a_304_or_an_answer_to_nobody_may_name_a_length_that_does_not_come(client: New) -> None:
    new = client().greeted().opened(1)
    new.receive(headers(1, block((b":status", b"304"), (b"content-length", b"12"))))
    assert new.ended(Answered) == [1]


def test_a_window_update_of_0_on_a_stream_resets_that_stream(client: New) -> None:
    new = client().greeted(window=3)
    new.submit(requests([1, 3], bodies=[b"abcdef", b"abc"]))
    new.frames()
    new.receive(window_update(1, 0), plain(3))
    assert [(frame.stream_id, frame.code) for frame in new.frames()] == [(1, "PROTOCOL_ERROR")]
    assert (new.ended(Unknown), new.ended(Accepted)) == ([1], [3])


def test_a_window_that_overflows_while_the_body_waits_for_the_connection_resets_the_stream(client: New) -> None:
    new = client().greeted(window=2**31 - 1)
    new.submit(requests([1], bodies=[b"x" * 70_000]))
    new.frames()
    new.receive(window_update(1, 65_536))
    assert [(frame.stream_id, frame.code) for frame in new.frames()] == [(1, "FLOW_CONTROL_ERROR")]
    assert new.ended(Unknown) == [1]


# -- what ends the connection --------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[bytes, str]] = {
    "DATA on stream 0": (data(0, b"x"), "PROTOCOL_ERROR"),
    "HEADERS on stream 0": (headers(0, OK), "PROTOCOL_ERROR"),
    "PRIORITY on stream 0": (priority(0, 1), "PROTOCOL_ERROR"),
    "RST_STREAM on stream 0": (rst_stream(0, 8), "PROTOCOL_ERROR"),
    "CONTINUATION on stream 0": (continuation(0, OK), "PROTOCOL_ERROR"),
    "SETTINGS on a stream": (raw(4, 0, 1), "PROTOCOL_ERROR"),
    "PING on a stream": (raw(6, 0, 1, bytes(8)), "PROTOCOL_ERROR"),
    "GOAWAY on a stream": (raw(7, 0, 1, bytes(8)), "PROTOCOL_ERROR"),
    "PUSH_PROMISE": (raw(5, 4, 1, b"\0\0\0\2" + OK), "PROTOCOL_ERROR"),
    "PUSH_PROMISE on stream 0": (raw(5, 4, 0, b"\0\0\0\2" + OK), "PROTOCOL_ERROR"),
    "a frame that is too large": (raw(0, 0, 1, bytes(16_385)), "FRAME_SIZE_ERROR"),
    "an unknown frame that is too large": (raw(0xBB, 0, 1, bytes(16_385)), "FRAME_SIZE_ERROR"),
    "HEADERS that are too large": (raw(1, 5, 1, bytes(16_385)), "FRAME_SIZE_ERROR"),
    "SETTINGS of 5 octets": (raw(4, 0, 0, bytes(5)), "FRAME_SIZE_ERROR"),
    "a SETTINGS acknowledgement with content": (raw(4, 1, 0, bytes(6)), "FRAME_SIZE_ERROR"),
    "PING of 7 octets": (raw(6, 0, 0, bytes(7)), "FRAME_SIZE_ERROR"),
    "PING of 9 octets": (raw(6, 0, 0, bytes(9)), "FRAME_SIZE_ERROR"),
    "RST_STREAM of 3 octets": (raw(3, 0, 1, bytes(3)), "FRAME_SIZE_ERROR"),
    "RST_STREAM of 5 octets": (raw(3, 0, 1, bytes(5)), "FRAME_SIZE_ERROR"),
    "WINDOW_UPDATE of 3 octets": (raw(8, 0, 0, bytes(3)), "FRAME_SIZE_ERROR"),
    "WINDOW_UPDATE of 5 octets on a stream": (raw(8, 0, 1, bytes(5)), "FRAME_SIZE_ERROR"),
    "PRIORITY of 4 octets": (raw(2, 0, 1, bytes(4)), "FRAME_SIZE_ERROR"),
    "GOAWAY of 7 octets": (raw(7, 0, 0, bytes(7)), "FRAME_SIZE_ERROR"),
    "padded DATA without its padding's length": (raw(0, 8, 1), "FRAME_SIZE_ERROR"),
    "padded HEADERS without their padding's length": (raw(1, 8 | 5, 1), "FRAME_SIZE_ERROR"),
    "DATA that is all padding and more": (raw(0, 8, 1, b"\4abc"), "PROTOCOL_ERROR"),
    "HEADERS that are all padding and more": (raw(1, 8 | 5, 1, b"\2" + OK), "PROTOCOL_ERROR"),
    "HEADERS too short for their priority": (raw(1, 0x20 | 5, 1, bytes(4)), "FRAME_SIZE_ERROR"),
    "a stream that depends on itself": (priority(1, 1), "PROTOCOL_ERROR"),
    "an answer whose stream depends on itself": (headers(1, OK, priority=b"\0\0\0\1\x0f"), "PROTOCOL_ERROR"),
    "a block broken off by DATA": (headers(1, OK, whole=False) + data(1), "PROTOCOL_ERROR"),
    "a block broken off by HEADERS": (headers(1, OK, whole=False) + headers(1, OK), "PROTOCOL_ERROR"),
    "a block broken off by a plain answer": (headers(1, OK, whole=False) + plain(3), "PROTOCOL_ERROR"),
    "a block broken off by PING": (headers(1, OK, whole=False) + ping(), "PROTOCOL_ERROR"),
    "a block broken off by an unknown frame": (headers(1, OK, whole=False) + raw(0xBB, 0, 0), "PROTOCOL_ERROR"),
    "a block that goes on elsewhere": (headers(1, OK, whole=False) + continuation(3, OK), "PROTOCOL_ERROR"),
    "CONTINUATION after a whole block": (headers(1, OK, end=False) + continuation(1, b""), "PROTOCOL_ERROR"),
    "index 0": (headers(1, b"\x80"), "COMPRESSION_ERROR"),
    "an index behind the table": (headers(1, b"\xbe"), "COMPRESSION_ERROR"),
    "a name's index behind the table": (headers(1, b"\x0f\x40\x01x"), "COMPRESSION_ERROR"),
    "a block that ends inside a field": (headers(1, OK + b"\0\7apns"), "COMPRESSION_ERROR"),
    "a Huffman string with bad padding": (headers(1, OK + b"\0\1x\x81\0"), "COMPRESSION_ERROR"),
    "a table larger than we allow": (headers(1, integer(4097, 5, 0x20) + OK), "COMPRESSION_ERROR"),
    "a size update behind a field": (headers(1, OK + b"\x20"), "COMPRESSION_ERROR"),
    "a block that never ends": (
        headers(1, b"", whole=False) + continuation(1, bytes(16_000), whole=False) * 5,
        "ENHANCE_YOUR_CALM",
    ),
    "a window update of 0 on the connection": (window_update(0, 0), "PROTOCOL_ERROR"),
    "a connection's window beyond all bounds": (window_update(0, 2**31 - 1), "FLOW_CONTROL_ERROR"),
    "DATA on a stream that was not opened": (data(99, b"x"), "PROTOCOL_ERROR"),
    "an answer on a stream that was not opened": (headers(99, OK), "PROTOCOL_ERROR"),
    "RST_STREAM on a stream that was not opened": (rst_stream(99, 8), "PROTOCOL_ERROR"),
    "WINDOW_UPDATE on a stream that was not opened": (window_update(99, 8), "PROTOCOL_ERROR"),
    "a stream of the server's own": (headers(2, OK), "PROTOCOL_ERROR"),
    "DATA on a stream of the server's own": (data(2, b"x"), "PROTOCOL_ERROR"),
    "a server that allows push": (settings(enable_push=1), "PROTOCOL_ERROR"),
    "push neither on nor off": (settings(enable_push=2), "PROTOCOL_ERROR"),
    "an initial window beyond all bounds": (settings(window=2**31), "FLOW_CONTROL_ERROR"),
    "a frame size that is too small": (settings(max_frame=16_383), "PROTOCOL_ERROR"),
    "a frame size that is too large": (settings(max_frame=1 << 24), "PROTOCOL_ERROR"),
    "DATA after the answer": (plain(1) + data(1, b"x"), "STREAM_CLOSED"),
    "a second answer": (plain(1) + plain(1), "STREAM_CLOSED"),
    "an answer after a reset": (rst_stream(1, 8) + plain(1), "STREAM_CLOSED"),
}


@pytest.mark.parametrize("octets,code", BROKEN.values(), ids=BROKEN)
def test_a_broken_connection_says_why_and_every_outcome_is_unknown(client: New, octets: bytes, code: str) -> None:
    new = client().greeted().opened(20)
    new.receive(octets, plain(5))
    assert new.failed
    assert new.failed.ours
    assert new.failed.why
    last = new.frames()[-1]
    assert (last.kind, last.code) == ("GOAWAY", code)
    assert CODES[new.failed.code] == code
    assert new.core.over
    assert (new.core.usable, new.core.capacity, new.submit(requests([100]))) == (False, 0, 0)
    assert new.ended(Unknown) == [key for key in range(1, 40, 2) if key > 1 or not new.ended(Accepted)]
    assert new.core.wake_at() is None
    assert new.tick(NOW + 10_000) == []
    assert new.core.data_to_send() == b""


@pytest.mark.parametrize(
    "octets",
    [ping(), SETTINGS_ACK, headers(1, OK), window_update(0, 1), raw(0xBB, 0, 0), b"HTTP/1.1 400 Bad Request\r\n\r\n"],
    ids=["PING", "SETTINGS acknowledgement", "HEADERS", "WINDOW_UPDATE", "unknown kind", "HTTP/1.1"],
)
def test_a_server_that_does_not_begin_with_settings_is_none(client: New, octets: bytes) -> None:
    new = client()
    new.receive(octets)
    assert new.failed
    assert new.frames()[-1].code in ("PROTOCOL_ERROR", "FRAME_SIZE_ERROR")


def test_an_initial_window_that_makes_an_open_streams_window_too_large_ends_the_connection(client: New) -> None:
    new = client().greeted(window=65_535)
    new.submit(requests([1], bodies=[b"x" * 70_000]))
    new.receive(window_update(1, 65_536), settings(window=2**31 - 1))
    assert new.frames()[-1].code == "FLOW_CONTROL_ERROR"
    assert new.ended(Unknown) == [1]


def test_answers_before_the_fault_still_count(client: New) -> None:
    new = client().greeted().opened(30)
    new.receive(*[plain(stream_id) for stream_id in range(1, 40, 2)], rejection(41), raw(6, 0, 0, b"bad"), plain(43))
    assert new.ended(Accepted) == list(range(1, 40, 2))
    assert new.ended(Answered) == [41]
    assert new.ended(Unknown) == list(range(43, 60, 2))


# -- the small change ----------------------------------------------------------------------------------------------


def test_pings_are_answered_with_the_same_octets(client: New) -> None:
    new = client().greeted()
    assert new.receive(ping(b"hullo\0\0\1")) == []
    (pong,) = new.frames()
    assert (pong.kind, pong.flags, pong.payload) == ("PING", ("ACK",), b"hullo\0\0\1")


def test_our_own_ping_brings_a_pong(client: New) -> None:
    new = client().greeted()
    new.core.ping(b"are you?")
    (asked,) = new.frames()
    assert (asked.kind, asked.payload) == ("PING", b"are you?")
    assert new.receive(ping(b"are you?", ack=True)) == [Pong(b"are you?")]


def test_priority_and_unknown_frames_are_passed_over(client: New) -> None:
    new = client().greeted().opened(1)
    new.receive(
        priority(1), priority(99, 1), priority(2, 4), raw(0x0A, 0xFF, 1, b"altsvc"), raw(0xF0, 0, 0, bytes(100))
    )
    new.receive(plain(1))
    assert new.ended(Accepted) == [1]


def test_octets_to_send_are_given_once(client: New) -> None:
    new = client()
    assert new.core.data_to_send()
    assert new.core.data_to_send() == b""
