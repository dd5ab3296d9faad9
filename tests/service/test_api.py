"""The HTTP API over real sockets: uvicorn, SQLite, the wire and the simulator behind it."""

from __future__ import annotations

import asyncio
import json
import stat
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliograph import service
from heliograph.config import ApiSettings, AppSettings, Config, Environments
from heliograph.doors import api, columns, decoding, exchange, notifications, receipts
from heliograph.doors.api import Api, Route
from heliograph.doors.operations import Operations
from heliograph.doors.web import make_app
from heliograph.errors import ConfigError, Refused
from heliograph.keys import Keyring
from heliograph.model import Detail, Environment, Headers, LeaseEnd, Outcomes, Receipt, Scope, State
from heliograph.net.asgi import Server
from heliograph.relay import Relay
from heliograph.service import Running, serving
from heliograph.simulator.server import Simulator
from heliograph.stores.sqlite import SqliteStore
from heliograph.telemetry import Telemetry
from tests.service.house import PATIENCE_S, House, open_house, token

TOPIC = "com.example.app"
PATH = "/v1/notifications"
KEY = "hg_key_of_a_bare_door"
ANYBODY = frozenset(Scope)


Reply = tuple[int, Any, aiohttp.ClientResponse]


class Caller:
    """Speaks to the API as its users do."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def post(self, content: Any, *, query: str = "", headers: dict[str, str] | None = None) -> Reply:
        """`content` is sent as it is where it is bytes, as JSON otherwise."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return await self.ask("POST", PATH + query, body, headers)

    async def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        async with self._session.request(method, self._url + path, data=body, headers=headers) as response:
            text = await response.read()
            return response.status, json.loads(text) if text and "json" in response.content_type else text, response

    async def send(self, content: Any) -> Any:
        """What was taken, as the 202 says."""
        status, body, _ = await self.post(content)
        assert status == 202, body
        return body

    async def complaint(self, content: Any, *, query: str = "") -> dict[str, Any]:
        """The problem with it. The form of problems is checked here."""
        status, body, response = await self.post(content, query=query)
        assert 400 <= status < 500, body
        assert response.content_type == "application/problem+json"
        assert body["status"] == status
        assert body["type"].startswith("/docs/errors#")
        assert body["title"]
        assert body["detail"][-1] in ".?"
        found: dict[str, Any] = body
        return found


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator(keep=20_000) as apple:
        apple.add_app(TOPIC)
        yield apple


def settings_for(folder: Path, apple: Simulator, *apps: str, port: int | None = None) -> Config:
    key = folder / f"AuthKey_{apple.signing_key.key_id}.p8"
    key.touch(0o600)
    key.write_bytes(apple.signing_key.pem)
    (folder / "ca.pem").write_bytes(apple.ca_pem)
    app = AppSettings(
        key=f"file:{key}",
        team_id=apple.signing_key.team_id,
        topic=TOPIC,
        host="localhost",
        port=port or apple.port,
        ca=str(folder / "ca.pem"),
    )
    return Config(data=str(folder / "data"), api=ApiSettings(port=0), apps=dict.fromkeys(apps or ("shop",), app))


@asynccontextmanager
async def calling(running: Running) -> AsyncIterator[Caller]:
    headers = {"authorization": f"Bearer {running.key}"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(PATIENCE_S)) as session:
        yield Caller(session, running.url)


@pytest.fixture
async def running(tmp_path: Path, apple: Simulator) -> AsyncIterator[Running]:
    async with serving(settings_for(tmp_path, apple)) as running:
        yield running


@pytest.fixture
async def caller(running: Running) -> AsyncIterator[Caller]:
    async with calling(running) as caller:
        yield caller


async def outcome(running: Running, notification_id: str) -> Receipt:
    receipt = await running.relay.receipt(notification_id, PATIENCE_S)
    assert receipt is not None
    assert receipt.state is not State.QUEUED
    return receipt


# -- what is taken ---------------------------------------------------------------------------------------------------


async def test_one_notification_is_taken_sent_and_told_of(running: Running, caller: Caller, apple: Simulator) -> None:
    status, taken, response = await caller.post({"app": "shop", "token": token(1), "title": "Tea", "body": "is ready"})
    assert status == 202
    assert taken == {"id": taken["id"], "receipt": f"{PATH}/{taken['id']}"}
    assert response.headers["location"] == taken["receipt"]
    await outcome(running, taken["id"])

    status, receipt, _ = await caller.ask("GET", taken["receipt"])
    assert status == 200
    assert {name: receipt[name] for name in ("id", "app", "state", "reason", "status", "attempts")} == {
        "id": taken["id"],
        "app": "shop",
        "state": "accepted",
        "reason": None,
        "status": 200,
        "attempts": 1,
    }
    assert receipt["meaning"].startswith("Apple took it.")
    created, updated = (datetime.fromisoformat(receipt[name]) for name in ("created_at", "updated_at"))
    assert created.utcoffset() == updated - updated  # UTC
    assert created <= updated
    assert receipt["created_at"].endswith("Z")
    (received,) = apple.received
    assert received.id == taken["id"]
    assert json.loads(received.payload) == {"aps": {"alert": {"title": "Tea", "body": "is ready"}}}


async def test_a_payload_arrives_octet_by_octet_as_the_caller_wrote_it(caller: Caller, apple: Simulator) -> None:
    payload = '{ "aps" : {"alert":"caf\\u00e9 ☕"},  "n": 1.10e+2, "big": 123456789012345678901234567890 }'.encode()
    body = b'{"token": "%s", "payload": %s, "wait": 20}' % (token(1).encode(), payload)
    status, receipt, _ = await caller.post(body)
    assert (status, receipt["state"]) == (200, "accepted")
    assert apple.received[0].payload == payload


async def test_data_beside_friendly_fields_keeps_its_numbers(caller: Caller, apple: Simulator) -> None:
    body = b'{"token": "%s", "title": "x", "badge": 0, "data": {"price": 1.10, "n": [1e2]}, "wait": 20}'
    assert (await caller.post(body % token(1).encode()))[1]["state"] == "accepted"
    assert apple.received[0].payload == b'{"aps":{"alert":{"title":"x"},"badge":0},"price":1.10,"n":[1e2]}'


