"""`Idempotency-Key`: a request that is repeated is taken once, whoever crashed meanwhile and whatever has changed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliograph.doors import taking
from heliograph.doors.api import Api
from heliograph.doors.exchange import ErrorItem
from heliograph.doors.notifications import Notifications
from heliograph.errors import Refused, StoreError
from heliograph.keys import Keyring
from heliograph.model import Batch, DeviceToken, Environment, Headers, LeaseEnd, Once, Removal, Scope
from heliograph.ports import Queue
from heliograph.relay import Relay
from heliograph.service import serving
from heliograph.simulator.server import Simulator
from heliograph.stores.sqlite import SqliteStore
from heliograph.telemetry import Telemetry
from tests.service.house import APP, PATIENCE_S, TOPIC, House, open_house, token
from tests.service.test_api import KEY, Bare, Caller, calling, door_of, serving_door, settings_for

WORD = "8e03978e-40d5-43e8-bc93-6894a57f9324"


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator() as apple:
        apple.add_app(TOPIC)
        yield apple


@asynccontextmanager
async def door(house: House, relay: Relay | None = None) -> AsyncIterator[Bare]:
    relay = relay or house.relay
    async with serving_door(door_of(relay, [APP]), relay) as bare:
        yield bare


@pytest.fixture
async def house(tmp_path: Path, apple: Simulator) -> AsyncIterator[House]:
    async with open_house(tmp_path, apple, working=False) as house:
        yield house


@pytest.fixture
async def caller(house: House) -> AsyncIterator[Caller]:
    async with door(house) as bare:
        yield bare.caller


def headed(word: str = WORD) -> dict[str, str]:
    return {"Idempotency-Key": word}


async def post(
    caller: Caller, content: Any, word: str = WORD, *, query: str = "", key: str | None = None
) -> tuple[int, Any, bool]:
    """Status, answer, and whether it was said to be an old one."""
    more = {} if key is None else {"authorization": f"Bearer {key}"}
    status, body, response = await caller.post(content, query=query, headers=headed(word) | more)
    told = response.headers.get("Idempotency-Replayed")
    assert told in (None, "true")
    return status, body, told is not None


def one(number: int = 1, **fields: Any) -> dict[str, Any]:
    return {"token": token(number), "title": "x", **fields}


# -- the same again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        one(),
        {"tokens": [token(number) for number in range(2500)], "title": "x"},
        {"notifications": [one(1), one(2)]},
        {"tokens": [token(1), "x", token(2), "y"], "title": "x", "partial": True},
    ],
)
async def test_a_repeated_request_gets_the_first_answer_and_takes_nothing(
    house: House, caller: Caller, content: Any
) -> None:
    first = await post(caller, content)
    taken = house.store.waiting
    assert taken
    assert (first[0], first[2]) == (202, False)
    for _ in range(2):
        assert await post(caller, content) == (202, first[1], True)
    assert house.store.waiting == taken


async def test_the_answer_says_where_the_receipt_is_each_time(caller: Caller) -> None:
    _, first, response = await caller.post(one(), headers=headed())
    _, _, again = await caller.post(one(), headers=headed())
    assert response.headers["location"] == again.headers["location"] == first["receipt"]


async def test_without_the_header_everything_is_taken(house: House, caller: Caller) -> None:
    ids = {(await caller.send(one()))["id"] for _ in range(3)}
    assert len(ids) == house.store.waiting == 3
    _, _, response = await caller.post(one())
    assert "Idempotency-Replayed" not in response.headers


async def test_other_words_are_other_requests(house: House, caller: Caller) -> None:
    answers = [await post(caller, one(), word) for word in ("a", "b", "A")]
    assert len({answer["id"] for _, answer, _ in answers}) == house.store.waiting == 3


@pytest.mark.parametrize("bare, quoted", [(WORD, f'"{WORD}"'), ('a\\b"c', '"a\\\\b\\"c"')])
async def test_a_word_is_the_same_bare_and_as_a_string_of_structured_fields(
    caller: Caller, bare: str, quoted: str
) -> None:
    first = await post(caller, one(), bare)
    assert await post(caller, one(), quoted) == (202, first[1], True)


@pytest.mark.parametrize(
    "content",
    [
        one(2),
        one(1, priority=5),
        {"title": "x"},
        b"{",
        one(app="other"),
        b'{"token":"%s", "title":"x"}' % token(1).encode(),
    ],
)
async def test_the_same_word_with_another_body_is_refused_and_takes_nothing(
    house: House, caller: Caller, content: Any
) -> None:
    await post(caller, one())
    status, problem, replayed = await post(caller, content)
    assert (status, problem["code"], replayed) == (422, "IdempotencyKeyReused", False)
    assert problem["type"] == "/docs/errors#idempotency-key-reused"
    assert house.store.waiting == 1


async def test_what_no_longer_could_be_taken_is_answered_as_before(house: House, caller: Caller) -> None:
    first = await post(caller, one())
    dead = Removal(APP, Environment.PRODUCTION, DeviceToken(token(1)), int(time.time()))
    await house.store.record([], [dead])
    assert await post(caller, one()) == (202, first[1], True)
    assert (await post(caller, one(), "another"))[1]["code"] == "Unregistered"


async def test_a_repeated_request_is_answered_though_there_is_no_room(tmp_path: Path, house: House) -> None:
    store = await SqliteStore.open(tmp_path / "small.db", max_waiting=1)
    relay = Relay(store, store, house.carrier, house.relay._apps, Telemetry(), clock=time.time)
    async with door(house, relay) as bare:
        first = await post(bare.caller, one())
        assert (await post(bare.caller, one(), "another"))[0] == 429
        assert await post(bare.caller, one()) == (202, first[1], True)
    await store.aclose()


async def test_words_are_each_callers_own(house: House) -> None:
    keyring = Keyring(KEY.encode(), house.store, clock=time.time)
    _, other = await keyring.make("other", [Scope.SEND], None)
    api = Api((Notifications(house.relay, [APP]),), keyring)
    async with serving_door(api, house.relay) as bare:
        caller = bare.caller
        first = await post(caller, one())
        second = await post(caller, one(), key=other)
        assert (second[0], second[2]) == (202, False)
        assert first[1]["id"] != second[1]["id"]
        assert (await post(caller, one(2), "mine", key=other))[0] == 202
        assert (await post(caller, one(3), "mine"))[0] == 202


# -- refused, and once more ------------------------------------------------------------------------------------------


async def test_a_refused_request_keeps_nothing_and_may_be_corrected(caller: Caller) -> None:
    for content in (b"{", {"title": "x"}, one(titel="x"), {"token": "x", "title": "x"}, one(app="other")):
        status, _, replayed = await post(caller, content)
        assert (status, replayed) == (400, False)
    status, _, replayed = await post(caller, one())
    assert (status, replayed) == (202, False)


async def test_who_was_put_off_may_repeat(tmp_path: Path, house: House) -> None:
    store = await SqliteStore.open(tmp_path / "small.db", max_waiting=2)
    relay = Relay(store, store, house.carrier, house.relay._apps, Telemetry(), clock=time.time)
    content = {"tokens": [token(2), token(3)], "title": "x"}
    async with door(house, relay) as bare:
        await bare.caller.send(one())
        assert (await post(bare.caller, content))[0] == 429
        (lease,) = await store.take(1)
        await store.finish([LeaseEnd(lease.batch.id, lease.attempt)])
        status, _, replayed = await post(bare.caller, content)
        assert (status, replayed) == (202, False)
        assert store.waiting == 2
    await store.aclose()


@pytest.mark.parametrize(
    "word",
    ["", '""', '"', '"a', 'a"b" c', "a b", "a,\tb", "x" * 256, f'"{"x" * 256}"', "kettle ☕", '"a\\b"', '"a";q=1'],
)
async def test_a_word_that_is_none_is_refused(house: House, caller: Caller, word: str) -> None:
    status, problem, _ = await post(caller, one(), word)
    assert (status, problem["code"]) == (400, "BadIdempotencyKey")
    assert problem["errors"][0]["field"] == "Idempotency-Key"
    assert house.store.waiting == 0


@pytest.mark.parametrize("word", ["x", "x" * 255, f'"{"x" * 255}"', '"a b"', "a;b", "a,b", "!~"])
async def test_any_printable_word_of_up_to_255_characters_will_do(caller: Caller, word: str) -> None:
    assert (await post(caller, one(), word))[0] == 202


@given(st.binary(max_size=300))
def test_any_octets_are_a_word_or_refused(header: bytes) -> None:
    with contextlib.suppress(Refused):
        assert len(taking.once_key(header, "")) == 32


# -- at once ---------------------------------------------------------------------------------------------------------


async def test_of_a_hundred_at_once_exactly_one_is_taken_and_all_get_its_id(house: House, caller: Caller) -> None:
    answers = await asyncio.gather(*(post(caller, one()) for _ in range(100)))
    assert {(status, answer["id"]) for status, answer, _ in answers} == {(202, answers[0][1]["id"])}
    assert sum(not replayed for _, _, replayed in answers) == 1
    assert house.store.waiting == 1


async def test_of_different_requests_at_once_one_is_taken_and_the_others_are_told(house: House, caller: Caller) -> None:
    answers = await asyncio.gather(*(post(caller, one(number)) for number in range(20)))
    assert sorted(status for status, _, _ in answers) == [202] + 19 * [422]
    assert house.store.waiting == 1


class Forgetful:
    """A queue under whose hands what was kept is forgotten at the worst moment: after it has said that it is there."""

    def __init__(self, store: SqliteStore, path: Path) -> None:
        self._store = store
        self._path = path
        self.room = 1

    async def put(self, batches: Sequence[Batch], *, lease: bool = False, once: Once | None = None) -> Sequence[Any]:
        try:
            return await self._store.put(batches, lease=lease, once=once)
        finally:
            with apsw.Connection(str(self._path)) as db:
                db.set_busy_timeout(5000)
                db.execute("DELETE FROM once")


async def test_what_is_forgotten_at_the_very_moment_is_taken_anew(tmp_path: Path, house: House) -> None:
    await house.store.put(await house.admit([token(9)]), once=Once(taking.once_key(WORD.encode(), ""), bytes(32), b""))
    queue: Queue = Forgetful(house.store, tmp_path / "heliograph.db")  # type: ignore[assignment]
    relay = Relay(queue, Blind(house.store), house.carrier, house.relay._apps, Telemetry(), clock=time.time)
    async with door(house, relay) as bare:
        status, _, replayed = await post(bare.caller, one())
    assert (status, replayed) == (202, False)
    assert house.store.waiting == 2


class Blind:
    """A store that does not find what is there the first time, as though it had come in between."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._looked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def find_once(self, key: bytes) -> Once | None:
        looked, self._looked = self._looked, True
        return await self._store.find_once(key) if looked else None


