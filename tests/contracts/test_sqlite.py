"""SQLite as Queue and Store, on real files: the contracts, and what only one file and one process can promise."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import apsw
import msgspec
import pytest
import uvloop
from msgspec import structs

from heliograph import crash
from heliograph.errors import StoreBusy, StoreError
from heliograph.model import (
    Batch,
    Detail,
    DeviceToken,
    Environment,
    Filter,
    KnownCaller,
    LeaseEnd,
    Once,
    Origin,
    Outcomes,
    Removal,
    State,
)
from heliograph.ports import Queue, Store
from heliograph.stores import sqlite_file
from heliograph.stores.body import pack
from heliograph.stores.outcomes import UNREADABLE
from heliograph.stores.sqlite import SqliteStore
from heliograph.stores.sqlite_file import Migration
from heliograph.stores.sqlite_rows import key_of
from tests.contracts.queue import LEASE_S, MAX_WAITING, START, Clock, QueueContract, a_batch, done, ids
from tests.contracts.store import PRODUCTION, StoreContract, outcomes, removal

ID_OF_ANOTHER = "a9b8c7d6-0123-4567-89ab-cdef01234567"
"""Of a caller who makes ids as it likes."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "heliograph" / "queue.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextlib.asynccontextmanager
async def opened(path: Path, clock: Clock | None = None, **options: float) -> AsyncIterator[SqliteStore]:
    clocks: dict[str, Callable[[], float]] = {} if clock is None else {"clock": clock, "monotonic": clock}
    store = await SqliteStore.open(path, **clocks, **options)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.aclose()


def run(store: SqliteStore, work: Callable[[apsw.Connection], object]) -> asyncio.Future[object]:
    """Do something on the connection that writes."""
    return store._writer.run(lambda db, calls: [work(db) for _ in calls], None)


async def open_and_close(path: Path) -> None:
    async with opened(path):
        pass


def refused(path: Path, match: str) -> None:
    with pytest.raises(StoreError, match=match):
        asyncio.run(open_and_close(path))


class TestQueue(QueueContract):
    @pytest.fixture
    async def queue(self, path: Path, clock: Clock) -> AsyncIterator[Queue]:
        async with opened(path, clock, lease_s=LEASE_S, max_waiting=MAX_WAITING) as store:
            yield store


class TestStore(StoreContract):
    @pytest.fixture
    async def store(self, path: Path, clock: Clock) -> AsyncIterator[Store]:
        async with opened(path, clock, lease_s=LEASE_S, max_waiting=MAX_WAITING) as store:
            yield store

    @pytest.fixture
    def queue(self, store: SqliteStore) -> Queue:
        return store


# What is on disk


async def test_all_of_it_survives_closing_and_opening(path: Path) -> None:
    waiting, finished = a_batch(1000), a_batch(2)
    async with opened(path) as store:
        await store.put([finished, waiting])
        await store.take(1)
        await store.record([outcomes(finished, [State.ACCEPTED] * 2)], [removal(finished.tokens[0])])
        await store.finish([LeaseEnd(finished.id, 1)])
    async with opened(path) as store:
        assert store.waiting == 1000
        assert [lease.batch for lease in await store.take(10)] == [waiting]
        (receipt,) = await store.find_receipts([finished.id + "0002"])
        assert receipt is not None
        assert receipt.state is State.ACCEPTED
        assert set(await store.held_among("shop", PRODUCTION, finished.tokens)) == {finished.tokens[0]}


async def test_what_was_put_once_leaves_the_file_after_a_day_and_survives_until_then(path: Path, clock: Clock) -> None:
    key = bytes(32)
    async with opened(path, clock) as store:
        for number in range(100):
            await store.put([a_batch()], once=Once(number.to_bytes(32), key, b"old"))
        clock.advance(1)
        await store.put([a_batch()], once=Once(b"\xff" * 32, key, b"young"))
    clock.advance(86_399)
    async with opened(path, clock) as store:
        await store.purge(0)
        assert await run(store, lambda db: db.execute("SELECT count(*) FROM once").get) == 1
        assert await store.find_once(b"\xff" * 32) == Once(b"\xff" * 32, key, b"young")


async def test_log_is_folded_into_the_file_on_closing(path: Path) -> None:
    async with opened(path) as store:
        await store.put([a_batch(1000)])
        assert path.with_name("queue.db-wal").stat().st_size > 0
    assert sorted(file.name for file in path.parent.iterdir()) == ["queue.db", "queue.db.lock"]


async def test_log_is_folded_into_the_file_though_somebody_else_looks_into_it(path: Path) -> None:
    async with opened(path) as store:
        await store.put([a_batch(1000)])
        outside = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        assert outside.execute("SELECT count(*) FROM batch").get == 1
    with contextlib.closing(outside):
        assert path.with_name("queue.db-wal").stat().st_size == 0


async def test_every_commit_is_synced_before_it_is_answered(path: Path) -> None:
    async with opened(path) as store:

        def settings(db: apsw.Connection) -> list[object]:
            return [db.pragma(name) for name in ("journal_mode", "synchronous", "page_size")]

        full = 2
        assert await run(store, settings) == ["wal", full, 16384]


async def test_files_are_for_their_owner_only_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        async with opened(path) as store:
            await store.put([a_batch()])
            modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(["queue.db", "queue.db-wal", "queue.db-shm", "queue.db.lock"], 0o600)
    assert path.parent.stat().st_mode & 0o777 == 0o700


SENDER = """
import asyncio, os, sys
from heliograph.model import LeaseEnd, State
from heliograph.stores.sqlite import SqliteStore
from tests.contracts.queue import a_batch
from tests.contracts.store import outcomes, removal

async def put(store):
    while True:
        batch = a_batch(3)
        await store.put([batch])
        os.write(1, f"put {batch.id}\\n".encode())

async def send(store):
    while True:
        for lease in await store.take(5):
            batch = lease.batch
            await store.record(
                [outcomes(batch, [State.ACCEPTED] * 3, attempt=lease.attempt)], [removal(batch.tokens[0])]
            )
            await store.finish([LeaseEnd(batch.id, lease.attempt)])
            os.write(1, f"finished {batch.id}\\n".encode())

async def main():
    store = await SqliteStore.open(sys.argv[1])
    os.write(1, b"open\\n")
    await asyncio.gather(*(put(store) for _ in range(8)), *(send(store) for _ in range(3)))

asyncio.run(main())
"""


