"""The simulator's control API: real sockets on both sides."""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket
import time
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec import Struct

from heliograph.errors import ConfigError
from heliograph.model import Environment
from heliograph.protocols.provider_token import mint, public_key, verify
from heliograph.simulator.control import MAX_BODY_BYTES, Control, controlled
from heliograph.simulator.faults import Answer, Close, Rule
from heliograph.simulator.reading import ACTIONS, load_rules
from heliograph.simulator.server import Simulator, new_signing_key
from heliograph.simulator.threaded import ThreadedSimulator
from tests.service.pushing import TOPIC, push

ONE, TWO = "aa" * 32, "bb" * 32

Reply = tuple[int, Any]


class Box:
    """A simulator, its control API, and somebody who uses both."""

    def __init__(self, apple: Simulator, control: Control, session: aiohttp.ClientSession) -> None:
        self.apple = apple
        self.control = control
        self.session = session

    async def ask(self, method: str, path: str, content: Any = None) -> Reply:
        """Status and decoded answer. `content` goes as it is where it is bytes, else as JSON."""
        body = io.BytesIO(
            content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        )
        async with self.session.request(method, self.control.url + path, data=body) as response:
            text = await response.read()
            kind = response.headers["content-type"]
            assert kind == ("application/json" if response.status < 400 else "application/problem+json")
            return response.status, json.loads(text)

    async def complaint(self, method: str, path: str, content: Any = None) -> tuple[int, str]:
        status, problem = await self.ask(method, path, content)
        assert problem.keys() == {"type", "title", "status", "detail"}
        assert problem["status"] == status
        assert problem["detail"].endswith((".", "?"))
        return status, problem["detail"]

    async def text(self, path: str) -> bytes:
        async with self.session.get(self.control.url + path) as response:
            assert response.status == 200
            return await response.read()

    async def push(self, token: str = ONE, payload: bytes = b'{"aps":{"alert":"Hello"}}', **fields: str) -> Reply:
        jwt = fields.pop("jwt", None) or (await self.text("/provider-token")).decode()
        return await asyncio.to_thread(push, self.apple.port, self.apple.ca_pem, jwt, token, payload, **fields)


@asynccontextmanager
async def open_box(*, strict: bool = False, environment: Environment = Environment.PRODUCTION) -> AsyncIterator[Box]:
    async with (
        Simulator(environment, strict=strict) as apple,
        controlled(apple) as control,
        aiohttp.ClientSession() as session,
    ):
        yield Box(apple, control, session)


@pytest.fixture
async def box() -> AsyncIterator[Box]:
    async with open_box() as box:
        yield box


# -- what a client has to know ---------------------------------------------------------------------------------------


async def test_a_test_in_any_language_finds_what_it_needs_at_the_root(box: Box) -> None:
    status, told = await box.ask("GET", "/")
    assert status == 200
    assert told["url"] == f"https://127.0.0.1:{box.apple.port}"
    assert (told["port"], told["control"]) == (box.apple.port, box.control.url)
    assert (told["environment"], told["strict"]) == ("production", False)
    assert "/shown/follow" in told["paths"]
    assert await box.text("/ca.pem") == box.apple.ca_pem
    assert await box.text("/AuthKey.p8") == box.apple.signing_key.pem


async def test_what_listens_everywhere_is_shown_by_a_name_that_its_certificate_has() -> None:
    async with (
        Simulator(host="0.0.0.0") as apple,
        controlled(apple) as control,
        aiohttp.ClientSession() as session,
    ):
        told = (await Box(apple, control, session).ask("GET", "/"))[1]
        assert (told["url"], told["host"]) == (f"https://localhost:{apple.port}", "localhost")
        assert told["control"].startswith("http://localhost:")


async def test_a_follower_is_told_the_number_under_which_the_history_has_it(box: Box) -> None:
    await box.push()
    told: list[tuple[int, str]] = []
    unfollow = box.control.follow(lambda number, shown: told.append((number, shown.received.id)))
    await box.push()
    await box.push()
    unfollow()
    await box.push()
    history = (await box.ask("GET", "/shown"))[1]["shown"]
    assert told == [(each["number"], each["id"]) for each in history[1:3]]


