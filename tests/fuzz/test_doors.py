"""Random frames over TLS at a whole server: it goes on, says what it should, and gets no larger.

What each connection brings follows from the seed and the connection's number, not from what runs beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import ssl
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from msgspec import Struct

from heliograph import admission, reasons
from heliograph.doors.legacy.columns import HeaderSets
from heliograph.model import Access, App, Environment
from heliograph.protocols.binary import (
    ErrorResponse,
    FrameReader,
    Status,
    enhanced_frame,
    error_packet,
    item_frame,
    items,
    simple_frame,
)
from heliograph.protocols.http2 import Field
from heliograph.simulator.apple import Verdict, Visit
from heliograph.simulator.faults import Answer
from heliograph.simulator.server import Simulator
from tests.faults.server import APP, TOPIC, Server
from tests.fuzz.frames import PAYLOAD, STREAMS, WORDS
from tests.fuzz.guided import mutate
from tests.wire import frames_by_hand as http2

CLIENTS = 6
"""At a time."""
PATIENCE_S = 30.0
"""Longer, and it stands still. It may wait 10 s for a handshake, and 5 s for what Apple says."""
WARM = 0.1
"""Of the time; from then on it may not grow."""
GROWTH_MB = 48
MORE_DESCRIPTORS = 8
"""More than before: connections to Apple, files of the store."""

UNKNOWN, DEAD = "0b" * 32, "0d" * 32
"""Device tokens: Apple does not know the one, and has buried the other."""

OTHER_TOPIC = "com.example.other"
OTHER_NAME = "other.example"
MORE = f"""
[apps.other]
topic = "{OTHER_TOPIC}"
key = "AuthKey_{{0}}.p8"
team_id = "{{1}}"
host = "localhost"
port = {{2}}
ca = "ca.pem"
[legacy.main]
port = 0
feedback_port = 0
app = "{APP}"
names = {{{{ "{OTHER_NAME}" = "other" }}}}
[apple_proxy.main]
port = 0
"""
"""Who else sends has an app apart: what waits for Apple is no matter of the door."""

BOUND = [
    b"".join(enhanced_frame(f"{n:064x}".encode(), PAYLOAD, n, 2**31) for n in range(1, 1001)),
    b"".join(item_frame(items(f"{n:08x}".encode(), PAYLOAD, n)) for n in range(1, 301)),
    enhanced_frame(b"ab", PAYLOAD, 1, 2**31) + enhanced_frame(UNKNOWN.encode(), PAYLOAD, 2, 2**31),
    enhanced_frame(DEAD.encode(), PAYLOAD, 1, 2**31) + enhanced_frame(b"ab", PAYLOAD, 2, 2**31),
    simple_frame(UNKNOWN.encode(), PAYLOAD) + simple_frame(DEAD.encode(), PAYLOAD),
    enhanced_frame(b"ab", b"[]", 9, 2**31),
]
"""Streams that have to do with more than the reader."""
GREETING = http2.PREFACE + http2.settings()
REQUEST = http2.headers(
    1,
    http2.block(
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", b"/3/device/" + b"ab" * 32),
        (b":authority", b"api.push.apple.com"),
        (b"apns-topic", TOPIC.encode()),
        (b"authorization", b"bearer eyJ.eyJ.AA"),
    ),
)
HTTP2 = [
    GREETING,
    REQUEST,
    REQUEST + http2.data(1, PAYLOAD, end=True),
    http2.ping(),
    http2.rst_stream(1, 8),
    http2.goaway(0),
    http2.window_update(0, 2**31 - 1),
    http2.settings(window=0),
    http2.settings(table_size=0, max_frame=2**24 - 1),
    http2.continuation(1, b"\x82"),
    http2.priority(1),
    http2.raw(99, 255, 1, b"?"),
]

whole = [pytest.mark.slow, pytest.mark.timeout(1200)]


# -- what is to be expected ------------------------------------------------------------------------------------------


class Expected(Struct, frozen=True):
    """Of a stream."""

    answers: set[bytes]
    """What may come before the end."""
    fewest: int
    most: int
    """Frames that are taken."""
    goes_on: bool
    """Another frame behind it would be taken."""


def expect(stream: bytes, app: App) -> Expected:
    """As the frame reader and admission say, which are pure."""
    reader = FrameReader()
    frames, error = reader.receive(stream)
    most = len(frames)
    if frames:
        now = time.time()
        headers = HeaderSets(TOPIC, (TOPIC,)).column(frames, now)
        checked = admission.check(app, Environment.PRODUCTION, now, headers, frames.tokens, frames.payloads)
        if checked.refused:
            first = min(checked.refused, key=lambda each: each.index or 0)
            most = first.index or 0
            status = reasons.TABLE[first.reason].legacy_status if first.reason in reasons.TABLE else None
            error = ErrorResponse(Status.PROCESSING_ERROR if status is None else status, frames.identifiers[most])
    answers = {b"" if error is None else error_packet(error.status, error.identifier)}
    fewest = most
    for place, token in enumerate(frames.tokens[:most]):
        if token in (UNKNOWN.encode(), DEAD.encode()):
            # Whether Apple's no, or that it is known by now, comes before the end is a matter of time.
            answers.add(error_packet(Status.INVALID_TOKEN, frames.identifiers[place]))
            fewest = min(fewest, place)
    return Expected(answers, fewest, most, error is None and not reader.held and len(answers) == 1)


# -- a server, and who watches it ------------------------------------------------------------------------------------


class Apple(Simulator):
    """Tells when a device token comes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._awaited: dict[bytes, asyncio.Event] = {}

    def awaits(self, token: str) -> asyncio.Event:
        return self._awaited.setdefault(b"/3/device/" + token.encode(), asyncio.Event())

    def judge(
        self,
        visit: Visit,
        fields: Sequence[Field],
        body: bytes,
        now: float,
        instead: Answer | None = None,
        identifier: int | None = None,
    ) -> Verdict:
        for name, value in fields:
            if name == b":path" and value in self._awaited:
                self._awaited.pop(value).set()
        return super().judge(visit, fields, body, now, instead, identifier)


