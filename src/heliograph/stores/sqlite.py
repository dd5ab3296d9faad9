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
import fcntl
import hashlib
import math
import os
import re
import threading
import time
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import apsw
import msgspec

from heliograph.errors import Overloaded, StoreBusy, StoreError
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

A = TypeVar("A")
Row = tuple[Any, ...]

RETRY_AFTER_S = 5.0
"""What Overloaded tells callers to wait: long enough for several hundred thousand to leave."""

PURGE_SLICE = 50
"""Batches deleted in one transaction; some milliseconds of the writer's time, so that nobody waits long behind it."""

UNREADABLE = "Unreadable"
"""The reason in the receipts of a batch that is damaged in the store."""

# A full batch takes 10 such pages and not 37 of SQLite's own 4096: 40 % less CPU to store it, 20 % more for a lone one.
_PAGE_OCTETS = 16384
_CHECKPOINT_PAGES = 512  # 8 MB: larger ones save next to nothing and stall the writer for longer.

_ROWS = 64
"""Rows in one statement. Each call of SQLite gives up the interpreter's lock, and a busy event loop may then keep it
for a switch interval: a thousand calls for a thousand rows took seconds. One for 64 rows also costs half the CPU."""

_PUT = """
INSERT INTO batch (id, app, environment, created_at, size, body) VALUES {rows} ON CONFLICT (id) DO NOTHING"""

_PUT_JOBS = "INSERT INTO job (row, size, due_at) SELECT row, size, ? FROM batch WHERE row > ?"

# Leases that ran out are few; they are sorted in among what is due. CROSS JOIN fixes the order of the loops.
_DUE = """
SELECT row, id, app, environment, created_at, size, body, attempt + 1, recorded, states, times_ms, details
FROM (
    SELECT row, due_at, attempt FROM (
        SELECT * FROM (
            SELECT row, due_at, attempt FROM job INDEXED BY job_due
            WHERE due_at <= ?1 AND leased_until IS NULL ORDER BY due_at, row LIMIT ?2)
        UNION ALL
        SELECT * FROM (
            SELECT row, due_at, attempt FROM job INDEXED BY job_leased
            WHERE leased_until <= ?1 ORDER BY leased_until LIMIT ?2))
    ORDER BY due_at, row LIMIT ?2) AS ready
CROSS JOIN batch USING (row)
LEFT JOIN (SELECT row, attempt AS recorded, states, times_ms, details FROM outcome) USING (row)
ORDER BY due_at, row"""

_NEXT_DUE = """
SELECT min(at) FROM (
    SELECT min(due_at) AS at FROM job WHERE due_at IS NOT NULL AND leased_until IS NULL
    UNION ALL SELECT min(leased_until) FROM job WHERE leased_until IS NOT NULL)"""

_LEASE = "UPDATE job SET attempt = attempt + 1, leased_until = ? WHERE row IN carray(?)"

_GIVE_BACK = "UPDATE job SET attempt = attempt - 1, leased_until = NULL WHERE row = ? AND attempt = ?"

# The plus keeps the planner from walking through all leases for each end.
_FINISH = """
UPDATE job SET due_at = column3, leased_until = NULL FROM (VALUES {rows})
WHERE row = (SELECT row FROM batch WHERE id = column1) AND attempt = column2 AND +leased_until IS NOT NULL
RETURNING CASE WHEN due_at IS NULL THEN size ELSE 0 END"""

_RECORD = """
INSERT INTO outcome (row, attempt, states, times_ms, details)
SELECT row, column2, column3, column4, column5
FROM (VALUES {rows}) CROSS JOIN job ON row = (SELECT row FROM batch WHERE id = column1)
WHERE attempt <= column2
ON CONFLICT (row) DO UPDATE SET attempt = excluded.attempt, states = excluded.states,
    times_ms = excluded.times_ms, details = excluded.details"""

_REMOVE = """
INSERT INTO removal (app, environment, token, since) VALUES {rows}
ON CONFLICT (app, environment, token) DO UPDATE SET since = excluded.since WHERE excluded.since > removal.since"""

# As `_octets` does: what is no hex is kept as it is.
_REMOVED = """
SELECT value FROM carray(?) WHERE EXISTS (
    SELECT 1 FROM removal WHERE app = ? AND environment = ? AND token = coalesce(unhex(value), value))"""

