"""Queue and Store in one SQLite file: one writer thread with group commit, two threads that read.

The writer (`group_commit`) commits what waits in one transaction, in WAL with synchronous=FULL. Who reads sees the
last commit and does not wait for the next. The ports' methods are here and hand all work on the file over: to the
writer what changes jobs (`sqlite_jobs`) or anything else (`sqlite_records`), to one reader what is asked for by name
(`sqlite_reading`), to the other what may take long (`sqlite_listing`). Which device tokens may be held back is known
here in memory (`held`).

One process a file, by a kernel lock on `<path>.lock`. Two things follow. A lease found on opening belongs to a dead
process and is void at once. And time is counted from the opening by the monotonic clock: setting the machine's clock
neither ends leases nor moves what waits. The wall clock is read on opening, and then only for what callers name or see:
how far away a time is that they name, how old a batch is at its burial or replay, and when that was.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar, TypeVarTuple

import apsw

from heliograph import crash
from heliograph.batches import notification_id
from heliograph.errors import HeliographError, StoreError
from heliograph.model import (
    ApiKey,
    Batch,
    Depth,
    Environment,
    Filter,
    KnownCaller,
    Lane,
    Lease,
    LeaseEnd,
    Listed,
    Once,
    Outcomes,
    Page,
    Quarantine,
    Receipt,
    Removal,
)
from heliograph.stores import sqlite_listing, sqlite_reading, sqlite_records
from heliograph.stores.body import unpack
from heliograph.stores.group_commit import Work, closed_error, store_error
from heliograph.stores.held import MaybeHeld
from heliograph.stores.outcomes import bury, decode_details, receipt
from heliograph.stores.sqlite_file import Row, connect, locked, make_directory, prepare
from heliograph.stores.sqlite_jobs import Jobs, Kept, OwnIds, Put, Taken
from heliograph.stores.sqlite_rows import (
    CANONICAL,
    api_key,
    api_key_row,
    apns_id_key,
    batch_row,
    caller_of,
    caller_row,
    details_of,
    id_of,
    key_of,
    octets_of,
    outcome_row,
    places_of,
)
from heliograph.stores.takers import Takers
from heliograph.telemetry import Histogram

A = TypeVar("A")
T = TypeVar("T")
Args = TypeVarTuple("Args")

_PAUSE_STEPS = 3.0
"""The pause after a step, in steps: the others get three quarters of the writer's time."""


