"""Queue and Store in one SQLite file: one writer thread with group commit, one reader thread beside it.

The writer (`group_commit`) commits what waits in one transaction, in WAL with synchronous=FULL. Readers see the last
commit and do not wait for the next.

One process a file, by a kernel lock on `<path>.lock`. Two things follow. A lease found on opening belongs to a dead
process and is void at once. And time is counted from the opening by the monotonic clock: setting the machine's clock
neither ends leases nor moves what waits. The wall clock is read on opening, and then only to learn how far away a time
is that a caller names.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import math
import os
import re
import threading
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import apsw

from heliograph import crash
from heliograph.batches import notification_id, parse_id
from heliograph.errors import Overloaded, StoreError
from heliograph.model import (
    Batch,
    Detail,
    Environment,
    Lane,
    Lease,
    LeaseEnd,
    Outcomes,
    Quarantine,
    Receipt,
    Removal,
    State,
)
from heliograph.stores.body import pack, unpack
from heliograph.stores.group_commit import Work, Writer, closed_error, store_error
from heliograph.stores.held import MaybeHeld
from heliograph.stores.outcomes import bury, decode_details, encode_details, exhume, receipt
from heliograph.stores.sqlite_file import Row, connect, locked, make_directory, prepare
from heliograph.stores.turns import SMALL, Turns

A = TypeVar("A")
T = TypeVar("T")

RETRY_AFTER_S = 5.0
"""What Overloaded tells callers to wait: long enough for several hundred thousand to leave."""

REMOVAL_LAPSES_S = 180 * 86400.0
"""How long a removal holds. Whoever never registers device tokens with us would otherwise hold one back for ever."""

_STEP_S = 0.003
"""How long one step of a purge may keep the writer, about."""
_PAUSE_STEPS = 3.0
"""The pause after a step, in steps: the others get three quarters of the writer's time."""

_ROWS = 64
"""Rows in one statement. Each call of SQLite gives up the interpreter's lock, and a busy event loop may then keep it
for a switch interval: a thousand calls for a thousand rows took seconds. One for 64 rows also costs half the CPU."""

_PUT = """
INSERT INTO batch (id, app, environment, created_at, size, body) VALUES {rows} ON CONFLICT (id) DO NOTHING"""

_PUT_JOBS = f"""
INSERT INTO job (row, line, size, due_at, attempt, leased_until)
SELECT row, 2 * number + (size > {SMALL}), size, ?, ?, ?
FROM batch CROSS JOIN lane USING (app, environment) WHERE row > ?"""  # noqa: S608 - an integer of ours

_NEW = "SELECT row, line, job.size, id FROM job CROSS JOIN batch USING (row) WHERE row > ?"

_LINES = """
WITH RECURSIVE found (line) AS (
    SELECT min(line) FROM job INDEXED BY job_due WHERE leased_until IS NULL
    UNION ALL
    SELECT (
        SELECT min(line) FROM job INDEXED BY job_due
        WHERE line > found.line AND leased_until IS NULL)
    FROM found WHERE line IS NOT NULL)
SELECT line, (
    SELECT min(due_at) FROM job INDEXED BY job_due
    WHERE line = found.line AND leased_until IS NULL)
FROM found WHERE line IS NOT NULL"""

# The first of several lines by the index alone, for each what is due and perhaps what is not.
_DUE = """
SELECT line, row, due_at FROM carray(?) AS wanted CROSS JOIN job ON row IN (
    SELECT row FROM job AS first INDEXED BY job_due
    WHERE first.line = wanted.value AND first.leased_until IS NULL
    ORDER BY first.due_at, first.row LIMIT ?)
ORDER BY due_at, row"""

_LEASE = "UPDATE job SET attempt = attempt + 1, leased_until = ? WHERE row IN carray(?)"

_LEASED = """
SELECT row, batch.id, app, environment, batch.created_at, batch.size, body, attempt, recorded, states, times_ms, details
FROM carray(?) AS wanted CROSS JOIN job ON row = wanted.value JOIN batch USING (row)
LEFT JOIN (SELECT row, attempt AS recorded, states, times_ms, details FROM outcome) USING (row)"""

