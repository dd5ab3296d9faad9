"""TLS streams over real sockets, on asyncio's loop and on uvloop's, and whom their contexts take."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from heliograph.config import TlsVersion
from heliograph.errors import ConfigError
from heliograph.net import streams
from heliograph.net.streams import Stream, StreamListener, listen
from heliograph.net.tls import Identity, legacy_context, throwaway_identity
from tests.certificates import Issued, PrivateKey, authority, ec_key, push_certificate, rsa_key

PATIENCE_S = 20.0
"""After this a test gives up; on any machine that is not broken, nothing takes so long."""
LONG_AGO = datetime(2012, 6, 1, tzinfo=UTC)
ERROR = b"\x08\x08\x00\x00\x00\x2a"

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


@cache
def server_identity() -> Identity:
    return throwaway_identity(datetime.now(UTC))


@cache
def expired() -> Issued:
    """A certificate as Apple issued it long ago; its issuer is unknown to the server."""
    return push_certificate("com.example.shop", now=LONG_AGO, key=rsa_key())


def context_for(*anchors: bytes, minimum: TlsVersion = TlsVersion.TLS_1_2, required: bool = True) -> ssl.SSLContext:
    mine = server_identity()
    return legacy_context(mine.certificate_pem, mine.key_pem, anchors=anchors, minimum=minimum, required=required)


def client_context(
    shown: bytes | None = None, *, version: ssl.TLSVersion | None = None, any_strength: bool = False
) -> ssl.SSLContext:
    """As an old script's: it verifies nothing. `shown`: PEM of a certificate, what is behind it, and the key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if any_strength:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    if version is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
    if shown is not None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(shown)
            file.flush()
            context.load_cert_chain(file.name)
    return context


