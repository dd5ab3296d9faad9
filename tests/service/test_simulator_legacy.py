"""The binary gateway and the feedback service that the simulator plays: raw TLS sockets on the client's side."""

from __future__ import annotations

import errno
import json
import re
import select
import socket
import ssl
import struct
import time
import urllib.request
import warnings
from asyncio import to_thread
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest

from heliograph.errors import ConfigError
from heliograph.model import PushType
from heliograph.net.clients import throwaway_client
from heliograph.protocols.binary import (
    PAYLOAD,
    TOKEN,
    ErrorReader,
    ErrorResponse,
    FeedbackReader,
    Status,
    enhanced_frame,
    item_frame,
    items,
    simple_frame,
)
from heliograph.protocols.certificate import load
from heliograph.simulator.control import controlled
from heliograph.simulator.faults import (
    Answer,
    Close,
    Cut,
    Delay,
    ErrorPacket,
    Faults,
    GoAway,
    Handshake,
    Opening,
    Rule,
    StopReading,
    Trickle,
)
from heliograph.simulator.legacy import TOPIC, Legacy
from heliograph.simulator.reading import load_rules
from heliograph.simulator.server import Simulator
from heliograph.simulator.threaded import ThreadedSimulator
from tests.certificates import push_certificate
from tests.service.pushing import push

PATIENCE_S = 30
ONE, TWO, THREE = (pair.encode() * 32 for pair in ("aa", "bb", "cc"))
HELLO = b'{"aps":{"alert":"Hello"}}'
SINCE = 1_700_000_000


class Client:
    """Somebody who speaks to one of the two doors."""

    def __init__(self, port: int, ca: bytes, *, certificate: Path | None = None, oldest: bool = False) -> None:
        context = ssl.create_default_context(cadata=ca.decode())
        if oldest:
            context.set_ciphers("DEFAULT:@SECLEVEL=0")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1
        if certificate is not None:
            context.load_cert_chain(certificate)
        connected = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        try:
            self.tls = context.wrap_socket(
                connected, server_hostname="gateway.push.apple.com", suppress_ragged_eofs=False
            )
        except BaseException:
            connected.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.tls.close()

    def send(self, *frames: bytes) -> None:
        self.tls.sendall(b"".join(frames))

    def rest(self) -> list[bytes]:
        """What is said until the connection ends, TLS record by TLS record."""
        return list(iter(lambda: self.tls.recv(65_536), b""))

    def error(self) -> ErrorResponse | None:
        """The error packet that ends the connection; None: it ended without one."""
        octets = b"".join(self.rest())
        assert len(octets) in (0, 6)
        return ErrorReader().receive(octets)

    def fate(self) -> int:
        """The error that the connection ends with. OpenSSL keeps it from who reads."""
        poll = select.poll()
        poll.register(self.tls, 0)
        assert poll.poll(PATIENCE_S * 1000)
        return self.tls.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def finish(self) -> ErrorResponse | None:
        """Have the gateway say by what is wrong with the last frame that all before it were taken."""
        self.send(enhanced_frame(b"", HELLO, 0xFFFF, 0))
        return self.error()


FINISHED = ErrorResponse(Status.MISSING_TOKEN, 0xFFFF)


def frame(identifier: int, token: bytes = ONE, payload: bytes = HELLO, expiration: int = 2**32 - 1) -> bytes:
    return enhanced_frame(token, payload, identifier, expiration)


@pytest.fixture
def apple() -> Iterator[ThreadedSimulator]:
    with ThreadedSimulator() as apple:
        yield apple


def gateway(apple: ThreadedSimulator, **more: Any) -> Client:
    return Client(apple.legacy_port, apple.ca_pem, **more)


