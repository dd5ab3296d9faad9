"""Clients that try to cost our server role more than they pay: each is cut off in time, and little is kept of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from struct import pack

import pytest
from hpack import Encoder

from heliograph.net import http2
from heliograph.net.http2 import Link
from heliograph.protocols.http2 import Answer, ErrorCode, Event, Failed, Request, ServerConnection
from heliograph.protocols.http2 import frames as f

NOW = 1_000.0
KEPT_AT_MOST = 64 << 20
"""Octets that a connection may hold, whatever its client does."""
REQUEST = [(b":method", b"POST"), (b":scheme", b"https"), (b":path", b"/3/device/ab"), (b":authority", b"localhost")]


class Attacker:
    """A client that says what it likes, and the connection that has to bear it."""

    def __init__(self, *, polite: bool = True, answers: bytes | None = None) -> None:
        self.core = ServerConnection(NOW)
        self.encoder = Encoder()
        self.answers = answers
        """What requests are answered with at once; None: not at all."""
        self.output = 0
        self.ended_by: ErrorCode | None = None
        self.send(f.PREFACE + f.settings({}) + (f.SETTINGS_ACK if polite else b""))

    def send(self, octets: bytes, now: float = NOW) -> list[Event]:
        events = self.core.receive(octets, now)
        if self.answers is not None:
            requests = [event.stream_id for event in events if isinstance(event, Request)]
            self.core.respond([Answer(stream_id, 200, (), self.answers) for stream_id in requests])
        self.note(events)
        return events

    def note(self, events: list[Event]) -> None:
        self.output += len(self.core.data_to_send())
        for event in events:
            if isinstance(event, Failed):
                self.ended_by = ErrorCode(event.code)

    def request(self, stream_id: int, *more: tuple[bytes, bytes], end: bool = True) -> bytes:
        return f.header_block(stream_id, self.encoder.encode([*REQUEST, *more]), 16_384, end_stream=end)

    def flood(self, waves: Iterator[bytes], at_most: int) -> int:
        """Send waves until the connection ends; how many it took. Fails where `at_most` did not end it."""
        for sent, wave in enumerate(islice(waves, at_most), 1):
            self.send(wave)
            if self.ended_by is not None:
                return sent
        pytest.fail(f"still there after {at_most} waves and {self.output} octets of output")


@pytest.fixture(autouse=True)
def little_is_kept() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < KEPT_AT_MOST, f"{peak >> 20} MB at the worst"


def ids() -> Iterator[int]:
    return count(1, 2)


def test_rapid_reset_is_cut_off() -> None:
    attacker = Attacker()
    waves = (attacker.request(stream_id) + f.rst_stream(stream_id, ErrorCode.CANCEL) for stream_id in ids())
    assert attacker.flood(waves, 300) <= 201
    assert attacker.ended_by == ErrorCode.ENHANCE_YOUR_CALM


def test_rapid_reset_of_answered_requests_is_cut_off() -> None:
    attacker = Attacker(answers=b"")
    waves = (attacker.request(stream_id) + f.rst_stream(stream_id, ErrorCode.CANCEL) for stream_id in ids())
    assert attacker.flood(waves, 300) <= 201
    assert attacker.ended_by == ErrorCode.ENHANCE_YOUR_CALM


MADE_YOU_RESET: dict[str, Callable[[Attacker, int], bytes]] = {
    "window update of 0": lambda _, stream_id: f.window_update(stream_id, 0),
    "window overflow": lambda _, stream_id: f.window_update(stream_id, f.MAX_WINDOW),
    "headers after the end": lambda attacker, stream_id: attacker.request(stream_id),
    "data after the end": lambda _, stream_id: f.frame(f.DATA, f.END_STREAM, stream_id, b"more"),
}


@pytest.mark.parametrize("fault", MADE_YOU_RESET)
def test_making_the_server_reset_is_cut_off_as_rapid_reset_is(fault: str) -> None:
    attacker = Attacker()
    waves = (attacker.request(stream_id) + MADE_YOU_RESET[fault](attacker, stream_id) for stream_id in ids())
    assert attacker.flood(waves, 300) <= 201
    assert attacker.ended_by == ErrorCode.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    "field",
    [(b"connection", b"close"), (b"content-length", b"7"), (b"X-Upper", b"1"), (b"te", b"gzip")],
    ids=lambda field: field[0].decode(),
)
def test_malformed_requests_are_cut_off(field: tuple[bytes, bytes]) -> None:
    attacker = Attacker()
    assert attacker.flood((attacker.request(stream_id, field) for stream_id in ids()), 300) <= 201
    assert attacker.ended_by == ErrorCode.ENHANCE_YOUR_CALM


def test_streams_beyond_the_limit_are_cut_off() -> None:
    attacker = Attacker()
    assert attacker.flood(map(attacker.request, ids()), 2_000) <= 1_201
    assert attacker.ended_by == ErrorCode.ENHANCE_YOUR_CALM


def test_streams_beyond_the_limit_are_cut_off_even_if_our_settings_are_never_acknowledged() -> None:
    attacker = Attacker(polite=False)
    attacker.flood(map(attacker.request, ids()), 4_000)
    assert attacker.ended_by in {ErrorCode.ENHANCE_YOUR_CALM, ErrorCode.PROTOCOL_ERROR, ErrorCode.SETTINGS_TIMEOUT}


def test_streams_after_our_goaway_are_cut_off() -> None:
    attacker = Attacker()
    attacker.core.goaway()
    attacker.flood(map(attacker.request, ids()), 20_000)
    assert attacker.ended_by == ErrorCode.ENHANCE_YOUR_CALM


@pytest.mark.parametrize("size", [0, 1, 63, 64, 1_000, 16_384])
def test_a_header_block_without_end_is_cut_off(size: int) -> None:
    attacker = Attacker()
    attacker.send(f.frame(f.HEADERS, 0, 1, b""))
    part = f.frame(f.CONTINUATION, 0, 1, b"\0" * size)
    assert attacker.flood((part for _ in count()), 2_000) <= 1_025
    assert attacker.ended_by == ErrorCode.ENHANCE_YOUR_CALM


def test_an_hpack_bomb_costs_no_memory_and_is_cut_off() -> None:
    attacker = Attacker()
    large = b"x" * 3_900

    def bombs() -> Iterator[bytes]:
        # One octet stands for 3,900: 15 MB in a block of 4 kB.
        first = attacker.encoder.encode([*REQUEST, (b"x-large", large)])
        yield f.header_block(1, first, 16_384, end_stream=True)
        for stream_id in count(3, 2):
            block = attacker.encoder.encode(REQUEST) + b"\xbe" * 4_000
            yield f.header_block(stream_id, block, 16_384, end_stream=True)

    assert attacker.flood(bombs(), 300) <= 202
    assert attacker.ended_by == ErrorCode.ENHANCE_YOUR_CALM


def test_after_a_header_list_that_is_too_large_the_next_request_is_understood() -> None:
    attacker = Attacker()
    fields = [*REQUEST, *[(b"x-%d" % place, b"z" * 40) for place in range(1_500)]]
    block = attacker.encoder.encode(fields)
    assert len(block) < 65_536
    assert attacker.send(f.header_block(1, block, 16_384, end_stream=True)) == []
    events = attacker.send(attacker.request(3, (b"x-1499", b"z" * 40)))
    assert [(event.stream_id, event.fields[-1]) for event in events if isinstance(event, Request)] == [
        (3, (b"x-1499", b"z" * 40))
    ]


CONTROL: dict[str, bytes] = {
    "PING": f.frame(f.PING, 0, 0, bytes(8)),
    "PING acknowledgement": f.frame(f.PING, f.ACK, 0, bytes(8)),
    "SETTINGS": f.settings({}),
    "SETTINGS acknowledgement": f.SETTINGS_ACK,
    "WINDOW_UPDATE": f.window_update(0, 1),
    "WINDOW_UPDATE of a stream": f.window_update(1, 1),
    "WINDOW_UPDATE of a closed stream": f.window_update(3, 1),
    "PRIORITY": f.frame(f.PRIORITY, 0, 1, bytes(5)),
    "PRIORITY of an idle stream": f.frame(f.PRIORITY, 0, 99, bytes(5)),
    "empty DATA": f.frame(f.DATA, 0, 1, b""),
    "DATA of padding only": f.frame(f.DATA, f.PADDED, 1, b"\0"),
    "GOAWAY": f.goaway(0, 0),
    "unknown": f.frame(0xEE, 0, 0, b""),
    "RST_STREAM of a closed stream": f.rst_stream(3, 0),
}


@pytest.mark.parametrize("kind", CONTROL)
def test_a_flood_of_control_frames_is_cut_off(kind: str) -> None:
    attacker = Attacker()
    attacker.send(attacker.request(1, end=False))
    attacker.send(attacker.request(3) + f.rst_stream(3, 0))
    assert attacker.flood((CONTROL[kind] for _ in count()), 2_000) <= 1_000
    assert attacker.ended_by == ErrorCode.ENHANCE_YOUR_CALM
    assert attacker.output < 64_000


@pytest.mark.parametrize("kind", ["PING", "SETTINGS", "WINDOW_UPDATE", "empty DATA", "PRIORITY"])
def test_a_flood_in_one_read_is_cut_off_and_answers_little(kind: str) -> None:
    attacker = Attacker()
    attacker.send(attacker.request(1, end=False))
    attacker.send(CONTROL[kind] * 100_000)
    assert attacker.ended_by == ErrorCode.ENHANCE_YOUR_CALM
    assert attacker.output < 64_000


def test_settings_are_counted_by_what_is_in_them() -> None:
    # Each change of the initial window touches every open stream: 2,730 changes a frame times 1,000 streams.
    attacker = Attacker()
    for stream_id in islice(ids(), 1_000):
        attacker.send(attacker.request(stream_id))
    changes = b"".join(pack(">HI", f.INITIAL_WINDOW_SIZE, value % 2) for value in range(2_730))
    assert attacker.flood((f.frame(f.SETTINGS, 0, 0, changes) for _ in count()), 20) <= 10
    assert attacker.ended_by == ErrorCode.ENHANCE_YOUR_CALM


def test_control_frames_that_come_with_work_are_no_flood() -> None:
    attacker = Attacker(answers=b"{}")
    for stream_id in islice(ids(), 5_000):
        octets = attacker.request(stream_id, end=False)
        octets += f.window_update(stream_id, 10) + f.window_update(0, 10)
        attacker.send(octets + f.frame(f.DATA, f.END_STREAM, stream_id, b"{}"))
    assert attacker.ended_by is None


def test_a_budget_is_for_ten_seconds_and_then_there_is_a_new_one() -> None:
    attacker = Attacker()
    for second in range(60):
        attacker.send(CONTROL["PING"] * 90, NOW + second)
    assert attacker.ended_by is None


def test_resets_within_the_budget_go_on_for_ever() -> None:
    attacker = Attacker()
    for place, stream_id in enumerate(islice(ids(), 600)):
        attacker.send(attacker.request(stream_id) + f.rst_stream(stream_id, ErrorCode.CANCEL), NOW + place / 18)
    assert attacker.ended_by is None


def test_answers_that_no_window_lets_out_are_given_up_in_time() -> None:
    attacker = Attacker(answers=b"b" * 1_000)
    attacker.send(f.settings({f.INITIAL_WINDOW_SIZE: 0}))
    for stream_id in islice(ids(), 1_000):
        attacker.send(attacker.request(stream_id))
    assert attacker.core.open_streams == 1_000
    assert attacker.core.wake_at() == NOW + attacker.core.limits.message_s
    attacker.note(attacker.core.tick(NOW + attacker.core.limits.message_s))
    assert attacker.core.open_streams == 0
    assert attacker.ended_by == ErrorCode.ENHANCE_YOUR_CALM


def test_a_body_that_dribbles_is_given_up_in_time() -> None:
    attacker = Attacker()
    attacker.send(attacker.request(1, end=False))
    for second in range(30):
        attacker.send(f.frame(f.DATA, 0, 1, b"d"), NOW + second)
        assert attacker.core.tick(NOW + second) == []
    assert attacker.core.open_streams == 1
    attacker.note(attacker.core.tick(NOW + 30))
    assert attacker.core.open_streams == 0


def test_a_header_block_that_dribbles_is_given_up_in_time() -> None:
    attacker = Attacker()
    attacker.send(f.frame(f.HEADERS, 0, 1, b"\x83"))
    for second in range(9):
        attacker.send(f.frame(f.CONTINUATION, 0, 1, b"\x87"), NOW + second)
        attacker.note(attacker.core.tick(NOW + second))
    assert attacker.ended_by is None
    attacker.note(attacker.core.tick(NOW + 10))
    assert attacker.ended_by is not None


@pytest.mark.parametrize("octets", [b"", f.PREFACE[:10], f.PREFACE, f.PREFACE + f.settings({})[:8]], ids=len)
def test_a_client_that_does_not_greet_is_given_up_in_time(octets: bytes) -> None:
    core = ServerConnection(NOW)
    assert core.receive(octets, NOW) == []
    assert core.wake_at() == NOW + 10
    assert [type(event) for event in core.tick(NOW + 10)] == [Failed]


def test_an_idle_client_is_told_to_go_after_a_minute() -> None:
    attacker = Attacker()
    assert attacker.core.wake_at() == NOW + 60
    assert attacker.core.tick(NOW + 59.9) == []
    attacker.note(attacker.core.tick(NOW + 60))
    assert attacker.ended_by == ErrorCode.NO_ERROR


def test_as_many_and_as_large_requests_as_are_allowed_fit_into_memory() -> None:
    attacker = Attacker()
    own = count()
    for stream_id in islice(ids(), 1_000):
        fields = [(b"x-%d" % place, b"%060d" % next(own) * 120) for place in range(8)]
        block = Encoder().encode([*REQUEST, *fields], huffman=False)
        attacker.send(f.header_block(stream_id, block, 16_384, end_stream=False))
        attacker.send(f.frame(f.DATA, 0, stream_id, b"d" * 16_000))
        if attacker.ended_by is not None:
            break


def test_requests_of_any_size_in_one_read_are_taken_without_growth() -> None:
    attacker = Attacker(answers=b"{}")
    octets = b"".join(
        attacker.request(stream_id, end=False) + f.frame(f.DATA, f.END_STREAM, stream_id, b"d" * 4_096)
        for stream_id in islice(ids(), 1_000)
    )
    assert len(attacker.send(octets)) == 1_000
    assert attacker.core.open_streams == 0


class Generous:
    """A session that answers each request with a kilobyte."""

    def __init__(self, link: Link[ServerConnection]) -> None:
        self.link = link
        self.requests = 0
        self.most_unsent = 0

    def on_events(self, events: Sequence[Event]) -> None:
        requests = [event.stream_id for event in events if isinstance(event, Request)]
        self.requests += len(requests)
        self.link.core.respond([Answer(stream_id, 200, (), b"b" * 1_000) for stream_id in requests])
        self.link.flush()
        self.most_unsent = max(self.most_unsent, self.link._transport.get_write_buffer_size())

    def on_writable(self) -> None:
        pass

    def on_close(self) -> None:
        pass


async def test_a_client_that_reads_no_answers_is_not_read_from_and_is_shed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "UNREAD_S", 0.2)
    monkeypatch.setattr(http2, "_TICK_S", 0.02)
    sessions: list[Generous] = []

    def new_session(link: Link[ServerConnection]) -> Generous:
        sessions.append(Generous(link))
        return sessions[-1]

    listener = await http2.listen(new_session, tls=None)
    encoder = Encoder()
    first, again = encoder.encode(REQUEST), encoder.encode(REQUEST)
    asked = 1
    loop = asyncio.get_running_loop()
    with socket.socket() as client, contextlib.suppress(ConnectionError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", listener.port))
        greeting = f.settings({f.INITIAL_WINDOW_SIZE: f.MAX_WINDOW}) + f.window_update(0, 1 << 30)
        await loop.sock_sendall(client, f.PREFACE + greeting + f.header_block(1, first, 16_384, end_stream=True))
        while not sessions or not sessions[0].link.closed.done():
            stream_ids = range(2 * asked + 1, 2 * asked + 201, 2)
            # The server stops reading, so that this waits until the server gives up.
            await loop.sock_sendall(client, b"".join([f.frame(f.HEADERS, 5, id_, again) for id_ in stream_ids]))
            asked += 100
            await asyncio.sleep(0)
    await sessions[0].link.closed
    assert 100 < sessions[0].requests < asked
    assert sessions[0].most_unsent < 8 << 20
    await listener.aclose()