class Client:
    """A blocking client of TLS that has each of its steps told; its socket is its own."""

    def __init__(self, port: int, context: ssl.SSLContext, server_name: str | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self.raw_read = 0
        """Octets that came after the handshake."""

    def shake_hands(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.send()
                data = self.socket.recv(65536)
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            else:
                self.send()
                return

    def send(self) -> None:
        self.socket.sendall(self.take())

    def take(self) -> bytes:
        """What is to be sent."""
        return self._outgoing.read()

    def write(self, data: bytes) -> None:
        for at in range(0, len(data), 16384):
            self.tls.write(data[at : at + 16384])
            self.send()

    def say_close_notify(self) -> None:
        with contextlib.suppress(ssl.SSLError):
            self.tls.unwrap()
        self.send()

    def read(self) -> bytes | None:
        """One record; empty at close_notify, None where the socket ends without one."""
        while True:
            try:
                return self.tls.read(65536)
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLWantReadError:
                data = self.socket.recv(65536)
                self.raw_read += len(data)
                if not data:
                    return None
                self._incoming.write(data)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class User:
    """Notes what it is told, and does at each step what a test gives it to do."""

    def __init__(self, stream: Stream, house: House) -> None:
        self.stream = stream
        self.house = house
        self.said = b""
        self.calls: list[str] = []
        self.error: Exception | None = None

    def on_open(self) -> None:
        self._note("open")

    def on_data(self, data: bytes) -> None:
        assert data
        self.said += data
        self._note("data")

    def on_end(self) -> None:
        assert self.stream.ended
        self._note("end")

    def on_close(self, error: Exception | None) -> None:
        self.error = error
        self._note("close")

    def _note(self, call: str) -> None:
        assert "close" not in self.calls, "nothing is told after the end"
        if not (call == "data" and self.calls[-1] == "data"):
            self.calls.append(call)
        if call in self.house.acts:
            self.house.acts[call](self)
        self.house.news()


class House:
    """A listener, and what it brought."""

    listener: StreamListener

    def __init__(self, acts: dict[str, Callable[[User], None]]) -> None:
        self.acts = acts
        self.users: list[User] = []
        self.refused: list[str] = []
        self._news = asyncio.Event()

    def enter(self, stream: Stream) -> User:
        self.users.append(User(stream, self))
        return self.users[-1]

    def refuse(self, address: str, why: str) -> None:
        assert address == "127.0.0.1"
        self.refused.append(why)
        self.news()

    def news(self) -> None:
        self._news.set()

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():
            self._news.clear()
            await self._news.wait()

    async def closed(self, count: int = 1) -> list[User]:
        """That many users, all of them closed."""
        await self.until(lambda: sum("close" in user.calls for user in self.users) >= count)
        return self.users


def ends(user: User) -> None:
    user.stream.end()


@asynccontextmanager
async def house(
    context: ssl.SSLContext | None = None, *, max_connections: int = 1000, **acts: Callable[[User], None]
) -> AsyncIterator[House]:
    """`acts`: what a user does in `open`, `data`, `end`, `close`; at the end it ends as well, unless told."""
    context = context or context_for(expired().certificate_pem)
    opened = House({"end": ends, **acts})
    opened.listener = await listen(
        opened.enter,
        context=lambda: context,
        host="127.0.0.1",
        port=0,
        max_connections=max_connections,
        refused=opened.refuse,
    )
    try:
        yield opened
    finally:
        await opened.listener.aclose(0.0)


def connect(
    opened: House,
    shown: bytes | None = None,
    *,
    version: ssl.TLSVersion | None = None,
    server_name: str | None = None,
) -> Client:
    client = Client(opened.listener.port, client_context(shown or expired().pem, version=version), server_name)
    try:
        client.shake_hands()
    except OSError:
        client.close()
        raise
    return client


VERSIONS = pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"]
)


# -- ends -------------------------------------------------------------------------------------------------------------


@VERSIONS
@pytest.mark.parametrize("polite", [True, False], ids=["close_notify", "close alone"])
def test_all_that_was_written_before_a_close_at_once_arrives(run: Run, version: ssl.TLSVersion, polite: bool) -> None:
    frames = os.urandom(30_000)

    async def scenario() -> None:
        async with house() as opened:
            context = client_context(expired().pem, version=version)

            def write_and_close() -> None:
                for _ in range(100):
                    client = Client(opened.listener.port, context)
                    client.shake_hands()
                    client.write(frames)
                    if polite:
                        client.say_close_notify()
                    client.close()

            await asyncio.gather(asyncio.to_thread(write_and_close), asyncio.to_thread(write_and_close))
            for user in await opened.closed(200):
                assert user.calls == ["open", "data", "end", "close"]
                assert user.said == frames
            assert not opened.refused

    run(scenario)


@VERSIONS
def test_what_came_before_a_reset_was_given(run: Run, version: ssl.TLSVersion) -> None:
    async def scenario() -> None:
        async with house() as opened:

            def write_and_reset() -> None:
                client = connect(opened, version=version)
                client.write(b"frames")
                client.reset()

            await asyncio.to_thread(write_and_reset)
            (user,) = await opened.closed()
            assert user.said == b"frames"
            assert user.calls == ["open", "data", "close"]
            assert isinstance(user.error, ConnectionError)

    run(scenario)


@VERSIONS
def test_peer_that_ended_its_side_is_still_written_to(run: Run, version: ssl.TLSVersion) -> None:
    def answer(user: User) -> None:
        user.stream.write(b"first ")
        user.stream.write(b"second")
        user.stream.end()
        user.stream.write(b"too late")

    async def scenario() -> None:
        async with house(end=answer) as opened:

            def speak(fin: bool) -> list[bytes | None]:
                client = connect(opened, version=version)
                client.write(b"question")
                if fin:
                    client.socket.shutdown(socket.SHUT_WR)
                else:
                    client.say_close_notify()
                with contextlib.closing(client):
                    return [client.read() for _ in range(3)]

            for fin in (False, True):
                assert await asyncio.to_thread(speak, fin) == [b"first ", b"second", b""]  # one record each
            for user in await opened.closed(2):
                assert user.calls == ["open", "data", "end", "close"]
                assert user.error is None

    run(scenario)


@VERSIONS
def test_peer_is_heard_after_our_end(run: Run, version: ssl.TLSVersion) -> None:
    async def scenario() -> None:
        async with house(open=ends, end=lambda _: None) as opened:

            def speak() -> list[bytes | None]:
                client = connect(opened, version=version)
                read = [client.read(), client.socket.recv(1)]
                client.write(b"I was not done")
                client.write(b", you know" * 5000)
                client.say_close_notify()
                client.close()
                return read

            assert await asyncio.to_thread(speak) == [b"", b""]
            (user,) = await opened.closed()
            assert user.said == b"I was not done" + b", you know" * 5000
            assert user.calls == ["open", "data", "end", "close"]
            assert user.error is None

    run(scenario)


@VERSIONS
def test_peer_that_writes_on_reads_our_last_words(run: Run, version: ssl.TLSVersion) -> None:
    def refuse(user: User) -> None:
        user.stream.write(ERROR)
        user.stream.linger(PATIENCE_S)

    async def scenario() -> None:
        async with house(data=refuse) as opened:

            def write_all_then_read() -> list[bytes | None]:
                client = connect(opened, version=version)
                for _ in range(100):
                    client.write(b"frame" * 10_000)
                read = [client.read(), client.read()]
                client.close()
                return read

            for _ in range(5):
                assert await asyncio.to_thread(write_all_then_read) == [ERROR, b""]
            for user in await opened.closed(5):
                assert user.calls == ["open", "data", "close"]
                assert user.error is None

    run(scenario)


def test_peer_that_never_ends_is_lingered_for_no_longer_than_was_said(run: Run) -> None:
    async def scenario() -> None:
        async with house(open=lambda user: user.stream.linger(0.05)) as opened:
            client = await asyncio.to_thread(connect, opened)
            (user,) = await opened.closed()
            assert user.error is None
            client.close()

    run(scenario)


def test_peer_that_is_gone_after_its_end_is_noticed_when_it_was_written_to(run: Run) -> None:
    def answer(user: User) -> None:
        user.stream.write(b"answer")
        asyncio.get_running_loop().call_later(0.05, user.stream.end)

    async def scenario() -> None:
        async with house(end=answer) as opened:

            def write_and_close(client: Client) -> None:
                client.write(b"frames")
                client.close()

            await asyncio.to_thread(write_and_close, await asyncio.to_thread(connect, opened))
            (user,) = await opened.closed()
            assert user.calls == ["open", "data", "end", "close"]
            assert isinstance(user.error, ConnectionError)

    run(scenario)


@VERSIONS
def test_nothing_is_written_that_the_user_did_not_write(run: Run, version: ssl.TLSVersion) -> None:
    async def scenario() -> None:
        async with house() as opened:

            def speak() -> Client:
                client = connect(opened, version=version)
                client.write(b"frames")
                client.say_close_notify()
                assert client.read() == b""
                client.close()
                return client

            client = await asyncio.to_thread(speak)
            # A record with an alert of two octets, sealed: close_notify and nothing before it.
            assert client.raw_read == 24 if version is ssl.TLSVersion.TLSv1_3 else client.raw_read <= 31

    run(scenario)


@VERSIONS
def test_stream_that_comes_octet_by_octet_is_read(run: Run, version: ssl.TLSVersion) -> None:
    async def scenario() -> None:
        async with house() as opened:

            def dribble() -> None:
                client = connect(opened, version=version)
                client.tls.write(b"one")
                client.tls.write(b"two")
                for octet in client.take():
                    client.socket.sendall(bytes((octet,)))
                client.say_close_notify()
                client.close()

            await asyncio.to_thread(dribble)
            (user,) = await opened.closed()
            assert user.said == b"onetwo"

    run(scenario)


def test_what_came_before_broken_tls_was_given(run: Run) -> None:
    async def scenario() -> None:
        async with house() as opened:

            def break_it() -> bytes | None:
                client = connect(opened)
                client.tls.write(b"frames")
                client.socket.sendall(client.take() + b"\x17\x03\x03\x00\x20" + bytes(32))
                try:
                    return client.read()
                except ssl.SSLError as error:
                    return str(error.reason).encode()
                finally:
                    client.close()

            assert await asyncio.to_thread(break_it) == b"SSLV3_ALERT_BAD_RECORD_MAC"
            (user,) = await opened.closed()
            assert user.said == b"frames"
            assert isinstance(user.error, ssl.SSLError)

    run(scenario)


# -- pressure ---------------------------------------------------------------------------------------------------------


def test_peer_is_not_read_from_while_paused(run: Run) -> None:
    frames = os.urandom(16 * 1024 * 1024)

    async def scenario() -> None:
        async with house(data=lambda user: user.stream.pause()) as opened:

            def write() -> None:
                client = connect(opened)
                client.write(frames)
                client.say_close_notify()
                client.close()

            writing = asyncio.create_task(asyncio.to_thread(write))
            await opened.until(lambda: bool(opened.users and opened.users[0].said))
            (user,) = opened.users
            del opened.acts["data"]
            await asyncio.wait([writing], timeout=0.1)
            assert not writing.done(), "sockets hold less than that"
            assert len(user.said) < 1024 * 1024
            user.stream.resume()
            await writing
            await opened.closed()
            assert user.said == frames
            assert user.calls == ["open", "data", "end", "close"]

    run(scenario)


def test_peer_that_reads_slowly_is_waited_for(run: Run) -> None:
    async def scenario() -> None:
        async with house() as opened:

            def read_all() -> int:
                client = connect(opened)
                total = 0
                while data := client.read():
                    total += len(data)
                client.say_close_notify()
                client.close()
                return total

            reading = asyncio.create_task(asyncio.to_thread(read_all))
            await opened.until(lambda: bool(opened.users))
            stream = opened.users[0].stream
            for _ in range(1000):
                stream.write(bytes(16384))
                await stream.drained()
            stream.end()
            assert await reading == 1000 * 16384
            (user,) = await opened.closed()
            assert user.error is None

    run(scenario)


def test_peer_that_does_not_read_is_given_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "UNREAD_S", 0.05)

    async def scenario() -> None:
        async with house() as opened:
            client = await asyncio.to_thread(connect, opened)
            await opened.until(lambda: bool(opened.users))
            stream = opened.users[0].stream

            async def write_on() -> None:
                while True:
                    stream.write(bytes(16384))
                    await stream.drained()

            with pytest.raises(ConnectionError):
                await write_on()
            (user,) = await opened.closed()
            assert isinstance(user.error, TimeoutError)
            client.close()

    run(scenario)


