"""Apple's binary interface against its pages: which octets mean what, and which mistake draws which status.

Expected rows come from what was drawn or written by hand, never from the reader itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliograph.protocols.binary import (
    ERROR_PACKET_OCTETS,
    EXPIRATION,
    IDENTIFIER,
    MAX_PAYLOAD_BYTES,
    MAX_TOKEN_BYTES,
    PAYLOAD,
    PRIORITY,
    TOKEN,
    ErrorReader,
    ErrorResponse,
    FeedbackReader,
    FrameReader,
    Frames,
    Status,
    enhanced_frame,
    error_packet,
    feedback_tuples,
    item_frame,
    items,
    simple_frame,
)

Row = tuple[bytes, bytes, int, int | None, int | None]
"""Token, payload, identifier, expiration, priority."""

TOKEN_32 = b"0123456789abcdef" * 4
RAW_32 = bytes.fromhex(TOKEN_32.decode())
HELLO = b'{"aps":{"alert":"Hello"}}'
MAX_UINT32 = 2**32 - 1

LONGEST_FRAME = 5 + 3 + MAX_TOKEN_BYTES + 3 + MAX_PAYLOAD_BYTES + 3 + 4 + 3 + 4 + 3 + 1


def rows(frames: Frames) -> list[Row]:
    return list(
        zip(
            frames.tokens,
            frames.payloads,
            frames.identifiers,
            frames.expirations,
            frames.priorities,
            strict=True,
        )
    )


def read(pieces: Iterable[bytes], reader: FrameReader | None = None) -> tuple[list[Row], ErrorResponse | None]:
    """Everything that a connection takes, and its one error."""
    reader = reader or FrameReader()
    taken: list[Row] = []
    error = None
    for piece in pieces:
        frames, now = reader.receive(piece)
        assert error is None or (not frames and now is None), "something came after the error"
        assert reader.held < LONGEST_FRAME
        taken += rows(frames)
        error = error or now
    return taken, error


def octets(stream: bytes) -> list[bytes]:
    return [stream[at : at + 1] for at in range(len(stream))]


def split(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    return [stream[start:stop] for start, stop in pairwise(places)]


def item(kind: int, data: bytes) -> bytes:
    return struct.pack(">BH", kind, len(data)) + data


def framed(body: bytes, size: int | None = None) -> bytes:
    return struct.pack(">BI", 2, len(body) if size is None else size) + body


# -- what is drawn ----------------------------------------------------------------------------------------------------

TOKENS = st.one_of(st.just(32), st.integers(1, MAX_TOKEN_BYTES)).flatmap(
    lambda size: st.binary(min_size=size, max_size=size).map(lambda token: token.hex().encode())
)
PAYLOADS = st.one_of(
    st.binary(min_size=1, max_size=60),
    st.sampled_from([255, 256, 257, 2048, 4096, MAX_PAYLOAD_BYTES]).map(lambda size: b"\x02" * size),
)
UINT32 = st.one_of(st.sampled_from([0, 1, 255, 2**31 - 1, 2**31, MAX_UINT32]), st.integers(0, MAX_UINT32))

Sent = tuple[bytes, Row]


@st.composite
def sound_frames(draw: st.DrawFn) -> Sent:
    """A sound frame, and the row that it has to give."""
    token, payload = draw(TOKENS), draw(PAYLOADS)
    command = draw(st.sampled_from([0, 1, 1, 2]))
    if command == 0:
        return simple_frame(token, payload), (token, payload, 0, None, None)
    identifier, expiration = draw(UINT32), draw(UINT32)
    if command == 1:
        return enhanced_frame(token, payload, identifier, expiration), (token, payload, identifier, expiration, None)
    priority = draw(st.sampled_from([1, 5, 10]))
    chosen = items(token, payload, identifier, expiration, priority)
    kept = {TOKEN, PAYLOAD, *draw(st.sets(st.sampled_from([IDENTIFIER, EXPIRATION, PRIORITY])))}
    chosen = [each for each in chosen if each[0] in kept]
    if len(payload) < 1000:
        unknown = st.tuples(st.sampled_from([0, 6, 7, 255]), st.binary(max_size=20))
        chosen += draw(st.lists(unknown, max_size=3))
    chosen = draw(st.permutations(chosen))
    row = (
        token,
        payload,
        identifier if IDENTIFIER in kept else 0,
        expiration if EXPIRATION in kept else None,
        priority if PRIORITY in kept else None,
    )
    return item_frame(chosen), row


CUTS = st.lists(st.integers(0, 20_000), max_size=30)

# -- frames as Apple's pages lay them out, by hand --------------------------------------------------------------------

SIMPLE_BY_HAND = b"\x00" + b"\x00\x20" + RAW_32 + b"\x00\x19" + HELLO
ENHANCED_BY_HAND = (
    b"\x01" + b"\x00\x00\x04\xd2" + b"\x65\x53\xf1\x00" + b"\x00\x20" + RAW_32 + b"\x00\x19" + HELLO
)  # fmt: skip
ITEMS_BY_HAND = (
    b"\x02" + b"\x00\x00\x00\x51"
    + b"\x01" + b"\x00\x20" + RAW_32
    + b"\x02" + b"\x00\x19" + HELLO
    + b"\x03" + b"\x00\x04" + b"\x00\x00\x04\xd2"
    + b"\x04" + b"\x00\x04" + b"\x65\x53\xf1\x00"
    + b"\x05" + b"\x00\x01" + b"\x05"
)  # fmt: skip


def test_frames_by_hand_are_read_as_apples_pages_lay_them_out() -> None:
    assert read([SIMPLE_BY_HAND + ENHANCED_BY_HAND + ITEMS_BY_HAND]) == (
        [
            (TOKEN_32, HELLO, 0, None, None),
            (TOKEN_32, HELLO, 1234, 1_700_000_000, None),
            (TOKEN_32, HELLO, 1234, 1_700_000_000, 5),
        ],
        None,
    )


def test_frames_are_built_as_apples_pages_lay_them_out() -> None:
    assert simple_frame(TOKEN_32, HELLO) == SIMPLE_BY_HAND
    assert enhanced_frame(TOKEN_32, HELLO, 1234, 1_700_000_000) == ENHANCED_BY_HAND
    assert item_frame(items(TOKEN_32, HELLO, 1234, 1_700_000_000, 5)) == ITEMS_BY_HAND
    assert item_frame(items(TOKEN_32, HELLO)) == framed(item(1, RAW_32) + item(2, HELLO))


# -- what is taken ----------------------------------------------------------------------------------------------------


@given(st.lists(sound_frames(), max_size=12), CUTS)
def test_sound_frames_of_all_commands_are_taken_however_they_are_cut(sent: list[Sent], cuts: list[int]) -> None:
    stream = b"".join(frame for frame, _ in sent)
    expected = [row for _, row in sent]
    reader = FrameReader()
    assert read(split(stream, cuts), reader) == (expected, None)
    assert reader.held == 0


@given(st.lists(sound_frames(), min_size=1, max_size=3))
def test_an_octet_at_a_time_gives_the_same_as_one_packet(sent: list[Sent]) -> None:
    stream = b"".join(frame for frame, _ in sent)
    assert read(octets(stream)) == read([stream]) == ([row for _, row in sent], None)


@pytest.mark.parametrize("size", range(1, MAX_TOKEN_BYTES + 1))
def test_tokens_of_1_to_100_octets_are_taken(size: int) -> None:
    token = bytes(range(size)).hex().encode()
    stream = simple_frame(token, HELLO) + enhanced_frame(token, HELLO, 1, 0) + item_frame(items(token, HELLO))
    taken, error = read([stream])
    assert error is None
    assert [row[0] for row in taken] == [token] * 3


def test_thousands_of_frames_in_one_packet_are_taken_in_order() -> None:
    makers = [
        lambda i: enhanced_frame(TOKEN_32, b"%d" % i, i, i + 1),
        lambda i: simple_frame(TOKEN_32, b"%d" % i),
        lambda i: item_frame(items(TOKEN_32, b"%d" % i, i)),
    ]
    taken, error = read([b"".join(makers[i * i % 5 % 3](i) for i in range(3000))])
    assert error is None
    assert [row[1] for row in taken] == [b"%d" % i for i in range(3000)]


def test_an_identifier_cut_to_the_octets_it_needs_is_taken() -> None:
    frame = framed(item(TOKEN, RAW_32) + item(PAYLOAD, HELLO) + item(IDENTIFIER, b"\x07"))
    assert read([frame]) == ([(TOKEN_32, HELLO, 7, None, None)], None)


def test_unknown_items_are_skipped_even_twice_or_empty() -> None:
    frame = framed(item(9, b"") + item(TOKEN, RAW_32) + item(9, b"x" * 50) + item(PAYLOAD, HELLO) + item(0, b"y"))
    assert read(octets(frame)) == ([(TOKEN_32, HELLO, 0, None, None)], None)


# -- what is refused --------------------------------------------------------------------------------------------------

HEAD_1 = b"\x01\x00\x00\x00\x09\x00\x00\x00\x00"
"""Command 1, identifier 9, expiration 0."""
ID_9 = item(IDENTIFIER, b"\x00\x00\x00\x09")
T, P = item(TOKEN, RAW_32), item(PAYLOAD, HELLO)
SIZE_OF_100 = b"\x00\x64"
TOO_LONG = b" " * (MAX_PAYLOAD_BYTES + 1)

MISTAKES = [
    # what is wrong, the frame's octets as far as they matter, status, identifier
    ("command 0 without a token", b"\x00\x00\x00", 2, 0),
    ("command 0 with a token of 101 octets", b"\x00\x00\x65", 5, 0),
    ("command 0 with a token of 65535 octets", b"\x00\xff\xff", 5, 0),
    ("command 0 without a payload", b"\x00\x00\x20" + RAW_32 + b"\x00\x00", 4, 0),
    ("command 0 with a payload one octet too long", b"\x00\x00\x20" + RAW_32 + b"\x14\x01", 7, 0),
    ("command 1 without a token", HEAD_1 + b"\x00\x00", 2, 9),
    ("command 1 with nothing at all", HEAD_1 + b"\x00\x00\x00\x00", 2, 9),
    ("command 1 with a token of 101 octets", HEAD_1 + b"\x00\x65", 5, 9),
    ("command 1 with a token too long and no payload", HEAD_1 + b"\x00\x65" + b"x" * 101 + b"\x00\x00", 5, 9),
    ("command 1 without a payload", HEAD_1 + b"\x00\x20" + RAW_32 + b"\x00\x00", 4, 9),
    ("command 1 without a payload, token of 100", HEAD_1 + SIZE_OF_100 + b"x" * 100 + b"\x00\x00", 4, 9),
    ("command 1 with a payload one octet too long", HEAD_1 + b"\x00\x20" + RAW_32 + b"\x14\x01", 7, 9),
    ("command 1 with a payload of 65535 octets", HEAD_1 + b"\x00\x20" + RAW_32 + b"\xff\xff", 7, 9),
    ("command 2 with no items", framed(b""), 2, 0),
    ("command 2 with only an identifier", framed(ID_9), 2, 9),
    ("command 2 without a token", framed(P + ID_9), 2, 9),
    ("command 2 with an empty token", framed(item(TOKEN, b"") + P + ID_9), 2, 9),
    ("command 2 with neither", framed(item(TOKEN, b"") + ID_9 + item(PAYLOAD, b"")), 2, 9),
    ("command 2 with a token of 101 octets", framed(item(TOKEN, b"x" * 101) + P + ID_9), 5, 9),
    ("command 2 with a bad token and no payload", framed(item(TOKEN, b"x" * 101) + ID_9), 5, 9),
    ("command 2 without a payload", framed(T + ID_9), 4, 9),
    ("command 2 with an empty payload", framed(ID_9 + item(PAYLOAD, b"") + T), 4, 9),
    ("command 2 with a payload one octet too long", framed(T + item(PAYLOAD, TOO_LONG) + ID_9), 7, 9),
    ("command 2 with a payload far too long", framed(T + item(PAYLOAD, TOO_LONG * 3) + ID_9), 7, 9),
    ("the same, identifier first", framed(ID_9 + T + item(PAYLOAD, b" " * 65535)), 7, 9),
    ("the same, without an identifier", framed(T + item(PAYLOAD, b" " * 65535)), 7, 0),
    ("command 2 with priority 0", framed(T + P + ID_9 + item(PRIORITY, b"\x00")), 1, 9),
    ("command 2 with priority 7", framed(item(PRIORITY, b"\x07") + T + P + ID_9), 1, 9),
    ("command 2 with bad priority and no token", framed(item(PRIORITY, b"\x07") + P + ID_9), 2, 9),
    ("command 2 with two tokens", framed(T + T + P + ID_9), 128, 9),
    ("command 2 with two payloads", framed(T + P + P + ID_9), 128, 9),
    ("command 2 with two identifiers: the first", framed(ID_9 + T + P + item(IDENTIFIER, b"\x08")), 128, 9),
    ("command 2 with two expirations", framed(T + P + ID_9 + item(EXPIRATION, b"\0\0\0\1") * 2), 128, 9),
    ("command 2 with two priorities", framed(T + P + ID_9 + item(PRIORITY, b"\x0a") * 2), 128, 9),
    ("command 2 with an identifier of 5 octets", framed(T + P + item(IDENTIFIER, b"\0\0\0\0\1")), 128, 0),
    ("command 2 with an empty identifier", framed(T + P + item(IDENTIFIER, b"")), 128, 0),
    ("command 2 with an expiration of 8 octets", framed(T + P + ID_9 + item(EXPIRATION, bytes(8))), 128, 9),
    ("command 2 with an empty priority", framed(T + P + ID_9 + item(PRIORITY, b"")), 128, 9),
    ("command 2 with an item past its end", framed(ID_9 + T + b"\x02\x00\x1a" + HELLO), 128, 9),
    ("command 2 that ends in an item's kind", framed(T + P + ID_9 + b"\x05"), 128, 9),
    ("command 2 that ends in an item's length", framed(T + P + ID_9 + b"\x05\x00"), 128, 9),
    ("command 2 with a length a little too short", framed(ID_9 + T + P, len(ID_9 + T + P) - 1), 128, 9),
    ("command 2 with a length no payload can give", b"\x02\xff\xff\xff\xff", 128, 0),
    ("command 2 with a little-endian length", b"\x02\x51\x00\x00\x00", 128, 0),
    ("a frame too long, with an item past its end", framed(T + b"\x02\xff\xff", 6000), 128, 0),
    ("a frame too long, with an item past its end by one", framed(T + b"\x02\x17\x4b", 6000), 128, 0),
    ("too long, and ends in an item's length", framed(T + item(PAYLOAD, TOO_LONG * 2) + b"\x05\x00"), 128, 0),
    ("a frame too long, with an identifier of 5", framed(T + b"\x03\x00\x05", 6000), 128, 0),
    ("too long, and ends in an item's kind", framed(T + item(PAYLOAD, TOO_LONG * 2) + b"\x05"), 128, 0),
    ("command 3", b"\x03", 128, 0),
    ("command 8, which is the gateway's", b"\x08\x08\x00\x00\x00\x01", 128, 0),
    ("command 255", b"\xff", 128, 0),
    ("HTTP", b"POST /3/device/", 128, 0),
    ("TLS within TLS", b"\x16\x03\x01", 128, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    "frame,status,identifier", [pytest.param(*rest, id=name) for name, *rest in MISTAKES]
)  # fmt: skip
def test_mistake_draws_its_status_and_what_came_before_is_taken(frame: bytes, status: int, identifier: int) -> None:
    before, after = ENHANCED_BY_HAND, SIMPLE_BY_HAND * 3
    expected = ([(TOKEN_32, HELLO, 1234, 1_700_000_000, None)], ErrorResponse(status, identifier))
    stream = before + frame + after
    assert read([stream]) == expected
    assert read([before, frame, after]) == expected
    assert read(octets(stream)) == expected
    cuts = range(len(before) - 1, len(before) + min(len(frame), 300) + 2)
    assert all(read(split(stream, [cut])) == expected for cut in cuts)


@pytest.mark.parametrize("name,frame", [each[:2] for each in MISTAKES])
def test_mistake_is_told_without_waiting_for_what_follows(name: str, frame: bytes) -> None:
    reader = FrameReader()
    assert reader.receive(frame)[1] is not None
    assert reader.held == 0


@given(st.lists(sound_frames(), max_size=6), st.sampled_from(MISTAKES), st.lists(sound_frames(), max_size=3), CUTS)
def test_everything_before_a_bad_frame_is_taken_and_nothing_after_it(
    before: list[Sent], mistake: tuple[str, bytes, int, int], after: list[Sent], cuts: list[int]
) -> None:
    _, bad, status, identifier = mistake
    stream = b"".join([*(frame for frame, _ in before), bad, *(frame for frame, _ in after)])
    assert read(split(stream, cuts)) == ([row for _, row in before], ErrorResponse(status, identifier))


@pytest.mark.parametrize(
    "limits,size,plain,with_items",
    [
        ({"max_payload": 256, "max_item_payload": 2048}, 256, None, None),
        ({"max_payload": 256, "max_item_payload": 2048}, 257, 7, None),
        ({"max_payload": 256, "max_item_payload": 2048}, 2048, 7, None),
        ({"max_payload": 256, "max_item_payload": 2048}, 2049, 7, 7),
        ({"max_payload": 2048, "max_item_payload": 256}, 257, None, 7),
        ({"max_payload": 2048, "max_item_payload": 256}, 2049, 7, 7),
        ({}, 4096, None, None),
        ({}, 5120, None, None),
        ({}, 5121, 7, 7),
    ],
)
def test_payload_limits_are_those_that_were_asked_for(
    limits: dict[str, int], size: int, plain: int | None, with_items: int | None
) -> None:
    def status(frame: bytes) -> int | None:
        taken, error = read(octets(frame), FrameReader(**limits))
        assert len(taken) == (error is None)
        return error.status if error else None

    payload = b" " * size
    assert status(simple_frame(TOKEN_32, payload)) == plain
    assert status(enhanced_frame(TOKEN_32, payload, 1, 0)) == plain
    assert status(item_frame(items(TOKEN_32, payload, 1, 0, 10))) == with_items


# -- hostile peers ----------------------------------------------------------------------------------------------------

LONG_TOKEN = b"ab" * MAX_TOKEN_BYTES


@pytest.mark.parametrize(
    "frame",
    [
        simple_frame(LONG_TOKEN, b"x" * MAX_PAYLOAD_BYTES),
        enhanced_frame(LONG_TOKEN, b"x" * MAX_PAYLOAD_BYTES, 1, 1),
        item_frame(items(LONG_TOKEN, b"x" * MAX_PAYLOAD_BYTES, 1, 1, 10)),
    ],
    ids=["command 0", "command 1", "command 2"],
)
def test_an_unfinished_frame_is_counted_to_the_octet(frame: bytes) -> None:
    reader = FrameReader()
    for count, octet in enumerate(octets(frame[:-1]), 1):
        assert reader.receive(octet) == (Frames([], [], [], [], []), None)
        assert reader.held == count < LONGEST_FRAME
    frames, error = reader.receive(frame[-1:])
    assert (len(frames), error, reader.held) == (1, None, 0)


def test_a_frame_too_long_is_never_held_and_never_looks_idle() -> None:
    body = T + item(PAYLOAD, b" " * 65535)
    reader = FrameReader()
    stream = framed(body)
    for octet in octets(stream[:5]):
        reader.receive(octet)
    for octet in octets(stream[5:-1]):
        assert reader.receive(octet)[1] is None
        assert 0 < reader.held < 16
    assert reader.receive(stream[-1:])[1] == ErrorResponse(Status.INVALID_PAYLOAD_SIZE, 0)


def test_a_frame_too_long_made_of_empty_items_ends_without_being_held() -> None:
    reader = FrameReader()
    stream = framed(item(99, b"") * 20_000)
    taken, error = read(split(stream, range(0, len(stream), 7)), reader)
    assert (taken, error) == ([], ErrorResponse(Status.INVALID_PAYLOAD_SIZE, 0))


def test_nothing_is_kept_of_what_comes_after_the_error() -> None:
    reader = FrameReader()
    assert reader.receive(b"\xff")[1] == ErrorResponse(Status.PROTOCOL_ERROR, 0)
    for _ in range(1000):
        frames, error = reader.receive(ENHANCED_BY_HAND * 10)
        assert (len(frames), error, reader.held) == (0, None, 0)


@st.composite
def spoilt_streams(draw: st.DrawFn) -> bytes:
    """Sound frames with octets changed, cut out and put in."""
    stream = bytearray().join(frame for frame, _ in draw(st.lists(sound_frames(), min_size=1, max_size=5)))
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(stream)))
        kind = draw(st.sampled_from(["change", "cut", "put"]))
        if kind == "change":
            stream[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del stream[at : at + draw(st.integers(1, 50))]
        else:
            stream[at:at] = draw(st.binary(min_size=1, max_size=12))
    return bytes(stream)


@given(st.one_of(spoilt_streams(), st.binary(max_size=400)), CUTS)
def test_any_octets_give_rows_and_one_error_at_most_whatever_the_cuts(stream: bytes, cuts: list[int]) -> None:
    whole = read([stream])
    assert read(split(stream, cuts)) == whole
    for token, payload, identifier, expiration, priority in whole[0]:
        assert 1 <= len(bytes.fromhex(token.decode())) <= MAX_TOKEN_BYTES
        assert 1 <= len(payload) <= MAX_PAYLOAD_BYTES
        assert 0 <= identifier <= MAX_UINT32
        assert expiration is None or 0 <= expiration <= MAX_UINT32
        assert priority in (None, 1, 5, 10)
    assert whole[1] is None or whole[1].status in {1, 2, 4, 5, 7, 128}


def test_frames_do_not_show_tokens_or_payloads() -> None:
    frames, _ = FrameReader().receive(ENHANCED_BY_HAND)
    assert repr(frames) == "<1 frames>"


# -- error packets ----------------------------------------------------------------------------------------------------

CODES = {
    0: "NO_ERROR",
    1: "PROCESSING_ERROR",
    2: "MISSING_TOKEN",
    3: "MISSING_TOPIC",
    4: "MISSING_PAYLOAD",
    5: "INVALID_TOKEN_SIZE",
    6: "INVALID_TOPIC_SIZE",
    7: "INVALID_PAYLOAD_SIZE",
    8: "INVALID_TOKEN",
    10: "SHUTDOWN",
    128: "PROTOCOL_ERROR",
    255: "UNKNOWN",
}


def test_statuses_are_those_of_apples_table() -> None:
    assert {status.value: status.name for status in Status} == CODES


def test_error_packet_is_command_8_status_and_identifier() -> None:
    assert error_packet(Status.INVALID_TOKEN, 0x01020304) == b"\x08\x08\x01\x02\x03\x04"
    assert error_packet(Status.SHUTDOWN, 0) == b"\x08\x0a\x00\x00\x00\x00"
    assert len(error_packet(Status.UNKNOWN, MAX_UINT32)) == ERROR_PACKET_OCTETS


@given(st.integers(0, 255), UINT32, st.lists(st.integers(0, 12)), st.binary(max_size=5))
def test_error_packet_is_read_once_in_pieces_and_the_rest_ignored(
    status: int, identifier: int, cuts: list[int], more: bytes
) -> None:
    reader = ErrorReader()
    answers = [reader.receive(piece) for piece in split(error_packet(status, identifier) + more, cuts)]
    assert [each for each in answers if each] == [ErrorResponse(status, identifier)]


def test_what_is_no_error_packet_says_nothing_of_any_frame() -> None:
    reader = ErrorReader()
    assert reader.receive(b"HTTP/") is None
    assert reader.receive(b"1.1") == ErrorResponse(Status.UNKNOWN, 0)


# -- feedback ---------------------------------------------------------------------------------------------------------


def test_feedback_tuple_is_time_length_and_token() -> None:
    assert feedback_tuples([1_700_000_000], [TOKEN_32]) == b"\x65\x53\xf1\x00" + b"\x00\x20" + RAW_32
    assert feedback_tuples([], []) == b""


@given(st.lists(st.tuples(UINT32, st.binary(max_size=200)), max_size=10), CUTS)
def test_feedback_is_read_as_it_was_written_however_it_is_cut(
    removals: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    times = [time for time, _ in removals]
    tokens = [token.hex().encode() for _, token in removals]
    reader = FeedbackReader()
    seen = [reader.receive(piece) for piece in split(feedback_tuples(times, tokens), cuts)]
    assert [time for column, _ in seen for time in column] == times
    assert [token for _, column in seen for token in column] == tokens
    assert reader.held == 0


def test_feedback_cut_short_is_seen() -> None:
    reader = FeedbackReader()
    stream = feedback_tuples([1, 2], [b"aa", b"bbcc"])
    assert reader.receive(stream[:-1]) == ([1], [b"aa"])
    assert reader.held == 7
    assert reader.receive(stream[-1:]) == ([2], [b"bbcc"])


def test_feedback_time_past_2106_does_not_keep_others_from_being_told() -> None:
    reader = FeedbackReader()
    assert reader.receive(feedback_tuples([2**40, 5], [b"aa", b"bb"])) == ([MAX_UINT32, 5], [b"aa", b"bb"])


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_any_octets_give_feedback_without_an_exception(pieces: list[bytes]) -> None:
    reader = FeedbackReader()
    for piece in pieces:
        times, tokens = reader.receive(piece)
        assert len(times) == len(tokens)
        assert reader.held < 6 + 65_535
