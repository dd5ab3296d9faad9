"""The gateway for old scripts: real TLS clients on one side, the simulator on the other, a real store between."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import random
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from heliograph.callers import Callers, certificate_id
from heliograph.config import LegacySettings
from heliograph.doors.legacy import Gateway
from heliograph.doors.legacy import connection as connection_module
from heliograph.doors.legacy import gateway as gateway_module
from heliograph.doors.legacy.common import advise
from heliograph.doors.receipts import meaning
from heliograph.errors import ConfigError, Overloaded, StoreError
from heliograph.model import Access, App, Environment, Filter, KnownCaller, PushType, Receipt, State
from heliograph.net import streams
from heliograph.net.tls import throwaway_identity
from heliograph.protocols.binary import (
    ErrorReader,
    ErrorResponse,
    Status,
    enhanced_frame,
    error_packet,
    item_frame,
    items,
    simple_frame,
)
from heliograph.simulator.faults import Answer, Delay
from heliograph.simulator.server import Simulator
from heliograph.telemetry import Standing, Telemetry
from tests.service.house import APP, PATIENCE_S, PAYLOAD, TOPIC, House, open_house, token

LATER = int(time.time()) + 3600
UNKNOWN_TOKEN = Answer(400, "BadDeviceToken")
PRODUCTION = Environment.PRODUCTION
BACKGROUND = b'{"aps":{"content-available":1},"what":"news"}'


# -- old scripts -----------------------------------------------------------------------------------------------------


@lru_cache
def client_certificate(name: str = "script", issuer: str | None = None) -> tuple[bytes, bytes]:
    """Certificate and key as PEM, long expired; of `issuer`, with its certificate behind, or of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    chain, signing = b"", key
    if issuer is not None:
        chain, signing_pem = client_certificate(issuer)
        loaded = load_pem_private_key(signing_pem, None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        signing = loaded
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"Apple Push Services: {name}")])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(x509.load_pem_x509_certificate(chain).subject if chain else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2012, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2013, 1, 1, tzinfo=datetime.UTC))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(signing, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return made.public_bytes(Encoding.PEM) + chain, pem


def known_caller(name: str = "script", **more: Any) -> KnownCaller:
    certificate, _ = client_certificate(name)
    der = ssl.PEM_cert_to_DER_cert(certificate.decode())
    known: dict[str, Any] = {"app": APP, "certificate": certificate, "created_at": time.time(), **more}
    return KnownCaller(id=certificate_id(der), name=name, **known)


class Script:
    """A client as they were written then: a blocking socket, in a thread."""

    def __init__(self, connected: ssl.SSLSocket) -> None:
        self.socket = connected

    async def send(self, *frames: bytes) -> None:
        await asyncio.to_thread(self.socket.sendall, b"".join(frames))

    async def error(self) -> ErrorResponse | None:
        """What comes before the end; None: nothing."""
        return await asyncio.to_thread(self._error)

    def _error(self) -> ErrorResponse | None:
        reader = ErrorReader()
        found = None
        while octets := self.socket.recv(100):
            found = found or reader.receive(octets)
        return found

    def end(self) -> None:
        """End our side, and read on."""
        socket.socket.shutdown(self.socket, socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Door:
    """A gateway, and what a test asks of it."""

    def __init__(self, house: House, gateway: Gateway, callers: Callers, telemetry: Telemetry, folder: Path) -> None:
        self.house = house
        self.apple = house.apple
        self.gateway = gateway
        self.callers = callers
        self.telemetry = telemetry
        self._folder = folder

    async def connect(self, name: str | None = "script", server_name: str = "gateway.push.apple.com") -> Script:
        """`name`: of its certificate; with ` of ` and another name: which that one has issued."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if name is not None:
            path = self._folder / f"{name}.pem"
            path.write_bytes(b"".join(client_certificate(*name.split(" of "))))
            context.load_cert_chain(path)

        def connect() -> ssl.SSLSocket:
            plain = socket.create_connection(("127.0.0.1", self.gateway.port), PATIENCE_S)
            return context.wrap_socket(plain, server_hostname=server_name)

        return Script(await asyncio.to_thread(connect))

    async def kept(self) -> list[Receipt]:
        """All notifications that there are, oldest first."""
        found: list[Receipt] = []
        before = None
        while True:
            page = await self.house.relay.notifications(Filter(), before, 1000)
            found += page.receipts
            if (before := page.next) is None:
                return found[::-1]

    async def refused(self) -> list[Receipt]:
        """Those that were refused as they came."""
        return [each for each in await self.kept() if each.state is State.REJECTED and each.status is None]

    async def taken(self, count: int) -> list[Receipt]:
        """Those that were not, as soon as there are so many."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = [each for each in await self.kept() if each.state is not State.REJECTED or each.status]
                assert len(found) <= count
                if len(found) == count:
                    return found
                await asyncio.sleep(0.01)

    async def ended(self, count: int) -> list[Receipt]:
        """As `taken`, when nothing is left to do."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = await self.taken(count)
                if all(each.state not in (State.QUEUED, State.SENT) for each in found):
                    return found
                await asyncio.sleep(0.01)

    async def until_closed(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.gateway._common.connections:  # noqa: ASYNC110 - nobody rings a bell for it
                await asyncio.sleep(0.01)

    @property
    def received(self) -> Counter[str]:
        """How often Apple took each device token."""
        return Counter(each.token for each in self.apple.received)


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator(keep=50_000) as apple:
        yield apple


@pytest.fixture
async def house(tmp_path: Path, apple: Simulator) -> AsyncIterator[House]:
    async with open_house(tmp_path, apple) as house:
        yield house


@pytest.fixture
async def door(house: House, tmp_path: Path) -> AsyncIterator[Door]:
    async with open_door(house, tmp_path) as door:
        yield door


@asynccontextmanager
async def open_door(
    house: House, folder: Path, callers: Sequence[KnownCaller] | None = None, **settings: Any
) -> AsyncIterator[Door]:
    apps = dict(house.relay._apps)
    house.relay._apps = apps
    known = Callers(house.store, apps, clock=time.time)
    for each in (known_caller(),) if callers is None else callers:
        await known.add(each)
    identity = throwaway_identity(datetime.datetime.now(datetime.UTC))
    telemetry = Telemetry()
    gateway = Gateway(
        "main",
        LegacySettings(port=0, feedback_port=0, **settings),
        relay=house.relay,
        apps=apps,
        callers=known,
        identity=(identity.certificate_pem, identity.key_pem),
        telemetry=telemetry,
        clock=time.time,
    )
    await gateway.start()
    try:
        yield Door(house, gateway, known, telemetry, folder)
    finally:
        await gateway.aclose()


def frame(number: int, *, payload: bytes = PAYLOAD, expiration: int = LATER, identifier: int | None = None) -> bytes:
    return enhanced_frame(token(number).encode(), payload, number if identifier is None else identifier, expiration)


def frames(numbers: Sequence[int]) -> bytes:
    return b"".join(map(frame, numbers))


def tokens(numbers: Sequence[int]) -> Counter[str]:
    return Counter(map(token, numbers))


# -- what goes in ----------------------------------------------------------------------------------------------------


async def test_a_frame_reaches_apple_and_the_script_hears_nothing(door: Door) -> None:
    with await door.connect() as script:
        await script.send(frame(7))
        (receipt,) = await door.ended(1)
        assert receipt.state is State.ACCEPTED
        assert receipt.identifier == 7
        assert receipt.connection is not None
        assert receipt.connection.startswith("main-")
        (received,) = door.apple.received
        assert (received.token, received.payload, received.topic) == (token(7), PAYLOAD, TOPIC)
        script.end()
        assert await script.error() is None


async def test_a_thousand_frames_in_one_packet_are_each_sent_once(door: Door) -> None:
    with await door.connect() as script:
        await script.send(frames(range(1, 1001)))
        await door.ended(1000)
    assert door.received == tokens(range(1, 1001))


async def test_frames_of_a_script_that_writes_and_closes_at_once_are_all_sent(door: Door) -> None:
    for start, count in ((1, 1), (2, 999), (1001, 5000)):
        script = await door.connect()
        await script.send(frames(range(start, start + count)))
        script.close()
    await door.ended(6000)
    assert door.received == tokens(range(1, 6001))
    await door.until_closed()


async def test_frames_of_a_script_that_is_killed_in_the_middle_of_one_are_sent_up_to_it(door: Door) -> None:
    script = await door.connect()
    await script.send(frames(range(1, 11)), frame(11)[:-5])
    await door.taken(10)
    script.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    script.close()
    await door.until_closed()
    await door.ended(10)
    assert door.received == tokens(range(1, 11))


async def test_commands_of_all_kinds_are_taken_from_one_connection(door: Door) -> None:
    sent = [
        simple_frame(token(1).encode(), PAYLOAD),
        frame(2),
        item_frame(items(token(3).encode(), PAYLOAD, 3, LATER, 5)),
        item_frame([(99, b"?"), *reversed(items(token(4).encode(), PAYLOAD, 4))]),
        item_frame(items(token(5).encode(), PAYLOAD, None, 0, 10)),
        enhanced_frame(b"ab" * 100, PAYLOAD, 6, 0),
        simple_frame(b"ab", PAYLOAD),
    ]
    with await door.connect() as script:
        await script.send(*sent)
        receipts = await door.ended(7)
    assert [receipt.token for receipt in receipts] == [*map(token, range(1, 6)), "ab" * 100, "ab"]
    assert [receipt.identifier or 0 for receipt in receipts] == [0, 2, 3, 4, 0, 6, 0]
    assert [receipt.expiration for receipt in receipts] == [None, LATER, LATER, None, 0, 0, None]
    assert {receipt.state for receipt in receipts} == {State.ACCEPTED}


async def test_frames_that_come_an_octet_at_a_time_are_taken(door: Door) -> None:
    sent = simple_frame(token(1).encode(), PAYLOAD) + frame(2)
    sent += item_frame(items(token(3).encode(), PAYLOAD, 3, LATER, 5))

    def trickle(script: Script) -> None:
        for octet in sent:
            script.socket.sendall(bytes((octet,)))

    with await door.connect() as script:
        script.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.to_thread(trickle, script)
        await door.ended(3)
    assert door.received == tokens(range(1, 4))


async def test_expirations_that_have_passed_are_tried_once(door: Door) -> None:
    expirations = [0, 1, int(time.time()) - 1, LATER]
    with await door.connect() as script:
        await script.send(*[frame(number, expiration=each) for number, each in enumerate(expirations, 1)])
        receipts = await door.ended(4)
    assert [receipt.expiration for receipt in receipts] == [0, 0, 0, LATER]
    assert {receipt.state for receipt in receipts} == {State.ACCEPTED}


async def test_priorities_and_background_payloads_become_what_apple_takes_today(door: Door) -> None:
    both = b'{"aps":{"content-available":1,"alert":"look"}}'
    cases = [(PAYLOAD, None), (PAYLOAD, 5), (PAYLOAD, 10), (BACKGROUND, None), (BACKGROUND, 5), (BACKGROUND, 10)]
    cases.append((both, 10))
    with await door.connect() as script:
        await script.send(
            *[
                item_frame(items(token(number).encode(), payload, number, LATER, priority))
                for number, (payload, priority) in enumerate(cases, 1)
            ]
        )
        receipts = await door.ended(7)
    alert, background = PushType.ALERT, PushType.BACKGROUND
    assert [receipt.push_type for receipt in receipts] == [*[alert] * 3, *[background] * 3, alert]
    assert {receipt.state for receipt in receipts} == {State.ACCEPTED}


async def test_a_certificate_for_voip_sends_voip_pushes(house: House, tmp_path: Path) -> None:
    async with open_door(house, tmp_path, [known_caller(topic=f"{TOPIC}.voip")]) as door:
        with await door.connect() as script:
            await script.send(frame(1, payload=b'{"caller":"Ann","room":"%s"}' % (b"x" * 4500)))
            (receipt,) = await door.ended(1)
    assert (receipt.push_type, receipt.topic, receipt.state) == (PushType.VOIP, f"{TOPIC}.voip", State.ACCEPTED)


# -- what is refused at once -----------------------------------------------------------------------------------------


async def test_everything_before_a_bad_frame_is_taken_and_nothing_behind(door: Door) -> None:
    bad = frame(500, payload=b'{"aps":')
    with await door.connect() as script:
        await script.send(frames(range(1, 500)), bad, frames(range(501, 1001)))
        assert await script.error() == ErrorResponse(Status.PROCESSING_ERROR, 500)
    await door.ended(499)
    assert door.received == tokens(range(1, 500))


@pytest.mark.parametrize(
    "bad,status",
    [
        (enhanced_frame(b"", PAYLOAD, 3, 0), Status.MISSING_TOKEN),
        (enhanced_frame(b"ab" * 101, PAYLOAD, 3, 0), Status.INVALID_TOKEN_SIZE),
        (enhanced_frame(b"ab" * 32, b"", 3, 0), Status.MISSING_PAYLOAD),
        (enhanced_frame(b"ab" * 32, b" " * 5121, 3, 0), Status.INVALID_PAYLOAD_SIZE),
        (enhanced_frame(b"ab" * 32, b'{"aps":{}}'.ljust(5000), 3, 0), Status.INVALID_PAYLOAD_SIZE),
        (enhanced_frame(b"ab" * 32, b"no JSON", 3, 0), Status.PROCESSING_ERROR),
        (item_frame(items(b"ab" * 32, PAYLOAD, 3, 0, 7)), Status.PROCESSING_ERROR),
        (item_frame([*items(b"ab" * 32, PAYLOAD, 3), (1, b"x" * 32)]), Status.PROTOCOL_ERROR),
    ],
)
async def test_a_bad_frame_is_named_with_its_status(door: Door, bad: bytes, status: Status) -> None:
    with await door.connect() as script:
        await script.send(frame(1), frame(2), bad, frame(4))
        assert await script.error() == ErrorResponse(status, 3)
    await door.ended(2)
    assert door.received == tokens([1, 2])


async def test_a_frame_that_is_refused_as_it_came_has_a_receipt_of_its_own(door: Door) -> None:
    with await door.connect() as script:
        await script.send(frame(1), frame(2, payload=b"no JSON", identifier=77), frame(3))
        assert await script.error() == ErrorResponse(Status.PROCESSING_ERROR, 77)
    (taken,) = await door.ended(1)
    (receipt,) = await door.refused()
    assert (receipt.connection, receipt.identifier, receipt.token) == (taken.connection, 77, token(2))
    assert (receipt.reason, receipt.attempts, receipt.app) == ("BadRequestPayload", 0, APP)
    assert receipt.why is not None
    assert meaning(receipt).endswith(f": {receipt.why}")
    assert "Apple was not asked" in meaning(receipt)


async def test_a_receipt_that_cannot_be_kept_delays_no_error_packet(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise StoreError("no disk")

    monkeypatch.setattr(door.house.store, "keep", fail)
    with structlog.testing.capture_logs() as logs, await door.connect() as script:
        await script.send(frame(1), frame(2, payload=b"no JSON"), frame(3))
        assert await script.error() == ErrorResponse(Status.PROCESSING_ERROR, 2)
    assert [each["event"] for each in logs if each["log_level"] == "error"] == ["cannot_keep"]
    await door.ended(1)


async def test_of_two_bad_frames_that_come_at_once_the_first_is_told_of(door: Door) -> None:
    refused, unreadable = frame(2, payload=b"no JSON"), enhanced_frame(b"", PAYLOAD, 4, 0)
    for sent, error in (
        ((frame(1), refused, frame(3), unreadable), ErrorResponse(Status.PROCESSING_ERROR, 2)),
        ((frame(1), unreadable, frame(3), refused), ErrorResponse(Status.MISSING_TOKEN, 4)),
    ):
        with await door.connect() as script:
            await script.send(*sent)
            assert await script.error() == error
    await door.ended(2)


async def test_a_bad_frame_of_command_0_is_told_of_with_identifier_0(door: Door) -> None:
    with await door.connect() as script:
        await script.send(frame(1), simple_frame(b"", PAYLOAD), frame(3))
        assert await script.error() == ErrorResponse(Status.MISSING_TOKEN, 0)
    await door.ended(1)


async def test_the_limits_of_old_can_be_had_again(house: House, tmp_path: Path) -> None:
    async with open_door(house, tmp_path, max_payload=256, max_item_payload=2048) as door:
        long = b'{"aps":{"alert":"%s"}}' % (b"x" * 1000)
        with await door.connect() as script:
            await script.send(item_frame(items(token(1).encode(), long, 1)), frame(2, payload=long))
            assert await script.error() == ErrorResponse(Status.INVALID_PAYLOAD_SIZE, 2)
        await door.ended(1)


async def test_an_app_with_several_topics_needs_a_certificate_that_names_one(house: House, tmp_path: Path) -> None:
    async with open_door(house, tmp_path) as door:
        app = house.relay._apps[APP]
        house.relay._apps[APP] = App(APP, (TOPIC, "com.example.other"), app.access)  # type: ignore[index]
        with await door.connect() as script:
            await script.send(frame(1))
            assert await script.error() == ErrorResponse(Status.MISSING_TOPIC, 1)


async def test_a_script_that_is_still_writing_ten_megabytes_can_read_its_error(door: Door) -> None:
    with await door.connect() as script:
        await script.send(frame(1), enhanced_frame(b"", PAYLOAD, 2, 0), frames(range(3, 40_000)))
        await script.send(bytes(4_000_000))
        assert await script.error() == ErrorResponse(Status.MISSING_TOKEN, 2)
    await door.ended(1)


async def test_a_script_may_send_an_empty_token_to_see_that_all_else_was_taken(door: Door) -> None:
    with await door.connect() as script:
        await script.send(frames(range(1, 301)), enhanced_frame(b"", b"", 301, 0))
        assert await script.error() == ErrorResponse(Status.MISSING_TOKEN, 301)
    await door.ended(300)


# -- device tokens that are held back --------------------------------------------------------------------------------


async def remove(door: Door, number: int) -> None:
    """Have it known that this device token is dead."""
    door.apple.unregister(token(number), 1_700_000_000_000)
    await door.house.receipts(await door.house.push([token(number)]))


async def test_a_dead_token_is_told_of_where_its_frame_can_be_named(door: Door) -> None:
    await remove(door, 2)
    with await door.connect() as script:
        await script.send(frames(range(1, 4)))
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 2)
    await door.ended(2)


async def test_a_dead_token_in_a_frame_without_identifier_is_sent_to_again(door: Door) -> None:
    await remove(door, 2)
    with await door.connect() as script:
        await script.send(*[simple_frame(token(number).encode(), PAYLOAD) for number in (1, 2, 3)])
        receipts = await door.ended(4)
        script.end()
        assert await script.error() is None
    assert [receipt.reason for receipt in receipts] == ["Unregistered", None, "Unregistered", None]


async def test_a_dead_token_is_always_sent_to_again_where_the_listener_is_set_so(house: House, tmp_path: Path) -> None:
    async with open_door(house, tmp_path, refuse_removed=False) as door:
        await remove(door, 2)
        with await door.connect() as script:
            await script.send(frames(range(1, 4)))
            await door.ended(4)
    assert door.received == tokens([1, 3])


@pytest.mark.parametrize("named", [True, False])
async def test_a_token_in_quarantine_is_always_told_of(house: House, tmp_path: Path, named: bool) -> None:
    async with open_door(house, tmp_path, refuse_removed=False) as door:
        door.apple.rejects(token(2), "BadDeviceToken")
        await house.receipts(await house.push([token(2)]))
        with await door.connect() as script:
            await script.send(frame(1), frame(2) if named else simple_frame(token(2).encode(), PAYLOAD), frame(3))
            assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 2 if named else 0)
        await door.ended(2)


# -- what only Apple knows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["BadDeviceToken", "DeviceTokenNotForTopic"])
async def test_what_is_sent_again_behind_a_frame_that_apple_refused_reaches_each_device_once(
    door: Door, reason: str
) -> None:
    door.apple.rejects(token(500), reason)
    with await door.connect() as script:
        await script.send(frames(range(1, 1001)))
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 500)
    with await door.connect() as script:
        await script.send(frames(range(501, 1001)))
        receipts = await door.ended(1500)
    assert door.received == tokens([*range(1, 500), *range(501, 1001)])
    again = receipts[1000:]
    for receipt in again:
        if receipt.state is State.CANCELLED:
            assert receipt.reason == "SentBefore"
            assert receipt.why is not None
            assert any(each.id in receipt.why for each in receipts[:1000] if each.token == receipt.token)
        else:
            assert receipt.state is State.ACCEPTED
    before = {receipt.token: receipt.state for receipt in receipts[500:1000]}
    assert {receipt.token for receipt in again if receipt.state is State.CANCELLED} == {
        each for each, state in before.items() if state is State.ACCEPTED
    }
    assert len(door.gateway._common.sent) == 0


async def test_with_several_bad_tokens_every_other_one_is_reached_once(door: Door) -> None:
    bad = {17, 170, 400, 401, 899, 1000}
    for each in bad:
        door.apple.rejects(token(each), "BadDeviceToken")
    left = list(range(1, 1001))
    rounds = 0
    while left:
        rounds += 1
        assert rounds < 20
        with await door.connect() as script:
            await script.send(frames(left))
            if not bad.intersection(left):
                break
            error = await script.error()
            assert error is not None
            assert error.status == Status.INVALID_TOKEN
            assert error.identifier in bad
            left = [each for each in left if each > error.identifier]
    async with asyncio.timeout(PATIENCE_S):
        while door.received != tokens([each for each in range(1, 1001) if each not in bad]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(door.gateway._common.sent) == 0


async def test_what_is_on_the_wire_behind_a_bad_frame_is_waited_for_and_not_sent_twice(door: Door) -> None:
    door.apple.rejects(token(2), "BadDeviceToken")
    door.apple.misbehaves(Delay(0.5), token=token(3))
    door.apple.unregister(token(4), 1_700_000_000_000)
    with await door.connect() as script:
        await script.send(frames(range(1, 6)))
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 2)
    with await door.connect() as script:
        await script.send(frames(range(3, 6)))
        receipts = await door.ended(8)
    assert door.received == tokens([1, 3, 5])
    assert [receipt.reason for receipt in receipts[5:]] == ["SentBefore"] * 3


async def test_what_waits_to_be_tried_again_behind_a_bad_frame_is_cancelled_and_goes_out_once(door: Door) -> None:
    door.apple.misbehaves(Delay(0.5, then=UNKNOWN_TOKEN), token=token(2))
    door.apple.rejects(token(3), "TooManyRequests", times=1)  # it is tried again half a minute later
    with await door.connect() as script:
        await script.send(frames(range(1, 4)))
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 2)
    assert [receipt.state for receipt in await door.ended(3)] == [State.ACCEPTED, State.REJECTED, State.CANCELLED]
    with await door.connect() as script:
        await script.send(frame(3))
        await door.ended(4)
    assert door.received == tokens([1, 3])


async def test_the_lowest_of_the_bad_frames_that_are_known_is_named(door: Door) -> None:
    door.apple.rejects(token(5), "BadDeviceToken")
    door.apple.misbehaves(Delay(0.3, then=UNKNOWN_TOKEN), token=token(2))
    door.apple.misbehaves(Delay(0.6), token=token(7))  # keeps the word back until both are known
    with await door.connect() as script:
        await script.send(frames(range(1, 9)))
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 2)


async def test_apples_no_to_a_frame_of_command_0_is_told_of_with_identifier_0(door: Door) -> None:
    door.apple.rejects(token(2), "BadDeviceToken")
    with await door.connect() as script:
        await script.send(simple_frame(token(2).encode(), PAYLOAD))
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 0)


async def test_a_gone_device_draws_no_error_packet(door: Door) -> None:
    door.apple.unregister(token(2), 1_700_000_000_000)
    with await door.connect() as script:
        await script.send(frames(range(1, 4)))
        await door.ended(3)
        await script.send(frame(4))
        await door.ended(4)
        script.end()
        assert await script.error() is None
    assert door.received == tokens([1, 3, 4])


async def test_the_same_notification_twice_is_sent_twice(door: Door) -> None:
    with await door.connect() as script:
        await script.send(frame(1), frame(1), frame(1))
        await door.ended(3)
    assert door.received[token(1)] == 3


async def test_each_of_several_alike_is_known_again_once(door: Door) -> None:
    door.apple.misbehaves(Delay(0.3, then=UNKNOWN_TOKEN), token=token(1))
    with await door.connect() as script:
        await script.send(frame(1), frame(2), frame(2))
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 1)
    assert door.received == Counter({token(2): 2})
    with await door.connect() as script:
        await script.send(frame(2), frame(2), frame(2))
        await door.ended(6)
    assert door.received == Counter({token(2): 3})


async def test_what_differs_in_payload_or_expiration_is_sent_though_the_token_was_sent_to_before(door: Door) -> None:
    door.apple.misbehaves(Delay(0.3, then=UNKNOWN_TOKEN), token=token(1))
    with await door.connect() as script:
        await script.send(frame(1), frame(2))
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 1)
    with await door.connect() as script:
        await script.send(frame(2, expiration=LATER + 1), frame(2, payload=b'{"aps":{"alert":"another"}}'))
        await door.ended(4)
    assert door.received == Counter({token(2): 3})


async def test_what_is_known_again_behind_a_frame_that_is_bad_now_is_known_once_more(door: Door) -> None:
    door.apple.misbehaves(Delay(0.3, then=UNKNOWN_TOKEN), token=token(2))
    door.apple.rejects(token(3), "TooManyRequests", times=1)
    door.apple.misbehaves(Delay(0.2, then=UNKNOWN_TOKEN), token=token(3))
    for left, bad in (((1, 2, 3, 4, 5), 2), ((3, 4, 5), 3)):
        with await door.connect() as script:
            await script.send(frames(left))
            assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, bad)
    with await door.connect() as script:
        await script.send(frames((4, 5, 6)))
        receipts = await door.ended(5 + 3 + 3)
    assert door.received == tokens((1, 4, 5, 6))
    assert [receipt.reason for receipt in receipts[-3:]].count("SentBefore") == 2


@pytest.mark.parametrize("seed", range(3))
async def test_a_long_list_with_bad_tokens_reaches_every_good_one_once_whatever_the_order_of_answers(
    door: Door, seed: int
) -> None:
    chance = random.Random(seed)
    everybody = range(1, 4001)
    bad = set(chance.sample(everybody, 8))
    for each in bad:
        door.apple.misbehaves(Delay(chance.random() / 4, then=UNKNOWN_TOKEN), token=token(each))
    for each in chance.sample(sorted(set(everybody) - bad), 200):
        door.apple.misbehaves(Delay(chance.random() / 2), token=token(each))
    left = list(everybody)
    while True:
        with await door.connect() as script:
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(left), 500):
                    await script.send(frames(left[start : start + 500]))
            if not bad.intersection(left):
                break
            error = await script.error()
        assert error is not None
        assert error.identifier in bad
        left = left[left.index(error.identifier) + 1 :]
    async with asyncio.timeout(PATIENCE_S):
        while len(door.apple.received) < len(everybody) - len(bad):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert door.received == tokens(sorted(set(everybody) - bad))


async def test_another_client_of_the_app_may_send_the_same_meanwhile(house: House, tmp_path: Path) -> None:
    async with open_door(house, tmp_path, [known_caller("script"), known_caller("other")]) as door:
        door.apple.misbehaves(Delay(0.3, then=UNKNOWN_TOKEN), token=token(1))
        with await door.connect() as script:
            await script.send(frame(1), frame(2))
            assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 1)
        with await door.connect("other") as script:
            await script.send(frame(2))
            await door.ended(3)
        assert door.received == Counter({token(2): 2})


async def test_a_script_that_has_ended_its_side_reads_apples_no_and_what_it_sends_again_is_sent_once(
    door: Door,
) -> None:
    door.apple.misbehaves(Delay(0.3, then=UNKNOWN_TOKEN), token=token(2))
    door.apple.misbehaves(Delay(0.6), token=token(3))
    with await door.connect() as script:
        await script.send(frames(range(1, 5)))
        script.end()
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 2)
    with await door.connect() as script:
        await script.send(frames(range(3, 5)))
        await door.ended(6)
    assert door.received == tokens([1, 3, 4])


async def test_a_script_that_has_read_its_error_and_closed_may_take_its_time_to_send_again(door: Door) -> None:
    door.apple.rejects(token(2), "BadDeviceToken")
    script = await door.connect()
    await script.send(frames(range(1, 5)))
    script.end()
    assert await asyncio.to_thread(script.socket.recv, 6) == error_packet(Status.INVALID_TOKEN, 2)
    script.close()  # what the gateway writes from here on is answered with a reset
    await door.until_closed()
    await door.ended(4)
    with await door.connect() as script:
        await script.send(frames(range(3, 5)))
        await door.ended(6)
    assert door.received == tokens([1, 3, 4])


async def test_what_apple_refused_after_its_script_had_ended_is_told_of_when_it_comes_again(door: Door) -> None:
    door.apple.rejects(token(2), "BadDeviceToken")
    door.apple.misbehaves(Delay(0.3, then=UNKNOWN_TOKEN), token=token(4))
    with await door.connect() as script:
        await script.send(frames(range(1, 6)))
        script.end()
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 2)
    await door.ended(5)
    for left, error in (((3, 4, 5), ErrorResponse(Status.INVALID_TOKEN, 4)), ((5,), None)):
        with await door.connect() as script:
            await script.send(frames(left))
            script.end()
            assert await script.error() == error
    assert door.received == tokens([1, 3, 5])
    assert len(door.gateway._common.sent) == 0


@pytest.mark.parametrize("done", [False, True])
async def test_where_the_store_fails_to_cancel_nothing_is_lost_and_nothing_sent_twice(
    door: Door, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    door.apple.misbehaves(Delay(0.5, then=UNKNOWN_TOKEN), token=token(2))
    door.apple.rejects(token(3), "TooManyRequests", times=1)  # it is tried again half a minute later
    cancel = door.house.relay.cancel

    async def fail(ids: Sequence[str]) -> None:
        if done:
            await cancel(ids)
        raise StoreError("no disk")

    monkeypatch.setattr(door.house.relay, "cancel", fail)
    with await door.connect() as script:
        await script.send(frames(range(1, 5)))
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 2)
    with await door.connect() as script:
        await script.send(frames(range(3, 5)))
        again = (await door.taken(6))[4:]
        state, reason = (State.ACCEPTED, None) if done else (State.CANCELLED, "SentBefore")
        (receipt,) = [each for each in again if each.token == token(3)]
        await door.house.receipts([receipt.id], lambda each: (each.state, each.reason) == (state, reason))
    assert door.received == tokens([1, 3, 4] if done else [1, 4])


async def test_what_is_still_on_the_wire_when_its_client_is_told_is_known_again_once_apple_took_it(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "IN_FLIGHT_S", 0.1)
    door.apple.rejects(token(1), "BadDeviceToken")
    door.apple.misbehaves(Delay(1.0), token=token(2))
    door.apple.misbehaves(Delay(1.0, then=Answer(503, "ServiceUnavailable")), token=token(3), times=1)
    with await door.connect() as script:
        await script.send(frames(range(1, 4)))
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 1)
    receipts = await door.ended(3)
    assert [each.state for each in receipts] == [State.REJECTED, State.ACCEPTED, State.CANCELLED]
    with await door.connect() as script:
        await script.send(frames(range(2, 4)))
        await door.ended(5)
    assert door.received == tokens([2, 3])


async def test_a_script_that_is_gone_when_apple_refuses_loses_nothing_behind_it(door: Door) -> None:
    door.apple.rejects(token(2), "BadDeviceToken")
    script = await door.connect()
    await script.send(frames(range(1, 1001)))
    script.close()
    await door.ended(1000)
    await door.until_closed()
    assert door.received == tokens([1, *range(3, 1001)])
    # Who comes now sends no list again.
    assert len(door.gateway._common.sent) == 0
    with await door.connect() as script:
        await script.send(frames(range(3, 11)))
        await door.ended(1008)
    assert door.received[token(3)] == 2


async def test_frames_that_are_read_but_not_stored_when_apple_refuses_are_sent_where_the_script_is_gone(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    door.apple.misbehaves(Delay(0.3, then=UNKNOWN_TOKEN), token=token(2))
    put, go_on = door.house.store.put, asyncio.Event()

    async def slow(*given: Any, **more: Any) -> Any:
        await go_on.wait()
        return await put(*given, **more)

    script = await door.connect()
    await script.send(frames(range(1, 4)))
    await door.taken(3)
    monkeypatch.setattr(door.house.store, "put", slow)
    await script.send(frames(range(4, 8)))
    (connection,) = door.gateway._common.connections
    async with asyncio.timeout(PATIENCE_S):
        while connection._next < 7:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await script.send(frames(range(8, 11)))
        script.close()
        while connection._bad is None or not connection._stream.ended:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    go_on.set()
    await door.ended(10)
    assert door.received == tokens([1, *range(3, 11)])


# -- who is let in ---------------------------------------------------------------------------------------------------


async def refused(door: Door, *connect: Any) -> None:
    """The door takes no frame of such a client."""
    # With TLS 1.3 a client learns of it when it reads.
    with contextlib.suppress(ssl.SSLError, ConnectionError), await door.connect(*connect) as script:
        await script.send(frame(1))
        assert await script.error() is None
    await door.until_closed()
    assert await door.taken(0) == []


async def test_frames_of_a_client_with_an_unknown_certificate_are_not_read(house: House, tmp_path: Path) -> None:
    for settings in ({}, {"app": APP}, {"names": {"example.push.example.org": APP}}):
        async with open_door(house, tmp_path, **settings) as door:
            with structlog.testing.capture_logs() as logs:
                await refused(door, "stranger")
            (line,) = [each for each in logs if each["event"] == "legacy_refused"]
            assert "not registered" in line["why"]
            assert "heliograph callers add" in line["hint"]
            assert ("or have it show none" in line["hint"]) is bool(settings)


async def test_a_certificate_that_a_registered_one_has_issued_lets_nobody_in(house: House, tmp_path: Path) -> None:
    for settings in ({}, {"app": APP}):
        async with open_door(house, tmp_path, [known_caller("authority")], **settings) as door:
            with structlog.testing.capture_logs() as logs:
                await refused(door, "script of authority")
            (line,) = [each for each in logs if each["event"] == "legacy_refused"]
            assert "not registered" in line["why"]


async def test_frames_of_a_client_without_a_certificate_are_not_read(door: Door) -> None:
    with structlog.testing.capture_logs() as logs:
        await refused(door, None)
    (line,) = [each for each in logs if each["event"] == "legacy_refused"]
    assert "heliograph legacy certificate" in line["hint"]
    assert "app or names in [legacy.main]" in line["hint"]


@pytest.mark.parametrize(
    "said, hint",
    [(b"\x16\x03\x01", "doors-ca.pem"), (bytes.fromhex("15030100020250"), "OPENSSL_CONF"), (b"GET /", "with TLS")],
    ids=["a beginning", "alert", "HTTP"],
)
async def test_a_client_that_comes_without_a_handshake_is_logged_with_what_to_do(
    door: Door, said: bytes, hint: str
) -> None:
    with structlog.testing.capture_logs() as logs:
        _, writer = await asyncio.open_connection("127.0.0.1", door.gateway.port)
        writer.write(said)
        writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            while not logs:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        writer.close()
    assert logs[0]["event"] == "legacy_refused"
    assert hint in logs[0]["hint"]


@pytest.mark.parametrize(
    "why, hint",
    [
        (f"{streams.CLIENT_REFUSED} unknown ca", "doors-ca.pem"),
        (f"{streams.CLIENT_REFUSED} certificate unknown", "certificate in [legacy.old]"),
        (streams.TOO_OLD, 'minimum_tls = "1.0", in a network that you trust'),
    ],
)
def test_what_to_do_about_a_handshake_that_failed(why: str, hint: str) -> None:
    assert hint in (advise(why, "old", LegacySettings()) or "")


async def test_a_listener_with_an_app_takes_clients_without_a_certificate(house: House, tmp_path: Path) -> None:
    async with open_door(house, tmp_path, app=APP) as door:
        for name in (None, "script"):
            with await door.connect(name) as script:
                await script.send(frame(1))
                await door.ended(1 if name is None else 2)


async def test_a_server_name_chooses_the_app(house: House, tmp_path: Path) -> None:
    async with open_door(house, tmp_path, names={"Example.push.example.org": APP}) as door:
        with await door.connect(None, "example.push.example.org") as script:
            await script.send(frame(1))
            await door.ended(1)
        with structlog.testing.capture_logs() as logs, await door.connect(None, "other.example.org") as script:
            assert await script.error() is None
        (line,) = [each for each in logs if each["event"] == "legacy_refused"]
        assert line["why"] == "it shows no certificate, and asks for the server name other.example.org"
        assert "[legacy.main]" in line["hint"]
        with structlog.testing.capture_logs() as logs, await door.connect(None, "127.0.0.1") as script:
            assert await script.error() is None
        (line,) = [each for each in logs if each["event"] == "legacy_refused"]
        assert line["why"] == "it shows no certificate, and names no server (SNI)"


async def test_a_certificate_of_an_app_that_is_gone_is_told_as_that(house: House, tmp_path: Path) -> None:
    async with open_door(house, tmp_path) as door:
        del house.relay._apps[APP]  # type: ignore[attr-defined]
        with structlog.testing.capture_logs() as logs:
            await refused(door, "script")
        (line,) = [each for each in logs if each["event"] == "legacy_refused"]
        assert line["why"] == f"its certificate is that of the app {APP}, which is gone"
        assert "add the app again" in line["hint"]


async def test_a_refusal_without_advice_has_no_hint(door: Door) -> None:
    with structlog.testing.capture_logs() as logs:
        door.gateway._on_refused("192.0.2.1", "there are 2 connections already")
    assert "hint" not in logs[0]


@pytest.mark.parametrize(
    "host, words",
    [
        ("127.0.0.1", "(Address already in use): stop whatever is there, or set another port in [legacy.second]"),
        ("192.0.2.1", "(Cannot assign requested address): host in [legacy.second] is no address of this machine"),
        ("nosuch.invalid", "): host in [legacy.second] is no address of this machine: write 127.0.0.1, 0.0.0.0 or"),
    ],
)
async def test_an_address_that_cannot_be_had_is_told_with_what_to_do(door: Door, host: str, words: str) -> None:
    port, common = door.gateway.port, door.gateway._common
    second = Gateway(
        "second",
        LegacySettings(host=host, port=port),
        relay=common.relay,
        apps=common.apps,
        callers=door.callers,
        identity=common.admittance._identity,
        telemetry=door.telemetry,
        clock=common.clock,
    )
    with pytest.raises(ConfigError) as told:
        await second.start()
    assert str(told.value).startswith(f"legacy.second cannot listen on {host}:{port} (")
    assert words in str(told.value)
    assert "error while" not in str(told.value)


async def test_an_app_with_both_environments_needs_one_of_them_said(house: House, tmp_path: Path) -> None:
    app = house.relay._apps[APP]
    house.relay._apps[APP] = App(APP, app.topics, (Access(app.access[0].credentials, tuple(Environment)),))  # type: ignore[index]
    async with open_door(house, tmp_path) as door:
        with structlog.testing.capture_logs() as logs, await door.connect() as script:
            assert await script.error() is None
        (line,) = [each for each in logs if each["event"] == "legacy_refused"]
        assert "environment" in line["hint"]
    async with open_door(house, tmp_path, environment=PRODUCTION) as door:
        with await door.connect() as script:
            await script.send(frame(1))
            await door.ended(1)


async def test_a_certificate_that_is_registered_later_is_known_at_the_next_connection(door: Door) -> None:
    await refused(door, "newcomer")
    await door.callers.add(known_caller("newcomer"))
    with await door.connect("newcomer") as script:
        await script.send(frame(1))
        await door.ended(1)


async def test_a_client_whose_certificate_is_removed_is_told_what_was_taken(door: Door) -> None:
    with await door.connect() as script:
        await script.send(frame(1))
        await door.ended(1)
        await door.callers.remove(known_caller().id)
        door.gateway._sweep()
        assert await script.error() == ErrorResponse(Status.SHUTDOWN, 1)
    await door.until_closed()


async def test_a_client_of_an_app_that_is_gone_is_not_let_in(door: Door) -> None:
    del door.house.relay._apps[APP]  # type: ignore[attr-defined]
    with await door.connect() as script:
        assert await script.error() is None


async def test_no_more_connections_are_taken_than_configured(house: House, tmp_path: Path) -> None:
    async with open_door(house, tmp_path, max_connections=1) as door:
        with await door.connect() as script:
            with pytest.raises((ConnectionError, ssl.SSLError)):
                await door.connect()
            await script.send(frame(1))
            await door.ended(1)


async def test_a_port_that_is_taken_is_said_so(door: Door, house: House, tmp_path: Path) -> None:
    taken = door.gateway.port
    settings = LegacySettings(port=taken)
    gateway = Gateway(
        "other",
        settings,
        relay=house.relay,
        apps={},
        callers=door.callers,
        identity=door.gateway._admittance._identity,
        telemetry=Telemetry(),
        clock=time.time,
    )
    with pytest.raises(ConfigError, match=rf"{taken}.*\[legacy\.other\]"):
        await gateway.start()


# -- when things go wrong --------------------------------------------------------------------------------------------


async def test_a_stop_names_the_last_frame_that_is_safe(house: House, tmp_path: Path) -> None:
    async with open_door(house, tmp_path) as door:
        with await door.connect() as script, await door.connect() as silent:
            await script.send(frames(range(1, 31)), frame(31)[:20])
            await door.taken(30)
            await door.gateway.aclose()
            assert await script.error() == ErrorResponse(Status.SHUTDOWN, 30)
            assert await silent.error() is None
        await door.ended(30)
    assert door.received == tokens(range(1, 31))


class Held:
    """Keeps calls of a method waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, whose: object, name: str) -> None:
        call = getattr(whose, name)
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()

        async def wait(*given: Any, **more: Any) -> Any:
            self.begun.set()
            await self.go_on.wait()
            return await call(*given, **more)

        monkeypatch.setattr(whose, name, wait)


async def test_a_stop_waits_for_what_is_being_stored_and_names_that(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    with await door.connect() as script:
        await script.send(frames(range(1, 31)))
        await door.taken(30)
        put = Held(monkeypatch, door.house.store, "put")
        await script.send(frames(range(31, 41)))
        await put.begun.wait()
        (connection,) = door.gateway._common.connections
        await script.send(frames(range(41, 46)))
        async with asyncio.timeout(PATIENCE_S):
            while not connection._gathered:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        stopping = asyncio.create_task(door.gateway.aclose())
        asyncio.get_running_loop().call_later(0.2, put.go_on.set)
        assert await script.error() == ErrorResponse(Status.SHUTDOWN, 45)
        await stopping
    await door.ended(45)
    assert door.received == tokens(range(1, 46))


async def test_a_stop_does_not_wait_for_ever_and_names_nothing_that_may_be_lost(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "STOP_S", 0.2)
    with await door.connect() as script:
        await script.send(frames(range(1, 31)))
        await door.taken(30)
        put = Held(monkeypatch, door.house.store, "put")
        await script.send(frames(range(31, 41)))
        await put.begun.wait()
        stopping = asyncio.create_task(door.gateway.aclose())
        assert await script.error() == ErrorResponse(Status.SHUTDOWN, 30)
        await stopping


async def test_a_stop_names_the_bad_frame_where_what_is_behind_it_is_being_cancelled(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "STOP_S", 0.2)
    cancel = Held(monkeypatch, door.house.relay, "cancel")
    door.apple.rejects(token(2), "BadDeviceToken")
    with await door.connect() as script:
        await script.send(frames(range(1, 31)))
        await cancel.begun.wait()
        stopping = asyncio.create_task(door.gateway.aclose())
        assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 2)
        await stopping


@pytest.mark.parametrize("error", [Overloaded("full", retry_after_s=1.0), StoreError("no disk")])
async def test_a_full_or_failing_store_has_the_rest_sent_again_later(
    door: Door, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with await door.connect() as script, await door.connect() as other:
        await script.send(frames(range(1, 11)))
        await door.taken(10)

        async def fail(*_: object, **__: object) -> None:
            raise error

        with monkeypatch.context() as broken:
            broken.setattr(door.house.store, "put", fail)
            await script.send(frames(range(11, 21)))
            assert await script.error() == ErrorResponse(Status.SHUTDOWN, 10)
            await other.send(frames(range(11, 21)))
            assert await other.error() is None
    with await door.connect() as script:
        await script.send(frames(range(11, 21)))
        await door.ended(20)
    assert door.received == tokens(range(1, 21))


async def test_while_the_store_is_slow_clients_are_not_read_from_and_nothing_piles_up(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = b'{"aps":{"alert":"%s"}}' % (b"x" * 3900)
    put, go_on = door.house.store.put, asyncio.Event()
    most = 0

    async def slow(*given: Any, **more: Any) -> Any:
        nonlocal most
        most = max(most, door.gateway._common.intake._octets)
        await go_on.wait()
        return await put(*given, **more)

    monkeypatch.setattr(door.house.store, "put", slow)
    with await door.connect() as script, await door.connect() as other:
        sending = [
            asyncio.create_task(each.send(*[frame(start + number, payload=large) for number in range(4000)]))
            for start, each in ((1, script), (4001, other))
        ]
        _, writing = await asyncio.wait(sending, timeout=0.5)
        assert len(writing) == 2
        go_on.set()
        await asyncio.gather(*sending)
        await door.ended(8000)
    assert most < 512 * 1024
    assert door.gateway._common.intake._octets == 0
    assert door.received == tokens(range(1, 8001))


async def test_a_client_that_does_not_finish_a_frame_is_shed_and_an_idle_one_is_kept(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    with await door.connect() as slow, await door.connect() as idle, await door.connect() as silent:
        await slow.send(frame(1), frame(2)[:30])
        await idle.send(frame(3))
        await door.taken(2)
        monkeypatch.setattr(connection_module, "UNFINISHED_S", 0.0)
        door.gateway._sweep()
        assert await slow.error() == ErrorResponse(Status.SHUTDOWN, 1)
        await idle.send(frame(4))
        await silent.send(frame(5))
        await door.ended(4)
    assert door.received == tokens([1, 3, 4, 5])


async def test_connections_that_ended_in_whatever_way_leave_nothing_behind(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "ENDED_S", 0.2)
    door.apple.rejects(token(3), "BadDeviceToken")
    door.apple.rejects(token(4), "TooManyRequests")  # it is tried for hours

    async def come(ways: Sequence[str]) -> None:
        for way in ways:
            with await door.connect() as script, contextlib.suppress(ConnectionError):
                await script.send(frames(range(1, 3)), *[frame(3)] * (way == "refused"), frame(4))
                if way == "bad":
                    await script.send(enhanced_frame(b"", b"", 5, 0), frame(6))
                if way == "unfinished":
                    await script.send(frame(6)[:9])
                if way == "reset":
                    script.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                if way == "ended":
                    script.end()
                if way in ("bad", "refused", "ended"):
                    await script.error()

    with await door.connect() as script:
        await script.send(frame(4))
        await door.taken(1)
        assert door.house.relay._watchers
        script.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await door.until_closed()
    assert not door.house.relay._watchers
    ways = ["closed", "bad", "refused", "unfinished", "reset", "ended"]
    await asyncio.gather(*[come(random.Random(seed).sample(ways, len(ways))) for seed in range(5)])
    await door.until_closed()
    common = door.gateway._common
    async with asyncio.timeout(PATIENCE_S):
        while common.tasks or door.house.relay._waiters:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not door.house.relay._watchers
    assert not common.intake._octets
    assert not common.intake._waiting
    assert door.gateway._listener is not None
    assert not door.gateway._listener.streams
    assert not door.gateway._listener._entering


@pytest.mark.parametrize("seed", range(20))
async def test_octets_at_random_end_in_an_error_packet_or_the_end_and_harm_nobody(door: Door, seed: int) -> None:
    chance = random.Random(seed)
    sound = bytearray(
        b"".join([frame(1), simple_frame(b"ab" * 32, PAYLOAD), item_frame(items(b"cd" * 32, PAYLOAD, 3))])
    )
    sound = sound * 20
    for _ in range(chance.choice((1, 5, 50))):
        sound[chance.randrange(len(sound))] = chance.randrange(256)
    with structlog.testing.capture_logs() as logs:
        with await door.connect() as script, contextlib.suppress(ConnectionError):
            await script.send(chance.randbytes(500) if seed < 3 else bytes(sound))
            script.end()
            error = await script.error()
            assert error is None or error.status in set(Status)
        async with asyncio.timeout(PATIENCE_S):
            while door.gateway._common.tasks:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        with await door.connect() as script:
            await script.send(frame(4), enhanced_frame(b"", b"", 5, 0))
            assert await script.error() == ErrorResponse(Status.MISSING_TOKEN, 5)
    assert not [each for each in logs if each["event"] == "legacy_failed"]


async def test_log_lines_and_figures_tell_of_packets_and_never_of_tokens(door: Door) -> None:
    door.apple.rejects(token(0xABCDEF), "BadDeviceToken")
    with structlog.testing.capture_logs() as logs:
        with await door.connect() as script:
            await script.send(frame(1), frame(0xABCDEF, identifier=9))
            assert await script.error() == ErrorResponse(Status.INVALID_TOKEN, 9)
        await door.until_closed()
    (line,) = [each for each in logs if each["event"] == "legacy_error_packet"]
    (receipt,) = [each for each in await door.ended(2) if each.identifier == 9]
    assert line["connection"] == receipt.connection
    assert (line["app"], line["identifier"], line["status"], line["reason"]) == (APP, 9, 8, "BadDeviceToken")
    assert "abcdef" not in str(logs)
    page = door.telemetry.page(Standing()).decode()
    assert 'heliograph_legacy_error_packets_total{listener="main",status="8"} 1.0' in page
    assert 'heliograph_legacy_frames_total{listener="main"} 2.0' in page
    assert 'heliograph_legacy_connections{listener="main"} 0.0' in page
    assert 'heliograph_legacy_window_seconds_count{listener="main"} 2.0' in page


async def test_log_lines_name_what_is_wrong_with_a_frame_as_apple_names_reasons(door: Door) -> None:
    with structlog.testing.capture_logs() as logs:
        with await door.connect() as script:
            await script.send(enhanced_frame(b"ab" * 32, b" " * 5121, 3, 0))
            assert await script.error() == ErrorResponse(Status.INVALID_PAYLOAD_SIZE, 3)
        await door.until_closed()
    (line,) = [each for each in logs if each["event"] == "legacy_error_packet"]
    assert (line["reason"], line["max_payload"], line["max_item_payload"]) == ("InvalidPayloadSize", 5120, 5120)


async def test_log_lines_of_a_kind_are_bounded(door: Door) -> None:
    with structlog.testing.capture_logs() as logs:
        for _ in range(50):
            with await door.connect() as script:
                await script.send(enhanced_frame(b"", PAYLOAD, 1, 0))
                assert await script.error() == ErrorResponse(Status.MISSING_TOKEN, 1)
        await door.gateway.aclose()
    assert sum(each["event"] == "legacy_error_packet" for each in logs) == 30
    (rest,) = [each for each in logs if each["event"] == "legacy_more"]
    assert (rest["kind"], rest["count"]) == ("legacy_error_packet", 20)
    assert rest["last"] == [each for each in logs if each["event"] == "legacy_closed"][-1]["connection"]


async def test_what_apple_says_after_the_script_is_gone_is_in_the_receipt_alone(door: Door) -> None:
    door.apple.misbehaves(Delay(0.3, then=UNKNOWN_TOKEN), token=token(2))
    with await door.connect() as script:
        await script.send(frames(range(1, 4)))
        await door.taken(3)
        script.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    receipts = await door.ended(3)
    assert [receipt.state for receipt in receipts] == [State.ACCEPTED, State.REJECTED, State.ACCEPTED]
    assert receipts[1].reason == "BadDeviceToken"
    assert door.gateway._common.meter.packets == []
