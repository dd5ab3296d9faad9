"""API keys over real sockets: who may do what, how keys come and go, and what a key for some apps must not reach."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

import aiohttp
import apsw
import pytest
from msgspec.structs import replace

from heliograph.config import ApiSettings, Config
from heliograph.errors import StoreError
from heliograph.keys import Caller, Keyring
from heliograph.model import ApiKey, Detail, LeaseEnd, Outcomes, Scope, State
from heliograph.ports import Store
from heliograph.service import DATABASE, Running, serving
from heliograph.simulator.server import Simulator
from heliograph.stores.sqlite import SqliteStore
from tests.contracts.queue import Clock, a_batch
from tests.service.house import PATIENCE_S, token

TOPICS = {"shop": "com.example.shop", "shop2": "com.example.shop2"}
SEND, READ, MANAGE = Scope
DAY_S = 86400.0
LOOK_S = 0.01


class Asking:
    """Speaks to one server, with any key."""

    def __init__(self, session: aiohttp.ClientSession, running: Running) -> None:
        self._session = session
        self.running = running

    async def ask(self, method: str, path: str, content: Any = None, *, key: str | None = None) -> tuple[int, Any]:
        """`key`: other than the server's own."""
        headers = {"authorization": f"Bearer {key or self.running.key}"}
        body = content if isinstance(content, bytes) else None if content is None else json.dumps(content)
        async with self._session.request(method, self.running.url + path, data=body, headers=headers) as response:
            text = await response.text()
            return response.status, json.loads(text) if "json" in response.content_type else text

    async def code(self, method: str, path: str, content: Any = None, *, key: str | None = None) -> tuple[int, str]:
        """Status and code of a problem."""
        status, problem = await self.ask(method, path, content, key=key)
        assert status >= 400, problem
        return status, str(problem["code"])

    async def make(self, key: str | None = None, **content: Any) -> dict[str, Any]:
        """A new key, as the 201 has it."""
        status, made = await self.ask("POST", "/v1/keys", {"name": "ci", **content}, key=key)
        assert status == 201, made
        return dict(made)

    async def ids(self, key: str | None = None) -> list[str]:
        """Of the keys that are listed."""
        _, found = await self.ask("GET", "/v1/keys", key=key)
        return [each["id"] for each in found["keys"]]


@asynccontextmanager
async def asking(folder: Path, look_s: float = LOOK_S) -> AsyncIterator[Asking]:
    config = Config(data=str(folder / "data"), api=ApiSettings(port=0))
    async with (
        serving(config, look_s=look_s) as running,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE_S)) as session,
    ):
        yield Asking(session, running)


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator() as apple:
        for topic in TOPICS.values():
            apple.add_app(topic)
        yield apple


def app_for(apple: Simulator, topic: str) -> dict[str, Any]:
    key = apple.signing_key
    return {
        "topic": topic,
        "key": key.pem.decode(),
        "key_id": key.key_id,
        "team_id": key.team_id,
        "host": "localhost",
        "port": apple.port,
        "ca": apple.ca_pem.decode(),
    }


async def bury(folder: Path, *apps: str) -> list[str]:
    """Ids of notifications of these apps that were given up on, in a store that no server has open."""
    ids = []
    store = await SqliteStore.open(folder / "data" / DATABASE)
    try:
        for app in apps:
            batch = a_batch(app=app, created_at=time.time())
            await store.put([batch])
            (lease,) = await store.take(1)
            buried = (Detail(0, "ServiceUnavailable", 503, attempts=9),)
            await store.record([Outcomes(batch.id, lease.attempt, bytes([State.BURIED]), bytes(4), buried)], [])
            await store.finish([LeaseEnd(batch.id, lease.attempt)])
            ids.append(f"{batch.id}0001")
    finally:
        await store.aclose()
    return ids


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Asking]:
    """Without apps."""
    async with asking(tmp_path) as server:
        yield server


# -- how they come and go --------------------------------------------------------------------------------------------


async def test_a_key_is_shown_once_and_opens_what_its_scopes_say(server: Asking) -> None:
    made = await server.make(name="späti 24", scopes=["read"])
    key = made.pop("key")
    assert key.startswith(f"hg_{made['id']}_")
    assert made == {**made, "name": "späti 24", "scopes": ["read"], "apps": None, "expires_at": None}
    for path in (f"/v1/keys/{made['id']}", "/v1/keys"):
        status, shown = await server.ask("GET", path)
        assert (status, shown) == (200, made if path != "/v1/keys" else {"keys": [made]})
    assert (await server.ask("GET", "/v1/buried", key=key))[0] == 200
    assert await server.code("GET", "/v1/keys", key=key) == (403, "MissingScope")
    assert await server.code("POST", "/v1/notifications", {}, key=key) == (403, "MissingScope")


