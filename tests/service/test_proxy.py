"""To Apple through a proxy that speaks CONNECT: a real one, of forty lines."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import structlog

from heliograph.carriers.apns import ApnsCarrier, Endpoint, PoolSettings, Route
from heliograph.errors import ConfigError
from heliograph.model import ACCEPTED, NotProcessed, Outcome
from heliograph.net.proxy import parse_proxy
from heliograph.net.tls import client_context
from heliograph.simulator.server import Simulator
from tests.service.test_carrier import Ledger, batch_of

PASSWORD = "pass:word@/%"
SPELT = "pass%3Aword%40%2F%25"


class ConnectProxy:
    """Connects whoever asks to one port of this machine, whatever the name, and notes what it was asked."""

    def __init__(self, to: int, *, credentials: str | None = None, instead: bytes | None = None) -> None:
        self._to = to
        self._credentials = credentials
        self._instead = instead
        self.asked: list[str] = []
        self._pumps: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.asked.append(head.partition("\r\n")[0])
            if self._instead is not None:
                writer.write(self._instead)
                return
            if self._credentials is not None:
                line = f"proxy-authorization: basic {b64encode(self._credentials.encode()).decode()}"
                if line.lower() not in head.lower().split("\r\n"):
                    writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nproxy-authenticate: Basic\r\n\r\n")
                    return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
            writer.write(b"HTTP/1.1 200 Connection established\r\nvia: a test\r\n\r\n")
            self._pumps.add(asyncio.create_task(self._pump(reader, far_writer)))
            await self._pump(far_reader, writer)
        finally:
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while octets := await reader.read(65536):
                writer.write(octets)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


async def push(apple: Simulator, proxy: str, *, host: str = "localhost", port: int | None = None) -> list[Outcome]:
    endpoint = Endpoint(host, port or apple.port, client_context(apple.ca_pem), proxy=proxy)
    route = Route(endpoint, apple.signing_key)
    settings = PoolSettings(patience_s=0.3, backoff_s=0.1, tls_backoff_s=0.1)
    carrier = ApnsCarrier(lambda *_: route, settings=settings, clock=time.time)
    batch = batch_of(3)
    ledger = Ledger(batch)
    carrier.carry(batch, range(3), ledger.report)
    try:
        return await ledger.settled()
    finally:
        await carrier.aclose()


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator() as apple:
        yield apple


def why(outcomes: list[Outcome]) -> str:
    (one,) = set(outcomes)
    assert isinstance(one, NotProcessed)
    return one.why


async def test_pushes_go_through_a_proxy_which_looks_the_name_up(apple: Simulator) -> None:
    proxy = ConnectProxy(apple.port)
    async with proxy.listening() as port:
        # The name is one of Apple's, which this machine need not know, and TLS inside is verified against it.
        outcomes = await push(apple, f"http://127.0.0.1:{port}", host="api.push.apple.com", port=443)
    assert outcomes == [ACCEPTED] * 3
    assert proxy.asked == ["CONNECT api.push.apple.com:443 HTTP/1.1"]


async def test_tls_inside_the_tunnel_is_verified_against_apples_name(apple: Simulator) -> None:
    async with ConnectProxy(apple.port).listening() as port:
        outcomes = await push(apple, f"http://127.0.0.1:{port}", host="api.elsewhere.example", port=443)
    assert "certificate" in why(outcomes)
    assert not apple.received


async def test_a_proxy_is_given_user_and_password(apple: Simulator) -> None:
    async with ConnectProxy(apple.port, credentials=f"us er:{PASSWORD}").listening() as port:
        outcomes = await push(apple, f"http://us%20er:{SPELT}@localhost:{port}")
    assert outcomes == [ACCEPTED] * 3


@pytest.mark.parametrize(
    "login, complaint",
    [
        ("", "wants credentials (HTTP/1.1 407 Proxy Authentication Required): write http://user:password@host:port"),
        (f"user:{SPELT}@", "does not take these credentials (HTTP/1.1 407 Proxy Authentication Required)"),
    ],
    ids=["without", "wrong"],
)
async def test_a_proxy_that_wants_other_credentials_says_what_to_do_and_nothing_secret(
    apple: Simulator, login: str, complaint: str
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with ConnectProxy(apple.port, credentials="user:another").listening() as port:
            outcomes = await push(apple, f"http://{login}127.0.0.1:{port}")
    assert complaint in why(outcomes)
    for secret in (PASSWORD, SPELT, b64encode(f"user:{PASSWORD}".encode()).decode()):
        assert secret not in f"{outcomes}{logs}"


@pytest.mark.parametrize(
    "answer, complaint",
    [
        (
            b"HTTP/1.1 403 No such place\r\n\r\n",
            "would not connect to localhost:2197: it answered HTTP/1.1 403 No such",
        ),
        (b"HTTP/1.0 502 Bad\x1b[2J Gateway\r\ncontent-length: 0\r\n\r\n", "it answered HTTP/1.0 502 Bad?[2J Gateway"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "did not answer as an HTTP proxy does"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 2000, "did not answer as an HTTP proxy does"),
        (b"", "did not answer as an HTTP proxy does"),
        (b"HTTP/1.1 200 OK\r\n\r\nand more", "sent octets of its own"),
    ],
    ids=["refusal", "control characters", "no proxy", "endless head", "silence", "more"],
)
async def test_what_a_proxy_answers_instead_is_told(apple: Simulator, answer: bytes, complaint: str) -> None:
    async with ConnectProxy(apple.port, instead=answer).listening() as port:
        outcomes = await push(apple, f"http://127.0.0.1:{port}", port=2197)
    assert f"cannot connect to localhost:2197: the proxy 127.0.0.1:{port} " in why(outcomes)
    assert complaint in why(outcomes)


async def test_a_proxy_that_does_not_answer_is_given_up(apple: Simulator) -> None:
    hung = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        hung.set()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    endpoint = Endpoint(
        "localhost",
        apple.port,
        client_context(apple.ca_pem),
        proxy=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
    )
    carrier = ApnsCarrier(
        lambda *_: Route(endpoint, apple.signing_key),
        settings=PoolSettings(connect_s=0.2, patience_s=0.5),
        clock=time.time,
    )
    batch = batch_of(1)
    ledger = Ledger(batch)
    carrier.carry(batch, range(1), ledger.report)
    assert "did not answer in time" in why(await ledger.settled())
    await carrier.aclose()
    server.close()
    await asyncio.wait_for(hung.wait(), 20)


async def test_a_proxys_address_that_cannot_be_used_is_told(apple: Simulator) -> None:
    assert "The proxy must be one that is spoken to in plain HTTP" in why(await push(apple, "https://127.0.0.1:1"))


@pytest.mark.parametrize(
    "url", ["https://proxy:3128", "socks5://proxy:1080", "http://proxy", "proxy:3128", "http://:3128", "http://p:99999"]
)
def test_what_is_no_proxys_address_is_refused_with_the_right_form(url: str) -> None:
    with pytest.raises(ConfigError, match="write http://host:port"):
        parse_proxy(url)


@pytest.mark.parametrize("url", ["ftp://user:canary@proxy:1", "http://user:canary@proxy", "http://user:canary@[::1:2"])
def test_a_proxys_password_is_never_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_proxy(url)
    assert "canary" not in str(caught.value)


def test_a_proxy_shows_its_place_only() -> None:
    proxy = parse_proxy("http://user:canary@proxy.example:3128/")
    assert repr(proxy) == "<proxy proxy.example:3128>"
    assert proxy.credentials == "user:canary"
    assert parse_proxy("http://[::1]:3128").host == "::1"


def test_an_endpoint_shows_no_password_of_its_proxy(apple: Simulator) -> None:
    endpoint = Endpoint("localhost", 443, client_context(apple.ca_pem), proxy="http://user:canary@proxy:3128")
    assert "canary" not in repr(Route(endpoint, apple.signing_key))
