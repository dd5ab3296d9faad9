"""What every Queue must do, whatever holds it.

An implementation's test class inherits `QueueContract` and has a fixture `queue`, opened with `LEASE_S`, `MAX_WAITING`
and the fixture `clock`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import pytest
from msgspec import structs

from heliograph.errors import Overloaded
from heliograph.model import Batch, Environment, Headers, Lane, Lease, LeaseEnd, Origin, PushType
from heliograph.ports import Queue

LEASE_S = 30.0
MAX_WAITING = 5000
START = 1_700_000_000.0
SMALL, LARGE = 32, 33
"""Notifications in the largest small batch and in the smallest large one."""


class Clock:
    """Time that passes when it is told to: for the wall clock and the monotonic one alike."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def batch_id(created_at: float) -> str:
    """A UUIDv7 (RFC 9562, section 5.7) without its last four digits."""
    octets = bytearray(int(created_at * 1000).to_bytes(6, "big") + random.randbytes(10))
    octets[6] = 0x70 | octets[6] & 0x0F
    octets[8] = 0x80 | octets[8] & 0x3F
    return str(uuid.UUID(bytes=bytes(octets)))[:-4]


def a_batch(
    size: int = 1,
    *,
    created_at: float = START,
    app: str = "shop",
    environment: Environment = Environment.PRODUCTION,
) -> Batch:
    """`size` notifications with a payload for each."""
    return Batch(
        id=batch_id(created_at),
        app=app,
        environment=environment,
        created_at=created_at,
        headers=(Headers("com.example.shop", priority=10, expiration=0),),
        tokens=[random.randbytes(32).hex().encode() for _ in range(size)],
        payloads=[b'{"aps":{"alert":"%d"}}' % number for number in range(size)],
    )


def identifiers(numbers: Iterable[int]) -> bytes:
    """As `Origin` has them."""
    return b"".join(number.to_bytes(4, "big") for number in numbers)


def ids(leases: Sequence[Lease]) -> list[str]:
    return [lease.batch.id for lease in leases]


def lane(batch: Batch) -> Lane:
    return batch.app, batch.environment


def done(lease: Lease) -> LeaseEnd:
    return LeaseEnd(lease.batch.id, lease.attempt)


