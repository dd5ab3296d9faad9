"""What every Store must do, whatever holds it.

An implementation's test class inherits `StoreContract` and has fixtures `store` and `queue` (often one object), opened
as `QueueContract` says, over one file or database.
"""

from __future__ import annotations

import struct
import uuid

import pytest

from heliograph.model import (
    Batch,
    Detail,
    DeviceToken,
    Environment,
    LeaseEnd,
    Outcomes,
    Receipt,
    Removal,
    State,
)
from heliograph.ports import Queue, Store
from tests.contracts.queue import LEASE_S, START, Clock, a_batch

PRODUCTION, DEVELOPMENT = Environment.PRODUCTION, Environment.DEVELOPMENT


def outcomes(batch: Batch, states: list[State], *details: Detail, attempt: int = 1, after_ms: int = 250) -> Outcomes:
    """What was learnt of `batch`: each state `after_ms` times its place, counted from 1, after it was made."""
    times = struct.pack(f">{len(states)}I", *(after_ms * place for place in range(1, len(states) + 1)))
    return Outcomes(batch.id, attempt, bytes(states), times, details)


def removal(token: bytes, *, app: str = "shop", environment: Environment = PRODUCTION, since: int = 5) -> Removal:
    return Removal(app, environment, DeviceToken(token.decode()), since)