# -- waiting for the outcome -----------------------------------------------------------------------------------------


async def test_with_wait_a_repeat_gets_the_outcome_of_the_first(tmp_path: Path, apple: Simulator) -> None:
    async with serving(settings_for(tmp_path, apple)) as running, calling(running) as caller:
        status, first, replayed = await post(caller, one(wait=PATIENCE_S))
        assert (status, first["state"], replayed) == (200, "accepted", False)
        assert await post(caller, one(wait=PATIENCE_S)) == (200, first, True)
        _, taken, _ = await post(caller, one(2), "other")
        status, again, replayed = await post(caller, one(2), "other", query=f"?wait={PATIENCE_S}")
        assert (status, again["id"], again["state"], replayed) == (200, taken["id"], "accepted", True)
        assert (await post(caller, one(2), "other", query="?wait=x"))[1]["code"] == "BadWait"
        assert (await post(caller, one(2), "other", query="?wiat=1"))[1]["code"] == "UnknownParameter"
    assert len(apple.received) == 2


# -- restarts, and time ----------------------------------------------------------------------------------------------


async def test_what_was_taken_is_known_after_a_restart(tmp_path: Path, apple: Simulator) -> None:
    content = {"tokens": [token(1), "x", token(2)], "title": "x", "partial": True}
    async with open_house(tmp_path, apple, working=False) as house, door(house) as bare:
        first = await post(bare.caller, content)
    async with open_house(tmp_path, apple, working=False) as house, door(house) as bare:
        assert await post(bare.caller, content) == (202, first[1], True)
        assert house.store.waiting == 2