_RECEIPTS = """
SELECT id, app, created_at, size, states, times_ms, details
FROM carray(?) AS wanted CROSS JOIN batch ON batch.id = wanted.value LEFT JOIN outcome USING (row)"""

_FINISHED = """
SELECT id, row FROM batch CROSS JOIN job USING (row)
WHERE id > ? AND id < ? AND due_at IS NULL ORDER BY id LIMIT ?"""

_CANONICAL = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_encode_details = msgspec.msgpack.Encoder().encode
_decode_details = msgspec.msgpack.Decoder(tuple[Detail, ...]).decode


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
        with contextlib.ExitStack() as undo:
            try:
                _make_directory(path.parent)
                undo.enter_context(_locked(path))
                # SQLite gives its other files the mode of this one. Later on nothing in this process may open and close
                # the file beside SQLite: that would drop its locks (POSIX, fcntl).
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                writer = undo.enter_context(contextlib.closing(_connect(path)))
                waiting = _prepare(writer, path, self._now())
                self._reader = undo.enter_context(contextlib.closing(_connect(path)))
                self._reader.pragma("query_only", value=True)
            except (apsw.Error, OSError) as error:
                raise store_error(path, error) from error
            self._opened = undo.pop_all()
        self._readers = ThreadPoolExecutor(1, "heliograph-sqlite-reader")
        self._writer = Writer(writer, path, waiting, self._takers.wake)

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

    async def put(self, batches: Sequence[Batch]) -> None:
        if not batches:
            return
        rows = [
            (_key(batch.id), batch.app, batch.environment.value, batch.created_at, len(batch), pack(batch))
            for batch in batches
        ]
        refusal = await self._writer.run(self._put, rows, wakes=True)
        if refusal is not None:
            raise refusal

    async def take(self, limit: int, full: Collection[Lane] = ()) -> Sequence[Lease]:  # noqa: ARG002
        if limit < 1:
            raise ValueError(f"take at least one batch, not {limit}")
        while True:
            seen = self._takers.changes
            rows, wait_s = await self._take(limit)
            if leases := self._readable(rows):
                return leases
            if not rows:
                await self._takers.wait(seen, wait_s)

    async def finish(self, ends: Sequence[LeaseEnd]) -> None:
        if not ends:
            return
        ahead = self._now() - self._clock()
        rows = [
            (_key(end.batch_id), end.attempt, None if end.again_at is None else end.again_at + ahead) for end in ends
        ]
        await self._writer.run(self._finish, rows, wakes=any(end.again_at is not None for end in ends))

    # Store

    async def record(
        self,
        outcomes: Sequence[Outcomes],
        removals: Sequence[Removal],
        quarantines: Sequence[Quarantine] = (),  # noqa: ARG002
    ) -> None:
        if not outcomes and not removals:
            return
        known = [_outcome_row(each) for each in outcomes]
        dead = [(each.app, each.environment.value, _octets(each.token), each.since) for each in removals]
        await self._writer.run(_record, (known, dead))

    async def find_receipts(self, ids: Sequence[str]) -> Sequence[Receipt | None]:
        receipts: list[Receipt | None] = [None] * len(ids)
        canonical = list(map(str.lower, ids))
        wanted: dict[str, list[int]] = {}
        for position, text in enumerate(canonical):
            if _CANONICAL.fullmatch(text):
                wanted.setdefault(text[:-4], []).append(position)
        if wanted:
            for row in await self._read(_RECEIPTS, apsw.carray(tuple(map(_key, wanted)))):
                details = {detail.index: detail for detail in _details(row[-1])}
                for position in wanted[_text(row[0])]:
                    receipts[position] = _receipt(canonical[position], row, details)
        return receipts

    async def held_among(self, app: str, environment: Environment, tokens: Collection[bytes]) -> dict[bytes, str]:
        if not tokens:
            return {}
        return {
            token: "Unregistered"
            for (token,) in await self._read(_REMOVED, apsw.carray(tuple(tokens)), app, environment.value)
        }

    async def purge(self, before: float) -> int:
        """Delete finished batches made before `before` (UNIX seconds), and with them their receipts.

        Returns how many batches. Unfinished ones stay, whatever their age.
        """
        # A UUIDv7 begins with its milliseconds (RFC 9562, section 5.7): ids are in the order of time.
        last, end = b"", max(0, math.ceil(before * 1000)).to_bytes(6, "big")
        count = 0
        while finished := await self._read(_FINISHED, last, end, PURGE_SLICE):
            last = finished[-1][0]
            await self._writer.run(_delete, [row for _, row in finished])
            count += len(finished)
        return count

    async def find_buried(self, app: str | None, before: str | None, limit: int) -> Sequence[Receipt]:
        raise NotImplementedError

    async def replay(self, ids: Sequence[str]) -> Sequence[str]:
        raise NotImplementedError

    async def save_app(self, name: str, record: bytes) -> None:
        raise NotImplementedError

    async def find_apps(self) -> dict[str, bytes]:
        raise NotImplementedError

    async def delete_app(self, name: str) -> bool:
        raise NotImplementedError

    async def aclose(self) -> None:
        """Do what was asked for, refuse what comes now, fold the log into the file, release the lock.

        Calls of `take` that wait end with StoreError.
        """
        self._writer.close()
        self._takers.wake()
        await asyncio.to_thread(self._end)

    # Below the ports

    def _now(self) -> float:
        """UNIX seconds as on opening, counted on from there by the monotonic clock."""
        return self._opened_at + self._monotonic()

    async def _read(self, sql: str, *bindings: Any) -> list[Row]:
        def read() -> list[Row]:
            try:
                return self._reader.execute(sql, bindings).fetchall()
            except apsw.Error as error:
                raise store_error(self._path, error) from error

        if self._writer.closed:
            raise closed_error(self._path)
        return await asyncio.get_running_loop().run_in_executor(self._readers, read)

    async def _take(self, limit: int) -> tuple[list[Row], float]:
        """Rows of `_DUE`, leased now; or none, and the seconds until there will be one."""

        def give_back(leased: asyncio.Future[tuple[list[Row], float]]) -> None:
            if not leased.cancelled() and leased.exception() is None:
                self._run_unattended(_give_back, [(row[0], row[7]) for row in leased.result()[0]], wakes=True)

        leasing = self._writer.run(self._lease, limit)
        try:
            return await asyncio.shield(leasing)
        except asyncio.CancelledError:
            leasing.add_done_callback(give_back)
            raise

    def _readable(self, rows: Sequence[Row]) -> list[Lease]:
        """Leases of rows of `_DUE`. What is damaged is buried here: it must not hold up the others."""
        leases = []
        for _, key, app, environment, created_at, size, body, attempt, recorded, states, times_ms, details in rows:
            name, known = _text(key), None
            try:
                if states is not None:
                    known = Outcomes(name, recorded, states, times_ms, _details(details))
                leases.append(Lease(unpack(name, app, Environment(environment), created_at, body), known, attempt))
            except StoreError:
                known = known or Outcomes(name, attempt, states or bytes(size), times_ms or bytes(4 * size))
                buried = _buried(known, attempt, self._clock() - created_at)
                self._run_unattended(_record, ([_outcome_row(buried)], []))
                self._run_unattended(self._finish, [(key, attempt, None)])
        return leases

    def _run_unattended(self, work: Work[A, Any], argument: A, *, wakes: bool = False) -> None:
        """Where this fails, the lease that it was to end runs out, or is void on the next opening."""
        with contextlib.suppress(StoreError):
            done = self._writer.run(work, argument, wakes=wakes)
            done.add_done_callback(lambda future: future.cancelled() or future.exception())

    def _end(self) -> None:
        self._readers.shutdown()
        self._writer.join()
        self._opened.close()

    # What the writer does, each for all calls of a group (see `group_commit.Work`)

    def _put(self, db: apsw.Connection, calls: Sequence[list[Row]]) -> list[Overloaded | None]:
        answers: list[Overloaded | None] = []
        rows: list[Row] = []
        waiting = self._writer.counted
        for call in calls:
            count = sum(row[4] for row in call)
            if waiting + count <= self._max_waiting:
                waiting += count
                rows += call
                answers.append(None)
            else:
                text = f"{waiting} notifications are waiting, {count} more would be above {self._max_waiting}"
                answers.append(Overloaded(text, retry_after_s=RETRY_AFTER_S))
        last = db.execute("SELECT coalesce(max(row), 0) FROM batch").get
        _write_rows(db, _PUT, rows)
        db.execute(_PUT_JOBS, (self._now(), last))
        self._writer.counted += db.execute("SELECT coalesce(sum(size), 0) FROM job WHERE row > ?", (last,)).get
        return answers

    def _lease(self, db: apsw.Connection, calls: Sequence[int]) -> list[tuple[list[Row], float]]:
        now = self._now()
        answers = []
        for limit in calls:
            rows: list[Row] = db.execute(_DUE, (now, limit)).fetchall()
            wait_s = 0.0
            if rows:
                db.execute(_LEASE, (now + self._lease_s, apsw.carray(array("q", [row[0] for row in rows]))))
            else:
                at = db.execute(_NEXT_DUE).get
                wait_s = math.inf if at is None else at - now
            answers.append((rows, wait_s))
        return answers

    def _finish(self, db: apsw.Connection, calls: Sequence[list[Row]]) -> list[None]:
        ended = _write_rows(db, _FINISH, list(chain.from_iterable(calls)))
        self._writer.counted -= sum(size for (size,) in ended)
        return [None] * len(calls)


