"""What is written to the SQLite store's file and changes nothing that waits or is leased (for that see `sqlite_jobs`).

Outcomes, device tokens that are held back, apps, API keys and other callers, and the removal of what is old. Nothing is
kept in memory here. Each function is a `group_commit.Work`, done for all calls of a group at once, but for those which
are part of such: `record_outcomes`, `keep_outcomes`, `keep_apns_ids`, `hold_back`, `known_once` and `keep_once`.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Collection, Sequence
from operator import itemgetter

import apsw

from heliograph.model import Once
from heliograph.stores.sqlite_file import Row
from heliograph.stores.sqlite_rows import write_rows

REMOVAL_LAPSES_S = 180 * 86400.0
"""How long a removal or a registration holds. Who never registers device tokens with us would otherwise have one held
back for ever."""

ONCE_LAPSES_S = 86400.0
"""How long a request may be repeated without being taken again."""

STEP_S = 0.003
"""How long one step of a purge may keep the writer, about."""

REVIVED_AT_ONCE = 100
"""Device tokens whose registration is written in one step; a step takes some milliseconds."""

_RECORD = """
INSERT INTO outcome (row, attempt, states, times_ms, details, buried_id, buried_app)
SELECT row, column2, column3, column4, column5,
    CASE WHEN column6 THEN column1 END, CASE WHEN column6 THEN (SELECT app FROM batch WHERE id = column1) END
FROM (VALUES {rows}) CROSS JOIN job ON row = (SELECT row FROM batch WHERE id = column1)
WHERE attempt <= column2
ON CONFLICT (row) DO UPDATE SET attempt = excluded.attempt, states = excluded.states, times_ms = excluded.times_ms,
    details = excluded.details, buried_id = excluded.buried_id, buried_app = excluded.buried_app
RETURNING (SELECT id FROM batch WHERE batch.row = outcome.row)"""

_KEEP_OUTCOMES = """
INSERT INTO outcome (row, attempt, states, times_ms, details, buried_id, buried_app) VALUES {rows}"""

_KEEP_APNS_IDS = "INSERT INTO apns_id (row, place, id) VALUES {rows}"

# What died again gets a new number, and so does what is said again after it lapsed.
_OUTDATED = f"""
DELETE FROM removal WHERE number IN (
    SELECT number FROM (VALUES {{rows}})
    CROSS JOIN removal ON app = column1 AND environment = column2 AND token = column3
    WHERE since < column4 OR recorded_at <= column5 - {REMOVAL_LAPSES_S})"""  # noqa: S608 - a number of ours

# What Apple said of a token before its registration may come to be known after it.
_REMOVE = """
INSERT INTO removal (app, environment, token, since, recorded_at)
SELECT * FROM (VALUES {rows}) WHERE NOT EXISTS (
    SELECT 1 FROM registration WHERE app = column1 AND environment = column2 AND token = column3 AND at >= column4)
ON CONFLICT (app, environment, token) DO NOTHING"""

_QUARANTINE = """
INSERT INTO quarantine (app, environment, token, until) VALUES {rows}
ON CONFLICT (app, environment, token) DO UPDATE SET until = excluded.until WHERE excluded.until > quarantine.until"""

_TELL = """
INSERT INTO told (app, environment, number) VALUES (?, ?, ?)
ON CONFLICT (app, environment) DO UPDATE SET number = excluded.number WHERE excluded.number > told.number"""

_REVIVE = """
DELETE FROM removal WHERE app = ? AND environment = ? AND token IN carray(?) AND since <= ? RETURNING token"""

_REGISTER = """
INSERT INTO registration (app, environment, token, at) SELECT ?, ?, value, ?4 FROM carray(?3) WHERE true
ON CONFLICT (app, environment, token) DO UPDATE SET at = excluded.at WHERE excluded.at > registration.at"""

_RELEASE = "DELETE FROM quarantine WHERE app = ? AND environment = ? AND token IN carray(?) RETURNING token, until"

# A UUIDv7 begins with its milliseconds (RFC 9562, section 5.7): ids are in the order of time.
_OLD = """
SELECT id, row, EXISTS (SELECT 1 FROM job WHERE job.row = batch.row) FROM batch
WHERE id > ? AND id < ? ORDER BY id LIMIT 16"""

# What has lapsed may still be there, and is as though it were not.
_KEEP_ONCE = """
INSERT INTO once (key, request, answer, kept_at) VALUES {rows} ON CONFLICT (key) DO UPDATE
SET request = excluded.request, answer = excluded.answer, kept_at = excluded.kept_at"""

_LAPSED = (
    """