async def test_after_a_day_the_same_request_is_taken_anew(tmp_path: Path, house: House) -> None:
    ahead = 0.0
    store = await SqliteStore.open(tmp_path / "other.db", clock=time.time, monotonic=lambda: time.monotonic() + ahead)
    relay = Relay(store, store, house.carrier, house.relay._apps, Telemetry(), clock=time.time)
    async with door(house, relay) as bare:
        first = await post(bare.caller, one())
        ahead = 86_400 - 3600
        assert await post(bare.caller, one()) == (202, first[1], True)
        ahead = 86_400
        status, again, replayed = await post(bare.caller, one())
        assert (status, replayed) == (202, False)
        assert again["id"] != first[1]["id"]
    await store.aclose()


async def test_an_answer_that_is_damaged_is_a_fault_of_the_store(house: House, caller: Caller) -> None:
    body = json.dumps(one()).encode()
    key = taking.once_key(WORD.encode(), "")
    kept = taking.keep(key, body, taking.Taken((), single=True))
    await house.store.put(await house.admit([token(1)]), once=Once(key, kept.request, b"\xc1"))
    status, problem, _ = await post(caller, body)
    assert (status, problem["code"]) == (503, "StoreUnavailable")


# -- what is kept ----------------------------------------------------------------------------------------------------