class StoreContract:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    async def test_ids_that_are_unknown_or_none_have_no_receipt(self, queue: Queue, store: Store) -> None:
        batch = a_batch(2)
        await queue.put([batch])
        known = batch.id + "0001"
        none = ["", "x", known[:-1], known + "0", known.replace("-", ""), "{" + known + "}", known.replace("-", "_")]
        none += [batch.id + place for place in ("0000", "0003", "ffff", "00 1")]
        none += [str(uuid.uuid4()), a_batch().id + "0001"]
        assert list(await store.find_receipts(none)) == [None] * len(none)
        assert list(await store.find_receipts([])) == []

    async def test_receipt_of_what_is_queued_says_when_it_came_in(self, queue: Queue, store: Store) -> None:
        batch = a_batch(2)
        await queue.put([batch])
        assert list(await store.find_receipts([batch.id + "0002"])) == [
            Receipt(batch.id + "0002", "shop", State.QUEUED, START)
        ]

    async def test_receipt_tells_state_time_and_detail(self, queue: Queue, store: Store) -> None:
        batch = a_batch(4, app="späti")
        await queue.put([batch])
        await queue.take(1)
        dead = Detail(1, "Unregistered", 410, since=1_600_000_000_123, attempts=2)
        waits = Detail(2, "TooManyRequests", 429, unique_id="9c01", attempts=3, due_at=START + 30, why="busy")
        states = [State.ACCEPTED, State.REJECTED, State.QUEUED, State.QUEUED]
        await store.record([outcomes(batch, states, dead, waits)], [])
        found = await store.find_receipts([batch.id + place for place in ("0001", "0002", "0003", "0004")])
        assert list(found) == [
            Receipt(batch.id + "0001", "späti", State.ACCEPTED, START, START + 0.25, attempts=1),
            Receipt(
                batch.id + "0002",
                "späti",
                State.REJECTED,
                START,
                START + 0.5,
                reason="Unregistered",
                status=410,
                since=1_600_000_000_123,
                attempts=2,
            ),
            Receipt(
                batch.id + "0003",
                "späti",
                State.QUEUED,
                START,
                START + 0.75,
                reason="TooManyRequests",
                status=429,
                unique_id="9c01",
                attempts=3,
                next_attempt_at=START + 30,
                why="busy",
            ),
            Receipt(batch.id + "0004", "späti", State.QUEUED, START),
        ]

    async def test_receipts_come_in_the_order_that_was_asked_for(self, queue: Queue, store: Store) -> None:
        batches = [a_batch(1000) for _ in range(3)]
        await queue.put(batches)
        wanted = [f"{batch.id}{place:04x}" for place in range(1000, 0, -1) for batch in batches]
        wanted[7:7] = ["nonsense", wanted[0]]
        found = await store.find_receipts(wanted)
        assert found[7] is None
        assert [receipt.id for receipt in found if receipt] == wanted[:7] + wanted[8:]

    async def test_receipt_is_found_by_an_id_in_any_case(self, queue: Queue, store: Store) -> None:
        batch = a_batch()
        await queue.put([batch])
        (receipt,) = await store.find_receipts([(batch.id + "0001").upper()])
        assert receipt is not None
        assert receipt.id == batch.id + "0001"

    async def test_newer_outcomes_replace_older_ones_whole(self, queue: Queue, store: Store) -> None:
        batch = a_batch(2)
        await queue.put([batch])
        await queue.take(1)
        waits = Detail(0, "ServiceUnavailable", 503, due_at=START + 1)
        await store.record([outcomes(batch, [State.QUEUED, State.ACCEPTED], waits)], [])
        last = outcomes(batch, [State.ACCEPTED, State.ACCEPTED], after_ms=2000)
        await store.record([last, last], [])
        await store.record([last], [])
        (receipt,) = await store.find_receipts([batch.id + "0001"])
        assert receipt == Receipt(batch.id + "0001", "shop", State.ACCEPTED, START, START + 2, attempts=1)

    async def test_what_an_older_lease_says_is_not_recorded(self, queue: Queue, store: Store, clock: Clock) -> None:
        batch = a_batch()
        await queue.put([batch])
        await queue.take(1)
        clock.advance(LEASE_S)
        await queue.take(1)
        late = outcomes(batch, [State.BURIED], attempt=1)
        await store.record([late], [])
        (receipt,) = await store.find_receipts([batch.id + "0001"])
        assert receipt is not None
        assert receipt.state is State.QUEUED
        await store.record([outcomes(batch, [State.ACCEPTED], attempt=2)], [])
        await store.record([late], [])
        (receipt,) = await store.find_receipts([batch.id + "0001"])
        assert receipt is not None
        assert receipt.state is State.ACCEPTED

    async def test_next_lease_brings_what_earlier_ones_recorded(self, queue: Queue, store: Store, clock: Clock) -> None:
        batch = a_batch(2)
        await queue.put([batch])
        await queue.take(1)
        known = outcomes(batch, [State.ACCEPTED, State.QUEUED], Detail(1, "InternalServerError", 500))
        await store.record([known], [])
        await queue.finish([LeaseEnd(batch.id, 1, clock())])
        (lease,) = await queue.take(1)
        assert (lease.outcomes, lease.attempt) == (known, 2)

    async def test_receipts_outlive_their_job(self, queue: Queue, store: Store) -> None:
        batch = a_batch()
        await queue.put([batch])
        await queue.take(1)
        await store.record([outcomes(batch, [State.ACCEPTED])], [])
        await queue.finish([LeaseEnd(batch.id, 1)])
        (receipt,) = await store.find_receipts([batch.id + "0001"])
        assert receipt is not None
        assert receipt.state is State.ACCEPTED

    async def test_outcomes_of_an_unknown_batch_change_nothing(self, store: Store) -> None:
        batch = a_batch()
        await store.record([outcomes(batch, [State.ACCEPTED])], [])
        assert list(await store.find_receipts([batch.id + "0001"])) == [None]

    async def test_removed_tokens_are_found_among_others(self, store: Store) -> None:
        tokens = a_batch(1000).tokens
        await store.record([], [removal(token) for token in tokens[::2]])
        assert set(await store.held_among("shop", PRODUCTION, tokens)) == set(tokens[::2])
        assert set(await store.held_among("shop", PRODUCTION, set(tokens[1::2]))) == set()
        assert set(await store.held_among("shop", PRODUCTION, [])) == set()

    async def test_token_is_removed_for_its_app_and_environment_only(self, store: Store) -> None:
        token = b"00ff" * 16
        await store.record([], [removal(token, app="späti", environment=DEVELOPMENT)])
        assert set(await store.held_among("späti", DEVELOPMENT, [token])) == {token}
        assert set(await store.held_among("späti", PRODUCTION, [token])) == set()
        assert set(await store.held_among("shop", DEVELOPMENT, [token])) == set()

    @pytest.mark.parametrize("token", [b"", b"0", b"00f", b"00ff", b"no hex", b"ab" * 5000])
    async def test_token_of_any_form_can_be_removed(self, store: Store, token: bytes) -> None:
        others = [b"00", b"0f", b"ff00", b"no"]
        await store.record([], [removal(token)])
        assert set(await store.held_among("shop", PRODUCTION, [token, *others])) == {token}

    async def test_outcomes_and_removals_are_recorded_together(self, queue: Queue, store: Store) -> None:
        batch = a_batch()
        await queue.put([batch])
        await queue.take(1)
        gone = outcomes(batch, [State.REJECTED], Detail(0, "Unregistered", 410, since=7000))
        for _ in range(2):
            await store.record([gone], [removal(batch.tokens[0], since=7)])
            (receipt,) = await store.find_receipts([batch.id + "0001"])
            assert receipt is not None
            assert receipt.state is State.REJECTED
            assert set(await store.held_among("shop", PRODUCTION, batch.tokens)) == set(batch.tokens)

    async def test_nothing_is_recorded_at_once(self, queue: Queue, store: Store) -> None:
        batch = a_batch()
        await queue.put([batch])
        await store.record([], [])
        (receipt,) = await store.find_receipts([batch.id + "0001"])
        assert receipt is not None
        assert (receipt.state, receipt.updated_at) == (State.QUEUED, None)