async def test_what_is_not_said_is_send_for_all_apps_for_ever(server: Asking) -> None:
    made = await server.make()
    assert (made["scopes"], made["apps"], made["expires_at"]) == (["send"], None, None)
    assert await server.code("POST", "/v1/notifications", {}, key=made["key"]) == (400, "MissingDeviceToken")


async def test_a_removed_key_opens_nothing_from_the_answer_on(tmp_path: Path) -> None:
    async with asking(tmp_path, look_s=3600) as server:
        made = await server.make()
        assert (await server.ask("GET", "/v1/keys/self", key=made["key"]))[0] == 200
        assert await server.ask("DELETE", f"/v1/keys/{made['id']}") == (200, {"removed": made["id"]})
        assert await server.code("GET", "/v1/keys/self", key=made["key"]) == (401, "Unauthorized")
        status, problem = await server.ask("DELETE", f"/v1/keys/{made['id']}")
        assert (status, problem["code"]) == (404, "UnknownKey")
        assert "GET /v1/keys or `heliograph keys list` lists those" in problem["detail"]
        assert await server.ids() == []


async def test_keys_survive_a_restart_and_removed_ones_do_not(tmp_path: Path) -> None:
    async with asking(tmp_path) as server:
        kept, gone = await server.make(name="kept"), await server.make(name="gone")
        await server.ask("DELETE", f"/v1/keys/{gone['id']}")
    async with asking(tmp_path) as server:
        assert (await server.ask("GET", "/v1/keys/self", key=kept["key"]))[1]["name"] == "kept"
        assert await server.code("GET", "/v1/keys/self", key=gone["key"]) == (401, "Unauthorized")


async def test_what_another_process_changes_in_the_store_is_seen_soon(server: Asking) -> None:
    made = await server.make()
    assert await server.running.relay._store.delete_key(made["id"])
    async with asyncio.timeout(PATIENCE_S):
        while (await server.ask("GET", "/v1/keys/self", key=made["key"]))[0] == 200:
            pass


async def test_a_key_tells_its_bearer_what_it_may_do(server: Asking) -> None:
    made = await server.make(scopes=["manage", "send", "send"], expires_in_days=1)
    key = made.pop("key")
    assert made["scopes"] == ["send", "manage"]
    assert await server.ask("GET", "/v1/keys/self", key=key) == (200, made)
    own = {"id": None, "name": "the server's own", "scopes": list(Scope)}
    assert await server.ask("GET", "/v1/keys/self") == (
        200,
        {**own, "apps": None, "created_at": None, "expires_at": None},
    )
    assert await server.code("DELETE", "/v1/keys/self") == (405, "MethodNotAllowed")


@pytest.mark.parametrize("field", ["expires_at", "expires_in_days"])
async def test_a_key_ends_when_it_was_said_to(server: Asking, field: str) -> None:
    end = datetime.now(UTC) + timedelta(days=30)
    made = await server.make(None, **{field: end.isoformat() if field == "expires_at" else 30})
    assert abs((datetime.fromisoformat(made["expires_at"]) - end).total_seconds()) < 60


@pytest.mark.parametrize(
    "content, code, words",
    [
        (b"", "InvalidJson", "send a JSON object"),
        (b"[]", "BadType", "The body: expected object"),
        (b'{"name": "\\ud800"}', "InvalidJson", "not JSON in UTF-8"),
        ({}, "BadKey", "name is missing"),
        ({"name": None}, "BadType", "name: expected str"),
        *(
            ({"name": name}, "BadKey", "1 to 64 printable")
            for name in ("", " ", "ci ", "x" * 65, "a\nb", "\u202eab", "\0")
        ),
        ({"name": "ci", "scope": ["send"]}, "UnknownField", "Did you mean scopes?"),
        ({"name": "ci", "scopes": ["root"]}, "BadKey", "scopes[0] must be one of send, read, manage"),
        ({"name": "ci", "scopes": []}, "BadKey", "scopes is empty"),
        ({"name": "ci", "scopes": "send"}, "BadType", "scopes: expected array"),
        ({"name": "ci", "apps": []}, "BadKey", "apps is empty"),
        ({"name": "ci", "apps": ["shop"]}, "UnknownApp", "There is no app 'shop'. Known apps: none."),
        ({"name": "ci", "expires_in_days": 0}, "BadKey", "must be in the future"),
        ({"name": "ci", "expires_in_days": -1e300}, "BadKey", "must be in the future"),
        ({"name": "ci", "expires_in_days": 1e300}, "BadKey", "36500 days ahead at most"),
        ({"name": "ci", "expires_at": "2001-09-09T01:46:40Z"}, "BadKey", "must be in the future"),
        ({"name": "ci", "expires_at": "9999-12-31T23:59:59Z"}, "BadKey", "36500 days ahead at most"),
        ({"name": "ci", "expires_at": "0001-01-01T00:00:00+23:00"}, "BadKey", "must be in the future"),
        ({"name": "ci", "expires_at": "2099-01-01"}, "BadType", "such as 2027-01-31T12:00:00Z"),
        ({"name": "ci", "expires_at": "2099-01-01T00:00:00"}, "BadType", "a time with its offset"),
        ({"name": "ci", "expires_at": 4e9}, "BadType", "a time with its offset"),
        ({"name": "ci", "expires_at": "2099-01-01T00:00:00Z", "expires_in_days": 1}, "AmbiguousRequest", "not both"),
    ],
)
async def test_a_key_that_cannot_be_is_refused_with_what_to_change(
    server: Asking, content: Any, code: str, words: str
) -> None:
    status, problem = await server.ask("POST", "/v1/keys", content)
    assert (status, problem["code"]) == (400, code)
    assert words in problem["detail"]
    assert await server.ids() == []