DELETE FROM removal WHERE number IN (
    SELECT number FROM removal INDEXED BY removal_recorded WHERE recorded_at <= ? LIMIT 64)""",
    """
DELETE FROM quarantine WHERE (app, environment, token) IN (
    SELECT app, environment, token FROM quarantine INDEXED BY quarantine_until WHERE until <= ? LIMIT 64)""",
    """
DELETE FROM registration WHERE (app, environment, token) IN (
    SELECT app, environment, token FROM registration INDEXED BY registration_at WHERE at <= ? LIMIT 64)""",
    """
DELETE FROM once WHERE key IN (
    SELECT key FROM once INDEXED BY once_kept WHERE kept_at <= ? LIMIT 16)""",
)


def record_outcomes(db: apsw.Connection, known: Sequence[Row]) -> list[Row]:
    """The keys of the batches whose outcomes (see `outcome_row`) were recorded, each as a row."""
    return write_rows(db, _RECORD, known)


def record(db: apsw.Connection, calls: Sequence[tuple[list[Row], list[Row], list[Row]]]) -> list[Collection[bytes]]:
    """The keys of the batches that were recorded, for each call."""
    recorded: list[Collection[bytes]] = []
    for known, _, _ in calls:
        recorded.append({key for (key,) in record_outcomes(db, known)})
    hold_back(db, [row for _, dead, _ in calls for row in dead], [row for _, _, held in calls for row in held])
    return recorded


def keep_outcomes(db: apsw.Connection, known: Sequence[Row]) -> None:
    """Of batches that have none: the batch's row, and what `outcome` has in its other columns."""
    write_rows(db, _KEEP_OUTCOMES, known)


def keep_apns_ids(db: apsw.Connection, those: Sequence[Row]) -> None:
    """Of batches that have none: the batch's row, the place in it, the id's octets."""
    write_rows(db, _KEEP_APNS_IDS, those)


def hold_back(db: apsw.Connection, dead: Sequence[Row], held: Sequence[Row]) -> None:
    """Removals of app, environment, token, since and recorded_at; quarantines of app, environment, token and until."""
    if dead:
        newest = {row[:3]: row for row in sorted(dead, key=_SINCE)}
        rows = list(newest.values())
        write_rows(db, _OUTDATED, rows)
        write_rows(db, _REMOVE, rows)
    write_rows(db, _QUARANTINE, held)


_SINCE = itemgetter(3)


def tell(db: apsw.Connection, calls: Sequence[Row]) -> list[None]:
    """Of app, environment, and the number up to which its removals were told."""
    db.executemany(_TELL, calls)
    return [None] * len(calls)


def revive(db: apsw.Connection, calls: Sequence[tuple[str, str, tuple[bytes, ...], int, float]]) -> list[int]:
    """How many of an app's and environment's tokens are held back no more, as they were registered at a time.

    A call's last is the present time, by the store's own clock: a quarantine that is over holds nothing back.
    """
    answers = []
    for app, environment, tokens, at, now in calls:
        wanted = (app, environment, apsw.carray(tokens))
        db.execute(_REGISTER, (*wanted, at))
        free = {token for (token,) in db.execute(_REVIVE, (*wanted, at))}
        free.update(token for token, until in db.execute(_RELEASE, wanted) if until > now)
        answers.append(len(free))
    return answers


