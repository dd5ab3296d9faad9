"""Each of Apple's reasons, drawn by a foreign client that does the wrong thing over a real connection."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from msgspec import Struct

from heliograph import reasons
from heliograph.model import ClientCertificate, Environment, SigningKey
from heliograph.net.tls import client_context
from heliograph.simulator.server import KEY_ID, TEAM_ID, Simulator, new_signing_key
from tests.certificates import authority, push_certificate

TOKEN = "ab" * 32
TOPIC = "com.example.shop"
PAYLOAD = b'{"aps":{"alert":"Hello"}}'
SIGNING_KEY = new_signing_key()
SECOND_KEY = new_signing_key("SECONDKEY1", TEAM_ID)
SINCE = 1_700_000_000_123


def jwt(
    key: SigningKey = SIGNING_KEY,
    age_s: float = 60,
    *,
    alg: str = "ES256",
    key_id: str | None = None,
    team_id: str | None = None,
) -> str:
    """The authorization with a provider token that was made so long ago."""

    def packed(octets: bytes) -> str:
        return urlsafe_b64encode(octets).rstrip(b"=").decode()

    header = {"alg": alg, "kid": key_id or key.key_id}
    claims = {"iss": team_id or key.team_id, "iat": int(time.time() - age_s)}
    signed = packed(json.dumps(header).encode()) + "." + packed(json.dumps(claims).encode())
    private = load_pem_private_key(key.pem, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    r, s = decode_dss_signature(private.sign(signed.encode(), ec.ECDSA(SHA256())))
    return f"bearer {signed}.{packed(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


@cache
def usual_jwt() -> str:
    return jwt()


class Said(Struct):
    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def reason(self) -> str | None:
        return json.loads(self.body)["reason"] if self.body else None


class Peer:
    """hyper's h2 over asyncio's streams; one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        # It is to send what it would not send by itself.
        self._h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=True, validate_outbound_headers=False, normalize_outbound_headers=False
            )
        )
        self._h2.initiate_connection()
        self._flush()
        self.goodbye: bytes | None = None
        """The debug data of the GOAWAY."""

    def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())

    async def read(self) -> list[Any]:
        """What the next frame says."""
        try:
            head = await self._reader.readexactly(9)
            payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
        except asyncio.IncompleteReadError:
            return []
        if self.goodbye is not None:  # h2 takes nothing more, our acknowledgement of its SETTINGS for one
            return []
        events: list[Any] = list(self._h2.receive_data(head + payload))
        for event in events:
            if isinstance(event, h2.events.ConnectionTerminated):
                self.goodbye = event.additional_data or b""
        self._flush()
        return events

    async def ask(self, fields: Sequence[tuple[str, str]], body: bytes) -> Said | None:
        """None where the connection ended instead."""
        stream = self._h2.get_next_available_stream_id()
        self._h2.send_headers(stream, fields, end_stream=not body)
        if body:
            self._h2.send_data(stream, body, end_stream=True)
        self._flush()
        said = Said(0, {}, b"")
        while True:
            events = await self.read()
            if not events and self._reader.at_eof():
                return None
            for event in events:
                if isinstance(event, h2.events.ResponseReceived):
                    said.fields = {name.decode(): value.decode() for name, value in event.headers}
                    said.status = int(said.fields[":status"])
                elif isinstance(event, h2.events.DataReceived):
                    said.body += event.data
                elif isinstance(event, h2.events.StreamEnded):
                    return said

    async def until_closed(self) -> None:
        while not self._reader.at_eof():
            await self.read()


@asynccontextmanager
async def peer_of(apple: Simulator, certificate: ClientCertificate | None = None) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", apple.port, ssl=client_context(apple.ca_pem, certificate), server_hostname="localhost"
    )
    try:
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()


def fields_of(more: dict[str, str | None]) -> list[tuple[str, str]]:
    """Those of a good request, and `more` in their places; None leaves one out."""
    fields: dict[str, str | None] = {
        ":method": "POST",
        ":scheme": "https",
        ":authority": "localhost",
        ":path": f"/3/device/{TOKEN}",
        "authorization": usual_jwt(),
        "apns-topic": TOPIC,
        "apns-push-type": "alert",
        **more,
    }
    return [(name, value) for name, value in fields.items() if value is not None]


class Wrong(Struct):
    """Requests, the last of which is wrong."""

    reason: str
    requests: Callable[[], list[dict[str, str | None]]] = lambda: [{}]
    """What differs from a good one."""
    body: bytes = PAYLOAD
    twice: str | None = None
    """A field that the request has two times."""
    given: Callable[[Simulator], None] = lambda _: None
    """What there is before."""
    settings: dict[str, Any] = {}


def once(**fields: str | None) -> Callable[[], list[dict[str, str | None]]]:
    """One request; an underscore in a name is a hyphen, and `_path` is `:path`."""
    named = {(":" + name[1:] if name[0] == "_" else name.replace("_", "-")): value for name, value in fields.items()}
    return lambda: [named]