# -- who gets in ------------------------------------------------------------------------------------------------------


def test_stream_knows_who_came_and_whom_they_called(run: Run) -> None:
    async def scenario() -> None:
        async with house() as opened:

            def call() -> object:
                client = connect(opened, server_name="gateway.push.apple.com")
                name = client.socket.getsockname()
                client.close()
                return name

            name = await asyncio.to_thread(call)
            (user,) = await opened.closed()
            assert user.stream.certificate == expired().certificate_der
            assert user.stream.server_name == "gateway.push.apple.com"
            assert user.stream.peername == name

    run(scenario)


def test_client_without_certificate_may_come_where_none_is_required(run: Run) -> None:
    async def scenario() -> None:
        async with house(context_for(expired().certificate_pem, required=False)) as opened:

            def call() -> None:
                client = Client(opened.listener.port, client_context())
                client.shake_hands()
                client.close()

            await asyncio.to_thread(call)
            (user,) = await opened.closed()
            assert user.stream.certificate is None
            assert user.stream.server_name is None

    run(scenario)


@VERSIONS
@pytest.mark.parametrize(
    "shown,alert,why",
    [
        (False, "CERTIFICATE_REQUIRED", "the client showed no certificate"),
        (True, "UNKNOWN_CA", "the client's certificate is not registered"),
    ],
    ids=["none", "another"],
)
def test_client_without_a_known_certificate_is_refused_and_reads_why(
    run: Run, version: ssl.TLSVersion, shown: bool, alert: str, why: str
) -> None:
    stranger = push_certificate("com.example.other")
    context = client_context(stranger.pem if shown else None, version=version)

    async def scenario() -> None:
        async with house() as opened:

            def call() -> str | None:
                client = Client(opened.listener.port, context)
                try:
                    client.shake_hands()
                    client.write(b"frame" * 100_000)  # TLS 1.3: the client is through before the server has looked
                    client.read()
                except ssl.SSLError as error:
                    return error.reason
                finally:
                    client.close()
                return None

            reason = await asyncio.to_thread(call)
            assert reason is not None
            if version is ssl.TLSVersion.TLSv1_3 or shown:
                assert reason.endswith(alert)
            await opened.until(lambda: bool(opened.refused))
            assert opened.refused[0].startswith(why)
            assert len(opened.refused) == 1
            assert not opened.users

    run(scenario)


