"""The queue in the SQLite store's file: what waits, what is leased, and what the writer's thread keeps of it in memory.

A batch that is not finished has a row in the table `job`. What adds a job that nobody has leased, ends a lease or
changes when a job is due tells `Jobs._stir` its line and time; what changes how many notifications wait counts that in
`Writer.counted`. What changes no job is in `sqlite_records`, but for `Jobs.keep`: it adds batches that may be replayed,
and so have a lane.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from heliograph.batches import parse_id
from heliograph.errors import HeliographError, Overloaded, Repeated, StoreError
from heliograph.model import Lane, Once, Outcomes, State
from heliograph.stores import sqlite_records
from heliograph.stores.group_commit import Writer
from heliograph.stores.outcomes import call_off, decode_details, exhume
from heliograph.stores.sqlite_file import Row
from heliograph.stores.sqlite_records import record_outcomes
from heliograph.stores.sqlite_rows import id_of, key_of, outcome_row, write_rows
from heliograph.stores.takers import Takers
from heliograph.stores.turns import SMALL, Turns

RETRY_AFTER_S = 5.0
"""What Overloaded tells callers to wait: long enough for several hundred thousand to leave."""

_PUT = """
INSERT INTO batch (id, app, environment, created_at, size, body, connection) VALUES {rows}
ON CONFLICT (id) DO NOTHING"""

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

_REPLAYABLE = f"""
SELECT row, id, created_at, batch.size, coalesce(job.attempt, outcome.attempt) + 1, states, times_ms, details,
    coalesce(line, 2 * number + (batch.size > {SMALL})), job.row IS NULL
FROM carray(?) AS wanted CROSS JOIN batch ON id = wanted.value CROSS JOIN lane USING (app, environment)
CROSS JOIN outcome USING (row) LEFT JOIN job USING (row)
WHERE buried_id IS NOT NULL AND (leased_until IS NULL OR leased_until <= ?)"""  # noqa: S608 - an integer of ours

_RESTART = """
INSERT INTO job (row, line, size, attempt, ended, due_at) VALUES {rows} ON CONFLICT (row) DO UPDATE
SET attempt = excluded.attempt, ended = excluded.ended, due_at = excluded.due_at, leased_until = NULL"""

_CANCELLABLE = """
SELECT row, id, created_at, batch.size, job.attempt + 1, states, times_ms, details, line, due_at
FROM carray(?) AS wanted CROSS JOIN batch ON id = wanted.value CROSS JOIN job USING (row)
LEFT JOIN outcome USING (row) WHERE leased_until IS NULL OR leased_until <= ?"""

_OVER = "DELETE FROM job WHERE row IN carray(?)"


Put = Overloaded | Repeated | Collection[bytes]
"""The keys of batches that are leased as they are put; or why nothing was put."""


OwnIds = Mapping[bytes, Sequence[tuple[int, bytes]]]
"""Ids that callers brought: by their batches' keys, places in those and octets."""


class Kept(NamedTuple):
    """What is kept of batches that never wait."""

    rows: list[Row]
    """Of `batch_row`."""
    known: list[Row]
    """Of `outcome_row`, one for each of them."""
    own_ids: OwnIds
    dead: list[Row]
    """As `sqlite_records.hold_back` wants it, like the next."""
    held: list[Row]


class Taken(NamedTuple):
    """What a take found: rows of `_LEASED`, leased now; or none."""

    rows: list[Row]
    shut: frozenset[int]
    """The lanes that are full, as numbers."""
    wait_s: float
    """Seconds until there may be something."""