def known_once(db: apsw.Connection, keys: Sequence[bytes], now: float) -> set[bytes]:
    """Which of these are kept. `now` is by the store's own clock, here and below."""
    sql = "SELECT key FROM carray(?) AS wanted CROSS JOIN once ON key = wanted.value WHERE kept_at > ?"
    return {key for (key,) in db.execute(sql, (apsw.carray(tuple(keys)), now - ONCE_LAPSES_S))}


def keep_once(db: apsw.Connection, those: Sequence[Once], now: float) -> None:
    write_rows(db, _KEEP_ONCE, [(each.key, each.request, each.answer, now) for each in those])


def save_apps(db: apsw.Connection, calls: Sequence[Row]) -> list[None]:
    sql = "INSERT INTO app VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET record = excluded.record"
    db.executemany(sql, calls)
    return [None] * len(calls)


def delete_apps(db: apsw.Connection, calls: Sequence[str]) -> list[bool]:
    answers = []
    for name in calls:
        db.execute("DELETE FROM app WHERE name = ?", (name,))
        answers.append(db.changes() > 0)
    return answers


def save_keys(db: apsw.Connection, calls: Sequence[Row]) -> list[None]:
    """Rows of `api_key_row`."""
    db.executemany("REPLACE INTO api_key VALUES (?, ?, ?, ?, ?, ?, ?)", calls)
    return [None] * len(calls)


def delete_keys(db: apsw.Connection, calls: Sequence[str]) -> list[bool]:
    answers = []
    for key_id in calls:
        db.execute("DELETE FROM api_key WHERE id = ?", (key_id,))
        answers.append(db.changes() > 0)
    return answers


def save_callers(db: apsw.Connection, calls: Sequence[Row]) -> list[None]:
    """Rows of `caller_row`."""
    db.executemany("REPLACE INTO caller (id, record) VALUES (?, ?)", calls)
    return [None] * len(calls)


def delete_callers(db: apsw.Connection, calls: Sequence[str]) -> list[bool]:
    answers = []
    for caller_id in calls:
        db.execute("DELETE FROM caller WHERE id = ?", (caller_id,))
        answers.append(db.changes() > 0)
    return answers


def purge(db: apsw.Connection, calls: Sequence[tuple[bytes, bytes]]) -> list[tuple[int, bytes | None]]:
    """Delete finished batches between two ids, for one step: how many, and where the next one begins, if any."""
    answers: list[tuple[int, bytes | None]] = []
    for last, end in calls:
        count, ends_at = 0, time.monotonic() + STEP_S / len(calls)
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
                db.execute("DELETE FROM apns_id WHERE row IN carray(?)", (apsw.carray(rows),))
                db.execute("DELETE FROM batch WHERE row IN carray(?)", (apsw.carray(rows),))
                count += len(rows)
        answers.append((count, place))
    return answers


def lapse(db: apsw.Connection, calls: Sequence[float]) -> list[bool]:
    """Delete what lapsed and is no notification, for one step; whether there may be more.

    A call's argument is the time, by the store's own clock.
    """
    now = max(calls)
    ends_at = time.monotonic() + STEP_S
    ends = now - REMOVAL_LAPSES_S, now, now - REMOVAL_LAPSES_S, now - ONCE_LAPSES_S
    for sql, until in zip(_LAPSED, ends, strict=True):
        while True:
            db.execute(sql, (until,))
            if not db.changes():
                break
            if time.monotonic() >= ends_at:
                return [True] * len(calls)
    return [False] * len(calls)


def probe(db: apsw.Connection, calls: Sequence[None]) -> list[None]:
    """Have something written that changes nothing: SQLite writes the page of a number that we do not use."""
    db.execute("PRAGMA user_version = 0")
    return [None] * len(calls)