@pytest.mark.parametrize(
    "said,why",
    [
        (b"\x00\x00\x20" + bytes(32) + b"\x00\x02{}", "the client does not speak TLS"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "the client does not speak TLS"),
        (bytes.fromhex("15030100020250"), "the client's own TLS gave up before it began"),
        (b"\x16\x03", "the client hung up during the TLS handshake"),
    ],
    ids=["frame", "HTTP", "alert", "little"],
)
def test_client_without_tls_is_refused(run: Run, said: bytes, why: str) -> None:
    async def scenario() -> None:
        async with house() as opened:

            def call() -> None:
                with socket.create_connection(("127.0.0.1", opened.listener.port), timeout=PATIENCE_S) as client:
                    client.sendall(said)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(1000):
                        pass

            await asyncio.to_thread(call)
            await opened.until(lambda: bool(opened.refused))
            assert opened.refused == [why]
            assert not opened.users

    run(scenario)


def test_client_with_a_tls_version_too_old_is_refused(run: Run) -> None:
    async def scenario() -> None:
        async with house(context_for(expired().certificate_pem, minimum=TlsVersion.TLS_1_3)) as opened:
            with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
                await asyncio.to_thread(connect, opened, version=ssl.TLSVersion.TLSv1_2)
            await opened.until(lambda: bool(opened.refused))
            assert opened.refused == ["the client's TLS version is too old"]

    run(scenario)


