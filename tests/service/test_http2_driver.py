"""The driver over real sockets, on asyncio's loop and on uvloop's, with TLS and without."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trustme
import uvloop

from heliograph.net import http2
from heliograph.net.http2 import Link, Listener, connect, listen
from heliograph.protocols.http2 import (
    Accepted,
    Answer,
    Answered,
    ClientConnection,
    ErrorCode,
    Event,
    Failed,
    GoAway,
    Key,
    Limits,
    NotProcessed,
    Request,
    Requests,
    ServerConnection,
    SettingsChanged,
    Template,
    Unknown,
)
from tests.wire import frames_by_hand as by_hand
from tests.wire.frames_by_hand import PREFACE, SETTINGS_ACK, block, data, headers, ping, settings, window_update

PATIENCE_S = 20.0
"""After this a test gives up; on any machine that is not broken, nothing takes so long."""
BODY = b'{"aps":{"alert":"Hello"}}'
ASKED = block((b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", b"/3/device/aa"))

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def run_it(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def patiently() -> None:
            async with asyncio.timeout(PATIENCE_S):
                await scenario()

        with asyncio.Runner(loop_factory=request.param) as runner:
            trouble: list[dict[str, Any]] = []
            runner.get_loop().set_exception_handler(lambda _, context: trouble.append(context))
            runner.run(patiently())
            assert not trouble

    return run_it


class Tls:
    """Both ends of TLS: contexts of a server and of a client that trusts it."""

    def __init__(self) -> None:
        self.ca = trustme.CA()
        self.certificate = self.ca.issue_cert("localhost", "127.0.0.1")

    def server(self, *alpn: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.certificate.configure_cert(context)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context

    def client(self, *, trusting: bool = True) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(["h2"])
        if trusting:
            self.ca.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def tls() -> Tls:
    return Tls()


class Session:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ends: dict[Key, Event] = {}
        self.writable = 0
        """How often we were told that we may write again."""
        self.closed = 0
        self._news = asyncio.Event()

    def on_events(self, events: Sequence[Event]) -> None:
        assert not self.closed, "nothing is told after the end"
        self.events += events
        for event in events:
            keys = [event.key] if isinstance(event, Answered) else getattr(event, "keys", [])
            for key in keys:
                assert key not in self.ends
                self.ends[key] = event
        self._news.set()

    def on_writable(self) -> None:
        self.writable += 1
        self._news.set()

    def on_close(self) -> None:
        self.closed += 1
        self._news.set()

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._news.clear()
            await self._news.wait()

    def told(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


class Client(Session):
    """Sends requests over our own client link."""

    link: Link[ClientConnection]

    def submit(self, keys: Sequence[int], body: bytes = BODY) -> int:
        template = Template(b"localhost", b"/3/device/", (), (b"apns-id",))
        paths, suffixes = [b"%064x" % key for key in keys], [b"%036d" % key for key in keys]
        now = asyncio.get_running_loop().time()
        taken = self.link.core.submit(Requests(template, keys, paths, [body], ((),), (b"",), suffixes), now)
        self.link.flush()
        return taken

    async def greeted(self) -> Client:
        await self.until(lambda: bool(self.told(SettingsChanged)))
        return self


class Server(Session):
    """Answers requests at once with 200 and `body`; or later, where `patient`."""

    def __init__(self, link: Link[ServerConnection], body: bytes, *, patient: bool) -> None:
        super().__init__()
        self.link = link
        self.body = body
        self.patient = patient

    def on_events(self, events: Sequence[Event]) -> None:
        super().on_events(events)
        if not self.patient:
            self.answer([event.stream_id for event in events if isinstance(event, Request)])

    async def asked_for(self, count: int) -> None:
        """Until so many requests have come."""
        await self.until(lambda: len(self.told(Request)) == count)

    def answer(self, streams: Sequence[int]) -> None:
        self.link.core.respond([Answer(stream_id, 200, (), self.body) for stream_id in streams])
        self.link.flush()


class Stranger:
    """A peer made of a socket: it reads and writes only when told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read_to_the_end(self) -> bytes:
        octets = b""
        try:
            while more := await self.reader.read(1 << 20):
                octets += more
        except ConnectionResetError:
            pass
        return octets

    def leave(self) -> None:
        self.writer.transport.abort()


