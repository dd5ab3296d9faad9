"""Our client role against foreign HTTP/2 servers over real sockets: every request has one end, and the right one."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import h2.events
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection

from tests.peers.conftest import Pki
from tests.peers.courier import BODIES, Book, apns_id, deliver
from tests.peers.foreign import HERE, Ledger, build_go, listening, serving
from tests.programs import need

COUNT = 3_000
GONE = b'{"reason":"Unregistered","timestamp":1700000000000}'


def free_port() -> int:
    """For a server that cannot be asked which port it took."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def tokens(count: int, **kinds: range) -> list[str]:
    """Device tokens, of which the servers in this folder treat those with a special beginning specially."""
    found = [f"{place:064x}" for place in range(count)]
    for kind, places in kinds.items():
        for place in places:
            found[place] = f"{kind}{place:x}"
    return found


def check(book: Book, ledger: Ledger) -> None:
    """What we think became of each request is what the server did."""
    assert not book.flying
    for key, token in enumerate(book.tokens):
        acted = ledger.acted.get(apns_id(key), 0)
        if key in book.answers:
            assert acted == 1, f"request {key} was answered, and acted on {acted} times"
            expected = (410, GONE) if token.startswith("dead") else (200, b"{}" if token.startswith("hint") else b"")
            assert book.answers[key] == expected
        elif key in book.unknown:
            assert acted <= 1
        else:
            assert acted == 0, f"request {key} was acted on, and taken for not processed"


@pytest.mark.peer("nghttpd")
@pytest.mark.parametrize(
    "options",
    [
        "",
        "-m 1",
        "-m 1000",
        "-b 200",
        "-w 10 -W 16",
        "-c 0 --encoder-header-table-size=0",
        "--no-content-length --trailer x-late:1",
        "--early-response",
    ],
)
async def test_nghttpd_echoes_each_body_to_the_request_it_came_with(options: str, pki: Pki, tmp_path: Path) -> None:
    port = free_port()
    command: list[str | Path] = [need("nghttpd"), "--echo-upload", "-a", "127.0.0.1", "-d", tmp_path, *options.split()]
    async with listening([*command, str(port), pki.key, pki.certificate], port):
        book = await deliver(tokens(COUNT), port, pki.client())
    assert (book.unknown, book.handed_back) == (set(), 0)
    for key in range(COUNT):
        assert book.answers[key] == (200, BODIES[key % len(BODIES)])


@pytest.mark.peer("nghttpd")
async def test_nghttpd_may_be_spoken_to_without_tls(tmp_path: Path) -> None:
    port = free_port()
    command: list[str | Path] = [
        need("nghttpd"),
        "--no-tls",
        "--echo-upload",
        "-a",
        "127.0.0.1",
        "-d",
        tmp_path,
        str(port),
    ]
    async with listening(command, port):
        book = await deliver(tokens(COUNT), port, None)
    assert [book.answers[key] for key in range(3)] == [(200, body) for body in BODIES]


@pytest.mark.peer("go")
@pytest.mark.parametrize("streams", [1, 7, 250, 1000])
async def test_go_answers_every_request_once(streams: int, pki: Pki) -> None:
    sent = tokens(COUNT, dead=range(0, COUNT, 5), hint=range(1, COUNT, 50))
    async with go_server(pki, streams) as ledger:
        book = await deliver(sent, ledger.port, pki.client())
    assert (len(book.answers), book.handed_back) == (COUNT, 0)
    check(book, ledger)


@pytest.mark.peer("go")
async def test_a_request_that_gos_handler_aborts_is_unknown(pki: Pki) -> None:
    aborted = range(3, COUNT, 10)
    async with go_server(pki, 250) as ledger:
        book = await deliver(tokens(COUNT, abort=aborted), ledger.port, pki.client())
    assert book.unknown == set(aborted)
    assert len(book.answers) == COUNT - len(aborted)
    check(book, ledger)


@pytest.mark.peer("go")
async def test_a_go_server_that_shuts_down_answers_what_it_took_and_the_rest_is_still_ours(pki: Pki) -> None:
    async with go_server(pki, 100) as ledger:
        book = await deliver(tokens(COUNT, bye=range(500, 501)), ledger.port, pki.client())
    assert book.goaways
    assert 501 <= len(book.answers) < COUNT
    assert len(book.answers) + len(book.waiting) == COUNT
    check(book, ledger)