@pytest.mark.parametrize("name", ["x", "SELF", "%00", "%ff", "hg_", "1" * 5000, "self/", "0b5cfe52%2f"])
async def test_ids_of_no_key_are_told_so(server: Asking, name: str) -> None:
    for method in ("GET", "DELETE"):
        status, problem = await server.ask(method, f"/v1/keys/{name}")
        assert (status, problem["code"]) in ((404, "UnknownKey"), (404, "NotFound"))
        assert len(problem["detail"]) < 200


# -- what is said to whom --------------------------------------------------------------------------------------------


async def refusal(server: Asking, authorization: str | None) -> tuple[int, dict[str, Any], str]:
    headers = {} if authorization is None else {"authorization": authorization}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.get(f"{server.running.url}/v1/keys/self") as response,
    ):
        return response.status, await response.json(content_type=None), response.headers["www-authenticate"]


@pytest.mark.parametrize(
    "shown, words, challenge",
    [
        (None, "The Authorization header is missing: send a key as `Authorization: Bearer hg_...`", "Bearer"),
        ("hg_something", "The Authorization header holds no API key", "Bearer"),
        ("Basic aGc6aGc=", "The Authorization header holds no API key", "Bearer"),
        ("Bearer ", "The Authorization header holds no API key", "Bearer"),
        ("Bearer hg_something", "The API key is not one of this server", 'Bearer error="invalid_token"'),
    ],
)
async def test_who_shows_no_key_of_ours_reads_how_to(
    server: Asking, shown: str | None, words: str, challenge: str
) -> None:
    status, problem, found = await refusal(server, shown)
    assert (status, problem["code"], found) == (401, "Unauthorized", challenge)
    assert words in problem["detail"]


async def test_the_right_id_with_another_secret_is_no_key_of_this_server(server: Asking) -> None:
    made = await server.make()
    whole = made["key"]
    twin = (await server.make())["key"]
    wrong = [whole[:-1], whole + "x", whole[:12], whole.upper(), whole[:12] + twin[12:], whole + "\0", f"x{whole}"]
    told = {json.dumps((await refusal(server, f"Bearer {each}"))[1]) for each in wrong if each.isprintable()}
    unknown = json.dumps((await refusal(server, "Bearer hg_00000000_x"))[1])
    assert told == {unknown}


async def test_only_who_shows_the_whole_of_an_ended_key_hears_that_it_ended(server: Asking) -> None:
    made = await server.make(name="old ci", expires_in_days=1)
    store = server.running.relay._store
    (kept,) = await store.find_keys()
    await store.save_key(replace(kept, expires_at=1_000_000_000))
    async with asyncio.timeout(PATIENCE_S):
        while (await server.ask("GET", "/v1/keys/self", key=made["key"]))[0] == 200:
            pass
    status, problem, challenge = await refusal(server, f"Bearer {made['key']}")
    assert (status, problem["code"], challenge) == (401, "ExpiredKey", 'Bearer error="invalid_token"')
    assert f"The API key {made['id']} (old ci) ended at 2001-09-09T01:46:40Z" in problem["detail"]
    for part in (made["key"][:-1], f"hg_{made['id']}_", f"hg_{made['id']}_x"):
        _, problem, _ = await refusal(server, f"Bearer {part}")
        assert problem["code"] == "Unauthorized"
        assert "ended" not in problem["detail"]
    assert await server.ids() == [made["id"]]


