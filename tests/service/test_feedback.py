"""The feedback service: real TLS clients on one side, a real store on the other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import structlog

from heliograph.callers import Callers, certificate_id
from heliograph.config import LegacySettings
from heliograph.doors.legacy import feedback
from heliograph.doors.legacy.feedback import Feedback, Turns
from heliograph.errors import ConfigError, StoreError
from heliograph.model import Access, App, DeviceToken, Environment, KnownCaller, Removal, SigningKey
from heliograph.net import streams
from heliograph.net.tls import Identity, throwaway_identity
from heliograph.protocols.binary import FeedbackReader
from heliograph.stores.sqlite import SqliteStore
from tests.certificates import TOPIC, Issued, push_certificate

PATIENCE_S = 20.0
"""After this a test gives up; on any machine that is not broken, nothing takes so long."""
APP, OTHER = "shop", "other"
DIED_AT = 1_700_000_000
PRODUCTION, DEVELOPMENT = Environment.PRODUCTION, Environment.DEVELOPMENT
MANY = 100_000
"""More removals than the kernel's buffers hold."""
LONG_AGO = datetime(2012, 6, 1, tzinfo=UTC)

Tuples = list[tuple[int, bytes]]


@cache
def server_identity() -> Identity:
    return throwaway_identity(datetime.now(UTC))


@cache
def certificate(name: str) -> Issued:
    """What an old script has."""
    return push_certificate(name, now=LONG_AGO)


def caller(name: str, app: str = APP, environment: Environment | None = PRODUCTION) -> KnownCaller:
    pem = certificate(name).certificate_pem
    known_as = certificate_id(certificate(name).certificate_der)
    return KnownCaller(
        id=known_as, name=name, app=app, environment=environment, certificate=pem, created_at=time.time()
    )


def app_of(name: str, *environments: Environment) -> App:
    return App(name, (TOPIC,), (Access(SigningKey("KEY", "TEAM", b""), environments),))


def token(number: int) -> bytes:
    return b"%064x" % number


def told(*numbers: int, at: int = DIED_AT) -> Tuples:
    return [(at, token(number)) for number in numbers]