async def test_the_provider_token_it_gives_is_of_its_own_key(box: Box) -> None:
    told = (await box.ask("GET", "/"))[1]
    token = await box.text("/provider-token")
    claims = verify(token, lambda _: public_key(box.apple.signing_key), time.time())
    assert (claims.key_id, claims.team_id) == (told["key_id"], told["team_id"])
    assert await box.push() == (200, None)


# -- what devices show -----------------------------------------------------------------------------------------------


async def test_what_a_device_shows_is_read_with_its_payload_as_json(box: Box) -> None:
    await box.push(payload=b'{ "aps" :\n{"alert": "Gr\xc3\xbc\xc3\x9fe"}, "order": 7}', apns_collapse_id="order")
    (shown,) = (await box.ask("GET", f"/devices/{ONE}/shown"))[1]["shown"]
    assert shown["payload"] == {"aps": {"alert": "Grüße"}, "order": 7}
    assert (shown["token"], shown["topic"], shown["push_type"]) == (ONE, TOPIC, "alert")
    assert shown["collapse_id"] == "order"
    assert (await box.ask("GET", f"/devices/{TWO}/shown"))[1] == {"shown": []}


@pytest.mark.parametrize("payload", [b"\xff\x00", b'{"aps":', b'"\xff"'])
async def test_a_payload_that_is_no_json_is_told_in_base64(box: Box, payload: bytes) -> None:
    await box.push(payload=payload)
    (shown,) = (await box.ask("GET", "/shown"))[1]["shown"]
    assert b64decode(shown["payload_base64"]) == payload
    assert "payload" not in shown


async def test_of_two_with_one_collapse_id_the_device_shows_the_last_and_the_history_both(box: Box) -> None:
    for text in (b'"first"', b'"second"'):
        await box.push(payload=b'{"aps":{"alert":%b}}' % text, apns_collapse_id="score")
    (shown,) = (await box.ask("GET", f"/devices/{ONE}/shown"))[1]["shown"]
    assert shown["payload"]["aps"]["alert"] == "second"
    history = (await box.ask("GET", "/shown"))[1]
    assert [each["payload"]["aps"]["alert"] for each in history["shown"]] == ["first", "second"]
    assert history["last"] == 2


async def test_history_is_read_from_where_one_left_off_and_for_one_device(box: Box) -> None:
    for token in (ONE, TWO, ONE):
        await box.push(token)
    assert [each["number"] for each in (await box.ask("GET", "/shown?after=1"))[1]["shown"]] == [2, 3]
    one = (await box.ask("GET", f"/shown?token={ONE.upper()}"))[1]
    assert [each["number"] for each in one["shown"]] == [1, 3]
    assert (await box.ask("GET", "/shown?after=3"))[1] == {"shown": [], "last": 3}


async def test_what_is_shown_can_be_followed_line_by_line(box: Box) -> None:
    async with box.session.get(f"{box.control.url}/shown/follow") as lines:
        assert lines.content_type == "application/x-ndjson"
        for text in (b"one", b"two"):
            await box.push(payload=b'{"aps":\n{"alert":"%b"}}' % text)
            assert json.loads(await lines.content.readline())["payload"]["aps"]["alert"] == text.decode()


async def test_who_follows_from_a_number_misses_nothing_between(box: Box) -> None:
    await box.push(ONE)
    await box.push(TWO)
    async with box.session.get(f"{box.control.url}/shown/follow?after=0&token={TWO}") as lines:
        assert json.loads(await lines.content.readline())["number"] == 2
        await box.push(ONE)
        await box.push(TWO)
        assert json.loads(await lines.content.readline())["number"] == 4


async def test_streams_end_with_the_simulator() -> None:
    async with aiohttp.ClientSession() as session:
        async with open_box() as box:
            lines = await session.get(f"{box.control.url}/shown/follow")
        assert await lines.content.read() == b""


async def test_followers_that_hang_up_are_forgotten(box: Box) -> None:
    async with box.session.get(f"{box.control.url}/shown/follow"):
        pass
    await box.push()
    assert (await box.ask("GET", "/shown"))[1]["last"] == 1


# -- devices ---------------------------------------------------------------------------------------------------------