class SqliteStore:
    """Queue and Store (see `ports`) in one file, for callers on asyncio's or uvloop's loops.

    Every method raises StoreError when the file cannot be read or written, and once the store is closed. A call that is
    cancelled may have had its effect all the same, but for `take`: it gives back what it had leased.
    """

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        lease_s: float = 60.0,
        max_waiting: int = 5_000_000,
    ) -> Self:
        """Open or make the store at `path`, bring its schema up to date and void the leases of a former process.

        `clock` gives UNIX seconds, `monotonic` seconds from anywhere. `max_waiting` is how many unfinished
        notifications are kept before `put` raises Overloaded. Raises StoreBusy when the store is open already, in this
        process or another, and StoreError when it cannot be used.
        """
        return await asyncio.to_thread(cls, Path(path), clock, monotonic, lease_s, max_waiting)

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        lease_s: float,
        max_waiting: int,
    ) -> None:
        """Works on the disk: `open` is the way in."""
        path = path.resolve()  # one lock for one file, by whatever link it is opened
        self._path = path
        self._clock = clock
        self._monotonic = monotonic
        self._opened_at = clock() - monotonic()
        self._max_waiting = max_waiting
        self._lease_s = lease_s
        self._takers = Takers()
        # The loop's thread alone has to do with these.
        self._held: MaybeHeld | None = None
        """None: not read from the file yet."""
        self._newly_held: list[bytes] = []
        """Recorded while there is no `_held`."""
        self._reading_held: asyncio.Future[None] | None = None
        with contextlib.ExitStack() as undo:
            try:
                make_directory(path.parent)
                undo.enter_context(locked(path))
                # SQLite gives its other files the mode of this one. Later on nothing in this process may open and close
                # the file beside SQLite: that would drop its locks (POSIX, fcntl).
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                writer = undo.enter_context(contextlib.closing(connect(path)))
                waiting = prepare(writer, path, self._now())
                self._reader = undo.enter_context(contextlib.closing(connect(path)))
                self._looker = undo.enter_context(contextlib.closing(connect(path)))
                for each in (self._reader, self._looker):
                    each.pragma("query_only", value=True)
            except (apsw.Error, OSError) as error:
                raise store_error(path, error) from error
            self._opened = undo.pop_all()
        self._readers = ThreadPoolExecutor(1, "heliograph-sqlite-reader")
        self._lookers = ThreadPoolExecutor(1, "heliograph-sqlite-looker")
        self._jobs = Jobs(
            writer,
            path,
            waiting,
            self._takers,
            now=self._now,
            clock=clock,
            lease_s=lease_s,
            max_waiting=max_waiting,
        )
        self._writer = self._jobs.writer

    @property
    def commits(self) -> int:
        """Transactions that changed something, since the opening."""
        return self._writer.commits

    @property
    def commit_s(self) -> Histogram:
        """How long each of them took."""
        return self._writer.commit_s

    @property
    def waiting(self) -> int:
        """Notifications in batches that are not finished."""
        return self._writer.waiting

    @property
    def room(self) -> int:
        """How many more notifications `put` would take."""
        return max(0, self._max_waiting - self._writer.waiting)

    # Queue

    async def put(self, batches: Sequence[Batch], *, lease: bool = False, once: Once | None = None) -> Sequence[Lease]:
        if not batches:
            return ()
        rows = list(map(batch_row, batches))
        putting = self._writer.run(self._jobs.put, (rows, lease, once, _own_ids(batches)), unwanted=self._unlease)
        try:
            leased = await putting
        except asyncio.CancelledError:
            _reject(putting, self._unlease)
            raise
        if isinstance(leased, HeliographError):
            raise leased
        return [Lease(batch, None, 1) for batch, row in zip(batches, rows, strict=True) if row[0] in leased]

    async def take(self, limit: int, full: Collection[Lane] = ()) -> Sequence[Lease]:
        if limit < 1:
            raise ValueError(f"take at least one batch, not {limit}")
        while True:
            seen = self._takers.changes
            rows, shut, wait_s = await self._take(limit, full)
            if leases := self._readable(rows):
                return leases
            if not rows:
                # What is leased with a put wakes nobody, and its lease may run out too.
                await self._takers.wait(seen, shut, min(wait_s, self._lease_s))

    async def finish(self, ends: Sequence[LeaseEnd]) -> None:
        if not ends:
            return
        ahead = self._now() - self._clock()
        done = [(key_of(end.batch_id), end.attempt) for end in ends if end.again_at is None]
        again = [(key_of(end.batch_id), end.attempt, end.again_at + ahead) for end in ends if end.again_at is not None]
        await self._writer.run(self._jobs.finish, (done, again))

    # Store

    async def record(
        self, outcomes: Sequence[Outcomes], removals: Sequence[Removal], quarantines: Sequence[Quarantine] = ()
    ) -> Collection[str]:
        if not outcomes and not removals and not quarantines:
            return ()
        known = [outcome_row(each) for each in outcomes]
        dead, held = self._hold_back(removals, quarantines)
        recorded = await self._writer.run(sqlite_records.record, (known, dead, held))
        return {each.batch_id for each, row in zip(outcomes, known, strict=True) if row[0] in recorded}

    async def keep(
        self,
        finished: Sequence[tuple[Batch, Outcomes]],
        removals: Sequence[Removal] = (),
        quarantines: Sequence[Quarantine] = (),
    ) -> None:
        if not finished and not removals and not quarantines:
            return
        batches = [batch for batch, _ in finished]
        rows, known = list(map(batch_row, batches)), [outcome_row(each) for _, each in finished]
        dead, held = self._hold_back(removals, quarantines)
        await self._writer.run(self._jobs.keep, Kept(rows, known, _own_ids(batches), dead, held))

    async def find_receipts(self, ids: Sequence[str], apps: Collection[str] | None = None) -> Sequence[Receipt | None]:
        """In whatever case an id is written, it is the same."""
        receipts: list[Receipt | None] = [None] * len(ids)
        if apps is not None and not apps:
            return receipts
        canonical = list(map(str.lower, ids))
        wanted: dict[str, list[int]] = {}
        for position, text in enumerate(canonical):
            if CANONICAL.fullmatch(text):
                wanted.setdefault(text[:-4], []).append(position)
        if wanted:
            for row in await self._read(sqlite_reading.receipt_rows, tuple(map(key_of, wanted))):
                if apps is not None and row[1] not in apps:
                    continue
                details, places = details_of(row[7]), places_of(row[-1])
                for position in wanted[id_of(row[0])]:
                    receipts[position] = receipt(canonical[position], row, details, places)
            brought: dict[bytes, list[int]] = {}
            for positions in wanted.values():
                for position in positions:
                    if receipts[position] is None:
                        brought.setdefault(apns_id_key(canonical[position]), []).append(position)
            if brought:
                of_apps = None if apps is None else tuple(apps)
                for octets, place, row in await self._read(sqlite_reading.own_rows, tuple(brought), of_apps):
                    name = notification_id(id_of(row[0]), place)
                    found = receipt(name, row, details_of(row[7]), places_of(row[-1]))
                    for position in brought[octets]:
                        receipts[position] = found
        return receipts

    async def find_removals(
        self, app: str, environment: Environment | None, after: int, limit: int, token: bytes | None = None
    ) -> Sequence[Listed]:
        """One connection writes, so numbers become visible in their order: none below one that was read comes later."""
        environments = tuple(Environment) if environment is None else (environment,)
        octets = None if token is None else octets_of(token.decode())
        return await self._read(sqlite_reading.find_removals, app, environments, after, limit, octets, self._now())

    async def told_until(self, app: str, environment: Environment) -> int:
        return await self._read(sqlite_reading.told_until, app, environment)

    async def tell_until(self, app: str, environment: Environment, number: int) -> None:
        await self._writer.run(sqlite_records.tell, (app, environment.value, number))

    async def revive(self, app: str, environment: Environment, tokens: Collection[bytes], at: float) -> int:
        """In whole seconds: one that died within the second of its registration lives.

        Many are written a part at a time. Remembered as long as removals: see `sqlite_records.REMOVAL_LAPSES_S`.
        """
        octets = sorted({octets_of(token.decode()) for token in tokens})
        revived = 0
        for start in range(0, len(octets), sqlite_records.REVIVED_AT_ONCE):
            some = tuple(octets[start : start + sqlite_records.REVIVED_AT_ONCE])
            asked = app, environment.value, some, int(at), self._now()
            revived += await self._writer.run(sqlite_records.revive, asked)
        return revived

    async def held_among(self, app: str, environment: Environment, tokens: Collection[bytes]) -> dict[bytes, str]:
        if self._held is not None:
            tokens = self._held.among(tokens)
        elif self._reading_held is None:
            self._reading_held = asyncio.ensure_future(self._read_held())
        if not tokens:
            return {}
        return await self._read(sqlite_reading.held_among, app, environment, tuple(tokens), self._now())

    async def find_buried(self, apps: Collection[str] | None, before: str | None, limit: int) -> Sequence[Receipt]:
        """By id, which begins with the time when it was made. Raises ValueError if `before` is no id."""
        canonical = sqlite_reading.canonical_before(before)
        return await self._look(sqlite_reading.find_buried, apps, canonical, limit)

    async def find_notifications(self, wanted: Filter, before: str | None, limit: int) -> Page:
        """As the port has it; one look takes `sqlite_listing.LOOK_S` at most, about."""
        canonical = sqlite_reading.canonical_before(before)
        return await self._look(sqlite_listing.find_notifications, wanted, canonical, limit)

    async def replay(self, ids: Sequence[str]) -> Sequence[str]:
        """Those of a batch that somebody has leased at the moment are left as they are: ask for them again.

        An older lease of the batch, though it ran out only, is told apart from now on: what it says is not recorded.
        """
        if not ids:
            return []
        return await self._writer.run(self._jobs.replay, ids)

    async def cancel(self, ids: Sequence[str]) -> Sequence[str]:
        """An older lease of the batch is told apart from now on, as with `replay`."""
        if not ids:
            return []
        return await self._writer.run(self._jobs.cancel, ids)

    async def find_once(self, key: bytes) -> Once | None:
        return await self._read(sqlite_reading.find_once, key, self._now())

    async def purge(self, before: float) -> int:
        """Delete finished batches made before `before` (UNIX seconds), and with them their receipts and callers' ids.

        Returns how many batches. Unfinished ones stay, whatever their age. Then removals and registrations that are
        older than `sqlite_records.REMOVAL_LAPSES_S` and quarantines that ended.
        """
        purged = 0
        place: bytes | None = b""
        end = max(0, math.ceil(before * 1000)).to_bytes(6, "big")
        while place is not None:
            async with _in_steps():
                count, place = await self._writer.run(sqlite_records.purge, (place, end))
            purged += count
        lapsed = True
        while lapsed:
            async with _in_steps():
                lapsed = await self._writer.run(sqlite_records.lapse, self._now())
        return purged

    async def depths(self) -> Sequence[Depth]:
        """Of all lanes that there ever were."""
        found: dict[int, list[float]] = {}
        place: int | None = 0
        while place is not None:
            rows, place = await self._read(sqlite_reading.depth_rows, place)
            for number, waiting, leased, due_at in rows:
                lane = found.setdefault(number, [0, 0, math.inf])
                lane[0] += waiting
                lane[1] += leased
                lane[2] = min(lane[2], math.inf if due_at is None else due_at)
        now = self._now()
        depths = []
        for number, app, environment in await self._read(sqlite_reading.lanes):
            waiting, leased, due_at = found.get(number, (0, 0, math.inf))
            depths.append(Depth(app, Environment(environment), int(waiting), int(leased), max(0.0, now - due_at)))
        return depths

    async def probe(self) -> None:
        await self._writer.run(sqlite_records.probe, None)
        await self._read(sqlite_reading.probe)

    async def save_app(self, name: str, record: bytes) -> None:
        await self._writer.run(sqlite_records.save_apps, (name, record))

    async def find_apps(self) -> dict[str, bytes]:
        return await self._read(sqlite_reading.find_apps)

    async def delete_app(self, name: str) -> bool:
        return await self._writer.run(sqlite_records.delete_apps, name)

    async def save_caller(self, caller: KnownCaller) -> None:
        await self._writer.run(sqlite_records.save_callers, caller_row(caller))

    async def find_callers(self) -> Sequence[KnownCaller]:
        records = await self._read(sqlite_reading.caller_records)
        callers = [caller for caller in map(caller_of, records) if caller is not None]
        return sorted(callers, key=lambda caller: (caller.created_at, caller.id))

    async def delete_caller(self, id: str) -> bool:
        return await self._writer.run(sqlite_records.delete_callers, id)

    async def save_key(self, key: ApiKey) -> None:
        await self._writer.run(sqlite_records.save_keys, api_key_row(key))

    async def find_keys(self) -> Sequence[ApiKey]:
        return [key for key in map(api_key, await self._read(sqlite_reading.api_key_rows)) if key is not None]

    async def delete_key(self, id: str) -> bool:
        return await self._writer.run(sqlite_records.delete_keys, id)

    async def aclose(self) -> None:
        """Do what was asked for, refuse what comes now, fold the log into the file, release the lock.

        Calls of `take` that wait end with StoreError.
        """
        self._writer.close()
        self._takers.wake(None)
        if self._reading_held is not None:
            await asyncio.wait([self._reading_held])
        await asyncio.to_thread(self._end)

    # Below the ports

    def _now(self) -> float:
        """UNIX seconds as on opening, counted on from there by the monotonic clock."""
        return self._opened_at + self._monotonic()

    async def _read(self, find: Callable[[apsw.Connection, *Args], T], *arguments: *Args) -> T:
        """What `find` finds, on the reader's connection and thread."""
        return await self._find(self._reader, self._readers, find, *arguments)

    async def _look(self, find: Callable[[apsw.Connection, *Args], T], *arguments: *Args) -> T:
        """The same on the looker's, for what may take long."""
        return await self._find(self._looker, self._lookers, find, *arguments)

    async def _find(
        self, db: apsw.Connection, thread: Executor, find: Callable[[apsw.Connection, *Args], T], *arguments: *Args
    ) -> T:
        def find_there() -> T:
            try:
                return find(db, *arguments)
            except apsw.Error as error:
                raise store_error(self._path, error) from error

        if self._writer.closed:
            raise closed_error(self._path)
        return await asyncio.get_running_loop().run_in_executor(thread, find_there)

    def _hold_back(self, removals: Sequence[Removal], quarantines: Sequence[Quarantine]) -> tuple[list[Row], list[Row]]:
        """Both as `sqlite_records.hold_back` wants them, and known here from now on."""
        if not removals and not quarantines:
            return [], []
        now = self._now()
        ahead = now - self._clock()
        dead = [(each.app, each.environment.value, octets_of(each.token), each.since, now) for each in removals]
        held = [(each.app, each.environment.value, octets_of(each.token), each.until + ahead) for each in quarantines]
        self._note_held([each.token.encode() for each in removals] + [each.token.encode() for each in quarantines])
        return dead, held

    def _note_held(self, tokens: Sequence[bytes]) -> None:
        if self._held is None:
            self._newly_held.extend(tokens)
            return
        self._held.add(tokens)
        if self._held.crowded:  # a larger one will be read
            self._held = None
            self._newly_held.extend(tokens)

    async def _read_held(self) -> None:
        """Fill `_held` from the file. What is recorded meanwhile is in `_newly_held`, whether it is read or not."""
        try:
            held = MaybeHeld(await self._read(sqlite_reading.count_held) + len(self._newly_held))
            for sql in sqlite_reading.HELD_PAGES:
                place: Row = ("", "", b"")
                while rows := await self._read(sqlite_reading.held_page, sql, place):
                    held.add(octets.hex().encode() for _, _, octets in rows)
                    held.add(octets for _, _, octets in rows if octets.isascii())  # see `octets_of`
                    place = rows[-1]
            held.add(self._newly_held)
            self._newly_held.clear()
            self._held = held
        except StoreError:  # whoever asks next tries again
            pass
        finally:
            self._reading_held = None

    async def _take(self, limit: int, full: Collection[Lane]) -> Taken:
        taking = self._writer.run(self._jobs.lease, (limit, full), unwanted=self._untake)
        try:
            return await taking
        except asyncio.CancelledError:
            _reject(taking, self._untake)
            raise

    def _untake(self, taken: Taken) -> None:
        """Nobody is there for what was taken."""
        if taken.rows:
            self._run_unattended(self._jobs.give_back, [(row[0], row[7]) for row in taken.rows])

    def _unlease(self, leased: Put) -> None:
        """Nobody is there for what was leased with a put."""
        if leased and not isinstance(leased, HeliographError):
            self._run_unattended(self._jobs.put_back, [(key,) for key in leased])

    def _readable(self, rows: Sequence[Row]) -> list[Lease]:
        """Leases of rows of `Taken`. What is damaged is buried here: it must not hold up the others."""
        leases = []
        for _, key, app, environment, created_at, size, body, attempt, recorded, states, times_ms, details in rows:
            name, known = id_of(key), None
            try:
                if states is not None:
                    known = Outcomes(name, recorded, states, times_ms, decode_details(details))
                leases.append(Lease(unpack(name, app, Environment(environment), created_at, body), known, attempt))
            except StoreError:
                known = known or Outcomes(name, attempt, states or bytes(size), times_ms or bytes(4 * size))
                buried = bury(known, attempt, self._clock() - created_at)
                self._run_unattended(self._jobs.bury, (outcome_row(buried), (key, attempt)))
        return leases

    def _run_unattended(self, work: Work[A, Any], argument: A) -> None:
        """Where this fails, the lease that it was to end runs out, or is void on the next opening."""
        with contextlib.suppress(StoreError):
            done = self._writer.run(work, argument)
            done.add_done_callback(lambda future: future.cancelled() or future.exception())

    def _end(self) -> None:
        self._readers.shutdown()
        self._lookers.shutdown()
        self._writer.join()
        self._opened.close()


def _own_ids(batches: Sequence[Batch]) -> OwnIds:
    """Raises ValueError where one is no UUID."""
    return {
        key_of(batch.id): [(place, apns_id_key(text)) for place, text in batch.apns_ids.items()]
        for batch in batches
        if batch.apns_ids
    }


def _reject(asked: asyncio.Future[T], unwanted: Callable[[T], None]) -> None:
    """The caller was cancelled: if the answer is there already, nobody else will tell that it is not wanted."""
    if not asked.cancelled() and asked.exception() is None:
        unwanted(asked.result())


@contextlib.asynccontextmanager
async def _in_steps() -> AsyncIterator[None]:
    """Around a step of what keeps the writer busy for long: let others through before the next."""
    started_at = time.monotonic()
    yield
    await asyncio.sleep(_PAUSE_STEPS * min(time.monotonic() - started_at, sqlite_records.STEP_S))
    crash.point("purge")