def batch(number: int, size: int) -> Batch:
    name = f"01a1fdd3-db9d-79a4-87f4-{number:08x}"
    return Batch(name, APP, Environment.PRODUCTION, 0.0, (Headers(TOPIC),), [b"ab"] * size, [b"{}"])


def test_what_is_kept_of_ten_thousand_notifications_is_short() -> None:
    taken = taking.take_down([batch(number, 1000) for number in range(10)], single=False, wrong=None)
    assert len(json.loads(taken.body())["ids"]) == 10_000
    assert len(taking.keep(bytes(32), b"", taken).answer) < 512


def test_what_is_kept_of_thousands_that_are_wrong_in_one_way_is_short() -> None:
    wrong = [ErrorItem("Unregistered", "It is dead: " + "x" * 100, index, "token") for index in range(9000)]
    kept = taking.keep(bytes(32), b"", taking.take_down([batch(1, 1000)], single=False, wrong=wrong))
    assert len(kept.answer) < 20_000
    again = taking.find_again(kept, b"")
    assert again is not None
    answer = json.loads(again.body())
    assert answer["ids"] == [None] * 9000 + [f"{batch(1, 1).id}{place:04x}" for place in range(1, 1001)]
    assert [each["index"] for each in answer["errors"]] == list(range(9000))


_error = st.builds(
    ErrorItem, st.sampled_from("ab"), st.sampled_from("cd"), st.integers(0, 40), st.sampled_from(["f", None])
)


@given(st.lists(_error, max_size=30), st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_what_is_kept_makes_the_same_answer_again(wrong: list[ErrorItem], sizes: list[int]) -> None:
    refused = {each.index for each in wrong}
    count = sum(sizes) + len(refused)
    if any(index is not None and index >= count for index in refused):
        return
    taken = taking.take_down([batch(*each) for each in enumerate(sizes)], single=False, wrong=wrong)
    kept = taking.keep(bytes(32), b"body", taken)
    again = taking.find_again(kept, b"body")
    assert again is not None
    assert again.body() == taken.body()
    assert taking.find_again(kept, b"other") is None
    answer = json.loads(taken.body())
    assert {index for index, each in enumerate(answer["ids"]) if each is None} == refused
    assert [each for each in answer["ids"] if each] == [
        f"{batch(number, 1).id}{place:04x}" for number, size in enumerate(sizes) for place in range(1, size + 1)
    ]
    assert sorted((each["index"], each["code"]) for each in answer["errors"]) == sorted(
        (each.index, each.code) for each in wrong
    )


def test_what_cannot_be_read_again_is_told_without_what_it_was() -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        taking.find_again(Once(bytes(32), taking.keep(bytes(32), b"", taking.Taken((), True)).request, b"{"), b"")
