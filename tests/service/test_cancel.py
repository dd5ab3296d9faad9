"""Cancelling, from what waits in the store to what is on the wire: real SQLite, the real wire, the simulator."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import apsw
import msgspec
import pytest

from heliograph.carriers.apns import PoolSettings
from heliograph.errors import StoreError
from heliograph.model import Detail, Environment, Headers, LeaseEnd, Outcomes, Receipt, State
from heliograph.protocols.http2 import ErrorCode
from heliograph.simulator.faults import Action, Answer, Delay, Reset
from heliograph.simulator.server import Judged, Simulator
from tests.service.house import APP, PATIENCE_S, TOPIC, House, open_house, token

CANCELLED = State.CANCELLED


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator(keep=20_000) as apple:
        yield apple


@pytest.fixture
async def house(tmp_path: Path, apple: Simulator) -> AsyncIterator[House]:
    async with open_house(tmp_path, apple) as house:
        yield house


@pytest.fixture
async def cut_off(tmp_path: Path) -> AsyncIterator[House]:
    """A house whose Apple cannot be reached: what is sent waits in the carrier for half a minute."""
    async with Simulator() as gone:
        pass
    async with open_house(tmp_path, gone) as house:
        yield house


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is looked at has no event
            await asyncio.sleep(0.002)


async def carried(house: House, *, waiting: int = 0, in_flight: int = 0) -> None:
    """Return once the carrier has so many."""

    def is_so() -> bool:
        views = house.carrier.lanes()
        return (sum(each.waiting for each in views), sum(each.in_flight for each in views)) == (waiting, in_flight)

    await until(is_so)


async def cancel(house: House, ids: Sequence[str]) -> list[Receipt]:
    found = [receipt for receipt in await house.relay.cancel(ids) if receipt is not None]
    assert [receipt.id for receipt in found] == list(ids)
    assert found == [receipt for receipt in await house.relay.receipts(ids) if receipt is not None]  # on record
    return found


def states(receipts: Sequence[Receipt]) -> list[State]:
    return [receipt.state for receipt in receipts]


async def test_what_waits_in_the_store_is_never_sent_once_it_is_cancelled(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        ids = await house.push([token(number) for number in range(1500)])
        assert set(states(await cancel(house, ids[::2]))) == {CANCELLED}
        assert house.store.waiting == 1500
        lone = await house.push([token(9)])
        await cancel(house, lone)
        assert house.store.waiting == 1500
    async with open_house(tmp_path, apple) as house:
        await house.receipts(ids)
        assert set(states(await cancel(house, ids[::2]))) == {CANCELLED}  # again is no fault
        await until(lambda: house.store.waiting == 0)
    assert sorted(each.id for each in apple.received) == sorted(ids[1::2])


async def test_who_waits_for_the_outcome_hears_at_once_that_it_was_cancelled_in_the_store(
    tmp_path: Path, apple: Simulator
) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        (lone,) = await house.push([token(1)])
        waiting = asyncio.create_task(house.relay.receipt(lone, 1000 * PATIENCE_S))
        await until(lambda: bool(house.relay._waiters))
        await cancel(house, [lone])
        receipt = await asyncio.wait_for(waiting, PATIENCE_S)
        assert receipt is not None
        assert receipt.state is CANCELLED


async def test_what_waits_in_the_carrier_as_apple_cannot_be_reached_is_cancelled_at_once(cut_off: House) -> None:
    ids = await cut_off.push([token(number) for number in range(100)])
    ids += await cut_off.push([token(200)])
    await carried(cut_off, waiting=101)
    receipts = await cancel(cut_off, [*ids[20:40], ids[100]])
    assert {(each.state, each.attempts, each.reason, each.status) for each in receipts} == {(CANCELLED, 0, None, None)}
    await carried(cut_off, waiting=80)
    assert set(states(await cancel(cut_off, ids))) == {CANCELLED}
    await carried(cut_off)
    await until(lambda: cut_off.store.waiting == 0)


async def test_those_beside_what_is_taken_back_from_the_carrier_are_sent_whole(
    tmp_path: Path, apple: Simulator
) -> None:
    chance = random.Random(5)
    kinds = [Headers(TOPIC), Headers(TOPIC, collapse_id="x"), Headers(TOPIC, priority=5)]
    async with open_house(tmp_path, apple, settings=PoolSettings(connections=1)) as house:
        apple.misbehaves(Delay(0.3), times=1)  # the one stream that a new connection has
        first = await house.push([token(0)])
        await carried(house, in_flight=1)
        tokens = [token(number) for number in range(1, 301)]
        ids = await house.push(
            tokens, [b'{"n":%d}' % number for number in range(300)], [chance.choice(kinds) for _ in range(300)]
        )
        await carried(house, waiting=300, in_flight=1)
        gone = chance.sample(ids, 150)
        for start in range(0, 150, 10):
            assert set(states(await cancel(house, gone[start : start + 10]))) == {CANCELLED}
        kept = [each for each in ids if each not in gone]
        await house.receipts([*first, *kept])
    received = {each.id: each for each in apple.received}
    assert sorted(received) == sorted([*first, *kept])
    for place, each in enumerate(ids):
        if each in received:
            assert (received[each].token, received[each].payload) == (tokens[place], b'{"n":%d}' % place)


async def test_what_is_put_off_is_cancelled_and_its_receipt_tells_what_went_wrong(
    house: House, apple: Simulator
) -> None:
    apple.misbehaves(Answer(503, "ServiceUnavailable", retry_after_s=3600), token=token(1))
    apple.misbehaves(Delay(1.0), token=token(2))  # so its batch stays in hand
    ids = await house.push([token(1), token(2)])
    await house.receipts(ids[:1], lambda receipt: receipt.reason is not None)
    (receipt,) = await cancel(house, ids[:1])
    assert (receipt.state, receipt.status, receipt.attempts) == (CANCELLED, 503, 1)
    assert receipt.next_attempt_at is None
    (other,) = await house.receipts(ids[1:])
    assert other.state is State.ACCEPTED
    await until(lambda: house.store.waiting == 0)

    (lone,) = await house.push([token(1)])  # and where nobody has it in hand any more
    await house.receipts([lone], lambda receipt: receipt.reason is not None)
    assert states(await cancel(house, [lone])) == [CANCELLED]
    await until(lambda: house.store.waiting == 0)


@pytest.mark.parametrize("alone", [True, False])
async def test_what_apple_may_have_taken_when_it_was_last_tried_is_unknown_once_it_is_cancelled(
    house: House, apple: Simulator, *, alone: bool
) -> None:
    apple.resets(token(1), ErrorCode.INTERNAL_ERROR)
    apple.misbehaves(Delay(1.0), token=token(2))  # so its batch stays in hand
    (first, *_) = ids = await house.push([token(1)] if alone else [token(1), token(2)])
    await house.receipts([first], lambda receipt: receipt.reason == "NoAnswer")
    await house.relay.cancel([first])
    receipt, *_ = await house.receipts(ids)
    assert (receipt.state, receipt.reason, receipt.next_attempt_at) == (State.UNKNOWN, "NoAnswer", None)
    await until(lambda: house.store.waiting == 0)
    meter = house.relay._telemetry.lane(APP, Environment.PRODUCTION)
    assert dict(meter.ends)["unknown",] == 1


async def test_what_apple_may_have_taken_before_its_last_no_is_unknown_once_it_is_cancelled(
    house: House, apple: Simulator
) -> None:
    apple.resets(token(1), ErrorCode.INTERNAL_ERROR, times=1)
    apple.rejects(token(1), "ServiceUnavailable", retry_after_s=600)
    ids = await house.push([token(1)])
    await house.receipts(ids, lambda receipt: receipt.reason == "ServiceUnavailable")
    await house.relay.cancel(ids)
    (receipt,) = await house.receipts(ids)
    assert (receipt.state, receipt.reason, receipt.status) == (State.UNKNOWN, "NoAnswer", None)
    assert receipt.why == "an earlier try was not answered"


@pytest.mark.parametrize(
    "then,state,reason",
    [
        (None, State.ACCEPTED, None),
        (Answer(503, "ServiceUnavailable"), CANCELLED, "ServiceUnavailable"),
        (Answer(403, "ExpiredProviderToken"), CANCELLED, "ExpiredProviderToken"),
        (Answer(410, "Unregistered"), State.REJECTED, "Unregistered"),
        (Reset(ErrorCode.REFUSED_STREAM), CANCELLED, None),
        (Reset(ErrorCode.INTERNAL_ERROR), State.UNKNOWN, "NoAnswer"),
    ],
)
async def test_what_is_on_the_wire_is_cancelled_unless_apple_takes_it_this_time(
    house: House, apple: Simulator, then: Answer | Reset | None, state: State, reason: str | None
) -> None:
    apple.misbehaves(Delay(0.5, then))
    (notification_id,) = await house.push([token(1)])
    await carried(house, in_flight=1)
    for _ in range(2):
        (receipt,) = await cancel(house, [notification_id])
        assert (receipt.state, receipt.cancelling) == (State.QUEUED, True)
    (receipt,) = await house.receipts([notification_id])
    assert (receipt.state, receipt.reason, receipt.cancelling) == (state, reason, False)
    await until(lambda: house.store.waiting == 0)
    assert len(apple.received) == (state is State.ACCEPTED)


async def test_what_has_ended_is_left_as_it_is(house: House, apple: Simulator) -> None:
    apple.unregister(token(2), 1_700_000_000_000)
    ids = await house.push([token(1), token(2)])
    await house.receipts(ids)
    assert states(await cancel(house, ids)) == [State.ACCEPTED, State.REJECTED]


async def test_what_is_sent_at_most_once_is_not_cancelled_once_that_is_written_down(
    house: House, apple: Simulator
) -> None:
    apple.misbehaves(Delay(0.5), times=1)
    ids = await house.push([token(1)], headers=[Headers(TOPIC, at_most_once=True)])
    await carried(house, in_flight=1)
    assert states(await cancel(house, ids)) == [State.SENT]
    assert states(await house.receipts(ids)) == [State.ACCEPTED]


async def test_what_is_unknown_or_of_another_app_is_not_cancelled(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        ids = await house.push([token(1), token(2)])
        strange = ["", "x", ids[0][:-4] + "0000", ids[0][:-4] + "0003"]
        assert list(await house.relay.cancel([*strange, ids[0].upper()])) == [None] * 4 + list(
            await house.relay.receipts(ids[:1])
        )
        assert list(await house.relay.cancel(ids, ["other"])) == [None, None]
        assert states(await house.receipts(ids, lambda _: True)) == [CANCELLED, State.QUEUED]
        assert None not in await house.relay.cancel(ids, ["other", APP])
        assert states(await house.receipts(ids, lambda _: True)) == [CANCELLED, CANCELLED]
        assert list(await house.relay.cancel([])) == []


async def test_what_was_being_cancelled_on_the_wire_when_the_server_died_is_not_sent_again(
    tmp_path: Path, apple: Simulator
) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        ids = await house.push([token(1), token(2)])
        (lease,) = await house.store.take(1)
        known = Outcomes(lease.batch.id, lease.attempt, bytes(2), bytes(8), (Detail(0, cancelled=True),))
        await house.store.record([known], [])
        await house.store.finish([LeaseEnd(lease.batch.id, lease.attempt, time.time())])
        (receipt,) = await cancel(house, ids[:1])
        assert (receipt.state, receipt.cancelling) == (State.QUEUED, True)
    async with open_house(tmp_path, apple) as house:
        receipts = await house.receipts(ids)
    assert states(receipts) == [State.UNKNOWN, State.ACCEPTED]
    assert not receipts[0].cancelling
    assert [each.id for each in apple.received] == ids[1:]


async def test_nobody_is_told_of_a_cancellation_that_cannot_be_written_down(
    house: House, apple: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heliograph.relay._CANCEL_S", 0.3)
    apple.misbehaves(Delay(0.1, Answer(503, "ServiceUnavailable", retry_after_s=3600)))
    ids = await house.push([token(1)])
    await house.receipts(ids, lambda receipt: receipt.reason is not None)
    with contextlib.closing(apsw.Connection(str(tmp_path / "heliograph.db"))) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="written down"):
            await house.relay.cancel(ids)
        other.execute("ROLLBACK")
    assert states(await cancel(house, ids)) == [CANCELLED]


@pytest.mark.parametrize("faults", [(), (Answer(503, "ServiceUnavailable"), Reset(ErrorCode.REFUSED_STREAM))])
async def test_what_was_said_to_be_cancelled_under_load_was_never_taken_by_apple(
    tmp_path: Path, faults: Sequence[Action]
) -> None:
    chance = random.Random(len(faults))
    journal = tmp_path / "journal"
    told: dict[str, float] = {}
    """When it was said of which."""
    late: set[str] = set()
    async with Simulator(streams=40, journal=journal) as apple:
        for fault in faults:
            apple.misbehaves(fault, share=0.05)
        apple.misbehaves(Delay(0.01), share=0.5)
        async with open_house(tmp_path, apple, settings=PoolSettings(connections=2)) as house:
            ids: list[str] = []
            over = asyncio.Event()

            async def send() -> None:
                for number in range(60):
                    size = chance.choice([1, 1, 5, 50, 200])
                    ids.extend(await house.push([token(1000 * number + place) for place in range(size)]))
                    await asyncio.sleep(chance.uniform(0, 0.02))
                over.set()

            async def call_off() -> None:
                while not over.is_set() or chance.random() < 0.9:
                    await asyncio.sleep(chance.uniform(0, 0.02))
                    newest = ids[-400:]
                    some = chance.sample(newest, min(len(newest), chance.choice([1, 3, 40])))
                    for receipt in await house.relay.cancel(some):
                        assert receipt is not None
                        if receipt.state is CANCELLED:
                            told.setdefault(receipt.id, time.time())
                        elif not receipt.cancelling:
                            late.add(receipt.id)

            await asyncio.gather(send(), *[call_off() for _ in range(4)])
            left = [receipt.id for receipt in await house.receipts(ids, _is_over)]
            assert left == ids
            final = {receipt.id: receipt for receipt in await house.receipts(ids, _is_over)}
            if not faults:
                await until(lambda: house.store.waiting == 0)
    lines = [msgspec.json.decode(line, type=Judged) for line in journal.read_bytes().splitlines()]
    taken = {line.apns_id for line in lines if line.status == 200}
    assert told
    assert late
    assert {final[each].state for each in told} == {CANCELLED}
    assert not taken & told.keys()
    assert not [line for line in lines if line.apns_id in told and line.at > told[line.apns_id]]
    assert taken == {each for each, receipt in final.items() if receipt.state is State.ACCEPTED}
    if not faults:
        assert not {line.apns_id for line in lines} & told.keys()
        assert len(lines) == len(taken)


def _is_over(receipt: Receipt) -> bool:
    """It has ended, or waits for a quarter of an hour as Apple had trouble three times."""
    return receipt.state is not State.QUEUED or (receipt.next_attempt_at or 0.0) > time.time() + 60.0