_RUN_OUT = """
UPDATE job SET leased_until = NULL WHERE row IN carray(?) AND leased_until <= ?
RETURNING line, due_at"""

_GIVE_BACK = """
UPDATE job SET attempt = attempt - 1, leased_until = NULL FROM (VALUES {rows})
WHERE row = column1 AND attempt = column2
RETURNING line, due_at"""

_PUT_BACK = """
UPDATE job SET attempt = 0, leased_until = NULL FROM (VALUES {rows})
WHERE row = (SELECT row FROM batch WHERE id = column1) AND attempt = 1
RETURNING line, due_at"""

_DONE = """
DELETE FROM job WHERE row IN (
    SELECT row FROM (VALUES {rows}) CROSS JOIN batch ON id = column1 CROSS JOIN job USING (row)
    WHERE attempt = column2 AND ended < attempt)
RETURNING size"""

_AGAIN = """
UPDATE job SET due_at = column3, leased_until = NULL, ended = attempt FROM (VALUES {rows})
WHERE row = (SELECT row FROM batch WHERE id = column1) AND attempt = column2 AND ended < attempt
RETURNING line, due_at"""

_RECORD = """
INSERT INTO outcome (row, attempt, states, times_ms, details, buried_id, buried_app)
SELECT row, column2, column3, column4, column5,
    CASE WHEN column6 THEN column1 END, CASE WHEN column6 THEN (SELECT app FROM batch WHERE id = column1) END
FROM (VALUES {rows}) CROSS JOIN job ON row = (SELECT row FROM batch WHERE id = column1)
WHERE attempt <= column2
ON CONFLICT (row) DO UPDATE SET attempt = excluded.attempt, states = excluded.states, times_ms = excluded.times_ms,
    details = excluded.details, buried_id = excluded.buried_id, buried_app = excluded.buried_app
RETURNING (SELECT id FROM batch WHERE batch.row = outcome.row)"""

_REMOVE = """
INSERT INTO removal (app, environment, token, since, recorded_at) VALUES {rows}
ON CONFLICT (app, environment, token) DO UPDATE SET since = excluded.since, recorded_at = excluded.recorded_at
WHERE excluded.since > removal.since"""

_QUARANTINE = """
INSERT INTO quarantine (app, environment, token, until) VALUES {rows}
ON CONFLICT (app, environment, token) DO UPDATE SET until = excluded.until WHERE excluded.until > quarantine.until"""

# As `_octets` does: what is no hex is kept as it is.
_HELD = """
SELECT value, CASE
    WHEN EXISTS (
        SELECT 1 FROM removal WHERE app = ?2 AND environment = ?3 AND token = coalesce(unhex(value), value))
    THEN 'Unregistered'
    WHEN EXISTS (
        SELECT 1 FROM quarantine
        WHERE app = ?2 AND environment = ?3 AND token = coalesce(unhex(value), value) AND until > ?4)
    THEN 'BadDeviceToken' END AS word
FROM carray(?1) WHERE word IS NOT NULL"""

_COUNT_HELD = "SELECT count(*) FROM removal UNION ALL SELECT count(*) FROM quarantine"

_ALL_HELD = tuple(
    f"""
SELECT app, environment, token FROM {table} WHERE (app, environment, token) > (?, ?, ?)
ORDER BY app, environment, token LIMIT 5000"""  # noqa: S608 - two literals
    for table in ("removal", "quarantine")
)

_RECEIPTS = """
SELECT id, app, created_at, size, states, times_ms, details
FROM carray(?) AS wanted CROSS JOIN batch ON batch.id = wanted.value LEFT JOIN outcome USING (row)"""

_BURIED = """
SELECT id, app, created_at, size, states, times_ms, details FROM outcome INDEXED BY outcome_buried
CROSS JOIN batch USING (row) WHERE buried_id IS NOT NULL AND buried_id <= ? ORDER BY buried_id DESC"""

_BURIED_OF_APP = """
SELECT id, app, created_at, size, states, times_ms, details FROM outcome INDEXED BY outcome_buried_app
CROSS JOIN batch USING (row)
WHERE buried_app = ? AND buried_id IS NOT NULL AND buried_id <= ? ORDER BY buried_id DESC"""

