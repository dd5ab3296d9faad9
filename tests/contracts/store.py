"""What every Store must do, whatever holds it.

An implementation's test class inherits `StoreContract` and has fixtures `store` and `queue` (often one object), opened
as `QueueContract` says, over one file or database.
"""

from __future__ import annotations

import asyncio
import random
import struct
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from heliograph.errors import Overloaded, Repeated
from heliograph.model import (
    NO_ANSWER,
    ApiKey,
    Batch,
    Detail,
    DeviceToken,
    Environment,
    Filter,
    Headers,
    KnownCaller,
    LeaseEnd,
    Listed,
    Once,
    Origin,
    Outcomes,
    Page,
    PushType,
    Quarantine,
    Receipt,
    Removal,
    Scope,
    State,
)
from heliograph.ports import Queue, Store
from tests.contracts.queue import LEASE_S, MAX_WAITING, START, Clock, a_batch, identifiers

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


BURIED, ACCEPTED, QUEUED, CANCELLED = State.BURIED, State.ACCEPTED, State.QUEUED, State.CANCELLED
DAY_S = 86400.0


async def finished(queue: Queue, store: Store, batch: Batch, states: list[State]) -> None:
    """Put, take and end a batch that has these states then."""
    await queue.put([batch])
    leases = [lease for lease in await queue.take(1000) if lease.batch.id == batch.id]
    indices = [index for index, state in enumerate(states) if state is BURIED]
    await store.record([outcomes(batch, states, *given_up(*indices), attempt=leases[0].attempt)], [])
    await queue.finish([LeaseEnd(batch.id, leases[0].attempt)])


def told(batch: Batch, index: int, state: State, updated_at: float | None = None, **more: Any) -> Receipt:
    """The receipt of one place, where `more` says nothing else."""
    headers = batch.headers[0 if batch.headers_of is None else batch.headers_of[index]]
    origin = batch.origin or Origin("")
    names = struct.unpack(f">{len(origin.identifiers) // 4}I", origin.identifiers)
    return Receipt(
        f"{batch.id}{index + 1:04x}",
        batch.app,
        state,
        batch.created_at,
        updated_at,
        environment=batch.environment,
        topic=headers.topic,
        push_type=headers.push_type,
        token=DeviceToken(batch.tokens[index].decode()),
        collapse_id=headers.collapse_id,
        expiration=headers.expiration,
        connection=origin.connection or None,
        identifier=names[index] if names else None,
        apns_id=batch.apns_ids.get(index),
        **more,
    )


async def listed(store: Store, wanted: Filter, limit: int = 100) -> list[Receipt]:
    """All that fit, page by page."""
    found: list[Receipt] = []
    before = None
    while True:
        page = await store.find_notifications(wanted, before, limit)
        assert len(page.receipts) <= limit
        found += page.receipts
        if page.next is None:
            return found
        assert page.next == before or before is None or page.next < before
        before = page.next


def places(receipts: Sequence[Receipt]) -> list[str]:
    return [receipt.id for receipt in receipts]


async def found_by(store: Store, *ids: str) -> list[str | None]:
    """The ids of what is found by these."""
    return [None if receipt is None else receipt.id for receipt in await store.find_receipts(ids)]


async def dead(store: Store, *tokens: bytes, app: str = "shop", since: int = 5) -> None:
    """Removals, each recorded after the other."""
    for token in tokens:
        await store.record([], [removal(token, app=app, since=since)])


async def removed(
    store: Store, after: int = 0, *, app: str = "shop", environment: Environment | None = PRODUCTION
) -> list[bytes]:
    """The device tokens that are listed, in their order."""
    found = await store.find_removals(app, environment, after, 1000)
    return [each.removal.token.encode() for each in found]


async def last_number(store: Store, app: str = "shop") -> int:
    return max((each.number for each in await store.find_removals(app, None, 0, 1000)), default=0)


async def states_of(store: Store, batch: Batch) -> list[State | None]:
    found = await store.find_receipts([f"{batch.id}{place:04x}" for place in range(1, len(batch) + 1)])
    return [None if receipt is None else receipt.state for receipt in found]


def once(word: int, answer: bytes = b"taken", *, request: int = 0) -> Once:
    return Once(bytes([word]) * 32, bytes([request]) * 32, answer)