async def test_a_missing_scope_is_named(server: Asking) -> None:
    made = await server.make(scopes=["send", "read"])
    status, problem = await server.ask("GET", "/v1/apps", key=made["key"])
    assert (status, problem["code"]) == (403, "MissingScope")
    assert problem["detail"] == "This takes an API key with the scope manage: yours has read, send."


@pytest.mark.parametrize("scope", list(Scope))
async def test_each_path_takes_its_scopes_only(server: Asking, scope: Scope) -> None:
    key = (await server.make(scopes=[scope]))["key"]
    allowed = {
        ("POST", "/v1/notifications"): {SEND},
        ("GET", "/v1/notifications"): {READ},
        ("GET", "/v1/notifications/x"): {SEND, READ},
        ("DELETE", "/v1/notifications/x"): {SEND},
        ("POST", "/v1/notifications/cancel"): {SEND},
        ("GET", "/v1/buried"): {READ},
        ("POST", "/v1/buried/replay"): {MANAGE},
        ("GET", "/v1/apps"): {MANAGE},
        ("GET", "/v1/apps/x"): {MANAGE},
        ("PUT", "/v1/apps/x"): {MANAGE},
        ("DELETE", "/v1/apps/x"): {MANAGE},
        ("POST", "/v1/apps/x/credentials"): {MANAGE},
        ("DELETE", "/v1/apps/x/credentials/y"): {MANAGE},
        ("GET", "/v1/keys"): {MANAGE},
        ("POST", "/v1/keys"): {MANAGE},
        ("GET", "/v1/keys/x"): {MANAGE},
        ("DELETE", "/v1/keys/x"): {MANAGE},
        ("GET", "/v1/keys/self"): {SEND, READ, MANAGE},
    }
    for (method, path), scopes in allowed.items():
        status, body = await server.ask(method, path, {} if method in ("POST", "PUT") else None, key=key)
        assert (status == 403) == (scope not in scopes), (method, path, body)


# -- attacks ---------------------------------------------------------------------------------------------------------


class Siege:
    """A server with the apps `shop` and `shop2`, and who has a key with all scopes for `shop` only."""

    def __init__(self, server: Asking, keys: dict[str, dict[str, Any]], buried: Sequence[str]) -> None:
        self.server = server
        self.keys = keys
        """`shop`, `shop2`, `both` (apps) and `all`, which may do everything; `mine` attacks."""
        self.buried = buried
        """Of `shop`, of `shop2`."""

    async def attack(self, method: str, path: str, content: Any = None) -> tuple[int, Any]:
        """No answer may tell of the other app, but for the words that were asked with."""
        status, body = await self.server.ask(method, path, content, key=self.keys["mine"]["key"])
        text = json.dumps(body)
        asked = f"{unquote(path)} {json.dumps(content)}"
        for secret in (
            "shop2",
            TOPICS["shop2"],
            self.buried[1],
            *(self.keys[name]["id"] for name in ("shop2", "both", "all")),
        ):
            assert secret in asked or secret not in text, body
        return status, body

    async def is_whole(self) -> bool:
        """All that is not the attacker's is as it was."""
        ask = self.server.ask
        apps = {each["name"]: each["topics"] for each in (await ask("GET", "/v1/apps"))[1]["apps"]}
        assert {name: [topic] for name, topic in TOPICS.items()} == apps
        _, found = await ask("GET", "/v1/buried")
        assert [each["id"] for each in found["buried"] if each["app"] == "shop2"] == [self.buried[1]]
        assert {each["id"] for each in self.keys.values()} <= set(await self.server.ids())
        return True


@pytest.fixture
async def siege(tmp_path: Path, apple: Simulator) -> AsyncIterator[Siege]:
    (tmp_path / "data").mkdir(mode=0o700)
    buried = await bury(tmp_path, "shop", "shop2")
    async with asking(tmp_path) as server:
        for name, topic in TOPICS.items():
            assert (await server.ask("PUT", f"/v1/apps/{name}", app_for(apple, topic)))[0] == 201
        every = list(Scope)
        keys = {
            name: await server.make(name=f"of {name}", scopes=every, apps=apps)
            for name, apps in {
                "shop": ["shop"], "shop2": ["shop2"], "both": ["shop2", "shop"], "all": None, "mine": ["shop"]
            }.items()
        }  # fmt: skip
        yield Siege(server, keys, buried)