def test_client_that_does_not_trust_us_is_noted(run: Run) -> None:
    async def scenario() -> None:
        async with house() as opened:

            def call() -> None:
                client = Client(opened.listener.port, ssl.create_default_context(), "localhost")
                with pytest.raises(ssl.SSLCertVerificationError):
                    client.shake_hands()
                client.send()
                client.close()

            await asyncio.to_thread(call)
            await opened.until(lambda: bool(opened.refused))
            assert opened.refused == ["the client refused: it says unknown ca"]

    run(scenario)


def test_client_that_takes_too_long_for_its_handshake_is_shed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HANDSHAKE_S", 0.05)

    async def scenario() -> None:
        async with house() as opened:
            with socket.create_connection(("127.0.0.1", opened.listener.port), timeout=PATIENCE_S):
                await opened.until(lambda: bool(opened.refused))
            assert opened.refused == ["the TLS handshake took longer than 0.05 s"]

    run(scenario)


def test_connections_above_the_limit_are_closed_and_room_is_made_by_those_that_leave(run: Run) -> None:
    async def scenario() -> None:
        async with house(max_connections=2) as opened:
            first, second = [await asyncio.to_thread(connect, opened) for _ in range(2)]
            with pytest.raises((ssl.SSLError, OSError)):
                await asyncio.to_thread(connect, opened)
            assert opened.refused == ["there are 2 connections already"]
            first.close()
            await opened.closed()
            third = await asyncio.to_thread(connect, opened)
            await opened.until(lambda: len(opened.users) == 3)
            second.close()
            third.close()

    run(scenario)


def test_listener_waits_for_its_streams_to_be_closed_and_aborts_the_late(run: Run) -> None:
    async def scenario() -> None:
        async with house() as opened:
            clients = [await asyncio.to_thread(connect, opened) for _ in range(3)]
            await opened.until(lambda: len(opened.users) == 3)
            assert len(opened.listener.streams) == 3
            half_way = socket.create_connection(("127.0.0.1", opened.listener.port))
            clients[0].close()
            await opened.listener.aclose(0.05)
            assert not opened.listener.streams
            assert [user.calls[-1] for user in opened.users] == ["close"] * 3
            with pytest.raises(OSError):
                socket.create_connection(("127.0.0.1", opened.listener.port))
            half_way.close()
            for each in clients:
                each.close()

    run(scenario)