async def test_a_strict_simulator_takes_what_was_registered() -> None:
    async with open_box(strict=True) as box:
        assert await box.push() == (400, "BadDeviceToken")
        status, device = await box.ask("PUT", f"/devices/{ONE}", {"topic": TOPIC})
        assert status == 200
        assert device == {
            "token": ONE,
            "state": "installed",
            "since": None,
            "online": True,
            "topic": TOPIC,
            "environment": None,
            "waiting": None,
        }
        assert await box.push() == (200, None)
        assert await box.push(apns_topic="com.example.other") == (400, "DeviceTokenNotForTopic")
        assert (await box.ask("GET", "/devices"))[1] == {"devices": [device]}


async def test_a_device_of_the_other_environment_has_a_bad_token(box: Box) -> None:
    await box.ask("PUT", f"/devices/{ONE}", {"environment": "development"})
    assert await box.push() == (400, "BadDeviceToken")


async def test_an_uninstalled_app_is_unregistered_until_it_is_registered_again(box: Box) -> None:
    status, device = await box.ask("DELETE", f"/devices/{ONE}", {"since": 1_700_000_000_000})
    assert (status, device["state"], device["since"]) == (200, "uninstalled", 1_700_000_000_000)
    assert await box.push() == (410, "Unregistered")
    await box.ask("PUT", f"/devices/{ONE}")
    assert await box.push() == (200, None)
    before = time.time() * 1000
    assert (await box.ask("DELETE", f"/devices/{ONE}"))[1]["since"] >= int(before)


async def test_a_device_without_a_network_shows_the_newest_when_it_is_back(box: Box) -> None:
    assert (await box.ask("POST", f"/devices/{ONE}/offline"))[1]["online"] is False
    for text in (b"old", b"new"):
        assert await box.push(payload=b'{"aps":{"alert":"%b"}}' % text) == (200, None)
    assert (await box.ask("GET", f"/devices/{ONE}/shown"))[1]["shown"] == []
    assert (await box.ask("GET", f"/devices/{ONE}"))[1]["waiting"]["payload"] == {"aps": {"alert": "new"}}
    async with box.session.get(f"{box.control.url}/shown/follow") as lines:
        assert (await box.ask("POST", f"/devices/{ONE}/online"))[1]["waiting"] is None
        assert json.loads(await lines.content.readline())["payload"] == {"aps": {"alert": "new"}}


async def test_a_device_that_nothing_is_known_of_is_not_found(box: Box) -> None:
    assert (await box.complaint("GET", f"/devices/{ONE}"))[0] == 404
    await box.push()
    assert (await box.ask("GET", f"/devices/{ONE}"))[0] == 200


# -- faults ----------------------------------------------------------------------------------------------------------


async def test_a_rule_decides_until_it_is_used_up(box: Box) -> None:
    rule = {"action": {"kind": "answer", "status": 429, "reason": "TooManyRequests"}, "token": ONE, "times": 1}
    status, added = await box.ask("POST", "/rules", rule)
    assert status == 201
    assert added == {"id": added["id"], **rule}
    assert (await box.ask("GET", "/rules"))[1] == {"rules": [added]}
    assert (await box.ask("GET", f"/rules/{added['id']}"))[1] == added
    assert await box.push(TWO) == (200, None)
    assert await box.push() == (429, "TooManyRequests")
    assert await box.push() == (200, None)
    assert (await box.complaint("GET", f"/rules/{added['id']}"))[0] == 404


async def test_several_rules_are_added_in_order_and_removed_by_id(box: Box) -> None:
    rules: list[dict[str, Any]] = [
        {"action": {"kind": "delay", "seconds": 0.001, "then": {"kind": "close"}}},
        {"action": {"kind": "close"}},
    ]
    added = (await box.ask("POST", "/rules", rules))[1]["rules"]
    assert [{**rule, "id": each["id"]} for rule, each in zip(rules, added, strict=True)] == added
    assert (await box.ask("DELETE", f"/rules/{added[0]['id']}"))[1] == {"removed": [added[0]["id"]]}
    assert (await box.complaint("DELETE", f"/rules/{added[0]['id']}"))[0] == 404
    assert (await box.ask("DELETE", "/rules"))[1] == {"removed": [added[1]["id"]]}
    assert (await box.ask("GET", "/rules"))[1] == {"rules": []}