def signed(*make: Callable[[], str]) -> Callable[[], list[dict[str, str | None]]]:
    """Requests with these provider tokens."""
    return lambda: [{"authorization": each()} for each in make]


WRONG = {
    "a collapse id of 65 octets": Wrong("BadCollapseId", once(apns_collapse_id="x" * 65)),
    "half an octet": Wrong("BadDeviceToken", once(_path="/3/device/abc")),
    "no hex": Wrong("BadDeviceToken", once(_path="/3/device/" + "xy" * 32)),
    "a token of the other environment": Wrong(
        "BadDeviceToken", given=lambda apple: apple.register(TOKEN, environment=Environment.DEVELOPMENT)
    ),
    "a token that nobody registered": Wrong("BadDeviceToken", settings={"strict": True}),
    "milliseconds": Wrong("BadExpirationDate", once(apns_expiration="1700000000000")),
    "an id that is no UUID": Wrong("BadMessageId", once(apns_id="17")),
    "a priority of 7": Wrong("BadPriority", once(apns_priority="7")),
    "an urgent background push": Wrong("BadPriority", once(apns_push_type="background", apns_priority="10")),
    "a topic with a blank": Wrong("BadTopic", once(apns_topic="com example")),
    "a call to the app itself": Wrong("BadTopic", once(apns_push_type="voip")),
    "a token of another app": Wrong(
        "DeviceTokenNotForTopic", given=lambda apple: apple.register(TOKEN, topic="com.example.other")
    ),
    "two topics": Wrong("DuplicateHeaders", twice="apns-topic"),
    "a push type that is none": Wrong("InvalidPushType", once(apns_push_type="shout")),
    "no device token": Wrong("MissingDeviceToken", once(_path="/3/device/")),
    "no topic": Wrong("MissingTopic", once(apns_topic=None)),
    "no payload": Wrong("PayloadEmpty", body=b""),
    "an app of another team": Wrong("TopicDisallowed", given=lambda apple: apple.add_app("com.example.other")),
    "a topic that the key is not for": Wrong(
        "TopicDisallowed", given=lambda apple: apple.add_key(SIGNING_KEY, topics=["com.example.other"])
    ),
    "a key of the other environment": Wrong(
        "BadEnvironmentKeyInToken",
        given=lambda apple: apple.add_key(SIGNING_KEY, environment=Environment.DEVELOPMENT),
    ),
    "a provider token older than an hour": Wrong("ExpiredProviderToken", signed(lambda: jwt(age_s=3700))),
    "a signature by another key": Wrong("InvalidProviderToken", signed(lambda: jwt(new_signing_key(KEY_ID, TEAM_ID)))),
    "another team": Wrong("InvalidProviderToken", signed(lambda: jwt(team_id="OTHERTEAM1"))),
    "an unknown key id": Wrong("InvalidProviderToken", signed(lambda: jwt(key_id="UNKNOWNKEY"))),
    "another algorithm": Wrong("InvalidProviderToken", signed(lambda: jwt(alg="HS256"))),
    "no signature": Wrong("InvalidProviderToken", signed(lambda: jwt(alg="none").rpartition(".")[0] + ".")),
    "a clock that is fast": Wrong("InvalidProviderToken", signed(lambda: jwt(age_s=-3000))),
    "nonsense for a provider token": Wrong("InvalidProviderToken", signed(lambda: "bearer nonsense")),
    "no provider token": Wrong("MissingProviderToken", once(authorization=None)),
    "a second key": Wrong(
        "UnrelatedKeyIdInToken",
        signed(usual_jwt, lambda: jwt(SECOND_KEY)),
        given=lambda apple: apple.add_key(SECOND_KEY),
    ),
    "another path": Wrong("BadPath", once(_path="/3/devices/" + TOKEN)),
    "another method": Wrong("MethodNotAllowed", once(_method="PUT")),
    "an app that was uninstalled": Wrong("Unregistered", given=lambda apple: apple.unregister(TOKEN, SINCE)),
    "4097 octets": Wrong("PayloadTooLarge", body=b"x" * 4097),
    "a new provider token at once": Wrong(
        "TooManyProviderTokenUpdates", signed(lambda: jwt(age_s=600), lambda: jwt(age_s=60))
    ),
    # The two that decide come within one second: of three, two do.
    "too many to one device": Wrong("TooManyRequests", lambda: [{}, {}, {}], settings={"device_limit": 1}),
}

GOODBYES = {"BadCertificate", "BadCertificateEnvironment", "IdleTimeout"}
"""Those that come as the reason of a GOAWAY: the last three tests."""

