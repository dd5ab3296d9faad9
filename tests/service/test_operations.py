"""What operators look at: /healthz and /livez, the metrics of a server at work, and what it logs of itself."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from heliograph.batches import make_batches, new_batch_id
from heliograph.commands.findings import _is_ours
from heliograph.config import AppSettings, Config
from heliograph.doors.operations import RECENT_S, Operations, Seen, Status, judge
from heliograph.errors import StoreError
from heliograph.keys import Caller
from heliograph.model import (
    Access,
    App,
    ClientCertificate,
    Depth,
    Environment,
    Headers,
    LaneView,
    PushType,
    Scope,
    SigningKey,
    State,
)
from heliograph.service import Running, serving
from heliograph.simulator.faults import Answer, Delay, GoAway
from heliograph.simulator.server import Simulator, new_signing_key
from heliograph.stores.sqlite import SqliteStore
from heliograph.telemetry import Standing, Telemetry
from tests.service.house import APP, HEADERS, PATIENCE_S, PAYLOAD, TOPIC, House, open_house, token
from tests.service.test_api import settings_for, unused_port

PRODUCTION, DEVELOPMENT = Environment
NOW = 1_800_000_000.0
KEY = SigningKey("ABC123DEFG", "DEF123GHIJ", b"")
OF_ALL = Caller("", frozenset(Scope), None)

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "heliograph"
PAGE = (ROOT / "docs" / "operations.md").read_text()
EVENTS = re.compile(r'(?:_log|log)\.(?:debug|info|warning|error|exception)\(\s*"([^"]+)"|_alarm\(\s*"([^"]+)"')


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator(keep=20_000) as apple:
        apple.add_app(TOPIC)
        yield apple


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not reached():  # noqa: ASYNC110 - nobody rings a bell for it
            await asyncio.sleep(0.01)


# -- how it is judged ------------------------------------------------------------------------------------------------


def app(name: str = "shop", *environments: Environment) -> App:
    return App(name, (TOPIC,), (Access(KEY, environments or (PRODUCTION,)),))


def view(name: str = "shop", **more: Any) -> LaneView:
    known: dict[str, Any] = {
        "environment": PRODUCTION,
        "host": "api.push.apple.com",
        "credentials": "signing key ABC123DEFG of team DEF123GHIJ",
        "connections": 1,
        "in_flight": 0,
        "waiting": 0,
        "answered_at": NOW - 1,
    }
    return LaneView(name, **{**known, **more})


def cut_off(name: str = "shop", **more: Any) -> LaneView:
    known: dict[str, Any] = {
        "connections": 0,
        "answered_at": None,
        "trouble": "cannot connect to api.push.apple.com:443: refused",
        "advice": "see to it",
        "since": NOW - 30,
        "failed_at": NOW - 3,
    }
    return view(name, **{**known, **more})


def seen(*lanes: LaneView, apps: tuple[App, ...] = (app(),), **more: Any) -> Seen:
    return Seen(
        **{"now": NOW, "apps": {each.name: each for each in apps}, "lanes": lanes, "depths": (), "room": 9, **more}
    )


def certificate(ends_at: float) -> ClientCertificate:
    return ClientCertificate(
        "Apple Push Services: com.example.app", b"", b"", (TOPIC,), (PRODUCTION,), 0, int(ends_at), "00"
    )


def test_a_server_that_has_sent_nothing_yet_is_well() -> None:
    health = judge(seen())
    assert (health.status, health.good, health.idle, health.failing) == (Status.OK, 0, 1, 0)
    assert health.reasons == []


def test_a_server_to_which_apple_answers_is_well() -> None:
    health = judge(seen(view()))
    assert (health.status, health.good, health.idle, health.failing) == (Status.OK, 1, 0, 0)


def test_apple_out_of_reach_for_all_that_was_tried_is_failing_though_others_are_idle() -> None:
    health = judge(seen(cut_off(), apps=(app(), app("till"), app("desk"))))
    assert (health.status, health.good, health.idle, health.failing) == (Status.FAILING, 0, 2, 1)
    (reason,) = health.reasons
    assert (reason.about, reason.app, reason.environment) == ("app", "shop", "production")
    assert reason.problem == "cannot connect to api.push.apple.com:443: refused"
    assert reason.advice == "see to it"
    assert reason.since == "2027-01-15T07:59:30Z"


def test_one_of_many_out_of_reach_is_degraded() -> None:
    health = judge(seen(cut_off(), view("till"), apps=(app(), app("till"))))
    assert (health.status, health.good, health.failing) == (Status.DEGRADED, 1, 1)


def test_one_of_two_environments_out_of_reach_is_degraded() -> None:
    lanes = cut_off(environment=DEVELOPMENT), view()
    assert judge(seen(*lanes, apps=(app("shop", PRODUCTION, DEVELOPMENT),))).status is Status.DEGRADED


def test_credentials_that_apple_refuses_say_nothing_of_other_apps() -> None:
    refused = cut_off(own=True, trouble="Apple refuses the credentials: InvalidProviderToken")
    assert judge(seen(refused, apps=(app(), app("till")))).status is Status.DEGRADED
    health = judge(seen(refused))
    assert health.status is Status.FAILING
    assert "signing key ABC123DEFG" in health.reasons[0].problem


def test_trouble_of_long_ago_is_forgotten_unless_something_waits() -> None:
    long_ago = cut_off(failed_at=NOW - RECENT_S - 1)
    assert judge(seen(long_ago)).status is Status.OK
    assert judge(seen(replace(long_ago, waiting=1))).status is Status.FAILING
    waits = Depth("shop", PRODUCTION, waiting=7, leased=0, oldest_due_s=0.0)
    health = judge(seen(long_ago, depths=(waits,)))
    assert (health.status, health.reasons[0].waiting) == (Status.FAILING, 7)


def test_an_app_with_one_good_way_of_two_is_good_and_its_bad_one_is_told() -> None:
    health = judge(seen(view(), cut_off(host="other.example.com")))
    assert (health.status, health.good, health.failing, len(health.reasons)) == (Status.DEGRADED, 1, 0, 1)


def test_an_ended_certificate_fails_its_app_and_not_the_others() -> None:
    ended = App("shop", (TOPIC,), (Access(certificate(NOW - 86400), (PRODUCTION,)),))
    health = judge(seen(apps=(ended, app("till"))))
    assert (health.status, health.idle, health.failing) == (Status.DEGRADED, 1, 1)
    assert "has ended" in health.reasons[0].problem
    assert judge(seen(apps=(ended,))).status is Status.FAILING
    assert (
        judge(seen(apps=(App("shop", (TOPIC,), (Access(certificate(NOW + 9), (PRODUCTION,)),)),))).status is Status.OK
    )


def test_an_ended_certificate_that_apple_hangs_up_on_is_not_taken_for_the_network() -> None:
    ended = App("shop", (TOPIC,), (Access(certificate(NOW - 86400), (PRODUCTION,)),))
    health = judge(seen(cut_off(), apps=(ended, app("till"))))
    assert (health.status, health.idle, health.failing, len(health.reasons)) == (Status.DEGRADED, 1, 1, 2)
    both = App("shop", (TOPIC,), (Access(certificate(NOW - 9), (PRODUCTION,)), Access(KEY, (PRODUCTION,))))
    assert judge(seen(cut_off(), apps=(both, app("till")))).status is Status.FAILING


def test_an_ended_certificate_beside_a_good_one_is_degraded() -> None:
    both = App("shop", (TOPIC,), (Access(certificate(NOW - 9), (PRODUCTION,)), Access(KEY, (PRODUCTION,))))
    assert judge(seen(apps=(both,))).status is Status.DEGRADED


def test_what_waits_for_an_app_that_is_gone_is_told() -> None:
    waits = Depth("gone", PRODUCTION, waiting=7, leased=0, oldest_due_s=0.0)
    health = judge(seen(depths=(waits, Depth("past", PRODUCTION, waiting=0, leased=0, oldest_due_s=0.0))))
    (reason,) = health.reasons
    assert (health.status, reason.app, reason.waiting) == (Status.DEGRADED, "gone", 7)


def test_without_apps_a_server_is_degraded_so_that_one_can_still_be_added() -> None:
    assert judge(seen(apps=())).status is Status.DEGRADED


@pytest.mark.parametrize(
    "more", [{"room": 0}, {"store_trouble": ("x.db: disk I/O error.", NOW - 5)}, {"stopping": True}]
)
def test_a_server_that_takes_nothing_is_failing_however_well_apple_is(more: dict[str, Any]) -> None:
    health = judge(seen(view(), **more))
    assert (health.status, len(health.reasons)) == (Status.FAILING, 1)


# -- /healthz --------------------------------------------------------------------------------------------------------


class Asking:
    """Speaks to a server, with its key or without."""

    def __init__(self, session: aiohttp.ClientSession, running: Running) -> None:
        self._session = session
        self._running = running
        self._with_key = {"authorization": f"Bearer {running.key}"}

    async def health(self, *, key: bool = False, path: str = "/healthz") -> tuple[int, dict[str, Any]]:
        headers = self._with_key if key else {}
        async with self._session.get(self._running.url + path, headers=headers) as response:
            found: dict[str, Any] = await response.json()
            return response.status, found

    async def until(self, reached: Callable[[dict[str, Any]], bool]) -> tuple[int, dict[str, Any]]:
        """The first answer, with details, that is so."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = await self.health(key=True)
                if reached(found[1]):
                    return found
                await asyncio.sleep(0.05)

    async def post(self, content: Any) -> int:
        url = f"{self._running.url}/v1/notifications"
        async with self._session.post(url, json=content, headers=self._with_key) as response:
            await response.read()
            return response.status

    async def page(self) -> str:
        async with self._session.get(f"{self._running.url}/metrics") as response:
            assert response.status == 200
            return await response.text()

    async def metrics(self) -> dict[str, float]:
        return read(await self.page())


