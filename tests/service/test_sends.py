"""What is carried at once, past the queue: couriers between the simulator and a real store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from heliograph.batches import MAX_KINDS
from heliograph.carriers.apns import PoolSettings
from heliograph.errors import StoreError
from heliograph.model import ACCEPTED, MAX_BATCH, Answered, Environment, Headers, NotProcessed, Outcome, State
from heliograph.protocols.http2 import ErrorCode
from heliograph.relay import sends
from heliograph.simulator.faults import Answer, Delay, Reset, Withhold
from heliograph.simulator.server import Simulator
from tests.service.house import APP, HEADERS, PATIENCE_S, PAYLOAD, TOPIC, House, open_house, token

PRODUCTION = Environment.PRODUCTION
OWN = "0f6a2c1e-2f8d-4a67-9d5c-1b0c2d3e4f50"


class Caller:
    """Somebody who waits: what it was told, by ticket."""

    def __init__(self, house: House) -> None:
        self.courier = house.relay.courier(APP, PRODUCTION, self._tell)
        self.told: dict[int, tuple[str, Outcome]] = {}
        self._news = asyncio.Event()

    def _tell(self, tickets: Sequence[int], ids: Sequence[bytes], outcome: Outcome) -> None:
        for ticket, apns_id in zip(tickets, ids, strict=True):
            assert ticket not in self.told, "told twice"
            self.told[ticket] = apns_id.decode(), outcome
        self._news.set()

    def send(self, number: int, *, headers: Headers = HEADERS, own: str | None = None) -> None:
        self.courier.send(headers, token(number).encode(), PAYLOAD, own, number)

    async def outcomes(self, count: int) -> list[Outcome]:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.told) < count:
                self._news.clear()
                await self._news.wait()
        return [outcome for _, (_, outcome) in sorted(self.told.items())]

    @property
    def ids(self) -> list[str]:
        return [apns_id for _, (apns_id, _) in sorted(self.told.items())]


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator(keep=20_000) as apple:
        yield apple


@pytest.fixture
async def house(tmp_path: Path, apple: Simulator) -> AsyncIterator[House]:
    async with open_house(tmp_path, apple) as house:
        yield house


async def test_each_is_told_apples_answer_once_and_receipts_say_the_same(house: House) -> None:
    house.apple.unregister(token(2), 1_700_000_000_000)
    caller = Caller(house)
    for number in range(4):
        caller.send(number, own=OWN if number == 3 else None)
    assert await caller.outcomes(4) == [ACCEPTED, ACCEPTED, Answered(410, "Unregistered", 1_700_000_000_000), ACCEPTED]
    assert caller.ids[3] == OWN
    async with asyncio.timeout(PATIENCE_S):
        found = [await house.relay.receipt(each, PATIENCE_S) for each in caller.ids[:3]]
    assert [each.state for each in found if each] == [State.ACCEPTED, State.ACCEPTED, State.REJECTED]
    assert [each.id for each in found if each] == caller.ids[:3]
    (own,) = await house.relay.receipts([OWN])
    assert own is not None
    assert (own.token, own.apns_id) == (token(3), OWN)
    assert await house.store.held_among(APP, PRODUCTION, [token(2).encode()]) == {token(2).encode(): "Unregistered"}


async def test_more_than_a_batch_holds_and_more_kinds_than_one_may_have_are_all_sent(house: House) -> None:
    caller = Caller(house)
    count = 2 * MAX_BATCH + 7
    for number in range(count):
        caller.send(number)
    kinds = 2 * MAX_KINDS + 7
    for number in range(count, count + kinds):
        caller.send(number, headers=Headers(TOPIC, collapse_id=str(number)))
    assert set(await caller.outcomes(count + kinds)) == {ACCEPTED}
    assert len(set(caller.ids)) == count + kinds
    by_token = {str(each.token): (each.id, each.collapse_id) for each in house.apple.received}
    for number, apns_id in enumerate(caller.ids):
        assert by_token[token(number)] == (apns_id, None if number < count else str(number))
    receipts = await house.receipts([await settled(house, each) for each in caller.ids])
    assert [each.token for each in receipts] == [token(number) for number in range(count + kinds)]
    assert [each.collapse_id for each in receipts[-3:]] == [str(count + kinds - 3 + number) for number in range(3)]


async def settled(house: House, apns_id: str) -> str:
    """The id, once something is on record."""
    assert await house.relay.receipt(apns_id, PATIENCE_S) is not None
    return apns_id


async def test_nothing_is_sent_twice_where_nobody_knows(house: House) -> None:
    house.apple.misbehaves(Reset(ErrorCode.CANCEL, acted=True), times=1)
    caller = Caller(house)
    caller.send(1)
    (outcome,) = await caller.outcomes(1)
    assert not isinstance(outcome, Answered | NotProcessed)
    assert len(house.apple.received) == 1
    receipt = await house.relay.receipt(caller.ids[0], PATIENCE_S)
    assert receipt is not None
    assert (receipt.state, receipt.reason) == (State.UNKNOWN, "NoAnswer")


async def test_what_apple_did_not_act_on_is_carried_again_a_few_times_and_then_told(house: House) -> None:
    house.apple.misbehaves(Reset(ErrorCode.REFUSED_STREAM, acted=False), times=sends._TRIES - 1)
    caller = Caller(house)
    caller.send(1)
    assert await caller.outcomes(1) == [ACCEPTED]
    house.apple.misbehaves(Reset(ErrorCode.REFUSED_STREAM, acted=False), times=sends._TRIES)
    caller.send(2)
    assert isinstance((await caller.outcomes(2))[1], NotProcessed)
    receipt = await house.relay.receipt(caller.ids[1], PATIENCE_S)
    assert receipt is not None
    assert (receipt.state, receipt.reason) == (State.CANCELLED, "NotProcessed")


async def test_a_provider_token_that_expired_is_renewed_before_the_caller_hears_of_it(
    tmp_path: Path, apple: Simulator
) -> None:
    ahead = [0.0]

    async with open_house(tmp_path, apple, clock=lambda: time.time() + ahead[0]) as house:
        caller = Caller(house)
        caller.send(1)
        assert await caller.outcomes(1) == [ACCEPTED]
        apple.misbehaves(Delay(0.3, Answer(403, "ExpiredProviderToken")), times=1)
        caller.send(2)
        async with asyncio.timeout(PATIENCE_S):
            while not any(each.in_flight for each in house.carrier.lanes()):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        ahead[0] = -1800.0  # in the half hour before there is another provider token
        assert await caller.outcomes(2) == [ACCEPTED, ACCEPTED]


async def test_too_many_in_hand_are_told_so_at_once_and_kept_nowhere(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sends, "MOST", 10)
    house.apple.misbehaves(Delay(0.3), times=2)
    caller, other = Caller(house), Caller(house)
    caller.send(1)
    caller.send(2)
    await asyncio.sleep(0)
    caller.send(3)
    await asyncio.sleep(0)
    assert list(caller.told) == [3]
    assert isinstance(caller.told[3][1], NotProcessed)
    assert (await caller.outcomes(3))[:2] == [ACCEPTED, ACCEPTED]
    other.send(4)
    assert await other.outcomes(1) == [ACCEPTED]
    assert await house.relay.receipts([caller.ids[2]]) == [None]


async def test_stopping_keeps_what_was_learnt_last(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple) as house:
        caller = Caller(house)
        for number in range(5):
            caller.send(number)
        await caller.outcomes(5)
        ids = caller.ids
    async with open_house(tmp_path, apple, working=False) as house:
        assert {each.state for each in await house.relay.receipts(ids) if each} == {State.ACCEPTED}


async def test_who_cannot_be_asked_is_told_when_patience_ends(tmp_path: Path) -> None:
    async with Simulator() as gone:
        pass
    settings = PoolSettings(patience_s=0.2, backoff_s=0.1)
    async with open_house(tmp_path, gone, settings=settings) as house:
        caller = Caller(house)
        caller.send(1)
        (outcome,) = await caller.outcomes(1)
        assert isinstance(outcome, NotProcessed)
        assert "cannot connect" in outcome.why


async def test_store_that_fails_for_long_costs_receipts_and_nothing_else(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(sends, "_STORE_PAUSE_S", 0.01)
    monkeypatch.setattr(sends, "_MOST_UNKEPT", 3)
    caller = Caller(house)
    with monkeypatch.context() as broken:
        broken.setattr(house.store, "keep", fail)
        for number in range(1, 7):  # a sheet each
            caller.send(number)
            assert set(await caller.outcomes(number)) == {ACCEPTED}
            await asyncio.sleep(2 * sends._SHEET_S)
        assert house.relay.store_failure is not None
    found = [await house.relay.receipt(each, PATIENCE_S) for each in caller.ids]
    assert [each is not None for each in found] == [False] * 3 + [True] * 3
    assert not house.relay._sends.unkept


async def test_dead_token_is_known_at_once_though_another_of_its_sheet_waits_for_its_answer(
    house: House, apple: Simulator
) -> None:
    apple.unregister(token(2), 1_700_000_000_000)
    apple.misbehaves(Withhold(), times=1)
    caller = Caller(house)
    caller.send(1)
    caller.send(2)
    (gone,) = await caller.outcomes(1)
    assert isinstance(gone, Answered)
    async with asyncio.timeout(PATIENCE_S):
        while not (told := await house.store.find_removals(APP, PRODUCTION, 0, 10)):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
    assert [each.removal.token for each in told] == [token(2)]
    assert len(house.relay._sends.unkept) == 1