class Jobs:
    """Batches that are put, leased and finished, and the writer whose thread does that.

    Each method without an underscore is a `group_commit.Work`: for all calls of a group at once, on the writer's
    thread, which alone has to do with what is kept here.
    """

    def __init__(
        self,
        db: apsw.Connection,
        path: Path,
        waiting: int,
        takers: Takers,
        *,
        now: Callable[[], float],
        clock: Callable[[], float],
        lease_s: float,
        max_waiting: int,
    ) -> None:
        """`now` is the store's own clock, `clock` the machine's, `waiting` how many notifications wait in the file."""
        self._takers = takers
        self._now = now
        self._clock = clock
        self._lease_s = lease_s
        self._max_waiting = max_waiting
        self._turns: Turns | None = None
        """None: to be read from the file, and `lanes` with it."""
        self._lanes: dict[tuple[str, str], int] = {}
        self._stirred: set[int] = set()
        """Lanes that something was added to since the takers were last woken."""
        self._lent: deque[tuple[float, array[int]]] = deque()
        """When the leases of each take run out, and their rows; ended ones too, until their time comes."""
        self._called_in = 0
        """How many of `lent`, from the left, the transaction under way has dealt with."""
        self.writer = Writer(db, path, waiting, wake=self._wake, forget=self._forget)

    def put(self, db: apsw.Connection, calls: Sequence[tuple[list[Row], bool, Once | None, OwnIds]]) -> list[Put]:
        """The keys of the batches that are leased to the caller, for each call; or why none was put."""
        answers: list[Put] = []
        to_wait: list[Row] = []
        to_lease: list[Row] = []
        now = self._now()
        new_once: dict[bytes, Once] = {}
        once_keys = [once.key for _, _, once, _ in calls if once is not None]
        known_once = sqlite_records.known_once(db, once_keys, now) if once_keys else ()
        waiting = self.writer.counted
        brought: dict[bytes, Sequence[tuple[int, bytes]]] = {}
        for rows, lease, once, own_ids in calls:
            if once is not None and (once.key in known_once or once.key in new_once):
                answers.append(Repeated("This was taken before."))
                continue
            count = sum(row[4] for row in rows)
            if waiting + count > self._max_waiting:
                text = f"{waiting} notifications are waiting, {count} more would be above {self._max_waiting}"
                answers.append(Overloaded(text, retry_after_s=RETRY_AFTER_S))
                continue
            if once is not None:
                new_once[once.key] = once
            waiting += count
            (to_lease if lease else to_wait).extend(rows)
            brought.update(own_ids)
            answers.append({row[0] for row in rows} if lease else ())
        turns = self._read_turns(db)
        self._know_lanes(db, chain(to_wait, to_lease))
        sqlite_records.keep_once(db, tuple(new_once.values()), now)
        added = self._add(db, to_wait, (now, 0, None))
        self._stir(turns, {line: now for _, line, _, _ in added}.items())
        ends_at = now + self._lease_s
        lent = self._add(db, to_lease, (now, 1, ends_at))
        if lent:
            self._lent.append((ends_at, array("q", [row for row, _, _, _ in lent])))
        if brought:
            new_rows = {key: row for row, _, _, key in chain(added, lent)}
            _keep_apns_ids(db, new_rows, brought)
        if len(lent) < len(to_lease):  # some were known before
            new = {key for _, _, _, key in lent}
            answers = [each if isinstance(each, HeliographError) else new.intersection(each) for each in answers]
        self.writer.counted += sum(size for _, _, size, _ in chain(added, lent))
        return answers

    def keep(self, db: apsw.Connection, calls: Sequence[Kept]) -> list[None]:
        """Batches that nobody is to work on, with what became of them."""
        rows = [row for call in calls for row in call.rows]
        if rows:
            self._read_turns(db)
            self._know_lanes(db, rows)
            last = self._insert(db, rows)
            found: list[Any] = db.execute("SELECT id, row FROM batch WHERE row > ?", (last,)).fetchall()
            new: dict[bytes, int] = dict(found)
            _keep_apns_ids(db, new, {key: ids for call in calls for key, ids in call.own_ids.items()})
            known: list[Row] = []
            for call in calls:
                for (key, app, *_), (_, attempt, states, times_ms, details, buried) in zip(
                    call.rows, call.known, strict=True
                ):
                    row = new.pop(key, None)
                    if row is not None:
                        whose = (key, app) if buried else (None, None)
                        known.append((row, attempt, states, times_ms, details, *whose))
            sqlite_records.keep_outcomes(db, known)
        sqlite_records.hold_back(
            db, [row for call in calls for row in call.dead], [row for call in calls for row in call.held]
        )
        return [None] * len(calls)

    def _know_lanes(self, db: apsw.Connection, rows: Iterable[Row]) -> None:
        """Give those of these batches a number that have none."""
        for lane in {(row[1], row[2]) for row in rows} - self._lanes.keys():
            self._lanes[lane] = db.execute(
                "INSERT INTO lane (app, environment) VALUES (?, ?) RETURNING number", lane
            ).get

    def _insert(self, db: apsw.Connection, rows: Sequence[Row]) -> int:
        """Add batches that are not known yet; the row after which they are."""
        last: int = db.execute("SELECT coalesce(max(row), 0) FROM batch").get
        write_rows(db, _PUT, rows)
        return last

    def _add(self, db: apsw.Connection, rows: Sequence[Row], job: Row) -> list[Row]:
        """New batches and their jobs, which have due_at, attempt and leased_until in common: row, line, size, key."""
        if not rows:
            return []
        last = self._insert(db, rows)
        db.execute(_PUT_JOBS, (*job, last))
        new: list[Row] = db.execute(_NEW, (last,)).fetchall()
        return new

    def lease(self, db: apsw.Connection, calls: Sequence[tuple[int, Collection[Lane]]]) -> list[Taken]:
        """For each call, up to so many batches of lanes that are not full; void old leases first."""
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
                answers.append(Taken(db.execute(_LEASED, (apsw.carray(wanted),)).fetchall(), shut, 0.0))
            else:
                next_end = self._lent[self._called_in][0] if len(self._lent) > self._called_in else math.inf
                answers.append(Taken([], shut, min(turns.next_due(shut), next_end) - now))
        return answers

    def give_back(self, db: apsw.Connection, calls: Sequence[list[Row]]) -> list[None]:
        """Leases that nobody was there for: of row and attempt, which does not count."""
        self._stir(self._read_turns(db), write_rows(db, _GIVE_BACK, list(chain.from_iterable(calls))))
        return [None] * len(calls)

    def put_back(self, db: apsw.Connection, calls: Sequence[list[Row]]) -> list[None]:
        """Likewise those of batches that were leased as they were put: of key."""
        self._stir(self._read_turns(db), write_rows(db, _PUT_BACK, list(chain.from_iterable(calls))))
        return [None] * len(calls)

    def finish(self, db: apsw.Connection, calls: Sequence[tuple[list[Row], list[Row]]]) -> list[None]:
        """Ends of leases: of key and attempt what is done, and with a time what is due again then."""
        ended = write_rows(db, _DONE, [row for done, _ in calls for row in done])
        self.writer.counted -= sum(size for (size,) in ended)
        self._stir(self._read_turns(db), write_rows(db, _AGAIN, [row for _, again in calls for row in again]))
        return [None] * len(calls)

    def bury(self, db: apsw.Connection, calls: Sequence[tuple[Row, Row]]) -> list[None]:
        """Record what became of a batch (see `outcome_row`) and end its lease, of key and attempt."""
        record_outcomes(db, [known for known, _ in calls])
        return self.finish(db, [([end], []) for _, end in calls])

    def replay(self, db: apsw.Connection, calls: Sequence[Sequence[str]]) -> list[list[str]]:
        """Which of these notifications, by id, are sent again."""
        return [self._replay_these(db, ids) for ids in calls]

    def _replay_these(self, db: apsw.Connection, ids: Sequence[str]) -> list[str]:
        now, wall = self._now(), self._clock()
        turns = self._read_turns(db)
        wanted = _by_batch(ids)
        jobs: list[Row] = []
        known: list[Row] = []
        replayed: list[str] = []
        found: list[Row] = db.execute(_REPLAYABLE, (apsw.carray(tuple(wanted)), now)).fetchall() if wanted else []
        for row, key, created_at, size, attempt, states, times_ms, stored, line, finished in found:
            try:
                before = Outcomes(id_of(key), attempt, states, times_ms, decode_details(stored))
            except StoreError:
                continue  # damaged
            after, again = exhume(before, wanted[key].keys(), wall, wall - created_at)
            if again:
                # As though the attempt had been leased and ended: what former holders say is not recorded.
                jobs.append((row, line, size, attempt, attempt, now))
                known.append(outcome_row(after))
                replayed += [wanted[key][index] for index in again]
                self.writer.counted += size if finished else 0
        write_rows(db, _RESTART, jobs)
        record_outcomes(db, known)
        self._stir(turns, ((job[1], now) for job in jobs))
        return replayed

    def cancel(self, db: apsw.Connection, calls: Sequence[Sequence[str]]) -> list[list[str]]:
        """Which of these notifications, by id, were waiting and are cancelled now."""
        return [self._cancel_these(db, ids) for ids in calls]

    def _cancel_these(self, db: apsw.Connection, ids: Sequence[str]) -> list[str]:
        wall = self._clock()
        turns = self._read_turns(db)
        wanted = _by_batch(ids)
        jobs: list[Row] = []
        known: list[Row] = []
        over: list[int] = []
        cancelled: list[str] = []
        found: list[Row] = (
            db.execute(_CANCELLABLE, (apsw.carray(tuple(wanted)), self._now())).fetchall() if wanted else []
        )
        for row, key, created_at, size, attempt, states, times_ms, stored, line, due_at in found:
            try:
                details = decode_details(stored)
            except StoreError:
                continue  # damaged
            before = Outcomes(id_of(key), attempt, states or bytes(size), times_ms or bytes(4 * size), details)
            after, those = call_off(before, wanted[key].keys(), wall - created_at)
            if those:
                # As in `replay`: what former holders say is not recorded.
                jobs.append((row, line, size, attempt, attempt, due_at))
                known.append(outcome_row(after))
                cancelled += [wanted[key][index] for index in those]
                if not {State.QUEUED, State.SENT}.intersection(after.states):
                    over.append(row)
                    self.writer.counted -= size
        write_rows(db, _RESTART, jobs)
        record_outcomes(db, known)
        if over:
            db.execute(_OVER, (apsw.carray(array("q", over)),))
        self._stir(turns, ((job[1], job[5]) for job in jobs))
        return cancelled

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


def _keep_apns_ids(db: apsw.Connection, new: Mapping[bytes, int], own_ids: OwnIds) -> None:
    """Of these, those of new batches, by key and row."""
    those = [(new[key], place, octets) for key, ids in own_ids.items() if key in new for place, octets in ids]
    sqlite_records.keep_apns_ids(db, those)


def _by_batch(ids: Sequence[str]) -> dict[bytes, dict[int, str]]:
    """Notifications' ids by their batches' keys and their places; what is none is left out."""
    wanted: dict[bytes, dict[int, str]] = {}
    for each in ids:
        if place := parse_id(each):
            wanted.setdefault(key_of(place[0]), {}).setdefault(place[1], each)
    return wanted