async def test_of_several_rules_with_a_bad_one_none_is_added(box: Box) -> None:
    rules = {"rules": [{"action": {"kind": "close"}}, {"action": {"kind": "close"}, "token": "no token"}]}
    status, detail = await box.complaint("POST", "/rules", rules)
    assert (status, detail.startswith("Rule 2: The device token ")) == (400, True)
    assert box.apple.rules() == {}


ACTION: dict[str, Any] = {"kind": "close"}


@pytest.mark.parametrize(
    "rule, words",
    [
        ({}, "The field action is missing"),
        ({"action": {}}, "action: the field kind is missing, one of answer, "),
        ({"action": {"kind": "anser"}}, "there is no action 'anser': did you mean answer?"),
        ({"action": {"kind": 5}}, "there is no action '5': known here are answer, "),
        ({"action": {"kind": "reset", "cod": 1}}, "action: there is no field 'cod' here: did you mean code?"),
        ({"action": {"kind": "reset", "zzz": 1}}, "there is no field 'zzz' here: known here are code, acted"),
        ({"action": ACTION, "tokn": ONE}, "There is no field 'tokn' here: did you mean token?"),
        ({"action": {"kind": "answer", "status": 400}}, "action: the field reason is missing"),
        ({"action": {"kind": "delay", "seconds": "1"}}, "action.seconds: expected float, got str"),
        ({"action": {"kind": "delay", "seconds": 1, "then": {"kind": "delay"}}}, "delay cannot stand here: known here"),
        ({"action": {"kind": "handshake", "how": "x"}}, "action.how: it must be one of silent, closed, "),
        ({"action": {"kind": "goaway", "last_stream_id": 1 << 31}}, "action: last_stream_id is below 2147483648"),
        ({"action": {"kind": "goaway", "reason": "x" * 1001}}, "action: reason has 1000 characters at most"),
        ({"action": {"kind": "stream-limit", "count": 1 << 31}}, "action: count is below 2147483648"),
        ({"action": ACTION, "share": 2}, "share is above 0 and at most 1"),
        ({"action": ACTION, "token": "12 34"}, "The device token holds blanks"),
        ({"rules": [], "token": ONE}, "Beside rules there is nothing"),
        (5, "Expected object, got int"),
        (b"{", "This is not JSON in UTF-8"),
        (b'{"action": "\xff"}', "This is not JSON in UTF-8"),
        (b"[" * 100_000, "This is not JSON in UTF-8"),
    ],
)
async def test_a_rule_that_cannot_be_is_refused_with_what_to_change(box: Box, rule: Any, words: str) -> None:
    status, detail = await box.complaint("POST", "/rules", rule)
    assert status == 400
    assert words in detail
    assert box.apple.rules() == {}