class Log(deque[str]):
    """Keeps what went wrong, however much is logged."""

    def __init__(self) -> None:
        super().__init__(maxlen=100)
        self.wrong: list[str] = []
        self.ports: dict[str, int] = {}

    def append(self, line: str) -> None:
        super().append(line)
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if said["event"] == "listening":
                self.ports[said["service"]] = said["port"]
            if said["level"] in ("debug", "info", "warning"):
                return
        if len(self.wrong) < 100 and '"listening"' not in line:
            self.wrong.append(line)


class Doors:
    """The server's process."""

    def __init__(self, server: Server, log: Log, app: App, apple: Apple) -> None:
        self.server = server
        self.log = log
        self.app = app
        self.apple = apple
        process = server._process
        assert process is not None
        self._process = Path("/proc", str(process.pid))

    @property
    def gateway(self) -> int:
        return self.log.ports["gateway"]

    @property
    def proxy(self) -> int:
        return self.log.ports["proxy"]

    @property
    def rss_mb(self) -> float:
        return int((self._process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    @property
    def descriptors(self) -> int:
        return len(list((self._process / "fd").iterdir()))

    async def metric(self, name: str) -> int:
        async with aiohttp.ClientSession() as session, session.get(f"{self.server.url}/metrics") as response:
            found = re.search(rf'^{name}{{listener="main"}} (\S+)$', await response.text(), re.MULTILINE)
        return 0 if found is None else int(float(found[1]))

    async def is_quiet(self, most_descriptors: int) -> bool:
        """Whether there is one client left, and all else that was opened for clients is closed."""
        connections = await self.metric("heliograph_legacy_connections")
        return connections == 1 and self.descriptors <= most_descriptors

    async def ask_proxy(self) -> tuple[int, str]:
        async with httpx.AsyncClient(http2=True, verify=False) as http:
            answer = await http.post(f"https://127.0.0.1:{self.proxy}/3/device/{'ab' * 32}", content=PAYLOAD)
        return answer.status_code, answer.json()["reason"]


@asynccontextmanager
async def open_doors(folder: Path) -> AsyncIterator[Doors]:
    async with Apple(keep=0) as apple:
        apple.add_app(TOPIC)
        apple.rejects(UNKNOWN, "BadDeviceToken")
        apple.rejects(DEAD, "Unregistered", since=int(time.time() * 1000))
        apple.add_app(OTHER_TOPIC)
        key = apple.signing_key.key_id, apple.signing_key.team_id
        more = MORE.format(*key, apple.port)
        server = Server(folder, apple, more)
        server.log = log = Log()
        try:
            await server.start()
            app = App(APP, (TOPIC,), (Access(apple.signing_key, (Environment.PRODUCTION,)),))
            yield Doors(server, log, app, apple)
        finally:
            await server.kill()


def client_context(*protocols: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


# -- clients ---------------------------------------------------------------------------------------------------------


class Tally(Struct):
    """Of all connections so far."""

    connections: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    fewest: int = 0
    most: int = 0


class Clients:
    """Misbehave in threads until the time is over."""

    def __init__(self, doors: Doors, seed: int, seconds: float) -> None:
        self.tally = Tally(Counter(), Counter())
        self.stopped = False
        self._doors = doors
        self._seed = seed
        self._until = time.monotonic() + seconds
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._plain, self._http2, self._no_alpn = client_context(), client_context("h2"), client_context()

    def work(self) -> None:
        while time.monotonic() < self._until and not self.stopped:
            number = next(self._numbers)
            chance = random.Random(f"{self._seed} {number}")
            kind = chance.choices(*zip(*_KINDS.items(), strict=True))[0]
            data = b""
            try:
                if kind == "no TLS":
                    data = self._draw_hello(chance)
                    self._babble(data)
                elif kind == "HTTP/2":
                    data = self._draw(chance, HTTP2, HTTP2)
                    self._speak_http2(data, chance)
                else:
                    data = self._draw(chance, [*STREAMS, *BOUND], WORDS)
                    self._converse(kind, data, chance)
            except Exception as error:
                self.stopped = True
                error.add_note(f"connection {number}, {kind}, of seed {self._seed}: {data.hex()}")
                raise
            with self._lock:
                self.tally.connections[kind] += 1

    def _draw(self, chance: random.Random, streams: Sequence[bytes], words: Sequence[bytes]) -> bytes:
        stream = b"".join(chance.choices(streams, k=chance.choice((1, 1, 2, 5))))
        if streams is HTTP2 and chance.random() < 0.9:
            stream = GREETING + stream
        return mutate(stream, streams, words, chance) if chance.random() < 0.7 else stream

    def _draw_hello(self, chance: random.Random) -> bytes:
        outgoing = ssl.MemoryBIO()
        tls = self._plain.wrap_bio(ssl.MemoryBIO(), outgoing)
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        hello = outgoing.read()
        return mutate(hello, STREAMS, WORDS, chance) if chance.random() < 0.8 else chance.choice(STREAMS)

    def _babble(self, data: bytes) -> None:
        with self._connect(self._doors.gateway) as plain, contextlib.suppress(ConnectionError):
            plain.sendall(data)
            plain.shutdown(socket.SHUT_WR)
            _read(plain)

    def _speak_http2(self, data: bytes, chance: random.Random) -> None:
        context = self._http2 if chance.random() < 0.8 else self._no_alpn
        with (
            contextlib.suppress(ConnectionError, ssl.SSLEOFError),
            self._connect(self._doors.proxy) as plain,
            context.wrap_socket(plain) as tls,
        ):
            for piece in _pieces(data, chance):
                tls.sendall(piece)
            socket.socket.shutdown(tls, socket.SHUT_WR)
            _read(tls)

    def _converse(self, kind: str, data: bytes, chance: random.Random) -> None:
        expected = expect(data, self._doors.app)
        pieces = list(_pieces(data, chance))
        fewest, most = expected.fewest, expected.most
        with self._connect(self._doors.gateway) as plain, self._plain.wrap_socket(plain) as tls:
            if kind == "resets":
                fewest = 0
                pieces = pieces[: chance.randint(0, len(pieces))]
            for piece in pieces:
                tls.sendall(piece)
            if kind == "goes on" and expected.goes_on:
                time.sleep(chance.choice((0, 0.02)))
                tls.sendall(enhanced_frame(b"ab" * 32, PAYLOAD, 1, 2**31))
                fewest, most = fewest + 1, most + 1
            if kind == "resets":
                tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif kind != "closes":
                socket.socket.shutdown(tls, socket.SHUT_WR)
                answer = _read(tls)
                assert answer in expected.answers, f"{answer!r} came, and not one of {expected.answers}"
                with self._lock:
                    self.tally.answers[str(answer[1]) if answer else "none"] += 1
        with self._lock:
            self.tally.fewest += fewest
            self.tally.most += most

    def _connect(self, port: int) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return plain


_KINDS = {"ends": 10, "goes on": 5, "closes": 4, "resets": 3, "no TLS": 2, "HTTP/2": 4}
"""How a client behaves in the end; how often."""


def _pieces(data: bytes, chance: random.Random) -> Iterator[bytes]:
    count = chance.choice((0, 0, 1, 5, 40))
    cuts = sorted(chance.randint(0, len(data)) for _ in range(count))
    return (data[start:stop] for start, stop in pairwise((0, *cuts, len(data))) if start < stop)


def _read(connection: socket.socket) -> bytes:
    """All that comes before the end."""
    found = b""
    while octets := connection.recv(4096):
        found += octets
    return found


# -- the campaign ----------------------------------------------------------------------------------------------------


class Bystander:
    """Somebody else's connection, which sends a frame now and then for as long as all this lasts."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors
        plain = socket.create_connection(("127.0.0.1", doors.gateway), PATIENCE_S)
        self._tls = client_context().wrap_socket(plain, server_hostname=OTHER_NAME)
        self.sent = 0
        self.worst_s = 0.0

    async def send(self) -> None:
        """Fails where Apple does not get it."""
        self.sent += 1
        token = f"{self.sent:062x}ff"
        arrived = self._doors.apple.awaits(token)
        began = time.monotonic()
        await asyncio.to_thread(self._tls.sendall, enhanced_frame(token.encode(), PAYLOAD, self.sent, 2**31))
        async with asyncio.timeout(PATIENCE_S):
            await arrived.wait()
        self.worst_s = max(self.worst_s, time.monotonic() - began)

    async def last_words(self) -> bytes:
        return await asyncio.to_thread(_read, self._tls)

    def close(self) -> None:
        self._tls.close()


@pytest.mark.parametrize("seconds", [6, pytest.param(600, marks=whole)], ids=["short", "whole"])
async def test_a_server_takes_random_frames_as_it_should_and_does_not_stop_fall_or_grow(
    tmp_path: Path, seconds: int
) -> None:
    seed = int(os.environ.get("SEED") or random.randrange(2**32))
    print(f"again with SEED={seed}")  # noqa: T201 - shown where the test fails
    async with open_doors(tmp_path) as doors:
        with contextlib.closing(Bystander(doors)) as bystander:
            await bystander.send()
            descriptors = doors.descriptors
            tally, warm_mb = await campaign(doors, bystander, seed, seconds)
            async with asyncio.timeout(PATIENCE_S):
                while not await doors.is_quiet(descriptors + MORE_DESCRIPTORS):  # noqa: ASYNC110 - in another process
                    await asyncio.sleep(0.1)
            await bystander.send()
            frames = await doors.metric("heliograph_legacy_frames_total")
            rss_mb = doors.rss_mb
            print(  # noqa: T201 - the result of a campaign
                f"{dict(tally.connections)}, answers {dict(tally.answers)}; {frames:,} frames taken, of "
                f"{tally.fewest:,} to {tally.most:,}; another client waited {bystander.worst_s * 1000:.0f} ms at most; "
                f"{warm_mb:.0f} MB became {rss_mb:.0f}, {descriptors} descriptors {doors.descriptors}"
            )
            assert tally.fewest <= frames - bystander.sent <= tally.most
            assert rss_mb < warm_mb + GROWTH_MB
            assert await doors.ask_proxy() == (403, "MissingProviderToken")
            assert doors.log.wrong == []
            doors.server.send_signal(signal.SIGTERM)
            assert await bystander.last_words() == error_packet(Status.SHUTDOWN, bystander.sent)
            assert await doors.server.ended() == 0


async def campaign(doors: Doors, bystander: Bystander, seed: int, seconds: float) -> tuple[Tally, float]:
    """What the clients came to, and the server's memory in MB when it was warm."""
    clients = Clients(doors, seed, seconds)
    warm_mb, warm_at = 0.0, time.monotonic() + WARM * seconds
    with ThreadPoolExecutor(CLIENTS) as threads:  # not among asyncio's own, where they would leave none for others
        working = [asyncio.wrap_future(threads.submit(clients.work)) for _ in range(CLIENTS)]
        try:
            while not all(each.done() for each in working):
                await bystander.send()
                await asyncio.sleep(0.2)
                if not warm_mb and time.monotonic() > warm_at:
                    warm_mb = doors.rss_mb
        finally:
            clients.stopped = True
            ended = await asyncio.gather(*working, return_exceptions=True)
    for failure in ended:
        if failure is not None:
            raise failure
    return clients.tally, warm_mb