# -- certificates and versions ----------------------------------------------------------------------------------------


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> str:
    """The TLS version, or why the server refused."""
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = client.wrap_bio(one, other)
    ours = server.wrap_bio(other, one, server_side=True)
    for _ in range(4):
        with contextlib.suppress(ssl.SSLWantReadError):
            theirs.do_handshake()
        try:
            ours.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        except ssl.SSLError as error:
            return str(error.reason)
    return str(ours.version())


def self_made(
    name: str | x509.Name = "push",
    *extensions: x509.ExtensionType,
    key: PrivateKey | None = None,
    issuer: Issued | None = None,
) -> Issued:
    key = key or ec_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) if isinstance(name, str) else name
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(LONG_AGO)
        .not_valid_after(LONG_AGO + timedelta(days=365))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return Issued(builder.sign(issuer.key if issuer else key, SHA256()), key, ())


def key_usage(**allowed: bool) -> x509.KeyUsage:
    uses = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    uses += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
    return x509.KeyUsage(**{use: allowed.get(use, False) for use in uses})


ODD: dict[str, Callable[[], Issued]] = {
    "expired, of an unknown issuer": expired,
    "self-made": self_made,
    "self-made authority": lambda: self_made("ca", x509.BasicConstraints(ca=True, path_length=None)),
    "to sign certificates with": lambda: self_made("ca", key_usage(key_cert_sign=True)),
    "for servers": lambda: self_made("server", x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])),
    "for code": lambda: self_made("code", x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])),
    "for encryption": lambda: self_made("enc", key_usage(key_encipherment=True), key=rsa_key()),
    "with an unknown critical extension": lambda: self_made(
        "critical", x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.840.113635.100.6.3.1"), b"\5\0")
    ),
}


@VERSIONS
@pytest.mark.parametrize("with_chain", [False, True], ids=["alone", "with its issuer"])
@pytest.mark.parametrize("kind", ODD)
def test_registered_certificate_is_taken_whatever_it_says(kind: str, with_chain: bool, version: ssl.TLSVersion) -> None:
    odd = ODD[kind]()
    shown = odd.pem + (authority().certificate_pem if with_chain else b"")
    # Others of the same subject do not hide it.
    twins = [self_made(odd.certificate.subject) for _ in range(2)]
    context = context_for(twins[0].certificate_pem, odd.certificate_pem, twins[1].certificate_pem)
    assert shake_hands(context, client_context(shown, version=version)).startswith("TLSv1")


@VERSIONS
@pytest.mark.parametrize("required", [True, False], ids=["required", "optional"])
@pytest.mark.parametrize("anchored", [True, False], ids=["one known", "none known"])
def test_certificate_that_is_not_registered_is_not_taken(
    version: ssl.TLSVersion, required: bool, anchored: bool
) -> None:
    known = (push_certificate("com.example.shop").certificate_pem,) if anchored else ()
    other = push_certificate("com.example.shop")  # the same names, issuer and key
    said = shake_hands(context_for(*known, required=required), client_context(other.pem, version=version))
    assert said == "unable to get local issuer certificate"


def test_client_without_certificate_is_refused_where_one_is_required_and_none_is_known() -> None:
    assert shake_hands(context_for(), client_context()) == "PEER_DID_NOT_RETURN_A_CERTIFICATE"
    assert shake_hands(context_for(required=False), client_context()) == "TLSv1.3"


@VERSIONS
def test_sessions_of_those_that_left_are_not_kept(version: ssl.TLSVersion) -> None:
    server, client = context_for(expired().certificate_pem), client_context(expired().pem, version=version)
    for _ in range(3):
        assert shake_hands(server, client).startswith("TLSv1")
    assert server.session_stats()["accept_good"] == 3
    assert server.session_stats()["number"] == 0


