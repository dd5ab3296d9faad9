"""The OpenAPI document against the server that it describes: what it says is so, and what is so it says."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
import socket
import subprocess
import threading
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from html import unescape
from typing import Any, NamedTuple
from urllib.parse import urlencode
from uuid import uuid4

import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import settings
from msgspec import Struct
from schemathesis.checks import CheckContext, CheckFunction
from schemathesis.core.transport import Response
from schemathesis.generation.case import Case
from schemathesis.specs.openapi import checks
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from heliograph import __version__, service
from heliograph.doors import contract, openapi, problems
from heliograph.doors.api import Api, Part, Route, Routes
from heliograph.service import serving
from heliograph.simulator.server import Simulator
from tests.service.house import PATIENCE_S
from tests.service.test_api import TOPIC, settings_for

# Schemathesis draws from `random` in places.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

DOCUMENT: dict[str, Any] = json.loads(openapi.encoded())


def closed() -> dict[str, Any]:
    """The document, with answers that may hold nothing but what it names."""
    document = copy.deepcopy(DOCUMENT)
    for schema in document["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return document


CLOSED = closed()


class Served(NamedTuple):
    """A server, in a thread of its own."""

    url: str
    key: str
    pem: str
    """Of a signing key that makes an app."""
    parts: Sequence[Part]

    def ask(self, method: str, path: str, content: Any = None, **headers: str) -> requests.Response:
        return requests.request(
            method,
            self.url + path,
            json=content,
            headers={"Authorization": f"Bearer {self.key}", **headers},
            timeout=PATIENCE_S,
            allow_redirects=False,
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    started: list[Served] = []
    parts: list[Part] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    class Seen(Api):
        def __init__(self, given: Sequence[Part], *more: Any) -> None:
            parts.extend(given)
            super().__init__(given, *more)

    async def serve() -> None:
        async with Simulator() as apple:
            apple.add_app(TOPIC)
            async with serving(settings_for(folder, apple)) as running:
                started.append(Served(running.url, running.key, apple.signing_key.pem.decode(), parts))
                ready.set()
                await stop.wait()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(serve())
        finally:
            ready.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "Api", Seen)
        thread = threading.Thread(target=run)
        thread.start()
        ready.wait()
    try:
        yield started[0]
    finally:
        if started:
            loop.call_soon_threadsafe(stop.set)
        thread.join()


# -- the document ----------------------------------------------------------------------------------------------------


def test_it_is_openapi_and_its_schemas_are_json_schema() -> None:
    assert [str(error) for error in OPENAPI_31_VALIDATOR.iter_errors(DOCUMENT)] == []
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)


def test_it_says_what_every_member_and_every_parameter_means() -> None:
    unsaid = [
        f"{name}.{field}"
        for name, schema in DOCUMENT["components"]["schemas"].items()
        for field, inner in schema.get("properties", {}).items()
        if not inner.get("description")
    ]
    assert unsaid == []
    for operation in contract.OPERATIONS:
        assert operation.summary
        assert all(each.description for each in operation.parameters)
        assert set(re.findall(r"\{(\w+)\}", operation.path)) == {
            each.name for each in operation.parameters if each.where == "path"
        }


@pytest.mark.parametrize("kind", contract.LIMITS, ids=lambda kind: kind.__qualname__)
def test_limits_are_those_of_members_that_there_are(kind: type[Struct]) -> None:
    assert contract.LIMITS[kind].keys() <= set(kind.__struct_fields__)


def test_examples_of_answers_are_as_their_schemas_say() -> None:
    for operation in contract.OPERATIONS:
        for reply in operation.replies:
            if reply.kinds:
                described = {
                    "anyOf": [{"$ref": f"#/components/schemas/{openapi.name_of(kind)}"} for kind in reply.kinds]
                }
                jsonschema_rs.validate({**described, "components": CLOSED["components"]}, reply.example)


def test_every_problem_of_the_api_is_that_of_some_operation() -> None:
    told = {code for operation in contract.OPERATIONS for code in openapi.codes(operation)}
    of_api = {entry.code for entry in problems.of(problems.Origin.API)}
    assert of_api - told == {"MethodNotAllowed", "NotFound"}  # which are of no operation


def test_it_has_every_route_of_every_part_and_no_other(served: Served) -> None:
    documented: dict[int, set[str]] = {}
    for path, item in DOCUMENT["paths"].items():
        concrete = re.sub(r"\{\w+\}", "x", path)
        found = [routes for part in served.parts if (routes := part.find(concrete))]
        operations = [each for each in contract.OPERATIONS if each.path == path]
        if not found:
            assert all(operation.scopes is None for operation in operations), path
            continue
        routes = found[0]
        documented[id(routes)] = {method.upper() for method in item}
        for operation in operations:
            assert routes[operation.method].scopes == operation.scopes, path
        assert documented[id(routes)] == routes.keys() - {"HEAD"}, path
        assert ("HEAD" in routes) == ("GET" in routes)
    there = [routes for part in served.parts for routes in routes_of(vars(part))]
    assert there
    assert {id(routes) for routes in there} == documented.keys()


def routes_of(values: Mapping[Any, Any]) -> Iterator[Routes]:
    """All tables of routes that a part holds, whatever it calls them."""
    for value in values.values():
        if isinstance(value, dict) and value:
            if all(isinstance(each, Route) for each in value.values()):
                yield value
            else:
                yield from routes_of(value)


# -- examples --------------------------------------------------------------------------------------------------------


def test_every_example_is_answered_as_it_should_be(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    key = {"key": served.pem, "key_id": "ABC123DEFG", "team_id": "DEF123GHIJ", "topic": TOPIC}
    assert served.ask("PUT", "/v1/apps/silent", {**key, "host": "127.0.0.1", "port": port}).status_code == 201
    sent = served.ask("POST", "/v1/notifications", {"app": "shop", "token": "ab", "title": "x"}).json()["id"]
    waits = served.ask("POST", "/v1/notifications", {"app": "silent", "token": "ab", "title": "x"}).json()["id"]
    made = served.ask("POST", "/v1/keys", {"name": "x"}).json()["id"]
    named = {
        "getNotification": sent,
        "cancelNotification": waits,
        "getApp": "shop",
        "putApp": "till",
        "addCredential": "till",
        "deleteCredential": "till/HIJ456KLMN",
        "deleteApp": "till",
        "getKey": made,
        "deleteKey": made,
        "deleteCaller": contract.CALLER_ID,
    }
    for operation in contract.OPERATIONS:
        path = operation.path
        for value in named.get(operation.id, "").split("/"):
            path = re.sub(r"\{\w+\}", value, path, count=1)
        given = {each.name: each.example for each in operation.parameters if each.where == "query" and each.example}
        path += f"?{urlencode(given)}"
        for example in operation.examples or (None,):
            content = None if example is None else json.loads(json.dumps(example.value).replace(*in_json(served.pem)))
            answer = served.ask(operation.method, path, content)
            replies = {reply.status: reply for reply in operation.replies}
            assert answer.status_code in replies, (operation.id, answer.text)
            expected = replies[answer.status_code].example
            if len(replies[answer.status_code].kinds) == 1:
                assert set(answer.json()) <= set(expected) | {"reasons"}
                assert set(expected) <= set(answer.json())


def in_json(pem: str) -> tuple[str, str]:
    """What stands in an example in place of a key, and the key, both as they are in JSON."""
    return json.dumps(contract.PRIVATE_KEY), json.dumps(pem)


def test_a_request_that_is_sent_again_is_told_apart_in_a_header(served: Served) -> None:
    content = contract.OPERATIONS[0].examples[0].value
    answers = [served.ask("POST", "/v1/notifications", content, **{"Idempotency-Key": "tea"}) for _ in range(2)]
    assert answers[0].json() == answers[1].json()
    assert [answer.headers.get("idempotency-replayed") for answer in answers] == [None, "true"]


# -- what Schemathesis finds -----------------------------------------------------------------------------------------


def at_home() -> dict[str, Any]:
    """The document as this server has it.

    Otherwise nearly all requests would end at an app that there is not, or at two ways to say the same.
    """
    document = copy.deepcopy(CLOSED)
    send = document["components"]["schemas"]["Send"]
    for field, value in {"app": "shop", "environment": "production", "topic": TOPIC}.items():
        send["properties"][field] = {"enum": [value, None]}
    ways = {"token", "tokens", "notifications"}
    send["anyOf"] = [
        {"required": [way], "properties": dict.fromkeys({*ways, *more} - {way}, False)}
        for way in ways
        for more in ({"payload"}, {"title", "body", "badge", "data"})
    ]
    return document


schema = schemathesis.openapi.from_dict(at_home())
schema.config.output.sanitization.update(enabled=False)
schema.config.checks.negative_data_rejection.expected_statuses = ["4xx"]

SLOW = settings().max_examples > 1000
"""As conftest has it for --slow."""

EXCLUDED: list[CheckFunction] = [
    # What no schema can say is refused too: an app that there is not, a payload that is too long.
    checks.positive_data_acceptance,
]


def keep_apart(case: Case[Any]) -> None:
    """Leave out what would hide the rest.

    Examples are sent again and again, and would be repetitions, and changes to an app of the configuration. What the
    query says of `wait` wins over the body.
    """
    if case.headers.get("Idempotency-Key") == EXAMPLE_KEY:
        case.headers["Idempotency-Key"] = str(uuid4())
    if case.method == "PUT" and case.path_parameters.get("name") == "shop":
        case.path_parameters["name"] = "till"
    if isinstance(case.body, dict) and "wait" in case.body:
        case.query.pop("wait", None)


EXAMPLE_KEY = next(each.example for each in contract.OPERATIONS[0].parameters if each.where == "header")


BY_LABEL = {f"{operation.method} {operation.path}": operation for operation in contract.OPERATIONS}


def code_is_as_documented(_: CheckContext, response: Response, case: Case[Any]) -> None:
    if "problem" in response.headers.get("content-type", [""])[0]:
        told = response.json()
        if told["code"] not in {"MethodNotAllowed", "NotFound"}:
            assert told["code"] in openapi.codes(BY_LABEL[case.operation.label])
        entry = problems.CATALOGUE[told["code"]]
        assert told["type"] == f"/docs/errors#{entry.slug}"
        assert told["title"] == entry.title
        assert told["status"] == response.status_code
        assert entry.origin is problems.Origin.APPLE or response.status_code in entry.statuses


@schema.parametrize()
@settings(max_examples=300 if SLOW else 25)
def test_every_answer_is_as_the_document_says(case: Case[Any], served: Served) -> None:
    keep_apart(case)
    case.call_and_validate(
        base_url=served.url,
        headers={"Authorization": f"Bearer {served.key}"},  # spelt as the checks look for it
        additional_checks=[code_is_as_documented],
        excluded_checks=EXCLUDED,
        timeout=PATIENCE_S,
    )


def test_what_one_answer_gives_the_next_request_takes(served: Served) -> None:
    class Machine(schema.as_state_machine()):  # type: ignore[misc] # it is made anew each time
        def get_call_kwargs(self, case: Case[Any]) -> dict[str, Any]:
            keep_apart(case)
            headers = {"Authorization": f"Bearer {served.key}"}
            return {"base_url": served.url, "headers": headers, "timeout": PATIENCE_S}

        def validate_response(self, response: Response, case: Case[Any], **more: Any) -> None:
            case.validate_response(response, excluded_checks=EXCLUDED, transport_kwargs=more)

    Machine.run(settings=settings(max_examples=100 if SLOW else 10, stateful_step_count=6))


# -- the pages -------------------------------------------------------------------------------------------------------

ANCHORS = re.compile(r'\bid="([^"]+)"')
LINKS = re.compile(r'\b(?:href|src)="([^"]+)"')


@pytest.fixture(scope="module")
def pages(served: Served) -> dict[str, requests.Response]:
    return {path: requests.get(served.url + path, timeout=PATIENCE_S) for path in ("/docs", "/docs/errors")}


def test_pages_load_nothing_and_run_nothing(pages: Mapping[str, requests.Response]) -> None:
    for page in pages.values():
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["x-content-type-options"] == "nosniff"
        (style,) = re.findall(r"<style>(.*?)</style>", page.text, re.DOTALL)
        digest = b64encode(sha256(style.encode()).digest()).decode()
        policy = page.headers["content-security-policy"].split("; ")
        assert policy[:2] == ["default-src 'none'", f"style-src 'sha256-{digest}'"]
        assert not re.search(r"<(script|link|img|iframe|object|form)\b|\bstyle=|\bon\w+=|url\(|@import", page.text)
        assert all(link.startswith(("#", "/")) for link in LINKS.findall(page.text))


def test_links_on_pages_lead_somewhere(served: Served, pages: Mapping[str, requests.Response]) -> None:
    anchors = {path: ANCHORS.findall(page.text) for path, page in pages.items()}
    for path, page in pages.items():
        assert len(anchors[path]) == len(set(anchors[path]))
        for link in LINKS.findall(page.text):
            target, _, anchor = link.partition("#")
            if anchor:
                assert anchor in anchors[target or path], link
            else:
                assert served.ask("GET", target).status_code == 200


def test_every_operation_member_and_code_is_on_a_page(pages: Mapping[str, requests.Response]) -> None:
    for operation in contract.OPERATIONS:
        assert f'<section id="{operation.id}">' in pages["/docs"].text
    for schema in DOCUMENT["components"]["schemas"].values():
        for field in schema.get("properties", {}):
            assert f"<dt><code>{field}</code></dt>" in pages["/docs"].text
    for entry in problems.CATALOGUE.values():
        assert f'<section id="{entry.slug}">' in pages["/docs/errors"].text


@pytest.mark.peer("curl")
def test_the_lines_for_the_shell_do_what_they_say(served: Served, pages: Mapping[str, requests.Response]) -> None:
    lines = [
        unescape(each) for each in re.findall(r"<pre[^>]*><code>(curl .*?)</code>", pages["/docs"].text, re.DOTALL)
    ]
    assert len(lines) >= len(contract.OPERATIONS)
    environment = {**os.environ, "HELIOGRAPH_URL": served.url, "HELIOGRAPH_KEY": served.key}
    for line in lines:
        told = line.replace("curl ", "curl -sS -o /dev/null -w '%{http_code}' ", 1)
        done = subprocess.run(["sh", "-c", told], env=environment, capture_output=True, check=True, timeout=PATIENCE_S)
        # Ids and the private key are made up, and the app is in the configuration.
        wanted = {404} if f"/{contract.ID}" in line or f"/{contract.KEY_ID}" in line else {200, 201, 202}
        assert int(done.stdout) in wanted | ({409} if "/v1/apps/" in line else set()), line


def test_the_link_in_a_problem_leads_to_what_it_means(served: Served, pages: Mapping[str, requests.Response]) -> None:
    told = served.ask("POST", "/v1/notifications", {"app": "shop", "title": "x"}).json()
    page, _, anchor = told["type"].partition("#")
    section = pages[page].text.partition(f'<section id="{anchor}">')[2].partition("</section>")[0]
    assert told["code"] in section


def test_the_front_sends_browsers_to_the_documentation_and_tells_others_of_it(served: Served) -> None:
    page = served.ask("GET", "/", Accept="text/html,application/xhtml+xml;q=0.9")
    assert (page.status_code, page.headers["location"]) == (307, "/docs")
    assert served.ask("GET", "/").json() == {"heliograph": __version__, "docs": "/docs", "openapi": "/openapi.json"}
    assert served.ask("DELETE", "/").status_code == 405
    assert requests.head(served.url + "/docs", timeout=PATIENCE_S).headers["content-length"] == str(
        len(served.ask("GET", "/docs").content)
    )


def test_the_document_is_served_as_it_is(served: Served) -> None:
    answer = requests.get(served.url + "/openapi.json", timeout=PATIENCE_S)
    assert answer.headers["content-type"] == "application/json"
    assert answer.content == openapi.encoded()