def _record(db: apsw.Connection, calls: Sequence[tuple[list[Row], list[Row]]]) -> list[None]:
    _write_rows(db, _RECORD, [row for known, _ in calls for row in known])
    _write_rows(db, _REMOVE, [row for _, dead in calls for row in dead])
    return [None] * len(calls)


def _give_back(db: apsw.Connection, calls: Sequence[list[Row]]) -> list[None]:
    db.executemany(_GIVE_BACK, chain.from_iterable(calls))
    return [None] * len(calls)


def _delete(db: apsw.Connection, calls: Sequence[list[int]]) -> list[None]:
    rows = array("q", chain.from_iterable(calls))
    for table in ("outcome", "job", "batch"):
        db.execute(f"DELETE FROM {table} WHERE row IN carray(?)", (apsw.carray(rows),))  # noqa: S608 - three literals
    return [None] * len(calls)


def _write_rows(db: apsw.Connection, sql: str, rows: Sequence[Row]) -> list[Row]:
    """Run `sql` for `rows`, which stand where it says `{rows}`; what it returns."""
    returned: list[Row] = []
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        marks = ",".join([f"({','.join('?' * len(some[0]))})"] * len(some))
        returned += db.execute(sql.format(rows=marks), tuple(chain.from_iterable(some))).fetchall()
    return returned