def read_feedback(apple: ThreadedSimulator) -> list[tuple[int, bytes]]:
    """As an old client does: until the service closes, and then it closes too."""
    with Client(apple.feedback_port, apple.ca_pem) as client:
        reader = FeedbackReader()
        times, tokens = reader.receive(b"".join(client.rest()))
        assert reader.held == 0
        client.tls.unwrap().close()
    return list(zip(times, tokens, strict=True))


def identifiers(apple: ThreadedSimulator) -> list[int | None]:
    return [each.identifier for each in apple.received]


# -- what is taken ---------------------------------------------------------------------------------------------------


def test_frames_are_taken_in_silence_and_shown_like_what_comes_by_http2(apple: ThreadedSimulator) -> None:
    with gateway(apple) as client:
        client.send(
            frame(7),
            simple_frame(TWO, HELLO),
            item_frame(items(THREE, HELLO, identifier=9, expiration=0, priority=5)),
            item_frame([(PAYLOAD, HELLO), (99, b"?"), (TOKEN, bytes.fromhex("dd" * 64))]),
        )
        assert client.finish() == FINISHED
    push(apple.port, apple.ca_pem, apple.provider_token(), ONE.decode())
    assert [(each.token, each.door, each.identifier) for each in apple.received] == [
        (ONE.decode(), "legacy", 7),
        (TWO.decode(), "legacy", 0),
        (THREE.decode(), "legacy", 9),
        ("dd" * 64, "legacy", 0),
        (ONE.decode(), "http2", None),
    ]
    (first, *_) = apple.received
    assert (first.topic, first.push_type, first.payload, first.collapse_id) == (TOPIC, PushType.ALERT, HELLO, None)
    assert [each.received for each in apple.shown(TWO.decode())] == [apple.received[1]]


def test_a_frame_may_come_octet_by_octet(apple: ThreadedSimulator) -> None:
    with gateway(apple) as client:
        for octet in frame(1):
            client.send(bytes((octet,)))
        assert client.finish() == FINISHED
    assert identifiers(apple) == [1]


def test_a_client_that_writes_and_closes_without_reading_loses_nothing(apple: ThreadedSimulator) -> None:
    with gateway(apple) as client:
        client.send(*(frame(number) for number in range(1, 501)))
    assert [each.identifier for each in apple.wait_for(500)] == [*range(1, 501)]


def test_a_client_that_ends_its_side_is_answered_with_the_end(apple: ThreadedSimulator) -> None:
    with gateway(apple) as client:
        client.send(frame(1))
        client.tls.unwrap().close()
    assert len(apple.wait_for(1)) == 1


def test_expirations_decide_what_waits_for_a_device_without_a_network(apple: ThreadedSimulator) -> None:
    apple.go_offline(ONE.decode())
    with gateway(apple) as client:
        client.send(frame(1, expiration=int(time.time()) + 3600), frame(2, expiration=0))
        assert client.finish() == FINISHED
    (device,) = apple.devices()
    assert device.waiting is not None
    assert device.waiting.identifier == 1


def test_the_topic_is_the_simulators_and_its_suffix_the_push_type() -> None:
    with ThreadedSimulator(legacy=Legacy(topic="com.example.shop.voip")) as apple:
        with gateway(apple) as client:
            client.send(frame(1))
            assert client.finish() == FINISHED
        assert [(each.topic, each.push_type) for each in apple.received] == [("com.example.shop.voip", PushType.VOIP)]


SILENT = b'{"aps":{"content-available":1}}'


def test_a_payload_that_shows_nothing_is_a_background_push_and_must_not_claim_priority_10(
    apple: ThreadedSimulator,
) -> None:
    loud = b'{"aps":{"content-available":1,"sound":"default"}}'
    with gateway(apple) as client:
        client.send(
            frame(1, payload=SILENT),
            item_frame(items(ONE, SILENT, 2, priority=5)),
            item_frame(items(ONE, loud, 3, priority=10)),
            frame(4, payload=b"content-available, and no JSON"),
            item_frame(items(ONE, SILENT, 5, priority=10)),
        )
        assert client.error() == ErrorResponse(Status.PROCESSING_ERROR, 5)
    background, alert = PushType.BACKGROUND, PushType.ALERT
    assert [each.push_type for each in apple.received] == [background, background, alert, alert]