# -- keys and apps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["private", "public"])
async def test_provider_tokens_of_an_added_key_are_good(box: Box, half: str) -> None:
    key = new_signing_key("ABC123DEFG", "DEF123GHIJ")
    jwt = mint(key, time.time())
    assert await box.push(jwt=jwt) == (403, "InvalidProviderToken")
    public = public_key(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    content = {"key": (key.pem if half == "private" else public).decode(), "key_id": "ABC123DEFG"}
    status, added = await box.ask("POST", "/keys", {**content, "team_id": "DEF123GHIJ"})
    assert (status, added) == (201, {"key_id": "ABC123DEFG", "team_id": "DEF123GHIJ"})
    assert await box.push(jwt=jwt) == (200, None)
    assert added in (await box.ask("GET", "/keys"))[1]["keys"]


async def test_a_key_may_be_for_one_environment_or_a_few_topics(box: Box) -> None:
    scopes: list[dict[str, Any]] = [{"environment": "development"}, {"topics": ["com.example.other"]}]
    for number, limits in enumerate(scopes):
        key = new_signing_key(f"ABC123DEF{number}", box.apple.signing_key.team_id)
        await box.ask("POST", "/keys", {"key": key.pem.decode(), "key_id": key.key_id, **limits})
        assert (await box.push(jwt=mint(key, time.time())))[0] != 200


async def test_once_an_app_is_listed_its_team_may_send_to_no_other(box: Box) -> None:
    status, app = await box.ask("POST", "/apps", {"bundle_id": TOPIC})
    assert (status, app) == (201, {"bundle_id": TOPIC, "team_id": box.apple.signing_key.team_id})
    assert (await box.ask("GET", "/apps"))[1] == {"apps": [app]}
    assert await box.push() == (200, None)
    assert await box.push(apns_topic="org.example.other") == (400, "TopicDisallowed")


async def test_reset_forgets_what_was_done_and_keeps_what_clients_have(box: Box) -> None:
    await box.push()
    await box.ask("DELETE", f"/devices/{TWO}")
    await box.ask("POST", "/rules", {"action": {"kind": "close"}, "token": ONE})
    await box.ask("POST", "/apps", {"bundle_id": "org.example.other"})
    before = (await box.ask("GET", "/"))[1]
    async with box.session.get(f"{box.control.url}/shown/follow") as lines:
        assert (await box.ask("POST", "/reset"))[1] == before
        assert (await box.ask("GET", "/shown"))[1] == {"shown": [], "last": 1}
        for path, name in (("/devices", "devices"), ("/rules", "rules"), ("/apps", "apps")):
            assert (await box.ask("GET", path))[1] == {name: []}
        assert await box.push() == (200, None)
        assert await box.push(TWO) == (200, None)
        assert json.loads(await lines.content.readline())["number"] == 2


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, path, content, status, words",
    [
        ("GET", "/device", None, 404, "There is no path '/device' here: did you mean /devices?"),
        (
            "POST",
            "/rules/",
            {"action": {"kind": "close"}},
            404,
            "There is no path '/rules/' here: did you mean /rules?",
        ),
        ("GET", "/" + "x" * 500, None, 404, "...' here: there are /, "),
        ("POST", "/shown", None, 405, "/shown takes GET, HEAD only"),
        ("PATCH", f"/devices/{ONE}", None, 405, "takes DELETE, GET, HEAD, PUT only"),
        ("GET", "/devices/no-token", None, 400, "hex"),
        ("GET", "/shown?afer=1", None, 400, "There is no parameter 'afer' here: known are after, token"),
        ("GET", "/shown?after=x", None, 400, "after must be a number"),
        ("GET", "/shown?after=" + "9" * 30, None, 400, "after must be a number"),
        ("GET", "/shown?token=zz", None, 400, "hex"),
        ("GET", "/rules/x", None, 404, "There is no rule x"),
        ("GET", "/rules/" + "9" * 5000, None, 404, "There is no rule 999"),
        ("PUT", f"/devices/{ONE}", {"tpoic": "x"}, 400, "There is no field 'tpoic' here: did you mean topic?"),
        ("PUT", f"/devices/{ONE}", {"environment": "sandbox"}, 400, "one of production, development"),
        ("PUT", f"/devices/{ONE}", [], 400, "Expected object, got array"),
        ("DELETE", f"/devices/{ONE}", {"since": "now"}, 400, "since: expected int"),
        ("DELETE", f"/devices/{ONE}", {"since": -1}, 400, "since: expected int >= 0"),
        ("POST", "/keys", {"key": "", "key_id": "short"}, 400, "The key id must be 10"),
        ("POST", "/keys", {"key": "x", "key_id": "ABC123DEFG"}, 400, "is not PEM"),
        ("POST", "/keys", {"key": "-----BEGIN PUBLIC KEY-----", "key_id": "ABC123DEFG"}, 400, "damaged PEM"),
        ("POST", "/apps", {}, 400, "The field bundle_id is missing"),
        ("POST", "/apps", {"bundle_id": "bad id!"}, 400, "'bad id!' is no bundle id: it is letters, digits"),
        ("POST", "/apps", {"bundle_id": ""}, 400, "'' is no bundle id"),
        ("PUT", f"/devices/{ONE}", {"topic": "com.example shop"}, 400, "'com.example shop' is no bundle id"),
        ("POST", "/rules", {"action": {"kind": "close"}, "app": "späti"}, 400, "'späti' is no bundle id"),
        ("POST", "/rules", b"x" * (MAX_BODY_BYTES + 1), 413, "send less"),
    ],
)
async def test_a_mistake_ends_in_a_sentence_that_says_what_to_change(
    box: Box, method: str, path: str, content: Any, status: int, words: str
) -> None:
    told, detail = await box.complaint(method, path, content)
    assert told == status
    assert words in detail


