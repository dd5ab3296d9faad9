"""Apps: from files and from the API, in place while notifications are under way, and sealed at rest."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from msgspec.structs import replace
from structlog.testing import capture_logs

from heliograph import service, vault
from heliograph.apps import Directory
from heliograph.apps.building import suffixed
from heliograph.batches import new_batch_id
from heliograph.config import (
    MAX_CREDENTIALS,
    ApiSettings,
    AppContent,
    AppSettings,
    Config,
    CredentialContent,
    CredentialSettings,
    Environments,
)
from heliograph.doors import apps as apps_door
from heliograph.errors import ConfigError, StoreError
from heliograph.model import Batch, Environment, Headers, LeaseEnd, State
from heliograph.net.tls import server_context, throwaway_identity
from heliograph.service import Running, serving
from heliograph.simulator.server import Simulator, new_signing_key
from heliograph.stores.sqlite import SqliteStore
from tests.certificates import Issued, authority, push_certificate
from tests.service.house import PATIENCE_S, token

TOPIC = "com.example.shop"
VOIP = f"{TOPIC}.voip"
PRODUCTION, DEVELOPMENT = Environment
LOOK_S = 0.01


def write(path: Path, content: bytes) -> str:
    """A reference to a file that only we can read; what was there is replaced at once."""
    aside = path.with_name(f"{path.name}.new")
    aside.touch(0o600)
    aside.write_bytes(content)
    aside.replace(path)
    return f"file:{path}"


async def started(folder: Path, clock: Callable[[], float] = time.time, **apps: AppSettings) -> Directory:
    made = Directory(Config(data=str(folder / "data"), apps=apps), clock=clock)
    await made.start()
    return made


def signing(folder: Path, name: str = "key.p8", key_id: str = "ABC123DEFG") -> CredentialSettings:
    key = write(folder / name, new_signing_key().pem)
    return CredentialSettings(key=key, key_id=key_id, team_id="DEF123GHIJ")


def with_certificate(folder: Path, issued: Issued, **more: Any) -> AppSettings:
    return AppSettings(certificate=write(folder / "push.pem", issued.pem), **more)


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not reached():  # noqa: ASYNC110 - nobody rings a bell for it
            await asyncio.sleep(LOOK_S)


# -- from files ------------------------------------------------------------------------------------------------------


async def test_a_certificate_says_topic_and_environments_itself(tmp_path: Path) -> None:
    issued = push_certificate(TOPIC, (VOIP, "voip"))
    shop = AppSettings(
        certificate=write(tmp_path / "shop.p12", issued.p12(b"tea")), passphrase=write(tmp_path / "word", b"tea\n")
    )
    apps = await started(tmp_path, shop=shop)
    app = apps.apps["shop"]
    assert app.topics == (TOPIC,)
    assert app.environments == (PRODUCTION, DEVELOPMENT)
    route = apps.find_route("shop", PRODUCTION, VOIP)
    assert route is not None
    assert (route.endpoint.host, route.endpoint.port, route.key) == ("api.push.apple.com", 443, None)
    assert apps.find_route("shop", PRODUCTION, "com.example.other") is None
    assert apps.find_route("till", PRODUCTION, TOPIC) is None


@pytest.mark.parametrize(
    "topics, certified, told",
    [
        (["com.example.shop"], [], []),
        (["com.example.shop", "com.example.shop.voip"], [], ["com.example.shop.voip"]),
        (["com.example.shop.push-type.liveactivity"], [], ["com.example.shop.push-type.liveactivity"]),
        (["com.example.shop.voip"], ["com.example.shop.voip", "com.example.shop.voip.voip"], []),
        (["com.example.voip"], ["com.example.shop"], ["com.example.voip"]),
    ],
)
def test_a_topic_with_a_suffix_is_told_unless_a_certificate_has_it(
    topics: list[str], certified: list[str], told: list[str]
) -> None:
    assert suffixed(topics, certified) == told


async def test_a_certificate_and_its_key_may_be_two_files(tmp_path: Path) -> None:
    issued = push_certificate(TOPIC)
    shop = AppSettings(
        certificate=write(tmp_path / "aps.cer", issued.certificate_der),
        certificate_key=write(tmp_path / "aps.key", issued.key_pem),
    )
    assert (await started(tmp_path, shop=shop)).apps["shop"].topics == (TOPIC,)


async def test_a_connection_shows_the_certificate(tmp_path: Path) -> None:
    identity = throwaway_identity(datetime.now(UTC))
    (tmp_path / "ca.pem").write_bytes(identity.ca_pem)
    issued = push_certificate(TOPIC, environments=(PRODUCTION,))
    shop = with_certificate(tmp_path, issued, host="localhost", port=2197, ca=str(tmp_path / "ca.pem"))
    route = (await started(tmp_path, shop=shop)).find_route("shop", PRODUCTION, TOPIC)
    assert route is not None
    tls = server_context(identity.certificate_pem, identity.key_pem, client_authorities=authority().certificate_pem)
    shown = await asyncio.to_thread(shake_hands, tls, route.endpoint.tls)
    assert hashlib.sha256(shown).digest() == hashlib.sha256(issued.certificate_der).digest()


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """The certificate that the client showed."""
    ours, theirs = socket.socketpair()
    shown: list[bytes] = []

    def serve() -> None:
        with theirs, server.wrap_socket(theirs, server_side=True) as accepted:
            shown.append(accepted.getpeercert(binary_form=True) or b"")

    thread = threading.Thread(target=serve)
    thread.start()
    with ours, client.wrap_socket(ours, server_hostname="localhost") as connected:
        connected.recv(1)
    thread.join()
    return shown[0]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"environment": Environments.DEVELOPMENT}, "is for production, not for development: correct environment"),
        ({"environment": Environments.BOTH}, "is for production, not for development: correct environment"),
        ({"topic": "com.example.till"}, f"is for {TOPIC}, not for com.example.till: correct topic"),
        ({"topics": (TOPIC, "com.example.till")}, "nothing that is given opens the topic com.example.till"),
    ],
)
async def test_what_contradicts_the_certificate_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    shop = with_certificate(tmp_path, push_certificate(TOPIC, environments=(PRODUCTION,)), **change)
    with pytest.raises(ConfigError, match=f"^apps.shop.*{words}"):
        await started(tmp_path, shop=shop)


async def test_a_key_for_each_environment_and_a_certificate_for_voip(tmp_path: Path) -> None:
    voip = push_certificate((VOIP, "voip"), uid=VOIP, environments=(PRODUCTION,))
    tables = (
        CredentialSettings(certificate=write(tmp_path / "voip.p12", voip.p12())),
        replace(signing(tmp_path, "production.p8", "AAAAAAAAAA"), environment=Environments.PRODUCTION),
        replace(signing(tmp_path, "development.p8", "BBBBBBBBBB"), environment=Environments.DEVELOPMENT),
    )
    apps = await started(tmp_path, shop=AppSettings(topic=TOPIC, credentials=tables))
    used = {
        (environment, topic): apps.find_route("shop", environment, topic)
        for environment in Environment
        for topic in (TOPIC, VOIP)
    }
    assert {place: route and route.key and route.key.key_id for place, route in used.items()} == {
        (PRODUCTION, TOPIC): "AAAAAAAAAA",
        (PRODUCTION, VOIP): None,
        (DEVELOPMENT, TOPIC): "BBBBBBBBBB",
        (DEVELOPMENT, VOIP): "BBBBBBBBBB",
    }
    with pytest.raises(ConfigError, match=r"certificate .* is never used, as what stands before it opens the same"):
        await started(tmp_path, shop=AppSettings(topic=TOPIC, credentials=tables[::-1]))


async def test_apps_with_the_same_key_share_a_route(tmp_path: Path) -> None:
    one = signing(tmp_path)
    shop = AppSettings(topic=TOPIC, key=one.key, key_id=one.key_id, team_id=one.team_id)
    apps = await started(tmp_path, shop=shop, till=replace(shop, topic="com.example.till"))
    assert apps.find_route("shop", PRODUCTION, TOPIC) == apps.find_route("till", PRODUCTION, "com.example.till")


async def test_a_proxy_with_a_password_comes_from_a_file_and_is_not_shown(tmp_path: Path) -> None:
    one = signing(tmp_path)
    proxy = write(tmp_path / "proxy", b"http://me:very-secret@proxy.example.com:3128\n")
    shop = AppSettings(topic=TOPIC, key=one.key, key_id=one.key_id, team_id=one.team_id, port=2197, proxy=proxy)
    apps = await started(tmp_path, shop=shop)
    route = apps.find_route("shop", PRODUCTION, TOPIC)
    assert route is not None
    assert (route.endpoint.port, route.endpoint.proxy) == (2197, "http://me:very-secret@proxy.example.com:3128")
    shown = apps.show("shop")
    assert shown is not None
    assert shown["proxy"] == "http://proxy.example.com:3128"
    assert "very-secret" not in json.dumps(shown) + repr(route)
    write(tmp_path / "proxy", b"https://me:very-secret@proxy.example.com")
    with pytest.raises(ConfigError, match=r"^apps.shop has a proxy that is not like http://[^@]*$"):
        await started(tmp_path, shop=shop)


# -- read again ------------------------------------------------------------------------------------------------------


async def test_reading_again_changes_only_what_has_changed(tmp_path: Path) -> None:
    keys = {name: signing(tmp_path, f"{name}.p8") for name in ("shop", "till")}
    settings = {
        name: AppSettings(topic=f"com.example.{name}", key=one.key, key_id=one.key_id, team_id=one.team_id)
        for name, one in keys.items()
    }
    apps = await started(tmp_path, shop=settings["shop"], till=settings["till"])
    before = {name: apps.find_route(name, PRODUCTION, f"com.example.{name}") for name in settings}
    write(tmp_path / "till.p8", new_signing_key().pem)
    with capture_logs() as logs:
        await apps.reload()
    after = {name: apps.find_route(name, PRODUCTION, f"com.example.{name}") for name in settings}
    assert before["shop"] == after["shop"]
    assert before["till"] != after["till"]
    assert [(each["event"], each["app"]) for each in logs] == [("app_changed", "till")]


async def test_a_broken_file_keeps_the_former_credentials_and_says_so(tmp_path: Path) -> None:
    one = signing(tmp_path)
    shop = AppSettings(topic=TOPIC, key=one.key, key_id=one.key_id, team_id=one.team_id)
    apps = await started(tmp_path, shop=shop)
    before = apps.find_route("shop", PRODUCTION, TOPIC)
    write(tmp_path / "key.p8", b"half a k")
    with capture_logs() as logs:
        await apps.reload()
    assert apps.find_route("shop", PRODUCTION, TOPIC) == before
    (told,) = logs
    assert (told["event"], told["app"], told["log_level"]) == ("app_kept", "shop", "error")
    assert "The signing key is not PEM" in told["why"]
    assert "the former credentials go on" in told["hint"]


def long_ended(**more: Any) -> Issued:
    return push_certificate(TOPIC, now=datetime.now(UTC) - timedelta(days=400), **more)


async def test_a_certificate_that_has_ended_does_not_take_the_place_of_a_good_one(tmp_path: Path) -> None:
    shop = with_certificate(tmp_path, push_certificate(TOPIC))
    apps = await started(tmp_path, shop=shop)
    before = apps.find_route("shop", PRODUCTION, TOPIC)
    write(tmp_path / "push.pem", long_ended().pem)
    with capture_logs() as logs:
        await apps.reload()
    assert apps.find_route("shop", PRODUCTION, TOPIC) == before
    (told,) = logs
    assert (told["event"], told["log_level"]) == ("app_kept", "error")
    assert "ended on 20" in told["why"]
    write(tmp_path / "push.pem", push_certificate(TOPIC).pem)
    await apps.reload()
    assert apps.find_route("shop", PRODUCTION, TOPIC) != before


async def test_a_certificate_that_has_ended_takes_the_place_of_another_that_has(tmp_path: Path) -> None:
    apps = await started(tmp_path, shop=with_certificate(tmp_path, long_ended()))
    before = apps.find_route("shop", PRODUCTION, TOPIC)
    write(tmp_path / "push.pem", long_ended().pem)
    await apps.reload()
    assert apps.find_route("shop", PRODUCTION, TOPIC) != before


async def test_a_signing_key_under_a_passphrase_is_opened_with_it(tmp_path: Path) -> None:
    plain = new_signing_key().pem
    locked = load_pem_private_key(plain, None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"tea")
    )
    shop = AppSettings(topic=TOPIC, key=write(tmp_path / "key.p8", locked), key_id="ABC123DEFG", team_id="DEF123GHIJ")
    with pytest.raises(ConfigError, match=r'under a passphrase: .*, as passphrase = "file:PATH"$'):
        await started(tmp_path, shop=shop)
    apps = await started(tmp_path, shop=replace(shop, passphrase=write(tmp_path / "word", b"tea\n")))
    route = apps.find_route("shop", PRODUCTION, TOPIC)
    assert route is not None
    assert route.key is not None
    assert route.key.pem == plain


async def test_a_broken_configuration_keeps_all_apps_and_says_so(tmp_path: Path) -> None:
    one = signing(tmp_path)
    shop = AppSettings(topic=TOPIC, key=one.key, key_id=one.key_id, team_id=one.team_id)
    config = Config(data=str(tmp_path / "data"), apps={"shop": shop})

    def reread() -> Config:
        raise ConfigError("heliograph.toml is not TOML")

    apps = Directory(config, clock=time.time, reread=reread)
    await apps.start()
    with capture_logs() as logs:
        assert not await apps.reload()
    assert list(apps.apps) == ["shop"]
    assert [(each["event"], each["why"]) for each in logs] == [("configuration_kept", "heliograph.toml is not TOML")]


async def test_a_credential_that_cannot_be_named_keeps_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    one = signing(tmp_path)
    shop = AppSettings(topic=TOPIC, key=one.key, key_id=one.key_id, team_id=one.team_id)
    config = Config(data=str(tmp_path / "data"), apps={"shop": shop})
    now = {"shop": replace(shop, key="credential:shop"), "till": replace(shop, key="credential:till")}
    apps = Directory(config, clock=time.time, reread=lambda: replace(config, apps=now))
    await apps.start()
    with capture_logs() as logs:
        await apps.reload()
    assert [(each["event"], each["app"]) for each in logs] == [("app_kept", "shop"), ("app_left_out", "till")]
    assert list(apps.apps) == ["shop"]


async def test_the_view_of_apps_is_live_and_follows_the_configuration(tmp_path: Path) -> None:
    one = signing(tmp_path)
    shop = AppSettings(topic=TOPIC, key=one.key, key_id=one.key_id, team_id=one.team_id)
    config = Config(data=str(tmp_path / "data"), apps={"shop": shop})
    now = config

    apps = Directory(config, clock=time.time, reread=lambda: now)
    await apps.start()
    view = apps.apps
    now = replace(config, apps={"till": replace(shop, topic="com.example.till")})
    await apps.reload()
    assert list(view) == ["till"]
    assert apps.find_route("shop", PRODUCTION, TOPIC) is None


async def test_changed_files_are_read_once_they_have_stayed_the_same(tmp_path: Path) -> None:
    one = signing(tmp_path)
    shop = AppSettings(topic=TOPIC, key=one.key, key_id=one.key_id, team_id=one.team_id)
    apps = await started(tmp_path, shop=shop)
    before = apps.find_route("shop", PRODUCTION, TOPIC)
    await apps.look()
    write(tmp_path / "key.p8", b"")
    await apps.look()
    write(tmp_path / "key.p8", new_signing_key().pem)
    with capture_logs() as logs:
        await apps.look()
        assert apps.find_route("shop", PRODUCTION, TOPIC) == before
        await apps.look()
    assert apps.find_route("shop", PRODUCTION, TOPIC) != before
    assert [each["event"] for each in logs] == ["app_changed"]


# -- days left -------------------------------------------------------------------------------------------------------


async def test_the_end_of_a_certificate_is_told_at_each_step_and_once(tmp_path: Path) -> None:
    start = datetime.now(UTC)
    now = start.timestamp()
    shop = with_certificate(tmp_path, push_certificate(TOPIC, now=start, days=100, environments=(PRODUCTION,)))
    apps = await started(tmp_path, lambda: now, shop=shop)
    told = []
    for day in range(105):
        now = (start + timedelta(days=day, hours=1)).timestamp()
        with capture_logs() as logs:
            apps.warn()
            apps.warn()
        told += [(day, each["log_level"], each["app"], each["days_left"]) for each in logs]
    assert told == [
        (70, "warning", "shop", 29),
        (86, "warning", "shop", 13),
        (93, "warning", "shop", 6),
        (99, "warning", "shop", 0),
        (100, "error", "shop", -1),
    ]
    assert list(apps.days_left()) == [("shop", "production", "certificate", f"Apple Push Services: {TOPIC}", -5)]


async def test_an_app_whose_certificate_has_ended_starts_all_the_same(tmp_path: Path) -> None:
    ended = push_certificate(TOPIC, now=datetime.now(UTC) - timedelta(days=400))
    with capture_logs() as logs:
        apps = await started(tmp_path, shop=with_certificate(tmp_path, ended))
    assert apps.find_route("shop", PRODUCTION, TOPIC) is not None
    assert [(each["event"], each["log_level"]) for each in logs] == [("certificate_ended", "error")]
    shown = apps.show("shop")
    assert shown is not None
    assert shown["credentials"][0]["days_left"] < 0


# -- by the API ------------------------------------------------------------------------------------------------------


class Caller:
    """Speaks to the API of one server."""

    def __init__(self, session: aiohttp.ClientSession, running: Running) -> None:
        self._session = session
        self.running = running

    async def ask(self, method: str, path: str, content: Any = None) -> tuple[int, Any]:
        body = None if content is None else json.dumps(content)
        async with self._session.request(method, self.running.url + path, data=body) as response:
            text = await response.text()
            return response.status, json.loads(text) if "json" in response.content_type else text

    async def send(self, app: str, number: int = 1) -> dict[str, Any]:
        """A notification, and what became of it."""
        content = {"app": app, "token": token(number), "title": "Hello", "wait": PATIENCE_S}
        return dict((await self.ask("POST", "/v1/notifications", content))[1])


@asynccontextmanager
async def calling(config: Config, **more: Any) -> AsyncIterator[Caller]:
    async with serving(config, look_s=LOOK_S, **more) as running:
        headers = {"authorization": f"Bearer {running.key}"}
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(2 * PATIENCE_S)) as session:
            yield Caller(session, running)


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator() as apple:
        apple.add_app(TOPIC)
        yield apple


def config_of(folder: Path, apple: Simulator | None = None) -> Config:
    """With the app `shop`, where there is somebody to send to."""
    config = Config(data=str(folder / "data"), api=ApiSettings(port=0))
    if apple is None:
        return config
    (folder / "ca.pem").write_bytes(apple.ca_pem)
    shop = AppSettings(
        key=write(folder / "shop.p8", apple.signing_key.pem),
        key_id=apple.signing_key.key_id,
        team_id=apple.signing_key.team_id,
        topic=TOPIC,
        host="localhost",
        port=apple.port,
        ca=str(folder / "ca.pem"),
    )
    return replace(config, apps={"shop": shop})


def body_for(apple: Simulator, **change: Any) -> dict[str, Any]:
    key = apple.signing_key
    return {
        "topic": TOPIC,
        "key": key.pem.decode(),
        "key_id": key.key_id,
        "team_id": key.team_id,
        "host": "localhost",
        "port": apple.port,
        "ca": apple.ca_pem.decode(),
        **change,
    }


async def test_a_key_that_is_replaced_on_the_disk_is_used_for_what_comes_next(tmp_path: Path, apple: Simulator) -> None:
    config = config_of(tmp_path, apple)
    write(tmp_path / "shop.p8", new_signing_key().pem)
    async with calling(config) as caller:
        apps = caller.running.apps
        before = apps.find_route("shop", PRODUCTION, TOPIC)
        write(tmp_path / "shop.p8", apple.signing_key.pem)
        await until(lambda: apps.find_route("shop", PRODUCTION, TOPIC) != before)
        assert (await caller.send("shop"))["state"] == "accepted"


async def test_an_app_that_is_put_can_be_sent_to_and_outlives_the_server(tmp_path: Path, apple: Simulator) -> None:
    config = config_of(tmp_path)
    async with calling(config) as caller:
        status, shown = await caller.ask("PUT", "/v1/apps/till", body_for(apple))
        assert status == 201
        assert shown["name"] == "till"
        assert shown["source"] == "api"
        assert shown["topics"] == [TOPIC]
        assert shown["environments"] == ["production"]
        assert shown["credentials"][0]["name"] == apple.signing_key.key_id
        assert (await caller.send("till"))["state"] == "accepted"
        assert (await caller.ask("PUT", "/v1/apps/till", body_for(apple)))[0] == 200
    async with calling(config) as caller:
        assert (await caller.ask("GET", "/v1/apps/till"))[1] == shown
        assert (await caller.ask("GET", "/v1/apps"))[1] == {"apps": [shown]}
        assert (await caller.send("till"))["state"] == "accepted"


async def test_a_removed_app_takes_nothing_more(tmp_path: Path, apple: Simulator) -> None:
    async with calling(config_of(tmp_path)) as caller:
        await caller.ask("PUT", "/v1/apps/till", body_for(apple))
        assert await caller.ask("DELETE", "/v1/apps/till") == (200, {"removed": "till"})
        assert (await caller.send("till"))["code"] == "UnknownApp"
        for method in ("GET", "DELETE"):
            status, problem = await caller.ask(method, "/v1/apps/till")
            assert (status, problem["code"]) == (404, "UnknownApp")


async def test_a_certificate_sends_and_its_successor_takes_over(tmp_path: Path) -> None:
    first, second = (push_certificate(TOPIC, environments=(PRODUCTION,), days=days) for days in (10, 365))
    async with Simulator(client_authorities=authority().certificate_pem) as apple:
        (tmp_path / "ca.pem").write_bytes(apple.ca_pem)
        shop = with_certificate(tmp_path, first, host="localhost", port=apple.port, ca=str(tmp_path / "ca.pem"))
        async with calling(replace(config_of(tmp_path), apps={"shop": shop})) as caller:
            assert (await caller.send("shop"))["state"] == "accepted"
            write(tmp_path / "push.pem", second.pem)
            apps = caller.running.apps
            await until(lambda: all(days > 300 for *_, days in apps.days_left()))
            assert (await caller.send("shop", 2))["state"] == "accepted"
        assert apple.connections == 2


async def test_a_certificate_may_be_put_as_base64_or_pem(tmp_path: Path) -> None:
    issued = push_certificate(TOPIC, environments=(PRODUCTION,))
    async with calling(config_of(tmp_path)) as caller:
        p12 = {"certificate": b64encode(issued.p12(b"tea")).decode(), "passphrase": "tea"}
        pem = {"certificate": issued.certificate_pem.decode(), "certificate_key": issued.key_pem.decode()}
        for name, body in (("shop", p12), ("till", pem)):
            status, shown = await caller.ask("PUT", f"/v1/apps/{name}", body)
            assert (status, shown["topics"]) == (201, [TOPIC])
            assert shown["credentials"][0]["days_left"] == 364
        metrics = (await caller.ask("GET", "/metrics"))[1]
        assert (
            'heliograph_credentials_days_left{app="shop",environment="production",kind="certificate",'
            f'name="Apple Push Services: {TOPIC}"}} 364.0' in metrics
        )


async def test_a_certificate_that_has_ended_is_not_taken(tmp_path: Path) -> None:
    async with calling(config_of(tmp_path)) as caller:
        body = {"certificate": long_ended().pem.decode()}
        status, problem = await caller.ask("PUT", "/v1/apps/shop", body)
        assert (status, problem["code"]) == (400, "BadApp")
        assert "ended on 20" in problem["detail"]
        assert (await caller.ask("GET", "/v1/apps"))[1] == {"apps": []}


def contents(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.iterdir())


async def test_no_answer_and_no_file_shows_a_secret(tmp_path: Path, apple: Simulator) -> None:
    config = config_of(tmp_path)
    password, secret = "very-secret-word", apple.signing_key.pem.splitlines()[1]
    async with calling(config) as caller:
        put = await caller.ask("PUT", "/v1/apps/till", body_for(apple, proxy=f"http://me:{password}@localhost:1"))
        said = json.dumps([put, await caller.ask("GET", "/v1/apps"), await caller.ask("GET", "/v1/apps/till")])
        kept = contents(Path(config.data))
    for word in (secret, b64encode(secret), password.encode()):
        assert word not in kept
    assert secret.decode() not in said
    assert password not in said
    assert "http://localhost:1" in said


async def test_a_long_name_of_no_app_is_not_repeated_whole(tmp_path: Path) -> None:
    async with calling(config_of(tmp_path)) as caller:
        status, problem = await caller.ask("GET", f"/v1/apps/{'x' * 4000}")
        assert (status, problem["code"]) == (404, "UnknownApp")
        assert len(problem["detail"]) < 200


async def test_an_app_of_the_configuration_is_shown_and_cannot_be_changed(tmp_path: Path, apple: Simulator) -> None:
    async with calling(config_of(tmp_path, apple)) as caller:
        assert (await caller.ask("GET", "/v1/apps/shop"))[1]["source"] == "configuration"
        for method, body in (("PUT", body_for(apple)), ("DELETE", None)):
            status, problem = await caller.ask(method, "/v1/apps/shop", body)
            assert (status, problem["code"]) == (409, "ConfiguredApp")
            assert "change it there" in problem["detail"]


@pytest.mark.parametrize(
    "change, code, words",
    [
        ({"key": None}, "BadApp", "The app has no credentials: add key"),
        ({"team_id": None}, "BadApp", "The app has a key but no team_id"),
        ({"topic": None}, "BadApp", "The app needs either topic"),
        ({"topics": ["a"]}, "BadApp", "The app has both topic and topics"),
        ({"key_id": "short"}, "BadApp", "The key id must be 10 capital letters"),
        ({"key": "file:/etc/passwd"}, "BadApp", "The signing key is not PEM"),
        ({"certificate": "%"}, "BadApp", "has both a key and a certificate"),
        ({"key": None, "key_id": None, "team_id": None, "certificate": "%"}, "BadApp", "PEM text, or a file as base64"),
        ({"host": None, "ca": None, "port": 80}, "BadApp", "Apple listens on 443 and 2197"),
        ({"ca": "x"}, "BadApp", "The authority to trust is not PEM"),
        ({"proxy": "file:/etc/passwd"}, "BadApp", "not like http://proxy.example.com:3128"),
        ({"port": "443"}, "BadType", "port: expected"),
        ({"environment": "sandbox"}, "BadEnvironment", "development, both. Apple's sandbox is called development"),
        ({"teamid": "x"}, "UnknownField", "Did you mean team_id?"),
        ({"x" * 400_000: "x"}, "UnknownField", "x...' here. Known here are key, "),
        ({" - at `$x" * 10_000: "x"}, "UnknownField", "There is no field ' - at `$x"),
        ({"credentials": [{"topic": "x"}]}, "UnknownField", "There is no field 'topic' here."),
        ({"credentials": [{"key": 1}]}, "BadType", "credentials[0].key: expected str"),
        ({"topic": "com.example shop"}, "BadApp", "The app has a topic that is not 1 to 255 printable ASCII"),
        ({"topic": ""}, "BadApp", "The app has a topic that is not 1 to 255 printable ASCII"),
        ({"port": 0}, "BadApp", "The app has port 0"),
        ({"host": ""}, "BadApp", "neither a name nor an address: write it alone"),
        ({"host": "https://x/"}, "BadApp", "neither a name nor an address: write it alone"),
        ({"host": "apple.example:443"}, "BadApp", "a port goes into port"),
        ({"host": "x\r\nProxy-Authorization: Basic x"}, "BadApp", "neither a name nor an address: write it alone"),
    ],
)
async def test_an_app_that_cannot_be_is_refused_with_what_to_change(
    tmp_path: Path, apple: Simulator, change: dict[str, Any], code: str, words: str
) -> None:
    body = body_for(apple, **change)
    async with calling(config_of(tmp_path)) as caller:
        status, problem = await caller.ask("PUT", "/v1/apps/till", body)
        assert (status, problem["code"]) == (400, code)
        assert words in problem["detail"]
        assert problem["detail"][-1] in ".?"
        assert len(problem["detail"]) < 400
        assert apple.signing_key.pem.decode().splitlines()[1] not in problem["detail"]
        assert (await caller.ask("GET", "/v1/apps"))[1] == {"apps": []}


def test_what_an_app_is_made_of_is_not_shown() -> None:
    made = {"key": "very-secret", "key_id": "ABC123DEFG", "proxy": "http://me:very-secret@proxy.example.com:1"}
    body = apps_door._parse(
        json.dumps({**made, "credentials": [{"passphrase": "very-secret"}]}).encode(), apps_door.NewApp
    )
    assert body.credentials is not None
    for each in (body, *body.credentials):
        assert "very-secret" not in repr(each)


async def test_a_body_that_is_no_app_is_refused(tmp_path: Path, apple: Simulator) -> None:
    async with calling(config_of(tmp_path)) as caller:
        assert (await caller.ask("PUT", "/v1/apps/till", body_for(apple, ca="x" * 600_000)))[0] == 413
        status, problem = await caller.ask("PUT", "/v1/apps/a%20b", body_for(apple))
        assert status == 400
        assert "name must be letters" in problem["detail"]


async def test_the_api_cannot_take_the_name_of_a_configured_app_that_cannot_be_used(
    tmp_path: Path, apple: Simulator
) -> None:
    broken = config_of(tmp_path, apple)
    write(tmp_path / "shop.p8", b"half a k")
    async with calling(config_of(tmp_path), reread=lambda: broken) as caller:
        with capture_logs() as logs:
            await caller.running.apps.reload()
        assert "app_left_out" in [each["event"] for each in logs]
        for method, body in (("PUT", body_for(apple)), ("DELETE", None)):
            status, problem = await caller.ask(method, "/v1/apps/shop", body)
            assert (status, problem["code"]) == (409, "ConfiguredApp")


# -- credentials one by one ------------------------------------------------------------------------------------------


def key_for(apple: Simulator, **change: Any) -> dict[str, Any]:
    key = apple.signing_key
    return {"key": key.pem.decode(), "key_id": key.key_id, "team_id": key.team_id, **change}


def new_key(key_id: str, **change: Any) -> dict[str, Any]:
    return {"key": new_signing_key().pem.decode(), "key_id": key_id, "team_id": "DEF123GHIJ", **change}


def ids(shown: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [(each["id"], each["environments"]) for each in shown["credentials"]]


CREDENTIALS = "/v1/apps/till/credentials"
OLD, NEW = "OLDKEYOLDK", "NEWKEYNEWK"


async def test_credentials_that_are_added_are_used_at_once_and_outlive_the_server(
    tmp_path: Path, apple: Simulator
) -> None:
    config = config_of(tmp_path)
    notification = {"app": "till", "token": token(1), "title": "x", "environment": "development", "wait": PATIENCE_S}
    async with calling(config) as caller:
        await caller.ask("PUT", "/v1/apps/till", body_for(apple, **new_key(OLD)))
        assert (await caller.ask("POST", "/v1/notifications", notification))[1]["code"] == "UnknownEnvironment"
        status, shown = await caller.ask("POST", CREDENTIALS, key_for(apple, environment="development"))
        assert (status, shown["environments"]) == (201, ["production", "development"])
        assert ids(shown) == [(OLD, ["production"]), (apple.signing_key.key_id, ["development"])]
        assert (await caller.ask("POST", "/v1/notifications", notification))[1]["state"] == "accepted"
    secret = apple.signing_key.pem.splitlines()[1]
    assert secret.decode() not in json.dumps(shown)
    assert secret not in contents(Path(config.data))
    async with calling(config) as caller:
        assert (await caller.ask("GET", "/v1/apps/till"))[1] == shown
        assert (await caller.ask("POST", "/v1/notifications", notification))[1]["state"] == "accepted"


async def test_credentials_that_are_removed_are_used_no_more(tmp_path: Path, apple: Simulator) -> None:
    config = config_of(tmp_path)
    async with calling(config) as caller:
        tables = [new_key(OLD, environment="development"), key_for(apple)]
        target = {name: body_for(apple)[name] for name in ("topic", "host", "port", "ca")}
        status, _ = await caller.ask("PUT", "/v1/apps/till", {**target, "credentials": tables})
        assert status == 201
        assert await caller.ask("DELETE", f"{CREDENTIALS}/{OLD}") == (200, {"removed": OLD})
        status, problem = await caller.ask("DELETE", f"{CREDENTIALS}/{OLD}")
        assert (status, problem["code"]) == (404, "UnknownCredential")
        assert f"Known ids: {apple.signing_key.key_id}." in problem["detail"]
        assert caller.running.apps.find_route("till", DEVELOPMENT, TOPIC) is None
    async with calling(config) as caller:
        assert ids((await caller.ask("GET", "/v1/apps/till"))[1]) == [(apple.signing_key.key_id, ["production"])]


async def test_the_same_key_or_certificate_is_replaced_where_it_stands(tmp_path: Path) -> None:
    issued = push_certificate(TOPIC, environments=(DEVELOPMENT,))
    pem = {"certificate": issued.pem.decode()}
    async with calling(config_of(tmp_path)) as caller:
        await caller.ask("PUT", "/v1/apps/till", {"topic": TOPIC, **new_key(OLD)})
        added = [await caller.ask("POST", CREDENTIALS, pem) for _ in range(2)]
        assert added[0] == added[1]
        its = hashlib.sha256(issued.certificate_der).hexdigest()[:16]
        assert ids(added[0][1]) == [(OLD, ["production"]), (its, ["development"])]
        before = caller.running.apps.find_route("till", PRODUCTION, TOPIC)
        status, shown = await caller.ask("POST", CREDENTIALS, new_key(OLD))
        assert (status, ids(shown)) == (201, ids(added[0][1]))
        assert caller.running.apps.find_route("till", PRODUCTION, TOPIC) != before


async def test_the_same_key_for_each_environment_comes_and_goes_as_one(tmp_path: Path) -> None:
    async with calling(config_of(tmp_path)) as caller:
        tables = [new_key(OLD, environment=each) for each in ("production", "development")]
        shown = (await caller.ask("PUT", "/v1/apps/till", {"topic": TOPIC, "credentials": tables}))[1]
        assert ids(shown) == [(OLD, ["production"]), (OLD, ["development"])]
        status, problem = await caller.ask("DELETE", f"{CREDENTIALS}/{OLD}")
        assert (status, problem["code"]) == (409, "CredentialNeeded")
        status, shown = await caller.ask("POST", CREDENTIALS, new_key(OLD, environment="both"))
        assert (status, ids(shown)) == (201, [(OLD, ["production", "development"])])


async def test_a_new_key_takes_the_place_of_an_old_one_and_may_be_sent_twice(tmp_path: Path, apple: Simulator) -> None:
    async with calling(config_of(tmp_path)) as caller:
        await caller.ask("PUT", "/v1/apps/till", body_for(apple, **new_key(OLD)))
        await caller.ask("POST", CREDENTIALS, new_key("THIRDTHIRD", environment="development"))
        body = key_for(apple, key_id=apple.signing_key.key_id)
        status, problem = await caller.ask("POST", CREDENTIALS, body)
        assert (status, problem["code"]) == (400, "BadApp")
        assert f"as {OLD} stands before it and opens the same: have it replace {OLD}" in problem["detail"]
        for _ in range(2):
            status, shown = await caller.ask("POST", f"{CREDENTIALS}?replace={OLD}", body)
            assert status == 201
            assert [each for each, _ in ids(shown)] == [apple.signing_key.key_id, "THIRDTHIRD"]
        sent = {"app": "till", "token": token(1), "title": "x", "environment": "production", "wait": PATIENCE_S}
        assert (await caller.ask("POST", "/v1/notifications", sent))[1]["state"] == "accepted"
        status, problem = await caller.ask("POST", f"{CREDENTIALS}?replace={OLD}", new_key(NEW, environment="both"))
        assert (status, problem["code"]) == (404, "UnknownCredential")
        assert "Known ids: " in problem["detail"]
        status, problem = await caller.ask("POST", f"{CREDENTIALS}?instead={OLD}", body)
        assert (status, problem["code"]) == (400, "UnknownParameter")


async def test_an_ended_certificate_stays_in_nobodys_way_and_is_replaced(tmp_path: Path) -> None:
    start = datetime.now(UTC)
    now = start.timestamp()
    store = await SqliteStore.open(tmp_path / "heliograph.db")
    apps = Directory(Config(data=str(tmp_path / "data")), clock=lambda: now)
    await apps.open(store)
    first, second = (push_certificate(TOPIC, days=days, environments=(PRODUCTION,)) for days in (10, 365))
    await apps.put("till", AppContent(credentials=(CredentialContent(certificate=first.pem),)))
    now = (start + timedelta(days=20)).timestamp()
    key = new_key(OLD)
    content = CredentialContent(
        key=key["key"].encode(), key_id=OLD, team_id=key["team_id"], environment=Environments.DEVELOPMENT
    )
    assert await apps.add_credentials("till", content) == OLD
    with pytest.raises(ConfigError, match=r"ended on 20.*: make a new one"):
        await apps.add_credentials("till", CredentialContent(certificate=first.pem))
    old, new = (each.loaded().fingerprint[:16] for each in (first, second))
    assert await apps.add_credentials("till", CredentialContent(certificate=second.pem), old) == new
    assert [each["id"] for each in (apps.show("till") or {})["credentials"]] == [new, OLD]
    await store.aclose()


async def test_an_app_keeps_the_credentials_that_it_needs(tmp_path: Path) -> None:
    issued = push_certificate(TOPIC, environments=(DEVELOPMENT,))
    its = issued.loaded().fingerprint[:16]
    async with calling(config_of(tmp_path)) as caller:
        await caller.ask("PUT", "/v1/apps/till", {"certificate": issued.pem.decode()})

        async def refused(gone: str) -> str:
            status, problem = await caller.ask("DELETE", f"{CREDENTIALS}/{gone}")
            assert (status, problem["code"]) == (409, "CredentialNeeded")
            return str(problem["detail"])

        assert await refused(its) == f"{its} is all that the app 'till' has: remove the app, or add others first."
        assert (await caller.ask("POST", CREDENTIALS, new_key(OLD)))[0] == 201
        # The certificate alone says which topics the app has.
        assert "nothing says which topics the app has" in await refused(its)
        till = push_certificate("com.example.till", environments=(PRODUCTION,))
        tables = [{"certificate": each.pem.decode()} for each in (issued, till)]
        both = {"topics": [TOPIC, "com.example.till"], "credentials": tables}
        assert (await caller.ask("PUT", "/v1/apps/till", both))[0] == 200
        assert "opens the topic com.example.till" in await refused(till.loaded().fingerprint[:16])
        assert (await caller.ask("GET", "/v1/apps/till"))[1]["topics"] == [TOPIC, "com.example.till"]


async def test_credentials_of_a_configured_app_or_of_none_cannot_be_changed(tmp_path: Path, apple: Simulator) -> None:
    async with calling(config_of(tmp_path, apple)) as caller:
        for name, answer in (("shop", (409, "ConfiguredApp")), ("till", (404, "UnknownApp"))):
            path = f"/v1/apps/{name}/credentials"
            for method, rest, body in (("POST", "", new_key(NEW)), ("DELETE", f"/{apple.signing_key.key_id}", None)):
                status, problem = await caller.ask(method, path + rest, body)
                assert (status, problem["code"]) == answer
        for path in ("/v1/apps//credentials", "/v1/apps/shop/credentials/", "/v1/apps/shop/keys", "/v1/apps/x/y/z/a"):
            assert (await caller.ask("DELETE", path))[1]["code"] == "NotFound"
        assert (await caller.ask("GET", "/v1/apps/shop/credentials"))[1]["code"] == "MethodNotAllowed"


@pytest.mark.parametrize(
    "body, code, words",
    [
        ({}, "BadApp", "What was sent has no credentials: add key"),
        (new_key(NEW, team_id=None), "BadApp", "What was sent has a key but no team_id"),
        (new_key(NEW, certificate="x"), "BadApp", "What was sent has both a key and a certificate"),
        (new_key(NEW, key="very-secret"), "BadApp", "The signing key is not PEM"),
        (new_key("short"), "BadApp", "The key id must be 10 capital letters"),
        ({"certificate": "%"}, "BadApp", "PEM text, or a file as base64"),
        (new_key(NEW, environment="test"), "BadEnvironment", "must be one of production, development, both."),
        (new_key(NEW, topic=TOPIC), "UnknownField", "There is no field 'topic' here."),
        (new_key(NEW, teamid="x"), "UnknownField", "Did you mean team_id?"),
        ([], "BadType", "The body: expected object"),
        ({"certificate": push_certificate("com.example.till").pem.decode()}, "BadApp", "not for com.example.shop"),
    ],
)
async def test_credentials_that_cannot_be_are_refused_with_what_to_change(
    tmp_path: Path, body: Any, code: str, words: str
) -> None:
    async with calling(config_of(tmp_path)) as caller:
        shown = (await caller.ask("PUT", "/v1/apps/till", {"topic": TOPIC, **new_key(OLD)}))[1]
        status, problem = await caller.ask("POST", CREDENTIALS, body)
        assert (status, problem["code"]) == (400, code)
        assert words in problem["detail"]
        assert problem["detail"][-1] in ".?"
        assert "very-secret" not in json.dumps(problem)
        assert (await caller.ask("GET", "/v1/apps/till"))[1] == shown


async def test_changes_of_one_app_at_the_same_moment_all_count(tmp_path: Path) -> None:
    topics = [f"com.example.a{number}" for number in range(MAX_CREDENTIALS + 3)]
    issued = [push_certificate(topic, environments=(PRODUCTION,)) for topic in topics]
    bodies = [{"certificate": each.pem.decode()} for each in issued]
    async with calling(config_of(tmp_path)) as caller:
        await caller.ask("PUT", "/v1/apps/till", bodies[0])
        answers = await asyncio.gather(*(caller.ask("POST", CREDENTIALS, body) for body in bodies[1:]))
        refused = [body["detail"] for status, body in answers if status != 201]
        assert refused == [f"The app has {MAX_CREDENTIALS} credentials, which are enough: remove some first."] * 3
        shown = (await caller.ask("GET", "/v1/apps/till"))[1]
        there = [each["id"] for each in shown["credentials"]]
        assert len(set(there)) == len(shown["topics"]) == MAX_CREDENTIALS
        done = await asyncio.gather(*(caller.ask("DELETE", f"{CREDENTIALS}/{each}") for each in there))
        # Whoever is last finds the app's last credentials.
        assert sorted(status for status, _ in done) == [200] * (MAX_CREDENTIALS - 1) + [409]
        assert len((await caller.ask("GET", "/v1/apps/till"))[1]["credentials"]) == 1


# -- the master key --------------------------------------------------------------------------------------------------


async def test_a_new_master_key_seals_anew_while_the_server_runs(tmp_path: Path, apple: Simulator) -> None:
    config = config_of(tmp_path)
    path = Path(config.data) / "master-key"
    async with calling(config) as caller:
        await caller.ask("PUT", "/v1/apps/till", body_for(apple))
        with capture_logs() as logs:
            vault.rotate(path)
            await until(lambda: any(each["event"] == "sealed_anew" for each in logs))
    path.write_text(path.read_text().splitlines()[0])
    async with calling(config) as caller:
        assert (await caller.send("till"))["state"] == "accepted"


async def test_a_master_key_that_is_lost_is_told_and_none_is_made_in_its_place(
    tmp_path: Path, apple: Simulator
) -> None:
    config = config_of(tmp_path)
    path = Path(config.data) / "master-key"
    async with calling(config) as caller:
        await caller.ask("PUT", "/v1/apps/till", body_for(apple))
        kept = path.read_bytes()
        with capture_logs() as logs:
            path.unlink()
            await until(lambda: any(each["event"] == "master_key_kept" for each in logs))
        await caller.ask("PUT", "/v1/apps/shop", body_for(apple))
        assert not is_there(path)
        write(path, kept)
    async with calling(config) as caller:
        assert (await caller.send("till"))["state"] == (await caller.send("shop"))["state"] == "accepted"


def is_there(path: Path) -> bool:
    return path.exists()


async def test_a_new_master_key_seals_anew_at_the_next_start(tmp_path: Path, apple: Simulator) -> None:
    config = config_of(tmp_path)
    path = Path(config.data) / "master-key"
    async with calling(config) as caller:
        await caller.ask("PUT", "/v1/apps/till", body_for(apple))
    vault.rotate(path)
    async with calling(config):
        pass
    path.write_text(path.read_text().splitlines()[0])
    async with calling(config) as caller:
        assert (await caller.send("till"))["state"] == "accepted"


async def test_an_app_of_the_configuration_hides_a_stored_one_of_its_name(tmp_path: Path, apple: Simulator) -> None:
    async with calling(config_of(tmp_path)) as caller:
        await caller.ask("PUT", "/v1/apps/shop", body_for(apple, key_id="OTHERKEYID"))
    configured = config_of(tmp_path, apple)
    with capture_logs() as logs:
        async with calling(configured, reread=lambda: config_of(tmp_path)) as caller:
            assert [each["app"] for each in logs if each["event"] == "app_hidden"] == ["shop"]
            assert (await caller.ask("GET", "/v1/apps/shop"))[1]["source"] == "configuration"
            assert (await caller.send("shop"))["state"] == "accepted"
            await caller.running.apps.reload()
            shown = (await caller.ask("GET", "/v1/apps/shop"))[1]
    assert (shown["source"], shown["credentials"][0]["name"]) == ("api", "OTHERKEYID")


async def test_a_file_whose_mode_was_put_right_is_read(tmp_path: Path) -> None:
    one = signing(tmp_path)
    shop = AppSettings(topic=TOPIC, key=one.key, key_id=one.key_id, team_id=one.team_id)
    apps = await started(tmp_path, shop=shop)
    before = apps.find_route("shop", PRODUCTION, TOPIC)
    write(tmp_path / "key.p8", new_signing_key().pem)
    change_mode(tmp_path / "key.p8", 0o644)
    with capture_logs() as logs:
        await apps.look()
        await apps.look()
        assert apps.find_route("shop", PRODUCTION, TOPIC) == before
        change_mode(tmp_path / "key.p8", 0o600)
        await apps.look()
        await apps.look()
    assert apps.find_route("shop", PRODUCTION, TOPIC) != before
    assert [each["event"] for each in logs] == ["app_kept", "app_changed"]


def change_mode(path: Path, mode: int) -> None:
    path.chmod(mode)


async def test_a_server_does_not_start_without_the_master_key_of_its_apps(tmp_path: Path, apple: Simulator) -> None:
    config = config_of(tmp_path)
    path = Path(config.data) / "master-key"
    async with calling(config) as caller:
        await caller.ask("PUT", "/v1/apps/till", body_for(apple))
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(ConfigError, match=r"master-key is gone, and the store has apps .*\(till\): put it back"):
        async with serving(config):
            pass
    vault.load_or_make(path)
    with pytest.raises(StoreError, match="sealed with a master key that is not here"):
        async with serving(config):
            pass
    path.write_bytes(kept)
    async with calling(config) as caller:
        assert (await caller.send("till"))["state"] == "accepted"


# -- retention -------------------------------------------------------------------------------------------------------


async def test_receipts_are_forgotten_after_as_many_days_as_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_FIRST_PURGE_S", 0.0)
    now = time.time()
    store = await SqliteStore.open(tmp_path / "heliograph.db")
    batches = [
        Batch(new_batch_id(at, bytes(8)), "shop", PRODUCTION, at, (Headers(TOPIC),), (b"00",), (b"{}",))
        for at in (now - 3 * 86400, now - 86400)
    ]
    await store.put(batches)
    leases = await store.take(2)
    await store.finish([LeaseEnd(lease.batch.id, lease.attempt) for lease in leases])
    ids = [f"{each.id}0001" for each in batches]
    purging = asyncio.create_task(service._purge(store, 2))
    async with asyncio.timeout(PATIENCE_S):
        while (await store.find_receipts(ids))[0] is not None:  # noqa: ASYNC110 - as above
            await asyncio.sleep(LOOK_S)
    purging.cancel()
    await asyncio.wait([purging])
    kept = (await store.find_receipts(ids))[1]
    assert kept is not None
    assert kept.state is State.QUEUED
    await store.aclose()