class _Takers:
    """Calls of `take` that found nothing due, on any event loop."""

    def __init__(self) -> None:
        self.changes = 0
        self._waiters: set[asyncio.Future[None]] = set()
        self._gate = threading.Lock()  # the writer's thread wakes, the loops' threads wait

    def wake(self) -> None:
        with self._gate:
            self.changes += 1
            waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                waiter.get_loop().call_soon_threadsafe(_ring, waiter)

    async def wait(self, seen: int, seconds: float) -> None:
        """Return after `seconds`, or as soon as `changes` is no longer `seen`."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        with self._gate:
            if self.changes != seen:
                return
            self._waiters.add(waiter)
        # A loop's timer may ring early by the loop's resolution: a millisecond keeps that from becoming a spin.
        timer = loop.call_later(max(seconds, 0.001), _ring, waiter) if seconds < math.inf else None
        try:
            await waiter
        finally:
            if timer is not None:
                timer.cancel()
            with self._gate:
                self._waiters.discard(waiter)


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
    details = _encode_details(known.details) if known.details else None
    return _key(known.batch_id), known.attempt, known.states, known.times_ms, details


def _octets(token: str) -> bytes:
    digits = token.encode()
    try:
        return binascii.unhexlify(digits)
    except binascii.Error:
        return digits


def _details(stored: bytes | None) -> tuple[Detail, ...]:
    try:
        return _decode_details(stored) if stored else ()
    except msgspec.DecodeError as error:
        raise StoreError(f"Stored outcomes cannot be read: {error}") from error


def _receipt(id: str, row: Row, details: dict[int, Detail]) -> Receipt | None:
    """The receipt of `id` from its batch's row of `_RECEIPTS`; None where the batch has no such place."""
    _, app, created_at, size, states, times_ms, _ = row
    index = int(id[-4:], 16) - 1
    if not 0 <= index < size:
        return None
    state = State.QUEUED if states is None else State(states[index])
    detail = details.get(index)
    if detail is None and state is State.QUEUED:
        return Receipt(id, app, state, created_at)
    updated_at = created_at + int.from_bytes(times_ms[4 * index : 4 * index + 4], "big") / 1000
    if detail is None:
        return Receipt(id, app, state, created_at, updated_at, attempts=1 if state is State.ACCEPTED else 0)
    return Receipt(
        id,
        app,
        state,
        created_at,
        updated_at,
        reason=detail.reason,
        why=detail.why,
        status=detail.status,
        since=detail.since,
        unique_id=detail.unique_id,
        attempts=detail.attempts,
        next_attempt_at=detail.due_at,
    )