@pytest.mark.parametrize(
    "minimum,version,said",
    [
        (TlsVersion.TLS_1_0, ssl.TLSVersion.TLSv1, "TLSv1"),
        (TlsVersion.TLS_1_0, ssl.TLSVersion.TLSv1_1, "TLSv1.1"),
        (TlsVersion.TLS_1_1, ssl.TLSVersion.TLSv1, "UNSUPPORTED_PROTOCOL"),
        (TlsVersion.TLS_1_1, ssl.TLSVersion.TLSv1_1, "TLSv1.1"),
        (TlsVersion.TLS_1_2, ssl.TLSVersion.TLSv1_1, "UNSUPPORTED_PROTOCOL"),
        (TlsVersion.TLS_1_2, ssl.TLSVersion.TLSv1_2, "TLSv1.2"),
        (TlsVersion.TLS_1_3, ssl.TLSVersion.TLSv1_2, "UNSUPPORTED_PROTOCOL"),
        (TlsVersion.TLS_1_3, ssl.TLSVersion.TLSv1_3, "TLSv1.3"),
    ],
)
def test_minimum_version_is_kept(minimum: TlsVersion, version: ssl.TLSVersion, said: str) -> None:
    client = client_context(expired().pem, version=version, any_strength=True)
    assert shake_hands(context_for(expired().certificate_pem, minimum=minimum), client) == said


@VERSIONS
@pytest.mark.parametrize("bits", [1024, 2048])
@pytest.mark.parametrize("with_chain", [False, True], ids=["alone", "with its issuer"])
def test_registered_certificate_is_taken_however_weak_it_is(
    bits: int, with_chain: bool, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    # cryptography signs with SHA-1 no more.
    options = ["-sha1", "-nodes", "-newkey", f"rsa:{bits}"]
    for name, issuer in (("issuer", []), ("own", ["-CA", "issuer.pem", "-CAkey", "issuer.key"])):
        made = [
            "openssl",
            "req",
            "-x509",
            "-subj",
            f"/CN={name}",
            *options,
            *issuer,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
        ]
        subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
    own, key, issuer_pem = ((tmp_path / each).read_bytes() for each in ("own.pem", "own.key", "issuer.pem"))
    shown = own + (issuer_pem if with_chain else b"") + key
    client = client_context(shown, version=version, any_strength=True)
    assert shake_hands(context_for(own), client).startswith("TLSv1")


def test_ciphers_are_those_of_the_level_above_from_tls_1_2_on() -> None:
    strong = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    strong.set_ciphers("DEFAULT:@SECLEVEL=2")
    assert [each["name"] for each in context_for().get_ciphers()] == [each["name"] for each in strong.get_ciphers()]


def test_connection_that_ends_without_an_octet_is_not_told_of(run: Run) -> None:
    async def scenario() -> None:
        async with house() as opened:
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", opened.listener.port)) as probe:
                    while not opened.listener._entering:  # noqa: ASYNC110
                        await asyncio.sleep(0)
                    probe.shutdown(socket.SHUT_WR)
                    while opened.listener._entering:  # noqa: ASYNC110
                        await asyncio.sleep(0)
            assert not opened.refused

    run(scenario)


def test_context_of_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="certificate and key of the listener"):
        legacy_context(
            server_identity().certificate_pem,
            expired().key_pem,
            anchors=(),
            minimum=TlsVersion.TLS_1_2,
            required=True,
        )


# -- a program that we did not write ----------------------------------------------------------------------------------


@VERSIONS
def test_openssl_writes_and_closes(run: Run, version: ssl.TLSVersion, tmp_path: Path) -> None:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not on this machine")
    pem = tmp_path / "push.pem"
    pem.write_bytes(expired().pem)
    flag = "-tls1_2" if version is ssl.TLSVersion.TLSv1_2 else "-tls1_3"

    def answer(user: User) -> None:
        user.stream.write(ERROR)
        user.stream.linger(PATIENCE_S)

    async def scenario() -> None:
        async with house(data=answer) as opened:
            command = [program, "s_client", "-connect", f"127.0.0.1:{opened.listener.port}", "-cert", str(pem)]
            command += ["-key", str(pem), "-quiet", "-noservername", flag]
            ran = await asyncio.to_thread(
                subprocess.run, command, input=b"frames\n", capture_output=True, timeout=PATIENCE_S, check=False
            )
            assert ran.stdout == ERROR
            (user,) = await opened.closed()
            assert user.said == b"frames\n"

    run(scenario)