@pytest.mark.peer("node")
@pytest.mark.parametrize("padding", [(), ("padded",)], ids=["plain", "padded"])
@pytest.mark.parametrize("streams", [1, 7, 1000])
async def test_node_answers_every_request_once(streams: int, padding: tuple[str, ...], pki: Pki) -> None:
    sent = tokens(COUNT, dead=range(0, COUNT, 5), hint=range(1, COUNT, 50))
    async with node_server(pki, streams, *padding) as ledger:
        book = await deliver(sent, ledger.port, pki.client())
    assert (len(book.answers), book.handed_back) == (COUNT, 0)
    check(book, ledger)


@pytest.mark.peer("node")
async def test_a_stream_limit_that_falls_and_rises_again_is_never_exceeded(pki: Pki) -> None:
    sent = tokens(COUNT, fewer=range(100, COUNT, 400), more=range(300, COUNT, 400))
    async with node_server(pki, 500) as ledger:
        book = await deliver(sent, ledger.port, pki.client())
    # What crossed with the new limit on the wire, Node refuses; beyond one that we acknowledged it ends the connection.
    assert len(book.answers) == COUNT
    check(book, ledger)


@pytest.mark.peer("node")
async def test_streams_that_node_refuses_are_not_processed_and_those_it_breaks_off_are_unknown(pki: Pki) -> None:
    aborted, refused = range(3, COUNT, 10), range(5, COUNT, 10)
    async with node_server(pki, 1000) as ledger:
        book = await deliver(tokens(COUNT, abort=aborted, refuse=refused), ledger.port, pki.client())
    assert book.unknown == set(aborted)
    assert book.handed_back == len(refused)
    assert len(book.answers) == COUNT - len(aborted)
    check(book, ledger)


@pytest.mark.peer("node")
async def test_goaway_hands_back_what_came_after_the_last_stream_and_nothing_is_sent_twice(pki: Pki) -> None:
    sent = tokens(COUNT, bye=range(200, COUNT, 500))
    async with node_server(pki, 100) as ledger:
        book = await deliver(sent, ledger.port, pki.client(), connections=20)
    assert book.finished
    assert (len(book.answers), book.unknown) == (COUNT, set())
    assert book.handed_back > 0
    assert {event.debug for event in book.goaways} == {b'{"reason":"Shutdown"}'}
    check(book, ledger)


def go_server(pki: Pki, streams: int) -> AbstractAsyncContextManager[Ledger]:
    return serving(build_go("go", "./server"), pki.certificate, pki.key, str(streams))


def node_server(pki: Pki, streams: int, *options: str) -> AbstractAsyncContextManager[Ledger]:
    return serving(need("node"), HERE / "node" / "server.mjs", pki.certificate, pki.key, str(streams), *options)


class Miser:
    """h2 as a server that answers at once, and opens the connection's window when nothing is left of it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._h2 = H2Connection(H2Configuration(client_side=False, header_encoding=False))
        self._unread = 0

    async def serve(self) -> None:
        self._h2.initiate_connection()
        self._writer.write(self._h2.data_to_send())
        while octets := await self._reader.read(2**16):
            for event in self._h2.receive_data(octets):
                if isinstance(event, h2.events.DataReceived):
                    self._unread += event.flow_controlled_length
                elif isinstance(event, h2.events.StreamEnded):
                    self._h2.send_headers(event.stream_id, [(b":status", b"200")], end_stream=True)
            self._writer.write(self._h2.data_to_send())
            await self._writer.drain()
            if not self._h2.inbound_flow_control_window and not self._h2.open_inbound_streams:
                self._h2.increment_flow_control_window(self._unread)
                self._unread = 0
                # In a segment of its own, so that no answer comes with it.
                await asyncio.sleep(0.01)
                self._writer.write(self._h2.data_to_send())
        self._writer.close()


async def test_sending_goes_on_when_the_connections_window_opens_after_the_last_answer() -> None:
    server = await asyncio.start_server(lambda reader, writer: Miser(reader, writer).serve(), "127.0.0.1", 0)
    # 257 times 255 octets are the whole window, so that nothing at all is left of it.
    async with server, asyncio.timeout(10):
        book = await deliver(tokens(600), server.sockets[0].getsockname()[1], None, bodies=[b"b" * 255])
    assert len(book.answers) == 600