def read(page: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(page):
        for each in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(each.labels.items()))
            found[f"{each.name}{{{labels}}}" if labels else each.name] = each.value
    return found


@asynccontextmanager
async def asking(config: Config) -> AsyncIterator[Asking]:
    async with serving(config) as running, aiohttp.ClientSession() as session:
        yield Asking(session, running)


async def test_healthz_says_ok_and_nothing_of_apps_to_who_shows_no_key(tmp_path: Path, apple: Simulator) -> None:
    async with asking(settings_for(tmp_path, apple)) as server:
        assert await server.health() == (
            200,
            {"status": "ok", "lanes": {"good": 0, "idle": 1, "failing": 0}, "problems": 0},
        )
        status, body = await server.health(key=True)
        assert (status, body["reasons"]) == (200, [])


async def test_apple_out_of_reach_is_a_503_that_says_why_to_who_has_a_key(tmp_path: Path, apple: Simulator) -> None:
    port = unused_port()
    async with asking(settings_for(tmp_path, apple, port=port)) as server:
        assert await server.post({"token": token(1), "title": "x"}) == 202
        status, body = await server.until(lambda body: body["status"] != "ok")
        assert (status, body["status"]) == (503, "failing")
        (reason,) = body["reasons"]
        assert (reason["about"], reason["app"], reason["environment"]) == ("app", "shop", "production")
        assert f"localhost:{port}" in reason["problem"]
        assert f"localhost:{port}" in reason["advice"]
        assert reason["waiting"] == 1
        assert reason["since"].endswith("Z")
        status, bare = await server.health()
        assert status == 503
        assert bare == {"status": "failing", "lanes": {"good": 0, "idle": 0, "failing": 1}, "problems": 1}
        assert await server.health(path="/livez") == (200, {"status": "ok"})


