"""JSON and Unicode at their worst, in every place of a body: told in words, never by a 5xx."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from heliograph.doors.notifications import PATH, REPLAY_PATH
from heliograph.simulator.server import Simulator
from tests.service.house import APP, open_house, token
from tests.service.test_api import Caller, door_of, serving_door

TOKEN = token(1).encode()
SHORT = 2000
"""Octets of an answer that repeats nothing long."""

BROKEN = {
    "deep arrays": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "unclosed": b"[" * 100_000,
    "not a number": b"NaN",
    "infinity": b"Infinity",
    "minus infinity": b"-Infinity",
    "leading zero": b"01",
    "leading plus": b"+1",
    "hex": b"0x10",
    "single quotes": b"'x'",
    "comment": b"/* x */ 1",
    "trailing comma": b"[1,]",
    "NUL as it is": b'"a\0b"',
    "control character": b'"a\x01b"',
    "line break": b'"a\nb"',
    "unknown escape": b'"\\x41"',
    "short escape": b'"\\u12"',
    "high surrogate alone": b'"\\ud83d"',
    "low surrogate alone": b'"\\ude00"',
    "surrogates the wrong way": b'"\\ude00\\ud83d"',
    "UTF-16": "☕".encode("utf-16"),
}
"""No JSON at all."""

ILL_ENCODED = {
    "no UTF-8": b'"\xff\xfe"',
    "overlong": b'"\xc0\xaf"',
    "surrogates as octets": b'"\xed\xa0\xbd\xed\xb8\x80"',
    "cut off": b'"\xe2\x82"',
    "above Unicode": b'"\xf4\x90\x80\x80"',
}

ODD = {
    "null": b"null",
    "true": b"true",
    "nothing in quotes": b'""',
    "object": b"{}",
    "array": b"[]",
    "600 arrays": b"[" * 600 + b"]" * 600,
    "5,000 digits": b"9" * 5000,
    "minus 5,000 digits": b"-" + b"9" * 5000,
    "31 digits": b"1" + b"0" * 30,
    "long fraction": b"0." + b"1" * 100_000,
    "1e999": b"1e999",
    "-1e999": b"-1e999",
    "1e1000000000": b"1e1000000000",
    "minus zero": b"-0.0",
    "NUL": b'"a\\u0000b"',
    "delete": b'"\x7f"',
    "noncharacter": '"\uffff"'.encode(),
    "byte order mark": '"\ufeff"'.encode(),
    "right to left": '"\u202e"'.encode(),
    "combining": ('"' + "\u0301" * 2000 + '"').encode(),
    "prototype": b'{"__proto__": {}}',
}
"""JSON all the same: some of it is taken where it stands."""

LARGE = {
    "200,000 keys": b"{" + b",".join(b'"k%d":1' % number for number in range(200_000)) + b"}",
    "one key 200,000 times": b"{" + b",".join([b'"k":1'] * 200_000) + b"}",
    "5 MB": b'"' + b"x" * 5_000_000 + b'"',
    "5 MB of escapes": b'"' + b"\\u0041" * 833_000 + b'"',
}

ONE = b'{"token": "%s", "title": "x", ' % TOKEN
TWO = b'{"title": "x", "notifications": [{"token": "%s"}, ' % TOKEN
PLACES = {
    "whole": b"@",
    "unknown": ONE + b'"unknown": @}',
    "name": ONE + b"@: 1}",
    "token": b'{"title": "x", "token": @}',
    "tokens": b'{"title": "x", "tokens": ["%s", @]}' % TOKEN,
    "tokens, some": b'{"title": "x", "partial": true, "tokens": ["%s", @]}' % TOKEN,
    "notifications": b'{"title": "x", "notifications": @}',
    "member": TWO + b"@]}",
    "member, some": TWO + b'@], "partial": true}',
    "field of a member, some": TWO + b'{"token": "%s", "badge": @}], "partial": true}' % TOKEN,
    "app": ONE + b'"app": @}',
    "title": b'{"token": "%s", "title": @}' % TOKEN,
    "badge": ONE + b'"badge": @}',
    "sound": ONE + b'"sound": @}',
    "data": ONE + b'"data": @}',
    "in data": ONE + b'"data": {"a": @}}',
    "payload": b'{"token": "%s", "payload": @}' % TOKEN,
    "in a payload": b'{"token": "%s", "payload": {"aps": {"alert": "x"}, "a": @}}' % TOKEN,
    "shortened payload": b'{"token": "%s", "shorten": true, "payload": {"aps": {"alert": @}}}' % TOKEN,
    "shortened title": b'{"token": "%s", "shorten": true, "title": @}' % TOKEN,
    "expiration": ONE + b'"expiration": @}',
    "priority": ONE + b'"priority": @}',
    "relevance_score": ONE + b'"relevance_score": @}',
    "collapse_id": ONE + b'"collapse_id": @}',
    "topic": ONE + b'"topic": @}',
    "push_type": ONE + b'"push_type": @}',
    "partial": b'{"title": "x", "tokens": ["%s"], "partial": @}' % TOKEN,
    "content_state": b'{"token": "%s", "push_type": "liveactivity", "live_activity": '
    b'{"event": "update", "timestamp": 1, "content_state": @}}' % TOKEN,
}


@pytest.fixture
async def caller(tmp_path: Path) -> AsyncIterator[Caller]:
    async with (
        Simulator() as apple,
        open_house(tmp_path, apple, working=False) as house,
        serving_door(door_of(house.relay, [APP]), house.relay) as bare,
    ):
        yield bare.caller


async def answers(caller: Caller, value: bytes) -> AsyncIterator[tuple[str, int, str]]:
    """Where the value stood, and what was said: each answer is sound, short and no 5xx."""
    bodies = [(PATH, place, form.replace(b"@", value)) for place, form in PLACES.items()]
    if len(value) < 32_768:
        bodies += [(REPLAY_PATH, "ids", b'{"ids": %s}' % value), (REPLAY_PATH, "id", b'{"ids": [%s]}' % value)]
    for path, place, body in bodies:
        content = body if len(body) < 1_000_000 else io.BytesIO(body)  # aiohttp warns of large bodies that are whole
        status, answer, response = await caller.ask("POST", path, content)
        assert 200 <= status < 500, (place, answer)
        assert len(json.dumps(answer)) < SHORT, place
        if status >= 400:
            assert response.content_type == "application/problem+json"
            assert answer["detail"][-1] in ".?", (place, answer)
        yield place, status, answer.get("code", "")


async def test_what_is_no_json_is_refused_wherever_it_stands(caller: Caller) -> None:
    for name, value in BROKEN.items():
        async for place, status, code in answers(caller, value):
            # A reader that knows what is wanted may stop before it sees that what stands there has no end.
            assert (status, code) in {(400, "InvalidJson"), (400, "BadType")}, (name, place)


async def test_what_is_no_utf_8_is_never_taken(caller: Caller) -> None:
    words = ("InvalidJson", "BadType", "BadRequestPayload", "UnknownField")
    for name, value in ILL_ENCODED.items():
        async for place, status, code in answers(caller, value):
            if place.endswith("some"):
                assert status in (202, 400), (name, place)  # the other one is taken, or none
            else:
                assert (status, code) in {(400, word) for word in words}, (name, place)


async def test_what_is_odd_is_taken_or_told_of(caller: Caller) -> None:
    for name, value in ODD.items():
        async for place, status, code in answers(caller, value):
            assert status < 400 or code != "InvalidJson" or place in ("whole", "name"), (name, place)


@pytest.mark.parametrize("value", LARGE.values(), ids=LARGE)
async def test_what_is_very_long_is_taken_or_told_of(caller: Caller, value: bytes) -> None:
    async for place, status, code in answers(caller, value):
        assert status < 400 or code != "InvalidJson" or place in ("whole", "name"), place


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp500"])
async def test_a_body_in_another_encoding_is_refused(caller: Caller, encoding: str) -> None:
    body = json.dumps({"token": token(1), "title": "Grüße"}, ensure_ascii=False).encode(encoding)
    assert (await caller.complaint(body))["code"] == "InvalidJson"


async def test_what_is_in_order_arrives_in_any_script(caller: Caller) -> None:
    for text in ("Grüße", "お茶", "☕\ufe0f", "\U0001f469\u200d\U0001f680", "a\u0000b", "\u202eabc"):
        await caller.send({"token": token(1), "title": text, "data": {text: text}})
        await caller.send(json.dumps({"token": token(1), "payload": {text: text}}, ensure_ascii=False).encode())
