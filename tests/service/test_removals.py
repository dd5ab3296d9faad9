"""Removals and registrations over HTTP: a cursor that consumes nothing, and device tokens that live again."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from heliograph.model import DeviceToken, Environment, Removal, Scope
from heliograph.simulator.server import Simulator
from tests.service.house import token
from tests.service.test_keys import TOPICS, Asking, app_for, asking

PATH = "/v1/removals"
REGISTRATIONS = "/v1/registrations"
NOW = int(time.time())


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator() as apple:
        for topic in TOPICS.values():
            apple.add_app(topic)
        yield apple


@pytest.fixture
async def server(tmp_path: Path, apple: Simulator) -> AsyncIterator[Asking]:
    """With the apps `shop` and `shop2`, which are sent to in both environments."""
    async with asking(tmp_path) as server:
        for name, topic in TOPICS.items():
            content = {**app_for(apple, topic), "environment": "both"}
            assert (await server.ask("PUT", f"/v1/apps/{name}", content))[0] == 201
        yield server


async def remove(
    server: Asking,
    *numbers: int,
    app: str = "shop",
    environment: Environment = Environment.PRODUCTION,
    since: int = NOW - 600,
) -> None:
    """As after a 410."""
    removals = [Removal(app, environment, DeviceToken(token(number)), since) for number in numbers]
    await server.running.relay._store.record([], removals)


async def read(server: Asking, query: str = "", *, key: str | None = None) -> tuple[list[int], str]:
    """Which are told, and where to go on."""
    status, found = await server.ask("GET", f"{PATH}?app=shop{query}", key=key)
    assert status == 200, found
    numbers = [each["number"] for each in found["removals"]]
    assert numbers == sorted(numbers)
    return [int(each["token"], 16) for each in found["removals"]], found["next"]


async def test_a_removal_is_told_with_its_time_and_its_number(server: Asking) -> None:
    await remove(server, 7)
    status, found = await server.ask("GET", f"{PATH}?app=shop")
    (told,) = found["removals"]
    assert (status, found["next"]) == (200, str(told["number"]))
    assert told == {
        "token": token(7),
        "app": "shop",
        "environment": "production",
        "since": datetime.fromtimestamp(NOW - 600, UTC).isoformat().replace("+00:00", "Z"),
        "number": told["number"],
    }


async def test_a_410_of_apple_is_told(server: Asking, apple: Simulator) -> None:
    apple.unregister(token(9), (NOW - 60) * 1000)
    content = {"app": "shop", "environment": "production", "token": token(9), "title": "x", "wait": 20}
    assert (await server.ask("POST", "/v1/notifications", content))[1]["reason"] == "Unregistered"
    assert (await read(server))[0] == [9]


async def test_reading_consumes_nothing_and_the_cursor_goes_on(server: Asking) -> None:
    assert await read(server) == ([], "0")
    await remove(server, *range(1, 6))
    first, cursor = await read(server, "&limit=2")
    assert len(first) == 2
    rest, end = await read(server, f"&after={cursor}")
    assert sorted(first + rest) == [1, 2, 3, 4, 5]
    assert await read(server, f"&after={end}") == ([], end)
    assert len((await read(server))[0]) == 5
    await remove(server, 6)
    assert (await read(server, f"&after={end}"))[0] == [6]


async def test_each_environment_and_each_app_is_told_by_itself(server: Asking) -> None:
    await remove(server, 1)
    await remove(server, 2, environment=Environment.DEVELOPMENT)
    await remove(server, 3, app="shop2")
    assert (await read(server))[0] == [1, 2]
    assert (await read(server, "&environment=development"))[0] == [2]


async def test_whether_one_device_token_is_dead_is_told_by_itself(server: Asking) -> None:
    await remove(server, 1, 2)
    await remove(server, 1, environment=Environment.DEVELOPMENT)
    await remove(server, 1, app="shop2")
    assert (await read(server, f"&token={token(1).upper()}"))[0] == [1, 1]
    assert (await read(server, f"&token={token(1)}&environment=development"))[0] == [1]
    assert await read(server, f"&token={token(3)}") == ([], "0")


@pytest.mark.parametrize(
    "query, code, words",
    [
        ("", "MissingApp", "there are shop, shop2"),
        ("?app=nope", "UnknownApp", "Known apps: shop, shop2"),
        ("?app=shop&after=", "BadParameter", "after is empty"),
        ("?app=shop&after=x", "BadParameter", "what the former answer gave in next"),
        ("?app=shop&after=-1", "BadParameter", "what the former answer gave in next"),
        ("?app=shop&after=" + "9" * 19, "BadParameter", "what the former answer gave in next"),
        ("?app=shop&limit=0", "BadParameter", "from 1 to 1000"),
        ("?app=shop&environment=sandbox", "BadParameter", "There is no environment 'sandbox'"),
        ("?app=shop&cursor=1", "UnknownParameter", "There may be app, environment, token, after, limit"),
        ("?app=shop&token=xyz", "BadDeviceToken", "hex"),
    ],
)
async def test_a_query_that_cannot_be_is_refused(server: Asking, query: str, code: str, words: str) -> None:
    status, problem = await server.ask("GET", PATH + query)
    assert (status, problem["code"]) == (400, code)
    assert words in problem["detail"]
    assert await read(server, "&after=" + "9" * 18) == ([], "9" * 18)


# -- registrations ---------------------------------------------------------------------------------------------------


async def register(server: Asking, **content: Any) -> int:
    status, found = await server.ask("POST", REGISTRATIONS, {"app": "shop", **content})
    assert status == 200, found
    return int(found["revived"])


async def sends(server: Asking, number: int) -> str:
    """What comes of a notification: `202`, or why it is refused."""
    content = {"app": "shop", "environment": "production", "token": token(number), "title": "x"}
    status, answer = await server.ask("POST", "/v1/notifications", content)
    return str(answer.get("code", status))


async def test_a_registered_device_token_is_sent_to_again_and_told_no_more(server: Asking) -> None:
    await remove(server, 1, 2)
    assert await sends(server, 1) == "Unregistered"
    assert await register(server, tokens=[token(1).upper(), token(3)]) == 1
    assert await sends(server, 1) == "202"
    assert await sends(server, 2) == "Unregistered"
    assert (await read(server))[0] == [2]
    assert await register(server, tokens=[token(1)]) == 0


async def test_a_registration_of_before_apple_s_word_changes_nothing(server: Asking) -> None:
    await remove(server, 1)
    before, after = (datetime.fromtimestamp(NOW - 600 + shift, UTC) for shift in (-1, 1))
    assert await register(server, tokens=[token(1)], at=before.isoformat()) == 0
    assert await sends(server, 1) == "Unregistered"
    assert await register(server, tokens=[token(1)], at=after.isoformat()) == 1


async def test_what_apple_says_late_of_the_time_before_a_registration_changes_nothing(
    server: Asking, apple: Simulator
) -> None:
    assert await register(server, tokens=[token(9)]) == 0
    apple.unregister(token(9), (NOW - 60) * 1000)
    content = {"app": "shop", "environment": "production", "token": token(9), "title": "x", "wait": 20}
    assert (await server.ask("POST", "/v1/notifications", content))[1]["reason"] == "Unregistered"
    assert (await read(server))[0] == []
    assert await sends(server, 9) == "202"


async def test_without_an_environment_each_of_the_app_s_is_meant(server: Asking) -> None:
    await remove(server, 1)
    await remove(server, 2, environment=Environment.DEVELOPMENT)
    await remove(server, 1, app="shop2")
    assert await register(server, tokens=[token(1), token(2)], environment="production") == 1
    assert await register(server, tokens=[token(1), token(2)]) == 1
    assert (await read(server))[0] == []
    _, found = await server.ask("GET", f"{PATH}?app=shop2")
    assert len(found["removals"]) == 1


@pytest.mark.parametrize(
    "content, status, code, words",
    [
        (b"{", 400, "InvalidJson", "send a JSON object"),
        ({}, 400, "BadType", "tokens"),
        ({"tokens": []}, 400, "BadRegistration", "tokens is empty"),
        ({"tokens": token(1)}, 400, "BadType", "tokens: expected array"),
        ({"tokens": [token(1), "<4f1c ab8d>"]}, 400, "BadDeviceToken", "token"),
        ({"tokens": [""]}, 400, "MissingDeviceToken", "no device token"),
        ({"tokens": [token(1)] * 1001}, 413, "TooManyNotifications", "1000 device tokens at most: these are 1001"),
        ({"tokens": [token(1)], "at": "tomorrow"}, 400, "BadType", "at must be a time with its offset"),
        ({"tokens": [token(1)], "at": 1795262400}, 400, "BadType", "at must be a time with its offset"),
        ({"tokens": [token(1)], "at": "2026-11-21T12:00:00"}, 400, "BadType", "at must be a time with its offset"),
        ({"tokens": [token(1)], "at": "9999-12-31T23:59:59Z"}, 400, "BadRegistration", "at is in the future"),
        ({"tokens": [token(1)], "app": "nope"}, 400, "UnknownApp", "Known apps: shop, shop2"),
        ({"tokens": [token(1)], "app": None}, 400, "MissingApp", "there are shop, shop2"),
        ({"tokens": [token(1)], "environment": "sandbox"}, 400, "BadEnvironment", "called development here"),
        ({"token": token(1)}, 400, "UnknownField", "Did you mean tokens?"),
    ],
)
async def test_a_registration_that_cannot_be_is_refused_and_revives_nothing(
    server: Asking, content: Any, status: int, code: str, words: str
) -> None:
    await remove(server, 1)
    body = {"app": "shop", **content} if isinstance(content, dict) else content
    found, problem = await server.ask("POST", REGISTRATIONS, body)
    assert (found, problem["code"]) == (status, code), problem
    assert words in problem["detail"]
    assert (await read(server))[0] == [1]


async def test_the_clock_of_a_caller_may_be_a_little_fast(server: Asking) -> None:
    await remove(server, 1)
    soon = datetime.now(UTC) + timedelta(seconds=20)
    assert await register(server, tokens=[token(1)], at=soon.isoformat()) == 1


# -- whose they are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", list(Scope))
async def test_reading_takes_the_scope_read_and_registering_the_scope_send(server: Asking, scope: Scope) -> None:
    key = (await server.make(scopes=[scope]))["key"]
    status, _ = await server.ask("GET", f"{PATH}?app=shop", key=key)
    assert (status == 403) == (scope is not Scope.READ)
    status, _ = await server.ask("POST", REGISTRATIONS, {"app": "shop", "tokens": [token(1)]}, key=key)
    assert (status == 403) == (scope is not Scope.SEND)


async def test_a_key_for_some_apps_reads_and_revives_nothing_of_others(server: Asking) -> None:
    await remove(server, 1)
    await remove(server, 1, app="shop2")
    key = (await server.make(scopes=list(Scope), apps=["shop"]))["key"]
    for app in ("shop2", "nope"):
        assert await server.code("GET", f"{PATH}?app={app}", key=key) == (403, "AppNotAllowed")
        wrong = {"app": app, "tokens": [token(1)]}
        assert await server.code("POST", REGISTRATIONS, wrong, key=key) == (403, "AppNotAllowed")
    status, found = await server.ask("GET", PATH, key=key)
    assert (status, [each["app"] for each in found["removals"]]) == (200, ["shop"])
    assert await server.ask("POST", REGISTRATIONS, {"tokens": [token(1)]}, key=key) == (200, {"revived": 1})
    _, found = await server.ask("GET", f"{PATH}?app=shop2")
    assert len(found["removals"]) == 1
