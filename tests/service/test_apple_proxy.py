"""The Apple-shaped proxy: whole servers, with clients that know nothing of heliograph, and the simulator as Apple."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, Event, ResponseReceived, StreamEnded

from heliograph.callers import Callers, certificate_id
from heliograph.carriers.apns import ApnsCarrier, Endpoint, PoolSettings, Route
from heliograph.config import AppleProxySettings
from heliograph.doors.apple import AppleProxy
from heliograph.errors import ConfigError, StoreError
from heliograph.keys import Keyring
from heliograph.model import Access, App, Environment, KnownCaller, PushType, Receipt, Scope, SigningKey, State
from heliograph.net.http2 import Link, connect
from heliograph.net.tls import client_context, throwaway_identity
from heliograph.protocols.http2 import Accepted, ClientConnection, ErrorCode, Requests, Template
from heliograph.protocols.http2 import GoAway as GoAwayEvent
from heliograph.protocols.provider_token import mint, public_key
from heliograph.relay import Relay
from heliograph.simulator.faults import Answer, Delay, GoAway, Reset, Withhold
from heliograph.simulator.server import Simulator, new_signing_key
from heliograph.stores.sqlite import SqliteStore
from heliograph.telemetry import Telemetry
from tests.service.house import PATIENCE_S, token

TOPIC = "com.example.shop"
OTHER_TOPIC = "com.example.till"
KEY = b"a-key-of-the-server-itself"
PAYLOAD = b'{"aps":{"alert":"Hello"}}'
CALLER_KEY = new_signing_key("CALLERKEY1", "CALLERTEAM")
IDENTITY = throwaway_identity(datetime.now(UTC))
PRODUCTION, DEVELOPMENT = Environment.PRODUCTION, Environment.DEVELOPMENT


class Clock:
    """UNIX seconds, by the machine, and some more."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Place:
    """What a test speaks to."""

    def __init__(self, apple: Simulator, sandbox: Simulator, store: SqliteStore) -> None:
        self.apple = apple
        self.sandbox = sandbox
        self.store = store
        self.clock = Clock()
        both = (Access(apple.signing_key, (PRODUCTION, DEVELOPMENT)),)
        self.apps = {"shop": App("shop", (TOPIC,), both), "till": App("till", (OTHER_TOPIC,), both)}
        self.settings = PoolSettings(patience_s=0.5, backoff_s=0.1)
        ends = {
            PRODUCTION: Route(Endpoint("localhost", apple.port, client_context(apple.ca_pem)), apple.signing_key),
            DEVELOPMENT: Route(
                Endpoint("localhost", sandbox.port, client_context(sandbox.ca_pem), unique_ids=True), apple.signing_key
            ),
        }
        self.carrier = ApnsCarrier(lambda _, where, __: ends[where], settings=self.settings, clock=time.time)
        self.telemetry = Telemetry()
        self.relay = Relay(store, store, self.carrier, self.apps, self.telemetry, clock=time.time)
        self.keyring = Keyring(KEY, store, clock=self.clock)
        self.callers = Callers(store, self.apps, clock=self.clock)

    @asynccontextmanager
    async def proxy(self, **settings: Any) -> AsyncIterator[Proxy]:
        proxy = AppleProxy(
            "main",
            AppleProxySettings(port=0, **settings),
            relay=self.relay,
            store=self.store,
            apps=self.apps,
            keyring=self.keyring,
            callers=self.callers,
            identity=(IDENTITY.certificate_pem, IDENTITY.key_pem),
            telemetry=self.telemetry,
            clock=self.clock,
        )
        await proxy.start()
        try:
            yield Proxy(proxy, tls=settings.get("tls", True))
        finally:
            await proxy.aclose()

    async def register(self, key: SigningKey = CALLER_KEY, app: str = "shop", **more: Any) -> str:
        """A caller with a key of its own; a provider token that it signs."""
        caller = KnownCaller(
            id=f"{key.team_id}.{key.key_id}",
            name="a script",
            app=app,
            public_key=public_pem(key),
            created_at=self.clock(),
            **more,
        )
        assert await self.callers.add(caller) is None
        return mint(key, self.clock())

    async def receipt(self, apns_id: str) -> Receipt:
        """What is on record, once it is."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                (found,) = await self.relay.receipts([apns_id])
                if found is not None and found.state is not State.QUEUED:
                    return found
                await asyncio.sleep(0.01)


class Proxy:
    """A client's view of a proxy."""

    def __init__(self, door: AppleProxy, *, tls: bool) -> None:
        self.door = door
        self.url = f"{'https' if tls else 'http'}://localhost:{door.port}"

    def client(self, certificate: Path | None = None) -> httpx.AsyncClient:
        context = ssl.create_default_context(cadata=IDENTITY.ca_pem.decode())
        if certificate is not None:
            context.load_cert_chain(certificate)
        return httpx.AsyncClient(http1=False, http2=True, verify=context, base_url=self.url, timeout=PATIENCE_S)

    async def push(
        self,
        headers: Mapping[str, str] | list[tuple[str, str]] | None = None,
        *,
        device: str | None = None,
        bearer: str | None = KEY.decode(),
        payload: bytes = PAYLOAD,
        path: str | None = None,
        method: str = "POST",
        client: httpx.AsyncClient | None = None,
        certificate: Path | None = None,
        topic: str | None = TOPIC,
    ) -> httpx.Response:
        """One request; by itself on a connection of its own."""
        fields = list(headers.items() if isinstance(headers, Mapping) else headers or [])
        if bearer is not None:
            fields.append(("authorization", f"bearer {bearer}"))
        if topic is not None:
            fields.append(("apns-topic", topic))
        way = f"/3/device/{token(1) if device is None else device}" if path is None else path
        if client is not None:
            return await client.request(method, way, headers=fields, content=payload)
        async with self.client(certificate) as own:
            return await own.request(method, way, headers=fields, content=payload)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