class House:
    """A listener and the sessions of those who came."""

    listener: Listener

    def __init__(self) -> None:
        self.sessions: list[Server] = []
        self._came = asyncio.Event()
        self._strangers: list[Stranger] = []

    def enter(self, session: Server) -> Server:
        self.sessions.append(session)
        self._came.set()
        return session

    async def guest(self) -> Server:
        """The session of the one who came."""
        await self._came.wait()
        return self.sessions[0]

    async def visit(self, tls: ssl.SSLContext | None = None, *, limit: int = 65_536) -> Stranger:
        """Come as a stranger. `limit`: of what is read ahead."""
        name = "localhost" if tls else None
        port = self.listener.port
        self._strangers.append(
            Stranger(*await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname=name, limit=limit))
        )
        return self._strangers[-1]

    async def aclose(self) -> None:
        for stranger in self._strangers:
            stranger.leave()
        await self.listener.aclose(grace_s=0)


@asynccontextmanager
async def house(
    tls: ssl.SSLContext | None = None,
    *,
    body: bytes = b"",
    patient: bool = False,
    new_core: Callable[[float], ServerConnection] = ServerConnection,
) -> AsyncIterator[House]:
    one = House()
    one.listener = await listen(lambda link: one.enter(Server(link, body, patient=patient)), tls=tls, new_core=new_core)
    try:
        yield one
    finally:
        await one.aclose()


async def client_of(
    port: int,
    tls: ssl.SSLContext | None = None,
    new_core: Callable[[float], ClientConnection] = ClientConnection,
) -> Client:
    client = Client()
    client.link = await connect(
        lambda _: client, host="localhost" if tls else "127.0.0.1", port=port, tls=tls, new_core=new_core
    )
    return await client.greeted()


@asynccontextmanager
async def stranger_at_home(
    greet: bytes, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[int, asyncio.Future[Stranger]]]:
    """A server that says `greet` to the one client that comes, and no more: its port, and the stranger to come."""
    came: asyncio.Future[Stranger] = asyncio.get_running_loop().create_future()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greet)
        came.set_result(Stranger(reader, writer))

    server = await asyncio.start_server(meet, "127.0.0.1", 0, ssl=tls, limit=4096)
    try:
        yield server.sockets[0].getsockname()[1], came
    finally:
        server.close()
        if came.done():
            came.result().leave()


ENCRYPTED = pytest.mark.parametrize("encrypted", [True, False], ids=["tls", "plain"])


# -- both ends -----------------------------------------------------------------------------------------------------


@ENCRYPTED
def test_requests_go_out_and_answers_come_back(run: Run, tls: Tls, encrypted: bool) -> None:
    async def scenario() -> None:
        async with house(tls.server("h2") if encrypted else None) as home:
            client = await client_of(home.listener.port, tls.client() if encrypted else None)
            assert client.submit(range(500)) == 500
            await client.until(lambda: len(client.ends) == 500)
            assert {type(event) for event in client.ends.values()} == {Accepted}
            assert [event.body for event in home.sessions[0].told(Request) if isinstance(event, Request)] == [
                BODY
            ] * 500
            client.link.finish()
            await client.link.closed
            await home.sessions[0].link.closed
            assert (client.closed, home.sessions[0].closed) == (1, 1)

    run(scenario)


def test_both_ends_know_whom_they_speak_to(run: Run, tls: Tls) -> None:
    async def scenario() -> None:
        context, own = tls.server("h2"), tls.client()
        context.verify_mode = ssl.CERT_REQUIRED
        tls.ca.configure_trust(context)
        visitor = tls.ca.issue_cert("visitor.example")
        visitor.configure_cert(own)
        async with house(context) as home:
            client = await client_of(home.listener.port, own)
            guest = await home.guest()
            pem = visitor.cert_chain_pems[0].bytes().decode()
            assert guest.link.peer_certificate == ssl.PEM_cert_to_DER_cert(pem)
            assert client.link.peer_certificate is not None
            assert isinstance(guest.link.peername, tuple)
            client.link.abort()
            await client.link.closed

    run(scenario)


