"""Callers over HTTP: how they come and go, what is refused, and what a key for some apps must not reach."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from heliograph.model import Environment, Scope
from heliograph.net.identity import AUTHORITY, SERVER, server_identity
from heliograph.simulator.server import Simulator
from tests.certificates import Issued, authority, key_pem, push_certificate, rsa_key
from tests.service.test_keys import TOPICS, Asking, app_for, asking

PATH = "/v1/callers"
LONG_AGO = datetime(2018, 3, 2, tzinfo=UTC)
PAIR = ec.derive_private_key(41, ec.SECP256R1())
PUBLIC = PAIR.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
RSA_PUBLIC = rsa_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
IDS = {"key_id": "ABC123DEFG", "team_id": "DEF123GHIJ"}


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator() as apple:
        yield apple


@pytest.fixture
async def server(tmp_path: Path, apple: Simulator) -> AsyncIterator[Asking]:
    """With the apps `shop` and `shop2`."""
    async with asking(tmp_path) as server:
        for name, topic in TOPICS.items():
            content = {**app_for(apple, topic), "environment": "both" if name == "shop" else "production"}
            assert (await server.ask("PUT", f"/v1/apps/{name}", content))[0] == 201
        yield server


def old(topic: str = TOPICS["shop"], environment: Environment = Environment.PRODUCTION) -> Issued:
    """As a script has it: from Apple, and ended."""
    return push_certificate(topic, uid=topic, environments=[environment], now=LONG_AGO)


def of(issued: Issued, app: str = "shop", **more: Any) -> dict[str, Any]:
    return {"app": app, "certificate": issued.certificate_pem.decode(), **more}


async def add(server: Asking, content: dict[str, Any], *, key: str | None = None) -> dict[str, Any]:
    """A new caller, as the 201 has it."""
    status, made = await server.ask("POST", PATH, content, key=key)
    assert status == 201, made
    return dict(made)


async def listed(server: Asking, *, key: str | None = None) -> list[dict[str, Any]]:
    status, found = await server.ask("GET", PATH, key=key)
    assert status == 200
    return list(found["callers"])


# -- how they come and go --------------------------------------------------------------------------------------------


async def test_an_ended_certificate_of_apple_s_is_registered_with_what_it_says(server: Asking) -> None:
    issued = old()
    made = await add(server, of(issued))
    assert made == {
        **made,
        "id": issued.loaded().fingerprint,
        "kind": "certificate",
        "name": "Apple Push Services: com.example.shop",
        "app": "shop",
        "environment": "production",
        "topic": "com.example.shop",
        "ends_at": "2019-03-02T00:00:00Z",
    }
    assert await listed(server) == [made]
    assert await server.ask("DELETE", f"{PATH}/{made['id']}") == (200, {"removed": made["id"]})
    assert await listed(server) == []
    assert await server.code("DELETE", f"{PATH}/{made['id']}") == (404, "UnknownCaller")


async def test_a_public_key_is_registered_under_its_two_ids(server: Asking) -> None:
    made = await add(server, {"app": "shop", "name": "mail robot", "public_key": PUBLIC, **IDS})
    assert made == {
        "id": "DEF123GHIJ.ABC123DEFG",
        "kind": "signing key",
        "name": "mail robot",
        "app": "shop",
        "environment": None,
        "topic": None,
        "ends_at": None,
        "created_at": made["created_at"],
    }
    twin = await add(server, {"app": "shop2", "public_key": PUBLIC, **IDS, "team_id": "OTHER12345"})
    assert twin["id"] == "OTHER12345.ABC123DEFG"
    assert twin["name"] == "ABC123DEFG"


async def test_callers_are_there_after_a_restart(tmp_path: Path, apple: Simulator) -> None:
    async with asking(tmp_path) as server:
        await server.ask("PUT", "/v1/apps/shop", app_for(apple, TOPICS["shop"]))
        made = [await add(server, of(old())), await add(server, {"app": "shop", "public_key": PUBLIC, **IDS})]
    async with asking(tmp_path) as server:
        assert sorted(map(str, await listed(server))) == sorted(map(str, made))


async def test_what_is_registered_again_for_its_app_is_changed(server: Asking) -> None:
    issued = old()
    made = await add(server, of(issued, name="before"))
    status, changed = await server.ask("POST", PATH, of(issued, name="after", environment="development"))
    assert status == 200
    assert (changed["id"], changed["name"], changed["environment"]) == (made["id"], "after", "development")
    assert await listed(server) == [changed]


async def test_a_certificate_of_another_app_is_refused_and_stays_with_it(server: Asking) -> None:
    issued = old()
    made = await add(server, of(issued))
    status, problem = await server.ask("POST", PATH, of(issued, "shop2", topic=TOPICS["shop2"]))
    assert (status, problem["code"]) == (409, "CallerTaken")
    assert "opens the app 'shop': remove it there first" in problem["detail"]
    assert await listed(server) == [made]


async def test_what_the_certificate_leaves_open_stays_open(server: Asking) -> None:
    both = push_certificate(TOPICS["shop"], (f"{TOPICS['shop']}.voip", "voip"))
    assert (await add(server, of(both)))["environment"] is None
    plain = push_certificate(uid=None, environments=[], name="my own script")
    made = await add(server, of(plain))
    assert (made["name"], made["environment"], made["topic"]) == ("my own script", None, None)


async def test_what_is_said_wins_over_what_the_certificate_says(server: Asking) -> None:
    issued = old("com.example.long-gone", Environment.DEVELOPMENT)
    status, problem = await server.ask("POST", PATH, of(issued, "shop2", topic=TOPICS["shop2"]))
    assert (status, problem["code"]) == (400, "UnknownEnvironment")
    assert "say so with environment production" in problem["detail"]
    made = await add(server, of(issued, "shop2", topic=TOPICS["shop2"] + ".voip", environment="production"))
    assert (made["topic"], made["environment"]) == ("com.example.shop2.voip", "production")


async def test_an_authority_beside_the_certificate_is_left_out(server: Asking) -> None:
    issued = old()
    chain = (authority().certificate_pem + issued.certificate_pem).decode()
    assert (await add(server, {"app": "shop", "certificate": chain}))["id"] == issued.loaded().fingerprint


async def test_an_app_with_several_topics_needs_one_for_a_certificate_without(server: Asking, apple: Simulator) -> None:
    content = {**app_for(apple, ""), "topics": [TOPICS["shop"], "com.example.till"]}
    del content["topic"]
    assert (await server.ask("PUT", "/v1/apps/both", content))[0] == 201
    plain = push_certificate(uid=None, environments=[], name="my own script")
    status, problem = await server.ask("POST", PATH, of(plain, "both"))
    assert (status, problem["code"]) == (400, "MissingTopic")
    assert "name one of com.example.shop, com.example.till" in problem["detail"]
    assert (await add(server, of(plain, "both", topic="com.example.till")))["topic"] == "com.example.till"
    assert (await add(server, of(old(), "both")))["topic"] == TOPICS["shop"]


# -- what is refused -------------------------------------------------------------------------------------------------

CERTIFICATE = old().certificate_pem.decode()
COMMON_NAME, NOT_TO_OPENSSL = bytes.fromhex("06035504030c"), bytes.fromhex("060355040304")
"""The name of a subject as text, and as octets, at which OpenSSL gives up."""
UNREADABLE = ssl.DER_cert_to_PEM_cert(old().certificate_der.replace(COMMON_NAME, NOT_TO_OPENSSL))


@pytest.mark.parametrize(
    "content, code, words",
    [
        (b"", "InvalidJson", "send a JSON object"),
        (b"[]", "BadType", "The body: expected object"),
        ({}, "BadCaller", "Send what the caller shows"),
        ({"certificate": 7}, "BadType", "certificate: expected str"),
        ({"certificat": "x"}, "UnknownField", "Did you mean certificate?"),
        ({"certificate": ""}, "BadCaller", "There is no certificate in the file"),
        ({"certificate": "shop.pem"}, "BadCaller", "BEGIN CERTIFICATE"),
        ({"certificate": CERTIFICATE[:300]}, "BadCaller", "has no end"),
        ({"certificate": CERTIFICATE[:300] + CERTIFICATE[-40:]}, "BadCaller", "damaged"),
        ({"certificate": CERTIFICATE + old().certificate_pem.decode()}, "BadCaller", "There are 2 certificates"),
        ({"certificate": UNREADABLE}, "BadCaller", "OpenSSL cannot read it"),
        ({"certificate": old().pem.decode()}, "BadCaller", "has a private key in it, which nobody but its owner"),
        ({"certificate": key_pem(PAIR).decode()}, "BadCaller", "has a private key in it"),
        ({"certificate": PUBLIC}, "BadCaller", "There is no certificate in the file"),
        ({"certificate": CERTIFICATE, "public_key": PUBLIC}, "AmbiguousRequest", "not both"),
        ({"certificate": CERTIFICATE, **IDS}, "BadCaller", "key_id goes with a public_key"),
        ({"certificate": CERTIFICATE, "team_id": IDS["team_id"]}, "BadCaller", "team_id goes with a public_key"),
        ({"certificate": CERTIFICATE, "name": "a\nb"}, "BadCaller", "1 to 64 printable"),
        ({"certificate": CERTIFICATE, "environment": "sandbox"}, "BadEnvironment", "sandbox is called development"),
        ({"certificate": CERTIFICATE, "topic": "com.other"}, "TopicDisallowed", "send com.example.shop"),
        ({"certificate": old("com.other").certificate_pem.decode()}, "TopicDisallowed", "is for com.other, which is"),
        ({"certificate": CERTIFICATE, "app": "nope"}, "UnknownApp", "Known apps: shop, shop2"),
        ({"certificate": CERTIFICATE, "app": None}, "MissingApp", "there are shop, shop2"),
        ({"certificate": CERTIFICATE, "app": "shop2", "environment": "development"}, "UnknownEnvironment", "set up"),
        ({"public_key": PUBLIC}, "BadCaller", "key_id is missing"),
        ({"public_key": PUBLIC, "key_id": "ABC123DEFG"}, "BadCaller", "team_id is missing"),
        ({"public_key": PUBLIC, **IDS, "key_id": "abc"}, "BadCaller", "10 capital letters and digits"),
        ({"public_key": PUBLIC, **IDS, "team_id": "abc"}, "BadCaller", "The team id must be 10 capital letters"),
        ({"public_key": key_pem(PAIR).decode(), **IDS}, "BadCaller", "openssl pkey -in FILE -pubout"),
        ({"public_key": CERTIFICATE, **IDS}, "BadCaller", "BEGIN PUBLIC KEY"),
        ({"public_key": PUBLIC.replace("M", "N"), **IDS}, "BadCaller", "damaged PEM"),
        ({"public_key": RSA_PUBLIC, **IDS}, "BadCaller", "no elliptic-curve key on P-256"),
    ],
)
async def test_a_caller_that_cannot_be_is_refused_with_what_to_change(
    server: Asking, content: Any, code: str, words: str
) -> None:
    if isinstance(content, dict):
        content = {"app": "shop", **content}
    status, problem = await server.ask("POST", PATH, content)
    assert (status, problem["code"]) == (400, code), problem
    assert words in problem["detail"]
    assert problem["detail"][-1] in ".?"
    assert "PRIVATE KEY-----\n" not in str(problem)
    assert await listed(server) == []


async def test_what_the_server_shows_itself_is_no_client_s_certificate(server: Asking, tmp_path: Path) -> None:
    server_identity(tmp_path, None, None)
    for file in (AUTHORITY, SERVER):
        content = (tmp_path / file).read_text().partition("-----BEGIN PRIVATE KEY-----")[0]
        status, problem = await server.ask("POST", PATH, {"app": "shop", "certificate": content})
        assert (status, problem["code"]) == (400, "BadCaller")
        assert "heliograph's own" in problem["detail"]
    assert await listed(server) == []


async def test_a_certificate_that_calls_itself_an_authority_may_be_a_client_s(server: Asking) -> None:
    # As those of `openssl req -x509` do.
    assert (await add(server, of(authority())))["app"] == "shop"


@pytest.mark.parametrize("name", ["x", "%00", "%ff", "0" * 64, "1" * 5000, "DEF123GHIJ.ABC123DEFG", "x/y"])
async def test_ids_of_no_caller_are_told_so(server: Asking, name: str) -> None:
    status, problem = await server.ask("DELETE", f"{PATH}/{name}")
    assert (status, problem["code"]) in ((404, "UnknownCaller"), (404, "NotFound"))
    assert len(problem["detail"]) < 200


# -- whose they are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", list(Scope))
async def test_callers_take_the_scope_manage(server: Asking, scope: Scope) -> None:
    key = (await server.make(scopes=[scope]))["key"]
    for method, path in (("GET", PATH), ("POST", PATH), ("DELETE", f"{PATH}/x")):
        status, _ = await server.ask(method, path, {} if method == "POST" else None, key=key)
        assert (status == 403) == (scope is not Scope.MANAGE)


async def test_a_key_for_some_apps_sees_and_changes_the_callers_of_these(server: Asking) -> None:
    mine, theirs = old(), old(TOPICS["shop2"])
    own, other = await add(server, of(mine)), await add(server, of(theirs, "shop2"))
    key = (await server.make(scopes=list(Scope), apps=["shop"]))["key"]
    assert await listed(server, key=key) == [own]
    for app in ("shop2", "nope"):
        assert await server.code("POST", PATH, of(mine, app), key=key) == (403, "AppNotAllowed")
    status, problem = await server.ask("POST", PATH, of(theirs, topic=TOPICS["shop"]), key=key)
    assert (status, problem["code"]) == (409, "CallerTaken")
    assert "opens another app:" in problem["detail"]
    assert "shop2" not in str(problem)
    status, unknown = await server.ask("DELETE", f"{PATH}/{'0' * 64}", key=key)
    assert await server.ask("DELETE", f"{PATH}/{other['id']}", key=key) == (404, unknown)
    assert (await server.ask("DELETE", f"{PATH}/{own['id']}", key=key))[0] == 200
    assert await listed(server) == [other]
    assert (await add(server, {"certificate": mine.certificate_pem.decode()}, key=key))["app"] == "shop"