_REPLAYABLE = f"""
SELECT row, id, created_at, batch.size, coalesce(job.attempt, outcome.attempt) + 1, states, times_ms, details,
    2 * number + (batch.size > {SMALL}), job.row IS NULL
FROM carray(?) AS wanted CROSS JOIN batch ON id = wanted.value CROSS JOIN lane USING (app, environment)
CROSS JOIN outcome USING (row) LEFT JOIN job USING (row)
WHERE buried_id IS NOT NULL AND (leased_until IS NULL OR leased_until <= ?)"""  # noqa: S608 - an integer of ours

_REPLAY = """
INSERT INTO job (row, line, size, attempt, ended, due_at) VALUES {rows} ON CONFLICT (row) DO UPDATE
SET attempt = excluded.attempt, ended = excluded.ended, due_at = excluded.due_at, leased_until = NULL"""

# A UUIDv7 begins with its milliseconds (RFC 9562, section 5.7): ids are in the order of time.
_OLD = """
SELECT id, row, EXISTS (SELECT 1 FROM job WHERE job.row = batch.row) FROM batch
WHERE id > ? AND id < ? ORDER BY id LIMIT 16"""

_LAPSED = (
    """
DELETE FROM removal WHERE (app, environment, token) IN (
    SELECT app, environment, token FROM removal INDEXED BY removal_recorded WHERE recorded_at <= ? LIMIT 64)""",
    """
DELETE FROM quarantine WHERE (app, environment, token) IN (
    SELECT app, environment, token FROM quarantine INDEXED BY quarantine_until WHERE until <= ? LIMIT 64)""",
)