def _buried(known: Outcomes, attempt: int, age_s: float) -> Outcomes:
    """`known` with all that was still queued given up on."""
    time_ms = min(max(round(age_s * 1000), 0), 2**32 - 1).to_bytes(4, "big")
    times_ms = bytearray(known.times_ms)
    details = {detail.index: detail for detail in known.details}
    for index, state in enumerate(known.states):
        if state == State.QUEUED:
            times_ms[4 * index : 4 * index + 4] = time_ms
            details[index] = Detail(index, reason=UNREADABLE, attempts=attempt)
    states = known.states.replace(bytes([State.QUEUED]), bytes([State.BURIED]))
    return Outcomes(known.batch_id, attempt, states, bytes(times_ms), tuple(details.values()))


# Opening


class Migration(NamedTuple):
    """One step of the schema, as the file that holds it."""

    number: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def _migrations() -> Iterator[Migration]:
    files = resources.files("heliograph.stores") / "schema" / "sqlite"
    for file in sorted(files.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".sql"):
            yield Migration(int(file.name[:4]), file.name, file.read_text("utf-8"))


def _migrate(db: apsw.Connection, path: Path, known: Sequence[Migration]) -> None:
    """Bring the schema up to date, wholly or not at all. The caller's transaction is around it."""
    db.execute(
        "CREATE TABLE IF NOT EXISTS migration "
        "(number INTEGER PRIMARY KEY, name TEXT NOT NULL, sha256 TEXT NOT NULL, applied_at REAL NOT NULL) STRICT"
    )
    recorded: list[Row] = db.execute("SELECT number, sha256 FROM migration").fetchall()
    applied: dict[int, str] = dict(recorded)
    newest = max(applied, default=0)
    if newest > known[-1].number:
        raise StoreError(
            f"{path} has schema {newest}, made by a newer heliograph; this one knows schemas up to {known[-1].number}. "
            "Start the newer version."
        )
    for migration in known:
        if migration.number not in applied:
            db.execute(migration.sql)
            db.execute(
                "INSERT INTO migration VALUES (?, ?, ?, ?)",
                (migration.number, migration.name, migration.sha256, time.time()),
            )
        elif applied[migration.number] != migration.sha256:
            raise StoreError(
                f"{path} was made with another {migration.name} than this version of heliograph has. "
                "Start the version that made it."
            )


def _prepare(db: apsw.Connection, path: Path, now: float) -> int:
    """Make the file ready for work; how many notifications wait in it."""
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if tables and "migration" not in tables:
        raise StoreError(f"{path} is another program's SQLite file. Give the store a path of its own.")
    if db.pragma("journal_mode", "wal") != "wal":
        raise StoreError(f"{path} is on a file system without shared memory. Put the store on a local disk.")
    with db:
        _migrate(db, path, tuple(_migrations()))
        db.execute("UPDATE job SET leased_until = NULL WHERE leased_until IS NOT NULL")
        # What was never tried was due when it came in, whatever the clock said then.
        db.execute(
            "UPDATE job SET due_at = ?1 WHERE due_at > ?1 AND leased_until IS NULL AND attempt = 0",
            (now,),
        )
    return int(db.execute("SELECT total(size) FROM job WHERE due_at IS NOT NULL AND leased_until IS NULL").get)


def _connect(path: Path) -> apsw.Connection:
    db = apsw.Connection(str(path))
    db.set_busy_timeout(5000)  # for a shell that looks into the file; of ours there is one writer only
    db.pragma("page_size", _PAGE_OCTETS)
    db.pragma("synchronous", "full")
    db.pragma("cache_size", -16384)
    db.pragma("wal_autocheckpoint", _CHECKPOINT_PAGES)
    db.pragma("journal_size_limit", 64 * 1024 * 1024)
    return db


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `<path>.lock`, with our pid in it. The kernel releases it however this process ends."""
    file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 32, 0).decode("ascii", "replace").strip()
            raise StoreBusy(
                f"{path} is in use by process {holder or 'unknown'}. Stop that first, or use a file of your own."
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(file)


def _make_directory(directory: Path) -> None:
    """Make what is missing of the path, for us alone, so that a power cut does not undo it."""
    if directory.exists():
        return
    _make_directory(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    parent = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