async def test_every_friendly_field_and_header_reaches_apple(caller: Caller, apple: Simulator) -> None:
    status, _, _ = await caller.post(
        {
            "token": token(1),
            "title": "a",
            "subtitle": "b",
            "body": "c",
            "badge": 3,
            "sound": "bell.caf",
            "thread_id": "d",
            "category": "e",
            "content_available": True,
            "mutable_content": True,
            "interruption_level": "passive",
            "relevance_score": 0.5,
            "topic": TOPIC,
            "environment": "production",
            "priority": 5,
            "expiration": int(time.time()) + 3600,
            "collapse_id": "tea",
        },
        query="?wait=20",
    )
    assert status == 200
    (received,) = apple.received
    assert received.collapse_id == "tea"
    assert json.loads(received.payload)["aps"] == {
        "alert": {"title": "a", "subtitle": "b", "body": "c"},
        "badge": 3,
        "sound": "bell.caf",
        "thread-id": "d",
        "category": "e",
        "content-available": 1,
        "mutable-content": 1,
        "interruption-level": "passive",
        "relevance-score": 0.5,
    }


def read(content: Any) -> columns.Columns:
    """A body as columns."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return columns.read(body).columns


def test_texts_may_be_looked_up_and_sounds_be_critical() -> None:
    columns = read(
        {
            "token": token(1),
            "title": {"loc_key": "SENT", "loc_args": ["Ada"]},
            "body": "x",
            "launch_image": "l.png",
            "action": "View",
            "sound": {"name": "alarm.caf", "volume": 0.5},
            "target_content_id": "w",
            "filter_criteria": "f",
            "url_args": ["a"],
        }
    )
    assert json.loads(columns.payloads[0])["aps"] == {
        "alert": {
            "title-loc-key": "SENT",
            "title-loc-args": ["Ada"],
            "body": "x",
            "launch-image": "l.png",
            "action": "View",
        },
        "sound": {"critical": 1, "name": "alarm.caf", "volume": 0.5},
        "target-content-id": "w",
        "filter-criteria": "f",
        "url-args": ["a"],
    }


def test_what_a_live_activity_shows_keeps_its_numbers() -> None:
    columns = read(
        b'{"token": "ab", "push_type": "liveactivity", "live_activity": {"event": "start", "timestamp": 1700000000,'
        b' "content_state": {"price": 1.10}, "attributes_type": "Match", "attributes": {"n": [1e2]},'
        b' "input_push_token": true}, "title": {"loc_key": "K"}, "relevance_score": 50}'
    )
    assert columns.payloads[0] == (
        b'{"aps":{"alert":{"title":{"loc-key":"K"}},"relevance-score":50.0,"timestamp":1700000000,"event":"start",'
        b'"content-state":{"price":1.10},"attributes-type":"Match","attributes":{"n":[1e2]},"input-push-token":1}}'
    )


def test_widgets_are_told_that_their_content_changed() -> None:
    columns = read({"token": token(1), "push_type": "widgets", "content_changed": True})
    assert columns.payloads == (b'{"aps":{"content-changed":true}}',)


@pytest.mark.parametrize(
    "own,common,expected",
    [
        ({}, {}, Headers("")),
        ({"at_most_once": True}, {}, Headers("", at_most_once=True)),
        ({}, {"at_most_once": True}, Headers("", at_most_once=True)),
        ({"at_most_once": False}, {"at_most_once": True}, Headers("")),
        ({"collapse": False}, {}, Headers("", collapse_on_id=False)),
        ({}, {"collapse": False}, Headers("", collapse_on_id=False)),
        ({"collapse": True}, {"collapse": False}, Headers("", collapse_on_id=True)),
        ({"collapse_id": "x"}, {"collapse": True}, Headers("", collapse_id="x")),
    ],
)
def test_at_most_once_and_collapse_are_said_for_all_or_for_one(own: Any, common: Any, expected: Headers) -> None:
    columns = read({"title": "x", "notifications": [{"token": token(1), **own}, {"token": token(2)}], **common})
    assert columns.headers[0] == expected
    if not common:
        assert read({"token": token(1), "title": "x", **own}).headers == (expected,)


async def test_without_collapse_an_alert_gets_no_collapse_id(
    running: Running, caller: Caller, apple: Simulator
) -> None:
    members = [{"token": token(1), "collapse": False}, {"token": token(2)}]
    taken = await caller.send({"title": "x", "notifications": members})
    for notification_id in taken["ids"]:
        await outcome(running, notification_id)
    collapse_ids = {each.token: each.collapse_id for each in apple.received}
    assert collapse_ids == {token(1): None, token(2): taken["ids"][1]}


async def test_what_is_sent_at_most_once_is_accepted_as_ever(caller: Caller) -> None:
    status, receipt, _ = await caller.post({"token": token(1), "title": "x", "at_most_once": True, "wait": 20})
    assert (status, receipt["state"]) == (200, "accepted")


def test_a_receipt_tells_what_is_being_sent_once_only() -> None:
    body = receipts.receipt_body(Receipt("x", "shop", State.SENT, 1.0))
    assert body.state == "sent"
    assert "once only" in body.meaning


LONG = {"alert": {"title": "Tea", "body": "x" * 5000}}


@pytest.mark.parametrize(
    "content",
    [
        {"token": token(1), "payload": {"aps": LONG}, "shorten": True},
        {"token": token(1), **LONG["alert"], "shorten": True},
        {"tokens": [token(1)], **LONG["alert"], "shorten": True},
        {"notifications": [{"token": token(1), "payload": {"aps": LONG}}], "shorten": True},
        {"notifications": [{"token": token(1), **LONG["alert"]}], "shorten": True},
        {"notifications": [{"token": token(1)}], "payload": {"aps": LONG}, "shorten": True},
        {"notifications": [{"token": token(1)}], **LONG["alert"], "shorten": True},
        {"notifications": [{"token": token(1), "payload": {"aps": LONG}, "shorten": True}]},
        {"notifications": [{"token": token(1), **LONG["alert"], "shorten": True}]},
        {"notifications": [{"token": token(1), "shorten": True}], **LONG["alert"]},
    ],
)
def test_alert_text_that_is_too_long_is_cut_where_the_caller_wants_it(content: Any) -> None:
    (short,) = read(content).payloads
    assert len(short) == 4096
    assert json.loads(short)["aps"]["alert"]["body"].strip("x") == "…"


def test_what_shortening_cannot_help_is_refused() -> None:
    with pytest.raises(Refused, match="even without any alert text"):
        read({"token": token(1), "payload": {"aps": LONG, "own": "x" * 5000}, "shorten": True})
    members = [{"token": token(1), "title": "x"}, {"token": token(2), "title": "x", "data": {"own": "x" * 5000}}]
    with pytest.raises(exchange.Problem) as caught:
        read({"notifications": members, "shorten": True})
    assert [(each.code, each.index) for each in caught.value.errors] == [("PayloadTooLarge", 1)]


async def test_one_payload_goes_to_many_tokens_and_ids_come_in_their_order(
    running: Running, caller: Caller, apple: Simulator
) -> None:
    tokens = [token(number) for number in range(2500)]
    taken = await caller.send({"app": "shop", "tokens": tokens, "payload": {"aps": {"alert": "x"}}})
    assert len(set(taken["ids"])) == 2500
    for notification_id in taken["ids"]:
        await outcome(running, notification_id)
    assert {each.id: each.token for each in apple.received} == dict(zip(taken["ids"], tokens, strict=True))


async def test_many_notifications_keep_their_own_content_over_common_defaults(
    running: Running, caller: Caller, apple: Simulator
) -> None:
    taken = await caller.send(
        {
            "app": "shop",
            "title": "Tea",
            "body": "is ready",
            "collapse_id": "tea",
            "notifications": [
                {"token": token(0)},
                {"token": token(1), "body": "is cold", "collapse_id": None},
                {"token": token(2), "payload": {"aps": {"badge": 1}}, "collapse_id": "pot"},
                {"token": token(3), "badge": 2},
            ],
        }
    )
    for notification_id in taken["ids"]:
        await outcome(running, notification_id)
    received = {each.id: each for each in apple.received}
    ordered = [received[notification_id] for notification_id in taken["ids"]]
    assert [each.token for each in ordered] == [token(number) for number in range(4)]
    assert [json.loads(each.payload)["aps"] for each in ordered] == [
        {"alert": {"title": "Tea", "body": "is ready"}},
        {"alert": {"title": "Tea", "body": "is cold"}},
        {"badge": 1},
        {"alert": {"title": "Tea", "body": "is ready"}, "badge": 2},
    ]
    assert [each.collapse_id for each in ordered] == ["tea", "tea", "pot", "tea"]


async def test_many_whole_payloads_go_out_each_to_its_token(running: Running, caller: Caller, apple: Simulator) -> None:
    members = [{"token": token(number), "payload": {"n": number}} for number in range(1200)]
    taken = await caller.send({"notifications": members})
    for notification_id in taken["ids"]:
        await outcome(running, notification_id)
    received = {each.id: each for each in apple.received}
    assert [json.loads(received[each].payload)["n"] for each in taken["ids"]] == list(range(1200))


async def test_a_common_payload_serves_members_that_bring_none(
    running: Running, caller: Caller, apple: Simulator
) -> None:
    members = [{"token": token(1)}, {"token": token(2)}, {"token": token(3), "body": "own"}]
    taken = await caller.send({"payload": {"aps": {"alert": "common"}}, "notifications": members})
    for notification_id in taken["ids"]:
        await outcome(running, notification_id)
    received = {each.token: json.loads(each.payload)["aps"]["alert"] for each in apple.received}
    assert received == {token(1): "common", token(2): "common", token(3): {"body": "own"}}


async def test_apples_no_is_told_with_its_reason_and_what_it_means(caller: Caller, apple: Simulator) -> None:
    apple.unregister(token(1), since=1_700_000_000_000)
    status, receipt, _ = await caller.post({"token": token(1), "title": "x", "wait": 20})
    assert status == 200
    assert (receipt["state"], receipt["reason"], receipt["status"]) == ("rejected", "Unregistered", 410)
    assert "no longer on the device" in receipt["meaning"]
    # From now on the door knows, and says so at once.
    assert (await caller.complaint({"token": token(1), "title": "x"}))["code"] == "Unregistered"


async def test_what_apple_puts_off_is_queued_with_the_reason_and_the_next_try(caller: Caller, apple: Simulator) -> None:
    apple.rejects(token(1), "TooManyRequests")
    taken = await caller.send({"token": token(1), "title": "x"})
    async with asyncio.timeout(PATIENCE_S):
        while True:
            _, receipt, _ = await caller.ask("GET", taken["receipt"])
            if receipt["reason"] is not None:
                break
    assert (receipt["state"], receipt["reason"], receipt["status"]) == ("queued", "TooManyRequests", 429)
    assert receipt["next_attempt_at"] > receipt["created_at"]
    assert receipt["meaning"].startswith("It is waiting to be sent. Too many")


async def test_development_answers_show_apples_unique_id(tmp_path: Path) -> None:
    async with Simulator(Environment.DEVELOPMENT) as apple:
        config = settings_for(tmp_path, apple)
        app = msgspec.structs.replace(config.apps["shop"], environment=Environments.DEVELOPMENT)
        config = msgspec.structs.replace(config, apps={"shop": app})
        async with serving(config) as running, calling(running) as caller:
            _, receipt, _ = await caller.post({"token": token(1), "title": "x", "wait": 20})
    assert receipt["unique_id"]


# -- what is refused -------------------------------------------------------------------------------------------------


async def test_one_wrong_entry_means_that_nothing_is_taken(running: Running, caller: Caller, apple: Simulator) -> None:
    problem = await caller.complaint({"tokens": [token(1), "not hex", token(3), "abc"], "title": "x"})
    assert problem["code"] == "BadDeviceToken"
    assert problem["type"] == "/docs/errors#bad-device-token"
    assert [(each["index"], each["field"]) for each in problem["errors"]] == [(1, "token"), (3, "token")]
    assert "nothing was taken" in problem["detail"]
    good = await caller.send({"token": token(9), "title": "x"})
    await outcome(running, good["id"])
    assert [each.token for each in apple.received] == [token(9)]


async def test_each_member_of_a_wrong_type_is_named(caller: Caller) -> None:
    members = [{"token": 1}, {"token": token(1)}, {"tokn": "x"}, "x", {"token": token(2), "badge": "3"}]
    problem = await caller.complaint({"title": "x", "notifications": members})
    assert [(each["index"], each.get("field"), each["code"]) for each in problem["errors"]] == [
        (0, "token", "BadType"),
        (2, "tokn", "UnknownField"),
        (3, None, "BadType"),
        (4, "badge", "BadType"),
    ]
    assert "Did you mean token?" in problem["errors"][1]["detail"]


async def test_a_long_list_of_errors_is_cut(caller: Caller) -> None:
    problem = await caller.complaint({"tokens": ["x"] * 5000, "title": "x"})
    assert len(problem["errors"]) == 100
    assert "5000 things are wrong" in problem["detail"]


@pytest.mark.parametrize(
    "content, code, words",
    [
        ({"token": token(1)}, "PayloadEmpty", "add title or body"),
        ({"title": "x"}, "MissingDeviceToken", "token, tokens"),
        ({"token": "", "title": "x"}, "MissingDeviceToken", "no device token"),
        ({"tokens": [], "title": "x"}, "MissingDeviceToken", "tokens is empty"),
        ({"notifications": []}, "MissingDeviceToken", "notifications is empty"),
        ({"notifications": [{"title": "x"}]}, "MissingDeviceToken", "no device token"),
        ({"notifications": [{"token": token(1)}]}, "PayloadEmpty", "add title or body"),
        ({"token": "<ab cd>", "title": "x"}, "BadDeviceToken", "blanks or angle brackets"),
        ({"token": token(1), "tokens": [token(1)], "title": "x"}, "AmbiguousRequest", "token and tokens"),
        ({"token": token(1), "payload": {}, "title": "x"}, "AmbiguousRequest", "not both"),
        ({"notifications": [{"token": token(1), "payload": {}, "body": "x"}]}, "AmbiguousRequest", "not both"),
        ({"token": token(1), "body": "x" * 5000}, "PayloadTooLarge", "shorten it by"),
        ({"token": token(1), "payload": "text"}, "BadRequestPayload", "must be a JSON object"),
        ({"token": token(1), "title": "x", "push_type": "alrt"}, "InvalidPushType", "alert, background"),
        ({"token": token(1), "title": "x", "environment": "staging"}, "BadEnvironment", "production, development"),
        (
            {"token": token(1), "title": "x", "environment": "sandbox"},
            "BadEnvironment",
            "sandbox is called development",
        ),
        ({"token": token(1), "title": "x", "environment": "development"}, "UnknownEnvironment", "not set up for"),
        ({"token": token(1), "title": "x", "topic": "com.other"}, "TopicDisallowed", TOPIC),
        ({"token": token(1), "title": "x", "priority": 7}, "BadPriority", "1, 5 or 10"),
        ({"token": token(1), "title": "x", "expiration": 1700000000000}, "BadExpirationDate", "milliseconds"),
        ({"token": token(1), "title": "x", "expiration": 10**30}, "BadExpirationDate", "UNIX seconds"),
        ({"token": token(1), "title": "x", "collapse_id": "x" * 65}, "BadCollapseId", "64"),
        ({"token": token(1), "title": "x", "app": "shpo"}, "UnknownApp", "Known apps: shop"),
        ({"token": token(1), "titel": "x"}, "UnknownField", "Did you mean title?"),
        ({"token": token(1), "orderNumber": 7}, "UnknownField", "data"),
        ({"notifications": [{"token": token(1), "app": "shop"}]}, "UnknownField", "top of the request"),
        ({"token": token(1), "title": "x", "wait": 31}, "BadWait", "0 to 30"),
        ({"token": token(1), "title": "x", "wait": -1}, "BadWait", "0 to 30"),
        ({"tokens": [token(1)], "title": "x", "wait": 1}, "BadWait", "single token"),
        ({"token": token(1), "title": 3}, "BadType", "title: expected a string or an object, got a whole"),
        ({"token": token(1), "title": "x", "priority": "high"}, "BadType", "priority: expected a whole number, got a"),
        ({"token": token(1), "title": {"loc_key": 1}}, "BadType", "title.loc_key: expected a string"),
        ({"token": token(1), "title": {"loc-key": "K"}}, "UnknownField", "'title.loc-key' here. Did you mean loc_key?"),
        ({"token": token(1), "sound": {"loud": 1}}, "UnknownField", "There may be name, volume, critical."),
        ({"token": token(1), "sound": {"volume": 2}}, "BadRequestPayload", "aps.sound.volume must lie within 0 and 1"),
        ({"token": token(1), "live_activity": {"event": "end"}}, "BadType", "timestamp"),
        ({"token": token(1), "live_activity": {"event": "end", "timestamp": 1}}, "BadRequestPayload", "liveactivity"),
        ({"token": token(1), "url_args": [1]}, "BadType", "url_args[0]: expected a string"),
        ({"notifications": [{"token": token(1), "sound": {"nam": "x"}}]}, "UnknownField", "Did you mean name?"),
        ({"token": token(1), "title": "x", "collapse": "no"}, "BadType", "true or false"),
        ([], "BadType", "expected an object, got an array"),
        (b"", "InvalidJson", "empty"),
        (b"{", "InvalidJson", "not JSON"),
        (b"token=ab&title=x", "InvalidJson", "is a form, and forms are not taken: send a JSON object"),
        (b'--7d0\r\nContent-Disposition: form-data; name="token"\r\n', "InvalidJson", "is a form"),
        (b'{"token": "\xff"}', "InvalidJson", "not UTF-8"),
        (b'{"token": "\\ud83d"}', "InvalidJson", "lone surrogate"),
        (b'{"token": NaN}', "InvalidJson", "not JSON"),
        (b'{"payload": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "InvalidJson", "nested too deeply"),
        (b'{"payload": {"a": "\xff"}, "token": "ab"}', "BadRequestPayload", "not UTF-8"),
        (b'{"title": "x", "data": {"a": 1e999}, "token": "ab"}', "BadRequestPayload", "out of range"),
        (b'{"priority": ' + b"9" * 5000 + b"}", "BadType", "out of range"),
    ],
)
async def test_bad_input_is_told_in_words_that_help(caller: Caller, content: Any, code: str, words: str) -> None:
    problem = await caller.complaint(content)
    assert problem["status"] == 400
    assert problem["code"] == code
    assert words in problem["detail"]
    assert token(1) not in json.dumps(problem)


@pytest.mark.parametrize("name", ["x" * (1 << 20), " - at `$x" * 1000, "x` - at `$notifications[0]" * 1000])
@pytest.mark.parametrize("form", ['{"%s": 1}', '{"title": {"%s": 1}}', '{"notifications": [{"%s": 1}]}'])
async def test_a_field_name_of_any_length_is_named_by_its_beginning(name: str, form: str) -> None:
    with pytest.raises(exchange.Problem) as caught:
        read((form % name).encode())
    assert caught.value.code == "UnknownField"
    assert len(caught.value.answer().body) < 1000


@pytest.mark.parametrize("value", ["y" * 100_000, " - at `$x" * 1000, "`"])
async def test_a_value_that_is_none_of_a_few_is_not_repeated(value: str) -> None:
    with pytest.raises(exchange.Problem) as caught:
        read({"token": token(1), "push_type": value})
    assert (caught.value.code, caught.value.errors[0].field) == ("InvalidPushType", "push_type")
    assert value not in caught.value.detail


def test_of_thousands_of_wrong_members_the_first_are_told_and_all_are_counted() -> None:
    with pytest.raises(exchange.Problem) as caught:
        read({"notifications": [{f"titel{number}": "x"} for number in range(10_000)]})
    assert [each.index for each in caught.value.errors] == list(range(100))
    assert caught.value.detail.startswith("10000 things are wrong")
    with pytest.raises(exchange.Problem) as caught:
        read({"notifications": [{"titel": "x"}] * 10_001})
    assert (caught.value.status, caught.value.code) == (413, "TooManyNotifications")


def test_what_a_caller_sent_is_not_shown() -> None:
    content = {"token": "cafe0123", "payload": {"aps": {"alert": "a secret"}}}
    for shown in (repr(decoding.parse(json.dumps(content).encode(), decoding.Post)), repr(read(content))):
        assert "cafe0123" not in shown
        assert "a secret" not in shown


@pytest.mark.parametrize("query", ["?wait=nan", "?wait=x", "?wait=31"])
async def test_a_wait_that_is_no_time_is_refused(caller: Caller, query: str) -> None:
    assert (await caller.complaint({"token": token(1), "title": "x"}, query=query))["code"] == "BadWait"


@pytest.mark.parametrize("query", ["?wait=", "?wait=1&wait=2"])
async def test_a_wait_that_is_empty_or_comes_twice_is_refused(caller: Caller, query: str) -> None:
    assert (await caller.complaint({"token": token(1), "title": "x"}, query=query))["code"] == "BadParameter"


async def test_an_unknown_query_parameter_is_refused(caller: Caller) -> None:
    assert (await caller.complaint({"token": token(1), "title": "x"}, query="?wiat=1"))["code"] == "UnknownParameter"


async def test_the_app_must_be_named_where_there_are_two(tmp_path: Path, apple: Simulator) -> None:
    config = settings_for(tmp_path, apple, "shop", "till")
    async with serving(config) as running, calling(running) as caller:
        problem = await caller.complaint({"token": token(1), "title": "x"})
        assert (problem["code"], problem["detail"]) == ("MissingApp", "Say which app: there are shop, till.")
        await caller.send({"app": "till", "token": token(1), "title": "x"})


async def test_ten_thousand_notifications_are_the_most(caller: Caller) -> None:
    tokens = [token(number) for number in range(10_001)]
    assert (await caller.complaint({"tokens": tokens, "title": "x"}))["code"] == "TooManyNotifications"
    assert len((await caller.send({"tokens": tokens[1:], "title": "x"}))["ids"]) == 10_000


async def test_a_body_announced_as_too_long_is_refused_before_it_is_sent(running: Running) -> None:
    url = urlsplit(running.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.key}\r\nContent-Length: 9000000\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(PATIENCE_S):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()
    await writer.wait_closed()


async def test_a_body_that_turns_out_too_long_is_refused(caller: Caller) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(129):
            yield bytes(65_536)

    status, problem, _ = await caller.ask("POST", PATH, chunks())
    assert (status, problem["code"]) == (413, "RequestTooLarge")


async def test_a_compressed_body_is_refused(caller: Caller) -> None:
    status, problem, _ = await caller.post(b"x", headers={"content-encoding": "gzip"})
    assert (status, problem["code"]) == (415, "UnsupportedEncoding")


# -- when there is no room -------------------------------------------------------------------------------------------


class Bare:
    """A door of its own, with a relay that sends nothing."""

    def __init__(self, door: Api, relay: Relay, url: str, caller: Caller) -> None:
        self.door = door
        (self.notifications,) = (part for part in door._parts if isinstance(part, notifications.Notifications))
        self.relay = relay
        self.caller = caller
        parts = urlsplit(url)
        self._address = (parts.hostname, parts.port)

    async def begin(self, content: bytes, *, length: int | None = None, key: str = KEY, more: str = "") -> Wire:
        """A POST of `content`, announced as `length` octets."""
        reader, writer = await asyncio.open_connection(*self._address)
        size = len(content) if length is None else length
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {size}\r\n{more}\r\n"
        writer.write(head.encode() + content)
        return Wire(reader, writer)

    async def holds(self, octets: int) -> None:
        """Once the door holds so many."""
        async with asyncio.timeout(PATIENCE_S):
            while self.door._budget.held_bytes != octets:
                await self.caller.ask("GET", "/healthz")


class Wire:
    """A connection that says what it is told to, when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, content: bytes) -> None:
        self._writer.write(content)
        await self._writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        async with asyncio.timeout(PATIENCE_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await self._reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers, json.loads(body)

    async def ended(self) -> bytes:
        """What still comes, up to the end; a connection that is reset raises."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.read()

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


class Paths(dict[str, api.Routes]):
    """A part of the API as a table."""

    find = dict.get


def door_of(relay: Relay, apps: Collection[str], *parts: api.Part) -> Api:
    """A door for who has `KEY`."""
    keyring = Keyring(KEY.encode(), relay._store, clock=time.time)
    return Api((notifications.Notifications(relay, apps), *parts), keyring)


@asynccontextmanager
async def serving_door(door: Api, relay: Relay) -> AsyncIterator[Bare]:
    operations = Operations(relay, relay._store, relay._carrier, relay._apps, Telemetry(), clock=time.time)
    server = Server(make_app(door, operations), answering_s=10)
    with service._listen(ApiSettings(port=0)) as listening:
        serve = asyncio.create_task(server.serve([listening]))
        await server.ready.wait()
        url = service._url(listening)
        async with aiohttp.ClientSession(
            headers={"authorization": f"Bearer {KEY}"}, timeout=aiohttp.ClientTimeout(PATIENCE_S)
        ) as session:
            yield Bare(door, relay, url, Caller(session, url))
        server.should_exit = True
        await serve


@pytest.fixture
async def bare(tmp_path: Path, apple: Simulator) -> AsyncIterator[Bare]:
    async with open_house(tmp_path, apple, working=False) as house:
        door = door_of(house.relay, ["example"])
        async with serving_door(door, house.relay) as bare:
            yield bare
            assert (door._budget.held_bytes, door._budget.requests) == (0, 0)


def one(number: int, **fields: Any) -> bytes:
    return json.dumps({"token": token(number), "title": "x", **fields}).encode()


async def test_a_full_queue_answers_429_and_a_closed_store_503_both_with_retry_after(
    tmp_path: Path, apple: Simulator
) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        store = await SqliteStore.open(tmp_path / "small.db", max_waiting=2)
        relay = Relay(store, store, house.carrier, house.relay._apps, Telemetry(), clock=time.time)
        async with serving_door(door_of(relay, ["example"]), relay) as bare:
            caller = bare.caller
            await caller.send({"token": token(1), "title": "x"})
            status, problem, response = await caller.post({"tokens": [token(2), token(3)], "title": "x"})
            assert (status, problem["code"]) == (429, "Overloaded")
            assert int(response.headers["retry-after"]) > 0
            await store.aclose()
            status, problem, response = await caller.post({"token": token(3), "title": "x"})
            assert (status, problem["code"]) == (503, "StoreUnavailable")
            assert int(response.headers["retry-after"]) > 0


async def test_without_room_nothing_is_read_and_what_is_known_is_still_told(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        store = await SqliteStore.open(tmp_path / "small.db", max_waiting=1)
        relay = Relay(store, store, house.carrier, house.relay._apps, Telemetry(), clock=time.time)
        async with serving_door(door_of(relay, ["example"]), relay) as bare:
            taken = await bare.caller.send({"token": token(1), "title": "x"})
            wire = await bare.begin(b"", length=1_000_000)
            status, headers, problem = await wire.answer()
            assert (status, problem["code"]) == (429, "Overloaded")
            assert int(headers["retry-after"]) > 0
            await wire.close()
            # What came whole all the same keeps its connection.
            wire = await bare.begin(b"no JSON at all")
            status, headers, problem = await wire.answer()
            assert (status, "connection" in headers) == (429, False)
            await wire.close()
            assert (await bare.caller.ask("GET", taken["receipt"]))[0] == 200
        await store.aclose()


async def test_bodies_beyond_the_budget_are_put_off_until_others_are_through(
    bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MAX_HELD_BYTES", 1000)
    content = one(1, body="x" * 600)
    slow = await bare.begin(content[:100], length=len(content))
    await bare.holds(len(content))
    status, problem, response = await bare.caller.post(content)
    assert (status, problem["code"], response.headers["retry-after"]) == (503, "Busy", "1")
    await slow.send(content[100:])
    assert (await slow.answer())[0] == 202
    await slow.close()
    assert (await bare.caller.post(content))[0] == 202


async def test_a_body_that_comes_in_chunks_counts_as_it_comes(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_HELD_BYTES", 100_000)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(10_000)

    status, problem, _ = await bare.caller.ask("POST", PATH, chunks())
    assert (status, problem["code"]) == (503, "Busy")


async def test_more_requests_than_may_be_in_hand_are_put_off(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_REQUESTS", 1)
    content = one(1)
    slow = await bare.begin(content[:20], length=len(content))
    await bare.holds(len(content))
    status, problem, response = await bare.caller.ask("GET", f"{PATH}/x")
    assert (status, problem["code"], response.headers["retry-after"]) == (503, "Busy", "1")
    await slow.send(content[20:])
    assert (await slow.answer())[0] == 202
    await slow.close()


async def test_who_hangs_up_gives_back_what_was_held(bare: Bare) -> None:
    wire = await bare.begin(b"{", length=5000)
    await bare.holds(5000)
    await wire.close()
    await bare.holds(0)


async def test_who_waits_for_an_outcome_holds_no_body(bare: Bare) -> None:
    waiting = asyncio.create_task(bare.caller.post(one(1, body="x" * 1000, wait=30)))
    async with asyncio.timeout(PATIENCE_S):
        while not bare.notifications._waits:
            await bare.caller.ask("GET", "/healthz")
    await bare.holds(0)
    bare.notifications.hurry()
    assert (await waiting)[0] == 202


async def test_a_body_that_does_not_come_in_time_is_given_up(bare: Bare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_S", 0.05)
    for sent in (b"", b"{"):
        wire = await bare.begin(sent, length=100)
        status, headers, problem = await wire.answer()
        assert (status, problem["code"], headers["connection"]) == (408, "RequestTimeout", "close")
        await wire.close()


@pytest.mark.parametrize("key", [KEY, "hg_wrong"])
async def test_who_is_still_sending_gets_the_answer_and_no_reset(
    bare: Bare, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MAX_HELD_BYTES", 1000)
    size = exchange.MAX_BODY_BYTES
    wire = await bare.begin(b"", length=size, key=key)
    await wire.send(bytes(size))
    status, headers, problem = await wire.answer()
    assert (status, problem["code"]) == ((503, "Busy") if key == KEY else (401, "Unauthorized"))
    assert headers["connection"] == "close"
    assert await wire.ended() == b""
    await wire.close()


async def test_who_asks_before_sending_is_told_no_before_it_sends(bare: Bare) -> None:
    wire = await bare.begin(b"", length=9_000_000, more="Expect: 100-continue\r\n")
    assert (await wire.answer())[0] == 413
    await wire.close()


async def test_what_comes_after_an_answer_is_thrown_away_for_a_while_only(
    bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_LINGER_S", 0.05)
    wire = await bare.begin(b"", length=1_000_000, key="hg_wrong")
    assert (await wire.answer())[0] == 401
    assert await wire.ended() == b""
    await wire.close()


async def test_apps_that_come_while_the_door_is_open_are_seen(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        apps: dict[str, object] = {}
        async with serving_door(door_of(house.relay, apps), house.relay) as bare:
            problem = await bare.caller.complaint({"token": token(1), "title": "x"})
            assert problem["code"] == "MissingApp"
            assert problem["detail"].startswith("There is no app yet: add an [apps.NAME] to the server's configuration")
            apps["example"] = 1
            await bare.caller.send({"token": token(1), "title": "x"})
            apps["other"] = 2
            assert (await bare.caller.complaint({"token": token(1), "title": "x"}))["code"] == "MissingApp"


async def test_paths_beside_those_of_the_door_need_the_key_too(tmp_path: Path, apple: Simulator) -> None:
    async def hello(_: api.Call) -> exchange.Answer:
        return exchange.Answer(200, b'"hello"')

    async with open_house(tmp_path, apple, working=False) as house:
        door = door_of(house.relay, ["example"], Paths({"/v1/hello": {"GET": Route(hello, ANYBODY)}}))
        async with serving_door(door, house.relay) as bare:
            assert (await bare.caller.ask("GET", "/v1/hello"))[:2] == (200, "hello")
            assert (await bare.caller.ask("POST", "/v1/hello", b"x"))[0] == 405
            wrong = {"authorization": "Bearer hg_wrong"}
            assert (await bare.caller.ask("GET", "/v1/hello", headers=wrong))[0] == 401


async def test_bodies_read_beside_count_with_the_others_within_a_maximum_of_their_own(
    tmp_path: Path, apple: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MAX_HELD_BYTES", 1000)

    async def size(body: bytes) -> exchange.Answer:
        return exchange.Answer(200, b"%d" % len(body))

    async def put(call: api.Call) -> exchange.Answer:
        return await call.read(size, 800)

    async with open_house(tmp_path, apple, working=False) as house:
        door = door_of(house.relay, ["example"], Paths({"/v1/hello": {"PUT": Route(put, ANYBODY)}}))
        async with serving_door(door, house.relay) as bare:
            assert (await bare.caller.ask("PUT", "/v1/hello", bytes(800)))[:2] == (200, 800)
            status, problem, _ = await bare.caller.ask("PUT", "/v1/hello", bytes(801))
            assert (status, problem["code"]) == (413, "RequestTooLarge")
            assert "longer than 800 octets" in problem["detail"]
            slow = await bare.begin(b"{", length=500)
            await bare.holds(500)
            status, problem, _ = await bare.caller.ask("PUT", "/v1/hello", bytes(501))
            assert (status, problem["code"]) == (503, "Busy")
            await slow.close()
            await bare.holds(0)


async def test_our_own_fault_is_told_and_logged(
    tmp_path: Path, apple: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: api.Call) -> exchange.Answer:
        raise ZeroDivisionError

    async with open_house(tmp_path, apple, working=False) as house:
        door = door_of(house.relay, ["example"], Paths({"/v1/fail": {"GET": Route(fail, ANYBODY)}}))
        async with serving_door(door, house.relay) as bare:
            status, problem, _ = await bare.caller.ask("GET", "/v1/fail")
    assert (status, problem["code"]) == (500, "InternalError")
    assert "ZeroDivisionError" in caplog.text


# -- the buried ------------------------------------------------------------------------------------------------------


async def bury(house: House, count: int) -> list[str]:
    """Ids of notifications that were given up on, newest last."""
    ids = await house.push([token(number) for number in range(count)])
    (lease,) = await house.store.take(1)
    details = tuple(Detail(index, "ServiceUnavailable", 503, attempts=9) for index in range(count))
    states = bytes([State.BURIED] * count)
    await house.store.record([Outcomes(lease.batch.id, lease.attempt, states, bytes(4 * count), details)], [])
    await house.store.finish([LeaseEnd(lease.batch.id, lease.attempt)])
    return ids


async def test_the_buried_are_listed_page_by_page_and_sent_again_when_asked(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        ids = await bury(house, 3)
        async with serving_door(door_of(house.relay, ["example"]), house.relay) as bare:
            caller = bare.caller
            status, page, _ = await caller.ask("GET", "/v1/buried?limit=2")
            assert status == 200
            assert [each["id"] for each in page["buried"]] == [ids[2], ids[1]]
            assert {(each["state"], each["reason"], each["attempts"]) for each in page["buried"]} == {
                ("buried", "ServiceUnavailable", 9)
            }
            assert page["next"] == ids[1]
            _, page, _ = await caller.ask("GET", f"/v1/buried?app=example&limit=2&before={page['next']}")
            assert ([each["id"] for each in page["buried"]], page["next"]) == ([ids[0]], None)
            status, problem, _ = await caller.ask("GET", "/v1/buried?app=exampel")
            assert (status, problem["code"]) == (400, "UnknownApp")
            assert "Did you mean example?" in problem["detail"]

            body = json.dumps({"ids": [ids[0], ids[2], "x"]}).encode()
            status, replayed, _ = await caller.ask("POST", "/v1/buried/replay", body)
            assert (status, sorted(replayed["replayed"])) == (200, [ids[0], ids[2]])
            _, page, _ = await caller.ask("GET", "/v1/buried")
            assert [each["id"] for each in page["buried"]] == [ids[1]]
            assert (await caller.ask("GET", f"{PATH}/{ids[0]}"))[1]["state"] == "queued"


@pytest.mark.parametrize(
    "method,path,content,code",
    [
        ("GET", "?limit=0", None, "BadParameter"),
        ("GET", "?limit=1001", None, "BadParameter"),
        ("GET", "?limit=ten", None, "BadParameter"),
        ("GET", "?limit=" + "0" * 5000 + "1", None, "BadParameter"),
        ("GET", "?limit=%C2%B2", None, "BadParameter"),
        ("GET", "?before=x", None, "BadParameter"),
        ("GET", "?page=2", None, "UnknownParameter"),
        ("POST", "/replay", b"{}", "BadType"),
        ("POST", "/replay", b'{"ids": [1]}', "BadType"),
        ("POST", "/replay", b'{"ids": [], "id": "x"}', "UnknownField"),
        ("POST", "/replay", b"{", "InvalidJson"),
        ("POST", "/replay", json.dumps({"ids": ["x"] * 1001}).encode(), "TooManyNotifications"),
        ("POST", "", b"", "MethodNotAllowed"),
        ("GET", "/replay", None, "MethodNotAllowed"),
    ],
)
async def test_bad_questions_about_the_buried_are_refused(
    bare: Bare, method: str, path: str, content: bytes | None, code: str
) -> None:
    assert (await bare.caller.ask(method, "/v1/buried" + path, content))[1]["code"] == code


# -- any octets ------------------------------------------------------------------------------------------------------


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_known = st.sampled_from([*decoding.Post.__struct_fields__, "x"])


@given(
    st.binary() | st.dictionaries(_known, _json | st.just(token(1))).map(lambda content: json.dumps(content).encode())
)
def test_any_octets_become_columns_or_a_problem(body: bytes) -> None:
    try:
        found = columns.read(body).columns
    except (Refused, exchange.Problem):
        return
    count = len(found.tokens)
    assert len(found.headers) in (1, count)
    assert len(found.payloads) in (1, count)


# -- keys, paths and methods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", [None, "Bearer", "Bearer hg_wrong", "Basic aGc6aGc=", "hg_wrong", "Bearer \xff"])
async def test_a_caller_without_the_key_is_sent_away(running: Running, shown: str | None) -> None:
    headers = {} if shown is None else {"authorization": shown}
    async with aiohttp.ClientSession(headers=headers) as session:
        caller = Caller(session, running.url)
        status, problem, response = await caller.post({"token": token(1), "title": "x"})
        assert (status, problem["code"]) == (401, "Unauthorized")
        assert response.headers["www-authenticate"].partition(" ")[0] == "Bearer"
        assert running.key not in json.dumps(problem)
        assert (await caller.ask("GET", f"{PATH}/x"))[0] == 401


async def test_the_scheme_of_the_key_may_be_in_any_case(running: Running) -> None:
    async with aiohttp.ClientSession(headers={"authorization": f"bearer {running.key}"}) as session:
        assert (await Caller(session, running.url).post({"token": token(1), "title": "x"}))[0] == 202


@pytest.mark.parametrize("name", ["x", "01a1fdd3-db9d-79a4-87f4-efdcdc8e0001", "%00", "%ff", "1" * 5000])
async def test_an_id_that_was_never_given_is_not_found(caller: Caller, name: str) -> None:
    status, problem, _ = await caller.ask("GET", f"{PATH}/{name}")
    assert (status, problem["code"]) == (404, "UnknownNotification")


async def test_unknown_paths_and_methods_are_problems_too(caller: Caller) -> None:
    for path in ("/v1", "/v1/notification", PATH + "/", PATH + "/a/b"):
        status, problem, _ = await caller.ask("POST", path, b"{}")
        assert (status, problem["code"]) == (404, "NotFound"), path
    for method, path, allowed in (
        ("PUT", PATH, "POST"),
        ("PATCH", f"{PATH}/x", "GET, HEAD"),
        ("POST", "/healthz", ""),
    ):
        status, problem, response = await caller.ask(method, path)
        assert (status, problem["code"]) == (405, "MethodNotAllowed")
        assert allowed in response.headers["allow"]


async def test_health_and_metrics_need_no_key(running: Running, caller: Caller) -> None:
    taken = await caller.send({"token": token(1), "title": "x"})
    await outcome(running, taken["id"])
    async with aiohttp.ClientSession() as session:
        other = Caller(session, running.url)
        status, health, _ = await other.ask("GET", "/healthz")
        assert (status, health["status"]) == (200, "ok")
        status, text, _ = await other.ask("GET", "/metrics")
    assert status == 200
    assert b'heliograph_taken_total{app="shop"} 1.0' in text
    assert (
        b'heliograph_answers_total{app="shop",environment="production",outcome="accepted",push_type="alert"} 1.0'
        in text
    )


# -- start and stop --------------------------------------------------------------------------------------------------


def unused_port() -> int:
    """A port where nobody listens, most likely."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


async def test_what_waits_when_the_server_stops_is_sent_by_the_next_one(tmp_path: Path, apple: Simulator) -> None:
    nowhere = settings_for(tmp_path, apple, port=unused_port())
    async with serving(nowhere) as running, calling(running) as caller:
        taken = await caller.send({"tokens": [token(1), token(2)], "title": "x"})
    assert apple.received == []
    async with serving(settings_for(tmp_path, apple)) as running:
        for notification_id in taken["ids"]:
            assert (await outcome(running, notification_id)).state is State.ACCEPTED
    assert sorted(each.id for each in apple.received) == taken["ids"]


async def test_who_waits_while_the_server_stops_is_told_what_is_known(tmp_path: Path, apple: Simulator) -> None:
    async with aiohttp.ClientSession() as session:
        async with serving(settings_for(tmp_path, apple, port=unused_port())) as running:
            caller = Caller(session, running.url)
            content = {"token": token(1), "title": "x", "wait": 30}
            headers = {"authorization": f"Bearer {running.key}"}
            waiting = asyncio.create_task(caller.post(content, headers=headers))
            async with asyncio.timeout(PATIENCE_S):
                while b'heliograph_taken_total{app="shop"} 1.0' not in (await caller.ask("GET", "/metrics"))[1]:
                    pass
        status, receipt, _ = await waiting
    assert (status, receipt["state"]) == (202, "queued")


async def test_a_receipt_says_why_apple_cannot_be_asked(tmp_path: Path, apple: Simulator) -> None:
    async with serving(settings_for(tmp_path, apple, port=unused_port())) as running, calling(running) as caller:
        status, receipt, _ = await caller.post({"token": token(1), "title": "x", "wait": 0.2})
    assert (status, receipt["state"]) == (202, "queued")
    assert receipt["meaning"].startswith("It is waiting to be sent.")


async def test_the_key_is_made_once_and_kept_private(tmp_path: Path, apple: Simulator) -> None:
    config = settings_for(tmp_path, apple)
    async with serving(config) as first:
        pass
    async with serving(config) as second:
        pass
    path = Path(config.data) / "api-key"
    assert first.key == second.key == path.read_text().strip()
    assert first.key.startswith("hg_")
    assert first.key not in repr(first)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_a_configured_key_is_the_one_that_counts(tmp_path: Path, apple: Simulator) -> None:
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_text("hg_of_my_own_choice\n")
    config = msgspec.structs.replace(
        settings_for(tmp_path, apple), api=ApiSettings(port=0, key=f"file:{tmp_path / 'key'}")
    )
    async with serving(config) as running:
        assert running.key == "hg_of_my_own_choice"
    (tmp_path / "key").write_text("short")
    with pytest.raises(ConfigError, match=r"api\.key must be one line of 16"):
        async with serving(config):
            pass


@pytest.mark.parametrize(
    "change, words",
    [
        ({"key_id": "abc"}, "apps.shop .*key id must be 10"),
        ({"team_id": "abc"}, "apps.shop .*team id must be 10"),
        ({"key": "file:{folder}/key.p8"}, "key_id is missing, and the file's name key.p8"),
        ({"key": "file:{folder}/other.p8"}, "apps.shop.key: .*other.p8 is a certificate, and has no private key"),
        ({"ca": "{folder}/absent.pem"}, "apps.shop.ca: .*cannot be read"),
    ],
)
async def test_credentials_that_cannot_be_used_stop_the_start(
    tmp_path: Path, apple: Simulator, change: dict[str, str], words: str
) -> None:
    config = settings_for(tmp_path, apple)
    (tmp_path / "other.p8").touch(0o600)
    (tmp_path / "other.p8").write_bytes(apple.ca_pem)
    (tmp_path / "key.p8").touch(0o600)
    (tmp_path / "key.p8").write_bytes(apple.signing_key.pem)
    change = {name: value.replace("{folder}", str(tmp_path)) for name, value in change.items()}
    app = msgspec.structs.replace(config.apps["shop"], **change)
    with pytest.raises(ConfigError, match=words):
        async with serving(msgspec.structs.replace(config, apps={"shop": app})):
            pass


def is_absent(path: Path) -> bool:
    return not path.exists()


async def test_a_taken_port_is_told_before_anything_is_touched(
    running: Running, tmp_path: Path, apple: Simulator
) -> None:
    port = urlsplit(running.url).port
    assert port is not None
    other = tmp_path / "other"
    config = msgspec.structs.replace(settings_for(tmp_path, apple), data=str(other), api=ApiSettings(port=port))
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}, is taken"):
        async with serving(config):
            pass
    assert is_absent(other)