@contextlib.contextmanager
def sender(path: Path, crash_at: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A process that puts and sends as fast as it can, and tells what was answered, line by line."""
    command = [sys.executable, "-c", SENDER, str(path)]
    environment = {**os.environ, crash.VARIABLE: crash_at}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    "point",
    [f"{name}:{times}" for name in ("before-commit", "after-commit") for times in (1, 2, 40)] + ["checkpoint:2"],
)
async def test_nothing_that_was_answered_is_lost_by_dying_at_the_worst_instant(path: Path, point: str) -> None:
    with sender(path, point) as process:
        assert process.stdout is not None
        told = [line.decode().split() for line in process.stdout.readlines()]
    assert process.returncode == -signal.SIGKILL
    async with opened(path) as store:
        assert None not in await store.find_receipts([batch + "0003" for verb, batch in told if verb == "put"])
        receipts = await store.find_receipts([batch + "0001" for verb, batch in told if verb == "finished"])
        assert {receipt and receipt.state for receipt in receipts} <= {State.ACCEPTED}
        assert await run(store, lambda db: db.execute("PRAGMA integrity_check").get) == "ok"
        assert store.waiting == await run(store, lambda db: db.execute("SELECT total(size) FROM job").get)


PURGER = """
import asyncio, sys
from heliograph.stores.sqlite import SqliteStore

async def main():
    store = await SqliteStore.open(sys.argv[1])
    await store.purge(2_000_000_000)

asyncio.run(main())
"""


async def test_purge_that_dies_between_two_steps_is_gone_on_with_by_the_next(path: Path, clock: Clock) -> None:
    waits = a_batch(created_at=START)
    async with opened(path, clock) as store:
        batches = [a_batch(created_at=START + 1) for _ in range(2000)]
        await store.put(batches)
        leases = await store.take(2000)
        await store.record([outcomes(lease.batch, [State.ACCEPTED]) for lease in leases], [])
        await store.finish(list(map(done, leases)))
        await store.put([waits])
    died = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", PURGER, str(path)],
        env={**os.environ, crash.VARIABLE: "purge"},
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    async with opened(path, clock) as store:
        rows = "SELECT (SELECT count(*) FROM batch) || ' ' || (SELECT count(*) FROM outcome)"
        left = str(await run(store, lambda db: db.execute(rows).get)).split()
        assert 1 <= int(left[0]) < 2001
        assert int(left[1]) == int(left[0]) - 1
        assert await store.purge(clock() + 10) == int(left[1])
        assert ids(await store.take(10)) == [waits.id]


@pytest.mark.parametrize(
    "kills", [pytest.param(24, id="24"), pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
async def test_nothing_that_was_answered_is_lost_by_kill_9(path: Path, kills: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - shown when it fails
    chance = random.Random(seed)
    told: dict[str, set[str]] = {"put": set(), "finished": set()}
    for _ in range(kills):
        with sender(path) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(chance.randrange(1, 300))]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        for line in lines:
            verb, batch = line.decode().split()
            told[verb].add(batch)
        async with opened(path) as store:
            put, finished = sorted(told["put"]), sorted(told["finished"])
            assert None not in await store.find_receipts([batch + "0003" for batch in put])
            receipts = await store.find_receipts([batch + "0001" for batch in finished])
            assert {receipt and receipt.state for receipt in receipts} <= {State.ACCEPTED}
            check = await run(store, lambda db: db.execute("PRAGMA integrity_check").get)
            assert check == "ok"
    assert told["finished"]
    left = set()
    async with opened(path) as store:
        while store.waiting:
            leases = await store.take(100)
            left.update(ids(leases))
            await store.finish(list(map(done, leases)))
    assert not left & told["finished"]


# One process a file


async def test_second_process_is_refused_at_once_and_told_which_one_has_the_file(path: Path) -> None:
    with sender(path) as process:
        with pytest.raises(StoreBusy, match=rf"in use by process {process.pid}\b"):
            await SqliteStore.open(path)
        process.kill()
        process.wait()
        async with opened(path) as store:
            assert store.waiting == await run(store, lambda db: db.execute("SELECT total(size) FROM job").get)


async def test_same_process_cannot_open_it_twice_but_again(path: Path) -> None:
    async with opened(path):
        with pytest.raises(StoreBusy, match=str(os.getpid())):
            await SqliteStore.open(path)
    await open_and_close(path)


@pytest.fixture
def link(path: Path, tmp_path: Path) -> Path:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    return link


async def test_file_is_one_by_whatever_link_it_is_opened(path: Path, link: Path) -> None:
    async with opened(path):
        with pytest.raises(StoreBusy):
            await SqliteStore.open(link)


async def test_leases_of_a_dead_process_are_void(path: Path, clock: Clock) -> None:
    first, second = a_batch(), a_batch()
    async with opened(path, clock) as store:
        await store.put([first, second])
        await store.take(1)
    clock.advance(1)
    async with opened(path, clock) as store:
        assert [(lease.batch.id, lease.attempt) for lease in await store.take(2)] == [(first.id, 2), (second.id, 1)]


def test_file_that_cannot_be_opened_can_be_opened_later(path: Path) -> None:
    path.mkdir(parents=True)
    refused(path, r"queue\.db")
    path.rmdir()
    asyncio.run(open_and_close(path))


# The clock


async def test_setting_the_clock_neither_ends_leases_nor_moves_what_waits(path: Path) -> None:
    wall, steady = Clock(), Clock()
    leased, waits, other = a_batch(), a_batch(), a_batch()
    store = await SqliteStore.open(path, clock=wall, monotonic=steady, lease_s=60)
    await store.put([leased, waits])
    await store.take(2)
    await store.finish([LeaseEnd(waits.id, 1, wall() + 30)])
    for jump in (3600, -7200, 315_360_000):
        wall.advance(jump)
        await store.put([other := a_batch()])
        assert ids(await store.take(10)) == [other.id]
    steady.advance(30)
    assert ids(await store.take(10)) == [waits.id]
    await store.finish([LeaseEnd(waits.id, 2, wall() + 10)])
    steady.advance(10)
    assert ids(await store.take(10)) == [waits.id]
    await store.aclose()


async def test_what_was_never_tried_is_due_on_opening_though_the_clock_was_set_back(path: Path) -> None:
    clock = Clock()
    batch = a_batch()
    async with opened(path, clock) as store:
        await store.put([batch])
    clock.advance(-3600)
    async with opened(path, clock) as store:
        assert ids(await store.take(1)) == [batch.id]


async def test_take_wakes_when_something_becomes_due(path: Path) -> None:
    batch = a_batch()
    async with opened(path) as store:
        await store.put([batch])
        await store.take(1)
        due_at = time.time() + 0.05
        await store.finish([LeaseEnd(batch.id, 1, due_at)])
        assert ids(await store.take(1)) == [batch.id]
        assert time.time() >= due_at - 0.01


async def test_who_waits_for_work_takes_over_what_was_leased_meanwhile_and_never_ended(path: Path) -> None:
    async with opened(path, lease_s=0.05) as store:
        batch = a_batch()
        taking = asyncio.create_task(store.take(1))
        async with asyncio.timeout(20):
            while not store._takers._waiters:  # noqa: ASYNC110 - what is looked at has no event
                await asyncio.sleep(0)
            (lost,) = await store.put([batch], lease=True)
            (lease,) = await taking
        assert (lease.batch, lost.attempt, lease.attempt) == (batch, 1, 2)


async def test_take_wakes_when_a_lease_runs_out(path: Path) -> None:
    async with opened(path, lease_s=0.05) as store:
        await store.put([a_batch()])
        await store.take(1)
        assert [lease.attempt for lease in await store.take(1)] == [2]


async def test_waiting_take_asks_the_file_nothing(path: Path) -> None:
    async with opened(path) as store:
        asked: list[str] = []
        await store.put([a_batch()])
        await store.take(1)
        taking = asyncio.create_task(store.take(1))
        await store.finish([LeaseEnd(a_batch().id, 1)])
        await run(store, lambda db: db.trace_v2(apsw.SQLITE_TRACE_STMT, lambda event: asked.append(event["sql"])))
        await asyncio.sleep(0.05)
        taking.cancel()
        await run(store, lambda db: db.trace_v2(0))
        assert [sql for sql in asked if "job" in sql] == []


# Group commit


async def test_calls_that_come_in_together_share_a_commit(path: Path) -> None:
    async with opened(path) as store:
        before = store.commits
        await asyncio.gather(*(store.put([a_batch()]) for _ in range(200)))
        assert store.waiting == 200
        assert store.commits - before <= 20
        before = store.commits
        await store.put([a_batch() for _ in range(200)])
        assert store.commits - before == 1


async def test_calls_refused_for_want_of_room_share_a_commit_with_the_others(path: Path) -> None:
    async with opened(path, max_waiting=100) as store:
        before = store.commits
        await asyncio.gather(*(store.put([a_batch()]) for _ in range(200)), return_exceptions=True)
        assert store.waiting == 100
        assert store.commits - before <= 20


def poison() -> Batch:
    """A batch that no database takes: a lone surrogate has no UTF-8."""
    return structs.replace(a_batch(), app="\ud800")


async def test_call_that_fails_does_not_fail_those_in_its_group(path: Path) -> None:
    async with opened(path) as store:
        batches = [a_batch() for _ in range(200)]
        batches[17:17] = [poison()]
        batches[120:120] = [poison()]
        answers = await asyncio.gather(*(store.put([batch]) for batch in batches), return_exceptions=True)
        failed = [index for index, answer in enumerate(answers) if isinstance(answer, BaseException)]
        assert failed == [17, 120]
        assert store.waiting == 200
        assert len(await store.take(1000)) == 200


async def test_call_that_fails_half_way_leaves_nothing_behind(path: Path) -> None:
    async with opened(path) as store:
        good = a_batch()
        with pytest.raises(UnicodeEncodeError):
            await store.put([good, poison()])
        assert store.waiting == 0
        assert list(await store.find_receipts([good.id + "0001"])) == [None]


async def test_commit_that_fails_fails_all_of_its_group_and_leaves_nothing_behind(path: Path) -> None:
    async with opened(path) as store:
        await store.put([a_batch(1000)])
        batches = [a_batch(1000) for _ in range(8)]
        # A limit on file sizes stands for a disk that takes no more: the log's next pages cannot be written.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.with_name("queue.db-wal").stat().st_size, limits[1]))
        try:
            answers = await asyncio.gather(*(store.put([batch]) for batch in batches), return_exceptions=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [type(answer) for answer in answers] == [StoreError] * 8
        assert store.waiting == 1000
        assert set(await store.find_receipts([batch.id + "0001" for batch in batches])) == {None}
        await store.put(batches)
        assert len(await store.take(100)) == 9


async def test_full_disk_is_a_store_error_and_over_when_there_is_room(path: Path) -> None:
    async with opened(path) as store:
        batch = a_batch()
        await store.put([batch])
        await run(store, lambda db: db.pragma("max_page_count", db.pragma("page_count")))
        large = [a_batch(1000) for _ in range(3)]
        answers = await asyncio.gather(*(store.put([each]) for each in large), return_exceptions=True)
        assert [type(answer) for answer in answers] == [StoreError] * 3
        assert "Make room" in str(answers[0])
        assert store.waiting == 1
        (lease,) = await store.take(10)
        await store.finish([done(lease)])
        await run(store, lambda db: db.pragma("max_page_count", 1_000_000))
        await store.put(large)
        assert ids(await store.take(10)) == [each.id for each in large]


async def test_reader_does_not_wait_for_the_writer(path: Path) -> None:
    async with opened(path) as store:
        batch = a_batch()
        await store.put([batch])
        held = threading.Event()
        writing = run(store, lambda _: held.wait())
        try:
            assert None not in await store.find_receipts([batch.id + "0001"])
            assert set(await store.held_among("shop", PRODUCTION, batch.tokens)) == set()
            assert not writing.done()
        finally:
            held.set()
        await writing


async def test_lane_whose_first_batch_was_rolled_back_is_taken_from_later(path: Path) -> None:
    async with opened(path) as store:
        good = a_batch(app="new")
        with pytest.raises(UnicodeEncodeError):
            await store.put([good, poison()])
        answers = await asyncio.gather(
            store.put([a_batch(app="newer")]), store.put([poison()]), store.put([good]), return_exceptions=True
        )
        assert [isinstance(answer, BaseException) for answer in answers] == [False, True, False]
        assert sorted(lease.batch.app for lease in await store.take(10)) == ["new", "newer"]


async def test_lease_that_was_rolled_back_is_leased_again(path: Path, clock: Clock) -> None:
    def fail(db: apsw.Connection) -> None:
        raise ArithmeticError

    async with opened(path, clock, lease_s=LEASE_S) as store:
        batches = [a_batch(app=app) for app in "abc"]
        await store.put(batches)
        for attempt in (1, 2, 3):
            answers = await asyncio.gather(store.take(1), run(store, fail), store.take(9), return_exceptions=True)
            assert isinstance(answers[1], ArithmeticError)
            leases = [lease for answer in answers[::2] if isinstance(answer, list) for lease in answer]
            assert sorted(ids(leases)) == sorted(batch.id for batch in batches)
            assert {lease.attempt for lease in leases} == {attempt}
            clock.advance(LEASE_S)  # they are called in again within a group that fails at first
        assert store.waiting == 3


async def test_call_whose_caller_is_cancelled_does_not_disturb_the_others(path: Path) -> None:
    async with opened(path) as store:
        puts = [asyncio.create_task(store.put([a_batch()])) for _ in range(20)]
        await asyncio.sleep(0)
        for put in puts[::2]:
            put.cancel()
        answers = await asyncio.gather(*puts, return_exceptions=True)
        assert answers[1::2] == [[]] * 10
        await store.put([a_batch()])


async def test_put_on_another_event_loop_wakes_a_take_here(path: Path) -> None:
    async with opened(path) as store:
        batch = a_batch()
        taking = asyncio.create_task(store.take(1))
        await asyncio.to_thread(lambda: asyncio.run(store.put([batch])))
        assert ids(await taking) == [batch.id]


def test_it_works_on_uvloop_as_well(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as store:
            batches = [a_batch(10) for _ in range(20)]
            taking = asyncio.create_task(store.take(1))
            await asyncio.gather(*(store.put([batch]) for batch in batches))
            leases = [*await taking, *await store.take(100)]
            assert sorted(ids(leases)) == sorted(batch.id for batch in batches)
            await store.finish(list(map(done, leases)))
            assert store.waiting == 0

    uvloop.run(main())


# The end


async def test_closing_does_what_was_asked_for_and_refuses_what_comes_later(path: Path) -> None:
    store = await SqliteStore.open(path)
    batches = [a_batch() for _ in range(50)]
    puts = [asyncio.create_task(store.put([batch])) for batch in batches]
    await asyncio.sleep(0)
    await asyncio.gather(store.aclose(), store.aclose())
    assert await asyncio.gather(*puts) == [[]] * 50
    for late in (store.put([a_batch()]), store.take(1), store.find_receipts([batches[0].id + "0001"]), store.purge(0)):
        with pytest.raises(StoreError, match="closed"):
            await late
    await store.aclose()
    async with opened(path) as store:
        assert len(await store.take(100)) == 50


async def test_closing_ends_a_take_that_waits(path: Path) -> None:
    async with opened(path) as store:
        taking = asyncio.create_task(store.take(1))
        await store.finish([LeaseEnd(a_batch().id, 1)])
    with pytest.raises(StoreError, match="closed"):
        await taking


async def test_closing_ends_the_threads(path: Path) -> None:
    async with opened(path) as store:
        await store.find_receipts([a_batch().id + "0001"])
        assert any(thread.name.startswith("heliograph-sqlite") for thread in threading.enumerate())
    assert not any(thread.name.startswith("heliograph-sqlite") for thread in threading.enumerate())


# Old, odd and damaged


async def test_purge_deletes_what_is_old_and_finished(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        old = [a_batch(created_at=clock() - 100 + number / 10) for number in range(120)]
        unfinished, young = a_batch(created_at=clock() - 200), a_batch(created_at=clock())
        await store.put([unfinished])
        await store.take(1)
        await store.put([*old, young])
        leases = await store.take(1000)
        await store.record([outcomes(lease.batch, [State.ACCEPTED]) for lease in leases], [])
        await store.finish(list(map(done, leases)))
        assert await store.purge(clock() - 80) == 120
        assert await store.purge(clock() - 80) == 0
        assert set(await store.find_receipts([batch.id + "0001" for batch in old])) == {None}
        assert None not in await store.find_receipts([batch.id + "0001" for batch in (unfinished, young)])
        rows = await run(
            store, lambda db: [db.execute(f"SELECT count(*) FROM {table}").get for table in ("batch", "job", "outcome")]
        )
        assert rows == [2, 1, 1]


async def test_purge_lets_others_through(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        await store.put([a_batch() for _ in range(3000)])
        await store.finish(list(map(done, await store.take(3000))))
        purging = asyncio.create_task(store.purge(clock() + 1))
        await store.put([a_batch()])
        assert not purging.done()
        assert await purging == 3000
        assert store.waiting == 1


async def test_newer_removal_wins(path: Path) -> None:
    async with opened(path) as store:
        token = b"00ff"
        for since in (5, 9, 7):
            await store.record([], [removal(token, since=since)])
        stored = await run(store, lambda db: db.execute("SELECT token, since FROM removal").fetchall())
        assert stored == [(b"\x00\xff", 9)]


async def test_batch_whose_body_is_damaged_is_buried_and_holds_nobody_up(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        damaged, fresh, sound = a_batch(3), a_batch(2), a_batch()
        await store.put([damaged])
        await store.take(1)
        clock.advance(1)
        await store.record([outcomes(damaged, [State.ACCEPTED, State.QUEUED, State.QUEUED], Detail(1, "X", 500))], [])
        await store.finish([LeaseEnd(damaged.id, 1, clock())])
        await store.put([fresh, sound])
        await run(store, lambda db: db.execute("UPDATE batch SET body = x'01' WHERE size > 1").fetchall())
        clock.advance(1)
        assert ids(await store.take(10)) == [sound.id]
        await store.finish([LeaseEnd(a_batch().id, 1)])  # answered after the burial, which nobody waits for
        found = await store.find_receipts([damaged.id + "0001", damaged.id + "0002", fresh.id + "0002"])
        assert [receipt and receipt.state for receipt in found] == [State.ACCEPTED, State.BURIED, State.BURIED]
        assert [receipt and receipt.reason for receipt in found] == [None, UNREADABLE, UNREADABLE]
        assert [receipt and receipt.updated_at for receipt in found[1:]] == [clock(), clock()]
        assert store.waiting == 1


async def test_batch_whose_outcomes_are_damaged_is_buried_as_well(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        damaged = a_batch(2)
        await store.put([damaged])
        await store.take(1)
        await store.record([outcomes(damaged, [State.ACCEPTED, State.QUEUED], Detail(1, "X", 500))], [])
        await store.finish([LeaseEnd(damaged.id, 1, clock())])
        await run(store, lambda db: db.execute("UPDATE outcome SET details = x'c1'").fetchall())
        (known,) = await store.find_receipts([damaged.id + "0001"])
        assert known is not None
        assert known.state is State.ACCEPTED
        taking = asyncio.create_task(store.take(1))
        while store.waiting:
            await store.finish([LeaseEnd(a_batch().id, 1)])
        found = await store.find_receipts([damaged.id + "0001", damaged.id + "0002"])
        assert [receipt and receipt.state for receipt in found] == [State.ACCEPTED, State.BURIED]
    with pytest.raises(StoreError, match="closed"):
        await taking


async def test_damaged_batch_alone_does_not_end_a_take_that_waits(path: Path) -> None:
    async with opened(path) as store:
        damaged, sound = a_batch(), a_batch()
        await store.put([damaged])
        await run(store, lambda db: db.execute("UPDATE batch SET body = x'01'").fetchall())
        taking = asyncio.create_task(store.take(10))
        while store.waiting:
            await store.finish([LeaseEnd(a_batch().id, 1)])
        await store.put([sound])
        assert ids(await taking) == [sound.id]


async def test_damaged_batch_is_never_sent_again(path: Path, clock: Clock) -> None:
    async with opened(path, clock) as store:
        damaged = a_batch(3)
        await store.put([damaged])
        await store.take(1)
        given_up = Detail(0, "ServiceUnavailable", 503)
        await store.record([outcomes(damaged, [State.BURIED, State.SENT, State.QUEUED], given_up)], [])
        await store.finish([LeaseEnd(damaged.id, 1, clock())])
        await run(store, lambda db: db.execute("UPDATE batch SET body = x'01'").fetchall())
        taking = asyncio.create_task(store.take(1))
        while store.waiting:
            await store.finish([LeaseEnd(a_batch().id, 1)])
        taking.cancel()
        wanted = [damaged.id + place for place in ("0001", "0002", "0003")]
        states = [receipt and receipt.state for receipt in await store.find_receipts(wanted)]
        assert states == [State.BURIED, State.UNKNOWN, State.BURIED]
        assert list(await store.replay(wanted)) == [wanted[0]]  # given up on before it was damaged: that is found out
        await run(store, lambda db: db.execute("UPDATE outcome SET details = x'c1'").fetchall())
        assert list(await store.replay(wanted)) == []


async def test_replayed_batch_that_waits_in_another_line_than_its_size_says_is_due_at_once(
    path: Path, clock: Clock
) -> None:
    """As after an update to another idea of what is a small batch (`turns.SMALL`)."""
    batch = a_batch(2)
    async with opened(path, clock) as store:
        await store.put([batch])
        await store.take(1)
        await store.record([outcomes(batch, [State.BURIED, State.QUEUED])], [])
        await store.finish([LeaseEnd(batch.id, 1, clock() + 900)])
        await run(store, lambda db: db.execute("UPDATE job SET line = line + 1").fetchall())
    async with opened(path, clock) as store:
        assert list(await store.replay([batch.id + "0001"])) == [batch.id + "0001"]
        assert ids(await store.take(1)) == [batch.id]


def old_file(path: Path) -> dict[str, Batch]:
    """A file as the first version left it when it died: with what waits, is leased, is due later, and is finished."""
    first, *_ = sqlite_file.migrations()
    batches = {
        "single": a_batch(app="späti"),
        "large": a_batch(1000),
        "leased": a_batch(33),
        "later": a_batch(2, environment=Environment.DEVELOPMENT),
        "finished": a_batch(2),
        "buried": a_batch(3),
    }
    path.parent.mkdir()
    with contextlib.closing(apsw.Connection(str(path))) as db:
        db.pragma("journal_mode", "wal")
        with db:
            sqlite_file.migrate(db, path, [first])
            for batch in batches.values():
                key = bytes.fromhex((batch.id + "0000").replace("-", ""))
                row = (key, batch.app, batch.environment, batch.created_at, len(batch), pack(batch))
                db.execute("INSERT INTO batch (id, app, environment, created_at, size, body) VALUES (?,?,?,?,?,?)", row)
            db.execute(f"INSERT INTO job (row, size, due_at) SELECT row, size, {START} FROM batch")
            db.execute(f"UPDATE job SET attempt = 1, leased_until = {START + 60} WHERE row = 3")
            db.execute(f"UPDATE job SET attempt = 2, due_at = {START + 900} WHERE row = 4")
            db.execute("UPDATE job SET attempt = 1, due_at = NULL WHERE row > 4")
            for number, name, states, details in (
                (4, "later", b"\1\0", (Detail(1, "TooManyRequests", 429, due_at=START + 900),)),
                (5, "finished", b"\1\2", (Detail(1, "Unregistered", 410, since=9),)),
                (6, "buried", b"\5\1\5", (Detail(0, "NoAnswer"), Detail(2, "NoAnswer"))),
            ):
                known = outcomes(batches[name], list(map(State, states)))
                told = (number, 1, known.states, known.times_ms, msgspec.msgpack.encode(details))
                db.execute("INSERT INTO outcome VALUES (?,?,?,?,?)", told)
            db.execute(f"INSERT INTO removal VALUES ('shop', 'production', x'00ff', {START})")
    return batches


async def test_file_of_the_first_version_comes_over_whole(path: Path) -> None:
    batches = old_file(path)
    clock = Clock()
    async with opened(path, clock, lease_s=LEASE_S) as store:
        assert store.waiting == 1 + 1000 + 33 + 2
        assert await store.held_among("shop", PRODUCTION, [b"00ff", b"ff00"]) == {b"00ff": "Unregistered"}
        places = [batches[name].id + place for name in ("later", "finished", "buried") for place in ("0001", "0002")]
        assert [receipt and receipt.state for receipt in await store.find_receipts(places)] == [
            *(State.ACCEPTED, State.QUEUED),
            *(State.ACCEPTED, State.REJECTED),
            *(State.BURIED, State.ACCEPTED),
        ]
        taken = {lease.batch.id: lease for lease in await store.take(100)}
        assert {lease.batch.id: lease.batch for lease in taken.values()} == {
            batches[name].id: batches[name] for name in ("single", "large", "leased")
        }
        assert taken[batches["leased"].id].attempt == 2
        await store.finish(list(map(done, taken.values())))
        clock.advance(900)
        (later,) = await store.take(100)
        assert (later.batch, later.attempt) == (batches["later"], 3)
        assert later.outcomes is not None
        assert later.outcomes.details[0].due_at == START + 900
        await store.finish([done(later)])
        found = await store.find_buried(["shop"], None, 9)
        assert [receipt.id for receipt in found] == [batches["buried"].id + place for place in ("0003", "0001")]
        assert len(await store.replay([found[0].id])) == 1
        assert ids(await store.take(9)) == [batches["buried"].id]
        await store.finish([LeaseEnd(batches["buried"].id, 3)])
        assert store.waiting == 0
        assert await store.purge(clock() + 1) == 6


def count(db: apsw.Connection, table: str) -> object:
    """Rows in it."""
    return db.execute(f"SELECT count(*) FROM {table}").get


def third_version(path: Path) -> list[Batch]:
    """A file as the third version left it: of two batches the second waits, and six device tokens were removed."""
    batches = [a_batch(2, created_at=START - 10), a_batch(1000)]
    path.parent.mkdir()
    with contextlib.closing(apsw.Connection(str(path))) as db:
        db.pragma("journal_mode", "wal")
        with db:
            sqlite_file.migrate(db, path, tuple(sqlite_file.migrations())[:3])
            db.execute("INSERT INTO lane VALUES (1, 'shop', 'production')")
            for number, batch in enumerate(batches, 1):
                key = bytes.fromhex((batch.id + "0000").replace("-", ""))
                put = (number, key, batch.app, batch.environment, batch.created_at, len(batch), pack(batch))
                db.execute("INSERT INTO batch VALUES (?,?,?,?,?,?,?)", put)
            db.execute("INSERT INTO job (row, line, size, due_at) VALUES (2, 3, 1000, ?)", (START,))
            known = outcomes(batches[0], [State.ACCEPTED, State.BURIED])
            ended = (1, 1, known.states, known.times_ms, None, key_of(batches[0].id), "shop")
            db.execute("INSERT INTO outcome VALUES (?,?,?,?,?,?,?)", ended)
            for number, (app, environment) in enumerate(
                [
                    ("späti", "production"),
                    *[("shop", "production")] * 3,
                    ("shop", "development"),
                    ("shop", "production"),
                ]
            ):
                recorded_at = START - number * 40 * 86400
                removed = (app, environment, bytes([number] * 32), START - 7 * number, recorded_at)
                db.execute("INSERT INTO removal VALUES (?,?,?,?,?)", removed)
            db.execute("INSERT INTO quarantine VALUES ('shop', 'production', x'ee', ?)", (START + 60,))
            db.execute("INSERT INTO app VALUES ('shop', x'00')")
    return batches


async def test_file_of_the_third_version_comes_over_whole(path: Path) -> None:
    ended, waits = third_version(path)
    clock = Clock()
    async with opened(path, clock, lease_s=LEASE_S) as store:
        found = await store.find_receipts([ended.id + "0001", ended.id + "0002", waits.id + "03e8"])
        assert [receipt and receipt.state for receipt in found] == [State.ACCEPTED, State.BURIED, State.QUEUED]
        assert [receipt and (receipt.connection, receipt.identifier, receipt.apns_id) for receipt in found] == [
            (None, None, None)
        ] * 3
        assert (await store.find_notifications(Filter(connection="main-1"), None, 9)).receipts == []
        assert [receipt.id for receipt in await store.find_buried(["shop"], None, 9)] == [ended.id + "0002"]
        assert await store.find_apps() == {"shop": b"\0"}
        assert await store.find_callers() == []
        new = structs.replace(a_batch(created_at=START + 1), origin=Origin("main-1"), apns_ids={0: waits.id + "ffff"})
        await store.put([new])
        assert [lease.batch for lease in await store.take(9)] == [new, waits]
        (receipt,) = (await store.find_notifications(Filter(connection="main-1"), None, 9)).receipts
        assert await store.find_receipts([waits.id + "ffff"]) == [receipt]


async def test_removals_from_before_they_had_numbers_are_all_listed_in_the_order_of_their_coming(path: Path) -> None:
    third_version(path)
    tokens = [b"%02x" % number * 32 for number in range(6)]

    async def listed(store: SqliteStore, environment: Environment | None) -> list[bytes]:
        found = await store.find_removals("shop", environment, await store.told_until("shop", PRODUCTION), 100)
        return [each.removal.token.encode() for each in found]

    async with opened(path, clock := Clock()) as store:
        # The oldest was recorded 200 days ago.
        assert await listed(store, PRODUCTION) == [tokens[3], tokens[2], tokens[1]]
        assert await listed(store, None) == [tokens[4], tokens[3], tokens[2], tokens[1]]
        (oldest,) = await store.find_removals("shop", None, 0, 1)
        assert oldest.removal == Removal(
            "shop", Environment.DEVELOPMENT, DeviceToken(tokens[4].decode()), int(START) - 28
        )
        await store.purge(clock())
        assert set(await store.held_among("shop", PRODUCTION, [*tokens, b"ee"])) == {*tokens[1:4], b"ee"}
        assert set(await store.held_among("späti", PRODUCTION, tokens)) == {tokens[0]}
        await store.record([], [Removal("shop", PRODUCTION, DeviceToken(tokens[3].decode()), int(START) - 20)])
        assert await listed(store, PRODUCTION) == [tokens[2], tokens[1], tokens[3]]


async def test_number_of_a_removal_is_never_used_again_whatever_was_deleted_meanwhile(path: Path) -> None:
    token = "00ff"
    async with opened(path) as store:
        await store.record([], [Removal("shop", PRODUCTION, DeviceToken(token), 5)])
        (first,) = await store.find_removals("shop", PRODUCTION, 0, 9)
        await store.tell_until("shop", PRODUCTION, first.number)
        assert await store.revive("shop", PRODUCTION, [token.encode()], 5) == 1
    async with opened(path) as store:
        assert await store.told_until("shop", PRODUCTION) == first.number
        await store.record([], [Removal("shop", PRODUCTION, DeviceToken(token), 6)])
        (second,) = await store.find_removals("shop", PRODUCTION, first.number, 9)
        assert second.number > first.number


async def test_registration_counts_also_for_what_comes_to_be_known_after_a_restart(path: Path) -> None:
    (token,) = a_batch().tokens
    async with opened(path) as store:
        await store.revive("shop", PRODUCTION, [token], 100)
    async with opened(path) as store:
        await store.record([], [removal(token, since=100)])
        assert await store.held_among("shop", PRODUCTION, [token]) == {}
        assert list(await store.find_removals("shop", None, 0, 9)) == []


async def test_purge_leaves_nothing_behind_of_connections_and_of_ids_that_callers_brought(
    path: Path, clock: Clock
) -> None:
    async with opened(path, clock) as store:
        for _ in range(40):
            batch = structs.replace(a_batch(2), origin=Origin("main-1"), apns_ids={0: ID_OF_ANOTHER, 1: ID_OF_ANOTHER})
            await store.keep([(batch, outcomes(batch, [State.ACCEPTED] * 2))])
        assert await store.purge(clock() + 1) == 40
        for table in ("apns_id", "batch INDEXED BY batch_connection WHERE connection IS NOT NULL", "outcome"):
            assert await run(store, partial(count, table=table)) == 0
        assert await run(store, lambda db: db.execute("PRAGMA integrity_check").get) == "ok"


async def test_receipt_of_a_damaged_batch_is_found_by_the_id_that_its_caller_brought(path: Path) -> None:
    async with opened(path) as store:
        batch = structs.replace(a_batch(), apns_ids={0: ID_OF_ANOTHER})
        await store.keep([(batch, outcomes(batch, [State.ACCEPTED]))])
        await run(store, lambda db: db.execute("UPDATE batch SET body = x'01'").fetchall())
        (receipt,) = await store.find_receipts([ID_OF_ANOTHER])
        assert receipt is not None
        assert (receipt.id, receipt.state, receipt.token) == (batch.id + "0001", State.ACCEPTED, None)


async def test_damaged_caller_is_not_known_and_the_others_are(path: Path) -> None:
    caller = KnownCaller(id="TEAM000001.KEY0000001", name="", app="shop", public_key=b"PEM", created_at=START)
    async with opened(path) as store:
        await store.save_caller(caller)
        await run(store, lambda db: db.execute("INSERT INTO caller VALUES ('x', x'7b7d'), ('y', x'ff')").fetchall())
        assert await store.find_callers() == [caller]
        assert await store.delete_caller("y") is True


async def test_keep_that_fails_leaves_nothing_behind_and_the_others_of_its_group_are_kept(path: Path) -> None:
    async with opened(path) as store:
        bad, good = structs.replace(a_batch(), app=None), a_batch(app="späti")
        answers = await asyncio.gather(
            store.keep([(bad, outcomes(bad, [State.BURIED]))], [removal(bad.tokens[0])]),
            store.keep([(good, outcomes(good, [State.BURIED]))], [removal(good.tokens[0])]),
            return_exceptions=True,
        )
        assert [type(answer) for answer in answers] == [StoreError, type(None)]
        assert [receipt.id for receipt in await store.find_buried(None, None, 9)] == [good.id + "0001"]
        assert set(await store.held_among("shop", PRODUCTION, [bad.tokens[0], good.tokens[0]])) == {good.tokens[0]}
        assert len(await store.replay([good.id + "0001"])) == 1
        assert ids(await store.take(9)) == [good.id]


async def test_file_of_the_first_version_that_cannot_come_over_is_left_as_it_was(path: Path) -> None:
    old_file(path)
    with contextlib.closing(apsw.Connection(str(path))) as db:
        db.execute("CREATE TABLE app (x)")
        before = db.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()
    with pytest.raises(StoreError, match="app already exists"):
        await SqliteStore.open(path)
    with contextlib.closing(apsw.Connection(str(path))) as db:
        assert db.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall() == before
        assert db.execute("SELECT count(*) FROM job").get == 6
        db.execute("DROP TABLE app")
    async with opened(path) as store:
        assert store.waiting == 1 + 1000 + 33 + 2


async def test_file_of_a_newer_version_is_refused(path: Path) -> None:
    async with opened(path) as store:
        await run(store, lambda db: db.execute("INSERT INTO migration VALUES (7, '0007_x.sql', '', 0)").get)
    with pytest.raises(StoreError, match="has schema 7, made by a newer heliograph"):
        await SqliteStore.open(path)


async def test_file_made_with_another_schema_of_the_same_number_is_refused(path: Path) -> None:
    async with opened(path) as store:
        await run(store, lambda db: db.execute("UPDATE migration SET sha256 = 'x'").get)
    with pytest.raises(StoreError, match=r"another 0001_start\.sql"):
        await SqliteStore.open(path)


def test_file_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(apsw.Connection(str(path))) as db:
        db.execute("CREATE TABLE theirs (x); PRAGMA user_version = 3").fetchall()
    before = path.read_bytes()
    refused(path, "another program")
    assert path.read_bytes() == before


def test_file_that_is_no_database_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(content := b"not a database at all" * 100)
    refused(path, "damaged or no SQLite file")
    assert path.read_bytes() == content


def test_migration_is_done_whole_or_not_at_all(path: Path) -> None:
    path.parent.mkdir()
    first = Migration(1, "0001_a.sql", "CREATE TABLE a (x); CREATE TABLE b (x);")
    bad = Migration(2, "0002_c.sql", "CREATE TABLE c (x); CREATE TABLE a (x);")
    good = Migration(2, "0002_c.sql", "CREATE TABLE c (x); DROP TABLE a;")

    def tables(db: apsw.Connection) -> set[object]:
        return {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}

    with contextlib.closing(apsw.Connection(str(path))) as db:
        with db:
            sqlite_file.migrate(db, path, [first])
        with pytest.raises(apsw.SQLError, match="a already exists"), db:
            sqlite_file.migrate(db, path, [first, bad])
        assert tables(db) == {"migration", "a", "b"}
        for _ in range(2):
            with db:
                sqlite_file.migrate(db, path, [first, good])
        assert tables(db) == {"migration", "b", "c"}


async def settled_filter(store: SqliteStore) -> None:
    """Until the store knows in memory which device tokens may be held."""
    await store.held_among("shop", PRODUCTION, [b"00"])
    while store._reading_held is not None:
        await asyncio.wait([store._reading_held])
    assert store._held is not None


async def test_held_device_tokens_are_found_whether_recorded_before_while_or_after_they_are_read_into_memory(
    path: Path,
) -> None:
    tokens = [b"%064x" % number for number in range(12_000)] + [b"abc", b"not hex"]

    def removals(some: Sequence[bytes]) -> list[Removal]:
        return [Removal("shop", PRODUCTION, DeviceToken(each.decode()), 1) for each in some]

    async with opened(path) as store:
        await store.record([], removals(tokens[::3]))
    async with opened(path) as store:
        reading = asyncio.ensure_future(settled_filter(store))
        await asyncio.sleep(0)
        await store.record([], removals(tokens[1::3]))
        await reading
        held = tokens[::3] + tokens[1::3]
        assert set(await store.held_among("shop", PRODUCTION, tokens)) == set(held)
        await store.record([], removals(tokens[2::3]))
        assert set(await store.held_among("shop", PRODUCTION, tokens)) == set(tokens)
        await settled_filter(store)
        assert set(await store.held_among("shop", PRODUCTION, tokens)) == set(tokens)
        assert await store.held_among("shop", PRODUCTION, [b"%064x" % 99_999]) == {}


async def test_filter_that_is_crowded_is_read_anew(path: Path) -> None:
    async with opened(path) as store:
        await settled_filter(store)
        many = [Removal("shop", PRODUCTION, DeviceToken(f"{number:064x}"), 1) for number in range(5000)]
        await store.record([], many)
        assert store._held is None
        await settled_filter(store)
        assert set(await store.held_among("shop", PRODUCTION, [each.token.encode() for each in many])) == {
            each.token.encode() for each in many
        }


@pytest.mark.parametrize("lease", [False, True])
async def test_what_waits_is_due_at_once_after_a_restart_with_the_clock_set_back(path: Path, lease: bool) -> None:
    batch = a_batch()
    async with opened(path, ahead := Clock()) as store:
        ahead.advance(3600)
        await store.put([batch], lease=lease)
    async with opened(path, Clock()) as store, asyncio.timeout(5):
        assert ids(await store.take(1)) == [batch.id]


async def test_damaged_details_of_one_batch_do_not_keep_others_from_being_read(path: Path) -> None:
    async with opened(path) as store:
        batches = [a_batch(), a_batch()]
        for lease in await store.put(batches, lease=True):
            detail = Detail(0, reason="ServiceUnavailable", status=503)
            known = Outcomes(lease.batch.id, 1, bytes((State.BURIED,)), bytes(4), (detail,))
            assert set(await store.record([known], [])) == {lease.batch.id}
            await store.finish([done(lease)])
    with contextlib.closing(apsw.Connection(str(path))) as db:
        db.execute("UPDATE outcome SET details = x'ff' WHERE row = 1")
    async with opened(path) as store:
        found = await store.find_receipts([batch.id + "0001" for batch in batches])
        assert [receipt.state for receipt in found if receipt] == [State.BURIED] * 2
        assert len(await store.find_buried(None, None, 10)) == 2


async def test_the_tokens_that_make_the_filter_too_small_are_not_forgotten(path: Path) -> None:
    async with opened(path) as store:
        await settled_filter(store)
        many = [Removal("shop", PRODUCTION, DeviceToken(f"{number:064x}"), 1) for number in range(5000)]
        recording = asyncio.ensure_future(store.record([], many))
        await settled_filter(store)
        await recording
        assert len(await store.held_among("shop", PRODUCTION, [each.token.encode() for each in many])) == 5000