def reason(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["reason"] if answer.content else None


def public_pem(key: SigningKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import PublicFormat

    return public_key(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def client_certificate(folder: Path, *, ended: bool = False) -> tuple[Path, bytes]:
    """A self-made one, with its key, in a file; and as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Apple Push Services: com.example.shop")])
    until = datetime.now(UTC) + timedelta(days=-900 if ended else 9)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(until - timedelta(days=365))
        .not_valid_after(until)
        .sign(key, SHA256())
    )
    pem = certificate.public_bytes(Encoding.PEM)
    path = folder / f"{uuid4()}.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + pem)
    return path, pem


def caller_with(pem: bytes, **more: Any) -> KnownCaller:
    der = ssl.PEM_cert_to_DER_cert(pem.decode())
    return KnownCaller(
        id=certificate_id(der), name="an old script", app="shop", certificate=pem, created_at=time.time(), **more
    )


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with Simulator() as apple, Simulator(Environment.DEVELOPMENT, signing_key=apple.signing_key) as sandbox:
        store = await SqliteStore.open(tmp_path / "heliograph.db")
        place = Place(apple, sandbox, store)
        tasks = [asyncio.create_task(place.relay.work()), asyncio.create_task(place.relay.settle())]
        try:
            yield place
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await place.carrier.aclose()
            await place.relay.drain()
            await store.aclose()


# -- what goes through ------------------------------------------------------------------------------------------------

OWN = "0f6a2c1e-2f8d-4a67-9d5c-1b0c2d3e4f50"


async def test_a_request_goes_to_apple_as_it_came_and_apples_answer_comes_back(place: Place, tmp_path: Path) -> None:
    fields = {
        "apns-push-type": "alert",
        "apns-priority": "5",
        "apns-expiration": "1999999999",
        "apns-collapse-id": "parcel",
        "apns-id": OWN.upper(),
    }
    async with place.proxy() as proxy:
        answer = await proxy.push(fields, device=token(7).upper())
    assert (answer.status_code, answer.content, answer.http_version) == (200, b"", "HTTP/2")
    assert answer.headers["apns-id"] == OWN
    (received,) = place.apple.received
    assert (received.token, received.payload, received.topic) == (token(7), PAYLOAD, TOPIC)
    assert (received.id, received.collapse_id) == (OWN, "parcel")


async def test_who_brings_no_id_gets_ours_and_nothing_else_is_added(place: Place) -> None:
    async with place.proxy() as proxy:
        answer = await proxy.push()
    (received,) = place.apple.received
    assert (answer.status_code, answer.headers["apns-id"], received.collapse_id) == (200, received.id, None)
    assert received.push_type is PushType.ALERT


async def test_sandbox_gives_its_unique_id(place: Place) -> None:
    async with place.proxy(environment=DEVELOPMENT) as proxy:
        answer = await proxy.push()
    assert answer.status_code == 200
    assert len(answer.headers["apns-unique-id"]) == 36
    assert len(place.sandbox.received) == 1


async def test_apples_no_comes_back_with_reason_and_time(place: Place) -> None:
    place.apple.unregister(token(1), 1_700_000_000_123)
    async with place.proxy() as proxy, proxy.client() as client:
        gone = await proxy.push({"apns-id": OWN}, client=client)
        again = await proxy.push(client=client)
        place.apple.misbehaves(Answer(429, "TooManyRequests", retry_after_s=7), times=1)
        too_many = await proxy.push(device=token(2), client=client)
        place.apple.misbehaves(Answer(503, "ServiceUnavailable", retry_after_s=9), times=1)
        busy = await proxy.push(device=token(2), client=client)
        place.apple.misbehaves(Answer(500, "InternalServerError"), times=1)
        trouble = await proxy.push(device=token(2), client=client)
    assert (gone.status_code, gone.json()) == (410, {"reason": "Unregistered", "timestamp": 1_700_000_000_123})
    assert gone.headers["apns-id"] == OWN
    assert again.json() == gone.json(), "Apple is asked again"
    assert (reason(too_many), too_many.headers["retry-after"]) == ((429, "TooManyRequests"), "7")
    assert (reason(busy), busy.headers["retry-after"]) == ((503, "ServiceUnavailable"), "9")
    assert reason(trouble) == (500, "InternalServerError")


async def test_what_apple_did_not_act_on_is_sent_again_at_once_and_the_caller_knows_nothing_of_it(place: Place) -> None:
    async with place.proxy() as proxy, proxy.client() as client:
        assert (await proxy.push(client=client)).status_code == 200
        for action in (Reset(ErrorCode.REFUSED_STREAM, acted=False), GoAway("Shutdown", last_stream_id=0)):
            place.apple.misbehaves(action, times=1)
            assert (await proxy.push(device=token(2), client=client)).status_code == 200
        place.apple.misbehaves(Answer(403, "ExpiredProviderToken"), times=1)
        assert (await proxy.push(device=token(3), client=client)).status_code in (200, 503)
    assert [each.token for each in place.apple.received][:3] == [token(1), token(2), token(2)]


async def test_what_apple_has_against_our_credentials_is_not_told_as_the_callers_fault(place: Place) -> None:
    place.apple.misbehaves(Answer(403, "InvalidProviderToken"), times=1)
    async with place.proxy() as proxy:
        answer = await proxy.push()
    assert (reason(answer), answer.headers["retry-after"]) == ((503, "ServiceUnavailable"), "5")


async def test_where_nobody_knows_whether_apple_acted_that_is_the_answer(place: Place) -> None:
    place.apple.misbehaves(Reset(ErrorCode.INTERNAL_ERROR, acted=True), times=1)
    async with place.proxy() as proxy:
        answer = await proxy.push({"apns-id": OWN})
    assert (reason(answer), answer.headers["apns-id"]) == ((500, "InternalServerError"), OWN)
    assert len(place.apple.received) == 1, "it was not sent a second time"
    assert (await place.receipt(OWN)).state is State.UNKNOWN


async def test_apple_that_cannot_be_reached_is_503_for_one_after_a_while_and_for_others_at_once(
    place: Place, tmp_path: Path
) -> None:
    await place.apple.__aexit__(None, None, None)
    try:
        async with place.proxy() as proxy, proxy.client() as client:
            first = asyncio.create_task(proxy.push({"apns-id": OWN}, client=client))
            await until(lambda: any(each.trouble for each in place.carrier.lanes()))
            other = await proxy.push(device=token(2), client=client)
            assert not first.done()
            for answer in (other, await first):
                assert (reason(answer), answer.headers["retry-after"]) == ((503, "ServiceUnavailable"), "5")
        receipt = await place.receipt(OWN)
        assert (receipt.state, receipt.reason) == (State.CANCELLED, "NotProcessed")
    finally:
        await place.apple.__aenter__()


# -- who may ----------------------------------------------------------------------------------------------------------


async def test_api_key_opens_what_it_is_for_until_it_is_removed(place: Place) -> None:
    key, shown = await place.keyring.make("a script", [Scope.SEND], ["shop"])
    _, reading = await place.keyring.make("a page", [Scope.READ], None)
    async with place.proxy() as proxy, proxy.client() as client:
        answers = [
            await proxy.push(bearer=shown, client=client),
            await proxy.push(bearer=shown, topic=OTHER_TOPIC, client=client),
            await proxy.push(bearer=reading, client=client),
            await proxy.push([("authorization", f"BEARER {shown}")], bearer=None, client=client),
        ]
        await place.keyring.remove(key.id)
        answers.append(await proxy.push(bearer=shown, client=client))
    assert [reason(each) for each in answers] == [
        (200, None),
        (400, "TopicDisallowed"),
        (403, "InvalidProviderToken"),
        (200, None),
        (403, "InvalidProviderToken"),
    ]


async def test_tenants_that_share_a_connection_are_told_apart_request_by_request(place: Place) -> None:
    """As by a proxy of their own in front of this one: all in one write, so that they are read together."""
    await place.register()
    shown = [
        mint(CALLER_KEY, time.time()),
        (await place.keyring.make("the till", [Scope.SEND], ["till"]))[1],
        "somebody",
    ]
    async with place.proxy(tls=False) as proxy, bare(proxy.door) as client:
        expected: dict[int, bytes] = {}
        for number in range(60):
            stream_id, who, till = 2 * number + 1, number % 3, number % 2
            fields = [("authorization", f"bearer {shown[who]}"), ("apns-topic", OTHER_TOPIC if till else TOPIC)]
            client.h2.send_headers(stream_id, [*BASICS, *fields])
            client.h2.send_data(stream_id, PAYLOAD, end_stream=True)
            expected[stream_id] = b"403" if who == 2 else b"200" if who == till else b"400"
        client.writer.write(client.h2.data_to_send())
        ended: set[int] = set()

        def all_ended(each: Event) -> bool:
            if isinstance(each, StreamEnded):
                ended.add(each.stream_id)
            return ended == set(expected)

        await client.until(all_ended)
        got = {
            each.stream_id: dict(each.headers or [])[b":status"]
            for each in client.events
            if isinstance(each, ResponseReceived)
        }
    assert got == expected
    assert {each.topic for each in place.apple.received} == {TOPIC, OTHER_TOPIC}
    assert len(place.apple.received) == 20


async def test_what_is_neither_key_nor_provider_token_is_called_that_in_the_log(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(AppleProxy, "complain", lambda _, refused: told.append(refused.detail))
    async with place.proxy() as proxy:
        assert reason(await proxy.push(bearer="hg_mistyped")) == (403, "InvalidProviderToken")
    assert told == ["What was shown is neither an API key that is known here nor a provider token."]


async def test_each_kind_of_refusal_is_told_of_and_only_many_are_summed_up(place: Place) -> None:
    key, shown = await place.keyring.make("a script", [Scope.SEND], ["shop"])
    with structlog.testing.capture_logs() as lines:
        async with place.proxy() as proxy, proxy.client() as client:
            for number in range(40):
                await proxy.push(bearer=shown, topic=f"other.{number}", client=client)
            for _ in range(12):
                await proxy.push(bearer="mistyped", client=client)
                await proxy.push(bearer=None, client=client)
    told = [(each["reason"], each["count"], each["why"]) for each in lines if each["event"] == "proxy_refused"]
    topics = [each for each in told if each[0] == "TopicDisallowed"]
    assert topics[0][2].endswith(
        f"The topic 'other.0' is of no app that this caller may use. It came from the API key {key.id}."
    )
    assert sum(each[1] for each in topics) == 40
    assert len(topics) == 31
    for word in ("InvalidProviderToken", "MissingProviderToken"):
        assert [each[1] for each in told if each[0] == word] == [*[1] * 10, 2]


async def test_client_that_speaks_no_http2_is_told_of_once_a_minute(place: Place) -> None:
    with structlog.testing.capture_logs() as lines:
        async with place.proxy(tls=False) as proxy:
            for octets in (b"POST /3/device/ab HTTP/1.1\r\n\r\n", bytes(40)):
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy.door.port)
                writer.write(octets)
                async with asyncio.timeout(PATIENCE_S):
                    await reader.read()
                writer.close()
                await writer.wait_closed()
    told = [each for each in lines if each["event"] == "proxy_refused"]
    assert [(each["reason"], each["listener"], each["count"]) for each in told] == [("NotHttp2", "main", 1)] * 2
    assert "use HTTP/2 (curl --http2" in told[0]["why"]


async def test_api_key_ends_on_its_day(place: Place) -> None:
    _, shown = await place.keyring.make("a script", [Scope.SEND], None, place.clock() + 60)
    async with place.proxy() as proxy, proxy.client() as client:
        assert reason(await proxy.push(bearer=shown, client=client)) == (200, None)
        place.clock.ahead = 61
        assert reason(await proxy.push(bearer=shown, client=client)) == (403, "InvalidProviderToken")


async def test_provider_token_of_a_registered_key_opens_its_app_and_apple_never_sees_it(place: Place) -> None:
    shown = await place.register()
    stranger = mint(new_signing_key("STRANGER12", "CALLERTEAM"), time.time())
    async with place.proxy() as proxy, proxy.client() as client:
        answers = [
            await proxy.push(bearer=shown, client=client),
            await proxy.push(bearer=shown, topic=OTHER_TOPIC, client=client),
            await proxy.push(bearer=stranger, client=client),
            await proxy.push(bearer=None, client=client),
            await proxy.push([("authorization", "Basic eDp5")], bearer=None, client=client),
        ]
        place.clock.ahead = 3 * 3600
        answers.append(await proxy.push(bearer=shown, client=client))
        place.clock.ahead = 0
        await place.callers.remove("CALLERTEAM.CALLERKEY1")
        answers.append(await proxy.push(bearer=shown, client=client))
    assert [reason(each) for each in answers] == [
        (200, None),
        (400, "TopicDisallowed"),
        (403, "InvalidProviderToken"),
        (403, "MissingProviderToken"),
        (403, "MissingProviderToken"),
        (403, "ExpiredProviderToken"),
        (403, "InvalidProviderToken"),
    ]
    assert len(place.apple.received) == 1


@pytest.mark.parametrize("ended", [False, True], ids=["good", "ended years ago"])
async def test_certificate_registered_while_running_opens_its_app_and_authorization_is_not_looked_at(
    place: Place, tmp_path: Path, ended: bool
) -> None:
    path, pem = client_certificate(tmp_path, ended=ended)
    async with place.proxy() as proxy:
        with pytest.raises((httpx.TransportError, ssl.SSLError)):
            await proxy.push(bearer=None, certificate=path)
        await place.callers.add(caller_with(pem, topic=TOPIC))
        assert reason(await proxy.push(bearer="nonsense", topic=None, certificate=path)) == (200, None)
        assert reason(await proxy.push(topic=OTHER_TOPIC, certificate=path)) == (400, "TopicDisallowed")
        async with proxy.client(path) as client:
            assert reason(await proxy.push(bearer=None, client=client)) == (200, None)
            await place.callers.remove(place.callers.all()[0].id)
            assert reason(await proxy.push(bearer=None, client=client)) == (403, "BadCertificate")


async def test_app_that_is_removed_while_running_is_nobodys(place: Place) -> None:
    async with place.proxy() as proxy, proxy.client() as client:
        assert reason(await proxy.push(client=client)) == (200, None)
        del place.apps["shop"]
        assert reason(await proxy.push(client=client)) == (400, "TopicDisallowed")


# -- which app, which environment -------------------------------------------------------------------------------------


async def test_topic_chooses_the_app(place: Place) -> None:
    async with place.proxy() as proxy, proxy.client() as client:
        for topic in (TOPIC, OTHER_TOPIC, f"{TOPIC}.voip"):
            assert reason(await proxy.push(topic=topic, client=client)) == (200, None)
        assert reason(await proxy.push(topic="com.example.other", client=client)) == (400, "TopicDisallowed")
        assert reason(await proxy.push(topic=None, client=client)) == (400, "MissingTopic")
        wrong = await proxy.push({"apns-push-type": "voip"}, client=client)
        assert reason(wrong) == (400, "BadTopic")
        del place.apps["till"]
        assert reason(await proxy.push(topic=None, client=client)) == (200, None)
    assert [each.push_type for each in place.apple.received] == [
        PushType.ALERT,
        PushType.ALERT,
        PushType.VOIP,
        PushType.ALERT,
    ]


async def test_environment_is_the_callers_else_the_listeners_else_by_the_name_that_was_called(place: Place) -> None:
    shown = await place.register(environment=DEVELOPMENT)
    async with place.proxy(environment=PRODUCTION) as proxy:
        await proxy.push(bearer=shown, device=token(1))
        await proxy.push(device=token(2))
    async with place.proxy() as proxy:
        await proxy.push([("host", "api.sandbox.push.apple.com")], device=token(3))
        await proxy.push([("host", "api.development.push.apple.com:443")], device=token(4))
        await proxy.push([("host", "api.push.apple.com")], device=token(5))
        await proxy.push(device=token(6))
        place.apps["shop"] = App("shop", (TOPIC,), (Access(place.apple.signing_key, (DEVELOPMENT,)),))
        await proxy.push([("host", "api.push.apple.com")], device=token(7))
    async with place.proxy(environment=PRODUCTION) as proxy:
        assert reason(await proxy.push()) == (400, "TopicDisallowed")
    assert [each.token for each in place.sandbox.received] == [token(number) for number in (1, 3, 4, 7)]
    assert [each.token for each in place.apple.received] == [token(number) for number in (2, 5, 6)]


async def test_push_type_that_is_not_named_is_told_by_the_payload(place: Place) -> None:
    silent = b'{"aps":{"content-available":1},"x":1}'
    loud = b'{"aps":{"content-available":1,"badge":0}}'
    async with place.proxy() as proxy, proxy.client() as client:
        for payload in (silent, loud, b"content-available"):
            answer = await proxy.push({"apns-priority": "10"}, payload=payload, client=client)
            assert reason(answer) == (200, None)
        named = await proxy.push({"apns-priority": "10", "apns-push-type": "background"}, payload=silent, client=client)
        assert reason(named) == (400, "BadPriority")
    assert [each.push_type for each in place.apple.received] == [PushType.BACKGROUND, PushType.ALERT, PushType.ALERT]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields,more,wanted",
    [
        ({}, {"method": "GET", "payload": b"", "path": "/nowhere"}, (405, "MethodNotAllowed")),
        ({}, {"path": "/3/devices/x", "bearer": None}, (404, "BadPath")),
        ({}, {"path": f"/4/broadcasts/apps/{TOPIC}"}, (404, "BadPath")),
        ({}, {"path": f"/1/apps/{TOPIC}/channels"}, (404, "BadPath")),
        ({}, {"method": "GET", "payload": b"", "path": f"/1/apps/{TOPIC}/all-channels"}, (404, "BadPath")),
        ({}, {"method": "DELETE", "payload": b"", "path": f"/1/apps/{TOPIC}/channels"}, (404, "BadPath")),
        ({}, {"method": "PUT", "path": f"/4/broadcasts/apps/{TOPIC}"}, (404, "BadPath")),
        ({}, {"method": "GET", "payload": b""}, (405, "MethodNotAllowed")),
        ({}, {"device": ""}, (400, "MissingDeviceToken")),
        ({}, {"device": "xyz"}, (400, "BadDeviceToken")),
        ({}, {"device": "abc"}, (400, "BadDeviceToken")),
        ({}, {"device": "ab" * 201}, (400, "BadDeviceToken")),
        ({}, {"device": "%3Cab%3E"}, (400, "BadDeviceToken")),
        ({"apns-id": "7"}, {}, (400, "BadMessageId")),
        ({"apns-id": OWN.replace("-", "")}, {}, (400, "BadMessageId")),
        ({"apns-priority": "7"}, {}, (400, "BadPriority")),
        ({"apns-priority": "high"}, {}, (400, "BadPriority")),
        ({"apns-expiration": "soon"}, {}, (400, "BadExpirationDate")),
        ({"apns-expiration": "-1"}, {}, (400, "BadExpirationDate")),
        ({"apns-expiration": "1700000000000"}, {}, (400, "BadExpirationDate")),
        ({"apns-push-type": "shout"}, {}, (400, "InvalidPushType")),
        ({"apns-collapse-id": "x" * 65}, {}, (400, "BadCollapseId")),
        ({}, {"topic": "x" * 256}, (400, "TopicDisallowed")),
        ({}, {"payload": b""}, (400, "PayloadEmpty")),
        ({}, {"payload": b"x" * 4097}, (413, "PayloadTooLarge")),
        ([("apns-priority", "5"), ("apns-priority", "5")], {}, (400, "DuplicateHeaders")),
        ([("apns-id", OWN), ("apns-id", OWN)], {}, (400, "DuplicateHeaders")),
        ([("apns-collapse-id", "x"), ("apns-collapse-id", "y")], {}, (400, "DuplicateHeaders")),
        ([("authorization", "bearer x")], {}, (400, "DuplicateHeaders")),
    ],
)
async def test_what_apple_would_refuse_is_refused_in_its_words(
    place: Place, fields: Any, more: dict[str, Any], wanted: tuple[int, str]
) -> None:
    async with place.proxy() as proxy:
        answer = await proxy.push(fields, **more)
    assert reason(answer) == wanted
    assert len(answer.headers["apns-id"]) == 36
    assert answer.headers["content-type"] == "application/json"
    assert not place.apple.received


@pytest.mark.parametrize(
    "fields,more",
    [
        ({"apns-expiration": "1"}, {}),
        ({"apns-expiration": "0"}, {}),
        ({"apns-something": "new"}, {}),
        ({"apns-collapse-id": ""}, {}),
        ({}, {"payload": b"not JSON: that is Apple's to judge"}),
        ({}, {"payload": b"x" * 4096}),
        ({}, {"payload": b"x" * 5120, "topic": f"{TOPIC}.voip"}),
        ({}, {"device": "ab" * 100}),
        ({}, {"device": "0a"}),
    ],
)
async def test_nothing_is_refused_that_apple_takes(place: Place, fields: Any, more: dict[str, Any]) -> None:
    async with place.proxy() as proxy:
        assert reason(await proxy.push(fields, **more)) == (200, None)


async def test_token_that_apple_called_dead_or_unknown_is_asked_for_again(place: Place) -> None:
    place.apple.register(token(2), environment=DEVELOPMENT)
    place.apple.unregister(token(1), 1_700_000_000_000)
    async with place.proxy() as proxy, proxy.client() as client:
        refused = [await proxy.push(device=token(number), client=client) for number in (1, 2)]
        for answer in refused:
            await place.receipt(answer.headers["apns-id"])
        held = await place.store.held_among("shop", PRODUCTION, [token(1).encode(), token(2).encode()])
        assert list(held.values()) == ["Unregistered", "BadDeviceToken"]
        for number in (1, 2):
            place.apple.register(token(number))
            assert reason(await proxy.push(device=token(number), client=client)) == (200, None)


# -- what is on record ------------------------------------------------------------------------------------------------


async def test_what_became_of_it_is_on_record_under_our_id_and_under_the_callers(place: Place) -> None:
    place.apple.unregister(token(2), 1_700_000_000_000)
    async with place.proxy() as proxy, proxy.client() as client:
        good = await proxy.push({"apns-collapse-id": "x"}, client=client)
        await proxy.push({"apns-id": OWN}, device=token(2), client=client)
    receipt = await place.receipt(good.headers["apns-id"])
    assert (receipt.state, receipt.app, receipt.token, receipt.collapse_id) == (State.ACCEPTED, "shop", token(1), "x")
    receipt = await place.receipt(OWN)
    assert (receipt.state, receipt.status, receipt.reason) == (State.REJECTED, 410, "Unregistered")
    assert (receipt.since, receipt.apns_id, receipt.connection) == (1_700_000_000_000, OWN, "apple_proxy.main")
    assert [each.removal.token for each in await place.store.find_removals("shop", None, 0, 10)] == [token(2)]


async def test_many_at_once_go_together_and_each_gets_its_own_answer(place: Place) -> None:
    ids = [str(uuid4()) for _ in range(300)]
    for number in range(0, 300, 7):
        place.apple.unregister(token(number), 1_700_000_000_000)
    async with place.proxy() as proxy, proxy.client() as one, proxy.client() as two:
        answers = await asyncio.gather(
            *[
                proxy.push(
                    {"apns-id": each} if number % 3 else {},
                    device=token(number),
                    client=(one, two)[number % 2],
                    topic=TOPIC if number % 5 else OTHER_TOPIC,
                )
                for number, each in enumerate(ids)
            ]
        )
    assert [each.status_code for each in answers] == [200 if number % 7 else 410 for number in range(300)]
    got = [answer.headers["apns-id"] for answer in answers]
    assert [mine for number, mine in enumerate(got) if number % 3] == [mine for i, mine in enumerate(ids) if i % 3]
    by_token = {str(each.token): each.id for each in place.apple.received}
    assert all(by_token[token(number)] == mine for number, mine in enumerate(got) if number % 7)
    receipts = [await place.receipt(each) for each in got]
    assert [each.token for each in receipts] == [token(number) for number in range(300)]


class Broken(SqliteStore):
    """Its disk is full."""

    failing = False

    async def keep(self, *arguments: Any) -> None:
        if self.failing:
            raise StoreError("the disk is full")
        await super().keep(*arguments)


async def test_store_that_fails_delays_no_answer_and_is_told_of_it_later(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place.store, "__class__", Broken)
    monkeypatch.setattr("heliograph.relay.sends._STORE_PAUSE_S", 0.05)
    Broken.failing = True
    async with place.proxy() as proxy, proxy.client() as client:
        for number in range(3):
            assert reason(await proxy.push({"apns-id": OWN} if number else {}, client=client)) == (200, None)
        await until(lambda: place.relay.store_failure is not None)
        Broken.failing = False
        assert (await place.receipt(OWN)).state is State.ACCEPTED
        assert place.relay.store_failure is None


# -- durable ----------------------------------------------------------------------------------------------------------


async def test_durable_app_is_answered_as_soon_as_it_is_safe(place: Place) -> None:
    place.apple.misbehaves(Withhold(), times=1)
    async with place.proxy(durable=("shop",)) as proxy, proxy.client() as client:
        fields = {"apns-id": OWN.upper(), "apns-expiration": "1"}
        answers = [await proxy.push(fields, client=client), await proxy.push(device=token(2), client=client)]
        assert [reason(each) for each in answers] == [(200, None), (200, None)]
        assert answers[0].headers["apns-id"] == OWN
        receipt = await place.receipt(answers[1].headers["apns-id"])
        assert (receipt.state, receipt.collapse_id) == (State.ACCEPTED, receipt.id)
        assert receipt.connection == "apple_proxy.main.durable"
        (first,) = await place.relay.receipts([OWN])
        assert first is not None
        assert (first.state, first.apns_id, first.expiration) == (State.QUEUED, OWN, 0)
        bad = await proxy.push({"apns-priority": "3"}, client=client)
        empty = await proxy.push(payload=b"[]", client=client)
        assert (reason(bad), reason(empty)) == ((400, "BadPriority"), (400, "BadRequestPayload"))


async def test_durable_app_refuses_at_once_what_is_known_to_be_dead(place: Place) -> None:
    place.apple.unregister(token(1), 1_700_000_000_000)
    async with place.proxy(durable=("shop",)) as proxy, proxy.client() as client:
        answer = await proxy.push(client=client)
        assert (await place.receipt(answer.headers["apns-id"])).state is State.REJECTED
        answers = await asyncio.gather(
            *[proxy.push({"apns-id": OWN}, device=token(number), client=client) for number in (1, 2)]
        )
    assert [reason(each) for each in answers] == [(410, "Unregistered"), (200, None)]
    assert answers[0].json()["timestamp"] == 1_700_000_000_000
    assert {each.headers["apns-id"] for each in answers} == {OWN}


async def test_dead_token_has_a_time_though_the_store_cannot_be_read(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise StoreError("the disk is gone")

    place.apple.unregister(token(1), 1_700_000_000_000)
    async with place.proxy(durable=("shop",)) as proxy, proxy.client() as client:
        answer = await proxy.push(client=client)
        assert (await place.receipt(answer.headers["apns-id"])).state is State.REJECTED
        monkeypatch.setattr(place.store, "find_removals", fail)
        answer = await proxy.push(client=client)
    assert reason(answer) == (410, "Unregistered")
    assert abs(answer.json()["timestamp"] / 1000 - place.clock()) < PATIENCE_S


async def test_durable_app_asks_to_come_again_where_too_much_waits(tmp_path: Path) -> None:
    async with Simulator() as apple, Simulator(Environment.DEVELOPMENT) as sandbox:
        store = await SqliteStore.open(tmp_path / "small.db", max_waiting=1)
        place = Place(apple, sandbox, store)
        async with place.proxy(durable=("shop",)) as proxy, proxy.client() as client:
            assert reason(await proxy.push(client=client)) == (200, None)
            answer = await proxy.push({"apns-id": OWN}, client=client)
            assert (reason(answer), answer.headers["apns-id"]) == ((503, "ServiceUnavailable"), OWN)
            assert int(answer.headers["retry-after"]) >= 1
        await place.carrier.aclose()
        await place.relay.drain()
        await store.aclose()


# -- connections ------------------------------------------------------------------------------------------------------


BASICS = [(":method", "POST"), (":scheme", "https"), (":path", f"/3/device/{token(1)}"), (":authority", "localhost")]
OWN_FIELDS = [("authorization", f"bearer {KEY.decode()}"), ("apns-topic", TOPIC)]


class Bare:
    """A client of nothing but h2 and a socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.h2 = H2Connection(H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False))
        self.h2.initiate_connection()
        self.events: list[Event] = []

    def push(self, stream_id: int, *fields: tuple[str, str], body: bytes = PAYLOAD) -> None:
        self.h2.send_headers(stream_id, [*BASICS, *OWN_FIELDS, *fields])
        self.h2.send_data(stream_id, body, end_stream=True)
        self.writer.write(self.h2.data_to_send())

    async def until(self, enough: Callable[[Event], bool]) -> Event:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for event in self.events:
                    if enough(event):
                        return event
                octets = await self.reader.read(65_536)
                if not octets:
                    raise ConnectionResetError
                self.events += self.h2.receive_data(octets)
                self.writer.write(self.h2.data_to_send())


@asynccontextmanager
async def bare(door: AppleProxy, context: ssl.SSLContext | None = None) -> AsyncIterator[Bare]:
    name = None if context is None else "localhost"
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port, ssl=context, server_hostname=name)
    try:
        yield Bare(reader, writer)
    finally:
        writer.transport.abort()


async def test_client_that_offers_no_alpn_and_starts_with_the_preface_is_taken(place: Place) -> None:
    async with place.proxy() as proxy:
        context = ssl.create_default_context(cadata=IDENTITY.ca_pem.decode())
        async with bare(proxy.door, context) as client:
            client.push(1)
            event = await client.until(lambda each: isinstance(each, ResponseReceived))
            assert isinstance(event, ResponseReceived)
            assert dict(event.headers or [])[b":status"] == b"200"


async def test_without_tls_it_speaks_to_this_machine_only(place: Place) -> None:
    async with place.proxy(tls=False) as proxy:
        assert reason(await proxy.push()) == (200, None)
    with pytest.raises(ValueError, match="tls = false"):
        AppleProxySettings(tls=False, host="192.0.2.1")


async def test_port_that_is_taken_is_said(place: Place) -> None:
    async with place.proxy() as proxy:
        with pytest.raises(ConfigError, match="cannot listen"):
            await AppleProxy(
                "other",
                AppleProxySettings(port=proxy.door.port),
                relay=place.relay,
                store=place.store,
                apps=place.apps,
                keyring=place.keyring,
                callers=place.callers,
                identity=(IDENTITY.certificate_pem, IDENTITY.key_pem),
                telemetry=place.telemetry,
                clock=time.time,
            ).start()


async def test_one_connection_too_many_is_turned_away(place: Place) -> None:
    async with place.proxy(tls=False, max_connections=1) as proxy, bare(proxy.door) as first:
        first.push(1)
        await first.until(lambda each: isinstance(each, StreamEnded))
        async with bare(proxy.door) as second:
            event = await second.until(lambda each: isinstance(each, ConnectionTerminated))
            assert isinstance(event, ConnectionTerminated)
            assert event.error_code == ErrorCode.ENHANCE_YOUR_CALM
        first.push(3)
        await first.until(lambda each: isinstance(each, StreamEnded) and each.stream_id == 3)


async def test_client_that_gives_up_disturbs_nobody(place: Place) -> None:
    place.apple.misbehaves(Delay(0.2), times=2)
    async with place.proxy(tls=False) as proxy:
        async with bare(proxy.door) as gone, bare(proxy.door) as client:
            gone.push(1, ("apns-id", OWN))
            client.push(1)
            client.push(3)
            await until(lambda: place.relay._sends.in_hand == 3)
            client.h2.reset_stream(1, ErrorCode.CANCEL)
            client.writer.write(client.h2.data_to_send())
            gone.writer.transport.abort()
            await client.until(lambda each: isinstance(each, StreamEnded) and each.stream_id == 3)
            client.push(5)
            await client.until(lambda each: isinstance(each, StreamEnded) and each.stream_id == 5)
            assert not any(isinstance(each, StreamEnded) and each.stream_id == 1 for each in client.events)
        assert (await place.receipt(OWN)).state is State.ACCEPTED, "it had gone to Apple"


async def test_field_that_would_smuggle_something_ends_its_stream_only(place: Place) -> None:
    async with place.proxy(tls=False) as proxy, bare(proxy.door) as client:
        client.push(1, ("apns-collapse-id", "a\r\nb"))
        client.push(3, ("apns-collapse-id", "a\x07b"))
        client.push(5)
        await client.until(lambda each: isinstance(each, StreamEnded) and each.stream_id == 5)
        statuses = {
            each.stream_id: dict(each.headers or [])[b":status"]
            for each in client.events
            if isinstance(each, ResponseReceived)
        }
        assert statuses == {3: b"400", 5: b"200"}


class Listening:
    """A session that notes what it is told: h2 takes no answers after a GOAWAY."""

    def __init__(self, link: Link[ClientConnection]) -> None:
        self.link = link
        self.told: list[object] = []

    def on_events(self, events: Sequence[object]) -> None:
        self.told += events

    def on_writable(self) -> None: ...

    def on_close(self) -> None: ...


async def test_who_is_being_answered_when_the_server_stops_is_answered_before(place: Place) -> None:
    place.apple.misbehaves(Delay(0.3), times=1)
    async with place.proxy(tls=False) as proxy:
        link = await connect(Listening, host="127.0.0.1", port=proxy.door.port, tls=None)
        session = cast("Listening", link.session)
        await until(lambda: link.core.capacity > 0)
        shared = tuple((name.encode(), value.encode()) for name, value in OWN_FIELDS)
        template = Template(b"localhost", b"/3/device/", shared)
        link.core.submit(Requests(template, [7], [token(1).encode()], [PAYLOAD]), asyncio.get_running_loop().time())
        link.flush()
        await until(lambda: place.relay._sends.in_hand == 1)
        await proxy.door.aclose()
        kinds = [type(each) for each in session.told]
        assert kinds.index(GoAwayEvent) < kinds.index(Accepted)


async def test_payload_without_end_is_answered_before_it_ends(place: Place) -> None:
    async with place.proxy(tls=False) as proxy, bare(proxy.door) as client:
        client.h2.send_headers(1, [*BASICS, *OWN_FIELDS])
        client.h2.send_data(1, b"x" * 16_000)
        client.writer.write(client.h2.data_to_send())
        event = await client.until(lambda each: isinstance(each, ResponseReceived))
        assert isinstance(event, ResponseReceived)
        assert dict(event.headers or [])[b":status"] == b"413"


async def test_answers_are_counted(place: Place) -> None:
    async with place.proxy() as proxy, proxy.client() as client:
        for device in (token(1), token(2), "x"):
            await proxy.push(device=device, client=client)
    counted = dict(place.telemetry._proxied.items())
    assert counted == {("main", "200", ""): 2, ("main", "400", "BadDeviceToken"): 1}