# -- what is not -----------------------------------------------------------------------------------------------------


def test_an_unknown_device_token_is_named_and_nothing_behind_it_is_taken() -> None:
    with ThreadedSimulator(strict=True) as apple:
        apple.register(ONE.decode())
        with gateway(apple) as client:
            client.send(frame(1), frame(2, TWO), frame(3))
            assert client.error() == ErrorResponse(Status.INVALID_TOKEN, 2)
        with gateway(apple) as client:
            client.send(simple_frame(TWO, HELLO))
            assert client.error() == ErrorResponse(Status.INVALID_TOKEN, 0)
        assert identifiers(apple) == [1]


def test_a_device_token_of_another_app_is_an_invalid_one(apple: ThreadedSimulator) -> None:
    apple.register(ONE.decode(), topic="com.example.other")
    with gateway(apple) as client:
        client.send(frame(1))
        assert client.error() == ErrorResponse(Status.INVALID_TOKEN, 1)


@pytest.mark.parametrize(
    "bad, status",
    [
        (enhanced_frame(b"ab" * 101, HELLO, 5, 0), Status.INVALID_TOKEN_SIZE),
        (enhanced_frame(ONE, b"", 5, 0), Status.MISSING_PAYLOAD),
        (item_frame(items(ONE, b"x" * 2049, 5)), Status.INVALID_PAYLOAD_SIZE),
        (item_frame([*items(ONE, HELLO, 5), (TOKEN, b"x")]), Status.PROTOCOL_ERROR),
    ],
    ids=["long token", "no payload", "long payload", "two tokens"],
)
def test_a_bad_frame_draws_the_status_that_apple_had_for_it(apple: ThreadedSimulator, bad: bytes, status: int) -> None:
    with gateway(apple) as client:
        client.send(frame(4), bad, frame(6))
        assert client.error() == ErrorResponse(status, 5)
    assert identifiers(apple) == [4]


def test_the_payload_limit_of_the_early_years_is_for_commands_0_and_1() -> None:
    with ThreadedSimulator(legacy=Legacy(max_payload=256)) as apple, gateway(apple) as client:
        client.send(item_frame(items(ONE, b"x" * 2048, 1)), frame(2, payload=b"x" * 256), frame(3, payload=b"x" * 257))
        assert client.error() == ErrorResponse(Status.INVALID_PAYLOAD_SIZE, 3)
        assert identifiers(apple) == [1, 2]


# -- the feedback service --------------------------------------------------------------------------------------------


def test_a_device_token_whose_app_is_gone_is_taken_and_told_once_by_feedback(apple: ThreadedSimulator) -> None:
    assert read_feedback(apple) == []
    apple.unregister(ONE.decode(), since=SINCE * 1000 + 999)
    assert read_feedback(apple) == []
    with gateway(apple) as client:
        client.send(frame(1), frame(2, TWO))
        assert client.finish() == FINISHED
    assert identifiers(apple) == [2]
    assert read_feedback(apple) == [(SINCE, ONE)]
    assert read_feedback(apple) == []


def test_a_list_that_was_not_read_to_its_end_is_told_again(apple: ThreadedSimulator) -> None:
    apple.add_feedback([ONE.decode()], SINCE)
    client = Client(apple.feedback_port, apple.ca_pem)
    assert client.tls.recv(65_536)
    client.tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.tls.close()  # a reset
    assert read_feedback(apple) == [(SINCE, ONE)]
    assert read_feedback(apple) == []