async def test_a_wrong_key_sees_no_more_than_none(tmp_path: Path, apple: Simulator) -> None:
    async with serving(settings_for(tmp_path, apple)) as running, aiohttp.ClientSession() as session:
        headers = {"authorization": "Bearer hg_wrong"}
        async with session.get(f"{running.url}/healthz", headers=headers) as response:
            assert response.status == 200
            assert "reasons" not in await response.json()


async def test_one_app_out_of_reach_beside_a_good_one_is_degraded(tmp_path: Path, apple: Simulator) -> None:
    config = settings_for(tmp_path, apple, "shop", "till")
    lost: AppSettings = replace(config.apps["till"], port=unused_port())
    async with asking(replace(config, apps={**config.apps, "till": lost})) as server:
        for name in ("shop", "till"):
            assert await server.post({"app": name, "token": token(1), "title": "x"}) == 202
        status, body = await server.until(lambda body: body["lanes"] == {"good": 1, "idle": 0, "failing": 1})
        assert (status, body["status"], body["reasons"][0]["app"]) == (200, "degraded", "till")


async def test_credentials_that_apple_refuses_are_told_with_what_to_do(tmp_path: Path, apple: Simulator) -> None:
    config = settings_for(tmp_path, apple)
    (tmp_path / f"AuthKey_{apple.signing_key.key_id}.p8").write_bytes(new_signing_key().pem)
    async with asking(config) as server:
        assert await server.post({"token": token(1), "title": "x"}) == 202
        status, body = await server.until(lambda body: body["status"] != "ok")
        assert (status, body["status"]) == (503, "failing")
        assert "Apple refuses the credentials: InvalidProviderToken" in body["reasons"][0]["problem"]
        assert apple.signing_key.key_id in body["reasons"][0]["problem"]
        assert body["reasons"][0]["advice"]
        assert body["reasons"][0]["rests_until"] > body["reasons"][0]["since"]