def test_without_tls_there_is_no_certificate(run: Run) -> None:
    async def scenario() -> None:
        async with house() as home:
            client = await client_of(home.listener.port)
            assert client.link.peer_certificate is None
            client.link.close()
            await client.link.closed

    run(scenario)


# -- connecting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpn", [(), ("http/1.1",)], ids=["none", "another"])
def test_a_server_that_does_not_choose_http2_is_a_connection_error(run: Run, tls: Tls, alpn: tuple[str, ...]) -> None:
    async def scenario() -> None:
        async with stranger_at_home(b"", tls.server(*alpn)) as (port, came):
            session = Session()
            with pytest.raises(ConnectionError, match="ALPN"):
                await connect(lambda _: session, host="localhost", port=port, tls=tls.client())
            await (await came).read_to_the_end()
            assert session.events in ([], session.told(Failed))

    run(scenario)


def test_a_server_that_nobody_vouches_for_hears_nothing(run: Run, tls: Tls) -> None:
    async def scenario() -> None:
        async with house(tls.server("h2")) as home:
            with pytest.raises(ssl.SSLCertVerificationError):
                await connect(
                    lambda _: Session(), host="localhost", port=home.listener.port, tls=tls.client(trusting=False)
                )
            assert home.sessions == []

    run(scenario)


def test_where_nobody_listens_there_is_an_os_error(run: Run) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        with pytest.raises(OSError):
            await connect(lambda _: Session(), host="127.0.0.1", port=port, tls=None)

    run(scenario)


def test_a_port_that_is_taken_is_an_os_error(run: Run) -> None:
    async def scenario() -> None:
        async with house() as home:
            with pytest.raises(OSError):
                await listen(lambda link: Server(link, b"", patient=False), tls=None, port=home.listener.port)

    run(scenario)


# -- writing -------------------------------------------------------------------------------------------------------