def test_what_is_learnt_during_a_read_is_told_by_the_next(apple: ThreadedSimulator) -> None:
    apple.add_feedback([ONE.decode(), TWO.decode()], SINCE)
    with Client(apple.feedback_port, apple.ca_pem) as client:
        client.rest()
        apple.add_feedback([TWO.decode(), THREE.decode()], SINCE + 5)
        client.tls.unwrap().close()
    assert read_feedback(apple) == [(SINCE + 5, TWO), (SINCE + 5, THREE)]


def test_a_flood_of_removals_is_told_whole(apple: ThreadedSimulator) -> None:
    tokens = [f"{number:064x}" for number in range(20_000)]
    apple.add_feedback(tokens, SINCE)
    assert read_feedback(apple) == [(SINCE, token.encode()) for token in tokens]


def test_a_list_can_come_in_pieces_or_not_at_all(apple: ThreadedSimulator) -> None:
    apple.add_feedback([ONE.decode()], SINCE)
    apple.misbehaves(Close(), opening=True, door="feedback", times=1)
    assert read_feedback(apple) == []
    apple.misbehaves(Cut(), opening=True, door="feedback", times=1)
    with Client(apple.feedback_port, apple.ca_pem) as client:
        assert client.fate() == errno.ECONNRESET
    apple.misbehaves(Trickle(7, 0.001), opening=True, times=1)
    with Client(apple.feedback_port, apple.ca_pem) as client:
        pieces = client.rest()
        assert [len(piece) for piece in pieces] == [7, 7, 7, 7, 7, 3]
        client.tls.unwrap().close()
    assert read_feedback(apple) == []


# -- misbehaviour by rules -------------------------------------------------------------------------------------------


def test_an_error_packet_can_be_had_for_the_third_notification(apple: ThreadedSimulator) -> None:
    apple.misbehaves(ErrorPacket(Status.PROCESSING_ERROR), after=2, times=1)
    with gateway(apple) as client:
        client.send(*(frame(number) for number in range(11, 16)))
        assert client.error() == ErrorResponse(Status.PROCESSING_ERROR, 13)
    with gateway(apple) as client:
        client.send(frame(13))
        assert client.finish() == FINISHED
    assert identifiers(apple) == [11, 12, 13]


def test_an_error_packet_can_say_what_apple_never_said(apple: ThreadedSimulator) -> None:
    apple.misbehaves(ErrorPacket(77, identifier=2**32 - 1), token=ONE.decode())
    with gateway(apple) as client:
        client.send(frame(1))
        assert client.error() == ErrorResponse(77, 2**32 - 1)


def test_a_shutdown_names_the_last_that_was_taken(apple: ThreadedSimulator) -> None:
    apple.misbehaves(ErrorPacket(Status.SHUTDOWN), after=2, times=1)
    with gateway(apple) as client:
        client.send(frame(21), frame(22), frame(23))
        assert client.error() == ErrorResponse(Status.SHUTDOWN, 22)
    apple.misbehaves(ErrorPacket(Status.SHUTDOWN), opening=True)
    with gateway(apple) as client:
        assert client.error() == ErrorResponse(Status.SHUTDOWN, 0)


def test_the_end_of_the_simulator_is_a_shutdown() -> None:
    with ThreadedSimulator() as apple:
        client = gateway(apple)
        client.send(frame(1))
        apple.wait_for(1)
    with client:
        assert client.error() == ErrorResponse(Status.SHUTDOWN, 1)


def test_what_a_rule_still_holds_up_at_the_end_was_not_taken() -> None:
    with ThreadedSimulator() as apple:
        apple.misbehaves(Delay(0), times=1)
        apple.delays(3600)
        client = gateway(apple)
        client.send(frame(1), frame(2))
        apple.wait_for(1)
    with client:
        assert client.error() == ErrorResponse(Status.SHUTDOWN, 1)


