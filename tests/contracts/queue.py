"""What every Queue must do, whatever holds it.

An implementation's test class inherits `QueueContract` and has a fixture `queue`, opened with `LEASE_S`, `MAX_WAITING`
and the fixture `clock`.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Sequence

import pytest
from msgspec import structs

from heliograph.errors import Overloaded
from heliograph.model import Batch, Environment, Headers, Lease, LeaseEnd, PushType
from heliograph.ports import Queue

LEASE_S = 30.0
MAX_WAITING = 5000
START = 1_700_000_000.0


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


def ids(leases: Sequence[Lease]) -> list[str]:
    return [lease.batch.id for lease in leases]


def done(lease: Lease) -> LeaseEnd:
    return LeaseEnd(lease.batch.id, lease.attempt)


class QueueContract:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

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
        assert [lease.batch for lease in leases] == [one_each, shared, mixed]
        assert [(lease.attempt, lease.outcomes) for lease in leases] == [(1, None)] * 3

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