SCRIPTED = {
    "BadEnvironmentKeyIdInToken",  # as Apple's table has it; its servers say it otherwise
    *("Forbidden", "ExpiredToken", "InternalServerError", "ServiceUnavailable", "Shutdown"),
    # Channels and broadcasts are not simulated.
    *("BadChannelId", "BadRequestParams", "BadRequestPayload", "CannotCreateChannelConfig", "ChannelNotRegistered"),
    *("FeatureNotEnabled", "MissingChannelId", "MissingChannelQueueSize", "MissingPushType", "TopicMismatch"),
}
"""Those that come from Apple's own state, which is only simulated by a fault."""


def test_every_reason_can_be_drawn() -> None:
    drawn = {each.reason for each in WRONG.values()}
    assert drawn | GOODBYES | SCRIPTED == set(reasons.TABLE)
    assert not (drawn | GOODBYES) & SCRIPTED


@pytest.mark.parametrize("what", WRONG)
async def test_wrong_request_draws_its_reason(what: str) -> None:
    wrong = WRONG[what]
    async with Simulator(signing_key=SIGNING_KEY, **wrong.settings) as apple:
        wrong.given(apple)
        async with peer_of(apple) as peer:
            said = []
            for more in wrong.requests():
                fields = fields_of(more)
                fields += [field for field in fields if field[0] == wrong.twice]
                said.append(await peer.ask(fields, wrong.body))
    refused = [each for each in said if each is not None and each.status != 200]
    assert [each.reason for each in refused] == [wrong.reason] * len(refused)
    assert refused
    no = refused[0]
    assert no.status == reasons.TABLE[wrong.reason].status
    assert no.fields["content-type"] == "application/json"
    assert len(no.fields["apns-id"]) == 36
    assert set(json.loads(no.body)) == ({"reason", "timestamp"} if no.status == 410 else {"reason"})
    if no.status == 410:
        assert json.loads(no.body)["timestamp"] == SINCE


@pytest.mark.parametrize("reason", sorted(SCRIPTED))
async def test_other_reasons_are_said_when_they_are_ordered(reason: str) -> None:
    async with Simulator(signing_key=SIGNING_KEY) as apple, peer_of(apple) as peer:
        apple.rejects(TOKEN, reason, retry_after_s=3, times=1)
        said = await peer.ask(fields_of({}), PAYLOAD)
        assert said is not None
        assert (said.status, said.reason) == (reasons.TABLE[reason].status, reason)
        assert said.fields["retry-after"] == "3"
        assert "timestamp" not in json.loads(said.body)
        apple.rejects(TOKEN, reason, times=1)
        said = await peer.ask(fields_of({}), PAYLOAD)
        assert said is not None
        assert "retry-after" not in said.fields
        again = await peer.ask(fields_of({}), PAYLOAD)
        assert again is not None
        assert again.status == 200


@pytest.mark.parametrize("environment", list(Environment))
async def test_good_request_is_accepted_with_a_unique_id_in_the_development_environment_only(
    environment: Environment,
) -> None:
    async with Simulator(environment, signing_key=SIGNING_KEY) as apple, peer_of(apple) as peer:
        said = await peer.ask(fields_of({}), PAYLOAD)
        assert said is not None
        assert (said.status, said.body) == (200, b"")
        assert ("apns-unique-id" in said.fields) == (environment is Environment.DEVELOPMENT)


# -- said by GOAWAY ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["BadCertificateEnvironment", "BadCertificate"])
async def test_certificate_that_is_not_for_here_draws_a_goodbye(reason: str) -> None:
    if reason == "BadCertificate":
        issued = push_certificate(environments=[], uid=None, name="Somebody")
        shown = ClientCertificate("Somebody", issued.certificate_pem, issued.key_pem, (), (), 0, 0, "")
    else:
        shown = push_certificate(TOPIC, environments=[Environment.DEVELOPMENT]).loaded()
    async with Simulator(client_authorities=authority().certificate_pem) as apple, peer_of(apple, shown) as peer:
        await peer.until_closed()
        assert peer.goodbye is not None
        assert json.loads(peer.goodbye) == {"reason": reason}


async def test_certificate_for_here_needs_no_provider_token_and_may_open_all_streams_at_once() -> None:
    shown = push_certificate(TOPIC).loaded()
    async with Simulator(client_authorities=authority().certificate_pem) as apple, peer_of(apple, shown) as peer:
        said = await peer.ask(fields_of({"authorization": None, "apns-topic": None}), PAYLOAD)
        assert said is not None
        assert said.status == 200
        assert peer._h2.remote_settings.max_concurrent_streams == 1000
        other = await peer.ask(fields_of({"apns-topic": "com.example.other"}), PAYLOAD)
        assert other is not None
        assert other.reason == "TopicDisallowed"


async def test_connection_that_is_idle_for_too_long_is_told_so() -> None:
    async with Simulator(signing_key=SIGNING_KEY, idle_s=0.05) as apple, peer_of(apple) as peer:
        said = await peer.ask(fields_of({}), PAYLOAD)
        assert said is not None
        await peer.until_closed()
        assert peer.goodbye is not None
        assert json.loads(peer.goodbye) == {"reason": "IdleTimeout"}