async def test_apples_own_trouble_is_told_until_it_is_over(tmp_path: Path, apple: Simulator) -> None:
    apple.misbehaves(Answer(503, "ServiceUnavailable"))
    async with asking(settings_for(tmp_path, apple)) as server:
        assert await server.post({"token": token(1), "title": "x"}) == 202
        status, body = await server.until(lambda body: body["status"] != "ok")
        assert (status, body["reasons"][0]["problem"]) == (503, "Apple answers ServiceUnavailable (localhost)")
        apple.behaves()
        assert await server.post({"token": token(2), "title": "x"}) == 202
        await server.until(lambda body: body["status"] == "ok" and body["lanes"]["good"] == 1)


async def test_a_lone_5xx_among_good_answers_is_nobodys_trouble(tmp_path: Path, apple: Simulator) -> None:
    apple.misbehaves(Answer(503, "ServiceUnavailable", retry_after_s=3600), token=token(2))
    async with open_house(tmp_path, apple) as house:
        await house.receipts(await house.push([token(1)]))
        await house.receipts(await house.push([token(2)]), lambda receipt: receipt.reason is not None)
        assert (await operations(house).healthz(None)).status == 200
        (lane,) = house.carrier.lanes()
        assert lane.trouble is None


async def test_a_store_that_takes_no_more_is_failing(tmp_path: Path, apple: Simulator) -> None:
    config = settings_for(tmp_path, apple, port=unused_port())
    async with asking(replace(config, store=replace(config.store, max_waiting=2))) as server:
        assert await server.post({"tokens": [token(1), token(2)], "title": "x"}) == 202
        status, body = await server.until(lambda body: any(each["about"] == "store" for each in body["reasons"]))
        assert (status, body["status"]) == (503, "failing")


async def test_a_server_without_apps_is_degraded(tmp_path: Path, apple: Simulator) -> None:
    async with asking(replace(settings_for(tmp_path, apple), apps={})) as server:
        status, body = await server.health(key=True)
        assert (status, body["status"], body["reasons"][0]["about"]) == (200, "degraded", "server")


async def test_doctor_knows_an_unwell_server_for_ours(tmp_path: Path, apple: Simulator) -> None:
    config = settings_for(tmp_path, apple, port=unused_port())
    async with serving(config) as running, aiohttp.ClientSession() as session:
        server = Asking(session, running)
        assert await asyncio.to_thread(_is_ours, running.url)
        assert await server.post({"token": token(1), "title": "x"}) == 202
        await server.until(lambda body: body["status"] == "failing")
        assert await asyncio.to_thread(_is_ours, running.url)


# -- beside a house without doors ------------------------------------------------------------------------------------


