"""Looking for notifications and cancelling them over HTTP, by callers who may see all apps or some."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from msgspec.structs import replace

from heliograph.doors import notifications
from heliograph.doors.api import Api
from heliograph.keys import Keyring
from heliograph.model import Batch, Detail, Environment, Headers, LeaseEnd, Origin, Outcomes, PushType, Scope, State
from heliograph.simulator.faults import Delay
from heliograph.simulator.server import Simulator
from heliograph.stores import sqlite_listing
from heliograph.stores.sqlite import SqliteStore
from tests.contracts.queue import START, a_batch
from tests.service.house import House, open_house, token
from tests.service.test_api import KEY, Caller, serving_door

PATH = "/v1/notifications"
CANCEL = f"{PATH}/cancel"
APPS = ("example", "späti", "shop")
DAY = "2023-11-14T22:13:20"
"""`START` as RFC 3339."""


class Desk:
    """What a test speaks to: a house with a door, and API keys for it."""

    def __init__(self, house: House, caller: Caller, keyring: Keyring) -> None:
        self.house = house
        self.caller = caller
        self._keyring = keyring

    async def key(self, *apps: str, scopes: Sequence[Scope] = tuple(Scope)) -> dict[str, str]:
        """The headers of a caller who is for these apps only."""
        _, key = await self._keyring.make("x", scopes, apps or None)
        return {"authorization": f"Bearer {key}"}

    async def get(self, path: str, headers: dict[str, str] | None = None) -> Any:
        status, body, _ = await self.caller.ask("GET", path, headers=headers)
        assert status == 200, body
        return body

    async def listed(self, query: str = "", headers: dict[str, str] | None = None) -> list[str]:
        """The ids of all that fit, page by page."""
        found: list[str] = []
        cursor = ""
        while True:
            page = await self.get(f"{PATH}?{query}{'&' if query and cursor else ''}{cursor}", headers)
            found += [each["id"] for each in page["notifications"]]
            if page["next"] is None:
                return found
            cursor = f"cursor={page['next']}"

    async def post(self, path: str, ids: Sequence[str], headers: dict[str, str] | None = None) -> Any:
        status, body, _ = await self.caller.ask("POST", path, json.dumps({"ids": ids}).encode(), headers)
        assert status == 200, body
        return body

    async def complaint(self, method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, str, str]:
        status, body, response = await self.caller.ask(method, path, headers=headers)
        assert response.content_type == "application/problem+json", body
        return status, body["code"], body["detail"]


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator() as apple:
        yield apple


@asynccontextmanager
async def open_desk(folder: Path, apple: Simulator, *, working: bool = False) -> AsyncIterator[Desk]:
    async with open_house(folder, apple, working=working) as house:
        keyring = Keyring(KEY.encode(), house.store, clock=time.time)
        door = Api((notifications.Notifications(house.relay, APPS),), keyring)
        async with serving_door(door, house.relay) as bare:
            yield Desk(house, bare.caller, keyring)


@pytest.fixture
async def desk(tmp_path: Path, apple: Simulator) -> AsyncIterator[Desk]:
    async with open_desk(tmp_path, apple) as desk:
        yield desk


def ids_of(batch: Batch, *indices: int) -> list[str]:
    return [f"{batch.id}{index + 1:04x}" for index in indices or range(len(batch))]


async def told(store: SqliteStore, batch: Batch, states: Sequence[State], *details: Detail) -> Batch:
    """A finished batch with these outcomes."""
    await store.put([batch], lease=True)
    await store.record([Outcomes(batch.id, 1, bytes(states), bytes(4 * len(batch)), details)], [])
    await store.finish([LeaseEnd(batch.id, 1)])
    return batch


async def some(store: SqliteStore) -> dict[str, Batch]:
    """One of each kind, oldest first."""
    plain = a_batch(2, app="example")
    voip = replace(
        a_batch(1, app="example", environment=Environment.DEVELOPMENT, created_at=START + 60),
        headers=(Headers("com.example.voip", PushType.VOIP, expiration=7),),
        tokens=[b"00ff"],
    )
    other = a_batch(2, app="späti", created_at=START + 120)
    waits = a_batch(1, app="shop", created_at=START + 180)
    no = Detail(1, "Unregistered", 410, since=1_700_000_000_123)
    await told(store, plain, [State.ACCEPTED, State.REJECTED], no)
    await told(store, voip, [State.BURIED], Detail(0, "NotProcessed", why="x"))
    await told(store, other, [State.ACCEPTED, State.BURIED], Detail(1, "ServiceUnavailable", 503))
    await store.put([waits])
    return {"plain": plain, "voip": voip, "other": other, "waits": waits}


# -- looking for them ------------------------------------------------------------------------------------------------


async def test_notifications_are_listed_newest_first_with_all_that_is_known_of_them(desk: Desk) -> None:
    batches = await some(desk.house.store)
    page = await desk.get(PATH)
    assert page["next"] is None
    newest_first = [each for name in reversed(batches) for each in reversed(ids_of(batches[name]))]
    assert [each["id"] for each in page["notifications"]] == newest_first
    for each in page["notifications"]:
        assert each == await desk.get(f"{PATH}/{each['id']}")
    (voip,) = [each for each in page["notifications"] if each["push_type"] == "voip"]
    assert {name: voip[name] for name in ("environment", "topic", "token", "collapse_id", "expiration")} == {
        "environment": "development",
        "topic": "com.example.voip",
        "token": "00ff",
        "collapse_id": None,
        "expiration": 7,
    }
    (dead,) = [each for each in page["notifications"] if each["status"] == 410]
    assert dead["unregistered_at"] == "2023-11-14T22:13:20.123Z"


@pytest.mark.parametrize(
    "query,expected",
    [
        ("app=example", ["voip:0", "plain:1", "plain:0"]),
        ("app=" + quote("späti"), ["other:1", "other:0"]),
        ("environment=development", ["voip:0"]),
        ("state=buried", ["other:1", "voip:0"]),
        ("state=buried&state=rejected", ["other:1", "voip:0", "plain:1"]),
        ("state=buried,rejected,buried", ["other:1", "voip:0", "plain:1"]),
        ("state=queued", ["waits:0"]),
        ("state=sent", []),
        ("reason=Unregistered", ["plain:1"]),
        ("reason=NotProcessed&state=buried", ["voip:0"]),
        ("reason=Status418", []),
        ("token=00ff", ["voip:0"]),
        ("token=00FF", ["voip:0"]),
        ("token=00fe", []),
        ("topic=com.example.voip", ["voip:0"]),
        ("push_type=voip", ["voip:0"]),
        ("push_type=alert&app=example", ["plain:1", "plain:0"]),
        (f"since={START + 120:.0f}", ["waits:0", "other:1", "other:0"]),
        (f"since={START + 119.5}&until={START + 120.001:.3f}", ["other:1", "other:0"]),
        (f"since=0&until={DAY}.001Z", ["plain:1", "plain:0"]),
        (f"since=100000000&until={DAY}.001Z", ["plain:1", "plain:0"]),
        (f"until={DAY}.001%2B00:00", ["plain:1", "plain:0"]),
        (f"since={DAY}-00:03", ["waits:0"]),
        ("until=2023-11-15t00:13:20.5+02:00&state=accepted", ["plain:0"]),  # a plus sign that nobody escaped
    ],
)
async def test_what_is_listed_is_what_was_asked_for(desk: Desk, query: str, expected: list[str]) -> None:
    batches = await some(desk.house.store)
    named = {each: f"{name}:{index}" for name, batch in batches.items() for index, each in enumerate(ids_of(batch))}
    for limit in ("", "&limit=1"):
        assert [named[each] for each in await desk.listed(query + limit)] == expected


@pytest.mark.parametrize(
    "query,code,said",
    [
        ("appp=x", "UnknownParameter", "Did you mean app?"),
        ("xyz=1", "UnknownParameter", "There may be app, environment, state"),
        ("state=acepted", "BadParameter", "Did you mean accepted?"),
        ("state=accepted,", "BadParameter", "It is one of queued, accepted"),
        ("state=", "BadParameter", "state is empty"),
        ("state=delivered", "BadParameter", "There is no state 'delivered'"),
        ("environment=sandbox", "BadParameter", "It is one of production, development"),
        ("environment=Production", "BadParameter", "Did you mean production?"),
        ("push_type=alerts", "BadParameter", "Did you mean alert?"),
        ("reason=unregistered", "BadParameter", "Did you mean Unregistered?"),
        ("reason=Status99", "BadParameter", "There is no reason"),
        ("token=xyz", "BadDeviceToken", "hex"),
        ("app=exmaple", "UnknownApp", "Did you mean example?"),
        ("app=x", "UnknownApp", "former ones too"),
        ("app=shop&app=example", "BadParameter", "app may come once"),
        ("limit=0", "BadParameter", "from 1 to 1000"),
        ("limit=1001", "BadParameter", "from 1 to 1000"),
        ("cursor=yesterday", "BadParameter", "cursor must be what the former page gave in next"),
        ("since=yesterday", "BadParameter", "2026-11-21T12:00:00Z"),
        ("since=2026-11-21", "BadParameter", "2026-11-21T12:00:00Z"),
        ("since=2026-11-31T00:00:00Z", "BadParameter", "since must be a time"),
        ("since=2026-11-21T12:00:00", "BadParameter", "since must be a time"),
        ("since=-5", "BadParameter", "since must be a time"),
        ("until=nan", "BadParameter", "until must be a time"),
        ("until=1795262400000", "BadParameter", "rather milliseconds"),
        ("since=2000000000&until=2000000000", "BadParameter", "later than since"),
        ("since=2026", "BadParameter", "2026 would be UNIX seconds in 1970: write 2026-01-01T00:00:00Z."),
        ("until=20261121", "BadParameter", "20261121 would be UNIX seconds in 1970: write 2026-11-21T12:00:00Z."),
        ("since=99999999.9", "BadParameter", "would be UNIX seconds in 1973: write"),
        ("since=0001-01-01T00:00:00%2B14:00", "BadParameter", "since must be a time"),
        ("state=%ff%00", "BadParameter", "There is no state"),
    ],
)
async def test_what_cannot_be_looked_for_is_refused_with_what_was_probably_meant(
    desk: Desk, query: str, code: str, said: str
) -> None:
    status, found, detail = await desk.complaint("GET", f"{PATH}?{query}")
    assert (status, found) == (400, code), detail
    assert said in detail
    assert detail[-1] in ".?"


async def test_a_page_may_be_short_or_empty_and_still_lead_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_listing, "LOOK_S", 0.0)
    monkeypatch.setattr(sqlite_listing, "_CHUNK", 3)
    store = desk.house.store
    oldest = await told(store, a_batch(1, app="example"), [State.BURIED], Detail(0, "NoAnswer"))
    for number in range(1, 20):
        await told(store, a_batch(2, app="example", created_at=START + number), [State.ACCEPTED] * 2)
    page = await desk.get(f"{PATH}?state=buried")
    assert page["notifications"] == []
    assert page["next"] is not None
    assert await desk.listed("state=buried") == ids_of(oldest)
    assert len(await desk.listed()) == 39


async def test_of_very_many_listings_at_once_some_are_put_off_and_no_other_request_is(desk: Desk) -> None:
    caller, go_on = desk.caller, threading.Event()
    desk.house.store._lookers.submit(go_on.wait)  # a look that takes long
    try:
        paths = [PATH, "/v1/buried"] * (notifications.MAX_LOOKS // 2 + 5)
        asked = [asyncio.ensure_future(caller.ask("GET", path)) for path in paths]
        early = [await each for each in itertools.islice(asyncio.as_completed(asked), 10)]
        assert [(status, body["code"], response.headers["retry-after"]) for status, body, response in early] == [
            (503, "Busy", "1")
        ] * 10
        await caller.send({"app": "example", "token": token(1), "title": "x"})
    finally:
        go_on.set()
    answers = await asyncio.gather(*asked)
    assert sorted(status for status, _, _ in answers) == [200] * notifications.MAX_LOOKS + [503] * 10
    assert (await caller.ask("GET", PATH))[0] == 200


async def test_what_is_damaged_is_listed_with_what_is_still_known(desk: Desk) -> None:
    batch, other = a_batch(2, app="example"), a_batch(1, app="example", created_at=START + 1)
    await told(desk.house.store, batch, [State.ACCEPTED] * 2)
    await told(desk.house.store, other, [State.ACCEPTED])
    await desk.house.store._writer.run(
        lambda db, calls: [db.execute("UPDATE batch SET body = x'0007' WHERE size = 2") for _ in calls], None
    )
    first, second, _ = reversed((await desk.get(PATH))["notifications"])
    assert [first["id"], second["id"]] == ids_of(batch)
    assert {name: first[name] for name in ("state", "environment", "topic", "push_type", "token")} == {
        "state": "accepted",
        "environment": "production",
        "topic": None,
        "push_type": None,
        "token": None,
    }
    assert await desk.listed("push_type=alert") == ids_of(other)
    assert await desk.listed(urlencode({"token": batch.tokens[0].decode()})) == []


# -- callers who are for some apps only ------------------------------------------------------------------------------


async def test_callers_see_nothing_of_other_apps(desk: Desk) -> None:
    batches = await some(desk.house.store)
    mine = await desk.key("example", "shop")
    expected = [*ids_of(batches["waits"]), *ids_of(batches["voip"]), *reversed(ids_of(batches["plain"]))]
    assert await desk.listed("", mine) == expected
    assert await desk.listed("limit=1", mine) == expected
    assert await desk.listed("app=shop", mine) == ids_of(batches["waits"])
    buried = await desk.get("/v1/buried", mine)
    assert [each["id"] for each in buried["buried"]] == ids_of(batches["voip"])
    for path in (f"{PATH}?app=sp%C3%A4ti", "/v1/buried?app=sp%C3%A4ti", f"{PATH}?app=never"):
        status, code, _ = await desk.complaint("GET", path, mine)
        assert (status, code) == (403, "AppNotAllowed")
    (other, _) = ids_of(batches["other"])
    for method in ("GET", "DELETE"):
        status, code, _ = await desk.complaint(method, f"{PATH}/{other}", mine)
        assert (status, code) == (404, "UnknownNotification")
    assert await desk.listed("", await desk.key("never")) == []


async def test_callers_replay_and_cancel_nothing_of_other_apps(desk: Desk) -> None:
    batches = await some(desk.house.store)
    mine, others = await desk.key("example"), await desk.key("späti")
    buried = [*ids_of(batches["voip"]), *ids_of(batches["other"], 1)]
    assert await desk.post("/v1/buried/replay", buried, mine) == {"replayed": buried[:1]}
    waiting = [buried[0], *ids_of(batches["waits"])]
    nothing: dict[str, list[str]] = {"cancelled": [], "cancelling": [], "too_late": [], "unknown": []}
    assert await desk.post(CANCEL, waiting, others) == {**nothing, "unknown": waiting}
    assert await desk.listed("state=queued") == [waiting[1], waiting[0]]
    assert await desk.post(CANCEL, waiting, mine) == {**nothing, "cancelled": waiting[:1], "unknown": waiting[1:]}


async def test_callers_who_chose_the_same_apns_id_see_and_change_only_their_own(desk: Desk) -> None:
    store, theirs = desk.house.store, "A9B8C7D6-0123-4567-89AB-CDEF01234567"
    keys = {app: await desk.key(app) for app in ("example", "späti", "shop")}
    own = {app: replace(a_batch(app=app), apns_ids={0: theirs}) for app in ("example", "späti")}
    for batch in own.values():
        await store.put([batch])
    for app, batch in own.items():
        assert (await desk.get(f"{PATH}/{theirs}", keys[app]))["id"] == ids_of(batch)[0]
    for method in ("GET", "DELETE"):
        status, code, _ = await desk.complaint(method, f"{PATH}/{theirs}", keys["shop"])
        assert (status, code) == (404, "UnknownNotification")
    nothing: dict[str, list[str]] = {"cancelled": [], "cancelling": [], "too_late": [], "unknown": []}
    assert await desk.post(CANCEL, [theirs], keys["shop"]) == {**nothing, "unknown": [theirs]}
    assert await desk.post(CANCEL, [theirs], keys["example"]) == {**nothing, "cancelled": [theirs]}
    assert await desk.listed("state=queued") == ids_of(own["späti"])


async def test_what_was_given_up_on_is_replayed_by_the_apns_id_that_its_caller_chose(desk: Desk) -> None:
    theirs = "a9b8c7d6-0123-4567-89ab-cdef01234567"
    mine, others = await desk.key("example"), await desk.key("späti")
    for app in ("example", "späti"):
        batch = replace(a_batch(app=app), apns_ids={0: theirs})
        await told(desk.house.store, batch, [State.BURIED], Detail(0, "NotProcessed", why="x"))
    assert await desk.post("/v1/buried/replay", [theirs, theirs, "x"], mine) == {"replayed": [theirs]}
    assert await desk.post("/v1/buried/replay", [theirs], mine) == {"replayed": []}
    assert len(await desk.listed("state=queued", mine)) == 1
    assert await desk.listed("state=queued", others) == []


async def test_connections_of_other_apps_are_not_seen(desk: Desk) -> None:
    for app in ("example", "späti"):
        batch = replace(a_batch(2, app=app), origin=Origin("main-9f31c2-17"))
        await told(desk.house.store, batch, [State.ACCEPTED] * 2)
    seen = await desk.get(f"{PATH}?connection=main-9f31c2-17", await desk.key("example"))
    assert [each["app"] for each in seen["notifications"]] == ["example"] * 2
    assert await desk.listed("connection=main-9f31c2-17", await desk.key("shop")) == []


async def test_each_of_it_needs_its_scope(desk: Desk) -> None:
    batches = await some(desk.house.store)
    path = f"{PATH}/{ids_of(batches['waits'])[0]}"
    for scope, allowed in ((Scope.SEND, {"DELETE", "cancel"}), (Scope.READ, {"list"}), (Scope.MANAGE, set())):
        key = await desk.key(scopes=[scope])
        body = json.dumps({"ids": []}).encode()
        for name, method, where in (("list", "GET", PATH), ("DELETE", "DELETE", path), ("cancel", "POST", CANCEL)):
            status, _, _ = await desk.caller.ask(method, where, body if method == "POST" else None, key)
            assert (status != 403) == (name in allowed), (scope, name)


# -- cancelling ------------------------------------------------------------------------------------------------------


async def test_what_waits_is_cancelled_and_again_is_no_fault(desk: Desk) -> None:
    (notification_id,) = ids_of((await some(desk.house.store))["waits"])
    for name in (notification_id, notification_id.upper()):
        status, receipt, _ = await desk.caller.ask("DELETE", f"{PATH}/{name}")
        assert (status, receipt["state"], receipt["cancelling"]) == (200, "cancelled", False)
        assert receipt == await desk.get(f"{PATH}/{notification_id}")
    assert await desk.listed("state=cancelled") == [notification_id]
    assert desk.house.store.waiting == 0


async def test_what_has_ended_is_told_with_its_state(desk: Desk) -> None:
    batches = await some(desk.house.store)
    accepted, rejected = ids_of(batches["plain"])
    status, code, detail = await desk.complaint("DELETE", f"{PATH}/{accepted}")
    assert (status, code) == (409, "TooLate")
    assert detail.startswith("It is too late to cancel it: its state is accepted. Apple took it.")
    status, code, detail = await desk.complaint("DELETE", f"{PATH}/{rejected}")
    assert (status, code) == (409, "TooLate")
    assert "rejected" in detail
    for unknown in ("x", accepted[:-4] + "0003"):
        status, code, _ = await desk.complaint("DELETE", f"{PATH}/{unknown}")
        assert (status, code) == (404, "UnknownNotification")


async def test_many_are_cancelled_at_once_and_each_is_told_of(desk: Desk) -> None:
    batches = await some(desk.house.store)
    more = a_batch(1000, app="shop")
    await desk.house.store.put([more])
    wanted = [*ids_of(batches["waits"]), *ids_of(batches["plain"]), "x", *ids_of(more)[:900], *ids_of(batches["waits"])]
    assert await desk.post(CANCEL, wanted) == {
        "cancelled": [wanted[0], *ids_of(more)[:900]],
        "cancelling": [],
        "too_late": ids_of(batches["plain"]),
        "unknown": ["x"],
    }
    assert desk.house.store.waiting == 1000
    assert await desk.post(CANCEL, []) == {"cancelled": [], "cancelling": [], "too_late": [], "unknown": []}
    status, body, _ = await desk.caller.ask("POST", CANCEL, json.dumps({"ids": ["x"] * 1001}).encode())
    assert (status, body["code"]) == (413, "TooManyNotifications")
    status, code, _ = await desk.complaint("GET", CANCEL)
    assert (status, code) == (405, "MethodNotAllowed")


async def test_what_is_being_sent_is_said_to_be(tmp_path: Path, apple: Simulator) -> None:
    apple.misbehaves(Delay(0.5))
    async with open_desk(tmp_path, apple, working=True) as desk:
        (notification_id,) = await desk.house.push([token(1)])
        while not any(each.in_flight for each in desk.house.carrier.lanes()):
            await desk.house.relay.receipt(notification_id, 0.01)
        status, receipt, _ = await desk.caller.ask("DELETE", f"{PATH}/{notification_id}")
        assert (status, receipt["state"], receipt["cancelling"]) == (202, "queued", True)
        assert "if Apple does not take it this time" in receipt["meaning"]
        assert (await desk.post(CANCEL, [notification_id]))["cancelling"] == [notification_id]
        await desk.house.receipts([notification_id])
        status, code, _ = await desk.complaint("DELETE", f"{PATH}/{notification_id}")
        assert (status, code) == (409, "TooLate")
