"""All or nothing, and what is good where the caller asks for that: each entry's fate is told with its place."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliograph.doors import columns
from heliograph.doors.exchange import Problem
from heliograph.errors import Refused
from heliograph.model import DeviceToken, Environment, Quarantine, Removal
from heliograph.simulator.server import Simulator
from tests.service.house import APP, House, open_house, token
from tests.service.test_api import Caller, door_of, serving_door

LONG = "x" * 5000


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with Simulator() as apple, open_house(tmp_path, apple, working=False) as house:
        yield house


@pytest.fixture
async def caller(house: House) -> AsyncIterator[Caller]:
    async with serving_door(door_of(house.relay, [APP]), house.relay) as bare:
        yield bare.caller


def fates(answer: Any) -> list[tuple[int, str, str | None]]:
    return [(each["index"], each["code"], each.get("field")) for each in answer["errors"]]


async def sent(house: House) -> dict[str, tuple[str, Any]]:
    """What waits: by id, the device token and the payload."""
    found = {}
    for lease in await house.store.take(1000):
        batch = lease.batch
        payloads = list(batch.payloads) * (len(batch) if len(batch.payloads) == 1 else 1)
        for place, (device_token, payload) in enumerate(zip(batch.tokens, payloads, strict=True), 1):
            found[f"{batch.id}{place:04x}"] = device_token.decode(), json.loads(payload)
    return found


async def mark(house: House, *, dead: int, held: int) -> None:
    production, until = Environment.PRODUCTION, int(time.time()) + 3600
    removal = Removal(APP, production, DeviceToken(token(dead)), 1)
    await house.store.record([], [removal], [Quarantine(APP, production, DeviceToken(token(held)), until)])


# -- what is good is taken -------------------------------------------------------------------------------------------


async def test_of_a_list_with_dead_tokens_the_others_are_taken(house: House, caller: Caller) -> None:
    await mark(house, dead=2, held=4)
    tokens = [token(1), token(2), token(3), "<ab>", token(4), token(5)]
    answer = await caller.send({"tokens": tokens, "title": "x", "partial": True})
    assert fates(answer) == [
        (1, "Unregistered", "token"),
        (3, "BadDeviceToken", "token"),
        (4, "BadDeviceToken", "token"),
    ]
    assert all(each["detail"] for each in answer["errors"])
    ids = answer["ids"]
    assert [place for place, each in enumerate(ids) if each is None] == [1, 3, 4]
    waiting = await sent(house)
    assert [waiting[each][0] for each in ids if each] == [token(1), token(3), token(5)]
    assert len(waiting) == 3


async def test_whatever_is_wrong_with_an_entry_costs_no_other(house: House, caller: Caller) -> None:
    await mark(house, dead=7, held=8)
    members = [
        {"token": token(1), "body": "one"},
        {"token": 1},
        {"token": token(2), "titel": "x"},
        "x",
        {"token": token(3), "payload": {"aps": {}}, "body": "x"},
        {"token": token(4), "body": LONG},
        {"token": token(5), "priority": 7, "body": "five"},
        {"token": "xyz", "body": "six"},
        {"token": token(7), "body": "seven"},
        {"token": token(9), "payload": {"own": 9}},
        {"body": "ten"},
    ]
    answer = await caller.send({"notifications": members, "partial": True})
    assert fates(answer) == [
        (1, "BadType", "token"),
        (2, "UnknownField", "titel"),
        (3, "BadType", None),
        (4, "AmbiguousRequest", "body"),
        (5, "PayloadTooLarge", "payload"),
        (6, "BadPriority", "priority"),
        (7, "BadDeviceToken", "token"),
        (8, "Unregistered", "token"),
        (10, "MissingDeviceToken", "token"),
    ]
    assert [place for place, each in enumerate(answer["ids"]) if each] == [0, 9]
    waiting = await sent(house)
    assert [waiting[each] for each in answer["ids"] if each] == [
        (token(1), {"aps": {"alert": {"body": "one"}}}),
        (token(9), {"own": 9}),
    ]


async def test_tokens_that_are_no_strings_are_told_one_by_one(house: House, caller: Caller) -> None:
    tokens = [token(1), None, token(2), 3, [token(3)]]
    answer = await caller.send({"tokens": tokens, "title": "x", "partial": True})
    assert fates(answer) == [(place, "BadType", "token") for place in (1, 3, 4)]
    assert [each is None for each in answer["ids"]] == [False, True, False, True, True]
    assert house.store.waiting == 2


async def test_where_all_is_good_nothing_is_told(house: House, caller: Caller) -> None:
    answer = await caller.send({"tokens": [token(1), token(2)], "title": "x", "partial": True})
    assert answer["errors"] == []
    assert None not in answer["ids"]
    assert list(await caller.send({"tokens": [token(1)], "title": "x", "partial": False})) == ["ids"]


async def test_of_ten_thousand_each_is_told(house: House, caller: Caller) -> None:
    tokens = [token(number) if number % 2 else "x" for number in range(10_000)]
    answer = await caller.send({"tokens": tokens, "title": "x", "partial": True})
    assert [place for place, _, _ in fates(answer)] == list(range(0, 10_000, 2))
    waiting = await sent(house)
    assert [each and waiting[each][0] for each in answer["ids"]] == [each if each != "x" else None for each in tokens]
    members = [{"token": token(1)}, *[{f"titel{number}": 1} for number in range(9_999)]]
    answer = await caller.send({"title": "x", "notifications": members, "partial": True})
    assert [place for place, _, _ in fates(answer)] == list(range(1, 10_000))


async def test_a_shared_payload_too_long_for_one_push_type_goes_to_the_others(house: House, caller: Caller) -> None:
    members = [{"token": token(1)}, {"token": token(2), "push_type": "voip"}]
    content = {"payload": {"own": "x" * 4500}, "notifications": members, "partial": True}
    answer = await caller.send(content)
    assert fates(answer) == [(0, "PayloadTooLarge", "payload")]
    assert list(await sent(house)) == answer["ids"][1:]


# -- what is refused whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, code",
    [
        ({"token": token(1), "title": "x", "partial": True}, "AmbiguousRequest"),
        ({"tokens": [token(1)], "title": "x", "partial": "yes"}, "BadType"),
        ({"tokens": [token(1), 1], "title": "x", "partial": True, "titel": "x"}, "UnknownField"),
        ({"tokens": [token(1), 1], "title": 1, "partial": True}, "BadType"),
        ({"tokens": [token(1), 1], "title": "x", "partial": True, "app": "other"}, "UnknownApp"),
        ({"tokens": [token(1)], "title": "x", "partial": True, "priority": 7}, "BadPriority"),
        ({"tokens": [token(1), "x"], "body": LONG, "partial": True}, "PayloadTooLarge"),
        ({"tokens": [token(1), 1], "partial": True}, "PayloadEmpty"),
        ({"tokens": [token(1), 1], "notifications": [{}], "title": "x", "partial": True}, "BadType"),
        ({"tokens": [token(1), 1], "token": token(1), "title": "x", "partial": True}, "AmbiguousRequest"),
        ({"tokens": [], "title": "x", "partial": True}, "MissingDeviceToken"),
        (b'{"partial": true, "title": "x", "tokens": ["ab", 1], }', "InvalidJson"),
    ],
)
async def test_what_concerns_all_refuses_all(house: House, caller: Caller, content: Any, code: str) -> None:
    problem = await caller.complaint(content)
    assert code in {problem["code"], *(each["code"] for each in problem.get("errors", ()))}
    assert house.store.waiting == 0


async def test_where_nothing_is_good_all_is_refused_and_each_is_told(house: House, caller: Caller) -> None:
    await mark(house, dead=1, held=2)
    tokens = [token(1), token(2), 3, *["x"] * 200]
    problem = await caller.complaint({"tokens": tokens, "title": "x", "partial": True})
    assert problem["code"] == "Unregistered"
    assert [place for place, _, _ in fates(problem)] == list(range(203))
    assert "203 things are wrong in 203 notifications, so nothing was taken. The first: " in problem["detail"]
    for members in ([1] * 200, [{"token": token(1), "payload": {}, "body": "x"}] * 200):
        problem = await caller.complaint({"notifications": members, "partial": True})
        assert len(problem["errors"]) == 200
    assert house.store.waiting == 0


async def test_too_many_are_too_many_though_some_are_wrong(caller: Caller) -> None:
    tokens = [1, *[token(number) for number in range(10_000)]]
    problem = await caller.complaint({"tokens": tokens, "title": "x", "partial": True})
    assert problem["code"] == "TooManyNotifications"


# -- all or nothing --------------------------------------------------------------------------------------------------


async def test_without_partial_one_wrong_entry_refuses_all(house: House, caller: Caller) -> None:
    await mark(house, dead=2, held=3)
    for more in ({}, {"partial": False}, {"partial": None}):
        problem = await caller.complaint({"tokens": [token(1), token(2), token(3)], "title": "x", **more})
        assert fates(problem) == [(1, "Unregistered", "token"), (2, "BadDeviceToken", "token")]
    assert house.store.waiting == 0


async def test_all_that_is_wrong_with_an_entry_is_told_at_once(caller: Caller) -> None:
    members = [
        {"token": token(1)},
        {"token": 1, "titel": "x", "badge": "3", "sound": {"nam": "x"}, "boddy": 1, "title": {"loc_key": 2}},
        {"push_type": "alrt", "app": "shop", "url_args": ["a", 1]},
    ]
    problem = await caller.complaint({"title": "x", "notifications": members})
    assert fates(problem) == [
        (1, "BadType", "token"),
        (1, "UnknownField", "titel"),
        (1, "BadType", "badge"),
        (1, "UnknownField", "sound.nam"),
        (1, "UnknownField", "boddy"),
        (1, "BadType", "title.loc_key"),
        (2, "InvalidPushType", "push_type"),
        (2, "UnknownField", "app"),
        (2, "BadType", "url_args[1]"),
    ]
    assert problem["detail"].startswith("9 things are wrong, so nothing was taken. The first: ")


async def test_all_that_is_wrong_with_a_single_one_is_told_at_once(caller: Caller) -> None:
    problem = await caller.complaint({"token": 1, "titel": "x", "badge": "3", "wait": "long"})
    assert [(each["code"], each["field"], "index" in each) for each in problem["errors"]] == [
        ("BadType", "token", False),
        ("UnknownField", "titel", False),
        ("BadType", "badge", False),
        ("BadType", "wait", False),
    ]


async def test_what_is_wrong_beside_a_list_and_in_it_is_told_together(caller: Caller) -> None:
    problem = await caller.complaint({"titel": "x", "notifications": [{"token": token(1)}, {"token": 2}], "app": 1})
    assert [(each["code"], each["field"], each.get("index")) for each in problem["errors"]] == [
        ("UnknownField", "titel", None),
        ("BadType", "token", 1),
        ("BadType", "app", None),
    ]


def test_a_body_with_very_many_unknown_fields_is_told_of_by_those_that_are_known() -> None:
    names = ",".join(f'"{number}":1' for number in range(200_000))
    with pytest.raises(Problem) as caught:
        columns.read(b'{"tokens":[1],"badge":"x",%s}' % names.encode())
    assert [each.field for each in caught.value.errors] == ["badge", "token"]
    with pytest.raises(Problem) as caught:
        columns.read(b'{"tokens":["ab"],%s}' % names.encode())
    assert [(each.code, each.field) for each in caught.value.errors] == [("UnknownField", "0")]


# -- whatever is sent ------------------------------------------------------------------------------------------------

_member = st.one_of(
    st.integers(0, 3).map(lambda number: {"token": token(number)}),
    st.fixed_dictionaries({"token": st.sampled_from(["x", "", "abc", token(1)])}, optional={"body": st.just(LONG)}),
    st.sampled_from([None, 1, "x", {"token": 1}, {"tokn": "x"}, {"token": token(1), "priority": 3}]),
)


@given(st.lists(_member, min_size=1, max_size=12))
def test_each_entry_is_in_the_columns_or_told_of(members: list[Any]) -> None:
    body = json.dumps({"notifications": members, "title": "x", "partial": True}).encode()
    try:
        request = columns.read(body)
    except (Problem, Refused):
        return
    told = {each.index for each in request.wrong if each.index is not None}
    assert sorted([*request.places, *told]) == list(range(request.count))
    assert request.count == len(members)
    assert [members[place]["token"] for place in request.places] == list(request.columns.tokens)
    for column in (request.columns.headers, request.columns.payloads):
        assert len(column) in (1, len(request.places))