_CANONICAL = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LAST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"


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
        self._lease_s = lease_s
        self._max_waiting = max_waiting
        self._takers = _Takers()
        # The writer's thread alone has to do with these. None: to be read from the file.
        self._turns: Turns | None = None
        self._lanes: dict[tuple[str, str], int] = {}
        self._stirred: set[int] = set()
        """Lanes that something was added to since the takers were last woken."""
        self._lent: deque[tuple[float, array[int]]] = deque()
        """When the leases of each take run out, and their rows; ended ones too, until their time comes."""
        self._called_in = 0
        """How many of `lent`, from the left, the transaction under way has dealt with."""
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
                self._reader.pragma("query_only", value=True)
            except (apsw.Error, OSError) as error:
                raise store_error(path, error) from error
            self._opened = undo.pop_all()
        self._readers = ThreadPoolExecutor(1, "heliograph-sqlite-reader")
        self._writer = Writer(writer, path, waiting, wake=self._wake, forget=self._forget)

    @property
    def commits(self) -> int:
        """Transactions that changed something, since the opening."""
        return self._writer.commits

    @property
    def waiting(self) -> int:
        """Notifications in batches that are not finished."""
        return self._writer.waiting

    @property
    def room(self) -> int:
        """How many more notifications `put` would take."""
        return max(0, self._max_waiting - self._writer.waiting)

    # Queue

    async def put(self, batches: Sequence[Batch], *, lease: bool = False) -> Sequence[Lease]:
        if not batches:
            return ()
        rows = [
            (_key(batch.id), batch.app, batch.environment.value, batch.created_at, len(batch), pack(batch))
            for batch in batches
        ]
        putting = self._writer.run(self._put, (rows, lease), unwanted=self._unlease)
        try:
            leased = await putting
        except asyncio.CancelledError:
            _reject(putting, self._unlease)
            raise
        if isinstance(leased, Overloaded):
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
                await self._takers.wait(seen, shut, wait_s)

    async def finish(self, ends: Sequence[LeaseEnd]) -> None:
        if not ends:
            return
        ahead = self._now() - self._clock()
        done = [(_key(end.batch_id), end.attempt) for end in ends if end.again_at is None]
        again = [(_key(end.batch_id), end.attempt, end.again_at + ahead) for end in ends if end.again_at is not None]
        await self._writer.run(self._finish, (done, again))

    # Store

    async def record(
        self, outcomes: Sequence[Outcomes], removals: Sequence[Removal], quarantines: Sequence[Quarantine] = ()
    ) -> Collection[str]:
        if not outcomes and not removals and not quarantines:
            return ()
        now = self._now()
        ahead = now - self._clock()
        known = [_outcome_row(each) for each in outcomes]
        dead = [(each.app, each.environment.value, _octets(each.token), each.since, now) for each in removals]
        held = [(each.app, each.environment.value, _octets(each.token), each.until + ahead) for each in quarantines]
        self._note_held([each.token.encode() for each in removals] + [each.token.encode() for each in quarantines])
        recorded = await self._writer.run(_record, (known, dead, held))
        return {each.batch_id for each, row in zip(outcomes, known, strict=True) if row[0] in recorded}

    async def find_receipts(self, ids: Sequence[str]) -> Sequence[Receipt | None]:
        receipts: list[Receipt | None] = [None] * len(ids)
        canonical = list(map(str.lower, ids))
        wanted: dict[str, list[int]] = {}
        for position, text in enumerate(canonical):
            if _CANONICAL.fullmatch(text):
                wanted.setdefault(text[:-4], []).append(position)
        if wanted:
            for row in await self._read(_RECEIPTS, apsw.carray(tuple(map(_key, wanted)))):
                details = _details(row[-1])
                for position in wanted[_text(row[0])]:
                    receipts[position] = receipt(canonical[position], row, details)
        return receipts

    async def held_among(self, app: str, environment: Environment, tokens: Collection[bytes]) -> dict[bytes, str]:
        if self._held is not None:
            tokens = self._held.among(tokens)
        elif self._reading_held is None:
            self._reading_held = asyncio.ensure_future(self._read_held())
        if not tokens:
            return {}
        return dict(await self._read(_HELD, apsw.carray(tuple(tokens)), app, environment.value, self._now()))

    async def find_buried(self, app: str | None, before: str | None, limit: int) -> Sequence[Receipt]:
        """By id, which begins with the time when it was made. Raises ValueError if `before` is no id."""
        canonical = _LAST_ID if before is None else before.lower()
        if not _CANONICAL.fullmatch(canonical):
            raise ValueError(f"{before!r} is no notification's id")
        key = _key(canonical[:-4])

        def find(reader: apsw.Connection) -> list[Receipt]:
            found: list[Receipt] = []
            rows = reader.execute(_BURIED, (key,)) if app is None else reader.execute(_BURIED_OF_APP, (app, key))
            with contextlib.closing(rows):  # it may not be read to its end
                for row in rows:
                    details = _details(row[-1])
                    buried = [index for index, state in enumerate(row[4]) if state == State.BURIED]
                    for name in (notification_id(_text(row[0]), index) for index in reversed(buried)):
                        if len(found) >= limit:
                            return found
                        if name < canonical and (known := receipt(name, row, details)):
                            found.append(known)
            return found

        return await self._with_reader(find)

    async def replay(self, ids: Sequence[str]) -> Sequence[str]:
        """Those of a batch that somebody has leased at the moment are left as they are: ask for them again.

        An older lease of the batch, though it ran out only, is told apart from now on: what it says is not recorded.
        """
        if not ids:
            return []
        return await self._writer.run(self._replay, ids)

    async def purge(self, before: float) -> int:
        """Delete finished batches made before `before` (UNIX seconds), and with them their receipts.

        Returns how many batches. Unfinished ones stay, whatever their age. Then removals that are older than
        `REMOVAL_LAPSES_S` and quarantines that ended.
        """
        purged = 0
        place: bytes | None = b""
        end = max(0, math.ceil(before * 1000)).to_bytes(6, "big")
        while place is not None:
            async with _in_steps():
                count, place = await self._writer.run(self._purge, (place, end))
            purged += count
        lapsed = True
        while lapsed:
            async with _in_steps():
                lapsed = await self._writer.run(self._lapse, None)
        return purged

    async def save_app(self, name: str, record: bytes) -> None:
        await self._writer.run(_save_apps, (name, record))

    async def find_apps(self) -> dict[str, bytes]:
        return dict(await self._read("SELECT name, record FROM app ORDER BY name"))

    async def delete_app(self, name: str) -> bool:
        return await self._writer.run(_delete_apps, name)

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

    async def _read(self, sql: str, *bindings: Any) -> list[Row]:
        return await self._with_reader(lambda reader: reader.execute(sql, bindings).fetchall())

    async def _with_reader(self, read: Callable[[apsw.Connection], T]) -> T:
        def read_here() -> T:
            try:
                return read(self._reader)
            except apsw.Error as error:
                raise store_error(self._path, error) from error

        if self._writer.closed:
            raise closed_error(self._path)
        return await asyncio.get_running_loop().run_in_executor(self._readers, read_here)

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
            count = sum(number for (number,) in await self._read(_COUNT_HELD))
            held = MaybeHeld(count + len(self._newly_held))
            for sql in _ALL_HELD:
                place: Row = ("", "", b"")
                while rows := await self._read(sql, *place):
                    held.add(octets.hex().encode() for _, _, octets in rows)
                    held.add(octets for _, _, octets in rows if octets.isascii())  # see `_octets`
                    place = rows[-1]
            held.add(self._newly_held)
            self._newly_held.clear()
            self._held = held
        except StoreError:  # whoever asks next tries again
            pass
        finally:
            self._reading_held = None

    async def _take(self, limit: int, full: Collection[Lane]) -> _Taken:
        taking = self._writer.run(self._lease, (limit, full), unwanted=self._untake)
        try:
            return await taking
        except asyncio.CancelledError:
            _reject(taking, self._untake)
            raise

    def _untake(self, taken: _Taken) -> None:
        """Nobody is there for what was taken."""
        if taken.rows:
            self._run_unattended(self._give_back, [(row[0], row[7]) for row in taken.rows])

    def _unlease(self, leased: Overloaded | Collection[bytes]) -> None:
        """Nobody is there for what was leased with a put."""
        if leased and not isinstance(leased, Overloaded):
            self._run_unattended(self._put_back, [(key,) for key in leased])

    def _readable(self, rows: Sequence[Row]) -> list[Lease]:
        """Leases of rows of `_LEASED`. What is damaged is buried here: it must not hold up the others."""
        leases = []
        for _, key, app, environment, created_at, size, body, attempt, recorded, states, times_ms, details in rows:
            name, known = _text(key), None
            try:
                if states is not None:
                    known = Outcomes(name, recorded, states, times_ms, decode_details(details))
                leases.append(Lease(unpack(name, app, Environment(environment), created_at, body), known, attempt))
            except StoreError:
                known = known or Outcomes(name, attempt, states or bytes(size), times_ms or bytes(4 * size))
                buried = bury(known, attempt, self._clock() - created_at)
                self._run_unattended(self._bury, (_outcome_row(buried), (key, attempt)))
        return leases

    def _run_unattended(self, work: Work[A, Any], argument: A) -> None:
        """Where this fails, the lease that it was to end runs out, or is void on the next opening."""
        with contextlib.suppress(StoreError):
            done = self._writer.run(work, argument)
            done.add_done_callback(lambda future: future.cancelled() or future.exception())

    def _end(self) -> None:
        self._readers.shutdown()
        self._writer.join()
        self._opened.close()

    # What the writer does, each for all calls of a group (see `group_commit.Work`)

    def _put(
        self, db: apsw.Connection, calls: Sequence[tuple[list[Row], bool]]
    ) -> list[Overloaded | Collection[bytes]]:
        """The keys of the batches that are leased to the caller, for each call."""
        answers: list[Overloaded | Collection[bytes]] = []
        to_wait: list[Row] = []
        to_lease: list[Row] = []
        waiting = self._writer.counted
        for rows, lease in calls:
            count = sum(row[4] for row in rows)
            if waiting + count > self._max_waiting:
                text = f"{waiting} notifications are waiting, {count} more would be above {self._max_waiting}"
                answers.append(Overloaded(text, retry_after_s=RETRY_AFTER_S))
                continue
            waiting += count
            (to_lease if lease else to_wait).extend(rows)
            answers.append({row[0] for row in rows} if lease else ())
        turns = self._read_turns(db)
        for lane in {(row[1], row[2]) for row in chain(to_wait, to_lease)} - self._lanes.keys():
            self._lanes[lane] = db.execute(
                "INSERT INTO lane (app, environment) VALUES (?, ?) RETURNING number", lane
            ).get
        now = self._now()
        added = self._add(db, to_wait, (now, 0, None))
        self._stir(turns, {line: now for _, line, _, _ in added}.items())
        ends_at = now + self._lease_s
        lent = self._add(db, to_lease, (now, 1, ends_at))
        if lent:
            self._lent.append((ends_at, array("q", [row for row, _, _, _ in lent])))
        if len(lent) < len(to_lease):  # some were known before
            new = {key for _, _, _, key in lent}
            answers = [each if isinstance(each, Overloaded) else new.intersection(each) for each in answers]
        self._writer.counted += sum(size for _, _, size, _ in chain(added, lent))
        return answers

    def _add(self, db: apsw.Connection, rows: Sequence[Row], job: Row) -> list[Row]:
        """New batches and their jobs, which have due_at, attempt and leased_until in common: row, line, size, key."""
        if not rows:
            return []
        last = db.execute("SELECT coalesce(max(row), 0) FROM batch").get
        _write_rows(db, _PUT, rows)
        db.execute(_PUT_JOBS, (*job, last))
        new: list[Row] = db.execute(_NEW, (last,)).fetchall()
        return new

    def _lease(self, db: apsw.Connection, calls: Sequence[tuple[int, Collection[Lane]]]) -> list[_Taken]:
        now = self._now()
        turns = self._read_turns(db)
        if self._lent and self._lent[0][0] <= now:
            late = [rows for _, rows in takewhile(lambda lent: lent[0] <= now, self._lent)]
            self._called_in = len(late)
            self._stir(turns, db.execute(_RUN_OUT, (apsw.carray(array("q", chain(*late))), now)).fetchall())
        answers = []
        for limit, full in calls:
            shut = frozenset(self._lanes[lane] for lane in full if lane in self._lanes)
            rows: list[int] = []
            while not rows and (lines := turns.choose(now, limit, shut)):
                looked = min(limit + 1, max(1, 2 * limit // len(lines)))
                found: list[Any] = db.execute(_DUE, (apsw.carray(array("q", lines)), looked)).fetchall()
                rows = [row for _, row, _ in turns.share(lines, found, looked, now, limit)]
            if rows:
                wanted = array("q", rows)
                ends_at = now + self._lease_s
                db.execute(_LEASE, (ends_at, apsw.carray(wanted)))
                self._lent.append((ends_at, wanted))
                answers.append(_Taken(db.execute(_LEASED, (apsw.carray(wanted),)).fetchall(), shut, 0.0))
            else:
                next_end = self._lent[self._called_in][0] if len(self._lent) > self._called_in else math.inf
                answers.append(_Taken([], shut, min(turns.next_due(shut), next_end) - now))
        return answers

    def _give_back(self, db: apsw.Connection, calls: Sequence[list[Row]]) -> list[None]:
        self._stir(self._read_turns(db), _write_rows(db, _GIVE_BACK, list(chain.from_iterable(calls))))
        return [None] * len(calls)

    def _put_back(self, db: apsw.Connection, calls: Sequence[list[Row]]) -> list[None]:
        self._stir(self._read_turns(db), _write_rows(db, _PUT_BACK, list(chain.from_iterable(calls))))
        return [None] * len(calls)

    def _finish(self, db: apsw.Connection, calls: Sequence[tuple[list[Row], list[Row]]]) -> list[None]:
        ended = _write_rows(db, _DONE, [row for done, _ in calls for row in done])
        self._writer.counted -= sum(size for (size,) in ended)
        self._stir(self._read_turns(db), _write_rows(db, _AGAIN, [row for _, again in calls for row in again]))
        return [None] * len(calls)

    def _bury(self, db: apsw.Connection, calls: Sequence[tuple[Row, Row]]) -> list[None]:
        _write_rows(db, _RECORD, [known for known, _ in calls])
        return self._finish(db, [([end], []) for _, end in calls])

    def _replay(self, db: apsw.Connection, calls: Sequence[Sequence[str]]) -> list[list[str]]:
        return [self._replay_these(db, ids) for ids in calls]

    def _replay_these(self, db: apsw.Connection, ids: Sequence[str]) -> list[str]:
        now, wall = self._now(), self._clock()
        turns = self._read_turns(db)
        wanted: dict[bytes, dict[int, str]] = {}
        for each in ids:
            if place := parse_id(each):
                wanted.setdefault(_key(place[0]), {}).setdefault(place[1], each)
        jobs: list[Row] = []
        known: list[Row] = []
        replayed: list[str] = []
        found: list[Row] = db.execute(_REPLAYABLE, (apsw.carray(tuple(wanted)), now)).fetchall() if wanted else []
        for row, key, created_at, size, attempt, states, times_ms, stored, line, finished in found:
            try:
                before = Outcomes(_text(key), attempt, states, times_ms, decode_details(stored))
            except StoreError:
                continue  # damaged
            after, again = exhume(before, wanted[key].keys(), wall, wall - created_at)
            if again:
                # As though the attempt had been leased and ended: what former holders say is not recorded.
                jobs.append((row, line, size, attempt, attempt, now))
                known.append(_outcome_row(after))
                replayed += [wanted[key][index] for index in again]
                self._writer.counted += size if finished else 0
        _write_rows(db, _REPLAY, jobs)
        _write_rows(db, _RECORD, known)
        self._stir(turns, ((job[1], now) for job in jobs))
        return replayed

    def _purge(self, db: apsw.Connection, calls: Sequence[tuple[bytes, bytes]]) -> list[tuple[int, bytes | None]]:
        """Delete finished batches between two ids, for one step: how many, and where the next one begins, if any."""
        answers: list[tuple[int, bytes | None]] = []
        for last, end in calls:
            count, ends_at = 0, time.monotonic() + _STEP_S / len(calls)
            place: bytes | None = last
            while time.monotonic() < ends_at:
                old: list[Row] = db.execute(_OLD, (place, end)).fetchall()
                if not old:
                    place = None
                    break
                place = old[-1][0]
                rows = array("q", [row for _, row, waits in old if not waits])
                if rows:
                    db.execute("DELETE FROM outcome WHERE row IN carray(?)", (apsw.carray(rows),))
                    db.execute("DELETE FROM batch WHERE row IN carray(?)", (apsw.carray(rows),))
                    count += len(rows)
            answers.append((count, place))
        return answers

    def _lapse(self, db: apsw.Connection, calls: Sequence[None]) -> list[bool]:
        """Delete removals and quarantines that lapsed, for one step; whether there may be more."""
        now = self._now()
        ends_at = time.monotonic() + _STEP_S
        for sql, until in zip(_LAPSED, (now - REMOVAL_LAPSES_S, now), strict=True):
            while True:
                db.execute(sql, (until,))
                if not db.changes():
                    break
                if time.monotonic() >= ends_at:
                    return [True] * len(calls)
        return [False] * len(calls)

    def _stir(self, turns: Turns, added: Iterable[Sequence[Any]]) -> None:
        """Something was added to these lines, due at these times."""
        for line, at in added:
            turns.add(line, at)
            self._stirred.add(line >> 1)

    def _read_turns(self, db: apsw.Connection) -> Turns:
        """As the transaction under way sees it."""
        if self._turns is None:
            self._lanes = {(app, lane): number for number, app, lane in db.execute("SELECT * FROM lane")}
            found: list[Any] = db.execute(_LINES).fetchall()
            self._turns = Turns(dict(found))
        return self._turns

    def _forget(self) -> None:
        """A transaction was rolled back. What `lent` has too much does no harm."""
        self._turns = None
        self._called_in = 0

    def _wake(self) -> None:
        """A group is done with."""
        while self._called_in:
            self._lent.popleft()
            self._called_in -= 1
        if self._stirred:
            stirred, self._stirred = self._stirred, set()
            self._takers.wake(stirred)


def _reject(asked: asyncio.Future[T], unwanted: Callable[[T], None]) -> None:
    """The caller was cancelled: if the answer is there already, nobody else will tell that it is not wanted."""
    if not asked.cancelled() and asked.exception() is None:
        unwanted(asked.result())


@contextlib.asynccontextmanager
async def _in_steps() -> AsyncIterator[None]:
    """Around a step of what keeps the writer busy for long: let others through before the next."""
    started_at = time.monotonic()
    yield
    await asyncio.sleep(_PAUSE_STEPS * min(time.monotonic() - started_at, _STEP_S))
    crash.point("purge")


def _record(db: apsw.Connection, calls: Sequence[tuple[list[Row], list[Row], list[Row]]]) -> list[Collection[bytes]]:
    """The keys of the batches that were recorded, for each call."""
    recorded: list[Collection[bytes]] = []
    for known, _, _ in calls:
        recorded.append({key for (key,) in _write_rows(db, _RECORD, known)})
    _write_rows(db, _REMOVE, [row for _, dead, _ in calls for row in dead])
    _write_rows(db, _QUARANTINE, [row for _, _, held in calls for row in held])
    return recorded


def _save_apps(db: apsw.Connection, calls: Sequence[Row]) -> list[None]:
    sql = "INSERT INTO app VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET record = excluded.record"
    db.executemany(sql, calls)
    return [None] * len(calls)


def _delete_apps(db: apsw.Connection, calls: Sequence[str]) -> list[bool]:
    answers = []
    for name in calls:
        db.execute("DELETE FROM app WHERE name = ?", (name,))
        answers.append(db.changes() > 0)
    return answers


def _write_rows(db: apsw.Connection, sql: str, rows: Sequence[Row]) -> list[Row]:
    """Run `sql` for `rows`, which stand where it says `{rows}`; what it returns."""
    returned: list[Row] = []
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        marks = ",".join([f"({','.join('?' * len(some[0]))})"] * len(some))
        returned += db.execute(sql.format(rows=marks), tuple(chain.from_iterable(some))).fetchall()
    return returned


class _Taken(NamedTuple):
    """What a take found: rows of `_LEASED`, leased now; or none."""

    rows: list[Row]
    shut: frozenset[int]
    """The lanes that are full, as numbers."""
    wait_s: float
    """Seconds until there may be something."""


class _Takers:
    """Calls of `take` that found nothing due, on any event loop."""

    def __init__(self) -> None:
        self.changes = 0
        self._waiters: dict[asyncio.Future[None], Collection[int]] = {}
        self._gate = threading.Lock()  # the writer's thread wakes, the loops' threads wait

    def wake(self, lanes: Collection[int] | None) -> None:
        """Something was added to these lanes; None: wake all."""
        with self._gate:
            self.changes += 1
            waiters = [
                waiter
                for waiter, shut in self._waiters.items()
                if lanes is None or any(each not in shut for each in lanes)
            ]
            for waiter in waiters:
                del self._waiters[waiter]
        for waiter in waiters:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                waiter.get_loop().call_soon_threadsafe(_ring, waiter)

    async def wait(self, seen: int, shut: Collection[int], seconds: float) -> None:
        """Return after `seconds`, when something is added to a lane not `shut`, or if `changes` is no longer `seen`."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        with self._gate:
            if self.changes != seen:
                return
            self._waiters[waiter] = shut
        # A loop's timer may ring early by the loop's resolution: a millisecond keeps that from becoming a spin.
        timer = loop.call_later(max(seconds, 0.001), _ring, waiter) if seconds < math.inf else None
        try:
            await waiter
        finally:
            if timer is not None:
                timer.cancel()
            with self._gate:
                self._waiters.pop(waiter, None)


def _ring(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _key(id: str) -> bytes:
    """The 16 octets of the batch with this id, which lacks its last four digits (see `Batch.id`)."""
    key = bytes.fromhex(id.replace("-", "") + "0000")
    if len(key) != 16:
        raise ValueError("a batch's id is a UUID without its last four digits")
    return key


def _text(key: bytes) -> str:
    digits = key.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:28]}"


def _outcome_row(known: Outcomes) -> Row:
    buried = State.BURIED in known.states
    details = encode_details(known.details)
    return _key(known.batch_id), known.attempt, known.states, known.times_ms, details, buried


def _details(stored: bytes | None) -> dict[int, Detail]:
    """By index. Where they are damaged the states still count, and no other batch's reader may suffer."""
    try:
        return {detail.index: detail for detail in decode_details(stored)}
    except StoreError:
        return {}


def _octets(token: str) -> bytes:
    digits = token.encode()
    try:
        return binascii.unhexlify(digits)
    except binascii.Error:
        return digits