async def test_no_answer_repeats_a_private_key(box: Box) -> None:
    pem = new_signing_key().pem.decode()
    for content in ({"key": pem}, {"key": [pem], "key_id": "ABC123DEFG"}, {"key": pem, "key_id": pem}):
        assert pem.splitlines()[1] not in (await box.complaint("POST", "/keys", content))[1]


async def test_who_hangs_up_within_a_request_harms_nobody(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    host, port = box.control.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /rules HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await box.ask("GET", "/rules"))[1] == {"rules": []}
    assert caplog.records == []


async def test_the_head_of_a_stream_is_soon_there(box: Box) -> None:
    async with box.session.head(f"{box.control.url}/shown/follow") as answer:
        assert (answer.status, answer.content_type) == (200, "application/x-ndjson")


async def test_a_taken_control_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with Simulator() as apple:
            with pytest.raises(ConfigError, match=f"127.0.0.1:{port} .*name another port"):
                async with controlled(apple, port):
                    pass


# -- fault scripts ---------------------------------------------------------------------------------------------------

RULES = [Rule(Answer(503, "Shutdown", retry_after_s=5), times=2), Rule(Close(), token=ONE)]


def test_a_fault_script_is_toml_or_json(tmp_path: Path) -> None:
    toml = tmp_path / "faults.toml"
    toml.write_text(
        '[[rules]]\ntimes = 2\naction = {kind = "answer", status = 503, reason = "Shutdown", retry_after_s = 5}\n'
        f'[[rules]]\ntoken = "{ONE}"\naction.kind = "close"\n'
    )
    rules = [
        {"times": 2, "action": {"kind": "answer", "status": 503, "reason": "Shutdown", "retry_after_s": 5}},
        {"token": ONE, "action": {"kind": "close"}},
    ]
    alone, named = tmp_path / "list.json", tmp_path / "named.json"
    alone.write_text(json.dumps(rules))
    named.write_text(json.dumps({"rules": rules}))
    assert [load_rules(path) for path in (toml, alone, named)] == [RULES] * 3


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("absent.toml", None, "absent.toml cannot be read (No such file or directory)"),
        ("faults.toml", "[[rules]", "not TOML"),
        ("faults.json", "[[rules]]", "not JSON"),
        (
            "faults.toml",
            '[[rules]]\nacton = "x"\n',
            "faults.toml: Rule 1: There is no field 'acton' here: did you mean",
        ),
    ],
)
def test_a_fault_script_that_cannot_be_is_refused_by_name(
    tmp_path: Path, name: str, text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_rules(tmp_path / name)
    assert words in str(caught.value)


# -- the page --------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()


def test_the_page_has_every_kind_of_action() -> None:
    assert {kind for kind in ACTIONS if f"| `{kind}` |" not in PAGE} == set()


def test_the_page_has_every_field_of_rules_and_actions() -> None:
    structs: list[type[Struct]] = [Rule, *ACTIONS.values()]
    fields = {field for struct in structs for field in struct.__struct_fields__}
    assert {field for field in fields if f"`{field}`" not in PAGE} == {"action"}


async def test_the_page_has_every_path_and_method(box: Box) -> None:
    paths = (await box.ask("GET", "/"))[1]["paths"]
    said = {path.replace("{token}", "TOKEN").replace("{id}", "ID") for path in paths}
    assert set(re.findall(r"`(?:GET|POST|PUT|DELETE) (/\S*)`", PAGE)) == said


def test_the_page_has_every_name_of_the_fixture() -> None:
    names = {name for name in vars(ThreadedSimulator) if not name.startswith("_")}
    rows = PAGE[PAGE.index("## In pytest") :]
    assert {name for name in names if not re.search(rf"`(?:await )?{name}\b", rows)} == {"ask", "environment", "strict"}


def test_the_fault_script_on_the_page_is_one(tmp_path: Path) -> None:
    (found,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "faults.toml").write_text(found)
    assert len(load_rules(tmp_path / "faults.toml")) == 3