class QueueContract:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    async def test_what_is_leased_as_it_is_put_is_not_lent_to_others_until_its_lease_ends(
        self, queue: Queue, clock: Clock
    ) -> None:
        first, second = a_batch(3), a_batch(1)
        leases = await queue.put([first, second], lease=True)
        assert [(lease.batch, lease.outcomes, lease.attempt) for lease in leases] == [
            (first, None, 1),
            (second, None, 1),
        ]
        assert queue.waiting == 4
        other = a_batch()
        assert list(await queue.put([other])) == []
        assert ids(await queue.take(10)) == [other.id]
        await queue.finish([done(leases[0]), LeaseEnd(second.id, 1, clock.now)])
        (again,) = await queue.take(10)
        assert (again.batch.id, again.attempt) == (second.id, 2)
        assert queue.waiting == len(other) + 1

    @pytest.mark.parametrize("turns", range(6))
    async def test_what_was_leased_for_a_caller_who_is_gone_is_lent_to_the_next(self, queue: Queue, turns: int) -> None:
        batch = a_batch()
        putting = asyncio.ensure_future(queue.put([batch], lease=True))
        for _ in range(turns):
            await asyncio.sleep(0)
        putting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await putting
        await queue.put([batch])  # where it was cancelled before it was durable
        async with asyncio.timeout(5):
            assert ids(await queue.take(10)) == [batch.id]

    async def test_what_is_known_already_is_not_leased_by_putting_it_again(self, queue: Queue) -> None:
        known, new = a_batch(), a_batch()
        await queue.put([known])
        (lease,) = await queue.put([known, new], lease=True)
        assert lease.batch.id == new.id
        assert ids(await queue.take(10)) == [known.id]

    async def test_batch_is_taken_as_it_was_put(self, queue: Queue) -> None:
        one_each, shared = a_batch(1000), structs.replace(a_batch(3), payloads=[b"{}"])
        mixed = structs.replace(
            a_batch(3, app="späti", environment=Environment.DEVELOPMENT),
            headers=(
                Headers("com.example.shop.voip", PushType.VOIP, collapse_id="Grüße"),
                Headers("com.example.shop", PushType.BACKGROUND, 5, 1_800_000_000, collapse_on_id=True),
            ),
            headers_of=b"\0\1\0",
        )
        await queue.put([one_each, shared, mixed])
        leases = await queue.take(10)
        assert {lease.batch.id: lease.batch for lease in leases} == {
            batch.id: batch for batch in (one_each, shared, mixed)
        }
        assert [(lease.attempt, lease.outcomes) for lease in leases] == [(1, None)] * 3

    @pytest.mark.parametrize("lease", [False, True])
    async def test_batch_is_taken_with_its_connection_and_the_ids_that_callers_brought(
        self, queue: Queue, clock: Clock, lease: bool
    ) -> None:
        theirs = str(uuid.uuid4())
        batches = [
            structs.replace(a_batch(3), origin=Origin("main-9f31c2-1", identifiers([0, 5, 0xFFFFFFFF]))),
            structs.replace(a_batch(2), origin=Origin("täglich"), apns_ids={1: theirs}),
            structs.replace(a_batch(2), apns_ids={0: theirs.upper(), 1: theirs}),
        ]
        leases = await queue.put(batches, lease=lease)
        assert [each.batch for each in leases] == (batches if lease else [])
        clock.advance(LEASE_S)
        taken = {each.batch.id: each.batch for each in await queue.take(10)}
        assert [taken[batch.id] for batch in batches] == batches

    async def test_batch_put_twice_is_taken_once(self, queue: Queue) -> None:
        batch = a_batch()
        await queue.put([batch, batch])
        await queue.put([batch])
        assert ids(await queue.take(10)) == [batch.id]

    async def test_batch_known_already_is_left_as_it_is(self, queue: Queue) -> None:
        batch, other = a_batch(2), a_batch()
        await queue.put([batch])
        await queue.put([structs.replace(batch, payloads=[b"{}"]), other])
        first, second = await queue.take(10)
        assert first.batch == batch
        assert second.batch == other

    async def test_batch_put_again_once_finished_does_not_return(self, queue: Queue) -> None:
        batch, other = a_batch(), a_batch()
        await queue.put([batch])
        await queue.finish([done(lease) for lease in await queue.take(1)])
        await queue.put([batch, other])
        assert ids(await queue.take(10)) == [other.id]

    async def test_oldest_due_is_taken_first(self, queue: Queue, clock: Clock) -> None:
        again, first, second, third = (a_batch() for _ in range(4))
        await queue.put([again])
        await queue.take(1)
        await queue.put([first])
        await queue.finish([LeaseEnd(again.id, 1, clock() + 1.5)])
        clock.advance(1)
        await queue.put([second])
        clock.advance(1)
        await queue.put([third])
        assert ids(await queue.take(3)) == [first.id, second.id, again.id]
        assert ids(await queue.take(3)) == [third.id]

    async def test_no_more_than_the_limit_is_taken(self, queue: Queue) -> None:
        batches = [a_batch() for _ in range(5)]
        await queue.put(batches)
        assert ids(await queue.take(2)) == [batch.id for batch in batches[:2]]
        assert ids(await queue.take(9)) == [batch.id for batch in batches[2:]]

    async def test_to_take_no_batch_is_an_error(self, queue: Queue) -> None:
        with pytest.raises(ValueError, match="at least one"):
            await queue.take(0)

    async def test_lease_that_ran_out_is_taken_again_with_a_higher_attempt(self, queue: Queue, clock: Clock) -> None:
        batch, fresh = a_batch(), a_batch()
        await queue.put([batch])
        await queue.take(1)
        clock.advance(LEASE_S - 1)
        await queue.put([fresh])
        assert ids(await queue.take(10)) == [fresh.id]
        clock.advance(1)
        (lease,) = await queue.take(10)
        assert (lease.batch, lease.attempt) == (batch, 2)

    async def test_lease_that_ran_out_goes_before_what_came_in_later(self, queue: Queue, clock: Clock) -> None:
        batch, fresh = a_batch(), a_batch()
        await queue.put([batch])
        await queue.take(1)
        clock.advance(LEASE_S)
        await queue.put([fresh])
        assert ids(await queue.take(1)) == [batch.id]
        assert ids(await queue.take(1)) == [fresh.id]

    async def test_end_of_an_older_lease_changes_nothing(self, queue: Queue, clock: Clock) -> None:
        batch, other = a_batch(), a_batch()
        await queue.put([batch])
        (late,) = await queue.take(1)
        clock.advance(LEASE_S)
        await queue.take(1)
        await queue.finish([done(late), LeaseEnd(batch.id, late.attempt, clock())])
        await queue.put([other])
        assert ids(await queue.take(10)) == [other.id]
        clock.advance(LEASE_S)
        assert batch.id in ids(await queue.take(10))

    async def test_lease_that_ran_out_can_still_be_ended_while_nobody_else_has_it(
        self, queue: Queue, clock: Clock
    ) -> None:
        batch, other = a_batch(), a_batch()
        await queue.put([batch])
        leases = await queue.take(1)
        clock.advance(LEASE_S)
        await queue.finish(list(map(done, leases)))
        await queue.put([other])
        assert ids(await queue.take(10)) == [other.id]

    async def test_finished_batch_never_returns(self, queue: Queue, clock: Clock) -> None:
        batch, other = a_batch(), a_batch()
        await queue.put([batch])
        leases = await queue.take(1)
        await queue.finish(list(map(done, leases)))
        await queue.finish([LeaseEnd(batch.id, 1, clock())])
        clock.advance(10 * LEASE_S)
        await queue.put([other])
        assert ids(await queue.take(10)) == [other.id]

    async def test_rest_of_a_batch_is_due_again_at_its_time_and_not_before(self, queue: Queue, clock: Clock) -> None:
        batch, other = a_batch(), a_batch()
        await queue.put([batch])
        await queue.take(1)
        await queue.finish([LeaseEnd(batch.id, 1, clock() + 900)])
        clock.advance(899)
        await queue.put([other])
        assert ids(await queue.take(10)) == [other.id]
        clock.advance(1)
        attempts = {lease.batch.id: lease.attempt for lease in await queue.take(10)}
        assert attempts[batch.id] == 2

    async def test_end_told_twice_counts_once(self, queue: Queue, clock: Clock) -> None:
        batch, other = a_batch(), a_batch()
        await queue.put([batch])
        await queue.take(1)
        await queue.finish([LeaseEnd(batch.id, 1, clock() + 5)])
        await queue.finish([LeaseEnd(batch.id, 1, clock() + 50), LeaseEnd(batch.id, 1)])
        await queue.put([other])
        clock.advance(5)
        assert sorted(ids(await queue.take(10))) == sorted([batch.id, other.id])

    async def test_end_of_an_unknown_batch_changes_nothing(self, queue: Queue) -> None:
        batch = a_batch()
        await queue.put([batch])
        await queue.finish([LeaseEnd(a_batch().id, 1), LeaseEnd(batch.id, 1)])
        assert ids(await queue.take(10)) == [batch.id]

    async def test_put_wakes_a_take_that_waits(self, queue: Queue) -> None:
        batch = a_batch()
        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(queue.take(10))
            await queue.finish([LeaseEnd(batch.id, 1)])  # answered after the take has found nothing
            tasks.create_task(queue.put([batch]))
        assert ids(taking.result()) == [batch.id]

    async def test_batch_due_again_wakes_a_take_that_waits(self, queue: Queue, clock: Clock) -> None:
        batch = a_batch()
        await queue.put([batch])
        await queue.take(1)
        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(queue.take(10))
            await queue.finish([LeaseEnd(a_batch().id, 1)])  # answered after the take has found nothing
            tasks.create_task(queue.finish([LeaseEnd(batch.id, 1, clock())]))
        assert [lease.attempt for lease in taking.result()] == [2]

    async def test_take_that_is_cancelled_gives_back_what_it_leased(self, queue: Queue, clock: Clock) -> None:
        batch = a_batch()
        await queue.put([batch])
        attempt = 1
        for turns in range(5):
            taking = asyncio.create_task(queue.take(1))
            for _ in range(turns):
                await asyncio.sleep(0)
            taking.cancel()
            await asyncio.wait([taking])
            if not taking.cancelled():  # it was quicker: then this lease counts
                await queue.finish([LeaseEnd(batch.id, attempt, clock())])
                attempt += 1
        (lease,) = await queue.take(1)
        assert (lease.batch, lease.attempt) == (batch, attempt)

    async def test_each_batch_goes_to_one_of_many_takers(self, queue: Queue) -> None:
        batches = [a_batch() for _ in range(60)]
        taken: list[str] = []

        async def taker() -> None:
            while len(taken) < len(batches):
                leases = await queue.take(3)
                taken.extend(ids(leases))
                await queue.finish(list(map(done, leases)))

        takers = [asyncio.create_task(taker()) for _ in range(5)]
        for batch in batches:
            await queue.put([batch])
        await asyncio.wait(takers, return_when=asyncio.FIRST_COMPLETED)
        for task in takers:
            task.cancel()
        await asyncio.gather(*takers, return_exceptions=True)
        assert sorted(taken) == sorted(batch.id for batch in batches)

    async def test_app_with_much_waiting_holds_up_no_other(self, queue: Queue) -> None:
        await queue.put([a_batch(app="busy") for _ in range(300)])
        others = [a_batch(), a_batch(environment=Environment.DEVELOPMENT), a_batch(SMALL + 1, app="späti")]
        await queue.put(others)
        taken = await queue.take(8)
        assert {batch.id for batch in others} < set(ids(taken))

    async def test_lanes_take_turns(self, queue: Queue) -> None:
        await queue.put([a_batch(app=app) for app in ("a", "b", "c") for _ in range(5)])
        turns = [(await queue.take(1))[0].batch.app for _ in range(15)]
        assert all(set(turns[at : at + 3]) == {"a", "b", "c"} for at in range(0, 15, 3))

    async def test_no_lane_of_many_is_forgotten(self, queue: Queue) -> None:
        lanes = [(f"app{number}", environment) for number in range(100) for environment in Environment]
        await queue.put([a_batch(app=app, environment=environment) for app, environment in lanes for _ in range(3)])
        taken: list[Lane] = []
        while len(taken) < 2 * len(lanes):
            taken += [lane(lease.batch) for lease in await queue.take(7)]
        assert set(taken) == set(lanes)

    async def test_lane_alone_gets_all_of_a_take(self, queue: Queue) -> None:
        batches = [a_batch() for _ in range(64)]
        await queue.put([*batches, a_batch()])
        assert ids(await queue.take(64)) == [batch.id for batch in batches]

    async def test_small_batches_and_large_ones_take_turns_within_a_lane(self, queue: Queue) -> None:
        await queue.put([a_batch(LARGE) for _ in range(12)])
        await queue.put([a_batch(SMALL) for _ in range(12)])
        sizes = [len(lease.batch) for _ in range(24) for lease in await queue.take(1)]
        assert all(set(sizes[at : at + 2]) == {SMALL, LARGE} for at in range(0, 24, 2))

    async def test_each_kind_is_taken_in_order(self, queue: Queue, clock: Clock) -> None:
        batches = []
        for size in (LARGE, SMALL, LARGE, SMALL, SMALL, LARGE):
            batches.append(a_batch(size))
            await queue.put(batches[-1:])
            clock.advance(1)
        taken = [*await queue.take(3), *await queue.take(5)]
        for size in (SMALL, LARGE):
            assert [lease.batch.id for lease in taken if len(lease.batch) == size] == [
                batch.id for batch in batches if len(batch) == size
            ]

    async def test_lane_gets_few_large_batches_at_a_time(self, queue: Queue) -> None:
        await queue.put([a_batch(LARGE) for _ in range(64)])
        assert 1 <= len(await queue.take(64)) <= 16

    async def test_full_lane_is_passed_over(self, queue: Queue) -> None:
        full, other = a_batch(app="full"), a_batch(app="full", environment=Environment.DEVELOPMENT)
        await queue.put([full, other])
        assert ids(await queue.take(10, {lane(full), ("nobody", Environment.PRODUCTION)})) == [other.id]
        assert ids(await queue.take(10)) == [full.id]

    async def test_take_waits_while_all_that_is_due_is_of_full_lanes(self, queue: Queue) -> None:
        full, other = a_batch(app="full"), a_batch()
        await queue.put([full])
        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(queue.take(10, [lane(full)]))
            await queue.finish([LeaseEnd(full.id, 7)])  # answered after the take has found nothing
            await queue.put([a_batch(app="full")])
            assert not taking.done()
            tasks.create_task(queue.put([other]))
        assert ids(taking.result()) == [other.id]
        assert [(lease.batch.id, lease.attempt) for lease in await queue.take(1)] == [(full.id, 1)]

    async def test_lane_that_was_full_on_its_first_day_is_passed_over_as_well(self, queue: Queue) -> None:
        full, other = a_batch(app="full"), a_batch()
        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(queue.take(10, [lane(full)]))
            await queue.finish([LeaseEnd(full.id, 7)])  # answered after the take has found nothing
            await queue.put([full])
            assert not taking.done()
            tasks.create_task(queue.put([other]))
        assert ids(taking.result()) == [other.id]

    async def test_lease_that_ran_out_in_a_full_lane_waits_there(self, queue: Queue, clock: Clock) -> None:
        batch, other = a_batch(app="full"), a_batch()
        await queue.put([batch])
        await queue.take(1)
        clock.advance(LEASE_S)
        await queue.put([other])
        assert ids(await queue.take(10, [lane(batch)])) == [other.id]
        assert [(lease.batch.id, lease.attempt) for lease in await queue.take(10)] == [(batch.id, 2)]

    async def test_lease_that_ran_out_can_still_be_ended_after_others_looked_for_work(
        self, queue: Queue, clock: Clock
    ) -> None:
        batch, other = a_batch(app="full"), a_batch()
        await queue.put([batch])
        (lease,) = await queue.take(1)
        clock.advance(LEASE_S)
        await queue.put([other])
        await queue.take(10, [lane(batch)])
        await queue.finish([done(lease)])
        assert queue.waiting == 1
        await queue.put([a_batch()])
        assert batch.id not in ids(await queue.take(10))

    async def test_many_leases_that_ran_out_are_all_taken_again(self, queue: Queue, clock: Clock) -> None:
        batches = [a_batch(app=f"app{number % 3}") for number in range(3000)]
        await queue.put(batches)
        assert len(await queue.take(3000)) == 3000
        clock.advance(LEASE_S)
        again: Counter[str] = Counter()
        while len(again) < 3000:
            again.update(ids(await queue.take(100)))
        assert set(again.values()) == {1}

    async def test_waiting_and_room_are_exact(self, queue: Queue, clock: Clock) -> None:
        batches = [a_batch(size) for size in (1, 40, 1000)]
        assert (queue.waiting, queue.room) == (0, MAX_WAITING)
        await queue.put(batches)
        await queue.put(batches)
        assert (queue.waiting, queue.room) == (1041, MAX_WAITING - 1041)
        leases = await queue.take(10)
        await queue.finish([LeaseEnd(batches[1].id, 1, clock() + 9), LeaseEnd(batches[2].id, 1)])
        assert (queue.waiting, queue.room) == (41, MAX_WAITING - 41)
        await queue.finish([*map(done, leases), LeaseEnd(batches[1].id, 9)])
        assert (queue.waiting, queue.room) == (40, MAX_WAITING - 40)

    async def test_whatever_happens_nothing_is_lost_doubled_or_out_of_turn(self, queue: Queue, clock: Clock) -> None:
        seed = random.randrange(2**32)
        print(f"seed {seed}")  # noqa: T201 - shown when it fails
        await _Exercise(queue, clock, random.Random(seed)).run(400)

    async def test_more_than_may_wait_is_refused_and_nothing_of_it_taken(self, queue: Queue) -> None:
        full = [a_batch(1000) for _ in range(MAX_WAITING // 1000)]
        await queue.put(full[:-1])
        with pytest.raises(Overloaded) as refusal:
            await queue.put([full[-1], a_batch()])
        assert refusal.value.retry_after_s > 0
        await queue.put([full[-1]])
        assert ids(await queue.take(10)) == [batch.id for batch in full]

    async def test_what_is_refused_for_want_of_room_disturbs_nobody_else(self, queue: Queue) -> None:
        batches = [a_batch(1000) for _ in range(2 * MAX_WAITING // 1000)]
        answers = await asyncio.gather(*(queue.put([batch]) for batch in batches), return_exceptions=True)
        refused = [isinstance(answer, Overloaded) for answer in answers]
        assert sum(refused) == len(batches) - MAX_WAITING // 1000
        taken = [batch.id for batch, no in zip(batches, refused, strict=True) if not no]
        assert sorted(ids(await queue.take(100))) == sorted(taken)

    async def test_finished_batches_make_room(self, queue: Queue, clock: Clock) -> None:
        for _ in range(3):
            await queue.put([a_batch(1000) for _ in range(MAX_WAITING // 1000)])
            leases = await queue.take(100)
            await queue.finish([LeaseEnd(lease.batch.id, lease.attempt, clock()) for lease in leases])
            with pytest.raises(Overloaded):
                await queue.put([a_batch()])
            await queue.finish(list(map(done, await queue.take(100))))

    async def test_id_that_is_no_batch_id_is_an_error(self, queue: Queue) -> None:
        batch = a_batch()
        for wrong in ("", "x" * 32, batch.id + "0000", batch.id[:-2]):
            with pytest.raises(ValueError):
                await queue.put([structs.replace(batch, id=wrong)])

    async def test_nothing_is_put_and_finished_at_once(self, queue: Queue) -> None:
        batch = a_batch()
        await queue.put([])
        await queue.put([batch])
        await queue.finish([])
        assert [lease.batch.id for lease in await queue.take(10)] == [batch.id]


class _Exercise:
    """Random calls, and what must come of them: batches by id, when they are due, who holds them until when."""

    def __init__(self, queue: Queue, clock: Clock, chance: random.Random) -> None:
        self.queue = queue
        self.clock = clock
        self.chance = chance
        self.batches: dict[str, Batch] = {}
        self.due: dict[str, float] = {}
        self.attempts: Counter[str] = Counter()
        self.held: dict[str, float] = {}
        """Until when; some of it has passed."""

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            await self.chance.choice([self.put, self.take, self.take, self.finish, self.finish_late, self.wait])()
        while self.due:
            self.clock.advance(LEASE_S)
            while self.ready(()):
                await self.take()
            for name in list(self.held):
                await self.end(name, None)
        assert self.queue.waiting == 0

    async def put(self) -> None:
        sizes = self.chance.choices([1, SMALL, LARGE], k=self.chance.randrange(1, 6))
        batches = [
            a_batch(size, app=self.chance.choice("abc"), environment=self.chance.choice(list(Environment)))
            for size in sizes
            if self.queue.room > 200
        ]
        await self.queue.put(batches)
        for batch in batches:
            self.batches[batch.id] = batch
            self.due[batch.id] = self.clock()

    async def take(self) -> None:
        lanes = [(app, environment) for app in "abc" for environment in Environment]
        full = self.chance.sample(lanes, self.chance.choice([0, 0, 1, 3]))
        ready = self.ready(full)
        if not ready:
            return
        limit = self.chance.choice([1, 2, 5, 64])
        leases = await self.queue.take(limit, full)
        assert 1 <= len(leases) <= limit
        assert set(ids(leases)) <= set(ready)
        assert len(set(ids(leases))) == len(leases)
        times: dict[tuple[Lane, bool], list[float]] = {}
        for lease in leases:
            times.setdefault(self.line(lease.batch), []).append(self.due[lease.batch.id])
        for line, taken in times.items():
            assert (
                taken == sorted(self.due[name] for name in ready if self.line(self.batches[name]) == line)[: len(taken)]
            )
        for lease in leases:
            self.attempts[lease.batch.id] += 1
            assert lease.attempt == self.attempts[lease.batch.id]
            self.held[lease.batch.id] = self.clock() + LEASE_S

    async def finish(self) -> None:
        for name in self.chance.sample(list(self.held), min(3, len(self.held))):
            await self.end(name, self.chance.choice([None, 0.0, self.clock() + self.chance.random() * 2 * LEASE_S]))

    async def end(self, name: str, again_at: float | None) -> None:
        await self.queue.finish([self.late_end(name), LeaseEnd(name, self.attempts[name], again_at)])
        del self.held[name]
        if again_at is None:
            del self.due[name]
        else:
            self.due[name] = again_at
        assert self.queue.waiting == sum(len(self.batches[name]) for name in self.due)

    async def finish_late(self) -> None:
        await self.queue.finish(list(map(self.late_end, self.chance.sample(list(self.held), min(3, len(self.held))))))

    def late_end(self, name: str) -> LeaseEnd:
        return LeaseEnd(name, self.attempts[name] - 1, self.chance.choice([None, 0.0]))

    async def wait(self) -> None:
        self.clock.advance(self.chance.random() * LEASE_S)

    def ready(self, full: Collection[Lane]) -> list[str]:
        now = self.clock()
        return [
            name
            for name, due_at in self.due.items()
            if due_at <= now and self.held.get(name, now) <= now and lane(self.batches[name]) not in full
        ]

    def line(self, batch: Batch) -> tuple[Lane, bool]:
        return lane(batch), len(batch) > SMALL