def operations(house: House, store: SqliteStore | None = None, telemetry: Telemetry | None = None) -> Operations:
    return Operations(
        house.relay,
        store or house.store,
        house.carrier,
        house.relay._apps,
        telemetry or house.relay._telemetry,
        clock=time.time,
    )


async def test_a_stopping_server_says_so_at_once(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple) as house:
        looking = operations(house)
        assert (await looking.healthz(None)).status == 200
        looking.stopping = True
        answer = await looking.healthz(OF_ALL)
        assert answer.status == 503
        assert b"stopping" in answer.body


async def test_a_key_for_one_app_is_told_nothing_of_others(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        await house.push([token(1)])
        gone = Operations(house.relay, house.store, house.carrier, {}, Telemetry(), clock=time.time)
        assert APP.encode() in (await gone.healthz(OF_ALL)).body
        assert APP.encode() not in (await gone.healthz(Caller("x", frozenset(Scope), frozenset({"till"})))).body


async def test_a_full_disk_is_failing_and_over_when_there_is_room(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple) as house:
        await house.receipts(await house.push([token(1)]))
        db = house.store._writer._db
        pages = db.pragma("page_count")
        await house.store._writer.run(lambda db, calls: [db.pragma("max_page_count", pages)] * len(calls), None)
        with capture_logs() as logs:
            with pytest.raises(StoreError, match="Make room"):
                await house.push([token(number) for number in range(900)], [b'{"aps":{"alert":"%s"}}' % (b"x" * 3000)])
            answer = await operations(house).healthz(OF_ALL)
            assert answer.status == 503
            assert b"Make room on the disk" in answer.body
            await house.store._writer.run(lambda db, calls: [db.pragma("max_page_count", 1 << 30)] * len(calls), None)
            await house.receipts(await house.push([token(2)]))
        assert [each["event"] for each in logs if each["log_level"] != "debug"] == ["store_recovered"]
        assert (await operations(house).healthz(None)).status == 200


async def test_a_store_that_cannot_be_asked_is_failing(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple) as house:
        other = await SqliteStore.open(tmp_path / "other.db")
        await other.aclose()
        looking = operations(house, other)
        answer = await looking.healthz(OF_ALL)
        assert answer.status == 503
        assert b"closed" in answer.body
        page = (await looking.metrics()).body
        assert b"heliograph_queue_room" in page
        assert b"heliograph_queue_notifications" not in page


async def test_a_probe_writes_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "heliograph.db"
    store = await SqliteStore.open(path)
    try:
        await store.probe()
        log = path.with_name("heliograph.db-wal")
        before = log.stat().st_mtime_ns
        await store.probe()
        assert log.stat().st_mtime_ns > before
        assert store.commits == 0
    finally:
        await store.aclose()
    with pytest.raises(StoreError, match="closed"):
        await store.probe()


async def test_depths_are_those_of_lanes_whatever_their_number(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "heliograph.db")
    try:
        for name, environment, batches in (("shop", PRODUCTION, 20_500), ("till", DEVELOPMENT, 3)):
            made = [
                batch
                for number in range(batches)
                for batch in make_batches(
                    lambda: new_batch_id(time.time(), number.to_bytes(8)),  # noqa: B023 - called at once
                    name,
                    environment,
                    time.time(),
                    (HEADERS,),
                    [token(number).encode(), token(number + 1).encode()],
                    [PAYLOAD],
                )
            ]
            await store.put(made)
        depths = {each.app: each for each in await store.depths()}
        assert {name: (each.waiting, each.leased) for name, each in depths.items()} == {
            "shop": (41_000, 0),
            "till": (6, 0),
        }
        assert depths["till"].environment is DEVELOPMENT
        assert depths["till"].oldest_due_s > 0
        leases = await store.take(4)
        depths = {each.app: each for each in await store.depths()}
        assert sum(each.leased for each in depths.values()) == len(leases) == 4
        assert sum(each.waiting for each in depths.values()) == 41_006 - 8
    finally:
        await store.aclose()


async def test_who_reads_metrics_meanwhile_shares_one_walk_through_what_waits(tmp_path: Path, apple: Simulator) -> None:
    walks = 0

    class Walked:
        """The store, and how often it is walked through."""

        async def depths(self) -> Sequence[Depth]:
            nonlocal walks
            walks += 1
            return await house.store.depths()

    async with open_house(tmp_path, apple, working=False) as house:
        await house.push([token(1), token(2)])
        looking = operations(house, cast("Any", Walked()))
        pages = await asyncio.gather(*(looking.metrics() for _ in range(50)))
        assert walks == 1
        for page in pages:
            assert b'heliograph_queue_notifications{app="example",environment="production"} 2.0' in page.body
        await house.push([token(3)])
        page = await looking.metrics()
        assert b'heliograph_queue_notifications{app="example",environment="production"} 3.0' in page.body
        assert walks == 2


async def test_a_lane_that_is_empty_again_is_shown_as_empty(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple) as house:
        await house.receipts(await house.push([token(1)]))
        await until(lambda: not house.store.waiting)
        (depth,) = await house.store.depths()
        assert (depth.app, depth.waiting, depth.leased, depth.oldest_due_s) == (APP, 0, 0, 0.0)


# -- the metrics of a server at work ---------------------------------------------------------------------------------


async def test_metrics_tell_the_way_of_notifications(tmp_path: Path, apple: Simulator) -> None:
    async with asking(settings_for(tmp_path, apple)) as server:
        assert await server.post({"tokens": [token(number) for number in range(500)], "title": "x"}) == 202
        assert await server.post({"token": token(1), "content_available": True, "push_type": "background"}) == 202
        assert await server.post({"token": "rubbish", "title": "x"}) == 400
        assert await server.post({"tokn": "rubbish"}) == 400
        lane = "app=shop,environment=production"
        found: dict[str, float] = {}
        async with asyncio.timeout(PATIENCE_S):
            while found.get(f"heliograph_ended_total{{{lane},state=accepted}}") != 501:
                found = await server.metrics()
    for name, value in (
        (f"heliograph_answers_total{{{lane},outcome=accepted,push_type=alert}}", 500),
        (f"heliograph_answers_total{{{lane},outcome=accepted,push_type=background}}", 1),
        (f"heliograph_queue_wait_seconds_count{{{lane}}}", 501),
        (f"heliograph_apns_answer_seconds_count{{{lane}}}", 501),
        (f"heliograph_whole_way_seconds_count{{{lane}}}", 501),
        (f"heliograph_queue_notifications{{{lane}}}", 0),
        ("heliograph_http_requests_total{code=,status=202}", 2),
        ("heliograph_apns_connections_opened_total{host=localhost}", 1),
        ("heliograph_refused_total{app=shop,reason=BadDeviceToken}", 1),
    ):
        assert found[name] == value, name
    assert sum(value for name, value in found.items() if "http_requests" in name and "status=400" in name) == 2
    (connections,) = [value for name, value in found.items() if name.startswith("heliograph_apns_connections{")]
    assert connections == 1
    assert found["heliograph_store_commit_seconds_count"] > 0
    assert found["heliograph_queue_room"] > 4_000_000
    assert found["process_open_fds"] > 0
    way = found[f"heliograph_whole_way_seconds_sum{{{lane}}}"]
    answer = found[f"heliograph_apns_answer_seconds_sum{{{lane}}}"]
    assert 0 < answer < way


async def test_push_types_of_one_batch_are_counted_apart(tmp_path: Path, apple: Simulator) -> None:
    headers = [Headers(TOPIC), Headers(TOPIC, PushType.BACKGROUND), Headers(TOPIC)]
    background = b'{"aps":{"content-available":1}}'
    async with open_house(tmp_path, apple) as house:
        ids = await house.push([token(number) for number in range(3)], [PAYLOAD, background, PAYLOAD], headers)
        await house.receipts(ids)
        found = read((await operations(house).metrics()).body.decode())
    name = f"heliograph_answers_total{{app={APP},environment=production,outcome=accepted,push_type="
    assert (found[f"{name}alert}}"], found[f"{name}background}}"]) == (2, 1)


async def test_who_sends_without_the_queue_is_counted_too(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple) as house:
        told = asyncio.get_running_loop().create_future()
        courier = house.relay.courier(APP, PRODUCTION, lambda *what: told.set_result(what))
        courier.send(HEADERS, token(1).encode(), PAYLOAD, None, 1)
        await told
        found = read((await operations(house).metrics()).body.decode())
    assert found[f"heliograph_answers_total{{app={APP},environment=production,outcome=accepted,push_type=alert}}"] == 1


async def test_what_is_under_way_is_shown_and_ended_connections_by_why(tmp_path: Path, apple: Simulator) -> None:
    apple.misbehaves(Delay(0.3), times=1)
    apple.misbehaves(GoAway("Shutdown"), times=1)
    async with open_house(tmp_path, apple) as house:
        house.carrier._telemetry = telemetry = house.relay._telemetry
        ids = await house.push([token(1)])
        await until(lambda: sum(each.in_flight for each in house.carrier.lanes()) == 1)
        (lane,) = house.carrier.lanes()
        assert (lane.app, lane.connections, lane.in_flight, lane.waiting, lane.trouble) == (APP, 1, 1, 0, None)
        assert lane.answered_at is None
        await house.receipts(ids)
        (lane,) = house.carrier.lanes()
        assert (lane.in_flight, lane.answered_at is None) == (0, False)
        for number in (2, 3):
            await house.receipts(await house.push([token(number)]))
    found = read(telemetry.page(Standing()).decode())
    assert found["heliograph_apns_connections_ended_total{host=localhost,why=GOAWAY Shutdown}"] == 1
    assert found["heliograph_apns_connections_ended_total{host=localhost,why=retired}"] == 1
    assert found["heliograph_apns_connections_opened_total{host=localhost}"] == 2
    name = f"heliograph_apns_answer_seconds_bucket{{app={APP},environment=production,le="
    assert found[f"{name}0.25}}"] < found[f"{name}+Inf}}"], "the delayed one took longer"


# -- logs ------------------------------------------------------------------------------------------------------------


async def test_the_first_push_that_apple_takes_is_told_once_for_each_app(tmp_path: Path, apple: Simulator) -> None:
    with capture_logs() as logs:
        async with open_house(tmp_path, apple) as house:
            for number in range(3):
                await house.receipts(await house.push([token(number)]))
    found = [each for each in logs if each["event"] == "first_accepted"]
    assert [(each["app"], each["environment"]) for each in found] == [(APP, "production")]


async def test_what_is_given_up_is_told_together(tmp_path: Path, apple: Simulator) -> None:
    apple.misbehaves(Answer(503, "ServiceUnavailable", retry_after_s=60))
    once = [Headers(TOPIC, expiration=0)]  # a try later than in a minute would be worthless
    with capture_logs() as logs:
        async with open_house(tmp_path, apple) as house:
            receipts = await house.receipts(await house.push([token(number) for number in range(5)], headers=once))
    assert {each.state for each in receipts} == {State.EXPIRED}
    found = [each for each in logs if each["event"] == "gave_up"]
    assert sum(each["count"] for each in found) == 5
    assert len(found) <= 2, "at once, and what came after that at the end"
    assert {(each["app"], each["reason"], each["state"]) for each in found} == {(APP, "ServiceUnavailable", "expired")}


# -- the page that explains them -------------------------------------------------------------------------------------


async def test_every_metric_is_explained(tmp_path: Path, apple: Simulator) -> None:
    async with asking(settings_for(tmp_path, apple)) as server:
        page = await server.page()
    families = [family.name for family in text_string_to_metric_families(page)]
    assert len(families) > 20
    ours = [name for name in families if name.startswith("heliograph_")]
    assert [name for name in ours if f"`{name}`" not in PAGE and f"`{name}_total`" not in PAGE] == []
    assert {name for name in families if name not in ours} <= {name for name in families if name.startswith("process_")}


def test_every_log_event_is_explained() -> None:
    found = {each for file in SOURCE.rglob("*.py") for each in EVENTS.findall(file.read_text())}
    events = {event for pair in found for event in pair if event}
    assert {"started", "gave_up", "clock_wrong", "apns_connection_opened"} <= events
    assert [event for event in sorted(events) if f"`{event}`" not in PAGE] == []