class CountingTransport:
    """Hands all on to a transport and counts the writes."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.writes = 0

    def write(self, octets: bytes) -> None:
        self.writes += 1
        self._transport.write(octets)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def test_all_that_is_submitted_in_one_turn_of_the_loop_goes_out_in_one_write(run: Run) -> None:
    async def scenario() -> None:
        async with house() as home:
            client = await client_of(home.listener.port)
            counting = CountingTransport(client.link._transport)
            client.link._transport = counting  # type: ignore[assignment]
            for first in range(0, 100, 10):
                client.submit(range(first, first + 10))
            assert counting.writes == 0
            await asyncio.sleep(0)
            assert counting.writes == 1
            await client.until(lambda: len(client.ends) == 100)
            client.link.abort()
            await client.link.closed

    run(scenario)


def test_all_answers_to_one_read_go_out_in_one_write(run: Run) -> None:
    async def scenario() -> None:
        async with house() as home:
            stranger = await home.visit()
            guest = await home.guest()
            counting = CountingTransport(guest.link._transport)
            guest.link._transport = counting  # type: ignore[assignment]
            asked = b"".join(headers(stream_id, ASKED) for stream_id in range(1, 100, 2))
            stranger.writer.write(PREFACE + settings() + SETTINGS_ACK + asked)
            await guest.asked_for(50)
            await asyncio.sleep(0)
            assert counting.writes == 1

    run(scenario)


@ENCRYPTED
def test_last_words_are_let_out_before_the_connection_closes(run: Run, tls: Tls, encrypted: bool) -> None:
    async def scenario() -> None:
        async with house(tls.server("h2") if encrypted else None) as home:
            stranger = await home.visit(tls.client() if encrypted else None)
            stranger.writer.write(PREFACE + settings() + headers(1, ASKED) + ping(b"too short"))
            heard = by_hand.parse(await stranger.read_to_the_end())
            assert (heard[-1].kind, heard[-1].code) == ("GOAWAY", "FRAME_SIZE_ERROR")
            guest = await home.guest()
            await guest.link.closed
            assert (type(guest.events[-1]), guest.closed) == (Failed, 1)

    run(scenario)


@ENCRYPTED
def test_many_last_words_are_let_out_as_well(run: Run, tls: Tls, encrypted: bool) -> None:
    async def scenario() -> None:
        async with house(tls.server("h2") if encrypted else None, body=b"x" * 8000) as home:
            stranger = await home.visit(tls.client() if encrypted else None)
            stranger.writer.write(PREFACE + settings(window=1 << 24) + window_update(0, 1 << 24) + SETTINGS_ACK)
            stranger.writer.write(b"".join(headers(stream_id, ASKED) for stream_id in range(1, 400, 2)))
            guest = await home.guest()
            await guest.asked_for(200)
            stranger.writer.write(ping(b"too short"))
            heard = by_hand.parse(await stranger.read_to_the_end())
            assert sum(len(frame.payload) for frame in heard if frame.kind == "DATA") == 200 * 8000
            assert heard[-1].code == "FRAME_SIZE_ERROR"

    run(scenario)


# -- peers that do not read ----------------------------------------------------------------------------------------


async def ask_until_unread(stranger: Stranger, guest: Server, answered: int = 0) -> int:
    """Ask for answers and read none, until the server has had enough. Returns how many were asked for."""
    while guest.link.writable:
        first = 2 * answered + 1
        stranger.writer.write(b"".join(headers(stream_id, ASKED) for stream_id in range(first, first + 20, 2)))
        answered += 10
        await guest.asked_for(answered)
        await asyncio.sleep(0)
    return answered


GREETING = PREFACE + settings(window=2**31 - 1) + window_update(0, 2**30) + SETTINGS_ACK


@ENCRYPTED
def test_a_client_that_does_not_read_is_not_read_from_until_it_reads(run: Run, tls: Tls, encrypted: bool) -> None:
    async def scenario() -> None:
        async with house(tls.server("h2") if encrypted else None, body=b"x" * 16_000) as home:
            stranger = await home.visit(tls.client() if encrypted else None, limit=1024)
            stranger.writer.write(GREETING)
            guest = await home.guest()
            asked = await ask_until_unread(stranger, guest)
            assert not guest.link._transport.is_reading()
            assert guest.link._transport.get_write_buffer_size() < http2.UNSENT_OCTETS + 20 * 16_000
            stranger.writer.write(headers(2 * asked + 1, ASKED))
            octets = 0
            while octets < (asked + 1) * 16_000:
                octets += len(await stranger.reader.read(1 << 20))
            assert guest.link.writable
            assert guest.writable >= 1
            assert len(guest.told(Request)) == asked + 1

    run(scenario)


@ENCRYPTED
def test_a_client_that_never_reads_is_shed(
    run: Run, tls: Tls, encrypted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "_TICK_S", 0.02)

    async def scenario() -> None:
        async with house(tls.server("h2") if encrypted else None, body=b"x" * 16_000) as home:
            stranger = await home.visit(tls.client() if encrypted else None, limit=1024)
            stranger.writer.write(GREETING)
            guest = await home.guest()
            await ask_until_unread(stranger, guest)
            monkeypatch.setattr(http2, "UNREAD_S", 0.05)
            await guest.link.closed
            assert guest.closed == 1
            assert home.listener.links == set()

    run(scenario)


def test_a_server_that_does_not_read_is_not_given_more_until_it_reads(run: Run) -> None:
    async def scenario() -> None:
        greet = settings(window=2**31 - 1, max_streams=2**31 - 1) + window_update(0, 2**30)
        async with stranger_at_home(greet) as (port, came):
            client = await client_of(port)
            stranger = await came
            await client.until(lambda: client.link.core.capacity > 0)
            sent = 0
            while client.link.writable:
                assert client.submit(range(sent, sent + 10), b"x" * 16_000) == 10
                sent += 10
                await asyncio.sleep(0)
            assert client.link._transport.get_write_buffer_size() < http2.UNSENT_OCTETS + 20 * 16_000
            octets = 0
            while octets < sent * 16_000:
                octets += len(await stranger.reader.read(1 << 20))
            await client.until(lambda: client.writable == 1)
            assert client.link.writable
            assert client.ends == {}
            client.link.abort()
            await client.link.closed
            assert {type(event) for event in client.ends.values()} == {Unknown}
            assert len(client.ends) == sent

    run(scenario)


def test_a_server_that_never_reads_is_given_up_and_outcomes_are_unknown(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "_TICK_S", 0.02)

    async def scenario() -> None:
        greet = settings(window=2**31 - 1, max_streams=2**31 - 1) + window_update(0, 2**30)
        async with stranger_at_home(greet) as (port, came):
            client = await client_of(port)
            await came
            await client.until(lambda: client.link.core.capacity > 0)
            sent = 0
            while client.link.writable:
                sent += client.submit(range(sent, sent + 10), b"x" * 16_000)
                await asyncio.sleep(0)
            monkeypatch.setattr(http2, "UNREAD_S", 0.05)
            await client.link.closed
            assert len(client.ends) == sent
            assert {type(event) for event in client.ends.values()} == {Unknown}
            assert client.closed == 1

    run(scenario)


def test_a_peer_that_does_not_read_our_last_words_is_left(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "_FLUSH_S", 0.05)

    async def scenario() -> None:
        async with house(body=b"x" * 16_000) as home:
            stranger = await home.visit(limit=1024)
            stranger.writer.write(GREETING)
            guest = await home.guest()
            await ask_until_unread(stranger, guest)
            guest.link.close()
            guest.link.close()
            await guest.link.closed
            assert guest.closed == 1

    run(scenario)


# -- ends ----------------------------------------------------------------------------------------------------------


@ENCRYPTED
def test_a_connection_that_is_lost_ends_every_request_and_the_session_once(run: Run, tls: Tls, encrypted: bool) -> None:
    async def scenario() -> None:
        async with house(tls.server("h2") if encrypted else None, patient=True) as home:
            client = await client_of(home.listener.port, tls.client() if encrypted else None)
            client.submit(range(5))
            guest = await home.guest()
            await guest.asked_for(5)
            guest.answer([1])
            await client.until(lambda: len(client.ends) == 1)
            guest.link.abort()
            await client.link.closed
            assert [type(client.ends[key]) for key in range(5)] == [Accepted, Unknown, Unknown, Unknown, Unknown]
            assert isinstance(client.events[-1], Failed)
            assert client.closed == 1

    run(scenario)


def test_a_link_that_is_to_finish_waits_for_its_open_streams(run: Run) -> None:
    async def scenario() -> None:
        async with house(patient=True) as home:
            client = await client_of(home.listener.port)
            client.submit([1, 2])
            guest = await home.guest()
            await guest.asked_for(2)
            client.link.core.goodbye()
            client.link.finish()
            await guest.until(lambda: bool(guest.told(GoAway)))
            guest.answer([1])
            await client.until(lambda: len(client.ends) == 1)
            assert not client.link._transport.is_closing()
            guest.answer([3])
            await client.link.closed
            assert {type(event) for event in client.ends.values()} == {Accepted}
            await guest.link.closed

    run(scenario)


def test_a_link_without_streams_finishes_at_once(run: Run) -> None:
    async def scenario() -> None:
        async with house() as home:
            client = await client_of(home.listener.port)
            client.link.finish()
            await client.link.closed

    run(scenario)


def test_deadlines_of_the_core_are_kept(run: Run) -> None:
    async def scenario() -> None:
        hasty = Limits(settings_s=0.05)
        async with house(new_core=lambda now: ServerConnection(now, limits=hasty)) as home:
            stranger = await home.visit()
            stranger.writer.write(PREFACE[:10])
            assert by_hand.parse(await stranger.read_to_the_end())[-1].kind == "GOAWAY"

    run(scenario)


def test_a_server_that_says_nothing_is_given_up(run: Run) -> None:
    async def scenario() -> None:
        hasty = Limits(settings_s=0.05)
        async with stranger_at_home(b"") as (port, came):
            session = Session()
            link = await connect(
                lambda _: session,
                host="127.0.0.1",
                port=port,
                tls=None,
                new_core=lambda now: ClientConnection(now, limits=hasty),
            )
            heard = by_hand.parse(await (await came).read_to_the_end())
            assert heard[-1].code == "SETTINGS_TIMEOUT"
            await link.closed
            assert [type(event) for event in session.events] == [Failed]

    run(scenario)


# -- the listener --------------------------------------------------------------------------------------------------


def test_a_listener_that_closes_lets_open_streams_be_answered(run: Run) -> None:
    async def scenario() -> None:
        async with house(patient=True) as home:
            client = await client_of(home.listener.port)
            client.submit([1, 2])
            guest = await home.guest()
            await guest.asked_for(2)
            closing = asyncio.create_task(home.listener.aclose(grace_s=PATIENCE_S))
            await client.until(lambda: bool(client.told(GoAway)))
            assert client.submit([3]) == 0
            guest.answer([1, 3])
            await closing
            await client.link.closed
            assert {key: type(event) for key, event in client.ends.items()} == {1: Accepted, 2: Accepted}
            with pytest.raises(OSError):
                await home.visit()

    run(scenario)


def test_a_listener_that_closes_does_not_wait_for_ever(run: Run) -> None:
    async def scenario() -> None:
        async with house(patient=True) as home:
            client = await client_of(home.listener.port)
            client.submit([1])
            guest = await home.guest()
            await guest.asked_for(1)
            await home.listener.aclose(grace_s=0.01)
            await client.link.closed
            assert isinstance(client.ends[1], Unknown | NotProcessed)
            assert guest.closed == 1

    run(scenario)


def test_a_listener_closes_though_a_client_has_not_said_hello_yet(run: Run, tls: Tls) -> None:
    async def scenario() -> None:
        async with house(tls.server("h2")) as home:
            await home.visit()
            client = await client_of(home.listener.port, tls.client())
            await home.listener.aclose(grace_s=0.01)
            await client.link.closed

    run(scenario)


@pytest.mark.parametrize("hello", [b"", b"GET / HTTP/1.1\r\n\r\n"], ids=["nothing", "no TLS"])
def test_a_client_that_fails_its_tls_handshake_leaves_nothing_behind(run: Run, tls: Tls, hello: bytes) -> None:
    async def scenario() -> None:
        async with house(tls.server("h2")) as home:
            for _ in range(3):
                stranger = await home.visit()
                stranger.writer.write(hello)
                stranger.writer.write_eof()
                await stranger.read_to_the_end()
            client = await client_of(home.listener.port, tls.client())
            assert len(home.listener.links) == 1
            client.link.abort()
            await client.link.closed

    run(scenario)


def test_links_that_closed_are_forgotten(run: Run) -> None:
    async def scenario() -> None:
        async with house() as home:
            for _ in range(3):
                client = await client_of(home.listener.port)
                client.link.close()
                await client.link.closed
            for session in home.sessions:
                await session.link.closed
            await asyncio.sleep(0)
            assert home.listener.links == set()

    run(scenario)


def test_a_reset_by_the_server_is_told_as_it_is(run: Run) -> None:
    async def scenario() -> None:
        async with house(patient=True) as home:
            client = await client_of(home.listener.port)
            client.submit([1, 2])
            guest = await home.guest()
            await guest.asked_for(2)
            guest.link.core.reset([1], ErrorCode.REFUSED_STREAM)
            guest.link.core.reset([3], ErrorCode.INTERNAL_ERROR)
            guest.link.flush()
            await client.until(lambda: len(client.ends) == 2)
            assert [type(client.ends[key]) for key in (1, 2)] == [NotProcessed, Unknown]
            client.link.abort()
            await client.link.closed

    run(scenario)


def test_requests_by_hand_are_answered_by_hand_readable_frames(run: Run, tls: Tls) -> None:
    async def scenario() -> None:
        async with house(tls.server("h2"), body=b"{}") as home:
            stranger = await home.visit(tls.client())
            stranger.writer.write(
                PREFACE + settings() + SETTINGS_ACK + headers(1, ASKED, end=False) + data(1, BODY, end=True)
            )
            stranger.writer.write(by_hand.goaway(0))
            guest = await home.guest()
            await guest.until(lambda: bool(guest.told(GoAway)))
            guest.link.finish()
            heard = by_hand.parse(await stranger.read_to_the_end())
            assert [(frame.kind, frame.stream_id, frame.payload) for frame in heard[3:]] == [
                ("HEADERS", 1, b"\x88"),
                ("DATA", 1, b"{}"),
            ]

    run(scenario)