class Script:
    """A client as they were written then: a blocking socket."""

    def __init__(self, port: int, pem: Path | None, buffer: int | None = None) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if pem is not None:
            context.load_cert_chain(pem)
        plain = socket.socket()
        plain.settimeout(PATIENCE_S)
        if buffer is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        plain.connect(("127.0.0.1", port))
        self.socket = context.wrap_socket(plain, suppress_ragged_eofs=False)
        self._reader = FeedbackReader()
        self.tuples: Tuples = []

    def read(self, until: Callable[[Tuples], bool] = lambda _: False) -> Tuples:
        """All to the end, or until there is enough."""
        while not until(self.tuples) and (data := self.socket.recv(8192)):
            self.tuples += zip(*self._reader.receive(data), strict=True)
            # As the scripts do that read a tuple at a time, and none that is cut.
            assert not self._reader.held
        return self.tuples

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """As the kernel does for a process that dies with something unread."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class Door:
    """A feedback service, and what a test asks of it."""

    def __init__(self, service: Feedback, store: SqliteStore, folder: Path) -> None:
        self.service = service
        self.store = store
        self.folder = folder

    async def remove(
        self, *numbers: int, app: str = APP, environment: Environment = PRODUCTION, at: int = DIED_AT
    ) -> None:
        tokens = [DeviceToken(token(number).decode()) for number in numbers]
        await self.store.record((), [Removal(app, environment, each, at) for each in tokens])

    async def connect(self, name: str | None = "script", buffer: int | None = None) -> Script:
        pem = None
        if name is not None:
            pem = self.folder / f"{name}.pem"
            if not pem.exists():
                pem.write_bytes(certificate(name).pem)
        return await asyncio.to_thread(Script, self.service.port, pem, buffer)

    async def read(self, name: str | None = "script") -> Tuples:
        """What one reading to the end tells, once that is on record."""
        script = await self.connect(name)
        tuples = await asyncio.to_thread(script.read)
        script.close()
        await self.over()
        return tuples

    async def over(self) -> None:
        """Every reading has ended."""
        while tasks := tuple(self.service._tasks):
            await asyncio.wait(tasks)


@asynccontextmanager
async def open_door(
    folder: Path,
    callers: Iterable[KnownCaller] = (),
    environments: Sequence[Environment] = (PRODUCTION, DEVELOPMENT),
    turns: Turns | None = None,
    **settings: Any,
) -> AsyncIterator[Door]:
    store = await SqliteStore.open(folder / "heliograph.db")
    apps = {name: app_of(name, *environments) for name in (APP, OTHER)}
    known = Callers(store, apps, clock=time.time)
    await known.load()
    for each in (caller("script"), *callers):
        await known.add(each)
    service = Feedback(
        "main",
        LegacySettings(port=0, feedback_port=0, **settings),
        store=store,
        apps=apps,
        callers=known,
        identity=(server_identity().certificate_pem, server_identity().key_pem),
        turns=turns or Turns(),
    )
    await service.start()
    try:
        yield Door(service, store, folder)
    finally:
        await service.aclose()
        await store.aclose()


async def test_dead_tokens_are_told_with_their_times_then_the_connection_ends(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        await door.remove(1, 2)
        await door.remove(3, at=DIED_AT + 5)
        assert await door.read() == [*told(1, 2), *told(3, at=DIED_AT + 5)]


async def test_nothing_to_tell_is_an_end_at_once(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        assert await door.read() == []


async def test_removal_is_told_once(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        await door.remove(1, 2)
        assert await door.read() == told(1, 2)
        assert await door.read() == []
        await door.remove(3)
        await door.remove(1, at=DIED_AT + 9)  # it died anew
        assert await door.read() == [*told(3), *told(1, at=DIED_AT + 9)]
    async with open_door(tmp_path) as door:
        assert await door.read() == [], "it is known after a restart"


async def test_token_that_was_registered_again_is_not_told(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        await door.remove(1, 2, 3)
        assert await door.store.revive(APP, PRODUCTION, [token(2)], DIED_AT + 1) == 1
        assert await door.read() == told(1, 3)


async def test_each_environment_and_app_has_its_own_list(tmp_path: Path) -> None:
    others = [caller("sandbox", environment=DEVELOPMENT), caller("other", app=OTHER)]
    async with open_door(tmp_path, others) as door:
        await door.remove(1)
        await door.remove(2, environment=DEVELOPMENT)
        await door.remove(3, app=OTHER)
        assert await door.read("sandbox") == told(2)
        assert await door.read("script") == told(1)
        assert await door.read("other") == told(3)
        assert [await door.read(name) for name in ("script", "sandbox", "other")] == [[], [], []]


async def test_long_list_is_told_whole(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        await door.remove(*range(25_000))
        assert await door.read() == told(*range(25_000))
        assert await door.read() == []


async def test_reader_that_dies_in_the_middle_is_told_again(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        await door.remove(*range(25_000))
        for _ in range(3):
            script = await door.connect()
            assert await asyncio.to_thread(script.read, lambda tuples: len(tuples) > 100)
            script.reset()
            await door.over()
        assert await door.store.told_until(APP, PRODUCTION) == 0
        assert await door.read() == told(*range(25_000))


async def test_reader_that_closes_in_order_before_it_had_all_is_told_again(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        await door.remove(*range(MANY))
        script = await door.connect(buffer=4096)
        await asyncio.to_thread(script.read, lambda tuples: len(tuples) > 100)
        await asyncio.to_thread(script.socket.shutdown, socket.SHUT_WR)
        script.close()
        await door.over()
        assert await door.store.told_until(APP, PRODUCTION) == 0


async def test_reader_that_never_ends_is_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "UNENDED_S", 0.05)
    async with open_door(tmp_path) as door:
        await door.remove(1)
        script = await door.connect()
        assert await asyncio.to_thread(script.read) == told(1)
        await door.over()
        script.close()
        assert await door.read() == told(1)


async def test_reader_that_does_not_read_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "UNREAD_S", 0.1)
    async with open_door(tmp_path) as door:
        await door.remove(*range(MANY))
        script = await door.connect(buffer=4096)
        with structlog.testing.capture_logs() as lines:
            while not lines:
                await door.over()
                await asyncio.sleep(0)
        script.close()
        assert lines[0]["event"] == "feedback_not_read"
        assert "read nothing for" in lines[0]["why"]
        assert await door.store.told_until(APP, PRODUCTION) == 0


async def test_reader_that_ends_its_side_first_is_told_all_and_again(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        await door.remove(*range(5000))
        for _ in range(2):
            script = await door.connect()
            socket.socket.shutdown(script.socket, socket.SHUT_WR)
            assert await asyncio.to_thread(script.read) == told(*range(5000))
            script.close()
            await door.over()


@pytest.mark.parametrize("count", [0, 1, 5000])
async def test_who_sends_is_told_of_the_gateway_and_is_told_the_list_again(tmp_path: Path, count: int) -> None:
    async with open_door(tmp_path) as door:
        if count:
            await door.remove(*range(count))
        with structlog.testing.capture_logs() as lines:
            script = await door.connect()

            def write_then_read() -> None:
                with contextlib.suppress(OSError):
                    script.socket.sendall(b"\x01nonsense" * 10_000)
                    script.read()

            await asyncio.to_thread(write_then_read)
            script.close()
            await door.over()
        (line,) = [each for each in lines if each["event"] == "feedback_not_read"]
        assert line["why"] == f"it sends: notifications go to the gateway, port {door.service.settings.port}"
        assert await door.read() == told(*range(count))


async def test_readers_of_the_same_take_turns_and_tell_each_once(tmp_path: Path) -> None:
    second = caller("second")
    async with open_door(tmp_path, [second]) as door:
        await door.remove(*range(20_000))
        read = await asyncio.gather(*(door.read(name) for name in ("script", "second") * 5))
        assert sorted(each for tuples in read for each in tuples) == told(*range(20_000))
        assert sum(map(bool, read)) == 1


async def test_reader_waits_for_another_one_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "TURN_S", 0.05)
    others = [caller("second"), caller("sandbox", environment=DEVELOPMENT)]
    async with open_door(tmp_path, others) as door:
        await door.remove(1)
        await door.remove(2, environment=DEVELOPMENT)
        slow = await door.connect()
        assert await asyncio.to_thread(slow.read) == told(1)
        for name, tuples in (("second", []), ("sandbox", told(2))):
            script = await door.connect(name)
            with structlog.testing.capture_logs() as lines:
                assert await asyncio.to_thread(script.read) == tuples
            script.close()
            assert [line["event"] for line in lines] == ([] if tuples else ["feedback_busy"])
        slow.close()
        await door.over()
        assert await door.read() == []


async def test_two_listeners_do_not_tell_the_same_at_once(tmp_path: Path) -> None:
    turns = Turns()
    async with turns.take((APP, PRODUCTION)), open_door(tmp_path, turns=turns) as door:
        await door.remove(1)
        script = await door.connect()
        script.socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(script.read)
        script.close()


async def test_client_that_is_nobody_is_turned_away_and_told_of_in_the_log(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        for name in ("stranger", None):
            door.service._line_at = 0.0
            with structlog.testing.capture_logs() as lines:
                script = await door.connect(name)  # TLS 1.3: the client is through before the server has looked
                with pytest.raises(ssl.SSLError):
                    await asyncio.to_thread(script.read)
                script.close()
            assert [line["event"] for line in lines] == ["feedback_refused"]
            assert lines[0]["why"]
            assert "give" in lines[0]["hint"]


async def test_client_whose_environment_is_open_is_turned_away(tmp_path: Path) -> None:
    async with open_door(tmp_path, [caller("both", environment=None)]) as door:
        await door.remove(1)
        with structlog.testing.capture_logs() as lines:
            assert await door.read("both") == []
        assert "nothing says which is meant" in lines[0]["why"]
    async with open_door(tmp_path, environment=DEVELOPMENT) as door:
        await door.remove(2, environment=DEVELOPMENT)
        assert await door.read("both") == told(2)


async def test_app_may_be_that_of_the_listener(tmp_path: Path) -> None:
    async with open_door(tmp_path, app=APP, environment=PRODUCTION) as door:
        await door.remove(1)
        assert await door.read(None) == told(1)


@pytest.mark.parametrize("method", ["told_until", "find_removals", "tell_until"])
async def test_store_that_fails_tells_nothing_as_told(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_door(tmp_path) as door:
        await door.remove(1)

        async def fail(*_: object) -> None:
            raise StoreError("the disk is full")

        with monkeypatch.context() as broken, structlog.testing.capture_logs() as lines:
            broken.setattr(door.store, method, fail)
            assert await door.read() == ([] if method != "tell_until" else told(1))
            assert [line["event"] for line in lines] == ["cannot_tell"]
        assert await door.read() == told(1)


async def test_service_that_stops_has_the_list_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "STOP_S", 0.05)
    async with open_door(tmp_path) as door:
        await door.remove(1)
        script = await door.connect()
        assert await asyncio.to_thread(script.read) == told(1)
        await door.service.aclose()
        script.close()
    async with open_door(tmp_path) as door:
        assert await door.read() == told(1)


async def test_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with open_door(tmp_path) as door:
            settings = LegacySettings(port=0, feedback_port=port)
            second = Feedback(
                "second",
                settings,
                store=door.store,
                apps={},
                callers=Callers(door.store, {}, clock=time.time),
                identity=(server_identity().certificate_pem, server_identity().key_pem),
                turns=Turns(),
            )
            with pytest.raises(ConfigError, match="set another feedback_port"):
                await second.start()
            await second.aclose()