@pytest.mark.parametrize(
    "reason, status",
    [
        ("BadDeviceToken", Status.INVALID_TOKEN),
        ("PayloadTooLarge", Status.INVALID_PAYLOAD_SIZE),
        ("TooManyRequests", Status.PROCESSING_ERROR),
        ("InternalServerError", Status.PROCESSING_ERROR),
    ],
)
def test_one_rule_makes_both_protocols_say_a_reason_in_their_own_way(
    apple: ThreadedSimulator, reason: str, status: int
) -> None:
    apple.rejects(ONE.decode(), reason)
    with gateway(apple) as client:
        client.send(frame(1))
        assert client.error() == ErrorResponse(status, 1)
    assert push(apple.port, apple.ca_pem, apple.provider_token(), ONE.decode())[1] == reason


def test_a_reason_that_nobody_knows_is_a_processing_error(apple: ThreadedSimulator) -> None:
    apple.misbehaves(Answer(418, "Teapot"))
    with gateway(apple) as client:
        client.send(frame(1))
        assert client.error() == ErrorResponse(Status.PROCESSING_ERROR, 1)


def test_a_410_by_rule_is_told_by_feedback(apple: ThreadedSimulator) -> None:
    apple.rejects(ONE.decode(), "Unregistered", since=SINCE * 1000, times=1)
    apple.rejects(TWO.decode(), "ExpiredToken", times=1)
    before = int(time.time())
    with gateway(apple) as client:
        client.send(frame(1), frame(2, TWO))
        assert client.finish() == FINISHED
    first, second = read_feedback(apple)
    assert first == (SINCE, ONE)
    assert second[1] == TWO
    assert second[0] >= before


def test_the_gateway_can_close_without_a_word(apple: ThreadedSimulator) -> None:
    apple.hangs_up_after(1)
    with gateway(apple) as client:
        client.send(frame(1), frame(2), frame(3))
        assert client.error() is None
    assert identifiers(apple) == [1]
    apple.misbehaves(Close(), opening=True, times=1)
    with gateway(apple) as client:
        assert client.error() is None


def test_the_connection_can_break_off_after_a_frame_was_taken(apple: ThreadedSimulator) -> None:
    apple.misbehaves(Cut(), token=TWO.decode())
    with gateway(apple) as client:
        client.send(frame(1), frame(2, TWO), frame(3))
        assert client.fate() == errno.ECONNRESET
    assert identifiers(apple) == [1, 2]


def test_an_error_packet_can_come_octet_by_octet(apple: ThreadedSimulator) -> None:
    apple.misbehaves(Trickle(1, 0.001, then=ErrorPacket(Status.INVALID_TOKEN)))
    with gateway(apple) as client:
        client.send(frame(0x01020304), frame(2))
        assert client.rest() == [b"\x08", b"\x08", b"\x01", b"\x02", b"\x03", b"\x04"]


def test_an_error_packet_can_come_late_and_what_was_sent_meanwhile_is_not_taken(apple: ThreadedSimulator) -> None:
    apple.misbehaves(Delay(0.05, then=ErrorPacket(Status.INVALID_TOKEN)), token=TWO.decode())
    with gateway(apple) as client:
        client.send(frame(1), frame(2, TWO))
        client.send(frame(3))
        client.send(b"\xff no frame at all")
        assert client.error() == ErrorResponse(Status.INVALID_TOKEN, 2)
    assert identifiers(apple) == [1]


def test_all_can_be_slow_bad_frames_too(apple: ThreadedSimulator) -> None:
    apple.misbehaves(Delay(0.01), door="legacy")
    with gateway(apple) as client:
        client.send(*(frame(number) for number in range(1, 101)))
        assert client.finish() == FINISHED
    assert len(apple.received) == 100


def test_what_is_late_is_taken_though_the_client_ended_its_side(apple: ThreadedSimulator) -> None:
    apple.delays(0.05)
    with gateway(apple) as client:
        client.send(frame(1), frame(2))
        client.tls.unwrap().close()
    assert len(apple.wait_for(2)) == 2


