"""What every Store must do, whatever holds it.

An implementation's test class inherits `StoreContract` and has fixtures `store` and `queue` (often one object), opened
as `QueueContract` says, over one file or database.
"""

from __future__ import annotations

import asyncio
import struct
import uuid

import pytest
from msgspec.structs import replace

from heliograph.model import (
    ApiKey,
    Batch,
    Detail,
    DeviceToken,
    Environment,
    LeaseEnd,
    Outcomes,
    Quarantine,
    Receipt,
    Removal,
    Scope,
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


def quarantine(token: bytes, until: float, *, app: str = "shop", environment: Environment = PRODUCTION) -> Quarantine:
    return Quarantine(app, environment, DeviceToken(token.decode()), int(until))


def given_up(*indices: int) -> list[Detail]:
    return [Detail(index, "ServiceUnavailable", 503, attempts=9, why="it kept saying so") for index in indices]


BURIED, ACCEPTED, QUEUED = State.BURIED, State.ACCEPTED, State.QUEUED
DAY_S = 86400.0


async def finished(queue: Queue, store: Store, batch: Batch, states: list[State]) -> None:
    """Put, take and end a batch that has these states then."""
    await queue.put([batch])
    leases = [lease for lease in await queue.take(1000) if lease.batch.id == batch.id]
    indices = [index for index, state in enumerate(states) if state is BURIED]
    await store.record([outcomes(batch, states, *given_up(*indices), attempt=leases[0].attempt)], [])
    await queue.finish([LeaseEnd(batch.id, leases[0].attempt)])


async def states_of(store: Store, batch: Batch) -> list[State | None]:
    found = await store.find_receipts([f"{batch.id}{place:04x}" for place in range(1, len(batch) + 1)])
    return [None if receipt is None else receipt.state for receipt in found]


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
                attempts=2,
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

    # Device tokens that are held back

    async def test_device_token_in_quarantine_is_held_until_its_time(self, store: Store, clock: Clock) -> None:
        bad, good = a_batch().tokens[0], a_batch().tokens[0]
        await store.record([], [], [quarantine(bad, clock() + 3600)])
        assert await store.held_among("shop", PRODUCTION, [bad, good]) == {bad: "BadDeviceToken"}
        assert await store.held_among("shop", DEVELOPMENT, [bad]) == {}
        assert await store.held_among("späti", PRODUCTION, [bad]) == {}
        clock.advance(3599)
        assert await store.held_among("shop", PRODUCTION, [bad]) == {bad: "BadDeviceToken"}
        clock.advance(1)
        assert await store.held_among("shop", PRODUCTION, [bad]) == {}

    async def test_quarantine_moves_forward_only(self, store: Store, clock: Clock) -> None:
        token = a_batch().tokens[0]
        for until in (100, 300, 200, 300):
            await store.record([], [], [quarantine(token, clock() + until)])
        clock.advance(299)
        assert await store.held_among("shop", PRODUCTION, [token]) == {token: "BadDeviceToken"}
        clock.advance(1)
        assert await store.held_among("shop", PRODUCTION, [token]) == {}
        await store.record([], [], [quarantine(token, clock() + 5)])
        assert await store.held_among("shop", PRODUCTION, [token]) == {token: "BadDeviceToken"}

    async def test_removal_wins_over_a_quarantine(self, store: Store, clock: Clock) -> None:
        tokens = a_batch(100).tokens
        until = clock() + 60
        await store.record([], [removal(tokens[1])], [quarantine(token, until) for token in tokens[:3]])
        await store.record([], [removal(tokens[2])], [])
        assert await store.held_among("shop", PRODUCTION, tokens) == {
            tokens[0]: "BadDeviceToken",
            tokens[1]: "Unregistered",
            tokens[2]: "Unregistered",
        }

    async def test_removal_lapses_after_half_a_year(self, store: Store, clock: Clock) -> None:
        old, young, said_again = a_batch(3).tokens
        await store.record([], [removal(old), removal(said_again)])
        clock.advance(100 * DAY_S)
        await store.record([], [removal(young), removal(old), removal(said_again, since=6)])
        await store.purge(clock())
        assert set(await store.held_among("shop", PRODUCTION, [old, young, said_again])) == {old, young, said_again}
        clock.advance(80 * DAY_S)
        await store.purge(clock())
        assert set(await store.held_among("shop", PRODUCTION, [old, young, said_again])) == {young, said_again}
        await store.record([], [removal(old)])
        assert set(await store.held_among("shop", PRODUCTION, [old])) == {old}

    # What was given up on

    async def test_buried_are_found_newest_first_with_their_receipts(self, queue: Queue, store: Store) -> None:
        batches = [a_batch(3, created_at=START + number) for number in range(4)]
        await finished(queue, store, batches[0], [BURIED, ACCEPTED, BURIED])
        await finished(queue, store, batches[1], [ACCEPTED, ACCEPTED, ACCEPTED])
        await finished(queue, store, batches[3], [ACCEPTED, ACCEPTED, BURIED])
        await finished(queue, store, batches[2], [BURIED, BURIED, BURIED])
        places = [(3, 3), (2, 3), (2, 2), (2, 1), (0, 3), (0, 1)]
        found = await store.find_buried(None, None, 100)
        assert [receipt.id for receipt in found] == [f"{batches[batch].id}{place:04x}" for batch, place in places]
        assert list(found) == list(await store.find_receipts([receipt.id for receipt in found]))
        assert {(receipt.state, receipt.reason, receipt.attempts) for receipt in found} == {
            (BURIED, "ServiceUnavailable", 9)
        }

    async def test_buried_are_found_page_by_page_also_within_a_batch(self, queue: Queue, store: Store) -> None:
        for number in range(3):
            states = [BURIED, ACCEPTED, BURIED, BURIED, ACCEPTED, BURIED]
            await finished(queue, store, a_batch(6, created_at=START + number), states)
        whole = [receipt.id for receipt in await store.find_buried(None, None, 100)]
        assert len(whole) == 12
        for size in (1, 3, 4, 5):
            pages: list[str] = []
            while page := await store.find_buried(None, pages[-1] if pages else None, size):
                assert len(page) <= size
                pages += [receipt.id for receipt in page]
            assert pages == whole
        for before in (whole[0][:-4] + "0005", whole[0][:-4].upper() + "0005"):  # no buried one itself
            assert [receipt.id for receipt in await store.find_buried(None, before, 100)] == whole[1:]
        assert list(await store.find_buried(None, None, 0)) == []

    async def test_buried_are_found_by_app(self, queue: Queue, store: Store) -> None:
        mine, other = a_batch(2, created_at=START), a_batch(2, app="späti", created_at=START + 1)
        await finished(queue, store, mine, [BURIED, BURIED])
        await finished(queue, store, other, [BURIED, ACCEPTED])
        assert [receipt.id[:-4] for receipt in await store.find_buried("shop", None, 9)] == [mine.id] * 2
        assert [receipt.app for receipt in await store.find_buried("späti", None, 9)] == ["späti"]
        assert list(await store.find_buried("späti", other.id + "0001", 9)) == []
        assert list(await store.find_buried("nobody", None, 9)) == []
        assert len(await store.find_buried(None, other.id + "0001", 9)) == 2

    async def test_buried_are_looked_for_before_an_id_only(self, store: Store) -> None:
        with pytest.raises(ValueError, match="no notification's id"):
            await store.find_buried(None, "yesterday", 9)

    async def test_buried_are_found_while_others_of_their_batch_wait(self, queue: Queue, store: Store) -> None:
        batch = a_batch(2)
        await queue.put([batch])
        await queue.take(1)
        await store.record([outcomes(batch, [BURIED, QUEUED], *given_up(0))], [])
        assert [receipt.id for receipt in await store.find_buried(None, None, 9)] == [batch.id + "0001"]

    async def test_replayed_are_sent_again_under_their_ids(self, queue: Queue, store: Store, clock: Clock) -> None:
        batch, other = a_batch(3), a_batch()
        await finished(queue, store, batch, [BURIED, ACCEPTED, BURIED])
        clock.advance(50)
        wanted = [batch.id + place for place in ("0003", "0002", "0009", "0000")] + [other.id + "0001", "x", ""]
        assert list(await store.replay(wanted)) == [batch.id + "0003"]
        assert queue.waiting == 3
        assert await states_of(store, batch) == [BURIED, ACCEPTED, QUEUED]
        (receipt,) = await store.find_receipts([batch.id + "0003"])
        assert receipt == Receipt(
            batch.id + "0003", "shop", QUEUED, START, START + 50, attempts=0, next_attempt_at=START + 50
        )
        assert [each.id for each in await store.find_buried("shop", None, 9)] == [batch.id + "0001"]
        (lease,) = await queue.take(10)
        assert (lease.batch, lease.attempt) == (batch, 3)
        assert lease.outcomes is not None
        assert lease.outcomes.states == bytes([BURIED, ACCEPTED, QUEUED])
        assert {each.index: each for each in lease.outcomes.details} == {
            0: given_up(0)[0],
            2: Detail(2, due_at=START + 50, again_from=START + 50),
        }

    async def test_replayed_end_like_all_others(self, queue: Queue, store: Store) -> None:
        batch = a_batch(2)
        await finished(queue, store, batch, [BURIED, ACCEPTED])
        for _ in range(2):
            assert len(await store.replay([batch.id + "0001"])) == 1
            (lease,) = await queue.take(10)
            await store.record([outcomes(batch, [BURIED, ACCEPTED], *given_up(0), attempt=lease.attempt)], [])
            await queue.finish([LeaseEnd(batch.id, lease.attempt)])
            assert queue.waiting == 0
            assert await states_of(store, batch) == [BURIED, ACCEPTED]

    async def test_replay_told_twice_counts_once(self, queue: Queue, store: Store) -> None:
        batch = a_batch(2)
        await finished(queue, store, batch, [BURIED, BURIED])
        wanted = [batch.id + "0001", batch.id + "0002"]
        assert sorted(await store.replay([*wanted, *wanted])) == wanted
        assert list(await store.replay(wanted)) == []
        assert list(await store.replay([])) == []
        assert queue.waiting == 2
        assert list(await store.find_buried(None, None, 9)) == []
        assert len(await queue.take(10)) == 1

    async def test_replay_brings_forward_a_batch_whose_rest_waits(
        self, queue: Queue, store: Store, clock: Clock
    ) -> None:
        batch = a_batch(2)
        await queue.put([batch])
        await queue.take(1)
        waits = Detail(1, "TooManyRequests", 429, due_at=START + 900)
        await store.record([outcomes(batch, [BURIED, QUEUED], *given_up(0), waits)], [])
        await queue.finish([LeaseEnd(batch.id, 1, clock() + 900)])
        assert len(await store.replay([batch.id + "0001"])) == 1
        assert queue.waiting == 2
        (lease,) = await queue.take(10)
        assert lease.outcomes is not None
        assert waits in lease.outcomes.details

    async def test_replay_leaves_alone_what_somebody_works_on(self, queue: Queue, store: Store, clock: Clock) -> None:
        batch = a_batch(2)
        await queue.put([batch])
        await queue.take(1)
        known = outcomes(batch, [BURIED, QUEUED], *given_up(0))
        await store.record([known], [])
        assert list(await store.replay([batch.id + "0001"])) == []
        await store.record([known], [])
        await queue.finish([LeaseEnd(batch.id, 1, clock())])
        assert list(await store.replay([batch.id + "0001"])) == [batch.id + "0001"]

    async def test_former_holder_cannot_undo_a_replay(self, queue: Queue, store: Store, clock: Clock) -> None:
        held, ended = a_batch(), a_batch()
        known = {batch.id: outcomes(batch, [BURIED], *given_up(0)) for batch in (held, ended)}
        await queue.put([held, ended])
        await queue.take(2)
        await store.record(list(known.values()), [])
        await queue.finish([LeaseEnd(ended.id, 1)])
        clock.advance(LEASE_S)
        for batch in (held, ended):
            assert len(await store.replay([batch.id + "0001"])) == 1
            await store.record([known[batch.id]], [])
            await queue.finish([LeaseEnd(batch.id, 1)])
            assert await states_of(store, batch) == [QUEUED]
        assert queue.waiting == 2
        assert sorted(lease.batch.id for lease in await queue.take(10)) == sorted(known)

    async def test_replay_wakes_a_take_that_waits(self, queue: Queue, store: Store) -> None:
        batch = a_batch()
        await finished(queue, store, batch, [BURIED])
        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(queue.take(10))
            await queue.finish([LeaseEnd(batch.id, 9)])  # answered after the take has found nothing
            tasks.create_task(store.replay([batch.id + "0001"]))
        assert [lease.batch for lease in taking.result()] == [batch]

    # Old things, and apps

    async def test_what_is_old_and_finished_is_forgotten(self, queue: Queue, store: Store, clock: Clock) -> None:
        old = [a_batch(2, created_at=START - 100 + number) for number in range(50)]
        waits, young = a_batch(created_at=START - 200), a_batch()
        for batch in old:
            await finished(queue, store, batch, [ACCEPTED, BURIED])
        await queue.put([waits])
        await finished(queue, store, young, [ACCEPTED])
        assert await store.purge(clock() - 60) == 40
        assert await store.purge(clock() - 60) == 0
        assert set(await store.find_receipts([batch.id + "0001" for batch in old[:40]])) == {None}
        assert None not in await store.find_receipts([batch.id + "0001" for batch in [*old[40:], waits, young]])
        assert len(await store.find_buried(None, None, 100)) == 10
        assert list(await store.replay([old[0].id + "0002"])) == []
        assert queue.waiting == 1

    async def test_replayed_are_not_forgotten_while_they_wait(self, queue: Queue, store: Store, clock: Clock) -> None:
        batch = a_batch()
        await finished(queue, store, batch, [BURIED])
        await store.replay([batch.id + "0001"])
        assert await store.purge(clock() + 1) == 0
        (lease,) = await queue.take(10)
        await store.record([outcomes(batch, [ACCEPTED], attempt=lease.attempt)], [])
        await queue.finish([LeaseEnd(batch.id, lease.attempt)])
        assert await store.purge(clock() + 1) == 1

    async def test_purge_and_everything_else_go_on_side_by_side(self, queue: Queue, store: Store, clock: Clock) -> None:
        for _ in range(10):
            await finished(queue, store, a_batch(10), [ACCEPTED] * 10)
        fresh = [a_batch(created_at=START + 60) for _ in range(100)]
        purged, _, again, *_ = await asyncio.gather(
            store.purge(clock() + 1), queue.put(fresh[:50]), store.purge(clock() + 1), queue.put(fresh[50:])
        )
        assert purged + again == 10
        assert len(await queue.take(1000)) == 100

    async def test_apps_are_kept_replaced_and_deleted(self, store: Store) -> None:
        assert await store.find_apps() == {}
        await store.save_app("shop", b"\0one")
        await store.save_app("späti", b"")
        await store.save_app("shop", b"\xfftwo")
        assert await store.find_apps() == {"shop": b"\xfftwo", "späti": b""}
        assert await store.delete_app("shop") is True
        assert await store.delete_app("shop") is False
        assert await store.find_apps() == {"späti": b""}

    async def test_api_keys_are_kept_replaced_and_deleted(self, store: Store) -> None:
        assert list(await store.find_keys()) == []
        ours = ApiKey("0b5cfe52", "späti", bytes(32), (Scope.MANAGE, Scope.SEND), ("shop", "späti"), START + 2, START)
        first = ApiKey("ffffffff", "first", b"\xff" * 32, (Scope.READ,), None, START)
        twin = replace(first, id="aaaaaaaa", apps=())
        for key in (ours, first, twin, replace(ours, name="ci"), first):
            await store.save_key(key)
        assert list(await store.find_keys()) == [twin, first, replace(ours, name="ci")]
        assert await store.delete_key(first.id) is True
        assert await store.delete_key(first.id) is False
        assert await store.delete_key("") is False
        assert [key.id for key in await store.find_keys()] == [twin.id, ours.id]
