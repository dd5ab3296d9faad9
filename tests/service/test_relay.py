"""The middle from admission to the receipt: real SQLite, the real wire, the simulator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest
import structlog

from heliograph import batches
from heliograph.carriers.apns import ApnsCarrier, Endpoint, PoolSettings, Route
from heliograph.errors import Refused, StoreError
from heliograph.model import Access, App, Batch, Detail, Environment, Headers, LeaseEnd, Outcomes, PushType, State
from heliograph.net.tls import client_context
from heliograph.protocols.http2 import ErrorCode
from heliograph.relay import Relay
from heliograph.simulator.faults import Answer
from heliograph.simulator.server import Simulator
from heliograph.stores.sqlite import SqliteStore
from heliograph.telemetry import Telemetry
from tests.service.house import APP, HEADERS, PATIENCE_S, PAYLOAD, TOPIC, House, open_house, token


@pytest.fixture
async def apple() -> AsyncIterator[Simulator]:
    async with Simulator(keep=20_000) as apple:
        yield apple


@pytest.fixture
async def house(tmp_path: Path, apple: Simulator) -> AsyncIterator[House]:
    async with open_house(tmp_path, apple) as house:
        yield house


async def test_a_notification_reaches_the_simulator_with_its_own_id_and_payload(house: House) -> None:
    (notification_id,) = await house.push([token(1)])
    (receipt,) = await house.receipts([notification_id])
    assert receipt.state is State.ACCEPTED
    assert receipt.attempts == 1
    (received,) = house.apple.received
    assert (received.id, received.payload) == (notification_id, PAYLOAD)
    assert received.token == token(1)
    assert received.topic == TOPIC


async def test_ten_thousand_notifications_are_each_accepted_once(house: House) -> None:
    tokens = [token(number) for number in range(10_000)]
    ids = await house.push(tokens)
    assert len(set(ids)) == 10_000
    receipts = await house.receipts(ids)
    assert {receipt.state for receipt in receipts} == {State.ACCEPTED}
    assert sorted(received.id for received in house.apple.received) == sorted(ids)
    assert sorted(received.token for received in house.apple.received) == tokens


async def test_each_notification_keeps_its_own_payload_and_headers(house: House) -> None:
    count = 600
    payloads = [json.dumps({"aps": {"alert": f"number {number}"}}).encode() for number in range(count)]
    later = int(time.time()) + 3600
    headers = [
        Headers(TOPIC, collapse_id=f"game-{number}", expiration=later + number % 3, priority=5 if number % 7 else None)
        for number in range(count)
    ]
    ids = await house.push([token(number) for number in range(count)], payloads, headers)
    await house.receipts(ids)
    received = {each.id: each for each in house.apple.received}
    for number, notification_id in enumerate(ids):
        assert received[notification_id].payload == payloads[number]
        assert received[notification_id].collapse_id == f"game-{number}"


async def test_an_alert_without_a_collapse_id_gets_its_own_id_as_one(house: House) -> None:
    ids = await house.push([token(1)])
    ids += await house.push([token(2)], headers=[Headers(TOPIC, PushType.BACKGROUND)], payloads=[_BACKGROUND])
    await house.receipts(ids)
    assert {each.id: each.collapse_id for each in house.apple.received} == {ids[0]: ids[0], ids[1]: None}


async def test_an_unregistered_token_is_removed_and_refused_at_admission_afterwards(house: House) -> None:
    since_ms = 1_700_000_000_123
    house.apple.unregister(token(7), since_ms)
    ids = await house.push([token(6), token(7), token(8)])
    receipts = await house.receipts(ids)
    assert [receipt.state for receipt in receipts] == [State.ACCEPTED, State.REJECTED, State.ACCEPTED]
    assert (receipts[1].reason, receipts[1].status, receipts[1].since) == ("Unregistered", 410, since_ms)
    admitted = await house.relay.admit(APP, None, [HEADERS], [token(6), token(7)], [PAYLOAD])
    assert admitted.batches == ()
    assert [(refused.reason, refused.index) for refused in admitted.refused] == [("Unregistered", 1)]


async def test_admission_names_every_entry_that_cannot_succeed_and_takes_none(house: House) -> None:
    tokens = [token(1), "nonsense", token(2), "ab" * 300]
    payloads = [PAYLOAD, PAYLOAD, b'{"aps":' + b" " * 5000 + b"{}}", PAYLOAD]
    admitted = await house.relay.admit(APP, None, [HEADERS], tokens, payloads)
    assert admitted.batches == ()
    assert [(refused.index, refused.reason) for refused in admitted.refused] == [
        (1, "BadDeviceToken"),
        (2, "PayloadTooLarge"),
        (3, "BadDeviceToken"),
    ]


async def test_an_app_that_is_not_known_is_refused_with_the_names_that_are(house: House) -> None:
    with pytest.raises(Refused, match="Known apps: example"):
        await house.relay.admit("exmaple", None, [HEADERS], [token(1)], [PAYLOAD])


async def test_a_topic_of_somebody_else_is_refused_with_the_right_one(house: House) -> None:
    admitted = await house.relay.admit(APP, None, [Headers("com.other.app")], [token(1)], [PAYLOAD])
    assert [refused.reason for refused in admitted.refused] == ["TopicDisallowed"]
    assert TOPIC in admitted.refused[0].detail


async def test_goaway_in_mid_flight_loses_nothing_and_duplicates_nothing(tmp_path: Path, apple: Simulator) -> None:
    ids = []
    async with open_house(tmp_path, apple, settings=PoolSettings(connections=1)) as house:
        for turn in range(5):
            # The 301st request is the last that is acted on; the connection before took 699 that came after it.
            sent_before = 699 if turn else 0
            apple.says_goodbye("Shutdown", after=300, last_stream_id=2 * (sent_before + 300) + 1)
            more = await house.push([token(1000 * turn + number) for number in range(1000)])
            receipts = await house.receipts(more)
            assert {(receipt.state, receipt.attempts) for receipt in receipts} == {(State.ACCEPTED, 1)}
            ids += more
    assert sorted(each.id for each in apple.received) == sorted(ids)
    assert apple.connections == 6


async def test_a_refused_stream_is_sent_again_without_counting_as_an_attempt(house: House) -> None:
    house.apple.resets(token(3), ErrorCode.REFUSED_STREAM, times=1)
    ids = await house.push([token(number) for number in range(10)])
    receipts = await house.receipts(ids)
    assert {(receipt.state, receipt.attempts) for receipt in receipts} == {(State.ACCEPTED, 1)}
    assert len(house.apple.received) == 10


async def test_an_unknown_outcome_is_tried_again_with_the_same_id(house: House) -> None:
    house.apple.resets(token(3), ErrorCode.INTERNAL_ERROR, times=1)
    (notification_id,) = await house.push([token(3)])
    (receipt,) = await house.receipts([notification_id])
    assert (receipt.state, receipt.attempts) == (State.ACCEPTED, 2)
    assert [each.id for each in house.apple.received] == [notification_id]


async def test_what_cannot_be_sent_says_why_in_its_receipt(tmp_path: Path) -> None:
    async with Simulator() as gone:
        pass
    settings = PoolSettings(patience_s=0.2, backoff_s=0.1)
    async with open_house(tmp_path, gone, settings=settings) as house:
        (notification_id,) = await house.push([token(1)])
        (receipt,) = await house.receipts([notification_id], lambda receipt: receipt.reason is not None)
    assert (receipt.state, receipt.reason, receipt.attempts) == (State.QUEUED, "NotProcessed", 0)
    assert receipt.why is not None
    assert receipt.why.startswith("cannot connect to localhost")


async def test_a_connection_that_hangs_up_is_replaced_and_nothing_is_lost(house: House) -> None:
    ids = await house.push([token(0)])
    await house.receipts(ids)
    house.apple.hangs_up_after(500)
    ids = await house.push([token(number) for number in range(2000)])
    receipts = await house.receipts(ids)
    assert {receipt.state for receipt in receipts} == {State.ACCEPTED}
    assert {each.id for each in house.apple.received} >= set(ids)


async def test_service_unavailable_is_deferred_with_the_time_of_the_next_try(house: House) -> None:
    house.apple.misbehaves(Answer(503, "ServiceUnavailable", retry_after_s=3600), times=1)
    (notification_id,) = await house.push([token(3)])
    (receipt,) = await house.receipts([notification_id], lambda receipt: receipt.reason is not None)
    assert (receipt.state, receipt.reason, receipt.status) == (State.QUEUED, "ServiceUnavailable", 503)
    assert receipt.next_attempt_at is not None
    assert receipt.next_attempt_at - receipt.created_at == pytest.approx(3600, abs=60)


async def test_a_bad_device_token_is_rejected_and_held_back_at_admission_for_a_while(house: House) -> None:
    house.apple.register(token(5), environment=Environment.DEVELOPMENT)
    ids = await house.push([token(5)])
    (receipt,) = await house.receipts(ids)
    assert (receipt.state, receipt.reason, receipt.status) == (State.REJECTED, "BadDeviceToken", 400)
    admitted = await house.relay.admit(APP, None, [HEADERS], [token(4), token(5)], [PAYLOAD])
    assert [(refused.reason, refused.index) for refused in admitted.refused] == [("BadDeviceToken", 1)]


async def test_where_apple_knows_hardly_a_token_it_is_the_environment_that_is_wrong_and_none_is_held_back(
    house: House,
) -> None:
    tokens = [token(number) for number in range(200)]
    for each in tokens:
        house.apple.register(each, environment=Environment.DEVELOPMENT)
    with structlog.testing.capture_logs() as logs:
        receipts = await house.receipts(await house.push(tokens))
    assert {receipt.reason for receipt in receipts} == {"BadDeviceToken"}
    held = await house.store.held_among(APP, Environment.PRODUCTION, [each.encode() for each in tokens])
    assert len(held) <= 21
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["apple_knows_few_tokens"]


async def test_what_is_sent_at_most_once_is_not_sent_again_where_apple_may_have_acted_on_it(house: House) -> None:
    house.apple.resets(token(2), ErrorCode.INTERNAL_ERROR, times=1)
    house.apple.resets(token(3), ErrorCode.REFUSED_STREAM, times=1)
    once = Headers(TOPIC, at_most_once=True)
    ids = await house.push([token(number) for number in range(2, 6)], headers=[once])
    receipts = await house.receipts(ids)
    states = [State.UNKNOWN, State.ACCEPTED, State.ACCEPTED, State.ACCEPTED]
    assert [receipt.state for receipt in receipts] == states
    assert sorted(each.token for each in house.apple.received) == [token(3), token(4), token(5)]


async def test_what_was_being_sent_at_most_once_when_the_server_died_ends_as_unknown(
    tmp_path: Path, apple: Simulator
) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        ids = await house.push([token(1), token(2)], headers=[Headers(TOPIC, at_most_once=True)])
        (lease,) = await house.store.take(1)
        states = bytes((State.SENT, State.QUEUED))
        await house.store.record([Outcomes(lease.batch.id, lease.attempt, states, bytes(8))], ())
    async with open_house(tmp_path, apple) as house:
        receipts = await house.receipts(ids)
    assert [receipt.state for receipt in receipts] == [State.UNKNOWN, State.ACCEPTED]
    assert receipts[0].why == "the server ended before the answer came"
    assert [each.token for each in apple.received] == [token(2)]


async def test_at_most_once_is_written_down_before_it_is_sent(house: House) -> None:
    house.apple.delays(0.3)
    (notification_id,) = await house.push([token(1)], headers=[Headers(TOPIC, at_most_once=True)])
    (receipt,) = await house.receipts([notification_id], lambda receipt: receipt.state is not State.QUEUED)
    assert receipt.state is State.SENT
    receipt_or_none = await house.relay.receipt(notification_id, PATIENCE_S)
    assert receipt_or_none is not None
    assert receipt_or_none.state is State.ACCEPTED


async def test_refusals_of_one_batch_for_one_reason_are_sent_again_together(house: House) -> None:
    house.apple.misbehaves(Answer(503, "ServiceUnavailable"), times=300)
    before = house.store.commits
    ids = await house.push([token(number) for number in range(300)])
    receipts = await house.receipts(ids)
    assert {receipt.state for receipt in receipts} == {State.ACCEPTED}
    assert {receipt.attempts for receipt in receipts} == {2}
    assert house.store.commits - before < 100


async def test_what_was_enqueued_before_a_restart_is_sent_after_it(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        ids = await house.push([token(number) for number in range(1500)])
        assert {receipt.state for receipt in await house.receipts(ids, lambda _: True)} == {State.QUEUED}
    assert not apple.received
    async with open_house(tmp_path, apple) as house:
        assert {receipt.state for receipt in await house.receipts(ids)} == {State.ACCEPTED}
    assert sorted(each.id for each in apple.received) == sorted(ids)


async def test_a_clean_stop_while_sending_loses_nothing_and_duplicates_nothing(
    tmp_path: Path, apple: Simulator
) -> None:
    apple.delays(0.05)
    async with open_house(tmp_path, apple, settings=PoolSettings(connections=1)) as house:
        ids = await house.push([token(number) for number in range(8000)])
        await house.receipts(ids[:1])
    received_before = len(apple.received)
    assert 0 < received_before < 8000
    async with open_house(tmp_path, apple) as house:
        assert {receipt.state for receipt in await house.receipts(ids)} == {State.ACCEPTED}
    assert sorted(each.id for each in apple.received) == sorted(ids)


async def test_a_full_disk_keeps_what_was_learnt_until_there_is_room(house: House) -> None:
    house.apple.delays(0.3)
    ids = await house.push([token(number) for number in range(10_000)])
    with structlog.testing.capture_logs() as logs:
        async with asyncio.timeout(PATIENCE_S):
            while not house.apple.connections:  # noqa: ASYNC110 - the simulator has no event for it
                await asyncio.sleep(0.001)
        await _limit_pages(house.store, None)
        large = await house.admit([token(number) for number in range(1000)], [_LARGE] * 1000)
        with pytest.raises(StoreError, match="Make room"):
            await house.relay.enqueue(large)
        async with asyncio.timeout(PATIENCE_S):
            while not any(line["event"] == "cannot_record" for line in logs):  # noqa: ASYNC110 - nor has a log
                await asyncio.sleep(0.01)
    await _limit_pages(house.store, 1_000_000)
    assert {receipt.state for receipt in await house.receipts(ids)} == {State.ACCEPTED}
    assert sorted(each.id for each in house.apple.received) == sorted(ids)
    await house.relay.enqueue(large)
    (receipt,) = await house.receipts([f"{large[0].id}0001"])
    assert receipt.state is State.ACCEPTED


async def _limit_pages(store: SqliteStore, pages: int | None) -> None:
    """Let the file have so many pages; None: as many as it has."""
    await store._writer.run(
        lambda db, calls: [db.pragma("max_page_count", pages or db.pragma("page_count")) for _ in calls], None
    )


_LARGE = b'{"aps":{},"x":"' + b"x" * 400 + b'"}'
_BACKGROUND = b'{"aps":{"content-available":1}}'


async def test_at_most_once_holds_in_a_batch_with_others_too(house: House) -> None:
    house.apple.resets(token(1), ErrorCode.INTERNAL_ERROR, times=1)
    house.apple.resets(token(2), ErrorCode.INTERNAL_ERROR, times=1)
    headers = [Headers(TOPIC), Headers(TOPIC, at_most_once=True)]
    receipts = await house.receipts(await house.push([token(1), token(2)], [PAYLOAD] * 2, headers))
    assert [(receipt.state, receipt.attempts) for receipt in receipts] == [(State.ACCEPTED, 2), (State.UNKNOWN, 1)]
    assert [each.token for each in house.apple.received] == [token(1)]


async def test_whose_lease_ran_out_before_it_was_written_down_does_not_send_what_is_sent_at_most_once(
    tmp_path: Path, apple: Simulator
) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        (batch,) = await house.admit([token(1)], headers=[Headers(TOPIC, at_most_once=True)])
        (late,) = await house.store.put([batch], lease=True)
        await house.store.finish([LeaseEnd(batch.id, late.attempt, 0.0)])
        (lease,) = await house.store.take(1)
        house.relay._begin(late)
        house.relay._begin(lease)
        await house.receipts([f"{batch.id}0001"], lambda receipt: receipt.state is State.SENT)
        settling = asyncio.create_task(house.relay.settle())
        (receipt,) = await house.receipts([f"{batch.id}0001"])
        settling.cancel()
    assert receipt.state is State.ACCEPTED
    assert len(apple.received) == 1


async def test_an_end_that_comes_after_its_lease_ran_out_is_not_counted_as_it_is_not_on_record(
    tmp_path: Path, apple: Simulator
) -> None:
    async with open_house(tmp_path, apple, working=False) as house:
        (batch,) = await house.admit([token(1)])
        (late,) = await house.store.put([batch], lease=True)
        await house.store.finish([LeaseEnd(batch.id, late.attempt, 0.0)])
        (lease,) = await house.store.take(1)
        house.relay._begin(late)
        async with asyncio.timeout(PATIENCE_S):
            while not house.relay.unrecorded:  # noqa: ASYNC110 - what is looked at has no event
                await asyncio.sleep(0.002)
        await house.relay._settle_once()
        meter = house.relay._telemetry.lane(APP, Environment.PRODUCTION)
        assert (len(apple.received), meter.ends) == (1, [])
        house.relay._begin(lease)
        settling = asyncio.create_task(house.relay.settle())
        await house.receipts([f"{batch.id}0001"])
        settling.cancel()
    assert (len(apple.received), meter.ends) == (2, [(("accepted",), 1)])


async def test_nothing_new_is_sent_while_outcomes_cannot_be_recorded(tmp_path: Path, apple: Simulator) -> None:
    async with open_house(tmp_path, apple) as house:
        await house.receipts(await house.push([token(0)]))
        with contextlib.closing(apsw.Connection(str(tmp_path / "heliograph.db"))) as other:
            other.execute("CREATE TRIGGER no BEFORE INSERT ON outcome BEGIN SELECT RAISE(ABORT, 'as told'); END")
            with structlog.testing.capture_logs() as logs:
                ids = await house.push([token(1)])
                async with asyncio.timeout(PATIENCE_S):
                    while not any(entry["event"] == "cannot_record" for entry in logs):  # noqa: ASYNC110 - a log
                        await asyncio.sleep(0.01)
                for number in range(2, 12):
                    ids += await house.push([token(number)])
            assert {each.token for each in apple.received} == {token(0), token(1)}
            other.execute("DROP TRIGGER no")
        receipts = await house.receipts(ids)
    assert {receipt.state for receipt in receipts} == {State.ACCEPTED}
    assert len(apple.received) == 12


async def test_a_clock_that_is_set_back_does_not_put_off_what_is_to_be_sent_again(
    tmp_path: Path, apple: Simulator
) -> None:
    ahead = 3600.0
    apple.add_app(TOPIC)
    route = Route(Endpoint("localhost", apple.port, client_context(apple.ca_pem)), apple.signing_key)
    app = App(APP, (TOPIC,), (Access(apple.signing_key, (Environment.PRODUCTION,)),))

    def clock() -> float:
        return time.time() + ahead

    store = await SqliteStore.open(tmp_path / "heliograph.db", clock=clock)
    carrier = ApnsCarrier(lambda *_: route, clock=time.time)
    relay = Relay(store, store, carrier, {APP: app}, Telemetry(), clock=clock)
    house = House(relay, store, carrier, apple)
    tasks = [asyncio.create_task(relay.work()), asyncio.create_task(relay.settle())]
    apple.resets(token(1), ErrorCode.INTERNAL_ERROR, times=1)
    ids = await house.push([token(1)])
    await house.receipts(ids, lambda receipt: receipt.reason is not None)
    ahead = 0.0
    (receipt,) = await house.receipts(ids)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await carrier.aclose()
    await relay.drain()
    await store.aclose()
    assert (receipt.state, receipt.attempts) == (State.ACCEPTED, 2)


async def test_what_a_fast_clock_put_off_is_sent_soon_after_a_start_with_the_right_one(
    tmp_path: Path, apple: Simulator
) -> None:
    apple.add_app(TOPIC)
    path = tmp_path / "heliograph.db"
    ahead = 7200.0

    def clock() -> float:
        return time.time() + ahead

    store = await SqliteStore.open(path, clock=clock)
    batch = Batch(
        id=batches.new_batch_id(clock(), bytes(8)),
        app=APP,
        environment=Environment.PRODUCTION,
        created_at=clock(),
        headers=(Headers(TOPIC),),
        tokens=[token(number).encode() for number in range(2)],
        payloads=[b'{"aps":{}}'],
    )
    await store.put([batch])
    (lease,) = await store.take(1)
    again_at = clock() + 30
    details = tuple(Detail(index, "InvalidProviderToken", 403, attempts=2, due_at=again_at) for index in range(2))
    await store.record([Outcomes(batch.id, 1, bytes(2), bytes(8), details)], [])
    await store.finish([LeaseEnd(lease.batch.id, 1, again_at)])
    await store.aclose()
    async with open_house(tmp_path, apple) as house:
        receipts = await house.receipts([batches.notification_id(batch.id, index) for index in range(2)])
    assert [receipt.state for receipt in receipts] == [State.ACCEPTED] * 2


async def test_credentials_that_apple_refuses_cost_no_notification(tmp_path: Path, apple: Simulator) -> None:
    apple.rejects(None, "InvalidProviderToken", times=1)
    async with open_house(tmp_path, apple) as house:
        ids = await house.push([token(1)])
        (receipt,) = await house.receipts(ids, lambda receipt: receipt.reason is not None)
        assert (receipt.state, receipt.status, receipt.attempts) == (State.QUEUED, 403, 1)
        assert receipt.next_attempt_at is not None
        assert receipt.next_attempt_at - time.time() > 20