def test_the_gateway_can_stop_reading(apple: ThreadedSimulator) -> None:
    apple.misbehaves(StopReading(), connection=1, times=1)
    with gateway(apple) as mute, gateway(apple) as other:
        mute.send(frame(1), frame(2))
        apple.wait_for(1)
        mute.send(frame(3))
        other.send(frame(4))
        assert other.finish() == FINISHED
        assert identifiers(apple) == [1, 4]
    apple.misbehaves(StopReading(0.05), connection=3, opening=True)
    with gateway(apple) as client:
        client.send(frame(5))
        assert client.finish() == FINISHED
    assert identifiers(apple) == [1, 4, 5]


@pytest.mark.parametrize("how", ["expired", "other-name", "untrusted", "alert", "closed"])
def test_the_handshake_can_fail(apple: ThreadedSimulator, how: Any) -> None:
    apple.misbehaves(Handshake(how), times=2)
    for port in (apple.legacy_port, apple.feedback_port):
        with pytest.raises(OSError):
            Client(port, apple.ca_pem)
    assert read_feedback(apple) == []


def test_rules_for_one_door_leave_the_others_alone(apple: ThreadedSimulator) -> None:
    apple.misbehaves(Close(), door="http2")
    apple.misbehaves(GoAway("Shutdown"))
    apple.misbehaves(Close(), stream=1)
    apple.misbehaves(Handshake("closed"), door="feedback")
    with gateway(apple) as client:
        client.send(frame(1))
        assert client.finish() == FINISHED
    apple.behaves()
    apple.rejects(None, "BadDeviceToken", app="com.example.other")
    apple.misbehaves(ErrorPacket(8), app=TOPIC)
    with gateway(apple) as client:
        client.send(frame(2))
        assert client.error() == ErrorResponse(8, 2)
    assert push(apple.port, apple.ca_pem, apple.provider_token(), ONE.decode()) == (200, None)