@pytest.mark.parametrize("name", ["shop2", "nothing-like-it", "SHOP2", "shop2%00", "%73hop2"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_other_apps_are_refused_whether_there_are_such_or_not(
    siege: Siege, apple: Simulator, method: str, name: str
) -> None:
    content = app_for(apple, "com.evil") if method == "PUT" else None
    status, problem = await siege.attack(method, f"/v1/apps/{name}", content)
    assert (status, problem["code"]) == (403, "AppNotAllowed")
    assert await siege.is_whole()


@pytest.mark.parametrize("name", ["shop2", "nothing-like-it"])
async def test_credentials_of_other_apps_are_neither_added_nor_removed(
    siege: Siege, apple: Simulator, name: str
) -> None:
    key = apple.signing_key
    content = {"key": key.pem.decode(), "key_id": "EVILEVILEV", "team_id": key.team_id}
    attacks: tuple[tuple[str, str, Any], ...] = (
        ("POST", f"?replace={key.key_id}", content),
        ("POST", "", {}),
        ("DELETE", f"/{key.key_id}", None),
    )
    for method, rest, body in attacks:
        status, problem = await siege.attack(method, f"/v1/apps/{name}/credentials{rest}", body)
        assert (status, problem["code"]) == (403, "AppNotAllowed")
    assert await siege.is_whole()
    _, shown = await siege.server.ask("GET", "/v1/apps/shop2")
    assert [each["id"] for each in shown["credentials"]] == [key.key_id]


async def test_a_list_of_apps_holds_the_key_s_own(siege: Siege) -> None:
    status, found = await siege.attack("GET", "/v1/apps")
    assert (status, [each["name"] for each in found["apps"]]) == (200, ["shop"])


async def test_the_key_s_own_app_can_be_managed_and_its_absence_names_no_other(siege: Siege, apple: Simulator) -> None:
    assert (await siege.attack("DELETE", "/v1/apps/shop"))[0] == 200
    status, problem = await siege.attack("GET", "/v1/apps/shop")
    assert (status, problem["detail"]) == (404, "There is no app 'shop'. Known apps: none.")
    for content in ({"app": "shop", "token": token(1), "title": "x"}, {"token": token(1), "title": "x"}):
        status, problem = await siege.attack("POST", "/v1/notifications", content)
        assert status == 400
    assert problem["detail"].startswith("There is none yet of the apps that this API key is for: add an [apps.NAME]")
    for path in ("/v1/notifications", "/v1/buried"):
        assert (await siege.attack("GET", f"{path}?app=shop"))[0] in (200, 400)
    status, problem = await siege.attack("POST", "/v1/keys", {"name": "x", "apps": ["shop"]})
    assert (status, problem["code"]) == (400, "UnknownApp")
    assert (await siege.attack("PUT", "/v1/apps/shop", app_for(apple, TOPICS["shop"])))[0] == 201
    assert await siege.is_whole()


@pytest.mark.parametrize("app", ["shop2", "nothing-like-it", "", "shop,shop2", "*"])
async def test_nothing_is_sent_for_other_apps(siege: Siege, apple: Simulator, app: str) -> None:
    content = {"app": app, "token": token(1), "title": "x"}
    status, problem = await siege.attack("POST", "/v1/notifications", content)
    assert (status, problem["code"]) == (403, "AppNotAllowed")
    status, problem = await siege.attack(
        "POST", "/v1/notifications", {**content, "app": None, "topic": TOPICS["shop2"]}
    )
    assert (status, problem["code"]) == (400, "TopicDisallowed")
    assert list(apple.received) == []


async def test_what_became_of_other_apps_notifications_is_not_told(siege: Siege) -> None:
    taken = (
        await siege.server.ask(
            "POST", "/v1/notifications", {"app": "shop2", "token": token(1), "title": "x", "wait": 9}
        )
    )[1]["id"]
    never = taken[:-4] + "0002"
    told = []
    for each in (taken, siege.buried[1], never):
        status, problem = await siege.attack("GET", f"/v1/notifications/{each}")
        told.append((status, problem["code"], problem["detail"]))
    assert set(told) == {(404, "UnknownNotification", told[0][2])}
    assert (await siege.attack("GET", f"/v1/notifications/{siege.buried[0]}"))[0] == 200


async def test_the_buried_of_other_apps_are_not_listed(siege: Siege) -> None:
    for query in ("", "?limit=1", "?limit=1000", f"?before={siege.buried[1]}", "?app=shop&app=", "?app="):
        status, found = await siege.attack("GET", f"/v1/buried{query}")
        assert status >= 400 or {each["app"] for each in found["buried"]} <= {"shop"}
    for query in ("?app=shop2", "?app=shop&app=shop2", "?app=nothing-like-it"):
        status, found = await siege.attack("GET", f"/v1/buried{query}")
        assert status >= 400 or found["buried"] == []
    assert [each["id"] for each in (await siege.attack("GET", "/v1/buried"))[1]["buried"]] == [siege.buried[0]]


async def test_notifications_of_other_apps_are_not_listed(siege: Siege) -> None:
    for query in (
        "",
        "?limit=1000",
        "?state=buried",
        f"?before={siege.buried[1]}",
        "?app=shop2",
        "?app=shop&app=shop2",
        f"?cursor={siege.buried[1]}",
    ):
        status, found = await siege.attack("GET", f"/v1/notifications{query}")
        assert status >= 400 or {each["app"] for each in found["notifications"]} <= {"shop"}


async def test_the_buried_of_other_apps_are_not_replayed(siege: Siege) -> None:
    for ids in ([siege.buried[1]], [siege.buried[1].upper()], [siege.buried[1], siege.buried[1]]):
        status, replayed = await siege.attack("POST", "/v1/buried/replay", {"ids": ids})
        assert status >= 400 or replayed["replayed"] == []
        assert await siege.is_whole()
    asked = [siege.buried[0].upper(), siege.buried[1]]
    status, replayed = await siege.attack("POST", "/v1/buried/replay", {"ids": asked})
    assert status >= 400 or replayed["replayed"] == asked[:1]
    assert await siege.is_whole()


async def test_notifications_of_other_apps_are_not_cancelled(siege: Siege) -> None:
    assert (await siege.server.ask("DELETE", "/v1/apps/shop2"))[0] == 200  # so that it waits
    batch = a_batch(app="shop2", created_at=time.time())
    await siege.server.running.relay._queue.put([batch])
    waiting = f"{batch.id}0001"
    never = f"{batch.id}0002"
    told = [await siege.attack("DELETE", f"/v1/notifications/{each}") for each in (waiting, never)]
    assert [(status, problem["code"]) for status, problem in told] == [(404, "UnknownNotification")] * 2
    assert told[0] == told[1]
    asked = [waiting, waiting.upper(), never]
    status, found = await siege.attack("POST", "/v1/notifications/cancel", {"ids": asked})
    assert (status, found) == (200, {"cancelled": [], "cancelling": [], "too_late": [], "unknown": asked})
    _, receipt = await siege.server.ask("GET", f"/v1/notifications/{waiting}")
    assert (receipt["state"], receipt["cancelling"]) == ("queued", False)


async def test_a_word_for_a_request_that_another_key_said_tells_nothing_of_it(siege: Siege) -> None:
    content = {"app": "shop", "token": token(1), "title": "x"}
    answers = []
    for name in ("shop2", "mine", "all"):
        other = {**content, "app": "shop2"} if name == "shop2" else content
        headers = {"authorization": f"Bearer {siege.keys[name]['key']}", "idempotency-key": "order-7"}
        url = f"{siege.server.running.url}/v1/notifications"
        async with siege.server._session.post(url, data=json.dumps(other), headers=headers) as response:
            answers.append((response.status, await response.json(content_type=None)))
    assert [status for status, _ in answers] == [202] * 3, answers
    assert len({body["id"] for _, body in answers}) == 3


async def test_no_key_is_made_for_more_apps_than_ones_own(siege: Siege) -> None:
    for apps in (["shop2"], ["shop", "shop2"], ["nothing-like-it"], ["shop", "Shop2"], [""], ["*"]):
        status, problem = await siege.attack("POST", "/v1/keys", {"name": "x", "apps": apps})
        assert (status, problem["code"]) == (403, "AppNotAllowed"), apps
    for own in (None, ["shop"], ["shop", "shop"]):
        status, made = await siege.attack("POST", "/v1/keys", {"name": "x", "apps": own})
        assert (status, made["apps"]) == (201, ["shop"])


async def test_no_key_is_made_with_more_scopes_than_ones_own(server: Asking) -> None:
    manager = (await server.make(scopes=["manage"]))["key"]
    for scopes in (None, ["send"], ["manage", "read"], ["send", "read", "manage"]):
        status, problem = await server.ask("POST", "/v1/keys", {"name": "x", "scopes": scopes}, key=manager)
        assert (status, problem["code"]) == (403, "MissingScope")
        assert "A key can pass on only what it has: yours has manage, not" in problem["detail"]
    assert (await server.make(manager, scopes=["manage"]))["scopes"] == ["manage"]
    assert len(await server.ids()) == 2


async def test_no_key_is_made_that_outlives_ones_own(server: Asking) -> None:
    manager = await server.make(scopes=["manage"], expires_in_days=1)
    later = {"expires_in_days": 1.1}, {"expires_at": "2099-01-01T00:00:00Z"}
    for content in later:
        asked = {"name": "x", "scopes": ["manage"], **content}
        assert await server.code("POST", "/v1/keys", asked, key=manager["key"]) == (403, "OutlivesYourKey")
    for content in ({}, {"expires_at": manager["expires_at"]}):
        made = await server.make(manager["key"], scopes=["manage"], **content)
        assert made["expires_at"] == manager["expires_at"]


async def test_keys_for_other_apps_are_neither_seen_nor_removed(siege: Siege) -> None:
    keys = siege.keys
    assert await siege.server.ids(keys["mine"]["key"]) == [keys["shop"]["id"], keys["mine"]["id"]]
    for name in ("shop2", "both", "all"):
        for method in ("GET", "DELETE"):
            status, problem = await siege.attack(method, f"/v1/keys/{keys[name]['id']}")
            assert (status, problem["code"]) == (404, "UnknownKey")
    assert await siege.is_whole()
    assert (await siege.attack("DELETE", f"/v1/keys/{keys['shop']['id']}"))[0] == 200
    assert (await siege.attack("DELETE", f"/v1/keys/{keys['mine']['id']}"))[0] == 200
    assert (await siege.attack("GET", "/v1/keys/self"))[0] == 401


async def test_the_state_of_other_apps_is_not_told(siege: Siege) -> None:
    for app in TOPICS:
        await siege.server.ask("POST", "/v1/notifications", {"app": app, "token": token(1), "title": "x", "wait": 9})
        assert (await siege.server.ask("DELETE", f"/v1/apps/{app}"))[0] == 200
    for path in ("/healthz", "/livez"):
        await siege.attack("GET", path)


async def test_no_secret_is_in_a_log_an_error_or_a_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with asking(tmp_path) as server:
        made = await server.make(name="ci")
        key = made["key"]
        told = [
            str(await server.ask("GET", path, key=key)) for path in ("/v1/keys/self", "/v1/keys", f"/v1/keys/{key}")
        ]
        told += [str(await server.ask("DELETE", f"/v1/keys/{made['id']}", key=key))]
        told += [str(await server.ask("DELETE", f"/v1/keys/{made['id']}"))]
        told += [str(await server.ask("GET", "/v1/keys/self", key=key)), str(await refusal(server, key))]
        own = server.running.key
        told += [
            repr(server.running),
            str(await refusal(server, own[:-1])),
            str(await refusal(server, f"Bearer {own}x")),
        ]
    said = "".join(told) + caplog.text + "".join(capfd.readouterr())
    assert "key_added" in said
    assert made["id"] in said
    secret = key[12:]
    assert [word for word in (secret, own) if word in said] == []
    assert not any(secret.encode() in file.read_bytes() for file in (tmp_path / "data").iterdir())


# -- the ring by itself ----------------------------------------------------------------------------------------------


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(tmp_path / DATABASE)
    try:
        yield store
    finally:
        await store.aclose()


OWN = b"hg_the_key_of_the_server"


async def test_a_key_opens_until_its_last_second(store: SqliteStore) -> None:
    clock = Clock()
    ring = Keyring(OWN, store, clock=clock)
    key, whole = await ring.make("ci", [SEND], ["shop"], clock() + 10)
    clock.advance(9.9)
    assert ring.find(whole.encode()) == Caller(key.id, frozenset({SEND}), frozenset({"shop"}), key.expires_at)
    assert ring.find_ended(whole.encode()) is None
    clock.advance(0.1)
    assert ring.find(whole.encode()) is None
    assert ring.find_ended(whole.encode()) == key
    assert ring.find_ended(whole[:-1].encode()) is None
    assert ring.find_ended(OWN) is None


async def test_the_server_s_own_key_may_look_like_any_other(store: SqliteStore) -> None:
    ring = Keyring(OWN, store, clock=time.time)
    key, _ = await ring.make("ci", [SEND], None)
    for own in (OWN, f"hg_{key.id}_of_the_server".encode()):
        caller = Keyring(own, store, clock=time.time)
        await caller.load()
        assert caller.find(own) == Caller("", frozenset(Scope), None)


class Slow:
    """A store that changes at once, and is slow to tell what it has."""

    def __init__(self) -> None:
        self.keys: dict[str, ApiKey] = {}
        self.read = asyncio.Event()
        self.go_on = asyncio.Event()

    async def find_keys(self) -> Sequence[ApiKey]:
        found = list(self.keys.values())
        self.read.set()
        await self.go_on.wait()
        return found

    async def save_key(self, key: ApiKey) -> None:
        self.keys[key.id] = key

    async def delete_key(self, key_id: str) -> bool:
        return self.keys.pop(key_id, None) is not None


async def test_what_is_read_while_keys_change_brings_none_back_and_loses_none() -> None:
    slow = Slow()
    ring = Keyring(OWN, cast("Store", slow), clock=time.time)
    gone, whole = await ring.make("gone", [SEND], None)
    loading = asyncio.create_task(ring.load())
    await slow.read.wait()
    removing = asyncio.create_task(ring.remove(gone.id))
    making = asyncio.create_task(ring.make("new", [SEND], None))
    for _ in range(10):
        await asyncio.sleep(0)  # as far as they come
    slow.go_on.set()
    await loading
    assert await removing
    _, new = await making
    assert ring.find(whole.encode()) is None
    assert ring.find(new.encode()) is not None


async def test_keys_go_on_while_the_store_cannot_be_read(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / DATABASE)
    ring = Keyring(OWN, store, clock=time.time)
    key, whole = await ring.make("ci", [SEND], None)
    await store.aclose()
    await ring.look()
    with pytest.raises(StoreError):
        await ring.load()
    with pytest.raises(StoreError):
        await ring.remove(key.id)
    assert ring.find(whole.encode()) is not None


def damage(db: apsw.Connection, calls: Sequence[tuple[str, str]]) -> Sequence[None]:
    for call in calls:
        db.execute("UPDATE api_key SET scopes = ? WHERE id = ?", call)
    return [None] * len(calls)


async def test_a_damaged_key_opens_nothing_and_hurts_no_other(store: SqliteStore) -> None:
    ring = Keyring(OWN, store, clock=time.time)
    made = [await ring.make("ci", [SEND], ["shop"]) for _ in range(3)]
    for (key, _), scopes in zip(made, ('{"scopes": 1}', '["root"]'), strict=False):
        await store._writer.run(damage, (scopes, key.id))
    await ring.load()
    assert [ring.find(whole.encode()) is not None for _, whole in made] == [False, False, True]


# -- the command line ------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """What a program said, and how it ended."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def command(server: Asking, tmp_path: Path) -> Callable[..., Awaitable[Said]]:
    """Runs `heliograph keys ...` against the server."""

    async def run(*arguments: str) -> Said:
        ours = {"HELIOGRAPH_URL": server.running.url, "HELIOGRAPH_KEY": server.running.key}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "heliograph", "keys", *arguments),
            cwd=tmp_path,
            env={**{name: value for name, value in os.environ.items() if not name.startswith("HELIOGRAPH_")}, **ours},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(PATIENCE_S):
            stdout, stderr = await process.communicate()
        return Said(process.returncode or 0, stdout.decode(), stderr.decode())

    return run


async def test_a_key_is_made_shown_listed_and_removed_by_command(
    server: Asking, command: Callable[..., Awaitable[Said]]
) -> None:
    made = await command("add", "ci", "--scope", "send", "--scope", "read", "--expires-in", "30")
    key = made.stdout.strip()
    status, own = await server.ask("GET", "/v1/keys/self", key=key)
    assert (status, own["scopes"], own["apps"]) == (200, ["send", "read"], None)
    assert made.stdout == f"{key}\n"
    assert f"The key {own['id']} (ci) may send, read for all apps, until {own['expires_at']}." in made.stderr
    assert key not in made.stderr
    listed = await command("list")
    assert listed.stdout == f"{own['id']}  ci  send, read  all apps  until {own['expires_at']}\n"
    assert json.loads((await command("show", own["id"], "--json")).stdout) == own
    assert "the server's own" in (await command("show", "self")).stdout
    assert (await command("remove", own["id"])).stdout == f"{own['id']} is removed.\n"
    assert (await server.ask("GET", "/v1/keys/self", key=key))[0] == 401
    assert (await command("list")).stdout == "There are no API keys but the server's own.\n"
    again = await command("remove", own["id"])
    assert (again.code, "There is no API key with this id here" in again.stderr) == (1, True)


async def test_a_key_goes_into_a_new_file_that_only_its_owner_can_read(
    server: Asking, command: Callable[..., Awaitable[Said]], tmp_path: Path
) -> None:
    out = tmp_path / "ci.key"
    shown = json.loads((await command("add", "ci", "--out", "ci.key", "--json")).stdout)
    assert "key" not in shown
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert (await server.ask("GET", "/v1/keys/self", key=out.read_text().strip()))[1] == shown
    assert (await command("show", "self", "--key-file", "ci.key", "--json")).stdout == f"{json.dumps(shown)}\n"
    again = await command("add", "ci", "--out", "ci.key")
    assert (again.code, "there is a file ci.key already: name a new one" in again.stderr) == (2, True)
    nowhere = await command("add", "ci", "--out", "no/such/folder")
    assert (nowhere.code, "cannot be written" in nowhere.stderr) == (2, True)
    refused = await command("add", "ci", "--app", "shop", "--out", "shop.key")
    assert (refused.code, "There is no app 'shop'" in refused.stderr) == (1, True)
    assert not (tmp_path / "shop.key").exists()
    assert len(await server.ids()) == 1