def fits(wanted: Filter, batch: Batch, index: int, state: State, detail: Detail | None) -> bool:
    headers = batch.headers[0 if batch.headers_of is None else batch.headers_of[index]]
    return (
        (wanted.apps is None or batch.app in wanted.apps)
        and wanted.environment in (None, batch.environment)
        and (wanted.states is None or state in wanted.states)
        and (wanted.reason is None or (detail is not None and detail.reason == wanted.reason))
        and wanted.token in (None, batch.tokens[index])
        and wanted.push_type in (None, headers.push_type)
        and wanted.topic in (None, headers.topic)
        and (wanted.since is None or batch.created_at >= wanted.since)
        and (wanted.until is None or batch.created_at < wanted.until)
        and (wanted.connection is None or (batch.origin is not None and batch.origin.connection == wanted.connection))
    )


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
        assert list(await store.find_receipts([batch.id + "0002"])) == [told(batch, 1, State.QUEUED)]

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
            told(batch, 0, State.ACCEPTED, START + 0.25, attempts=1),
            told(
                batch,
                1,
                State.REJECTED,
                START + 0.5,
                reason="Unregistered",
                status=410,
                since=1_600_000_000_123,
                attempts=2,
            ),
            told(
                batch,
                2,
                State.QUEUED,
                START + 0.75,
                reason="TooManyRequests",
                status=429,
                unique_id="9c01",
                attempts=2,
                next_attempt_at=START + 30,
                why="busy",
            ),
            told(batch, 3, State.QUEUED),
        ]

    async def test_receipt_tells_what_was_to_be_sent_and_to_whom(self, queue: Queue, store: Store) -> None:
        kinds = (
            Headers("com.example.a", PushType.VOIP, expiration=7),
            Headers("com.example.b", collapse_id="täa"),
            Headers("com.example.c", collapse_on_id=True),
        )
        tokens = [b"ab", b"cdef0123" * 8, b"00" * 100, b"abcd"]
        batch = replace(
            a_batch(4, environment=DEVELOPMENT), headers=kinds, headers_of=bytes((2, 0, 1, 1)), tokens=tokens
        )
        large = replace(a_batch(1000), payloads=[b"x" * 500] * 1000, headers=kinds, headers_of=bytes((0, 1)) * 500)
        await queue.put([batch, large])
        found = await store.find_receipts([f"{batch.id}{place:04x}" for place in range(1, 5)])
        own = batch.id + "0001"
        assert list(found) == [
            replace(told(batch, 0, State.QUEUED), collapse_id=own),
            *(told(batch, index, State.QUEUED) for index in (1, 2, 3)),
        ]
        for index in (0, 1, 499, 999):
            assert list(await store.find_receipts([f"{large.id}{index + 1:04x}"])) == [told(large, index, State.QUEUED)]

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

    async def test_receipt_tells_the_connection_and_what_its_client_called_it(self, queue: Queue, store: Store) -> None:
        named = replace(a_batch(3), origin=Origin("main-9f31c2-17", identifiers([0, 7, 0xFFFFFFFF])))
        unnamed = replace(a_batch(), origin=Origin("main-9f31c2-18"))
        await queue.put([named, unnamed, elsewhere := a_batch()])
        found = await store.find_receipts([batch.id + "0001" for batch in (named, unnamed, elsewhere)])
        assert [receipt and (receipt.connection, receipt.identifier) for receipt in found] == [
            ("main-9f31c2-17", 0),
            ("main-9f31c2-18", None),
            (None, None),
        ]
        found = await store.find_receipts([named.id + "0002", named.id + "0003"])
        assert list(found) == [told(named, index, QUEUED) for index in (1, 2)]
        assert [receipt and receipt.identifier for receipt in found] == [7, 0xFFFFFFFF]

    # By the ids that callers brought

    async def test_notification_is_found_by_the_apns_id_that_its_caller_brought(
        self, queue: Queue, store: Store
    ) -> None:
        theirs = "A9B8C7D6-0123-4567-89AB-CDEF01234567"
        batch = replace(a_batch(3), apns_ids={1: theirs})
        await queue.put([a_batch(), batch])
        ours = batch.id + "0002"
        found = await store.find_receipts([theirs, theirs.lower(), ours, batch.id + "0001", str(uuid.uuid4())])
        assert list(found) == [*[told(batch, 1, QUEUED)] * 3, told(batch, 0, QUEUED), None]
        assert [receipt and (receipt.id, receipt.apns_id) for receipt in found[:1]] == [(ours, theirs)]

    async def test_of_several_with_the_same_apns_id_the_newest_is_found(self, queue: Queue, store: Store) -> None:
        theirs = str(uuid.uuid4())
        first, second = (replace(a_batch(2), apns_ids={index: theirs}) for index in (0, 1))
        await queue.put([first])
        assert await found_by(store, theirs) == [first.id + "0001"]
        await queue.put([second], lease=True)
        assert await found_by(store, theirs) == [second.id + "0002"]
        third = replace(a_batch(3), apns_ids={0: theirs, 2: theirs.upper()})
        await store.keep([(third, outcomes(third, [ACCEPTED] * 3))])
        assert await found_by(store, theirs, theirs) == [third.id + "0003"] * 2
        assert await found_by(store, first.id + "0001") == [first.id + "0001"]

    async def test_id_of_ours_is_ours_though_a_caller_brought_the_same(self, queue: Queue, store: Store) -> None:
        ours = a_batch()
        theirs = replace(a_batch(), apns_ids={0: ours.id + "0001"})
        await queue.put([theirs])
        assert await found_by(store, ours.id + "0001") == [theirs.id + "0001"]
        await queue.put([ours])
        assert await found_by(store, ours.id + "0001") == [ours.id + "0001"]

    async def test_of_callers_who_brought_the_same_apns_id_each_finds_the_notification_of_its_own_app(
        self, store: Store
    ) -> None:
        theirs = str(uuid.uuid4())
        batches = {app: replace(a_batch(app=app), apns_ids={0: theirs}) for app in ("shop", "späti")}
        for batch in batches.values():
            await store.keep([(batch, outcomes(batch, [ACCEPTED]))])
        for apps, app in (
            (None, "späti"),
            ({"shop"}, "shop"),
            ({"späti"}, "späti"),
            ({"shop", "späti"}, "späti"),
            ({"shop", "nobody"}, "shop"),
        ):
            (found,) = await store.find_receipts([theirs], apps)
            assert found is not None
            assert (found.id, found.app) == (batches[app].id + "0001", app)
        assert list(await store.find_receipts([theirs], {"nobody"})) == [None]
        assert list(await store.find_receipts([theirs], ())) == [None]

    async def test_own_apns_id_is_found_though_it_is_the_id_of_another_app_s_notification(self, store: Store) -> None:
        other = a_batch(app="späti")
        own = replace(a_batch(), apns_ids={0: other.id + "0001"})
        for batch in (other, own):
            await store.keep([(batch, outcomes(batch, [ACCEPTED]))])
        wanted = [other.id + "0001", own.id + "0001"]
        assert [each and each.app for each in await store.find_receipts(wanted)] == ["späti", "shop"]
        assert [each and each.id for each in await store.find_receipts(wanted, {"shop"})] == [own.id + "0001"] * 2
        assert [each and each.id for each in await store.find_receipts(wanted, {"späti"})] == [wanted[0], None]

    async def test_apns_ids_of_what_is_not_taken_find_nothing(self, queue: Queue, store: Store) -> None:
        theirs = [str(uuid.uuid4()) for _ in range(4)]
        batch = replace(a_batch(), apns_ids={0: theirs[0]})
        await queue.put([batch], once=once(1))
        await queue.put([replace(batch, apns_ids={0: theirs[1]})])  # known already
        with pytest.raises(Repeated):
            await queue.put([replace(a_batch(), apns_ids={0: theirs[2]})], once=once(1))
        with pytest.raises(Overloaded):
            await queue.put([replace(a_batch(1000), apns_ids={0: theirs[3]}) for _ in range(MAX_WAITING // 1000 + 1)])
        assert await found_by(store, *theirs) == [batch.id + "0001", None, None, None]

    async def test_apns_id_that_is_no_uuid_is_refused(self, queue: Queue, store: Store) -> None:
        for text in ("", "x", "a9b8c7d60123456789abcdef01234567", "{a9b8c7d6-0123-4567-89ab-cdef01234567}"):
            batch = replace(a_batch(), apns_ids={0: text})
            with pytest.raises(ValueError, match="UUID"):
                await queue.put([batch])
            with pytest.raises(ValueError, match="UUID"):
                await store.keep([(batch, outcomes(batch, [ACCEPTED]))])
        assert queue.waiting == 0

    async def test_apns_ids_are_forgotten_with_their_notifications(
        self, queue: Queue, store: Store, clock: Clock
    ) -> None:
        theirs = str(uuid.uuid4())
        waits, old = (replace(a_batch(created_at=START - 60), apns_ids={0: theirs}) for _ in range(2))
        await queue.put([waits])
        await store.keep([(old, outcomes(old, [ACCEPTED]))])
        assert await found_by(store, theirs) == [old.id + "0001"]
        assert await store.purge(clock()) == 1
        assert await found_by(store, theirs) == [waits.id + "0001"]

    # What never was in the queue

    async def test_what_is_kept_has_receipts_and_does_not_wait(self, queue: Queue, store: Store) -> None:
        origin = Origin("main-9f31c2-1", identifiers([9, 8]))
        batch = replace(a_batch(2, app="späti", environment=DEVELOPMENT), origin=origin)
        others = [a_batch(created_at=START + number) for number in range(200)]
        no = Detail(1, "BadDeviceToken", 400)
        await store.keep(
            [
                (batch, outcomes(batch, [ACCEPTED, State.REJECTED], no)),
                *((other, outcomes(other, [CANCELLED], Detail(0, "SentBefore", attempts=0))) for other in others),
            ]
        )
        assert list(await store.find_receipts([batch.id + "0001", batch.id + "0002"])) == [
            told(batch, 0, ACCEPTED, START + 0.25, attempts=1),
            told(batch, 1, State.REJECTED, START + 0.5, reason="BadDeviceToken", status=400, attempts=1),
        ]
        found = await listed(store, Filter(apps=frozenset(("shop",)), reason="SentBefore"))
        assert places(found) == [other.id + "0001" for other in reversed(others)]
        assert queue.waiting == 0
        await queue.put([waits := a_batch(app="späti", environment=DEVELOPMENT)])
        assert [lease.batch for lease in await queue.take(1000)] == [waits]

    async def test_batch_that_is_known_is_left_as_it_is_by_keeping(self, queue: Queue, store: Store) -> None:
        waits, kept = a_batch(), a_batch()
        await queue.put([waits])
        await store.keep([(kept, outcomes(kept, [ACCEPTED])), (kept, outcomes(kept, [State.EXPIRED]))])
        await store.keep([(batch, outcomes(batch, [State.REJECTED], attempt=9)) for batch in (waits, kept)])
        assert await states_of(store, waits) + await states_of(store, kept) == [QUEUED, ACCEPTED]
        await queue.put([kept])
        assert queue.waiting == 1
        assert [lease.batch for lease in await queue.take(10)] == [waits]

    async def test_what_is_kept_is_not_recorded_anew(self, store: Store) -> None:
        batch = a_batch()
        await store.keep([(batch, outcomes(batch, [ACCEPTED]))])
        assert list(await store.record([outcomes(batch, [State.REJECTED], attempt=2)], [])) == []
        assert await states_of(store, batch) == [ACCEPTED]

    async def test_removals_and_quarantines_are_kept_with_it(self, store: Store, clock: Clock) -> None:
        batch = a_batch(3)
        for _ in range(2):
            await store.held_among("shop", PRODUCTION, batch.tokens)  # whatever is remembered of it
            await store.keep(
                [(batch, outcomes(batch, [State.REJECTED, State.REJECTED, ACCEPTED]))],
                [removal(batch.tokens[0])],
                [quarantine(batch.tokens[1], clock() + 60)],
            )
            assert await store.held_among("shop", PRODUCTION, batch.tokens) == {
                batch.tokens[0]: "Unregistered",
                batch.tokens[1]: "BadDeviceToken",
            }
        assert await removed(store) == [batch.tokens[0]]
        await store.keep([], [removal(batch.tokens[2])])
        await store.keep([])
        assert await removed(store) == [batch.tokens[0], batch.tokens[2]]

    async def test_what_was_given_up_on_and_kept_is_found_and_sent_again(self, queue: Queue, store: Store) -> None:
        batch = a_batch(2, app="späti")
        await store.keep([(batch, outcomes(batch, [BURIED, ACCEPTED], *given_up(0)))])
        assert places(await store.find_buried(["späti"], None, 9)) == [batch.id + "0001"]
        assert places(await store.find_buried(None, None, 9)) == [batch.id + "0001"]
        assert list(await store.replay([batch.id + "0001", batch.id + "0002"])) == [batch.id + "0001"]
        assert queue.waiting == 2
        (lease,) = await queue.take(10)
        assert lease.batch == batch
        await store.record([outcomes(batch, [ACCEPTED, ACCEPTED], attempt=lease.attempt)], [])
        assert await states_of(store, batch) == [ACCEPTED, ACCEPTED]

    async def test_what_is_kept_is_not_cancelled(self, store: Store) -> None:
        batch = a_batch()
        await store.keep([(batch, outcomes(batch, [ACCEPTED]))])
        assert list(await store.cancel([batch.id + "0001"])) == []

    async def test_what_is_kept_is_forgotten_like_all_others(self, store: Store, clock: Clock) -> None:
        old, young = a_batch(created_at=START - 60), a_batch()
        await store.keep([(batch, outcomes(batch, [ACCEPTED])) for batch in (old, young)])
        assert await store.purge(clock() - 1) == 1
        assert await states_of(store, old) + await states_of(store, young) == [None, ACCEPTED]

    async def test_many_keep_and_put_at_once(self, queue: Queue, store: Store) -> None:
        kept, waiting = [a_batch(2) for _ in range(150)], [a_batch() for _ in range(150)]
        await asyncio.gather(
            *(store.keep([(batch, outcomes(batch, [ACCEPTED, CANCELLED]))]) for batch in kept),
            *(queue.put([batch]) for batch in waiting),
        )
        assert {tuple(await states_of(store, batch)) for batch in kept} == {(ACCEPTED, CANCELLED)}
        assert queue.waiting == 150
        assert {lease.batch.id for lease in await queue.take(1000)} == {batch.id for batch in waiting}

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
        assert receipt == told(batch, 0, State.ACCEPTED, START + 2, attempts=1)

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

    # Removals in their order

    async def test_removals_of_an_app_are_listed_in_the_order_of_their_coming(self, store: Store) -> None:
        tokens = a_batch(6).tokens
        await dead(store, *tokens[:3])
        await store.record([], [removal(tokens[3], app="späti"), removal(tokens[4], environment=DEVELOPMENT, since=9)])
        await dead(store, tokens[5])
        assert await removed(store) == [*tokens[:3], tokens[5]]
        assert await removed(store, environment=DEVELOPMENT) == [tokens[4]]
        assert await removed(store, environment=None) == [*tokens[:3], tokens[4], tokens[5]]
        assert await removed(store, app="späti") == [tokens[3]]
        assert await removed(store, app="nobody", environment=None) == []
        found = await store.find_removals("shop", None, 0, 100)
        assert found[3] == Listed(found[3].number, removal(tokens[4], environment=DEVELOPMENT, since=9))
        numbers = [each.number for each in found]
        assert numbers == sorted(set(numbers))
        assert numbers[0] > 0

    async def test_removals_are_listed_after_a_number_and_so_many(self, store: Store) -> None:
        tokens = a_batch(10).tokens
        for place, token in enumerate(tokens):
            await store.record([], [removal(token, environment=(PRODUCTION, DEVELOPMENT)[place % 2])])
        for environment, expected in ((None, tokens), (PRODUCTION, tokens[::2]), (DEVELOPMENT, tokens[1::2])):
            for limit in (1, 3, 100):
                seen, after = [], 0
                while found := await store.find_removals("shop", environment, after, limit):
                    assert len(found) <= limit
                    seen += [each.removal.token.encode() for each in found]
                    after = found[-1].number
                assert seen == expected
        assert list(await store.find_removals("shop", None, 0, 0)) == []

    async def test_removal_of_one_token_is_found_among_many(self, store: Store) -> None:
        tokens = a_batch(20).tokens
        await dead(store, *tokens)
        await store.record([], [removal(tokens[3], environment=DEVELOPMENT), removal(b"abc")])
        found = await store.find_removals("shop", None, 0, 10, tokens[3])
        assert [each.removal for each in found] == [
            removal(tokens[3]),
            removal(tokens[3], environment=DEVELOPMENT),
        ]
        assert len(await store.find_removals("shop", None, 0, 1, tokens[3])) == 1
        assert len(await store.find_removals("shop", None, found[0].number, 10, tokens[3])) == 1
        assert list(await store.find_removals("shop", PRODUCTION, 0, 10, b"00ff")) == []
        assert list(await store.find_removals("späti", None, 0, 10, tokens[3])) == []

    async def test_removal_said_again_keeps_its_number_and_one_that_is_newer_gets_a_new_one(self, store: Store) -> None:
        first, second = a_batch(2).tokens
        await dead(store, first, second)
        last = await last_number(store)
        await dead(store, first)
        await dead(store, first, since=4)
        assert await removed(store, last) == []
        assert await removed(store) == [first, second]
        await dead(store, first, since=6)
        assert await removed(store, last) == [first]
        assert await removed(store) == [second, first]
        (anew,) = await store.find_removals("shop", PRODUCTION, last, 10)
        assert anew.removal.since == 6

    async def test_of_one_token_told_twice_at_once_the_newer_counts(self, store: Store) -> None:
        token = a_batch().tokens[0]
        await asyncio.gather(
            store.record([], [removal(token, since=since) for since in (5, 8, 7)]), dead(store, token, since=6)
        )
        (known,) = await store.find_removals("shop", PRODUCTION, 0, 10)
        assert known.removal.since == 8

    async def test_number_is_never_used_again(self, store: Store) -> None:
        tokens = a_batch(3).tokens
        await dead(store, *tokens)
        last = await last_number(store)
        assert await store.revive("shop", PRODUCTION, tokens, 5) == 3
        await dead(store, tokens[0], since=6)
        assert await removed(store, last) == [tokens[0]]

    async def test_removals_that_lapsed_are_not_listed(self, store: Store, clock: Clock) -> None:
        old, young = a_batch(2).tokens
        await dead(store, old)
        clock.advance(DAY_S)
        await dead(store, young)
        clock.advance(179 * DAY_S - 1)
        assert await removed(store) == [old, young]
        clock.advance(1)
        assert await removed(store) == [young]
        assert set(await store.held_among("shop", PRODUCTION, [old, young])) == {young}
        await store.purge(clock())
        assert await removed(store) == [young]

    async def test_removal_that_is_said_again_after_it_lapsed_is_a_new_one(self, store: Store, clock: Clock) -> None:
        token = a_batch().tokens[0]
        await dead(store, token)
        number = await last_number(store)
        clock.advance(180 * DAY_S)
        await dead(store, token)  # nothing was purged meanwhile
        assert await removed(store, number) == [token]
        assert set(await store.held_among("shop", PRODUCTION, [token])) == {token}

    async def test_who_follows_the_numbers_misses_nothing_that_comes_meanwhile(self, store: Store) -> None:
        tokens = [a_batch(20).tokens for _ in range(10)]
        seen: list[bytes] = []
        after = 0

        async def follow() -> None:
            nonlocal after
            for each in await store.find_removals("shop", PRODUCTION, after, 7):
                seen.append(each.removal.token.encode())
                after = each.number

        for some in tokens:
            await asyncio.gather(*(dead(store, token) for token in some), follow())
        while len(seen) < 200:
            before = len(seen)
            await follow()
            assert len(seen) > before
        assert sorted(seen) == sorted(token for some in tokens for token in some)

    async def test_what_was_told_is_remembered_by_app_and_environment_and_moves_forward_only(
        self, store: Store
    ) -> None:
        assert await store.told_until("shop", PRODUCTION) == 0
        for number, known in ((7, 7), (3, 7), (7, 7), (8, 8)):
            await store.tell_until("shop", PRODUCTION, number)
            assert await store.told_until("shop", PRODUCTION) == known
        await asyncio.gather(*(store.tell_until("shop", PRODUCTION, number) for number in (12, 40, 9)))
        assert await store.told_until("shop", PRODUCTION) == 40
        assert await store.told_until("shop", DEVELOPMENT) == 0
        assert await store.told_until("späti", PRODUCTION) == 0

    # Registered again

    async def test_token_that_is_registered_after_it_died_is_held_back_and_listed_no_more(self, store: Store) -> None:
        older, same, newer, other = a_batch(4).tokens
        for token, since in ((older, 99), (same, 100), (newer, 101), (other, 5)):
            await dead(store, token, since=since)
        assert await store.revive("shop", PRODUCTION, [older, same, newer, b"00ff"], 100.9) == 2
        assert set(await store.held_among("shop", PRODUCTION, [older, same, newer, other])) == {newer, other}
        assert await removed(store) == [newer, other]
        assert await store.revive("shop", PRODUCTION, {older, same}, 100.9) == 0
        assert await store.revive("shop", PRODUCTION, [], 100.9) == 0

    async def test_token_that_is_registered_ends_its_quarantine(self, store: Store, clock: Clock) -> None:
        tokens = a_batch(4).tokens
        await store.record([], [removal(tokens[2])], [quarantine(token, clock() + 60) for token in tokens[:3]])
        await store.record([], [], [quarantine(tokens[3], clock() + 1)])
        clock.advance(1)  # the last one is over
        assert await store.revive("shop", PRODUCTION, [tokens[0], tokens[2], tokens[3]], clock()) == 2
        assert await store.held_among("shop", PRODUCTION, tokens) == {tokens[1]: "BadDeviceToken"}

    async def test_token_is_registered_for_its_app_and_environment_only(self, store: Store, clock: Clock) -> None:
        token = a_batch().tokens[0]
        for app, environment in (("shop", PRODUCTION), ("shop", DEVELOPMENT), ("späti", PRODUCTION)):
            await store.record([], [removal(token, app=app, environment=environment)])
        assert await store.revive("shop", PRODUCTION, [token], clock()) == 1
        assert await removed(store, environment=None) == [token]
        assert await removed(store, app="späti") == [token]
        assert set(await store.held_among("shop", DEVELOPMENT, [token])) == {token}

    async def test_token_that_dies_again_after_its_registration_is_held_back_again(self, store: Store) -> None:
        token = a_batch().tokens[0]
        await dead(store, token)
        await store.revive("shop", PRODUCTION, [token], 100)
        await dead(store, token, since=101)
        assert set(await store.held_among("shop", PRODUCTION, [token])) == {token}
        assert await removed(store) == [token]

    async def test_what_apple_said_before_a_registration_holds_nothing_back_though_it_is_learnt_later(
        self, store: Store
    ) -> None:
        token, other = a_batch(2).tokens
        assert await store.revive("shop", PRODUCTION, [token], 100.9) == 0
        await store.revive("shop", PRODUCTION, [token], 50)  # an older one changes nothing
        for since in (99, 100):
            await dead(store, token, other, since=since)
        await store.keep([], [removal(token, since=98)])
        assert await removed(store) == [other]
        assert set(await store.held_among("shop", PRODUCTION, [token, other])) == {other}
        await store.record([], [removal(token, app="späti"), removal(token, environment=DEVELOPMENT)])
        assert await removed(store, app="späti") == await removed(store, environment=DEVELOPMENT) == [token]
        await dead(store, token, since=101)
        assert await removed(store) == [other, token]

    async def test_registration_counts_as_long_as_a_removal_does(self, store: Store, clock: Clock) -> None:
        token = a_batch().tokens[0]
        at = clock()
        await store.revive("shop", PRODUCTION, [token], at)
        clock.advance(179 * DAY_S)
        await store.purge(clock())
        await dead(store, token, since=int(at))
        assert await removed(store) == []
        clock.advance(DAY_S)
        await store.purge(clock())
        await dead(store, token, since=int(at))
        assert await removed(store) == [token]

    async def test_thousand_tokens_are_registered_at_once_and_one_named_twice_counts_once(self, store: Store) -> None:
        tokens = a_batch(1000).tokens
        await dead(store, *tokens)
        assert await store.revive("shop", PRODUCTION, [*tokens, *tokens[:5]], 100) == 1000
        assert await removed(store) == []

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

    async def test_buried_of_several_apps_are_found_in_one_order(self, queue: Queue, store: Store) -> None:
        batches = [a_batch(2, app=f"app{number % 3}", created_at=START + number) for number in range(9)]
        for batch in batches:
            await finished(queue, store, batch, [BURIED, BURIED])
        expected = [
            batch.id + place for batch in reversed(batches) if batch.app != "app1" for place in ("0002", "0001")
        ]
        apps = ["app2", "nobody", "app0"]
        assert places(await store.find_buried(apps, None, 100)) == expected
        pages: list[str] = []
        while page := await store.find_buried(apps, pages[-1] if pages else None, 5):
            pages += places(page)
        assert pages == expected
        assert list(await store.find_buried([], None, 100)) == []

    async def test_buried_are_found_by_app(self, queue: Queue, store: Store) -> None:
        mine, other = a_batch(2, created_at=START), a_batch(2, app="späti", created_at=START + 1)
        await finished(queue, store, mine, [BURIED, BURIED])
        await finished(queue, store, other, [BURIED, ACCEPTED])
        assert [receipt.id[:-4] for receipt in await store.find_buried(["shop"], None, 9)] == [mine.id] * 2
        assert [receipt.app for receipt in await store.find_buried(["späti"], None, 9)] == ["späti"]
        assert list(await store.find_buried(["späti"], other.id + "0001", 9)) == []
        assert list(await store.find_buried(["nobody"], None, 9)) == []
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
        assert receipt == told(batch, 2, QUEUED, START + 50, next_attempt_at=START + 50)
        assert [each.id for each in await store.find_buried(["shop"], None, 9)] == [batch.id + "0001"]
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

    # What is put once

    async def test_what_is_put_once_is_found_with_its_answer_and_not_put_again(
        self, queue: Queue, store: Store
    ) -> None:
        first, again, other = a_batch(), a_batch(2), a_batch()
        assert await store.find_once(once(1).key) is None
        await queue.put([first], once=once(1, b"\0first"))
        with pytest.raises(Repeated):
            await queue.put([again], once=once(1, b"again", request=2))
        with pytest.raises(Repeated):
            await queue.put([again], lease=True, once=once(1))
        await queue.put([other], once=once(2, b""))
        assert await store.find_once(once(1).key) == once(1, b"\0first")
        assert await store.find_once(once(2).key) == once(2, b"")
        assert queue.waiting == 2
        assert await states_of(store, again) == [None, None]
        assert {lease.batch.id for lease in await queue.take(10)} == {first.id, other.id}

    async def test_of_many_at_once_under_one_key_exactly_one_is_put(self, queue: Queue, store: Store) -> None:
        batches = [a_batch() for _ in range(40)]
        answers = await asyncio.gather(
            *(
                queue.put([batch], lease=place % 2 == 0, once=once(place % 2, batch.id.encode()))
                for place, batch in enumerate(batches)
            ),
            return_exceptions=True,
        )
        assert sum(isinstance(answer, Repeated) for answer in answers) == 38
        taken = [batch.id for batch, answer in zip(batches, answers, strict=True) if not isinstance(answer, Repeated)]
        kept = [await store.find_once(once(word).key) for word in (0, 1)]
        assert sorted(each.answer.decode() for each in kept if each) == sorted(taken)
        assert queue.waiting == 2

    async def test_what_is_refused_for_want_of_room_keeps_nothing(self, queue: Queue, store: Store) -> None:
        fill = [a_batch(1000) for _ in range(MAX_WAITING // 1000)]
        await queue.put(fill)
        answers = await asyncio.gather(
            queue.put([a_batch()], once=once(1)), queue.put([a_batch()], once=once(1)), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [Overloaded, Overloaded]
        assert await store.find_once(once(1).key) is None
        (lease, *_) = await queue.take(10)
        await queue.finish([LeaseEnd(lease.batch.id, lease.attempt)])
        await queue.put([a_batch()], once=once(1))
        assert await store.find_once(once(1).key) == once(1)

    async def test_what_was_put_once_is_kept_for_a_day(self, queue: Queue, store: Store, clock: Clock) -> None:
        await queue.put([a_batch()], once=once(1))
        clock.advance(DAY_S - 1)
        await store.purge(0)
        assert await store.find_once(once(1).key) == once(1)
        with pytest.raises(Repeated):
            await queue.put([a_batch()], once=once(1))
        clock.advance(1)
        assert await store.find_once(once(1).key) is None
        await queue.put([a_batch()], once=once(1, b"anew", request=1))
        assert await store.find_once(once(1).key) == once(1, b"anew", request=1)

    async def test_what_was_put_once_is_forgotten_and_what_is_young_stays(
        self, queue: Queue, store: Store, clock: Clock
    ) -> None:
        for word in range(100):
            await queue.put([a_batch()], once=once(word))
        clock.advance(DAY_S / 2)
        await queue.put([a_batch()], once=once(100))
        clock.advance(DAY_S / 2)
        await store.purge(0)
        found = [await store.find_once(once(word).key) for word in (0, 50, 99, 100)]
        assert found == [None, None, None, once(100)]

    # Cancelled

    async def test_what_waits_is_cancelled_and_the_rest_of_its_batch_is_not(
        self, queue: Queue, store: Store, clock: Clock
    ) -> None:
        batch, other = a_batch(3), a_batch()
        await queue.put([batch])
        clock.advance(7)
        wanted = [batch.id + place for place in ("0003", "0001", "0009", "0000")] + [other.id + "0001", "x", ""]
        assert sorted(await store.cancel(wanted)) == [batch.id + "0001", batch.id + "0003"]
        assert await states_of(store, batch) == [CANCELLED, QUEUED, CANCELLED]
        assert list(await store.find_receipts([batch.id + "0003"])) == [told(batch, 2, CANCELLED, START + 7)]
        assert queue.waiting == 3
        (lease,) = await queue.take(10)
        assert lease.outcomes is not None
        assert lease.outcomes.states == bytes([CANCELLED, QUEUED, CANCELLED])
        assert list(await store.cancel([])) == []

    async def test_batch_that_is_cancelled_whole_is_finished(self, queue: Queue, store: Store, clock: Clock) -> None:
        batches = [a_batch(2), a_batch(40)]
        await queue.put(batches)
        assert len(await store.cancel([f"{batches[1].id}{place:04x}" for place in range(1, 41)])) == 40
        assert queue.waiting == 2
        assert list(await store.cancel([batches[0].id + "0001"])) == [batches[0].id + "0001"]
        assert queue.waiting == 2
        assert list(await store.cancel([batches[0].id + "0002"])) == [batches[0].id + "0002"]
        assert queue.waiting == 0
        kept = a_batch()
        await queue.put([kept])
        assert [lease.batch for lease in await queue.take(10)] == [kept]
        assert await store.purge(clock() + 1) == 2

    async def test_cancelled_twice_counts_once(self, queue: Queue, store: Store) -> None:
        batch = a_batch(2)
        await queue.put([batch])
        wanted = [batch.id + "0001"]
        assert list(await store.cancel(wanted + wanted)) == wanted
        assert list(await store.cancel(wanted)) == []
        assert await states_of(store, batch) == [CANCELLED, QUEUED]

    async def test_what_is_put_off_is_cancelled_and_what_went_wrong_is_still_told(
        self, queue: Queue, store: Store, clock: Clock
    ) -> None:
        batch = a_batch(2)
        await queue.put([batch])
        await queue.take(1)
        waits = [Detail(index, "ServiceUnavailable", 503, attempts=3, due_at=START + 900) for index in range(2)]
        await store.record([outcomes(batch, [QUEUED, QUEUED], *waits)], [])
        await queue.finish([LeaseEnd(batch.id, 1, clock() + 900)])
        assert len(await store.cancel([batch.id + "0001"])) == 1
        (receipt,) = await store.find_receipts([batch.id + "0001"])
        assert receipt == told(batch, 0, CANCELLED, START, reason="ServiceUnavailable", status=503, attempts=2)
        clock.advance(900)
        (lease,) = await queue.take(10)
        assert lease.outcomes is not None
        assert lease.outcomes.states == bytes([CANCELLED, QUEUED])
        assert waits[1] in lease.outcomes.details

    async def test_what_apple_may_have_taken_is_unknown_once_it_is_cancelled(self, queue: Queue, store: Store) -> None:
        batch = a_batch(2)
        await queue.put([batch])
        await queue.take(1)
        lost = Detail(0, NO_ANSWER, attempts=2, due_at=START + 900, why="reset", unanswered=True)
        await store.record([outcomes(batch, [QUEUED, QUEUED], lost)], [])
        await queue.finish([LeaseEnd(batch.id, 1, START + 900)])
        wanted = [batch.id + "0001", batch.id + "0002"]
        assert list(await store.cancel(wanted)) == wanted
        found = await store.find_receipts(wanted)
        assert list(found) == [
            told(batch, 0, State.UNKNOWN, START, reason=NO_ANSWER, why="reset", attempts=1),
            told(batch, 1, CANCELLED, START),
        ]
        assert queue.waiting == 0

    async def test_what_is_sent_or_ended_is_not_cancelled(self, queue: Queue, store: Store, clock: Clock) -> None:
        states = [ACCEPTED, BURIED, State.REJECTED, State.UNKNOWN, State.EXPIRED, State.SENT, QUEUED, QUEUED]
        batch = a_batch(len(states))
        await queue.put([batch])
        await queue.take(1)
        on_its_way = Detail(7, cancelled=True)
        await store.record([outcomes(batch, states, *given_up(1), on_its_way)], [])
        await queue.finish([LeaseEnd(batch.id, 1, clock())])
        wanted = [f"{batch.id}{place:04x}" for place in range(1, len(states) + 1)]
        assert list(await store.cancel(wanted)) == [wanted[6]]
        assert await states_of(store, batch) == [*states[:6], CANCELLED, QUEUED]
        (receipt,) = await store.find_receipts([wanted[7]])
        assert receipt is not None
        assert receipt.cancelling
        assert queue.waiting == len(states)  # what is being sent may have to be told of
        assert list(await store.cancel(wanted)) == []

    async def test_what_somebody_works_on_is_not_cancelled_here(self, queue: Queue, store: Store, clock: Clock) -> None:
        batch = a_batch(2)
        await queue.put([batch])
        await queue.take(1)
        assert list(await store.cancel([batch.id + "0001"])) == []
        await queue.finish([LeaseEnd(batch.id, 1, clock())])
        assert list(await store.cancel([batch.id + "0001"])) == [batch.id + "0001"]

    async def test_former_holder_cannot_undo_a_cancellation(self, queue: Queue, store: Store, clock: Clock) -> None:
        whole, part = a_batch(), a_batch(2)
        await queue.put([whole, part])
        await queue.take(2)
        clock.advance(LEASE_S)
        assert len(await store.cancel([whole.id + "0001", part.id + "0001"])) == 2
        for batch in (whole, part):
            assert list(await store.record([outcomes(batch, [ACCEPTED] * len(batch))], [])) == []
            await queue.finish([LeaseEnd(batch.id, 1)])
        assert await states_of(store, whole) == [CANCELLED]
        assert await states_of(store, part) == [CANCELLED, QUEUED]
        assert queue.waiting == 2
        assert [lease.batch for lease in await queue.take(10)] == [part]

    # Looking for notifications

    async def test_all_are_listed_newest_first_page_by_page(self, queue: Queue, store: Store) -> None:
        sizes = [1, 3, 1000, 1, 40]
        batches = [a_batch(size, created_at=START + number) for number, size in enumerate(sizes)]
        await queue.put(batches)
        expected = [told(batch, index, QUEUED) for batch in reversed(batches) for index in reversed(range(len(batch)))]
        for limit in (1000, 100, 41, 7):
            assert await listed(store, Filter(), limit) == expected
        page = await store.find_notifications(Filter(), expected[3].id.upper(), 2)
        assert list(page.receipts) == expected[4:6]

    async def test_last_page_says_that_it_is_the_last(self, queue: Queue, store: Store) -> None:
        assert await store.find_notifications(Filter(), None, 5) == Page([], None)
        batch = a_batch(3)
        await queue.put([batch])
        for limit, more in ((2, batch.id + "0002"), (3, None), (4, None)):
            assert (await store.find_notifications(Filter(), None, limit)).next == more

    async def test_pages_begin_behind_an_id_only(self, store: Store) -> None:
        with pytest.raises(ValueError, match="no notification's id"):
            await store.find_notifications(Filter(), "yesterday", 9)

    async def test_what_is_listed_fits_each_filter_and_nothing_else_does(self, queue: Queue, store: Store) -> None:
        chance = random.Random(7)
        kinds = (Headers("com.example.a"), Headers("com.example.a.voip", PushType.VOIP), Headers("com.example.b"))
        reasons = ["Unregistered", "BadDeviceToken", None]
        tokens = [b"ab", b"cd" * 32, b"cdcdef", b"0f" * 32]
        batches, known, expected = [], [], []
        for number in range(40):
            size = chance.choice([1, 1, 2, 5, 300])
            environment = chance.choice([PRODUCTION, DEVELOPMENT])
            batch = a_batch(size, created_at=START + number, app=f"app{number % 4}", environment=environment)
            batch = replace(
                batch,
                headers=kinds,
                headers_of=bytes(chance.choices(range(3), k=size)),
                tokens=[chance.choice(tokens + [token] * 20) for token in batch.tokens],
                origin=chance.choice([None, Origin("main-1"), Origin("main-2", identifiers(range(size)))]),
            )
            states = chance.choices([ACCEPTED, State.REJECTED, QUEUED, BURIED], [90, 5, 3, 2], k=size)
            details = {
                index: Detail(index, chance.choice(reasons)) for index, state in enumerate(states) if state != ACCEPTED
            }
            if number % 5 == 0:  # nothing is known of it
                states, details = [QUEUED] * size, {}
            else:
                known.append(outcomes(batch, states, *details.values()))
            batches.append(batch)
            expected += [(batch, index, state, details.get(index)) for index, state in enumerate(states)]
        await queue.put(batches)
        await queue.take(1000)
        await store.record(known, [])
        expected.reverse()

        for _ in range(150):
            wanted = Filter(
                apps=chance.choice([None, None, frozenset(("app1",)), frozenset(("app0", "app3", "x"))]),
                environment=chance.choice([None, None, PRODUCTION]),
                states=chance.choice([None, frozenset((QUEUED,)), frozenset((State.REJECTED, BURIED)), frozenset()]),
                reason=chance.choice([None, None, None, "Unregistered"]),
                token=chance.choice([None, None, *tokens, b"ff"]),
                push_type=chance.choice([None, None, PushType.VOIP, PushType.ALERT, PushType.MDM]),
                topic=chance.choice([None, None, "com.example.a", "com.example"]),
                since=chance.choice([None, None, START + 10]),
                until=chance.choice([None, None, START + 30, START + 5]),
                connection=chance.choice([None, None, None, "main-1", "main-2", "main"]),
            )
            fitting = [
                f"{batch.id}{index + 1:04x}"
                for batch, index, state, detail in expected
                if fits(wanted, batch, index, state, detail)
            ]
            assert places(await listed(store, wanted, limit=chance.choice([1000, 50]))) == fitting, wanted

    async def test_times_are_those_of_the_taking(self, queue: Queue, store: Store) -> None:
        batches = [a_batch(created_at=START + number / 1000) for number in range(4)]
        await queue.put(batches)
        inner = places(await listed(store, Filter(since=START + 0.001, until=START + 0.003)))
        assert inner == [batches[2].id + "0001", batches[1].id + "0001"]
        assert len(await listed(store, Filter(since=START + 0.0005))) == 3
        assert await listed(store, Filter(until=0.0)) == []
        assert len(await listed(store, Filter(until=1e300, since=-5.0))) == 4

    async def test_what_a_connection_brought_is_listed_page_by_page(self, queue: Queue, store: Store) -> None:
        origins = [None, Origin("main-1"), Origin("main-2"), Origin("main-1", identifiers(range(3)))]
        batches = [replace(a_batch(3, created_at=START + number), origin=origins[number % 4]) for number in range(40)]
        await queue.put(batches[:20])
        await store.keep([(batch, outcomes(batch, [ACCEPTED] * 3)) for batch in batches[20:]])
        expected = [
            f"{batch.id}{place:04x}"
            for batch in reversed(batches)
            for place in (3, 2, 1)
            if batch.origin is not None and batch.origin.connection == "main-1"
        ]
        assert len(expected) == 60
        for limit in (100, 60, 7, 3):
            assert places(await listed(store, Filter(connection="main-1"), limit)) == expected
        page = await store.find_notifications(Filter(connection="main-1"), None, 60)
        assert page.next is None
        assert await listed(store, Filter(connection="main-3")) == []
        some = Filter(connection="main-1", states=frozenset((QUEUED,)), since=START + 10)
        assert places(await listed(store, some)) == [
            each for each in expected if batches[10].id < each < batches[20].id
        ]

    async def test_pages_go_on_where_they_were_while_others_come_and_go(
        self, queue: Queue, store: Store, clock: Clock
    ) -> None:
        batches = [a_batch(3, created_at=START + number) for number in range(10)]
        for batch in batches:
            await finished(queue, store, batch, [ACCEPTED] * 3)
        seen: list[str] = []
        before = None
        for turn in range(100):
            page = await store.find_notifications(Filter(), before, 2)
            seen += places(page.receipts)
            if page.next is None:
                break
            before = page.next
            await finished(queue, store, a_batch(2, created_at=START + 100 + turn), [ACCEPTED] * 2)
            if turn == 4:  # the page ended within the seventh batch
                await store.purge(START + 7)
        assert seen == [f"{batch.id}{place:04x}" for batch in reversed(batches[6:]) for place in (3, 2, 1)][: len(seen)]
        assert len(seen) >= 9

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

    async def test_callers_are_kept_replaced_and_deleted(self, store: Store) -> None:
        assert list(await store.find_callers()) == []
        old = KnownCaller(
            id="ab" * 32,
            name="the old script",
            app="späti",
            environment=DEVELOPMENT,
            topic="com.example.shop.voip",
            certificate=b"-----BEGIN CERTIFICATE-----\n",
            not_after=1_300_000_000,
            created_at=START + 2,
        )
        first = KnownCaller(id="TEAM000001.KEY0000001", name="", app="shop", public_key=b"\0\xff", created_at=START)
        twin = replace(first, id="TEAM000001.KEY0000000")
        for caller in (old, first, twin, replace(old, name="renamed"), first):
            await store.save_caller(caller)
        assert list(await store.find_callers()) == [twin, first, replace(old, name="renamed")]
        assert await store.delete_caller(first.id) is True
        assert await store.delete_caller(first.id) is False
        assert [caller.id for caller in await store.find_callers()] == [twin.id, old.id]