@pytest.mark.parametrize(
    "rule, complaint",
    [
        ({"action": {"kind": "error-packet"}}, "status"),
        ({"action": {"kind": "error-packet", "status": 256}}, "`status` is from 0 to 255"),
        ({"action": {"kind": "error-packet", "status": 8, "identifier": -1}}, "`identifier` is from 0"),
        ({"action": {"kind": "error-packet", "status": 8}, "door": "http2"}, "means nothing at the door http2"),
        ({"action": {"kind": "goaway"}, "door": "legacy"}, "means nothing at the door legacy"),
        ({"action": {"kind": "close"}, "door": "legacy", "stream": 1}, "means nothing at the door legacy"),
        ({"action": {"kind": "close"}, "door": "feedback"}, "add `opening`"),
        ({"action": {"kind": "close"}, "door": "front"}, "front"),
        (
            {"action": {"kind": "stream-limit", "count": 1, "then": {"kind": "error-packet", "status": 8}}},
            "no door in common",
        ),
    ],
)
def test_a_rule_that_no_door_could_follow_is_refused(rule: dict[str, Any], complaint: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.convert(rule, Rule)


def test_an_error_packet_can_be_said_of_connections() -> None:
    faults = Faults()
    faults.misbehaves(ErrorPacket(10), opening=True)
    assert isinstance(faults.find_opening_fault(1, 0.0, "legacy"), Opening)
    assert faults.find_opening_fault(2, 0.0) is None
    assert faults.find_opening_fault(3, 0.0, "feedback") is None


# -- certificates, and clients that are wrong here -------------------------------------------------------------------


def test_any_client_certificate_will_do_as_none_is_asked_for(apple: ThreadedSimulator, tmp_path: Path) -> None:
    (tmp_path / "own.pem").write_bytes(push_certificate("com.example.shop").pem)
    for certificate in (None, tmp_path / "own.pem", apple.client_file):
        with gateway(apple, certificate=certificate) as client:
            assert client.finish() == FINISHED
    assert apple.client_file.stat().st_mode & 0o777 == 0o600


def test_the_client_certificate_looks_like_one_of_apples(apple: ThreadedSimulator) -> None:
    found = load(apple.client_file.read_bytes())
    assert found.topics == (TOPIC,)
    assert set(found.environments) == {"production", "development"}
    assert found.name == f"Apple Push Services: {TOPIC}"


async def test_a_certificate_can_be_required(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    (tmp_path / "other.pem").write_bytes(push_certificate("com.example.shop").pem)
    async with Simulator(legacy=Legacy(required=True)) as apple:
        apple.on_refused = lambda door, _, why: told.append((door, why))
        (tmp_path / "client.pem").write_bytes(apple.client_pem)
        assert apple.legacy_port is not None
        assert apple.feedback_port is not None

        def finish(port: int, certificate: Path | None) -> bytes:
            with Client(port, apple.ca_pem, certificate=certificate) as client:
                client.send(enhanced_frame(b"", HELLO, 1, 0))
                return b"".join(client.rest())

        assert await to_thread(finish, apple.legacy_port, tmp_path / "client.pem") == b"\x08\x02\0\0\0\x01"
        for port in (apple.legacy_port, apple.feedback_port):
            for certificate in (None, tmp_path / "other.pem"):
                with pytest.raises(OSError):
                    await to_thread(finish, port, certificate)
    assert [door for door, _ in told] == ["legacy", "legacy", "feedback", "feedback"]
    assert told[0][1] == "the client showed no certificate"
    assert "not registered" in told[1][1]


def test_a_client_that_knows_only_tls_1_0_is_taken(apple: ThreadedSimulator) -> None:
    with gateway(apple, oldest=True) as client:
        assert client.tls.version() == "TLSv1"
        client.send(frame(1))
        assert client.finish() == FINISHED


async def test_plain_text_is_told_from_tls() -> None:
    told: list[tuple[str, str, str]] = []

    def say(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as plain:
            plain.sendall(simple_frame(ONE, HELLO))
            while plain.recv(65_536):
                pass

    async with Simulator(legacy=Legacy()) as apple:
        apple.on_refused = lambda *what: told.append(what)
        assert apple.legacy_port is not None
        await to_thread(say, apple.legacy_port)
        assert told == [("legacy", "127.0.0.1", "the client does not speak TLS")]
        assert apple.received == []


def test_http_over_tls_is_a_protocol_error(apple: ThreadedSimulator) -> None:
    for request in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), b"POST /3/device/aa HTTP/1.1\r\n\r\n"):
        with gateway(apple) as client:
            client.send(request)
            assert client.error() == ErrorResponse(Status.PROTOCOL_ERROR, 0)
    assert apple.received == []


@pytest.mark.parametrize(
    "name, words", [("port", "The legacy gateway cannot listen on"), ("feedback_port", "The feedback service cannot")]
)
async def test_a_port_that_is_taken_is_told_and_nothing_goes_on_listening(name: str, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        simulator = Simulator(legacy=Legacy(**{name: taken.getsockname()[1]}))
        with pytest.raises(ConfigError, match=f"{words}.*: name another port"):
            await simulator.__aenter__()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", simulator.port))


async def test_a_client_certificate_that_is_none_is_told() -> None:
    pem = throwaway_client(TOPIC, datetime.now(UTC))
    certificate = pem[: pem.index(b"-----BEGIN RSA")]
    simulator = Simulator(legacy=Legacy(client_pem=certificate, required=True))
    with pytest.raises(ConfigError, match="no private key"):
        await simulator.__aenter__()


# -- the journal and the control API ---------------------------------------------------------------------------------


async def test_the_journal_has_every_frame_with_its_identifier_and_what_became_of_it(tmp_path: Path) -> None:
    async with Simulator(legacy=Legacy(), journal=tmp_path / "journal", strict=True) as apple:
        assert apple.legacy_port is not None
        port = apple.legacy_port
        apple.register(ONE.decode())
        apple.unregister(THREE.decode(), SINCE)

        def send(*frames: bytes) -> None:
            with Client(port, apple.ca_pem) as client:
                client.send(*frames)
                client.rest()

        await to_thread(send, frame(1), frame(2, THREE), frame(3, TWO), frame(4))
        await to_thread(send, enhanced_frame(ONE, b"", 5, 0))
        apple.misbehaves(ErrorPacket(1), times=1)
        await to_thread(send, frame(6))
        apple.misbehaves(Close(), times=1)
        await to_thread(send, frame(7))
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    assert [
        tuple(line.get(name) for name in ("connection", "stream", "identifier", "status", "reason", "fault", "code"))
        for line in lines
    ] == [
        (1, 1, 1, 200, None, None, None),
        (1, 2, 2, 410, "Unregistered", None, None),
        (1, 3, 3, 400, "BadDeviceToken", None, 8),
        (2, 1, 5, None, None, None, 4),
        (3, 1, 6, None, None, "error-packet", 1),
        (4, 1, 7, None, None, "closed", None),
    ]
    assert {line["topic"] for line in lines if line["identifier"] != 5} == {TOPIC}


@contextmanager
def asking(url: str) -> Iterator[Any]:
    def ask(path: str, method: str = "GET", content: object = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        with urllib.request.urlopen(urllib.request.Request(url + path, body, method=method), timeout=PATIENCE_S) as got:
            octets = got.read()
            return json.loads(octets) if got.headers["content-type"] == "application/json" else octets

    yield ask


async def test_the_control_api_tells_the_ports_shows_frames_and_keeps_the_feedback_list() -> None:
    async with Simulator(legacy=Legacy()) as apple, controlled(apple) as control:

        def use() -> None:
            with asking(control.url) as ask:
                told = ask("/")
                assert (told["topic"], told["connections"]) == (TOPIC, 0)
                assert load(ask("/client.pem")).topics == (TOPIC,)
                with Client(told["legacy_port"], ask("/ca.pem")) as client:
                    client.send(frame(7), simple_frame(TWO, HELLO))
                    assert client.finish() == FINISHED
                first, second = ask("/shown")["shown"]
                assert (first["door"], first["identifier"], first["payload"]) == ("legacy", 7, json.loads(HELLO))
                assert (second["door"], "identifier" in second) == ("legacy", False)
                assert ask("/feedback", "POST", {"tokens": [ONE.decode().upper()], "at": SINCE}) == {"listed": 1}
                assert ask("/feedback") == {"feedback": [{"token": ONE.decode(), "at": SINCE}]}
                assert ask("/feedback", "POST", {"count": 1000}) == {"listed": 1001}
                with Client(told["feedback_port"], ask("/ca.pem")) as client:
                    assert len(FeedbackReader().receive(b"".join(client.rest()))[1]) == 1001
                    client.tls.unwrap().close()
                assert ask("/feedback", "DELETE") == {"removed": 0}

        await to_thread(use)


def test_the_rules_on_the_page_are_some(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    (script,) = re.findall(r"```json\n(\[.*?)```", page, re.DOTALL)
    (tmp_path / "faults.json").write_text(script)
    assert [rule.door for rule in load_rules(tmp_path / "faults.json")] == [None, *["legacy"] * 3, "feedback"]


async def test_without_the_old_apple_its_ports_are_told_to_be_none() -> None:
    async with Simulator() as apple, controlled(apple) as control:
        told = control.describe()
        assert (told["legacy_port"], told["feedback_port"], told["topic"]) == (None, None, None)


@pytest.mark.apple
def test_the_fixture_has_both_ports_and_a_reset_forgets_the_list(apple: ThreadedSimulator) -> None:
    apple.add_feedback([ONE.decode()])
    apple.reset()
    assert read_feedback(apple) == []
    with pytest.raises(ValueError, match="32 bits"):
        apple.add_feedback([ONE.decode()], 1 << 32)
